// Kernels: those of PyTorch, which register with the runtime, and Triton's, which are loaded by the driver.
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "recorder.h"

using namespace recorder;

namespace {

struct Function {
  std::string symbol;
  int name = -1;  // once it is launched
  Kind kind = KERNEL;
};

std::unordered_map<const void*, Function*>& registered() {
  static std::unordered_map<const void*, Function*> all;
  return all;
}

Function* find(const void* host_function) {
  auto found = registered().find(host_function);
  return found == registered().end() ? nullptr : found->second;
}

// The limits of a launch are those of every compute capability from 5.0 on.
cudaError_t launch(Function* function, dim3 grid, dim3 block, const void* stream) {
  if (!function) return set_last_error(cudaErrorInvalidDeviceFunction);
  Lock lock(mutex());
  if (function->name < 0) function->name = name_id(function->symbol);
  bool empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
  if (empty || block.x * block.y * block.z > 1024 || block.z > 64 || grid.y > 65535 || grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration, "a launch with invalid configuration: " + function->symbol);
  return enqueue(function->kind, function->name, grid, block, stream);
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;  // of launches that are written with <<< >>>

}  // namespace

EXPORTED void** __cudaRegisterFatBinary(void* binary) {
  auto handle = static_cast<void**>(malloc(sizeof(void*)));
  *handle = binary;
  return handle;
}
EXPORTED void __cudaRegisterFatBinaryEnd(void**) {}
EXPORTED void __cudaUnregisterFatBinary(void**) {}
EXPORTED char __cudaInitModule(void**) { return 1; }
EXPORTED void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORTED void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}
EXPORTED void __cudaRegisterFunction(void**, const char* host_function, char*, const char* name, int, uint3*, uint3*,
                                     dim3*, dim3*, int*) {
  Lock lock(mutex());
  registered()[host_function] = new Function{name};
}

EXPORTED unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
EXPORTED cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}
EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
  *kernel = reinterpret_cast<cudaKernel_t>(find(host_function));
  return *kernel ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}
EXPORTED cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t,
                                        cudaStream_t stream) {
  return launch(reinterpret_cast<Function*>(kernel), grid, block, stream);
}
EXPORTED cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t,
                                      cudaStream_t stream) {
  return launch(find(function), grid, block, stream);
}
EXPORTED cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return launch(find(function), config->gridDim, config->blockDim, config->stream);
}
EXPORTED cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
EXPORTED cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int block, size_t,
                                                                            unsigned) {
  *blocks = std::max(1, 2048 / block);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static char content[4096];
  *address = content;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;
}

// Loading a module takes memory of the device and may wait for it: it belongs before a capture.
EXPORTED CUresult cuModuleLoadData(CUmodule* module, const void*) {
  Lock lock(mutex());
  *module = reinterpret_cast<CUmodule>(16);
  note(MODULE, "cuModuleLoadData");
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
EXPORTED CUresult cuModuleLoadDataEx(CUmodule* module, const void*, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, nullptr);
}
EXPORTED CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
EXPORTED CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  *function = reinterpret_cast<CUfunction>(new Function{name, -1, TRITON});
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 32
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                  : 0;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
EXPORTED CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
EXPORTED CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  *clusters = 1;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                 unsigned block_x, unsigned block_y, unsigned block_z, unsigned, CUstream stream,
                                 void**, void**) {
  dim3 grid(grid_x, grid_y, grid_z), block(block_x, block_y, block_z);
  return static_cast<CUresult>(launch(reinterpret_cast<Function*>(function), grid, block, stream));
}
EXPORTED CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                        config->blockDimY, config->blockDimZ, config->sharedMemBytes, config->hStream, arguments,
                        extra);
}
EXPORTED CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                         const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                         CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;
}
