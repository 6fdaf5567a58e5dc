#include "host.hpp"

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <new>

namespace fastattn {

namespace {

std::mutex region;
std::atomic<const KernelTable*> active{nullptr};
std::atomic<bool> forked{false};

struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
};
thread_local Buffer buffer;

// Attribute names and dtype objects, made once at import and kept for the life of the process.
struct Names {
    PyObject *data_ptr, *stride, *shape, *dtype, *is_cpu;
    PyObject* dtypes[8];
};
Names names;

constexpr const char* DTYPE_NAMES[8] = {"float32", "float16", "bfloat16", "bool",
                                        "uint8",   "int8",    "int32",    "int64"};

void lock_region() { region.lock(); }
void unlock_region() { region.unlock(); }
void after_fork_in_child() {
    forked = true;
    region.unlock();
}

py::object call(PyObject* object, PyObject* name) {
    return py::reinterpret_steal<py::object>(PyObject_CallMethodObjArgs(object, name, nullptr));
}

py::list available() {
    py::list result;
    for (int i = 0; i < isa_count; i++)
        if (isa_entries[i].runs_here()) result.append(isa_entries[i].table->name);
    return result;
}

void set_isa(const std::string& name) {
    for (int i = isa_count - 1; i >= 0; i--) {
        if (!isa_entries[i].runs_here()) continue;
        if (name.empty() || name == isa_entries[i].table->name) {
            active = isa_entries[i].table;
            return;
        }
    }
    throw py::value_error("isa='" + name + "' cannot run here: expected one of " +
                          std::string(py::str(available())) + " (slowest first)");
}

}  // namespace

const char* dtype_name(DType dtype) { return DTYPE_NAMES[int(dtype)]; }

int64_t item_bytes(DType dtype) {
    switch (dtype) {
        case DType::i64:
            return 8;
        case DType::f32:
        case DType::i32:
            return 4;
        case DType::f16:
        case DType::bf16:
            return 2;
        default:
            return 1;
    }
}

Tensor tensor(py::handle object, const char* name) {
    Tensor t;
    PyObject* p = object.ptr();
    const auto bad = [name](const std::string& why) {
        return py::value_error(std::string(name) + ": " + why);
    };
    py::object dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(p, names.dtype));
    py::object is_cpu = py::reinterpret_steal<py::object>(PyObject_GetAttr(p, names.is_cpu));
    py::object shape = py::reinterpret_steal<py::object>(PyObject_GetAttr(p, names.shape));
    if (!dtype || !is_cpu || !shape) throw py::error_already_set();
    int code = 0;
    while (code < 8 && names.dtypes[code] != dtype.ptr()) code++;
    if (code == 8) throw bad("dtype " + std::string(py::str(dtype)) + " is not known to the native kernels");
    if (is_cpu.ptr() != Py_True) throw bad("expected a CPU tensor");
    py::object stride = call(p, names.stride), address = call(p, names.data_ptr);
    if (!stride || !address) throw py::error_already_set();
    t.dtype = DType(code);
    t.data = PyLong_AsVoidPtr(address.ptr());
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape.ptr());
    if (ndim > MAX_DIM) throw bad("has " + std::to_string(ndim) + " dimensions, at most 8 are accepted");
    t.ndim = int(ndim);
    for (int i = 0; i < t.ndim; i++) {
        t.shape[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
        t.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), i));
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    return t;
}

std::optional<Tensor> maybe_tensor(py::handle object, const char* name) {
    if (object.is_none()) return std::nullopt;
    return tensor(object, name);
}

const KernelTable& kernels() { return *active.load(); }

int usable_threads(int asked) { return asked < 1 || forked ? 1 : asked; }

int threads_for(int64_t values, int64_t grain, int threads) {
    const int64_t useful = values / grain;
    return usable_threads(useful < threads ? int(useful) : threads);
}

void* workspace(size_t bytes) {
    if (buffer.size < bytes) {
        std::free(buffer.data);
        buffer.size = 0;
        bytes = (bytes + 4095) & ~size_t(4095);
        buffer.data = std::aligned_alloc(64, bytes);
        if (!buffer.data) throw std::bad_alloc();
        buffer.size = bytes;
    }
    return buffer.data;
}

Running::Running(int threads) : lock_(region, std::defer_lock) {
    if (threads > 1) lock_.lock();  // after release_, so that a waiting thread does not hold the GIL
}

}  // namespace fastattn

PYBIND11_MODULE(_kernels, m) {
    using namespace fastattn;
    m.doc() = "The native CPU kernels of fastattn. Import torch first: its OpenMP runtime is used.";
    py::module_ torch = py::module_::import("torch");
    names.data_ptr = PyUnicode_InternFromString("data_ptr");
    names.stride = PyUnicode_InternFromString("stride");
    names.shape = PyUnicode_InternFromString("shape");
    names.dtype = PyUnicode_InternFromString("dtype");
    names.is_cpu = PyUnicode_InternFromString("is_cpu");
    for (int i = 0; i < 8; i++) names.dtypes[i] = py::object(torch.attr(DTYPE_NAMES[i])).release().ptr();
    pthread_atfork(lock_region, unlock_region, after_fork_in_child);

    set_isa("");
    m.def("isa", [] { return kernels().name; });
    m.def("available_isas", available);
    m.def("set_isa", set_isa, py::arg("name"));
    // Of the calling thread only; torch.set_num_threads would bind every thread of the process.
    m.def("compute_on_one_thread", [] { omp_set_num_threads(1); });
    m.def("build_info", [] {
        py::dict info;
        info["compiler"] = FASTATTN_COMPILER;
        info["flags"] = FASTATTN_FLAGS;
        info["pybind11"] =
            PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
        return info;
    });
    bind_attention(m);
    bind_ops(m);
    bind_linear(m);
    bind_mx(m);
    bind_decoder(m);
    bind_shared_memory(m);
}
