// As much of CUDA as our .cu files need to run on a CPU, to test them without a GPU.
//
// The threads of a block are coroutines that switch at __syncthreads; blocks run one after the
// other. That finds wrong indices, missing barriers (when run in both orders of threads) and
// barriers that not all threads reach.  It tests neither speed nor a GPU's memory model nor its
// compiler. runtime.cc has devices, their memory and their streams.
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
#include <tuple>
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

// The values are CUDA's, because MXNet uses some of them.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotSupported = 801,
};
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
constexpr unsigned cudaHostAllocPortable = 1;
using cudaStream_t = struct CUstream_st*;
using cudaStreamCallback_t = void (*)(cudaStream_t, cudaError_t, void*);
inline const cudaStream_t cudaStreamPerThread = reinterpret_cast<cudaStream_t>(2);

#pragma GCC visibility push(default)
extern "C" {
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                          int threads, std::size_t shared);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device);
cudaError_t cudaMalloc(void** pointer, std::size_t bytes);
cudaError_t cudaFree(void* pointer);
cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned flags);
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data,
                                  unsigned flags);
}

namespace emulation {
// Queues a kernel; no other kernel or copy runs at the same time.
cudaError_t Queue(cudaStream_t stream, std::function<void()> kernel);
extern bool backwards;  // the order in which the threads of a block run
}  // namespace emulation
#pragma GCC visibility pop

namespace emulation {

// A block, whose threads run until all have reached the same barrier, or have ended.
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
        std::fprintf(stderr, "__syncthreads: only some threads of the block reached it\n");
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
// Never destroyed, because streams may still be running when the process ends.
inline Block& TheBlock() {
  static Block& block = *new Block;
  return block;
}
inline void Block::Enter() {
  Block& block = TheBlock();
  (*block.body_)();
  block.current_->ended = true;
}

template <typename... Parameters, std::size_t... I>
std::tuple<Parameters...> CopyOf(void** arguments, std::index_sequence<I...>) {
  return {*static_cast<Parameters*>(arguments[I])...};
}

}  // namespace emulation

inline void __syncthreads() { emulation::TheBlock().Synchronize(); }

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 threads,
                             void** arguments, std::size_t, cudaStream_t stream) {
  if (grid.x == 0 || grid.x > 0x7fffffff || grid.y == 0 || grid.y > 65535 ||
      threads.x * threads.y == 0 || threads.x * threads.y > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const auto copies =
      emulation::CopyOf<Parameters...>(arguments, std::index_sequence_for<Parameters...>());
  return emulation::Queue(stream, [=] {
    gridDim = grid;
    blockDim = threads;
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y);
        emulation::TheBlock().Run(threads, [&] { std::apply(kernel, copies); });
      }
    }
  });
}
