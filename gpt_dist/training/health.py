"""How large an update is beside the weights, and whether momentum agrees with the next gradient."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt_dist.config.settings import OptimConfig
from gpt_dist.optim.adamw import kind_of, options_of
from gpt_dist.optim.schedules import momentum

if TYPE_CHECKING:
    from gpt_dist.training.trainer import Trainer

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
"""Of AdamW and of Muon. Both are ``beta`` times the old one plus a share of the gradient."""

State = dict[str, Tensor]


class Health:
    """Compares weights and first moments before and after one step in ``every``.

    Scores, for each kind of parameters (``optim.rates``):

    - ``update_ratio/KIND``: norm of the update over norm of the weights. With AdamW 1e-3 is usual;
      far less teaches little, far more makes training unstable.
    - ``momentum_cosine/KIND``: cosine between momentum and the gradient that came next. Near 0 the
      gradients are mostly noise; below 0 for long, steps overshoot: lower the learning rate.

    The state is read twice, as for two checkpoints. World rank 0 keeps a copy of weights and
    first moments in host memory for one step.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.before: State | None = None
        """Empty on ranks other than world rank 0."""

    def due(self, trainer: Trainer) -> bool:
        return (self.before is not None or self._begins(trainer)) and not trainer.stopping

    def _begins(self, trainer: Trainer) -> bool:
        step = trainer.run.progress.step
        return self.every > 0 and step % self.every == 0 and not trainer.is_last

    def __call__(self, trainer: Trainer) -> None:
        main = trainer.run.world.is_main
        now = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in trainer.run.engine.full_state()  # collective
            if main and (name.startswith("model.") or name.split(".")[1] in FIRST_MOMENTS)
        }
        if self.before is not None:
            beta = momentum(trainer.run.progress.step - 1, trainer.run.config.optim)
            trainer.add_scores(compare(self.before, now, beta, trainer.run.config.optim))
        self.before = now if self._begins(trainer) else None


def compare(before: State, after: State, beta: float, config: OptimConfig) -> dict[str, float]:
    """The scores of ``Health``; none where nothing has changed.

    Args:
        before: weights and first moments by their names in ``Engine.full_state``, before a step.
        after: the same after it.
        beta: Muon's momentum in this step.
        config: the betas of AdamW.
    """
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
    for name, tensor in after.items():
        section, _, rest = name.partition(".")
        old, new = before[name].double().flatten(), tensor.double().flatten()
        if section == "model":
            kind = kind_of(rest, tensor)
            update = new - old
            sums[kind][:2] += torch.stack((update @ update, old @ old))
        else:
            key, _, parameter = rest.partition(".")
            kind = kind_of(parameter, tensor)
            decay = beta if key == "momentum_buffer" else options_of(kind, config)["betas"][0]
            gradient = new - decay * old  # times a factor
            sums[kind][2:] += torch.stack((gradient @ old, gradient @ gradient, old @ old))
    scores = {}
    for kind, numbers in sorted(sums.items()):
        update, weights, product, gradients, moments = numbers.tolist()
        if update and weights:
            scores[f"update_ratio/{kind}"] = math.sqrt(update / weights)
        if update and moments:
            scores[f"momentum_cosine/{kind}"] = product / math.sqrt(gradients * moments)
    return scores
