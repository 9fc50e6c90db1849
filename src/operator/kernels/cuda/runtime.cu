// See runtime.cuh.
#include <algorithm>
#include <array>
#include <map>
#include <utility>

#include "kernels/cuda/runtime.cuh"

namespace gluon_syncbn {
namespace {

class DeviceMemory {
 public:
  // A buffer that is too small is replaced but not freed: a captured CUDA graph may still use it.
  // Doubling limits what is kept this way to the size of the current buffer.
  void* AtLeast(std::size_t bytes) {
    if (bytes > size_) {
      const std::size_t size = std::max(bytes, 2 * size_);
      Check(cudaMalloc(&pointer_, size));
      size_ = size;
    }
    return pointer_;
  }

 private:
  void* pointer_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace

void* ScratchBytes(const Gpu& gpu, Use use, std::size_t bytes) {
  using Pieces = std::array<DeviceMemory, static_cast<std::size_t>(Use::kCount)>;
  static thread_local std::map<std::pair<int, void*>, Pieces> streams;
  return streams[{gpu.device, gpu.stream}][static_cast<std::size_t>(use)].AtLeast(bytes);
}

int ResidentBlocks(const Gpu& gpu, const void* kernel) {
  static thread_local std::map<std::pair<int, const void*>, int> known;
  int& blocks = known[{gpu.device, kernel}];
  if (blocks == 0) {
    int per_multiprocessor = 0, multiprocessors = 0;
    Check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0));
    Check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, gpu.device));
    blocks = std::max(1, per_multiprocessor * multiprocessors);
  }
  return blocks;
}

}  // namespace gluon_syncbn
