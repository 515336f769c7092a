// Capture and graphs: what may be put into a stream, what may be captured, and what a replay does.
#include <algorithm>
#include <unordered_set>

#include "recorder.h"

namespace recorder {

std::map<unsigned long long, std::unique_ptr<Capture>>& captures() {
  static std::map<unsigned long long, std::unique_ptr<Capture>> active;
  return active;
}

Stream& stream_of(const void* handle) {
  static Stream legacy;  // 0 and cudaStreamLegacy; cudaStreamPerThread is not used by PyTorch
  auto number = reinterpret_cast<uintptr_t>(handle);
  return number <= 2 ? legacy : *static_cast<Stream*>(const_cast<void*>(handle));
}

bool is_legacy(const Stream& stream) { return &stream == &stream_of(nullptr); }

static thread_local cudaError_t error_of_thread = cudaSuccess;
static thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;
static thread_local bool host_function_runs = false;

cudaError_t set_last_error(cudaError_t error) { return error_of_thread = error; }

cudaError_t last_error(bool clear) {
  cudaError_t error = error_of_thread;
  if (clear) error_of_thread = cudaSuccess;
  return error;
}

cudaError_t refuse(cudaError_t error, const std::string& what) {
  Record record{ILLEGAL, name_id(what)};
  note(record);
  return set_last_error(error);
}

cudaError_t refuse(cudaError_t error, Capture& capture, const std::string& what) {
  capture.invalid = true;  // an invalid operation invalidates every capture that it concerns
  return refuse(error, what);
}

cudaError_t refuse_capturing(cudaError_t error, const std::string& what) {
  for (auto& [id, capture] : captures())
    if (capture->thread == gettid() || capture->mode == cudaStreamCaptureModeGlobal) capture->invalid = true;
  return refuse(error, what);
}

bool in_host_function() { return host_function_runs; }

void run_host_function(const std::function<void()>& function) {
  bool before = host_function_runs;
  host_function_runs = true;
  function();
  host_function_runs = before;
}

// cudaThreadExchangeStreamCaptureMode: in the global mode a thread may make no potentially unsafe call while it
// captures itself, or while any thread captures in the global mode; in the thread-local mode, while it captures itself.
// A capture that was begun as relaxed does not count.
cudaError_t safe(const char* what) {
  if (host_function_runs) return refuse(cudaErrorNotPermitted, std::string(what) + " in a host function");
  if (mode_of_thread == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (auto& [id, capture] : captures()) {
    bool own = capture->thread == gettid() && capture->mode != cudaStreamCaptureModeRelaxed;
    bool others = mode_of_thread == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
    if (own || others)
      return refuse_capturing(cudaErrorStreamCaptureUnsupported, std::string(what) + " while capturing");
  }
  return cudaSuccess;
}

// The legacy stream waits for every blocking stream, so that no use of it is allowed while one of those captures.
static bool would_wait_for_capture(const Stream& stream) {
  if (!is_legacy(stream)) return false;
  for (auto& [id, capture] : captures())
    for (const Stream* member : capture->streams)
      if (member->blocking) return true;
  return false;
}

cudaError_t usable(Stream& stream, const std::string& what) {
  if (host_function_runs) return refuse(cudaErrorNotPermitted, what + " in a host function");
  if (would_wait_for_capture(stream))
    return refuse_capturing(cudaErrorStreamCaptureImplicit, what + " on the legacy stream while capturing");
  if (stream.capture && stream.capture->invalid)
    return refuse(cudaErrorStreamCaptureInvalidated, what + " in an invalidated capture");
  return cudaSuccess;
}

cudaError_t enqueue(Kind kind, int name, dim3 grid, dim3 block, const void* handle, long bytes,
                    Effect effect) {
  Stream& stream = stream_of(handle);
  REQUIRE(usable(stream, name_of(name)));
  Record record{kind, name, grid.x * grid.y * grid.z, block.x * block.y * block.z, bytes, handle};
  if (stream.capture) {
    record.where = "captured";
    auto& nodes = stream.capture->graph->nodes;
    nodes.push_back(std::make_unique<Node>(Node{record, stream.last, std::move(effect)}));
    stream.last = {nodes.back().get()};
    note(record);
    return cudaSuccess;
  }
  for (auto& [id, capture] : captures())
    if (capture->thread == gettid()) record.where = "beside";
  stream.work++;
  note(record);
  if (effect) effect(handle);
  return cudaSuccess;
}

cudaError_t enqueue(Kind kind, const std::string& name, dim3 grid, dim3 block, const void* handle, long bytes,
                    Effect effect) {
  return enqueue(kind, name_id(name), grid, block, handle, bytes, std::move(effect));
}

// Every node that must run before one of `ends`, and those themselves.
static std::unordered_set<const Node*> before(const std::vector<const Node*>& ends) {
  std::unordered_set<const Node*> seen;
  std::vector<const Node*> open = ends;
  while (!open.empty()) {
    const Node* node = open.back();
    open.pop_back();
    if (seen.insert(node).second) open.insert(open.end(), node->after.begin(), node->after.end());
  }
  return seen;
}

static size_t longest_chain(const Graph& graph) {
  std::map<const Node*, size_t> depth;  // nodes stand in an order in which each comes after what it depends on
  size_t longest = 0;
  for (auto& node : graph.nodes) {
    size_t deepest = 0;
    for (const Node* earlier : node->after) deepest = std::max(deepest, depth[earlier]);
    longest = std::max(longest, depth[node.get()] = deepest + 1);
  }
  return longest;
}

}  // namespace recorder

using namespace recorder;
using GraphHandle = std::shared_ptr<Graph>;  // what a cudaGraph_t and a cudaGraphExec_t point to

EXPORTED cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock(mutex());
  static unsigned long long count = 0;
  Stream& stream = stream_of(handle);
  if (is_legacy(stream)) return refuse(cudaErrorStreamCaptureUnsupported, "capture of the legacy stream");
  if (stream.capture) return refuse(cudaErrorIllegalState, "capture of a stream that captures already");
  auto capture = std::make_unique<Capture>();
  capture->id = ++count;
  capture->mode = mode;
  capture->thread = gettid();
  capture->origin = &stream;
  capture->streams.insert(&stream);
  stream.capture = capture.get();
  stream.last.clear();
  captures()[capture->id] = std::move(capture);
  return cudaSuccess;
}

