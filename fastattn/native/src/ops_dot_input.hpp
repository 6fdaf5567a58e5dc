// x as integers for dot products with integer weights.
//
// The values that a lane multiplies (8 columns for 4-bit weights, 4 for 8-bit ones) are integers of LIMBS
// balanced bytes times one scale: a power of two (LIMBS 2 and 3) or the largest value / 127 (LIMBS 1).
// Integer sums become floats without a conversion: they are added to the bits of a center, 1.5 * 2^23 times
// the scale, and the center is subtracted again, all exactly. That asks for sums below 2^22, so limbs are
// summed in PARTS separate integers where they must.
#pragma once

#include "ops_dot_passes.hpp"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

// How codes meet the limbs of x. A block is BLOCK_BYTES of codes of a row of W.
//   OPERANDS     vectors that a block is decoded into
//   CENTER       the code that is 0 in the sums; the rest of the weight is CENTER * scale + min
//   BIAS         what an operand exceeds its code's distance from CENTER by
//   PART_LIMBS   limbs of x that a sum of less than 2^22 may cover
struct DotInt4 {
    static constexpr int OPERANDS = 2, COLUMNS = 8 * W, CENTER = 8, BIAS = 8, PART_LIMBS = 2;
    FA_INLINE_MEMBER static void decode(vb codes, vb* q) { nibbles(codes, q[0], q[1]); }
    FA_INLINE_MEMBER static vi dot(vi acc, const vb* q, const vb* s) {
        return dot_nibbles(acc, q[0], s[0], q[1], s[1]);
    }
    // Where a column of a block lies in its operand, and in all of them.
    FA_INLINE_MEMBER static int byte(int column) { return column / CHUNK * 16 + column % 16; }
    FA_INLINE_MEMBER static int place(int column) { return column % CHUNK / 16 * BLOCK_BYTES + byte(column); }
    FA_INLINE_MEMBER static int column_of_lane(int lane) { return lane / 4 * CHUNK; }
};
struct DotInt8 {
    static constexpr int OPERANDS = 1, COLUMNS = 4 * W, CENTER = 0, BIAS = BYTE_BIAS, PART_LIMBS = 1;
    FA_INLINE_MEMBER static void decode(vb codes, vb* q) { q[0] = biased(codes); }
    FA_INLINE_MEMBER static vi dot(vi acc, const vb* q, const vb* s) { return dot_bytes(acc, q[0], s[0]); }
    FA_INLINE_MEMBER static int byte(int column) { return column; }
    FA_INLINE_MEMBER static int place(int column) { return column; }
    FA_INLINE_MEMBER static int column_of_lane(int lane) { return lane * 4; }
};

// Columns of whole blocks and whole chunks.
template <class Codes>
constexpr int dot_unit() {
    return Codes::COLUMNS > CHUNK ? Codes::COLUMNS : CHUNK;
}

// A block of a row of x. Limbs and parts from the most significant on; the first part may have fewer limbs.
template <class Codes, int LIMBS>
struct Limbs {
    static constexpr int PARTS = (LIMBS + Codes::PART_LIMBS - 1) / Codes::PART_LIMBS;
    int8_t limbs[LIMBS][Codes::OPERANDS][BLOCK_BYTES];
    int32_t start[PARTS][W];              // the bits of the part's center, less BIAS times its limbs
    float center[LIMBS == 1 ? 2 : 1][W];  // of the last part; then the scale, where it is no power of two
    // One past the last limb of part p.
    static constexpr int end(int p) { return LIMBS - (PARTS - 1 - p) * Codes::PART_LIMBS; }
    // The bits by which the center of part p exceeds that of the last part.
    static constexpr int32_t exponents(int p) { return 8 * (LIMBS - end(p)) << 23; }
};

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23

// From here on values, as infinities and NaN, are left to floats.
constexpr float LARGEST = 0x1p110f;

// Integers of the values x[i], N vectors, whose lanes 4 j .. 4 j + 3 share a scale; out[i]: their limbs as
// bytes. Returns the largest magnitude of each four lanes.
template <int LIMBS, int N>
FA_INLINE vf integers(const vf* x, vi* out, vf& center, vf& scale) {
    vf most = abs(x[0]);
    for (int i = 1; i < N; i++) most = max(abs(x[i]), most);
    most = max_of_fours(most);
    if (LIMBS == 1) {
        // Few enough bits that MAGIC times the scale is exact, rounded up so that no value exceeds 127.
        const vi least = as_int(max(most * set1(1.0f / 127), set1(0x1p-126f)));
        scale = as_float(shift_left<12>(shift_right<12>(least + set1_int(0x1fff))));
        center = scale * set1(MAGIC);
        const vf inverse = set1(1.0f) / scale;
        for (int i = 0; i < N; i++) out[i] = to_int(x[i] * inverse);
        return most;
    }
    // With `exponent` (biased) of the power of two above them, values become integers below 2^(8 LIMBS - 1);
    // balanced limbs reach 0.996 of that, hence the factor.
    constexpr int BITS = 8 * LIMBS - 1, HALVES = LIMBS == 2 ? 0x80 : 0x8080;
    const vi exponent = shift_right<23>(as_int(most * set1(1.004f)));
    center = as_float(shift_left<23>(exponent + set1_int(127 + 23 - 126 - BITS)) + set1_int(0x400000));
    const vf shift = set1(0x1p23f + 126 + BITS) - as_float(exponent + set1_int(0x4b000000));
    for (int i = 0; i < N; i++) out[i] = (to_int(ldexp(x[i], shift)) + set1_int(HALVES)) ^ set1_int(HALVES);
    return most;
}

