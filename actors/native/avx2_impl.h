// Registers of AVX2, two of 8 floats for 16 values, for kernels_impl.h. Included by the variant that has them; no include
// guard on purpose.

typedef __m256 Broadcast;

struct V {
    __m256 a, b;
};

// Six rows of bfloat16 would fit by count, but GCC then spills sums.
constexpr int max_rows(Format f) { return f == Format::bf16 ? 5 : 6; }
constexpr int max_groups(Format, int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

inline float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline V zero() { return V{_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Broadcast broadcast(const float* x) { return _mm256_broadcast_ss(x); }
inline V spread(float x) { return V{_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V load(const float* p) { return V{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
inline __m256i words(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline V even(const char* p) {
    return V{_mm256_castsi256_ps(_mm256_slli_epi32(words(p), 16)),
             _mm256_castsi256_ps(_mm256_slli_epi32(words(p + 32), 16))};
}
inline V odd(const char* p) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return V{_mm256_castsi256_ps(_mm256_and_si256(words(p), mask)),
             _mm256_castsi256_ps(_mm256_and_si256(words(p + 32), mask))};
}
inline V fma(Broadcast x, V w, V acc) {
    return V{_mm256_fmadd_ps(x, w.a, acc.a), _mm256_fmadd_ps(x, w.b, acc.b)};
}
inline V fma(V a, V b, V c) { return V{_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
inline V add(V a, V b) { return V{_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
inline V mul(V a, V b) { return V{_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
inline float sum(V v) {
    __m256 s = _mm256_add_ps(v.a, v.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float greatest(V v) {
    __m256 s = _mm256_max_ps(v.a, v.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
inline V greater(V a, V b) { return V{_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
inline bool any_greater(V v, float x) {
    const __m256 limit = _mm256_set1_ps(x);
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(v.a, limit, _CMP_GT_OQ),
                                           _mm256_cmp_ps(v.b, limit, _CMP_GT_OQ))) != 0;
}

// 16 integers, and weights as 8 outputs times inputs 0 and 2, 1 and 3, in 16 bits.
struct I {
    static constexpr int PARTS = 2;
    __m256i part[PARTS];
};
typedef int16_t Input;
struct Quads {
    __m256i even, odd;
};

inline I integers(int32_t x) { return I{{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
inline void arrange(const Input* from, Input* to) {
    for (int i = 0; i < PART; i += 4) {
        to[i] = from[i];
        to[i + 1] = from[i + 2];
        to[i + 2] = from[i + 1];
        to[i + 3] = from[i + 3];
    }
}
inline Quads quads(const char* p, int part) {
    const __m256i w = words(p + 32 * part);
    return Quads{_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srli_epi16(w, 8)};
}
inline __m256i two(const Input* x) { return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(x))); }
inline void dot(I& acc, int part, const Input* x, Quads w) {
    const __m256i even = _mm256_madd_epi16(two(x), w.even), odd = _mm256_madd_epi16(two(x + 2), w.odd);
    acc.part[part] = _mm256_add_epi32(_mm256_add_epi32(acc.part[part], even), odd);
}
inline V to_float(I sum) { return V{_mm256_cvtepi32_ps(sum.part[0]), _mm256_cvtepi32_ps(sum.part[1])}; }
