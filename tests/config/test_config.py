"""Settings: all problems at once, one line each; presets; files and flags agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gpt_dist import train
from gpt_dist.config import help
from gpt_dist.config.command_line import build, flags, load, parse_settings, presets
from gpt_dist.config.settings import Config, to_yaml
from gpt_dist.errors import UsageError
from gpt_dist.model.gpt import GPT

NANOCHAT = ["--model.architecture", "nanochat"]


def problems(*argv: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        load(list(argv))
    return str(caught.value).splitlines()


def test_every_preset_loads_and_survives_yaml() -> None:
    assert {"gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1558m", "shakespeare-char",
            "shakespeare-char-cpu", "bigram-shakespeare-char",
            "tinystories-124m", "nanochat-124m", "nanochat-350m", "tinystories-modern",
            "shakespeare-char-modern"} <= set(presets())  # fmt: skip
    for name in presets():
        config, _ = load(["--config", name])
        assert build(parse_settings(to_yaml(config))) == config


def test_an_architecture_has_its_own_defaults() -> None:
    """They do not count as given, so weights to start from may still say otherwise."""
    model = build({"model": {"architecture": "nanochat"}}).model
    assert (model.bias, model.tie_embeddings, model.norm) == (False, False, "pre")
    assert model.model_fields_set == {"architecture"}
    tied = load([*NANOCHAT, "--model.tie_embeddings", "true", "--model.bias", "false"])[0].model
    assert tied.tie_embeddings
    assert load([])[0].model.tie_embeddings


def test_the_default_is_the_paper_recipe() -> None:
    config, dry_run = load([])
    assert not dry_run
    assert (config.train.steps, config.train.batch_tokens) == (19073, 524288)
    assert (config.optim.lr, config.optim.min_lr, config.optim.warmup_steps) == (6e-4, 6e-5, 715)
    assert config == Config()  # and the defaults of the code are the same


@pytest.mark.parametrize(
    ("name", "millions"), [("gpt2-124m", 124.4), ("gpt2-350m", 354.8), ("gpt2-774m", 774.0),
                           ("gpt2-1558m", 1557.6)],
)  # fmt: skip
def test_presets_have_the_published_sizes(name: str, millions: float) -> None:
    import torch

    config, _ = load(["--config", name, "--model.vocab_size", "50257"])
    with torch.device("meta"):
        assert GPT(config.model).num_parameters() / 1e6 == pytest.approx(millions, abs=0.05)


def test_all_problems_at_once() -> None:
    found = problems(
        "--config", "shakespeare-char", "--trian.steps", "5", "--train.steps", "many",
        "--model.norm", "middle", "--train.compile", "7", "--optim.lr", "-1", "--optim.beta1", "2",
        "--data.path", "{}",
    )  # fmt: skip
    text = "\n".join(found)
    assert len(found) == 7
    assert "--trian.steps: no such setting; did you mean train.steps?" in found
    for key, value, valid in (
        ("train.steps", "many", "a whole number"),
        ("model.norm", "middle", "pre | post"),
        ("train.compile", "7", "auto | true | false"),
        ("optim.lr", "-1", "greater than 0"),
        ("optim.beta1", "2", "less than 1"),
        ("data.path", "{}", "DIR"),
    ):
        line = next(line for line in found if line.startswith(f"{key} = {value}"))
        assert valid in line, text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.n_head", "5"], "model.n_head = 5: must divide model.n_embd = 768"),
        (
            ["--model.n_kv_head", "4"],
            "model.n_kv_head = 4: model.architecture = gpt2 has n_head of",
        ),
        ([*NANOCHAT, "--model.n_kv_head", "5"], "n_kv_head = 5: must divide model.n_head = 12"),
        ([*NANOCHAT, "--model.bias", "true"], "model.bias = true: model.architecture = nanochat"),
        ([*NANOCHAT, "--model.norm", "post"], "model.norm = post: model.architecture = nanochat"),
        ([*NANOCHAT, "--model.n_layer", "0"], "model.n_layer = 0: model.architecture = nanochat"),
        ([*NANOCHAT, "--model.n_head", "256"], "nanochat rotates pairs of channels"),
        (["--model.architecture", "llama"], "valid: gpt2 | nanochat"),
        (["--model.architecture", "[a]"], "valid: gpt2 | nanochat"),
        ([*NANOCHAT, "--optim.rates.vectors.lr", "1e-3"], "optim.rates.vectors: model.archi"),
        (["--model.zero_head", "true"], "needs model.tie_embeddings = false"),
        (["--train.batch_tokens", "1000"], "for example 1024"),
        (["--optim.min_lr", "1"], "optim.min_lr = 1: must be at most optim.lr"),
        (["--train.steps", "null"], "set train.steps or train.epochs"),
        (["--train.steps", "100"], "optim.warmup_steps = 715: must be at most train.steps = 100"),
        (["--parallel.zero_stage", "5"], "parallel.zero_stage = 5"),
        (["--parallel.offload", "true"], "needs parallel.strategy = deepspeed"),
        (["--config", "nothing"], "no such file or preset; presets: bigram-shakespeare-char"),
        (["--model.n_layer"], "--model.n_layer: needs a value"),
        (["train"], "train: expected --section.key value"),
    ],
)
def test_one_line_names_the_problem(argv: list[str], message: str) -> None:
    found = problems(*argv)
    assert len(found) == 1
    assert message in found[0]


def test_the_batch_must_divide_over_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert "1024 * 7" in problems()[0]
    monkeypatch.setenv("WORLD_SIZE", "8")
    config, _ = load(["--train.micro_batch_size", "48"])
    assert config.micro_batch(8) == (32, 2)  # lowered until it divides


def test_files_and_flags_mean_the_same(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: 1e-3, min_lr: 1E-4}\ntrain: {steps: 800, eval_tokens: null}\n")
    by_file, _ = load(["--config", str(file)])
    flag = ["--optim.lr", "1e-3", "--optim.min_lr=1E-4", "--train.steps", "800",
            "--train.eval_tokens", "null"]  # fmt: skip
    by_flag, _ = load(["--config", "gpt2-124m", *flag])
    assert by_file.optim == by_flag.optim
    assert by_file.train == by_flag.train
    assert by_file.optim.lr == 0.001
    file.write_text("a: [")
    assert "not YAML" in problems("--config", str(file))[0]
    file.write_text("- 1")
    assert "expected a mapping" in problems("--config", str(file))[0]
    file.write_text("!!python/object/apply:os.system ['true']")
    assert "not YAML" in problems("--config", str(file))[0]


def test_mixtures() -> None:
    paths = {
        "a": {"a": 1.0},
        "a:0.7,b:0.3": {"a": 0.7, "b": 0.3},
        "[a, b]": {"a": 1.0, "b": 1.0},
        "{a: 2, b: 1e-1}": {"a": 2.0, "b": 0.1},
    }
    for text, expected in paths.items():
        config, _ = load(["--data.path", text])
        assert config.data.path == expected
    assert "greater than 0" in problems("--data.path", "a:0,b:1")[0]


def test_help_page_is_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """The page in the file is what the settings give today, and ``--help`` prints it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", "--config", "shakespeare-char", "--help"])
        train.main()
    shown = capsys.readouterr().out
    # Python 3.13 wraps some lines elsewhere.
    again = "after a change: python -m gpt_dist.config.help"
    assert shown.split() == help.make_parser().format_help().split(), again
    for flag, field in flags().items():
        assert f"--{flag} " in shown
        assert field.description, flag
    assert "shakespeare-char" in shown
    assert max(map(len, shown.partition("\n\n")[2].partition("options:")[2].splitlines())) < 80


