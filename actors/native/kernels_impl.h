// The kernels, written once and included by each instruction-set variant, which defines before it:
//   V (16 floats), Broadcast (one float for all lanes), max_rows(bf16) (rows of a register tile), max_groups(rows),
//   zero, load, store, spread, broadcast, even, odd, fma, madd, add, mul, sum, any_greater.
// No include guard on purpose; everything lives in the includer's unnamed namespace. Only plain functions and C
// headers are used, so that no inline function compiled for one instruction set can be linked into another.

#define S2D_UNROLL _Pragma("GCC unroll 8")

constexpr int64_t GROUPS_BYTES = 256 << 10;  // weights worked on together where there are many rows
constexpr int64_t FEW_TILES = 4;

// ---- products -------------------------------------------------------------------------------------------------

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

// ROWS rows times GROUPS output groups, sums in registers. `next` runs through the weights needed afterwards by
// `step` bytes a line, so that all tiles over the same groups together prefetch each of their lines once.
template <bool BF16, int ROWS, int GROUPS>
__attribute__((noinline)) void tile(const Product& p, int64_t row, int64_t group, const char* next, int64_t step) {
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
    alignas(64) float sums[ROWS * GROUPS * LANES];
    S2D_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) store(sums + (r * GROUPS + g) * LANES, acc[r][g]);
    }
#pragma GCC unroll 1
    for (int i = 0; i < ROWS * GROUPS; ++i) finish(p, row + i / GROUPS, group + i % GROUPS, sums + i * LANES);
}

template <bool BF16, int ROWS>
inline void tile_groups(const Product& p, int64_t row, int64_t group, int groups, const char* next, int64_t step) {
    if constexpr (max_groups(ROWS) >= 4) {
        if (groups == 4) return tile<BF16, ROWS, 4>(p, row, group, next, step);
    }
    if constexpr (max_groups(ROWS) >= 2) {
        if (groups == 2) return tile<BF16, ROWS, 2>(p, row, group, next, step);
    }
    tile<BF16, ROWS, 1>(p, row, group, next, step);
}

template <bool BF16, int ROWS>
inline void tile_rows(const Product& p, int64_t height, int64_t row, int64_t group, int groups, const char* next,
                      int64_t step) {
    if constexpr (ROWS > 1) {
        if (height < ROWS) return tile_rows<BF16, ROWS - 1>(p, height, row, group, groups, next, step);
    }
    tile_groups<BF16, ROWS>(p, row, group, groups, next, step);
}

template <bool BF16>
void product_of(const Product& p) {
    constexpr int64_t MOST_ROWS = max_rows(BF16);
    const int64_t tiles = (p.rows + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t base = p.rows / tiles, larger = p.rows % tiles;
    const int64_t width = max_groups(static_cast<int>(base + (larger > 0)));
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
                tile_rows<BF16, MOST_ROWS>(p, height, row, group, groups, next + part * (p.group_bytes / share),
                                           (64 + share - 1) / share);
                group += groups;
            }
            row += height;
        }
    }
}

void product(const Product& p) {
    if (p.bf16) product_of<true>(p);
    else product_of<false>(p);
}

// ---- element-wise ---------------------------------------------------------------------------------------------

// exp for x <= 88, relative error below 2e-7 (Cephes' expf); 0 below -87.
inline float exponential(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shifted = madd(clamped, 1.44269504088896341f, magic);
    const float n = shifted - magic;
    float r = madd(n, -0.693359375f, clamped);
    r = madd(n, 2.12194440e-4f, r);
    float y = 1.9875691500e-4f;
    y = madd(y, r, 1.3981999507e-3f);
    y = madd(y, r, 8.3334519073e-3f);
    y = madd(y, r, 4.1665795894e-2f);
    y = madd(y, r, 1.6666665459e-1f);
    y = madd(y, r, 5.0000001201e-1f);
    y = madd(y, r * r, r + 1.0f);
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : y * power;
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
    V squares[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < n; i += LANES) {
        const V v = load(x + i);
        squares[i / LANES % 4] = fma(v, v, squares[i / LANES % 4]);
    }
    const float total = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    const V factor = spread(1.0f / sqrtf(total / static_cast<float>(n) + eps));
    for (int64_t i = 0; i < n; i += LANES) store(out + i, mul(load(weight + i), mul(load(x + i), factor)));
}

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

void silu_mul(const float* y, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += LANES, y += 2 * LANES) {
        for (int64_t j = 0; j < LANES; ++j) {
            const float gate = y[j];
            out[i + j] = gate / (1.0f + exponential(-gate)) * y[LANES + j];
        }
    }
}

