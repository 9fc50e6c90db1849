// The layout of the feature maps of a call, handed to the operator by the thread that calls it.
//
// MXNet's interface of our operators, mxnet::Operator, knows plain arrays only.  A call whose maps
// are in a layout of MKL-DNN's (mkldnn_dispatch.cc) passes their memory as it is, in blobs with the
// shape that the maps have for users, and says here how the elements lie in it.
#pragma once

#include <cstddef>

namespace gluon_syncbn {

// Blocks of so many adjacent channels: [batch][channels / block][position][block].  A block of all
// channels is channels last.
struct MapLayout {
  std::size_t block;
};
inline bool operator==(const MapLayout& a, const MapLayout& b) { return a.block == b.block; }
inline bool operator!=(const MapLayout& a, const MapLayout& b) { return !(a == b); }

// Thrown in such a call by an operator that cannot use the layout, before it has done anything.
struct LayoutDeclined {};

// While it lives, the operators that this thread runs find their maps in `layout`.
class LayoutOfCall {
 public:
  explicit LayoutOfCall(const MapLayout& layout) : layout_(layout), outer_(Current()) {
    Current() = this;
  }
  ~LayoutOfCall() { Current() = outer_; }
  LayoutOfCall(const LayoutOfCall&) = delete;
  LayoutOfCall& operator=(const LayoutOfCall&) = delete;

  // Null: the maps are plain arrays.
  static const MapLayout* Get() { return Current() == nullptr ? nullptr : &Current()->layout_; }

 private:
  static LayoutOfCall*& Current() {
    static thread_local LayoutOfCall* current = nullptr;
    return current;
  }

  const MapLayout layout_;
  LayoutOfCall* const outer_;
};

}  // namespace gluon_syncbn
