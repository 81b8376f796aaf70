"""The data order: a permutation that every world size shares; nothing is lost or repeated."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt_dist.data.loader
from gpt_dist.config.command_line import build
from gpt_dist.config.settings import Config
from gpt_dist.data.dataset import open_dataset
from gpt_dist.data.loader import IGNORE, Loader, open_datasets, validation_batches
from gpt_dist.data.order import BLOCK, TrainingData, WindowOrder, permute
from gpt_dist.data.shards import write_shard
from gpt_dist.errors import GptDistError
from tests.conftest import make_dataset, words

CPU = torch.device("cpu")


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    image = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(image), np.arange(size))
    if size > 100:  # and no two keys share an order
        assert not np.array_equal(image, permute(np.arange(size), size, key ^ 1))


def test_permute_needs_no_memory_for_its_size() -> None:
    size = 10**12
    indices = np.array([0, 1, 2, size - 1])
    image = permute(indices, size, 7)
    assert len(set(image.tolist())) == 4
    assert (image < size).all()


def test_permute_looks_random() -> None:
    image = permute(np.arange(100_000), 100_000, 3)
    steps = np.diff(image)
    assert abs(np.corrcoef(np.arange(100_000), image)[0, 1]) < 0.02
    assert (np.abs(steps) < 10).mean() < 0.001
    counts = np.bincount(image[:10_000] * 10 // 100_000, minlength=10)
    assert counts.min() > 850
    assert counts.max() < 1150


@pytest.mark.slow(2)
@given(
    tokens=st.integers(40, 4000), context=st.integers(1, 39), stride=st.integers(1, 60),
    shuffle=st.sampled_from(["full", "blocks", "none"]), key=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_an_epoch_visits_every_window_once(
    tokens: int, context: int, stride: int, shuffle: str, key: int
) -> None:
    order = WindowOrder(tokens, context, stride, shuffle, key)
    for epoch in range(2):
        indices = np.arange(epoch * order.windows, (epoch + 1) * order.windows)
        starts = np.sort(order.starts(indices))
        assert (np.diff(starts) == stride).all()  # each once, none left out between
        assert starts[0] >= 0
        assert starts[0] < stride  # nothing lost at the start
        assert starts[-1] + context + 1 <= tokens
        # at the end at most the part that the epoch's offset cannot reach
        assert starts[-1] + 2 * stride + context + 1 > tokens


def test_epochs_differ_and_none_is_sequential() -> None:
    full = WindowOrder(10_000, 32, 32, "full", 5)
    first, second = (full.starts(np.arange(n, n + full.windows)) for n in (0, full.windows))
    assert not np.array_equal(first, second)
    assert first.min() != second.min()  # the offsets too
    none = WindowOrder(10_000, 32, 32, "none", 5)
    assert np.array_equal(none.starts(np.arange(5)), np.arange(5) * 32)


def test_blocks_read_one_stretch_after_the_other() -> None:
    order = WindowOrder(BLOCK * 32 * 5 + 33, 32, 32, "blocks", 5)
    starts = order.starts(np.arange(order.windows))
    blocks = (starts - starts.min()) // (32 * BLOCK)
    assert (np.diff(blocks) != 0).sum() == len(np.unique(blocks)) - 1
    assert not np.array_equal(np.unique(blocks), blocks[::BLOCK][: len(np.unique(blocks))])


def make_config(path: str, **train: int) -> Config:
    return build(
        {
            "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "context_length": 16},
            "data": {"path": path, "tokenizer": re.split("[,:]", path)[0]},
            "train": {"batch_tokens": 16 * 24, "micro_batch_size": 4, **train},
        }
    )


def stream(
    config: Config, world_size: int, micro_batch: int, steps: int, start: int = 0
) -> np.ndarray:
    """The sequences of a few steps in global order, from the loaders of all ranks."""
    data = TrainingData(config, open_datasets(config))
    batch = config.batch_sequences
    loaders = [
        Loader(data, batch_sequences=batch, micro_batch=micro_batch, rank=rank,
               world_size=world_size, device=CPU, consumed=start)
        for rank in range(world_size)
    ]  # fmt: skip
    rows = []
    for _ in range(steps):
        for batches in zip(*(loader.step() for loader in loaders), strict=True):
            for ids, targets in batches:
                assert torch.equal(ids[:, 1:], targets[:, :-1])
                rows.append(torch.cat([ids, targets[:, -1:]], dim=1).numpy())
    assert {loader.consumed for loader in loaders} == {start + steps * batch}
    for loader in loaders:
        loader.close()
    return np.concatenate(rows)


@pytest.mark.slow(2)
def test_the_order_does_not_depend_on_ranks_or_micro_batch(tiny_data: Path) -> None:
    config = make_config(str(tiny_data))
    reference = stream(config, 1, 24, 5)
    assert reference.shape == (120, 17)
    for world_size, micro_batch in ((1, 4), (2, 3), (3, 2), (4, 6), (8, 1)):
        assert np.array_equal(reference, stream(config, world_size, micro_batch, 5))
    # Continuing at a sequence gives what an uninterrupted run reads from there.
    assert np.array_equal(reference[48:], stream(config, 2, 4, 3, start=48))


def test_a_mixture_keeps_its_weights_and_each_sets_own_order(tmp_path: Path) -> None:
    a = make_dataset(tmp_path / "a", "ab" * 4000)
    b = make_dataset(tmp_path / "b", "ba" * 400 + "bb" * 400)
    (b / "tokenizer.json").write_bytes((a / "tokenizer.json").read_bytes())
    config = make_config(f"{a}:3,{b}:1")
    data = TrainingData(config, open_datasets(config))
    sources, starts = data.starts(np.arange(8192))
    assert abs((sources == 0).mean() - 0.75) < 0.001
    for window in np.split(sources[:4000], 40):  # evenly spread, not in long runs
        assert abs((window == 0).mean() - 0.75) < 0.03
    alone = make_config(str(b))
    only_b = TrainingData(alone, open_datasets(alone))
    count = int((sources == 1).sum())
    assert np.array_equal(starts[sources == 1], only_b.starts(np.arange(count))[1])
    assert data.fingerprint != only_b.fingerprint


def test_two_tokenizers_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = make_dataset(tmp_path / "a", "abc" * 100)
    b = make_dataset(tmp_path / "b", "xyz" * 100)
    config = make_config(f"{a},{b}")
    datasets = [open_dataset(a, str(a)), open_dataset(b, str(b))]
    assert datasets[0].tokenizer.to_dict() != datasets[1].tokenizer.to_dict()
    original = gpt_dist.data.loader.open_dataset
    monkeypatch.setattr(gpt_dist.data.loader, "open_dataset", lambda path, _: original(path, path))
    with pytest.raises(GptDistError, match="one tokenizer"):
        open_datasets(config)


def test_too_little_text_for_one_window(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "short", "abcdefghij")
    config = make_config(str(data))
    with pytest.raises(GptDistError, match="10 training tokens do not fill one window"):
        TrainingData(config, open_datasets(config))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (1, 8), (2, 3), (3, 4)])
def test_validation_predicts_every_token_once(
    tmp_path: Path, world_size: int, micro_batch: int
) -> None:
    text = words(300)
    data = make_dataset(tmp_path / "d", "x" + text, text)
    write_shard(data / "x_val_000001.bin", np.arange(10, dtype=np.uint16))
    split = open_dataset(data, str(data)).split("val")
    assert split is not None
    whole = split.read(0, len(split)).astype(np.int64)
    for tokens in (None, 100, 7):
        expected = whole[1 : (tokens or len(whole)) + 1]
        seen: dict[int, int] = {}
        for rank in range(world_size):
            batches = validation_batches(
                split, context=16, tokens=tokens, micro_batch=micro_batch, rank=rank,
                world_size=world_size, device=CPU,
            )  # fmt: skip
            window = rank
            for ids, targets in batches:
                for row_ids, row in zip(ids, targets, strict=True):
                    for offset, target in enumerate(row.tolist()):
                        if target != IGNORE:
                            position = window * 16 + offset
                            assert position not in seen
                            seen[position] = target
                            assert row_ids[offset] == whole[position]
                    window += world_size
        assert [seen[i] for i in range(len(seen))] == expected.tolist()
