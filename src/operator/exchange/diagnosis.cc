// See diagnosis.h.
#include "exchange/diagnosis.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <string>

namespace gluon_syncbn {
namespace {

using Participants = std::set<std::uint64_t>;

std::string InWords(Clock::duration duration) {
  const double seconds = Seconds(duration);
  std::ostringstream os;
  os.setf(std::ios::fixed);
  os.precision(seconds < 10 ? 1 : 0);
  os << seconds << " s";
  return os.str();
}

const char* Direction(bool backward) { return backward ? "backward" : "forward"; }

class Case {
 public:
  explicit Case(const Evidence& evidence)
      : e_(evidence),
        first_(evidence.round.present.front().arrival),
        present_(ParticipantsOf(evidence.round)) {
    const auto count = static_cast<std::size_t>(e_.round.num_devices);
    if (first_.backward) {
      expected_ = Set(e_.past.ParticipantsOf(first_.phase));
    } else {
      expected_ = Set(e_.announced);
      Participants known = Set(e_.past.CameTo(first_.key));
      for (const auto& participant_and_call : e_.calls) known.insert(participant_and_call.first);
      // Of a pass, some may not be expected: those without input, or of other groups.
      const bool all_are = !InPass() || known.size() == count;
      if (expected_.size() < count && all_are) expected_.insert(known.begin(), known.end());
    }
    std::set_difference(expected_.begin(), expected_.end(), present_.begin(), present_.end(),
                        std::inserter(missing_, missing_.end()));
  }

  Diagnosis Find() const {
    for (const auto find : {&Case::OneSender, &Case::WaitingElsewhere, &Case::NoBackward,
                            &Case::Unexpected, &Case::Behind}) {
      Diagnosis found = (this->*find)();
      if (found.cause != Cause::kUnknown) return found;
    }
    return {};
  }

 private:
  static Participants Set(const std::vector<std::uint64_t>& participants) {
    return {participants.begin(), participants.end()};
  }

  std::string Names(const Participants& participants) const {
    std::string names;
    std::size_t left = participants.size();
    for (const std::uint64_t participant : participants) {
      names += Name(participant);
      if (--left != 0) names += left == 1 ? " and " : ", ";
    }
    return names;
  }

  std::string Name(std::uint64_t participant) const {
    for (const Round* round : e_.open) {
      for (const Present& p : round->present) {
        if (p.arrival.participant == participant) return p.arrival.name;
      }
    }
    return e_.past.NameOf(participant);
  }

  // "key 'k'", or for the key of this round "this key".
  std::string Key(const std::string& key) const {
    return key == first_.key ? "this key" : "key '" + key + "'";
  }

  // Someone has been called, by what also called another, and has not come since.
  Diagnosis OneSender() const {
    if (first_.backward) return {};  // calls are those of forward
    for (const std::uint64_t missing : missing_) {
      const auto call = e_.calls.find(missing);
      if (call == e_.calls.end() || call->second.called < LatestOf(missing).came) continue;
      for (const std::uint64_t present : present_) {
        const auto other = e_.calls.find(present);
        if (other == e_.calls.end() || other->second.sender != call->second.sender) continue;
        return {Cause::kOneSender, "One thread ran " + Names({present, missing}) + "; " +
                                       Name(missing) +
                                       " has been called here and has not run yet."};
      }
    }
    return {};
  }

  // Another incomplete round, in which someone waits who is missing here.
  Diagnosis WaitingElsewhere() const {
    for (const Round* other : e_.open) {
      const Arrival& there = other->present.front().arrival;
      if (SameUse(there) || there.pass != first_.pass || there.kind != first_.kind) continue;
      const Participants waiting = ParticipantsOf(*other);
      if (!missing_.empty() && !Meet(waiting, missing_)) continue;
      if (Meet(waiting, present_)) continue;
      const bool never_met = !e_.past.HasMet(first_.key) && !e_.past.HasMet(there.key);
      const bool alike =
          other->num_devices == e_.round.num_devices && there.values.size() == first_.values.size();
      std::ostringstream os;
      if (!InPass() && never_met && alike && there.key != first_.key) {
        os << Names(waiting) << One(waiting, " waits", " wait") << " under key '" << there.key
           << "' and " << Names(present_) << " under key '" << first_.key
           << "', and neither key has ever met.";
        return {Cause::kDifferentKeys, os.str()};
      }
      if (missing_.empty()) continue;
      os << Names(waiting) << One(waiting, " waits", " wait") << " in the "
         << Direction(there.backward) << " exchange of " << Key(there.key);
      if (there.key == first_.key) os << " (use " << there.call << ")";
      os << ", to which " << Names(present_) << One(present_, " has", " have") << " not come.";
      return {Cause::kDifferentPaths, os.str()};
    }
    return {};
  }

  Diagnosis NoBackward() const {
    if (!first_.backward || missing_.empty()) return {};
    for (const std::uint64_t missing : missing_) {
      if (LatestOf(missing).backward) return {};
    }
    return {Cause::kNoBackward, Names(missing_) + " took part in the forward exchange, and " +
                                    One(missing_, "has", "have") + " not come to backward."};
  }

