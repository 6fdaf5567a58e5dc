// Normalises O and writes it, with the log-sum-exp.
#pragma once

#include "prefill_sequence.cuh"
#include "prefill_softmax.cuh"

namespace volta {
VOLTA_DEVICE void finish(Softmax& softmax, Output& out, const PrefillParams& p, const Sequence& s, const Lane& lane, i32 query0, u32 head, u32 batch) {
    float inv[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        float t = softmax.sum[r]; t += shuffle_xor(t, 2); t += shuffle_xor(t, 4);
        inv[r] = t > 0 ? rcp_approx(t) : 0;
    }
    u16* base = p.out + batch * p.out_strides.batch + head * p.out_strides.head;
    for (int m = 0; m < 2; ++m) {
        float pair[2];
        for (int h = 0; h < 2; ++h) pair[h] = WIDE ? (m == 0 ? inv[h] : shuffle_xor(inv[h], 8)) : inv[row_of(m, 2 * h)];
        i32 query = query0 + tile_row(lane, m) + 4 * lane.high + lane.low;
        for (int j = 0; j < OUT_COLS / 2; ++j) {
            Operand8 o[2];
            for (int t = 0; t < 2; ++t) {
                float (&x)[8] = out[m][2 * j + t];
                float y[8];
                for (int i = 0; i < 8; ++i) y[i] = x[i] * pair[i >> 1 & 1] * 1.9259299443872359e-34f;
                o[t] = to_operand(pack_half2(y[0], y[1]), pack_half2(y[4], y[5]), pack_half2(y[2], y[3]), pack_half2(y[6], y[7]), lane.odd);
            }
            for (int h = 0; h < 2; ++h) {
                u32 chunk = WIDE ? 8 * j + 4 * h + 2 * lane.other + lane.side : 4 * j + 2 * h + lane.side;
                if (query < s.q_len) stg(reinterpret_cast<Word4*>(base + (u64)(query + s.q_row) * p.out_strides.row + 8 * chunk), Word4{o[0].k[h].x, o[0].k[h].y, o[1].k[h].x, o[1].k[h].y});
            }
        }
    }
}
}  // namespace volta
