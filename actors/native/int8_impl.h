// Quantised inputs and their products with int8 weights (see kernels.h). Included by kernels_impl.h.

#if !defined(S2D_ROUNDS)
// Bits of the greatest magnitude of a part: ordered like the values, infinity and NaN on top.
inline int32_t greatest_bits(const float* x) {
    int32_t greatest = 0;
    for (int64_t i = 0; i < PART; ++i) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        greatest = bits > greatest ? bits : greatest;
    }
    return greatest;
}

// A part's values times `factor`, rounded to nearest, ties to even; returns their sum.
inline int32_t round_part(const float* x, float factor, Input* values) {
    const float magic = 12582912.0f;  // as in exponential()
    int32_t sum = 0;
    Input rounded[PART];
    for (int64_t i = 0; i < PART; ++i) {
        const float shifted = x[i] * factor + magic;
        int32_t bits;
        memcpy(&bits, &shifted, sizeof bits);
        const int8_t value = static_cast<int8_t>(bits);
        rounded[i] = value;
        sum += value;
    }
    arrange(rounded, values);
    return sum;
}
#endif

// One part: returns its scale and the sum of its values through `sum`.
inline float quantize_part(const float* x, Input* values, int32_t& sum) {
    const int32_t top_bits = greatest_bits(x);
    float top;
    memcpy(&top, &top_bits, sizeof top);
    const bool finite = top_bits < 0x7f800000;
    sum = 0;
    if (!finite || top < TINY) {
        memset(values, 0, PART * sizeof *values);
        return finite ? 0.0f : NAN;
    }
    sum = round_part(x, 127.0f / top, values);
    return top / 127.0f;
}

void quantize(const float* x, int64_t k, char* row) {
    const int64_t parts = units(k) * (UNIT / PART);
    float* scales = reinterpret_cast<float*>(row);
    int32_t* starts = reinterpret_cast<int32_t*>(row) + parts;
    Input* values = reinterpret_cast<Input*>(row + values_at(k));
    for (int64_t part = 0; part < parts; ++part, x += PART, k -= PART, values += PART) {
        int32_t sum;
        if (k >= PART) {
            scales[part] = quantize_part(x, values, sum);
        } else {
            float rest[PART] = {};
            for (int64_t i = 0; i < k; ++i) rest[i] = x[i];
            scales[part] = quantize_part(rest, values, sum);
        }
        starts[part] = -128 * sum;
    }
}

// Adds what the epilogue says to the 16 sums of a whole group and stores them.
inline void finish_whole(const Product& p, int64_t row, int64_t first, V v) {
    float* y = p.y + row * p.ldy + first;
    if (p.bias) v = add(v, load(p.bias + first));
    if (p.epilogue == Epilogue::add) v = add(load(y), v);
    if (p.epilogue == Epilogue::scale_add) v = fma(load(y), spread(p.row_scale[row]), v);
    store(y, v);
}

// The same for sums in memory; fewer than 16 in the last group.
inline void finish(const Product& p, int64_t row, int64_t group, const float* sums) {
    const int64_t first = group * LANES, count = p.n - first;
    if (count >= LANES) return finish_whole(p, row, first, load(sums));
    float* y = p.y + row * p.ldy + first;
    for (int64_t i = 0; i < count; ++i) {
        float x = sums[i];
        if (p.bias) x += p.bias[first + i];
        if (p.epilogue == Epilogue::add) x = y[i] + x;
        if (p.epilogue == Epilogue::scale_add) x = madd(y[i], p.row_scale[row], x);
        y[i] = x;
    }
}

constexpr int WHOLE_ROWS = 4;  // rows whose sums of a whole group fit the registers where it has two registers

// Adds the inputs of one part to registers FIRST..LAST-1 of the sums.
template <int ROWS, int GROUPS, int FIRST, int LAST>
__attribute__((always_inline)) inline void add_part(I (&acc)[ROWS][GROUPS], const Input* x, int64_t ldx, const char* w,
                                                    int64_t bytes, const char* next, int64_t step) {
    for (int64_t i = 0; i < PART / 4; ++i, w += 64, x += 4, next += step) {
        if constexpr (FIRST == 0) {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) __builtin_prefetch(next + g * bytes, 0, 2);
        }
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
            Quads weights[LAST - FIRST];
            S2D_UNROLL
            for (int part = FIRST; part < LAST; ++part) weights[part - FIRST] = quads(w + g * bytes, part);
            // A row's inputs serve all registers before the next row's are read: kept for all, they spill the sums.
            S2D_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                S2D_UNROLL
                for (int part = FIRST; part < LAST; ++part) dot(acc[r][g], part, x + r * ldx, weights[part - FIRST]);
            }
        }
    }
}

// ROWS rows times GROUPS output groups. `next` and `step` as for the other formats.
template <int ROWS, int GROUPS>
inline void tile_int8(const Product& p, int64_t row, int64_t group, const char* next, int64_t step) {
    alignas(64) V total[ROWS][GROUPS], sums[ROWS][GROUPS];
    S2D_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) total[r][g] = sums[r][g] = zero();
    }
    const int64_t parts = units(p.k) * (UNIT / PART), bytes = p.group_bytes;
    const int64_t ld = p.converted.bytes / 4, ldx = p.converted.bytes / static_cast<int64_t>(sizeof(Input));
    const char* first = p.converted.rows + row * p.converted.bytes;
    const float* scales = reinterpret_cast<const float*>(first);
    const int32_t* starts = reinterpret_cast<const int32_t*>(first) + parts;
    const Input* x = reinterpret_cast<const Input*>(first + values_at(p.k));
    const char* w = static_cast<const char*>(p.w) + group * bytes;
    for (int64_t part = 0; part < parts; ++part, x += PART) {
        I acc[ROWS][GROUPS];
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) acc[r][g] = integers(starts[r * ld + part]);
        }
        if constexpr (ROWS > WHOLE_ROWS && I::PARTS == 2) {
            add_part<ROWS, GROUPS, 0, 1>(acc, x, ldx, w, bytes, next, step);
            add_part<ROWS, GROUPS, 1, 2>(acc, x, ldx, w, bytes, nullptr, 0);
        } else {
            add_part<ROWS, GROUPS, 0, I::PARTS>(acc, x, ldx, w, bytes, next, step);
        }
        w += PART / 4 * 64;
        next += PART / 4 * step;
        const bool second = part % 2;
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const V scale = spread(scales[r * ld + part]);
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) {
                const V sum = mul(to_float(acc[r][g]), scale);
                if (second) {
                    const V weights = load(reinterpret_cast<const float*>(w + g * bytes));
                    total[r][g] = add(total[r][g], mul(add(sums[r][g], sum), weights));
                } else {
                    sums[r][g] = sum;
                }
            }
        }
        if (second) {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) __builtin_prefetch(next + g * bytes, 0, 2);
            w += 64;
            next += step;
        }
    }
    alignas(64) float out[LANES];
    for (int g = 0; g < GROUPS; ++g) {
        for (int r = 0; r < ROWS; ++r) {
            store(out, total[r][g]);
            finish(p, row + r, group + g, out);
        }
    }
}
