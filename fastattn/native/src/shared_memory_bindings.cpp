// Python's view of shared_memory.hpp.
#include "shared_memory.hpp"

#include "checks.hpp"

namespace fastattn {

namespace {

using std::to_string;
using Kind = SharedMemory::Kind;

int64_t bytes_of(const Tensor& t, const char* name) {
    expect_contiguous(t, name);
    return elements(t) * item_bytes(t.dtype);
}

// The memory of a Python buffer, kept while ranks may use it.
class Shared {
public:
    Shared(const py::buffer& memory, int rank, int world, int64_t slots, int64_t slot_bytes)
        : memory_(memory.request(true)), rank_(rank), world_(world) {
        if (world < 1 || rank < 0 || rank >= world) throw bad("rank", to_string(rank), "below world");
        if (slots < 1 || slot_bytes < 64 || slot_bytes % 64)
            throw bad("slot_bytes", to_string(slot_bytes), "a multiple of 64");
        const int64_t needed = SharedMemory::bytes_of(world, slots, slot_bytes);
        if (memory_.size * memory_.itemsize < needed || reinterpret_cast<uintptr_t>(memory_.ptr) % 128)
            throw bad("memory", to_string(memory_.size * memory_.itemsize) + " bytes",
                      to_string(needed) + ", aligned to 128");
        shared_.emplace(memory_.ptr, rank, world, slots, slot_bytes);
    }

    uint64_t sum(py::object x_) {
        const Tensor x = tensor(x_, "x");
        expect_float(x, "x");
        return start({Kind::sum, x.dtype, 0, bytes_of(x, "x"), x.as<char>(), nullptr});
    }
    uint64_t gather(py::object x_, py::object out_) {
        const Tensor x = tensor(x_, "x"), out = tensor(out_, "out");
        const int64_t bytes = bytes_of(x, "x");
        expect_dtype(out, "out", {x.dtype});
        if (bytes_of(out, "out") != bytes * world_)
            throw bad("out", to_string(elements(out)) + " elements", to_string(elements(x) * world_));
        return start({Kind::gather, x.dtype, 0, bytes, x.as<char>(), out.as<char>()});
    }
    uint64_t broadcast(py::object x_, int source) {
        const Tensor x = tensor(x_, "x");
        if (source < 0 || source >= world_) throw bad("source", to_string(source), "a rank");
        return start({Kind::broadcast, x.dtype, source, bytes_of(x, "x"), x.as<char>(), nullptr});
    }
    int finish(uint64_t number, double seconds) {
        const py::gil_scoped_release release;
        return shared_->finish(number, seconds);
    }

private:
    uint64_t start(const SharedMemory::Operation& operation) {
        const py::gil_scoped_release release;
        return shared_->start(operation);
    }

    py::buffer_info memory_;
    int rank_, world_;
    std::optional<SharedMemory> shared_;
};

}  // namespace

void bind_shared_memory(py::module_& m) {
    using py::arg;
    py::class_<Shared>(m, "SharedMemory", "Collectives between the ranks of one machine.")
        .def(py::init<const py::buffer&, int, int, int64_t, int64_t>(), arg("memory"), arg("rank"),
             arg("world"), arg("slots"), arg("slot_bytes"))
        .def_static("bytes_of", &SharedMemory::bytes_of, arg("world"), arg("slots"), arg("slot_bytes"))
        .def("sum", &Shared::sum, arg("x"))
        .def("gather", &Shared::gather, arg("x"), arg("out"))
        .def("broadcast", &Shared::broadcast, arg("x"), arg("source"))
        .def("finish", &Shared::finish, arg("number"), arg("seconds"));
}

}  // namespace fastattn
