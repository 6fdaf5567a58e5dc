// A switch in user space, with one cable to each of PORTS fresh network namespaces.
//
//   switch PORTS BYTES_PER_S LATENCY_S JITTER_S
//   switch enter PARENT_PID NAMESPACE COMMAND...
//
// Prints the numbers of the file descriptors that hold the namespaces (others reach them as /proc/PID/fd/NUMBER),
// then obeys lines on stdin: "cut PORT" loses every later frame from and to that port. It ends with its stdin, and
// the namespaces with it: however the program that started it ends, nothing is left behind. The second form runs a
// command in a namespace, and is killed with its parent.
//
// Cables are full duplex: each has two directions, and each direction is busy with one frame at a time.
// A frame of b bytes that one host hands over at time t for another
//   starts on the sender's cable at     u = max(t, end of the frame before it in that direction),
//   starts on the receiver's cable at   d = max(u, end of the frame before it in that direction),
//   and arrives at                      d + b / BYTES_PER_S + LATENCY_S + jitter,
// with jitter uniform in [0, JITTER_S) but without overtaking. So the switch cuts through, a lone frame takes
// b / rate + latency, and the rate bounds what a host sends and, apart from that, what it receives. b counts
// Ethernet headers, not preamble and gap.
//
// Hosts hand over bursts that a network card would segment, of what the cable carries in kBurst or in a quarter of
// the latency: large enough to be cheap, too small for others that wait behind one to notice. b counts the headers
// of every segment.
//
// A cable's queue is bounded in time (kQueue), as a switch's buffer is: what would wait longer for the receiver's
// cable is dropped. While its own cable is busy, the sender's device keeps kQueue worth of bursts of one frame, which
// is more than TCP hands over in larger ones.

#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <ctime>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "namespaces.hpp"

namespace {

using Nanoseconds = double;  // since boot: exact to a fraction of one

constexpr Nanoseconds kQueue = 100e6;
constexpr Nanoseconds kBurst = 100e3;
constexpr Nanoseconds kWake = 20e3;  // what waking up two threads takes: frames are delivered earlier by so much
constexpr Nanoseconds kAhead = 20e3;  // a frame is taken from its sender at most so early: shorter sleeps overrun

struct Link {
    double bytes_per_ns;
    Nanoseconds latency, jitter;
};

struct VnetHeader {  // virtio_net_hdr, whose own header is not C++
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset;
};

constexpr size_t kEthernetHeader = 14;
constexpr size_t kLargest = sizeof(VnetHeader) + kEthernetHeader + 65536;
constexpr size_t kSmall = 2048;  // a frame up to here is copied, a larger one keeps the buffer it was read into

struct Frame {
    Nanoseconds due;
    std::unique_ptr<char[]> bytes;  // VnetHeader, then Ethernet
    size_t size;
};

struct Port {
    Namespace host;
    std::atomic<bool> cut{false};
    // The direction towards the host.
    std::mutex mutex;
    std::condition_variable filled;
    std::deque<Frame> frames;
    Nanoseconds free = 0, last_due = 0;
    std::mt19937_64 random;
};

Nanoseconds now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec);
}

void sleep_until(Nanoseconds time) {
    timespec t;
    t.tv_sec = static_cast<time_t>(time / 1e9);
    t.tv_nsec = static_cast<long>(time - 1e9 * static_cast<double>(t.tv_sec));
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, nullptr) == EINTR) {}
}

// Of a burst once it is cut into segments, which repeat the headers.
double wire_bytes(const char* bytes, size_t size) {
    VnetHeader head;
    std::memcpy(&head, bytes, sizeof head);
    const size_t frame = size - sizeof head;
    if (head.gso_size == 0) return static_cast<double>(frame);
    const char* ip = bytes + sizeof head + kEthernetHeader;
    const size_t ip_header = 4u * (ip[0] & 15);
    const size_t tcp_header = 4u * (static_cast<unsigned char>(ip[ip_header + 12]) >> 4);
    const size_t headers = kEthernetHeader + ip_header + tcp_header;
    const size_t segments = (frame - headers + head.gso_size - 1) / head.gso_size;
    return static_cast<double>(frame + (segments - 1) * headers);
}

// Puts a frame that starts on its sender's cable at ``start`` on the receiver's.
void forward(const Link& link, Port& to, Frame frame, Nanoseconds start, Nanoseconds duration) {
    const std::lock_guard lock(to.mutex);
    const Nanoseconds begin = std::max(start, to.free);
    if (to.cut || begin - start > kQueue) return;
    to.free = begin + duration;
    const Nanoseconds jitter = link.jitter * std::uniform_real_distribution<>()(to.random);
    frame.due = to.last_due = std::max(to.last_due, to.free + link.latency + jitter);
    to.frames.push_back(std::move(frame));
    to.filled.notify_one();
}

