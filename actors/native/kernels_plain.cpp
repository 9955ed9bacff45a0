// The kernels in 128-bit generic vectors: any architecture (SSE2, NEON, or scalars where there is neither).
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace s2d {
namespace {

typedef float R __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
constexpr int WIDTH = 4;

#if defined(__aarch64__)
constexpr int max_rows(Format) { return 4; }
constexpr int max_groups(Format, int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
inline R fma(R a, R b, R c) { return vfmaq_f32(c, a, b); }
inline float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
constexpr int max_rows(Format) { return 2; }
constexpr int max_groups(Format, int) { return 1; }
inline R fma(R a, R b, R c) { return a * b + c; }
inline float madd(float a, float b, float c) { return a * b + c; }
#endif

inline R zero() { return R{}; }
inline R spread(float x) { return R{x, x, x, x}; }
inline R load(const float* p) {
    R v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, R v) { memcpy(p, &v, sizeof v); }
inline Bits words(const char* p) {
    Bits bits;
    memcpy(&bits, p, sizeof bits);
    return bits;
}
inline R even(const char* p) { return reinterpret_cast<R>(words(p) << 16); }
inline R odd(const char* p) { return reinterpret_cast<R>(words(p) & 0xffff0000u); }
template <typename T>
inline void keep(T&) {}
inline R accumulate(R sum, R x, R w) { return fma(x, w, sum); }
inline R add(R a, R b) { return a + b; }
inline R mul(R a, R b) { return a * b; }
inline float sum16(const R* r) {
    const R q = (r[0] + r[1]) + (r[2] + r[3]);
    return (q[0] + q[2]) + (q[1] + q[3]);
}
inline bool any_greater(R v, float x) { return v[0] > x || v[1] > x || v[2] > x || v[3] > x; }

typedef int32_t I __attribute__((vector_size(16)));
struct Pairs {
    I first, second;
};
typedef Pairs Pair;

inline I integers() { return I{}; }
inline Pairs low_pairs(const char* p) {  // a byte each of 32-bit words, its sign spread
    const I w = reinterpret_cast<I>(words(p));
    return Pairs{w << 24 >> 24, w << 8 >> 24};
}
inline Pairs high_pairs(const char* p) {
    const I w = reinterpret_cast<I>(words(p));
    return Pairs{w << 16 >> 24, w >> 24};
}
inline Pair pair(const int16_t* x) { return Pair{I{x[0], x[0], x[0], x[0]}, I{x[1], x[1], x[1], x[1]}}; }
inline I dot(I acc, const Pair& x, const Pairs& w) { return acc + x.first * w.first + x.second * w.second; }
inline R to_float(I sum) { return __builtin_convertvector(sum, R); }

#include "kernels_impl.h"

}  // namespace

const Kernels& plain_kernels() {
    static const Kernels table = make_table("plain");
    return table;
}

}  // namespace s2d
