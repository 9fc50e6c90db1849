// Forward rounds, outside of a pass, that failed before all participants had come: an arrival that
// was meant for one of them must not join a later one, which would make a wrong sum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <utility>

#include "exchange/round.h"

namespace gluon_syncbn {

// Not thread-safe.
class MissedRounds {
 public:
  using Use = std::pair<std::string, int>;  // key, call

  void Add(const Use& use, const Round& round, const std::string& error, Clock::time_point now) {
    OfUse& of_use = uses_[use];
    Missed& missed = of_use.rounds[round.id];
    missed = {now, round.num_devices, {}, error};
    for (const Present& p : round.present) missed.came.insert(p.arrival.participant);
    if (of_use.rounds.size() > kRemembered) {
      of_use.forgotten = of_use.rounds.begin()->second.failed;
      of_use.rounds.erase(of_use.rounds.begin());
    }
  }

  // Why the arrival is late, if it was called before a round failed that is older than `before` and
  // that it has not come to; otherwise empty.  If it was called after that, the program has begun
  // anew.  Notes that it came.
  std::string Refusal(const Use& use, const Arrival& arrival, std::uint64_t before) {
    const auto of_use = uses_.find(use);
    if (of_use == uses_.end()) return "";
    const bool dated = arrival.called != Clock::time_point();
    const auto late = [&arrival] {
      return arrival.name + " came after its round had failed; run the step again on every device.";
    };
    // Too many failed to know which; an error for an arrival in time is better than a wrong sum.
    if (dated && arrival.called < of_use->second.forgotten) return late();
    std::string error;
    auto& rounds = of_use->second.rounds;
    for (auto next = rounds.begin();
         error.empty() && next != rounds.end() && next->first < before;) {
      Missed& missed = next->second;
      const bool is_new = missed.came.insert(arrival.participant).second;
      if (is_new && dated && arrival.called < missed.failed) {
        error = late() + " The round: " + missed.error;
      }
      const bool all_came = static_cast<int>(missed.came.size()) >= missed.num_devices;
      next = all_came ? rounds.erase(next) : std::next(next);
    }
    if (rounds.empty() && of_use->second.forgotten == Clock::time_point()) uses_.erase(of_use);
    return error;
  }

 private:
  static constexpr std::size_t kRemembered = 64;  // rounds of a use, one by one

  struct Missed {
    Clock::time_point failed;
    int num_devices;
    std::set<std::uint64_t> came;  // participants, also those that came late or began anew
    std::string error;
  };

  struct OfUse {
    std::map<std::uint64_t, Missed> rounds;  // by id
    Clock::time_point forgotten{};           // when the last of those failed that are not there
  };

  std::map<Use, OfUse> uses_;
};

}  // namespace gluon_syncbn
