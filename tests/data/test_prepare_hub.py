"""From URLs, the hub and mirrors of it, end to end: what was read is recorded."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt_dist.data.dataset import open_dataset
from gpt_dist.data.preparation import run as preparation
from gpt_dist.data.preparation import tokenize_pool
from gpt_dist.errors import GptDistError, UsageError
from gpt_dist.text.tokenizers import END_OF_TEXT
from tests.data.helpers import (
    DEADLINE,
    encoding,
    hub_layout,
    journal_entry,
    run,
    split_documents,
    start_prepare,
    step,
    stories,
    tokens,
    write_parquet,
)
from tests.file_server import HEAD, serve

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def arguments_of(directory: str) -> dict[str, Any]:
    return dict(json.loads((Path(directory) / "dataset.json").read_text())["arguments"])


def forget(directory: str, *names: str) -> None:
    """Turn it into a data set of an older release, which did not record these arguments."""
    file = Path(directory) / "dataset.json"
    info = json.loads(file.read_text())
    for name in names:
        info["arguments"].pop(name, None)
    file.write_text(json.dumps(info))


# --- URLs ----------------------------------------------------------------------------------------


def test_another_url_is_another_data_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "web").mkdir()
    for name in ("a.txt", "b.txt", "c.txt?v=1", "c.txt?v=2"):
        (tmp_path / "web" / name).write_text(f"one\ntwo\n{name}\n")
    with serve(tmp_path / "web") as server:
        for one, other, query in (("a.txt", "b.txt", ""), ("c.txt?v=1", "c.txt?v=2", "[?]")):
            flags = ["--split", "lines", "--val-fraction", 0, "--out", "out", "--overwrite"]
            run("text", f"{server.url}/{one}", *flags)
            text = open_dataset("out").tokenizer.decode(tokens("out"))
            assert text.endswith(one)
            capsys.readouterr()
            assert run("text", f"{server.url}/{one}", *flags[:-1]) == 0
            assert "is there already" in capsys.readouterr().out
            message = rf"made with urls = {server.url}/\w\.txt{query}.*, not {server.url}/\w.txt"
            with pytest.raises(UsageError, match=message) as caught:
                run("text", f"{server.url}/{other}", *flags[:-1])
            assert "\n" not in str(caught.value)
            (tmp_path / "local.txt").write_text("x")
            with pytest.raises(UsageError, match=r"urls = http.* and content = unset, not 1 file"):
                run("text", "local.txt", *flags[:-1])
            run("text", f"{server.url}/{other}", *flags)
            assert open_dataset("out").tokenizer.decode(tokens("out")).endswith(other)
    # Data sets of releases that did not record the URL are still known as what was asked for.
    forget("out", "urls")
    assert run("text", f"{server.url}/anything.txt", *flags[:-1]) == 0
    assert run("inspect", "out") == 0


def test_no_secret_of_a_url_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.txt").write_text("one")
    with serve(tmp_path / "web") as server:
        url = server.url.replace("http://", "http://user:geheim@")
        run("text", f"{url}/a.txt?signature=geheim", "--out", "out")
    assert arguments_of("out")["urls"][0].startswith(f"{server.url}/a.txt?")
    assert "geheim" not in (tmp_path / "out" / "dataset.json").read_text()
    assert not any("geheim" in str(path) for path in tmp_path.rglob("*"))


def test_an_unfinished_data_set_resumes_from_its_own_url_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenize_pool, "CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(preparation, "COMMIT_SECONDS", 0)
    (tmp_path / "web").mkdir()
    documents = stories(60)
    good = "\n".join(json.dumps({"text": text}) for text in documents)
    (tmp_path / "web" / "a.jsonl").write_text(good.replace("40 ", "\x00", 1))
    (tmp_path / "web" / "b.jsonl").write_text(good)
    flags = ["--val-fraction", 0, "--out", "out"]
    with serve(tmp_path / "web") as server:
        with pytest.raises(GptDistError, match="documents are done and kept"):
            run("jsonl", f"{server.url}/a.jsonl", *flags)
        with pytest.raises(
            UsageError, match=r"unfinished data set made with urls = .*a\.jsonl, not"
        ):
            run("jsonl", f"{server.url}/b.jsonl", *flags)
        (tmp_path / "web" / "a.jsonl").write_text(good)
        shutil.rmtree("data/downloads")
        assert run("jsonl", f"{server.url}/a.jsonl", *flags) == 0
    assert split_documents(tokens("out")) == encoding().encode_ordinary_batch(documents)


# --- the hub -------------------------------------------------------------------------------------


@pytest.mark.slow(2)
def test_fineweb_from_a_mirror_of_the_hub(tmp_path: Path) -> None:
    """Fetched over a breaking connection and tokenised; found again without a connection."""
    documents = stories(300)
    hub_layout(tmp_path / "web/datasets/HuggingFaceFW/fineweb-edu", documents, "sample/10BT")
    with serve(tmp_path / "web") as server:
        server.cut_after = [9000]
        assert run("fineweb-edu", "--source", server.url, "--val-fraction", 0) == 0
    out = "data/fineweb-edu-sample-10BT"
    assert split_documents(tokens(out)) == encoding().encode_ordinary_batch(documents)
    kept = list(Path("data/downloads").rglob("*.parquet"))
    assert len(kept) == len({wanted[0] for wanted in server.requests}) == 2
    assert run("fineweb-edu", "--source", server.url, "--val-fraction", 0) == 0  # it is down now
    # The downloads are laid out as on the hub: they serve as a local source.
    again = ["--source", "data/downloads/fineweb-edu", "--val-fraction", 0, "--out", "again"]
    assert run("fineweb-edu", *again) == 0
    assert open_dataset("again").fingerprint == open_dataset(out).fingerprint


def test_tinystories_from_a_mirror_of_the_hub(tmp_path: Path) -> None:
    place = tmp_path / "web/datasets/roneneldan/TinyStories"
    place.mkdir(parents=True)
    for variant in ("V2-GPT4-", "-"):
        for number, part in enumerate(("train", "valid")):
            documents = stories(20, seed=number + 2 * (variant == "-"))
            (place / f"TinyStories{variant}{part}.txt").write_text(END_OF_TEXT.join(documents))
    with serve(tmp_path / "web") as server:
        assert run("tinystories", "--source", server.url) == 0
        assert run("tinystories", "--source", server.url, "--variant", "v1") == 0
        file = f"{server.url}/datasets/roneneldan/TinyStories/TinyStories-train.txt"
        assert run("text", file, "--split", "eot", "--val-fraction", 0) == 0
    for out, seed in (("data/tinystories", 0), ("data/tinystories-v1", 2), ("data/text", 2)):
        expected = encoding().encode_ordinary_batch(stories(20, seed=seed))
        assert split_documents(tokens(out)) == expected


@pytest.mark.slow
def test_the_hubs_commit_is_recorded_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data set on the hub changes between the kill and the second attempt."""
    place = "datasets/HuggingFaceFW/fineweb-edu"
    documents = stories(4000)
    hub_layout(tmp_path / "web" / place, documents, "sample/10BT")
    command = ["fineweb-edu", "--val-fraction", 0, "--out", "out", "--source"]
    with serve(tmp_path / "web") as server:
        process = start_prepare(*command, server.url)
        while not journal_entry(process):
            step(process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=DEADLINE)
        # Files that are brought here instead must be the same files.
        shutil.copytree(tmp_path / "web" / place, tmp_path / "copy")
        write_parquet(tmp_path / "copy" / "sample/10BT/002_00000.parquet", ["more"])
        with pytest.raises(UsageError, match=r"content = 2 file\(s\), .* not 3 file\(s\), "):
            run(*command, tmp_path / "copy")
        server.commits = {HEAD: tmp_path / "web", "b" * 40: tmp_path / "new"}
        server.head = "b" * 40
        write_parquet(tmp_path / "new" / place / "sample/10BT/000_00000.parquet", stories(100, 1))
        hub_layout(tmp_path / "new" / place, documents[::-1], "sample/10BT/later")
        shutil.rmtree("data/downloads")
        assert run(*command, server.url) == 0
        assert arguments_of("out")["commit"] == HEAD
        assert split_documents(tokens("out")) == encoding().encode_ordinary_batch(documents)

        capsys.readouterr()
        run("inspect", "out")
        assert f"fineweb-edu at commit {HEAD}" in capsys.readouterr().out

        # --revision: the recorded commit is the same data set, another one is not.
        assert run(*command, server.url, "--revision", HEAD) == 0
        with pytest.raises(UsageError, match="revision = unset, not v2"):
            run(*command, server.url, "--revision", "v2")
        older = [*command[:-3], "--out", "older", "--revision", HEAD, "--source", server.url]
        assert run(*older) == 0
        assert open_dataset("older").fingerprint == open_dataset("out").fingerprint
        with pytest.raises(GptDistError, match="fineweb-edu@v9: HTTP 404"):
            run("fineweb-edu", "--source", server.url, "--revision", "v9", "--out", "none")
    forget("out", "commit", "revision")  # of an older release
    assert run(*command, server.url) == 0
    with pytest.raises(UsageError, match="--revision: only for data of the hub, not for files"):
        run("fineweb-edu", "--source", "web", "--revision", "v2", "--out", "none")
    assert not Path("none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["environment", "mirror"])
def test_hub_data_sets_by_name(how: str, tmp_path: Path) -> None:
    """In a process of its own: ``datasets`` reads the address of the hub at import."""
    documents = stories(30)
    write_parquet(tmp_path / "old/datasets/owner/name/data/train-00000-of-00001.parquet", documents)
    write_parquet(tmp_path / "web/datasets/owner/name/data/train-00000-of-00001.parquet", ["new"])
    old = "c" * 40
    with serve(tmp_path / "web") as server:
        server.commits = {old: tmp_path / "old"}
        environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
        command = [sys.executable, "-m", "gpt_dist.prepare", "hf", "owner/name"]
        command += ["--val-fraction", "0"]
        if how == "mirror":
            command += ["--source", server.url]
        else:
            environment["HF_ENDPOINT"] = server.url
        runs = [("old", ["--revision", old]), ("new", [])]
        for out, flags in runs if how == "environment" else runs[1:]:
            done = subprocess.run(
                [*command, "--out", f"out-{out}", *flags], env=environment, capture_output=True,
                text=True, timeout=DEADLINE,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        token = "Bearer hf_secret" if how == "environment" else None
        assert server.authorizations <= {token, None}
        assert token in server.authorizations
    assert arguments_of("out-new")["commit"] == HEAD
    assert split_documents(tokens("out-new")) == [encoding().encode_ordinary("new")]
    if how == "environment":
        assert arguments_of("out-old")["commit"] == old
        assert split_documents(tokens("out-old")) == encoding().encode_ordinary_batch(documents)


# --- TinyStories ---------------------------------------------------------------------------------


def test_tinystories_from_a_full_local_copy(tmp_path: Path) -> None:
    """A directory with all files of the hub's repository: only one variant is read."""
    place = tmp_path / "copy"
    names = {"v2": "TinyStoriesV2-GPT4", "v1": "TinyStories"}
    texts: dict[tuple[str, str], list[str]] = {}
    place.mkdir()
    for number, (variant, name) in enumerate(names.items()):
        for split, part in (("train", "train"), ("val", "valid")):
            texts[variant, split] = stories(20, seed=10 * number + len(part))
            content = END_OF_TEXT.join(texts[variant, split])
            (place / f"{name}-{part}.txt").write_text(content)
    write_parquet(place / "data" / "train-00000-of-00001.parquet", stories(5, seed=99))
    for flags, variant, out in (
        ([], "v2", "data/tinystories"),
        (["--variant", "v2"], "v2", "data/tinystories-v2"),
        (["--variant", "v1"], "v1", "data/tinystories-v1"),
    ):
        assert run("tinystories", "--source", place, *flags) == 0
        for split in ("train", "val"):
            expected = encoding().encode_ordinary_batch(texts[variant, split])
            assert split_documents(tokens(out, split)) == expected
    for name in ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"):
        (place / name).unlink()
    with pytest.raises(UsageError, match=r"no TinyStoriesV2-GPT4-train\.txt .* give --variant v1"):
        run("tinystories", "--source", place, "--out", "none")
    with pytest.raises(UsageError, match=r"--variant v1: --source .* leave out --variant"):
        run("tinystories", "--source", place / "data", "--variant", "v1", "--out", "none")
    assert not Path("none").exists()
