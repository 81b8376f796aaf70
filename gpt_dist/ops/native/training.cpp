// Operations of a training step on CPUs, in bf16 and in fp32: causal self-attention, rotation of
// queries and keys, norms, activations and cross-entropy, forward and backward. Matrices are row-major. ops/native_training.py binds this.

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

// RMSNorm without weights: fp32 (rows, width) → (rows, width), and each row's scale.
template <class T>
void rms_norm(const float* x, int rows, int width, float eps, T* y, float* scales, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int r = 0; r < rows; r++) {
        const float* row = x + (int64_t)r * width;
        Vec squares = Vec{};
        for (int j = 0; j < width; j += LANES) {
            Vec part = load(row + j, tail(width - j));
            squares = fma(part, part, squares);
        }
        scales[r] = 1 / std::sqrt(reduce_add(squares) / width + eps);
        const Vec scale = splat(scales[r]);
        for (int j = 0; j < width; j += LANES) {
            Mask mask = tail(width - j);
            store(y + (int64_t)r * width + j, load(row + j, mask) * scale, mask);
        }
    }
}

// Gradients of the outputs → gradients of the inputs.
template <class T>
void rms_norm_backward(const float* x, const float* scales, const T* grad, int rows, int width,
                       float* grad_x, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int r = 0; r < rows; r++) {
        const int64_t start = (int64_t)r * width;
        Vec along = Vec{};
        for (int j = 0; j < width; j += LANES) {
            Mask mask = tail(width - j);
            along = fma(load(grad + start + j, mask), load(x + start + j, mask), along);
        }
        const Vec scale = splat(scales[r]);
        const Vec slope = splat(reduce_add(along) / width * scales[r] * scales[r]);
        for (int j = 0; j < width; j += LANES) {
            Mask mask = tail(width - j);
            Vec rest = fnma(load(x + start + j, mask), slope, load(grad + start + j, mask));
            store(grad_x + start + j, rest * scale, mask);
        }
    }
}

// qkv (rows, heads, size) → y: the first `turned` heads are rotated, channel i with channel
// i + size / 2, and normalised; the others are copied. `angles` (tokens, size) are the cosines and
// sines of row r at r % tokens. `scales` (rows, turned) are those of the norms.
template <class T>
void rotary(const T* qkv, const float* angles, int rows, int tokens, int heads, int turned, int size,
            float eps, T* y, float* scales, int threads) {
    const int half = size / 2;
#pragma omp parallel for num_threads(threads)
    for (int r = 0; r < rows; r++) {
        const float *cosines = angles + (int64_t)(r % tokens) * size, *sines = cosines + half;
        const int64_t start = (int64_t)r * heads * size;
        for (int h = 0; h < turned; h++) {
            const T* x = qkv + start + h * size;
            T* to = y + start + h * size;
            Vec squares = Vec{};
            for (int i = 0; i < size; i += LANES) {  // a rotation changes no length
                Vec part = load(x + i, tail(size - i));
                squares = fma(part, part, squares);
            }
            const float factor = 1 / std::sqrt(reduce_add(squares) / size + eps);
            scales[(int64_t)r * turned + h] = factor;
            const Vec scale = splat(factor);
            for (int i = 0; i < half; i += LANES) {
                Mask mask = tail(half - i);
                Vec cosine = load(cosines + i, mask), sine = load(sines + i, mask);
                Vec first = load(x + i, mask) * scale, second = load(x + half + i, mask) * scale;
                store(to + i, fma(first, cosine, second * sine), mask);
                store(to + half + i, fms(second, cosine, first * sine), mask);
            }
        }
        std::copy_n(qkv + start + turned * size, (heads - turned) * size, y + start + turned * size);
    }
}

// Gradients of the outputs `y` → gradients of the inputs.
template <class T>
void rotary_backward(const T* y, const float* angles, const float* scales, const T* grad, int rows,
                     int tokens, int heads, int turned, int size, T* grad_qkv, int threads) {
    const int half = size / 2;
#pragma omp parallel for num_threads(threads)
    for (int r = 0; r < rows; r++) {
        const float *cosines = angles + (int64_t)(r % tokens) * size, *sines = cosines + half;
        const int64_t start = (int64_t)r * heads * size;
        for (int h = 0; h < turned; h++) {
            const T *out = y + start + h * size, *slopes = grad + start + h * size;
            T* to = grad_qkv + start + h * size;
            Vec along = Vec{};
            for (int i = 0; i < size; i += LANES) {
                Mask mask = tail(size - i);
                along = fma(load(slopes + i, mask), load(out + i, mask), along);
            }
            const Vec level = splat(reduce_add(along) / size);
            const Vec scale = splat(scales[(int64_t)r * turned + h]);
            for (int i = 0; i < half; i += LANES) {
                Mask mask = tail(half - i);
                Vec cosine = load(cosines + i, mask), sine = load(sines + i, mask);
                Vec first = fnma(load(out + i, mask), level, load(slopes + i, mask)) * scale;
                Vec second =
                    fnma(load(out + half + i, mask), level, load(slopes + half + i, mask)) * scale;
                store(to + i, fms(first, cosine, second * sine), mask);
                store(to + half + i, fma(second, cosine, first * sine), mask);
            }
        }
        std::copy_n(grad + start + turned * size, (heads - turned) * size,
                    grad_qkv + start + turned * size);
    }
}

