// Blocked matrices in any format: how they are written. Their memory is the caller's.
#pragma once

#include <atomic>

#include "packed.h"
#include "pool.h"

namespace s2d {

// Thrown where weights cannot be packed as asked.
struct NotPackable {};

// Writes one group from rows of float32 or bfloat16 bits (those are kept as they are, quantised or packed). Returns
// false where it cannot be packed.
inline bool put_group(const void* rows, bool bf16, int64_t n, int64_t k, int64_t first_row, Format format, char* out) {
    if (format == Format::packed) return pack_group(static_cast<const uint16_t*>(rows), n, k, first_row, out);
    if (format == Format::int8) {
        if (bf16) quantize_group(static_cast<const uint16_t*>(rows), n, k, first_row, out);
        else quantize_group(static_cast<const float*>(rows), n, k, first_row, out);
    } else if (bf16) {
        block_group(static_cast<const uint16_t*>(rows), n, k, first_row, reinterpret_cast<uint16_t*>(out));
    } else {
        block_group(static_cast<const float*>(rows), n, k, first_row, reinterpret_cast<float*>(out));
    }
    return true;
}

// Writes a matrix [n, k] to memory that is zero. `halves`: groups of the first and the second half of the rows in turn,
// so that one thread holds both halves of what it activates (gate and up). Throws NotPackable.
inline void put_matrix(Pool& pool, const void* rows, bool bf16, int64_t n, int64_t k, Format format, bool halves,
                       char* out) {
    std::atomic<bool> fits{format != Format::packed || bf16};
    pool.parallel([&](int thread, int threads) {
        int64_t begin, end;
        share(groups_of(n), thread, threads, begin, end);
        for (int64_t g = begin; g < end && fits; ++g) {
            const int64_t from = halves ? g % 2 * (n / 2 / LANES) + g / 2 : g;
            if (!put_group(rows, bf16, n, k, from * LANES, format, out + g * group_bytes(k, format))) fits = false;
        }
    });
    if (!fits) throw NotPackable{};
}

}  // namespace s2d
