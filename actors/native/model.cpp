#include "model.h"

#include <math.h>
#include <string.h>

#include <algorithm>

namespace s2d {
namespace {

constexpr int64_t CHUNK = 512;  // rows worked on at a time: bounds the layers' scratch memory
constexpr int64_t FEW = 8;      // rows up to which repeating a norm on each thread costs less than a barrier

int64_t converted_floats(const Shape& s) { return converted_bytes(s.widest(), s.format()) / 4; }  // of the widest inputs

}  // namespace

// Rows begin..end-1 of x, in the form that the weights' format takes.
void Model::convert(const float* x, int64_t k, int64_t begin, int64_t end, float* to) const {
    if (!shape_.converts()) return;
    const int64_t ld = converted_floats(shape_);
    for (int64_t r = begin; r < end; ++r) {
        kernels_.convert(x + r * k, k, shape_.format(), reinterpret_cast<char*>(to + r * ld));
    }
}

// Contiguous x [rows, k] or its converted rows, times groups begin..end-1 of w, into y [rows, n].
void Model::multiply(const float* x, int64_t rows, const float* converted, const char* w, int64_t n, int64_t k,
                     int64_t begin, int64_t end, float* y, const float* bias, Epilogue epilogue, bool again) const {
    const Format format = shape_.format();
    const int64_t bytes = converted_floats(shape_) * 4;
    kernels_.product({x, k, rows, w, group_bytes(k, format), format, k, n, begin, end, y, n, bias, nullptr, epilogue,
                      {reinterpret_cast<const char*>(converted), bytes}, again});
}

template <typename T>
void Model::embed_rows(const int64_t* ids, int64_t begin, int64_t end, float* out) const {
    constexpr int64_t PER_WORD = 4 / sizeof(T);
    const int64_t hidden = shape_.hidden;
    for (int64_t r = begin; r < end; ++r) {
        const int64_t id = ids[r];
        float* to = out + r * hidden;
        if (shape_.tied) {
            const T* group = reinterpret_cast<const T*>(head_ + id / LANES * group_bytes(hidden, shape_.format()));
            for (int64_t i = 0; i < hidden; ++i) {
                to[i] = widen(group[(i / PER_WORD * LANES + id % LANES) * PER_WORD + i % PER_WORD]);
            }
        } else {
            const T* row = static_cast<const T*>(table_) + id * hidden;
            for (int64_t i = 0; i < hidden; ++i) to[i] = widen(row[i]);
        }
    }
}

Status Model::embed(const int64_t* ids, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= embeddable_) return BAD_TOKEN;
    }
    const auto rows = [&](int64_t begin, int64_t end) {
        if (shape_.bf16) embed_rows<uint16_t>(ids, begin, end, out);
        else embed_rows<float>(ids, begin, end, out);
    };
    if (count <= FEW) {  // not worth waking the team
        rows(0, count);
    } else {
        pool_.parallel([&](int thread, int threads) {
            int64_t begin, end;
            share(count, thread, threads, begin, end);
            rows(begin, end);
        });
    }
    return OK;
}

// One call, so that the team does not fall asleep between its parts.
Status Model::forward(const int64_t* ids, const Batch& batch, const int64_t* rows, int64_t count, float* states,
                      float* out) {
    const int64_t width = shape_.hidden;
    for (int64_t r = 0; r < count; ++r) {
        if (rows[r] < 0 || rows[r] >= batch.tokens) return BAD_ROW;
    }
    float* hidden = work_.hidden.reserve(batch.tokens * width);
    if (const Status status = embed(ids, batch.tokens, hidden); status != OK) return status;
    if (const Status status = run_layers(hidden, 0, shape_.layers, batch); status != OK) return status;
    for (int64_t r = 0; r < count; ++r) std::copy_n(hidden + rows[r] * width, width, states + r * width);
    return logits(states, count, out);
}

