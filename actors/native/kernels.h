// What the instruction-set variants of the kernels have in common: arguments and the table of entry points.
//
// Blocked weights. Outputs come in groups of 16. Inside a group the 16 values that belong to one input (float32)
// or to a pair of inputs (bfloat16) are adjacent, 64 bytes, so that a weight is one sequential stream:
//   float32   [group][k][16]
//   bfloat16  [group][k / 2][16][2]      the even input in the low half of each 32-bit word
//   int8      [group][k / 64]: [16][16][4], a quadruple of inputs an output, stored plus 128; then 16 scales in float32
//   packed    [group]: bfloat16 in 12 bits a value, see packed.h
// A 32-bit word of bfloat16 expands to its even value by a shift and to its odd value by a mask.
//
// int8 values are symmetric, -127..127: weights with one scale for 64 inputs of an output (UNIT), rows of inputs, which
// are quantised on the way, with one for 32 (PART). The products of a part add up to an exact integer, so that their
// order does not matter; parts and units are added in float32, first to last, each product and each sum rounded by
// itself: every instruction set gives the same bits. Weights plus 128 are unsigned bytes, as the byte products of VNNI
// want them; sums begin at -128 times the sum of the part's inputs instead of zero.
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

constexpr int64_t UNIT = 64;        // inputs that share a scale of int8 weights
constexpr int64_t PART = 32;        // inputs of a row that share a scale, half a unit
constexpr float TINY = 1e-30f;      // inputs or weights of one scale, none greater than this, quantise to zeros

enum class Format : int32_t { float32, bf16, int8, packed };

// Packed weights (see packed.h): a group is chunks of 8 inputs, then its table and its exceptions.
constexpr int64_t CHUNK_BYTES = 192;
constexpr int64_t chunks(int64_t k) { return (k + 7) / 8; }
constexpr int64_t most_exceptions(int64_t k) { return (k + 1023) / 1024 * 16; }
struct Trailer {
    uint8_t table[16];
    uint32_t count;
    uint32_t unused[3];
    // then uint32_t places[most_exceptions(k)], input * 16 + output, and uint16_t values[most_exceptions(k)]
};
static_assert(sizeof(Trailer) == 32);
constexpr int64_t trailer_bytes(int64_t k) {
    return (static_cast<int64_t>(sizeof(Trailer)) + most_exceptions(k) * 6 + 63) / 64 * 64;
}

constexpr int64_t UNIT_BYTES = (UNIT / 4 + 1) * 64;  // of one output group
constexpr int64_t units(int64_t k) { return (k + UNIT - 1) / UNIT; }

// Bytes of one output group over k inputs.
constexpr int64_t group_bytes(int64_t k, Format format) {
    switch (format) {
        case Format::bf16: return (k + 1) / 2 * 64;
        case Format::int8: return units(k) * UNIT_BYTES;
        case Format::packed: return chunks(k) * CHUNK_BYTES + trailer_bytes(k);
        default: return k * 64;
    }
}

// Inputs that a product takes in another form than float32, a row after the other.
//   int8      the scales of the row's parts, what their sums begin at (int32), then, on a cache line, the values, as
//             bytes or 16 bits wide and in an order that suits the instruction set; whole units, zeros at the end
//   packed    bfloat16, whole chunks, zeros at the end
constexpr int64_t values_at(int64_t k) { return (units(k) * (UNIT / PART) * 8 + 63) / 64 * 64; }
constexpr int64_t converted_bytes(int64_t k, Format format) {
    switch (format) {
        case Format::int8: return values_at(k) + units(k) * UNIT * 2;
        case Format::packed: return (chunks(k) * 16 + 63) / 64 * 64;
        default: return 0;
    }
}
struct Converted {
    const char* rows;
    int64_t bytes;  // from a row to the next
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
    Converted converted = {};  // read instead of x for the formats that have it, and for bf16 where it has bytes
    bool again = false;        // this thread's last product was over the same inputs
};

constexpr int64_t TOGETHER = 16;         // query rows of several tokens that share a reading of the keys
constexpr int64_t WIDEST_TOGETHER = 256;  // head_dim up to which they do

// Attention of the query heads of one KV head: softmax(q K^T * scale) V, as an online softmax over blocks of 32 keys in
// absolute order, of one token or of several that follow each other in a sequence (rows * group <= TOGETHER): token r
// sees keys 0..keys + r - 1. Each row's sums are what they would be alone. Blocks from tail_from on are read from
// `tail`. `rounds`: where keys are bfloat16 and there is a dot product of it, queries and the probabilities of whole
// blocks are rounded to it too.
struct Attention {
    const float* q;  // [rows][group][head_dim], tokens ldq apart
    int64_t ldq;
    float* out;  // [rows][group][head_dim], tokens ldout apart
    int64_t ldout;
    int64_t rows;
    int64_t group;
    int64_t head_dim;
    float scale;
    int64_t keys;                // that the first token sees
    const char* pool;            // this layer and head in block 0
    const int32_t* block_table;  // of the sequence
    int64_t block_bytes;         // from a block to the next
    const char* tail;
    int64_t tail_from;
    bool bf16, rounds;
};

struct Kernels {
    const char* name;
    bool packs;  // whether it has products over packed weights
    void (*product)(const Product&);
    // A row of k inputs as `format` wants them (see Converted). In int8, parts that hold an infinity or NaN get the
    // scale NaN.
    void (*convert)(const float* x, int64_t k, Format format, char* row);
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
    // values[i], some of the row's n values and the first of them the greatest, become their probabilities in it.
    void (*probabilities)(const float* row, int64_t n, float* values, int64_t count);
    // Reads `bytes` once, but for the last few; the sum only keeps the compiler from skipping it.
    float (*read_stream)(const float* data, int64_t bytes);
};

const Kernels& plain_kernels();
#if defined(__x86_64__)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_kernels();
#endif

}  // namespace s2d
