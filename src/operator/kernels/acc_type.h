// The types in which the kernels calculate, on every device.
//
// Types only, no code: this header is also compiled for several instruction sets (cpu/loops.inc).
#pragma once

namespace gluon_syncbn {

// The accumulator type of elements of type T: arithmetic on single elements, and the parameters of
// a layer with such data (gamma, beta, the moving statistics), are of this type.
template <typename T>
struct AccTypeOf {
  using Type = float;
};
template <>
struct AccTypeOf<double> {
  using Type = double;
};
template <typename T>
using AccType = typename AccTypeOf<T>::Type;

}  // namespace gluon_syncbn
