#include "fiber.hpp"

#include <cstdint>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// volta_switch(void** save, void* load): the registers that the System V ABI lets a callee keep.
asm(R"(
    .text
    .hidden volta_switch
    .globl volta_switch
    .type volta_switch, @function
volta_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size volta_switch, .-volta_switch
)");
#elif defined(__aarch64__)
asm(R"(
    .text
    .hidden volta_switch
    .globl volta_switch
    .type volta_switch, %function
volta_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size volta_switch, .-volta_switch
)");
#else
#error "the emulator switches stacks on x86-64 and aarch64 only"
#endif

extern "C" void volta_switch(void** save, void* load);

namespace volta::emulator {

void Fiber::prepare(void (*entry)(), size_t colour) {
#if defined(__SANITIZE_ADDRESS__)
    // A failed block leaves its fibers in the middle of their frames.
    __asan_unpoison_memory_region(stack, stack_bytes);
    sanitizer_state = nullptr;
#endif
    const auto top = (reinterpret_cast<uintptr_t>(stack) + stack_bytes - colour) & ~uintptr_t{15};
#if defined(__x86_64__)
    // Six registers, the address that `ret` takes, and a slot in which entry expects a return address.
    auto* words = reinterpret_cast<uint64_t*>(top) - 8;
    std::memset(words, 0, 8 * sizeof(*words));
    words[6] = reinterpret_cast<uint64_t>(entry);
#else
    auto* words = reinterpret_cast<uint64_t*>(top) - 20;
    std::memset(words, 0, 20 * sizeof(*words));
    words[11] = reinterpret_cast<uint64_t>(entry);  // x30
#endif
    stack_pointer = words;
}

void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.sanitizer_state, to.stack, to.stack_bytes);
    volta_switch(&from.stack_pointer, to.stack_pointer);
    __sanitizer_finish_switch_fiber(from.sanitizer_state, nullptr, nullptr);
#else
    volta_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

void fiber_entered([[maybe_unused]] Fiber& self) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self.sanitizer_state, nullptr, nullptr);
#endif
}

Stacks::~Stacks() {
    if (base_) munmap(base_, count_ * (BYTES + page_));
}

bool Stacks::reserve(size_t n) {
    if (n <= count_) return true;
    if (base_) munmap(base_, count_ * (BYTES + page_));
    base_ = nullptr;
    count_ = 0;
    page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK;
    void* memory = mmap(nullptr, n * (BYTES + page_), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) return false;
    base_ = static_cast<char*>(memory);
    count_ = n;
    for (size_t i = 0; i < n; i++)
        if (mprotect(base_ + i * (BYTES + page_), page_, PROT_NONE) != 0) return false;
    return true;
}

void* Stacks::lowest(size_t i) const { return base_ + i * (BYTES + page_) + page_; }

}  // namespace volta::emulator
