// The KV cache, and attention of one query over it.
//
// An fp32 cache is read with fp32 arithmetic. A bf16 cache keeps channels (of keys) and positions
// (of values) in pairs, as the bf16 instruction multiplies two at a time; its query and softmax
// weights are rounded to bf16, sums are fp32.

#pragma once

#include "vector.h"

namespace {

struct Cache {
    uint8_t *keys, *values;  // [layer][slot][head], then as Head says
    int32_t slots, context;  // context is a multiple of 16
};

using Bf16 = uint16_t;

// One head of one slot in one layer. PAIR is 1 for fp32, 2 for bf16:
// keys [position / 16][channel / PAIR][16][PAIR], values [position / PAIR][channel][PAIR].
template <class T> class Head {
  public:
    Head(const Cache& cache, int size, size_t index)
        : size(size), tall(padded(size, 2)), wide(padded(size, LANES)),
          keys((T*)cache.keys + index * cache.context * tall),
          values((T*)cache.values + index * cache.context * wide) {}

    // Positions are put in ascending order: one that begins a pair clears the other half.
    void put(int position, const float* key, const float* value) const {
        T* tile = keys + (size_t)(position / LANES) * LANES * tall;
        uint32_t* column = (uint32_t*)tile + position % LANES;
        if constexpr (PAIR == 1) {
            for (int i = 0; i < size; i++) std::memcpy(column + i * LANES, key + i, 4);
            std::memcpy(values + (size_t)position * wide, value, size * sizeof(float));
            return;
        }
        uint32_t* row = (uint32_t*)values + (size_t)(position / 2) * wide;
        for (int i = 0; i < size; i += LANES) {
            const __m256i k = (__m256i)to_bf16(key + i, size - i);
            alignas(32) uint32_t pairs[LANES / 2];
            _mm256_store_si256((__m256i*)pairs, k);
            for (int j = 0; j < LANES / 2 && i + 2 * j < size; j++) column[(i / 2 + j) * LANES] = pairs[j];
            __m512i v = _mm512_cvtepu16_epi32((__m256i)to_bf16(value + i, size - i));
            if (position % 2)
                v = _mm512_or_si512(_mm512_slli_epi32(v, 16), _mm512_loadu_si512(row + i));
            _mm512_storeu_si512(row + i, v);
        }
    }

    // Softmax attention of one query over the first `count` positions; `weights` is scratch for
    // as many floats as the context has positions.
    void attend(const float* query, int count, float* weights, float* out) const {
        const Vec scale = _mm512_set1_ps(1 / std::sqrt((float)size));
        alignas(64) float rounded[MAX_SIZE / 2];
        if (PAIR == 2) {
            for (int i = 0; i < tall; i += LANES)
                _mm256_storeu_si256((__m256i*)((Bf16*)rounded + i),
                                    (__m256i)to_bf16(query + i, size - i));
            query = rounded;
        }
        Vec most = _mm512_set1_ps(-INFINITY);
        for (int start = 0; start < count; start += LANES) {
            Vec dots = _mm512_mul_ps(dot(query, (const float*)(keys + (size_t)start * tall)), scale);
            dots = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), tail(count - start), dots);
            most = _mm512_max_ps(most, dots);
            _mm512_storeu_ps(weights + start, dots);
        }
        const Vec top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        Vec sum = Vec{};
        for (int start = 0; start < count; start += LANES) {
            Vec e = exp(_mm512_sub_ps(_mm512_loadu_ps(weights + start), top));
            e = _mm512_maskz_mov_ps(tail(count - start), e);
            sum = _mm512_add_ps(sum, e);
            if (PAIR == 1) _mm512_storeu_ps(weights + start, e);
            if (PAIR == 2)  // in place: the half-size results never overtake what is still read
                _mm256_storeu_si256((__m256i*)((Bf16*)weights + start),
                                    (__m256i)_mm512_cvtneps_pbh(e));
        }
        const Vec inverse = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
        for (int i = 0; i < wide;)
            if (wide - i >= 4 * LANES)
                mix<4>(weights, count, i, inverse, out), i += 4 * LANES;
            else
                mix<1>(weights, count, i, inverse, out), i += LANES;
    }

  private:
    static constexpr int PAIR = sizeof(float) / sizeof(T), MAX_SIZE = 4096;
    const int size, tall, wide;  // channels; padded in keys; padded in values
    T *const keys, *const values;

    static __m256bh to_bf16(const float* x, int left) {
        return _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(left > 0 ? tail(left) : 0, x));
    }

    // sums + a * b, where a register of bf16 holds a pair in each lane.
    static Vec multiply_add(Vec a, Vec b, Vec sums) {
        if constexpr (PAIR == 1) return _mm512_fmadd_ps(a, b, sums);
        return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
    }

    // The query times 16 keys; pairs are moved as floats.
    Vec dot(const float* query, const float* tile) const {
        Vec sums[4] = {};
        const int steps = (size + PAIR - 1) / PAIR;
        int i = 0;
        for (; i + 4 <= steps; i += 4)
            for (int j = 0; j < 4; j++)
                sums[j] = multiply_add(_mm512_set1_ps(query[i + j]),
                                       _mm512_loadu_ps(tile + (i + j) * LANES), sums[j]);
        for (; i < steps; i++)
            sums[0] = multiply_add(_mm512_set1_ps(query[i]), _mm512_loadu_ps(tile + i * LANES), sums[0]);
        return _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    }

    // N registers of channels from `first` on, summed over positions and scaled; two chains of sums
    // each hide the instruction's latency.
    template <int N>
    void mix(const float* weights, int count, int first, Vec scale, float* out) const {
        Vec even[N] = {}, odd[N] = {};
        const float* value = (const float*)values + first;
        const int steps = (count + PAIR - 1) / PAIR;
        auto add = [&](Vec* to, int step) {
            const Vec weight = _mm512_set1_ps(weights[step]);
            for (int j = 0; j < N; j++)
                to[j] = multiply_add(
                    weight, _mm512_loadu_ps(value + (size_t)step * wide + j * LANES), to[j]);
        };
        int step = 0;
        for (; step + 2 <= steps; step += 2) add(even, step), add(odd, step + 1);
        if (step < steps) add(even, step);
        for (int j = 0, i = first; j < N && i < size; j++, i += LANES)
            _mm512_mask_storeu_ps(out + i, tail(size - i),
                                  _mm512_mul_ps(_mm512_add_ps(even[j], odd[j]), scale));
    }
};

}  // namespace
