"""DeepSpeed ZeRO follows DDP, and checkpoints pass between all engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from gpt_dist.config.command_line import build
from gpt_dist.errors import UsageError
from gpt_dist.parallel.zero import build_config
from tests.conftest import column, make_dataset, read_rows, run_train, train_many, words
from tests.training.test_training import worst_relative

Config = Callable[..., Path]


SETTINGS = Path(__file__).with_name("partition_everything.json")
"""DeepSpeed settings under which ZeRO-3 gathers every parameter in every pass, and releases it.

By default parameters below 100,000 elements stay whole on every rank, and those used again within
10⁹ elements stay gathered: all of a test's, so that its forward passes would not be collective.
"""


def zero(stage: int) -> list[str]:
    return [
        *("--parallel.strategy", "deepspeed", "--parallel.zero_stage", str(stage)),
        *("--parallel.deepspeed_config", str(SETTINGS)),
    ]


STAGES = (0, 1, 2, 3)


@pytest.mark.slow(40)
def test_what_happens_between_steps(tiny_config: Config, tiny_data: Path, tmp_path: Path) -> None:
    """Validation, HellaSwag and samples when there is not the same work for every rank."""
    small = make_dataset(tmp_path / "small", words(2000, 2), words(40, 3))
    rows = [
        {"activity_label": "x", "ctx_a": "the", "ctx_b": "cat", "ctx": "the cat sat",
         "endings": ["on mat", "over hill", "to"][: 3 if n == 0 else 2], "label": n % 2}
        for n in range(16)
    ]  # fmt: skip
    hellaswag = tmp_path / "hellaswag.jsonl"
    hellaswag.write_text("\n".join(map(json.dumps, rows)))
    config = tiny_config(
        # 33 windows of one data set, 5 of the other and 33 endings, in batches of 8, 8 and 16.
        data={"path": {str(tiny_data): 2.0, str(small): 1.0}},
        train={
            "eval_tokens": 33 * 32,
            "sample_every": 3,
            "eval_every": 3,
            "steps": 6,
            "health_every": 1,
        },
        optim={"warmup_steps": 5},
        eval={"hellaswag_every": 3, "hellaswag_path": str(hellaswag)},
    )
    offload = ["--parallel.offload", "true"]
    runs = {"ddp": [], **{f"zero-{stage}": zero(stage) for stage in STAGES}}
    runs |= {f"offload-{stage}": [*zero(stage), *offload] for stage in (2, 3)}
    train_many(
        [["--config", str(config), "--out_dir", str(tmp_path / name), *flags]
         for name, flags in runs.items()],
        tmp_path, ranks=2,
    )  # fmt: skip
    for name in runs:
        for key in (
            "train_loss", "val_loss", "val_bpb", "val_loss/tiny", "val_loss/small",
            "hellaswag_acc", "hellaswag_acc_norm", "update_ratio/matrices",
            "momentum_cosine/vectors",
        ):  # fmt: skip
            expected, found = column(tmp_path / "ddp", key), column(tmp_path / name, key)
            assert len(expected) >= 3
            assert worst_relative(expected, found) < 1e-5, (name, key)
        samples = (tmp_path / name / "samples.txt").read_text()
        assert samples == (tmp_path / "ddp" / "samples.txt").read_text(), name


@pytest.mark.slow(50)
def test_every_stage_follows_ddp(tiny_config: Config, tmp_path: Path) -> None:
    runs = {}
    # The validation has 20 windows, uneven on 2 ranks.
    short = {"steps": 6, "checkpoint_every": 0, "eval_every": 6, "eval_tokens": 20 * 32}
    # A weight that differs in its last fp32 bit may round to another bf16 number; the larger the
    # steps, the faster such differences grow: to 1.03e-3 in 20 steps at 3e-3.
    nanochat = {"architecture": "nanochat", "n_kv_head": 1}
    muon = {"name": "muon", "newton_schulz_precision": "fp32"}
    for precision, model, optim, clip in (
        ("fp32", nanochat, {**muon, "lr": 3e-3}, 0.1),
        ("bf16", {}, {"lr": 1e-3}, 0.0),
    ):
        config = tiny_config(
            model=model,
            train={"precision": precision, **short},
            optim={"warmup_steps": 6, "grad_clip": clip, **optim},
        )
        runs[f"{precision}-ddp"] = [config, []]
        runs |= {f"{precision}-{stage}": [config, zero(stage)] for stage in STAGES}
    train_many(
        [["--config", str(config), "--out_dir", str(tmp_path / name), *flags]
         for name, (config, flags) in runs.items()],
        tmp_path, ranks=2,
    )  # fmt: skip
    for kind, tolerance in (("fp32", 1e-6), ("bf16", 1e-3)):
        for stage in STAGES:
            for key in ("train_loss", "grad_norm", "val_loss"):
                reference = column(tmp_path / f"{kind}-ddp", key)
                measured = column(tmp_path / f"{kind}-{stage}", key)
                assert worst_relative(reference, measured) < tolerance, (kind, stage, key)
    assert min(column(tmp_path / "fp32-ddp", "grad_norm")) > 0.1  # it did clip


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_skips_and_aborts_as_ddp(
    tiny_config: Config, tmp_path: Path, stage: int
) -> None:
    broken = tiny_config(
        optim={"lr": 1e18, "min_lr": 1e18, "schedule": "constant"},
        train={"eval_every": 0, "checkpoint_every": 0},
    )
    done = run_train(broken, tmp_path / "run", *zero(stage), ranks=2, check=False)
    assert done.returncode == 1
    assert done.stderr.count("not finite 10 times in a row") == 1
    norms = column(tmp_path / "run", "grad_norm")
    assert norms[-10:] == [None] * 10
    assert all(norm is not None for norm in norms[:-10])
    assert len(norms) > 10


ENGINES = {
    "ddp-1": (1, []),
    "ddp-2": (2, []),
    "zero1-2": (2, zero(1)),
    "zero2-2": (2, zero(2)),
    "zero3-2": (2, zero(3)),
    "offload2-2": (2, [*zero(2), "--parallel.offload", "true"]),
    "offload3-2": (2, [*zero(3), "--parallel.offload", "true"]),
    "ddp-4": (4, []),
    "zero1-4": (4, zero(1)),
    "zero2-4": (4, zero(2)),
    "zero3-4": (4, zero(3)),
}


@pytest.mark.slow(90)
def test_checkpoints_pass_between_all_engines(tiny_config: Config, tmp_path: Path) -> None:
    """Two steps under one engine and two under another follow the uninterrupted run."""
    config = tiny_config(
        model={"n_layer": 1},
        optim={"schedule": "constant", "warmup_steps": 1, "lr": 1e-3},
        train={"steps": 4, "checkpoint_every": 2, "eval_every": 0},
    )
    base = ["--config", str(config), "--out_dir"]

    def begin(name: str) -> list[list[str]]:
        return [[*base, str(tmp_path / name), *ENGINES[name][1]]]

    def follow(first: str, second: str) -> list[list[str]]:
        out = str(tmp_path / f"{first}-to-{second}")
        return [
            ["--copy", str(tmp_path / first), out, "step-00000004"],
            [*base, out, *ENGINES[second][1]],
        ]

    two = ["ddp-2", "zero1-2", "zero2-2", "zero3-2"]
    four = ["ddp-4", "zero1-4", "zero2-4", "zero3-4"]
    train_many([*begin("ddp-1"), *follow("ddp-1", "ddp-1")], tmp_path)
    runs = [run for name in two for run in (*begin(name), *follow(name, name))]
    offloaded = ["offload2-2", "offload3-2"]
    runs += [run for name in offloaded for run in (*begin(name), *follow(name, name))]
    pairs = [pair for pair in product(["ddp-1", *two], two) if pair[0] != pair[1]]
    runs += [run for pair in pairs for run in follow(*pair)]
    train_many(runs, tmp_path, ranks=2)
    train_many([run for name in two for run in follow(name, "ddp-1")], tmp_path)
    train_many([run for n in four for run in (*begin(n), *follow(n, n))], tmp_path, ranks=4)

    reference = column(tmp_path / "ddp-2", "train_loss")
    same = [(name, name) for name in ENGINES]
    to_one = [(name, "ddp-1") for name in two]
    assert len({*same, *pairs, *to_one}) == 5 * 5 + 4 + 2
    for first, second in [*same, *pairs, *to_one]:
        losses = column(tmp_path / f"{first}-to-{second}", "train_loss")
        assert worst_relative(reference, losses) < 1e-5, (first, second)
    for name in ENGINES:
        out, whole = tmp_path / f"{name}-to-{name}", tmp_path / name
        assert read_rows(out, timing=False) == read_rows(whole, timing=False), name
        for file in ("model.safetensors", "optimizer.safetensors"):
            a, b = (run / "checkpoints/step-00000004" / file for run in (out, whole))
            assert a.read_bytes() == b.read_bytes(), (name, file)
            assert a.stat().st_mtime_ns > b.stat().st_mtime_ns  # computed, not copied


def test_a_file_of_deepspeed_settings_adds_and_never_contradicts(tmp_path: Path) -> None:
    file = tmp_path / "extra.json"
    parallel = {"strategy": "deepspeed", "zero_stage": 2, "deepspeed_config": str(file)}
    config = build({"parallel": parallel})
    import torch

    file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}}))
    built = build_config(config, torch.bfloat16, 8)
    assert built["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert built["gradient_clipping"] == 1.0
    assert built["data_types"]["grad_accum_dtype"] == "fp32"
    for extra, named in (
        ({"gradient_clipping": 0.5}, "gradient_clipping"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage"),
        ({"optimizer": {"type": "Adam"}}, "optim"),
        ({"bf16": {"enabled": True}}, "train.precision"),
    ):
        file.write_text(json.dumps(extra))
        with pytest.raises(UsageError, match=named):
            build_config(config, torch.bfloat16, 8)
    file.write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        build_config(config, torch.bfloat16, 8)
