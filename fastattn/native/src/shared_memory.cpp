#include "shared_memory.hpp"

#include <sched.h>
#include <string.h>
#include <time.h>

#include <stdexcept>
#include <string>

#include "isa.hpp"

namespace fastattn {

namespace {

// A sum of more bytes by more than two ranks is divided among them: each adds a share, which the others copy,
// instead of reading everything that all have posted.
constexpr int64_t WHOLE_SUM_BYTES = 1 << 15;

constexpr int SPINS = 1000;          // about 20 us: most ranks come within it
constexpr double YIELDING_S = 5e-3;  // before sleeping, which wakes up too late for a decoded token
constexpr long SLEEP_NS = 50'000;

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

}  // namespace

// Each on its own cache lines, written by its rank only. Chunks are counted over all operations.
struct SharedMemory::Counters {
    alignas(128) std::atomic<uint64_t> posted;
    alignas(128) std::atomic<uint64_t> summed;  // shares of sums in two steps
    alignas(128) std::atomic<uint64_t> read;
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "processes cannot share a lock here");

std::string SharedMemory::Header::text() const {
    static const char* const KINDS[] = {"sums", "gathers", "broadcasts"};
    std::string result = std::string(KINDS[int(kind)]) + " " + std::to_string(bytes) + " bytes of ";
    result += dtype_name(dtype);
    if (kind == Kind::broadcast) result += " from rank " + std::to_string(source);
    return result + " as operation " + std::to_string(operation);
}

bool SharedMemory::Header::same(const Header& other) const {
    return operation == other.operation && bytes == other.bytes && kind == other.kind &&
           dtype == other.dtype && source == other.source;
}

SharedMemory::SharedMemory(void* memory, int rank, int world, int64_t slots, int64_t slot_bytes)
    : memory_(static_cast<char*>(memory)),
      rank_(rank),
      world_(world),
      slots_(slots),
      slot_bytes_(slot_bytes),
      parts_(size_t(world)) {}

int64_t SharedMemory::bytes_of(int world, int64_t slots, int64_t slot_bytes) {
    return world * (int64_t(sizeof(Counters)) + slots * (int64_t(sizeof(Header)) + slot_bytes));
}

SharedMemory::Counters& SharedMemory::counters(int rank) const {
    return reinterpret_cast<Counters*>(memory_)[rank];
}

SharedMemory::Header& SharedMemory::header(int rank, uint64_t chunk) const {
    const int64_t slot = rank * slots_ + int64_t(chunk % uint64_t(slots_));
    char* first = memory_ + world_ * int64_t(sizeof(Counters));
    return *reinterpret_cast<Header*>(first + slot * (int64_t(sizeof(Header)) + slot_bytes_));
}

char* SharedMemory::payload(int rank, uint64_t chunk) const {
    return reinterpret_cast<char*>(&header(rank, chunk) + 1);
}

int64_t SharedMemory::chunk_bytes(const Queued& q, int64_t chunk) const {
    const int64_t left = q.operation.bytes - chunk * slot_bytes_;
    return left < slot_bytes_ ? left : slot_bytes_;
}

bool SharedMemory::in_two_steps(const Queued& q) const {
    return q.operation.kind == Kind::sum && world_ > 2 && q.operation.bytes > WHOLE_SUM_BYTES;
}

uint64_t SharedMemory::start(const Operation& operation) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Queued q = {};
    q.operation = operation;
    q.header = {started_, operation.bytes, operation.kind, operation.dtype, operation.source};
    q.first = chunks_;
    q.chunks = operation.bytes ? (operation.bytes + slot_bytes_ - 1) / slot_bytes_ : 1;
    chunks_ += uint64_t(q.chunks);
    queue_.push_back(q);
    post();
    return started_++;
}

int SharedMemory::finish(uint64_t number, double seconds) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const double until = now() + seconds;
    while (!queue_.empty() && queue_.front().header.operation <= number) {
        if (const int late = advance(queue_.front(), until); late >= 0) return late;
        queue_.pop_front();
    }
    return -1;
}

// The chunk from which on this rank may not post: what lies in its slot may still be read.
uint64_t SharedMemory::room() const {
    uint64_t read = UINT64_MAX;
    for (int r = 0; r < world_; r++) {
        const uint64_t n = counters(r).read.load(std::memory_order_acquire);
        if (n < read) read = n;
    }
    return read + uint64_t(slots_);
}

