// Operations of a training step on CPUs, in bf16 and in fp32: causal self-attention, layer norm, GELU
// and cross-entropy, forward and backward. Matrices are row-major. ops/native_training.py binds this.

#include "training_attention.h"

namespace {

// qkv (batch, tokens, 3, heads, width) → out (batch, tokens, heads, width) and the log-sum-exp of
// each row of scores (batch, heads, tokens). The width is a multiple of 16.
template <class T>
void attention(const T* qkv, int batch, int tokens, int heads, int width, T* out, float* log_sums,
               int threads) {
    int64_t all = (int64_t)heads * width;
#pragma omp parallel num_threads(threads)
    {
        Scratch<T> scratch(tokens, width, false);
#pragma omp for schedule(dynamic)
        for (int item = 0; item < batch * heads; item++) {
            int b = item / heads, h = item % heads;
            const T* base = qkv + b * tokens * 3 * all + h * width;
            attend<T>({base, base + all, base + 2 * all, 3 * all}, tokens,
                      1 / std::sqrt((float)width), out + b * tokens * all + h * width, all, log_sums + (int64_t)item * tokens,
                   scratch);
        }
    }
}

template <class T>
void attention_backward(const T* qkv, int batch, int tokens, int heads, int width, const T* out,
                        const float* log_sums, const T* grad, T* grad_qkv, int threads) {
    int64_t all = (int64_t)heads * width;
#pragma omp parallel num_threads(threads)
    {
        Scratch<T> scratch(tokens, width, true);
#pragma omp for schedule(dynamic)
        for (int item = 0; item < batch * heads; item++) {
            int b = item / heads, h = item % heads;
            int64_t start = b * tokens * 3 * all + h * width, place = b * tokens * all + h * width;
            const T* base = qkv + start;
            T* to = grad_qkv + start;
            attend_backward<T>({base, base + all, base + 2 * all, 3 * all}, tokens,
                            1 / std::sqrt((float)width), out + place, grad + place, all,
                            log_sums + (int64_t)item * tokens, to, to + all, to + 2 * all, scratch);
        }
    }
}

// Layer norm: fp32 (rows, width) → (rows, width), and `stats` (rows, 2): each row's mean and
// inverse standard deviation. The bias may be null.
template <class T>
void layer_norm(const float* x, const float* weight, const float* bias, int rows, int width,
                float eps, T* y, float* stats, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int r = 0; r < rows; r++) {
        const float* row = x + (int64_t)r * width;
        Vec sum = Vec{}, squares = Vec{};
        for (int j = 0; j < width; j += LANES)
            sum += load(row + j, tail(width - j));
        float mean = reduce_add(sum) / width;
        const Vec middle = splat(mean);
        for (int j = 0; j < width; j += LANES) {
            Mask mask = tail(width - j);
            Vec off = keep(mask, load(row + j, mask) - middle);
            squares = fma(off, off, squares);
        }
        float inverse = 1 / std::sqrt(reduce_add(squares) / width + eps);
        stats[2 * r] = mean;
        stats[2 * r + 1] = inverse;
        for (int j = 0; j < width; j += LANES) {
            Mask mask = tail(width - j);
            Vec off = load(row + j, mask) - middle;
            Vec scale = load(weight + j, mask) * splat(inverse);
            Vec shift = bias ? load(bias + j, mask) : Vec{};
            store(y + (int64_t)r * width + j, fma(off, scale, shift), mask);
        }
    }
}

