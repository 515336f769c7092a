// cuDNN, through its backend API: descriptors with attributes, a plan made of a graph of operations, and its execution.
//
// A plan is one launch, however many operations its graph has: a convolution fused with its bias, a residual and a ReLU
// is one. It is described by its operations with the tensors that lie in memory. A tensor that only goes from one
// operation to the next ("virtual") is none of those, and costs no bytes.
#include <cudnn_graph.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "recorder.h"

using namespace recorder;

namespace {

struct Attribute {
  cudnnBackendAttributeType_t type;
  std::vector<char> content;
};

struct Descriptor {
  cudnnBackendDescriptorType_t type;
  std::map<int, Attribute> attributes;
  std::string plan;  // of an operation graph, and of all that is made from it

  template <typename Value>
  std::vector<Value> values(int name) const {
    auto found = attributes.find(name);
    if (found == attributes.end()) return {};
    auto& content = found->second.content;
    std::vector<Value> all(content.size() / sizeof(Value));
    memcpy(all.data(), content.data(), all.size() * sizeof(Value));
    return all;
  }
  template <typename Value>
  Value value(int name, Value otherwise = {}) const {
    auto all = values<Value>(name);
    return all.empty() ? otherwise : all.front();
  }
  const Descriptor* other(int name) const { return value<const Descriptor*>(name); }
};

size_t width(cudnnBackendAttributeType_t type) {
  switch (type) {
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE:
    case CUDNN_TYPE_VOID_PTR:
    case CUDNN_TYPE_BACKEND_DESCRIPTOR:
      return 8;
    case CUDNN_TYPE_BOOLEAN:
      return 1;
    default:
      return 4;
  }
}

std::string dtype(int type) {
  static const std::map<int, const char*> NAMES = {{CUDNN_DATA_FLOAT, "f32"},
                                                   {CUDNN_DATA_DOUBLE, "f64"},
                                                   {CUDNN_DATA_HALF, "f16"},
                                                   {CUDNN_DATA_BFLOAT16, "bf16"}};
  auto found = NAMES.find(type);
  return found == NAMES.end() ? "type" + std::to_string(type) : found->second;
}

std::string joined(const std::vector<int64_t>& numbers) {
  std::string text;
  for (auto number : numbers) text += (text.empty() ? "" : ",") + std::to_string(number);
  return text;
}

// " x=bf16[128,64,32,32]nhwc"; nothing for a tensor that does not lie in memory.
std::string tensor(const char* role, const Descriptor* tensor) {
  if (!tensor || tensor->value<char>(CUDNN_ATTR_TENSOR_IS_VIRTUAL)) return "";
  auto strides = tensor->values<int64_t>(CUDNN_ATTR_TENSOR_STRIDES);
  auto layout = strides.size() < 4 ? "" : strides[1] == 1 ? "nhwc" : "nchw";
  return std::string(" ") + role + "=" + dtype(tensor->value<int>(CUDNN_ATTR_TENSOR_DATA_TYPE, -1)) + "[" +
         joined(tensor->values<int64_t>(CUDNN_ATTR_TENSOR_DIMENSIONS)) + "]" + layout;
}

std::string convolution(const Descriptor& operation, const char* name, int x, int w, int y, int options) {
  auto description = std::string(name) + tensor("x", operation.other(x)) + tensor("w", operation.other(w)) +
                     tensor("y", operation.other(y));
  if (auto own = operation.other(options))
    description += " stride=" + joined(own->values<int64_t>(CUDNN_ATTR_CONVOLUTION_FILTER_STRIDES)) +
                   " in=" + dtype(own->value<int>(CUDNN_ATTR_CONVOLUTION_COMP_TYPE, -1));
  return description;
}

std::string pointwise(const Descriptor& operation) {
  static const std::map<int, const char*> NAMES = {{CUDNN_POINTWISE_ADD, "add"},
                                                   {CUDNN_POINTWISE_MUL, "mul"},
                                                   {CUDNN_POINTWISE_RELU_FWD, "relu"},
                                                   {CUDNN_POINTWISE_RELU_BWD, "relu gradient"},
                                                   {CUDNN_POINTWISE_IDENTITY, "identity"}};
  int mode = -1;
  if (auto own = operation.other(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR))
    mode = own->value<int>(CUDNN_ATTR_POINTWISE_MODE, -1);
  auto found = NAMES.find(mode);
  auto name = found == NAMES.end() ? "pointwise" + std::to_string(mode) : found->second;
  return name + tensor("x", operation.other(CUDNN_ATTR_OPERATION_POINTWISE_XDESC)) +
         tensor("b", operation.other(CUDNN_ATTR_OPERATION_POINTWISE_BDESC)) +
         tensor("y", operation.other(CUDNN_ATTR_OPERATION_POINTWISE_YDESC));
}

// Gradients are given the names of what they are gradients of, so that x, w and y mean the same in all three.
std::string description(const Descriptor& operation) {
  switch (operation.type) {
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR:
      return convolution(operation, "forward", CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_X,
                         CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_W, CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_Y,
                         CUDNN_ATTR_OPERATION_CONVOLUTION_FORWARD_CONV_DESC);
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR:
      return convolution(operation, "input_gradient", CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DX,
                         CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_W, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_DY,
                         CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC);
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR:
      return convolution(operation, "weight_gradient", CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_X,
                         CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DW, CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_DY,
                         CUDNN_ATTR_OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC);
    case CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR:
      return pointwise(operation);
    default:
      return "operation" + std::to_string(operation.type);
  }
}

// In the order of execution: a fused graph is given its convolution last by PyTorch.
std::string plan_of(const Descriptor& graph) {
  auto operations = graph.values<const Descriptor*>(CUDNN_ATTR_OPERATIONGRAPH_OPS);
  std::stable_partition(operations.begin(), operations.end(), [](const Descriptor* operation) {
    return operation->type != CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR;
  });
  std::string text = "cudnn ";
  for (auto operation : operations) text += (operation == operations.front() ? "" : " + ") + description(*operation);
  return text;
}

// From where each kind of descriptor takes the plan that it stands for.
const std::map<int, int> PLAN_FROM = {
    {CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR, CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH},
    {CUDNN_BACKEND_ENGINE_DESCRIPTOR, CUDNN_ATTR_ENGINE_OPERATION_GRAPH},
    {CUDNN_BACKEND_ENGINECFG_DESCRIPTOR, CUDNN_ATTR_ENGINECFG_ENGINE},
    {CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR, CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG},
};

Descriptor& of(cudnnBackendDescriptor_t handle) { return *static_cast<Descriptor*>(handle); }

thread_local cudaStream_t stream_of_thread = nullptr;

cudnnStatus_t executed(Kind kind, const std::string& name) {
  Lock lock(mutex());
  cudaError_t error = enqueue(kind, name, 1, 1, stream_of_thread);
  return error == cudaSuccess ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_EXECUTION_FAILED;
}

}  // namespace

