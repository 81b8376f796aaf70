"""What the run writes."""

from __future__ import annotations

import shutil
from pathlib import Path

from gpt_dist.training.plan.facts import Plan
from gpt_dist.training.plan.memory import optimizer_bytes
from gpt_dist.training.plan.rows import Row
from gpt_dist.training.reporting.formatting import file_size


def disk_rows(plan: Plan) -> list[Row]:
    """Size of the checkpoints that are on the disk at the same time, and whether they fit."""
    train = plan.config.train
    one = 4.0 * plan.parameters + optimizer_bytes(plan.model, plan.config)[0]
    for_good = (plan.steps or 0) // train.keep_every if train.keep_every else 0
    spared = plan.config.optim.schedule == "wsd" and train.checkpoint_every > 0
    kept = train.keep_checkpoints + 1 + for_good + spared
    # The next one is written before the oldest goes.
    need, free = one * (kept + 1), free_space(Path(plan.config.out_dir))
    text = f"{file_size(one)} a checkpoint, {kept + 1} at the same time: {file_size(need)}; "
    fits = f"{file_size(free)} free here"
    return [Row("disk", text + (fits if need <= free else f"DOES NOT FIT: {fits}"))]


def free_space(directory: Path) -> float:
    """Bytes that are free where a directory is, or would be made."""
    existing = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    return shutil.disk_usage(existing).free
