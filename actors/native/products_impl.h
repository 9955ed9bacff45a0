// Matrix products over blocked weights (see kernels.h). Included by kernels_impl.h.

constexpr int64_t GROUPS_BYTES = 256 << 10;  // weights worked on together where there are many rows
constexpr int64_t FEW_TILES = 4;

// ROWS rows times GROUPS output groups, sums in registers. `next` runs through the weights needed afterwards by
// `step` bytes a line, so that all tiles over the same groups together prefetch each of their lines once.
template <Format F, int ROWS, int GROUPS>
__attribute__((noinline)) void tile(const Product& p, int64_t row, int64_t group, const char* next, int64_t step) {
    if constexpr (F == Format::int8) return tile_int8<ROWS, GROUPS>(p, row, group, next, step);
#if defined(S2D_PACKED)
    if constexpr (F == Format::packed) return tile_packed<ROWS, GROUPS>(p, row, group, next, step);
    if constexpr (F == Format::bf16) {
        if (p.converted.bytes > 0) return tile_rounded<ROWS, GROUPS>(p, row, group, next, step);
    }
#endif
    constexpr bool BF16 = F == Format::bf16;
    V acc[ROWS][GROUPS];
    S2D_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) acc[r][g] = zero();
    }
    const int64_t ldx = p.ldx, bytes = p.group_bytes;
    const float* x = p.x + row * ldx;
    const char* w = static_cast<const char*>(p.w) + group * bytes;
    const int64_t whole = BF16 ? p.k / 2 : p.k;
    for (int64_t i = 0; i < whole; ++i, w += 64, next += step) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) __builtin_prefetch(next + g * bytes, 0, 2);
        if constexpr (BF16) {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) {
                const V w0 = even(w + g * bytes);
                S2D_UNROLL
                for (int r = 0; r < ROWS; ++r) acc[r][g] = fma(broadcast(x + r * ldx + 2 * i), w0, acc[r][g]);
            }
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) {
                const V w1 = odd(w + g * bytes);
                S2D_UNROLL
                for (int r = 0; r < ROWS; ++r) {
                    acc[r][g] = fma(broadcast(x + r * ldx + 2 * i + 1), w1, acc[r][g]);
                }
            }
        } else {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) {
                const V w0 = load(reinterpret_cast<const float*>(w + g * bytes));
                S2D_UNROLL
                for (int r = 0; r < ROWS; ++r) acc[r][g] = fma(broadcast(x + r * ldx + i), w0, acc[r][g]);
            }
        }
    }
    if (BF16 && p.k % 2) {  // the last input of an odd count is alone in its word
        for (int g = 0; g < GROUPS; ++g) {
            const V w0 = even(w + g * bytes);
            for (int r = 0; r < ROWS; ++r) acc[r][g] = fma(broadcast(x + r * ldx + 2 * whole), w0, acc[r][g]);
        }
    }
    if ((group + GROUPS) * LANES <= p.n) {
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) finish_whole(p, row + r, (group + g) * LANES, acc[r][g]);
        }
        return;
    }
    alignas(64) float sums[ROWS * GROUPS * LANES];
    S2D_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) store(sums + (r * GROUPS + g) * LANES, acc[r][g]);
    }
#pragma GCC unroll 1
    for (int i = 0; i < ROWS * GROUPS; ++i) finish(p, row + i / GROUPS, group + i % GROUPS, sums + i * LANES);
}

template <Format F, int ROWS>
inline void tile_groups(const Product& p, int64_t row, int64_t group, int groups, const char* next, int64_t step) {
    if constexpr (max_groups(F, ROWS) >= 4) {
        if (groups == 4) return tile<F, ROWS, 4>(p, row, group, next, step);
    }
    if constexpr (max_groups(F, ROWS) >= 2) {
        if (groups == 2) return tile<F, ROWS, 2>(p, row, group, next, step);
    }
    tile<F, ROWS, 1>(p, row, group, next, step);
}

template <Format F, int ROWS>
inline void tile_rows(const Product& p, int64_t height, int64_t row, int64_t group, int groups, const char* next,
                      int64_t step) {
    if constexpr (ROWS > 1) {
        if (height < ROWS) return tile_rows<F, ROWS - 1>(p, height, row, group, groups, next, step);
    }
    tile_groups<F, ROWS>(p, row, group, groups, next, step);
}

template <Format F>
void product_of(const Product& p) {
#if defined(S2D_TILES)
    if (tiled<F>(p.k)) return product_on_tiles(p);
#endif
    constexpr int64_t MOST_ROWS = max_rows(F);
    const int64_t tiles = (p.rows + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t base = p.rows / tiles, larger = p.rows % tiles;
    const int64_t width = max_groups(F, static_cast<int>(base + (larger > 0)));
    // Few rows: all tiles over one group while it is in the first-level cache, fetching the next group meanwhile.
    // Many: one tile over as many groups as the second level holds, so that its rows stay in the first.
    const int64_t held = GROUPS_BYTES / p.group_bytes;
    const int64_t block = tiles <= FEW_TILES || held <= width ? width : held;
    for (int64_t first = p.group_begin; first < p.group_end; first += block) {
        const int64_t last = p.group_end - first < block ? p.group_end : first + block;
        int64_t row = 0;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t height = base + (t < larger);
            for (int64_t group = first; group < last;) {
                const int64_t left = last - group;
                const int groups = static_cast<int>(left >= width ? width : left >= 2 && width >= 2 ? 2 : 1);
                const char* next = static_cast<const char*>(p.w) + (group + groups) * p.group_bytes;
                const int64_t share = block == width ? tiles : 1;
                const int64_t part = block == width ? t : 0;
                tile_rows<F, MOST_ROWS>(p, height, row, group, groups, next + part * (p.group_bytes / share),
                                           (64 + share - 1) / share);
                group += groups;
            }
            row += height;
        }
    }
}

void product(const Product& p) {
    switch (p.format) {
        case Format::float32: return product_of<Format::float32>(p);
        case Format::bf16: return product_of<Format::bf16>(p);
        case Format::int8: return product_of<Format::int8>(p);
        case Format::packed:
            if constexpr (PACKS) product_of<Format::packed>(p);  // nobody packs for kernels that cannot
            return;
    }
}

float read_stream(const float* data, int64_t bytes) {
    V total[4] = {zero(), zero(), zero(), zero()};
    const int64_t count = bytes / 4;
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        S2D_UNROLL
        for (int j = 0; j < 4; ++j) total[j] = add(total[j], load(data + i + j * LANES));
    }
    return sum(add(add(total[0], total[1]), add(total[2], total[3])));
}
