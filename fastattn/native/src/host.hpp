// The Python side of every kernel: tensors as pointers, the active table, the GIL, the region lock, memory.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>

#include "isa.hpp"

namespace fastattn {

namespace py = pybind11;

constexpr int MAX_DIM = 8;

// A torch CPU tensor, seen through its Python attributes (torch's C++ ABI is never used).
struct Tensor {
    void* data;
    DType dtype;
    int ndim;
    int64_t shape[MAX_DIM];
    int64_t stride[MAX_DIM];  // in elements

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

// Raises ValueError naming `name` unless it is a CPU tensor of at most MAX_DIM dimensions and a known dtype.
Tensor tensor(py::handle object, const char* name);
// Absent for None.
std::optional<Tensor> maybe_tensor(py::handle object, const char* name);

// Threads to use for a call that asks for `asked`: at least 1, and 1 in a child of fork(), where the
// OpenMP pool of the parent does not exist.
int usable_threads(int asked);

// Threads for `values` values of which each thread should get at least `grain`: a parallel region costs a few
// microseconds.
int threads_for(int64_t values, int64_t grain, int threads);
constexpr int64_t CHEAP = 1 << 15, COSTLY = 1 << 13;

// A buffer of at least `bytes`, aligned to 64 bytes, owned by the calling thread and reused by its later
// calls. Raises std::bad_alloc (MemoryError in Python).
void* workspace(size_t bytes);

// For the duration of a kernel: the GIL is released, and with threads > 1 no other thread of the process
// is inside an OpenMP region of this library. Nothing inside may touch Python objects.
class Running {
public:
    explicit Running(int threads);

private:
    py::gil_scoped_release release_;
    std::unique_lock<std::mutex> lock_;
};

void bind_attention(py::module_& m);
void bind_ops(py::module_& m);
void bind_linear(py::module_& m);
void bind_mx(py::module_& m);
void bind_decoder(py::module_& m);
void bind_shared_memory(py::module_& m);

}  // namespace fastattn
