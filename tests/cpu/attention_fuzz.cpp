// Random attention calls of one instruction set, for a build with sanitizers: every tensor is a heap block
// of exactly its size, what a call must not use is NaN, and a result far from a plain double sum ends the
// program.
// Usage: attention_fuzz CALLS
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <memory>
#include <vector>

#include "attention.hpp"

using namespace fastattn;
using namespace fastattn::FASTATTN_ISA;

namespace {

uint64_t seed = 1;
int64_t below(int64_t n) {  // xorshift64*
    seed ^= seed >> 12, seed ^= seed << 25, seed ^= seed >> 27;
    return int64_t((seed * 0x2545F4914F6CDD1Dull) >> 33) % n;
}
bool one_in(int64_t n) { return below(n) == 0; }
float value() { return float(below(2001) - 1000) / 1000.0f; }

// Elements of one type in a block of their own.
struct Block {
    DType dtype;
    std::vector<char> bytes;

    Block(DType type, int64_t n) : dtype(type), bytes(size_t(n * size())) {}
    int64_t size() const { return dtype == DType::f32 ? 4 : 2; }
    int64_t count() const { return int64_t(bytes.size()) / size(); }
    void set(int64_t i, float x) {
        char* at = bytes.data() + i * size();
        const f16 h = from_float<f16>(x);
        const bf16 b = from_float<bf16>(x);
        if (dtype == DType::f32)
            memcpy(at, &x, sizeof(x));
        else
            memcpy(at, dtype == DType::f16 ? &h.bits : &b.bits, sizeof(uint16_t));
    }
    float get(int64_t i) const {
        const char* at = bytes.data() + i * size();
        if (dtype == DType::f32) return *reinterpret_cast<const float*>(at);
        return dtype == DType::f16 ? to_float(*reinterpret_cast<const f16*>(at))
                                   : to_float(*reinterpret_cast<const bf16*>(at));
    }
    void fill() {
        for (int64_t i = 0; i < count(); i++) set(i, value());
    }
};

std::vector<float> floats(int64_t n) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& v : x) v = value();
    return x;
}

struct Call {
    AttentionArgs a = {};
    std::unique_ptr<Block> q, k, v, out;
    std::vector<int32_t> cu_q, cu_k, used, leftpad, table;
    std::vector<float> lse, alibi, sinks, k_scale, v_scale, mask;
    std::vector<uint8_t> keep;

    Call() {
        a.dtype = DType(below(3));
        a.batch = 1 + below(3);
        a.kv_heads = 1 + below(3);
        const int64_t groups[] = {1, 2, 3, 4, 5, 8, 16};
        a.heads = a.kv_heads * groups[below(7)];
        a.head_dim = one_in(2) ? 64 : 1 + below(130);
        a.v_head_dim = one_in(2) ? a.head_dim : 1 + below(130);
        a.scale = 1.0f / sqrtf(float(a.head_dim));
        a.softcap = one_in(4) ? 2.0f : 0.0f;
        a.left = one_in(3) ? below(100) : -1;
        a.right = one_in(2) ? 0 : one_in(4) ? below(50) : -1;
        lengths();
        if (one_in(4)) alibi = floats(a.heads), a.alibi = alibi.data();
        if (one_in(4)) sinks = floats(a.heads), a.sinks = sinks.data();
        if (one_in(4)) k_scale = floats(a.kv_heads), a.k_scale = k_scale.data();
        if (one_in(4)) v_scale = floats(a.kv_heads), a.v_scale = v_scale.data();
        if (!a.cu_q && one_in(3)) add_mask();
    }

