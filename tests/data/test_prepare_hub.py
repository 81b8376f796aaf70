"""From URLs, the hub and mirrors of it, end to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt_dist.data.shards import open_dataset
from gpt_dist.text.tokenizers import END_OF_TEXT
from tests.data.helpers import (
    encoding,
    hub_layout,
    run,
    split_documents,
    stories,
    tokens,
)
from tests.file_server import serve

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def test_fineweb_from_a_mirror_of_the_hub(tmp_path: Path) -> None:
    """Listed, fetched over a breaking connection, tokenised; then found to be there, offline."""
    documents = stories(300)
    hub_layout(tmp_path / "web/datasets/HuggingFaceFW/fineweb-edu", documents, "sample/10BT")
    with serve(tmp_path / "web") as server:
        server.cut_after = [9000]
        assert run("fineweb-edu", "--source", server.url, "--val-fraction", 0) == 0
    out = "data/fineweb-edu-sample-10BT"
    assert split_documents(tokens(out)) == encoding().encode_ordinary_batch(documents)
    kept = list(Path("data/downloads").rglob("*.parquet"))
    assert len(kept) == len({wanted[0] for wanted in server.requests}) == 2
    assert run("fineweb-edu", "--source", server.url, "--val-fraction", 0) == 0
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
