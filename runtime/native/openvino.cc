// OpenVINO extension (for Core::add_extension) with the operators as graph nodes. They call the C interface
// (sparsifiner.h) on OpenVINO's own threads: a second thread pool would have to wake up while OpenVINO's threads still
// spin.
//
// The attribute `precision` of a node, a sparsifiner_precision, is the precision of the products in attention. The
// process adds it to the model after reading the file. Attention in bfloat16 returns bfloat16, like the layers around
// it in that mode: OpenVINO would round a float32 result in a separate pass, and transpose it back and forth before an
// int8 layer.

#include <cmath>
#include <cstdarg>
#include <memory>
#include <oneapi/tbb/parallel_for.h>
#include <openvino/core/except.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/convert.hpp>
#include <openvino/op/op.hpp>
#include <string>
#include <utility>
#include <vector>

#include "operators.h"
#include "sparsifiner.h"

namespace sparsifiner {
namespace {

// Attributes of a node by name.
using Values = std::vector<std::pair<std::string, double>>;

// First error of a call.
class Problem {
 public:
  [[gnu::format(printf, 2, 3)]] bool Refuse(const char* format, ...) {
    if (!text_.empty()) return false;
    char text[512];
    va_list values;
    va_start(values, format);
    std::vsnprintf(text, sizeof(text), format, values);
    va_end(values);
    text_ = text;
    return false;
  }

  // Throws the error; without one, memory ran out.
  [[noreturn]] void Throw(const char* name) const {
    OPENVINO_THROW("sparsifiner::", name, ": ", text_.empty() ? "out of memory" : text_);
  }

 private:
  std::string text_;
};

// Reads the attributes of a node. They are also recorded in `values`, by which OpenVINO distinguishes nodes.
class Attributes {
 public:
  Attributes(const ov::frontend::NodeContext& node, Problem* problem, Values* values)
      : node_(node), problem_(problem), values_(values) {}

  bool Whole(const char* name, int64_t least, int64_t* number) const {
    *number = node_.get_attribute<int64_t>(name);
    values_->emplace_back(name, static_cast<double>(*number));
    return (*number >= least && *number < kMost) || problem_->Refuse("%s is %" PRId64, name, *number);
  }

  bool Number(const char* name, float* number) const {
    *number = node_.get_attribute<float>(name);
    values_->emplace_back(name, static_cast<double>(*number));
    return (std::isfinite(*number) && *number >= 0) || problem_->Refuse("%s is %f", name, static_cast<double>(*number));
  }

 private:
  const ov::frontend::NodeContext& node_;
  Problem* problem_;
  Values* values_;
};

// Inputs of a call. Data is null if only shapes are known.
class Tensors : public Packing<Tensors> {
 public:
  explicit Tensors(Problem* problem) : problem_(problem) {}

  void Add(const ov::Shape& axes, const void* data, const ov::element::Type& type) {
    inputs_.push_back({axes, data, type});
  }

  template <typename Tensor>
  bool Input(size_t index, Shape* shape, Tensor* tensor) const {
    if (index >= inputs_.size()) return problem_->Refuse("input %zu is missing", index);
    const auto& [axes, data, type] = inputs_[index];
    if (!Fits(type, tensor)) return problem_->Refuse("input %zu is of type %s", index, type.get_type_name().c_str());
    shape->rank = axes.size();
    for (size_t i = 0; i < std::min(shape->rank, Shape::kAxes); ++i) shape->axes[i] = static_cast<int64_t>(axes[i]);
    tensor->data = static_cast<decltype(tensor->data)>(data);
    tensor->count = static_cast<int64_t>(ov::shape_size(axes));
    return true;
  }

  bool IsHalf(size_t index) const { return index < inputs_.size() && inputs_[index].type == ov::element::f16; }

  Problem* problem() const { return problem_; }

 private:
  struct Entry {
    ov::Shape axes;
    const void* data;
    ov::element::Type type;
  };