Status Model::logits(const float* hidden, int64_t rows, float* out) {
    const Shape& s = shape_;
    if (rows == 0) return OK;
    float* normed = work_.normed.reserve(rows * s.hidden);
    float* converted = s.converts() ? work_.converted.reserve(rows * converted_floats(s)) : normed;
    pool_.parallel([&](int thread, int threads) {
        int64_t begin, end;
        share(rows, thread, threads, begin, end);
        for (int64_t r = begin; r < end; ++r) {
            kernels_.rms_norm(hidden + r * s.hidden, final_norm_, s.eps, s.hidden, normed + r * s.hidden);
        }
        convert(normed, s.hidden, begin, end, converted);
        pool_.barrier();
        const int64_t groups = groups_of(s.vocab), group = group_bytes(s.hidden, s.format());
        pool_.divide(groups, rows, group, thread, threads, [&](int64_t from, int64_t to, bool again) {
            multiply(normed, rows, converted, head_, s.vocab, s.hidden, from, to, out, nullptr, Epilogue::store, again);
        });
    });
    return OK;
}

// Layers, norm and head for the last token of each sequence, and the `best` likeliest rows of the head with their
// probabilities, best first. What is no number gives row -1.
Status Model::draft_step(float* hidden, int64_t last, const Batch& batch, int64_t best, int64_t* index, float* share) {
    const Shape& s = shape_;
    if (const Status status = run_layers(hidden, 0, last, batch); status != OK) return status;
    float* rows = work_.last.reserve(batch.seqs * s.hidden);
    float* scores = work_.scores.reserve(batch.seqs * s.vocab);
    for (int64_t r = 0; r < batch.seqs; ++r) {
        const int64_t end = batch.query_start[r + 1];
        if (batch.query_start[r] == end) return BAD_RAGGED;
        std::copy_n(hidden + (end - 1) * s.hidden, s.hidden, rows + r * s.hidden);
    }
    if (const Status status = logits(rows, batch.seqs, scores); status != OK) return status;
    for (int64_t r = 0; r < batch.seqs; ++r, index += best, share += best) {
        const float* row = scores + r * s.vocab;
        const int64_t held = kernels_.topk(row, s.vocab, best, index, share);
        std::fill(index + held, index + best, -1);
        std::fill(share + held, share + best, 0.0f);
        kernels_.probabilities(row, s.vocab, share, held);
    }
    return OK;
}

double Chain::accepted(double share) const {
    if (knots == 0) return share;
    const int64_t place = std::upper_bound(confidence, confidence + knots, share) - confidence;
    if (place == 0) return acceptance[0];
    if (place == knots) return acceptance[knots - 1];
    const double along = (share - confidence[place - 1]) / (confidence[place] - confidence[place - 1]);
    return acceptance[place - 1] + along * (acceptance[place] - acceptance[place - 1]);
}

// Of each token its row, at its slot. The batch has passed run_layers.
void Model::keep_states(const float* hidden, const Batch& batch, float* states) const {
    for (int64_t t = 0; t < batch.tokens; ++t, hidden += shape_.hidden) {
        const Token& token = tokens_[static_cast<size_t>(t)];
        const int64_t slot = token.table[token.index / BLOCK] * BLOCK + token.index % BLOCK;
        std::copy_n(hidden, shape_.hidden, states + slot * shape_.hidden);
    }
}

