// Vectors of 16 floats with AVX-512 (F, BW, DQ, VL, BF16, VNNI): an instruction each.
// avx2.h has the same names.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

using Vec = __m512;    // 16 floats, or 16 pairs of bf16 numbers; + - * / are the compiler's
using Ints = __m512i;  // 16 int32, or 16 quads of int8
using Mask = __mmask16;
using Bf16 = uint16_t;

// Inputs that a dot product takes at once: two rounded to bf16, four int8.
struct Bf16Step {
    uint32_t pair;
};
struct Int8Step {
    int32_t quad;
};

constexpr int REGISTERS = 32;    // Vecs that the processor holds
constexpr int PANEL = 64;        // columns of a tile of a matrix product
constexpr int TILE_ROWS = 6;     // rows of one, at most

inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Ints splat(int32_t x) { return _mm512_set1_epi32(x); }

inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load(const float* from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }
inline void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
inline void store(float* to, Vec x, Mask mask) { _mm512_mask_storeu_ps(to, mask, x); }
inline Ints load(const int32_t* from) { return _mm512_loadu_si512(from); }

inline Vec widened(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline __m256i rounded(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// bf16 in memory, floats in the register.
inline Vec load(const Bf16* from) { return widened(_mm256_loadu_si256((const __m256i*)from)); }
inline Vec load(const Bf16* from, Mask mask) {
    return widened(_mm256_maskz_loadu_epi16(mask, from));
}
inline void store(Bf16* to, Vec x) { _mm256_storeu_si256((__m256i*)to, rounded(x)); }
inline void store(Bf16* to, Vec x, Mask mask) { _mm256_mask_storeu_epi16(to, mask, rounded(x)); }

// Pairs of neighbours from two rows of 16 bf16 numbers.
inline Vec pairs(const Bf16* low, const Bf16* high) {
    __m512i below = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
    __m512i above = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high));
    return _mm512_castsi512_ps(_mm512_or_si512(below, _mm512_slli_epi32(above, 16)));
}

// 16 inputs as steps: 8 of bf16, 4 of int8 (from integers between -127 and 127).
inline void store(Bf16Step* to, Vec x) { store((Bf16*)to, x); }
inline void store(Int8Step* to, Ints x) {
    _mm_storeu_si128((__m128i*)to, _mm512_cvtsepi32_epi8(x));
}

inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }    // a b - c
inline Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec abs(Vec x) { return _mm512_abs_ps(x); }
inline Vec round(Vec x) { return _mm512_roundscale_ps(x, 0); }
inline Vec times_power_of_2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }  // x 2^n
inline float reduce_add(Vec x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(Vec x) { return _mm512_reduce_max_ps(x); }

inline Vec select(Mask mask, Vec a, Vec b) { return _mm512_mask_mov_ps(b, mask, a); }
inline Vec keep(Mask mask, Vec x) { return _mm512_maskz_mov_ps(mask, x); }  // zero elsewhere
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask above(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }

inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline int32_t reduce_add(Ints x) { return _mm512_reduce_add_epi32(x); }
inline Ints to_ints(Vec x) { return _mm512_cvtps_epi32(x); }  // to the nearest
inline Vec to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }

// A step of inputs, for all lanes.
inline Vec splat(Bf16Step inputs) { return _mm512_castsi512_ps(_mm512_set1_epi32(inputs.pair)); }
inline Ints splat(Int8Step inputs) { return _mm512_set1_epi32(inputs.quad); }
inline Vec splat_pair(uint32_t pair) { return splat(Bf16Step{pair}); }

// sums + inputs * weights, in each lane two products.
inline Vec dot_pairs(Vec inputs, Vec weights, Vec sums) {
    return _mm512_dpbf16_ps(sums, (__m512bh)inputs, (__m512bh)weights);
}

// sums + inputs * weights (unsigned), in each lane four products. It is assembly because GCC 12
// keeps copies of all sums on the stack around the intrinsic.
inline Ints dot_quads(Ints inputs, Ints weights, Ints sums) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(inputs));
    return sums;
}

}  // namespace
