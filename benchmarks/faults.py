"""Inject many faults into one run: SIGKILL, SIGTERM and SIGSTOP to random ranks and to torchrun.

    python benchmarks/faults.py --kills 100 --json benchmarks/results/faults.json

Two ranks train a small model and write a checkpoint every few steps. Faults come at random steps;
one in five comes within seconds of the previous one, while the ranks restart. torchrun restarts its
ranks; when torchrun itself is gone, this script starts it again as a scheduler would. At the end
the weights and metrics must equal those of an undisturbed run bit for bit, no process may be left,
and no fault may have cost more steps than one checkpoint interval.

A stopped rank makes the others wait for parallel.timeout. Two of three are then resumed (a machine
that was suspended); the third stays stopped until torchrun kills it 30 s later. A stopped torchrun
is resumed after a few seconds, because nothing else would resume it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from flags import as_flags
from record import record

from gpt_dist.checkpoints.checkpoint import complete_checkpoints
from gpt_dist.errors import GptDistError, UsageError, run_main

INTERVAL = 10
"""Steps between checkpoints."""

SPACING = (11, 28)
"""Least and most steps between two faults."""

TIMEOUT = 5
"""``parallel.timeout``, seconds."""

PATIENCE = 180
"""Seconds without a new step after which the run counts as hung."""

FAULTS = [
    (number, target)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
    for target in ("rank 0", "rank 1", "torchrun")
]


def flags(data: Path, steps: int) -> list[str]:
    """Flags for a model whose steps are short, yet longer than writing its checkpoint."""
    settings = {
        "config": "bigram-shakespeare-char",
        "data.path": data,
        "model.n_layer": 2,
        "model.n_head": 2,
        "model.n_embd": 32,
        "model.dropout": 0.1,
        "model.context_length": 64,
        "optim.lr": 1e-3,
        "optim.min_lr": 1e-4,
        "optim.warmup_steps": 10,
        "train.steps": steps,
        "train.batch_tokens": 4096,
        "train.micro_batch_size": 32,
        "train.eval_every": 200,
        "train.eval_tokens": 2048,
        "train.checkpoint_every": INTERVAL,
        "train.sample_every": 0,
        "parallel.timeout": TIMEOUT,
    }
    return as_flags(settings)


@dataclass
class Run:
    """Two ranks under torchrun, observed from outside."""

    out: Path
    arguments: list[str]
    log: Path
    agent: subprocess.Popen[bytes] | None = None
    starts: int = 0
    stopped: dict[int, float] = field(default_factory=dict)
    """When to resume each stopped process, by its id."""
    _read: int = 0

    def start(self) -> None:
        self.starts += 1
        command = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
        command += ["--nproc-per-node=2", "--max-restarts=1000", "--shutdown-timeout=30"]
        command += ["-m", "gpt_dist.train", "--out_dir", str(self.out), *self.arguments]
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def alive(self) -> bool:
        return self.agent is not None and self.agent.poll() is None

    def step(self) -> int:
        """The last step in metrics.jsonl."""
        with contextlib.suppress(OSError, IndexError):
            with (self.out / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
                return int(re.findall(rb'"step": (\d+), "train_loss"', file.read())[-1])
        return 0

    def resumed_at(self) -> list[int]:
        """The steps from which the ranks have started since the last call."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            text, newline, _ = file.read().rpartition(b"\n")
        self._read += len(text + newline)
        found = re.findall(rb"^(?:starting|continuing \S+/step-(\d+)):", text, re.MULTILINE)
        return [int(step or 0) for step in found]

    def process(self, target: str) -> psutil.Process | None:
        """The process of a rank or of torchrun; None while there is none."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.agent is None:
                return None
            agent = psutil.Process(self.agent.pid)
            if target == "torchrun":
                return agent
            for child in agent.children():
                with contextlib.suppress(psutil.Error):
                    if child.environ().get("RANK") == target[-1]:
                        return child
        return None

    def wake(self) -> None:
        """Resume the stopped processes that are due."""
        for pid, when in list(self.stopped.items()):
            if time.monotonic() > when:
                del self.stopped[pid]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def leftovers(self) -> list[psutil.Process]:
        """Processes of this run that still exist."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if str(self.out) in (process.info["cmdline"] or []) and process.pid != os.getpid()
        ]


