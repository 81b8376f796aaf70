// Vectors of 16 floats with AVX2 and FMA: two registers each. avx512.h has the same names.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct Vec {  // 16 floats, or 16 pairs of bf16 numbers
    __m256 low, high;
};
struct Ints {  // 16 int32, or 16 quads of int8
    __m256i low, high;
};
using Mask = uint16_t;
using Bf16 = uint16_t;

// Inputs that a dot product takes at once: two floats beside bf16 weights, which need no rounding
// here; four int8, widened to 16 bits, the even ones beside each other and the odd ones.
struct Bf16Step {
    float first, second;
};
struct Int8Step {
    int32_t even, odd;
};
struct Bf16Inputs {
    __m256 first, second;
};
struct Int8Inputs {
    __m256i even, odd;
};

constexpr int REGISTERS = 8;    // Vecs that the processor holds
constexpr int PANEL = 16;       // columns of a tile of a matrix product
constexpr int TILE_ROWS = 5;    // rows of one, at most

inline Vec operator+(Vec a, Vec b) { return {a.low + b.low, a.high + b.high}; }
inline Vec operator-(Vec a, Vec b) { return {a.low - b.low, a.high - b.high}; }
inline Vec operator*(Vec a, Vec b) { return {a.low * b.low, a.high * b.high}; }
inline Vec& operator+=(Vec& a, Vec b) { return a = a + b; }
inline Vec& operator*=(Vec& a, Vec b) { return a = a * b; }
inline Vec operator/(Vec a, Vec b) { return {a.low / b.low, a.high / b.high}; }

inline Vec splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints splat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

constexpr Mask ALL = 0xFFFF;

inline Ints lanes(Mask mask) {  // all bits of the lanes in a mask
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i high_bits = _mm256_slli_epi32(bits, 8), all = _mm256_set1_epi32(mask);
    return {_mm256_cmpeq_epi32(_mm256_and_si256(all, bits), bits),
            _mm256_cmpeq_epi32(_mm256_and_si256(all, high_bits), high_bits)};
}

inline Vec load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Vec load(const float* from, Mask mask) {
    if (mask == ALL) return load(from);
    const Ints where = lanes(mask);
    return {_mm256_maskload_ps(from, where.low), _mm256_maskload_ps(from + 8, where.high)};
}
inline void store(float* to, Vec x) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
inline void store(float* to, Vec x, Mask mask) {
    if (mask == ALL) return store(to, x);
    const Ints where = lanes(mask);
    _mm256_maskstore_ps(to, where.low, x.low);
    _mm256_maskstore_ps(to + 8, where.high, x.high);
}
inline Ints load(const int32_t* from) {
    return {_mm256_loadu_si256((const __m256i*)from), _mm256_loadu_si256((const __m256i*)from + 1)};
}

// 16 words of 32 bits whose values fit 16, in order.
inline __m256i packed(__m256i low, __m256i high) {
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8);
}

inline __m256 widened(__m128i x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline __m256i rounded(__m256 x) {  // to nearest, ties to even; what is no number stays none
    const __m256i bits = _mm256_castps_si256(x), top = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(top, _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(top, _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
}

// bf16 in memory, floats in the register.
inline Vec load(const Bf16* from) {
    return {widened(_mm_loadu_si128((const __m128i*)from)),
            widened(_mm_loadu_si128((const __m128i*)from + 1))};
}
inline void store(Bf16* to, Vec x) {
    _mm256_storeu_si256((__m256i*)to, packed(rounded(x.low), rounded(x.high)));
}
inline Vec load(const Bf16* from, Mask mask) {
    if (mask == ALL) return load(from);
    Bf16 buffer[16] = {};
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) std::memcpy(buffer + i, from + i, sizeof(Bf16));
    return load(buffer);
}
inline void store(Bf16* to, Vec x, Mask mask) {
    if (mask == ALL) return store(to, x);
    Bf16 buffer[16];
    store(buffer, x);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) std::memcpy(to + i, buffer + i, sizeof(Bf16));
}

// Pairs of neighbours from two rows of 16 bf16 numbers.
inline Vec pairs(const Bf16* low, const Bf16* high) {
    auto half = [&](int at) {
        __m256i below = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(low + at)));
        __m256i above = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(high + at)));
        return _mm256_castsi256_ps(_mm256_or_si256(below, _mm256_slli_epi32(above, 16)));
    };
    return {half(0), half(8)};
}

