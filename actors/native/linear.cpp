#include "linear.h"

#include <cmath>

namespace s2d {

Linear::Linear(const char* matrix, const float* bias, int64_t n, int64_t k, Format format, int threads,
               const Kernels& kernels)
    : kernels_(kernels),
      pool_(shared_pool(threads)),
      format_(format),
      n_(n),
      k_(k),
      matrix_(matrix) {
    if (bias) bias_.assign(bias, bias + n);
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
            kernels_.product({x, k_, rows, matrix_, group, format_, k_, n_, begin, end, y, n_, bias_.empty() ? nullptr : bias_.data(), nullptr,
                              Epilogue::store, {converted, bytes}, again});
        });
    });
}

void Linear::run_normalised(const float* const* x, int64_t rows, float eps, float* y) const {
    std::vector<float> normed(static_cast<size_t>(rows * k_));
    for (int64_t r = 0; r < rows; ++r) {
        double squares = 0;
        for (int64_t i = 0; i < k_; ++i) squares += static_cast<double>(x[r][i]) * x[r][i];
        const float factor = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(k_)) + eps);
        for (int64_t i = 0; i < k_; ++i) normed[static_cast<size_t>(r * k_ + i)] = x[r][i] * factor;
    }
    run(normed.data(), rows, y);
}

}  // namespace s2d
