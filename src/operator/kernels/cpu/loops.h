// The inner loops of the CPU kernels: what happens to one tile of a feature map.
//
// They are compiled once per instruction set (kernels/cpu/loops_*.cc, all from
// kernels/cpu/loops.inc), and one set of them is chosen when the library is loaded, so that one
// binary runs at the speed of memory on every x86-64.  Nothing here may have code of its own with
// external linkage; see kernels/cpu/loops.inc.
#pragma once

#include <cstddef>

#include "kernels/acc_type.h"
#include "kernels/cpu/float16.h"

namespace gluon_syncbn {

// A part of a feature map: `outer` runs of channels * inner contiguous elements, the first at
// `offset`, the next `stride` elements on.
struct FeatureTile {
  std::size_t offset;
  std::size_t rows;
  std::size_t stride;
  std::size_t first_column;
  std::size_t columns;
  std::size_t inner;
};

// Per channel: (x - mean) * scale + shift.
template <typename Acc>
struct Affine {
  const Acc* mean;
  const Acc* scale;
  const Acc* shift;
};

template <typename T>
struct CpuLoops {
  // Per column of the tile, in float64: sum(d) and sum(d^2), where d is the distance from the
  // column's first element.
  void (*moments)(const FeatureTile& tile, const T* x, double* sums, double* squares);
  // Per column of the tile, in float64: sum(dy) and sum(dy * (x - about)); `about` has a number for
  // every column of the map.
  void (*products)(const FeatureTile& tile, const AccType<T>* about, const T* dy, const T* x,
                   double* sums, double* products);
  // y = (x - mean) * scale + shift, or y += ...; y may be x.
  void (*affine)(const FeatureTile& tile, const Affine<AccType<T>>& affine, const T* x, T* y,
                 bool add);
  // dx = factor * dy + (x - mean) * scale + shift, or dx += ...; dx may be dy.
  void (*combine)(const FeatureTile& tile, const Affine<AccType<T>>& affine,
                  const AccType<T>* factor, const T* dy, const T* x, T* dx, bool add);
};

struct CpuLoopSet {
  CpuLoops<Float16> float16;
  CpuLoops<float> float32;
  CpuLoops<double> float64;
};

extern const CpuLoopSet kBaselineLoops;
#if GLUON_SYNCBN_X86_LOOPS
extern const CpuLoopSet kAvx2Loops;
extern const CpuLoopSet kAvx512Loops;
#endif

}  // namespace gluon_syncbn