// Capture ends where it began, and all that other streams have captured must come before something of that stream.
EXPORTED cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* made) {
  Lock lock(mutex());
  *made = nullptr;
  Stream& stream = stream_of(handle);
  Capture* capture = stream.capture;
  if (!capture) return refuse(cudaErrorIllegalState, "the end of a capture that was not begun");
  if (&stream != capture->origin)
    return refuse(cudaErrorStreamCaptureUnmatched, *capture, "a capture's end on a forked stream");
  if (capture->thread != gettid() && capture->mode != cudaStreamCaptureModeRelaxed)
    return refuse(cudaErrorStreamCaptureWrongThread, *capture, "a capture's end in another thread");
  bool unjoined = before(stream.last).size() != capture->graph->nodes.size(), invalid = capture->invalid;
  auto graph = capture->graph;
  for (Stream* member : capture->streams) {
    member->capture = nullptr;
    member->last.clear();
  }
  captures().erase(capture->id);
  if (invalid) return refuse(cudaErrorStreamCaptureInvalidated, "the end of an invalidated capture");
  if (unjoined) return refuse(cudaErrorStreamCaptureUnjoined, "a forked stream was not joined to the captured one");
  *made = reinterpret_cast<cudaGraph_t>(new GraphHandle(graph));
  return cudaSuccess;
}

EXPORTED cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  *status = cudaStreamCaptureStatusNone;
  if (would_wait_for_capture(stream))
    return refuse(cudaErrorStreamCaptureImplicit, "cudaStreamIsCapturing of the legacy stream");
  if (stream.capture)
    *status = stream.capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                              unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t** nodes,
                                              const cudaGraphEdgeData** edges, size_t* number) {
  Lock lock(mutex());
  REQUIRE(cudaStreamIsCapturing(handle, status));
  Stream& stream = stream_of(handle);
  if (id) *id = stream.capture ? stream.capture->id : 0;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = (const cudaGraphNode_t*)stream.last.data();  // opaque to the caller
  if (edges) *edges = nullptr;
  if (number) *number = stream.last.size();
  return cudaSuccess;
}
EXPORTED cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(mode_of_thread, *mode);
  return cudaSuccess;
}

static Graph& graph_of(const void* handle) { return **static_cast<const GraphHandle*>(handle); }

EXPORTED cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* number) {
  *number = graph ? graph_of(graph).nodes.size() : 0;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*,
                                                  size_t* number) {
  *number = 0;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = reinterpret_cast<cudaGraphExec_t>(new GraphHandle(*reinterpret_cast<GraphHandle*>(graph)));
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream) {
  Lock lock(mutex());
  Graph& graph = graph_of(handle);
  auto name = "graph of " + std::to_string(graph.nodes.size()) + " nodes, " + std::to_string(longest_chain(graph)) +
              " in its longest chain";
  return enqueue(GRAPH, name, 1, 1, stream, static_cast<long>(graph.nodes.size()), [&graph](const void* into) {
    for (auto& node : graph.nodes)
      if (node->effect) node->effect(into);
  });
}
EXPORTED cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<GraphHandle*>(graph);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete reinterpret_cast<GraphHandle*>(graph);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }

