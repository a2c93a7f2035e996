// Attributes, tensors and errors of operators in ONNX Runtime.
//
// ONNX Runtime's C functions are called directly, because their C++ wrappers throw.

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

// First error of a call, if any. The message is formatted when the error occurs, without allocating memory.
class Problem {
 public:
  // Refuse and OutOfMemory record an error and return false, for the caller to return. Only the first error is kept.
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

  // Returns true if a status of ONNX Runtime means success; otherwise records its error. Releases the status.
  bool Check(OrtStatus* status) noexcept {
    if (status == nullptr) return true;
    if (code_ == ORT_OK) {
      std::snprintf(text_, sizeof(text_), "%s", Ort::GetApi().GetErrorMessage(status));
      code_ = Ort::GetApi().GetErrorCode(status);
    }
    Ort::GetApi().ReleaseStatus(status);
    return false;
  }

  // Returns the error as a status of ONNX Runtime: null if there is none, or no memory for the status.
  OrtStatus* Status(const char* operator_name) const noexcept {
    if (code_ == ORT_OK) return nullptr;
    char all[sizeof(text_) + 64];
    std::snprintf(all, sizeof(all), "sparsifiner::%s: %s", operator_name, text_);
    return Ort::GetApi().CreateStatus(code_, all);
  }

  // Like Status, but throws std::bad_alloc if there is no memory for the status: null means success, so the error would
  // be ignored. ONNX Runtime handles exceptions where it creates and runs kernels.
  OrtStatus* StatusOrThrow(const char* operator_name) const {
    OrtStatus* status = Status(operator_name);
    if (status == nullptr && code_ != ORT_OK) throw std::bad_alloc();
    return status;
  }

 private:
  OrtErrorCode code_ = ORT_OK;
  char text_[512];
};

// Reads the attributes of a node.
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

// Inputs and outputs of a call.
class Tensors : public Packing<Tensors> {
 public:
  Tensors(OrtKernelContext* context, Problem* problem) : context_(context), problem_(problem) {}

  Problem* problem() const { return problem_; }

  // Reads an input. Tensor: sparsifiner_floats, sparsifiner_ints or sparsifiner_rows, according to its type.
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

  // Returns true if an input is float16.
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

  // Allocates the output, whose elements have four bytes.
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
    // An empty output has no data, but for the C interface null means a dry run.
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
