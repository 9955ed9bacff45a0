// The kernels, written once and included by each instruction-set variant, which defines before it:
//   R (a register of WIDTH floats), max_rows(format) and max_groups(format, rows) (the size of a register tile),
//   zero, load, store, spread, even, odd, fma, madd, add, mul, any_greater, sum16 (of a group's registers);
//   for int8: I (WIDTH integers), Pairs (the weights of WIDTH outputs and two inputs), Pair (two inputs for all lanes),
//   integers, low_pairs, high_pairs, pair, dot, to_float.
// No include guard on purpose; everything lives in the includer's unnamed namespace. Only plain functions and C
// headers are used, so that no inline function compiled for one instruction set can be linked into another.

#define S2D_UNROLL _Pragma("GCC unroll 8")

#include "lanes_impl.h"
#include "quantize_impl.h"
#include "tile_impl.h"
#include "products_impl.h"
#include "layer_impl.h"
#include "sampling_impl.h"

Kernels make_table(const char* name) {
    return Kernels{name, product, quantize, attention, rms_norm, rotate, silu_mul, gumbel, argmax, topk, read_stream};
}
