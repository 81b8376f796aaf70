"""Rows of documents: packed by best fit, the same for every process and after every restart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_dist.config.command_line import build
from gpt_dist.config.settings import Config
from gpt_dist.data.dataset import open_dataset
from gpt_dist.data.order import TrainingData
from gpt_dist.data.rows import CHOICE, DocumentRows, plan_rows
from gpt_dist.data.shards import write_shard
from gpt_dist.errors import GptDistError

EOT = 50256


def packed(sizes: list[int], length: int) -> list[list[tuple[int, int]]]:
    """Best fit by the letter of its description: (document, tokens taken) of each row."""
    waiting = list(enumerate(sizes))
    choice, rest = waiting[:CHOICE], waiting[CHOICE:]
    rows, row, room = [], [], length
    while choice:
        fitting = [document for document in choice if document[1] <= room]
        if fitting:
            best = max(fitting, key=lambda document: (document[1], document[0]))
        else:
            best = min(choice, key=lambda document: (document[1], document[0]))
        choice.remove(best)
        choice += rest[:1]
        rest = rest[1:]
        row.append((best[0], min(best[1], room)))
        room -= row[-1][1]
        if not room:
            rows.append(row)
            row, room = [], length
    return rows


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 30))
def test_rows_are_packed_by_best_fit(sizes: list[int], length: int) -> None:
    beginnings = np.cumsum([3, *sizes])[:-1]
    starts, ends = plan_rows(beginnings, 3 + sum(sizes), length)
    document = {int(at): number for number, at in enumerate(beginnings)}
    rows, before = [], 0
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if before % length == 0:
            rows.append([])
        rows[-1].append((document[start], end - before))
        before = end
    assert rows == packed(sizes, length)


@settings(max_examples=3)
@given(st.integers(0, 2**32))
def test_more_documents_than_are_compared(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 300, CHOICE + 200).tolist()
    starts, ends = plan_rows(np.cumsum([0, *sizes])[:-1], sum(sizes), 128)
    taken = [size for row in packed(sizes, 128) for _, size in row]
    assert np.diff(ends, prepend=0).tolist() == taken
    assert len(set(starts.tolist())) == len(starts)  # no document is seen twice


def make_documents(directory: Path, count: int = 200) -> np.ndarray:
    """A data set of random documents in three shards; returns its tokens."""
    dice = np.random.default_rng(0)
    parts = []
    for _ in range(count):
        parts += [[EOT], dice.integers(0, 50000, dice.integers(1, 60))]
    tokens = np.concatenate(parts).astype(np.uint16)
    directory.mkdir()
    for number, shard in enumerate(np.array_split(tokens, 3)):
        write_shard(directory / f"text_train_{number:06d}.bin", shard)
    return tokens


def make_config(data: object) -> Config:
    return build(
        {
            "model": {"context_length": 31},
            "data": {"path": str(data), "rows": "documents"},
            "train": {"batch_tokens": 248, "micro_batch_size": 2, "steps": 4},
            "optim": {"warmup_steps": 1},
        }
    )


def test_each_row_is_made_of_beginnings_of_documents(tmp_path: Path) -> None:
    tokens = make_documents(tmp_path / "data")
    documents = {bytes(d.tobytes()) for d in np.split(tokens, np.flatnonzero(tokens == EOT))[1:]}
    data = TrainingData(make_config(tmp_path / "data"), [open_dataset(tmp_path / "data")])
    count = data.windows
    epoch = data.sequences(np.arange(count))
    assert epoch.shape == (count, 32)
    cropped = 0
    for row in epoch:
        assert row[0] == EOT
        *whole, last = np.split(row, np.flatnonzero(row == EOT))[1:]
        assert all(document.tobytes() in documents for document in whole)
        if last.tobytes() not in documents:
            cropped += 1
            assert any(document.startswith(last.tobytes()) for document in documents)
    assert 0 < cropped < count
    # The next epoch has the same rows in another order.
    following = data.sequences(np.arange(count, 2 * count))
    assert not np.array_equal(epoch, following)
    assert sorted(map(bytes, epoch)) == sorted(map(bytes, following))
    stream = data.streams[0]
    assert isinstance(stream, DocumentRows)
    assert stream.share == pytest.approx(count * 32 / len(tokens))


def test_the_plan_is_kept_and_made_again_where_it_is_damaged(tmp_path: Path) -> None:
    make_documents(tmp_path / "data")
    config, indices = make_config(tmp_path / "data"), np.arange(300)

    def rows() -> np.ndarray:
        return TrainingData(config, [open_dataset(tmp_path / "data")]).sequences(indices)

    first = rows()
    (plan,) = (tmp_path / "data").glob("rows-32-*.npy")
    whole, made = plan.read_bytes(), plan.stat().st_mtime_ns
    assert np.array_equal(rows(), first)
    assert plan.stat().st_mtime_ns == made
    for damaged in (b"", whole[: len(whole) // 2], b"nonsense"):
        plan.write_bytes(damaged)
        assert np.array_equal(rows(), first)
        assert plan.read_bytes() == whole
    assert [path.name for path in (tmp_path / "data").iterdir() if path.suffix != ".bin"] == [
        plan.name
    ]


def test_text_without_documents_is_refused(tmp_path: Path, tiny_data: Path) -> None:
    with pytest.raises(GptDistError, match="no end-of-text token between"):
        TrainingData(make_config(tiny_data), [open_dataset(tiny_data, str(tiny_data))])
    (tmp_path / "one").mkdir()
    write_shard(tmp_path / "one" / "text_train_000000.bin", np.arange(100, dtype=np.uint16))
    with pytest.raises(GptDistError, match="do not fill one row"):
        TrainingData(make_config(tmp_path / "one"), [open_dataset(tmp_path / "one")])
