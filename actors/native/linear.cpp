#include "linear.h"

#include <algorithm>

namespace s2d {

Linear::Linear(const void* rows, bool bf16, const float* bias, int64_t n, int64_t k, Format format, int threads,
               const Kernels& kernels)
    : kernels_(kernels),
      pool_(shared_pool(threads)),
      format_(format),
      n_(n),
      k_(k),
      weights_(static_cast<size_t>(matrix_bytes(n, k, format)) + Arena::round(static_cast<size_t>(n) * sizeof(float))),
      matrix_(weights_.take<char>(static_cast<size_t>(matrix_bytes(n, k, format)))) {
    put_matrix(*pool_, kernels, rows, bf16, n, k, format, matrix_, [](int64_t group) { return group * LANES; });
    if (bias) {
        bias_ = weights_.take<float>(static_cast<size_t>(n) * sizeof(float));
        std::copy(bias, bias + n, bias_);
    }
}

void Linear::run(const float* x, int64_t rows, float* y) const {
    if (rows == 0) return;
    const int64_t bytes = converted_bytes(k_, format_);
    Scratch buffer;
    char* const converted = bytes ? reinterpret_cast<char*>(buffer.reserve(rows * bytes / 4)) : nullptr;
    pool_->parallel([&](int thread, int threads) {
        if (converted) {
            int64_t begin, end;
            share(rows, thread, threads, begin, end);
            for (int64_t r = begin; r < end; ++r) kernels_.convert(x + r * k_, k_, format_, converted + r * bytes);
            pool_->barrier();
        }
        const int64_t groups = groups_of(n_), group = group_bytes(k_, format_);
        pool_->divide(groups, rows, group, thread, threads, [&](int64_t begin, int64_t end, bool again) {
            kernels_.product({x, k_, rows, matrix_, group, format_, k_, n_, begin, end, y, n_, bias_, nullptr,
                              Epilogue::store, {converted, bytes}, again});
        });
    });
}

}  // namespace s2d
