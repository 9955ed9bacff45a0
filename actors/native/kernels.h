// What the instruction-set variants of the kernels have in common: arguments and the table of entry points.
//
// Blocked weights. Outputs come in groups of 16. Inside a group the 16 values that belong to one input (float32)
// or to a pair of inputs (bfloat16) are adjacent, 64 bytes, so that a weight is one sequential stream:
//   float32   [group][k][16]
//   bfloat16  [group][k / 2][16][2]      the even input in the low half of each 32-bit word
//   int8      [group][k / 4][16][4]      in the order 0, 2, 1, 3; then the 16 outputs' scales in float32
// A 32-bit word of bfloat16 expands to its even value by a shift and to its odd value by a mask.
//
// int8 weights are symmetric, -127..127 with one scale an output. Rows of inputs are quantised on the way, symmetric
// in 16 bits with one scale a row (in 8 bits the outliers of a row drown the rest of it, and the multipliers of AVX2
// take pairs of 16 bits anyway). The sum over SPAN inputs is an exact integer, so that its order does not matter;
// spans are added in float32, first to last: every instruction set gives the same bits.
//
// Every product sums over k = 0, 1, 2, ... into one float32 accumulator per output, whatever the number of rows:
// the bits of an output row do not depend on the other rows, on the tile that computed it or on the thread.
#pragma once

#include <stdint.h>

namespace s2d {

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 32;       // KV slots a block
constexpr int64_t MAX_GROUP = 64;   // query heads a KV head
constexpr int64_t MAX_TOP = 32;     // best entries a row that topk returns

constexpr int64_t SPAN = 512;       // inputs whose products fit 32 bits: 512 * 127 * 32767 < 2^31
constexpr float TINY = 1e-30f;      // a row (or weights of an output) of nothing greater quantises to zeros

enum class Format : int32_t { float32, bf16, int8 };

// Bytes of one output group over k inputs.
constexpr int64_t group_bytes(int64_t k, Format format) {
    switch (format) {
        case Format::bf16: return (k + 1) / 2 * 64;
        case Format::int8: return ((k + 3) / 4 + 1) * 64;
        default: return k * 64;
    }
}
// Rows of quantised inputs.
struct Quantized {
    const int16_t* values;
    int64_t ld;  // from a row to the next, at least k rounded up to a multiple of 4
    const float* scales;
    int64_t stride;  // from a row's scale to the next
};

enum class Epilogue { store, add, scale_add };

// y[r][n] = sum_k x[r][k] w[n][k] (+ bias[n]), for output groups group_begin..group_end-1.
// add: y += product. scale_add: y = y * row_scale[r] + product.
struct Product {
    const float* x;
    int64_t ldx;
    int64_t rows;
    const void* w;
    int64_t group_bytes;  // from a group of weights to the next
    Format format;
    int64_t k;
    int64_t n;  // outputs in all; the last group may be partial
    int64_t group_begin;
    int64_t group_end;
    float* y;
    int64_t ldy;
    const float* bias;
    const float* row_scale;
    Epilogue epilogue;
    Quantized q = {};  // read instead of x where the weights are int8
};

// Attention of the query heads of one KV head, one token: softmax(q K^T * scale) V over keys 0..keys-1, as an
// online softmax over blocks of 32 keys in absolute order. Blocks from tail_from on are read from `tail`.
struct Attention {
    const float* q;  // [group][head_dim]
    float* out;      // [group][head_dim]
    int64_t group;
    int64_t head_dim;
    float scale;
    int64_t keys;
    const char* pool;            // this layer and head in block 0
    const int32_t* block_table;  // of the sequence
    int64_t block_bytes;         // from a block to the next
    const char* tail;
    int64_t tail_from;
    bool bf16;
};

struct Kernels {
    const char* name;
    void (*product)(const Product&);
    // A row of k inputs for products with int8 weights, filled up with zeros to a multiple of 4. Returns its scale,
    // NaN where the row holds an infinity or NaN.
    float (*quantize)(const float* x, int64_t k, int16_t* values);
    void (*attention)(const Attention&);
    // out = x / sqrt(mean(x^2) + eps) * weight over n (a multiple of 16) values; out may be x.
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
    // Rotates element d with d + half in place.
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
    // y holds groups of 16 gate values and 16 up values in turn: out[i] = silu(gate[i]) * up[i], i < n.
    void (*silu_mul)(const float* y, int64_t n, float* out);
    // g(key, position, v) for v = ids[i], or v = i where ids is null (see core.cpp).
    void (*gumbel)(uint64_t key, int64_t position, uint32_t stream, const int64_t* ids, int64_t n, float* out);
    int64_t (*argmax)(const float* row, int64_t n);
    // The k best of a row, best first, equal values by lower index. Returns how many there were (n < k).
    int64_t (*topk)(const float* row, int64_t n, int64_t k, int64_t* index, float* value);
    // Reads `bytes` once, but for the last few; the sum only keeps the compiler from skipping it.
    float (*read_stream)(const float* data, int64_t bytes);
};

const Kernels& plain_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();
#endif

}  // namespace s2d
