// Which messages an all-reduce needs, and in which order contributions are merged: recursive
// doubling (Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in
// MPICH", 2005, section 4.5).
//
// In step k, neighbours at distance 2^k exchange what they have, the lower ranks' part first in the
// merge.  With 2^n ranks, n steps give every rank the total, all with the same bits: both sides of
// an exchange merge the same two vectors in the same order.  If the number of ranks is no power of
// two, the lowest ranks meet in pairs first: the even one gives its part to the odd one, and gets
// the total from it at the end.
#pragma once

#include <cstdint>
#include <vector>

namespace gluon_syncbn {

struct Step {
  enum class Kind {
    kGive,       // send to the peer
    kTake,       // receive from the peer and merge
    kSwap,       // send, receive and merge
    kGiveTotal,  // send the result
    kTakeTotal,  // receive the result
  };
  Kind kind;
  int peer;
  std::uint32_t number;  // the same for both sides

  bool sends() const {
    return kind == Kind::kGive || kind == Kind::kSwap || kind == Kind::kGiveTotal;
  }
  bool receives() const { return !(kind == Kind::kGive || kind == Kind::kGiveTotal); }
};

// The steps of one rank, in order.
inline std::vector<Step> RecursiveDoubling(int rank, int size) {
  int doubled = 1;
  while (doubled * 2 <= size) doubled *= 2;
  const int pairs = size - doubled;  // ranks below 2 * pairs meet in pairs
  constexpr std::uint32_t kTotal = 1000;
  std::vector<Step> steps;
  const bool paired = rank < 2 * pairs;
  if (paired && rank % 2 == 0) {
    return {{Step::Kind::kGive, rank + 1, 0}, {Step::Kind::kTakeTotal, rank + 1, kTotal}};
  }
  if (paired) steps.push_back({Step::Kind::kTake, rank - 1, 0});
  const int place = paired ? rank / 2 : rank - pairs;
  std::uint32_t number = 1;
  for (int distance = 1; distance < doubled; distance *= 2, ++number) {
    const int other = place ^ distance;
    steps.push_back({Step::Kind::kSwap, other < pairs ? 2 * other + 1 : other + pairs, number});
  }
  if (paired) steps.push_back({Step::Kind::kGiveTotal, rank - 1, kTotal});
  return steps;
}

}  // namespace gluon_syncbn
