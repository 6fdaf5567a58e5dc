// A fresh network namespace that holds one end of a cable (a TAP device, ready for TCP over IPv4), and programs in it.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

constexpr const char* kInterface = "eth0";
constexpr int kMtu = 1500;
constexpr int kUnavailable = 3;  // exit status: this machine, or this user, cannot have such devices

[[noreturn]] inline void fail(const char* what, int status = 1) {
    std::fprintf(stderr, "%s: %s\n", what, std::strerror(errno));
    _exit(status);
}

inline int check(int result, const char* what, int status = 1) {
    if (result < 0) fail(what, status);
    return result;
}

inline ifreq request(const char* interface) {
    ifreq r{};
    std::strncpy(r.ifr_name, interface, IFNAMSIZ - 1);
    return r;
}

inline void set_address(int sock, unsigned long what, const char* name, uint32_t address) {
    ifreq r = request(kInterface);
    sockaddr_in in{};
    in.sin_family = AF_INET;
    in.sin_addr.s_addr = htonl(address);
    std::memcpy(&r.ifr_addr, &in, sizeof in);
    check(ioctl(sock, what, &r), name);
}

inline void raise_interface(int sock, const char* interface) {
    ifreq r = request(interface);
    check(ioctl(sock, SIOCGIFFLAGS, &r), "SIOCGIFFLAGS");
    r.ifr_flags |= IFF_UP;
    check(ioctl(sock, SIOCSIFFLAGS, &r), "SIOCSIFFLAGS");
}

// The most bytes that TCP hands over at once. No ioctl sets it: it takes a netlink message.
inline void limit_bursts(uint32_t bytes) {
    struct {
        nlmsghdr head;
        ifinfomsg info;
        rtattr attribute;
        uint32_t value;
    } message{};
    message.head.nlmsg_len = sizeof message;
    message.head.nlmsg_type = RTM_NEWLINK;
    message.head.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
    message.info.ifi_index = static_cast<int>(if_nametoindex(kInterface));
    message.attribute = {RTA_LENGTH(sizeof(uint32_t)), IFLA_GSO_MAX_SIZE};
    message.value = bytes;
    struct {
        nlmsghdr head;
        nlmsgerr error;
        char rest[256];
    } answer{};
    const int sock = check(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE), "netlink socket");
    check(static_cast<int>(send(sock, &message, sizeof message, 0)), "netlink send");
    check(static_cast<int>(recv(sock, &answer, sizeof answer, 0)), "netlink receive");
    close(sock);
    errno = -answer.error.error;
    if (errno != 0) fail("IFLA_GSO_MAX_SIZE");
}

// With IPv6 the kernel would send router solicitations of its own.
inline void disable_ipv6() {
    const int file = open("/proc/sys/net/ipv6/conf/all/disable_ipv6", O_WRONLY);
    if (file < 0) return;
    if (write(file, "1", 1) != 1) fail("disable_ipv6");
    close(file);
}

struct Namespace {
    int self, tap;  // file descriptors
};

// Address 10.213.0.(1 + number), MAC 02:00:00:00:00:number. ``burst``: the largest, 0: frames of kMtu only.
// ``queue``: how many frames or bursts the device keeps until they are read.
inline Namespace make_namespace(int number, uint32_t burst, int queue) {
    check(unshare(CLONE_NEWNET), "a new network namespace", kUnavailable);
    const int tap = check(open("/dev/net/tun", O_RDWR | O_NONBLOCK), "/dev/net/tun", kUnavailable);
    ifreq r = request(kInterface);
    r.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    check(ioctl(tap, TUNSETIFF, &r), "TUNSETIFF", kUnavailable);
    check(ioctl(tap, TUNSETOFFLOAD, burst ? TUN_F_CSUM | TUN_F_TSO4 : TUN_F_CSUM), "TUNSETOFFLOAD");
    if (burst) limit_bursts(burst);
    disable_ipv6();
    const int sock = check(socket(AF_INET, SOCK_DGRAM, 0), "socket");
    r = request(kInterface);
    r.ifr_hwaddr.sa_family = ARPHRD_ETHER;
    r.ifr_hwaddr.sa_data[0] = 2;
    r.ifr_hwaddr.sa_data[5] = static_cast<char>(number);
    check(ioctl(sock, SIOCSIFHWADDR, &r), "SIOCSIFHWADDR");
    r = request(kInterface);
    r.ifr_mtu = kMtu;
    check(ioctl(sock, SIOCSIFMTU, &r), "SIOCSIFMTU");
    r = request(kInterface);
    r.ifr_qlen = queue;
    check(ioctl(sock, SIOCSIFTXQLEN, &r), "SIOCSIFTXQLEN");
    const uint32_t address = 10u << 24 | 213u << 16 | static_cast<uint32_t>(number + 1);
    set_address(sock, SIOCSIFADDR, "SIOCSIFADDR", address);
    set_address(sock, SIOCSIFNETMASK, "SIOCSIFNETMASK", 0xffffff00u);
    raise_interface(sock, "lo");
    raise_interface(sock, kInterface);
    close(sock);
    return {check(open("/proc/self/ns/net", O_RDONLY), "/proc/self/ns/net"), tap};
}

// Becomes the program ``command`` in the namespace at ``path``, killed when ``parent``, which started it, ends.
[[noreturn]] inline void enter(const char* parent, const char* path, char** command) {
    const int ns = check(open(path, O_RDONLY | O_CLOEXEC), path);
    check(setns(ns, CLONE_NEWNET), "entering the network namespace");
    check(prctl(PR_SET_PDEATHSIG, SIGKILL), "PR_SET_PDEATHSIG");
    if (getppid() != std::atoi(parent)) _exit(1);  // it has ended already
    execvp(command[0], command);
    fail(command[0], 127);
}
