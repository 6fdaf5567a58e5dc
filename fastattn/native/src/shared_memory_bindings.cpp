// Python's view of shared_memory.hpp.
#include "shared_memory.hpp"

#include <memory>

#include "checks.hpp"

namespace fastattn {

namespace {

using std::to_string;
using Kind = SharedMemory::Kind;

std::unique_ptr<SharedMemory> shared_memory(const py::buffer& buffer, int rank, int world, int64_t slots,
                                            int64_t slot_bytes) {
    if (world < 1 || rank < 0 || rank >= world)
        throw bad("rank", to_string(rank), "0 to " + to_string(world - 1));
    if (slots < 1) throw bad("slots", to_string(slots), "at least 1");
    if (slot_bytes < 64 || slot_bytes % 64)
        throw bad("slot_bytes", to_string(slot_bytes), "a multiple of 64");
    const py::buffer_info memory = buffer.request(true);
    const int64_t needed = SharedMemory::bytes_of(world, slots, slot_bytes);
    if (memory.size * memory.itemsize < needed || reinterpret_cast<uintptr_t>(memory.ptr) % 128)
        throw bad("memory", to_string(memory.size * memory.itemsize) + " bytes",
                  to_string(needed) + ", aligned to 128");
    return std::make_unique<SharedMemory>(memory.ptr, rank, world, slots, slot_bytes);
}

int64_t bytes_of(const Tensor& t, const char* name) {
    expect_contiguous(t, name);
    return elements(t) * item_bytes(t.dtype);
}

uint64_t start(SharedMemory& s, const SharedMemory::Operation& operation) {
    const py::gil_scoped_release release;
    return s.start(operation);
}

uint64_t sum(SharedMemory& s, py::object x_) {
    const Tensor x = tensor(x_, "x");
    expect_float(x, "x");
    return start(s, {Kind::sum, x.dtype, 0, bytes_of(x, "x"), x.as<char>(), nullptr});
}

uint64_t gather(SharedMemory& s, py::object x_, py::object out_) {
    const Tensor x = tensor(x_, "x"), out = tensor(out_, "out");
    const int64_t bytes = bytes_of(x, "x");
    expect_dtype(out, "out", {x.dtype});
    if (bytes_of(out, "out") != bytes * s.world())
        throw bad("out", to_string(elements(out)) + " elements", to_string(elements(x) * s.world()));
    return start(s, {Kind::gather, x.dtype, 0, bytes, x.as<char>(), out.as<char>()});
}

uint64_t broadcast(SharedMemory& s, py::object x_, int source) {
    const Tensor x = tensor(x_, "x");
    if (source < 0 || source >= s.world())
        throw bad("source", to_string(source), "0 to " + to_string(s.world() - 1));
    return start(s, {Kind::broadcast, x.dtype, source, bytes_of(x, "x"), x.as<char>(), nullptr});
}

}  // namespace

void bind_shared_memory(py::module_& m) {
    using py::arg;
    py::class_<SharedMemory>(m, "SharedMemory", "Collectives between the ranks of one machine.")
        .def(py::init(&shared_memory), arg("memory"), arg("rank"), arg("world"), arg("slots"),
             arg("slot_bytes"), py::keep_alive<1, 2>())
        .def_static("bytes_of", &SharedMemory::bytes_of, arg("world"), arg("slots"), arg("slot_bytes"))
        .def("sum", &sum, arg("x"))
        .def("gather", &gather, arg("x"), arg("out"))
        .def("broadcast", &broadcast, arg("x"), arg("source"))
        .def("finish", &SharedMemory::finish, arg("number"), arg("seconds"),
             py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastattn
