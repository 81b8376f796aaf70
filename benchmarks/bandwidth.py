"""How fast this machine reads memory: the ceiling of decoding at batch 1."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from gpt_dist.inference import cpu_kernels as kernels

SIZE = 256 << 20
SOURCE = """
#include <immintrin.h>
#include <omp.h>
#include <cstdint>

// Each thread reads every n-th block, `near` bytes ahead fetched by hand.
extern "C" int64_t read_all(const char* data, int64_t size, int64_t block, int64_t near,
                            int threads) {
    int64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        __m512i a{}, b{}, c{}, d{};
        for (int64_t start = omp_get_thread_num() * block; start + block <= size;
             start += threads * block)
            for (const char* p = data + start; p < data + start + block; p += 256) {
                if (near)
                    for (int i = 0; i < 256; i += 64) _mm_prefetch(p + near + i, _MM_HINT_T0);
                a = _mm512_xor_si512(a, _mm512_loadu_si512(p));
                b = _mm512_xor_si512(b, _mm512_loadu_si512(p + 64));
                c = _mm512_xor_si512(c, _mm512_loadu_si512(p + 128));
                d = _mm512_xor_si512(d, _mm512_loadu_si512(p + 192));
            }
        a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
        total += _mm512_reduce_add_epi64(a);
    }
    return total;
}
"""


@cache
def _reader() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "read.cpp", Path(folder) / "read.so"
        source.write_text(SOURCE)
        flags = ["-O3", "-mavx512f", "-mavx512dq", "-fopenmp", "-fPIC", "-shared", "-w"]
        subprocess.run(["g++", *flags, str(source), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
    library.read_all.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_int]
    return library


@cache
def _memory() -> torch.Tensor:
    return kernels.buffer(SIZE).fill_(1)


def bandwidth() -> float:
    """Bytes read in a second by all threads, the best of several ways to read."""
    best = 0.0
    for block in (64 << 10, SIZE // torch.get_num_threads()):
        for near in (0, 2048):
            began = time.perf_counter()
            _reader().read_all(_memory().data_ptr(), SIZE, block, near, torch.get_num_threads())
            best = max(best, SIZE / (time.perf_counter() - began))
    return best
