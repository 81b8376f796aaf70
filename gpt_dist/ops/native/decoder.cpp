// A forward pass over rows of (token, slot, position), and sampling, for CPUs. Every thread
// runs all layers and waits for the others between phases, so that a step with a single row is
// limited by reading the weights only. inference/cpu_kernels.py binds this.
//
// One thread computes an output, in an order that depends neither on the number of rows nor on the
// number of threads. A row's result is therefore bitwise the same alone and among others, and a
// prompt's cache is the same for any division into chunks.

#include <omp.h>

#include "attention.h"
#include "linear.h"
#include "sampling.h"

namespace {

enum NormKind : int32_t { NONE, LAYER, RMS };

struct Norm {
    const float *weight, *bias;  // of a layer norm; bias may be null
    float eps;
    NormKind kind;
};

struct Layer {
    Norm ln_1, ln_2;
    Linear qkv, mix, up, down;
};

struct Model {
    int32_t dtype, pre_norm, n_layer, n_head, n_kv_head, head_size, width, hidden;
    Epilogue activation;
    float turned_eps;  // in the norm of what was rotated
    const float *wte, *wpe;  // wpe is null where positions are not learned
    const float* rotations;  // (context, head_size): of a position the cosines, then the sines; or null
    const Layer* layers;
    Norm first_norm, final_norm;
    Linear head;
};

void rms_norm(const float* x, float eps, int width, float* out) {
    Vec squares = Vec{};
    for (int i = 0; i < width; i += LANES) {
        Vec part = load(x + i, tail(width - i));
        squares = fma(part, part, squares);
    }
    const Vec scale = splat(1 / std::sqrt(reduce_add(squares) / width + eps));
    for (int i = 0; i < width; i += LANES) {
        Mask mask = tail(width - i);
        store(out + i, load(x + i, mask) * scale, mask);
    }
}

// Rotates a head in place, channel i with channel i + size / 2, and normalises it.
void turn(float* head, const float* rotation, float eps, int size) {
    const int half = size / 2;
    for (int i = 0; i < half; i += LANES) {
        Mask mask = tail(half - i);
        Vec cosine = load(rotation + i, mask), sine = load(rotation + half + i, mask);
        Vec first = load(head + i, mask), second = load(head + half + i, mask);
        store(head + i, fma(first, cosine, second * sine), mask);
        store(head + half + i, fms(second, cosine, first * sine), mask);
    }
    rms_norm(head, eps, size, head);
}

void normalise(const float* x, const Norm& norm, int width, float* out) {
    if (norm.kind == RMS) return rms_norm(x, norm.eps, width, out);
    Vec sum = Vec{}, squares = Vec{};
    for (int i = 0; i < width; i += LANES)
        sum += load(x + i, tail(width - i));
    Vec mean = splat(reduce_add(sum) / width);
    for (int i = 0; i < width; i += LANES) {
        Mask mask = tail(width - i);
        Vec off = keep(mask, load(x + i, mask) - mean);
        squares = fma(off, off, squares);
    }
    Vec scale = splat(1 / std::sqrt(reduce_add(squares) / width + norm.eps));
    for (int i = 0; i < width; i += LANES) {
        Mask mask = tail(width - i);
        Vec y = (load(x + i, mask) - mean) * scale;
        y *= load(norm.weight + i, mask);
        if (norm.bias) y += load(norm.bias + i, mask);
        store(out + i, y, mask);
    }
}

struct Scratch {  // (rows, padded width) each, parts of one buffer
    float *x, *normed, *qkv, *mixed, *hidden, *weights;
    Operand narrow, wide;
    int c, h, c3;  // row strides

