// What all CUDA code here needs of the CUDA runtime: launches, errors, scratch memory, and element
// types in accesses of 16 bytes.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "batch_norm_kernels.h"

namespace gluon_syncbn {

inline void Check(cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("gluon_syncbn on the GPU: ") + cudaGetErrorString(status));
}

inline cudaStream_t ToStream(const Gpu& gpu) { return static_cast<cudaStream_t>(gpu.stream); }

// A launch by a function, not by <<<>>>, so that this is plain C++ (see tests/cuda_emulation).
template <typename... Parameters, typename... Arguments>
void Launch(const Gpu& gpu, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            const Arguments&... arguments) {
  const auto launch = [&](Parameters... parameters) {
    void* pointers[] = {static_cast<void*>(&parameters)...};
    Check(cudaLaunchKernel(kernel, grid, block, pointers, 0, ToStream(gpu)));
  };
  launch(arguments...);
}

// Device memory that a stream keeps from call to call, one piece per Use: kernels of one stream run
// one after the other, so they can share it.  It is allocated when it has to grow, never in the
// steady state.
enum class Use { kPartialSums, kTable, kSums, kCoefficients };
void* ScratchBytes(const Gpu& gpu, Use use, std::size_t bytes);
template <typename Element>
Element* Scratch(const Gpu& gpu, Use use, std::size_t size) {
  return static_cast<Element*>(ScratchBytes(gpu, use, size * sizeof(Element)));
}

// How many multiprocessors the device has.
int Multiprocessors(const Gpu& gpu);

constexpr int kThreads = 256;  // of every block

inline int64_t Ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A feature map: elements [outer][channels][inner].
struct Extent {
  int64_t outer, channels, inner;
  __host__ __device__ int64_t size() const { return outer * channels * inner; }
};

// What arithmetic is done in.
template <typename T>
struct WideOf {
  using Type = float;
};
template <>
struct WideOf<double> {
  using Type = double;
};
template <typename T>
using Wide = typename WideOf<T>::Type;

__device__ inline float ToWide(__half value) { return __half2float(value); }
__device__ inline float ToWide(float value) { return value; }
__device__ inline double ToWide(double value) { return value; }
__device__ inline void FromWide(float value, __half* to) { *to = __float2half_rn(value); }
__device__ inline void FromWide(float value, float* to) { *to = value; }
__device__ inline void FromWide(double value, double* to) { *to = value; }

// V elements that are read and written at once.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T element[V];
};

// The elements from `at` on, a multiple of V, of an array of `size`; those behind its end are 0.
template <typename T, int V>
__device__ Pack<T, V> Load(const T* from, int64_t at, int64_t size) {
  if (at + V <= size) return *reinterpret_cast<const Pack<T, V>*>(from + at);
  Pack<T, V> pack = {};
#pragma unroll
  for (int k = 0; k < V; ++k) {
    if (at + k < size) pack.element[k] = from[at + k];
  }
  return pack;
}

// How many elements fit an access of 16 bytes.
template <typename T>
constexpr int kPerAccess = 16 / static_cast<int>(sizeof(T));

inline bool Aligned(const void* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

}  // namespace gluon_syncbn
