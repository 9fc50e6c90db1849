// CUDA's runtime on a CPU: devices, their memory, their streams.
//
// It is used by our own CUDA code (cuda_runtime.h), and by MXNet's CUDA build as its
// libcudart.so.11.0.  To MXNet, the devices have no code for its kernels, like a GPU newer than the
// build.  It is as strict as a GPU:
//
// - Memory of a device is accessible only while a kernel or copy of this device runs: an access
// from
//   the host or from another device crashes.
// - A stream runs in a thread of its own, after the call has returned; EMULATED_JITTER
// (microseconds)
//   delays it by a random time.
// - A stream may be used only while its device is the current one of the thread.
// - A callback must not call CUDA.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>

#include "cuda_runtime.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace emulation {

bool backwards = false;

namespace {

constexpr int kMostDevices = 16;
int multiprocessors = 3;
std::atomic<long> allocations{0}, frees{0};
cudaError_t stream_status = cudaSuccess;  // passed to callbacks

int FromEnvironment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}
int Devices() {
  static const int count = std::min(kMostDevices, FromEnvironment("EMULATED_GPUS", 1));
  return count;
}

thread_local int current_device = 0;
thread_local bool in_callback = false;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t Result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Called at the beginning of every function.
void Enter(const char* name) {
  if (!in_callback) return;
  std::fprintf(stderr, "%s: a callback must not call CUDA\n", name);
  std::abort();
}

// The memory of a device.
class Memory {
 public:
  static constexpr std::size_t kSize = std::size_t(2) << 30;

  Memory() {
    base_ = static_cast<char*>(
        mmap(nullptr, kSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) std::abort();
    free_[0] = kSize;
  }
  bool Holds(const void* pointer) const {
    const char* p = static_cast<const char*>(pointer);
    return p >= base_ && p < base_ + kSize;
  }
  void Open() const { Protect(PROT_READ | PROT_WRITE); }
  void Close() const { Protect(PROT_NONE); }

  void* Take(std::size_t bytes) {
    bytes = std::max<std::size_t>(1, (bytes + 255) / 256) * 256;
    for (auto& [at, size] : free_) {
      if (size < bytes) continue;
      const std::size_t begin = at, rest = size - bytes;
      free_.erase(begin);
      if (rest != 0) free_[begin + bytes] = rest;
      taken_[begin] = bytes;
      used_ = std::max(used_, begin + bytes);
      Open();
      std::memset(base_ + begin, 0xff, bytes);  // NaN
      Close();
      return base_ + begin;
    }
    return nullptr;
  }
  bool Return(void* pointer) {
    const auto taken = taken_.find(static_cast<char*>(pointer) - base_);
    if (taken == taken_.end()) return false;
    auto [at, bytes] = *taken;
    taken_.erase(taken);
    const auto next = free_.find(at + bytes);
    if (next != free_.end()) {
      bytes += next->second;
      free_.erase(next);
    }
    const auto after = free_.lower_bound(at);
    if (after != free_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == at) {
        before->second += bytes;
        return true;
      }
    }
    free_[at] = bytes;
    return true;
  }

 private:
  void Protect(int how) const {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    if (mprotect(base_, (used_ + page - 1) / page * page, how) != 0) std::abort();
  }

  char* base_;
  std::size_t used_ = 0;
  std::map<std::size_t, std::size_t> free_, taken_;  // offset -> size
};

struct Machine {
  std::mutex mutex;  // guards the memory of all devices
  std::array<Memory, kMostDevices> memories;
};
// Never destroyed, like streams, whose threads run until the process ends.
Machine& TheMachine() {
  static Machine& machine = *new Machine;
  return machine;
}

// Runs `work` with the memory of `devices` accessible.
void With(const std::set<int>& devices, const std::function<void()>& work) {
  Machine& machine = TheMachine();
  const std::lock_guard<std::mutex> lock(machine.mutex);
  for (int d : devices) machine.memories[d].Open();
  work();
  for (int d : devices) machine.memories[d].Close();
}

std::set<int> Holding(std::initializer_list<const void*> pointers) {
  std::set<int> devices;
  for (const void* p : pointers) {
    for (int d = 0; d < kMostDevices; ++d) {
      if (TheMachine().memories[d].Holds(p)) devices.insert(d);
    }
  }
  return devices;
}

class Stream {
 public:
  explicit Stream(int device) : device(device) {
    std::thread([this] { Serve(); }).detach();
  }
  const int device;

  void Push(std::function<void()> work) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      work_.push_back(std::move(work));
    }
    changed_.notify_all();
  }
  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return work_.empty(); });
  }

 private:
  [[noreturn]] void Serve() {
    std::minstd_rand random(std::random_device{}());
    const int jitter = FromEnvironment("EMULATED_JITTER", 0);
    current_device = device;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return !work_.empty(); });
      const auto work = work_.front();
      lock.unlock();
      if (jitter > 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % jitter));
      work();
      lock.lock();
      work_.pop_front();
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;  // the first one is running
};

