// Follows a kernel's source in its host build: how to call an entry whose parameters only the compiler knows.
#pragma once

#include <cstddef>

namespace volta::emulator {

template <typename Params>
struct Entry {
    static constexpr size_t params_size = sizeof(Params);
    using Type = Params;
};
template <typename Params>
Entry<Params> entry_of(void (*)(Params));

}  // namespace volta::emulator

#define VOLTA_ENTRY(kernel)                                                                               \
    using VoltaParams = decltype(volta::emulator::entry_of(&kernel))::Type;                               \
    extern "C" void volta_invoke(const void* params) { kernel(*static_cast<const VoltaParams*>(params)); } \
    extern "C" __attribute__((visibility("default"))) size_t volta_params_size() { return sizeof(VoltaParams); }
