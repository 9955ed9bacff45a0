// bfloat16 weights in 12 bits each, without loss, for products that are limited by memory.
//
// Of a bfloat16 the low byte (the exponent's last bit and the mantissa) is kept as it is. The high byte (sign and the
// rest of the exponent) is one of few: weights of a matrix are of like magnitude. Each output group has a table of 16
// high bytes, and 4 bits say which. The first is 0, so that the value 0 always can be had; the others are the most
// frequent of the group. A weight with another high byte is stored as 0 and listed as an exception, which is added to
// the sum at the end (SmolLM2-135M: one in 22,000). A group with too many of them cannot be packed.
//
// A chunk has 8 inputs of 16 outputs, four lines of pairs as in the layout of bfloat16: 64 low bytes of the first two
// lines, 64 of the others, then 64 bytes of codes, the first two lines in the low halves. Bytes are ordered so that
// interleaving low and high bytes within 128-bit lanes gives the lines (_mm512_unpacklo_epi8).
#pragma once

#include <algorithm>
#include <array>

#include "layout.h"

namespace s2d {

// What follows the chunks of a group.
struct Trailer {
    uint8_t table[16];
    uint32_t count;
    uint32_t unused[3];
    // then uint32_t places[most_exceptions(k)], input * 16 + output, and uint16_t values[most_exceptions(k)]
};
static_assert(sizeof(Trailer) == 32);

// Where the low byte of one weight lies in its chunk. Its code lies 128 bytes from there in a chunk's first two lines,
// 64 bytes in the others.
inline int64_t packed_at(int64_t input, int64_t lane) {
    const int64_t line = input % 8 / 2, word = lane * 2 + input % 2;
    return line / 2 * 64 + word / 8 * 16 + line % 2 * 8 + word % 8;
}

// Writes one group from rows [n, k] of bfloat16 bits, in memory that is zero. Returns whether it could be packed.
inline bool pack_group(const uint16_t* rows, int64_t n, int64_t k, int64_t first_row, char* out) {
    const int64_t lanes = std::min(LANES, n - first_row);
    std::array<int64_t, 256> counts{};
    for (int64_t lane = 0; lane < lanes; ++lane) {
        const uint16_t* row = rows + (first_row + lane) * k;
        for (int64_t i = 0; i < k; ++i) ++counts[row[i] >> 8];
    }
    std::array<int32_t, 256> order;
    for (int32_t i = 0; i < 256; ++i) order[static_cast<size_t>(i)] = i;
    std::stable_sort(order.begin() + 1, order.end(), [&](int32_t a, int32_t b) {
        return counts[static_cast<size_t>(a)] > counts[static_cast<size_t>(b)];
    });
    Trailer trailer{};
    std::array<int32_t, 256> codes;
    codes.fill(-1);
    for (int32_t code = 0; code < 16; ++code) {
        trailer.table[code] = static_cast<uint8_t>(order[static_cast<size_t>(code)]);
        codes[trailer.table[code]] = code;
    }
    char* const end = out + chunks(k) * CHUNK_BYTES;
    uint32_t* places = reinterpret_cast<uint32_t*>(end + sizeof(Trailer));
    uint16_t* values = reinterpret_cast<uint16_t*>(places + most_exceptions(k));
    for (int64_t lane = 0; lane < lanes; ++lane) {
        const uint16_t* row = rows + (first_row + lane) * k;
        for (int64_t i = 0; i < k; ++i) {
            const int32_t code = codes[row[i] >> 8];
            if (code < 0) {
                if (trailer.count == most_exceptions(k)) return false;
                places[trailer.count] = static_cast<uint32_t>(i * LANES + lane);
                values[trailer.count++] = row[i];
                continue;
            }
            char* at = out + i / 8 * CHUNK_BYTES + packed_at(i, lane);
            at[0] = static_cast<char>(row[i] & 255);
            if (i % 8 < 4) at[128] = static_cast<char>(at[128] | code);
            else at[64] = static_cast<char>(at[64] | code << 4);
        }
    }
    memcpy(end, &trailer, sizeof trailer);
    return true;
}

// Writes one group of a blocked matrix in any format, from rows of float32 or bfloat16 bits (those are kept as they
// are, quantised or packed). Returns false where it cannot be packed.
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

}  // namespace s2d