// The streams of all devices, including destroyed ones, which stay idle.
struct Streams {
  std::mutex mutex;
  std::vector<Stream*> all;
};
Streams& AllStreams() {
  static Streams& streams = *new Streams;
  return streams;
}
Stream* NewStream(int device) {
  auto* const stream = new Stream(device);
  const std::lock_guard<std::mutex> lock(AllStreams().mutex);
  AllStreams().all.push_back(stream);
  return stream;
}
void WaitForAll(int device) {
  std::vector<Stream*> streams;
  {
    const std::lock_guard<std::mutex> lock(AllStreams().mutex);
    streams = AllStreams().all;
  }
  for (Stream* s : streams) {
    if (s->device == device) s->Wait();
  }
}

// The stream of a handle; null for the legacy stream, which waits for all others.
Stream* Find(cudaStream_t handle) {
  if (handle == cudaStreamPerThread) {
    static thread_local std::map<int, Stream*> mine;
    Stream*& stream = mine[current_device];
    if (stream == nullptr) stream = NewStream(current_device);
    return stream;
  }
  return reinterpret_cast<std::uintptr_t>(handle) < 2 ? nullptr : reinterpret_cast<Stream*>(handle);
}

cudaError_t Push(cudaStream_t handle, std::function<void()> work) {
  Stream* const stream = Find(handle);
  if (stream == nullptr) {
    WaitForAll(current_device);
    work();
    return cudaSuccess;
  }
  if (stream->device != current_device) return Result(cudaErrorInvalidResourceHandle);
  stream->Push(std::move(work));
  return cudaSuccess;
}

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  long recorded = 0, reached = 0;
};

struct Launch {
  dim3 grid, block;
  std::size_t shared;
  void* stream;
};
thread_local std::vector<Launch> launches;

}  // namespace

cudaError_t Queue(cudaStream_t stream, std::function<void()> kernel) {
  Enter("cudaLaunchKernel");
  const int device = current_device;
  return Push(stream, [=] { With({device}, kernel); });
}

}  // namespace emulation

using namespace emulation;

// --- used by our code and by MXNet

EXPORT const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotSupported:
      return "operation not supported";
  }
  return "unknown error";
}

EXPORT cudaError_t cudaGetDevice(int* device) {
  Enter(__func__);
  *device = current_device;
  return cudaSuccess;
}

EXPORT cudaError_t cudaSetDevice(int device) {
  Enter(__func__);
  if (device < 0 || device >= Devices()) return Result(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  Enter(__func__);
  if (device < 0 || device >= Devices()) return Result(cudaErrorInvalidDevice);
  switch (static_cast<int>(which)) {
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      break;
    case 75:  // compute capability, major: Hopper
      *value = 9;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                                 std::size_t) {
  Enter(__func__);
  *blocks = 2;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMalloc(void** pointer, std::size_t bytes) {
  Enter(__func__);
  Machine& machine = TheMachine();
  const std::lock_guard<std::mutex> lock(machine.mutex);
  ++allocations;
  *pointer = machine.memories[current_device].Take(bytes);
  return Result(*pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess);
}

EXPORT cudaError_t cudaFree(void* pointer) {
  Enter(__func__);
  if (pointer == nullptr) return cudaSuccess;
  ++frees;
  for (int d : Holding({pointer})) {
    WaitForAll(d);
    Machine& machine = TheMachine();
    const std::lock_guard<std::mutex> lock(machine.mutex);
    if (machine.memories[d].Return(pointer)) return cudaSuccess;
  }
  return Result(cudaErrorInvalidValue);
}

EXPORT cudaError_t cudaHostAlloc(void** pointer, std::size_t bytes, unsigned) {
  Enter(__func__);
  ++allocations;
  *pointer = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*pointer, 0xff, bytes);  // NaN
  return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void* pointer) {
  Enter(__func__);
  std::free(pointer);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                                   cudaStream_t stream) {
  Enter(__func__);
  return Push(stream, [=] { With(Holding({to, from}), [=] { std::memmove(to, from, bytes); }); });
}

EXPORT cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  Enter(__func__);
  return Push(stream, [=] { With(Holding({to}), [=] { std::memset(to, value, bytes); }); });
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Enter(__func__);
  if (Stream* const stream = Find(handle)) {
    stream->Wait();
  } else {
    WaitForAll(current_device);
  }
  return cudaSuccess;
}

EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t function,
                                         void* data, unsigned) {
  Enter(__func__);
  return Push(handle, [=] {
    in_callback = true;
    function(handle, stream_status, data);
    in_callback = false;
  });
}

// --- used by MXNet only

EXPORT const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
EXPORT cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }

EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  Enter(__func__);
  *count = Devices();
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = 11020;
  return cudaSuccess;
}
// Sets the fields that MXNet reads, at their offsets in CUDA 11.
EXPORT cudaError_t cudaGetDeviceProperties(void* properties, int device) {
  Enter(__func__);
  if (device < 0 || device >= Devices()) return Result(cudaErrorInvalidDevice);
  char* const p = static_cast<char*>(properties);
  const auto set = [p](std::size_t at, auto value) { std::memcpy(p + at, &value, sizeof value); };
  std::strcpy(p, "emulated");
  set(288, Memory::kSize);          // totalGlobalMem
  set(296, std::size_t(48) << 10);  // sharedMemPerBlock
  set(308, 32);                     // warpSize
  set(320, 1024);                   // maxThreadsPerBlock
  set(336, 0x7fffffff);             // maxGridSize
  set(340, 65535);
  set(344, 65535);
  set(360, 9);  // major
  set(364, 0);  // minor
  set(388, multiprocessors);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  Enter(__func__);
  *free = *total = Memory::kSize;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() {
  Enter(__func__);
  WaitForAll(current_device);
  return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, std::size_t bytes,
                                       cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}
EXPORT cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from,
                                     std::size_t from_pitch, std::size_t width, std::size_t height,
                                     cudaMemcpyKind, cudaStream_t stream) {
  Enter(__func__);
  return Push(stream, [=] {
    With(Holding({to, from}), [=] {
      for (std::size_t i = 0; i < height; ++i) {
        std::memmove(static_cast<char*>(to) + i * to_pitch,
                     static_cast<const char*>(from) + i * from_pitch, width);
      }
    });
  });
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  Enter(__func__);
  *stream = reinterpret_cast<cudaStream_t>(NewStream(current_device));
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t handle) { return cudaStreamSynchronize(handle); }

EXPORT cudaError_t cudaEventCreateWithFlags(Event** event, unsigned) {
  Enter(__func__);
  *event = new Event;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventDestroy(Event*) {
  return cudaSuccess;
}  // a stream may still wait for it
EXPORT cudaError_t cudaEventRecord(Event* event, cudaStream_t stream) {
  Enter(__func__);
  long mine;
  {
    const std::lock_guard<std::mutex> lock(event->mutex);
    mine = ++event->recorded;
  }
  return Push(stream, [=] {
    {
      const std::lock_guard<std::mutex> lock(event->mutex);
      event->reached = std::max(event->reached, mine);
    }
    event->changed.notify_all();
  });
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, Event* event, unsigned) {
  Enter(__func__);
  long wanted;
  {
    const std::lock_guard<std::mutex> lock(event->mutex);
    wanted = event->recorded;
  }
  return Push(stream, [=] {
    std::unique_lock<std::mutex> lock(event->mutex);
    event->changed.wait(lock, [=] { return event->reached >= wanted; });
  });
}

// MXNet's kernels can be registered, but not launched.
EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT char __cudaInitModule(void**) { return 0; }
EXPORT void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*,
                                   void*, void*, int*) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared,
                                            void* stream) {
  launches.push_back({grid, block, shared, stream});
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared,
                                              void** stream) {
  const Launch launch = launches.back();
  launches.pop_back();
  *grid = launch.grid;
  *block = launch.block;
  *shared = launch.shared;
  *stream = launch.stream;
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, std::size_t, void*) {
  Enter(__func__);
  return Result(cudaErrorNoKernelImageForDevice);
}

#define NOT_SUPPORTED(name) \
  EXPORT cudaError_t name() { return Result(cudaErrorNotSupported); }
NOT_SUPPORTED(cudaDeviceEnablePeerAccess)
NOT_SUPPORTED(cudaDeviceGetP2PAttribute)
NOT_SUPPORTED(cudaFuncGetAttributes)
NOT_SUPPORTED(cudaGraphDestroy)
NOT_SUPPORTED(cudaGraphExecDestroy)
NOT_SUPPORTED(cudaGraphExecUpdate)
NOT_SUPPORTED(cudaGraphGetNodes)
NOT_SUPPORTED(cudaGraphInstantiate)
NOT_SUPPORTED(cudaGraphLaunch)
NOT_SUPPORTED(cudaGraphMemcpyNodeGetParams)
NOT_SUPPORTED(cudaGraphMemsetNodeGetParams)
NOT_SUPPORTED(cudaMallocPitch)
NOT_SUPPORTED(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)
NOT_SUPPORTED(cudaStreamBeginCapture)
NOT_SUPPORTED(cudaStreamEndCapture)

// --- set and read by tests

EXPORT void Emulate(int multiprocessors, int backwards) {
  emulation::multiprocessors = multiprocessors;
  emulation::backwards = backwards != 0;
}
EXPORT long EmulatedAllocations() { return allocations; }
EXPORT long EmulatedFrees() { return frees; }
EXPORT void EmulateFailure(int failed) {
  stream_status = failed != 0 ? cudaErrorInvalidConfiguration : cudaSuccess;
}
