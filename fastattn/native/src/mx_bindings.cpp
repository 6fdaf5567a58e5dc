// Python functions of formats of few bits: packing, unpacking, messages and their sums.
#include "checks.hpp"

#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

namespace fastattn {

namespace {

using std::to_string;

// bits, exponent_bits, mantissa_bits, bias, emax, max_code of quant.mx.MxElement.
using Element = std::array<int, 6>;

MxFormat format_of(const Element& e, int64_t block, int scale, int carry_above, int top,
                   const std::vector<float>& candidates) {
    if (block < 1) throw bad("block", to_string(block), "at least 1");
    MxFormat f = {e[0], e[1], e[2], e[3], e[4], e[5], MxScale(scale), carry_above, top, block, 0, {}};
    f.candidates = int(candidates.size());
    const int most = int(sizeof f.candidate / sizeof *f.candidate);
    if (f.candidates < 1 || f.candidates > most)
        throw bad("candidates", to_string(f.candidates), "1 to " + to_string(most));
    for (int i = 0; i < f.candidates; i++) f.candidate[i] = candidates[size_t(i)];
    return f;
}

int64_t code_bytes(const MxArgs& a) { return (a.n * a.format.bits + 7) / 8; }
int64_t scale_bytes(const MxArgs& a) {
    const int64_t blocks = (a.n + a.format.block - 1) / a.format.block;
    if (a.format.scale == MxScale::e8m0) return blocks;
    return 1 + blocks * (a.format.scale == MxScale::fp16 ? 2 : 1);
}

void expect_bytes(const Tensor& t, const char* name) {
    expect_dtype(t, name, {DType::u8});
    expect_contiguous(t, name);
}

// (rows, hidden), contiguous.
MxArgs args_of(const Tensor& t, const char* name, const MxFormat& format, int rotate,
               const std::vector<int64_t>& outliers) {
    expect_dims(t, name, 2);
    expect_float(t, name);
    expect_contiguous(t, name);
    MxArgs a = {};
    a.format = format;
    a.rows = t.shape[0];
    a.outlier_count = int64_t(outliers.size());
    a.n = t.shape[1] - a.outlier_count;
    a.dtype = t.dtype;
    a.outliers = outliers.data();
    a.rotate = rotate;
    if (rotate && (rotate < 32 || rotate & (rotate - 1)))
        throw bad("rotate", to_string(rotate), "0 or a power of two from 32");
    for (size_t i = 0; i < outliers.size(); i++)
        if (outliers[i] < (i ? outliers[i - 1] + 1 : 0) || outliers[i] >= t.shape[1])
            throw bad("outliers", "channel " + to_string(outliers[i]),
                      "ascending channels below " + to_string(t.shape[1]));
    return a;
}

void run(const MxArgs& a, bool encode, int threads) {
    if (!a.rows || a.n + a.outlier_count == 0) return;  // memory that may be null
    threads = threads_for(a.rows * a.n * a.count, COSTLY, threads);
    void* scratch = workspace(kernels().ops.mx_workspace(a, threads));
    Running running(threads);
    (encode ? kernels().ops.mx_encode : kernels().ops.mx_decode_sum)(a, threads, scratch);
}

void pack_or_unpack(bool pack, py::object x_, py::object codes_, py::object scales_, const MxFormat& format,
                    int threads) {
    const Tensor x = tensor(x_, "x"), codes = tensor(codes_, "codes"), scales = tensor(scales_, "scales");
    MxArgs a = args_of(x, "x", format, 0, {});
    expect_bytes(codes, "codes");
    expect_bytes(scales, "scales");
    expect_shape(codes, "codes", {a.rows, code_bytes(a)});
    expect_shape(scales, "scales", {a.rows, scale_bytes(a)});
    const MxMessage message = {codes.as<uint8_t>(), scales.as<uint8_t>(), nullptr};
    a.x = a.out = x.data;
    a.messages = &message;
    a.count = 1;
    run(a, pack, threads);
}

MxMessage message_of(py::handle object, const MxArgs& a) {
    const Tensor t = tensor(object, "message");
    expect_bytes(t, "message");
    expect_shape(t, "message", {a.rows * (code_bytes(a) + scale_bytes(a) + 2 * a.outlier_count)});
    uint8_t* scales = t.as<uint8_t>() + a.rows * code_bytes(a);
    return {t.as<uint8_t>(), scales, scales + a.rows * scale_bytes(a)};
}

void encode(py::object x_, py::object message_, const MxFormat& format, int rotate,
            const std::vector<int64_t>& outliers, int threads) {
    const Tensor x = tensor(x_, "x");
    MxArgs a = args_of(x, "x", format, rotate, outliers);
    const MxMessage message = message_of(message_, a);
    a.x = x.data;
    a.messages = &message;
    a.count = 1;
    run(a, true, threads);
}

void decode_sum(py::sequence messages_, py::object out_, const MxFormat& format, int rotate,
                const std::vector<int64_t>& outliers, int threads) {
    const Tensor out = tensor(out_, "out");
    MxArgs a = args_of(out, "out", format, rotate, outliers);
    std::vector<MxMessage> messages;
    for (const py::handle m : messages_) messages.push_back(message_of(m, a));
    if (messages.empty()) throw bad("messages", "none", "at least one");
    a.out = out.data;
    a.messages = messages.data();
    a.count = int64_t(messages.size());
    run(a, false, threads);
}

}  // namespace

void bind_mx(py::module_& m) {
    py::class_<MxFormat>(m, "MxFormat").def(py::init(&format_of));
    m.def("mx_pack", [](py::object x, py::object codes, py::object scales, const MxFormat& f, int threads) {
        pack_or_unpack(true, x, codes, scales, f, threads);
    });
    m.def("mx_unpack", [](py::object x, py::object codes, py::object scales, const MxFormat& f, int threads) {
        pack_or_unpack(false, x, codes, scales, f, threads);
    });
    m.def("encode", encode);
    m.def("decode_sum", decode_sum);
}

}  // namespace fastattn
