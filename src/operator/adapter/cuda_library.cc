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

// Opened once, for good: its functions may be running when the process ends.
void* OpenLibrary() {
  Dl_info here{};
  dladdr(reinterpret_cast<void*>(&NeedCudaLibrary), &here);
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
  static void* const library = OpenLibrary();  // when it throws, the next call tries again
  void* const function = dlsym(library, name);
  if (function == nullptr) {
    throw std::runtime_error(std::string("libgluon_syncbn_cuda.so has no ") + name +
                             ": it is of another version than libgluon_syncbn.so; build again.");
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

// Nothing may be thrown into CUDA, which ends the process.
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

void NeedCudaLibrary() {
  Find<decltype(GluonSyncBNCudaMomentsForward)>("GluonSyncBNCudaMomentsForward");
}

void Run(const Gpu& gpu, const MomentsForward& kernel) { CALL_CUDA(MomentsForward, &gpu, &kernel); }
void Run(const Gpu& gpu, const NormalizeForward& kernel) {
  CALL_CUDA(NormalizeForward, &gpu, &kernel);
}
void Run(const Gpu& gpu, const NormalizeBackward& kernel) {
  CALL_CUDA(NormalizeBackward, &gpu, &kernel);
}
void Run(const Gpu& gpu, const MomentsBackward& kernel) {
  CALL_CUDA(MomentsBackward, &gpu, &kernel);
}
void RunAlone(const Gpu& gpu, const NormalizeForward& kernel, double* statistics) {
  CALL_CUDA(ForwardAlone, &gpu, &kernel, statistics);
}
void RunAlone(const Gpu& gpu, const NormalizeBackward& kernel) {
  CALL_CUDA(BackwardAlone, &gpu, &kernel);
}

void ReadValues(int device, DataType type, const void* from, std::size_t count, ValuesRead done) {
  auto data = std::make_unique<ValuesRead>(std::move(done));
  CALL_CUDA(ReadValues, device, type, from, count, &CallDone, data.get());
  data.release();  // CallDone deletes it
}

void WriteValues(const Gpu& gpu, DataType type, Request request, const std::vector<double>& from,
                 void* to) {
  CALL_CUDA(WriteValues, &gpu, type, request, from.data(), from.size(), to);
}

}  // namespace gluon_syncbn
