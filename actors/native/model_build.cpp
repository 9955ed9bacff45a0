// Taking weights in.
#include <algorithm>

#include "model.h"

namespace s2d {
namespace {

int64_t weight_room(const Shape& s) {
    const Format format = s.format();
    const auto vector = [](int64_t n) { return static_cast<int64_t>(Arena::round(static_cast<size_t>(n) * 4)); };
    const int64_t layer = matrix_bytes(s.qkv(), s.hidden, format) + matrix_bytes(s.hidden, s.heads * s.head_dim, format) +
                          matrix_bytes(2 * s.intermediate, s.hidden, format) +
                          matrix_bytes(s.hidden, s.intermediate, format) + 2 * vector(s.hidden) + vector(s.qkv()) +
                          2 * vector(s.head_dim);
    return s.layers * layer + matrix_bytes(s.vocab, s.hidden, format) + vector(s.hidden) +
           2 * vector(s.max_position * (s.head_dim / 2));
}

}  // namespace

Model::Model(const Shape& shape, int threads, const Kernels& kernels)
    : shape_(shape),
      kernels_(kernels),
      team_(shared_pool(threads)),
      pool_(*team_),
      head_bytes_(2 * BLOCK * shape.head_dim * (shape.bf16 ? 2 : 4)),
      block_bytes_(head_bytes_ * shape.kv_heads),
      weights_(static_cast<size_t>(weight_room(shape))),
      kv_(static_cast<size_t>(shape.layers * shape.blocks * block_bytes_)),
      layers_(static_cast<size_t>(shape.layers)),
      paths_(static_cast<size_t>(pool_.threads())),
      tails_(static_cast<size_t>(pool_.threads())),
      own_normed_(static_cast<size_t>(pool_.threads())),
      own_converted_(static_cast<size_t>(pool_.threads())) {}

// which: 0 qkv, 1 o, 2 gate_up, 3 down, 4 head. Throws NotPackable.
void Model::set_matrix(int64_t layer, int64_t which, const void* rows) {
    const Shape& s = shape_;
    const int64_t n = which == 0 ? s.qkv() : which == 2 ? 2 * s.intermediate : which == 4 ? s.vocab : s.hidden;
    const int64_t k = which == 1 ? s.heads * s.head_dim : which == 3 ? s.intermediate : s.hidden;
    char* out = weights_.take<char>(static_cast<size_t>(matrix_bytes(n, k, s.format())));
    put_matrix(pool_, kernels_, rows, s.bf16 != 0, n, k, s.format(), out, [&](int64_t group) {
        // gate and up groups in turn, so that one thread holds both halves of what it activates
        return (which == 2 ? group % 2 * (n / 2 / LANES) + group / 2 : group) * LANES;
    });
    if (which == 4) {
        head_ = out;
    } else {
        Layer& l = layers_[static_cast<size_t>(layer)];
        (which == 0 ? l.qkv : which == 1 ? l.o : which == 2 ? l.gate_up : l.down) = out;
    }
}

// which: 0 input_norm, 1 post_norm, 2 qkv bias, 3 q_norm, 4 k_norm, 5 final_norm, 6 cos table, 7 sin table.
void Model::set_vector(int64_t layer, int64_t which, const float* values) {
    const Shape& s = shape_;
    const int64_t n = which == 2                 ? s.qkv()
                      : which == 3 || which == 4 ? s.head_dim
                      : which >= 6               ? s.max_position * (s.head_dim / 2)
                                                 : s.hidden;
    float* out = weights_.take<float>(static_cast<size_t>(n) * sizeof(float));
    std::copy(values, values + n, out);
    if (which >= 5) {
        (which == 5 ? final_norm_ : which == 6 ? cos_ : sin_) = out;
    } else {
        Layer& l = layers_[static_cast<size_t>(layer)];
        (which == 0 ? l.input_norm : which == 1 ? l.post_norm : which == 2 ? l.bias : which == 3 ? l.q_norm : l.k_norm) = out;
    }
}

}  // namespace s2d