@pytest.mark.parametrize("module", ["gpt_dist.train", "gpt_dist.prepare", "serve"])
def test_help_imports_nothing_heavy(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported  # the listing is read right
    heavy = {"torch", "numpy", "rich", "matplotlib", "pyarrow", "tokenizers"}
    assert not imported & (heavy | {"pydantic", "yaml", "asyncio", "grpc"})


def test_yaml_of_a_config_is_plain(tmp_path: Path) -> None:
    config, _ = load(["--config", "shakespeare-char"])
    assert yaml.safe_load(to_yaml(config))["model"]["n_layer"] == 6


TEXTS = ["2024", "1.10", "007", "2024-11-21", "1e3", "true", "no", "-1", "a b"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_text(tmp_path: Path, text: str) -> None:
    """A name that YAML would take for a number, a date or a switch."""
    file = tmp_path / "c.yaml"
    file.write_text(
        f"out_dir: {text}\nresume: {text}\ndata:\n  path: {text}\n  tokenizer: {text}\n"
        f"train:\n  init_from: {text}\n"
    )
    names = ("out_dir", "resume", "data.path", "data.tokenizer", "train.init_from")
    by_flag, _ = load([part for name in names for part in (f"--{name}", text)])
    by_file, _ = load(["--config", str(file), "--optim.warmup_steps", "1"])
    for config in (by_flag, by_file):
        assert config.out_dir == config.resume == config.data.tokenizer == text
        assert config.train.init_from == text
        assert config.data.path == {text: 1.0}
        assert build(parse_settings(to_yaml(config))) == config


def test_text_in_mixtures_and_null(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for data, expected in (
        ("[1.10, 2024]", {"1.10": 1.0, "2024": 1.0}),
        ("{1.10: 2, 2024-11-21: 0.5}", {"1.10": 2.0, "2024-11-21": 0.5}),
    ):
        file.write_text(f"data: {{path: {data}}}\ntrain: {{init_from: null}}\n")
        config, _ = load(["--config", str(file)])
        assert config.data.path == expected
        assert config.train.init_from is None
    assert load(["--data.path", "{2024: 2}"])[0].data.path == {"2024": 2.0}
    assert load(["--train.init_from", "null"])[0].train.init_from is None
    file.write_text("out_dir: null\n")
    assert "out_dir = null" in problems("--config", str(file))[0]
    file.write_text("out_dir: !!python/object/apply:os.system ['true']\n")
    assert "not YAML" in problems("--config", str(file))[0]