Status Model::draft_chain(int64_t last, const Batch& batch, const Chain& c) {
    const Shape& s = shape_;
    if (c.best < 1 || c.best > std::min(MAX_TOP, s.vocab) || c.most < 1) return BAD_RANGE;
    float* hidden = work_.hidden.reserve(batch.tokens * s.hidden);
    if (const Status status = embed(c.tokens, batch.tokens, hidden); status != OK) return status;
    for (int64_t i = 0; i < c.added_count; ++i) {
        if (c.added_rows[i] < 0 || c.added_rows[i] >= batch.tokens) return BAD_ROW;
        float* row = hidden + c.added_rows[i] * s.hidden;
        for (int64_t j = 0; j < s.hidden; ++j) row[j] += c.added[i * s.hidden + j];
    }
    const auto count = static_cast<size_t>(batch.seqs);
    std::vector<int64_t> going(count), index(count * static_cast<size_t>(c.best)), positions, starts, lengths;
    std::vector<float> share(index.size());
    std::vector<double> survival(count, 1.0);
    std::vector<int32_t> tables;
    for (size_t r = 0; r < count; ++r) going[r] = static_cast<int64_t>(r);
    Batch now = batch;
    for (int64_t place = 0; !going.empty(); ++place) {
        if (const Status status = draft_step(hidden, last, now, c.best, index.data(), share.data()); status != OK) return status;
        if (c.states) keep_states(hidden, now, c.states);
        std::vector<int64_t> left, next_positions, next_lengths;
        std::vector<int32_t> next_tables;
        float* next = work_.drafted[place % 2].reserve(batch.seqs * s.hidden);
        for (size_t i = 0; i < going.size(); ++i) {
            const int64_t r = going[i], at = (r * c.most + place) * c.best, row = static_cast<int64_t>(i);
            for (int64_t j = 0; j < c.best; ++j) {
                const int64_t found = index[static_cast<size_t>(row * c.best + j)];
                c.drafted[at + j] = c.ids && found >= 0 ? c.ids[found] : found;
            }
            std::copy_n(share.data() + row * c.best, c.best, c.probability + at);
            c.counts[r] = place + 1;
            survival[static_cast<size_t>(r)] *= c.accepted(share[i * static_cast<size_t>(c.best)]);
            const int64_t id = c.drafted[at];
            if (place + 1 >= c.budgets[r] || survival[static_cast<size_t>(r)] < c.floors[r] || id < 0) continue;
            float* to = next + static_cast<int64_t>(left.size()) * s.hidden;
            if (s.bf16) embed_rows<uint16_t>(&id, 0, 1, to);
            else embed_rows<float>(&id, 0, 1, to);
            left.push_back(r);
            next_positions.push_back(now.positions[now.query_start[i + 1] - 1] + 1);
            next_lengths.push_back(now.context_lens[i] + 1);
            const int32_t* table = now.tables + row * now.table_width;
            next_tables.insert(next_tables.end(), table, table + now.table_width);
        }
        going.swap(left);
        positions.swap(next_positions);
        lengths.swap(next_lengths);
        tables.swap(next_tables);
        starts.resize(going.size() + 1);
        for (size_t i = 0; i <= going.size(); ++i) starts[i] = static_cast<int64_t>(i);
        const auto rows = static_cast<int64_t>(going.size());
        now = {rows, rows, batch.table_width, positions.data(), starts.data(), lengths.data(), tables.data(), nullptr};
        hidden = next;
    }
    return OK;
}

Status Model::prepare(const Batch& b) {
    tokens_.resize(static_cast<size_t>(b.tokens));
    if (b.query_start[0] != 0 || b.query_start[b.seqs] != b.tokens) return BAD_RAGGED;
    for (int64_t r = 0; r < b.seqs; ++r) {
        const int64_t begin = b.query_start[r], end = b.query_start[r + 1];
        const int64_t base = b.context_lens[r] - (end - begin);
        if (begin > end || base < 0 || b.context_lens[r] > b.table_width * BLOCK) return BAD_RAGGED;
        const int32_t* table = b.tables + r * b.table_width;
        if (begin < end) {
            for (int64_t i = 0; i * BLOCK < b.context_lens[r]; ++i) {
                if (table[i] < 0 || table[i] >= shape_.blocks) return BAD_BLOCK;
            }
        }
        for (int64_t t = begin; t < end; ++t) {
            const int64_t position = b.positions[t], index = base + (t - begin);
            if (position < 0 || position >= shape_.max_position) return BAD_POSITION;
            Token& token = tokens_[static_cast<size_t>(t)];
            token = {table, position, index, base, index + 1, true};
            if (!b.parents) continue;
            const int64_t parent = b.parents[t];
            if (parent != -1 && (parent < begin || parent >= t)) return BAD_PARENT;
            const Token* above = parent == -1 ? nullptr : &tokens_[static_cast<size_t>(parent)];
            token.keys = above ? above->keys + 1 : base + 1;
            token.straight = token.keys == index + 1;
        }
    }
    return OK;
}

