// Pieces of the training step for CPUs with AVX-512 BF16: causal self-attention, layer norm,
// GELU and cross-entropy, forward and backward. Matrices are row-major.

#include "training_attention.h"

extern "C" {

// qkv (batch, tokens, 3, heads, width) → out (batch, tokens, heads, width) and the log-sum-exp of
// each row of scores (batch, heads, tokens). The width is a multiple of 16.
void attention(const Half* qkv, int batch, int tokens, int heads, int width, Half* out,
               float* log_sums, int threads) {
    int64_t all = (int64_t)heads * width;
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(tokens, width, false);
#pragma omp for schedule(dynamic)
        for (int item = 0; item < batch * heads; item++) {
            int b = item / heads, h = item % heads;
            const Half* base = qkv + b * tokens * 3 * all + h * width;
            attend({base, base + all, base + 2 * all, 3 * all}, tokens, 1 / std::sqrt((float)width),
                   out + b * tokens * all + h * width, all, log_sums + (int64_t)item * tokens,
                   scratch);
        }
    }
}

void attention_backward(const Half* qkv, int batch, int tokens, int heads, int width,
                        const Half* out, const float* log_sums, const Half* grad, Half* grad_qkv,
                        int threads) {
    int64_t all = (int64_t)heads * width;
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(tokens, width, true);
#pragma omp for schedule(dynamic)
        for (int item = 0; item < batch * heads; item++) {
            int b = item / heads, h = item % heads;
            int64_t start = b * tokens * 3 * all + h * width, place = b * tokens * all + h * width;
            const Half* base = qkv + start;
            Half* to = grad_qkv + start;
            attend_backward({base, base + all, base + 2 * all, 3 * all}, tokens,
                            1 / std::sqrt((float)width), out + place, grad + place, all,
                            log_sums + (int64_t)item * tokens, to, to + all, to + 2 * all, scratch);
        }
    }
}

// Layer norm of rows of fp32 numbers (rows, width) → bf16; `stats` (rows, 2) become each row's mean
// and the inverse of its standard deviation. The bias may be null.
void layer_norm(const float* x, const float* weight, const float* bias, int rows, int width,
                float eps, Half* y, float* stats, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int r = 0; r < rows; r++) {
        const float* row = x + (int64_t)r * width;
        Vec sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int j = 0; j < width; j += LANES)
            sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(tail(width - j), row + j));
        float mean = _mm512_reduce_add_ps(sum) / width;
        const Vec middle = _mm512_set1_ps(mean);
        for (int j = 0; j < width; j += LANES) {
            __mmask16 mask = tail(width - j);
            Vec off = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, row + j), middle);
            squares = _mm512_fmadd_ps(off, off, squares);
        }
        float inverse = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps);
        stats[2 * r] = mean;
        stats[2 * r + 1] = inverse;
        for (int j = 0; j < width; j += LANES) {
            __mmask16 mask = tail(width - j);
            Vec off = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, row + j), middle);
            Vec scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, weight + j),
                                      _mm512_set1_ps(inverse));
            Vec shift = bias ? _mm512_maskz_loadu_ps(mask, bias + j) : _mm512_setzero_ps();
            store(y + (int64_t)r * width + j, _mm512_fmadd_ps(off, scale, shift), mask);
        }
    }
}

// Gradients of the outputs → those of the inputs, and `total` (2, width) those of weight and bias:
// summed by blocks of rows, so that they do not depend on the number of threads.
void layer_norm_backward(const float* x, const float* weight, const float* stats, const Half* grad,
                         int rows, int width, float* grad_x, float* total, int threads) {
    constexpr int block = 64;
    std::vector<float> sums((int64_t)(rows + block - 1) / block * 2 * width);
#pragma omp parallel for num_threads(threads)
    for (int first = 0; first < rows; first += block) {
        float* of_weight = sums.data() + (int64_t)(first / block) * 2 * width;
        float* of_bias = of_weight + width;
        for (int r = first; r < std::min(first + block, rows); r++) {
            int64_t start = (int64_t)r * width;
            const Vec mean = _mm512_set1_ps(stats[2 * r]);
            const Vec inverse = _mm512_set1_ps(stats[2 * r + 1]);
            Vec sum = _mm512_setzero_ps(), along = _mm512_setzero_ps();
            for (int j = 0; j < width; j += LANES) {
                __mmask16 mask = tail(width - j);
                Vec off = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + start + j), mean);
                Vec unit = _mm512_maskz_mul_ps(mask, off, inverse), g = load(grad + start + j, mask);
                Vec w = _mm512_mul_ps(g, _mm512_maskz_loadu_ps(mask, weight + j));
                sum = _mm512_add_ps(sum, w);
                along = _mm512_fmadd_ps(w, unit, along);
                Vec to_weight = _mm512_maskz_loadu_ps(mask, of_weight + j);
                Vec to_bias = _mm512_maskz_loadu_ps(mask, of_bias + j);
                _mm512_mask_storeu_ps(of_weight + j, mask, _mm512_fmadd_ps(g, unit, to_weight));
                _mm512_mask_storeu_ps(of_bias + j, mask, _mm512_add_ps(g, to_bias));
            }
            const Vec level = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
            const Vec slope = _mm512_set1_ps(_mm512_reduce_add_ps(along) / width);
            for (int j = 0; j < width; j += LANES) {
                __mmask16 mask = tail(width - j);
                Vec off = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + start + j), mean);
                Vec unit = _mm512_mul_ps(off, inverse);
                Vec w = _mm512_mul_ps(load(grad + start + j, mask),
                                      _mm512_maskz_loadu_ps(mask, weight + j));
                Vec rest = _mm512_fnmadd_ps(unit, slope, _mm512_sub_ps(w, level));
                _mm512_mask_storeu_ps(grad_x + start + j, mask, _mm512_mul_ps(rest, inverse));
            }
        }
    }
    std::fill_n(total, 2 * width, 0.0f);
    for (int first = 0; first < rows; first += block)
        for (int j = 0; j < 2 * width; j++) total[j] += sums[(int64_t)(first / block) * 2 * width + j];
}

