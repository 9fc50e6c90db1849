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
    auto& rounds = missed_[use];
    Missed& missed = rounds[round.id];
    missed = {now, round.num_devices, {}, error};
    for (const Present& p : round.present) missed.came.insert(p.arrival.participant);
    if (rounds.size() > kRemembered) rounds.erase(rounds.begin());
  }

  // Why the arrival is late, if it was called before a round failed that is older than `before` and
  // that it has not come to; otherwise empty.  If it was called after that, the program has begun
  // anew.  Notes that it came.
  std::string Refusal(const Use& use, const Arrival& arrival, std::uint64_t before) {
    const auto of_use = missed_.find(use);
    if (of_use == missed_.end()) return "";
    std::string error;
    auto& rounds = of_use->second;
    for (auto next = rounds.begin();
         error.empty() && next != rounds.end() && next->first < before;) {
      Missed& missed = next->second;
      const bool is_new = missed.came.insert(arrival.participant).second;
      if (is_new && arrival.called != Clock::time_point() && arrival.called < missed.failed) {
        error = arrival.name +
                " came after its round had failed; run the step again on every device. The "
                "round: " +
                missed.error;
      }
      const bool all_came = static_cast<int>(missed.came.size()) >= missed.num_devices;
      next = all_came ? rounds.erase(next) : std::next(next);
    }
    if (rounds.empty()) missed_.erase(of_use);
    return error;
  }

 private:
  static constexpr std::size_t kRemembered = 64;  // nothing is still to come to an earlier one

  struct Missed {
    Clock::time_point failed;
    int num_devices;
    std::set<std::uint64_t> came;  // participants, also those that came late or began anew
    std::string error;
  };

  std::map<Use, std::map<std::uint64_t, Missed>> missed_;  // by round
};

}  // namespace gluon_syncbn
