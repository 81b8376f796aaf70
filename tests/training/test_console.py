"""What a run shows on a terminal of 80 and of 120 columns, and in a file."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt_dist.checkpoints.checkpoint import complete_checkpoints
from gpt_dist.training.reporting.console import ConsoleSink, fitting, new_console
from gpt_dist.training.reporting.metrics import Row
from tests.conftest import step_count, train_command, wait_until
from tests.terminal import CTRL_C, Session, Terminal

Config = Callable[..., Path]
STEPS = 19073


class Shown(io.StringIO):
    """A stream to a terminal emulator."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.terminal = Terminal(columns)

    def write(self, text: str) -> int:
        self.terminal.feed(text.encode())
        return len(text)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def row(step: int, **changes: float) -> Row:
    """A row of a fast run with large numbers: the widest that are usual."""
    numbers = {
        "step": step, "train_loss": 10.98765, "lr": 6e-4, "grad_norm": 12.345,
        "tokens_per_second": 1_230_000.0, "mfu": 0.4567, "step_ms": 426.0,
    }  # fmt: skip
    return numbers | changes


def on_a_terminal(columns: int, step: int = 0) -> tuple[ConsoleSink, Terminal, Clock]:
    file, clock = Shown(columns), Clock()
    console = new_console(file=file, force_terminal=True, force_interactive=True, width=columns)
    return ConsoleSink(step, STEPS, console, clock), file.terminal, clock


def in_a_file(step: int = 0, steps: int = STEPS) -> tuple[ConsoleSink, io.StringIO, Clock]:
    file, clock = io.StringIO(), Clock()
    return ConsoleSink(step, steps, new_console(file=file), clock), file, clock


def advance(sink: ConsoleSink, clock: Clock, steps: range) -> None:
    for step in steps:
        clock.now += 0.426
        sink.train(row(step))


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_nothing_wraps_and_the_time_left_stays(columns: int) -> None:
    sink, terminal, clock = on_a_terminal(columns)
    advance(sink, clock, range(1, 201))
    sink.validation({"step": 200, "val_loss": 10.9, "val_bpb": 3.5} | {
        f"val_loss/{name}": 10.9 for name in ("tinystories", "fineweb-edu", "books")
    })  # fmt: skip
    assert sink._live
    sink._live.refresh()  # as its thread does, four times a second
    lines = terminal.lines
    sink.close()
    assert all(re.match(r"step +\d+|  ", line) for line in lines), lines  # none is a rest
    steps = [line for line in lines if "/19073" in line]
    assert len(steps) > 5
    left = {re.search(r"left (\d:\d\d:\d\d)$", line) is not None for line in steps}
    assert left == {True}, steps
    assert steps[-1].endswith("left 2:14:00")  # 18,873 steps of 0.426 s
    bar = steps[-1]
    assert ("━" in bar) == (columns > 40)
    if columns >= 80:
        assert all(part in bar for part in ("loss 10.9877", "norm 12.35", "1.23M tok/s"))
    assert ("lr 6.00e-04" in bar) == (columns == 120)
    assert "".join(lines).count("val_loss/") == 3


def test_lines_with_the_loss_stay_and_the_bar_goes() -> None:
    sink, terminal, clock = on_a_terminal(80)
    advance(sink, clock, range(1, 51))
    assert terminal.shows_cursor  # a run that is killed leaves it so
    with_bar = terminal.lines
    sink.close()
    assert [line for line in with_bar if "━" in line] == with_bar[-1:]
    assert terminal.lines == with_bar[:-1]
    assert all("loss 10.9877" in line for line in terminal.lines)
    assert len(terminal.lines) > 10


def test_lines_become_rare() -> None:
    sink, file, clock = in_a_file()
    advance(sink, clock, range(1, 2001))
    seen = [int(step) for step in re.findall(r"^step +(\d+)/", file.getvalue(), re.MULTILINE)]
    gaps = [(b - a) * 0.426 for a, b in itertools.pairwise(seen)]
    assert seen[0] == 1
    assert gaps[0] < 2
    assert 9 < gaps[-1] < 11


def test_every_number_is_in_a_file() -> None:
    sink, file, clock = in_a_file()
    clock.now += 0.426
    sink.train(row(1))
    assert file.getvalue() == (
        "step     1/19073  loss 10.9877  lr 6.00e-04  norm 12.35  1.23M tok/s  mfu 45.7%  "
        "left 2:15:25\n"
    )


def test_a_skipped_update_is_told_on_a_narrow_terminal() -> None:
    sink, terminal, clock = on_a_terminal(80)
    advance(sink, clock, range(1, 4))
    sink.train(row(4, grad_norm=float("nan")))
    sink.close()
    assert terminal.lines[-1].startswith("step     4/19073")
    assert "norm nan (update skipped)" in terminal.lines[-1]


