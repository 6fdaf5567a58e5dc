// All kernels of one instruction set: compiled once for each, with -DFASTATTN_ISA=<name> and its -m flags.
#include "attention.hpp"
#include "isa.hpp"
#include "ops_kernels.hpp"

#define FA_STRING_(x) #x
#define FA_STRING(x) FA_STRING_(x)

namespace fastattn {
namespace FASTATTN_ISA {

extern const KernelTable table;
const KernelTable table = {FA_STRING(FASTATTN_ISA), W, attention_workspace, attention, ops_table};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
