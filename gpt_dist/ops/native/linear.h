// Linear layers: packed weights times rows of activations in fp32, bf16 or int8.
//
// An output is summed over the inputs in one fixed order, whatever the number of rows in a tile.

#pragma once

#include "vector.h"

namespace {

enum DType : int32_t { FP32, BF16, INT8 };
enum Epilogue { STORE, ADD, GELU };

constexpr int BLOCK = 64;  // outputs that are packed and computed together
constexpr int GROUP = 64;  // activations that share a scale in int8; inputs are padded to this

struct Linear {  // weights (outputs, inputs), packed by `pack`
    const uint8_t* weight;
    const float* scale;  // a scale an output, int8 only
    const float* bias;   // or null
    int32_t outputs, inputs;
};

// The weights of 64 outputs: bytes for one input.
int block_bytes(DType dtype) { return BLOCK * (dtype == FP32 ? 4 : dtype == BF16 ? 2 : 1); }

// Activations as the matrix kernels read them: (rows, inputs) in fp32, bf16 or int8.
struct Operand {
    uint8_t* data;
    float* scale;  // int8: (rows, inputs / GROUP)
    int32_t* sum;  // int8: -128 times the sum of each group
    int inputs;

    template <DType D> void set(int row, const float* x, int width) const {
        for (int i = 0; i < inputs; i += LANES) {
            if (D == INT8 && i % GROUP == 0) quantise(row, i, x, width);
            if (D == INT8) continue;
            Vec part = i < width ? _mm512_maskz_loadu_ps(tail(width - i), x + i) : Vec{};
            if (D == FP32) _mm512_storeu_ps((float*)data + (size_t)row * inputs + i, part);
            if (D == BF16)
                _mm256_storeu_si256((__m256i*)(data + 2 * ((size_t)row * inputs + i)),
                                    (__m256i)_mm512_cvtneps_pbh(part));
        }
    }

  private:
    void quantise(int row, int start, const float* x, int width) const {
        Vec part[GROUP / LANES], most = Vec{};
        for (int j = 0; j < GROUP / LANES; j++) {
            int i = start + j * LANES;
            part[j] = i < width ? _mm512_maskz_loadu_ps(tail(width - i), x + i) : Vec{};
            most = _mm512_max_ps(most, _mm512_abs_ps(part[j]));
        }
        float top = _mm512_reduce_max_ps(most);
        Vec inverse = _mm512_set1_ps(top > 0 ? 127 / top : 0);
        __m512i total = __m512i{};
        for (int j = 0; j < GROUP / LANES; j++) {
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(part[j], inverse));
            total = _mm512_add_epi32(total, q);
            _mm_storeu_si128((__m128i*)(data + (size_t)row * inputs + start + j * LANES),
                             _mm512_cvtsepi32_epi8(q));
        }
        size_t group = ((size_t)row * inputs + start) / GROUP;
        scale[group] = top / 127;
        sum[group] = -128 * _mm512_reduce_add_epi32(total);
    }
};

// Weights that are wanted soon, brought nearer while others are in use.
struct Ahead {
    const uint8_t* next;
    int lines;  // cache lines a step

    void fetch() {
        for (int i = 0; i < lines; i++, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    }
};

// sums + weights (unsigned) * inputs (signed), four products a lane. As assembly, because GCC 12
// keeps copies of all sums on the stack around the intrinsic.
__m512i dot(__m512i sums, __m512i weights, __m512i inputs) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(inputs));
    return sums;
}

