// Large pages for large results.
//
// The C library gives memory of more than 32 MB back to the system each time it is freed, so a
// large output of a layer lies in fresh memory at every step, and the system maps and clears it
// page by page while the kernel writes it: that takes longer than the kernel.  Pages of 2 MB make
// it 512 times fewer.  NumPy does the same for its arrays.
#pragma once

#include <mxnet/base.h>

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gluon_syncbn {

// Call before writing a result.  It is advice; that it may fail does not matter.
inline void PreferHugePages([[maybe_unused]] const mxnet::TBlob& result) {
#if defined(__linux__)
  if (result.dev_mask() != mxnet::cpu::kDevMask || result.dptr_ == nullptr) return;
  constexpr std::size_t kLeast = 4u << 20, kPage = 4096;
  const std::size_t bytes = result.Size() * mshadow::mshadow_sizeof(result.type_flag_);
  if (bytes < kLeast) return;
  const auto address = reinterpret_cast<std::uintptr_t>(result.dptr_);
  const std::uintptr_t first = (address + kPage - 1) / kPage * kPage;
  const std::uintptr_t last = (address + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace gluon_syncbn
