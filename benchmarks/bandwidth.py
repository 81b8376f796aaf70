"""How fast this machine reads memory, which limits decoding at batch 1."""

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

// Each of n threads reads every n-th block and prefetches `near` bytes ahead.
extern "C" int64_t read_all(const char* data, int64_t size, int64_t block, int64_t near,
                            int threads) {
    int64_t total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        __m256i a{}, b{}, c{}, d{};
        for (int64_t start = omp_get_thread_num() * block; start + block <= size;
             start += threads * block)
            for (const char* p = data + start; p < data + start + block; p += 128) {
                if (near)
                    for (int i = 0; i < 128; i += 64) _mm_prefetch(p + near + i, _MM_HINT_T0);
                const __m256i* from = (const __m256i*)p;
                a = _mm256_xor_si256(a, _mm256_loadu_si256(from));
                b = _mm256_xor_si256(b, _mm256_loadu_si256(from + 1));
                c = _mm256_xor_si256(c, _mm256_loadu_si256(from + 2));
                d = _mm256_xor_si256(d, _mm256_loadu_si256(from + 3));
            }
        a = _mm256_xor_si256(_mm256_xor_si256(a, b), _mm256_xor_si256(c, d));
        total += a[0] + a[1] + a[2] + a[3];
    }
    return total;
}
"""


@cache
def _reader() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder) / "read.cpp", Path(folder) / "read.so"
        source.write_text(SOURCE)
        flags = ["-O3", "-mavx2", "-fopenmp", "-fPIC", "-shared", "-w"]
        subprocess.run(["g++", *flags, str(source), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
    library.read_all.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_int]
    return library


@cache
def _memory() -> torch.Tensor:
    return kernels.buffer(SIZE).fill_(1)


def bandwidth() -> float:
    """Bytes that all threads read in a second, in the fastest of several ways."""
    best = 0.0
    for block in (64 << 10, SIZE // torch.get_num_threads()):
        for near in (0, 2048):
            began = time.perf_counter()
            _reader().read_all(_memory().data_ptr(), SIZE, block, near, torch.get_num_threads())
            best = max(best, SIZE / (time.perf_counter() - began))
    return best
