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
    V squares[4] = {zero_all(), zero_all(), zero_all(), zero_all()};
    for (int64_t i = 0; i < n; i += LANES) {
        const V v = load_all(x + i);
        squares[i / LANES % 4] = fma(v, v, squares[i / LANES % 4]);
    }
    const float total = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    const V factor = spread_all(1.0f / sqrtf(total / static_cast<float>(n) + eps));
    for (int64_t i = 0; i < n; i += LANES) store(out + i, mul(load_all(weight + i), mul(load_all(x + i), factor)));
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

// The online softmax of a few rows.
template <Format F>
struct Softmax {
    explicit Softmax(const Attention& attention) : a(attention) {}

    const Attention& a;
    const int64_t half_bytes = BLOCK * a.head_dim * (F == Format::bf16 ? 2 : 4);
    alignas(64) float scores[MAX_GROUP * BLOCK];  // uninitialised, as all that follows
    float highest[MAX_GROUP], total[MAX_GROUP], best[MAX_GROUP], mass[MAX_GROUP], rescale[MAX_GROUP];

    // Rows begin..end-1 see the first `count` keys of a block, their first or a later one.
    void block(int64_t begin, int64_t end, const char* keys, int64_t count, bool first) {
        const int64_t d = a.head_dim;
        product_of<F>({a.q + begin * d, d, end - begin, keys, group_bytes(d, F), F, d, BLOCK, 0, BLOCK / LANES,
                       scores + begin * BLOCK, BLOCK, nullptr, nullptr, Epilogue::store});
        for (int64_t r = begin; r < end; ++r) {
            float* s = scores + r * BLOCK;
            for (int64_t j = 0; j < BLOCK; ++j) s[j] *= a.scale;
            if (count < BLOCK) {
                for (int64_t j = count; j < BLOCK; ++j) s[j] = -INFINITY;
            }
            best[r] = greatest(s);
            if (!first && highest[r] > best[r]) best[r] = highest[r];
        }
        for (int64_t r = begin; r < end; ++r) {
            float* s = scores + r * BLOCK;
            for (int64_t j = 0; j < BLOCK; ++j) s[j] = exponential(s[j] - best[r]);
            if (count < BLOCK) {
                for (int64_t j = count; j < BLOCK; ++j) s[j] = 0.0f;
            }
            mass[r] = sum(add(load_all(s), load_all(s + LANES)));
        }
        for (int64_t r = begin; r < end; ++r) {
            rescale[r] = first ? 0.0f : exponential(highest[r] - best[r]);
            total[r] = first ? mass[r] : madd(total[r], rescale[r], mass[r]);
            highest[r] = best[r];
        }
        product_of<F>({scores + begin * BLOCK, BLOCK, end - begin, keys + half_bytes, group_bytes(BLOCK, F), F, count,
                       d, 0, d / LANES, a.out + begin * d, d, nullptr, rescale + begin,
                       first ? Epilogue::store : Epilogue::scale_add});
    }
};

template <Format F>
void attention_of(const Attention& a) {
    Softmax<F> softmax(a);
    const int64_t rows = a.tokens * a.group;
    for (int64_t b = 0; b < a.shared; ++b) {
        softmax.block(0, rows, a.pool + a.block_table[b] * a.block_bytes, BLOCK, b == 0);
    }
    for (int64_t t = 0; t < a.tokens; ++t) {
        const Keys& keys = a.keys[t];
        for (int64_t b = a.shared; b * BLOCK < keys.count; ++b) {
            const int64_t left = keys.count - b * BLOCK;
            const char* at = b < keys.tail_from ? a.pool + a.block_table[b] * a.block_bytes
                                                : keys.tail + (b - keys.tail_from) * 2 * softmax.half_bytes;
            softmax.block(t * a.group, (t + 1) * a.group, at, left < BLOCK ? left : BLOCK, b == 0);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        const float inverse = 1.0f / softmax.total[r];
        for (int64_t i = 0; i < a.head_dim; ++i) a.out[r * a.head_dim + i] *= inverse;
    }
}

void attention(const Attention& a) {
    if (a.bf16) attention_of<Format::bf16>(a);
    else attention_of<Format::float32>(a);
}
