// The record itself, what Python asks of it, and the copies to the host that are still on their way.
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "recorder.h"

namespace recorder {

static const char* const KINDS[] = {"kernel", "triton",        "gemm", "convolution", "memcpy", "memset",
                                    "graph",  "host function", "sync", "query",       "alloc",  "free",
                                    "module", "illegal",       "mark"};

// Made on first use: PyTorch registers its kernels before the constructors of this library may have run.
std::recursive_mutex& mutex() {
  static std::recursive_mutex one;
  return one;
}

static std::vector<Record>& records() {
  static std::vector<Record> all;
  return all;
}

static std::vector<std::string>& names() {
  static std::vector<std::string> all;
  return all;
}

static bool recording = true;

int name_id(const std::string& name) {
  static std::unordered_map<std::string, int> ids;
  auto [found, is_new] = ids.try_emplace(name, static_cast<int>(names().size()));
  if (is_new) names().push_back(name);
  return found->second;
}

std::string& name_of(int id) { return names()[id]; }

void note(Record record) {
  if (recording || record.kind == ILLEGAL) records().push_back(record);
}

void note(Kind kind, const std::string& name, long bytes) {
  Record record{kind, name_id(name)};
  record.bytes = bytes;
  for (auto& [id, capture] : captures())
    if (capture->thread == gettid()) record.where = "beside";
  note(record);
}

// A copy to pinned memory that no one has waited for. Until then the memory holds ones in every bit, NaN as a number:
// a host that reads too early sees them.
struct InFlight {
  const Stream* stream;
  long work;
  char* to;
  size_t bytes;
};

static std::vector<InFlight>& in_flight() {
  static std::vector<InFlight> all;
  return all;
}

template <typename Done>
static void complete_where(Done done) {
  std::vector<InFlight> left;
  for (auto& copy : in_flight()) {
    if (done(copy)) memset(copy.to, 0, copy.bytes);
    else left.push_back(copy);
  }
  in_flight().swap(left);
}

void complete(const Clock& work) {
  complete_where([&](const InFlight& copy) {
    auto known = work.find(copy.stream);
    return known != work.end() && known->second >= copy.work;
  });
}

void complete_everything() {
  complete_where([](const InFlight&) { return true; });
}

void complete_stream(const Stream& stream) { complete(clock_of(stream)); }

void copy_to_host(const void* stream, void* to, size_t bytes) {
  Stream& own = stream_of(stream);
  memset(to, 0xff, bytes);
  in_flight().push_back({&own, own.work, static_cast<char*>(to), bytes});
}

void forget_range(const char* from, size_t bytes) {
  std::vector<InFlight> left;
  for (auto& copy : in_flight())
    if (copy.to + copy.bytes <= from || copy.to >= from + bytes) left.push_back(copy);
  in_flight().swap(left);
}

}  // namespace recorder

using namespace recorder;

EXPORTED void dry_run_reset() {
  Lock lock(mutex());
  records().clear();
}

EXPORTED void dry_run_recording(int on) { recording = on; }

EXPORTED void dry_run_mark(const char* name) {
  Lock lock(mutex());
  note(Record{MARK, name_id(name)});
}

EXPORTED long dry_run_size() { return static_cast<long>(records().size()); }

// Names of kernels are demangled here alone: a build of PyTorch registers tens of thousands.
static std::string readable(const std::string& name) {
  int status;
  char* plain = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? plain : name;
  free(plain);
  return result;
}

EXPORTED int dry_run_dump(const char* path) {
  Lock lock(mutex());
  FILE* file = fopen(path, "w");
  if (!file) return 1;
  for (auto& one : records())
    fprintf(file, "%s\t%u\t%u\t%ld\t%p\t%s\t%s\n", KINDS[one.kind], one.grid, one.block, one.bytes, one.stream,
            one.where, readable(name_of(one.name)).c_str());
  return fclose(file);
}

// A function that is not recorded was called: what follows is not what a GPU would do.
EXPORTED void dry_run_unrecorded(const char* name) {
  Lock lock(mutex());
  refuse(cudaErrorNotSupported, std::string(name) + " is not recorded");
}