def test_speed_is_smoothed() -> None:
    """One slow step in many, such as one beside a checkpoint's writing, hardly shows."""
    sink, file, clock = in_a_file(steps=12)
    for step in range(1, 13):
        clock.now += 11  # so that every step has a line
        slow = 2 if step == 11 else 1
        sink.train(row(step, step_ms=100.0 * slow, tokens_per_second=500 / slow, mfu=0.4 / slow))
    speeds = [int(speed) for speed in re.findall(r"(\d+) tok/s", file.getvalue())]
    assert speeds[:10] == [500] * 10
    assert 440 < speeds[10] < speeds[11] < 480
    shares = [float(share) for share in re.findall(r"mfu ([\d.]+)%", file.getvalue())]
    assert shares[10] == pytest.approx(40 * speeds[10] / 500, abs=0.1)


def test_the_time_left_counts_validations_but_not_the_first() -> None:
    sink, file, clock = in_a_file(step=100, steps=110)
    clock.now += 60  # before the first step
    for step in (101, 102):
        clock.now += 9  # of which 2 are the step, the rest a validation
        sink.train(row(step, step_ms=2000.0))
    assert re.findall("left (.*)", file.getvalue()) == ["0:00:18", "0:00:44"]


def test_samples_are_printed_as_they_are() -> None:
    sink, terminal, _ = on_a_terminal(80)
    sink.sample(5, "[bold]once[/bold] :cat: " + "word " * 40)
    sink.close()
    shown = terminal.lines
    assert shown[0] == "--- sample after step 5"
    assert "[bold]once[/bold] :cat: word" in shown[1]
    assert all(len(line) < 80 and line.endswith("word") for line in shown[1:-1])
    assert shown[-1] == "---"


def test_the_least_important_parts_go_first() -> None:
    parts = {"step": "1234", "loss": "1234", "lr": "1234", "left": "1234"}
    assert list(fitting(parts, 22)) == ["step", "loss", "lr", "left"]
    assert list(fitting(parts, 21)) == ["step", "loss", "left"]
    assert list(fitting(parts, 10)) == ["step", "left"]


@pytest.fixture
def workplace(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the data set's path is short enough for a line."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/tiny").symlink_to(tiny_data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_run_from_its_first_to_its_last_line(tiny_config: Config, workplace: Path) -> None:
    config = tiny_config(train={"steps": 60, "sample_every": 30}, data={"path": "data/tiny"})
    out = Path("runs/tiny")
    session = Session(train_command(config, out, "--data.stride", "16"), 80)
    assert session.wait() == 0
    lines = session.terminal.lines
    assert max(map(len, lines)) <= 80
    assert lines[:3] == [
        "starting: runs/tiny",
        "  model  27.1k parameters, float32 on cpu, eager",
        "  steps  60 of 1.02k tokens",
    ]
    assert lines[3] == "  batch  1 rank × 4 micro-batches × 8 sequences × 32 tokens"
    assert re.fullmatch(r"  data   data/tiny: 2.\d+k windows, 0.\d+ epochs", lines[4]), lines[4]
    assert lines[5].strip() == (
        "windows overlap (data.stride = 16): an epoch shows each token 2 times"
    )
    assert re.fullmatch(r" {9}and the run shows it 1.\d+ times", lines[6]), lines[6]
    assert not any("━" in line for line in lines)
    trained = [line for line in lines if line.startswith("step") and "/60  loss" in line]
    assert trained[0].startswith("step  1/60")
    assert trained[-1].startswith("step 60/60")
    end = lines.index(next(line for line in lines if line.startswith("done: ")))
    assert re.fullmatch(r"done: 60 steps in 0:\d\d:\d\d", lines[end])
    assert lines[end - 1] == "---"  # the last sample
    assert lines[-3:] == [
        "next:",
        "  python -m gpt_dist.generate --checkpoint runs/tiny",
        "  python -m serve --checkpoint runs/tiny",
    ]


@pytest.mark.slow
def test_ctrl_c_under_torchrun_ends_with_our_words(tiny_config: Config, workplace: Path) -> None:
    config = tiny_config(train={"steps": 100_000, "eval_every": 0}, data={"path": "data/tiny"})
    out = Path("runs/tiny")
    session = Session(train_command(config, out, ranks=2), 80)
    wait_until(lambda: step_count(out) > 5, "step 5", agent=session.process)
    session.type(CTRL_C)
    assert session.wait() == 1  # torchrun's
    lines = session.terminal.lines
    steps = step_count(out)
    assert lines[-2:] == [
        "(torchrun prints this traceback at every Ctrl-C)",
        f"stopped after step {steps}; run the same command to resume",
    ], lines
    assert any("stopping with a checkpoint" in line for line in lines)
    assert session.terminal.shows_cursor
    (checkpoint, *_) = reversed(complete_checkpoints(out / "checkpoints"))
    assert checkpoint.name == f"step-{steps:08d}"


@pytest.mark.slow
def test_ctrl_c_without_torchrun(tiny_config: Config, workplace: Path) -> None:
    config = tiny_config(train={"steps": 100_000, "eval_every": 0}, data={"path": "data/tiny"})
    out = Path("runs/tiny")
    session = Session(train_command(config, out), 80)
    wait_until(lambda: step_count(out) > 5, "step 5", agent=session.process)
    session.type(CTRL_C)
    assert session.wait() == 0
    assert session.terminal.lines[-1] == (
        f"stopped after step {step_count(out)}; run the same command to resume"
    )