    Scratch(const Model& model, int rows, int context, int threads, uint8_t* buffer) {
        c = padded(model.width, GROUP), h = padded(model.hidden, GROUP);
        c3 = padded(model.width + 2 * model.n_kv_head * model.head_size, BLOCK);
        size_t used = 0;
        auto take = [&](size_t bytes) {
            uint8_t* start = buffer ? buffer + used : nullptr;
            used += (bytes + 63) / 64 * 64;
            return start;
        };
        auto floats = [&](size_t count) { return (float*)take(count * 4); };
        x = floats((size_t)rows * c), normed = floats((size_t)rows * c);
        qkv = floats((size_t)rows * c3), mixed = floats((size_t)rows * c);
        hidden = floats((size_t)rows * h);
        weights = floats((size_t)threads * context);
        for (Operand* operand : {&narrow, &wide}) {
            operand->inputs = operand == &narrow ? c : h;
            size_t size = (size_t)rows * operand->inputs;
            operand->data = take(size * 4);
            operand->scale = floats(size / GROUP);
            operand->sum = (int32_t*)floats(size / GROUP);
        }
        bytes = used;
    }
    size_t bytes;
};

struct Rows {  // what one call computes
    int32_t count;
    const int32_t *ids, *slots, *positions;
    float* logits;  // (count, stride), or null
    int64_t stride;
    int32_t shared;  // whether rows may share a slot
};

// The most calls of Team::each.
constexpr int PHASES_A_LAYER = 11, OTHER_PHASES = 4;

template <DType D> void forward(Team& team, const Model& model, const Cache& cache,
                                const Rows& rows, const Scratch& s) {
    using Stored = std::conditional_t<D == FP32, float, Bf16>;
    const int width = model.width, size = model.head_size, count = rows.count;
    const int kv_heads = model.n_kv_head, group = model.n_head / kv_heads;
    auto x = [&](int row) { return s.x + (size_t)row * s.c; };
    auto mixed = [&](int row) { return s.mixed + (size_t)row * s.c; };
    auto qkv = [&](int row) { return s.qkv + (size_t)row * s.c3; };
    auto normed = [&](int row, const Norm& norm) {
        float* out = s.normed + (size_t)row * s.c;
        normalise(x(row), norm, width, out);
        return out;
    };
    auto head = [&](int layer, int row, int head) {
        size_t slot = (size_t)layer * cache.slots + rows.slots[row];
        return Head<Stored>(cache, size, slot * kv_heads + head);
    };

    team.each(count, [&](int row) {
        std::memcpy(x(row), model.wte + (size_t)rows.ids[row] * width, width * sizeof(float));
        if (model.first_norm.kind) normalise(x(row), model.first_norm, width, x(row));
        if (!model.wpe) return;
        const float* place = model.wpe + (size_t)rows.positions[row] * width;
        for (int i = 0; i < width; i++) x(row)[i] += place[i];
    });
    for (int index = 0; index < model.n_layer; index++) {
        const Layer& layer = model.layers[index];
        team.each(count, [&](int row) {
            s.narrow.set<D>(row, model.pre_norm ? normed(row, layer.ln_1) : x(row), width);
        });
        linear<D>(team, s.narrow, layer.qkv, count, s.qkv, s.c3, STORE);
        auto put = [&](int row, int h) {  // a head of keys and values; and rotate, also its queries
            float* key = qkv(row) + width + h * size;
            if (model.rotations) {
                const float* rotation = model.rotations + (size_t)rows.positions[row] * size;
                turn(key, rotation, model.turned_eps, size);
                for (int q = h * group; q < (h + 1) * group; q++)
                    turn(qkv(row) + q * size, rotation, model.turned_eps, size);
            }
            head(index, row, h).put(rows.positions[row], key, key + kv_heads * size);
        };
        constexpr int TOGETHER = 4;  // rows of an item, so that claiming items costs little
        const int items = (count + TOGETHER - 1) / TOGETHER;
        auto each_row = [&](int item, auto&& work) {
            const int h = item / items, first = item % items * TOGETHER;
            for (int row = first; row < std::min(count, first + TOGETHER); row++) work(row, h);
        };
        // A head whose keys nobody else needs is cached by who attends to it.
        const bool before = rows.shared || group > 1;
        if (rows.shared)
            team.each(kv_heads, [&](int h) {
                for (int row = 0; row < count; row++) put(row, h);
            });
        else if (before)
            team.each(items * kv_heads, [&](int item) { each_row(item, put); });
        team.each(items * model.n_head, [&](int item) {
            each_row(item, [&](int row, int h) {
                if (!before) put(row, h);
                head(index, row, h / group)
                    .attend(qkv(row) + h * size, rows.positions[row] + 1,
                            s.weights + (size_t)team.rank * cache.context, mixed(row) + h * size);
            });
        });
        team.each(count, [&](int row) { s.narrow.set<D>(row, mixed(row), width); });
        linear<D>(team, s.narrow, layer.mix, count, s.x, s.c, ADD);
        team.each(count, [&](int row) {
            if (!model.pre_norm) normalise(x(row), layer.ln_1, width, x(row));
            s.narrow.set<D>(row, model.pre_norm ? normed(row, layer.ln_2) : x(row), width);
        });
        linear<D>(team, s.narrow, layer.up, count, s.hidden, s.h, model.activation);
        team.each(count, [&](int row) {
            s.wide.set<D>(row, s.hidden + (size_t)row * s.h, model.hidden);
        });
        linear<D>(team, s.wide, layer.down, count, s.x, s.c, ADD);
        if (!model.pre_norm)
            team.each(count, [&](int row) { normalise(x(row), layer.ln_2, width, x(row)); });
    }
    if (!rows.logits) return;
    team.each(count, [&](int row) {
        s.narrow.set<D>(row, model.final_norm.kind ? normed(row, model.final_norm) : x(row), width);
    });
    const Epilogue last = model.head.cap ? CAP : STORE;
    linear<D>(team, s.narrow, model.head, count, rows.logits, rows.stride, last);
}

}  // namespace

