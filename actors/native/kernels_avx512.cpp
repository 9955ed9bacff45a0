// The kernels for AVX-512. The arithmetic of a product is that of AVX2.
#define S2D_NAME "avx512"
#define S2D_TABLE avx512_kernels
#define S2D_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"
#define S2D_REGISTERS "avx512_impl.h"
#include "kernels_variant.h"
