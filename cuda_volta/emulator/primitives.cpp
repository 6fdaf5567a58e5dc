// The machine, as primitives.hpp calls it from the kernels: on each worker its own.
#include "machine.hpp"
#include "primitives.hpp"

extern "C" void volta_invoke(const void* params);

namespace volta::emulator {

namespace {

thread_local Machine* machine = nullptr;

}  // namespace

void enter_machine(Machine* of_this_worker) { machine = of_this_worker; }

void thread_main() {
    fiber_entered(machine->lane_fiber());
    volta_invoke(machine->launch().params);
    machine->exit_thread();
    __builtin_unreachable();
}

u32 thread_index() { return machine->thread(); }
u32 block_index(int axis) { return machine->block(axis); }
u32 grid_size(int axis) { return machine->launch().grid[axis]; }
const void* shared_load(u32 address, u32 bytes, Site site) {
    return machine->shared_load(address, bytes, site);
}
void shared_store(u32 address, const void* value, u32 bytes, Site site) {
    machine->shared_store(address, value, bytes, site);
}
void global_load(const void* address, u32 bytes, Site site) {
    machine->global(address, bytes, Access::GLOBAL_LOAD, site);
}
void global_store(void* address, u32 bytes, Site site) {
    machine->global(address, bytes, Access::GLOBAL_STORE, site);
}
u32 global_atomic_add(u32* address, u32 value, Site site) {
    machine->global(address, sizeof(u32), Access::ATOMIC, site);
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);
}
void memory_fence() {
    machine->memory_fence();
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
void block_barrier(Site site) { machine->block_barrier(site); }
void warp_barrier(Site site) { machine->warp_barrier(site); }
u32 exchange_xor(u32 value, u32 mask, Site site) {
    return machine->exchange(value, machine->thread() ^ mask, site);
}
u32 exchange(u32 value, u32 lane, Site site) { return machine->exchange(value, lane, site); }
bool vote_any(bool value, Site site) { return machine->vote_any(value, site); }
void mma(float (&d)[8], Word2 a, Word2 b, bool b_is_row, Site site) { machine->mma(d, a, b, b_is_row, site); }

}  // namespace volta::emulator
