// Causal self-attention of one head in the training step, forward and backward.

#pragma once

#include "vector.h"

#include <vector>

namespace {

using Pair = uint32_t;  // two bf16 numbers, which `dot_pairs` multiplies and adds

// C (rows, columns) (+)= A (rows, 2 depth) B (2 depth, columns), both as pairs along the depth.
template <int ROWS, int VECTORS>
void tile(int depth, const Pair* a, int lda, const Pair* b, int ldb, float* c, int ldc, bool add) {
    Vec sum[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++)
            sum[i][j] = add ? load(c + i * ldc + j * LANES) : Vec{};
    for (int k = 0; k < depth; k++) {
        Vec right[VECTORS];
        for (int j = 0; j < VECTORS; j++) right[j] = load((const float*)b + k * ldb + j * LANES);
        for (int i = 0; i < ROWS; i++) {
            auto left = splat_pair(a[i * lda + k]);
            for (int j = 0; j < VECTORS; j++) sum[i][j] = dot_pairs(left, right[j], sum[i][j]);
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) store(c + i * ldc + j * LANES, sum[i][j]);
}

template <int VECTORS>
void strip(int rows, int depth, const Pair* a, int lda, const Pair* b, int ldb, float* c, int ldc,
           bool add) {
    int i = 0;
    for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
        tile<TILE_ROWS, VECTORS>(depth, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    for (; i < rows; i++)
        tile<1, VECTORS>(depth, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
}

void multiply(int rows, int columns, int depth, const Pair* a, int lda, const Pair* b, int ldb,
              float* c, int ldc, bool add = false) {
    int j = 0;
    for (; j + PANEL <= columns; j += PANEL)
        strip<PANEL / LANES>(rows, depth, a, lda, b + j, ldb, c + j, ldc, add);
    for (; j < columns; j += LANES) strip<1>(rows, depth, a, lda, b + j, ldb, c + j, ldc, add);
}

constexpr int QUERIES = 64;  // of a block

// Buffers of one thread.
struct Scratch {
    int time, width;  // number of keys, rounded up; channels of a head
    std::vector<Pair> keys_across, values_across, keys, values;
    std::vector<Pair> weights, slopes, queries_across, grads_across;
    std::vector<float> scores, products, block, grad_keys, grad_values;

    Scratch(int tokens, int width, bool backward)
        : time(padded(tokens, 2 * LANES)), width(width), keys_across(time * width / 2),
          values(time * width / 2), weights(QUERIES * time / 2), scores(QUERIES * time),
          block(QUERIES * width) {
        if (!backward) return;
        values_across.resize(time * width / 2);
        keys.resize(time * width / 2);
        slopes.resize(QUERIES * time / 2);
        queries_across.resize(QUERIES * width / 2);
        grads_across.resize(QUERIES * width / 2);
        products.resize(QUERIES * time);
        grad_keys.resize(time * width);
        grad_values.resize(time * width);
    }
};

// (tokens, width) → pairs of neighbouring channels, transposed: (width / 2, tokens).
void across_width(const Bf16* from, int64_t stride, int tokens, int width, Pair* to, int ldt) {
    for (int t = 0; t < ldt; t++)
        for (int d = 0; d < width / 2; d++)
            to[d * ldt + t] = t < tokens ? ((const Pair*)(from + t * stride))[d] : 0;
}

// (tokens, width) → pairs of neighbouring tokens: (tokens / 2, width).
void across_tokens(const Bf16* from, int64_t stride, int tokens, int width, Pair* to, int padded) {
    for (int t = 0; t < padded; t += 2)
        for (int d = 0; d < width; d++) {
            Pair low = t < tokens ? from[t * stride + d] : 0;
            Pair high = t + 1 < tokens ? from[(t + 1) * stride + d] : 0;
            to[t / 2 * width + d] = low | high << 16;
        }
}

// (tokens, width) → pairs of neighbouring tokens, transposed: (width, count / 2).
void transposed(const Bf16* from, int64_t stride, int tokens, int width, Pair* to, int count) {
    for (int t = 0; t < count; t += 2)
        for (int d = 0; d < width; d++) {
            Pair low = t < tokens ? from[t * stride + d] : 0;
            Pair high = t + 1 < tokens ? from[(t + 1) * stride + d] : 0;
            to[d * (count / 2) + t / 2] = low | high << 16;
        }
}

// (count, columns) → pairs from rows i and i + 1: (count / 2, columns).
void interleave(const Bf16* rows, int count, int columns, Pair* to) {
    for (int i = 0; i < count; i += 2)
        for (int j = 0; j < columns; j += LANES) {
            const Bf16* row = rows + i * columns + j;
            store((float*)to + i / 2 * columns + j, pairs(row, row + columns));
        }
}

struct Head {
    const Bf16 *query, *key, *value;
    int64_t stride;  // between tokens
};

void attend(const Head& head, int tokens, float scale, Bf16* out, int64_t out_stride,
            float* log_sums, Scratch& s) {
    int width = s.width;
    across_width(head.key, head.stride, tokens, width, s.keys_across.data(), s.time);
    across_tokens(head.value, head.stride, tokens, width, s.values.data(), s.time);
    for (int first = 0; first < tokens; first += QUERIES) {
        int rows = std::min(QUERIES, tokens - first), seen = padded(first + rows, 2 * LANES);
        multiply(rows, seen, width / 2, (const Pair*)(head.query + first * head.stride),
                 head.stride / 2, s.keys_across.data(), s.time, s.scores.data(), seen);
        Bf16* weights = (Bf16*)s.weights.data();
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
        multiply(rows, width, seen / 2, s.weights.data(), seen / 2, s.values.data(), width,
                 s.block.data(), width);
        for (int i = 0; i < rows; i++)
            for (int d = 0; d < width; d += LANES)
                store(out + (first + i) * out_stride + d,
                      load(s.block.data() + i * width + d) * splat(inverse[i]));
    }
}

void store_transposed(const float* from, int ldf, int tokens, int width, Bf16* to,
                      int64_t stride) {
    alignas(64) float row[LANES];
    for (int t = 0; t < tokens; t++)
        for (int d = 0; d < width; d += LANES) {
            for (int e = 0; e < LANES; e++) row[e] = from[(d + e) * ldf + t];
            store(to + t * stride + d, load(row));
        }
}

void attend_backward(const Head& head, int tokens, float scale, const Bf16* out,
                     const Bf16* grad, int64_t out_stride, const float* log_sums, Bf16* grad_query,
                     Bf16* grad_key, Bf16* grad_value, Scratch& s) {
    int width = s.width, time = s.time;
    across_width(head.key, head.stride, tokens, width, s.keys_across.data(), time);
    across_width(head.value, head.stride, tokens, width, s.values_across.data(), time);
    across_tokens(head.key, head.stride, tokens, width, s.keys.data(), time);
    std::fill(s.grad_keys.begin(), s.grad_keys.end(), 0.0f);
    std::fill(s.grad_values.begin(), s.grad_values.end(), 0.0f);
    Bf16* weights = (Bf16*)s.weights.data();
    Bf16* slopes = (Bf16*)s.slopes.data();
    for (int first = 0; first < tokens; first += QUERIES) {
        int rows = std::min(QUERIES, tokens - first), seen = padded(first + rows, 2 * LANES);
        int even = padded(rows, 2);
        const Bf16* grads = grad + first * out_stride;
        const Bf16* queries = head.query + first * head.stride;
        multiply(rows, seen, width / 2, (const Pair*)queries, head.stride / 2,
                 s.keys_across.data(), time, s.scores.data(), seen);
        multiply(rows, seen, width / 2, (const Pair*)grads, out_stride / 2,
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
            std::fill_n(weights + rows * seen, seen, 0);
            std::fill_n(slopes + rows * seen, seen, 0);
        }
        multiply(rows, width, seen / 2, s.slopes.data(), seen / 2, s.keys.data(), width,
                 s.block.data(), width);
        for (int i = 0; i < rows; i++)
            for (int d = 0; d < width; d += LANES)
                store(grad_query + (first + i) * head.stride + d,
                      load(s.block.data() + i * width + d));
        // Transposed: the gradients of keys and values as (width, keys), summed over the blocks.
        transposed(queries, head.stride, rows, width, s.queries_across.data(), even);
        transposed(grads, out_stride, rows, width, s.grads_across.data(), even);
        Pair* packed = (Pair*)s.scores.data();
        interleave(weights, even, seen, packed);
        multiply(width, seen, even / 2, s.grads_across.data(), even / 2, packed, seen,
                 s.grad_values.data(), time, true);
        interleave(slopes, even, seen, packed);
        multiply(width, seen, even / 2, s.queries_across.data(), even / 2, packed, seen,
                 s.grad_keys.data(), time, true);
    }
    store_transposed(s.grad_keys.data(), time, tokens, width, grad_key, head.stride);
    store_transposed(s.grad_values.data(), time, tokens, width, grad_value, head.stride);
}

}  // namespace
