// Runs a bundle on frames, with ONNX Runtime and without Python.
//
//     ffmpeg -v error -i photo.jpg -vf scale=518:518 -pix_fmt rgb24 -f rawvideo - | client LIBRARY BUNDLE [options]
//
// LIBRARY is the path of libsparsifiner_ops.so, and BUNDLE is the folder of the bundle.
//
// Options:
//     --threads N   Number of threads (0, the default: chosen by ONNX Runtime).
//     --share X     Recompute this fraction of the patches in every frame, for a fixed camera (0, the default: run the
//                   full model on every frame). The bundle must have been exported with --stream.
//     --bf16        Compute attention in bfloat16. The processor must have bfloat16 products.
//
// The program reads frames from standard input as raw RGB in the model's input size, so any decoder can feed it:
// ffmpeg, GStreamer or a camera's own program. For each frame it prints a line of JSON with the time in milliseconds
// and the outputs. Large outputs are printed as their shape, and numbers that are not finite as null. Preprocessing is
// part of the model file.

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

constexpr int64_t kMostPrinted = 4096;  // Outputs with more elements are printed as their shape.

struct Settings {
  std::string library, bundle;
  int threads = 0;    // Number of threads; 0: chosen by ONNX Runtime.
  double share = 0;   // Fraction of the patches to recompute in every frame; 0: run the full model on every frame.
  bool bf16 = false;  // Compute attention in bfloat16.
};

// Parses a number from 0 to `most`. Returns -1 if the word is anything else.
double number(const char* word, double most) {
  char* end = nullptr;
  const double value = std::strtod(word, &end);
  return end != word && *end == '\0' && value >= 0 && value <= most ? value : -1;
}

// Reads the command line, or prints the usage and exits with status 2.
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

// Returns true if the processor has int8 products with 32-bit sums (VNNI on x86).
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
  // Without this, threads that wait for the next run keep spinning and take cores from the decoder.
  options.AddConfigEntry("session.force_spinning_stop", "1");
  // Without VNNI, sums of uint8 x int8 products saturate in 16 bits. With this entry, ONNX Runtime converts int8
  // weights to uint8, which avoids that.
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
  if (std::fflush(stdout) != 0) throw std::runtime_error("Cannot write the results to standard output");
}

int run(const Settings& settings) {
  const Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "client");
  const Ort::SessionOptions options = session_options(settings);
  // The model files of the stream also process the first frame, so model.onnx is needed only without --share.
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
      std::fprintf(stderr, "frame %lld: %zu bytes, expected %lld x %lld x 3\n", static_cast<long long>(frame), read,
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
  } catch (const std::exception& error) {  // Includes Ort::Exception, which names the file or operator.
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
