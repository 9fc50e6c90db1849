// See gpu_runtime.cuh.
#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "gpu_runtime.cuh"

namespace gluon_syncbn {
namespace {

class DeviceMemory {
 public:
  // What was there is lost, but stays allocated: a captured CUDA graph (MXNet can make them) goes
  // on using it.  Doubling keeps that to as much again.
  void* AtLeast(std::size_t bytes) {
    if (bytes > size_) {
      const std::size_t size = std::max(bytes, 2 * size_);
      void* piece = nullptr;
      Check(cudaMalloc(&piece, size));
      pieces_.emplace_back(piece);
      size_ = size;
    }
    return pieces_.empty() ? nullptr : pieces_.back().get();
  }

 private:
  struct Free {  // fails, and need not succeed, when the process ends
    void operator()(void* pointer) const { cudaFree(pointer); }
  };
  std::vector<std::unique_ptr<void, Free>> pieces_;
  std::size_t size_ = 0;  // of the last
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
