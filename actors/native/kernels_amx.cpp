// The kernels for AMX: bfloat16 on tiles (tiles_impl.h), everything else as for AVX-512.
#define S2D_NAME "amx"
#define S2D_TABLE amx_kernels
#define S2D_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-bf16,avx2,fma"
#define S2D_REGISTERS "avx512_impl.h"
#define S2D_TILES
#include "kernels_variant.h"