Status Model::run_layers(float* hidden, int64_t first, int64_t last, const Batch& batch) {
    const Shape& s = shape_;
    if (first < 0 || last > s.layers || first > last) return BAD_RANGE;
    if (batch.tokens == 0 || first == last) return OK;
    if (const Status status = prepare(batch); status != OK) return status;
    const int64_t rows = std::min(batch.tokens, CHUNK);
    work_.normed.reserve(rows * s.hidden);
    for (Scratch& own : own_normed_) own.reserve(FEW * s.hidden);
    if (s.converts()) {
        work_.converted.reserve(rows * converted_floats(s));
        for (Scratch& own : own_converted_) own.reserve(FEW * converted_floats(s));
    }
    work_.qkv.reserve(rows * s.qkv());
    work_.attended.reserve(rows * s.heads * s.head_dim);
    work_.gate_up.reserve(rows * 2 * s.intermediate);
    work_.active.reserve(rows * s.intermediate);
    if (batch.parents) {
        int64_t longest = 0;
        for (const Token& token : tokens_) longest = std::max(longest, token.keys - token.base);
        for (size_t t = 0; t < tails_.size(); ++t) {
            paths_[t].resize(static_cast<size_t>(longest));
            tails_[t].reserve((longest / BLOCK + 2) * head_bytes_ / 4);
        }
    }
    for (int64_t at = 0; at < batch.tokens; at += CHUNK) {
        run_chunk(hidden + at * s.hidden, first, last, at, std::min(CHUNK, batch.tokens - at), batch);
    }
    return OK;
}

void Model::run_chunk(float* hidden, int64_t first, int64_t last, int64_t at, int64_t rows, const Batch& batch) {
    const Shape& s = shape_;
    const int64_t query = s.heads * s.head_dim, inner = s.intermediate;
    float *qkv = work_.qkv.data(), *attended = work_.attended.data();
    float *gate_up = work_.gate_up.data(), *active = work_.active.data();
    find_runs(at, rows);
    pool_.parallel([&](int thread, int threads) {
        const bool few = rows <= FEW;
        const bool by_head = few && (rows == 1 || s.kv_heads % threads == 0);
        int64_t row0 = 0, row1 = rows;
        float* normed = few ? own_normed_[static_cast<size_t>(thread)].data() : work_.normed.data();
        Scratch& held = few ? own_converted_[static_cast<size_t>(thread)] : work_.converted;
        float* converted = s.converts() ? held.data() : normed;
        if (!few) share(rows, thread, threads, row0, row1);
        const auto norm = [&](const float* weight) {
            for (int64_t r = row0; r < row1; ++r) {
                kernels_.rms_norm(hidden + r * s.hidden, weight, s.eps, s.hidden, normed + r * s.hidden);
            }
            convert(normed, s.hidden, row0, row1, converted);
            if (!few) pool_.barrier();
        };
        const auto read = [&](const float* x, int64_t k) {  // what another thread may have written
            convert(x, k, row0, row1, converted);
            if (s.converts() && !few) pool_.barrier();
        };
        const auto product = [&](const float* x, const char* w, int64_t n, int64_t k, float* y, const float* bias,
                                 Epilogue epilogue) {
            const int64_t group = group_bytes(k, s.format());
            pool_.divide(groups_of(n), rows, group, thread, threads, [&](int64_t begin, int64_t end, bool again) {
                multiply(x, rows, converted, w, n, k, begin, end, y, bias, epilogue, again);
            });
        };
        const auto runs = static_cast<int64_t>(runs_.size());
        const auto each_run = [&](auto&& body) {  // all runs of a head on one thread, or every so many of each head
            for (int64_t head = by_head ? thread : 0; head < s.kv_heads; head += by_head ? threads : 1) {
                const int64_t first = by_head ? 0 : (thread + head) % threads;
                for (int64_t i = first; i < runs; i += by_head ? 1 : threads) body(runs_[static_cast<size_t>(i)], head);
            }
        };
        for (int64_t l = first; l < last; ++l) {
            const Layer& w = layers_[static_cast<size_t>(l)];
            norm(w.input_norm);
            product(normed, w.qkv, s.qkv(), s.hidden, qkv, w.bias, Epilogue::store);
            pool_.barrier();
            // Neighbours share cache lines of the keys: one thread writes them.
            int64_t write0 = 0, write1 = rows;
            if (!by_head) share(rows, thread, threads, write0, write1);
            for (int64_t head = by_head ? thread : 0; head < s.kv_heads; head += by_head ? threads : 1) {
                for (int64_t row = write0; row < write1; ++row) {
                    write_kv(l, row, head, tokens_[static_cast<size_t>(at + row)]);
                }
            }
            if (!by_head) pool_.barrier();
            each_run([&](Run run, int64_t head) { attend(l, run, head, at, thread, batch); });
            pool_.barrier();
            read(attended, query);
            product(attended, w.o, s.hidden, query, hidden, nullptr, Epilogue::add);
            pool_.barrier();
            norm(w.post_norm);
            const int64_t pair = 2 * group_bytes(s.hidden, s.format());
            pool_.divide(inner / LANES, rows, pair, thread, threads, [&](int64_t begin, int64_t end, bool again) {
                multiply(normed, rows, converted, w.gate_up, 2 * inner, s.hidden, 2 * begin, 2 * end, gate_up, nullptr,
                         Epilogue::store, again);
                for (int64_t r = 0; r < rows; ++r) {
                    kernels_.silu_mul(gate_up + r * 2 * inner + 2 * begin * LANES, (end - begin) * LANES,
                                      active + r * inner + begin * LANES);
                }
            });
            pool_.barrier();
            read(active, inner);
            product(active, w.down, s.hidden, inner, hidden, nullptr, Epilogue::add);
            pool_.barrier();
        }
    });
}