// y[i] = function(x[i]).
template <class T, class Function>
void map(const T* x, T* y, int64_t count, int threads, Function function) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        Mask mask = tail((int)std::min<int64_t>(LANES, count - i));
        store(y + i, function(load(x + i, mask)), mask);
    }
}

// Gradients of the outputs → gradients of the inputs. Writes the outputs to `y` unless it is null.
// `function` returns the slope at its argument, and sets the output.
template <class T, class Function>
void map_backward(const T* x, const T* grad, T* grad_x, T* y, int64_t count, int threads,
                  Function function) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i += LANES) {
        Mask mask = tail((int)std::min<int64_t>(LANES, count - i));
        Vec output, slope = function(load(x + i, mask), output);
        if (y) store(y + i, output, mask);
        store(grad_x + i, slope * load(grad + i, mask), mask);
    }
}

// tanh GELU.
template <class T> void gelu(const T* x, T* y, int64_t count, int threads) {
    map(x, y, count, threads, [](Vec v) { return gelu(v); });
}

template <class T>
void gelu_backward(const T* x, const T* grad, T* grad_x, T* y, int64_t count, int threads) {
    const Vec one = splat(1.f), slope = splat(2 * 0.7978845608f);
    map_backward(x, grad, grad_x, y, count, threads, [=](Vec v, Vec& output) {
        // y = x s(u), s the logistic function, u = slope (x + 0.044715 x^3)
        Vec square = v * v, s = gelu_gate(v);
        output = v * s;
        Vec du = slope * fma(square, splat(3 * 0.044715f), one);
        Vec bend = v * du * (one - s);
        return fma(s, bend, s);
    });
}

// Squared ReLU.
template <class T> void relu2(const T* x, T* y, int64_t count, int threads) {
    map(x, y, count, threads, [](Vec v) { return relu2(v); });
}

template <class T>
void relu2_backward(const T* x, const T* grad, T* grad_x, T* y, int64_t count, int threads) {
    map_backward(x, grad, grad_x, y, count, threads, [](Vec v, Vec& output) {
        Vec kept = max(v, Vec{});
        output = kept * kept;
        return kept + kept;
    });
}

template <class T>
void capped_cross_entropy(T* logits, const int64_t* targets, int rows, int columns, int classes,
                          float cap, float* losses, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> buffer(classes);
        float* capped = buffer.data();
#pragma omp for schedule(dynamic)
        for (int r = 0; r < rows; r++) {
            T* row = logits + (int64_t)r * columns;
            losses[r] = 0;
            if (targets[r] < 0) {
                std::fill_n(row, columns, T(0));
                continue;
            }
            Vec top = splat(-cap), sum = Vec{};
            for (int j = 0; j < classes; j += LANES) {
                Mask mask = tail(classes - j);
                Vec z = soft_cap(load(row + j, mask), cap);
                store(capped + j, z, mask);
                top = select(mask, max(top, z), top);
            }
            const float largest = reduce_max(top);
            for (int j = 0; j < classes; j += LANES) {
                Mask mask = tail(classes - j);
                sum += keep(mask, exp(load(capped + j, mask) - splat(largest)));
            }
            const float log_sum = largest + std::log(reduce_add(sum));
            losses[r] = log_sum - capped[targets[r]];
            const Vec shift = splat(log_sum), inverse = splat(1 / cap), one = splat(1.f);
            for (int j = 0; j < classes; j += LANES) {
                Mask mask = tail(classes - j);
                Vec z = load(capped + j, mask), level = z * inverse;
                store(row + j, exp(z - shift) * fnma(level, level, one), mask);
            }
            const float own = capped[targets[r]], level = own / cap;
            put(row + targets[r], (std::exp(own - log_sum) - 1) * (1 - level * level));
            std::fill_n(row + classes, columns - classes, T(0));
        }
    }
}

// Cross-entropies of logits (rows, columns), of which the first `classes` columns count. A row with
// a negative target has none. The logits become the gradients of the sum of the losses. With `cap`
// above 0 the losses are those of capped logits, which are kept in fp32.
template <class T>
void cross_entropy(T* logits, const int64_t* targets, int rows, int columns, int classes, float cap,
                   float* losses, int threads) {
    if (cap) return capped_cross_entropy(logits, targets, rows, columns, classes, cap, losses, threads);
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
EXPORT(rms_norm)
EXPORT(rms_norm_backward)
EXPORT(rotary)
EXPORT(rotary_backward)
EXPORT(gelu)
EXPORT(gelu_backward)
EXPORT(relu2)
EXPORT(relu2_backward)
EXPORT(cross_entropy)
EXPORT(add)
