// Custom-op library for ONNX Runtime, built on the C interface (sparsifiner.h). It reads attributes and shapes, and
// runs the operators on the threads of the session.

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <atomic>
#include <cstdio>
#include <cstring>
#include <new>

#include "kernels.h"
#include "operators.h"
#include "scratch.h"
#include "sparsifiner.h"
#include "tensors.h"

namespace sparsifiner {
namespace {

// Call of the C interface on the threads of a session.
class SessionCall {
 public:
  SessionCall(OrtKernelContext* context, Problem* problem, int32_t precision) : context_(context), problem_(problem) {
    call_.version = SPARSIFINER_VERSION;
    call_.precision = precision;
    call_.parallel_for = &SessionCall::ParallelFor;
    call_.threads = this;
  }
  SessionCall(const SessionCall&) = delete;
  SessionCall& operator=(const SessionCall&) = delete;

  // Allocates an output of the given shape and runs an operator, run(call, output) -> status, that writes it. A dry run
  // validates the arguments first, because an output of invalid size cannot be allocated.
  template <size_t kRank, typename Run>
  bool Fill(const Tensors& tensors, const int64_t (&axes)[kRank], Run run) {
    sparsifiner_output output{};
    return Check(run(&call_, output)) && tensors.Output(axes, &output) && Check(run(&call_, output));
  }

 private:
  // Returns true if the call succeeded; otherwise records the problem.
  bool Check(sparsifiner_status status) {
    if (status == SPARSIFINER_OK) return true;
    return status == SPARSIFINER_OUT_OF_MEMORY ? problem_->OutOfMemory() : problem_->Refuse("%s", call_.message);
  }

  static int ParallelFor(void* self, size_t count, void (*run)(void*, size_t), void* data) {
    auto* session = static_cast<SessionCall*>(self);
    return session->problem_->Check(
        Ort::GetApi().KernelContext_ParallelFor(session->context_, run, count, count, data));
  }

  OrtKernelContext* context_;
  Problem* problem_;
  sparsifiner_call call_{};
};

// Kernel of one node of a graph.
template <typename Kernel>
struct Node : Allocated {
  Node(const char* operator_name, int32_t of_attention) : name(operator_name), precision(of_attention) {
    sparsifiner_hold_memory(1);
  }
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;
  ~Node() { sparsifiner_hold_memory(-1); }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
    Problem problem;
    SessionCall session(context, &problem, precision);
    // A failure without a recorded problem means that memory ran out. OutOfMemory keeps an earlier problem.
    if (!kernel.Compute(Tensors(context, &problem), &session)) problem.OutOfMemory();
    return problem.StatusOrThrow(name);
  }

  Kernel kernel{};
  const char* name;
  int32_t precision;
};

// Operator, as ONNX Runtime sees it.
template <typename Kernel>
struct Operator : Ort::CustomOpBase<Operator<Kernel>, Node<Kernel>, /*WithStatus=*/true> {
  // last, second: types of the last and the second input; all others are float32. of_attention: precision of attention,
  // a sparsifiner_precision.
  Operator(const char* operator_name, size_t input_count, ONNXTensorElementDataType last,
           ONNXTensorElementDataType output, int32_t of_attention,
           ONNXTensorElementDataType second = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
      : name(operator_name), inputs(input_count), last_type(last), second_type(second), output_type(output),
        precision(of_attention) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    Problem problem;
    auto* node = new (std::nothrow) Node<Kernel>(name, precision);
    if (node == nullptr || !node->kernel.Read(Attributes(info, &problem))) {
      problem.OutOfMemory();
      delete node;
      node = nullptr;
    }
    *kernel = node;
    return problem.StatusOrThrow(name);
  }
  const char* GetName() const { return name; }
  size_t GetInputTypeCount() const { return inputs; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    if (index + 1 == inputs) return last_type;
    return index == 1 ? second_type : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return output_type; }

  const char* name;
  size_t inputs;
  ONNXTensorElementDataType last_type, second_type, output_type;
  int32_t precision;
};

// Custom-op domain with the operators in one precision of attention. Sessions refer to it as long as the library is
// loaded. It is created at the first use; if that fails, the next use tries again.
class Domain {
 public:
  explicit Domain(int32_t precision) : precision_(precision) {}
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;
  ~Domain() {
    if (OrtCustomOpDomain* domain = domain_.exchange(nullptr)) Ort::GetApi().ReleaseCustomOpDomain(domain);
  }

