"""--dry-run: what a run needs, computed beforehand, and what would be refused."""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_dist.checkpoints.checkpoint import DamagedError
from gpt_dist.config.command_line import parse
from gpt_dist.config.settings import Config
from gpt_dist.data.loader import Batch
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.model.empty import meta_model
from gpt_dist.model.gpt import GPT
from gpt_dist.parallel.world import World
from gpt_dist.training.dry_run import report
from gpt_dist.training.plan import disk, fitting, work
from gpt_dist.training.plan.facts import make_plan
from gpt_dist.training.plan.memory import device_bytes, state_parts
from gpt_dist.training.plan.rows import WIDTH
from gpt_dist.training.plan.work import duration
from gpt_dist.training.setup import make_engine
from tests.conftest import make_dataset, run_train, words
from tests.parallel.ranks import on_ranks

ROOT = Path(__file__).resolve().parents[2]
BIG = ["--config", "gpt2-1558m", "--ranks", "8"]
ZERO = ["--parallel.strategy", "deepspeed", "--parallel.zero_stage"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory without data, on a machine without GPU, with room on its disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(disk, "free_space", lambda directory: 1e12)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def plan(*argv: str) -> str:
    text = report(parse(["--dry-run", *argv]))
    for line in text.splitlines():  # only a long path may stand out
        assert len(line) <= WIDTH or len(line.split()) == 1, text
    return text


def row(text: str, label: str) -> str:
    """The first line of a label, or of a part of the memory."""
    return next(line for line in text.splitlines() if line.strip().startswith(label))


def gigabytes(text: str, label: str) -> float:
    match = re.search(r"([0-9.]+) GB", row(text, label))
    assert match, text
    return float(match[1])


def test_the_example_of_the_documentation() -> None:
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    text = plan(*BIG, "--device-memory", "24GB")
    assert f"--config gpt2-1558m --ranks 8 --device-memory 24GB\n{text}\n```" in page, text


@pytest.mark.parametrize(
    ("flags", "weights", "gradients", "state"),
    [
        ([], 4, 4, 8),
        ([*ZERO, "0"], 4, 4, 8),
        ([*ZERO, "1"], 4, 4, 8 / 8),
        ([*ZERO, "2"], 4, 4 / 8, 8 / 8),
        ([*ZERO, "3"], 4 / 8, 4 / 8, 8 / 8),
    ],
)
def test_the_strategy_asked_for(
    flags: list[str], weights: float, gradients: float, state: float
) -> None:
    """1,557.6M parameters on 8 ranks: bytes a parameter of ZeRO's paper, figure 1, in fp32."""
    text = plan(*BIG, *flags)
    n = 1.5576112
    for label, per_parameter in (
        ("weights", weights), ("gradients", gradients), ("optimizer state", state),
    ):  # fmt: skip
        assert gigabytes(text, label) == pytest.approx(per_parameter * n, abs=0.006), label
    assert ("ZeRO-" + flags[-1] if flags else "DDP") in row(text, "memory")


def test_muon_needs_less() -> None:
    """Momentum alone for the matrices of the 12 blocks: 12 · 12 · 768² of 124M parameters."""
    matrices = 12 * 12 * 768**2
    text = plan("--optim.name", "muon", "--optim.lr", "5e-3")
    assert gigabytes(text, "optimizer state") == pytest.approx(
        (8 * 124_439_808 - 4 * matrices) / 1e9, abs=0.006
    )
    assert "muon" in row(text, "memory")
    averaged = plan("--optim.average", "0.99")
    assert gigabytes(averaged, "optimizer state") == pytest.approx(12 * 0.1244398, abs=0.006)
    assert "8 N + 4 N (average)" in row(averaged, "optimizer state")
    shared = plan("--optim.name", "muon", "--ranks", "4")
    assert gigabytes(shared, "optimizer state") == pytest.approx(
        (8 * (124_439_808 - matrices) + 4 * matrices / 4) / 1e9, abs=0.006
    )


def test_work_and_time() -> None:
    """19,073 steps of 2^19 tokens at 6N + 12LCT, by hand."""
    text = plan("--ranks", "8", "--mfu", "50%")
    flops = 19073 * 2**19 * (6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024)
    assert f"{flops:.3g} FLOPs" in row(text, "compute")
    minutes = flops / (989e12 * 0.5 * 8) / 60
    assert f"{minutes:.3g} min on 8 H100s" in row(text, "time")
    assert "at 50% of peak" in row(text, "time")
    assert "8 ranks × 4 micro-batches × 16 sequences × 1,024" in row(text, "step")
    single = plan("--train.batch_tokens", "1024")
    assert "1 rank × 1 micro-batch × 1 sequence × 1,024" in row(single, "step")
    assert [duration(s) for s in (30, 90, 5400, 86400 * 3)] == [
        "30 s",
        "1.5 min",
        "1.5 h",
        "3 days",
    ]


def test_the_time_of_a_cpu_is_measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "peak_flops", lambda device, dtype: 1e9)
    text = plan("--config", "demo", "--ranks", "2", "--mfu", "0.1")
    command = make_plan(parse(["--dry-run", "--config", "demo"]))
    flops = 400 * 4096 * command.model.flops_per_token()
    assert f"{duration(flops / 1e8)} on 1 CPU" in row(text, "time")


