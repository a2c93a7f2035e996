// How a call fails: with an error for ONNX Runtime, not with an exception, for which there may be no memory either.

#ifndef SPARSIFINER_ERRORS_H_
#define SPARSIFINER_ERRORS_H_

#include <onnxruntime_cxx_api.h>

#include <atomic>
#include <cstdarg>
#include <cstddef>
#include <cstdio>
#include <new>

namespace sparsifiner {

// Errors made ahead. ONNX Runtime needs memory for each new one, and where it has none hands out null: which is success
// to it.
class StatusReserve {
 public:
  StatusReserve() = default;
  StatusReserve(const StatusReserve&) = delete;
  StatusReserve& operator=(const StatusReserve&) = delete;
  ~StatusReserve() {
    for (auto& kept : kept_) {
      if (OrtStatus* status = kept.exchange(nullptr)) Ort::GetApi().ReleaseStatus(status);
    }
  }

  // Makes those that are missing. False: there is no memory for all of them.
  bool Fill() noexcept {
    if (missing_.load(std::memory_order_relaxed) == 0) return true;
    for (auto& kept : kept_) {
      if (kept.load(std::memory_order_relaxed) != nullptr) continue;
      OrtStatus* status = Make();
      if (status == nullptr) return false;
      OrtStatus* none = nullptr;
      if (kept.compare_exchange_strong(none, status)) {
        --missing_;
      } else {
        Ort::GetApi().ReleaseStatus(status);
      }
    }
    return true;
  }

  // Whether there is memory for one more: ONNX Runtime's success means it only where there is.
  static bool HasMemory() noexcept {
    OrtStatus* status = Make();
    if (status != nullptr) Ort::GetApi().ReleaseStatus(status);
    return status != nullptr;
  }

  // One of them, or null.
  OrtStatus* Find() noexcept {
    for (auto& kept : kept_) {
      if (OrtStatus* status = kept.exchange(nullptr)) {
        ++missing_;
        return status;
      }
    }
    return nullptr;
  }

 private:
  static OrtStatus* Make() { return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, "sparsifiner: out of memory"); }

  static constexpr size_t kSize = 64;
  std::atomic<OrtStatus*> kept_[kSize] = {};
  std::atomic<size_t> missing_{kSize};
};

inline StatusReserve& Reserve() {
  static StatusReserve reserve;
  return reserve;
}

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

  // The error for ONNX Runtime: null if there is no problem, or no memory for an error and none left in reserve.
  OrtStatus* Find(const char* operator_name) const noexcept {
    if (code_ == ORT_OK) return nullptr;
    char all[sizeof(text_) + 64];
    std::snprintf(all, sizeof(all), "sparsifiner::%s: %s", operator_name, text_);
    OrtStatus* status = Ort::GetApi().CreateStatus(code_, all);
    return status != nullptr ? status : Reserve().Find();
  }

  // The same, but throws std::bad_alloc where an error cannot be had, after dozens of failures in a row: a problem that
  // is not told would count as an answer. ONNX Runtime expects exceptions where it creates and runs kernels.
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
