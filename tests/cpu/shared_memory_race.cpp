// Ranks as threads of one process over small rings, for ThreadSanitizer: every operation is checked, and each
// byte that a rank reads must have been handed over by its writer.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "ops_sum.hpp"
#include "shared_memory.cpp"

namespace fastattn {

const KernelTable table = [] {
    KernelTable t = {};
    t.ops.sum = portable::sum;
    return t;
}();
const KernelTable& kernels() { return table; }
const char* dtype_name(DType) { return "float32"; }
int64_t item_bytes(DType) { return 4; }

}  // namespace fastattn

using fastattn::DType;
using fastattn::SharedMemory;

namespace {

constexpr int64_t SLOTS = 3, SLOT_BYTES = 4096;

float value(int rank, int64_t operation, int64_t i) { return float((rank * 7 + operation * 3 + i) % 64); }

bool rank_is_right(void* memory, int rank, int world, int operations) {
    SharedMemory shared(memory, rank, world, SLOTS, SLOT_BYTES);
    std::mt19937 common(5), own(static_cast<unsigned>(rank));
    struct Sum {
        uint64_t number;
        int64_t operation;
        std::vector<float> x;
    };
    std::deque<Sum> under_way;
    const auto end = [&](const Sum& s) {
        while (shared.finish(s.number, 0.01) >= 0) {
        }
        for (size_t i = 0; i < s.x.size(); i++) {
            float expected = 0;
            for (int r = 0; r < world; r++) expected += value(r, s.operation, int64_t(i));
            if (s.x[i] != expected) return false;
        }
        return true;
    };
    for (int64_t k = 0; k < operations; k++) {
        // From nothing to several rings; above 32 KB in two steps.
        const int64_t n = int64_t(common() % (k % 16 ? 3000 : 20000)), source = int64_t(common()) % world;
        const bool sums = common() % 4;
        std::vector<float> x(static_cast<size_t>(n));
        for (int64_t i = 0; i < n; i++) x[size_t(i)] = value(rank, k, i);
        char* data = reinterpret_cast<char*>(x.data());
        if (sums) {
            const uint64_t number =
                shared.start({SharedMemory::Kind::sum, DType::f32, 0, 4 * n, data, nullptr});
            under_way.push_back({number, k, std::move(x)});
        } else {
            const auto kind = SharedMemory::Kind::broadcast;
            const uint64_t number = shared.start({kind, DType::f32, int32_t(source), 4 * n, data, nullptr});
            while (shared.finish(number, 0.01) >= 0) {
            }
            for (int64_t i = 0; i < n; i++)
                if (x[size_t(i)] != value(int(source), k, i)) return false;
        }
        while (under_way.size() > own() % 4) {
            if (!end(under_way.front())) return false;
            under_way.pop_front();
        }
    }
    for (const Sum& s : under_way)
        if (!end(s)) return false;
    return true;
}

}  // namespace

int main(int, char** argv) {
    const int world = std::atoi(argv[1]), operations = std::atoi(argv[2]);
    const auto bytes = size_t(SharedMemory::bytes_of(world, SLOTS, SLOT_BYTES));
    void* memory = std::aligned_alloc(128, (bytes + 127) / 128 * 128);
    memset(memory, 0, bytes);
    std::vector<char> right(size_t(world), 0);
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < world; rank++)
        ranks.emplace_back(
            [&, rank] { right[size_t(rank)] = rank_is_right(memory, rank, world, operations); });
    for (std::thread& t : ranks) t.join();
    std::free(memory);
    for (int rank = 0; rank < world; rank++)
        if (!right[size_t(rank)]) return std::fprintf(stderr, "rank %d has a wrong result\n", rank), 1;
    return 0;
}