def test_disk() -> None:
    assert "18.7 GB a checkpoint, 4 at the same time: 74.8 GB" in row(plan(*BIG), "disk")
    assert "1 TB free here" in plan(*BIG)
    kept = plan(*BIG, "--train.keep_every", "1000")  # 19 more of them
    assert "23 at the same time" in row(kept, "disk")


@pytest.mark.slow(2)
def test_what_does_not_fit_is_told_what_does() -> None:
    for memory in ("80GB", "40GB", "24GB", "16GB", "12GB"):
        text = plan(*BIG, "--device-memory", memory)
        if "DOES NOT FIT" not in text:
            assert f"fits the {memory[:-2]} GB named" in text
            continue
        lines = text.split("this does:\n")[1].splitlines()
        flags = [word for line in lines if line.strip().startswith("--") for word in line.split()]
        assert f"fits the {memory[:-2]} GB named" in plan(*BIG, "--device-memory", memory, *flags)
    assert "DOES NOT FIT the 1 GB named" in plan(*BIG, "--device-memory", "1GB")
    assert "this does" not in plan(*BIG, "--device-memory", "1GB")
    # Cheapest first: a smaller micro-batch costs nothing.
    small = plan("--ranks", "1", "--device-memory", "6GB")
    assert "--train.micro_batch_size" in small.split("this does:")[1].splitlines()[1]


def test_the_device_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        name, total_memory = "NVIDIA H100 80GB HBM3", 80e9

    monkeypatch.setattr(fitting, "device_memory", fitting.device_memory)
    text = plan("--config", "demo", "--device", "cpu")
    assert "fits this machine's" in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: Found.name)
    text = plan("--ranks", "8")
    assert "fits 80 GB (NVIDIA H100 80GB HBM3)" in text
    assert "on 8 NVIDIA H100 80GB HBM3s" in " ".join(text.split())


# --- data -----------------------------------------------------------------------------------------


def test_without_data() -> None:
    text = plan()
    assert "N = 124,439,808" in text
    assert "19,073 (10B tokens)" in text
    flat = " ".join(text.split())
    assert "make it with: python -m gpt_dist.prepare fineweb-edu --variant sample-10BT" in flat
    assert row(text, "not checked")
    assert "vocabulary 71 (assumed: characters" in " ".join(
        plan("--config", "shakespeare-char", "--device", "cpu").split()
    )
    unknown = plan("--config", "tinystories-124m")
    assert "unknown without the data" in row(unknown, "steps")
    assert "time" not in [line[:4] for line in unknown.splitlines()]
    assert not list(Path().iterdir())


