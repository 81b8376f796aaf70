"""The documentation: it builds strictly, its tables are computed, its notebook runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gpt_dist.config import resuming, unheard
from gpt_dist.config.command_line import load, presets
from gpt_dist.model.gpt import GPT
from gpt_dist.training.plan.memory import activation_bytes
from gpt_dist.training.reporting.formatting import human
from gpt_dist.training.reporting.metrics import whole_lines
from tests import warm
from tests.components import require_module

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]


def gigabytes(size: float) -> str:
    if size < 1e6:
        return f"{size / 1e3:.0f} kB"
    return f"{size / 1e9:.1f} GB" if size > 5e8 else f"{size / 1e6:.0f} MB"


def hardware_rows() -> list[str]:
    """The table of docs/troubleshooting.md, from the presets themselves."""
    rows = []
    for name in presets():
        config, _ = load(["--config", name])
        # The bundled plays have 71 characters.
        sizes = {"char": 71, "demo": 71, "gpt1": 20_000}
        vocabulary = next((size for part, size in sizes.items() if part in name), 50_257)
        with torch.device("meta"):
            model = GPT(config.model.model_copy(update={"vocab_size": vocabulary}))
        parameters = model.num_parameters()
        micro_batch, _ = config.micro_batch(1)
        figures = [
            human(parameters),
            gigabytes(16 * parameters),
            gigabytes(activation_bytes(config, micro_batch)),
            gigabytes(12 * parameters),
            f"{model.flops_per_token():.1e}",
        ]
        rows.append(f"| {name} | {' | '.join(figures)} |")
    return rows


@pytest.mark.slow(2)
def test_hardware_table_is_computed() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert "\n".join(hardware_rows()) in page, "\n".join(hardware_rows())


@pytest.mark.parametrize("rules", [resuming, unheard], ids=["resuming", "unheard"])
def test_tables_of_settings_are_the_rules(rules: ModuleType) -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert rules.table() in page, rules.table()


def test_each_step_from_bigram_to_transformer_buys_something() -> None:
    """The page's losses are the records', and each is lower than the one before."""
    page = (ROOT / "docs" / "bigram-to-transformer.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([\w-]+)` \|.*\| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(shown) >= 6
    for run, loss in shown:
        rows = whole_lines(ROOT / "benchmarks/results/shakespeare" / run / "metrics.jsonl")
        recorded = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
        assert f"{recorded[-1]:.3f}" == loss, run
    losses = [float(loss) for _, loss in shown]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1.46


@pytest.mark.slow
def test_site_builds_strictly(tmp_path: Path) -> None:
    require_module("material", "mkdocs-material is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "recipes" / "index.html").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_modules_exist(page: Path) -> None:
    """Relative links lead to files, and each ``python -m`` names a module that is there."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)
    for target in links + re.findall(r'(?:src|srcset)="(?!https?:)([^"]+)"', text):
        assert (page.parent / target).exists(), target
    for module in re.findall(r"-m ((?:gpt_dist|serve)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_paths_in_the_text_exist(page: Path) -> None:
    """A path of the repository between backticks names a file or folder that is there."""
    text = page.read_text(encoding="utf-8")
    folders = "gpt_dist|serve|launch|benchmarks|configs|docs|notebooks|examples|proto|tests"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.slow(60)
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """notebooks/quickstart.ipynb from an empty directory, with fewer steps."""
    nbformat, nbclient = require_module("nbformat"), require_module("nbclient")
    require_module("ipykernel")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if "STEPS = " in cell.source)
    first.source = re.sub(r"STEPS = \d+", "STEPS = 4", first.source)
    flag = "--train.sample_every 0"
    for cell in notebook.cells:
        cell.source = cell.source.replace(flag, f"{flag} --train.eval_tokens 4096")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    resources = {"metadata": {"path": str(tmp_path)}}
    programs = tmp_path / "programs"
    programs.mkdir()
    with warm.python(programs) as python:
        warm_start = f"import sys; sys.executable = {str(python)!r}"
        notebook.cells.insert(0, nbformat.v4.new_code_cell(warm_start))
        nbclient.NotebookClient(notebook, timeout=240, resources=resources).execute()
    for run in ("bigram", "one-head", "transformer"):
        assert (tmp_path / "runs" / run / "loss.png").is_file()
    assert (tmp_path / "steps.png").is_file()
    output = "".join(
        part.get("text", "") for cell in notebook.cells for part in cell.get("outputs", [])
    )
    assert "val_loss" in output
    assert "ROMEO:" in output
