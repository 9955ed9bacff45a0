// The C interface of the native core, called by actors/native/library.py through ctypes. Nothing here throws.
#include <algorithm>
#include <new>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "linear.h"
#include "model.h"

#define S2D_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace s2d;

#if defined(__x86_64__)
// Whether the processor has AMX and the system lets this process use it: Linux wants to be asked, once a process.
bool amx_permitted() {
    static const bool permitted = [] {
        constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25, WANTED = BF16 | TILE | INT8;
        constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // asm/prctl.h, newer than some headers
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & WANTED) != WANTED) return false;
        return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    }();
    return permitted;
}
#endif

// isa: 0 the best that this machine has, 1 plain, 2 avx2, 3 avx512, 4 amx, 5 avx512_bf16. Null where the machine lacks it.
const Kernels* choose(int32_t isa) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    const bool amx = bf16 && (isa == 0 || isa == 4) && amx_permitted();
    if (isa == 4 || (isa == 0 && amx)) return amx ? &amx_kernels() : nullptr;
    if (isa == 5 || (isa == 0 && bf16)) return bf16 ? &avx512_bf16_kernels() : nullptr;
    if (isa == 3 || (isa == 0 && avx512)) return avx512 ? &avx512_kernels() : nullptr;
    if (isa == 2 || (isa == 0 && avx2)) return avx2 ? &avx2_kernels() : nullptr;
#else
    if (isa > 1) return nullptr;
#endif
    return &plain_kernels();
}

template <typename Body>
int32_t guarded(Body&& body) {
    try {
        return body();
    } catch (const NotPackable&) {
        return NOT_PACKABLE;
    } catch (...) {  // only memory can run out
        return NO_MEMORY;
    }
}

}  // namespace

// Raised whenever a signature below changes.
S2D_API int32_t s2d_abi_version() { return 9; }

// Raised whenever a blocked matrix (kernels.h, packed.h) of the same rows has other bytes: they are kept in files.
S2D_API int32_t s2d_layout_version() { return 1; }

S2D_API const char* s2d_isa_name(int32_t isa) {
    const Kernels* kernels = choose(isa);
    return kernels ? kernels->name : nullptr;
}

// Whether it has products over packed weights.
S2D_API int32_t s2d_packs(int32_t isa) {
    const Kernels* kernels = choose(isa);
    return kernels && kernels->packs;
}

S2D_API void* s2d_create(const Shape* shape, int32_t threads, int32_t isa) {
    const Kernels* kernels = choose(isa);
    if (!kernels) return nullptr;
    try {
        return new Model(*shape, threads, *kernels);
    } catch (...) {
        return nullptr;
    }
}

S2D_API void s2d_destroy(void* model) { delete static_cast<Model*>(model); }

// Bytes of a blocked matrix [n, k] in a format of kernels.h.
S2D_API int64_t s2d_matrix_bytes(int64_t n, int64_t k, int32_t format) {
    return matrix_bytes(n, k, static_cast<Format>(format));
}

// Writes a blocked matrix, from rows [n, k] of float32 or bfloat16 bits, to memory that is zero; see put_matrix.
S2D_API int32_t s2d_put_matrix(const void* rows, int32_t bf16, int64_t n, int64_t k, int32_t format, int32_t halves,
                               int32_t threads, char* out) {
    return guarded([&] {
        put_matrix(*shared_pool(threads), rows, bf16 != 0, n, k, static_cast<Format>(format), halves != 0, out);
        return OK;
    });
}

S2D_API int32_t s2d_set_matrix(void* model, int64_t layer, int64_t which, const char* matrix) {
    return guarded([&] { return static_cast<Model*>(model)->set_matrix(layer, which, matrix), OK; });
}

S2D_API int32_t s2d_set_vector(void* model, int64_t layer, int64_t which, const float* values) {
    return guarded([&] { return static_cast<Model*>(model)->set_vector(layer, which, values), OK; });
}

S2D_API void s2d_set_table(void* model, const void* rows, int64_t count) {
    static_cast<Model*>(model)->set_table(rows, count);
}

S2D_API int32_t s2d_forward(void* model, const int64_t* ids, const Batch* batch, const int64_t* rows, int64_t count,
                            float* states, float* out) {
    return guarded([&] { return static_cast<Model*>(model)->forward(ids, *batch, rows, count, states, out); });
}

