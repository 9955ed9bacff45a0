// The sums of a few rows times a few groups of outputs (see kernels.h). Included by kernels_impl.h.

// A tile of a product; its results without scales and epilogue go to `sums`. It also prefetches weights that are
// needed afterwards: from `next` on, `step` bytes of each group for 64 that it reads.
struct Tile {
    const Product& p;
    int64_t row, group;
    const char* next;
    int64_t step;
    float* sums;
    int64_t ld;  // from a row of sums to the next
};

// Rows times registers of weights, in the order that needs fewer registers besides the sums.
template <int ROWS, int REGS, typename Sum, typename Weights, typename Inputs, typename Step>
__attribute__((always_inline)) inline void outer(Sum (&sums)[ROWS][REGS], Weights&& weights, Inputs&& inputs,
                                                 Step&& step) {
    if constexpr (ROWS < REGS) {
        decltype(inputs(0)) x[ROWS];
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) x[r] = inputs(r);
        S2D_UNROLL
        for (int j = 0; j < REGS; ++j) {
            const auto w = weights(j);
            S2D_UNROLL
            for (int r = 0; r < ROWS; ++r) sums[r][j] = step(sums[r][j], x[r], w);
        }
    } else {
        decltype(weights(0)) w[REGS];
        S2D_UNROLL
        for (int j = 0; j < REGS; ++j) w[j] = weights(j);
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const auto x = inputs(r);
            S2D_UNROLL
            for (int j = 0; j < REGS; ++j) sums[r][j] = step(sums[r][j], x, w[j]);
            S2D_UNROLL
            for (int j = 0; j < REGS; ++j) keep(sums[r][j]);
        }
    }
}

// Where the weights of register j of a tile's outputs are.
inline const char* part_of(const char* w, int64_t bytes, int j) {
    return w + j / PARTS * bytes + j % PARTS * WIDTH * 4;
}

template <int GROUPS>
__attribute__((always_inline)) inline void prefetch(const char* next, int64_t bytes) {
    S2D_UNROLL
    for (int g = 0; g < GROUPS; ++g) __builtin_prefetch(next + g * bytes, 0, 2);
}

template <Format F, int ROWS, int GROUPS>
inline void sum_floats(const Tile& t) {
    constexpr bool BF16 = F == Format::bf16;
    constexpr int REGS = GROUPS * PARTS;
    R sums[ROWS][REGS];
    S2D_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        S2D_UNROLL
        for (int j = 0; j < REGS; ++j) sums[r][j] = zero();
    }
    const int64_t ldx = t.p.ldx, bytes = t.p.group_bytes, step = t.step;
    const int64_t whole = BF16 ? t.p.k / 2 : t.p.k;
    const float* x = t.p.x + t.row * ldx;
    const char *w = static_cast<const char*>(t.p.w) + t.group * bytes, *next = t.next;
    const auto even_weights = [&](int j) { return even(part_of(w, bytes, j)); };
    const auto inputs = [&](int r) { return spread(x[r * ldx]); };
    for (int64_t i = 0; i < whole; ++i, w += 64, next += step) {
        prefetch<GROUPS>(next, bytes);
        if constexpr (BF16) {
            outer(sums, even_weights, inputs, accumulate);
            ++x;
            outer(sums, [&](int j) { return odd(part_of(w, bytes, j)); }, inputs, accumulate);
            ++x;
        } else {
            outer(sums, [&](int j) { return load(reinterpret_cast<const float*>(part_of(w, bytes, j))); }, inputs,
                  accumulate);
            ++x;
        }
    }
    if (BF16 && t.p.k % 2) {  // the last input of an odd count is alone in its word
        outer(sums, even_weights, inputs, accumulate);
    }
    S2D_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        S2D_UNROLL
        for (int j = 0; j < REGS; ++j) store(t.sums + r * t.ld + j * WIDTH, sums[r][j]);
    }
}

template <int ROWS, int GROUPS>
inline void sum_integers(const Tile& t) {
    constexpr int REGS = GROUPS * PARTS;
    const int64_t ldx = t.p.q.ld, bytes = t.p.group_bytes, step = t.step;
    const int16_t* x = t.p.q.values + t.row * ldx;
    const char *w = static_cast<const char*>(t.p.w) + t.group * bytes, *next = t.next;
    const auto inputs = [&](int r) { return pair(x + r * ldx); };
    for (int r = 0; r < ROWS; ++r) {
        for (int j = 0; j < REGS; ++j) store(t.sums + r * t.ld + j * WIDTH, zero());
    }
    for (int64_t left = (t.p.k + 3) / 4; left > 0; left -= SPAN / 4) {
        const int64_t count = left < SPAN / 4 ? left : SPAN / 4;
        I sums[ROWS][REGS];
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            S2D_UNROLL
            for (int j = 0; j < REGS; ++j) sums[r][j] = integers();
        }
        for (int64_t i = 0; i < count; ++i, w += 64, next += step) {
            prefetch<GROUPS>(next, bytes);
            outer(sums, [&](int j) { return low_pairs(part_of(w, bytes, j)); }, inputs, dot);
            x += 2;
            outer(sums, [&](int j) { return high_pairs(part_of(w, bytes, j)); }, inputs, dot);
            x += 2;
        }
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            S2D_UNROLL
            for (int j = 0; j < REGS; ++j) {
                float* total = t.sums + r * t.ld + j * WIDTH;
                store(total, add(load(total), to_float(sums[r][j])));
            }
        }
    }
}

template <Format F, int ROWS, int GROUPS>
__attribute__((noinline)) void tile(const Tile& t) {
    if constexpr (F == Format::int8) sum_integers<ROWS, GROUPS>(t);
    else sum_floats<F, ROWS, GROUPS>(t);
}

// The tile made for so many rows and groups.
template <Format F, int ROWS>
inline void tile_of(const Tile& t, int64_t rows, int64_t groups) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return tile_of<F, ROWS - 1>(t, rows, groups);
    }
    if constexpr (max_groups(F, ROWS) >= 4) {
        if (groups == 4) return tile<F, ROWS, 4>(t);
    }
    if constexpr (max_groups(F, ROWS) >= 2) {
        if (groups == 2) return tile<F, ROWS, 2>(t);
    }
    tile<F, ROWS, 1>(t);
}