    // Dense, packed or paged; keys that are not in use become NaN.
    void lengths() {
        const int64_t most_q = one_in(2) ? 2 : 70, most_k = 300, layout = below(3);
        const bool packed = layout == 1, paged = layout == 2;
        a.q_len = below(most_q + 1), a.k_len = below(most_k + 1);
        a.page_size = paged ? 1 + below(40) : 0;
        const int64_t pages = paged ? a.k_len / a.page_size + 1 : 0, rows = paged ? a.batch * pages : a.batch;
        int64_t q_total = a.batch * a.q_len, k_total = paged ? rows * a.page_size : a.batch * a.k_len;
        if (packed) {
            cu_q = cumulative(most_q), cu_k = cumulative(most_k);
            a.cu_q = cu_q.data(), a.cu_k = cu_k.data();
            q_total = cu_q.back(), k_total = cu_k.back();
            a.q_len = a.k_len = 0;
        }
        q = std::make_unique<Block>(a.dtype, q_total * a.heads * a.head_dim);
        out = std::make_unique<Block>(a.dtype, q_total * a.heads * a.v_head_dim);
        k = std::make_unique<Block>(a.dtype, k_total * a.kv_heads * a.head_dim);
        v = std::make_unique<Block>(a.dtype, k_total * a.kv_heads * a.v_head_dim);
        q->fill();
        for (Block* b : {k.get(), v.get()})
            for (int64_t i = 0; i < b->count(); i++) b->set(i, NAN);
        lse.resize(size_t(q_total * a.heads));
        a.q = q->bytes.data(), a.k = k->bytes.data(), a.v = v->bytes.data(), a.out = out->bytes.data();
        a.lse = one_in(2) ? lse.data() : nullptr;
        a.q_head = a.head_dim, a.q_seq = a.heads * a.q_head, a.q_batch = a.q_len * a.q_seq;
        a.out_head = a.v_head_dim, a.out_seq = a.heads * a.out_head, a.out_batch = a.q_len * a.out_seq;
        a.k_head = a.head_dim, a.k_seq = a.kv_heads * a.k_head;
        a.v_head = a.v_head_dim, a.v_seq = a.kv_heads * a.v_head;
        const int64_t row_keys = paged ? a.page_size : a.k_len;
        a.k_batch = row_keys * a.k_seq, a.v_batch = row_keys * a.v_seq;
        a.lse_head = packed ? q_total : a.q_len, a.lse_batch = packed ? 0 : a.heads * a.q_len;
        const bool partly = paged || one_in(2);
        for (int64_t b = 0; b < a.batch; b++) {
            const int64_t stored = packed  ? cu_k[size_t(b) + 1] - cu_k[size_t(b)]
                                   : paged ? pages * a.page_size
                                           : a.k_len;
            used.push_back(int32_t(partly ? below(stored + 1) : stored));
            leftpad.push_back(int32_t(one_in(2) ? below(used.back() + 1) : 0));
            for (int64_t p = 0; p < pages; p++) table.push_back(int32_t(p * a.batch + b));
        }
        if (partly) a.used_k = used.data();
        if (one_in(3))
            a.leftpad = leftpad.data();
        else
            leftpad.assign(size_t(a.batch), 0);
        if (paged) a.block_table = table.data(), a.table_batch = pages, a.k_len = 0;
        for (int64_t b = 0; b < a.batch; b++)
            for (int64_t t = leftpad[size_t(b)]; t < used[size_t(b)]; t++) {
                for (int64_t i = 0; i < a.k_seq; i++) k->set(key_row(b, t) * a.k_seq + i, value());
                for (int64_t i = 0; i < a.v_seq; i++) v->set(key_row(b, t) * a.v_seq + i, value());
            }
    }

    std::vector<int32_t> cumulative(int64_t most) const {
        std::vector<int32_t> cu = {0};
        for (int64_t b = 0; b < a.batch; b++) cu.push_back(cu.back() + int32_t(below(most + 1)));
        return cu;
    }

    void add_mask() {
        const int64_t columns = a.page_size ? a.table_batch * a.page_size : a.k_len;
        a.mask_q = columns, a.mask_k = 1;
        a.mask_head = a.q_len * columns, a.mask_batch = a.heads * a.mask_head;
        mask = floats(a.batch * a.mask_batch);
        for (const float x : mask) keep.push_back(x > 0.0f);
        const bool boolean = one_in(2);
        a.mask_dtype = boolean ? DType::boolean : DType::f32;
        a.mask = boolean ? (const void*)keep.data() : mask.data();
    }

