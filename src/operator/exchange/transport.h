// What carries a round of the exchange on to other processes.
//
// A key may have a transport.  When all participants in this process have arrived, their merged
// values go through it, and what it brings back is the round's result.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "exchange/merge.h"

namespace gluon_syncbn {

// What this process contributes to a round.
struct Contribution {
  std::string key;
  int call = 0;
  bool backward = false;
  // Of a backward exchange: the id of its forward round.
  std::uint64_t forward_round = 0;
  Merge merge = Merge::kSum;
  std::vector<double> values;
  bool spin = false;  // see Arrival
};

// What comes back.
struct Outcome {
  const std::vector<double>* total = nullptr;  // null if it failed; valid during the call
  std::uint64_t round = 0;                     // the id of a forward round, with kElsewhere set
  std::string error;
  bool deadline = false;  // whether it failed because the deadline has passed
};

// All functions may be called from any thread.  None waits for another process, but for the time
// that Contribution::spin allows.
class Transport {
 public:
  // Set in the ids of rounds that went through a transport.  The exchange's own ids never have it.
  static constexpr std::uint64_t kElsewhere = std::uint64_t{1} << 63;

  virtual ~Transport() = default;
  // `done` is called exactly once, without a lock held.
  virtual void AllReduce(Contribution contribution, std::function<void(const Outcome&)> done) = 0;
  // A round of this key failed here, so this process does not come to it.
  virtual void FailedHere(const std::string& key, const std::string& why) = 0;
  // Applies to rounds that are under way as well.
  virtual void SetTimeout(double seconds) = 0;
};

}  // namespace gluon_syncbn
