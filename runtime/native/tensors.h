// What ONNX Runtime hands to an operator: attributes, and the tensors of a call, refused where their shapes do not fit;
// and how a call fails, with an error for ONNX Runtime.
//
// ONNX Runtime's C functions are called directly: their C++ wrappers throw.

#ifndef SPARSIFINER_TENSORS_H_
#define SPARSIFINER_TENSORS_H_

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <new>

#include "operators.h"
#include "sparsifiner.h"

namespace sparsifiner {

// What went wrong, if anything did. The text is made where it is found, and only then.
class Problem {
 public:
  // All of these return whether all is well, for the caller to return in turn. The first problem is reported.
  [[gnu::format(printf, 2, 3)]] bool Refuse(const char* format, ...) noexcept {
    if (code_ != ORT_OK) return false;
    code_ = ORT_INVALID_ARGUMENT;
    va_list values;
    va_start(values, format);
    std::vsnprintf(text_, sizeof(text_), format, values);
    va_end(values);
    return false;
  }

  bool OutOfMemory() noexcept {
    if (code_ != ORT_OK) return false;
    code_ = ORT_RUNTIME_EXCEPTION;
    std::snprintf(text_, sizeof(text_), "out of memory");
    return false;
  }

  // Takes over an answer of ONNX Runtime's.
  bool Check(OrtStatus* status) noexcept {
    if (status == nullptr) return true;
    if (code_ == ORT_OK) {
      std::snprintf(text_, sizeof(text_), "%s", Ort::GetApi().GetErrorMessage(status));
      code_ = Ort::GetApi().GetErrorCode(status);
    }
    Ort::GetApi().ReleaseStatus(status);
    return false;
  }

  // The error for ONNX Runtime; null if there is no problem, or no memory to say so.
  OrtStatus* Status(const char* operator_name) const noexcept {
    if (code_ == ORT_OK) return nullptr;
    char all[sizeof(text_) + 64];
    std::snprintf(all, sizeof(all), "sparsifiner::%s: %s", operator_name, text_);
    return Ort::GetApi().CreateStatus(code_, all);
  }

  // As `Status`, but throws std::bad_alloc where there is no memory for an error: null is success to ONNX Runtime, and a
  // problem that is not reported would count as success. It expects exceptions where it creates and runs kernels.
  OrtStatus* StatusOrThrow(const char* operator_name) const {
    OrtStatus* status = Status(operator_name);
    if (status == nullptr && code_ != ORT_OK) throw std::bad_alloc();
    return status;
  }

 private:
  OrtErrorCode code_ = ORT_OK;
  char text_[512];
};

// Attributes of a node.
class Attributes {
 public:
  Attributes(const OrtKernelInfo* info, Problem* problem) : info_(info), problem_(problem) {}

  bool Whole(const char* name, int64_t least, int64_t* number) const {
    return problem_->Check(Ort::GetApi().KernelInfoGetAttribute_int64(info_, name, number)) &&
           ((*number >= least && *number < kMost) || problem_->Refuse("%s is %" PRId64, name, *number));
  }

  bool Number(const char* name, float* number) const {
    return problem_->Check(Ort::GetApi().KernelInfoGetAttribute_float(info_, name, number)) &&
           ((std::isfinite(*number) && *number >= 0) ||
            problem_->Refuse("%s is %f", name, static_cast<double>(*number)));
  }

 private:
  const OrtKernelInfo* info_;
  Problem* problem_;
};

// A call's inputs and outputs.
class Tensors : public Packing<Tensors> {
 public:
  Tensors(OrtKernelContext* context, Problem* problem) : context_(context), problem_(problem) {}

  Problem* problem() const { return problem_; }

  // Tensor: sparsifiner_floats or sparsifiner_ints, whatever the input is.
  template <typename Tensor>
  bool Input(size_t index, Shape* shape, Tensor* tensor) const {
    const OrtApi& api = Ort::GetApi();
    const OrtValue* value = nullptr;
    void* data = nullptr;
    if (!problem_->Check(api.KernelContext_GetInput(context_, index, &value))) return false;
    if (value == nullptr) return problem_->Refuse("input %zu is missing", index);
    if (!problem_->Check(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data))) return false;
    tensor->data = static_cast<decltype(tensor->data)>(data);
    OrtTensorTypeAndShapeInfo* info = nullptr;
    if (!problem_->Check(api.GetTensorTypeAndShape(value, &info))) return false;
    if (info == nullptr) return problem_->OutOfMemory();
    const bool known = problem_->Check(api.GetDimensionsCount(info, &shape->rank)) &&
                       problem_->Check(api.GetDimensions(info, shape->axes, std::min(shape->rank, Shape::kAxes)));
    size_t all = 0;
    const bool counted = known && problem_->Check(api.GetTensorShapeElementCount(info, &all));
    tensor->count = static_cast<int64_t>(all);
    api.ReleaseTensorTypeAndShapeInfo(info);
    return counted;
  }

  // Whether an input is of float16.
  bool IsHalf(size_t index) const {
    const OrtApi& api = Ort::GetApi();
    const OrtValue* value = nullptr;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    if (!problem_->Check(api.KernelContext_GetInput(context_, index, &value)) || value == nullptr) return false;
    if (!problem_->Check(api.GetTensorTypeAndShape(value, &info)) || info == nullptr) return false;
    problem_->Check(api.GetTensorElementType(info, &type));
    api.ReleaseTensorTypeAndShapeInfo(info);
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  }

  // Of elements of four bytes.
  template <size_t kRank>
  bool Output(const int64_t (&axes)[kRank], sparsifiner_output* output) const {
    const OrtApi& api = Ort::GetApi();
    size_t bytes = 4;
    for (int64_t axis : axes) {
      if (__builtin_mul_overflow(bytes, static_cast<size_t>(axis), &bytes)) return problem_->OutOfMemory();
    }
    if (bytes > PTRDIFF_MAX) return problem_->OutOfMemory();
    OrtValue* value = nullptr;
    void* data = nullptr;
    if (!problem_->Check(api.KernelContext_GetOutput(context_, 0, axes, kRank, &value))) return false;
    if (value == nullptr) return problem_->OutOfMemory();
    if (!problem_->Check(api.GetTensorMutableData(value, &data))) return false;
    if (data == nullptr && bytes != 0) return problem_->OutOfMemory();
    // Nothing to write, but to the interface null asks whether it would.
    static float nothing;
    output->data = data == nullptr ? &nothing : data;
    output->count = static_cast<int64_t>(bytes / 4);
    return true;
  }

 private:
  OrtKernelContext* context_;
  Problem* problem_;
};

}  // namespace sparsifiner

#endif  // SPARSIFINER_TENSORS_H_
