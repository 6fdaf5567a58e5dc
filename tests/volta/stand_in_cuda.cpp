// A libcuda without a GPU: the driver functions that launching needs, with the signatures of cuda.h. It
// writes down what it was asked, and refuses what a driver would refuse.
#include <cstdio>
#include <cstring>
#include <string>

namespace {
std::string journal;
void* current = nullptr;
int version = 12020;
int shared_per_sm = 96 << 10;
void* const PRIMARY = reinterpret_cast<void*>(0x1000);
}  // namespace

#define NOTE(...)                              \
    do {                                       \
        char line[256];                        \
        snprintf(line, sizeof line, __VA_ARGS__); \
        journal += line;                       \
        journal += '\n';                       \
    } while (0)

extern "C" {
const char* journal_text() { return journal.c_str(); }
void journal_clear() { journal.clear(); }
void set_version(int v) { version = v; }
void set_shared_per_sm(int bytes) { shared_per_sm = bytes; }
void forget_context() { current = nullptr; }
void start_anew() { journal.clear(), version = 12020, shared_per_sm = 96 << 10, current = nullptr; }

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* v) { *v = version; return 0; }
int cuGetErrorName(int status, const char** text) {
    *text = status == 218 ? "CUDA_ERROR_INVALID_PTX" : status == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : nullptr;
    return *text ? 0 : 1;
}
int cuGetErrorString(int status, const char** text) {
    *text = status == 218 ? "a PTX JIT compilation failed" : status == 701 ? "too many resources requested" : nullptr;
    return *text ? 0 : 1;
}
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    if (attribute != 81) return 1;
    *value = shared_per_sm;
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { NOTE("retain %d", device); *context = PRIMARY; return 0; }
int cuCtxPushCurrent_v2(void* context) { current = context; return 0; }
int cuCtxPopCurrent_v2(void** context) { *context = current; current = nullptr; return 0; }
int cuCtxSetCurrent(void* context) { NOTE("set current"); current = context; return 0; }
int cuThreadExchangeStreamCaptureMode(int* mode) {
    static int mine = 0;
    NOTE("capture mode %d", *mode);
    int old = mine;
    mine = *mode, *mode = old;
    return 0;
}
int cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* keys, void** values) {
    if (current != PRIMARY) return 201;
    if (!strncmp(static_cast<const char*>(image), "newer", 5)) return 222;
    if (!strncmp(static_cast<const char*>(image), "wrong", 5)) {
        if (count == 2 && keys[0] == 5 && keys[1] == 6)
            strncpy(static_cast<char*>(values[0]), "ptxas error: line 1", reinterpret_cast<size_t>(values[1]));
        return 218;
    }
    *module = reinterpret_cast<void*>(0x2000);
    return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    NOTE("function %s", name);
    *function = reinterpret_cast<void*>(0x3000);
    return module == reinterpret_cast<void*>(0x2000) ? 0 : 400;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    NOTE("attribute %d = %d", attribute, value);
    return function == reinterpret_cast<void*>(0x3000) ? 0 : 400;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** params, void** extra) {
    if (current != PRIMARY) return 201;
    if (bx > 1024) return 701;
    struct { const void* x; void* y; float a; unsigned n; } p;
    memcpy(&p, params[0], sizeof p);
    NOTE("launch %p grid %u %u %u block %u %u %u shared %u stream %p x %p y %p a %g n %u%s", function, gx, gy, gz, bx,
         by, bz, shared, stream, p.x, p.y, p.a, p.n, extra ? " extra" : "");
    return 0;
}
}
