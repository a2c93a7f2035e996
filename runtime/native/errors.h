// How a call fails: with an error for ONNX Runtime.

#ifndef SPARSIFINER_ERRORS_H_
#define SPARSIFINER_ERRORS_H_

#include <onnxruntime_cxx_api.h>

#include <cstdarg>
#include <cstdio>
#include <new>

namespace sparsifiner {

// What went wrong, if anything did. The text is made where it is found, and only then.
class Problem {
 public:
  // All of these return whether things are well, for the caller to return in turn. The first of several is told.
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
  OrtStatus* Find(const char* operator_name) const noexcept {
    if (code_ == ORT_OK) return nullptr;
    char all[sizeof(text_) + 64];
    std::snprintf(all, sizeof(all), "sparsifiner::%s: %s", operator_name, text_);
    return Ort::GetApi().CreateStatus(code_, all);
  }

  // The same, but throws std::bad_alloc where there is no memory for an error: null is success to ONNX Runtime, and a
  // problem that is not told would count as an answer. It expects exceptions where it creates and runs kernels.
  OrtStatus* Get(const char* operator_name) const {
    OrtStatus* status = Find(operator_name);
    if (status == nullptr && code_ != ORT_OK) throw std::bad_alloc();
    return status;
  }

 private:
  OrtErrorCode code_ = ORT_OK;
  char text_[512];
};

}  // namespace sparsifiner

#endif  // SPARSIFINER_ERRORS_H_
