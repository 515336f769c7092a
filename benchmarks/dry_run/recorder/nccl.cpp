// NCCL, for a group of one process: its collective calls are launches. Declared here, as cuBLAS is: what is tested of the
// recorder without a CUDA build has no header of it.
#include <cstdlib>
#include <cstring>

#include "recorder.h"

using namespace recorder;

constexpr int SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, INVALID_ARGUMENT = 4;

struct UniqueId {  // ncclUniqueId
  char content[128];
};

static int made(void** communicator, int processes) {
  if (processes != 1) return INVALID_ARGUMENT;  // there is one device
  *communicator = malloc(64);
  return SUCCESS;
}

static int collective(const char* name, long count, const void* stream) {
  Lock lock(mutex());
  auto text = std::string("nccl ") + name + " of " + std::to_string(count);
  return enqueue(KERNEL, text, 1, 1, stream) == cudaSuccess ? SUCCESS : UNHANDLED_CUDA_ERROR;
}

EXPORTED int ncclGetVersion(int* version) {
  *version = 22809;
  return SUCCESS;
}
EXPORTED int ncclGetUniqueId(UniqueId* id) {
  memset(id, 0, sizeof *id);
  return SUCCESS;
}
EXPORTED const char* ncclGetErrorString(int) { return "recorded NCCL error"; }
EXPORTED const char* ncclGetLastError(void*) { return ""; }
EXPORTED int ncclCommInitRank(void** communicator, int processes, UniqueId, int) {
  return made(communicator, processes);
}
EXPORTED int ncclCommInitRankConfig(void** communicator, int processes, UniqueId, int, void*) {
  return made(communicator, processes);
}
EXPORTED int ncclCommInitRankScalable(void** communicator, int processes, int, int, UniqueId*, void*) {
  return made(communicator, processes);
}
EXPORTED int ncclCommFinalize(void*) { return SUCCESS; }
EXPORTED int ncclCommDestroy(void*) { return SUCCESS; }
EXPORTED int ncclCommAbort(void*) { return SUCCESS; }
EXPORTED int ncclCommGetAsyncError(void*, int* error) {
  *error = SUCCESS;
  return SUCCESS;
}
EXPORTED int ncclCommCount(const void*, int* processes) {
  *processes = 1;
  return SUCCESS;
}
EXPORTED int ncclCommUserRank(const void*, int* rank) {
  *rank = 0;
  return SUCCESS;
}
EXPORTED int ncclCommRegister(void*, void*, size_t, void** handle) {
  *handle = nullptr;
  return SUCCESS;
}
EXPORTED int ncclCommDeregister(void*, void*) { return SUCCESS; }
EXPORTED int ncclGroupStart() { return SUCCESS; }
EXPORTED int ncclGroupEnd() { return SUCCESS; }

EXPORTED int ncclAllReduce(const void*, void*, size_t count, int, int, void*, void* stream) {
  return collective("all-reduce", static_cast<long>(count), stream);
}
EXPORTED int ncclBroadcast(const void*, void*, size_t count, int, int, void*, void* stream) {
  return collective("broadcast", static_cast<long>(count), stream);
}
EXPORTED int ncclBcast(void*, size_t count, int, int, void*, void* stream) {
  return collective("broadcast", static_cast<long>(count), stream);
}
EXPORTED int ncclAllGather(const void*, void*, size_t count, int, void*, void* stream) {
  return collective("all-gather", static_cast<long>(count), stream);
}
EXPORTED int ncclReduce(const void*, void*, size_t count, int, int, int, void*, void* stream) {
  return collective("reduce", static_cast<long>(count), stream);
}
EXPORTED int ncclReduceScatter(const void*, void*, size_t count, int, int, void*, void* stream) {
  return collective("reduce-scatter", static_cast<long>(count), stream);
}
