// Memory and copies. Device memory is addresses without content: a host that touches it is stopped, as with a GPU.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "recorder.h"

namespace recorder {

using Ranges = std::map<const char*, size_t>;

static Ranges& device_ranges() {
  static Ranges ranges;
  return ranges;
}

static Ranges& pinned_ranges() {
  static Ranges ranges;
  return ranges;
}

static bool holds(const Ranges& ranges, const void* address) {
  auto at = static_cast<const char*>(address);
  auto next = ranges.upper_bound(at);
  return next != ranges.begin() && at < std::prev(next)->first + std::prev(next)->second;
}

bool on_device(const void* address) { return holds(device_ranges(), address); }
bool is_pinned(const void* address) { return holds(pinned_ranges(), address); }

constexpr size_t TOTAL = 143771ull << 20;  // of an H200
static size_t used = 0, peak = 0;

// Between which memories a copy goes. A copy of pageable memory goes through a buffer of the driver, so the host waits.
static std::string route(const void* to, const void* from) {
  bool down = on_device(from), up = on_device(to);
  if (up && down) return "device to device";
  if (up) return is_pinned(from) ? "pinned to device" : "pageable to device";
  if (down) return is_pinned(to) ? "device to pinned" : "device to pageable";
  return "host to host";
}

static bool is_pageable(const std::string& route) { return route.find("pageable") != std::string::npos; }

// What the host reads of the device is zeros, at once or once it has waited.
static Effect effect_of(const std::string& route, void* to, const void* from, size_t bytes) {
  if (route == "device to pinned") return [=](const void* stream) { copy_to_host(stream, to, bytes); };
  if (route == "device to pageable") return [=](const void*) { memset(to, 0, bytes); };
  if (route == "host to host") return [=](const void*) { memcpy(to, from, bytes); };
  return {};
}

}  // namespace recorder

using namespace recorder;

EXPORTED size_t dry_run_peak(int reset) {
  size_t bytes = peak;
  if (reset) peak = used;
  return bytes;
}

EXPORTED cudaError_t cudaMalloc(void** made, size_t bytes) {
  Lock lock(mutex());
  REQUIRE(safe("cudaMalloc"));
  if (used + bytes > TOTAL) return set_last_error(cudaErrorMemoryAllocation);
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* start = mmap(nullptr, std::max(bytes, size_t{1}), PROT_NONE, flags, -1, 0);
  if (start == MAP_FAILED) return set_last_error(cudaErrorMemoryAllocation);
  device_ranges()[static_cast<char*>(start)] = bytes;
  used += bytes;
  peak = std::max(peak, used);
  *made = start;
  note(ALLOC, "cudaMalloc", static_cast<long>(bytes));
  return cudaSuccess;
}

// Waits until the device is idle.
EXPORTED cudaError_t cudaFree(void* start) {
  Lock lock(mutex());
  if (!start) return cudaSuccess;
  REQUIRE(safe("cudaFree"));
  auto range = device_ranges().find(static_cast<char*>(start));
  if (range == device_ranges().end()) return set_last_error(cudaErrorInvalidValue);
  munmap(start, std::max(range->second, size_t{1}));
  used -= range->second;
  note(FREE, "cudaFree", static_cast<long>(range->second));
  device_ranges().erase(range);
  complete_everything();
  return cudaSuccess;
}

EXPORTED cudaError_t cudaHostAlloc(void** made, size_t bytes, unsigned) {
  Lock lock(mutex());
  REQUIRE(safe("cudaHostAlloc"));
  *made = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  pinned_ranges()[static_cast<char*>(*made)] = bytes;
  note(ALLOC, "cudaHostAlloc", static_cast<long>(bytes));
  return cudaSuccess;
}
EXPORTED cudaError_t cudaHostRegister(void* start, size_t bytes, unsigned) {
  Lock lock(mutex());
  REQUIRE(safe("cudaHostRegister"));
  pinned_ranges()[static_cast<char*>(start)] = bytes;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaHostUnregister(void* start) {
  Lock lock(mutex());
  auto range = pinned_ranges().find(static_cast<char*>(start));
  if (range == pinned_ranges().end()) return set_last_error(cudaErrorHostMemoryNotRegistered);
  forget_range(range->first, range->second);
  pinned_ranges().erase(range);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaFreeHost(void* start) {
  Lock lock(mutex());
  if (!start) return cudaSuccess;
  REQUIRE(cudaHostUnregister(start));
  free(start);
  return cudaSuccess;
}

EXPORTED cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  Lock lock(mutex());
  memset(attributes, 0, sizeof *attributes);
  attributes->type = on_device(address)   ? cudaMemoryTypeDevice
                     : is_pinned(address) ? cudaMemoryTypeHost
                                          : cudaMemoryTypeUnregistered;
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(address);
  return cudaSuccess;
}
EXPORTED CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr address) {
  Lock lock(mutex());
  auto start = reinterpret_cast<void*>(address);
  if (!on_device(start) && !is_pinned(start)) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<CUdeviceptr*>(value) = address;
  return CUDA_SUCCESS;
}

// A synchronous copy or fill works in the legacy stream and waits for it.
static cudaError_t synchronous(const char* what) {
  REQUIRE(safe(what));
  return usable(stream_of(nullptr), what);
}

EXPORTED cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  Lock lock(mutex());
  REQUIRE(synchronous("cudaMemcpy"));
  complete_stream(stream_of(nullptr));
  auto way = route(to, from);
  if (Effect effect = effect_of(way, to, from, bytes)) effect(nullptr);
  complete_stream(stream_of(nullptr));
  note(SYNC, "cudaMemcpy, " + way, static_cast<long>(bytes));
  return cudaSuccess;
}
EXPORTED cudaError_t cudaMemset(void*, int, size_t bytes) {
  Lock lock(mutex());
  REQUIRE(synchronous("cudaMemset"));
  return enqueue(MEMSET, "memset", 1, 1, nullptr, static_cast<long>(bytes));
}

EXPORTED cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t handle) {
  Lock lock(mutex());
  auto way = route(to, from);
  Stream& stream = stream_of(handle);
  if (is_pageable(way) && stream.capture)
    return refuse(cudaErrorStreamCaptureUnsupported, *stream.capture, "copy on a capturing stream, " + way);
  REQUIRE(enqueue(MEMCPY, "copy, " + way, 1, 1, handle, static_cast<long>(bytes), effect_of(way, to, from, bytes)));
  if (way == "device to pageable") complete_stream(stream);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaMemcpy2DAsync(void* to, size_t, const void* from, size_t, size_t width, size_t height,
                                       cudaMemcpyKind, cudaStream_t stream) {
  Lock lock(mutex());
  return enqueue(MEMCPY, "copy in two dimensions, " + route(to, from), 1, 1, stream, static_cast<long>(width * height));
}
EXPORTED cudaError_t cudaMemcpyPeerAsync(void*, int, const void*, int, size_t bytes, cudaStream_t stream) {
  Lock lock(mutex());
  return enqueue(MEMCPY, "copy, device to another", 1, 1, stream, static_cast<long>(bytes));
}
EXPORTED cudaError_t cudaMemsetAsync(void*, int, size_t bytes, cudaStream_t stream) {
  Lock lock(mutex());
  return enqueue(MEMSET, "memset", 1, 1, stream, static_cast<long>(bytes));
}
EXPORTED cudaError_t cudaMemGetInfo(size_t* left, size_t* total) {
  Lock lock(mutex());
  *left = TOTAL - used;
  *total = TOTAL;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t*, int) { return cudaErrorNotSupported; }