  static bool Fits(const ov::element::Type& type, const sparsifiner_floats*) { return type == ov::element::f32; }
  static bool Fits(const ov::element::Type& type, const sparsifiner_ints*) { return type == ov::element::i32; }
  static bool Fits(const ov::element::Type& type, const sparsifiner_rows*) {
    return type == ov::element::f32 || type == ov::element::f16;
  }

  std::vector<Entry> inputs_;
  Problem* problem_;
};

// A sparsifiner_parallel_for on OpenVINO's threads.
int OnOpenVino(void*, size_t count, void (*run)(void*, size_t), void* data) {
  try {
    tbb::parallel_for(size_t{0}, count, [=](size_t i) { run(data, i); }, tbb::simple_partitioner());
    return 1;
  } catch (...) {  // No memory for a task. An exception must not reach the caller, which is C.
    return 0;
  }
}

// Call of the C interface. Without an output (null), it only computes the shape of the output.
class Session {
 public:
  Session(int64_t precision, Problem* problem, ov::Tensor* output) : problem_(problem), output_(output) {
    call_.version = SPARSIFINER_VERSION;
    call_.precision = static_cast<sparsifiner_precision>(precision);
    call_.parallel_for = OnOpenVino;
  }

  template <size_t kRank, typename Run>
  bool Fill(const Tensors&, const int64_t (&axes)[kRank], Run run) {
    sparsifiner_output output{};
    if (!Check(run(&call_, output))) return false;
    shape.assign(axes, axes + kRank);
    if (output_ == nullptr) return true;
    if (output_->get_shape() != shape) output_->set_shape(shape);
    static float nothing;
    output.count = static_cast<int64_t>(output_->get_size());
    output.rounded = output_->get_element_type() == ov::element::bf16;
    output.data = output.count == 0 ? &nothing : output_->data();
    return Check(run(&call_, output));
  }

  ov::Shape shape;

 private:
  bool Check(sparsifiner_status status) {
    if (status == SPARSIFINER_OK) return true;
    return status != SPARSIFINER_OUT_OF_MEMORY && problem_->Refuse("%s", call_.message);
  }

  Problem* problem_;
  ov::Tensor* output_;
  sparsifiner_call call_{};
};

// Type of an output: kWhole is int32, kFloat is float32, and kRounded is bfloat16 if `precision` is, else float32.
enum class Gives { kWhole, kFloat, kRounded };

// Name of a kernel's operator, and type of its output.
template <typename Kernel>
struct About;
template <>
struct About<SelectKernel> {
  static constexpr const char* kName = "KeySelect";
  static constexpr Gives kGives = Gives::kWhole;
};
template <>
struct About<SparseKernel> {
  static constexpr const char* kName = "SparseAttention";
  static constexpr Gives kGives = Gives::kRounded;
};
template <>
struct About<DenseKernel> {
  static constexpr const char* kName = "DenseAttention";
  static constexpr Gives kGives = Gives::kRounded;
};
template <>
struct About<CachedKernel> {
  static constexpr const char* kName = "CachedAttention";
  static constexpr Gives kGives = Gives::kRounded;
};
template <>
struct About<MatchKernel> {
  static constexpr const char* kName = "MatchTokens";
  static constexpr Gives kGives = Gives::kWhole;
};
template <>
struct About<MergeKernel> {
  static constexpr const char* kName = "MergeTokens";
  static constexpr Gives kGives = Gives::kFloat;
};

// Graph node of a kernel.
template <typename Kernel>
class Node : public ov::op::Op {
 public:
  OPENVINO_OP(About<Kernel>::kName, "sparsifiner");

  Node() = default;
  Node(const ov::OutputVector& inputs, const Kernel& kernel, int64_t precision, Values values)
      : Op(inputs), kernel_(kernel), precision_(precision), values_(std::move(values)) {
    constructor_validate_and_infer_types();
  }

