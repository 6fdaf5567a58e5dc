// A Llama-family decoder over a paged KV cache as plain pointers, and the calls that run it: from one sync
// point to the next, or through all layers.
//
// Every kernel is the one that its own op runs, on the same arguments and in the same order: results equal
// those of the ops one by one, bit for bit.
#pragma once

#include <cstddef>
#include <vector>

#include "isa.hpp"
#include "linear_call.hpp"

namespace fastattn {

struct NormWeight {
    const void* weight = nullptr;  // null: no norm
    DType dtype = DType::f32;
    float eps = 0.0f;
};

struct Matrix {
    LinearArgs args;        // but x and what depends on it
    const int64_t* x_perm;  // the order of x's columns that args.w is stored in; null: x's own
};

// Matrices that read the same input, their outputs side by side: q, k, v or gate, up, as one or as several.
struct ColumnWeights {
    std::vector<Matrix> parts;
    int64_t width = 0;
};

struct AttentionWeights {
    NormWeight norm, q_norm, k_norm;
    ColumnWeights qkv;
    Matrix o;
    int64_t left;  // keys visible before a query; negative: all
};

struct MlpWeights {
    NormWeight norm;
    ColumnWeights gate_up;
    Matrix down;
};

struct DecoderArgs {
    DType dtype;  // of activations and of the cache
    int64_t hidden, heads, kv_heads, head_dim;
    bool interleaved;
    float scale;                      // of scores
    int64_t vocabulary, first_token;  // of all ranks, and the first one of this rank's
    WeightArgs embedding;             // (this rank's tokens, hidden)
    std::vector<AttentionWeights> attention;
    std::vector<MlpWeights> mlp;
    NormWeight norm;   // after the last layer
    Matrix head = {};  // (this rank's tokens, hidden); without rows: not here

    int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
};

// One layer's keys or values are pages (page, slot, head, head_dim) whose last dimension is contiguous.
struct CacheSide {
    char* data;
    int64_t layer_bytes;
    int64_t page_stride, slot_stride, head_stride;  // in elements
};

// What one forward of packed rows is about; `spec.KvStep` with its cache and rotary tables.
struct StepArgs {
    int64_t rows, batch, page_size;
    const int32_t* cu_seqlens;
    const int32_t* seqused;
    const int32_t* block_table;
    int64_t table_stride;
    const int64_t* positions;
    const int64_t* slots;
    const float* cos;
    const float* sin;
    int64_t cos_stride, sin_stride, half;
    CacheSide keys, values;
};

// The ranks that each hold a part of the decoder. May throw, which ends the forward.
class Ranks {
public:
    virtual ~Ranks() = default;
    // x, of so many values, becomes its sum over the ranks.
    virtual void sum(void* x, DType dtype, int64_t values) = 0;
    // Every rank's x to out (world, bytes).
    virtual void gather(void* x, void* out, int64_t bytes) = 0;
    virtual int world() const = 0;
};

class DecoderRun {
public:
    // `logits`: whether `next_tokens` will be called, which the decoder must have its head for.
    // `ranks`: who shares the sums of `forward`; null: nobody.
    DecoderRun(const DecoderArgs& decoder, const StepArgs& step, const KernelTable& kernels, int threads,
               bool logits, Ranks* ranks);

    // Bytes that `use` needs, aligned to 64.
    size_t workspace() const { return scratch_offset_ + scratch_bytes_; }
    void use(void* memory) { memory_ = static_cast<char*>(memory); }

    // Normalised input (rows, hidden) to this rank's partial result (rows, hidden), both contiguous.
    void attention_half(size_t layer, const void* hidden, void* out) const;
    void mlp_half(size_t layer, const void* hidden, void* out) const;
    // Token ids (rows,) to normalised hidden states (rows, hidden).
    void forward(const int64_t* ids, void* out) const;
    // Token ids (rows,) to the likeliest token after each (rows,): the first of equal ones, and -1 where the
    // largest logit is NaN or infinite.
    void next_tokens(const int64_t* ids, int64_t* next) const;

private:
    struct Buffer {
        size_t offset, bytes;
    };
    Buffer take(int64_t width);
    Buffer take_bytes(size_t bytes);
    void need_scratch(size_t bytes);
    void need_scratch(const Matrix& matrix);
    DequantizeArgs embedding(const int64_t* ids, int64_t rows, void* out) const;
    void embed(const int64_t* ids, void* out) const;
    void likeliest_of_ranks(int64_t* next) const;
    size_t choice_bytes() const;
    char* at(const Buffer& b) const { return memory_ + b.offset; }
    char* element(void* base, int64_t index) const;

    // `next`: the matrix that is multiplied after this one.
    LinearCall on_rows(const Matrix& matrix, const void* x, void* out, const Matrix* next) const;
    void linear(const Matrix& matrix, const void* x, void* out, const Matrix* next) const;
    void columns(const ColumnWeights& w, const void* x, void* out, const Matrix* next) const;
    const void* normed_heads(const NormWeight& norm, void* x, int64_t heads, const Buffer& out,
                             int64_t* row_stride) const;
    void norm(const NormWeight& w, const void* x, const void* residual, void* out, void* total) const;
    RotaryArgs heads_of(const void* x, int64_t row_stride, int64_t heads) const;
    void into_cache(RotaryArgs& a, const CacheSide& side, size_t layer) const;
    AttentionArgs attention_args(size_t layer, const void* q, void* out) const;

    const DecoderArgs& d_;
    const StepArgs& s_;
    const KernelTable& kernels_;
    int threads_;
    bool logits_wanted_;
    Ranks* ranks_;
    size_t item_;  // bytes of an activation
    char* memory_ = nullptr;
    size_t scratch_offset_ = 0, scratch_bytes_ = 0;
    Buffer embedded_, hidden_, partial_, streams_[2], logits_, choices_;
    Buffer qkv_, part_, q_norm_, k_norm_, q_, mixed_, gate_up_, gated_;
};

}  // namespace fastattn
