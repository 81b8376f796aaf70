// The KV cache, and attention of one query over it.
//
// A bf16 cache keeps channels (of keys) and positions (of values) in pairs, because `dot_pairs`
// multiplies two at a time. Query and softmax weights become `Bf16Step`s, sums are fp32. An fp32
// cache is fp32 throughout.

#pragma once

#include <type_traits>

#include "vector.h"

namespace {

struct Cache {
    uint8_t *keys, *values;  // [layer][slot][head], then the layout of Head
    int32_t slots, context;  // context is a multiple of 16
};

// One head of one slot in one layer. PAIR is 1 for fp32, 2 for bf16:
// keys [position / 16][channel / PAIR][16][PAIR], values [position / PAIR][channel][PAIR].
template <class T> class Head {
  public:
    Head(const Cache& cache, int size, size_t index)
        : size(size), tall(padded(size, 2)), wide(padded(size, LANES)),
          keys((T*)cache.keys + index * cache.context * tall),
          values((T*)cache.values + index * cache.context * wide) {}

    // Positions come in ascending order. An even one clears the other half of its pair.
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
            Bf16 k[LANES], v[LANES];
            store(k, load(key + i, tail(size - i)));
            store(v, load(value + i, tail(size - i)));
            for (int j = 0; j < LANES && i + j < size; j += 2)
                column[(i + j) / 2 * LANES] = k[j] | (uint32_t)k[j + 1] << 16;
            for (int j = 0; j < LANES; j++)
                row[i + j] = position % 2 ? (row[i + j] & 0xFFFF) | (uint32_t)v[j] << 16 : v[j];
        }
    }

    // Softmax attention of one query over the first `count` positions. `weights` is scratch: a
    // float for each position of the context.
    void attend(const float* query, int count, float* weights, float* out) const {
        const Vec scale = splat(1 / std::sqrt((float)size));
        Step parts[MAX_SIZE / PAIR];
        for (int i = 0; i < size; i += LANES)
            store(parts + i / PAIR, load(query + i, tail(size - i)));
        Vec most = splat(-INFINITY);
        for (int start = 0; start < count; start += LANES) {
            Vec dots = dot(parts, (const float*)(keys + (size_t)start * tall)) * scale;
            dots = select(tail(count - start), dots, splat(-INFINITY));
            most = max(most, dots);
            store(weights + start, dots);
        }
        const Vec top = splat(reduce_max(most));
        Vec sum = Vec{};
        for (int start = 0; start < count; start += LANES) {
            Vec e = exp(load(weights + start) - top);
            e = keep(tail(count - start), e);
            sum += e;
            store((Step*)weights + start / PAIR, e);  // in place: never ahead of the loads
        }
        const Vec inverse = splat(1 / reduce_add(sum));
        for (int i = 0; i < wide;)
            if (wide - i >= 4 * LANES)
                mix<4>((const Step*)weights, count, i, inverse, out), i += 4 * LANES;
            else
                mix<1>((const Step*)weights, count, i, inverse, out), i += LANES;
    }

  private:
    static constexpr int PAIR = sizeof(float) / sizeof(T), MAX_SIZE = 4096;
    using Step = std::conditional_t<PAIR == 1, float, Bf16Step>;
    const int size, tall, wide;  // channels; padded in keys; padded in values
    T *const keys, *const values;

    // sums + a * b, where b points to 16 floats or 16 pairs of bf16.
    static Vec multiply_add(Step a, const float* b, Vec sums) {
        if constexpr (PAIR == 1) return fma(splat(a), load(b), sums);
        if constexpr (PAIR == 2) return dot_pairs(splat(a), load(b), sums);
    }

    // The query times 16 keys. Pairs of bf16 are loaded as floats.
    Vec dot(const Step* query, const float* tile) const {
        Vec sums[4] = {};
        const int steps = (size + PAIR - 1) / PAIR;
        int i = 0;
        for (; i + 4 <= steps; i += 4)
            for (int j = 0; j < 4; j++)
                sums[j] = multiply_add(query[i + j], tile + (i + j) * LANES, sums[j]);
        for (; i < steps; i++)
            sums[0] = multiply_add(query[i], tile + i * LANES, sums[0]);
        return (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }

    // N Vecs of channels from `first` on, summed over positions and scaled. Even and odd steps have
    // sums of their own, which hides the latency of an addition.
    template <int N>
    void mix(const Step* weights, int count, int first, Vec scale, float* out) const {
        Vec even[N] = {}, odd[N] = {};
        const float* value = (const float*)values + first;
        const int steps = (count + PAIR - 1) / PAIR;
        auto add = [&](Vec* to, int step) {
            for (int j = 0; j < N; j++)
                to[j] = multiply_add(weights[step], value + (size_t)step * wide + j * LANES, to[j]);
        };
        int step = 0;
        for (; step + 2 <= steps; step += 2) add(even, step), add(odd, step + 1);
        if (step < steps) add(even, step);
        for (int j = 0, i = first; j < N && i < size; j++, i += LANES)
            store(out + i, (even[j] + odd[j]) * scale, tail(size - i));
    }
};

}  // namespace