  // Infers the shape with two different values for dynamic axes. Output axes that differ between the two are dynamic.
  void validate_and_infer_types() override {
    const ov::Shape some = Infer(64), others = Infer(128);
    ov::PartialShape shape = ov::PartialShape::dynamic(static_cast<int64_t>(some.size()));
    for (size_t i = 0; i < some.size(); ++i) {
      if (some[i] == others[i]) shape[i] = some[i];
    }
    const auto type = rounds() ? ov::element::bf16 : kGives == Gives::kWhole ? ov::element::i32 : ov::element::f32;
    set_output_type(0, type, shape);
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<Node>(inputs, kernel_, precision_, values_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    for (auto& [name, value] : values_) visitor.on_attribute(name, value);
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
    Problem problem;
    Tensors tensors(&problem);
    for (const ov::Tensor& input : inputs) tensors.Add(input.get_shape(), input.data(), input.get_element_type());
    Session session(precision_, &problem, &outputs[0]);
    if (!kernel_.Compute(tensors, &session)) problem.Throw(About<Kernel>::kName);
    return true;
  }

  // Returns true if the output is bfloat16.
  bool rounds() const { return kGives == Gives::kRounded && precision_ == SPARSIFINER_BFLOAT16; }

 private:
  static constexpr Gives kGives = About<Kernel>::kGives;

  // Returns the shape of the output if dynamic axes have the size `open`.
  ov::Shape Infer(int64_t open) const {
    Problem problem;
    Tensors tensors(&problem);
    for (size_t i = 0; i < get_input_size(); ++i) {
      ov::Shape axes;
      for (const ov::Dimension& axis : get_input_partial_shape(i)) {
        axes.push_back(static_cast<size_t>(axis.is_static() ? axis.get_length() : open));
      }
      tensors.Add(axes, nullptr, get_input_element_type(i));
    }
    Session session(precision_, &problem, nullptr);
    if (!kernel_.Compute(tensors, &session)) problem.Throw(About<Kernel>::kName);
    return session.shape;
  }

  Kernel kernel_{};
  int64_t precision_ = SPARSIFINER_FLOAT32;
  Values values_;
};

// Converts a node of an ONNX file. Consumers get float32 in any precision.
template <typename Kernel>
ov::OutputVector Convert(const ov::frontend::NodeContext& node) {
  Problem problem;
  Values values;
  Kernel kernel;
  if (!kernel.Read(Attributes(node, &problem, &values))) problem.Throw(About<Kernel>::kName);
  ov::OutputVector inputs;
  for (size_t i = 0; i < node.get_input_size(); ++i) inputs.push_back(node.get_input(static_cast<int>(i)));
  const auto precision = node.get_attribute<int64_t>("precision");
  const auto op = std::make_shared<Node<Kernel>>(inputs, kernel, precision, std::move(values));
  return op->rounds() ? std::make_shared<ov::op::v0::Convert>(op, ov::element::f32)->outputs() : op->outputs();
}

ov::Extension::Ptr Extension(const char* name, ov::frontend::CreatorFunction convert) {
  return std::make_shared<ov::frontend::onnx::ConversionExtension>(name, "sparsifiner", std::move(convert));
}

}  // namespace
}  // namespace sparsifiner

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    sparsifiner::Extension("KeySelect", sparsifiner::Convert<sparsifiner::SelectKernel>),
    sparsifiner::Extension("SparseAttention", sparsifiner::Convert<sparsifiner::SparseKernel>),
    sparsifiner::Extension("DenseAttention", sparsifiner::Convert<sparsifiner::DenseKernel>),
    sparsifiner::Extension("CachedAttention", sparsifiner::Convert<sparsifiner::CachedKernel>),
    sparsifiner::Extension("MatchTokens", sparsifiner::Convert<sparsifiner::MatchKernel>),
    sparsifiner::Extension("MergeTokens", sparsifiner::Convert<sparsifiner::MergeKernel>),
}));
