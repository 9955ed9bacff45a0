#include "linear.h"

#include <algorithm>
#include <map>

namespace s2d {
namespace {

// One team a number of threads, as long as a matrix uses it. A pool runs one caller at a time.
std::shared_ptr<Pool> shared_pool(int threads) {
    static std::mutex mutex;
    static std::map<int, std::weak_ptr<Pool>> pools;
    std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<Pool> pool = pools[threads].lock();
    if (!pool) pools[threads] = pool = std::make_shared<Pool>(threads);
    return pool;
}

}  // namespace

Linear::Linear(const void* rows, bool bf16, const float* bias, int64_t n, int64_t k, Format format, int threads,
               const Kernels& kernels)
    : kernels_(kernels),
      pool_(shared_pool(threads)),
      format_(format),
      n_(n),
      k_(k),
      weights_(static_cast<size_t>(matrix_bytes(n, k, format)) + Arena::round(static_cast<size_t>(n) * sizeof(float))),
      matrix_(weights_.take<char>(static_cast<size_t>(matrix_bytes(n, k, format)))) {
    std::atomic<bool> fits{format != Format::packed || (bf16 && kernels.packs)};
    pool_->parallel([&](int thread, int threads_) {
        int64_t begin, end;
        share(groups_of(n), thread, threads_, begin, end);
        for (int64_t g = begin; g < end && fits; ++g) {
            if (!put_group(rows, bf16, n, k, g * LANES, format, matrix_ + g * group_bytes(k, format))) fits = false;
        }
    });
    usable_ = fits;
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
        int64_t begin, end;
        if (converted) {
            share(rows, thread, threads, begin, end);
            for (int64_t r = begin; r < end; ++r) kernels_.convert(x + r * k_, k_, format_, converted + r * bytes);
            pool_->barrier();
        }
        share(groups_of(n_), thread, threads, begin, end);
        kernels_.product({x, k_, rows, matrix_, group_bytes(k_, format_), format_, k_, n_, begin, end, y, n_, bias_,
                          nullptr, Epilogue::store, {converted, bytes}});
    });
}

}  // namespace s2d