  // Everybody who ever came to this key is here.
  Diagnosis Unexpected() const {
    if (!missing_.empty() || first_.backward) return {};
    std::ostringstream os;
    if (InPass()) {  // whose number of devices is not the user's
      os << "Of the " << e_.round.num_devices << " devices of this step, only " << Names(present_)
         << One(present_, " has", " have") << " come to any exchange.";
      return {Cause::kStopped, os.str()};
    }
    Participants all = Set(e_.past.Participants(first_.kind));
    for (const Round* round : e_.open) {
      if (round->present.front().arrival.kind != first_.kind) continue;
      for (const Present& p : round->present) all.insert(p.arrival.participant);
    }
    os << "num_devices is " << e_.round.num_devices << ", but only ";
    if (all.size() < static_cast<std::size_t>(e_.round.num_devices)) {
      os << Names(all) << One(all, " has", " have") << " ever come to any exchange.";
      return {Cause::kTooFew, os.str()};
    }
    for (const std::uint64_t participant : present_) all.erase(participant);
    os << Names(present_) << One(present_, " has", " have") << " ever come to this key; "
       << Names(all) << One(all, " has", " have") << " come to others.";
    return {Cause::kNotThisKey, os.str()};
  }

  // What the one that is missing did last; of several, the one that did nothing for longest.
  Diagnosis Behind() const {
    if (missing_.empty()) return {};
    std::uint64_t slowest = *missing_.begin();
    for (const std::uint64_t missing : missing_) {
      if (LatestOf(missing).came < LatestOf(slowest).came) slowest = missing;
    }
    const Latest latest = LatestOf(slowest);
    std::ostringstream os;
    os << Name(slowest);
    if (!InPass() && latest.failed && *latest.key == first_.key && !first_.backward &&
        !latest.backward && !Meet(Set(e_.past.ParticipantsOf(latest.round)), present_)) {
      os << " waited in this exchange until that failed, " << InWords(e_.now - latest.ended)
         << " ago, and " << Names(present_) << " came only after it.";
      return {Cause::kLate, os.str()};
    }
    if (latest.key == nullptr) {
      os << " has not come to any exchange yet";
    } else {
      os << " came last to the " << Direction(latest.backward) << " exchange of "
         << Key(*latest.key) << ", " << InWords(e_.now - latest.came) << " ago";
    }
    std::map<std::uint64_t, int> rounds;  // of this use to which each has come
    int most = 0;
    for (const Round* round : e_.open) {
      if (!SameUse(round->present.front().arrival)) continue;
      for (const std::uint64_t one : ParticipantsOf(*round)) most = std::max(most, ++rounds[one]);
    }
    Participants ahead;
    for (const auto& one_and_rounds : rounds) {
      if (one_and_rounds.second == most) ahead.insert(one_and_rounds.first);
    }
    if (most > 1) {
      os << "; " << Names(ahead) << One(ahead, " is ", " are ") << most
         << " rounds of this key ahead of it";
    }
    os << '.';
    return {latest.came >= e_.round.opened ? Cause::kSlow : Cause::kStopped, os.str()};
  }

  // The rounds of a pass are between its devices; a KeyBarrierSum's are between any.
  bool InPass() const { return first_.phase != 0; }

  bool SameUse(const Arrival& other) const {
    return other.key == first_.key && other.call == first_.call &&
           other.backward == first_.backward;
  }

  static Participants ParticipantsOf(const Round& round) {
    Participants participants;
    for (const Present& p : round.present) participants.insert(p.arrival.participant);
    return participants;
  }

  static bool Meet(const Participants& some, const Participants& others) {
    return std::any_of(some.begin(), some.end(),
                       [&](std::uint64_t one) { return others.count(one) != 0; });
  }

  static const char* One(const Participants& participants, const char* one, const char* more) {
    return participants.size() == 1 ? one : more;
  }

  struct Latest {
    const std::string* key = nullptr;
    bool backward = false;
    bool failed = false;
    std::uint64_t round = 0;
    Clock::time_point came = Clock::time_point::min();
    Clock::time_point ended{};
  };

  Latest LatestOf(std::uint64_t participant) const {
    Latest latest;
    if (const PastArrival* const past = e_.past.LatestOf(participant)) {
      latest = {&past->key->key, past->backward, !past->succeeded,
                past->round,     past->came,     past->ended};
    }
    for (const Round* round : e_.open) {
      for (const Present& p : round->present) {
        if (p.arrival.participant == participant && p.came > latest.came) {
          latest = {&p.arrival.key, p.arrival.backward, false, round->id, p.came, {}};
        }
      }
    }
    return latest;
  }

  const Evidence& e_;
  const Arrival& first_;
  Participants present_, expected_, missing_;
};

}  // namespace

Diagnosis Diagnose(const Evidence& evidence) { return Case(evidence).Find(); }

}  // namespace gluon_syncbn
