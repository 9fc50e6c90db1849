// See gpu_runtime.cuh.
#include <array>
#include <map>
#include <utility>

#include "gpu_runtime.cuh"

namespace gluon_syncbn {
namespace {

class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory() { cudaFree(pointer_); }  // fails, and need not succeed, when the process ends

  // What was there is lost.  The device waits for what still uses it, so growing is slow and rare.
  void* AtLeast(std::size_t bytes) {
    if (bytes > size_) {
      Check(cudaFree(std::exchange(pointer_, nullptr)));
      size_ = 0;
      Check(cudaMalloc(&pointer_, bytes));
      size_ = bytes;
    }
    return pointer_;
  }

 private:
  void* pointer_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace

void* ScratchBytes(const Gpu& gpu, Use use, std::size_t bytes) {
  using Pieces = std::array<DeviceMemory, 4>;
  static thread_local std::map<std::pair<int, void*>, Pieces> streams;
  return streams[{gpu.device, gpu.stream}][static_cast<std::size_t>(use)].AtLeast(bytes);
}

int Multiprocessors(const Gpu& gpu) {
  int count = 0;
  Check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, gpu.device));
  return count;
}

}  // namespace gluon_syncbn