// 16 inputs as steps: 8 beside bf16, 4 of int8 (from integers between -127 and 127).
inline void store(Bf16Step* to, Vec x) { store((float*)to, x); }
inline void store(Int8Step* to, Ints x) {
    const __m256i even_first = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,
                                                0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xD8);
    _mm256_storeu_si256((__m256i*)to, _mm256_shuffle_epi8(words, even_first));
}

inline Vec fma(Vec a, Vec b, Vec c) {  // a b + c
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Vec fms(Vec a, Vec b, Vec c) {  // a b - c
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
inline Vec fnma(Vec a, Vec b, Vec c) {  // c - a b
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Vec max(Vec a, Vec b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Vec min(Vec a, Vec b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}
inline Vec abs(Vec x) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Vec round(Vec x) {
    constexpr int MODE = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.low, MODE), _mm256_round_ps(x.high, MODE)};
}

inline __m256 times_power_of_2(__m256 x, __m256 n) {
    // In two steps: 2^n itself may be below the range of normal numbers.
    const __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1);
    auto power = [](__m256i e) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
    };
    return x * power(half) * power(_mm256_sub_epi32(all, half));
}
inline Vec times_power_of_2(Vec x, Vec n) {  // x 2^n for integers n from -250 to 250
    return {times_power_of_2(x.low, n.low), times_power_of_2(x.high, n.high)};
}

inline float reduce_add(Vec x) {
    const __m256 eight = x.low + x.high;
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
}
inline float reduce_max(Vec x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four =
        _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline Vec select(Mask mask, Vec a, Vec b) {
    const Ints where = lanes(mask);
    return {_mm256_blendv_ps(b.low, a.low, _mm256_castsi256_ps(where.low)),
            _mm256_blendv_ps(b.high, a.high, _mm256_castsi256_ps(where.high))};
}
inline Vec keep(Mask mask, Vec x) { return select(mask, x, Vec{}); }  // zero elsewhere
template <int COMPARISON> Mask compare(Vec a, Vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, COMPARISON)) |
           _mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, COMPARISON)) << 8;
}
inline Mask equal(Vec a, Vec b) { return compare<_CMP_EQ_OQ>(a, b); }
inline Mask above(Vec a, Vec b) { return compare<_CMP_GT_OQ>(a, b); }
inline Mask at_least(Vec a, Vec b) { return compare<_CMP_GE_OQ>(a, b); }

inline Ints add(Ints a, Ints b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline int32_t reduce_add(Ints x) {
    const __m256i eight = _mm256_add_epi32(x.low, x.high);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}
inline Ints to_ints(Vec x) {  // to the nearest
    return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)};
}
inline Vec to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

inline __m256 first_of(__m256 pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
}
inline __m256 second_of(__m256 pairs) {
    return _mm256_and_ps(pairs, _mm256_castsi256_ps(_mm256_set1_epi32(0xFFFF0000)));
}

// A step of inputs, for all lanes.
inline Bf16Inputs splat(Bf16Step inputs) {
    return {_mm256_set1_ps(inputs.first), _mm256_set1_ps(inputs.second)};
}
inline Int8Inputs splat(Int8Step inputs) {
    return {_mm256_set1_epi32(inputs.even), _mm256_set1_epi32(inputs.odd)};
}
inline Bf16Inputs splat_pair(uint32_t pair) {
    const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(pair));
    return {first_of(all), second_of(all)};
}

// sums + inputs * weights, in each lane two products.
inline __m256 dot_pairs(Bf16Inputs inputs, __m256 weights, __m256 sums) {
    sums = _mm256_fmadd_ps(inputs.first, first_of(weights), sums);
    return _mm256_fmadd_ps(inputs.second, second_of(weights), sums);
}
inline Vec dot_pairs(Bf16Inputs inputs, Vec weights, Vec sums) {
    return {dot_pairs(inputs, weights.low, sums.low), dot_pairs(inputs, weights.high, sums.high)};
}

// sums + inputs * weights (unsigned), in each lane four products, exact: of 16 bits each, added in 32.
inline __m256i dot_quads(Int8Inputs inputs, __m256i weights, __m256i sums) {
    const __m256i even = _mm256_and_si256(weights, _mm256_set1_epi16(0xFF));
    const __m256i odd = _mm256_srli_epi16(weights, 8);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(even, inputs.even));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(odd, inputs.odd));
}
inline Ints dot_quads(Int8Inputs inputs, Ints weights, Ints sums) {
    return {dot_quads(inputs, weights.low, sums.low), dot_quads(inputs, weights.high, sums.high)};
}

}  // namespace
