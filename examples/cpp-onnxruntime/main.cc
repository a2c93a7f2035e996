// Runs a bundle on frames, with ONNX Runtime and no Python.
//
//     ffmpeg -v error -i photo.jpg -vf scale=518:518 -pix_fmt rgb24 -f rawvideo - | client LIBRARY BUNDLE [options]
//
// Frames come on standard input as raw RGB in the size of the model, so that whatever decodes can feed it: ffmpeg, GStreamer,
// a camera's program. Each gives a line of JSON: time and outputs, of large ones the shape; what is no finite number is null.
// All else is in the file of the model.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "stream.h"

namespace {

constexpr int64_t kMostPrinted = 4096;

struct Settings {
  std::string library, bundle;
  int threads = 0;    // 0: as ONNX Runtime likes.
  double share = 0;   // Of the patches, computed of each frame; 0: each frame is computed from nothing.
  bool bf16 = false;  // Attention computes in bfloat16, where the processor has it.
};

// The whole word as a number from 0 to `most`; else -1.
double number(const char* word, double most) {
  char* end = nullptr;
  const double value = std::strtod(word, &end);
  return end != word && *end == '\0' && value >= 0 && value <= most ? value : -1;
}

Settings read_settings(int count, char** words) {
  Settings settings;
  double threads = 0;
  int place = 0;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--bf16") {
      settings.bf16 = true;
    } else if (word == "--threads" && i + 1 < count) {
      threads = number(words[++i], 1024);
    } else if (word == "--share" && i + 1 < count) {
      settings.share = number(words[++i], 1);
    } else if (word.rfind("--", 0) != 0 && place < 2) {
      (place++ == 0 ? settings.library : settings.bundle) = word;
    } else {
      place = -1;
      break;
    }
  }
  settings.threads = static_cast<int>(threads);
  if (place != 2 || settings.threads != threads || threads < 0 || settings.share < 0) {
    std::fprintf(stderr, "usage: %s LIBSPARSIFINER_OPS BUNDLE [--threads N] [--share X] [--bf16] < FRAMES\n", words[0]);
    std::exit(2);
  }
  return settings;
}

// Whether the processor multiplies int8 with int8 in 32 bits.
bool has_int8_products() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512vnni") || __builtin_cpu_supports("avxvnni");
#else
  return true;
#endif
}

Ort::SessionOptions session_options(const Settings& settings) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(settings.threads);
  options.SetInterOpNumThreads(1);
  // Threads that wait for the next run take a core from whatever comes between.
  options.AddConfigEntry("session.force_spinning_stop", "1");
  // Products of int8 would saturate: ONNX Runtime then takes weights as uint8.
  if (!has_int8_products()) options.AddConfigEntry("session.x64quantprecision", "1");
  if (settings.bf16) options.AddConfigEntry("sparsifiner.attention", "bfloat16");
  options.RegisterCustomOpsLibrary(settings.library.c_str());
  return options;
}

void print_values(const float* data, int64_t count) {
  std::printf("[");
  for (int64_t i = 0; i < count; ++i) {
    std::printf(i == 0 ? "" : ", ");
    std::isfinite(data[i]) ? std::printf("%.9g", data[i]) : std::printf("null");
  }
  std::printf("]");
}

void print_shape(const std::vector<int64_t>& shape) {
  std::printf("{\"shape\": [");
  for (size_t i = 0; i < shape.size(); ++i) std::printf("%s%lld", i == 0 ? "" : ", ", static_cast<long long>(shape[i]));
  std::printf("]}");
}

void print(int64_t frame, double ms, const Outputs& outputs) {
  std::printf("{\"index\": %lld, \"ms\": %.3f", static_cast<long long>(frame), ms);
  for (const auto& [name, value] : outputs) {
    const auto info = value.GetTensorTypeAndShapeInfo();
    const auto count = static_cast<int64_t>(info.GetElementCount());
    const bool all = count <= kMostPrinted && info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    std::printf(", \"%s\": ", name.c_str());
    all ? print_values(value.GetTensorData<float>(), count) : print_shape(info.GetShape());
  }
  std::printf("}\n");
  if (std::fflush(stdout) != 0) throw std::runtime_error("The answers cannot be written");
}

int run(const Settings& settings) {
  const Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "client");
  const Ort::SessionOptions options = session_options(settings);
  // Files of a stream also answer a first frame; only without them is the whole model needed.
  std::unique_ptr<Model> model, embedding, step;
  std::unique_ptr<Stream> stream;
  if (settings.share > 0) {
    embedding = std::make_unique<Model>(env, options, settings.bundle + "/stream/embedding.onnx");
    step = std::make_unique<Model>(env, options, settings.bundle + "/stream/step.onnx");
    stream = std::make_unique<Stream>(*embedding, *step, settings.share);
  } else {
    model = std::make_unique<Model>(env, options, settings.bundle + "/model.onnx");
  }
  const auto& shape = (stream ? *embedding : *model).input("image").shape;  // [1, height, width, 3]
  std::vector<uint8_t> pixels(shape.at(1) * shape.at(2) * shape.at(3));
  for (int64_t frame = 0;; ++frame) {
    const size_t read = std::fread(pixels.data(), 1, pixels.size(), stdin);
    if (read != pixels.size()) {
      if (read == 0 && frame > 0 && !std::ferror(stdin)) return 0;
      std::fprintf(stderr, "frame %lld: %zu bytes, of %lld x %lld x 3\n", static_cast<long long>(frame), read,
                   static_cast<long long>(shape[2]), static_cast<long long>(shape[1]));
      return 2;
    }
    const View image = view(pixels, {1, shape[1], shape[2], shape[3]});
    const auto start = std::chrono::steady_clock::now();
    const Outputs outputs = stream ? stream->next(image) : model->run({{"image", image}});
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    print(frame, taken.count(), outputs);
  }
}

}  // namespace

int main(int count, char** words) {
  const Settings settings = read_settings(count, words);
  try {
    return run(settings);
  } catch (const std::exception& error) {  // Ort::Exception too: it says which file or operator.
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
