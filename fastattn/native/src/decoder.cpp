#include "decoder.hpp"

#include <algorithm>
#include <cstring>

#include "host.hpp"

namespace fastattn {

namespace {

size_t item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
size_t aligned(size_t bytes) { return (bytes + 63) & ~size_t(63); }

}  // namespace

DecoderRun::DecoderRun(const DecoderArgs& decoder, const StepArgs& step, const KernelTable& kernels,
                       int threads, bool logits, Ranks* ranks)
    : d_(decoder),
      s_(step),
      kernels_(kernels),
      threads_(threads),
      logits_wanted_(logits),
      ranks_(ranks),
      item_(item_size(decoder.dtype)) {
    int64_t part = 0, inner = 0;
    bool head_norms = false;
    for (const AttentionWeights& w : d_.attention) {
        head_norms |= w.q_norm.weight || w.k_norm.weight;
        for (const Matrix& m : w.qkv.parts) {
            need_scratch(m);
            if (w.qkv.parts.size() > 1) part = std::max(part, m.args.w.out);
        }
        need_scratch(w.o);
    }
    for (const MlpWeights& w : d_.mlp) {
        for (const Matrix& m : w.gate_up.parts) {
            need_scratch(m);
            if (w.gate_up.parts.size() > 1) part = std::max(part, m.args.w.out);
        }
        need_scratch(w.down);
        inner = std::max(inner, w.gate_up.width);
    }
    int64_t left = -2;
    for (size_t i = 0; i < d_.attention.size(); i++) {
        if (d_.attention[i].left == left) continue;  // the same plan as the layer before
        left = d_.attention[i].left;
        need_scratch(kernels_.attention_workspace(attention_args(i, nullptr, nullptr), threads_));
    }
    if (logits) need_scratch(d_.head);
    need_scratch(kernels_.ops.dequantize_workspace(embedding(nullptr, s_.rows, nullptr), threads_));
    embedded_ = take(d_.hidden);
    hidden_ = take(d_.hidden);
    partial_ = take(d_.hidden);
    streams_[0] = take(d_.hidden);
    streams_[1] = take(d_.hidden);
    logits_ = take(logits ? d_.head.args.w.out : 0);
    choices_ = take_bytes(logits && ranks ? choice_bytes() : 0);
    part_ = take(part);
    // One half-block's buffers lie where the other's do.
    const size_t shared = scratch_offset_;
    qkv_ = take(d_.qkv_width());
    q_norm_ = take(head_norms ? d_.heads * d_.head_dim : 0);
    k_norm_ = take(head_norms ? d_.kv_heads * d_.head_dim : 0);
    q_ = take(d_.heads * d_.head_dim);
    mixed_ = take(d_.heads * d_.head_dim);
    const size_t attention_end = scratch_offset_;
    scratch_offset_ = shared;
    gate_up_ = take(inner);
    gated_ = take(inner / 2);
    scratch_offset_ = std::max(scratch_offset_, attention_end);
}

DecoderRun::Buffer DecoderRun::take(int64_t width) { return take_bytes(size_t(s_.rows * width) * item_); }

DecoderRun::Buffer DecoderRun::take_bytes(size_t bytes) {
    const Buffer b = {scratch_offset_, bytes};
    scratch_offset_ += aligned(b.bytes);
    return b;
}

void DecoderRun::need_scratch(size_t bytes) { scratch_bytes_ = std::max(scratch_bytes_, aligned(bytes)); }

void DecoderRun::need_scratch(const Matrix& matrix) {
    need_scratch(on_rows(matrix, nullptr, nullptr, nullptr).workspace());
}

char* DecoderRun::element(void* base, int64_t index) const {
    return static_cast<char*>(base) + size_t(index) * item_;
}

// ------------------------------------------------------------------------------------------- half-blocks
void DecoderRun::attention_half(size_t layer, const void* hidden, void* out) const {
    const AttentionWeights& w = d_.attention[layer];
    char* qkv = at(qkv_);
    columns(w.qkv, hidden, qkv, &w.o);

    int64_t q_stride = d_.qkv_width(), k_stride = q_stride;
    const void* q = normed_heads(w.q_norm, qkv, d_.heads, q_norm_, &q_stride);
    char* k_rows = element(qkv, d_.heads * d_.head_dim);
    const void* k = normed_heads(w.k_norm, k_rows, d_.kv_heads, k_norm_, &k_stride);
    char* v = element(qkv, (d_.heads + d_.kv_heads) * d_.head_dim);

    RotaryArgs queries = heads_of(q, q_stride, d_.heads);
    queries.out = at(q_);
    RotaryArgs keys = heads_of(k, k_stride, d_.kv_heads);
    into_cache(keys, s_.keys, layer);
    RotaryArgs values = heads_of(v, d_.qkv_width(), d_.kv_heads);
    into_cache(values, s_.values, layer);
    values.cos = values.sin = nullptr;
    for (const RotaryArgs& a : {queries, keys, values})
        kernels_.ops.rotary(a, threads_for(a.n * a.heads * a.dim, CHEAP, threads_));

    const AttentionArgs a = attention_args(layer, at(q_), at(mixed_));
    kernels_.attention(a, threads_, memory_ + scratch_offset_);
    linear(w.o, at(mixed_), out, &d_.mlp[layer].gate_up.parts[0]);
}

void DecoderRun::mlp_half(size_t layer, const void* hidden, void* out) const {
    const MlpWeights& w = d_.mlp[layer];
    columns(w.gate_up, hidden, at(gate_up_), &w.down);
    const int64_t width = w.gate_up.width / 2;
    const SwigluArgs gate = {at(gate_up_), at(gated_), d_.dtype, s_.rows, width, w.gate_up.width};
    kernels_.ops.swiglu(gate, threads_for(s_.rows * width, COSTLY, threads_));
    const Matrix* next = logits_wanted_ ? &d_.head : nullptr;
    if (layer + 1 < d_.attention.size()) next = &d_.attention[layer + 1].qkv.parts[0];
    linear(w.down, at(gated_), out, next);
}

void DecoderRun::forward(const int64_t* ids, void* out) const {
    const size_t layers = d_.attention.size();
    const void* stream = at(embedded_);
    int next = 0;
    embed(ids, at(embedded_));
    norm(d_.attention[0].norm, stream, nullptr, at(hidden_), nullptr);
    const auto add = [&](const NormWeight& following, void* normed) {
        char* total = at(streams_[next]);
        if (ranks_) ranks_->sum(at(partial_), d_.dtype, s_.rows * d_.hidden);
        norm(following, at(partial_), stream, normed, total);
        stream = total;
        next = 1 - next;
    };
    for (size_t i = 0; i < layers; i++) {
        attention_half(i, at(hidden_), at(partial_));
        add(d_.mlp[i].norm, at(hidden_));
        mlp_half(i, at(hidden_), at(partial_));
        const bool last = i + 1 == layers;
        add(last ? d_.norm : d_.attention[i + 1].norm, last ? out : at(hidden_));
    }
}

// ------------------------------------------------------------------------------------------------ pieces
LinearCall DecoderRun::on_rows(const Matrix& matrix, const void* x, void* out, const Matrix* next) const {
    LinearArgs a = matrix.args;
    a.x = x;
    a.out = out;
    a.dtype = d_.dtype;
    a.rows = s_.rows;
    a.x_stride = a.w.in;
    a.next = next ? &next->args.w : nullptr;
    return LinearCall(a, matrix.x_perm, kernels_, threads_);
}

void DecoderRun::linear(const Matrix& matrix, const void* x, void* out, const Matrix* next) const {
    on_rows(matrix, x, out, next).run(memory_ + scratch_offset_);
}

void DecoderRun::columns(const ColumnWeights& w, const void* x, void* out, const Matrix* next) const {
    if (w.parts.size() == 1) return linear(w.parts[0], x, out, next);
    int64_t first = 0;
    for (size_t i = 0; i < w.parts.size(); i++) {
        const Matrix& m = w.parts[i];
        linear(m, x, at(part_), i + 1 < w.parts.size() ? &w.parts[i + 1] : next);
        const size_t bytes = size_t(m.args.w.out) * item_;
        for (int64_t r = 0; r < s_.rows; r++)
            std::memcpy(element(out, r * w.width + first), at(part_) + size_t(r) * bytes, bytes);
        first += m.args.w.out;
    }
}

// q or k of every row, each head normalised where the model has such a norm; `row_stride` in and out.
const void* DecoderRun::normed_heads(const NormWeight& norm, void* x, int64_t heads, const Buffer& out,
                                     int64_t* row_stride) const {
    if (!norm.weight) return x;
    RmsNormArgs a = {};
    a.x = {x, d_.dtype, *row_stride, d_.head_dim};
    a.weight = norm.weight;
    a.weight_dtype = norm.dtype;
    a.out = at(out);
    a.outer = s_.rows, a.inner = heads, a.width = d_.head_dim;
    a.eps = norm.eps;
    kernels_.ops.rms_norm(a, threads_for(s_.rows * heads * d_.head_dim, CHEAP, threads_));
    *row_stride = heads * d_.head_dim;
    return at(out);
}

void DecoderRun::norm(const NormWeight& w, const void* x, const void* residual, void* out,
                      void* total) const {
    RmsNormArgs a = {};
    a.x = {x, d_.dtype, 0, d_.hidden};
    if (residual) a.residual = {residual, d_.dtype, 0, d_.hidden};
    a.weight = w.weight;
    a.weight_dtype = w.dtype;
    a.out = out;
    a.total = total;
    a.outer = 1, a.inner = s_.rows, a.width = d_.hidden;
    a.eps = w.eps;
    kernels_.ops.rms_norm(a, threads_for(s_.rows * d_.hidden, CHEAP, threads_));
}

RotaryArgs DecoderRun::heads_of(const void* x, int64_t row_stride, int64_t heads) const {
    RotaryArgs a = {};
    a.x = {x, d_.dtype, row_stride, d_.head_dim};
    a.cos = s_.cos, a.sin = s_.sin;
    a.cos_stride = s_.cos_stride, a.sin_stride = s_.sin_stride;
    a.half = s_.half;
    a.positions = s_.positions;
    a.interleaved = d_.interleaved;
    a.n = s_.rows, a.heads = heads, a.dim = d_.head_dim;
    a.out_dtype = d_.dtype;
    return a;
}

void DecoderRun::into_cache(RotaryArgs& a, const CacheSide& side, size_t layer) const {
    a.out = side.data + layer * size_t(side.layer_bytes);
    a.slots = s_.slots;
    a.page = s_.page_size;
    a.page_stride = side.page_stride, a.slot_stride = side.slot_stride, a.head_stride = side.head_stride;
}

AttentionArgs DecoderRun::attention_args(size_t layer, const void* q, void* out) const {
    AttentionArgs a = {};
    a.dtype = d_.dtype;
    a.q = q;
    a.out = out;
    a.k = s_.keys.data + layer * size_t(s_.keys.layer_bytes);
    a.v = s_.values.data + layer * size_t(s_.values.layer_bytes);
    a.q_seq = a.out_seq = d_.heads * d_.head_dim;
    a.q_head = a.out_head = d_.head_dim;
    a.k_batch = s_.keys.page_stride, a.k_seq = s_.keys.slot_stride, a.k_head = s_.keys.head_stride;
    a.v_batch = s_.values.page_stride, a.v_seq = s_.values.slot_stride, a.v_head = s_.values.head_stride;
    a.batch = s_.batch;
    a.heads = d_.heads, a.kv_heads = d_.kv_heads;
    a.head_dim = a.v_head_dim = d_.head_dim;
    a.scale = d_.scale;
    a.left = d_.attention[layer].left, a.right = 0;  // causal
    a.cu_q = s_.cu_seqlens;
    a.used_k = s_.seqused;
    a.block_table = s_.block_table;
    a.table_batch = s_.table_stride;
    a.page_size = s_.page_size;
    return a;
}

}  // namespace fastattn