EXPORTED cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
  *handle = static_cast<cudnnHandle_t>(malloc(64));
  return CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnDestroy(cudnnHandle_t) { return CUDNN_STATUS_SUCCESS; }
EXPORTED cudnnStatus_t cudnnSetStream(cudnnHandle_t, cudaStream_t stream) {
  stream_of_thread = stream;
  return CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnGetStream(cudnnHandle_t, cudaStream_t* stream) {
  *stream = stream_of_thread;
  return CUDNN_STATUS_SUCCESS;
}

EXPORTED cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t* made) {
  *made = new Descriptor{type, {}, ""};
  return CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  delete &of(descriptor);
  return CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name,
                                                cudnnBackendAttributeType_t type, int64_t count, const void* values) {
  auto start = static_cast<const char*>(values);
  of(descriptor).attributes[name] = {type, {start, start + static_cast<size_t>(count) * width(type)}};
  return CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t handle) {
  Descriptor& own = of(handle);
  if (own.type == CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR) own.plan = plan_of(own);
  auto from = PLAN_FROM.find(own.type);
  if (from != PLAN_FROM.end())
    if (auto other = own.other(from->second)) own.plan = other->plan;
  return CUDNN_STATUS_SUCCESS;
}

// One engine is offered for every graph, without a workspace. A list is asked for its length first.
EXPORTED cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const handle, cudnnBackendAttributeName_t name,
                                                cudnnBackendAttributeType_t type, int64_t wanted, int64_t* count,
                                                void* values) {
  Descriptor& own = of(handle);
  int64_t ignored;
  if (!count) count = &ignored;
  *count = 1;
  switch (name) {
    case CUDNN_ATTR_ENGINEHEUR_RESULTS:
    case CUDNN_ATTR_ENGINECFG_ENGINE:
    case CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG:
      if (auto result = values ? *static_cast<Descriptor**>(values) : nullptr) result->plan = own.plan;
      return CUDNN_STATUS_SUCCESS;
    case CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE:
    case CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE:
    case CUDNN_ATTR_ENGINE_GLOBAL_INDEX:
      if (values) *static_cast<int64_t*>(values) = 0;
      return CUDNN_STATUS_SUCCESS;
    default:
      break;
  }
  auto found = own.attributes.find(name);
  *count = found == own.attributes.end() ? 0 : static_cast<int64_t>(found->second.content.size() / width(type));
  if (*count && values)
    memcpy(values, found->second.content.data(), static_cast<size_t>(std::min(*count, wanted)) * width(type));
  return CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnBackendExecute(cudnnHandle_t, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t) {
  return executed(CONVOLUTION, of(plan).plan);
}

// Batch norm by the older API, of which PyTorch takes these. Their arguments are left out.
#define BATCH_NORM(name) \
  EXPORTED cudnnStatus_t name() { return executed(KERNEL, "cudnn " #name); }
BATCH_NORM(cudnnBatchNormalizationForwardInference)
BATCH_NORM(cudnnBatchNormalizationForwardTrainingEx)
BATCH_NORM(cudnnBatchNormalizationBackwardEx)

static cudnnStatus_t no_bytes(size_t* bytes) {
  *bytes = 0;
  return CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*,
                                                                         void*, void*, void*, size_t* bytes) {
  return no_bytes(bytes);
}
EXPORTED cudnnStatus_t cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*,
                                                                                void*, void*, size_t* bytes) {
  return no_bytes(bytes);
}
EXPORTED cudnnStatus_t cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*,
                                                                            size_t* bytes) {
  return no_bytes(bytes);
}
