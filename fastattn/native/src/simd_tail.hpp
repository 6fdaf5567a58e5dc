// Partial loads and stores through a buffer, for instruction sets without masked memory operations.
#pragma once

namespace fastattn {
namespace FASTATTN_ISA {

template <class T>
FA_INLINE vf load_n(const T* p, int n) {
    T buffer[W] = {};
    for (int i = 0; i < n; i++) buffer[i] = p[i];
    return load(buffer);
}
template <class T>
FA_INLINE void store_n(T* p, vf a, int n) {
    T buffer[W];
    store(buffer, a);
    for (int i = 0; i < n; i++) p[i] = buffer[i];
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