S2D_API int32_t s2d_embed(void* model, const int64_t* ids, int64_t count, float* out) {
    return guarded([&] { return static_cast<Model*>(model)->embed(ids, count, out); });
}

S2D_API int32_t s2d_run_layers(void* model, float* hidden, int64_t first, int64_t last, const Batch* batch) {
    return guarded([&] { return static_cast<Model*>(model)->run_layers(hidden, first, last, *batch); });
}

S2D_API int32_t s2d_logits(void* model, const float* hidden, int64_t rows, float* out) {
    return guarded([&] { return static_cast<Model*>(model)->logits(hidden, rows, out); });
}

S2D_API int32_t s2d_draft_chain(void* model, int64_t last, const Batch* batch, const Chain* chain) {
    return guarded([&] { return static_cast<Model*>(model)->draft_chain(last, *batch, *chain); });
}

S2D_API int32_t s2d_copy_slots(void* model, const int64_t* source, const int64_t* target, int64_t count) {
    return guarded([&] { return static_cast<Model*>(model)->copy_slots(source, target, count); });
}

S2D_API int64_t s2d_weight_bytes(void* model) { return static_cast<Model*>(model)->weight_bytes(); }

S2D_API float s2d_read_weights(void* model) { return static_cast<Model*>(model)->read_weights(); }

// A blocked matrix [n, k] by itself, which stays the caller's, and a bias [n] or null. Null where there is no such
// instruction set or no memory.
S2D_API void* s2d_linear_create(const char* matrix, const float* bias, int64_t n, int64_t k, int32_t format,
                                int32_t threads, int32_t isa) {
    const Kernels* kernels = choose(isa);
    if (!kernels) return nullptr;
    try {
        return new Linear(matrix, bias, n, k, static_cast<Format>(format), threads, *kernels);
    } catch (...) {
        return nullptr;
    }
}

S2D_API void s2d_linear_destroy(void* linear) { delete static_cast<Linear*>(linear); }

// y [rows, n] = x [rows, k] w^T + bias.
S2D_API int32_t s2d_linear_run(void* linear, const float* x, int64_t rows, float* y) {
    return guarded([&] { return static_cast<Linear*>(linear)->run(x, rows, y), OK; });
}

// The same for rows x[0] .. x[rows - 1] of [k], each divided by the root of its mean square and `eps` first.
S2D_API int32_t s2d_linear_run_normalised(void* linear, const float* const* x, int64_t rows, float eps, float* y) {
    return guarded([&] { return static_cast<Linear*>(linear)->run_normalised(x, rows, eps, y), OK; });
}

// Gumbel noise -log(-log1p(-w)), w = min((x + 1/2) 2^-32, 1 - 2^-24), x the uint32 of Philox4x32-10 with counter
// (v >> 2, low32(position), high32(position), stream) and lane v & 3: the contract of actors/sampling/noise.py.
// v = ids[i], or i where ids is null. One thread.
S2D_API int32_t s2d_gumbel(int32_t isa, uint64_t key, int64_t position, uint32_t stream, const int64_t* ids, int64_t n,
                           float* out) {
    const Kernels* kernels = choose(isa);
    if (!kernels) return BAD_RANGE;
    kernels->gumbel(key, position, stream, ids, n, out);
    return OK;
}

// The k (at most MAX_TOP) best values of each row [n, v] in float32, best first, equal ones by lower index. Rows with
// fewer than k numbers (NaN is none) are filled up with index -1 and value -infinity.
S2D_API int32_t s2d_topk(int32_t isa, const float* rows, int64_t n, int64_t v, int64_t k, int64_t* index, float* value) {
    const Kernels* kernels = choose(isa);
    if (!kernels || k < 1 || k > MAX_TOP) return BAD_RANGE;
    for (int64_t r = 0; r < n; ++r) {
        const int64_t held = kernels->topk(rows + r * v, v, k, index + r * k, value + r * k);
        for (int64_t i = held; i < k; ++i) {
            index[r * k + i] = -1;
            value[r * k + i] = -__builtin_inff();
        }
    }
    return OK;
}

// The index of the greatest value of each row, the first of equal ones; 0 for a row of NaN.
S2D_API int32_t s2d_argmax(int32_t isa, const float* rows, int64_t n, int64_t v, int64_t* out) {
    const Kernels* kernels = choose(isa);
    if (!kernels) return BAD_RANGE;
    for (int64_t r = 0; r < n; ++r) out[r] = kernels->argmax(rows + r * v, v);
    return OK;
}
