// So much of CUDA that our .cu files run on a CPU, to test them where there is no GPU.
//
// The threads of a block are coroutines that change places at __syncthreads; blocks run one after
// the other.  That finds wrong indices, missing barriers (run it in both orders) and barriers that
// not all threads reach.  It says nothing of speed, of a GPU's memory order or of its compiler.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define CUDART_CB

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

inline int multiprocessors = 3;
inline bool backwards = false;  // the order in which the threads of a block run
inline long allocations = 0;

// A block: its threads run until all have come to the same barrier, or have ended.
class Block {
 public:
  void Run(dim3 block, const std::function<void()>& body) {
    const std::size_t count = std::size_t(block.x) * block.y * block.z;
    while (threads_.size() < count) threads_.push_back(std::make_unique<Thread>());
    body_ = &body;
    for (std::size_t i = 0; i < count; ++i) {
      Thread& t = *threads_[i];
      t.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
      t.ended = false;
      getcontext(&t.context);
      t.context.uc_stack = {t.stack.data(), 0, t.stack.size()};
      t.context.uc_link = &scheduler_;
      makecontext(&t.context, &Block::Enter, 0);
    }
    for (std::size_t ended = 0; ended < count;) {
      ended = 0;
      for (std::size_t i = 0; i < count; ++i) {
        current_ = threads_[backwards ? count - 1 - i : i].get();
        threadIdx = current_->index;
        swapcontext(&scheduler_, &current_->context);
        if (current_->ended) ++ended;
      }
      if (ended != 0 && ended != count) {
        std::fprintf(stderr, "__syncthreads: only some threads of the block came\n");
        std::abort();
      }
    }
  }
  void Synchronize() { swapcontext(&current_->context, &scheduler_); }

 private:
  struct Thread {
    ucontext_t context;
    dim3 index;
    bool ended;
    std::vector<char> stack = std::vector<char>(64 << 10);
  };
  static void Enter();

  ucontext_t scheduler_;
  std::vector<std::unique_ptr<Thread>> threads_;
  Thread* current_ = nullptr;
  const std::function<void()>* body_ = nullptr;
};
inline Block block;
inline void Block::Enter() {
  (*block.body_)();
  block.current_->ended = true;
}

template <typename... Parameters, std::size_t... I>
void Call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<Parameters*>(arguments[I])...);
}

}  // namespace emulation

inline void __syncthreads() { emulation::block.Synchronize(); }

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorInvalidDevice };
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
constexpr unsigned cudaHostAllocPortable = 1;
using cudaStream_t = struct CUstream_st*;
inline const cudaStream_t cudaStreamPerThread = reinterpret_cast<cudaStream_t>(2);

namespace emulation {
inline cudaError_t stream_status = cudaSuccess;  // what callbacks are told
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid configuration";
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulation::multiprocessors;
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads,
                             void** arguments, std::size_t, cudaStream_t) {
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 ||
      threads.x * threads.y == 0 || threads.x * threads.y > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = threads;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      emulation::block.Run(threads, [=] {
        emulation::Call(kernel, arguments, std::index_sequence_for<Parameters...>());
      });
    }
  }
  return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  ++emulation::allocations;
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*pointer, 0xff, bytes);  // NaN
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
inline cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned) {
  return cudaMalloc(pointer, bytes);
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memmove(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamAddCallback(cudaStream_t stream,
                                         void (*function)(cudaStream_t, cudaError_t, void*),
                                         void* data, unsigned) {
  function(stream, emulation::stream_status, data);
  return cudaSuccess;
}
