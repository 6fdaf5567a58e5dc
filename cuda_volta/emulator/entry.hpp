// Follows a kernel's source in its host build: how to call an entry whose parameters only the compiler knows.
#pragma once

#include <cstddef>

namespace volta::emulator {

template <typename Params>
struct Entry {
    using Type = Params;
};
template <typename Params>
Entry<Params> entry_of(void (*)(Params));

}  // namespace volta::emulator

#define VOLTA_ENTRY(kernel)                                                 \
    using VoltaParams = decltype(volta::emulator::entry_of(&kernel))::Type; \
    extern "C" void volta_invoke(const void* params) { kernel(*static_cast<const VoltaParams*>(params)); }
