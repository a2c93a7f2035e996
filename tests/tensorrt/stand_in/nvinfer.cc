/* Stands in for TensorRT's libraries under its real Python bindings, as far as a plugin's life goes: a registry of plugins,
 * and a call that takes one from creation through building, writing down and reading again to runs, as parser, builder
 * and runtime do. Compiled from the real headers, so that the bindings find every virtual function where they expect it. */

#include <NvInfer.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

using namespace nvinfer1;

namespace {

struct Size : apiv::VDimensionExpr {
  explicit Size(int64_t of) : size(of) {}
  bool isConstant() const noexcept override { return true; }
  int64_t getConstantValue() const noexcept override { return size; }
  bool isSizeTensor() const noexcept override { return false; }
  int64_t size;
};

struct Dimension : IDimensionExpr {
  explicit Dimension(int64_t size) { mImpl = new Size(size); }
  ~Dimension() noexcept override = default;
};

struct Sizes : apiv::VExprBuilder {
  IDimensionExpr const* constant(int64_t size) noexcept override { return new Dimension(size); }
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) noexcept override {
    return nullptr;  // No plugin of ours calculates.
  }
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) noexcept override {
    return nullptr;
  }
};

struct Expressions : IExprBuilder {
  Expressions() { mImpl = new Sizes; }
  ~Expressions() noexcept override = default;
};

struct Registry : IPluginRegistry {
  bool registerCreator(IPluginCreator&, AsciiChar const*) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t* count) const noexcept override { return *count = 0, nullptr; }
  IPluginCreator* getPluginCreator(AsciiChar const*, AsciiChar const*, AsciiChar const*) noexcept override {
    return nullptr;
  }
  void setErrorRecorder(IErrorRecorder*) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool) override {}
  PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* space) noexcept override {
    auto* one = static_cast<IPluginCreatorV3One*>(&creator);
    if (getCreator(one->getPluginName(), one->getPluginVersion(), space) != nullptr) return false;
    creators.push_back(&creator);
    return true;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override {
    return *count = static_cast<int32_t>(creators.size()), creators.data();
  }
  IPluginCreatorInterface* getCreator(AsciiChar const* name, AsciiChar const* version,
                                      AsciiChar const* space) noexcept override {
    for (auto* each : creators) {
      auto* one = static_cast<IPluginCreatorV3One*>(each);
      if (!std::strcmp(one->getPluginName(), name) && !std::strcmp(one->getPluginVersion(), version) &&
          !std::strcmp(one->getPluginNamespace(), space)) {
        return each;
      }
    }
    return nullptr;
  }
  bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return false; }
  IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { return nullptr; }
  int32_t releasePluginResource(AsciiChar const*) noexcept override { return 0; }
  /* New in 10.10. */
  virtual IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* count) noexcept { return getAllCreators(count); }
  std::vector<IPluginCreatorInterface*> creators;
};

Registry registry;

template <class Part>
Part* PartOf(IPluginV3* plugin, PluginCapabilityType kind) {
  return plugin == nullptr ? nullptr : static_cast<Part*>(plugin->getCapabilityInterface(kind));
}

}  // namespace

