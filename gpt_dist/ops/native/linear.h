// Linear layers: packed weights times rows of activations in fp32, bf16 or int8.
//
// An output sums its inputs in one fixed order, whatever the number of rows in a tile.

#pragma once

#include <array>
#include <tuple>
#include <utility>

#include "vector.h"

namespace {

enum DType : int32_t { FP32, BF16, INT8 };
enum Epilogue : int32_t { STORE, ADD, GELU, RELU2, CAP };

constexpr int BLOCK = 64;  // outputs are padded to a multiple of this
constexpr int DISTANCE = 4096;  // bytes from weights to those prefetched meanwhile
constexpr int GROUP = 64;  // int8 activations that share a scale; inputs are padded to a multiple

struct Linear {  // weights (outputs, inputs), packed by `pack`
    const uint8_t* weight;
    const float* scale;  // of each output, int8 only
    const float* bias;   // or null
    int32_t outputs, inputs;
    float cap;  // of the outputs, for CAP
};

// Inputs that lie side by side in the 32 bits of a lane.
constexpr int step(DType dtype) { return dtype == FP32 ? 1 : dtype == BF16 ? 2 : 4; }

// Bytes of the weights that connect one input to 64 outputs.
constexpr int block_bytes(DType dtype) { return BLOCK * 4 / step(dtype); }

template <DType D>
using Step = std::tuple_element_t<D, std::tuple<float, Bf16Step, Int8Step>>;

// Activations in the layout of the tiles: (rows, inputs / step) steps.
struct Operand {
    uint8_t* data;
    float* scale;  // int8: (rows, inputs / GROUP)
    int32_t* sum;  // int8: -128 times the sum of each group
    int inputs;

    template <DType D> void set(int row, const float* x, int width) const {
        for (int i = 0; i < inputs; i += LANES) {
            if constexpr (D == INT8) {
                if (i % GROUP == 0) quantise(row, i, x, width);
            } else {
                Vec part = i < width ? load(x + i, tail(width - i)) : Vec{};
                store(at<D>(row, i), part);
            }
        }
    }

    // The step whose first input is `input`.
    template <DType D> Step<D>* at(int row, int input) const {
        return (Step<D>*)data + ((size_t)row * inputs + input) / step(D);
    }

  private:
    void quantise(int row, int start, const float* x, int width) const {
        Vec part[GROUP / LANES], most = Vec{};
        for (int j = 0; j < GROUP / LANES; j++) {
            int i = start + j * LANES;
            part[j] = i < width ? load(x + i, tail(width - i)) : Vec{};
            most = max(most, abs(part[j]));
        }
        float top = reduce_max(most);
        Vec inverse = splat(top > 0 ? 127 / top : 0);
        Ints total = Ints{};
        for (int j = 0; j < GROUP / LANES; j++) {
            Ints q = to_ints(part[j] * inverse);
            total = add(total, q);
            store(at<INT8>(row, start + j * LANES), q);
        }
        size_t group = ((size_t)row * inputs + start) / GROUP;
        scale[group] = top / 127;
        sum[group] = -128 * reduce_add(total);
    }
};

// Weights to prefetch while the tile works on others.
struct Ahead {
    const uint8_t* next;
    int lines;  // cache lines for each step

