"""The allocator of large CPU tensors, in a process of its own each time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.conftest import break_compiler, read_rows, run_train


def run(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_tensors_never_overlap() -> None:
    """Four threads take and give tensors of all sizes; each finds in its own what it wrote."""
    program = """
import random, threading
import torch
from gpt_dist.training.memory import use_region
use_region(1 << 32)
torch.set_num_threads(1)
wrong = []

def work(seed):
    draw, live = random.Random(seed), []
    for number in range(1500):
        if live and draw.random() < 0.5:
            tensor, value = live.pop(draw.randrange(len(live)))
            if not (tensor == value).all():
                wrong.append(value)
        else:
            value = seed * 10_000 + number
            size = int(2 ** draw.uniform(12, 19))
            tensor = torch.full((size,), value, dtype=torch.int32)
            if size >= 1 << 15 and tensor.data_ptr() % 64:
                wrong.append("alignment")
            live.append((tensor, value))
        if draw.random() < 0.02 and live:
            tensor, value = live[-1]
            live[-1] = tensor.repeat(2), value  # a tensor from a tensor
    for tensor, value in live:
        if not (tensor == value).all():
            wrong.append(value)

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(wrong)
"""
    assert run(program) == "[]"


def test_holes_are_filled_and_merged() -> None:
    """Equal sizes take each other's place; neighbours that are free serve a larger tensor."""
    program = """
import torch
from gpt_dist.training.memory import use_region
use_region(1 << 30)
make = lambda megabytes: torch.zeros(megabytes << 20, dtype=torch.uint8)
a, b, c, d = make(3), make(3), make(5), make(1)
at = a.data_ptr()
assert b.data_ptr() == at + (3 << 20) and c.data_ptr() == at + (6 << 20)
del b
b = make(3)
assert b.data_ptr() == at + (3 << 20), "the same size again"
del a, c
e = make(4)
assert e.data_ptr() == at + (6 << 20), "the smallest hole that is large enough"
del b
f = make(6)
assert f.data_ptr() == at, "two neighbours are one hole"
del e, f
g = make(11)
assert g.data_ptr() == at, "and three"
h = make(2)
assert h.data_ptr() == at + (12 << 20)
del h
assert make(7).data_ptr() == at + (12 << 20), "the last hole grows"
print("good")
"""
    assert run(program) == "good"


def test_a_full_region_leaves_tensors_to_the_c_library() -> None:
    program = """
import torch
from gpt_dist.training.memory import use_region
before = torch.arange(100_000)  # from the C library; goes back there
use_region(8 << 20)
tensors = [torch.full((500_000,), number) for number in range(10)]  # 4 MB each
assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
low = tensors[0].data_ptr()
inside = sum(0 <= tensor.data_ptr() - low < 8 << 20 for tensor in tensors)
del before, tensors
print(inside, torch.ones(500_000).data_ptr() == low)
"""
    assert run(program) == "2 True"


STEPS = """
import resource
import torch
from gpt_dist.training.memory import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
places, counts = [], []
for step in range(6):
    start = faults()
    kept = [torch.ones(1_000_000 + 1_000 * layer) for layer in range(20)]
    places.append([tensor.data_ptr() for tensor in kept])
    del kept
    counts.append(faults() - start)
sizes = [-(-4 * (1_000_000 + 1_000 * layer) // 64) * 64 for layer in range(20)]
adjacent = all(b - a == size for a, b, size in zip(places[0], places[0][1:], sizes))
print(adjacent, len(set(map(tuple, places))) == 1, max(counts[2:]) < 2_000)  # of 20,000 pages
"""


def test_a_step_finds_the_memory_of_the_step_before() -> None:
    """Side by side without headers, at the same addresses in each step, and nothing mapped anew."""
    assert run(STEPS) == "True True True"


def test_without_the_allocator_the_c_library_keeps_what_it_has(tmp_path: Path) -> None:
    assert run(STEPS, GPT_DIST_KERNELS="0").split()[::2] == ["False", "True"]
    broken = "import logging; logging.basicConfig(format='%(message)s', stream=sys.stdout)"
    cache = str(tmp_path / "cache")
    lines = run(
        f"import sys; {broken}\n{STEPS}", CXX=str(break_compiler(tmp_path)), XDG_CACHE_HOME=cache
    ).splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("building allocator.cpp failed: out of order")
    assert lines[1].split()[::2] == ["False", "True"]


def test_a_tensor_larger_than_the_machine_is_refused_and_the_process_goes_on() -> None:
    program = """
import os, torch
from gpt_dist.training.memory import keep_freed_memory
keep_freed_memory()
size = 5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
try:
    torch.empty(size, dtype=torch.uint8)
except RuntimeError as error:
    print("you tried to allocate" in str(error), float(torch.ones(1_000_000).sum()))
"""
    assert run(program) == "True 1000000.0"


def test_a_run_asks_for_it_and_goes_on_without(
    tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    broken = {"CXX": str(break_compiler(tmp_path)), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    flags = ["--train.steps", "2", "--optim.warmup_steps", "0"]
    done = run_train(tiny_config(), out, *flags, env=os.environ | broken)
    said = done.stdout + done.stderr
    assert said.count("building allocator.cpp failed: out of order") == 1, said
    assert len(read_rows(out)) >= 2