    // Row of k and v that holds token t of sequence b's cache.
    int64_t key_row(int64_t b, int64_t t) const {
        if (a.cu_k) return cu_k[size_t(b)] + t;
        if (!a.page_size) return b * a.k_len + t;
        return table[size_t(b * a.table_batch + t / a.page_size)] * a.page_size + t % a.page_size;
    }

    // Of query i of sequence b with key j, -inf where it is not seen.
    double score(const Sequence& s, int64_t b, int64_t head, int64_t i, int64_t j) const {
        const int64_t distance = j - i - s.shift, kv_head = head / (a.heads / a.kv_heads);
        if ((a.left >= 0 && distance < -a.left) || (a.right >= 0 && distance > a.right)) return -INFINITY;
        double x = 0.0;
        for (int64_t d = 0; d < a.head_dim; d++)
            x += double(q->get(s.q_offset + i * a.q_seq + head * a.q_head + d)) *
                 k->get(key_row(b, s.first_key + j) * a.k_seq + kv_head * a.k_head + d);
        x *= double(a.scale) * (a.k_scale ? k_scale[size_t(kv_head)] : 1.0);
        if (a.softcap > 0.0f) x = tanh(x / a.softcap) * a.softcap;
        if (a.alibi) x -= double(alibi[size_t(head)]) * fabs(double(distance));
        if (!a.mask) return x;
        const size_t at = size_t(b * a.mask_batch + head * a.mask_head + i * a.mask_q + s.first_key + j);
        return a.mask_dtype == DType::boolean ? (keep[at] ? x : -INFINITY) : x + mask[at];
    }

    // The largest error of one query's output.
    double error(const Sequence& s, int64_t b, int64_t head, int64_t i) const {
        std::vector<double> p;
        double most = a.sinks ? sinks[size_t(head)] : -INFINITY, sum = 0.0, worst = 0.0;
        for (int64_t j = 0; j < s.k_len; j++) {
            p.push_back(score(s, b, head, i, j));
            most = fmax(most, p.back());
        }
        for (double& x : p) sum += x = most == -INFINITY ? 0.0 : exp(x - most);
        if (a.sinks) sum += exp(sinks[size_t(head)] - most);
        const int64_t kv_head = head / (a.heads / a.kv_heads);
        for (int64_t c = 0; c < a.v_head_dim; c++) {
            double y = 0.0;
            for (int64_t j = 0; j < s.k_len; j++)
                y += p[size_t(j)] * v->get(key_row(b, s.first_key + j) * a.v_seq + kv_head * a.v_head + c);
            y *= sum > 0.0 ? (a.v_scale ? v_scale[size_t(kv_head)] : 1.0) / sum : 0.0;
            const float ours = out->get(s.out_offset + i * a.out_seq + head * a.out_head + c);
            worst = fabs(ours - y) <= worst ? worst : fabs(ours - y);  // NaN stays
        }
        return worst;
    }

    bool run() {
        const int threads = int(1 + below(3));
        const size_t bytes = attention_workspace(a, threads);
        void* memory = nullptr;  // exactly as much as was asked for, aligned as promised
        if (posix_memalign(&memory, 64, bytes ? bytes : 1)) return false;
        attention(a, threads, memory);
        free(memory);
        const double limit = a.dtype == DType::f32 ? 1e-5 : a.dtype == DType::f16 ? 2e-3 : 2e-2;
        for (int64_t b = 0; b < a.batch; b++) {
            const Sequence s = sequence(a, b);
            for (int64_t head = 0; head < a.heads; head++)
                for (int64_t i = 0; i < s.q_len; i += 1 + s.q_len / 4)
                    if (!(error(s, b, head, i) <= limit)) return false;
        }
        return true;
    }
};

}  // namespace

int main(int, char** argv) {
    for (int64_t i = 0; i < atoll(argv[1]); i++) {
        Call call;
        if (call.run()) continue;
        fprintf(stderr, "call %lld is wrong\n", (long long)i);
        return 1;
    }
    return 0;
}