    void fetch() {
        for (int i = 0; i < lines; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    }
};

// The sums of R rows times V * 16 outputs over all inputs; a single row takes a whole block.
template <DType D, int R> struct Tile {
    static constexpr int WIDTH = R == 1 ? BLOCK : PANEL, V = WIDTH / LANES;
    Vec total[R][V];

    Tile(const Operand& x, int row, const uint8_t* weight, Ahead ahead) {
        for (auto& line : total)
            for (Vec& value : line) value = Vec{};
        if constexpr (D != INT8)
            add_inputs(x, row, weight, ahead);
        else
            for (int group = 0; group < x.inputs / GROUP; group++, weight += GROUP * PANEL) {
                // Where registers cannot hold both kinds of sums, the float ones stay in memory.
                if constexpr (4 * R * V > REGISTERS)
                    add_group_apart(x, row, group, weight, ahead);
                else
                    add_group(x, row, group, weight, ahead);
            }
    }

    __attribute__((always_inline)) void add_inputs(const Operand& x, int row, const uint8_t* weight,
                                                   Ahead ahead) {
        const int steps = x.inputs / step(D);
        const Step<D>* in = x.at<D>(row, 0);
        for (int k = 0; k < steps; k++, weight += PANEL * 4) {
            ahead.fetch();
            Vec w[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) w[v] = load((const float*)vector(weight, v, steps));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                auto in_r = splat(in[(size_t)r * steps + k]);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++)
                    if constexpr (D == FP32)
                        total[r][v] = fma(in_r, w[v], total[r][v]);
                    else
                        total[r][v] = dot_pairs(in_r, w[v], total[r][v]);
            }
        }
    }

    // The weights of 16 outputs for one step, among `steps` in the panel.
    static const uint8_t* vector(const uint8_t* weight, int v, int steps) {
        const int column = v * LANES;
        return weight + ((size_t)(column / PANEL) * steps * PANEL + column % PANEL) * 4;
    }

    __attribute__((noinline)) void add_group_apart(const Operand& x, int row, int group,
                                                   const uint8_t* weight, Ahead& ahead) {
        add_group(x, row, group, weight, ahead);
    }

    // Sums one group in integers, then scales the sums. `dot_quads` takes unsigned weights, so 128
    // was added to them; starting from the operand's sums subtracts that again.
    __attribute__((always_inline)) void add_group(const Operand& x, int row, int group,
                                                  const uint8_t* weight, Ahead& ahead) {
        Ints part[R][V];
        const int groups = x.inputs / GROUP, steps = x.inputs / step(D);
        const Int8Step* in = x.at<INT8>(row, group * GROUP);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) part[r][v] = splat(x.sum[(row + r) * groups + group]);
        Ahead here = ahead;
        for (int k = 0; k < GROUP / step(D); k++, weight += PANEL * 4) {
            here.fetch();
            Ints w[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) w[v] = load((const int32_t*)vector(weight, v, steps));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                auto in_r = splat(in[(size_t)r * steps + k]);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) part[r][v] = dot_quads(in_r, w[v], part[r][v]);
            }
        }
        ahead = here;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Vec scale = splat(x.scale[(row + r) * groups + group]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                total[r][v] = fma(to_floats(part[r][v]), scale, total[r][v]);
        }
    }

    void finish(const Linear& layer, int output, float* out, size_t stride, Epilogue e) const {
        for (int v = 0; v < V; v++) {
            const int at = output + v * LANES;
            const Mask mask = at < layer.outputs ? tail(layer.outputs - at) : 0;
            const Vec bias = layer.bias ? load(layer.bias + at, mask) : Vec{};
            const Vec scale = D == INT8 ? load(layer.scale + at, mask) : Vec{};
            for (int r = 0; r < R; r++) {
                float* to = out + r * stride + at;
                Vec y = D == INT8 ? fma(total[r][v], scale, bias)
                                  : total[r][v] + bias;
                if (e == GELU) y = gelu(y);
                if (e == RELU2) y = relu2(y);
                if (e == CAP) y = soft_cap(y, layer.cap);
                if (e == ADD) y += load(to, mask);
                store(to, y, mask);
            }
        }
    }
};

template <DType D, int R> void run_tile(const Operand& x, int row, const Linear& layer, int output,
                                        Ahead ahead, float* out, size_t stride, Epilogue e) {
    const uint8_t* weight = layer.weight + (size_t)output / BLOCK * x.inputs * block_bytes(D);
    weight += (size_t)(output % BLOCK) * x.inputs * block_bytes(D) / BLOCK;
    Tile<D, R>(x, row, weight, ahead).finish(layer, output, out + row * stride, stride, e);
}

