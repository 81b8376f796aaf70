// The KV cache, and attention of one query over it.

#pragma once

#include "vector.h"

namespace {

struct Cache {  // [layer][slot][head], then keys [position / 16][channel][16], values [position][channel]
    uint8_t *keys, *values;
    int32_t slots, context;  // context is a multiple of 16
};

// One head of one layer's cache, in storage type T.
template <class T> struct Head {
    T *keys, *values;
    int size, wide;  // channels, and padded to whole registers in `values`

    Head(const Cache& cache, int head_size, size_t index)  // index of (layer, slot, head)
        : size(head_size), wide(padded(head_size, LANES)) {
        keys = (T*)cache.keys + index * cache.context * size;
        values = (T*)cache.values + index * cache.context * wide;
    }

    void put(int position, const float* key, const float* value) {
        T* tile = keys + (size_t)(position / LANES) * LANES * size + position % LANES;
        for (int i = 0; i < size; i++) store(tile + i * LANES, key[i]);
        for (int i = 0; i < size; i++) store(values + (size_t)position * wide + i, value[i]);
    }

    // Softmax attention of one query over the first `count` positions; `weights` is scratch.
    void attend(const float* query, int count, float* weights, float* out) const {
        const float scale = 1 / std::sqrt((float)size);
        Vec most = _mm512_set1_ps(-INFINITY);
        for (int start = 0; start < count; start += LANES) {
            const T* tile = keys + (size_t)start * size;
            Vec sums[4] = {};
            int i = 0;
            for (; i + 4 <= size; i += 4)
                for (int j = 0; j < 4; j++)
                    sums[j] = _mm512_fmadd_ps(_mm512_set1_ps(query[i + j]),
                                              load(tile + (i + j) * LANES), sums[j]);
            for (; i < size; i++)
                sums[0] = _mm512_fmadd_ps(_mm512_set1_ps(query[i]), load(tile + i * LANES), sums[0]);
            Vec dot = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
            dot = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), tail(count - start), dot,
                                     _mm512_set1_ps(scale));
            most = _mm512_max_ps(most, dot);
            _mm512_storeu_ps(weights + start, dot);
        }
        Vec top = _mm512_set1_ps(_mm512_reduce_max_ps(most)), sum = Vec{};
        for (int start = 0; start < count; start += LANES) {
            Vec e = exp(_mm512_sub_ps(_mm512_loadu_ps(weights + start), top));
            e = _mm512_maskz_mov_ps(tail(count - start), e);
            sum = _mm512_add_ps(sum, e);
            _mm512_storeu_ps(weights + start, e);
        }
        const Vec inverse = _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
        for (int i = 0; i < size; i += 4 * LANES) {
            Vec even[4] = {}, odd[4] = {};  // two chains a register hide the latency of the sums
            const int registers = std::min(4, (wide - i) / LANES);
            auto add = [&](Vec* to, int position) {
                Vec weight = _mm512_set1_ps(weights[position]);
                const T* value = values + (size_t)position * wide + i;
                for (int j = 0; j < registers; j++)
                    to[j] = _mm512_fmadd_ps(weight, load(value + j * LANES), to[j]);
            };
            int position = 0;
            for (; position + 2 <= count; position += 2) add(even, position), add(odd, position + 1);
            if (position < count) add(even, position);
            for (int j = 0; j < registers; j++)
                if (int at = i + j * LANES; at < size)
                    _mm512_mask_storeu_ps(out + at, tail(size - at),
                                          _mm512_mul_ps(_mm512_add_ps(even[j], odd[j]), inverse));
        }
    }
};

}  // namespace
