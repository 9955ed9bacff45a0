// One matrix by itself, for layers of any architecture: blocked once, multiplied by a team of threads that all
// such matrices of the process share.
#pragma once

#include "weights.h"

namespace s2d {

class Linear {
public:
    // Throws NotPackable and std::bad_alloc.
    Linear(const void* rows, bool bf16, const float* bias, int64_t n, int64_t k, Format format, int threads,
           const Kernels& kernels);

    void run(const float* x, int64_t rows, float* y) const;

private:
    const Kernels& kernels_;
    const std::shared_ptr<Pool> pool_;
    const Format format_;
    const int64_t n_, k_;
    Arena weights_;
    char* matrix_;
    float* bias_ = nullptr;
};

}  // namespace s2d
