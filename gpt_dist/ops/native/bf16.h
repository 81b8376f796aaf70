// bf16 numbers, held as uint16_t, as vectors of floats.

#pragma once

#include "vector.h"

namespace {

using Half = uint16_t;

Vec load(const Half* from) {
    __m256i raw = _mm256_loadu_si256((const __m256i*)from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

Vec load(const Half* from, __mmask16 mask) {
    __m256i raw = _mm256_maskz_loadu_epi16(mask, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

__m256i halves(Vec values) { return (__m256i)_mm512_cvtneps_pbh(values); }

void store(Half* to, Vec values) { _mm256_storeu_si256((__m256i*)to, halves(values)); }

void store(Half* to, Vec values, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, halves(values));
}

}  // namespace
