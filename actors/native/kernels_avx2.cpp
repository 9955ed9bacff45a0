// The kernels for AVX2 and FMA: 16 outputs in two registers.
#if defined(__x86_64__)
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace s2d {
namespace {

typedef __m256 R;
constexpr int WIDTH = 8;

constexpr int max_rows(Format) { return 4; }
constexpr int max_groups(Format, int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

inline float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline R zero() { return _mm256_setzero_ps(); }
inline R spread(float x) { return _mm256_set1_ps(x); }
inline R load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, R v) { _mm256_storeu_ps(p, v); }
inline __m256i words(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline R even(const char* p) { return _mm256_castsi256_ps(_mm256_slli_epi32(words(p), 16)); }
alignas(32) const uint32_t HIGH_HALVES[8] = {0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u,
                                             0xffff0000u, 0xffff0000u, 0xffff0000u, 0xffff0000u};
inline R odd(const char* p) {
    __m256i w = words(p);
    asm("vpand %1, %0, %0" : "+x"(w) : "m"(HIGH_HALVES));  // not from a register: a tile fills them
    return _mm256_castsi256_ps(w);
}
inline R fma(R a, R b, R c) { return _mm256_fmadd_ps(a, b, c); }
// Both hold GCC to the written order where a tile's sums, weights and inputs fill the registers: else it spills.
template <typename T>
inline void keep(T& sum) {
    asm("" : "+x"(sum));
}
inline R accumulate(R sum, R x, R w) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(x), "xm"(w));
    return sum;
}
inline R add(R a, R b) { return _mm256_add_ps(a, b); }
inline R mul(R a, R b) { return _mm256_mul_ps(a, b); }
inline float sum16(const R* r) {
    const __m256 s = _mm256_add_ps(r[0], r[1]);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline bool any_greater(R v, float x) { return _mm256_movemask_ps(_mm256_cmp_ps(v, spread(x), _CMP_GT_OQ)) != 0; }

typedef __m256i I;
typedef __m256i Pairs;
typedef __m256i Pair;

inline I integers() { return _mm256_setzero_si256(); }
inline Pairs low_pairs(const char* p) { return _mm256_srai_epi16(_mm256_slli_epi16(words(p), 8), 8); }
inline Pairs high_pairs(const char* p) { return _mm256_srai_epi16(words(p), 8); }
inline Pair pair(const int16_t* x) {
    return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(x)));
}
inline I dot(I acc, Pair x, Pairs w) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x, w));
    keep(acc);
    return acc;
}
inline R to_float(I sum) { return _mm256_cvtepi32_ps(sum); }

#include "kernels_impl.h"

}  // namespace

const Kernels& avx2_kernels() {
    static const Kernels table = make_table("avx2");
    return table;
}

}  // namespace s2d

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
