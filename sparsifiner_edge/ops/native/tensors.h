// What an operator reads and writes: attributes, and the tensors of a call, refused where the schema refuses them.
//
// ONNX Runtime's C functions are called directly: their C++ wrappers throw.

#ifndef SPARSIFINER_TENSORS_H_
#define SPARSIFINER_TENSORS_H_

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>

#include "errors.h"
#include "kernels.h"
#include "scratch.h"

namespace sparsifiner {

inline constexpr int64_t kMost = int64_t{1} << 31;  // no size of a tensor or attribute reaches this

struct Shape {
  static constexpr size_t kAxes = 8;
  size_t rank = 0;
  int64_t axes[kAxes] = {};
};

struct Text {
  explicit Text(const Shape& shape) {
    size_t end = static_cast<size_t>(std::snprintf(text, sizeof(text), "["));
    for (size_t i = 0; i < std::min(shape.rank, Shape::kAxes); ++i) {
      end += static_cast<size_t>(
          std::snprintf(text + end, sizeof(text) - end, "%s%" PRId64, i ? ", " : "", shape.axes[i]));
    }
    std::snprintf(text + end, sizeof(text) - end, shape.rank > Shape::kAxes ? ", ...]" : "]");
  }
  char text[24 * Shape::kAxes];
};

inline bool WholeNumber(const OrtKernelInfo* info, const char* name, int64_t least, size_t* number, Problem* problem) {
  int64_t value = 0;
  if (!problem->Check(Ort::GetApi().KernelInfoGetAttribute_int64(info, name, &value))) return false;
  *number = static_cast<size_t>(value);
  return (value >= least && value < kMost) || problem->Refuse("%s is %" PRId64, name, value);
}

inline bool Number(const OrtKernelInfo* info, const char* name, float* number, Problem* problem) {
  if (!problem->Check(Ort::GetApi().KernelInfoGetAttribute_float(info, name, number))) return false;
  return (std::isfinite(*number) && *number >= 0) || problem->Refuse("%s is %f", name, static_cast<double>(*number));
}

// A call's inputs and outputs.
class Tensors {
 public:
  Tensors(OrtKernelContext* context, Problem* problem) : context_(context), problem_(problem) {}

  template <typename T>
  bool Input(size_t index, Shape* shape, const T** elements) const {
    const OrtApi& api = Ort::GetApi();
    const OrtValue* value = nullptr;
    void* data = nullptr;
    if (!problem_->Check(api.KernelContext_GetInput(context_, index, &value))) return false;
    if (value == nullptr) return problem_->Refuse("input %zu is missing", index);
    if (!problem_->Check(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data))) return false;
    *elements = static_cast<const T*>(data);
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (!problem_->Check(api.GetTensorTypeAndShape(value, &info))) return false;
    if (info == nullptr) return problem_->OutOfMemory();
    const bool known = problem_->Check(api.GetDimensionsCount(info, &shape->rank)) &&
                       problem_->Check(api.GetDimensions(info, shape->axes, std::min(shape->rank, Shape::kAxes)));
    api.ReleaseTensorTypeAndShapeInfo(info);
    return known;
  }

  template <typename T, size_t kRank>
  bool Output(const size_t (&sizes)[kRank], T** elements) const {
    const OrtApi& api = Ort::GetApi();
    int64_t axes[kRank];
    size_t bytes = sizeof(T);
    for (size_t i = 0; i < kRank; ++i) {
      axes[i] = static_cast<int64_t>(sizes[i]);
      bytes = Times(bytes, sizes[i]);
    }
    if (bytes > PTRDIFF_MAX) return problem_->OutOfMemory();
    OrtValue* value = nullptr;
    void* data = nullptr;
    if (!problem_->Check(api.KernelContext_GetOutput(context_, 0, axes, kRank, &value))) return false;
    if (value == nullptr) return problem_->OutOfMemory();
    if (!problem_->Check(api.GetTensorMutableData(value, &data))) return false;
    if (data == nullptr && bytes != 0) return problem_->OutOfMemory();
    *elements = static_cast<T*>(data);
    return true;
  }

  bool Pack(size_t heads, size_t prefix, float scale, Packed* in) const {
    Shape shape;
    const float* qkv = nullptr;
    if (!Input(0, &shape, &qkv)) return false;
    const int64_t* axes = shape.axes;
    if (shape.rank != 3 || axes[2] <= 0 || axes[2] % static_cast<int64_t>(3 * heads) != 0) {
      return problem_->Refuse("qkv must have shape [B, N, 3 * num_heads * d], got %s", Text(shape).text);
    }
    if (axes[1] <= static_cast<int64_t>(prefix)) {
      return problem_->Refuse("qkv of shape %s leaves no patch after %zu prefix tokens", Text(shape).text, prefix);
    }
    *in = {qkv, static_cast<size_t>(axes[0]), static_cast<size_t>(axes[1]), heads,
           static_cast<size_t>(axes[2]) / (3 * heads), scale};
    if (axes[1] >= kMost || Times(in->tokens, static_cast<size_t>(axes[2])) > UINT32_MAX) {
      return problem_->Refuse("qkv of shape %s is too large for 32-bit places", Text(shape).text);
    }
    return true;
  }

  // The input `sizes` of merged tokens.
  bool Sizes(size_t index, size_t batch, size_t tokens, const float** sizes) const {
    Shape shape;
    if (!Input(index, &shape, sizes)) return false;
    const bool fits = shape.rank == 2 && shape.axes[0] == static_cast<int64_t>(batch) &&
                      shape.axes[1] == static_cast<int64_t>(tokens);
    return fits || problem_->Refuse("sizes must have shape [%zu, %zu], got %s", batch, tokens, Text(shape).text);
  }

 private:
  OrtKernelContext* context_;
  Problem* problem_;
};

}  // namespace sparsifiner

#endif  // SPARSIFINER_TENSORS_H_
