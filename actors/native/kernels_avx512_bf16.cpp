// The kernels for AVX-512 with its bfloat16 dot product: packed weights (packed_impl.h), everything else as for AVX-512.
#define S2D_NAME "avx512_bf16"
#define S2D_TABLE avx512_bf16_kernels
#define S2D_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma"
#define S2D_REGISTERS "avx512_impl.h"
#define S2D_PACKED
#include "kernels_variant.h"
