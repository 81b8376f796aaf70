"""The allocator of large CPU tensors, in a process of its own each time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpt_dist import kernels

pytestmark = pytest.mark.skipif(
    kernels.unavailable() is not None, reason=f"no CPU kernels: {kernels.unavailable()}"
)


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_tensors_never_overlap() -> None:
    """Four threads take and give tensors of all sizes; each finds in its own what it wrote."""
    program = """
import random, threading
import torch
from gpt_dist.memory import use_region
assert use_region(1 << 32)
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
from gpt_dist.memory import use_region
assert use_region(1 << 30)
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
from gpt_dist.memory import use_region
before = torch.arange(100_000)  # from the C library; goes back there
assert use_region(8 << 20)
tensors = [torch.full((500_000,), number) for number in range(10)]  # 4 MB each
assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
low = tensors[0].data_ptr()
inside = sum(0 <= tensor.data_ptr() - low < 8 << 20 for tensor in tensors)
del before, tensors
print(inside, torch.ones(500_000).data_ptr() == low)
"""
    assert run(program) == "2 True"


@pytest.mark.parametrize("allowed", ["1", "0"])
def test_a_step_finds_the_memory_of_the_step_before(allowed: str) -> None:
    """From the third step on nothing is mapped anew; page faults stay below a tenth of a step's.

    Also with the C library alone (GPT_DIST_KERNELS=0).
    """
    program = f"""
import os, resource
os.environ["GPT_DIST_KERNELS"] = "{allowed}"
import torch
from gpt_dist.memory import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for step in range(6):
    start = faults()
    kept = [torch.ones(1_000_000 + 1_000 * layer) for layer in range(20)]
    del kept
    counts.append(faults() - start)
print(max(counts[2:]) < 2_000)  # of 20,000 pages
"""
    assert run(program) == "True"
