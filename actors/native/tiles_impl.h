// bfloat16 products on the tile registers of AMX: 16 rows of inputs times 16 outputs at once. Blocked weights (see
// kernels.h) already lie as tiles do: 16 lines of 64 bytes are 16 outputs times 32 inputs.
//
// Inputs are two tiles, high + low, both bfloat16: 16 bits of a float32's 24. Each output sums high and low of inputs
// 0..31, then 32..63, ... into one float32 accumulator, whatever the number of rows.
//
// int8 stays with the byte products of VNNI: a tile would leave its sums to be scaled after every part of 32 inputs.
//
// Included by kernels_impl.h after int8_impl.h, where S2D_TILES is defined.

constexpr int64_t TILE_ROWS = 16;
constexpr int64_t TILE_BYTES = 1024;
constexpr int64_t PANEL = 128;  // rows packed at a time: they stay in the second-level cache

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t line_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0-3 sums, 4-5 inputs: `rows` rows of 64 bytes; 6-7 weights.
inline void configure_tiles(int64_t rows) {
    TileConfig config;
    for (int t = 0; t < 8; ++t) {
        config.line_bytes[t] = 64;
        config.rows[t] = static_cast<uint8_t>(t < 6 ? rows : TILE_ROWS);
    }
    _tile_loadconfig(&config);
}

// Rows packed as pairs of tiles, [chunk of inputs][high, low][row][64 bytes], one after the other for each 16 rows.
class Packed {
public:
    ~Packed() { free(data_); }
    char* reserve(int64_t bytes) {
        if (bytes > bytes_) {
            free(data_);
            data_ = static_cast<char*>(aligned_alloc(64, static_cast<size_t>(bytes)));
            bytes_ = data_ ? bytes : 0;
        }
        return data_;
    }
    char* data() const { return data_; }

private:
    char* data_ = nullptr;
    int64_t bytes_ = 0;
};
thread_local Packed packed_rows;

inline __m512i to_bf16_pair(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
inline __m512 low_floats(__m512i pair) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(pair)), 16));
}
inline __m512 high_floats(__m512i pair) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(pair, 1)), 16));
}

// 32 inputs of one row.
inline void pack_bf16(const float* x, char* high, char* low) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + LANES);
    const __m512i rounded = to_bf16_pair(a, b);
    _mm512_store_si512(high, rounded);
    _mm512_store_si512(low, to_bf16_pair(_mm512_sub_ps(a, low_floats(rounded)), _mm512_sub_ps(b, high_floats(rounded))));
}

constexpr int64_t CHUNK_INPUTS = 32;

char* pack_panel(const Product& p, int64_t first, int64_t rows) {
    const int64_t chunks = p.k / CHUNK_INPUTS;
    char* const data = packed_rows.reserve((rows + TILE_ROWS - 1) / TILE_ROWS * chunks * 2 * TILE_BYTES);
    if (!data) return nullptr;
    for (int64_t r = 0; r < rows; ++r) {
        char* to = data + r / TILE_ROWS * chunks * 2 * TILE_BYTES + r % TILE_ROWS * 64;
        for (int64_t c = 0; c < chunks; ++c, to += 2 * TILE_BYTES) {
            pack_bf16(p.x + (first + r) * p.ldx + c * CHUNK_INPUTS, to, to + TILE_BYTES);
        }
    }
    return data;
}

// The next tile of weights, and a request for the line `ahead` bytes after each of its lines.
#define S2D_LOAD_WEIGHTS(tile, w, ahead)                                        \
    do {                                                                        \
        _tile_loadd(tile, w, 64);                                               \
        if (ahead) {                                                            \
            S2D_UNROLL                                                          \
            for (int line = 0; line < 16; ++line) __builtin_prefetch((w) + (ahead) + line * 64, 0, 2); \
        }                                                                       \
    } while (0)

