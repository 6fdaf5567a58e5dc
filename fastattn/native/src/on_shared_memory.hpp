// The ranks of one machine, as a forward sees them.
#pragma once

#include "decoder.hpp"
#include "host.hpp"
#include "shared_memory.hpp"

namespace fastattn {

// Between slices of a wait Python is asked whether to go on: `overdue(operation, late, waited)`, for the
// operation's number in this forward, a rank that is missing, and seconds, raises when it is not.
class OnSharedMemory : public Ranks {
public:
    OnSharedMemory(SharedMemory* memory, const py::object& overdue) : memory_(memory), overdue_(overdue) {}

    void sum(void* x, DType dtype, int64_t values) override {
        end({SharedMemory::Kind::sum, dtype, 0, values * item_bytes(dtype), static_cast<char*>(x), nullptr});
    }
    void gather(void* x, void* out, int64_t bytes) override {
        end({SharedMemory::Kind::gather, DType::u8, 0, bytes, static_cast<char*>(x),
             static_cast<char*>(out)});
    }
    int world() const override { return memory_->world(); }

private:
    void end(const SharedMemory::Operation& operation) {
        constexpr double SLICE_S = 0.05;
        const uint64_t number = memory_->start(operation);
        for (int slices = 1;; slices++) {
            const int late = memory_->finish(number, SLICE_S);
            if (late < 0) break;
            const py::gil_scoped_acquire gil;
            if (PyErr_CheckSignals()) throw py::error_already_set();
            overdue_(operations_, late, slices * SLICE_S);
        }
        operations_++;
    }

    SharedMemory* memory_;
    const py::object& overdue_;
    int operations_ = 0;
};

}  // namespace fastattn
