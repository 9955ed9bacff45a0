// The kernels, written once and included by each instruction-set variant, which defines before it:
//   V (16 floats), Broadcast (one float for all lanes), max_rows(format) (rows of a register tile),
//   max_groups(format, rows), zero, load, store, spread, broadcast, even, odd, fma, madd, add, mul, sum, any_greater;
//   for int8: I (16 integers in I::PARTS registers), Input (a quantised input), Quads (the weights of a register's
//   outputs and four inputs), integers, quads, dot, to_float, and either arrange (inputs of a part, into the order that
//   dot wants) or, with S2D_ROUNDS, greatest_bits and round_part of int8_impl.h.
// No include guard on purpose; everything lives in the includer's unnamed namespace. Only plain functions and C
// headers are used, so that no inline function compiled for one instruction set can be linked into another.

#define S2D_UNROLL _Pragma("GCC unroll 8")

#include "int8_impl.h"
#if defined(S2D_TILES)
#include "tiles_impl.h"
#endif
#if defined(S2D_PACKED)
#include "packed_impl.h"
constexpr bool PACKS = true;
#else
constexpr bool PACKS = false;
#endif
#include "products_impl.h"
#include "layer_impl.h"
#include "sampling_impl.h"

void convert(const float* x, int64_t k, Format format, char* row) {
    if (format == Format::int8) quantize(x, k, row);
#if defined(S2D_PACKED)
    if (format == Format::packed) to_bf16_row(x, k, row);
#endif
}

Kernels make_table(const char* name) {
    return Kernels{name,     PACKS,  product, convert, attention,  rms_norm, rotate,
                   silu_mul, gumbel, argmax,  topk,    probabilities, read_stream};
}
