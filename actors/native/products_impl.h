// Matrix products over blocked weights (see kernels.h). Included by kernels_impl.h.

constexpr int64_t HELD_BYTES = 256 << 10;  // weights that stay in the second-level cache while many rows pass
constexpr int64_t PANEL_TILES = 4;         // rows of tiles that pass together
constexpr int64_t PANEL_ROWS = 24;         // at most: 4 tiles of 6 rows
constexpr int64_t PANEL_GROUPS = 4;        // at most

// Adds what the epilogue says to 16 sums (fewer in the last group) and stores them.
inline void finish(const Product& p, int64_t row, int64_t group, float* sums) {
    if (p.format == Format::int8) {
        const char* scales = static_cast<const char*>(p.w) + (group + 1) * p.group_bytes - 64;
        const V scale = mul(load_all(reinterpret_cast<const float*>(scales)), spread_all(p.q.scales[row * p.q.stride]));
        store(sums, mul(load_all(sums), scale));
    }
    const int64_t first = group * LANES, count = p.n - first;
    float* y = p.y + row * p.ldy + first;
    if (count >= LANES) {
        V v = load_all(sums);
        if (p.bias) v = add(v, load_all(p.bias + first));
        if (p.epilogue == Epilogue::add) v = add(load_all(y), v);
        if (p.epilogue == Epilogue::scale_add) v = fma(load_all(y), spread_all(p.row_scale[row]), v);
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

// Rows row..row+rows-1 times groups begin..end-1, at most PANEL_ROWS and PANEL_GROUPS. All rows of tiles together
// prefetch each line of the groups that come next once.
template <Format F>
void panel(const Product& p, int64_t row, int64_t rows, int64_t begin, int64_t end) {
    constexpr int64_t MOST_ROWS = max_rows(F);
    const int64_t tiles = (rows + MOST_ROWS - 1) / MOST_ROWS, base = rows / tiles, larger = rows % tiles;
    const int64_t ld = (end - begin) * LANES, step = (64 + tiles - 1) / tiles;
    alignas(64) float sums[PANEL_ROWS * PANEL_GROUPS * LANES];
    for (int64_t t = 0, r = 0; t < tiles; ++t) {
        const int64_t height = base + (t < larger), most = max_groups(F, static_cast<int>(height));
        for (int64_t g = begin; g < end;) {
            const int64_t groups = end - g >= most ? most : end - g >= 2 && most >= 2 ? 2 : 1;
            const char* next = static_cast<const char*>(p.w) + (g + groups) * p.group_bytes;
            next += t * (p.group_bytes / tiles);
            tile_of<F, MOST_ROWS>({p, row + r, g, next, step, sums + r * ld + (g - begin) * LANES, ld}, height, groups);
            g += groups;
        }
        r += height;
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t g = begin; g < end; ++g) finish(p, row + r, g, sums + r * ld + (g - begin) * LANES);
    }
}

template <Format F>
void product_of(const Product& p) {
    constexpr int64_t MOST_ROWS = max_rows(F);
    const int64_t panels = (p.rows + PANEL_TILES * MOST_ROWS - 1) / (PANEL_TILES * MOST_ROWS);
    const int64_t groups = max_groups(F, static_cast<int>(p.rows < MOST_ROWS ? p.rows : MOST_ROWS));
    const int64_t fit = HELD_BYTES / p.group_bytes;
    const int64_t held = panels == 1 || fit < groups ? groups : fit;
    for (int64_t first = p.group_begin; first < p.group_end; first += held) {
        const int64_t last = p.group_end - first < held ? p.group_end : first + held;
        for (int64_t n = 0; n < panels; ++n) {
            const int64_t row = p.rows * n / panels, rows = p.rows * (n + 1) / panels - row;
            for (int64_t g = first; g < last; g += groups) {
                const int64_t end = last - g < groups ? last : g + groups;
                panel<F>(p, row, rows, g, end);
            }
        }
    }
}

void product(const Product& p) {
    switch (p.format) {
        case Format::float32: return product_of<Format::float32>(p);
        case Format::bf16: return product_of<Format::bf16>(p);
        case Format::int8: return product_of<Format::int8>(p);
    }
}

float read_stream(const float* data, int64_t bytes) {
    V total[4] = {zero_all(), zero_all(), zero_all(), zero_all()};
    const int64_t count = bytes / 4;
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES) {
        S2D_UNROLL
        for (int j = 0; j < 4; ++j) total[j] = add(total[j], load_all(data + i + j * LANES));
    }
    return sum(add(add(total[0], total[1]), add(total[2], total[3])));
}
