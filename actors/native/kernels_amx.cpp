// The kernels for AMX: bfloat16 on tiles (tiles_impl.h), everything else as for AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if !defined(__clang__)  // as in kernels_avx512.cpp
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16,avx2,fma")
#endif

namespace s2d {
namespace {

#define S2D_TILES
#include "avx512_impl.h"
#include "kernels_impl.h"

}  // namespace

const Kernels& amx_kernels() {
    static const Kernels table = make_table("amx");
    return table;
}

}  // namespace s2d

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