// Where the center and the scale are known, the rest of a block follows from its limbs.
template <class Codes, int LIMBS>
FA_INLINE void set_starts(Limbs<Codes, LIMBS>& r) {
    using Record = Limbs<Codes, LIMBS>;
    const vb bias[2] = {set1_byte(Codes::BIAS), set1_byte(Codes::BIAS)};
    for (int p = 0, l = 0; p < Record::PARTS; p++) {
        vi sum = set1_int(0);
        for (; l < Record::end(p); l++) {
            vb s[Codes::OPERANDS];
            for (int i = 0; i < Codes::OPERANDS; i++) s[i] = load_bytes(r.limbs[l][i]);
            sum = Codes::dot(shift_left<8>(sum), bias, s);
        }
        const vf center = LIMBS == 1 ? set1(MAGIC) : load(r.center[0]);
        store_ints(r.start[p], as_int(center) + set1_int(Record::exponents(p)) - sum);
    }
}

// The block of x of each pass from `first` up to `end`, of which the first one holds all columns.
template <class Codes, int LIMBS>
static void split_passes(const Passes<Codes>& passes, int64_t first, int64_t end,
                         Limbs<Codes, LIMBS>* records, int64_t stride) {
    for (int64_t p = end; p-- > first;) {  // the first one last: the others are made of it
        Limbs<Codes, LIMBS>& r = records[p * stride];
        if (p > first) r = records[first * stride];
        for (int l = 0; l < LIMBS; l++)
            for (int i = 0; i < Codes::OPERANDS; i++)
                for (int k = 0; k < BLOCK_BYTES; k++) r.limbs[l][i][k] &= passes.mask(p, i)[k];
        set_starts(r);
    }
}

template <class T>
static float sum_of(const T* x, int64_t n) {
    vf sum = zero();
    for (; n >= W; n -= W, x += W) sum = sum + load(x);
    return reduce_add(n ? sum + load_n(x, int(n)) : sum);
}

// Row m of x: its blocks are `records`[pass * stride], its sums over the groups of W are added to `sums`.
// False when a value is too large, infinite or NaN.
template <class Codes, int LIMBS, class T>
static bool integer_row(const T* x, const WeightArgs& w, const Passes<Codes>& passes,
                        Limbs<Codes, LIMBS>* records, int64_t stride, float* sums) {
    using Record = Limbs<Codes, LIMBS>;
    constexpr int UNIT = dot_unit<Codes>();
    constexpr int SHARING = Codes::OPERANDS, APART = PARTS / SHARING;  // vectors of a chunk that share lanes
    GroupCursor groups(w);
    vf largest = zero(), invalid = zero();
    for (int64_t i = 0; i < passes.run_count() && sums; i++) {
        const Run& run = passes.runs()[i];
        sums[run.group] += sum_of(x + run.begin, run.end - run.begin);
    }
    const bool by_halves = sums && !passes.run_count();
    int64_t block = 0;
    for (int64_t at = 0; at < w.in; at += UNIT, block += UNIT / Codes::COLUMNS) {
        for (int c = 0; c < UNIT; c += CHUNK) {
            vf v[PARTS];
            for (int k = 0; k < PARTS; k++) {
                const int64_t first = at + c + k * W, rest = w.in - first;
                v[k] = rest >= W ? load(x + first) : rest > 0 ? load_n(x + first, int(rest)) : zero();
                invalid = invalid + (v[k] - v[k]);
            }
            for (int k = 0; k < PARTS && by_halves; k += PARTS / 2) {
                vf sum = v[k];
                for (int i = 1; i < PARTS / 2; i++) sum = sum + v[k + i];
                sums[groups.next()] += reduce_add(sum);
            }
            for (int k = 0; k < APART; k++) {
                const int column = (c + k * W) % Codes::COLUMNS, lane = Codes::byte(column) / 4;
                Record& r = records[passes.begin_of(block + (c + k * W) / Codes::COLUMNS) * stride];
                vf sharing[SHARING], center, scale = zero();
                vi n[SHARING];
                for (int i = 0; i < SHARING; i++) sharing[i] = v[k + i * APART];
                largest = max(integers<LIMBS, SHARING>(sharing, n, center, scale), largest);
                store_fours(r.center[0] + lane, center);
                if (LIMBS == 1) store_fours(r.center[LIMBS == 1] + lane, scale);
                for (int i = 0; i < SHARING; i++) {
                    store_low_bytes(r.limbs[LIMBS - 1][i] + 4 * lane, n[i]);
                    if (LIMBS > 1)
                        store_low_bytes(r.limbs[LIMBS > 1 ? LIMBS - 2 : 0][i] + 4 * lane,
                                        shift_right<8>(n[i]));
                    if (LIMBS > 2) store_low_bytes(r.limbs[0][i] + 4 * lane, shift_right<16>(n[i]));
                }
            }
        }
        for (int64_t b = block; b < block + UNIT / Codes::COLUMNS; b++) {
            const int64_t first = passes.begin_of(b), end = passes.begin_of(b + 1);
            if (end - first > 1)
                split_passes(passes, first, end, records, stride);
            else
                set_starts(records[first * stride]);
        }
    }
    return reduce_max(largest) < LARGEST && reduce_add(invalid) == 0.0f;
}

}  // namespace
}  // namespace FASTATTN_ISA
}  // namespace fastattn
