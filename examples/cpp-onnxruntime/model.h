// ONNX model whose inputs and outputs are accessed by name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

// Tensor that is owned by the caller. Inputs are views; an output (Ort::Value) owns its memory.
struct View {
  void* data;
  size_t bytes;
  std::vector<int64_t> shape;
  ONNXTensorElementDataType type;
};

// Returns a view of a vector. The vector must outlive it.
template <typename T>
View view(std::vector<T>& elements, std::vector<int64_t> shape) {
  return {elements.data(), elements.size() * sizeof(T), std::move(shape), Ort::TypeToTensorType<T>::type};
}

using Inputs = std::map<std::string, View>;
using Outputs = std::map<std::string, Ort::Value>;

// Shape and type of an input or output in the file. An axis of any size is -1.
struct Spec {
  std::vector<int64_t> shape;
  ONNXTensorElementDataType type;
};

class Model {
 public:
  Model(const Ort::Env& env, const Ort::SessionOptions& options, const std::string& file);

  // Runs the model. Inputs that the file does not have are ignored. Throws Ort::Exception, or std::runtime_error if an
  // input is missing.
  Outputs run(const Inputs& inputs);

  // Returns the shape and type of an input. Throws std::runtime_error if the file has no input of this name.
  const Spec& input(const std::string& name) const;

  std::map<std::string, Spec> inputs, outputs;

 private:
  std::string file_;
  Ort::Session session_;
  std::vector<const char*> input_names_, output_names_;  // Keys of `inputs` and `outputs`, in the same order.
};