// tanh GELU of bf16 numbers.
void gelu(const Half* x, Half* y, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        __mmask16 mask = tail((int)std::min<int64_t>(LANES, count - i));
        store(y + i, gelu(load(x + i, mask)), mask);
    }
}

// Gradients of the outputs → those of the inputs, and the outputs once more unless `y` is null.
void gelu_backward(const Half* x, const Half* grad, Half* grad_x, Half* y, int64_t count,
                   int threads) {
    const Vec one = _mm512_set1_ps(1), slope = _mm512_set1_ps(2 * 0.7978845608f);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        __mmask16 mask = tail((int)std::min<int64_t>(LANES, count - i));
        // y = x s(u), s the logistic function, u = slope (x + 0.044715 x^3)
        Vec v = load(x + i, mask), square = _mm512_mul_ps(v, v), s = gelu_gate(v);
        if (y) store(y + i, _mm512_mul_ps(v, s), mask);
        Vec du = _mm512_mul_ps(
            slope, _mm512_fmadd_ps(square, _mm512_set1_ps(3 * 0.044715f), one));
        Vec bend = _mm512_mul_ps(_mm512_mul_ps(v, du), _mm512_sub_ps(one, s));
        Vec d = _mm512_fmadd_ps(s, bend, s);
        store(grad_x + i, _mm512_mul_ps(d, load(grad + i, mask)), mask);
    }
}

// Cross-entropies of rows of logits (rows, columns), of which `classes` count; a negative target
// does not count. The logits become the gradients of the losses' sum.
void cross_entropy(Half* logits, const int64_t* targets, int rows, int columns, int classes,
                   float* losses, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int r = 0; r < rows; r++) {
        Half* row = logits + (int64_t)r * columns;
        if (targets[r] < 0) {
            std::fill_n(row, columns, 0);
            losses[r] = 0;
            continue;
        }
        Vec top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int j = 0; j < classes; j += LANES) {
            __mmask16 mask = tail(classes - j);
            top = _mm512_mask_max_ps(top, mask, top, load(row + j, mask));
        }
        float largest = _mm512_reduce_max_ps(top);
        Vec shift = _mm512_set1_ps(largest);
        for (int j = 0; j < classes; j += LANES) {
            __mmask16 mask = tail(classes - j);
            sum = _mm512_mask_add_ps(sum, mask, sum, exp(_mm512_sub_ps(load(row + j, mask), shift)));
        }
        float log_sum = largest + std::log(_mm512_reduce_add_ps(sum));
        float target = _mm512_cvtss_f32(load(row + targets[r], 1));
        losses[r] = log_sum - target;
        shift = _mm512_set1_ps(log_sum);
        for (int j = 0; j < classes; j += LANES) {
            __mmask16 mask = tail(classes - j);
            store(row + j, exp(_mm512_sub_ps(load(row + j, mask), shift)), mask);
        }
        Vec at = _mm512_set1_ps(std::exp(target - log_sum) - 1);
        store(row + targets[r], at, 1);
        std::fill_n(row + classes, columns - classes, 0);
    }
}

// sum (fp32) = start (fp32) + addend (bf16); the sum may be where the start is.
void add(const float* start, const Half* addend, float* sum, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        __mmask16 mask = tail((int)std::min<int64_t>(LANES, count - i));
        Vec total = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, start + i), load(addend + i, mask));
        _mm512_mask_storeu_ps(sum + i, mask, total);
    }
}
}
