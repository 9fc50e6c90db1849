// See mkldnn_arrays.h.
//
// What is assumed, and how Verify (below) verifies it:
//
// - Functions: MXNet's library exports them, though no header declares them.  The references are
//   weak, so that our library loads without them as well; none may be missing.
// - NDArray is as its header has it, private members included (the compiler reads the header).
// - MKLDNNMemory is {shared_ptr<memory>, memory descriptor, size in bytes}, MkldnnMemory here.
//   Arrays are given descriptors, which must be found in it.
// - Descriptors mean what MKL-DNN's headers say, and LayoutOf reads them correctly: MXNet reorders
//   arrays of known numbers from each layout to the plain one, and back.
#include "adapter/mkldnn_arrays.h"

#include <dmlc/parameter.h>
#include <mxnet/c_api.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <thread>

#include "adapter/operator_util.h"

namespace gluon_syncbn {

using mxnet::NDArray;
using CppDescriptor = dnnl::memory::desc;

// Functions of MXNet's library.  A member function takes `this` as its first argument.
#define IN_MXNET(symbol) __asm__(symbol) __attribute__((weak))
namespace in_mxnet {
bool ChunkIsMkldnn(const void* chunk) IN_MXNET("_ZNK5mxnet7NDArray5Chunk8IsMKLDNNEv");
const dnnl::memory* GetMkldnnData(const NDArray* array)
    IN_MXNET("_ZNK5mxnet7NDArray13GetMKLDNNDataEv");
dnnl::memory* CreateMkldnnData(NDArray* array, const CppDescriptor& descriptor)
    IN_MXNET("_ZN5mxnet7NDArray16CreateMKLDNNDataERKN4dnnl6memory4descE");
void InvalidateMkldnnData(NDArray* array) IN_MXNET("_ZN5mxnet7NDArray20InvalidateMKLDNNDataEv");
NDArray Reorder2Default(const NDArray* array) IN_MXNET("_ZNK5mxnet7NDArray15Reorder2DefaultEv");
void CopyFrom(NDArray* array, const dnnl::memory& memory)
    IN_MXNET("_ZN5mxnet7NDArray8CopyFromERKN4dnnl6memoryE");
void* StreamOfThisThread() IN_MXNET("_ZN5mxnet12MKLDNNStream3GetEv");
void Submit(void* stream, bool clean_up) IN_MXNET("_ZN5mxnet12MKLDNNStream6SubmitEb");
void FallBackCompute(LegacyFunction function, const mxnet::OpStatePtr& state,
                     const mxnet::OpContext& ctx, const std::vector<NDArray>& inputs,
                     const std::vector<mxnet::OpReqType>& req, const std::vector<NDArray>& outputs)
    IN_MXNET(
        "_ZN5mxnet15FallBackComputeIPFvRKNS_10OpStatePtrERKNS_9OpContextERKSt6vectorINS_"
        "5TBlobESaIS8_EERKS7_INS_9OpReqTypeESaISD_EESC_ES1_EEvT_RKT0_S6_RKS7_INS_"
        "7NDArrayESaISO_EESH_SS_");
}  // namespace in_mxnet
#undef IN_MXNET

namespace {

using namespace in_mxnet;
using Descriptor = dnnl_memory_desc_t;

// mxnet::MKLDNNMemory.
struct MkldnnMemory {
  std::shared_ptr<dnnl::memory> memory;
  Descriptor descriptor;
  std::size_t bytes;
};

// ChunkOf(array) is *array.ptr_, which is private: access is not checked where a template is
// instantiated explicitly.
const auto& ChunkOf(const NDArray& array);
template <auto Pointer>
struct AccessToChunk {
  friend const auto& ChunkOf(const NDArray& array) { return *(array.*Pointer); }
};
template struct AccessToChunk<&NDArray::ptr_>;

const MkldnnMemory* MemoryOf(const NDArray& array) {
  return reinterpret_cast<const MkldnnMemory*>(ChunkOf(array).mkl_mem_.get());
}

// The descriptor that MKL-DNN gives a map of float32 numbers; `block`: as in MapLayout, 1 is plain.
Descriptor ToDescriptor(const std::vector<std::int64_t>& shape, std::int64_t block) {
  Descriptor d;
  std::memset(&d, 0, sizeof(d));
  d.ndims = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), d.dims);
  std::copy(shape.begin(), shape.end(), d.padded_dims);
  d.data_type = dnnl_f32;
  d.format_kind = dnnl_blocked;
  dnnl_blocking_desc_t& blocking = d.format_desc.blocking;
  const bool channels_last = block == shape[1];
  if (!channels_last && block > 1) {
    blocking.inner_nblks = 1;
    blocking.inner_blks[0] = block;
    blocking.inner_idxs[0] = 1;
  }
  std::int64_t stride = block;
  for (int i = d.ndims - 1; i >= 2; --i) {
    blocking.strides[i] = stride;
    stride *= shape[i];
  }
  blocking.strides[1] = channels_last ? 1 : stride;
  blocking.strides[0] = stride * (shape[1] / block);
  return d;
}

