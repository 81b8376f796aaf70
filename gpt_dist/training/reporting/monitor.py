"""Passes a run's numbers to every sink; also the picture at the end and torch's profiler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, Self

from gpt_dist.config.settings import Config
from gpt_dist.errors import UsageError
from gpt_dist.training.progress import Progress
from gpt_dist.training.reporting.console import ConsoleSink
from gpt_dist.training.reporting.curves import plot_runs
from gpt_dist.training.reporting.metrics import Row
from gpt_dist.training.reporting.sinks import JsonLines, Samples, Sink, TensorBoard


class Monitor:
    """The sinks of a run. Only world rank 0 has any; without sinks every method does nothing."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.sinks = sinks

    @classmethod
    def open(cls, config: Config, progress: Progress, steps: int) -> Self:
        """All sinks of a run, in its ``out_dir``.

        Args:
            config: the run's configuration.
            progress: where the run stands; rows and samples beyond it are removed.
            steps: the run's last step.
        """
        out_dir = Path(config.out_dir)
        return cls(
            [
                JsonLines(out_dir / "metrics.jsonl", progress.step, progress.evaluated),
                TensorBoard(out_dir / "tensorboard", progress.step, config),
                Samples(out_dir / "samples.txt", progress.sampled),
                ConsoleSink(progress.step, steps),
            ]
        )

    def train(self, row: Row) -> None:
        for sink in self.sinks:
            sink.train(row)

    def validation(self, row: Row) -> None:
        for sink in self.sinks:
            sink.validation(row)

    def sample(self, step: int, text: str) -> None:
        for sink in self.sinks:
            sink.sample(step, text)

    def flush(self) -> None:
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        # Everything that matters was flushed before the last checkpoint.
        with suppress(OSError):
            for sink in self.sinks:
                sink.close()


def draw(out_dir: Path) -> None:
    """Draw ``loss.png`` of a run, if it has any training steps."""
    with suppress(UsageError):
        plot_runs([out_dir], out_dir / "loss.png")


class Trace(Protocol):
    """What records a trace, such as torch's profiler; ``step`` follows each optimizer step."""

    def step(self) -> None: ...


class NoTrace:
    def step(self) -> None:
        pass


@contextmanager
def profiler(out_dir: Path, *, enabled: bool) -> Iterator[Trace]:
    """Record the 10th to 12th step to ``out_dir``/profile/trace.json, and say so."""
    if not enabled:
        yield NoTrace()
        return
    from torch import profiler as torch_profiler

    path = out_dir / "profile" / "trace.json"
    written = False

    def write(profile: Any) -> None:
        nonlocal written
        path.parent.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(path))
        written = True
        print(f"profile: {path} (open it in ui.perfetto.dev)", flush=True)

    schedule = torch_profiler.schedule(wait=8, warmup=1, active=3, repeat=1)
    with torch_profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile
    if not written:
        print("profile: none, because the run ended before its 10th step", flush=True)
