// The kernels, written once and included by each instruction-set variant, which defines before it:
//   V (16 floats), Broadcast (one float for all lanes), MAX_ROWS (rows of a register tile), max_groups(rows),
//   zero, load, store, spread, broadcast, even, odd, fma, madd, add, mul, sum, any_greater.
// No include guard on purpose; everything lives in the includer's unnamed namespace. Only plain functions and C
// headers are used, so that no inline function compiled for one instruction set can be linked into another.

#define S2D_UNROLL _Pragma("GCC unroll 8")

constexpr int64_t ROW_BYTES = 256 << 10;  // activations of a row block: they stay in a core's own cache

// ---- products -------------------------------------------------------------------------------------------------

template <int ROWS, int GROUPS>
inline void finish(const Product& p, int64_t row, int64_t group, V (&acc)[ROWS][GROUPS]) {
    S2D_UNROLL
    for (int g = 0; g < GROUPS; ++g) {
        const int64_t first = (group + g) * LANES;
        const int64_t count = p.n - first;
        S2D_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            float* y = p.y + (row + r) * p.ldy + first;
            V v = acc[r][g];
            if (count >= LANES) {
                if (p.bias) v = add(v, load(p.bias + first));
                if (p.epilogue == Epilogue::add) v = add(load(y), v);
                if (p.epilogue == Epilogue::scale_add) v = fma(load(y), spread(p.row_scale[row + r]), v);
                store(y, v);
            } else {
                float values[LANES];
                store(values, v);
                for (int64_t i = 0; i < count; ++i) {
                    float x = values[i];
                    if (p.bias) x += p.bias[first + i];
                    if (p.epilogue == Epilogue::add) x = y[i] + x;
                    if (p.epilogue == Epilogue::scale_add) x = madd(y[i], p.row_scale[row + r], x);
                    y[i] = x;
                }
            }
        }
    }
}

// ROWS rows times GROUPS output groups, sums in registers. `next` runs through the weights needed afterwards by
// `step` bytes a line, so that all tiles over the same groups together prefetch each of their lines once.
template <bool BF16, int ROWS, int GROUPS>
void tile(const Product& p, int64_t row, int64_t group, const char* next, int64_t step) {
    V acc[ROWS][GROUPS];
    S2D_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) acc[r][g] = zero();
    }
    const float* x = p.x + row * p.ldx;
    const int64_t lines = BF16 ? (p.k + 1) / 2 : p.k;
    const int64_t group_bytes = lines * 64;
    const char* w = static_cast<const char*>(p.w) + group * group_bytes;
    const int64_t whole = BF16 ? p.k / 2 : p.k;
    for (int64_t i = 0; i < whole; ++i, w += 64, next += step) {
        S2D_UNROLL
        for (int g = 0; g < GROUPS; ++g) __builtin_prefetch(next + g * group_bytes, 0, 2);
        if constexpr (BF16) {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) {
                const V w0 = even(w + g * group_bytes);
                S2D_UNROLL
                for (int r = 0; r < ROWS; ++r) acc[r][g] = fma(broadcast(x + r * p.ldx + 2 * i), w0, acc[r][g]);
            }
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) {
                const V w1 = odd(w + g * group_bytes);
                S2D_UNROLL
                for (int r = 0; r < ROWS; ++r) {
                    acc[r][g] = fma(broadcast(x + r * p.ldx + 2 * i + 1), w1, acc[r][g]);
                }
            }
        } else {
            S2D_UNROLL
            for (int g = 0; g < GROUPS; ++g) {
                const V w0 = load(reinterpret_cast<const float*>(w + g * group_bytes));
                S2D_UNROLL
                for (int r = 0; r < ROWS; ++r) acc[r][g] = fma(broadcast(x + r * p.ldx + i), w0, acc[r][g]);
            }
        }
    }
    if (BF16 && whole < lines) {  // the last input of an odd count is alone in its word
        for (int g = 0; g < GROUPS; ++g) {
            const V w0 = even(w + g * group_bytes);
            for (int r = 0; r < ROWS; ++r) acc[r][g] = fma(broadcast(x + r * p.ldx + 2 * whole), w0, acc[r][g]);
        }
    }
    finish<ROWS, GROUPS>(p, row, group, acc);
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

