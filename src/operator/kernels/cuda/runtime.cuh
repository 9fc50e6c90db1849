// The CUDA runtime as our kernels use it: errors, launches, scratch memory, and element types in
// accesses of 16 bytes.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels/acc_type.h"
#include "kernels/batch_norm_kernels.h"

namespace gluon_syncbn {

inline void Check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::string message = std::string("gluon_syncbn on the GPU: ") + cudaGetErrorString(status);
  if (status == cudaErrorInsufficientDriver) {
    message += ". Build gluon_syncbn with a CUDA toolkit that is no newer than the driver.";
  } else if (status == cudaErrorNoKernelImageForDevice) {
    message +=
        ". Build gluon_syncbn for this GPU: for compute capability 7.0, for example, set "
        "CUDAARCHS=70.";
  }
  throw std::runtime_error(message);
}

// Makes a device the current one of this thread until the end of the scope, and then restores the
// one before: the thread may be the user's.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    Check(cudaGetDevice(&before_));
    Check(cudaSetDevice(device));
  }
  ~CurrentDevice() { cudaSetDevice(before_); }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0;
};

inline cudaStream_t ToStream(const Gpu& gpu) { return static_cast<cudaStream_t>(gpu.stream); }

// Launches by a function call instead of <<<>>>, so that this is plain C++ (tests/cuda_emulation).
template <typename... Parameters, typename... Arguments>
void Launch(const Gpu& gpu, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            const Arguments&... arguments) {
#ifdef __CUDACC__
  const void* const function = reinterpret_cast<const void*>(kernel);
#else
  const auto function = kernel;  // the emulation needs the types of the parameters
#endif
  const auto launch = [&](Parameters... parameters) {
    void* pointers[] = {static_cast<void*>(&parameters)...};
    Check(cudaLaunchKernel(function, grid, block, pointers, 0, ToStream(gpu)));
  };
  launch(arguments...);
}

// Device memory that a stream keeps from call to call, one buffer per Use: kernels of one stream
// run one after the other, so they can share it.  It is allocated when it has to grow, never in the
// steady state, and is never freed.
enum class Use { kPartialSums, kTable, kBackwardSums, kBackwardContext, kGradient, kCount };
void* ScratchBytes(const Gpu& gpu, Use use, std::size_t bytes);
template <typename Element>
Element* Scratch(const Gpu& gpu, Use use, std::size_t size) {
  return static_cast<Element*>(ScratchBytes(gpu, use, size * sizeof(Element)));
}

constexpr int kThreads = 256;  // per block, in every kernel

// How many blocks of a kernel can be resident on the device at a time.
int ResidentBlocks(const Gpu& gpu, const void* kernel);
template <typename... Parameters>
int ResidentBlocks(const Gpu& gpu, void (*kernel)(Parameters...)) {
  return ResidentBlocks(gpu, reinterpret_cast<const void*>(kernel));
}

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
__device__ inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ inline int64_t Max(int64_t a, int64_t b) { return a < b ? b : a; }

// A feature map: elements [outer][channels][inner].
struct Extent {
  int64_t outer, channels, inner;
  __host__ __device__ int64_t size() const { return outer * channels * inner; }
};

__device__ inline float ToAcc(__half value) { return __half2float(value); }
__device__ inline float ToAcc(float value) { return value; }
__device__ inline double ToAcc(double value) { return value; }
__device__ inline void FromAcc(float value, __half* to) { *to = __float2half_rn(value); }
__device__ inline void FromAcc(float value, float* to) { *to = value; }
__device__ inline void FromAcc(double value, double* to) { *to = value; }

// Element k of an array of 32-bit words, by shifts alone.  (If a Pack were an array of halves, the
// compiler would merge one that is loaded in a branch half by half, and wait for every load.)
__device__ inline void Get(const std::uint32_t* words, int k, __half* to) {
  *to = __ushort_as_half(static_cast<unsigned short>(words[k / 2] >> (k % 2 * 16)));
}
__device__ inline void Get(const std::uint32_t* words, int k, float* to) {
  *to = __uint_as_float(words[k]);
}
__device__ inline void Get(const std::uint32_t* words, int k, double* to) {
  *to = __hiloint2double(static_cast<int>(words[2 * k + 1]), static_cast<int>(words[2 * k]));
}
// The bits of the element must be 0 before.
__device__ inline void Put(__half value, std::uint32_t* words, int k) {
  words[k / 2] |= std::uint32_t(__half_as_ushort(value)) << (k % 2 * 16);
}
__device__ inline void Put(float value, std::uint32_t* words, int k) {
  words[k] = __float_as_uint(value);
}
__device__ inline void Put(double value, std::uint32_t* words, int k) {
  words[2 * k] = static_cast<std::uint32_t>(__double2loint(value));
  words[2 * k + 1] = static_cast<std::uint32_t>(__double2hiint(value));
}

// V elements that are read and written in one access: whole words, or a single element.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  static_assert(sizeof(T) * V % 4 == 0);
  std::uint32_t words[sizeof(T) * V / 4];
  __device__ AccType<T> operator[](int k) const { return ToAcc(At(k)); }
  // Once per element, in a pack that was {}.
  __device__ void Set(int k, T value) { Put(value, words, k); }
  __device__ T At(int k) const {
    T element;
    Get(words, k, &element);
    return element;
  }
};
template <typename T>
struct Pack<T, 1> {
  T element;
  __device__ AccType<T> operator[](int) const { return ToAcc(element); }
  __device__ void Set(int, T value) { element = value; }
  __device__ T At(int) const { return element; }
};

// Elements at ... at + V - 1 of an array that has them all.  `at` is a multiple of V.
template <typename T, int V>
__device__ Pack<T, V> LoadWhole(const T* from, int64_t at) {
  return *reinterpret_cast<const Pack<T, V>*>(from + at);
}

// The same for an array of `size` elements; those past its end are 0.
template <typename T, int V>
__device__ Pack<T, V> Load(const T* from, int64_t at, int64_t size) {
  if (at + V <= size) return LoadWhole<T, V>(from, at);
  Pack<T, V> pack = {};
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (at + k < size) pack.Set(k, from[at + k]);
  }
  return pack;
}

// Elements per access of 16 bytes.
template <typename T>
constexpr int kPerAccess = 16 / static_cast<int>(sizeof(T));

inline bool Aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

}  // namespace gluon_syncbn