// Gradients of the outputs → gradients of the inputs, and `total` (2, width), those of weight and
// bias. Rows are summed block by block, so that results do not depend on the number of threads.
template <class T>
void layer_norm_backward(const float* x, const float* weight, const float* stats, const T* grad,
                         int rows, int width, float* grad_x, float* total, int threads) {
    constexpr int block = 64;
    std::vector<float> sums((int64_t)(rows + block - 1) / block * 2 * width);
#pragma omp parallel for num_threads(threads)
    for (int first = 0; first < rows; first += block) {
        float* of_weight = sums.data() + (int64_t)(first / block) * 2 * width;
        float* of_bias = of_weight + width;
        for (int r = first; r < std::min(first + block, rows); r++) {
            int64_t start = (int64_t)r * width;
            const Vec mean = splat(stats[2 * r]);
            const Vec inverse = splat(stats[2 * r + 1]);
            Vec sum = Vec{}, along = Vec{};
            for (int j = 0; j < width; j += LANES) {
                Mask mask = tail(width - j);
                Vec off = load(x + start + j, mask) - mean;
                Vec unit = keep(mask, off * inverse), g = load(grad + start + j, mask);
                Vec w = g * load(weight + j, mask);
                sum += w;
                along = fma(w, unit, along);
                Vec to_weight = load(of_weight + j, mask);
                Vec to_bias = load(of_bias + j, mask);
                store(of_weight + j, fma(g, unit, to_weight), mask);
                store(of_bias + j, g + to_bias, mask);
            }
            const Vec level = splat(reduce_add(sum) / width);
            const Vec slope = splat(reduce_add(along) / width);
            for (int j = 0; j < width; j += LANES) {
                Mask mask = tail(width - j);
                Vec off = load(x + start + j, mask) - mean;
                Vec unit = off * inverse;
                Vec w = load(grad + start + j, mask) * load(weight + j, mask);
                Vec rest = fnma(unit, slope, w - level);
                store(grad_x + start + j, rest * inverse, mask);
            }
        }
    }
    std::fill_n(total, 2 * width, 0.0f);
    for (int first = 0; first < rows; first += block)
        for (int j = 0; j < 2 * width; j++) total[j] += sums[(int64_t)(first / block) * 2 * width + j];
}

// tanh GELU.
template <class T> void gelu(const T* x, T* y, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        Mask mask = tail((int)std::min<int64_t>(LANES, count - i));
        store(y + i, gelu(load(x + i, mask)), mask);
    }
}

// Gradients of the outputs → gradients of the inputs. Writes the outputs to `y` unless it is null.
template <class T>
void gelu_backward(const T* x, const T* grad, T* grad_x, T* y, int64_t count, int threads) {
    const Vec one = splat(1.f), slope = splat(2 * 0.7978845608f);
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        Mask mask = tail((int)std::min<int64_t>(LANES, count - i));
        // y = x s(u), s the logistic function, u = slope (x + 0.044715 x^3)
        Vec v = load(x + i, mask), square = v * v, s = gelu_gate(v);
        if (y) store(y + i, v * s, mask);
        Vec du = slope * fma(square, splat(3 * 0.044715f), one);
        Vec bend = v * du * (one - s);
        Vec d = fma(s, bend, s);
        store(grad_x + i, d * load(grad + i, mask), mask);
    }
}

// Cross-entropies of logits (rows, columns), of which the first `classes` columns count. A row with
// a negative target has none. The logits become the gradients of the sum of the losses.
template <class T>
void cross_entropy(T* logits, const int64_t* targets, int rows, int columns, int classes,
                   float* losses, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int r = 0; r < rows; r++) {
        T* row = logits + (int64_t)r * columns;
        if (targets[r] < 0) {
            std::fill_n(row, columns, T(0));
            losses[r] = 0;
            continue;
        }
        Vec top = splat(-INFINITY), sum = Vec{};
        for (int j = 0; j < classes; j += LANES) {
            Mask mask = tail(classes - j);
            top = select(mask, max(top, load(row + j, mask)), top);
        }
        float largest = reduce_max(top);
        Vec shift = splat(largest);
        for (int j = 0; j < classes; j += LANES) {
            Mask mask = tail(classes - j);
            sum = select(mask, sum + exp(load(row + j, mask) - shift), sum);
        }
        float log_sum = largest + std::log(reduce_add(sum));
        float target = get(row + targets[r]);
        losses[r] = log_sum - target;
        shift = splat(log_sum);
        for (int j = 0; j < classes; j += LANES) {
            Mask mask = tail(classes - j);
            store(row + j, exp(load(row + j, mask) - shift), mask);
        }
        put(row + targets[r], std::exp(target - log_sum) - 1);
        std::fill_n(row + classes, columns - classes, T(0));
    }
}

// sum (fp32) = start (fp32) + addend; `sum` may be `start`.
template <class T>
void add(const float* start, const T* addend, float* sum, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        Mask mask = tail((int)std::min<int64_t>(LANES, count - i));
        Vec total = load(start + i, mask) + load(addend + i, mask);
        store(sum + i, total, mask);
    }
}

}  // namespace

// Function pointers by name and type: attention_bf16, attention_fp32, …
#define EXPORT(operation)                                     \
    extern "C" const auto operation##_bf16 = operation<Bf16>; \
    extern "C" const auto operation##_fp32 = operation<float>;

EXPORT(attention)
EXPORT(attention_backward)
EXPORT(layer_norm)
EXPORT(layer_norm_backward)
EXPORT(gelu)
EXPORT(gelu_backward)
EXPORT(cross_entropy)
EXPORT(add)
