"""What a run needs, and what is wrong with it, without starting it: ``gpt_dist.train --dry-run``.

A section of the report is one file in ``plan/`` and one line in ``SECTIONS``.
"""

from __future__ import annotations

from collections.abc import Callable

from gpt_dist.config.command_line import Command
from gpt_dist.training.plan.disk import disk_rows
from gpt_dist.training.plan.facts import Plan, make_plan
from gpt_dist.training.plan.fitting import memory_rows
from gpt_dist.training.plan.rows import Row, render
from gpt_dist.training.plan.work import data_rows, model_rows, step_rows, time_rows


def run_rows(plan: Plan) -> list[Row]:
    """Whether the run is new, and what it changes where it is not."""
    if plan.start is None:
        return [Row("run", f"a new one in {plan.config.out_dir}")]
    rows = [Row("run", f"continues {plan.start.path}, step {plan.start.state['step']:,}")]
    return rows + [Row("", note) for note in plan.start.notes]


def unchecked_rows(plan: Plan) -> list[Row]:
    """What could not be checked."""
    return [Row("" if n else "not checked", text) for n, text in enumerate(plan.unchecked)]


SECTIONS: tuple[Callable[[Plan], list[Row]], ...] = (
    run_rows,
    model_rows,
    data_rows,
    step_rows,
    time_rows,
    memory_rows,
    disk_rows,
    unchecked_rows,
)


def report(command: Command) -> str:
    """The plan of a run, as lines of 80 columns at most.

    Raises:
        UsageError: the run would be refused.
        GptDistError: the data or a checkpoint is damaged.
    """
    plan = make_plan(command)
    return render(row for section in SECTIONS for row in section(plan))
