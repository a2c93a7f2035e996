// One ONNX file, by names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

// A tensor that something else owns. Inputs of a call; an output has its own memory.
struct View {
  void* data;
  size_t bytes;
  std::vector<int64_t> shape;
  ONNXTensorElementDataType type;
};

template <typename T>
View view(std::vector<T>& elements, std::vector<int64_t> shape) {
  return {elements.data(), elements.size() * sizeof(T), std::move(shape), Ort::TypeToTensorType<T>::type};
}

using Inputs = std::map<std::string, View>;
using Outputs = std::map<std::string, Ort::Value>;

// What a file says of an input or output: -1 is any size.
struct Spec {
  std::vector<int64_t> shape;
  ONNXTensorElementDataType type;
};

class Model {
 public:
  Model(const Ort::Env& env, const Ort::SessionOptions& options, const std::string& file);

  // Takes of the inputs those that the file has. Throws Ort::Exception, and std::runtime_error where one lacks.
  Outputs run(const Inputs& inputs);

  // Of a name. Throws std::runtime_error where the file has none.
  const Spec& input(const std::string& name) const;

  std::map<std::string, Spec> inputs, outputs;

 private:
  std::string file_;
  Ort::Session session_;
  std::vector<const char*> input_names_, output_names_;  // Of the keys above, in their order.
};
