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

// Blocks are not neighbours, so that the processor does not read ahead by itself.
inline void request(const char* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + i, 0, 2);
}

template <Format F>
void attention_of(const Attention& a) {
    alignas(64) float scores[MAX_GROUP * BLOCK];
    alignas(64) float queries[TOGETHER * WIDEST_TOGETHER], outs[TOGETHER * WIDEST_TOGETHER];
    float highest[MAX_GROUP], total[MAX_GROUP], best[MAX_GROUP], mass[MAX_GROUP], rescale[MAX_GROUP];
    int64_t seen[MAX_GROUP];  // keys
    const int64_t d = a.head_dim, rows = a.rows * a.group;
    const int64_t half_bytes = BLOCK * d * (F == Format::bf16 ? 2 : 4);
    for (int64_t r = 0; r < rows; ++r) seen[r] = a.keys + r / a.group;
    const float* q = a.q;
    float* out = a.out;
    if (a.rows > 1) {
        for (int64_t t = 0; t < a.rows; ++t) {
            memcpy(queries + t * a.group * d, a.q + t * a.ldq, static_cast<size_t>(a.group * d) * sizeof(float));
        }
        q = queries;
        out = outs;
    }
    Product qk{q, d, rows, nullptr, group_bytes(d, F), F, d, BLOCK,
               0, BLOCK / LANES, scores, BLOCK, nullptr, nullptr, Epilogue::store};
    Product pv{nullptr, BLOCK, 0, nullptr, group_bytes(BLOCK, F), F, 0, d,
               0, d / LANES, nullptr, d, nullptr, nullptr, Epilogue::store};
#if defined(S2D_TILES)
    alignas(64) char query[MAX_TILED_HEAD / 32 * 2 * TILE_BYTES];
    const bool tiles = tiled_heads(a);
    if (tiles) {
        pack_rows(q, d, rows, d, query);
        configure_tiles(rows);
    }
#endif
#if defined(S2D_PACKED)
    alignas(64) char query[TOGETHER * WIDEST_TOGETHER * 2], probs[MAX_GROUP * BLOCK * 2];
    const bool rounds = F == Format::bf16 && a.rounds && d % 32 == 0 && a.group * d <= TOGETHER * WIDEST_TOGETHER;
    if (rounds) {
        round_rows(q, rows, d, query);
        qk.converted = {query, d * 2};
    }
#endif
    const auto block_at = [&](int64_t b) {
        return b < a.tail_from ? a.pool + a.block_table[b] * a.block_bytes : a.tail + (b - a.tail_from) * 2 * half_bytes;
    };
    // Adds `count` values of block b to the rows from `first` on.
    const auto add_values = [&](int64_t b, int64_t first, int64_t some, int64_t count, const char* values) {
        const float* p = scores + first * BLOCK;
#if defined(S2D_TILES)
        // Slots beyond a sequence's end hold whatever was there: they must not be multiplied, not even by zero.
        if (tiles && count == BLOCK) return values_on_tiles(p, some, d, values, rescale + first, b == 0, out + first * d);
#endif
#if defined(S2D_PACKED)
        const bool whole = rounds && count == BLOCK;
        pv.converted = whole ? Converted{probs + first * BLOCK * 2, BLOCK * 2} : Converted{};
#endif
        pv.x = p;
        pv.rows = some;
        pv.w = values;
        pv.k = count;
        pv.y = out + first * d;
        pv.row_scale = rescale + first;
        pv.epilogue = b == 0 ? Epilogue::store : Epilogue::scale_add;
        product_of<F>(pv);
    };
    for (int64_t b = 0; b * BLOCK < seen[rows - 1]; ++b) {
        const char* keys = block_at(b);
        const char* ahead = (b + 1) * BLOCK < seen[rows - 1] ? block_at(b + 1) : nullptr;
        if (ahead) request(ahead, half_bytes);
        qk.w = keys;
#if defined(S2D_TILES)
        if (tiles) scores_on_tiles(query, d, keys, scores);
        else product_of<F>(qk);
#else
        product_of<F>(qk);
#endif
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t count = seen[r] - b * BLOCK;  // none or less: this block changes nothing for the row
            float* s = scores + r * BLOCK;
            for (int64_t j = 0; j < BLOCK; ++j) s[j] *= a.scale;
            for (int64_t j = count < 0 ? 0 : count; j < BLOCK; ++j) s[j] = -INFINITY;
            best[r] = greatest(greater(load(s), load(s + LANES)));
            if (b > 0 && highest[r] > best[r]) best[r] = highest[r];
        }
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t count = seen[r] - b * BLOCK;
            float* s = scores + r * BLOCK;
            for (int64_t j = 0; j < BLOCK; ++j) s[j] = exponential(s[j] - best[r]);
            for (int64_t j = count < 0 ? 0 : count; j < BLOCK; ++j) s[j] = 0.0f;
            mass[r] = sum(add(load(s), load(s + LANES)));
        }
        if (ahead) request(ahead + half_bytes, half_bytes);
        for (int64_t r = 0; r < rows; ++r) {
            rescale[r] = b == 0 ? 0.0f : exponential(highest[r] - best[r]);
            total[r] = b == 0 ? mass[r] : madd(total[r], rescale[r], mass[r]);
            highest[r] = best[r];
        }
#if defined(S2D_PACKED)
        if (rounds) round_rows(scores, rows, BLOCK, probs);
#endif
        if (seen[0] >= (b + 1) * BLOCK) {
            add_values(b, 0, rows, BLOCK, keys + half_bytes);
            continue;
        }
        for (int64_t first = 0; first < rows; first += a.group) {
            const int64_t count = seen[first] - b * BLOCK;
            if (count > 0) add_values(b, first, a.group, count < BLOCK ? count : BLOCK, keys + half_bytes);
        }
    }
#if defined(S2D_TILES)
    if (tiles) _tile_release();
#endif
    for (int64_t r = 0; r < rows; ++r) {
        const float inverse = 1.0f / total[r];
        float* to = a.out + r / a.group * a.ldout + r % a.group * d;
        for (int64_t i = 0; i < d; ++i) to[i] = out[r * d + i] * inverse;
    }
}

void attention(const Attention& a) {
    if (a.bf16) attention_of<Format::bf16>(a);
    else attention_of<Format::float32>(a);
}
