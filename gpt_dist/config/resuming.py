"""Which settings a run may change when it continues, and what the change does.

    print(table())

prints the rules as Markdown, as docs/settings.md shows them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from gpt_dist.config.settings import Config, flags, setting, show

NO_EFFECT = "No effect: the weights come from the checkpoint."


class Rule(NamedTuple):
    """Settings that may change, and the effect on the rest of the run."""

    settings: tuple[str, ...]
    effect: str


MAY_CHANGE = (
    Rule(
        (
            "train.steps",
            "train.epochs",
            "optim.decay_share",
            "optim.decay_shape",
            "optim.decay_power",
        ),
        "The learning rate follows the new schedule from the next step on.",
    ),
    Rule(
        ("optim.average", "optim.average_share"),
        "From the next step on; an average that begins later begins with the weights of then. The "
        "weights themselves do not depend on it.",
    ),
    Rule(
        ("train.batch_tokens",),
        "The next step has the new size. No sequence is repeated or left out.",
    ),
    Rule(
        (
            "train.micro_batch_size",
            "train.precision",
            "train.residual",
            "train.compile",
            "device",
            "optim.newton_schulz_precision",
        ),
        "Rounding differs.",
    ),
    Rule(
        (
            "parallel.strategy",
            "parallel.zero_stage",
            "parallel.offload",
            "parallel.deepspeed_config",
        ),
        "Rounding differs. A checkpoint holds whole tensors, so any strategy continues it, on any "
        "number of ranks.",
    ),
    Rule(
        ("optim.split_qkv",),
        "From the next step on Muon orthogonalises other matrices. A run that began before this "
        "setting existed counts as `false`; give that value to continue it as it was.",
    ),
    Rule(
        ("data.path", "data.tokenizer"),
        "The data may move, but must be the same: it is compared by its fingerprint.",
    ),
    Rule(
        (
            "train.eval_every",
            "train.eval_tokens",
            "train.checkpoint_every",
            "train.keep_checkpoints",
            "train.keep_every",
            "train.best_every",
            "train.sample_every",
            "train.health_every",
            "train.profile",
            "eval.hellaswag_every",
            "eval.hellaswag_path",
            "parallel.timeout",
        ),
        "From the next step on. The weights do not depend on it.",
    ),
    Rule(("train.init_from", "model.zero_projections", "model.zero_head"), NO_EFFECT),
    Rule(("out_dir", "resume"), "Say where the run is, not what it is."),
)
"""All other settings are fixed: another value is refused."""

FREE = {setting: rule.effect for rule in MAY_CHANGE for setting in rule.settings}
"""Setting that may change → the effect."""

UNSAID = ("out_dir", "resume")
"""Settings whose change is not worth a line."""


def as_it_ran(settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a checkpoint, with what an earlier release did without a setting.

    Args:
        settings: nested dictionaries, as ``state.json`` holds them.
    """
    optim = settings.get("optim", {})
    if optim.get("name") == "muon":  # of release 0.1, before it split matrices
        optim = {"split_qkv": False} | optim
    return settings | {"optim": optim}


def fixed() -> list[str]:
    """The settings that a continued run must not change."""
    return [flag for flag in flags() if flag not in FREE]


def changes(saved: Config, config: Config) -> list[str]:
    """A line for each setting that a continued run changes.

    Args:
        saved: the configuration in the checkpoint.
        config: the one it continues with.
    """
    lines = []
    for flag in flags():
        before, now = setting(saved, flag), setting(config, flag)
        if flag in FREE and flag not in UNSAID and before != now:
            note = " (no effect: the run continues)" if FREE[flag] == NO_EFFECT else ""
            lines.append(f"changed: {flag} {show(before)} → {show(now)}{note}")
    return lines


def conflicts(saved: Config, config: Config, source: object) -> list[str]:
    """A line for each fixed setting in which two configurations differ.

    Args:
        saved: the configuration in the checkpoint.
        config: the one that is to continue it.
        source: the checkpoint.
    """
    return [
        f"{flag} = {show(setting(config, flag))}: the run in {source} has "
        f"{show(setting(saved, flag))}"
        for flag in fixed()
        if setting(saved, flag) != setting(config, flag)
    ]


def way_out(saved: Config, config: Config, source: object) -> str:
    """What to do instead of continuing a checkpoint that does not fit the configuration."""
    advice = "choose another --out_dir for a new run"
    if saved.model.shape == config.model.shape:
        advice += f"; --train.init_from {source} starts it from these weights"
    return advice


def table() -> str:
    """The rules as a Markdown table."""
    lines = ["| setting | when the run continues with another value |", "|---|---|"]
    for settings, effect in MAY_CHANGE:
        lines.append(f"| {', '.join(f'`{name}`' for name in settings)} | {effect} |")
    sections: dict[str, list[str]] = {}
    for flag in fixed():
        sections.setdefault(flag.rpartition(".")[0], []).append(flag)
    names = []
    for section, members in sections.items():
        total = sum(f.rpartition(".")[0] == section for f in flags())
        if section and len(members) > total / 2:
            names.append(f"`{section}.*`" + " not named above" * (len(members) < total))
        else:
            names += [f"`{name}`" for name in members]
    lines.append(f"| {', '.join(names)} | Refused. |")
    return "\n".join(lines)
