// A thread of a block as a stack of its own: switching costs a dozen instructions and no system call.
#pragma once

#include <cstddef>

namespace volta::emulator {

struct Fiber {
    void* stack_pointer = nullptr;
    void* stack = nullptr;  // lowest address
    size_t stack_bytes = 0;
    void* sanitizer_state = nullptr;

    // Makes the next switch to this fiber call entry, which must not return. `colour` moves the top of the
    // stack, so that the hot lines of many stacks do not fall into the same sets of the host's caches.
    void prepare(void (*entry)(), size_t colour);
};

// Saves the running context in `from` and continues `to`.
void switch_fiber(Fiber& from, Fiber& to);
// To be called first by an entry.
void fiber_entered(Fiber& self);

// Stacks for many fibers, a page without access below each: an overflow stops the process.
class Stacks {
public:
    static constexpr size_t BYTES = size_t{256} << 10;
    Stacks() = default;
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    ~Stacks();
    // At least n stacks; false when the system has no memory for them.
    bool reserve(size_t n);
    void* lowest(size_t i) const;

private:
    char* base_ = nullptr;
    size_t count_ = 0;
    size_t page_ = 0;
};

}  // namespace volta::emulator
