// One instruction-set variant of the kernels: the whole of its source file, which defines before it
//   S2D_NAME       what the variant is called
//   S2D_TABLE      the function of kernels.h that gives its table
//   S2D_TARGET     the compiler's name for the instruction sets
//   S2D_REGISTERS  the header with its registers (see kernels_impl.h)
// and S2D_PACKED or S2D_TILES for products of its own.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#define S2D_PRAGMA(text) _Pragma(#text)
#define S2D_PRAGMA_OF(...) S2D_PRAGMA(__VA_ARGS__)
#if defined(__clang__)
S2D_PRAGMA_OF(clang attribute push(__attribute__((target(S2D_TARGET))), apply_to = function))
#else
#pragma GCC push_options
S2D_PRAGMA_OF(GCC target(S2D_TARGET))
// GCC's own headers leave the unused operand of unmasked AVX-512 forms undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace s2d {
namespace {

#include S2D_REGISTERS
#include "kernels_impl.h"

}  // namespace

const Kernels& S2D_TABLE() {
    static const Kernels table = make_table(S2D_NAME);
    return table;
}

}  // namespace s2d

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
