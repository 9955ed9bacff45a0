// Position-keyed noise and selection of the best entries of a row. Included by kernels_impl.h.

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
    const double k = as_double((((offset >> 52) + 1024u) & 0xfffu) | 0x4330000000000000u) - (0x1p52 + 1024.0);
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
    const double w = (as_double(x | 0x4330000000000000u) - 0x1p52 + 0.5) * 0x1p-32;
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

void probabilities(const float* row, int64_t n, float* values, int64_t count) {
    if (count == 0) return;
    const float most = values[0];
    float sums[LANES] = {}, total = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int64_t j = 0; j < LANES; ++j) sums[j] += exponential(row[i + j] - most);
    }
    for (; i < n; ++i) total += exponential(row[i] - most);
    for (const float sum : sums) total += sum;
    for (i = 0; i < count; ++i) values[i] = exponential(values[i] - most) / total;
}

int64_t argmax(const float* row, int64_t n) {
    int64_t index[1] = {0};
    float value[1];
    topk(row, n, 1, index, value);
    return index[0];
}
