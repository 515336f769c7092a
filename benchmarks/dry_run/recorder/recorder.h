// A recorder that stands in for CUDA's runtime and driver, cuBLAS, cuDNN and NCCL under a CUDA build of PyTorch.
//
// It launches nothing. It writes down what it is asked for, and refuses what CUDA refuses. Device memory is a range of
// addresses without content, so the host reads zeros from it. The rules are those of the CUDA C++ Programming Guide
// (section on stream capture) and of the comments in cuda_runtime_api.h; each check names its rule.
//
// This file declares what the parts share: the record, the streams, and the graph that a capture makes.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace recorder {

// The record. Kinds up to HOST_FUNCTION are work that a stream does; their names in the dump stand in record.cpp.
enum Kind { KERNEL, TRITON, GEMM, CONVOLUTION, MEMCPY, MEMSET, GRAPH, HOST_FUNCTION,
            SYNC, QUERY, ALLOC, FREE, MODULE, ILLEGAL, MARK };

struct Record {
  Kind kind;
  int name = 0;  // from name_id
  unsigned grid = 0, block = 0;
  long bytes = 0;  // of copies, fills and allocations; the nodes of a graph
  const void* stream = nullptr;
  const char* where = "";  // "captured"; "beside": by a thread that captures, into a stream that does not
};

int name_id(const std::string& name);
std::string& name_of(int id);
void note(Record record);
void note(Kind kind, const std::string& name, long bytes = 0);

using Lock = std::lock_guard<std::recursive_mutex>;
std::recursive_mutex& mutex();

// What work does to the memory of the host: called as it is put into a stream, or by each replay into that stream.
using Effect = std::function<void(const void* stream)>;

// A node of a graph.
struct Node {
  Record record;
  std::vector<const Node*> after;
  Effect effect;
};

struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
};

struct Stream;

struct Capture {
  std::shared_ptr<Graph> graph = std::make_shared<Graph>();
  unsigned long long id;
  cudaStreamCaptureMode mode;
  pid_t thread;
  Stream* origin;
  std::set<Stream*> streams;
  bool invalid = false;
};

// How far each stream's work is known to be done: what an event stands for.
using Clock = std::map<const Stream*, long>;

struct Stream {
  bool blocking = true;  // with the legacy stream; PyTorch's own are not
  int priority = 0;
  Capture* capture = nullptr;
  std::vector<const Node*> last;  // nodes that the next captured one depends on
  long work = 0, asked = 0;       // how much was put into the stream, and how much of it was asked for
  Clock waits;                    // work of other streams that comes before its next work
};

struct Event {
  unsigned long long capture = 0;  // where it was last recorded; 0: outside any
  std::vector<const Node*> last;
  Clock work;
  bool recorded = false, asked = false;
  double seconds = 0;
};

Stream& stream_of(const void* handle);  // the legacy stream for 0, 1 and 2
bool is_legacy(const Stream& stream);
std::map<unsigned long long, std::unique_ptr<Capture>>& captures();

// Put work into a stream: a node while it captures, a record and the effect otherwise.
cudaError_t enqueue(Kind kind, const std::string& name, dim3 grid, dim3 block, const void* stream, long bytes = 0,
                    Effect effect = {});
cudaError_t enqueue(Kind kind, int name, dim3 grid, dim3 block, const void* stream, long bytes = 0,
                    Effect effect = {});

cudaError_t refuse(cudaError_t error, const std::string& what);          // record it as illegal, and return it
cudaError_t refuse_capturing(cudaError_t error, const std::string& what);  // and invalidate this thread's captures
cudaError_t refuse(cudaError_t error, Capture& capture, const std::string& what);  // and invalidate that capture
cudaError_t last_error(bool clear);
cudaError_t set_last_error(cudaError_t error);

// cudaSuccess, or the error of a call that puts work into the stream.
cudaError_t usable(Stream& stream, const std::string& what);

// cudaSuccess, or the error of a call that is "potentially unsafe" while a stream captures, or made by a host function.
cudaError_t safe(const char* what);
bool in_host_function();
void run_host_function(const std::function<void()>& function);

// The host waits: copies to it that belong to this work are complete from here on.
void complete(const Clock& work);
void complete_everything();
void complete_stream(const Stream& stream);
Clock clock_of(const Stream& stream);
void copy_to_host(const void* stream, void* to, size_t bytes);  // in flight until the host waits for it
void forget_range(const char* from, size_t bytes);

bool on_device(const void* address);
bool is_pinned(const void* address);

}  // namespace recorder

// Leave the function with the error of an expression that is not cudaSuccess.
#define REQUIRE(expression)                        \
  do {                                             \
    cudaError_t _error = (expression);             \
    if (_error != cudaSuccess) return _error;      \
  } while (0)
