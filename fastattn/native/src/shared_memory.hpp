// Collectives between the ranks of one machine, through memory that all of them have mapped.
//
// A rank posts the chunks of its operand into a ring of slots and counts them; every rank reads what the
// others posted, in the order of the chunks, and counts that too, so that slots can be used again. Nothing
// else is shared: a wait is a look at other ranks' counters, and a rank that ends leaves nothing locked.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "common.hpp"

namespace fastattn {

class SharedMemory {
public:
    enum class Kind : int32_t { sum, gather, broadcast };

    // The same on every rank but for the addresses, which stay valid until the operation has ended.
    struct Operation {
        Kind kind;
        DType dtype;
        int32_t source;  // broadcast: the rank whose operand all get
        int64_t bytes;   // of each rank's operand
        char* x;         // the operand, which sum and broadcast overwrite
        char* out;       // gather: (world, bytes)
    };

    // `memory`: `bytes_of` bytes, zero at first, aligned to 64, and mapped by all ranks.
    // `slot_bytes`: a multiple of 64.
    SharedMemory(void* memory, int rank, int world, int64_t slots, int64_t slot_bytes);
    static int64_t bytes_of(int world, int64_t slots, int64_t slot_bytes);
    int world() const { return world_; }

    // Posts what there is room for and returns the operation's number. Every rank starts the same operations
    // in the same order.
    uint64_t start(const Operation& operation);
    // Ends the operations up to `number`. Returns -1, or after `seconds` a rank that is still missing.
    // Throws std::runtime_error when the ranks do not run the same operation; no later call may follow.
    int finish(uint64_t number, double seconds);

private:
    struct Counters;

    // In front of a chunk's bytes: what its rank believes to be running.
    struct alignas(64) Header {
        uint64_t operation;
        int64_t bytes;
        Kind kind;
        DType dtype;
        int32_t source;

        std::string text() const;
        bool same(const Header& other) const;
    };

    struct Queued {
        Operation operation;
        Header header;
        uint64_t first;  // chunk
        int64_t chunks;
        int64_t posted;  // of them
        int64_t ended;
        bool summed;  // this rank's share of the chunk at hand
    };

    Counters& counters(int rank) const;
    Header& header(int rank, uint64_t chunk) const;
    char* payload(int rank, uint64_t chunk) const;
    int64_t chunk_bytes(const Queued& q, int64_t chunk) const;
    bool in_two_steps(const Queued& q) const;
    uint64_t room() const;
    void post();
    template <class Counter>
    int missing(Counter counter, uint64_t chunk);
    template <class Counter>
    int wait(Counter counter, uint64_t chunk, double until);
    void check(const Queued& q, uint64_t chunk) const;
    void sum(const Queued& q, uint64_t chunk, char* x, int64_t bytes);
    void sum_share(const Queued& q, uint64_t chunk, int64_t bytes);
    void collect(const Queued& q, uint64_t chunk, char* x, int64_t bytes) const;
    int advance(Queued& q, double until);

    char* memory_;
    int rank_, world_;
    int64_t slots_, slot_bytes_;
    std::mutex mutex_;
    std::deque<Queued> queue_;
    uint64_t started_ = 0;            // operations
    uint64_t chunks_ = 0;             // of the operations started
    std::vector<const void*> parts_;  // of a sum, one a rank
};

}  // namespace fastattn
