// Vectors of 16 floats, and threads that share work.

#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include "avx512.h"
#else
#include "avx2.h"
#endif

namespace {

constexpr int LANES = 16;  // floats in a Vec

inline int padded(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }

inline Mask tail(int left) { return left >= LANES ? 0xFFFF : (1u << left) - 1; }

inline float to_float(Bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline Bf16 to_bf16(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

// One number in memory, of either type.
inline float get(const float* from) { return *from; }
inline float get(const Bf16* from) { return to_float(*from); }
inline void put(float* to, float x) { *to = x; }
inline void put(Bf16* to, float x) { *to = to_bf16(x); }

// e^x to about 1 ulp, for x up to 88: 2^n times a polynomial on [-ln2 / 2, ln2 / 2] (coefficients:
// Cephes expf).
inline Vec exp(Vec x) {
    x = max(x, splat(-104.f));
    Vec n = round(x * splat(1.44269504f));
    Vec r = fnma(n, splat(0.693359375f), x);
    r = fnma(n, splat(-2.12194440e-4f), r);
    Vec p = splat(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
        p = fma(p, r, splat(c));
    p = fma(p, r * r, r + splat(1.f));
    return times_power_of_2(p, n);
}

// The factor s in tanh GELU: x (1 + tanh(u)) / 2 = x s with s = 1 / (1 + e^(-2u)) and
// u = sqrt(2 / pi) (x + 0.044715 x^3).
inline Vec gelu_gate(Vec x) {
    Vec u = fma(x * x * x, splat(0.044715f), x);
    Vec e = exp(min(u * splat(-2 * 0.7978845608f), splat(88.f)));
    const Vec one = splat(1.f);
    return one / (e + one);
}

inline Vec gelu(Vec x) { return x * gelu_gate(x); }

inline Vec relu2(Vec x) {
    x = max(x, Vec{});
    return x * x;
}

// cap tanh(x / cap), with tanh(u) = 1 - 2 / (1 + e^(2u)).
inline Vec soft_cap(Vec x, float cap) {
    const Vec one = splat(1.f);
    const Vec e = exp(min(x * splat(2 / cap), splat(88.f)));
    return splat(cap) * (one - splat(2.f) / (e + one));
}

// The threads of one parallel region. Work comes in phases. Threads claim the items of a phase one
// by one, and the next phase begins when all are done: a thread that the system pauses delays the
// others by one item only.
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