template <bool BF16>
void product_of(const Product& p) {
    constexpr int GROUPS_OF[] = {0, max_groups(1), max_groups(2), max_groups(3), max_groups(4), max_groups(5), max_groups(6)};
    const int64_t group_bytes = (BF16 ? (p.k + 1) / 2 : p.k) * 64;
    int64_t block_rows = ROW_BYTES / (p.k * 4) / MAX_ROWS * MAX_ROWS;
    if (block_rows < 2 * MAX_ROWS) block_rows = 2 * MAX_ROWS;
    for (int64_t row = 0; row < p.rows; row += block_rows) {
        const int64_t rows = p.rows - row < block_rows ? p.rows - row : block_rows;
        const int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
        const int64_t base = rows / tiles, larger = rows % tiles;
        const int64_t most = GROUPS_OF[base + (larger > 0)];
        for (int64_t group = p.group_begin; group < p.group_end;) {
            const int64_t left = p.group_end - group;
            const int groups = static_cast<int>(left >= most ? most : left >= 2 && most >= 2 ? 2 : 1);
            const char* next = static_cast<const char*>(p.w) + (group + groups) * group_bytes;
            const int64_t step = (64 + tiles - 1) / tiles;
            int64_t at = row;
            for (int64_t t = 0; t < tiles; ++t) {
                const char* ahead = next + t * (group_bytes / tiles);
                const int64_t height = base + (t < larger);
                switch (height) {
                    case 1: tile_groups<BF16, 1>(p, at, group, groups, ahead, step); break;
                    case 2: tile_groups<BF16, 2>(p, at, group, groups, ahead, step); break;
                    case 3: if constexpr (MAX_ROWS >= 3) tile_groups<BF16, 3>(p, at, group, groups, ahead, step); break;
                    case 4: if constexpr (MAX_ROWS >= 4) tile_groups<BF16, 4>(p, at, group, groups, ahead, step); break;
                    case 5: if constexpr (MAX_ROWS >= 5) tile_groups<BF16, 5>(p, at, group, groups, ahead, step); break;
                    default: if constexpr (MAX_ROWS >= 6) tile_groups<BF16, 6>(p, at, group, groups, ahead, step); break;
                }
                at += height;
            }
            group += groups;
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

template <bool BF16>
void attention_of(const Attention& a) {
    alignas(64) float scores[MAX_GROUP * BLOCK];
    float highest[MAX_GROUP], total[MAX_GROUP], rescale[MAX_GROUP];
    const int64_t half_bytes = BLOCK * a.head_dim * (BF16 ? 2 : 4);
    Product qk{a.q, a.head_dim, a.group, nullptr, BF16, a.head_dim, BLOCK, 0, BLOCK / LANES, scores, BLOCK, nullptr, nullptr, Epilogue::store};
    Product pv{scores, BLOCK, a.group, nullptr, BF16, 0, a.head_dim, 0, a.head_dim / LANES, a.out, a.head_dim, nullptr, rescale, Epilogue::store};
    for (int64_t b = 0; b * BLOCK < a.keys; ++b) {
        const int64_t count = a.keys - b * BLOCK < BLOCK ? a.keys - b * BLOCK : BLOCK;
        const char* keys = b < a.tail_from ? a.pool + a.block_table[b] * a.block_bytes
                                           : a.tail + (b - a.tail_from) * 2 * half_bytes;
        qk.w = keys;
        product_of<BF16>(qk);
        for (int64_t r = 0; r < a.group; ++r) {
            float* s = scores + r * BLOCK;
            for (int64_t j = 0; j < BLOCK; ++j) s[j] *= a.scale;
            for (int64_t j = count; j < BLOCK; ++j) s[j] = -INFINITY;
            float top[LANES];
            for (int64_t j = 0; j < LANES; ++j) top[j] = s[j] > s[j + LANES] ? s[j] : s[j + LANES];
            float best = b == 0 ? -INFINITY : highest[r];
            for (int64_t j = 0; j < LANES; ++j) best = best > top[j] ? best : top[j];
            for (int64_t j = 0; j < BLOCK; ++j) s[j] = exponential(s[j] - best);
            for (int64_t j = count; j < BLOCK; ++j) s[j] = 0.0f;
            const float mass = sum(add(load(s), load(s + LANES)));
            rescale[r] = b == 0 ? 0.0f : exponential(highest[r] - best);
            total[r] = b == 0 ? mass : madd(total[r], rescale[r], mass);
            highest[r] = best;
        }
        pv.w = keys + half_bytes;
        pv.k = count;
        // V groups are laid out for a whole block; a shorter product would compute a smaller stride.
        pv.epilogue = b == 0 ? Epilogue::store : Epilogue::scale_add;
        values_product<BF16>(pv);
    }
    for (int64_t r = 0; r < a.group; ++r) {
        const float inverse = 1.0f / total[r];
        for (int64_t i = 0; i < a.head_dim; ++i) a.out[r * a.head_dim + i] *= inverse;
    }
}