// The block of a descriptor, or 0 if it is none that we understand.
std::size_t BlockOf(const Descriptor& d) {
  if (d.ndims < 3 || d.ndims > 5 || d.data_type != dnnl_f32 || d.format_kind != dnnl_blocked ||
      d.offset0 != 0 || d.extra.flags != 0) {
    return 0;
  }
  const dnnl_blocking_desc_t& blocking = d.format_desc.blocking;
  for (int i = 0; i < d.ndims; ++i) {
    if (d.dims[i] <= 0 || d.padded_dims[i] != d.dims[i] || d.padded_offsets[i] != 0) return 0;
  }
  std::int64_t block = d.dims[1];
  if (blocking.inner_nblks == 1 && blocking.inner_idxs[0] == 1) {
    block = blocking.inner_blks[0];
    if (block < 2 || d.dims[1] % block != 0) return 0;
  } else if (blocking.inner_nblks != 0) {
    return 0;
  }
  const Descriptor expected =
      ToDescriptor(std::vector<std::int64_t>(d.dims, d.dims + d.ndims), block);
  for (int i = 0; i < d.ndims; ++i) {
    // The stride of a single index says nothing, nor that of a single block.
    const std::int64_t indices =
        i == 1 && blocking.inner_nblks == 1 ? d.dims[1] / block : d.dims[i];
    if (indices > 1 && blocking.strides[i] != expected.format_desc.blocking.strides[i]) return 0;
  }
  return static_cast<std::size_t>(block);
}

// An array that MXNet's C API has made: create(&handle) returns its status.
template <typename Create>
NDArray Made(const Create& create) {
  NDArrayHandle handle = nullptr;
  if (create(&handle) != 0) throw dmlc::Error(MXGetLastError());
  const NDArray array = *static_cast<NDArray*>(handle);
  MXNDArrayFree(handle);
  return array;
}

NDArray NewArray(const mxnet::TShape& shape, const mxnet::Context& context) {
  const std::vector<mx_uint> sizes(shape.begin(), shape.end());
  constexpr int kAllocateNow = 0;
  return Made([&](NDArrayHandle* handle) {
    return MXNDArrayCreateEx(sizes.data(), static_cast<mx_uint>(sizes.size()), context.dev_type,
                             context.dev_id, kAllocateNow, mshadow::kFloat32, handle);
  });
}

}  // namespace

bool InMkldnnLayout(const NDArray& array) {
  const auto& chunk = ChunkOf(array);
  return chunk.mkl_mem_ != nullptr && ChunkIsMkldnn(&chunk);
}

