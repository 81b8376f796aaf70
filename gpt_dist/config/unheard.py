"""Settings that another setting switches off.

Setting one of them changes nothing, and the user is told. It is refused if the run would differ
from what the setting says. It is a warning if only the reports about the run would differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from gpt_dist.config.settings import Config, flags, setting, show

FILE, COMMAND_LINE = "file", "command line"
"""Where the user gave a setting. Defaults and presets are not the user's."""


class Rule(NamedTuple):
    """Settings that have no effect in some configurations."""

    settings: tuple[str, ...]
    switch: str
    """The setting that switches them off."""
    off: Callable[[Config], bool]
    """Whether they are switched off."""
    remedy: str
    """What lets them have an effect."""
    refused: bool
    """Whether the run would be another one than the settings say."""


RULES = (
    Rule(
        ("parallel.zero_stage",),
        "parallel.strategy",
        lambda config: config.parallel.strategy != "deepspeed",
        "parallel.strategy = deepspeed",
        refused=True,
    ),
    Rule(
        ("train.residual",),
        "train.precision",
        lambda config: config.train.precision == "fp32" and config.train.residual != "fp32",
        "train.precision = bf16",
        refused=True,
    ),
    Rule(
        ("train.steps",),
        "train.epochs",
        lambda config: config.train.epochs is not None,
        "train.epochs = null",
        refused=True,
    ),
    Rule(
        ("data.stride",),
        "data.rows",
        lambda config: config.data.rows == "documents",
        "data.rows = stream",
        refused=True,
    ),
    Rule(
        ("optim.min_lr",),
        "optim.schedule",
        lambda config: (
            config.optim.schedule == "constant" and config.optim.min_lr != config.optim.lr
        ),
        "optim.schedule = cosine or wsd",
        refused=True,
    ),
    Rule(
        (
            "optim.momentum",
            "optim.momentum_start",
            "optim.momentum_warmup_steps",
            "optim.nesterov",
            "optim.newton_schulz_steps",
            "optim.newton_schulz_coefficients",
            "optim.newton_schulz_precision",
            "optim.split_qkv",
        ),
        "optim.name",
        lambda config: config.optim.name != "muon",
        "optim.name = muon",
        refused=True,
    ),
    Rule(
        ("optim.decay_share", "optim.decay_shape"),
        "optim.schedule",
        lambda config: config.optim.schedule != "wsd",
        "optim.schedule = wsd",
        refused=True,
    ),
    Rule(
        ("optim.decay_power",),
        "optim.decay_shape",
        lambda config: config.optim.decay_shape != "power",
        "optim.decay_shape = power",
        refused=True,
    ),
    Rule(
        ("optim.average_share",),
        "optim.average",
        lambda config: config.optim.average == 0,
        "optim.average above 0",
        refused=True,
    ),
    Rule(
        ("optim.momentum_start",),
        "optim.momentum_warmup_steps",
        lambda config: config.optim.name == "muon" and config.optim.momentum_warmup_steps == 0,
        "optim.momentum_warmup_steps above 0",
        refused=True,
    ),
    Rule(
        ("optim.name",),
        "model.n_layer",
        lambda config: config.model.n_layer == 0 and config.optim.name == "muon",
        "model.n_layer above 0, because Muon updates the matrices of the blocks",
        refused=True,
    ),
    Rule(
        (
            "model.n_head",
            "model.n_kv_head",
            "model.mlp_hidden",
            "model.dropout",
            "model.bias",
            "model.qkv_bias",
            "model.zero_projections",
            "model.activation_checkpointing",
        ),
        "model.n_layer",
        lambda config: config.model.n_layer == 0,
        "model.n_layer above 0",
        refused=False,
    ),
    Rule(
        ("train.eval_tokens", "train.best_every"),
        "train.eval_every",
        lambda config: config.train.eval_every == 0,
        "train.eval_every above 0",
        refused=False,
    ),
    Rule(
        ("eval.hellaswag_path",),
        "eval.hellaswag_every",
        lambda config: config.eval.hellaswag_every == 0,
        "eval.hellaswag_every above 0",
        refused=False,
    ),
    Rule(
        ("train.profile",),
        "train.steps",
        lambda config: config.train.epochs is None and (config.train.steps or 0) < 12,
        "train.steps from 12 on, because steps 10 to 12 are traced",
        refused=False,
    ),
)


def unheard(config: Config, given: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What the user set without effect.

    A file that also sets the switch was written on purpose, or is a run's resolved
    ``config.yaml``, which sets everything. It is never refused, and warned of only where the run
    would be another one and the value is not the default.

    Args:
        config: the whole configuration.
        given: setting → ``FILE`` or ``COMMAND_LINE``, for the settings that the user gave.

    Returns:
        Refusals and warnings, a line each.
    """
    refusals: list[str] = []
    warnings: list[str] = []
    for rule in RULES:
        if not rule.off(config):
            continue
        for flag in rule.settings:
            value = setting(config, flag)
            if flag not in given or value is None:
                continue
            on_purpose = given[flag] == FILE and rule.switch in given
            if on_purpose and (not rule.refused or value == flags()[flag].default):
                continue
            refused = rule.refused and not on_purpose
            line = (
                f"{flag} = {show(value)}: has no effect with {rule.switch} = "
                f"{show(setting(config, rule.switch))}; it needs {rule.remedy}"
            )
            (refusals if refused else warnings).append(line)
    return refusals, warnings


def table() -> str:
    """The rules as a Markdown table, as docs/settings.md shows it."""
    lines = ["| setting | needs | otherwise |", "|---|---|---|"]
    for rule in RULES:
        names = ", ".join(f"`{name}`" for name in rule.settings)
        lines.append(f"| {names} | {rule.remedy} | {'refused' if rule.refused else 'a warning'} |")
    return "\n".join(lines)
