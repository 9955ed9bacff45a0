// Taking weights in. Matrices are the caller's, blocked already (weights.h); vectors are copied.
#include <algorithm>

#include "model.h"

namespace s2d {
namespace {

int64_t vector_room(const Shape& s) {
    const auto vector = [](int64_t n) { return static_cast<int64_t>(Arena::round(static_cast<size_t>(n) * 4)); };
    const int64_t layer = 2 * vector(s.hidden) + vector(s.qkv()) + 2 * vector(s.head_dim);
    return s.layers * layer + vector(s.hidden) + 2 * vector(s.max_position * (s.head_dim / 2));
}

}  // namespace

Model::Model(const Shape& shape, int threads, const Kernels& kernels)
    : shape_(shape),
      kernels_(kernels),
      team_(shared_pool(threads)),
      pool_(*team_),
      head_bytes_(2 * BLOCK * shape.head_dim * (shape.bf16 ? 2 : 4)),
      block_bytes_(head_bytes_ * shape.kv_heads),
      vectors_(static_cast<size_t>(vector_room(shape))),
      kv_(static_cast<size_t>(shape.layers * shape.blocks * block_bytes_)),
      layers_(static_cast<size_t>(shape.layers)),
      embeddable_(shape.vocab),
      paths_(static_cast<size_t>(pool_.threads())),
      tails_(static_cast<size_t>(pool_.threads())),
      own_normed_(static_cast<size_t>(pool_.threads())),
      own_converted_(static_cast<size_t>(pool_.threads())) {}

// which: 0 qkv, 1 o, 2 gate_up (in halves), 3 down, 4 head.
void Model::set_matrix(int64_t layer, int64_t which, const char* matrix) {
    const Shape& s = shape_;
    const int64_t n = which == 0 ? s.qkv() : which == 2 ? 2 * s.intermediate : which == 4 ? s.vocab : s.hidden;
    const int64_t k = which == 1 ? s.heads * s.head_dim : which == 3 ? s.intermediate : s.hidden;
    matrices_.emplace_back(matrix, matrix_bytes(n, k, s.format()));
    if (which == 4) {
        head_ = matrix;
    } else {
        Layer& l = layers_[static_cast<size_t>(layer)];
        (which == 0 ? l.qkv : which == 1 ? l.o : which == 2 ? l.gate_up : l.down) = matrix;
    }
}

// which: 0 input_norm, 1 post_norm, 2 qkv bias, 3 q_norm, 4 k_norm, 5 final_norm, 6 cos table, 7 sin table.
void Model::set_vector(int64_t layer, int64_t which, const float* values) {
    const Shape& s = shape_;
    const int64_t n = which == 2                 ? s.qkv()
                      : which == 3 || which == 4 ? s.head_dim
                      : which >= 6               ? s.max_position * (s.head_dim / 2)
                                                 : s.hidden;
    float* out = vectors_.take<float>(static_cast<size_t>(n) * sizeof(float));
    std::copy(values, values + n, out);
    if (which >= 5) {
        (which == 5 ? final_norm_ : which == 6 ? cos_ : sin_) = out;
    } else {
        Layer& l = layers_[static_cast<size_t>(layer)];
        (which == 0 ? l.input_norm : which == 1 ? l.post_norm : which == 2 ? l.bias : which == 3 ? l.q_norm : l.k_norm) = out;
    }
}

}  // namespace s2d