@pytest.mark.slow(2)
def test_a_mixture(tmp_path: Path) -> None:
    """Shares, tokens and epochs by hand: 20 steps of 1,024 tokens, a quarter from the first."""
    text = words(2_000)
    one = make_dataset(tmp_path / "one", text, words(300, 1))
    other = tmp_path / "other"
    make_dataset(other, text + text)
    flags = ["--data.path", f"{one}:1,{other}:3", "--data.tokenizer", str(one)]
    flags += ["--model.context_length", "32", "--train.batch_tokens", "1024", "--train.steps", "20"]
    flags += ["--model.n_embd", "12", "--optim.warmup_steps", "1", "--device", "cpu"]
    shown = plan(*flags)
    first = next(line.split() for line in shown.splitlines() if line.strip().startswith("25.0%"))
    second = next(line.split() for line in shown.splitlines() if line.strip().startswith("75.0%"))
    windows = [(size - 32 - 1 - 31) // 32 + 1 for size in (len(text), 2 * len(text))]
    assert first[1] == f"{len(text) / 1e3:.3g}k"
    assert second[2] == "0"  # no validation split
    assert (first[3], second[3]) == ("5.12k", "15.4k")
    assert first[4] == f"{160 / windows[0]:.2f}"
    assert second[4] == f"{480 / windows[1]:.2f}"
    assert "not checked" not in shown
    overlapping = plan(*flags, "--data.stride", "8")
    assert "each token 4 times" in " ".join(overlapping.split())
    half = plan("--data.path", f"{one}:1,{tmp_path}/none:1", *flags[2:])
    assert "50.0%" in half
    assert f"{tmp_path}/none is not there" in " ".join(half.split())


def test_no_validation_data(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "one", words(2_000))
    text = plan("--config", "shakespeare-char-cpu", "--data.path", str(data),
                "--data.tokenizer", str(data))  # fmt: skip
    assert "no validation data" in text


# --- what is checked ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--resume", "runs/none"], "runs/none: no such run, checkpoint or model directory"),
        (["--train.init_from", "runs/none"], "runs/none: no such run"),
        ([*ZERO, "1", "--parallel.deepspeed_config", "none.json"], "none.json: No such file"),
        (["--eval.hellaswag_every", "5", "--eval.hellaswag_path", "none.jsonl"], "none.jsonl"),
        (["--data.tokenizer", "none"], "tokenizer none: no such tokenizer"),
        (["--ranks", "7"], "1024 * 7"),
    ],
)
def test_what_would_be_refused_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        plan(*flags)


def test_deepspeed_settings_that_conflict(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(UsageError, match=r"conflicts with zero_optimization\.stage = 2"):
        plan(*BIG, *ZERO, "2", "--parallel.deepspeed_config", str(file))
    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 10_000_000}}))
    text = plan(*BIG, *ZERO, "2", "--parallel.deepspeed_config", str(file))
    assert gigabytes(text, "bucket") == 0.04


def test_where_it_continues(finished: Config, tiny_config: Callable[..., Path]) -> None:
    flags = ["--config", str(tiny_config()), "--out_dir", finished.out_dir]
    text = " ".join(plan(*flags, "--train.steps", "40").split())
    assert f"continues {finished.out_dir}/checkpoints/step-00000020, step 20" in text
    assert "changed: train.steps 20 → 40" in text
    with pytest.raises(UsageError, match="seed = 9: the run in"):
        plan(*flags, "--seed", "9")
    for step in (10, 20):
        file = Path(finished.out_dir) / f"checkpoints/step-000000{step}/model.safetensors"
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DamagedError, match="no earlier checkpoint"):
        plan(*flags)