// The sums of R rows times 64 outputs over all inputs.
template <DType D, int R> struct Tile {
    static constexpr int V = BLOCK / LANES;
    Vec total[R][V];

    Tile(const Operand& x, int row, const uint8_t* weight, Ahead ahead) {
        for (auto& line : total)
            for (Vec& value : line) value = Vec{};
        if constexpr (D == INT8) {
            for (int group = 0; group < x.inputs / GROUP; group++) {
                // With many rows the float sums have to stay in memory, so that the integer sums
                // fit into the registers.
                if constexpr (R > 2)
                    add_group_apart(x, row, group, weight, ahead);
                else
                    add_group(x, row, group, weight, ahead);
                weight += GROUP * BLOCK;
            }
            return;
        }
        constexpr int STEP = D == FP32 ? 1 : 2;  // inputs that one instruction takes
        const int steps = x.inputs / STEP;
        const float* in = (const float*)x.data + (size_t)row * steps;
        for (int k = 0; k < steps; k++, weight += BLOCK * 4) {
            ahead.fetch();
            Vec w[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) w[v] = _mm512_loadu_ps(weight + v * 64);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                Vec in_r = _mm512_set1_ps(in[(size_t)r * steps + k]);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++)
                    if constexpr (D == FP32)
                        total[r][v] = _mm512_fmadd_ps(in_r, w[v], total[r][v]);
                    else
                        total[r][v] = _mm512_dpbf16_ps(total[r][v], (__m512bh)in_r, (__m512bh)w[v]);
            }
        }
    }

    __attribute__((noinline)) void add_group_apart(const Operand& x, int row, int group,
                                                   const uint8_t* weight, Ahead& ahead) {
        add_group(x, row, group, weight, ahead);
    }

    // Integer sums over one group, then scaled. Weights are stored with 128 added, as the
    // instruction wants one side unsigned; the operand's sums take that off again.
    __attribute__((always_inline)) void add_group(const Operand& x, int row, int group,
                                                  const uint8_t* weight, Ahead& ahead) {
        __m512i part[R][V];
        const int groups = x.inputs / GROUP, steps = x.inputs / 4;
        const int32_t* in = (const int32_t*)x.data + (size_t)row * steps + group * (GROUP / 4);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                part[r][v] = _mm512_set1_epi32(x.sum[(row + r) * groups + group]);
        Ahead here = ahead;
        for (int k = 0; k < GROUP / 4; k++, weight += BLOCK * 4) {
            here.fetch();
            __m512i w[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) w[v] = _mm512_loadu_si512(weight + v * 64);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                __m512i in_r = _mm512_set1_epi32(in[(size_t)r * steps + k]);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) part[r][v] = dot(part[r][v], w[v], in_r);
            }
        }
        ahead = here;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            Vec scale = _mm512_set1_ps(x.scale[(row + r) * groups + group]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++)
                total[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[r][v]), scale, total[r][v]);
        }
    }

    void finish(const Linear& layer, int output, float* out, size_t stride, Epilogue e) const {
        for (int v = 0; v < V; v++) {
            const int at = output + v * LANES;
            const __mmask16 mask = at < layer.outputs ? tail(layer.outputs - at) : 0;
            const Vec bias = layer.bias ? _mm512_maskz_loadu_ps(mask, layer.bias + at) : Vec{};
            const Vec scale = D == INT8 ? _mm512_maskz_loadu_ps(mask, layer.scale + at) : Vec{};
            for (int r = 0; r < R; r++) {
                float* to = out + r * stride + at;
                Vec y = D == INT8 ? _mm512_fmadd_ps(total[r][v], scale, bias)
                                  : _mm512_add_ps(total[r][v], bias);
                if (e == GELU) y = gelu(y);
                if (e == ADD) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, to));
                _mm512_mask_storeu_ps(to, mask, y);
            }
        }
    }
};

template <DType D, int R> void run_tile(const Operand& x, int row, const Linear& layer, int block,
                                        Ahead ahead, float* out, size_t stride, Epilogue e) {
    const uint8_t* weight = layer.weight + (size_t)block * x.inputs * block_bytes(D);
    Tile<D, R>(x, row, weight, ahead).finish(layer, block * BLOCK, out + row * stride, stride, e);
}

// out (rows, outputs) = epilogue(x (rows, inputs) times the layer)
template <DType D> void linear(Team& team, const Operand& x, const Linear& layer, int rows,
                               float* out, size_t stride, Epilogue e) {
    constexpr decltype(&run_tile<D, 1>) kernels[] = {run_tile<D, 1>, run_tile<D, 2>,
                                                     run_tile<D, 3>, run_tile<D, 4>,
                                                     run_tile<D, 5>, run_tile<D, 6>};
    const int tiles = (rows + 5) / 6, blocks = padded(layer.outputs, BLOCK) / BLOCK;
    const size_t size = (size_t)x.inputs * block_bytes(D);
    // A single tile is a stream through memory: long runs of blocks, so that the hardware can follow
    // it, and the beginning of what comes next is fetched by hand. Several tiles each fetch a share
    // of the block that this thread probably gets next.
    const int run = tiles == 1 ? std::clamp(blocks / (3 * team.size), 1, 64) : 1;
    const int lines = tiles >= 4 ? 1 : tiles >= 2 ? 2 : 0;
    auto compute = [&](int block) {
        const int next = block % run == run - 1 ? block + 1 + (team.size - 1) * run : block + 1;
        const uint8_t* soon = next < blocks ? layer.weight + next * size : nullptr;
        if (tiles == 1 && soon) Ahead{soon, 32}.fetch();
        for (int tile = 0; tile < tiles; tile++) {
            const int first = rows * tile / tiles, end = rows * (tile + 1) / tiles;
            const bool useful = soon && tile * lines < BLOCK / LANES;
            const Ahead ahead{soon + tile * lines * size / 4, useful ? lines : 0};
            kernels[end - first - 1](x, first, layer, block, ahead, out, stride, e);
        }
    };
    team.each((blocks + run - 1) / run, [&](int item) {
        for (int block = item * run; block < std::min(blocks, (item + 1) * run); block++)
            compute(block);
    });
}

uint16_t to_bf16(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

// weight (outputs, inputs) in fp32 to the layout that tiles read: for each block of 64 outputs,
// for each 1 (fp32), 2 (bf16) or 4 (int8) inputs, 64 outputs with those inputs side by side.
template <DType D> void pack_block(const float* weight, int outputs, int inputs, int block,
                                   uint8_t* packed, float* scale) {
    constexpr int STEP = D == FP32 ? 1 : D == BF16 ? 2 : 4;  // inputs side by side in a lane
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
            const size_t at = (size_t)(k / STEP * BLOCK + column) * STEP + k % STEP;
            if (D == FP32) ((float*)packed)[at] = value;
            if (D == BF16) ((uint16_t*)packed)[at] = to_bf16(value);
            if (D == INT8) packed[at] = (uint8_t)(std::lrint(value * inverse) + 128);
        }
    }
}

}  // namespace
