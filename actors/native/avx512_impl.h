// Registers of AVX-512, 16 floats each, for kernels_impl.h. Included by the variants that have them; no include guard
// on purpose.

typedef __m512 Broadcast;

struct V {
    __m512 v;
};

constexpr int max_rows(Format f) { return f == Format::int8 || f == Format::packed ? 8 : 6; }
constexpr int max_groups(Format f, int rows) {
    switch (f) {
        case Format::int8: return rows <= 2 ? 4 : rows <= 4 ? 2 : 1;
        case Format::packed: return rows <= 4 ? 4 : 2;
        default: return 4;
    }
}

inline float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline V zero() { return V{_mm512_setzero_ps()}; }
inline Broadcast broadcast(const float* x) { return _mm512_set1_ps(*x); }
inline V spread(float x) { return V{_mm512_set1_ps(x)}; }
inline V load(const float* p) { return V{_mm512_loadu_ps(p)}; }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v.v); }
inline V even(const char* p) { return V{_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
inline V odd(const char* p) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return V{_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), mask))};
}
inline V fma(Broadcast x, V w, V acc) { return V{_mm512_fmadd_ps(x, w.v, acc.v)}; }
inline V fma(V a, V b, V c) { return V{_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline V add(V a, V b) { return V{_mm512_add_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return V{_mm512_mul_ps(a.v, b.v)}; }
inline float sum(V v) {
    __m256 s = _mm256_add_ps(_mm512_castps512_ps256(v.v), _mm512_extractf32x8_ps(v.v, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float greatest(V v) {
    __m256 s = _mm256_max_ps(_mm512_castps512_ps256(v.v), _mm512_extractf32x8_ps(v.v, 1));
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
inline V greater(V a, V b) { return V{_mm512_max_ps(a.v, b.v)}; }
inline bool any_greater(V v, float x) {
    return _mm512_cmp_ps_mask(v.v, _mm512_set1_ps(x), _CMP_GT_OQ) != 0;
}

// 16 integers, and weights as 16 outputs times 4 inputs.
struct I {
    static constexpr int PARTS = 1;
    __m512i v;
};
typedef int8_t Input;
typedef __m512i Quads;

inline I integers(int32_t x) { return I{_mm512_set1_epi32(x)}; }
inline Quads quads(const char* p, int) { return _mm512_loadu_si512(p); }
inline void dot(I& acc, int, const Input* x, Quads w) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    acc.v = _mm512_dpbusd_epi32(acc.v, w, _mm512_set1_epi32(four));
}
inline V to_float(I sum) { return V{_mm512_cvtepi32_ps(sum.v)}; }

// Inputs of int8 (see int8_impl.h).
#define S2D_ROUNDS
inline int32_t greatest_bits(const float* x) {
    const __m512i mask = _mm512_set1_epi32(0x7fffffff);
    return _mm512_reduce_max_epi32(_mm512_max_epi32(_mm512_and_si512(_mm512_loadu_si512(x), mask),
                                                    _mm512_and_si512(_mm512_loadu_si512(x + LANES), mask)));
}
inline int32_t round_part(const float* x, float factor, Input* values) {
    const __m512 by = _mm512_set1_ps(factor);
    const __m512i a = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), by));
    const __m512i b = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + LANES), by));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values), _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values + LANES), _mm512_cvtepi32_epi8(b));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
}