template <DType D, int... R> constexpr auto tile_kernels(std::integer_sequence<int, R...>) {
    return std::array{run_tile<D, R + 1>...};
}

// out (rows, outputs) = epilogue(x (rows, inputs) times the layer)
template <DType D> void linear(Team& team, const Operand& x, const Linear& layer, int rows,
                               float* out, size_t stride, Epilogue e) {
    constexpr auto kernels = tile_kernels<D>(std::make_integer_sequence<int, TILE_ROWS>());
    const int width = rows == 1 ? Tile<D, 1>::WIDTH : PANEL;  // of a strip of outputs
    const int tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, strips = (layer.outputs + width - 1) / width;
    const size_t size = (size_t)x.inputs * block_bytes(D) * width / BLOCK;
    // With one tile, weights stream from memory, in long runs of strips. The hardware's prefetcher
    // follows a whole block, and only the beginnings of the next strip's panels are prefetched here;
    // a single narrow panel is prefetched from DISTANCE ahead. With several tiles, each prefetches a
    // share of the strip that this thread probably gets next.
    const int run = tiles == 1 ? std::clamp(strips / (3 * team.size), 1, 64) : 1;
    const int vectors = width / LANES, lines = tiles == 1 ? 0 : (vectors + tiles - 1) / tiles;
    auto compute = [&](int strip) {
        const int next = strip % run == run - 1 ? strip + 1 + (team.size - 1) * run : strip + 1;
        const uint8_t* soon = next < strips ? layer.weight + next * size : nullptr;
        if (tiles == 1 && width == BLOCK && soon)
            for (int column = 0; column < width; column += PANEL)
                Ahead{soon + column * size / width, 32 * PANEL / width}.fetch();
        for (int tile = 0; tile < tiles; tile++) {
            const int first = rows * tile / tiles, end = rows * (tile + 1) / tiles;
            const bool useful = soon && tile * lines < vectors;
            const Ahead ahead = tiles == 1 && width < BLOCK
                ? Ahead{layer.weight + strip * size + DISTANCE, 1}
                : Ahead{soon + tile * lines * size / vectors, useful ? lines : 0};
            kernels[end - first - 1](x, first, layer, strip * width, ahead, out, stride, e);
        }
    };
    team.each((strips + run - 1) / run, [&](int item) {
        for (int strip = item * run; strip < std::min(strips, (item + 1) * run); strip++)
            compute(strip);
    });
}

// Packs weight (outputs, inputs) in fp32 into the layout of the tiles: [panel][step][output][input],
// where a step is 1 (fp32), 2 (bf16) or 4 (int8) inputs.
template <DType D> void pack_block(const float* weight, int outputs, int inputs, int block,
                                   uint8_t* packed, float* scale) {
    constexpr int STEP = step(D);
    const int wide = padded(inputs, GROUP);
    packed += (size_t)block * wide * block_bytes(D);
    for (int column = 0; column < BLOCK; column++) {
        const int output = block * BLOCK + column;
        const float* row = weight + (size_t)output * inputs;
        float inverse = 0;
        if (D == INT8 && output < outputs) {
            float top = 0;
            for (int k = 0; k < inputs; k++) top = std::max(top, std::fabs(row[k]));
            scale[output] = top / 127;
            inverse = top > 0 ? 127 / top : 0;
        }
        for (int k = 0; k < wide; k++) {
            const float value = output < outputs && k < inputs ? row[k] : 0;
            const size_t group = (size_t)column / PANEL * (wide / STEP) + k / STEP;
            const size_t at = (group * PANEL + column % PANEL) * STEP + k % STEP;
            if (D == FP32) ((float*)packed)[at] = value;
            if (D == BF16) ((Bf16*)packed)[at] = to_bf16(value);
            if (D == INT8) packed[at] = (uint8_t)(std::lrint(value * inverse) + 128);
        }
    }
}

}  // namespace
