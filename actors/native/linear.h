// One matrix by itself, for layers of any architecture: blocked once, multiplied by a team of threads that all
// such matrices of the process share.
#pragma once

#include <memory>
#include <mutex>

#include "packed.h"
#include "pool.h"

namespace s2d {

class Linear {
public:
    Linear(const void* rows, bool bf16, const float* bias, int64_t n, int64_t k, Format format, int threads,
           const Kernels& kernels);

    // false where the weights cannot be packed as asked; the matrix is then of no use
    bool usable() const { return usable_; }
    void run(const float* x, int64_t rows, float* y) const;

private:
    const Kernels& kernels_;
    const std::shared_ptr<Pool> pool_;
    const Format format_;
    const int64_t n_, k_;
    Arena weights_;
    char* matrix_;
    float* bias_ = nullptr;
    bool usable_ = true;
};

}  // namespace s2d