def describe_process(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"{process.pid} ({process.status()})"
    return ""


def quiet_run(run: Run) -> float:
    """Train undisturbed; return the seconds it took."""
    start = time.monotonic()
    run.start()
    if run.agent is None or run.agent.wait():
        raise GptDistError(f"the quiet run failed:\n{run.log.read_text()[-6000:]}")
    return time.monotonic() - start


class Observer:
    """Measures how long a run stalls after a fault, and how many steps it loses."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.step, self.progress = 0, time.monotonic()
        self.hit_step, self.hit_time = 0, 0.0
        self.stalls: list[float] = []
        self.lost: list[int] = []
        self._started, self._top = False, 0
        self._looked = time.monotonic()

    def look(self) -> None:
        now, step = time.monotonic(), self.run.step()
        if (gap := now - self._looked) > 10:  # this process itself was suspended
            self.progress += gap
            self.hit_time += gap if self.hit_time else 0.0
        self._looked = now
        self._top = max(self._top, step)
        for start in self.run.resumed_at():
            if self._started:
                self.lost.append(self._top - start)
            self._started, self._top = True, start
        if step > self.step:
            self.step, self.progress = step, now
        if self.hit_time and step > self.hit_step:
            self.stalls.append(now - self.hit_time)
            self.hit_time = 0.0
        if now - self.progress > PATIENCE:
            log = self.run.log.read_text(errors="replace")
            raise GptDistError(
                f"no new step for {PATIENCE} s after step {self.step}:\n{log[-3000:]}"
            )

    def hit(self) -> None:
        """A fault has just been injected."""
        self.hit_step = max(self.step, self.hit_step)
        self.hit_time = self.hit_time or time.monotonic()


class Injector:
    """Injects faults: every kind equally often, in random order, at random moments."""

    def __init__(self, run: Run, kills: int, steps: int, generator: random.Random) -> None:
        self.run, self.kills, self.steps, self.random = run, kills, steps, generator
        self.counts: Counter[str] = Counter()
        self._deck: list[tuple[signal.Signals, str]] = []
        self._step, self._time = generator.randint(*SPACING), 0.0
        self._rank_stops = 0

    def maybe(self, step: int) -> bool:
        """Inject the next fault if it is due; return whether it was."""
        now = time.monotonic()
        due = now > self._time if self._time else step >= self._step
        if not due or self.counts.total() == self.kills:
            return False
        if not self._deck:
            self._deck = self.random.sample(FAULTS, len(FAULTS))
        number, target = self._deck[-1]
        if self._time and number == signal.SIGSTOP:
            # Before the first step a silent rank has half an hour, because compiling takes long.
            self._plan(step, early=False)
            return False
        victim = self.run.process(target)
        if victim is None:
            return False
        self._deck.pop()
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(number)
        self.counts[f"{number.name} {target}"] += 1
        print(f"{self.counts.total():4d}/{self.kills}  step {step:5d}  {number.name} to {target}")
        if number == signal.SIGSTOP:
            self._plan_waking(victim.pid, target)
        self._plan(step, early=self.random.random() < 0.2)
        return True

    def _plan(self, step: int, *, early: bool) -> None:
        self._time = time.monotonic() + self.random.uniform(0, 6) if early else 0.0
        self._step = min(self.steps - 3, max(step, self._step) + self.random.randint(*SPACING))

    def _plan_waking(self, pid: int, target: str) -> None:
        now = time.monotonic()
        if target == "torchrun":
            self.run.stopped[pid] = now + self.random.uniform(1, 4)
            return
        self._rank_stops += 1
        if self._rank_stops % 3:
            self.run.stopped[pid] = now + TIMEOUT + self.random.uniform(1, 6)


def disturbed_run(run: Run, kills: int, steps: int, generator: random.Random) -> dict[str, Any]:
    """Train with faults until the last step is done; return what happened."""
    observer, injector = Observer(run), Injector(run, kills, steps, generator)
    run.start()
    while True:
        time.sleep(0.03)
        run.wake()
        observer.look()
        if run.alive():
            if injector.maybe(observer.step):
                observer.hit()
        elif observer.step == steps and run.agent is not None and run.agent.returncode == 0:
            break
        else:
            run.start()
    return {
        "faults": dict(sorted(injector.counts.items())),
        "torchrun_starts": run.starts,
        "recoveries": len(observer.lost),
        "most_steps_lost": max(observer.lost, default=0),
        "median_steps_lost": statistics.median(observer.lost or [0]),
        "longest_stall_s": round(max(observer.stalls, default=0.0), 1),
        "median_stall_s": round(statistics.median(observer.stalls or [0.0]), 1),
    }


def differences(quiet: Path, disturbed: Path) -> list[str]:
    """What differs between two runs that should be bitwise equal."""
    found = []
    ends = [complete_checkpoints(run / "checkpoints")[-1] for run in (quiet, disturbed)]
    for name in ("model.safetensors", "optimizer.safetensors"):
        if len({(end / name).read_bytes() for end in ends}) > 1:
            found.append(name)
    timing = re.compile(r', "tokens_per_second.*')
    rows = [timing.sub("", (run / "metrics.jsonl").read_text()) for run in (quiet, disturbed)]
    return found + ["metrics.jsonl"] * (rows[0] != rows[1])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/faults.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=10, help="faults to inject (default: 10)")
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of kinds and moments (default: 0)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        raise UsageError(f"--kills {arguments.kills}: expected 1 or more")
    steps = 30 + arguments.kills * sum(SPACING) // 2
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        directory = Path(name)
        data = directory / "data"
        prepare = ["gpt_dist.prepare", "shakespeare", "--tokenizer", "char", "--out", str(data)]
        subprocess.run([sys.executable, "-m", *prepare], check=True, stdout=subprocess.DEVNULL)
        quiet, disturbed = (
            Run(directory / run, flags(data, steps), directory / f"{run}.log")
            for run in ("quiet", "disturbed")
        )
        seconds = quiet_run(quiet)
        print(f"quiet run: {steps} steps in {seconds:.0f} s")
        start = time.monotonic()
        try:
            result = disturbed_run(disturbed, arguments.kills, steps, random.Random(arguments.seed))
        finally:
            for process in disturbed.leftovers():
                if disturbed.alive():
                    process.kill()
        result |= {
            "kills": arguments.kills,
            "seed": arguments.seed,
            "steps": steps,
            "checkpoint_interval": INTERVAL,
            "parallel_timeout_s": TIMEOUT,
            "quiet_run_s": round(seconds),
            "disturbed_run_s": round(time.monotonic() - start),
            "processes_left": [describe_process(p) for p in disturbed.leftovers()],
            "differences": differences(quiet.out, disturbed.out),
        }
    for key, value in result.items():
        print(f"{key:20s} {value}")
    record(arguments.json, result)
    good = (
        not result["differences"]
        and not result["processes_left"]
        and result["most_steps_lost"] <= INTERVAL
    )
    print("passed" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    run_main(main)
