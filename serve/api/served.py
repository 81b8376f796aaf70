"""The model that is served, as far as calls need to know it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from gpt_dist.text.tokenizers import Tokenizer
from serve.api.parsing import Limits
from serve.api.status import other_weights, unknown_model
from serve.engine.engine import Engine
from serve.engine.loading import Loaded


@dataclass(frozen=True)
class Served:
    """A model that is ready to serve."""

    name: str
    engine: Engine
    tokenizer: Tokenizer
    limits: Limits
    facts: dict[str, Any]
    """The constant fields of GetModelInfoResponse."""

    @property
    def weights_version(self) -> str:
        """Version of the weights for new requests."""
        return self.engine.scheduler.weights.newest

    def fingerprint(self, weights_version: str) -> str:
        """What computes with these weights. Replicas that differ in it may differ in tokens."""
        facts = self.facts
        parts = (facts["dtype"], f"{facts['backend']}:{facts['device']}", facts["server_version"])
        return "/".join((weights_version, *parts))

    def check_model(self, name: str, field: str = "model") -> None:
        """Check a request's model; empty stands for the one that is served.

        Raises:
            StatusError: NOT_FOUND.
        """
        if name and name != self.name:
            raise unknown_model(name, self.name, field)

    def check_weights(self, expected: str) -> None:
        """Check the weights that a request expects; empty stands for any.

        Raises:
            StatusError: FAILED_PRECONDITION.
        """
        if expected and expected != self.weights_version:
            raise other_weights(expected, self.weights_version)


def server_version() -> str:
    """Version of this package."""
    try:
        return version("gpt_dist")
    except PackageNotFoundError:  # run from a checkout
        return "0"


def describe_model(loaded: Loaded, engine: Engine, name: str) -> Served:
    """Collect what calls need to know about a model."""
    decoder, tokenizer = loaded.decoder, loaded.tokenizer
    facts = {
        **loaded.shape,
        "name": name,
        "parameters": loaded.parameters,
        "max_context": decoder.max_context,
        "vocab_size": decoder.vocab_size,
        "tokenizer": tokenizer.name,
        "device": decoder.device.type,
        "dtype": decoder.dtype,
        "backend": decoder.backend,
        "deterministic": decoder.deterministic,
        "server_version": server_version(),
    }
    if tokenizer.eot_id is not None:
        facts["end_of_text_id"] = tokenizer.eot_id
    lengths = tokenizer.byte_lengths
    limits = Limits(
        tokenizer=tokenizer,
        vocab_size=decoder.vocab_size,
        max_context=decoder.max_context,
        max_slots=decoder.max_slots,
        max_outputs=engine.scheduler.jobs.capacity,
        longest_token=max(1, int(lengths.max())),
        typical_token=max(1, round(2 * float(lengths.mean()))),
    )
    return Served(name, engine, tokenizer, limits, facts)
