// A Llama-family decoder with its own paged KV pool.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "weights.h"

namespace s2d {

enum Status : int32_t {
    OK = 0,
    BAD_TOKEN = 1,
    BAD_POSITION = 2,
    BAD_RAGGED = 3,
    BAD_BLOCK = 4,
    BAD_PARENT = 5,
    BAD_SLOT = 6,
    BAD_RANGE = 7,
    NO_MEMORY = 8,
    NOT_PACKABLE = 9,
    BAD_ROW = 10,
};

struct Shape {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, blocks, max_position;
    int32_t bf16, tied;  // bf16: KV pool and embedding table, and what weights come in
    int32_t weights;     // a Format: of all products, the head's included; tied only in the form they come in
    float eps;

    Format format() const { return static_cast<Format>(weights); }
    bool converts() const { return converted_bytes(1, format()) > 0; }
    int64_t widest() const { return std::max({hidden, heads * head_dim, intermediate}); }  // input of a product
    int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

struct Layer {
    const char *qkv = nullptr, *o = nullptr, *gate_up = nullptr, *down = nullptr;
    float *input_norm = nullptr, *post_norm = nullptr, *bias = nullptr, *q_norm = nullptr, *k_norm = nullptr;
};

// The packed tokens of a pass, as actors/models/runner.py's RaggedBatch has them.
struct Batch {
    int64_t tokens, seqs, table_width;
    const int64_t *positions, *query_start, *context_lens;
    const int32_t* tables;
    const int64_t* parents;  // null for chains
};

// Greedy drafts of a batch's sequences, a token after the other: what they begin with, how they end, where they go.
struct Chain {
    const int64_t* tokens;      // of the batch
    const int64_t* added_rows;  // to the embeddings of these of them
    const float* added;         // [added_count][hidden] is added
    int64_t added_count;
    const int64_t* ids;  // the token that a row of the head stands for; null: the row itself
    int64_t most, best;  // the longest draft, and rows wanted a place
    const int64_t* budgets;  // [seqs], 1..most
    const double* floors;    // [seqs]: a draft ends below this probability that all of it is accepted
    int64_t knots;           // of the curve from a token's probability to that of its acceptance; 0: they are equal
    const double *confidence, *acceptance;
    int64_t* drafted;    // [seqs][most][best], tokens
    float* probability;  // [seqs][most][best]
    int64_t* counts;     // [seqs], tokens drafted
    float* states;       // [blocks * BLOCK][hidden], by slot, after the layers, of all tokens run; or null

    double accepted(double share) const;
};

// One token of a pass. Its KV is entry `index` of its sequence; it attends to `keys` entries: the `base` entries
// before the pass, then those of this pass that lead to it.
struct Token {
    const int32_t* table;
    int64_t position, index, base, keys;
    bool straight;  // its entries are 0..index, in order
};

// Rows of a chunk that attend together.
struct Run {
    int64_t row, rows;
};

class Model {
public:
    Model(const Shape& shape, int threads, const Kernels& kernels);

    void set_matrix(int64_t layer, int64_t which, const char* matrix);
    void set_vector(int64_t layer, int64_t which, const float* values);
    void set_table(const void* rows, int64_t count) { table_ = rows, embeddable_ = count; }

    // All of a pass: states [count][hidden] after the layers of tokens `rows`, and their logits [count][vocab].
    Status forward(const int64_t* ids, const Batch& batch, const int64_t* rows, int64_t count, float* states, float* out);
    Status embed(const int64_t* ids, int64_t count, float* out);
    Status run_layers(float* hidden, int64_t first, int64_t last, const Batch& batch);
    Status logits(const float* hidden, int64_t rows, float* out);
    Status draft_chain(int64_t last, const Batch& batch, const Chain& chain);
    Status copy_slots(const int64_t* source, const int64_t* target, int64_t count);
    float read_weights();
    int64_t weight_bytes() const;

private:
    struct Work {
        Scratch normed, qkv, attended, gate_up, active, converted, last, scores, hidden, drafted[2];
    };

    Status prepare(const Batch& batch);
    void keep_states(const float* hidden, const Batch& batch, float* states) const;
    Status draft_step(float* hidden, int64_t last, const Batch& batch, int64_t best, int64_t* index, float* share);
    void run_chunk(float* hidden, int64_t first, int64_t last, int64_t at, int64_t rows, const Batch& batch);
    void write_kv(int64_t layer, int64_t row, int64_t head, const Token& token);
    void find_runs(int64_t at, int64_t rows);
    void attend(int64_t layer, Run run, int64_t head, int64_t at, int thread, const Batch& batch);
    const char* assemble(const Token& token, int64_t packed, char* pool, int thread, const Batch& batch);
    void convert(const float* x, int64_t k, int64_t begin, int64_t end, float* to) const;
    void multiply(const float* x, int64_t rows, const float* converted, const char* w, int64_t n, int64_t k,
                  int64_t begin, int64_t end, float* y, const float* bias, Epilogue epilogue, bool again) const;
    template <typename T>
    void embed_rows(const int64_t* ids, int64_t begin, int64_t end, float* out) const;

    char* head_pool(int64_t layer, int64_t head) {
        return kv_.data() + layer * shape_.blocks * block_bytes_ + head * head_bytes_;
    }

    const Shape shape_;
    const Kernels& kernels_;
    const std::shared_ptr<Pool> team_;
    Pool& pool_;
    const int64_t head_bytes_, block_bytes_;
    Arena vectors_, kv_;
    std::vector<std::pair<const char*, int64_t>> matrices_;  // and their bytes; owned by the caller
    std::vector<Layer> layers_;
    const char* head_ = nullptr;
    float *final_norm_ = nullptr, *cos_ = nullptr, *sin_ = nullptr;
    const void* table_ = nullptr;  // embedding rows where not tied to the head; owned by the caller
    int64_t embeddable_;           // tokens that have an embedding
    Work work_;
    std::vector<Token> tokens_;
    std::vector<Run> runs_;
    std::vector<std::vector<int64_t>> paths_;  // a thread's list of the entries of this pass a token sees
    std::vector<Scratch> tails_, own_normed_, own_converted_;  // of a thread
};

}  // namespace s2d
