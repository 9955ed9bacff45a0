// A group's 16 values as one: V. Included by kernels_impl.h.

constexpr int PARTS = LANES / WIDTH;  // registers of a group

struct V {
    R part[PARTS];
};

template <typename Body>
__attribute__((always_inline)) inline V each_part(Body&& body) {
    V v;
    S2D_UNROLL
    for (int i = 0; i < PARTS; ++i) v.part[i] = body(i);
    return v;
}
inline V zero_all() {
    return each_part([&](int) { return zero(); });
}
inline V spread_all(float x) {
    return each_part([&](int) { return spread(x); });
}
inline V load_all(const float* p) {
    return each_part([&](int i) { return load(p + i * WIDTH); });
}
inline V add(const V& a, const V& b) {
    return each_part([&](int i) { return add(a.part[i], b.part[i]); });
}
inline V mul(const V& a, const V& b) {
    return each_part([&](int i) { return mul(a.part[i], b.part[i]); });
}
inline V fma(const V& a, const V& b, const V& c) {
    return each_part([&](int i) { return fma(a.part[i], b.part[i], c.part[i]); });
}
inline void store(float* p, const V& v) {
    for (int i = 0; i < PARTS; ++i) store(p + i * WIDTH, v.part[i]);
}
inline float sum(const V& v) { return sum16(v.part); }
inline bool any_greater(const V& v, float x) {
    bool any = false;
    for (int i = 0; i < PARTS; ++i) any |= any_greater(v.part[i], x);
    return any;
}
