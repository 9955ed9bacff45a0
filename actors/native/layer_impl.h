// What a decoder layer does besides products. Included by kernels_impl.h.

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

inline float greatest(const float* s) {
    float top[LANES];
    for (int64_t j = 0; j < 16; ++j) top[j] = s[j] > s[j + 16] ? s[j] : s[j + 16];
    for (int64_t j = 0; j < 8; ++j) top[j] = top[j] > top[j + 8] ? top[j] : top[j + 8];
    for (int64_t j = 0; j < 4; ++j) top[j] = top[j] > top[j + 4] ? top[j] : top[j + 4];
    const float a = top[0] > top[2] ? top[0] : top[2], b = top[1] > top[3] ? top[1] : top[3];
    return a > b ? a : b;
}

inline const char* block_of(const Attention& a, int64_t b, int64_t bytes) {
    return b < a.tail_from ? a.pool + a.block_table[b] * a.block_bytes : a.tail + (b - a.tail_from) * bytes;
}

// Blocks are not neighbours, so that the processor does not read ahead by itself.
inline void request(const char* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + i, 0, 2);
}

template <Format F>
void attention_of(const Attention& a) {
    alignas(64) float scores[MAX_GROUP * BLOCK];
    float highest[MAX_GROUP], total[MAX_GROUP], best[MAX_GROUP], mass[MAX_GROUP], rescale[MAX_GROUP];
    const int64_t half_bytes = BLOCK * a.head_dim * (F == Format::bf16 ? 2 : 4);
    Product qk{a.q, a.head_dim, a.group, nullptr, group_bytes(a.head_dim, F), F, a.head_dim, BLOCK,
               0, BLOCK / LANES, scores, BLOCK, nullptr, nullptr, Epilogue::store};
    Product pv{scores, BLOCK, a.group, nullptr, group_bytes(BLOCK, F), F, BLOCK, a.head_dim,
               0, a.head_dim / LANES, a.out, a.head_dim, nullptr, rescale, Epilogue::store};
#if defined(S2D_TILES)
    alignas(64) char query[MAX_TILED_HEAD / 32 * 2 * TILE_BYTES];
    const bool tiles = tiled_heads(a);
    if (tiles) {
        pack_rows(a.q, a.head_dim, a.group, a.head_dim, query);
        configure_tiles(a.group);
    }
#endif
    for (int64_t b = 0; b * BLOCK < a.keys; ++b) {
        const int64_t count = a.keys - b * BLOCK < BLOCK ? a.keys - b * BLOCK : BLOCK;
        const char* keys = block_of(a, b, 2 * half_bytes);
        const char* ahead = a.cold && (b + 1) * BLOCK < a.keys ? block_of(a, b + 1, 2 * half_bytes) : nullptr;
        if (ahead) request(ahead, half_bytes);
        qk.w = keys;
#if defined(S2D_TILES)
        if (tiles) scores_on_tiles(query, a.head_dim, keys, scores);
        else product_of<F>(qk);
#else
        product_of<F>(qk);
#endif
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
        if (ahead) request(ahead + half_bytes, half_bytes);
        for (int64_t r = 0; r < a.group; ++r) {
            rescale[r] = b == 0 ? 0.0f : exponential(highest[r] - best[r]);
            total[r] = b == 0 ? mass[r] : madd(total[r], rescale[r], mass[r]);
            highest[r] = best[r];
        }
#if defined(S2D_TILES)
        // Slots beyond a sequence's end hold whatever was there: they must not be multiplied, not even by zero.
        if (tiles && count == BLOCK) {
            values_on_tiles(a, scores, keys + half_bytes, rescale, b == 0);
            continue;
        }
#endif
        pv.w = keys + half_bytes;
        pv.k = count;
        pv.epilogue = b == 0 ? Epilogue::store : Epilogue::scale_add;
        product_of<F>(pv);
    }
#if defined(S2D_TILES)
    if (tiles) _tile_release();
#endif
    for (int64_t r = 0; r < a.group; ++r) {
        const float inverse = 1.0f / total[r];
        for (int64_t i = 0; i < a.head_dim; ++i) a.out[r * a.head_dim + i] *= inverse;
    }
}

void attention(const Attention& a) {
    if (a.bf16) attention_of<Format::bf16>(a);
    else attention_of<Format::float32>(a);
}
