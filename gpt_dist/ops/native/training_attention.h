// Causal self-attention of one head in the training step, forward and backward.

#pragma once

#include "vector.h"

#include <vector>

namespace {

// What a matrix product takes at once along its depth: a number, or a pair of bf16 numbers.
template <class T> struct Product;

template <> struct Product<Bf16> {
    using Step = uint32_t;
    static constexpr int DEPTH = 2;
    static auto spread(Step pair) { return splat_pair(pair); }
    template <class Inputs> static Vec add(Inputs left, Vec right, Vec sum) {
        return dot_pairs(left, right, sum);
    }
};

template <> struct Product<float> {
    using Step = float;
    static constexpr int DEPTH = 1;
    static Vec spread(float x) { return splat(x); }
    static Vec add(Vec left, Vec right, Vec sum) { return fma(left, right, sum); }
};

template <class T> using Step = typename Product<T>::Step;

// C (rows, columns) (+)= A (rows, depth) B (depth, columns), the depth in steps.
template <class T, int ROWS, int VECTORS>
void tile(int depth, const Step<T>* a, int lda, const Step<T>* b, int ldb, float* c, int ldc,
          bool add) {
    Vec sum[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++)
            sum[i][j] = add ? load(c + i * ldc + j * LANES) : Vec{};
    for (int k = 0; k < depth; k++) {
        Vec right[VECTORS];
        for (int j = 0; j < VECTORS; j++) right[j] = load((const float*)b + k * ldb + j * LANES);
        for (int i = 0; i < ROWS; i++) {
            auto left = Product<T>::spread(a[i * lda + k]);
            for (int j = 0; j < VECTORS; j++)
                sum[i][j] = Product<T>::add(left, right[j], sum[i][j]);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) store(c + i * ldc + j * LANES, sum[i][j]);
}

template <class T, int VECTORS>
void strip(int rows, int depth, const Step<T>* a, int lda, const Step<T>* b, int ldb, float* c,
           int ldc, bool add) {
    int i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
        tile<T, TILE_ROWS, VECTORS>(depth, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    for (; i < rows; i++)
        tile<T, 1, VECTORS>(depth, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
}

template <class T>
void multiply(int rows, int columns, int depth, const Step<T>* a, int lda, const Step<T>* b,
              int ldb, float* c, int ldc, bool add = false) {
    int j = 0;
    for (; j + PANEL <= columns; j += PANEL)
        strip<T, PANEL / LANES>(rows, depth, a, lda, b + j, ldb, c + j, ldc, add);
    for (; j < columns; j += LANES)
        strip<T, 1>(rows, depth, a, lda, b + j, ldb, c + j, ldc, add);
}

constexpr int QUERIES = 64;  // of a block

// Buffers of one thread.
template <class T> struct Scratch {
    static constexpr int DEPTH = Product<T>::DEPTH;
    int time, width;  // number of keys, rounded up; channels of a head
    std::vector<Step<T>> keys_across, values_across, keys, values;
    std::vector<Step<T>> weights, slopes, queries_across, grads_across;
    std::vector<float> scores, products, block, grad_keys, grad_values;

    Scratch(int tokens, int width, bool backward)
        : time(padded(tokens, 2 * LANES)), width(width), keys_across(time * width / DEPTH),
          values(time * width / DEPTH), weights(QUERIES * time / DEPTH), scores(QUERIES * time),
          block(QUERIES * width) {
        if (!backward) return;
        values_across.resize(time * width / DEPTH);
        keys.resize(time * width / DEPTH);
        slopes.resize(QUERIES * time / DEPTH);
        queries_across.resize(QUERIES * width / DEPTH);
        grads_across.resize(QUERIES * width / DEPTH);
        products.resize(QUERIES * time);
        grad_keys.resize(time * width);
        grad_values.resize(time * width);
    }
};

// (tokens, width) → steps of neighbouring channels, transposed: (width / DEPTH, tokens).
template <class T>
void across_width(const T* from, int64_t stride, int tokens, int width, Step<T>* to, int ldt) {
    for (int t = 0; t < ldt; t++)
        for (int d = 0; d < width / Product<T>::DEPTH; d++)
            to[d * ldt + t] = t < tokens ? ((const Step<T>*)(from + t * stride))[d] : 0;
}

// Steps of neighbouring tokens at one channel, from token t on.
inline uint32_t step_at(const Bf16* from, int64_t stride, int t, int tokens) {
    uint32_t low = t < tokens ? from[t * stride] : 0;
    uint32_t high = t + 1 < tokens ? from[(t + 1) * stride] : 0;
    return low | high << 16;
}
inline float step_at(const float* from, int64_t stride, int t, int tokens) {
    return t < tokens ? from[t * stride] : 0;
}

// (tokens, width) → steps of neighbouring tokens: (count / DEPTH, width).
template <class T>
void across_tokens(const T* from, int64_t stride, int tokens, int width, Step<T>* to, int count) {
    for (int i = 0; i < count / Product<T>::DEPTH; i++)
        for (int d = 0; d < width; d++)
            to[i * width + d] = step_at(from + d, stride, i * Product<T>::DEPTH, tokens);
}

// (tokens, width) → steps of neighbouring tokens, transposed: (width, count / DEPTH).
template <class T>
void transposed(const T* from, int64_t stride, int tokens, int width, Step<T>* to, int count) {
    int steps = count / Product<T>::DEPTH;
    for (int i = 0; i < steps; i++)
        for (int d = 0; d < width; d++)
            to[d * steps + i] = step_at(from + d, stride, i * Product<T>::DEPTH, tokens);
}

// (count, columns) → steps from neighbouring rows: (count / DEPTH, columns). Uses `to` or `rows`.
const uint32_t* interleave(const Bf16* rows, int count, int columns, float* to) {
    for (int i = 0; i < count; i += 2)
        for (int j = 0; j < columns; j += LANES) {
            const Bf16* row = rows + i * columns + j;
            store(to + i / 2 * columns + j, pairs(row, row + columns));
        }
    return (const uint32_t*)to;
}
const float* interleave(const float* rows, int, int, float*) { return rows; }

template <class T> struct Head {
    const T *query, *key, *value;
    int64_t stride;  // between tokens
};

template <class T>
void attend(const Head<T>& head, int tokens, float scale, T* out, int64_t out_stride,
            float* log_sums, Scratch<T>& s) {
    constexpr int DEPTH = Product<T>::DEPTH;
    int width = s.width;
    across_width(head.key, head.stride, tokens, width, s.keys_across.data(), s.time);
    across_tokens(head.value, head.stride, tokens, width, s.values.data(), s.time);
    for (int first = 0; first < tokens; first += QUERIES) {
        int rows = std::min(QUERIES, tokens - first), seen = padded(first + rows, 2 * LANES);
        multiply<T>(rows, seen, width / DEPTH, (const Step<T>*)(head.query + first * head.stride),
                 head.stride / DEPTH, s.keys_across.data(), s.time, s.scores.data(), seen);
        T* weights = (T*)s.weights.data();
        float inverse[QUERIES];
        for (int i = 0; i < rows; i++) {
            float* row = s.scores.data() + i * seen;
            int count = first + i + 1;
            Vec top = splat(-INFINITY), sum = Vec{};
            for (int j = 0; j < count; j += LANES)
                top = select(tail(count - j), max(top, load(row + j)), top);
            float largest = reduce_max(top) * scale;
            for (int j = 0; j < seen; j += LANES) {
                Mask mask = j < count ? tail(count - j) : 0;
                Vec x = fms(load(row + j), splat(scale), splat(largest));
                x = keep(mask, exp(x));
                sum += x;
                store(weights + i * seen + j, x);
            }
            float total = reduce_add(sum);
            inverse[i] = 1 / total;
            log_sums[first + i] = largest + std::log(total);
        }
        multiply<T>(rows, width, seen / DEPTH, s.weights.data(), seen / DEPTH, s.values.data(), width,
                 s.block.data(), width);
        for (int i = 0; i < rows; i++)
            for (int d = 0; d < width; d += LANES)
                store(out + (first + i) * out_stride + d,
                      load(s.block.data() + i * width + d) * splat(inverse[i]));
    }
}

template <class T>
void store_transposed(const float* from, int ldf, int tokens, int width, T* to, int64_t stride) {
    alignas(64) float row[LANES];
    for (int t = 0; t < tokens; t++)
        for (int d = 0; d < width; d += LANES) {
            for (int e = 0; e < LANES; e++) row[e] = from[(d + e) * ldf + t];
            store(to + t * stride + d, load(row));
        }
}

template <class T>
void attend_backward(const Head<T>& head, int tokens, float scale, const T* out, const T* grad,
                     int64_t out_stride, const float* log_sums, T* grad_query, T* grad_key,
                     T* grad_value, Scratch<T>& s) {
    constexpr int DEPTH = Product<T>::DEPTH;
    int width = s.width, time = s.time;
    across_width(head.key, head.stride, tokens, width, s.keys_across.data(), time);
    across_width(head.value, head.stride, tokens, width, s.values_across.data(), time);
    across_tokens(head.key, head.stride, tokens, width, s.keys.data(), time);
    std::fill(s.grad_keys.begin(), s.grad_keys.end(), 0.0f);
    std::fill(s.grad_values.begin(), s.grad_values.end(), 0.0f);
    T* weights = (T*)s.weights.data();
    T* slopes = (T*)s.slopes.data();
    for (int first = 0; first < tokens; first += QUERIES) {
        int rows = std::min(QUERIES, tokens - first), seen = padded(first + rows, 2 * LANES);
        int even = padded(rows, 2);
        const T* grads = grad + first * out_stride;
        const T* queries = head.query + first * head.stride;
        multiply<T>(rows, seen, width / DEPTH, (const Step<T>*)queries, head.stride / DEPTH,
                 s.keys_across.data(), time, s.scores.data(), seen);
        multiply<T>(rows, seen, width / DEPTH, (const Step<T>*)grads, out_stride / DEPTH,
                 s.values_across.data(), time, s.products.data(), seen);
        for (int i = 0; i < rows; i++) {
            Vec inner = Vec{};  // sum(weights * their gradients)
            for (int d = 0; d < width; d += LANES)
                inner = fma(load(grads + i * out_stride + d), load(out + (first + i) * out_stride + d), inner);
            Vec shift = splat(reduce_add(inner));
            Vec log_sum = splat(log_sums[first + i]), factor = splat(scale);
            int count = first + i + 1;
            for (int j = 0; j < seen; j += LANES) {
                Mask mask = j < count ? tail(count - j) : 0;
                Vec x = load(s.scores.data() + i * seen + j);
                x = keep(mask, exp(fms(x, factor, log_sum)));
                Vec slope = load(s.products.data() + i * seen + j) - shift;
                store(weights + i * seen + j, x);
                store(slopes + i * seen + j, x * slope * factor);
            }
        }
        if (even > rows) {
            std::fill_n(weights + rows * seen, seen, T(0));
            std::fill_n(slopes + rows * seen, seen, T(0));
        }
        multiply<T>(rows, width, seen / DEPTH, s.slopes.data(), seen / DEPTH, s.keys.data(), width,
                 s.block.data(), width);
        for (int i = 0; i < rows; i++)
            for (int d = 0; d < width; d += LANES)
                store(grad_query + (first + i) * head.stride + d,
                      load(s.block.data() + i * width + d));
        // Transposed: the gradients of keys and values as (width, keys), summed over the blocks.
        transposed(queries, head.stride, rows, width, s.queries_across.data(), even);
        transposed(grads, out_stride, rows, width, s.grads_across.data(), even);
        auto packed = interleave(weights, even, seen, s.scores.data());
        multiply<T>(width, seen, even / DEPTH, s.grads_across.data(), even / DEPTH, packed, seen,
                 s.grad_values.data(), time, true);
        packed = interleave(slopes, even, seen, s.scores.data());
        multiply<T>(width, seen, even / DEPTH, s.queries_across.data(), even / DEPTH, packed, seen,
                 s.grad_keys.data(), time, true);
    }
    store_transposed(s.grad_keys.data(), time, tokens, width, grad_key, head.stride);
    store_transposed(s.grad_values.data(), time, tokens, width, grad_value, head.stride);
}

}  // namespace
