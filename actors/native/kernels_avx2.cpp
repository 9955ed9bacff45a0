// The kernels for AVX2 and FMA.
#define S2D_NAME "avx2"
#define S2D_TABLE avx2_kernels
#define S2D_TARGET "avx2,fma"
#define S2D_REGISTERS "avx2_impl.h"
#include "kernels_variant.h"
