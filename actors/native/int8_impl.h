// Inputs quantised to int8 and their products with int8 weights (see kernels.h). Included by kernels_impl.h.

// The integers nearest to x * factor, ties to even, BIAS added; |x * factor| is at most about 127.
inline void round_span(const float* x, int64_t count, float factor, uint8_t* values) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    for (int64_t i = 0; i < count; ++i) {
        const float shifted = x[i] * factor + magic;
        uint32_t bits;
        memcpy(&bits, &shifted, sizeof bits);
        values[i] = static_cast<uint8_t>(bits + BIAS);
    }
}

// The greatest magnitude as bits: ordered like the values, infinity and NaN on top.
inline uint32_t magnitude_bits(const float* x, int64_t count) {
    int32_t top = 0;
    for (int64_t i = 0; i < count; ++i) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    return static_cast<uint32_t>(top);
}

void quantize(const float* x, int64_t k, uint8_t* values, float* scales) {
    for (int64_t at = 0; at < k; at += SPAN) {
        const int64_t count = k - at < SPAN ? k - at : SPAN;
        const uint32_t bits = count == SPAN ? magnitude_bits(x + at, SPAN) : magnitude_bits(x + at, count);
        float top;
        memcpy(&top, &bits, sizeof top);
        const float scale = top / 127.0f;
        if (bits >= 0x7f800000u || top < TINY) {
            memset(values + at, BIAS, static_cast<size_t>(count));
            *scales++ = bits >= 0x7f800000u ? NAN : 0.0f;
            continue;
        }
        if (count == SPAN) round_span(x + at, SPAN, 127.0f / top, values + at);
        else round_span(x + at, count, 127.0f / top, values + at);
        *scales++ = scale;
    }
    for (int64_t i = k; i % 4; ++i) values[i] = BIAS;
}

// Adds what the epilogue says to 16 sums (fewer in the last group) and stores them.
inline void finish(const Product& p, int64_t row, int64_t group, const float* sums) {
    const int64_t first = group * LANES, count = p.n - first;
    float* y = p.y + row * p.ldy + first;
    if (count >= LANES) {
        V v = load(sums);
        if (p.bias) v = add(v, load(p.bias + first));
        if (p.epilogue == Epilogue::add) v = add(load(y), v);
        if (p.epilogue == Epilogue::scale_add) v = fma(load(y), spread(p.row_scale[row]), v);
        store(y, v);
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        float x = sums[i];
        if (p.bias) x += p.bias[first + i];
        if (p.epilogue == Epilogue::add) x = y[i] + x;
        if (p.epilogue == Epilogue::scale_add) x = madd(y[i], p.row_scale[row], x);
        y[i] = x;
    }
}

// ROWS rows times GROUPS output groups. `next` and `step` as for the other formats.
template <int ROWS, int GROUPS>
inline void tile_int8(const Product& p, int64_t row, int64_t group, const char* next, int64_t step) {
    alignas(64) V total[ROWS][GROUPS];
    for (int r = 0; r < ROWS; ++r) {
        for (int g = 0; g < GROUPS; ++g) total[r][g] = zero();
    }
    const int64_t ldx = p.q.ld, bytes = p.group_bytes;
    const uint8_t* x = p.q.values + row * ldx;
    const float* scales = p.q.scales + row * p.q.spans;
    const char* w = static_cast<const char*>(p.w) + group * bytes;
    int64_t left = (p.k + 3) / 4;
    for (; left > 0; left -= SPAN / 4, ++scales) {
        const int64_t count = left < SPAN / 4 ? left : SPAN / 4;
        I acc[ROWS][GROUPS], bias[GROUPS];
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
            bias[g] = integers();
            S2D_UNROLL
            for (int r = 0; r < ROWS; ++r) acc[r][g] = integers();
        }
        for (int64_t i = 0; i < count; ++i, w += 64, x += 4, next += step) {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) __builtin_prefetch(next + g * bytes, 0, 2);
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) {
                const Quads quad = quads(w + g * bytes);
                bias[g] = bias_sum(quad, bias[g]);
                S2D_UNROLL
                for (int r = 0; r < ROWS; ++r) acc[r][g] = dot(x + r * ldx, quad, acc[r][g]);
            }
        }
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) {
                total[r][g] = add(total[r][g], mul(unbiased(acc[r][g], bias[g]), spread(scales[r * p.q.spans])));
            }
        }
    }
    alignas(64) float sums[LANES];
    for (int g = 0; g < GROUPS; ++g) {
        const V scale = load(reinterpret_cast<const float*>(w + g * bytes));
        for (int r = 0; r < ROWS; ++r) {
            store(sums, mul(total[r][g], scale));
            finish(p, row + r, group + g, sums);
        }
    }
}