// Normalises and rotates the query heads of one KV head and its key, and writes key and value to their slot.
void Model::write_kv(int64_t layer, int64_t row, int64_t head, const Token& token) {
    const Shape& s = shape_;
    const Layer& w = layers_[static_cast<size_t>(layer)];
    const int64_t d = s.head_dim, group = s.heads / s.kv_heads;
    float* qkv = work_.qkv.data() + row * s.qkv();
    const float* cos = cos_ + token.position * (d / 2);
    const float* sin = sin_ + token.position * (d / 2);
    for (int64_t h = head * group; h < (head + 1) * group; ++h) {
        float* q = qkv + h * d;
        if (w.q_norm) kernels_.rms_norm(q, w.q_norm, s.eps, d, q);
        kernels_.rotate(q, cos, sin, d / 2);
    }
    float* k = qkv + (s.heads + head) * d;
    if (w.k_norm) kernels_.rms_norm(k, w.k_norm, s.eps, d, k);
    kernels_.rotate(k, cos, sin, d / 2);
    const float* v = qkv + (s.heads + s.kv_heads + head) * d;
    char* block = head_pool(layer, head) + token.table[token.index / BLOCK] * block_bytes_;
    if (s.bf16) HeadBlock<uint16_t>::write(reinterpret_cast<uint16_t*>(block), token.index % BLOCK, k, v, d);
    else HeadBlock<float>::write(reinterpret_cast<float*>(block), token.index % BLOCK, k, v, d);
}

// The last blocks of a token in a tree, its own entries moved to where they would be in a chain: the sums are
// then those of the chain, bit for bit.
const char* Model::assemble(const Token& token, int64_t packed, char* pool, int thread, const Batch& batch) {
    const int64_t d = shape_.head_dim, first = token.base / BLOCK;
    auto& path = paths_[static_cast<size_t>(thread)];
    for (int64_t i = token.keys - token.base - 1, t = packed; i >= 0; --i, t = batch.parents[t]) {
        path[static_cast<size_t>(i)] = tokens_[static_cast<size_t>(t)].index;
    }
    char* tail = reinterpret_cast<char*>(tails_[static_cast<size_t>(thread)].data());
    for (int64_t b = first; b * BLOCK < token.keys; ++b) {
        memcpy(tail + (b - first) * head_bytes_, pool + token.table[b] * block_bytes_, static_cast<size_t>(head_bytes_));
    }
    for (int64_t j = token.base; j < token.keys; ++j) {
        const int64_t index = path[static_cast<size_t>(j - token.base)];
        if (index == j) continue;
        const char* from = pool + token.table[index / BLOCK] * block_bytes_;
        char* to = tail + (j / BLOCK - first) * head_bytes_;
        if (shape_.bf16) {
            HeadBlock<uint16_t>::copy(reinterpret_cast<const uint16_t*>(from), index % BLOCK,
                                      reinterpret_cast<uint16_t*>(to), j % BLOCK, d);
        } else {
            HeadBlock<float>::copy(reinterpret_cast<const float*>(from), index % BLOCK, reinterpret_cast<float*>(to),
                                   j % BLOCK, d);
        }
    }
    return tail;
}