Frame copy(const char* bytes, size_t size) {
    Frame frame{0, std::unique_ptr<char[]>(new char[size]), size};
    std::memcpy(frame.bytes.get(), bytes, size);
    return frame;
}

// Takes the host's frames, each when its time on the cable comes: so those of several senders to one receiver
// meet in the order in which they would on wires.
void receive(const Link& link, std::vector<Port>& ports, size_t number) {
    Port& port = ports[number];
    Nanoseconds free = 0;
    std::unique_ptr<char[]> buffer;
    for (;;) {
        if (!buffer) buffer.reset(new char[kLargest]);
        const ssize_t got = read(port.host.tap, buffer.get(), kLargest);
        if (got < 0) {
            if (errno != EAGAIN) fail("reading a TAP device");
            pollfd wait{port.host.tap, POLLIN, 0};
            poll(&wait, 1, -1);
            free = std::max(free, now());  // while a frame that was there at once waited for the cable
            continue;
        }
        const size_t size = static_cast<size_t>(got);
        if (port.cut || size < sizeof(VnetHeader) + kEthernetHeader) continue;
        const Nanoseconds start = free, duration = wire_bytes(buffer.get(), size) / link.bytes_per_ns;
        free += duration;
        const auto* mac = reinterpret_cast<unsigned char*>(buffer.get()) + sizeof(VnetHeader);
        if (mac[0] & 1) {  // broadcast: ARP
            for (Port& other : ports) {
                if (&other != &port) forward(link, other, copy(buffer.get(), size), start, duration);
            }
        } else if (const size_t to = mac[5]; to < ports.size()) {
            Frame frame = size > kSmall ? Frame{0, std::move(buffer), size} : copy(buffer.get(), size);
            forward(link, ports[to], std::move(frame), start, duration);
        }
        if (free > now() + kAhead) sleep_until(free);
    }
}

void deliver(const Link& link, Port& port) {
    const Nanoseconds early = std::min(kWake, link.latency);
    for (;;) {
        Frame frame;
        {
            std::unique_lock lock(port.mutex);
            port.filled.wait(lock, [&] { return !port.frames.empty(); });
            frame = std::move(port.frames.front());
            port.frames.pop_front();
        }
        if (frame.due - early > now()) sleep_until(frame.due - early);
        if (port.cut) continue;
        if (write(port.host.tap, frame.bytes.get(), frame.size) < 0 && errno != EIO) fail("writing a TAP device");
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 4 && std::strcmp(argv[1], "enter") == 0) enter(argv[2], argv[3], argv + 4);
    if (argc != 5) {
        std::fprintf(stderr, "%d arguments, expected PORTS BYTES_PER_S LATENCY_S JITTER_S\n", argc - 1);
        return 2;
    }
    const Link link{1e-9 * std::atof(argv[2]), 1e9 * std::atof(argv[3]), 1e9 * std::atof(argv[4])};
    const double carried = std::min(65536.0, link.bytes_per_ns * std::max(kBurst, link.latency / 4));
    const uint32_t burst = carried < 2 * kMtu ? 0 : static_cast<uint32_t>(carried);
    const double queue = kQueue * link.bytes_per_ns / kMtu;
    prctl(PR_SET_TIMERSLACK, 1);  // the threads inherit both
    // A cable does not wait for the ranks' computing: ahead of everything, or as far as this user may.
    const sched_param first{1};
    if (sched_setscheduler(0, SCHED_FIFO, &first)) setpriority(PRIO_PROCESS, 0, -20);
    std::vector<Port> ports(std::strtoul(argv[1], nullptr, 10));
    for (size_t i = 0; i < ports.size(); ++i) {
        ports[i].host = make_namespace(static_cast<int>(i), burst, std::clamp(static_cast<int>(queue), 500, 10000));
        ports[i].random.seed(i);
    }
    for (size_t i = 0; i < ports.size(); ++i) {
        std::thread([&, i] { receive(link, ports, i); }).detach();
        std::thread([&, i] { deliver(link, ports[i]); }).detach();
    }
    for (const Port& port : ports) std::printf("%d ", port.host.self);
    std::printf("\n");
    std::fflush(stdout);
    char line[64];
    while (std::fgets(line, sizeof line, stdin)) {
        size_t number;
        if (std::sscanf(line, "cut %zu", &number) == 1 && number < ports.size()) ports[number].cut = true;
    }
    _exit(0);
}
