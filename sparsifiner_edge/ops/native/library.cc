// The custom-op library that ONNX Runtime loads: reads attributes and shapes, refuses what the schema refuses, calls
// the kernels on the session's own threads.

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <new>

#include "call.h"
#include "errors.h"
#include "kernels.h"
#include "scratch.h"
#include "tensors.h"

namespace sparsifiner {
namespace {

size_t Tiles(const Packed& in, size_t prefix, size_t tile) { return (in.tokens - prefix + tile - 1) / tile; }

// A kernel reads its attributes once; Compute may run on several threads at a time. Both are false where they fail, and
// the problem, if it is none of memory, is told. kMerged: the second input are the tokens' sizes.
template <bool kMerged>
struct DenseKernel {
  bool Read(const OrtKernelInfo* info, Problem* problem) {
    return WholeNumber(info, "num_heads", 1, &heads, problem) && Number(info, "scale", &scale, problem);
  }

  bool Compute(const Tensors& tensors, Problem*, const Parallel& parallel) const {
    Packed in{};
    float* output = nullptr;
    return tensors.Pack(heads, 0, scale, &in) && (!kMerged || tensors.Sizes(1, in.batch, in.tokens, &in.sizes)) &&
           tensors.Output({in.batch, in.tokens, heads * in.width}, &output) && DenseAttention(in, output, parallel);
  }

  size_t heads;
  float scale;
};

struct ScoreKernel {
  bool Read(const OrtKernelInfo* info, Problem* problem) {
    return WholeNumber(info, "num_heads", 1, &heads, problem) && Number(info, "scale", &scale, problem);
  }

  bool Compute(const Tensors& tensors, Problem*, const Parallel& parallel) const {
    Packed in{};
    float* output = nullptr;
    return tensors.Pack(heads, 0, scale, &in) && tensors.Output({in.batch, in.tokens}, &output) &&
           TokenScore(in, output, parallel);
  }

  size_t heads;
  float scale;
};

template <bool kMerged>
struct SparseKernel {
  bool Read(const OrtKernelInfo* info, Problem* problem) {
    if (!WholeNumber(info, "num_heads", 1, &heads, problem) || !Number(info, "scale", &scale, problem) ||
        !WholeNumber(info, "num_prefix", 0, &settings.prefix, problem) ||
        !WholeNumber(info, "tile", 1, &settings.tile, problem) ||
        !WholeNumber(info, "cell", 0, &settings.cell, problem) ||
        !WholeNumber(info, "prefix_keys", 0, &settings.prefix_keys, problem)) {
      return false;
    }
    if (settings.prefix_keys > 1) return problem->Refuse("prefix_keys must be 0 or 1");
    if (settings.prefix_keys == 0 && (settings.tile != 1 || settings.cell != 0)) {
      return problem->Refuse("prefix_keys 0 goes with tile 1 and cell 0");
    }
    if (settings.prefix_keys == 1) settings.prefix_keys = settings.prefix;
    return true;
  }

  bool Compute(const Tensors& tensors, Problem* problem, const Parallel& parallel) const {
    Packed in{};
    Shape shape;
    const int32_t* indices = nullptr;
    if (!tensors.Pack(heads, settings.prefix, scale, &in) ||
        (kMerged && !tensors.Sizes(1, in.batch, in.tokens, &in.sizes)) ||
        !tensors.Input(kMerged ? 2 : 1, &shape, &indices)) {
      return false;
    }
    Shape expected;
    for (size_t axis : {in.batch, heads, Tiles(in, settings.prefix, settings.tile)}) {
      expected.axes[expected.rank++] = static_cast<int64_t>(axis);
    }
    if (shape.rank != 4 || !std::equal(expected.axes, expected.axes + 3, shape.axes) || shape.axes[3] < 1 ||
        shape.axes[3] > static_cast<int64_t>(in.tokens - settings.prefix_keys)) {
      return problem->Refuse("indices must have shape %s and K, got %s", Text(expected).text, Text(shape).text);
    }
    SparseSettings all = settings;
    all.keys = static_cast<size_t>(shape.axes[3]);
    if (all.cell != 0 && (in.tokens - all.prefix + all.cell - 1) / all.cell > 65535) {
      return problem->Refuse("more than 65535 cells");
    }
    // Rows that are narrower than a vector grow where they are packed.
    if (Times(in.tokens, in.width + 15) > UINT32_MAX) {
      return problem->Refuse("%zu tokens are too many for 32-bit places", in.tokens);
    }
    float* output = nullptr;
    return tensors.Output({in.batch, in.tokens, heads * in.width}, &output) &&
           SparseAttention(in, indices, all, output, parallel);
  }