  OrtCustomOpDomain* Get(Problem* problem) {
    const OrtApi& api = Ort::GetApi();
    if (OrtCustomOpDomain* existing = domain_.load()) return existing;
    OrtCustomOpDomain* domain = nullptr;
    if (!problem->Check(api.CreateCustomOpDomain("sparsifiner", &domain)) || domain == nullptr) return nullptr;
    const OrtCustomOp* const operators[] = {&select_, &sparse_, &dense_, &cached_, &cached_halves_, &match_, &merge_};
    for (const OrtCustomOp* each : operators) {
      if (problem->Check(api.CustomOpDomain_Add(domain, each))) continue;
      api.ReleaseCustomOpDomain(domain);
      return nullptr;
    }
    OrtCustomOpDomain* first = nullptr;
    if (domain_.compare_exchange_strong(first, domain)) return domain;
    api.ReleaseCustomOpDomain(domain);
    return first;
  }

 private:
  static constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kInt = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  const int32_t precision_;
  const Operator<SelectKernel> select_{"KeySelect", 4, kFloat, kInt, precision_};
  const Operator<SparseKernel> sparse_{"SparseAttention", 3, kInt, kFloat, precision_};
  const Operator<DenseKernel> dense_{"DenseAttention", 2, kFloat, kFloat, precision_};
  const Operator<CachedKernel> cached_{"CachedAttention", 3, kFloat, kFloat, precision_};
  const Operator<CachedKernel> cached_halves_{"CachedAttention", 3, kFloat, kFloat, precision_,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16};
  const Operator<MatchKernel> match_{"MatchTokens", 2, kFloat, kInt, precision_};
  const Operator<MergeKernel> merge_{"MergeTokens", 3, kInt, kFloat, precision_};
  std::atomic<OrtCustomOpDomain*> domain_{nullptr};
};

// Values of the session configuration entry "sparsifiner.attention", the precision of attention.
constexpr const char* kPrecisions[] = {"float32", "bfloat16"};  // indexed by sparsifiner_precision
static_assert(SPARSIFINER_FLOAT32 == 0 && SPARSIFINER_BFLOAT16 == 1);

// Reads the precision of attention from the session options; float32 by default.
bool AttentionPrecision(const OrtApi& api, const OrtSessionOptions* options, Problem* problem, int32_t* precision) {
  constexpr char kEntry[] = "sparsifiner.attention";
  int present = 0;
  char value[16] = "float32";
  size_t size = sizeof(value);
  if (!problem->Check(api.HasSessionConfigEntry(options, kEntry, &present))) return false;
  if (present && !problem->Check(api.GetSessionConfigEntry(options, kEntry, value, &size))) return false;
  *precision = 0;
  for (const char* name : kPrecisions) {
    if (std::strcmp(value, name) == 0) {
      return FindAttention(*precision) != nullptr || problem->Refuse("%s has no %s", sparsifiner_target(), name);
    }
    ++*precision;
  }
  return problem->Refuse("%s is %s, not float32 or bfloat16", kEntry, value);
}

}  // namespace
}  // namespace sparsifiner

extern "C" SPARSIFINER_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                           const OrtApiBase* base) noexcept {
  using namespace sparsifiner;
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    char message[200];
    std::snprintf(message, sizeof(message), "the sparsifiner library needs ONNX Runtime 1.%d or newer, but this is %s",
                  ORT_API_VERSION, base->GetVersionString());
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message);
  }
  Ort::InitApi(api);
  static Domain domains[] = {Domain(SPARSIFINER_FLOAT32), Domain(SPARSIFINER_BFLOAT16)};
  Problem problem;
  int32_t precision = 0;
  if (AttentionPrecision(*api, options, &problem, &precision)) {
    OrtCustomOpDomain* domain = domains[precision].Get(&problem);
    if (domain == nullptr || !problem.Check(api->AddCustomOpDomain(options, domain))) problem.OutOfMemory();
  }
  // If there is no memory even for the message, the status is null, which means success, and the session has no native
  // operators: it runs the function bodies in the file, or rejects the file.
  return problem.Status("library");
}