std::optional<MapLayout> LayoutOf(const NDArray& map) {
  if (map.dtype() != mshadow::kFloat32 || !InMkldnnLayout(map) || map.IsView()) return {};
  const Descriptor& descriptor = MemoryOf(map)->descriptor;
  const mxnet::TShape& shape = map.shape();
  if (descriptor.ndims != shape.ndim() ||
      !std::equal(shape.begin(), shape.end(), descriptor.dims)) {
    return {};
  }
  const std::size_t block = BlockOf(descriptor);
  if (block == 0) return {};
  return MapLayout{block};
}

mxnet::TBlob RawBlob(const NDArray& map) {
  return mxnet::TBlob(ChunkOf(map).shandle.dptr, map.shape(), map.ctx().dev_mask(), map.dtype(),
                      map.ctx().dev_id);
}

bool TakeLayout(const NDArray& array, const NDArray& like) {
  auto& target = const_cast<NDArray&>(array);
  return CreateMkldnnData(&target, CppDescriptor(MemoryOf(like)->descriptor)) != nullptr;
}

NDArray Reordered(const NDArray& map, const NDArray& like) {
  NDArray source = map;
  if (InMkldnnLayout(source) && source.IsView()) source = Reorder2Default(&map);
  NDArray result = NewArray(map.shape(), map.ctx());
  TakeLayout(result, like);
  CopyFrom(&result, *GetMkldnnData(&source));
  EndMkldnnCall();
  return result;
}

void EndMkldnnCall() { Submit(StreamOfThisThread(), true); }

void RunOnPlainArrays(LegacyFunction function, const mxnet::OpStatePtr& state,
                      const mxnet::OpContext& ctx, const std::vector<NDArray>& inputs,
                      const std::vector<mxnet::OpReqType>& req,
                      const std::vector<NDArray>& outputs) {
  FallBackCompute(function, state, ctx, inputs, req, outputs);
}