  size_t heads;
  float scale;
  SparseSettings settings{};
};

template <bool kMerged>
struct SelectKernel {
  bool Read(const OrtKernelInfo* info, Problem* problem) {
    if (!WholeNumber(info, "num_heads", 1, &heads, problem) || !Number(info, "scale", &scale, problem) ||
        !WholeNumber(info, "num_prefix", 0, &settings.prefix, problem) ||
        !WholeNumber(info, "probe", 1, &settings.probe, problem) ||
        !WholeNumber(info, "tile", 1, &settings.tile, problem) ||
        !WholeNumber(info, "cell", 0, &settings.cell, problem) ||
        !WholeNumber(info, "keys", 1, &settings.keys, problem) ||
        !Number(info, "value_power", &settings.value_power, problem)) {
      return false;
    }
    return settings.tile % settings.probe == 0 || problem->Refuse("tile is not a multiple of probe");
  }

  bool Compute(const Tensors& tensors, Problem* problem, const Parallel& parallel) const {
    Packed in{};
    Shape shape, other;
    const float *proj_q = nullptr, *proj_k = nullptr;
    constexpr size_t kFirst = kMerged ? 2 : 1;
    if (!tensors.Pack(heads, settings.prefix, scale, &in) ||
        (kMerged && !tensors.Sizes(1, in.batch, in.tokens, &in.sizes)) || !tensors.Input(kFirst, &shape, &proj_q) ||
        !tensors.Input(kFirst + 1, &other, &proj_k)) {
      return false;
    }
    if (shape.rank != 3 || other.rank != 3 || !std::equal(shape.axes, shape.axes + 3, other.axes) ||
        shape.axes[0] != static_cast<int64_t>(heads) || shape.axes[1] != static_cast<int64_t>(in.width) ||
        shape.axes[2] < 1) {
      return problem->Refuse("proj_q and proj_k must have shape [num_heads, d, c], got %s and %s", Text(shape).text,
                             Text(other).text);
    }
    if (settings.keys > in.tokens - settings.prefix) return problem->Refuse("keys exceed the patches");
    SelectSettings all = settings;
    all.channels = static_cast<size_t>(shape.axes[2]);
    int32_t* indices = nullptr;
    return tensors.Output({in.batch, heads, Tiles(in, all.prefix, all.tile), all.keys}, &indices) &&
           KeySelect(in, proj_q, proj_k, all, indices, parallel);
  }

  size_t heads;
  float scale;
  SelectSettings settings{};
};

struct MatchKernel {
  bool Read(const OrtKernelInfo* info, Problem* problem) {
    if (!WholeNumber(info, "num_heads", 1, &heads, problem) ||
        !WholeNumber(info, "num_prefix", 0, &settings.prefix, problem) ||
        !WholeNumber(info, "window", 2, &settings.window, problem) ||
        !WholeNumber(info, "merged", 1, &settings.merged, problem)) {
      return false;
    }
    return settings.window % 2 == 0 || problem->Refuse("window %zu is odd", settings.window);
  }

  bool Compute(const Tensors& tensors, Problem* problem, const Parallel& parallel) const {
    Packed in{};
    if (!tensors.Pack(heads, settings.prefix, 1.0f, &in) || !tensors.Sizes(1, in.batch, in.tokens, &in.sizes)) {
      return false;
    }
    if (settings.merged > (in.tokens - settings.prefix) / 2) {
      return problem->Refuse("merged %zu exceeds half of the %zu patches", settings.merged,
                             in.tokens - settings.prefix);
    }
    int32_t* pairs = nullptr;
    return tensors.Output({in.batch, in.tokens - settings.merged, 2}, &pairs) &&
           MatchTokens(in, settings, pairs, parallel);
  }

  size_t heads;
  MatchSettings settings{};
};

struct MergeKernel {
  bool Read(const OrtKernelInfo*, Problem*) { return true; }

  bool Compute(const Tensors& tensors, Problem* problem, const Parallel& parallel) const {
    Merging in{};
    Shape tokens, shape;
    if (!tensors.Input(0, &tokens, &in.x)) return false;
    if (tokens.rank != 3 || tokens.axes[1] < 1) {
      return problem->Refuse("x must have shape [B, N, C], got %s", Text(tokens).text);
    }
    in.batch = static_cast<size_t>(tokens.axes[0]);
    in.tokens = static_cast<size_t>(tokens.axes[1]);
    in.channels = static_cast<size_t>(tokens.axes[2]);
    if (!tensors.Sizes(1, in.batch, in.tokens, &in.sizes) || !tensors.Input(2, &shape, &in.pairs)) return false;
    if (shape.rank != 3 || shape.axes[0] != tokens.axes[0] || shape.axes[2] != 2) {
      return problem->Refuse("pairs must have shape [%zu, M, 2], got %s", in.batch, Text(shape).text);
    }
    in.count = static_cast<size_t>(shape.axes[1]);
    float* output = nullptr;
    return tensors.Output({in.batch, in.count, in.channels}, &output) && MergeTokens(in, output, parallel);
  }
};

template <typename Kernel>
struct Node : Allocated {
  explicit Node(const char* operator_name) : name(operator_name) { IdleMemory::AddKernel(); }
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;
  ~Node() { IdleMemory::RemoveKernel(); }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
    Problem problem;
    if (Run(context, &problem)) Reserve().Fill();
    return problem.Get(name);
  }

