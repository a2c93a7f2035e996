#include "model.h"

#include <functional>
#include <stdexcept>
#include <utility>

namespace {

// Returns the shape and type of `count` inputs or outputs by name.
std::map<std::string, Spec> specs(size_t count, const std::function<std::string(size_t)>& name,
                                  const std::function<Ort::TypeInfo(size_t)>& type) {
  std::map<std::string, Spec> result;
  for (size_t i = 0; i < count; ++i) {
    const Ort::TypeInfo info = type(i);
    const auto tensor = info.GetTensorTypeAndShapeInfo();
    result[name(i)] = {tensor.GetShape(), tensor.GetElementType()};
  }
  return result;
}

std::vector<const char*> names(const std::map<std::string, Spec>& specs) {
  std::vector<const char*> result;
  for (const auto& [name, spec] : specs) result.push_back(name.c_str());
  return result;
}

}  // namespace

Model::Model(const Ort::Env& env, const Ort::SessionOptions& options, const std::string& file)
    : file_(file), session_(env, file.c_str(), options) {
  Ort::AllocatorWithDefaultOptions memory;
  inputs = specs(
      session_.GetInputCount(), [&](size_t i) { return std::string(session_.GetInputNameAllocated(i, memory).get()); },
      [&](size_t i) { return session_.GetInputTypeInfo(i); });
  outputs = specs(
      session_.GetOutputCount(),
      [&](size_t i) { return std::string(session_.GetOutputNameAllocated(i, memory).get()); },
      [&](size_t i) { return session_.GetOutputTypeInfo(i); });
  input_names_ = names(inputs);
  output_names_ = names(outputs);
}

Outputs Model::run(const Inputs& given) {
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<Ort::Value> values;
  for (const auto& [name, spec] : inputs) {
    const auto found = given.find(name);
    if (found == given.end()) {
      throw std::runtime_error(file_ + " requires an input " + name + ", which this client does not supply");
    }
    const View& from = found->second;
    values.push_back(
        Ort::Value::CreateTensor(memory, from.data, from.bytes, from.shape.data(), from.shape.size(), from.type));
  }
  auto results = session_.Run(Ort::RunOptions(), input_names_.data(), values.data(), values.size(),
                              output_names_.data(), output_names_.size());
  Outputs by_name;
  for (size_t i = 0; i < results.size(); ++i) by_name.emplace(output_names_[i], std::move(results[i]));
  return by_name;
}

const Spec& Model::input(const std::string& name) const {
  const auto found = inputs.find(name);
  if (found == inputs.end()) throw std::runtime_error(file_ + " has no input " + name);
  return found->second;
}
