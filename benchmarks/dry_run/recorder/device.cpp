// The device that is claimed to be there: one H200.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <map>

#include "recorder.h"

using namespace recorder;

static const char* const NAME = "NVIDIA H200";
static thread_local int current = 0;

// As the runtime reports them of an H200; what is missing is 0.
static const std::map<int, int> ATTRIBUTES = {
    {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrMultiProcessorCount, 132},
    {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
    {cudaDevAttrMaxRegistersPerBlock, 65536},
    {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
    {cudaDevAttrComputeCapabilityMajor, 9},
    {cudaDevAttrComputeCapabilityMinor, 0},
    {cudaDevAttrL2CacheSize, 60 << 20},
    {cudaDevAttrClockRate, 1980000},
    {cudaDevAttrMemoryClockRate, 3201000},
    {cudaDevAttrGlobalMemoryBusWidth, 6144},
    {cudaDevAttrMaxGridDimX, 2147483647},
    {cudaDevAttrMaxGridDimY, 65535},
    {cudaDevAttrMaxGridDimZ, 65535},
};

EXPORTED cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaSetDevice(int device) {
  if (device != 0) return set_last_error(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
EXPORTED cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int) {
  snprintf(text, static_cast<size_t>(length), "0000:00:04.0");
  return cudaSuccess;
}
EXPORTED cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  auto found = ATTRIBUTES.find(attribute);
  *value = found == ATTRIBUTES.end() ? 0 : found->second;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  auto of = [](cudaDeviceAttr attribute) { return ATTRIBUTES.at(attribute); };
  size_t left, total;
  REQUIRE(cudaMemGetInfo(&left, &total));
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, NAME);
  properties->totalGlobalMem = total;
  properties->major = of(cudaDevAttrComputeCapabilityMajor);
  properties->minor = of(cudaDevAttrComputeCapabilityMinor);
  properties->multiProcessorCount = of(cudaDevAttrMultiProcessorCount);
  properties->maxThreadsPerMultiProcessor = of(cudaDevAttrMaxThreadsPerMultiProcessor);
  properties->maxThreadsPerBlock = of(cudaDevAttrMaxThreadsPerBlock);
  properties->warpSize = of(cudaDevAttrWarpSize);
  properties->sharedMemPerBlock = of(cudaDevAttrMaxSharedMemoryPerBlock);
  properties->sharedMemPerBlockOptin = of(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  properties->sharedMemPerMultiprocessor = of(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  properties->regsPerBlock = of(cudaDevAttrMaxRegistersPerBlock);
  properties->regsPerMultiprocessor = of(cudaDevAttrMaxRegistersPerMultiprocessor);
  properties->l2CacheSize = of(cudaDevAttrL2CacheSize);
  properties->maxBlocksPerMultiProcessor = 32;
  properties->maxGridSize[0] = of(cudaDevAttrMaxGridDimX);
  properties->maxGridSize[1] = properties->maxGridSize[2] = of(cudaDevAttrMaxGridDimY);
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->memoryBusWidth = of(cudaDevAttrGlobalMemoryBusWidth);
  properties->totalConstMem = 65536;
  properties->textureAlignment = 512;
  properties->asyncEngineCount = 3;
  properties->concurrentKernels = properties->unifiedAddressing = properties->canMapHostMemory = 1;
  properties->cooperativeLaunch = 1;
  return cudaSuccess;
}

// The texts that code of PyTorch and of this project looks for; the others show their number.
EXPORTED const char* cudaGetErrorString(cudaError_t error) {
  static const std::map<int, const char*> TEXTS = {
      {cudaSuccess, "no error"},
      {cudaErrorMemoryAllocation, "out of memory"},
      {cudaErrorNotReady, "device not ready"},
      {cudaErrorNotPermitted, "operation not permitted"},
      {cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"},
      {cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"},
      {cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"},
      {cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"},
      {cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"},
      {cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"},
      {cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream"},
      {cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"},
      {cudaErrorStreamCaptureWrongThread, "attempt to terminate a thread-local capture sequence from another thread"},
  };
  static thread_local char other[32];
  auto found = TEXTS.find(error);
  if (found != TEXTS.end()) return found->second;
  snprintf(other, sizeof other, "CUDA error %d", error);
  return other;
}
EXPORTED const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
EXPORTED cudaError_t cudaProfilerStart() { return cudaSuccess; }
EXPORTED cudaError_t cudaProfilerStop() { return cudaSuccess; }

// The driver, for Triton and for what PyTorch looks up by name.
EXPORTED CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORTED CUresult cuDriverGetVersion(int* version) { return static_cast<CUresult>(cudaDriverGetVersion(version)); }
EXPORTED CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }
EXPORTED CUresult cuDeviceGet(CUdevice* device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDeviceGetCount(int* count) { return static_cast<CUresult>(cudaGetDeviceCount(count)); }
EXPORTED CUresult cuDeviceGetName(char* text, int length, CUdevice) {
  snprintf(text, static_cast<size_t>(length), "%s", NAME);
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return static_cast<CUresult>(cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device));
}
static CUcontext the_context() { return reinterpret_cast<CUcontext>(16); }  // any address that is not null
EXPORTED CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* is_active) {
  *flags = 0;
  *is_active = 1;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = the_context();
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = the_context();
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
EXPORTED CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

static CUresult not_supported() { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORTED cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                      cudaDriverEntryPointQueryResult* result) {
  void* own = dlsym(RTLD_DEFAULT, name);
  *function = own ? own : reinterpret_cast<void*>(not_supported);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
