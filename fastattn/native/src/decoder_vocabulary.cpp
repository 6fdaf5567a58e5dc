// The two ends of a forward, token ids in and token ids out. Each rank may hold a range of the vocabulary.
#include <cstring>

#include "decoder.hpp"
#include "host.hpp"

namespace fastattn {

namespace {

// Whether the exponent has a zero bit: NaN and infinities have none.
bool is_finite(const void* value, DType dtype) {
    if (dtype == DType::f32) {
        uint32_t bits;
        std::memcpy(&bits, value, sizeof bits);
        return ~bits & 0x7f800000;
    }
    uint16_t bits;
    std::memcpy(&bits, value, sizeof bits);
    return ~bits & (dtype == DType::f16 ? 0x7c00 : 0x7f80);
}

}  // namespace

DequantizeArgs DecoderRun::embedding(const int64_t* ids, int64_t rows, void* out) const {
    return {d_.embedding, ids, rows, out, d_.dtype};
}

void DecoderRun::embed(const int64_t* ids, void* out) const {
    char* scratch = memory_ + scratch_offset_;
    if (!ranks_) {
        const int threads = threads_for(s_.rows * d_.hidden, CHEAP, threads_);
        kernels_.ops.dequantize(embedding(ids, s_.rows, out), threads, scratch);
        return;
    }
    // The owner's row and the others' zeros add up to the row.
    for (int64_t r = 0; r < s_.rows; r++) {
        const int64_t token = ids[r] - d_.first_token;
        char* row = element(out, r * d_.hidden);
        if (token >= 0 && token < d_.embedding.out)
            kernels_.ops.dequantize(embedding(&token, 1, row), 1, scratch);
        else
            std::memset(row, 0, size_t(d_.hidden) * item_);
    }
    ranks_->sum(out, d_.dtype, s_.rows * d_.hidden);
}

void DecoderRun::next_tokens(const int64_t* ids, int64_t* next) const {
    forward(ids, at(hidden_));
    linear(d_.head, at(hidden_), at(logits_), &d_.attention[0].qkv.parts[0]);
    kernels_.ops.argmax({at(logits_), d_.dtype, s_.rows, d_.head.args.w.out, next});
    if (ranks_) return likeliest_of_ranks(next);
    for (int64_t r = 0; r < s_.rows; r++)
        if (!is_finite(element(at(logits_), r * d_.head.args.w.out + next[r]), d_.dtype)) next[r] = -1;
}

// A message of each rank, all ranks' messages, and the logits to choose from.
size_t DecoderRun::choice_bytes() const {
    const size_t message = size_t(s_.rows) * (sizeof(int64_t) + item_), world = size_t(ranks_->world());
    return message * (1 + world) + size_t(s_.rows) * world * item_;
}

// From each rank's likeliest of its own tokens. A message is (rows,) tokens and (rows,) logits; as the ranks'
// tokens ascend, the first of equal logits is still the lowest token's.
void DecoderRun::likeliest_of_ranks(int64_t* next) const {
    const size_t rows = size_t(s_.rows), world = size_t(ranks_->world());
    const size_t tokens_bytes = rows * sizeof(int64_t), message_bytes = tokens_bytes + rows * item_;
    char* mine = at(choices_);
    char* all = mine + message_bytes;
    char* logits = all + world * message_bytes;  // (rows, world)
    for (size_t r = 0; r < rows; r++) {
        const int64_t token = next[r] + d_.first_token;
        std::memcpy(mine + r * sizeof token, &token, sizeof token);
        std::memcpy(mine + tokens_bytes + r * item_,
                    element(at(logits_), int64_t(r) * d_.head.args.w.out + next[r]), item_);
    }
    ranks_->gather(mine, all, int64_t(message_bytes));
    for (size_t k = 0; k < world; k++)
        for (size_t r = 0; r < rows; r++)
            std::memcpy(logits + (r * world + k) * item_, all + k * message_bytes + tokens_bytes + r * item_,
                        item_);
    kernels_.ops.argmax({logits, d_.dtype, s_.rows, int64_t(world), next});
    for (size_t r = 0; r < rows; r++) {
        const size_t k = size_t(next[r]);
        std::memcpy(&next[r], all + k * message_bytes + r * sizeof(int64_t), sizeof(int64_t));
        if (!is_finite(logits + (r * world + k) * item_, d_.dtype)) next[r] = -1;
    }
}

}  // namespace fastattn
