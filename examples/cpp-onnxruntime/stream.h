// Streaming inference for a fixed camera: each frame recomputes a fraction of the patches, mainly those that changed
// most, and also those that were not recomputed for the longest time.
#pragma once

#include "model.h"

class Stream {
 public:
  // embedding, step: model files of the stream. share: fraction of the patches to recompute in every frame; 1: all.
  Stream(Model& embedding, Model& step, double share);

  // Returns the model's outputs for the next frame, `image`.
  Outputs next(const View& image);

 private:
  // State that is kept from frame to frame: an input of `step` that is updated from one of its outputs.
  struct Kept {
    std::vector<char> data;  // [tokens, row bytes]
    std::vector<int64_t> shape;
    ONNXTensorElementDataType type;
    size_t row;      // Bytes per token.
    size_t skipped;  // Bytes before them in a token's new values (its queries), which are not kept.
    bool cached;     // True: only recomputed tokens are updated. False: all tokens are replaced.
  };

  // Returns the patches to recompute, in ascending order.
  std::vector<int64_t> choose(const std::vector<float>& change) const;
  // Computes the given patches. change: change of each patch since it was last computed; empty for a full frame, which
  // computes all patches and ignores the kept state.
  Outputs step(const View& image, const float* tokens, const std::vector<int64_t>& patches, const std::vector<float>& change);

  Model& embedding_;
  Model& step_;
  double share_;
  int64_t tokens_, patches_, width_;
  bool begun_ = false;
  std::vector<float> references_;  // [patches, width]: embedding of each patch when it was last computed.
  std::vector<int64_t> ages_;      // [patches]: number of frames since then.
  std::map<std::string, Kept> kept_;
};
