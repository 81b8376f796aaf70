"""Every command of README.md and docs/ runs, copied from the page and only reduced in size.

Each section runs from an empty directory. What it takes for granted is put there first: the user's
texts, a trained run where the section trains none, a server where the section starts none.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from gpt_dist.config.command_line import load
from serve.client.connection import DEFAULT_TARGET
from tests import warm
from tests.components import require
from tests.conftest import free_port, free_ports, wait_until, words

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
ELSEWHERE = ("make", "sbatch", "source", "docker", "grpcurl", "tensorboard", "lm-eval")
"""Programs whose lines are tested elsewhere (`make` by CI, `sbatch` in tests/cluster, the image in
test_container.py, `lm-eval` in tests/serve/http) or are not ours; benchmarks have tests and records
of their own."""
WEB = "127.0.0.1:8000"
"""Where the pages let a server speak HTTP."""


def sections(page: str) -> dict[str, list[tuple[str, str]]]:
    """Page and heading → (language, text) of each code block, for all sections that have any."""
    found = {}
    for section in re.split(r"^## ", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading = section.lstrip("# ").partition("\n")[0]
        blocks = re.findall(r"^```(sh|python)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        if blocks:
            found[f"{page}: {heading}"] = blocks
    return found


def lines(block: str) -> list[list[str]]:
    """The commands of a shell block, as words, but for those that are tested elsewhere."""
    joined = block.replace("\\\n", " ")
    found = (shlex.split(line, comments=True) for line in joined.splitlines())
    ours = (parts for parts in found if parts and parts[0] not in ELSEWHERE)
    return [parts for parts in ours if "benchmarks/" not in parts[1]]


SECTIONS = {
    title: blocks
    for page in PAGES
    for title, blocks in sections(page).items()
    if any(kind == "python" or lines(block) for kind, block in blocks)
}
SMALL = {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": 16,
    "model.context_length": 16,
    "train.epochs": "null",
    "train.steps": 2,
    "train.batch_tokens": 64,
    "train.micro_batch_size": 2,
    "train.eval_tokens": 64,
    "train.eval_every": 1,
    "train.checkpoint_every": 1,
    "optim.warmup_steps": 1,
}


def reduced(command: list[str], server: str, web: str) -> list[str]:
    """Module and arguments with overrides appended; downloads get a local source."""
    start, *parts = command
    if start == "torchrun":  # its part is tested elsewhere: here one rank runs without it
        launcher = get_args_parser().parse_args(parts)
        assert launcher.module, command
        parts = [launcher.training_script, *launcher.training_script_args]
    else:
        assert start == "python", command
        assert parts.pop(0) == "-m", command
    if "gpt_dist.train" in parts:
        small = dict(SMALL)
        if any("bigram" in part for part in parts):
            del small["model.n_layer"]
        if "--model.mlp_hidden" in parts or "gpt1" in parts:
            small["model.mlp_hidden"] = 24
        overrides = [f"--{key}={value}" for key, value in small.items()]
        if "deepspeed" in parts:  # tests/parallel; here one rank trains without a process group
            for flag in ("--parallel.strategy", "--parallel.zero_stage"):
                at = parts.index(flag)
                del parts[at : at + 2]
        return [*parts, *overrides, "--device", "cpu"]
    for name, extra in {
        "gpt_dist.generate": ["--max-new-tokens", "8", "--device", "cpu"],
        "tinyshakespeare": ["--source", "story.txt"],
        "tinystories": ["--source", "offline/TinyStoriesV2-GPT4-train.txt"],
        "fineweb-edu": ["--source", "offline/fineweb-edu"],
        "hf": ["--source", "offline/hub"],
        "hellaswag": ["--source", "offline/hellaswag.jsonl", "--device", "cpu"],
        "lambada": ["--source", "offline/lambada.jsonl", "--device", "cpu"],
        "perplexity": ["--stride", "8", "--device", "cpu"],
        "bpe": ["--vocab-size", "300"],
        "serve": ["--port", server.partition(":")[2]],
        "serve.client": ["--target", server, "--max-new-tokens", "8"],
        "serve.playground": ["--port", str(free_port())],
    }.items():
        if name in parts:
            parts += extra
    ports = {DEFAULT_TARGET: server, WEB.partition(":")[2]: web.partition(":")[2]}
    parts = [ports.get(part, part) for part in parts]
    return ["offline/gpt2" if part == "openai-community/gpt2" else part for part in parts]


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's files that the recipes name, and small stand-ins for downloads."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from gpt_dist.config.settings import ModelConfig
    from gpt_dist.export import export_hf
    from gpt_dist.model.gpt import GPT
    from gpt_dist.text.tokenizers import load_tokenizer

    directory = tmp_path_factory.mktemp("recipes")
    texts = ["The " + words(60, seed) for seed in range(80)]
    (directory / "wikipedia.txt").write_text("".join(texts), encoding="utf-8")
    for name in ("story.txt", "mine.txt", "book.txt"):
        (directory / name).write_text("".join(texts), encoding="utf-8")
    for folder in ("stories", "books"):
        (directory / folder).mkdir()
        for number in range(20):
            part = "".join(texts[4 * number : 4 * number + 4])
            (directory / folder / f"{number}.txt").write_text(part, encoding="utf-8")
    data = directory / "offline"
    for folder in ("fineweb-edu/sample/10BT", "hub"):
        (data / folder).mkdir(parents=True)
        table = pa.table({"text": texts})
        pq.write_table(table, data / folder / "train-00000.parquet")
    (data / "TinyStoriesV2-GPT4-train.txt").write_text("<|endoftext|>".join(texts))
    row = {"activity_label": "a", "ctx_a": "the cat", "ctx_b": "", "ctx": "the cat", "label": 0}
    row |= {"endings": ["sat", "ran", "sang", "hill"]}
    (data / "hellaswag.jsonl").write_text(json.dumps(row) + "\n")
    (data / "lambada.jsonl").write_text(json.dumps({"text": "the cat sat on the hill"}) + "\n")
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_length": 16, "vocab_size": 50257}
    model = GPT(ModelConfig.model_validate(shape))
    export_hf(model, load_tokenizer("gpt2"), data / "gpt2", torch.float32)
    return directory


@pytest.fixture(scope="session")
def granted(offline: Path) -> Path:
    """A trained run and its data, for sections that begin with the result of another."""
    prepare = ["text", "story.txt", "--out", "offline/data"]
    assert_runs("gpt_dist.prepare", prepare, offline, "prepare")
    small = [f"--{key}={value}" for key, value in SMALL.items()]
    train = ["--data.path", "offline/data", "--out_dir", "offline/run", "--device", "cpu", *small]
    assert_runs("gpt_dist.train", train, offline, "train")
    return offline / "offline"


def assert_runs(module: str, arguments: list[str], cwd: Path, line: object) -> None:
    status, output = warm.run(module, arguments, cwd, cwd / "log.txt")
    assert status == 0, f"{line}\n{arguments}\n{output}"


def assert_answers(command: list[str]) -> None:
    """Run a ``curl``, of a stream."""
    require("curl")
    done = subprocess.run([*command, "--silent", "--show-error"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("data: [DONE]\n\n"), done.stdout


def take_for_granted(arguments: list[str], granted: Path, cwd: Path) -> None:
    """Put the runs and data sets that a command reads where they are missing."""
    wanted = {part: "run" for part in arguments if part.startswith("runs/")}
    if arguments[0] == "gpt_dist.train" and "--help" not in arguments:
        config, _ = load(arguments[1:])
        wanted = dict.fromkeys(config.data.path, "data")
        if config.train.init_from:
            wanted[config.train.init_from] = "run"
    if "inspect" in arguments:
        wanted |= dict.fromkeys(arguments[-1:], "data")
    for path, kind in wanted.items():
        if not (cwd / path).exists():
            (cwd / path).parent.mkdir(exist_ok=True)
            (cwd / path).symlink_to(granted / kind)


@contextmanager
def running(module: str, arguments: list[str], cwd: Path) -> Iterator[None]:
    """A command that serves until it is stopped."""
    log = cwd / f"{module}.log"
    log.touch()
    process = warm.Command(module, arguments, (log, log), cwd)
    try:
        wait_until(
            lambda: process.poll() is not None or "ready" in log.read_text(),
            f"{module} {arguments}",
        )
        assert process.poll() is None, log.read_text(encoding="utf-8")
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait() in (0, -signal.SIGTERM), log.read_text(encoding="utf-8")


@pytest.mark.slow(10)
@pytest.mark.parametrize("title", SECTIONS)
def test_section(title: str, offline: Path, granted: Path, tmp_path: Path) -> None:
    for path in offline.iterdir():
        (tmp_path / path.name).symlink_to(path)
    server, web = (f"127.0.0.1:{port}" for port in free_ports(2))
    blocks = SECTIONS[title]
    with ExitStack() as stack:

        def serve(arguments: list[str]) -> None:
            stack.enter_context(running("serve", arguments, tmp_path))

        text = "".join(block for _, block in blocks)
        if (DEFAULT_TARGET in text or WEB in text) and "-m serve " not in text:
            ports = ["--port", server.partition(":")[2], "--http-port", web.partition(":")[2]]
            serve(["--checkpoint", str(granted / "run"), *ports])
        for kind, block in blocks:
            if kind == "python":
                program = block.replace(DEFAULT_TARGET, server).replace(WEB, web)
                (tmp_path / "runpy_block.py").write_text(program, encoding="utf-8")
                assert_runs("runpy_block", [], tmp_path, block)
                continue
            for line in lines(block):
                if line[0] == "curl":
                    assert_answers([part.replace(WEB, web) for part in line])
                    continue
                module, *arguments = reduced(line, server, web)
                take_for_granted([module, *arguments], granted, tmp_path)
                if module == "serve":
                    serve(arguments)
                elif module == "serve.playground":
                    with running(module, arguments, tmp_path):
                        pass
                else:
                    assert_runs(module, arguments, tmp_path, line)
    if title.startswith("docs/recipes.md"):
        for run in (tmp_path / "runs").iterdir():
            assert (run / "loss.png").is_file()
            assert (run / "checkpoints" / "step-00000002").is_dir()
            assert (run / "samples.txt").is_file() or "finetuned" in run.name


def test_every_command_is_found() -> None:
    """The pattern above finds the pages' sections and their commands."""
    assert sum(title.startswith("docs/recipes.md") for title in SECTIONS) == 6
    commands = [
        " ".join(line)
        for blocks in SECTIONS.values()
        for kind, block in blocks
        if kind == "sh"
        for line in lines(block)
    ]
    for module, least in {
        "gpt_dist.train": 28,
        "gpt_dist.prepare": 15,
        "gpt_dist.generate": 10,
        "gpt_dist.evaluate": 5,
        "gpt_dist.export": 4,
        "gpt_dist.import_hf": 3,
        "gpt_dist.plot": 3,
        "serve": 2,
        "serve.client": 2,
        "serve.playground": 3,
    }.items():
        found = [command for command in commands if re.search(rf"-m {module}( |$)", command)]
        assert len(found) >= least, (module, found)
    # What is left out of the sections is shell that starts no program of ours.
    for page in PAGES:
        for title, blocks in sections(page).items():
            assert title in SECTIONS or not any("-m " in block for _, block in blocks), title
