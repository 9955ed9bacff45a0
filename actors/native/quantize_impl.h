// Quantised inputs (see kernels.h). Included by kernels_impl.h.

float quantize(const float* x, int64_t k, int16_t* values) {
    int32_t top_bits = 0;  // of a magnitude: ordered like the values, infinity and NaN on top
    for (int64_t i = 0; i < k; ++i) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        top_bits = bits > top_bits ? bits : top_bits;
    }
    for (int64_t i = k; i % 4; ++i) values[i] = 0;
    float top;
    memcpy(&top, &top_bits, sizeof top);
    const bool finite = top_bits < 0x7f800000;
    if (!finite || top < TINY) {
        memset(values, 0, static_cast<size_t>(k) * sizeof *values);
        return finite ? 0.0f : NAN;
    }
    const float factor = 32767.0f / top, magic = 12582912.0f;  // as in exponential(): rounds to nearest, ties to even
    for (int64_t i = 0; i < k; ++i) {
        const float shifted = x[i] * factor + magic;
        uint32_t bits;
        memcpy(&bits, &shifted, sizeof bits);
        values[i] = static_cast<int16_t>(bits);
    }
    return top / 32767.0f;
}