namespace {

// Whether a test asks for a wrong expectation of this kind, which the checks must not find
// fulfilled.
bool Corrupt(const char* expectation) {
  static const std::string asked = dmlc::GetEnv("GLUON_SYNCBN_CORRUPT_EXPECTATION", std::string());
  return asked == expectation;
}

// Throws what is different, if it is.
void Check(bool as_assumed, const char* what) {
  if (as_assumed) return;
  throw dmlc::Error(std::string("this MXNet differs from what is known of it: ") + what);
}

// The element of the plain map at each place of a blocked one.
std::vector<float> Blocked(const mxnet::TShape& shape, std::int64_t block) {
  std::int64_t positions = 1;
  for (int i = 2; i < shape.ndim(); ++i) positions *= shape[i];
  std::vector<float> numbers;
  for (std::int64_t n = 0; n < shape[0]; ++n) {
    for (std::int64_t first = 0; first < shape[1]; first += block) {
      for (std::int64_t position = 0; position < positions; ++position) {
        for (std::int64_t c = first; c < first + block; ++c) {
          numbers.push_back(static_cast<float>((n * shape[1] + c) * positions + position));
        }
      }
    }
  }
  return numbers;
}

bool Holds(const NDArray& array, const std::vector<float>& numbers) {
  return std::memcmp(ChunkOf(array).shandle.dptr, numbers.data(), numbers.size() * sizeof(float)) ==
         0;
}

// Verifies one layout.  The arrays that this makes are returned: see Verify.
std::vector<NDArray> VerifyLayout(const mxnet::TShape& shape, std::int64_t block) {
  const auto context = mxnet::Context::CPU();
  const std::vector<std::int64_t> sizes(shape.begin(), shape.end());
  const Descriptor descriptor = ToDescriptor(sizes, block);
  const std::vector<float> blocked = Blocked(shape, block);
  std::vector<float> plain = Blocked(shape, 1);
  if (Corrupt("numbers")) std::swap(plain[1], plain[2]);
  const std::size_t bytes = plain.size() * sizeof(float);

  NDArray array = NewArray(shape, context);
  Check(ChunkOf(array).shandle.dptr == array.data().dptr_ && ChunkOf(array).shandle.size >= bytes,
        "the memory of an array");
  Check(!InMkldnnLayout(array) && !LayoutOf(array) && !array.IsView(), "a plain array");

  Check(CreateMkldnnData(&array, CppDescriptor(descriptor)) != nullptr, "giving a layout");
  Check(InMkldnnLayout(array), "being in a layout");
  const MkldnnMemory* memory = MemoryOf(array);
  Check(memory->memory != nullptr && memory->bytes == bytes + Corrupt("bytes"),
        "the size in MKLDNNMemory");
  Descriptor expected = descriptor;
  expected.dims[0] += Corrupt("descriptor");
  Check(std::memcmp(&memory->descriptor, &expected, sizeof(expected)) == 0,
        "the descriptor in MKLDNNMemory");
  const auto layout = LayoutOf(array);
  Check(layout && layout->block == static_cast<std::size_t>(block), "the block of a layout");

  std::memcpy(ChunkOf(array).shandle.dptr, blocked.data(), bytes);
  NDArray reordered = Reorder2Default(&array);
  Check(!InMkldnnLayout(reordered) && Holds(reordered, plain), "reordering to plain");
  Check(Holds(array, blocked), "what is reordered");
  NDArray back = Reordered(reordered, array);
  Check(LayoutOf(back) == layout && Holds(back, blocked), "reordering from plain");

  const NDArray view =
      Made([&](NDArrayHandle* handle) { return MXNDArraySlice(&array, 0, 1, handle); });
  Check(view.IsView() && InMkldnnLayout(view) && !LayoutOf(view), "a view");

  InvalidateMkldnnData(&array);
  Check(!InMkldnnLayout(array) && array.data().dptr_ == ChunkOf(array).shandle.dptr,
        "taking a layout back");
  return {array, reordered, back};
}

void Verify() {
  int version = 0;
  MXGetVersion(&version);
  Check(version == 10901 + Corrupt("version"), "its version");
  Check(ChunkIsMkldnn != nullptr && GetMkldnnData != nullptr && CreateMkldnnData != nullptr &&
            InvalidateMkldnnData != nullptr && Reorder2Default != nullptr && CopyFrom != nullptr &&
            StreamOfThisThread != nullptr && Submit != nullptr && FallBackCompute != nullptr,
        "the functions of MXNet's library");
  // Freeing an array starts MXNet's worker threads, which importing a package should not do, and
  // when the process ends, the engine that frees it may have gone: the few arrays of these checks
  // are never destroyed.
  static union Kept {
    std::vector<NDArray> arrays;
    Kept() : arrays() {}
    ~Kept() {}
  } kept;
  for (const std::int64_t block : {8, 16, 32}) {  // 32: channels last
    for (const auto& shape : {mxnet::TShape({2, 32, 3}), mxnet::TShape({2, 32, 3, 5}),
                              mxnet::TShape({2, 32, 3, 5, 2})}) {
      const auto made = VerifyLayout(shape, block);
      kept.arrays.insert(kept.arrays.end(), made.begin(), made.end());
    }
  }
}

}  // namespace

void VerifyMkldnnArrays() {
  if (!dmlc::GetEnv("GLUON_SYNCBN_MKLDNN_LAYOUTS", true)) {
    throw dmlc::Error("GLUON_SYNCBN_MKLDNN_LAYOUTS=0 switches them off");
  }
  if (!dmlc::GetEnv("MXNET_MKLDNN_ENABLED", true)) {
    throw dmlc::Error("MXNET_MKLDNN_ENABLED=0 switches MKL-DNN off");
  }
  // In a thread of its own, which leaves no OpenMP team and no stream behind in the caller's.
  std::exception_ptr failure;
  std::thread([&] {
    omp_set_num_threads(1);
    try {
      Verify();
    } catch (...) {
      failure = std::current_exception();
    }
  }).join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace gluon_syncbn
