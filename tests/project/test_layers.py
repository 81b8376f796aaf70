"""The house: few entries at the root, short files, and imports that only run downward."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import BIN

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gpt_dist", "serve")
COMMANDS = {"train", "prepare", "generate", "evaluate", "export", "import_hf", "plot", "kernels"}
MODULES = [
    path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if not path.stem.endswith(("_pb2", "_pb2_grpc"))
]


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    """The check of ``make lint`` on the packages in a directory."""
    command = [str(BIN / "lint-imports"), "--no-logo", "--no-cache"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all modules and of the rules."""
    directory = tmp_path_factory.mktemp("house")
    shutil.copy(ROOT / "pyproject.toml", directory)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "presets", "assets", "native")
        shutil.copytree(ROOT / package, directory / package, ignore=ignored)
    return directory


@pytest.mark.slow
def test_no_import_runs_upward(house: Path) -> None:
    done = lint_imports(house)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "line", "reported"),
    [
        (
            "gpt_dist/ops/attention.py",
            "from gpt_dist.model import gpt",
            "gpt_dist.ops.attention -> gpt_dist.model.gpt",
        ),
        (
            "gpt_dist/data/shards.py",
            "def late() -> None:\n    import gpt_dist.training.reporting.metrics",
            "gpt_dist.data.shards -> gpt_dist.training.reporting.metrics",
        ),
        ("serve/options.py", "import serve.server", "serve.options -> serve.server"),
        (
            "gpt_dist/inference/decoder.py",
            "import serve.metrics",
            "gpt_dist.inference.decoder -> serve.metrics",
        ),
    ],
)
def test_an_upward_import_is_found(house: Path, module: str, line: str, reported: str) -> None:
    file = house / module
    before = file.read_text(encoding="utf-8")
    file.write_text(f"{before}\n{line}\n", encoding="utf-8")
    try:
        done = lint_imports(house)
    finally:
        file.write_text(before, encoding="utf-8")
    assert done.returncode == 1
    assert reported in done.stdout, done.stdout


@pytest.mark.slow
def test_a_folder_without_a_floor_is_found(house: Path) -> None:
    extra = house / "gpt_dist" / "extra"
    extra.mkdir()
    (extra / "__init__.py").touch()
    try:
        done = lint_imports(house)
    finally:
        shutil.rmtree(extra)
    assert done.returncode != 0
    assert "gpt_dist.extra" in done.stdout + done.stderr


def test_the_root_has_few_entries() -> None:
    """The folders and shared modules; commands are thin and come on top."""
    found = (ROOT / "gpt_dist").iterdir()
    entries = {path.stem for path in found if path.name[:2] != "__" and path.name != "py.typed"}
    assert entries >= COMMANDS
    assert len(entries - COMMANDS) <= 16, sorted(entries)


def test_folders_and_files_are_small() -> None:
    for folder in {path.parent for path in MODULES}:
        modules = [path for path in MODULES if path.parent == folder and path.name[:2] != "__"]
        assert len(modules) <= 14, folder.relative_to(ROOT)
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert not {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > 420}