// Splits rows of a chunk, whose first token is `at`, into runs of tokens that follow each other in a sequence.
void Model::find_runs(int64_t at, int64_t rows) {
    const int64_t together = TOGETHER / (shape_.heads / shape_.kv_heads);
    const int64_t most = shape_.head_dim <= WIDEST_TOGETHER ? std::max<int64_t>(1, together) : 1;
    const auto follows = [&](int64_t row) {
        const Token* token = &tokens_[static_cast<size_t>(at + row)];
        return token->straight && token[-1].straight && token->table == token[-1].table && token->keys == token[-1].keys + 1;
    };
    runs_.clear();
    for (int64_t row = 0, end; row < rows; row = end) {
        for (end = row + 1; end < rows && follows(end);) ++end;
        const int64_t pieces = (end - row + most - 1) / most;
        for (int64_t i = 0, first, last; i < pieces; ++i) {
            share(end - row, static_cast<int>(i), static_cast<int>(pieces), first, last);
            runs_.push_back({row + first, last - first});
        }
    }
}

void Model::attend(int64_t layer, Run run, int64_t head, int64_t at, int thread, const Batch& batch) {
    const Shape& s = shape_;
    const Token& token = tokens_[static_cast<size_t>(at + run.row)];
    const int64_t group = s.heads / s.kv_heads, first = head * group * s.head_dim, width = s.heads * s.head_dim;
    char* pool = head_pool(layer, head);
    Attention a{work_.qkv.data() + run.row * s.qkv() + first, s.qkv(),
                work_.attended.data() + run.row * width + first, width,
                run.rows, group, s.head_dim, 1.0f / sqrtf(static_cast<float>(s.head_dim)), token.keys,
                pool, token.table, block_bytes_, nullptr, (token.keys + run.rows - 1 + BLOCK - 1) / BLOCK, s.bf16 != 0,
                s.converts()};  // products round their inputs too
    if (!token.straight) {
        a.tail = assemble(token, at + run.row, pool, thread, batch);
        a.tail_from = token.base / BLOCK;
    }
    kernels_.attention(a);
}

Status Model::copy_slots(const int64_t* source, const int64_t* target, int64_t count) {
    const Shape& s = shape_;
    for (int64_t i = 0; i < count; ++i) {
        for (const int64_t slot : {source[i], target[i]}) {
            if (slot < 0 || slot >= s.blocks * BLOCK) return BAD_SLOT;
        }
    }
    if (count == 0) return OK;
    const int64_t staged_blocks = (count + BLOCK - 1) / BLOCK;
    const int64_t d = s.head_dim;
    for (Scratch& tail : tails_) tail.reserve(staged_blocks * head_bytes_ / 4);
    const auto copy = [&](const char* from, int64_t a, char* to, int64_t b) {
        if (s.bf16) {
            HeadBlock<uint16_t>::copy(reinterpret_cast<const uint16_t*>(from), a, reinterpret_cast<uint16_t*>(to), b, d);
        } else {
            HeadBlock<float>::copy(reinterpret_cast<const float*>(from), a, reinterpret_cast<float*>(to), b, d);
        }
    };
    pool_.parallel([&](int thread, int threads) {
        char* staged = reinterpret_cast<char*>(tails_[static_cast<size_t>(thread)].data());
        for (int64_t u = thread; u < s.layers * s.kv_heads; u += threads) {
            char* pool = head_pool(u / s.kv_heads, u % s.kv_heads);
            for (int64_t i = 0; i < count; ++i) {  // all are read before any is written
                copy(pool + source[i] / BLOCK * block_bytes_, source[i] % BLOCK, staged + i / BLOCK * head_bytes_, i % BLOCK);
            }
            for (int64_t i = 0; i < count; ++i) {
                copy(staged + i / BLOCK * head_bytes_, i % BLOCK, pool + target[i] / BLOCK * block_bytes_, target[i] % BLOCK);
            }
        }
    });
    return OK;
}

int64_t Model::weight_bytes() const {
    int64_t bytes = static_cast<int64_t>(vectors_.used());
    for (const auto& matrix : matrices_) bytes += matrix.second;
    return bytes;
}

float Model::read_weights() {
    std::vector<float> sums(static_cast<size_t>(pool_.threads()));
    pool_.parallel([&](int thread, int threads) {
        float& sum = sums[static_cast<size_t>(thread)];
        for (const auto& [matrix, bytes] : matrices_) {
            int64_t begin, end;
            share(bytes / 64, thread, threads, begin, end);
            sum += kernels_.read_stream(reinterpret_cast<const float*>(matrix + begin * 64), (end - begin) * 64);
        }
    });
    float total = 0.0f;
    for (const float sum : sums) total += sum;
    return total;
}

}  // namespace s2d