// ---- attention ------------------------------------------------------------------------------------------------

inline float greatest(const float* s) {
    float top[LANES];
    for (int64_t j = 0; j < 16; ++j) top[j] = s[j] > s[j + 16] ? s[j] : s[j + 16];
    for (int64_t j = 0; j < 8; ++j) top[j] = top[j] > top[j + 8] ? top[j] : top[j + 8];
    for (int64_t j = 0; j < 4; ++j) top[j] = top[j] > top[j + 4] ? top[j] : top[j + 4];
    const float a = top[0] > top[2] ? top[0] : top[2], b = top[1] > top[3] ? top[1] : top[3];
    return a > b ? a : b;
}

template <bool BF16>
void attention_of(const Attention& a) {
    alignas(64) float scores[MAX_GROUP * BLOCK];
    float highest[MAX_GROUP], total[MAX_GROUP], best[MAX_GROUP], mass[MAX_GROUP], rescale[MAX_GROUP];
    const int64_t half_bytes = BLOCK * a.head_dim * (BF16 ? 2 : 4);
    Product qk{a.q, a.head_dim, a.group, nullptr, group_bytes(a.head_dim, BF16), BF16, a.head_dim, BLOCK,
               0, BLOCK / LANES, scores, BLOCK, nullptr, nullptr, Epilogue::store};
    Product pv{scores, BLOCK, a.group, nullptr, group_bytes(BLOCK, BF16), BF16, BLOCK, a.head_dim,
               0, a.head_dim / LANES, a.out, a.head_dim, nullptr, rescale, Epilogue::store};
    for (int64_t b = 0; b * BLOCK < a.keys; ++b) {
        const int64_t count = a.keys - b * BLOCK < BLOCK ? a.keys - b * BLOCK : BLOCK;
        const char* keys = b < a.tail_from ? a.pool + a.block_table[b] * a.block_bytes
                                           : a.tail + (b - a.tail_from) * 2 * half_bytes;
        qk.w = keys;
        product_of<BF16>(qk);
        for (int64_t r = 0; r < a.group; ++r) {
            float* s = scores + r * BLOCK;
            for (int64_t j = 0; j < BLOCK; ++j) s[j] *= a.scale;
            if (count < BLOCK) {
                for (int64_t j = count; j < BLOCK; ++j) s[j] = -INFINITY;
            }
            best[r] = greatest(s);
            if (b > 0 && highest[r] > best[r]) best[r] = highest[r];
        }
        for (int64_t r = 0; r < a.group; ++r) {
            float* s = scores + r * BLOCK;
            for (int64_t j = 0; j < BLOCK; ++j) s[j] = exponential(s[j] - best[r]);
            if (count < BLOCK) {
                for (int64_t j = count; j < BLOCK; ++j) s[j] = 0.0f;
            }
            mass[r] = sum(add(load(s), load(s + LANES)));
        }
        for (int64_t r = 0; r < a.group; ++r) {
            rescale[r] = b == 0 ? 0.0f : exponential(highest[r] - best[r]);
            total[r] = b == 0 ? mass[r] : madd(total[r], rescale[r], mass[r]);
            highest[r] = best[r];
        }
        pv.w = keys + half_bytes;
        pv.k = count;
        pv.epilogue = b == 0 ? Epilogue::store : Epilogue::scale_add;
        product_of<BF16>(pv);
    }
    for (int64_t r = 0; r < a.group; ++r) {
        const float inverse = 1.0f / total[r];
        for (int64_t i = 0; i < a.head_dim; ++i) a.out[r * a.head_dim + i] *= inverse;
    }
}

void attention(const Attention& a) {
    if (a.bf16) attention_of<true>(a);
    else attention_of<false>(a);
}

// ---- noise ----------------------------------------------------------------------------------------------------

constexpr int64_t BATCH = 64;  // counters at a time

