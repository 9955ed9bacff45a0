// Quantised inputs and their products with int8 weights (see kernels.h). Included by kernels_impl.h.

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

constexpr int WHOLE_ROWS = 4;  // rows whose sums of a whole group fit the registers where it has two parts

// Adds `count` quadruples of inputs to parts FIRST..LAST-1 of the sums.
template <int ROWS, int GROUPS, int FIRST, int LAST>
__attribute__((always_inline)) inline void add_span(I (&acc)[ROWS][GROUPS], const int16_t* x, int64_t ldx, const char* w,
                                                    int64_t bytes, int64_t count, const char* next, int64_t step) {
    for (int64_t i = 0; i < count; ++i, w += 64, x += 4, next += step) {
        if constexpr (FIRST == 0) {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) __builtin_prefetch(next + g * bytes, 0, 2);
        }
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
            S2D_UNROLL
            for (int part = FIRST; part < LAST; ++part) {
                const Pairs first = low_pairs(w + g * bytes, part), second = high_pairs(w + g * bytes, part);
                const int16_t* inputs = x;
                // Read again for each part: kept in registers, GCC spills the sums instead.
                if constexpr (ROWS > 2) asm("" : "+r"(inputs));
                S2D_UNROLL
                for (int r = 0; r < ROWS; ++r) {
                    dot(acc[r][g], part, inputs + r * ldx, first);
                    dot(acc[r][g], part, inputs + r * ldx + 2, second);
                }
            }
        }
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
    const int16_t* x = p.q.values + row * ldx;
    const char* w = static_cast<const char*>(p.w) + group * bytes;
    for (int64_t left = (p.k + 3) / 4; left > 0; left -= SPAN / 4) {
        const int64_t count = left < SPAN / 4 ? left : SPAN / 4;
        I acc[ROWS][GROUPS];
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) acc[r][g] = integers();
        }
        if constexpr (ROWS > WHOLE_ROWS && I::PARTS == 2) {
            add_span<ROWS, GROUPS, 0, 1>(acc, x, ldx, w, bytes, count, next, step);
            add_span<ROWS, GROUPS, 1, 2>(acc, x, ldx, w, bytes, count, nullptr, 0);
        } else {
            add_span<ROWS, GROUPS, 0, I::PARTS>(acc, x, ldx, w, bytes, count, next, step);
        }
        x += 4 * count;
        w += 64 * count;
        next += step * count;
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) total[r][g] = add(total[r][g], to_float(acc[r][g]));
        }
    }
    alignas(64) float sums[LANES];
    for (int g = 0; g < GROUPS; ++g) {
        const V scale = load(reinterpret_cast<const float*>(w + g * bytes));
        for (int r = 0; r < ROWS; ++r) {
            store(sums, mul(total[r][g], mul(scale, spread(p.q.scales[(row + r) * p.q.stride]))));
            finish(p, row + r, group + g, sums);
        }
    }
}
