// Runs an engine of a bundle on frames, with TensorRT and without Python.
//
//     sparsifiner-edge build bundle/ --backend tensorrt
//     ffmpeg -v error -i photo.jpg -vf scale=518:518 -pix_fmt rgb24 -f rawvideo - | client bundle/engines/....engine
//
// The program reads frames from standard input as raw RGB in the model's input size. For each frame it prints a line of
// JSON with the time in milliseconds and the first values of each output.
//
// From TensorRT 10.9 on, the engine contains the kernels. With TensorRT 10.3 to 10.8 (JetPack 6), the kernels are
// plugins that only Python registers; build the engine without them: `sparsifiner-edge build --kernels portable`.

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr size_t kPrinted = 16;  // Number of values to print of each output.

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", message);
  }
};

void require(cudaError_t status, const char* action) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA failed to ") + action + ": " + cudaGetErrorString(status));
}

void require(bool done, const std::string& action) {
  if (!done) throw std::runtime_error("TensorRT failed to " + action + ". It printed the reason above.");
}

// Tensor in host and device memory. The host memory is page-locked, so that copies run asynchronously on the stream.
struct Buffer {
  explicit Buffer(size_t size) : bytes(size) {
    require(cudaMallocHost(&host, bytes), "allocate page-locked memory");
    require(cudaMalloc(&device, bytes), "allocate GPU memory");
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    cudaFree(device);
    cudaFreeHost(host);
  }

  size_t bytes;
  void* host = nullptr;
  void* device = nullptr;
};

size_t bytes_of(nvinfer1::DataType type) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT:
    case nvinfer1::DataType::kINT32:
      return 4;
    case nvinfer1::DataType::kHALF:
    case nvinfer1::DataType::kBF16:
      return 2;
    case nvinfer1::DataType::kINT64:
      return 8;
    default:
      return 1;
  }
}

class Client {
 public:
  explicit Client(const std::string& file) {
    std::ifstream stream(file, std::ios::binary);
    if (!stream) throw std::runtime_error("Cannot read the engine " + file);
    const std::vector<char> content((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    require(runtime_ != nullptr, "start");
    engine_.reset(runtime_->deserializeCudaEngine(content.data(), content.size()));
    require(engine_ != nullptr, "load " + file + " (was it built for this GPU and this version of TensorRT?)");
    context_.reset(engine_->createExecutionContext());
    require(context_ != nullptr, "allocate the memory of the engine");
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "create a stream");
    for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
      const char* name = engine_->getIOTensorName(i);
      if (engine_->getTensorIOMode(name) != nvinfer1::TensorIOMode::kINPUT) continue;
      nvinfer1::Dims shape = engine_->getTensorShape(name);
      for (int axis = 0; axis < shape.nbDims; ++axis) shape.d[axis] = std::max<int64_t>(shape.d[axis], 1);
      require(context_->setInputShape(name, shape), "accept a batch of one image");
    }
    for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
      const char* name = engine_->getIOTensorName(i);
      const nvinfer1::Dims shape = context_->getTensorShape(name);
      size_t size = bytes_of(engine_->getTensorDataType(name));
      for (int axis = 0; axis < shape.nbDims; ++axis) size *= static_cast<size_t>(shape.d[axis]);
      const bool input = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
      if (!input && engine_->getTensorDataType(name) != nvinfer1::DataType::kFLOAT) {
        throw std::runtime_error(file + ": output " + name + " is not float32");
      }
      (input ? inputs_ : outputs_).push_back(name);
      buffers_.push_back(std::make_unique<Buffer>(size));
      (input ? read_ : written_).push_back(buffers_.back().get());
      require(context_->setTensorAddress(name, buffers_.back()->device), std::string("bind ") + name);
    }
    if (inputs_ != std::vector<std::string>{"image"}) throw std::runtime_error(file + " has other inputs than 'image'");
  }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  ~Client() { cudaStreamDestroy(stream_); }

  // Buffer for the next frame, and its size in bytes.
  void* frame() { return read_[0]->host; }
  size_t frame_bytes() const { return read_[0]->bytes; }

  // Runs the engine on the frame in the buffer.
  void infer() {
    require(cudaMemcpyAsync(read_[0]->device, read_[0]->host, read_[0]->bytes, cudaMemcpyHostToDevice, stream_), "copy a frame");
    require(context_->enqueueV3(stream_), "run");
    for (Buffer* to : written_) {
      require(cudaMemcpyAsync(to->host, to->device, to->bytes, cudaMemcpyDeviceToHost, stream_), "copy an output");
    }
    require(cudaStreamSynchronize(stream_), "run");
  }

  void print(long frame, double ms) const {
    std::printf("{\"index\": %ld, \"ms\": %.3f", frame, ms);
    for (size_t i = 0; i < outputs_.size(); ++i) {
      std::printf(", \"%s\": [", outputs_[i].c_str());
      const auto* data = static_cast<const float*>(written_[i]->host);  // Float32, as checked by the constructor.
      for (size_t j = 0; j < std::min(kPrinted, written_[i]->bytes / sizeof(float)); ++j) {
        std::printf(j == 0 ? "" : ", ");
        std::isfinite(data[j]) ? std::printf("%.9g", data[j]) : std::printf("null");
      }
      std::printf("]");
    }
    std::printf("}\n");
    if (std::fflush(stdout) != 0) throw std::runtime_error("Cannot write the results to standard output");
  }

 private:
  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  cudaStream_t stream_ = nullptr;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<std::string> inputs_, outputs_;
  std::vector<Buffer*> read_, written_;
};

int run(const std::string& file) {
  Client client(file);
  for (long frame = 0;; ++frame) {
    const size_t read = std::fread(client.frame(), 1, client.frame_bytes(), stdin);
    if (read != client.frame_bytes()) {
      if (read == 0 && frame > 0 && !std::ferror(stdin)) return 0;
      std::fprintf(stderr, "frame %ld: %zu bytes, expected %zu\n", frame, read, client.frame_bytes());
      return 2;
    }
    const auto start = std::chrono::steady_clock::now();
    client.infer();
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    client.print(frame, taken.count());
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) {
    std::fprintf(stderr, "usage: %s ENGINE < FRAMES\n", words[0]);
    return 2;
  }
  try {
    return run(words[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
