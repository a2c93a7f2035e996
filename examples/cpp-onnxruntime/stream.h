// A camera that stands still: of each frame a share of the patches is computed, those that changed most, and the oldest.
#pragma once

#include "model.h"

class Stream {
 public:
  // share: of the patches, computed of each frame; 1: all.
  Stream(Model& embedding, Model& step, double share);

  // The model's outputs for the next frame; `image` is its input.
  Outputs next(const View& image);

 private:
  struct Kept {
    std::vector<char> data;  // [tokens, row bytes]
    std::vector<int64_t> shape;
    ONNXTensorElementDataType type;
    size_t row, skipped;  // Bytes of a token; of what comes before in a token's new values, its queries.
    bool cached;          // Tokens are kept one by one; else the whole is.
  };

  std::vector<int64_t> choose(const std::vector<float>& change) const;
  // change: of each patch, from what it was; empty: all are computed, and what was kept counts no more.
  Outputs step(const View& image, const float* tokens, const std::vector<int64_t>& patches, const std::vector<float>& change);

  Model& embedding_;
  Model& step_;
  double share_;
  int64_t tokens_, patches_, width_;
  bool begun_ = false;
  std::vector<float> references_;  // [patches, width]: of each patch, what it was when it was computed.
  std::vector<int64_t> ages_;      // [patches]: frames since then.
  std::map<std::string, Kept> kept_;
};
