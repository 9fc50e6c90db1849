// A round of the exchange, that is, one all-reduce: who has come to it, with what, and when.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "exchange/merge.h"

namespace gluon_syncbn {

using Clock = std::chrono::steady_clock;

inline double Seconds(Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

// What one participant contributes to a round.
struct Arrival {
  std::string key;
  int call = 0;  // tells apart the uses of a key that is used in several places
  // Arrivals join a round of the same key, call and phase.  The phase of a forward exchange is its
  // pass, or 0 outside of one.  The phase of a backward exchange is the id of the forward round, so
  // that it finds the same participants, in whatever order the devices run backward.
  std::uint64_t phase = 0;
  bool backward = false;
  std::uint64_t pass = 0;  // for KeyBarrier::Abort; 0: none
  std::uint64_t participant = 0;
  std::string kind;  // must be the same for all arrivals of a round, for example "cpu"
  std::string name;  // for messages
  int num_devices = 1;
  std::vector<double> values;
  // From KeyBarrier::TakeTicket: the arrival waits for those of its participant with earlier
  // tickets.  0: it does not wait.
  std::uint64_t ticket = 0;
  Clock::time_point called{};  // when the program made the call; Clock's epoch: unknown
  Merge merge = Merge::kSum;
  // Whether the thread has up to 50 us for the messages of other processes: to wake another thread
  // for them takes longer than most rounds.  Nothing depends on it.
  bool spin = false;
};

// Why a round failed, as far as a caller may have advice to add to the message.
enum class Failure {
  kNone,
  kDeadline,         // not all participants arrived in time
  kDifferentMerge,   // two arrivals want to be merged in different ways
  kDifferentLength,  // two arrivals have different numbers of values
  kProcessDeadline,  // not all processes came in time
  kOther,
};

// The likeliest cause of a deadline; see diagnosis.h.
enum class Cause {
  kUnknown,
  kOneSender,       // one thread sends for several of its participants
  kDifferentKeys,   // the others use another key for it
  kDifferentPaths,  // the others have come to other keys instead
  kNoBackward,      // the others took part in the forward exchange, and are not in backward
  kTooFew,          // so many participants have never been seen
  kNotThisKey,      // the others are there, but have never come to this key
  kLate,            // the others' round has failed already
  kEarlierCall,     // of the same participant, has not run
  kSlow,            // the others are on their way
  kStopped,         // the others have come to nothing since
};

struct Diagnosis {
  Cause cause = Cause::kUnknown;
  std::string text;  // a sentence
};

// That a participant is going to arrive under a key.
struct Call {
  std::uint64_t sender = 0;  // what calls, as any number
  Clock::time_point called{};
};

// What every participant of a round gets.
struct Result {
  const std::vector<double>* total = nullptr;  // null if the round failed; valid during the call
  std::uint64_t round = 0;                     // its id; never 0 if it succeeded
  int num_devices = 0;                         // how many took part
  std::string error;                           // the message if it failed
  Failure failure = Failure::kNone;
  Diagnosis diagnosis;  // with kDeadline: why
};

// Called exactly once per arrival, never under the barrier's lock: by the thread of the last
// arrival, by the thread that ended the round otherwise, or by the barrier's own thread.
using Completion = std::function<void(const Result&)>;

struct Present {
  Arrival arrival;
  Completion done;
  Clock::time_point came{};  // when it joined
};

struct Round {
  std::uint64_t id = 0;
  int num_devices = 0;
  Clock::time_point opened{};
  std::vector<Present> present;  // in the order of their coming, until they are merged
};

}  // namespace gluon_syncbn
