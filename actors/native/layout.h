// Where things lie in memory: aligned memory, blocked weights, KV blocks.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <new>

#include "kernels.h"

namespace s2d {

// Zeroed memory that starts at a multiple of 2 MiB and asks for huge pages, handed out in 64-byte steps. Pages
// are taken from the system when first written.
class Arena {
public:
    explicit Arena(size_t bytes) : mapped_(bytes + HUGE) {
        void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        map_ = static_cast<char*>(p);
        base_ = map_ + (HUGE - reinterpret_cast<uintptr_t>(map_) % HUGE) % HUGE;
        size_ = bytes;
#if defined(MADV_HUGEPAGE)
        madvise(base_, bytes, MADV_HUGEPAGE);
#endif
    }
    ~Arena() { munmap(map_, mapped_); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    static size_t round(size_t bytes) { return (bytes + 63) / 64 * 64; }

    template <typename T>
    T* take(size_t bytes) {
        bytes = round(bytes);
        if (used_ + bytes > size_) throw std::bad_alloc();
        char* p = base_ + used_;
        used_ += bytes;
        return reinterpret_cast<T*>(p);
    }
    const char* data() const { return base_; }
    char* data() { return base_; }
    size_t used() const { return used_; }

private:
    static constexpr size_t HUGE = size_t{2} << 20;
    size_t mapped_, size_ = 0, used_ = 0;
    char* map_ = nullptr;
    char* base_ = nullptr;
};

// A growing array of floats, 64-byte aligned. Growing loses the contents.
class Scratch {
public:
    Scratch() = default;
    ~Scratch() { free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    float* reserve(int64_t count) {
        if (count > count_) {
            free(data_);
            count_ = 0;
            data_ = static_cast<float*>(aligned_alloc(64, Arena::round(static_cast<size_t>(count) * sizeof(float))));
            if (!data_) throw std::bad_alloc();
            count_ = count;
        }
        return data_;
    }
    float* data() const { return data_; }

private:
    float* data_ = nullptr;
    int64_t count_ = 0;
};

inline int64_t groups_of(int64_t n) { return (n + LANES - 1) / LANES; }
inline int64_t matrix_bytes(int64_t n, int64_t k, Format format) { return groups_of(n) * group_bytes(k, format); }

// The part of `count` things that a thread of a team works on.
inline void share(int64_t count, int thread, int threads, int64_t& begin, int64_t& end) {
    begin = count * thread / threads;
    end = count * (thread + 1) / threads;
}

// Of `count` parts of a product of few rows, how many are a piece of work (`Pool::divide`): a thread that has one is
// not interrupted for longer than it takes. With many rows, what a piece repeats would cost more.
inline int64_t piece_of(int64_t count, int64_t rows, int64_t part_bytes) {
    constexpr int64_t SOME_ROWS = 64, BYTES = 192 << 10, LEAST = 4;
    return rows > SOME_ROWS ? count : BYTES / part_bytes < LEAST ? LEAST : BYTES / part_bytes / LEAST * LEAST;
}

// Writes one group of a blocked matrix from rows [n, k]; rows from n on are left as they are (zero).
template <typename T>
void block_group(const T* rows, int64_t n, int64_t k, int64_t first_row, T* out) {
    constexpr int64_t PER_WORD = 4 / sizeof(T);
    for (int64_t lane = 0; lane < LANES && first_row + lane < n; ++lane) {
        const T* row = rows + (first_row + lane) * k;
        for (int64_t i = 0; i < k; ++i) out[(i / PER_WORD * LANES + lane) * PER_WORD + i % PER_WORD] = row[i];
    }
}

inline uint16_t to_bf16(float x) {  // to nearest even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float from_bf16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
inline void convert(float x, float& to) { to = x; }
inline void convert(float x, uint16_t& to) { to = to_bf16(x); }
inline float widen(float x) { return x; }
inline float widen(uint16_t x) { return from_bf16(x); }

// The same for int8: values rounded to the nearest multiple of the scale of their unit and output.
template <typename T>
void quantize_group(const T* rows, int64_t n, int64_t k, int64_t first_row, char* out) {
    for (int64_t lane = 0; lane < LANES && first_row + lane < n; ++lane) {
        for (int64_t first = 0; first < k; first += UNIT) {
            const T* row = rows + (first_row + lane) * k + first;
            const int64_t count = k - first < UNIT ? k - first : UNIT;
            char* unit = out + first / UNIT * UNIT_BYTES;
            float top = 0.0f;
            for (int64_t i = 0; i < count; ++i) top = fmaxf(top, fabsf(widen(row[i])));
            if (!(top >= TINY)) continue;  // the scale stays zero
            reinterpret_cast<float*>(unit + UNIT_BYTES - 64)[lane] = top / 127.0f;
            const float factor = 127.0f / top;
            for (int64_t i = 0; i < count; ++i) {
                unit[(i / 4 * LANES + lane) * 4 + i % 4] = static_cast<char>(lrintf(widen(row[i]) * factor) + 128);
            }
        }
    }
}

// The KV of one head in one block: K then V, both as blocked weights. K has the 32 slots as outputs and head_dim
// inputs (scores = q K^T), V has head_dim outputs and the 32 slots as inputs (out = p V).
template <typename T>
struct HeadBlock {
    static constexpr int64_t PER_WORD = 4 / sizeof(T);

    static int64_t bytes(int64_t head_dim) { return 2 * BLOCK * head_dim * static_cast<int64_t>(sizeof(T)); }
    static int64_t key(int64_t slot, int64_t d, int64_t head_dim) {
        return (slot / LANES * head_dim + d / PER_WORD * PER_WORD) * LANES + slot % LANES * PER_WORD + d % PER_WORD;
    }
    static int64_t value(int64_t slot, int64_t d, int64_t head_dim) {
        return BLOCK * head_dim + (d / LANES * BLOCK + slot / PER_WORD * PER_WORD) * LANES + d % LANES * PER_WORD +
               slot % PER_WORD;
    }
    static void write(T* block, int64_t slot, const float* k, const float* v, int64_t head_dim) {
        for (int64_t d = 0; d < head_dim; ++d) {
            convert(k[d], block[key(slot, d, head_dim)]);
            convert(v[d], block[value(slot, d, head_dim)]);
        }
    }
    static void copy(const T* from, int64_t source, T* to, int64_t target, int64_t head_dim) {
        for (int64_t d = 0; d < head_dim; ++d) {
            to[key(target, d, head_dim)] = from[key(source, d, head_dim)];
            to[value(target, d, head_dim)] = from[value(source, d, head_dim)];
        }
    }
};

}  // namespace s2d
