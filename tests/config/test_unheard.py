"""Settings that another one switches off: refused, a warning, or silent."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gpt_dist.config.command_line import load, parse, presets
from gpt_dist.config.settings import flags, to_yaml
from gpt_dist.config.unheard import RULES
from gpt_dist.errors import UsageError

BIGRAM = ["--config", "bigram-shakespeare-char"]
REFUSED = [
    (["--parallel.zero_stage", "2"], "parallel.zero_stage = 2", "parallel.strategy = deepspeed"),
    (["--parallel.zero_stage", "1"], "parallel.zero_stage = 1", "parallel.strategy = ddp"),
    (
        ["--train.residual", "bf16", "--train.precision", "fp32"],
        "train.residual = bf16",
        "train.precision = fp32",
    ),
    (
        ["--config", "tinystories-124m", "--train.steps", "900"],
        "train.steps = 900",
        "train.epochs = 1",
    ),
    (
        ["--data.rows", "documents", "--data.stride", "8"],
        "data.stride = 8",
        "data.rows = documents",
    ),
    (["--optim.schedule", "constant", "--optim.min_lr", "1e-5"], "optim.min_lr = 1e-05", "cosine"),
    (["--optim.momentum", "0.9"], "optim.momentum = 0.9", "optim.name = muon"),
    (["--optim.momentum_start", "0.9"], "optim.momentum_start = 0.9", "optim.name = adamw"),
    (["--optim.momentum_warmup_steps", "9"], "optim.momentum_warmup_steps = 9", "= adamw"),
    (["--optim.nesterov", "false"], "optim.nesterov = false", "optim.name = adamw"),
    (["--optim.newton_schulz_steps", "9"], "optim.newton_schulz_steps = 9", "= adamw"),
    (
        ["--optim.newton_schulz_precision", "fp32"],
        "optim.newton_schulz_precision = fp32",
        "= adamw",
    ),
    (["--optim.split_qkv", "false"], "optim.split_qkv = false", "optim.name = adamw"),
    (
        ["--optim.newton_schulz_coefficients", "2,-1.5,0.5"],
        "optim.newton_schulz_coefficients = 2,-1.5,0.5",
        "optim.name = muon",
    ),
    (["--optim.decay_share", "0.3"], "optim.decay_share = 0.3", "optim.schedule = wsd"),
    (["--optim.decay_shape", "sqrt"], "optim.decay_shape = sqrt", "optim.schedule = cosine"),
    (
        ["--optim.schedule", "wsd", "--optim.decay_power", "3"],
        "optim.decay_power = 3",
        "optim.decay_shape = linear",
    ),
    (["--optim.average_share", "0.5"], "optim.average_share = 0.5", "optim.average above 0"),
    (
        ["--optim.name", "muon", "--optim.momentum_start", "0.8"],
        "optim.momentum_start = 0.8",
        "optim.momentum_warmup_steps = 0",
    ),
    ([*BIGRAM, "--optim.name", "muon"], "optim.name = muon", "model.n_layer = 0"),
]
WARNED = [
    (["--eval.hellaswag_path", "x.jsonl"], "eval.hellaswag_path = x.jsonl", "hellaswag_every = 0"),
    (["--train.eval_every", "0", "--train.eval_tokens", "64"], "train.eval_tokens = 64", "above 0"),
    (["--train.eval_every", "0", "--train.best_every", "5"], "train.best_every = 5", "above 0"),
    ([*BIGRAM, "--model.dropout", "0.1"], "model.dropout = 0.1", "model.n_layer = 0"),
    ([*BIGRAM, "--model.n_head", "2"], "model.n_head = 2", "model.n_layer = 0"),
    ([*BIGRAM, "--model.mlp_hidden", "64"], "model.mlp_hidden = 64", "model.n_layer = 0"),
    ([*BIGRAM, "--model.bias", "true"], "model.bias = true", "model.n_layer = 0"),
    ([*BIGRAM, "--model.qkv_bias", "true"], "model.qkv_bias = true", "model.n_layer = 0"),
    ([*BIGRAM, "--model.n_kv_head", "1"], "model.n_kv_head = 1", "model.n_layer = 0"),
    (
        [*BIGRAM, "--model.zero_projections", "true"],
        "model.zero_projections = true",
        "model.n_layer = 0",
    ),
    (
        [*BIGRAM, "--model.activation_checkpointing", "true"],
        "model.activation_checkpointing = true",
        "model.n_layer = 0",
    ),
    (
        ["--train.profile", "true", "--train.steps", "5", "--optim.warmup_steps", "1"],
        "train.profile = true",
        "train.steps = 5",
    ),
]


@pytest.mark.parametrize(("argv", "setting", "why"), REFUSED)
def test_refused(argv: list[str], setting: str, why: str) -> None:
    with pytest.raises(UsageError) as refused:
        load(argv)
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{setting}: has no effect with ")
    assert why in line


@pytest.mark.parametrize(("argv", "setting", "why"), WARNED)
def test_warned(
    argv: list[str], setting: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {setting}: has no effect with ")
    assert why in line


def test_every_rule_is_tested() -> None:
    text = " ".join(setting for _, setting, _ in REFUSED + WARNED)
    for rule in RULES:
        for flag in rule.settings:
            assert f"{flag} = " in text, flag


def test_only_rank_0_warns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    load(WARNED[0][0])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("preset", presets())
def test_presets_and_what_they_become_are_silent(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the config.yaml of such a run, which sets everything."""
    config, _ = load(["--config", preset])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert load(["--config", str(file)])[0] == config
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["--optim.schedule", "constant"],
        ["--config", "tinystories-124m", "--train.epochs", "2"],
        ["--config", "tinystories-124m", "--train.epochs", "null", "--train.steps", "900"],
        ["--train.epochs", "2", "--train.steps", "null"],
        ["--train.eval_every", "0"],
        ["--parallel.strategy", "deepspeed", "--parallel.zero_stage", "2"],
        ["--optim.schedule", "constant", "--optim.min_lr", "6e-4"],  # the learning rate itself
        ["--optim.schedule", "constant", "--optim.lr", "1e-6"],  # below the preset's min_lr
        [*BIGRAM, "--optim.lr", "0.1"],
    ],
)
def test_what_is_heard_is_silent(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    load(argv)
    assert capsys.readouterr().err == ""


def test_a_file_that_sets_both_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be the config.yaml of a run of an earlier release; the run itself is not refused."""
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"parallel": {"zero_stage": 2}}))
    with pytest.raises(UsageError, match=r"parallel\.zero_stage = 2: has no effect"):
        load(["--config", str(file)])
    file.write_text(yaml.safe_dump({"parallel": {"zero_stage": 2, "strategy": "ddp"}}))
    load(["--config", str(file)])
    assert capsys.readouterr().err.startswith("warning: parallel.zero_stage = 2: has no effect")
    file.write_text(yaml.safe_dump({"parallel": {"zero_stage": 2, "strategy": "deepspeed"}}))
    load(["--config", str(file)])
    assert capsys.readouterr().err == ""
    load(["--config", str(file), "--parallel.strategy", "ddp"])  # a comparison, say
    assert capsys.readouterr().err.startswith("warning: parallel.zero_stage = 2")
    file.write_text(yaml.safe_dump({"parallel": {"strategy": "ddp"}}))
    with pytest.raises(UsageError, match=r"parallel\.zero_stage = 3: has no effect"):
        load(["--config", str(file), "--parallel.zero_stage", "3"])


def test_all_problems_come_together() -> None:
    with pytest.raises(UsageError) as refused:
        load(["--parallel.zero_stage", "2", "--model.n_head", "5", "--train.epochs", "2",
              "--train.steps", "5"])  # fmt: skip
    assert len(str(refused.value).splitlines()) == 3


def test_what_the_user_gave(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\noptim: {lr: 1e-3}\n")
    given = parse(["--config", str(file), "--optim.lr", "2e-3", "--device", "cpu"]).given
    assert given == {"seed": "file", "optim.lr": "command line", "device": "command line"}
    assert parse(["--config", "demo"]).given == {}
    assert set(given) <= set(flags())


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--ranks", "8"], "--ranks: valid only with --dry-run"),
        (["--mfu", "0.4"], "--mfu: valid only with --dry-run"),
        (["--device-memory", "80GB"], "--device-memory: valid only with --dry-run"),
        (["--dry-run", "--ranks", "0"], "--ranks 0: valid is a whole number from 1 on"),
        (["--dry-run", "--ranks", "many"], "--ranks many: valid is a whole number from 1 on"),
        (["--dry-run", "--mfu", "40"], "--mfu 40: valid is a share"),
        (["--dry-run", "--mfu", "0"], "--mfu 0: valid is a share"),
        (["--dry-run", "--device-memory", "big"], "--device-memory big: valid is a size such as"),
        (["--dry-run", "--device-memory", "0GB"], "--device-memory 0GB: valid is a size such as"),
        (["--dry-run", "--rank", "8"], "--rank: no such setting; did you mean ranks?"),
    ],
)
def test_options_of_the_dry_run(argv: list[str], line: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(argv)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_values_of_the_dry_run() -> None:
    plan = parse(["--dry-run", "--ranks", "8", "--mfu", "35%", "--device-memory", "24GiB"]).plan
    assert plan == (8, 0.35, 24 * 2**30)
    assert parse(["--dry-run", "--device-memory=80 GB"]).plan.device_memory == 80e9
    assert parse(["--dry-run", "--device-memory", "80g"]).plan.device_memory == 80e9
    with pytest.raises(UsageError, match=r"model.context_length \* ranks = 1024 \* 7"):
        parse(["--dry-run", "--ranks", "7"])
