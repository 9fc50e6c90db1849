// See cuda_library.h.
#include "adapter/cuda_library.h"

#include <dlfcn.h>

#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/cuda/functions.h"

namespace gluon_syncbn {
namespace {

// The library is never closed: its functions may still be running when the process ends.
void* OpenLibrary() {
  Dl_info here{};
  dladdr(reinterpret_cast<void*>(&RequireCudaLibrary), &here);
  const std::string self = here.dli_fname == nullptr ? "" : here.dli_fname;
  const std::string path = self.substr(0, self.rfind('/') + 1) + "libgluon_syncbn_cuda.so";
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* why = dlerror();
    throw std::runtime_error(
        std::string("gluon_syncbn has no GPU side here, so it takes CPU contexts only. It is built "
                    "where nvcc, the compiler of the CUDA toolkit, is found: install the toolkit, "
                    "then build again (\"make build\" in a checkout, otherwise \"pip install "
                    "--force-reinstall --no-deps .\"). (") +
        (why == nullptr ? "no reason given" : why) + ")");
  }
  return library;
}

template <typename Function>
Function* Find(const char* name) {
  static void* const library = OpenLibrary();  // if it throws, the next call tries again
  void* const function = dlsym(library, name);
  if (function == nullptr) {
    throw std::runtime_error(std::string("libgluon_syncbn_cuda.so has no ") + name +
                             ": its version is not that of libgluon_syncbn.so; build again.");
  }
  return reinterpret_cast<Function*>(function);
}

void Check(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

// Calls a function of kernels/cuda/functions.h.
#define CALL_CUDA(name, ...)                                                                     \
  do {                                                                                           \
    static const auto function = Find<decltype(GluonSyncBNCuda##name)>("GluonSyncBNCuda" #name); \
    Check(function(__VA_ARGS__));                                                                \
  } while (false)

// Throws nothing: an exception in a thread of CUDA's would end the process.
void CallDone(void* data, const double* values, std::size_t count, const char* error) noexcept {
  const std::unique_ptr<ValuesRead> done(static_cast<ValuesRead*>(data));
  std::string why = error == nullptr ? "" : error;
  if (error == nullptr) {
    try {
      return (*done)({values, values + count}, why);
    } catch (const std::exception& e) {
      why = e.what();
    }
  }
  (*done)({}, why);
}

}  // namespace

void RequireCudaLibrary() {
  Find<decltype(GluonSyncBNCudaMomentsForward)>("GluonSyncBNCudaMomentsForward");
}

void Run(const Gpu& gpu, const MomentsForwardParams& params) {
  CALL_CUDA(MomentsForward, &gpu, &params);
}
void Run(const Gpu& gpu, const NormalizeForwardParams& params) {
  CALL_CUDA(NormalizeForward, &gpu, &params);
}
void Run(const Gpu& gpu, const NormalizeBackwardParams& params) {
  CALL_CUDA(NormalizeBackward, &gpu, &params);
}
void Run(const Gpu& gpu, const MomentsBackwardParams& params) {
  CALL_CUDA(MomentsBackward, &gpu, &params);
}
void RunWeighted(const Gpu& gpu, const MomentsForwardParams& params,
                 const PositionWeights& weights) {
  CALL_CUDA(WeightedMomentsForward, &gpu, &params, &weights);
}
void RunWeighted(const Gpu& gpu, const MomentsBackwardParams& params,
                 const PositionWeights& weights) {
  CALL_CUDA(WeightedMomentsBackward, &gpu, &params, &weights);
}
void RunLocal(const Gpu& gpu, const NormalizeForwardParams& params, double* statistics) {
  CALL_CUDA(LocalForward, &gpu, &params, statistics);
}
void RunLocal(const Gpu& gpu, const LocalBackwardParams& params) {
  CALL_CUDA(LocalBackward, &gpu, &params);
}
void Run(const Gpu& gpu, const MovingAverageForwardParams& params) {
  CALL_CUDA(MovingAverageForward, &gpu, &params);
}
void Run(const Gpu& gpu, const MovingAverageSumsParams& params) {
  CALL_CUDA(MovingAverageSums, &gpu, &params);
}
void Run(const Gpu& gpu, const MovingAverageBackwardParams& params) {
  CALL_CUDA(MovingAverageBackward, &gpu, &params);
}

void ReadValues(int device, DataType type, const void* from, std::size_t count, ValuesRead done) {
  auto data = std::make_unique<ValuesRead>(std::move(done));
  CALL_CUDA(ReadValues, device, type, from, count, &CallDone, data.get());
  data.release();  // CallDone deletes it
}

void WriteValues(const Gpu& gpu, DataType type, WriteMode mode, const std::vector<double>& from,
                 void* to) {
  CALL_CUDA(WriteValues, &gpu, type, mode, from.data(), from.size(), to);
}

}  // namespace gluon_syncbn