def test_the_shape_of_init_from(finished: Config) -> None:
    text = plan("--train.init_from", finished.out_dir, "--train.batch_tokens", "64")
    assert "2 layers, 2 heads, width 32, context 32" in row(text, "model")
    with pytest.raises(UsageError, match=r"model\.n_layer = 5"):
        plan("--train.init_from", finished.out_dir, "--model.n_layer", "5")
    file = Path(finished.out_dir) / "checkpoints/step-00000020/model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(GptDistError, match=r"model\.safetensors"):
        plan("--train.init_from", finished.out_dir, "--train.batch_tokens", "64")


@pytest.mark.slow
def test_printed_once_under_torchrun(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    done = run_train(tiny_config(), tmp_path / "run", "--dry-run", ranks=2)
    assert done.stdout.count("parameters   N = ") == 1
    assert "2 ranks × 2 micro-batches × 8 sequences × 32" in done.stdout
    assert not (tmp_path / "run").exists()


# --- the formulas against real engines ------------------------------------------------------------

BUCKET = 4096
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    **{f"zero-{stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)},
    **{f"offload-{stage}": {"zero_stage": stage, "offload": True} for stage in (2, 3)},
    "muon": {},
    **{f"muon-{stage}": {"zero_stage": stage} for stage in (1, 3)},
}


def live() -> dict[int, int]:
    """Address → bytes of every tensor's memory in this process, gradients included."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor):
            continue
        for tensor in (thing, thing.grad if thing.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def held(before: dict[int, int]) -> int:
    """Bytes of the tensors that came since, without what gloo's threads let go within moments."""
    found = []
    for _ in range(3):
        found.append(sum(size for at, size in live().items() if at not in before))
        time.sleep(0.05)
    return min(found)


def measured(world: World, file: str) -> dict[str, tuple[float, float]]:
    """Strategy → largest number of bytes between passes, and the formula's."""
    found = {}
    shape = {"n_layer": 8, "n_head": 2, "n_embd": 64, "context_length": 16, "vocab_size": 128}
    for name, parallel in STRATEGIES.items():
        settings = {"strategy": "deepspeed", "deepspeed_config": file} | parallel
        config = Config.model_validate(
            {
                "model": shape,
                "train": {"batch_tokens": 64, "micro_batch_size": 1, "precision": "fp32"},
                "parallel": settings if parallel else {},
                "optim": {"name": "muon" if name.startswith("muon") else "adamw"},
            }
        )
        before = live()
        engine = make_engine(GPT(config.model), world, config, torch.float32)
        ids = torch.zeros(1, 16, dtype=torch.int64)
        sizes = []
        for last in (False, True):
            engine.micro_step(Batch(ids, ids), last=last)
            sizes.append(held(before))
        parts = state_parts(meta_model(config.model), config, world.size)
        bucket = 4 * BUCKET if parallel.get("zero_stage") else 0
        found[name] = max(sizes), sum(part.size for part in parts) + bucket
        del engine
    return found


@pytest.mark.slow
def test_the_formulas_are_what_engines_hold(tmp_path: Path) -> None:
    """Two ranks on a CPU: host and device are the same memory there."""
    file = tmp_path / "ds.json"
    settings = {"reduce_bucket_size": BUCKET, "stage3_param_persistence_threshold": 0}
    settings |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    file.write_text(json.dumps({"zero_optimization": settings}))
    for found in on_ranks(measured, str(file)):
        for name, (size, formula) in found.items():
            assert size == pytest.approx(formula, rel=0.015), name


def test_a_smaller_share_is_never_more() -> None:
    """More ranks, a higher stage: each rank holds less of weights, gradients and state."""
    config = Config(model={"vocab_size": 50257, "n_layer": 1})
    model = meta_model(config.model)
    sizes = [
        device_bytes(state_parts(model, fitting.with_zero(config, stage), ranks))
        for stage in (1, 2, 3)
        for ranks in (2, 4, 64)
    ]
    assert sizes[:3] == sorted(sizes[:3], reverse=True)
    assert sizes[2] > sizes[5] > sizes[8]
