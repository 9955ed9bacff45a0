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

typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t QuadBits __attribute__((vector_size(16)));
typedef float Broadcast;

struct V {
    Quad q[4];
};

#if defined(__aarch64__)
constexpr int max_rows(Format) { return 4; }
constexpr int max_groups(Format, int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
inline Quad madd(Quad a, Quad b, Quad c) { return vfmaq_f32(c, a, b); }
inline float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
constexpr int max_rows(Format) { return 2; }
constexpr int max_groups(Format, int) { return 1; }
inline Quad madd(Quad a, Quad b, Quad c) { return a * b + c; }
inline float madd(float a, float b, float c) { return a * b + c; }
#endif

inline V zero() { return V{}; }
inline Broadcast broadcast(const float* x) { return *x; }
inline V spread(float x) {
    Quad q = {x, x, x, x};
    return V{{q, q, q, q}};
}
inline V load(const float* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }
inline V even(const char* p) {
    V v;
    for (int i = 0; i < 4; ++i) {
        QuadBits bits;
        memcpy(&bits, p + 16 * i, sizeof bits);
        v.q[i] = reinterpret_cast<Quad>(bits << 16);
    }
    return v;
}
inline V odd(const char* p) {
    V v;
    for (int i = 0; i < 4; ++i) {
        QuadBits bits;
        memcpy(&bits, p + 16 * i, sizeof bits);
        v.q[i] = reinterpret_cast<Quad>(bits & 0xffff0000u);
    }
    return v;
}
inline V fma(Broadcast x, V w, V acc) {
    Quad q = {x, x, x, x};
    for (int i = 0; i < 4; ++i) acc.q[i] = madd(q, w.q[i], acc.q[i]);
    return acc;
}
inline V fma(V a, V b, V c) {
    for (int i = 0; i < 4; ++i) c.q[i] = madd(a.q[i], b.q[i], c.q[i]);
    return c;
}
inline V add(V a, V b) {
    for (int i = 0; i < 4; ++i) a.q[i] += b.q[i];
    return a;
}
inline V mul(V a, V b) {
    for (int i = 0; i < 4; ++i) a.q[i] *= b.q[i];
    return a;
}
inline float sum(V v) {
    Quad q = (v.q[0] + v.q[1]) + (v.q[2] + v.q[3]);
    return (q[0] + q[2]) + (q[1] + q[3]);
}
// The greater of each two values, and the greatest of all; the second where one is NaN.
inline V greater(V a, V b) {
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) a.q[i][j] = a.q[i][j] > b.q[i][j] ? a.q[i][j] : b.q[i][j];
    }
    return a;
}
inline float greatest(V v) {
    float values[16];
    store(values, v);
    for (int n = 8; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) values[i] = values[i] > values[i + n] ? values[i] : values[i + n];
    }
    return values[0];
}
// Whether any of 16 values is greater than x.
inline bool any_greater(V v, float x) {
    float values[16];
    store(values, v);
    bool any = false;
    for (int i = 0; i < 16; ++i) any |= values[i] > x;
    return any;
}

struct I {
    static constexpr int PARTS = 1;
    int32_t lane[16];
};
typedef int16_t Input;
struct Quads {
    int16_t value[64];
};

inline I integers(int32_t x) {
    I sum;
    for (int i = 0; i < 16; ++i) sum.lane[i] = x;
    return sum;
}
inline void arrange(const Input* from, Input* to) { memcpy(to, from, PART * sizeof *to); }
inline Quads quads(const char* p, int) {
    Quads w;
    for (int i = 0; i < 64; ++i) w.value[i] = static_cast<unsigned char>(p[i]);
    return w;
}
inline void dot(I& acc, int, const Input* x, const Quads& w) {
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 4; ++j) acc.lane[i] += x[j] * w.value[4 * i + j];
    }
}
inline V to_float(const I& sum) {
    float values[16];
    for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(sum.lane[i]);
    return load(values);
}

#include "kernels_impl.h"

}  // namespace

const Kernels& plain_kernels() {
    static const Kernels table = make_table("plain");
    return table;
}

}  // namespace s2d