extern "C" {

int64_t packed_bytes(int32_t dtype, int32_t outputs, int32_t inputs) {
    return (int64_t)padded(outputs, BLOCK) / BLOCK * padded(inputs, GROUP) *
           block_bytes((DType)dtype);
}

// Packs weight (outputs, inputs) in fp32 into the tiles' layout; int8 also writes scale (outputs).
void pack(int32_t dtype, const float* weight, int32_t outputs, int32_t inputs, uint8_t* packed,
          float* scale, int32_t threads) {
    const auto kernel =
        dtype == FP32 ? pack_block<FP32> : dtype == BF16 ? pack_block<BF16> : pack_block<INT8>;
#pragma omp parallel for num_threads(threads)
    for (int block = 0; block < padded(outputs, BLOCK) / BLOCK; block++)
        kernel(weight, outputs, inputs, block, packed, scale);
}

int64_t scratch_bytes(const Model* model, int32_t rows, int32_t context, int32_t threads) {
    return Scratch(*model, rows, context, threads, nullptr).bytes;
}

// Runs tokens. Each is cached at its position in its slot and attends to the positions before it,
// those of other rows in this call included. `draws` (by slot), unless null, chooses a token for
// each row: `tokens` (rows), `logprobs` (rows, 1 + reported) and `top_ids` (rows, reported). Rows of
// one slot lie side by side: all but the first are guesses, and from the first wrong one on nothing
// is chosen: -1 in `tokens`.
void forward(const Model* model, const Cache* cache, const Rows* rows, uint8_t* scratch,
             int32_t threads, Draw* draws, int32_t* tokens, float* logprobs, int32_t* top_ids,
             int32_t reported) {
    const Scratch buffers(*model, rows->count, cache->context, threads, scratch);
    std::vector<Phase> phases(OTHER_PHASES + PHASES_A_LAYER * model->n_layer);
    const auto kernel = model->dtype == FP32   ? forward<FP32>
                        : model->dtype == BF16 ? forward<BF16>
                                               : forward<INT8>;
    std::vector<int> starts;  // of the rows of each slot, and the end
    for (int row = 0; row < rows->count; row++)
        if (row == 0 || rows->slots[row] != rows->slots[row - 1]) starts.push_back(row);
    starts.push_back(rows->count);
#pragma omp parallel num_threads(threads)
    {
        Team team(omp_get_thread_num(), omp_get_num_threads(), phases.data());
        kernel(team, *model, *cache, *rows, buffers);
        if (draws)
            team.each(starts.size() - 1, [&](int slot) {
                static thread_local Sampler sampler(0);
                const int vocab = model->head.outputs;
                if (sampler.vocab != vocab) sampler = Sampler(vocab);
                bool right = true;
                for (int row = starts[slot]; row < starts[slot + 1]; row++) {
                    right = right && (row == starts[slot] || tokens[row - 1] == rows->ids[row]);
                    tokens[row] = !right ? -1 : sampler.run(
                        draws[rows->slots[row]], rows->logits + row * rows->stride,
                        logprobs + row * (reported + 1), top_ids + row * reported);
                }
            });
    }
}
}
