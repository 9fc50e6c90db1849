// See pinned_copy.cuh.
//
// A kernel reads or writes the pinned memory itself and converts on the way.  A read ends with a
// callback on the stream: no thread waits for it.
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/batch_norm_math.h"
#include "kernels/cuda/pinned_copy.cuh"
#include "kernels/cuda/runtime.cuh"

namespace gluon_syncbn {
namespace {

// Pinned buffers for reuse: pinning takes far longer than a copy.  They are never unpinned.
class PinnedPool {
 public:
  struct Buffer {
    double* values = nullptr;
    std::size_t capacity = 0;
  };

  // A buffer that all devices can access.
  Buffer Take(std::size_t count) {
    std::size_t capacity = 256;
    while (capacity < count) capacity *= 2;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto& free = free_[capacity];
      if (!free.empty()) {
        const Buffer buffer{free.back(), capacity};
        free.pop_back();
        return buffer;
      }
    }
    void* pointer = nullptr;
    Check(cudaHostAlloc(&pointer, capacity * sizeof(double), cudaHostAllocPortable));
    return {static_cast<double*>(pointer), capacity};
  }
  void Return(const Buffer& buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_[buffer.capacity].push_back(buffer.values);
  }

 private:
  std::mutex mutex_;
  std::map<std::size_t, std::vector<double*>> free_;
};

// Never destroyed: callbacks may still return buffers when the process ends.
PinnedPool& Pool() {
  static PinnedPool& pool = *std::make_unique<PinnedPool>().release();
  return pool;
}

class PinnedValues {
 public:
  explicit PinnedValues(std::size_t count) : buffer_(Pool().Take(count)) {}
  ~PinnedValues() { Pool().Return(buffer_); }
  PinnedValues(const PinnedValues&) = delete;
  PinnedValues& operator=(const PinnedValues&) = delete;
  double* get() const { return buffer_.values; }

 private:
  const PinnedPool::Buffer buffer_;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) ToDoubles(const T* from, int64_t count, double* to) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    to[i] = from[i];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    FromDoubles(const double* from, int64_t count, WriteMode mode, T* to) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    Store(mode, to + i, from[i]);
  }
}

dim3 GridFor(std::size_t count) {
  const int64_t blocks = CeilDiv(static_cast<int64_t>(count), kThreads);
  return dim3(static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(blocks, 64))));
}

// A read that is under way.
struct Reading {
  explicit Reading(std::size_t n) : values(n), count(n) {}
  PinnedValues values;
  std::size_t count;
  GluonSyncBNValuesRead done = nullptr;
  void* data = nullptr;

  // The stream's callback, which is also called if something on the device has failed.
  static void CUDART_CB Notify(cudaStream_t, cudaError_t status, void* self) {
    const std::unique_ptr<Reading> reading(static_cast<Reading*>(self));
    if (status == cudaSuccess) {
      reading->done(reading->data, reading->values.get(), reading->count, nullptr);
    } else {
      char error[128];  // nothing here may throw: CUDA calls it
      std::snprintf(
          error, sizeof error,
          "gluon_syncbn on the GPU: CUDA error %d before an exchange; an operator on this "
          "device failed.",
          static_cast<int>(status));
      reading->done(reading->data, nullptr, 0, error);
    }
  }
};

}  // namespace

void ReadDeviceValues(int device, DataType type, const void* from, std::size_t count,
                      GluonSyncBNValuesRead done, void* data) {
  const CurrentDevice current(device);
  const Gpu gpu{device, cudaStreamPerThread};
  auto reading = std::make_unique<Reading>(count);
  reading->done = done;
  reading->data = data;
  const int64_t n = static_cast<int64_t>(count);
  if (type == DataType::kFloat64) {
    Launch(gpu, ToDoubles<double>, GridFor(count), dim3(kThreads), static_cast<const double*>(from),
           n, reading->values.get());
  } else {
    Launch(gpu, ToDoubles<float>, GridFor(count), dim3(kThreads), static_cast<const float*>(from),
           n, reading->values.get());
  }
  // (Not cudaLaunchHostFunc, whose function is not called after an error: the read would not end.)
  const cudaError_t status =
      cudaStreamAddCallback(ToStream(gpu), &Reading::Notify, reading.get(), 0);
  if (status != cudaSuccess) {
    cudaStreamSynchronize(ToStream(gpu));  // the kernel writes to the buffer
    Check(status);
  }
  reading.release();  // Notify deletes it
}

void WriteDeviceValues(const Gpu& gpu, DataType type, WriteMode mode, const double* from,
                       std::size_t count, void* to) {
  if (mode == WriteMode::kSkip) return;
  const CurrentDevice current(gpu.device);
  const PinnedValues values(count);
  std::copy_n(from, count, values.get());
  const int64_t n = static_cast<int64_t>(count);
  const double* pinned = values.get();
  if (type == DataType::kFloat64) {
    Launch(gpu, FromDoubles<double>, GridFor(count), dim3(kThreads), pinned, n, mode,
           static_cast<double*>(to));
  } else {
    Launch(gpu, FromDoubles<float>, GridFor(count), dim3(kThreads), pinned, n, mode,
           static_cast<float*>(to));
  }
  Check(cudaStreamSynchronize(ToStream(gpu)));
}

}  // namespace gluon_syncbn
