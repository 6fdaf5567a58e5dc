// Which instruction sets were built (-DFASTATTN_WITH_<NAME>) and which of them this CPU and kernel can run.
#include "isa.hpp"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace fastattn {

namespace portable {
extern const KernelTable table;
}
namespace {
bool always() { return true; }
}  // namespace

#if defined(FASTATTN_WITH_AVX2)
namespace avx2 {
extern const KernelTable table;
}
namespace {
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace
#endif

#if defined(FASTATTN_WITH_AVX512)
namespace avx512 {
extern const KernelTable table;
}
namespace {
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
}  // namespace
#endif

#if defined(FASTATTN_WITH_AVX512_BF16)
namespace avx512_bf16 {
extern const KernelTable table;
}
namespace {
bool has_avx512_bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
}  // namespace
#endif

#if defined(FASTATTN_WITH_NEON)
namespace neon {
extern const KernelTable table;
}
namespace {
bool has_neon() { return getauxval(AT_HWCAP) & (1u << 1); }  // HWCAP_ASIMD
}  // namespace
#endif

const IsaEntry isa_entries[] = {
    {&portable::table, always},
#if defined(FASTATTN_WITH_NEON)
    {&neon::table, has_neon},
#endif
#if defined(FASTATTN_WITH_AVX2)
    {&avx2::table, has_avx2},
#endif
#if defined(FASTATTN_WITH_AVX512)
    {&avx512::table, has_avx512},
#endif
#if defined(FASTATTN_WITH_AVX512_BF16)
    {&avx512_bf16::table, has_avx512_bf16},
#endif
};
const int isa_count = sizeof(isa_entries) / sizeof(isa_entries[0]);

}  // namespace fastattn