void SharedMemory::post() {
    for (Queued& q : queue_) {
        while (q.posted < q.chunks) {
            const uint64_t chunk = q.first + uint64_t(q.posted);
            if (chunk >= room()) return;
            header(rank_, chunk) = q.header;
            const bool sends = q.operation.kind != Kind::broadcast || q.operation.source == rank_;
            if (const int64_t n = chunk_bytes(q, q.posted); sends && n)
                memcpy(payload(rank_, chunk), q.operation.x + q.posted * slot_bytes_, size_t(n));
            counters(rank_).posted.store(chunk + 1, std::memory_order_release);
            q.posted++;
        }
    }
}

// A rank whose counter has not passed `chunk`, or -1.
template <class Counter>
int SharedMemory::missing(Counter counter, uint64_t chunk) {
    for (int r = 0; r < world_; r++)
        if ((counters(r).*counter).load(std::memory_order_acquire) <= chunk) return r;
    return -1;
}

// Until all have passed it: -1, or at the time `until` a rank that has not.
template <class Counter>
int SharedMemory::wait(Counter counter, uint64_t chunk, double until) {
    int late = -1;
    const auto passed = [&] {
        post();  // others may be waiting for what had no room before
        return (late = missing(counter, chunk)) < 0;
    };
    for (int i = 0; i < SPINS; i++) {
        if (passed()) return -1;
        relax();
    }
    const double begin = now();
    while (!passed()) {
        const double time = now();
        if (time >= until) return late;
        if (time - begin < YIELDING_S) {
            sched_yield();
        } else {
            const timespec pause = {0, SLEEP_NS};
            nanosleep(&pause, nullptr);
        }
    }
    return -1;
}

void SharedMemory::check(const Queued& q, uint64_t chunk) const {
    for (int r = 0; r < world_; r++)
        if (const Header& theirs = header(r, chunk); !theirs.same(q.header))
            throw std::runtime_error("rank " + std::to_string(r) + " " + theirs.text() + ", this rank " +
                                     q.header.text());
}

void SharedMemory::sum(const Queued& q, uint64_t chunk, char* x, int64_t bytes) {
    for (int r = 0; r < world_; r++) parts_[size_t(r)] = r == rank_ ? x : payload(r, chunk);
    const DType dtype = q.operation.dtype;
    kernels().ops.sum({parts_.data(), world_, bytes / item_bytes(dtype), x, dtype});
}

// Into this rank's own slot, where nobody else reads that share before it is counted.
void SharedMemory::sum_share(const Queued& q, uint64_t chunk, int64_t bytes) {
    const DType dtype = q.operation.dtype;
    const int64_t item = item_bytes(dtype), n = bytes / item;
    const int64_t lo = n * rank_ / world_, hi = n * (rank_ + 1) / world_;
    for (int r = 0; r < world_; r++) parts_[size_t(r)] = payload(r, chunk) + lo * item;
    kernels().ops.sum({parts_.data(), world_, hi - lo, payload(rank_, chunk) + lo * item, dtype});
}

void SharedMemory::collect(const Queued& q, uint64_t chunk, char* x, int64_t bytes) const {
    const int64_t item = item_bytes(q.operation.dtype), n = bytes / item;
    for (int r = 0; r < world_; r++) {
        const int64_t lo = n * r / world_ * item, hi = n * (r + 1) / world_ * item;
        memcpy(x + lo, payload(r, chunk) + lo, size_t(hi - lo));
    }
}

int SharedMemory::advance(Queued& q, double until) {
    const Operation& o = q.operation;
    Counters& mine = counters(rank_);
    while (q.ended < q.chunks) {
        const uint64_t chunk = q.first + uint64_t(q.ended);
        const int64_t bytes = chunk_bytes(q, q.ended), offset = q.ended * slot_bytes_;
        if (!q.summed) {
            if (const int late = wait(&Counters::posted, chunk, until); late >= 0) return late;
            check(q, chunk);
        }
        if (in_two_steps(q)) {
            if (!q.summed) {
                sum_share(q, chunk, bytes);
                mine.summed.store(chunk + 1, std::memory_order_release);
                q.summed = true;
            }
            if (const int late = wait(&Counters::summed, chunk, until); late >= 0) return late;
            q.summed = false;
            collect(q, chunk, o.x + offset, bytes);
        } else if (o.kind == Kind::sum) {
            sum(q, chunk, o.x + offset, bytes);
        } else if (o.kind == Kind::gather) {
            for (int r = 0; r < world_; r++)
                memcpy(o.out + r * o.bytes + offset, payload(r, chunk), size_t(bytes));
        } else if (o.source != rank_ && bytes) {
            memcpy(o.x + offset, payload(o.source, chunk), size_t(bytes));
        }
        mine.read.store(chunk + 1, std::memory_order_release);
        q.ended++;
    }
    return -1;
}

}  // namespace fastattn
