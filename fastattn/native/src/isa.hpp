// The table of kernels that each instruction set fills, the choice among them, and the dtypes they know.
#pragma once

#include <stddef.h>

#include "attention_args.hpp"
#include "ops_table.hpp"

namespace fastattn {

struct KernelTable {
    const char* name;
    int lanes;  // float lanes of a vector
    // Bytes of workspace that `attention` needs for these arguments and threads.
    size_t (*attention_workspace)(const AttentionArgs&, int threads);
    void (*attention)(const AttentionArgs&, int threads, void* workspace);
    OpsTable ops;
};

struct IsaEntry {
    const KernelTable* table;
    bool (*runs_here)();
};

// Slowest first; defined in isa.cpp.
extern const IsaEntry isa_entries[];
extern const int isa_count;

// Defined in host.cpp.
const KernelTable& kernels();  // in use
const char* dtype_name(DType dtype);
int64_t item_bytes(DType dtype);

}  // namespace fastattn
