// cuBLAS and cuBLASLt, as far as PyTorch's matrix products and vector norms ask for them. Declared here: their header
// needs CUDA's C++ library, which no package of PyTorch brings. Arguments after the last that is read are left out.
#include <cstdlib>
#include <cstring>

#include "recorder.h"

using namespace recorder;

constexpr int SUCCESS = 0, FAILED = 13;  // CUBLAS_STATUS_EXECUTION_FAILED

static thread_local void* stream_of_thread = nullptr;

static int product(const char* name, long m, long n, long k, const void* stream) {
  Lock lock(mutex());
  auto text = std::string("cublas ") + name + " m=" + std::to_string(m) + " n=" + std::to_string(n) +
              " k=" + std::to_string(k);
  return enqueue(GEMM, text, 1, 1, stream) == cudaSuccess ? SUCCESS : FAILED;
}

static int made(void** handle) {
  *handle = malloc(64);
  return SUCCESS;
}
static int freed(void* handle) {
  free(handle);
  return SUCCESS;
}

EXPORTED int cublasCreate_v2(void** handle) { return made(handle); }
EXPORTED int cublasDestroy_v2(void*) { return SUCCESS; }
EXPORTED int cublasSetStream_v2(void*, void* stream) {
  stream_of_thread = stream;
  return SUCCESS;
}
EXPORTED int cublasSetWorkspace_v2(void*, void*, size_t) { return SUCCESS; }
EXPORTED int cublasSetMathMode(void*, int) { return SUCCESS; }
EXPORTED int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return SUCCESS;
}
EXPORTED int cublasSetPointerMode_v2(void*, int) { return SUCCESS; }
EXPORTED int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return SUCCESS;
}
EXPORTED int cublasSgemm_v2(void*, int, int, int m, int n, int k) {
  return product("sgemm", m, n, k, stream_of_thread);
}
EXPORTED int cublasDgemm_v2(void*, int, int, int m, int n, int k) {
  return product("dgemm", m, n, k, stream_of_thread);
}
EXPORTED int cublasGemmEx(void*, int, int, int m, int n, int k) {
  return product("gemmEx", m, n, k, stream_of_thread);
}
EXPORTED int cublasSgemmStridedBatched(void*, int, int, int m, int n, int k) {
  return product("sgemmStridedBatched", m, n, k, stream_of_thread);
}
EXPORTED int cublasGemmStridedBatchedEx(void*, int, int, int m, int n, int k) {
  return product("gemmStridedBatchedEx", m, n, k, stream_of_thread);
}
EXPORTED int cublasSgemv_v2(void*, int, int m, int n) { return product("sgemv", m, n, 1, stream_of_thread); }
EXPORTED int cublasDgemv_v2(void*, int, int m, int n) { return product("dgemv", m, n, 1, stream_of_thread); }
EXPORTED int cublasDotEx(void*, int n) { return product("dotEx", 1, 1, n, stream_of_thread); }
EXPORTED int cublasSdot_v2(void*, int n) { return product("sdot", 1, 1, n, stream_of_thread); }
EXPORTED int cublasDdot_v2(void*, int n) { return product("ddot", 1, 1, n, stream_of_thread); }
EXPORTED int cusparseCreate(void** handle) { return made(handle); }

// cuBLASLt
struct Layout {
  unsigned long rows, columns;
};
struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  unsigned long algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

EXPORTED int cublasLtMatrixLayoutCreate(Layout** made, int, unsigned long rows, unsigned long columns, long) {
  *made = new Layout{rows, columns};
  return SUCCESS;
}
EXPORTED int cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return SUCCESS;
}
EXPORTED int cublasLtMatrixLayoutSetAttribute() { return SUCCESS; }
EXPORTED int cublasLtMatmulDescCreate(void** handle, int, int) { return made(handle); }
EXPORTED int cublasLtMatmulDescDestroy(void* handle) { return freed(handle); }
EXPORTED int cublasLtMatmulDescSetAttribute() { return SUCCESS; }
EXPORTED int cublasLtMatmulPreferenceCreate(void** handle) { return made(handle); }
EXPORTED int cublasLtMatmulPreferenceDestroy(void* handle) { return freed(handle); }
EXPORTED int cublasLtMatmulPreferenceSetAttribute() { return SUCCESS; }
EXPORTED int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, Heuristic* results,
                                            int* number) {
  memset(results, 0, sizeof *results);
  *number = 1;
  return SUCCESS;
}
EXPORTED int cublasLtMatmul(void*, void*, const void*, const void*, const Layout* a, const void*, const Layout*,
                            const void*, const void*, const Layout*, void*, const Layout* d, const void*, void*, size_t,
                            void* stream) {
  unsigned long inner = a->rows == d->rows ? a->columns : a->rows;
  return product("ltMatmul with its epilogue", static_cast<long>(d->rows), static_cast<long>(d->columns),
                 static_cast<long>(inner), stream);
}
EXPORTED size_t cublasLtGetVersion() { return 130100; }
