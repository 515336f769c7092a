// Streams and events: what waits for what, and what a host may ask of them.
#include <algorithm>
#include <ctime>

#include "recorder.h"

namespace recorder {

Clock clock_of(const Stream& stream) {
  Clock clock = stream.waits;
  clock[&stream] = stream.work;
  return clock;
}

}  // namespace recorder

using namespace recorder;

static void merge(Clock& into, const Clock& other) {
  for (auto& [stream, work] : other) into[stream] = std::max(into[stream], work);
}

static Capture* active(unsigned long long id) {
  auto found = captures().find(id);
  return found == captures().end() ? nullptr : found->second.get();
}

static double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

EXPORTED cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  Lock lock(mutex());
  REQUIRE(safe("cudaStreamCreate"));  // nowhere documented to be safe
  auto made = new Stream;
  made->priority = priority;
  made->blocking = !(flags & cudaStreamNonBlocking);
  *stream = reinterpret_cast<cudaStream_t>(made);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
EXPORTED cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORTED cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream).priority;
  return cudaSuccess;
}

// A stream that is captured has no state of execution: it may be neither asked nor waited for.
static cudaError_t waitable(Stream& stream, const char* what) {
  if (stream.capture)
    return refuse(cudaErrorStreamCaptureUnsupported, *stream.capture, std::string(what) + " of a capturing stream");
  REQUIRE(usable(stream, what));
  return safe(what);
}

// New work is not done when it is asked for the first time, so that code which polls is seen to poll.
EXPORTED cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  REQUIRE(waitable(stream, "cudaStreamQuery"));
  note(QUERY, "cudaStreamQuery");
  if (stream.asked < stream.work) {
    stream.asked = stream.work;
    return set_last_error(cudaErrorNotReady);
  }
  complete_stream(stream);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock(mutex());
  REQUIRE(waitable(stream_of(handle), "cudaStreamSynchronize"));
  note(SYNC, "cudaStreamSynchronize");
  complete_stream(stream_of(handle));
  return cudaSuccess;
}

// A device encompasses all its streams: it may not be waited for while one of them captures, in whatever mode.
EXPORTED cudaError_t cudaDeviceSynchronize() {
  Lock lock(mutex());
  if (!captures().empty()) {
    for (auto& [id, capture] : captures()) capture->invalid = true;
    return refuse(cudaErrorStreamCaptureUnsupported, "cudaDeviceSynchronize while a stream captures");
  }
  REQUIRE(safe("cudaDeviceSynchronize"));
  note(SYNC, "cudaDeviceSynchronize");
  complete_everything();
  return cudaSuccess;
}

EXPORTED cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
EXPORTED cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}

static Event& event_of(cudaEvent_t handle) { return *reinterpret_cast<Event*>(handle); }

EXPORTED cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t to, unsigned flags) {
  Lock lock(mutex());
  Stream& stream = stream_of(to);
  Event& event = event_of(handle);
  REQUIRE(usable(stream, "cudaEventRecord"));
  if (stream.capture && flags & cudaEventRecordExternal)  // a node of the graph; the event stays one outside
    return enqueue(HOST_FUNCTION, "event record", 1, 1, to);
  event = Event{stream.capture ? stream.capture->id : 0, stream.last, clock_of(stream), true, false, now()};
  return cudaSuccess;
}
EXPORTED cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

// An event that was last recorded in a capture stands for nodes, which have no state of execution.
static cudaError_t waitable(Event& event, const char* what) {
  if (event.capture) {
    if (Capture* capture = active(event.capture)) capture->invalid = true;
    return refuse(cudaErrorCapturedEvent, std::string(what) + " of an event that was recorded in a capture");
  }
  return safe(what);
}

// Ready at once if never recorded; after a record ready at the second query, or once someone has waited.
EXPORTED cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock(mutex());
  Event& event = event_of(handle);
  REQUIRE(waitable(event, "cudaEventQuery"));
  note(QUERY, "cudaEventQuery");
  if (event.recorded && !event.asked) {
    event.asked = true;
    return set_last_error(cudaErrorNotReady);
  }
  complete(event.work);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock(mutex());
  Event& event = event_of(handle);
  REQUIRE(waitable(event, "cudaEventSynchronize"));
  note(SYNC, "cudaEventSynchronize");
  event.asked = true;
  complete(event.work);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  Lock lock(mutex());
  REQUIRE(waitable(event_of(from), "cudaEventElapsedTime"));
  REQUIRE(waitable(event_of(to), "cudaEventElapsedTime"));
  *milliseconds = static_cast<float>(1e3 * (event_of(to).seconds - event_of(from).seconds));  // of the host's clock
  return cudaSuccess;
}

// A captured event takes a waiting stream into its capture. What is captured may not wait for what is not, unless that
// is asked for as external; nor may two captures be joined, nor the legacy stream be drawn into one.
EXPORTED cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t of, unsigned flags) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  Event& event = event_of(of);
  REQUIRE(usable(stream, "cudaStreamWaitEvent"));
  if (stream.capture && flags & cudaEventWaitExternal) return enqueue(HOST_FUNCTION, "event wait", 1, 1, handle);
  if (!event.capture) {
    if (stream.capture && event.recorded)
      return refuse(cudaErrorStreamCaptureIsolation, *stream.capture, "a capturing stream waits for an event outside");
    merge(stream.waits, event.work);
    return cudaSuccess;
  }
  Capture* capture = active(event.capture);
  if (!capture) return refuse(cudaErrorCapturedEvent, "a wait for an event of a capture that has ended");
  if (is_legacy(stream))
    return refuse(cudaErrorStreamCaptureImplicit, *capture, "the legacy stream waits for a capture");
  if (stream.capture && stream.capture != capture) {
    stream.capture->invalid = true;
    return refuse(cudaErrorStreamCaptureMerge, *capture, "a wait that joins two captures");
  }
  if (!stream.capture) stream.last.clear();
  stream.capture = capture;
  capture->streams.insert(&stream);
  for (const Node* node : event.last)
    if (std::find(stream.last.begin(), stream.last.end(), node) == stream.last.end()) stream.last.push_back(node);
  return cudaSuccess;
}

// A host function may call nothing of CUDA. In a capture it becomes a node, which every replay runs.
EXPORTED cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  Lock lock(mutex());
  return enqueue(HOST_FUNCTION, "cudaLaunchHostFunc", 1, 1, stream, 0,
                 [=](const void*) { run_host_function([=] { function(data); }); });
}
// "this function is not supported with cudaStreamBeginCapture and cudaStreamEndCapture"
EXPORTED cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t function, void* data, unsigned) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  if (stream.capture)
    return refuse(cudaErrorStreamCaptureUnsupported, *stream.capture, "cudaStreamAddCallback on a capturing stream");
  return enqueue(HOST_FUNCTION, "cudaStreamAddCallback", 1, 1, handle, 0,
                 [=](const void*) { run_host_function([=] { function(handle, cudaSuccess, data); }); });
}
EXPORTED cudaError_t cudaGetLastError() { return last_error(true); }
EXPORTED cudaError_t cudaPeekAtLastError() { return last_error(false); }
