"""What the kernels are compiled for, and when a compiler is needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gpt_dist.errors import GptDistError
from gpt_dist.ops import build
from tests.components import missing, require
from tests.conftest import break_compiler

AVX2 = set(build.INSTRUCTION_SETS["avx2"])
AVX512 = set(build.INSTRUCTION_SETS["avx512"]) | AVX2


@pytest.mark.parametrize(
    ("present", "wanted", "expected"),
    [
        (AVX512, "", "avx512"),
        (AVX512, "avx2", "avx2"),
        (AVX512 - {"avx512_bf16"}, "", "avx2"),
        (AVX2, "", "avx2"),
        (AVX2, "avx512", "this CPU has no avx512f"),
        (AVX512 - {"avx512_vnni"}, "avx512", "this CPU has no avx512_vnni"),
        (AVX2 - {"fma"}, "", "this CPU has no fma"),
        (set(), "", "this CPU has no avx2"),
        (AVX2, "sse2", "GPT_DIST_CPU=sse2: choose one of avx512, avx2"),
    ],
)
def test_the_widest_instruction_set_of_the_cpu(
    present: set[str], wanted: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cpu_features", lambda: present)
    monkeypatch.setenv("GPT_DIST_CPU", wanted)
    if expected in build.INSTRUCTION_SETS:
        assert build.instruction_set() == expected
    else:
        with pytest.raises(GptDistError, match=f"^{expected}$"):
            build.instruction_set()
        assert build.unavailable() == expected
        with pytest.raises(GptDistError, match=f"^{expected}$"):
            build.load("training.cpp")


@pytest.mark.slow
@pytest.mark.parametrize("name", build.INSTRUCTION_SETS)
@pytest.mark.parametrize("source", build.KERNELS)
def test_sources_compile_for_every_instruction_set(name: str, source: str) -> None:
    """Also for those that this machine cannot run."""
    compiler = require("g++", "clang++")
    features = [f"-m{feature.replace('_', '')}" for feature in build.INSTRUCTION_SETS[name]]
    command = [compiler, *build.FLAGS, *features, "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run([*command, str(build.SOURCES / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on a machine with a compiler that takes no time; returns the cache."""
    if reason := build.unavailable():
        missing(f"no CPU kernels: {reason}")
    kernels = {source: build.build(source) for source in build.KERNELS}
    programs = tmp_path / "bin"
    programs.mkdir()
    compiler = programs / "g++"
    cases = "".join(f"*/{source}) from={path};;" for source, path in kernels.items())
    compiler.write_text(
        '#!/bin/sh\nfor word; do case "$word" in ' + cases + " esac; to=$word; done\n"
        '/bin/cp "$from" "$to"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gpt_dist"


def test_a_cached_library_needs_no_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not cache.exists()
    assert build.unavailable() is None
    build.load("decoder.cpp")
    assert [path.stem.split("-")[0] for path in cache.iterdir()] == ["decoder"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.load("decoder.cpp").packed_bytes
    # The other source is not built yet.
    assert build.unavailable() == "there is no C++ compiler (g++)"
    with pytest.raises(GptDistError, match=r"^there is no C\+\+ compiler \(g\+\+\)$"):
        build.load("training.cpp")
    break_compiler(tmp_path)
    with pytest.raises(GptDistError, match=r"^building training.cpp failed: out of order$"):
        build.load("training.cpp")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    build.load("training.cpp")
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.unavailable() is None
    assert build.load("training.cpp").gelu_bf16
    assert len(list(cache.iterdir())) == 2


def test_instruction_sets_share_a_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cpu_features", lambda: AVX512)
    paths = []
    for name in build.INSTRUCTION_SETS:
        monkeypatch.setenv("GPT_DIST_CPU", name)
        paths.append(build.build("training.cpp"))
    assert sorted(paths) == sorted(cache.iterdir())
    assert len(set(paths)) == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file, not a directory")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = build.build("training.cpp")
    assert path.is_relative_to(tmp_path)
    assert build.load("training.cpp").gelu_bf16