// Up to 16 rows times GROUPS output groups.
template <int GROUPS>
inline void tiles_bf16(const Product& p, const char* x, int64_t row, int64_t rows, int64_t group, int64_t ahead) {
    const int64_t bytes = p.group_bytes, chunks = p.k / CHUNK_INPUTS;
    const char* w = static_cast<const char*>(p.w) + group * bytes;
    _tile_zero(0);
    if constexpr (GROUPS > 1) _tile_zero(1);
    if constexpr (GROUPS > 2) _tile_zero(2);
    if constexpr (GROUPS > 3) _tile_zero(3);
    for (int64_t c = 0; c < chunks; ++c, x += 2 * TILE_BYTES, w += TILE_BYTES) {
        _tile_loadd(4, x, 64);
        _tile_loadd(5, x + TILE_BYTES, 64);
        S2D_LOAD_WEIGHTS(6, w, ahead);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (GROUPS > 1) {
            S2D_LOAD_WEIGHTS(7, w + bytes, ahead);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_dpbf16ps(0, 5, 6);
        if constexpr (GROUPS > 1) _tile_dpbf16ps(1, 5, 7);
        if constexpr (GROUPS > 2) {
            S2D_LOAD_WEIGHTS(6, w + 2 * bytes, ahead);
            _tile_dpbf16ps(2, 4, 6);
        }
        if constexpr (GROUPS > 3) {
            S2D_LOAD_WEIGHTS(7, w + 3 * bytes, ahead);
            _tile_dpbf16ps(3, 4, 7);
        }
        if constexpr (GROUPS > 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (GROUPS > 3) _tile_dpbf16ps(3, 5, 7);
    }
    alignas(64) float sums[GROUPS][TILE_ROWS * LANES];
    _tile_stored(0, sums[0], 64);
    if constexpr (GROUPS > 1) _tile_stored(1, sums[1], 64);
    if constexpr (GROUPS > 2) _tile_stored(2, sums[2], 64);
    if constexpr (GROUPS > 3) _tile_stored(3, sums[3], 64);
    for (int64_t r = 0; r < rows; ++r) {
        for (int g = 0; g < GROUPS; ++g) finish(p, row + r, group + g, sums[g] + r * LANES);
    }
}

inline void tiles_of(const Product& p, const char* x, int64_t row, int64_t rows, int64_t group, int64_t groups,
                     int64_t ahead) {
    switch (groups) {
        case 4: return tiles_bf16<4>(p, x, row, rows, group, ahead);
        case 3: return tiles_bf16<3>(p, x, row, rows, group, ahead);
        case 2: return tiles_bf16<2>(p, x, row, rows, group, ahead);
        default: return tiles_bf16<1>(p, x, row, rows, group, ahead);
    }
}

// Whether a product runs on tiles depends on the matrix alone, never on the rows: whole chunks of inputs do.
template <Format F>
constexpr bool tiled(int64_t k) {
    return F == Format::bf16 && k > 0 && k % CHUNK_INPUTS == 0;
}

__attribute__((noinline)) void product_on_tiles(const Product& p) {
    constexpr int64_t WIDTH = 4;
    const int64_t strip = p.k / CHUNK_INPUTS * 2 * TILE_BYTES;
    for (int64_t first = 0; first < p.rows; first += PANEL) {
        const int64_t panel = p.rows - first < PANEL ? p.rows - first : PANEL;
        const bool packed = p.again && p.rows <= PANEL;
        const char* x = packed ? packed_rows.data() : pack_panel(p, first, panel);
        if (!x) abort();
        int64_t configured = 0;
        for (int64_t group = p.group_begin; group < p.group_end; group += WIDTH) {
            const int64_t groups = p.group_end - group < WIDTH ? p.group_end - group : WIDTH;
            for (int64_t r = 0; r < panel; r += TILE_ROWS) {
                const int64_t rows = panel - r < TILE_ROWS ? panel - r : TILE_ROWS;
                if (rows != configured) configure_tiles(configured = rows);
                tiles_of(p, x + r / TILE_ROWS * strip, first + r, rows, group, groups, r ? 0 : groups * p.group_bytes);
            }
        }
    }
    _tile_release();
}

// Attention on tiles (see attention_of): the query heads of a KV head are the rows, of one token or several.
constexpr int64_t MAX_TILED_HEAD = 256;
inline bool tiled_heads(const Attention& a) {
    return a.bf16 && a.group <= TILE_ROWS && a.head_dim % 32 == 0 && a.head_dim <= MAX_TILED_HEAD;
}

inline void pack_rows(const float* x, int64_t ldx, int64_t rows, int64_t inputs, char* to) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < inputs / 32; ++c) {
            char* at = to + c * 2 * TILE_BYTES + r * 64;
            pack_bf16(x + r * ldx + c * 32, at, at + TILE_BYTES);
        }
    }
}

// scores [rows][32] = q K^T over one block of keys.
inline void scores_on_tiles(const char* query, int64_t head_dim, const char* keys, float* scores) {
    const char* second = keys + group_bytes(head_dim, Format::bf16);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t c = 0; c < head_dim / 32; ++c, query += 2 * TILE_BYTES, keys += TILE_BYTES, second += TILE_BYTES) {
        _tile_loadd(4, query, 64);
        _tile_loadd(5, query + TILE_BYTES, 64);
        _tile_loadd(6, keys, 64);
        _tile_loadd(7, second, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(1, 5, 7);
    }
    _tile_stored(0, scores, BLOCK * 4);
    _tile_stored(1, scores + LANES, BLOCK * 4);
}

// out = out * rescale (nothing for the first block) + p V over one whole block of values. Tiles may be configured for
// more rows.
inline void values_on_tiles(const float* p, int64_t rows, int64_t head_dim, const char* values, const float* rescale,
                            bool first, float* out) {
    alignas(64) char packed[2 * TILE_BYTES];
    alignas(64) float sums[2][TILE_ROWS * LANES];
    pack_rows(p, BLOCK, rows, BLOCK, packed);
    _tile_loadd(4, packed, 64);
    _tile_loadd(5, packed + TILE_BYTES, 64);
    for (int64_t g = 0; g < head_dim / LANES; g += 2, values += 2 * TILE_BYTES) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(6, values, 64);
        _tile_loadd(7, values + TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(0, 5, 6);
        _tile_dpbf16ps(1, 5, 7);
        _tile_stored(0, sums[0], 64);
        _tile_stored(1, sums[1], 64);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < 2; ++i) {
                float* to = out + r * head_dim + (g + i) * LANES;
                const V sum = load(sums[i] + r * LANES);
                store(to, first ? sum : fma(load(to), spread(rescale[r]), sum));
            }
        }
    }
}