extern "C" {

/* Of a tensor: DataType, sizes, and where it lies. */
struct Tensor {
  int32_t type, rank;
  int64_t sizes[8];
  void* data;
};

/* The whole life of a plugin. tensors: inputs, then outputs, whose types and sizes are written. Returns the step that
 * failed, or null. */
const char* stand_in_live(const char* space, const char* name, Tensor* tensors, int inputs, int outputs, int runs) {
  auto* creator = static_cast<IPluginCreatorV3One*>(registry.getCreator(name, "1", space));
  if (creator == nullptr) return "no creator";
  PluginFieldCollection const none{0, nullptr};
  IPluginV3* plugin = creator->createPlugin("a node", &none, TensorRTPhase::kBUILD);
  auto* build = PartOf<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  auto* core = PartOf<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
  if (build == nullptr || core == nullptr) return "create";
  if (std::strcmp(core->getPluginName(), name) || std::strcmp(core->getPluginNamespace(), space)) return "name";
  if (build->getNbOutputs() != outputs) return "number of outputs";

  std::vector<DataType> types(inputs), given(outputs);
  std::vector<DimsExprs> sizes(inputs), shapes(outputs);
  for (int i = 0; i < inputs; ++i) {
    types[i] = static_cast<DataType>(tensors[i].type);
    sizes[i].nbDims = tensors[i].rank;
    for (int axis = 0; axis < tensors[i].rank; ++axis) sizes[i].d[axis] = new Dimension(tensors[i].sizes[axis]);
  }
  Expressions expressions;
  if (build->getOutputDataTypes(given.data(), outputs, types.data(), inputs) != 0) return "types";
  if (build->getOutputShapes(sizes.data(), inputs, nullptr, 0, shapes.data(), outputs, expressions) != 0) return "shapes";
  for (int i = 0; i < outputs; ++i) {
    Tensor& to = tensors[inputs + i];
    to.type = static_cast<int32_t>(given[i]);
    to.rank = shapes[i].nbDims;
    for (int axis = 0; axis < to.rank; ++axis) to.sizes[axis] = shapes[i].d[axis]->getConstantValue();
  }
  const int all = inputs + outputs;
  std::vector<DynamicPluginTensorDesc> planned(all);
  std::vector<PluginTensorDesc> at_run(all);
  std::vector<void*> data(all);
  for (int i = 0; i < all; ++i) {
    PluginTensorDesc& of = at_run[i];
    of.type = static_cast<DataType>(tensors[i].type);
    of.format = TensorFormat::kLINEAR;
    of.dims.nbDims = tensors[i].rank;
    std::copy(tensors[i].sizes, tensors[i].sizes + 8, of.dims.d);
    planned[i].desc = of;
    planned[i].min = planned[i].opt = planned[i].max = of.dims;
    data[i] = tensors[i].data;
  }
  for (int i = 0; i < all; ++i) {
    planned[i].desc.format = TensorFormat::kCHW32;
    if (build->supportsFormatCombination(i, planned.data(), inputs, outputs)) return "takes another format";
    planned[i].desc.format = TensorFormat::kLINEAR;
    if (!build->supportsFormatCombination(i, planned.data(), inputs, outputs)) return "format";
  }
  if (build->configurePlugin(planned.data(), inputs, planned.data() + inputs, outputs) != 0) return "configure";
  if (build->getWorkspaceSize(planned.data(), inputs, planned.data() + inputs, outputs) != 0) return "workspace";
  if (build->getTimingCacheID() == nullptr || std::strcmp(build->getTimingCacheID(), name) != 0) return "timing cache";

  // A network keeps a copy of what it is handed.
  IPluginV3* copy = plugin->clone();
  auto* runtime = PartOf<IPluginV3OneRuntime>(copy, PluginCapabilityType::kRUNTIME);
  if (runtime == nullptr) return "runtime";
  auto const* fields = runtime->getFieldsToSerialize();
  if (fields == nullptr || fields->nbFields != 0) return "fields";
  IPluginV3* of_engine = creator->createPlugin("a node", fields, TensorRTPhase::kRUNTIME);
  auto* again = PartOf<IPluginV3OneRuntime>(of_engine, PluginCapabilityType::kRUNTIME);
  if (again == nullptr) return "create again";
  delete copy;
  delete plugin;
  IPluginV3* of_context = again->attachToContext(nullptr);
  auto* attached = PartOf<IPluginV3OneRuntime>(of_context, PluginCapabilityType::kRUNTIME);
  if (attached == nullptr) {
    delete of_engine;
    return "attach";
  }
  if (attached->onShapeChange(at_run.data(), inputs, at_run.data() + inputs, outputs) != 0) return "change of shape";
  int failed = 0;
  for (int run = 0; run < runs; ++run) {
    auto* stream = reinterpret_cast<cudaStream_t>(0x42);
    failed |= attached->enqueue(at_run.data(), at_run.data() + inputs, data.data(), data.data() + inputs, nullptr, stream);
  }
  delete of_context;
  delete of_engine;
  return failed != 0 ? "run" : nullptr;
}

IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
IPluginRegistry* getBuilderPluginRegistry(EngineCapability) noexcept { return &registry; }
bool initLibNvInferPlugins(void*, char const*) noexcept { return true; }
int32_t getNvOnnxParserVersion() noexcept { return 0; }
/* What the bindings link besides; nothing here makes engines. */
void* createInferBuilder_INTERNAL(void*, int32_t) noexcept { return nullptr; }
void* createInferRefitter_INTERNAL(void*, void*, int32_t) noexcept { return nullptr; }
void* createInferRuntime_INTERNAL(void*, int32_t) noexcept { return nullptr; }
void* createNvOnnxParser_INTERNAL(void*, void*, int32_t) noexcept { return nullptr; }
void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int32_t) noexcept { return nullptr; }

}  // extern "C"
