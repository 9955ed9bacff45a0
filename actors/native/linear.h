// One matrix by itself, for layers of any architecture: multiplied by a team of threads that all such matrices of the
// process share.
#pragma once

#include <vector>

#include "weights.h"

namespace s2d {

class Linear {
public:
    // The matrix (weights.h) is the caller's, the bias [n] or null is copied. Throws std::bad_alloc.
    Linear(const char* matrix, const float* bias, int64_t n, int64_t k, Format format, int threads,
           const Kernels& kernels);

    void run(const float* x, int64_t rows, float* y) const;
    // The same for rows that lie apart, each divided by the root of its mean square and `eps` first.
    void run_normalised(const float* const* x, int64_t rows, float eps, float* y) const;

private:
    const Kernels& kernels_;
    const std::shared_ptr<Pool> pool_;
    const Format format_;
    const int64_t n_, k_;
    const char* const matrix_;
    std::vector<float> bias_;
};

}  // namespace s2d
