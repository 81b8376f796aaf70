// Vectors of 16 floats, and threads that share work.

#pragma once

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;  // floats in a register

using Vec = __m512;

int padded(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }

__mmask16 tail(int left) { return left >= LANES ? 0xFFFF : (1u << left) - 1; }

// e^x to about 1 ulp: 2^n times a polynomial on [-ln2 / 2, ln2 / 2] (coefficients: Cephes expf).
Vec exp(Vec x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-104));
    Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    Vec r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    Vec p = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1)));
    return _mm512_scalef_ps(p, n);
}

// The share s of x that tanh GELU lets through: x (1 + tanh(u)) / 2 = x s, s = 1 / (1 + e^(-2u)),
// u = sqrt(2 / pi) (x + 0.044715 x^3).
Vec gelu_gate(Vec x) {
    Vec cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    Vec u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
    Vec e = exp(_mm512_mul_ps(u, _mm512_set1_ps(-2 * 0.7978845608f)));
    const Vec one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(e, one));
}

Vec gelu(Vec x) { return _mm512_mul_ps(x, gelu_gate(x)); }

// The threads of one parallel region. Work comes in phases; a phase's items are handed out one by
// one and the next phase begins when all are done, so that a thread that the system has paused
// holds the others up only by the item in its hands.
struct Phase {
    std::atomic<int> claimed{0}, done{0};
};

class Team {
  public:
    const int rank, size;

    Team(int rank, int size, Phase* phases) : rank(rank), size(size), phase(phases) {}

    template <class F> void each(int items, F&& work) {
        int mine = 0;
        for (int i; (i = phase->claimed.fetch_add(1, std::memory_order_relaxed)) < items; mine++)
            work(i);
        phase->done.fetch_add(mine, std::memory_order_acq_rel);
        for (int spins = 0; phase->done.load(std::memory_order_acquire) < items; spins++)
            spins < 4096 ? _mm_pause() : (void)sched_yield();
        phase++;
    }

  private:
    Phase* phase;
};

}  // namespace
