// Products over packed weights (see packed.h) with the bfloat16 dot product of AVX-512: inputs are rounded to bfloat16,
// sums are float32. Each output adds inputs 0 and 1, then 2 and 3, ..., then the exceptions of its group, whatever the
// number of rows. Attention over bfloat16 keys may round its inputs too. Included by kernels_impl.h where S2D_PACKED is
// defined.

void to_bf16_row(const float* x, int64_t k, char* row) {
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) {
        const __m512bh pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + LANES), _mm512_loadu_ps(x + i));
        _mm512_storeu_si512(row + i * 2, (__m512i)pairs);
    }
    const int64_t end = converted_bytes(k, Format::packed) / 2;
    for (; i < end; i += LANES) {
        alignas(64) float rest[LANES] = {};
        for (int64_t j = 0; j < LANES && i + j < k; ++j) rest[j] = x[i + j];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + i * 2), (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(rest)));
    }
}

// Four lines of pairs of one chunk.
struct Lines {
    __m512i line[4];
};
inline Lines unpack(const char* chunk, __m512i table) {
    const __m512i mask = _mm512_set1_epi8(15), codes = _mm512_loadu_si512(chunk + 128);
    const __m512i low0 = _mm512_loadu_si512(chunk), low1 = _mm512_loadu_si512(chunk + 64);
    const __m512i high0 = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, mask));
    const __m512i high1 = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), mask));
    return Lines{{_mm512_unpacklo_epi8(low0, high0), _mm512_unpackhi_epi8(low0, high0),
                  _mm512_unpacklo_epi8(low1, high1), _mm512_unpackhi_epi8(low1, high1)}};
}

inline float from_bits(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Adds the exceptions of one group to its sums in some rows.
inline void add_exceptions(const Product& p, int64_t row, int64_t rows, const char* trailer, float* sums,
                           int64_t stride) {
    uint32_t count;
    memcpy(&count, trailer + offsetof(Trailer, count), sizeof count);
    const uint32_t* places = reinterpret_cast<const uint32_t*>(trailer + sizeof(Trailer));
    const uint16_t* values = reinterpret_cast<const uint16_t*>(places + most_exceptions(p.k));
    for (int64_t r = 0; r < rows; ++r, sums += stride) {
        const uint16_t* x = reinterpret_cast<const uint16_t*>(p.converted.rows + (row + r) * p.converted.bytes);
        for (uint32_t e = 0; e < count; ++e) {
            float& sum = sums[places[e] % LANES];
            sum = madd(from_bits(x[places[e] / LANES]), from_bits(values[e]), sum);
        }
    }
    // Without this GCC 12 reads the vectors that were stored before, not these sums (test_packed_weights_are_the_weights
    // fails); why it thinks that it may was not found.
    asm volatile("" : : "r"(sums) : "memory");
}

// ROWS rows times GROUPS output groups. `next` and `step` as for the other formats.
template <int ROWS, int GROUPS>
inline void tile_packed(const Product& p, int64_t row, int64_t group, const char* next, int64_t step) {
    const int64_t bytes = p.group_bytes, count = chunks(p.k), ldx = p.converted.bytes;
    const char* const x = p.converted.rows + row * ldx;
    const char* const w = static_cast<const char*>(p.w) + group * bytes;
    const char* const trailer = w + count * CHUNK_BYTES;
    __m512 acc[ROWS][GROUPS];
    __m512i table[GROUPS];
    S2D_UNROLL
    for (int g = 0; g < GROUPS; ++g) {
        table[g] = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(trailer + g * bytes)));
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) acc[r][g] = _mm512_setzero_ps();
    }
    const char* pairs = x;
    const char* chunk = w;
    for (int64_t c = 0; c < count; ++c, chunk += CHUNK_BYTES, pairs += 16, next += 3 * step) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
            S2D_UNROLL
            for (int i = 0; i < 3; ++i) __builtin_prefetch(next + g * bytes + i * step, 0, 2);
            const Lines lines = unpack(chunk + g * bytes, table[g]);
            S2D_UNROLL
            for (int i = 0; i < 4; ++i) {
                S2D_UNROLL
                for (int r = 0; r < ROWS; ++r) {
                    int32_t pair;
                    memcpy(&pair, pairs + r * ldx + 4 * i, sizeof pair);
                    acc[r][g] = _mm512_dpbf16_ps(acc[r][g], (__m512bh)lines.line[i], (__m512bh)_mm512_set1_epi32(pair));
                }
            }
        }
    }
    alignas(64) float sums[ROWS * GROUPS * LANES];
    S2D_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) _mm512_store_ps(sums + (r * GROUPS + g) * LANES, acc[r][g]);
    }
    for (int g = 0; g < GROUPS; ++g) {
        add_exceptions(p, row, ROWS, trailer + g * bytes, sums + g * LANES, GROUPS * LANES);
    }
#pragma GCC unroll 1
    for (int i = 0; i < ROWS * GROUPS; ++i) finish(p, row + i / GROUPS, group + i % GROUPS, sums + i * LANES);
}

// As tile_packed, over whole groups of blocked bfloat16 weights, which have nothing to unpack, and an even p.k.
template <int ROWS, int GROUPS>
inline void tile_rounded(const Product& p, int64_t row, int64_t group, const char* next, int64_t step) {
    const int64_t bytes = p.group_bytes, ldx = p.converted.bytes;
    const char* pairs = p.converted.rows + row * ldx;
    const char* w = static_cast<const char*>(p.w) + group * bytes;
    __m512 acc[ROWS][GROUPS];
    S2D_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) acc[r][g] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < p.k / 2; ++i, w += 64, pairs += 4, next += step) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) {
            __builtin_prefetch(next + g * bytes, 0, 2);
            const __m512bh line = (__m512bh)_mm512_loadu_si512(w + g * bytes);
            S2D_UNROLL
            for (int r = 0; r < ROWS; ++r) {
                int32_t pair;
                memcpy(&pair, pairs + r * ldx, sizeof pair);
                acc[r][g] = _mm512_dpbf16_ps(acc[r][g], line, (__m512bh)_mm512_set1_epi32(pair));
            }
        }
    }
    S2D_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) finish_whole(p, row + r, (group + g) * LANES, V{acc[r][g]});
    }
}

// Rows of whole chunks, one after the other.
inline void round_rows(const float* x, int64_t rows, int64_t k, char* to) {
    for (int64_t r = 0; r < rows; ++r) to_bf16_row(x + r * k, k, to + r * k * 2);
}
