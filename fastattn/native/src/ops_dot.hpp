// y = x W^T + bias for few rows of x and a quantized W, by integer dot products.
#pragma once

#include "ops_dot_ahead.hpp"
#include "ops_dot_input.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

constexpr int MAX_M = 4;  // rows of x whose sums stay in registers

// Rows of W in flight at M rows of x: their sums, their operands and a block of x share the registers.
constexpr int dot_rows(int m, int operands) {
    if (REGISTERS == 32) return m + operands <= 5 ? 4 : 2;
    return m <= 3 ? 2 : 1;
}

// A row of W; Scale: float or f16.
template <class Scale>
struct DotRow {
    const uint8_t* codes;
    const uint8_t* ahead;  // fetched while they are read
    const Scale* scales;   // SPREAD - 1 more can be read
    const Scale* mins;     // may be null
};

// What the rows of W are multiplied with.
template <class Record>
struct DotInput {
    const Record* x;       // [pass][rows]
    const float* sums;     // over groups: [rows][sums_stride]
    const int32_t* block;  // of each pass
    const int32_t* first;  // the lowest group of each pass
    const int32_t* lanes;  // [pass][W]: group of each lane, less that
    int64_t rows, sums_stride, groups;
    int64_t last;  // block
    int rest;      // bytes of its codes
};

template <class Codes, int LIMBS, class Scale, int M, int R>
struct DotBlocks {
    using Record = Limbs<Codes, LIMBS>;

    // Adds passes [lo, hi) over R rows of W and M rows of x from m0 on to their sums, which pass 0 begins.
    static void run(const DotRow<Scale>* rows, const DotInput<Record>& in, int64_t m0, int64_t lo, int64_t hi,
                    vf* sums) {
        vf sum[M * R];
#pragma GCC unroll 16
        for (int i = 0; i < M * R; i++) sum[i] = zero();
        if (lo == 0 && (Codes::CENTER || rows[0].mins)) add_constants(rows, in, m0, sum);
        const Record* x = in.x + lo * in.rows + m0;
        for (int64_t pass = lo; pass < hi; pass++, x += in.rows) {
            const vi lane = load_ints(in.lanes + pass * W);
            const int64_t first = in.first[pass], b = in.block[pass];
            const int bytes = b < in.last ? BLOCK_BYTES : in.rest;
            vb q[R][Codes::OPERANDS];
            vf scale[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                prefetch(rows[r].ahead + b * BLOCK_BYTES);
                Codes::decode(load_bytes_n(rows[r].codes + b * BLOCK_BYTES, bytes), q[r]);
                scale[r] = spread(rows[r].scales + first, lane);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) {
                vf products[R];
                add_part<0>(q, x[m], products);
                if constexpr (Record::PARTS > 1) add_part<1>(q, x[m], products);
                if constexpr (Record::PARTS > 2) add_part<2>(q, x[m], products);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) sum[m * R + r] = fma(products[r], scale[r], sum[m * R + r]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < M * R; i++) {
            vf& total = sums[i / R * TILE + i % R];
            total = lo == 0 ? sum[i] : total + sum[i];
        }
    }

    // What is constant in a group of W, times the group's sum of x.
    FA_INLINE_MEMBER static void add_constants(const DotRow<Scale>* rows, const DotInput<Record>& in,
                                               int64_t m0, vf* sum) {
        const float* x = in.sums + m0 * in.sums_stride;
        for (int64_t g = 0; g < in.groups; g += W, x += W) {
            const int n = in.groups - g < W ? int(in.groups - g) : W;
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                vf c = zero();
                if (rows[r].mins) c = load_first(rows[r].mins + g, n);
                if (Codes::CENTER) c = fma(load_first(rows[r].scales + g, n), set1(float(Codes::CENTER)), c);
#pragma GCC unroll 8
                for (int m = 0; m < M; m++)
                    sum[m * R + r] = fma(c, load(x + m * in.sums_stride), sum[m * R + r]);
            }
        }
    }
    FA_INLINE_MEMBER static vf load_first(const Scale* p, int n) { return n == W ? load(p) : load_n(p, n); }

    // Part P of the products of R rows' codes and a block of x, in x's scale.
    template <int P>
    FA_INLINE_MEMBER static void add_part(const vb (*q)[Codes::OPERANDS], const Record& x, vf* products) {
        constexpr int LOW = Record::end(P) - 1;
        constexpr bool TWO = LOW - (P ? Record::end(P - 1) : 0) > 0;
        vb low[Codes::OPERANDS], high[Codes::OPERANDS];
#pragma GCC unroll 2
        for (int i = 0; i < Codes::OPERANDS; i++) {
            low[i] = hold(load_bytes(x.limbs[LOW][i]));
            if (TWO) high[i] = hold(load_bytes(x.limbs[LOW - TWO][i]));
        }
        const vi start = load_ints(x.start[P]);
        const vf last = load(x.center[0]), center = as_float(as_int(last) + set1_int(Record::exponents(P)));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            vi n = Codes::dot(start, q[r], low);
            if (TWO) n = n + shift_left<8>(Codes::dot(set1_int(0), q[r], high));
            if (LIMBS == 1)
                products[r] = fma(as_float(n), load(x.center[LIMBS == 1]), zero() - center);
            else
                products[r] = P ? products[r] + (as_float(n) - center) : as_float(n) - center;
        }
    }
};

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
