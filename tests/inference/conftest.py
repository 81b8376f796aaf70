"""The choice of a backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gpt_dist.inference import cpu_kernels as kernels
from tests.decoders import BACKENDS, use_backend


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    use_backend(request.param, monkeypatch)
    yield request.param
    kernels.decoder_library.cache_clear()