  bool Run(OrtKernelContext* context, Problem* problem) const {
    const Call call(context, problem);
    return kernel.Compute(Tensors(context, problem), problem, call) || problem->OutOfMemory();
  }

  Kernel kernel{};
  const char* name;
};

template <typename Kernel>
struct Operator : Ort::CustomOpBase<Operator<Kernel>, Node<Kernel>, /*WithStatus=*/true> {
  // last: the type of the last input; all others are floats.
  Operator(const char* operator_name, size_t input_count, ONNXTensorElementDataType last,
           ONNXTensorElementDataType output)
      : name(operator_name), inputs(input_count), last_type(last), output_type(output) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** made) const {
    Problem problem;
    auto* node = new (std::nothrow) Node<Kernel>(name);
    if (node == nullptr || !node->kernel.Read(info, &problem)) {
      problem.OutOfMemory();
      delete node;
      node = nullptr;
    }
    *made = node;
    return problem.Get(name);
  }
  const char* GetName() const { return name; }
  size_t GetInputTypeCount() const { return inputs; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index + 1 < inputs ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : last_type;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return output_type; }

  const char* name;
  size_t inputs;
  ONNXTensorElementDataType last_type, output_type;
};

// The operators, as sessions refer to them: for as long as the library is loaded. Made once, or again where it failed.
class Domain {
 public:
  Domain() = default;
  Domain(const Domain&) = delete;
  Domain& operator=(const Domain&) = delete;
  ~Domain() {
    if (OrtCustomOpDomain* domain = made_.exchange(nullptr)) Ort::GetApi().ReleaseCustomOpDomain(domain);
  }

  OrtCustomOpDomain* Get(Problem* problem) {
    const OrtApi& api = Ort::GetApi();
    if (OrtCustomOpDomain* made = made_.load()) return made;
    OrtCustomOpDomain* domain = nullptr;
    if (!problem->Check(api.CreateCustomOpDomain("sparsifiner", &domain)) || domain == nullptr) return nullptr;
    const OrtCustomOp* const operators[] = {&select_,        &sparse_,        &dense_, &score_, &merged_select_,
                                            &merged_sparse_, &merged_dense_, &match_, &merge_};
    for (const OrtCustomOp* each : operators) {
      if (problem->Check(api.CustomOpDomain_Add(domain, each))) continue;
      api.ReleaseCustomOpDomain(domain);
      return nullptr;
    }
    if (!StatusReserve::HasMemory()) {  // Some may be missing, for want of an error to say so.
      api.ReleaseCustomOpDomain(domain);
      return nullptr;
    }
    OrtCustomOpDomain* first = nullptr;
    if (made_.compare_exchange_strong(first, domain)) return domain;
    api.ReleaseCustomOpDomain(domain);
    return first;
  }

 private:
  static constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kInt = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  const Operator<SelectKernel<false>> select_{"KeySelect", 3, kFloat, kInt};
  const Operator<SparseKernel<false>> sparse_{"SparseAttention", 2, kInt, kFloat};
  const Operator<DenseKernel<false>> dense_{"DenseAttention", 1, kFloat, kFloat};
  const Operator<SelectKernel<true>> merged_select_{"MergedKeySelect", 4, kFloat, kInt};
  const Operator<SparseKernel<true>> merged_sparse_{"MergedSparseAttention", 3, kInt, kFloat};
  const Operator<DenseKernel<true>> merged_dense_{"MergedDenseAttention", 2, kFloat, kFloat};
  const Operator<MatchKernel> match_{"MatchTokens", 2, kFloat, kInt};
  const Operator<MergeKernel> merge_{"MergeTokens", 3, kInt, kFloat};
  const Operator<ScoreKernel> score_{"TokenScore", 1, kFloat, kFloat};
  std::atomic<OrtCustomOpDomain*> made_{nullptr};
};

}  // namespace
}  // namespace sparsifiner

#if defined(_WIN32)
#define SPARSIFINER_EXPORT __declspec(dllexport)
#else
#define SPARSIFINER_EXPORT __attribute__((visibility("default")))
#endif

extern "C" SPARSIFINER_EXPORT const char* sparsifiner_target() { return sparsifiner::TargetName(); }

extern "C" SPARSIFINER_EXPORT int sparsifiner_limit_target(const char* name) { return sparsifiner::LimitTarget(name); }

extern "C" SPARSIFINER_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                           const OrtApiBase* base) noexcept {
  using namespace sparsifiner;
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    char message[200];
    std::snprintf(message, sizeof(message), "the sparsifiner library needs ONNX Runtime 1.%d or newer, this is %s",
                  ORT_API_VERSION, base->GetVersionString());
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message);
  }
  Ort::InitApi(api);
  // Without errors in reserve nothing is registered. If there is not even one to say so, the session knows no operator
  // of this library: it runs the function bodies in the file, or refuses the file.
  if (!Reserve().Fill()) return Reserve().Find();
  static Domain domain;
  Problem problem;
  OrtCustomOpDomain* made = domain.Get(&problem);
  if (made == nullptr || !problem.Check(api->AddCustomOpDomain(options, made))) problem.OutOfMemory();
  return problem.Find("library");
}
