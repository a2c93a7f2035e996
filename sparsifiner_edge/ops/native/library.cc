// The custom-op library that ONNX Runtime loads: reads attributes and shapes, refuses what the schema refuses, calls the
// kernels on the session's own threads.

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace sparsifiner {
namespace {

// Enough pieces for uneven cores, few enough to cost nothing.
constexpr size_t kPieces = 64;

class SessionThreads final : public Parallel {
 public:
  explicit SessionThreads(OrtKernelContext* context) : context_(context) {}
  void For(size_t count, void (*fn)(void*, size_t), void* data) const override {
    Ort::KernelContext(context_).ParallelFor(fn, count, std::min(count, kPieces), data);
  }

 private:
  OrtKernelContext* context_;
};

void Require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

std::string Text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

size_t WholeNumber(const Ort::ConstKernelInfo& info, const char* name, int64_t least) {
  const auto value = info.GetAttribute<int64_t>(name);
  Require(value >= least && value < (int64_t{1} << 31), std::string(name) + " is " + std::to_string(value));
  return static_cast<size_t>(value);
}

float Number(const Ort::ConstKernelInfo& info, const char* name) {
  const auto value = info.GetAttribute<float>(name);
  Require(std::isfinite(value) && value >= 0, std::string(name) + " is " + std::to_string(value));
  return value;
}

std::vector<int64_t> Shape(const Ort::ConstValue& value) { return value.GetTensorTypeAndShapeInfo().GetShape(); }

Packed Pack(const Ort::ConstValue& qkv, size_t heads, size_t prefix, float scale) {
  const auto shape = Shape(qkv);
  Require(shape.size() == 3 && shape[2] > 0 && shape[2] % static_cast<int64_t>(3 * heads) == 0,
          "qkv must have shape [B, N, 3 * num_heads * d], got " + Text(shape));
  Require(shape[1] > static_cast<int64_t>(prefix), "qkv of shape " + Text(shape) + " leaves no patch after " +
                                                       std::to_string(prefix) + " prefix tokens");
  Require(shape[1] * shape[2] < (int64_t{1} << 32), "qkv of shape " + Text(shape) + " is too large for 32-bit places");
  return {qkv.GetTensorData<float>(),        static_cast<size_t>(shape[0]), static_cast<size_t>(shape[1]), heads,
          static_cast<size_t>(shape[2]) / (3 * heads), scale};
}

float* Output(const Ort::KernelContext& context, const Packed& in) {
  return context
      .GetOutput(0, {static_cast<int64_t>(in.batch), static_cast<int64_t>(in.tokens),
                     static_cast<int64_t>(in.heads * in.width)})
      .GetTensorMutableData<float>();
}

size_t Tiles(const Packed& in, size_t prefix, size_t tile) { return (in.tokens - prefix + tile - 1) / tile; }

// A kernel reads its attributes once; Compute may run on several threads at a time.
struct DenseKernel {
  explicit DenseKernel(const Ort::ConstKernelInfo& info)
      : heads(WholeNumber(info, "num_heads", 1)), scale(Number(info, "scale")) {}

  void Compute(const Ort::KernelContext& context, const Parallel& parallel) const {
    const Packed in = Pack(context.GetInput(0), heads, 0, scale);
    DenseAttention(in, Output(context, in), parallel);
  }

  size_t heads;
  float scale;
};

struct ScoreKernel {
  explicit ScoreKernel(const Ort::ConstKernelInfo& info)
      : heads(WholeNumber(info, "num_heads", 1)), scale(Number(info, "scale")) {}

  void Compute(const Ort::KernelContext& context, const Parallel& parallel) const {
    const Packed in = Pack(context.GetInput(0), heads, 0, scale);
    float* output = context.GetOutput(0, {static_cast<int64_t>(in.batch), static_cast<int64_t>(in.tokens)})
                        .GetTensorMutableData<float>();
    TokenScore(in, output, parallel);
  }

  size_t heads;
  float scale;
};

struct SparseKernel {
  explicit SparseKernel(const Ort::ConstKernelInfo& info)
      : heads(WholeNumber(info, "num_heads", 1)), scale(Number(info, "scale")) {
    settings.prefix = WholeNumber(info, "num_prefix", 0);
    settings.tile = WholeNumber(info, "tile", 1);
    settings.cell = WholeNumber(info, "cell", 0);
    settings.prefix_keys = WholeNumber(info, "prefix_keys", 0);
    Require(settings.prefix_keys <= 1, "prefix_keys must be 0 or 1");
    Require(settings.prefix_keys == 1 || (settings.tile == 1 && settings.cell == 0),
            "prefix_keys 0 goes with tile 1 and cell 0");
    if (settings.prefix_keys == 1) settings.prefix_keys = settings.prefix;
  }

  void Compute(const Ort::KernelContext& context, const Parallel& parallel) const {
    const Packed in = Pack(context.GetInput(0), heads, settings.prefix, scale);
    const Ort::ConstValue indices = context.GetInput(1);
    const auto shape = Shape(indices);
    const std::vector<int64_t> expected = {static_cast<int64_t>(in.batch), static_cast<int64_t>(heads),
                                           static_cast<int64_t>(Tiles(in, settings.prefix, settings.tile))};
    Require(shape.size() == 4 && std::equal(expected.begin(), expected.end(), shape.begin()) && shape[3] >= 1 &&
                shape[3] <= static_cast<int64_t>(in.tokens - settings.prefix_keys),
            "indices must have shape " + Text(expected) + " and K, got " + Text(shape));
    SparseSettings all = settings;
    all.keys = static_cast<size_t>(shape[3]);
    Require(all.cell == 0 || (in.tokens - all.prefix + all.cell - 1) / all.cell < 65536, "more than 65535 cells");
    SparseAttention(in, indices.GetTensorData<int32_t>(), all, Output(context, in), parallel);
  }

  size_t heads;
  float scale;
  SparseSettings settings{};
};

struct SelectKernel {
  explicit SelectKernel(const Ort::ConstKernelInfo& info)
      : heads(WholeNumber(info, "num_heads", 1)), scale(Number(info, "scale")) {
    settings.prefix = WholeNumber(info, "num_prefix", 0);
    settings.probe = WholeNumber(info, "probe", 1);
    settings.tile = WholeNumber(info, "tile", 1);
    settings.cell = WholeNumber(info, "cell", 0);
    settings.keys = WholeNumber(info, "keys", 1);
    settings.value_power = Number(info, "value_power");
    Require(settings.tile % settings.probe == 0, "tile is not a multiple of probe");
  }

  void Compute(const Ort::KernelContext& context, const Parallel& parallel) const {
    const Packed in = Pack(context.GetInput(0), heads, settings.prefix, scale);
    const Ort::ConstValue proj_q = context.GetInput(1), proj_k = context.GetInput(2);
    const auto shape = Shape(proj_q);
    Require(shape.size() == 3 && shape == Shape(proj_k) && shape[0] == static_cast<int64_t>(heads) &&
                shape[1] == static_cast<int64_t>(in.width) && shape[2] >= 1,
            "proj_q and proj_k must have shape [num_heads, d, c], got " + Text(shape) + " and " + Text(Shape(proj_k)));
    Require(settings.keys <= in.tokens - settings.prefix, "keys exceed the patches");
    SelectSettings all = settings;
    all.channels = static_cast<size_t>(shape[2]);
    const size_t tiles = Tiles(in, all.prefix, all.tile);
    int32_t* indices = context
                           .GetOutput(0, {static_cast<int64_t>(in.batch), static_cast<int64_t>(heads),
                                          static_cast<int64_t>(tiles), static_cast<int64_t>(all.keys)})
                           .GetTensorMutableData<int32_t>();
    KeySelect(in, proj_q.GetTensorData<float>(), proj_k.GetTensorData<float>(), all, indices, parallel);
  }

  size_t heads;
  float scale;
  SelectSettings settings{};
};

// No exception may reach ONNX Runtime's C interface.
template <typename Fn>
OrtStatusPtr Guarded(const char* name, const Fn& fn) noexcept {
  try {
    fn();
    return nullptr;
  } catch (const std::exception& error) {
    const std::string message = std::string("sparsifiner::") + name + ": " + error.what();
    return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
  }
}

template <typename Kernel>
struct Guard {
  Kernel kernel;
  const char* name;

  OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
    return Guarded(name, [&] { kernel.Compute(Ort::KernelContext(context), SessionThreads(context)); });
  }
};

template <typename Kernel>
struct Operator : Ort::CustomOpBase<Operator<Kernel>, Guard<Kernel>, /*WithStatus=*/true> {
  Operator(const char* operator_name, size_t input_count, ONNXTensorElementDataType second,
           ONNXTensorElementDataType output)
      : name(operator_name), inputs(input_count), second_type(second), output_type(output) {}

  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return Guarded(name, [&] { *kernel = new Guard<Kernel>{Kernel(Ort::ConstKernelInfo(info)), name}; });
  }
  const char* GetName() const { return name; }
  size_t GetInputTypeCount() const { return inputs; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : second_type;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return output_type; }

  const char* name;
  size_t inputs;
  ONNXTensorElementDataType second_type, output_type;
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

extern "C" SPARSIFINER_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace sparsifiner;
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    const std::string message = "the sparsifiner library needs ONNX Runtime 1." + std::to_string(ORT_API_VERSION) +
                                " or newer, this is " + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
  }
  Ort::InitApi(api);
  constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, kInt = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  static const Operator<SelectKernel> select("KeySelect", 3, kFloat, kInt);
  static const Operator<SparseKernel> sparse("SparseAttention", 2, kInt, kFloat);
  static const Operator<DenseKernel> dense("DenseAttention", 1, kFloat, kFloat);
  static const Operator<ScoreKernel> score("TokenScore", 1, kFloat, kFloat);
  // The session refers to the domain as long as it lives; the operators never change.
  static Ort::CustomOpDomain domain("sparsifiner");
  static const bool filled = [] {
    domain.Add(&select);
    domain.Add(&sparse);
    domain.Add(&dense);
    domain.Add(&score);
    return true;
  }();
  static_cast<void>(filled);
  return Guarded("library", [&] { Ort::UnownedSessionOptions(options).Add(domain); });
}