// Philox4x32-10 (Salmon et al., SC 2011) of counters (word0[i], word1, word2, word3): four words each.
void philox(const uint32_t* word0, uint32_t word1, uint32_t word2, uint32_t word3, uint64_t key,
            uint32_t (&x)[4][BATCH]) {
    for (int64_t i = 0; i < BATCH; ++i) {
        uint32_t c0 = word0[i], c1 = word1, c2 = word2, c3 = word3;
        uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
        _Pragma("GCC unroll 10")
        for (int round = 0; round < 10; ++round) {
            const uint64_t a = static_cast<uint64_t>(c0) * 0xD2511F53u, b = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
            c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
            c1 = static_cast<uint32_t>(b);
            c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
            c3 = static_cast<uint32_t>(a);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        x[0][i] = c0;
        x[1][i] = c1;
        x[2][i] = c2;
        x[3][i] = c3;
    }
}

inline double as_double(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// log of a positive normal number, error below 1 ulp (the polynomial of FreeBSD's e_log.c), without branches
// and without fused operations: the same bits on every machine.
inline double logarithm(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint64_t offset = bits - 0x3fe6a09e00000000u;  // from about sqrt(1/2): its exponent field is k
    const uint64_t exponent = offset & 0xfff0000000000000u;
    const double m = as_double(bits - exponent);
    // k as a double: biased by 1024 it is a positive integer below 2^52
    const double k = as_double((((offset >> 52) + 1024u) & 0xfffu) | 0x4330000000000000u) - (4503599627370496.0 + 1024.0);
    const double f = m - 1.0;
    const double half = 0.5 * f * f;
    const double s = f / (2.0 + f);
    const double z = s * s, w = z * z;
    const double t1 = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    const double t2 = z * (6.666666666666735130e-01 + w * (2.857142874366239149e-01
                           + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    return s * (half + (t1 + t2)) + k * 1.90821492927058770002e-10 - half + f + k * 6.93147180369123816490e-01;
}

// -log(-log u), u = 1 - min((x + 1/2) 2^-32, 1 - 2^-24): u is exact, so log u is as good as log1p(-w).
inline float gumbel_of(uint32_t x) {
    const double w = (as_double(x | 0x4330000000000000u) - 4503599627370496.0 + 0.5) * 0x1p-32;
    const double bounded = w < 1.0 - 0x1p-24 ? w : 1.0 - 0x1p-24;
    return static_cast<float>(-logarithm(-logarithm(1.0 - bounded)));
}

void gumbel(uint64_t key, int64_t position, uint32_t stream, const int64_t* ids, int64_t n, float* out) {
    const uint32_t low = static_cast<uint32_t>(position);
    const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
    const int64_t step = ids ? BATCH : 4 * BATCH;
    uint32_t counters[BATCH], x[4][BATCH], lanes[4 * BATCH];
    float values[4 * BATCH];
    for (int64_t at = 0; at < n; at += step) {
        const int64_t count = n - at < step ? n - at : step;
        if (ids) {
            for (int64_t i = 0; i < BATCH; ++i) counters[i] = i < count ? static_cast<uint32_t>(ids[at + i] >> 2) : 0;
        } else {
            for (int64_t i = 0; i < BATCH; ++i) counters[i] = static_cast<uint32_t>(at / 4 + i);
        }
        philox(counters, low, high, stream, key, x);
        if (ids) {
            for (int64_t i = 0; i < count; ++i) lanes[i] = x[ids[at + i] & 3][i];
        } else {
            for (int64_t i = 0; i < BATCH; ++i) {
                for (int64_t lane = 0; lane < 4; ++lane) lanes[4 * i + lane] = x[lane][i];
            }
        }
        float* to = count == step ? out + at : values;
        for (int64_t i = count; i < step; ++i) lanes[i] = 0;
        for (int64_t i = 0; i < step; ++i) to[i] = gumbel_of(lanes[i]);
        if (to == values) memcpy(out + at, values, static_cast<size_t>(count) * sizeof(float));
    }
}

// ---- selection ------------------------------------------------------------------------------------------------

int64_t topk(const float* row, int64_t n, int64_t k, int64_t* index, float* value) {
    int64_t held = 0;
    float limit = -INFINITY;  // the worst entry held, once there are k
    for (int64_t i = 0; i < n;) {
        if (held == k && i + LANES <= n && !any_greater(load(row + i), limit)) {
            i += LANES;
            continue;
        }
        const int64_t end = held == k && i + LANES <= n ? i + LANES : i + 1;
        for (; i < end; ++i) {
            const float x = row[i];
            if (!(held < k ? x == x : x > limit)) continue;  // NaN is never chosen
            int64_t at = held < k ? held++ : k - 1;
            for (; at > 0 && value[at - 1] < x; --at) {
                value[at] = value[at - 1];
                index[at] = index[at - 1];
            }
            value[at] = x;
            index[at] = i;
            if (held == k) limit = value[k - 1];
        }
    }
    return held;
}

int64_t argmax(const float* row, int64_t n) {
    int64_t index[1] = {0};
    float value[1];
    topk(row, n, 1, index, value);
    return index[0];
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

Kernels make_table(const char* name) {
    return Kernels{name, product, attention, rms_norm, rotate, silu_mul, gumbel, argmax, topk, read_stream};
}
