// What happened in past rounds: who waited, how long, and for whom.  It answers where a program
// loses time, and helps to explain a round that stays incomplete.
//
// Recording is always on.  It reads no clock, and allocates nothing once a key's participants are
// known; the last rounds are kept in a ring.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "exchange/round.h"

namespace gluon_syncbn {

// One participant under one key, in rounds that succeeded.  It waits from its arrival until the
// last one's.
struct DeviceRecord {
  std::uint64_t rounds = 0;
  std::uint64_t last = 0;  // of them, those to which it came last
  double held = 0;         // seconds that the others waited in those
  double waited = 0;       // seconds, in all rounds
  double longest = 0;      // seconds, in one
};

struct KeyRecord {
  std::string key;
  std::uint64_t rounds = 0;  // that succeeded
  std::uint64_t failures = 0;
  double elsewhere = 0;  // seconds that complete rounds took in other processes
  std::vector<std::pair<std::uint64_t, DeviceRecord>> devices;  // by participant, in order
  bool met = false;  // whether a round has ever succeeded
};

// One participant's arrival at a round that has ended.
struct PastArrival {
  const KeyRecord* key = nullptr;
  std::uint64_t round = 0;
  std::uint64_t participant = 0;
  std::uint64_t last = 0;        // who came last to the round, of those who came
  Clock::time_point came{};      // it came,
  Clock::time_point complete{};  // the last one did (or the round failed),
  Clock::time_point ended{};     // and the result did
  int call = 0;
  bool backward = false;
  bool succeeded = false;
};

// Not thread-safe.
class RoundRecords {
 public:
  static constexpr std::size_t kPastArrivals = 1 << 14;

  // The record of a key, for Add; it stays where it is.
  KeyRecord& Of(const std::string& key);
  // A round of this key has ended, now.
  void Add(KeyRecord* key, const Round& round, bool succeeded, Clock::time_point now);
  // Names a participant that may not have come to any round yet.
  void Name(std::uint64_t participant, const std::string& name);
  // Counts from zero, and leaves out of Snapshot what came before.
  void Reset();

  struct Copy {
    std::vector<KeyRecord> keys;  // those with rounds
    std::map<std::uint64_t, std::string> names;
    std::vector<PastArrival> past;  // the oldest first
  };
  Copy Snapshot() const;

  // Whether a round of this key has ever succeeded.
  bool HasMet(const std::string& key) const;
  // The participants that have ever come to any key, of one kind.
  std::vector<std::uint64_t> Participants(const std::string& kind) const;
  // The participants that have ever come to this key.
  std::vector<std::uint64_t> CameTo(const std::string& key) const;
  // Those of a round that has ended, as far as the ring goes back.
  std::vector<std::uint64_t> ParticipantsOf(std::uint64_t round) const;
  // A participant's latest arrival at a round that has ended; null if there is none.
  const PastArrival* LatestOf(std::uint64_t participant) const;
  // "participant 3" if it was never named.
  std::string NameOf(std::uint64_t participant) const;

 private:
  DeviceRecord& DeviceOf(KeyRecord* key, const Arrival& arrival);
  template <typename Visit>
  void ForEachPast(const Visit& visit) const;  // the latest first, until visit() returns false

  std::map<std::string, KeyRecord> keys_;
  std::map<std::uint64_t, std::string> names_;
  std::map<std::uint64_t, std::string> kinds_;  // of those that have come
  std::vector<PastArrival> past_;               // a ring, in full from the first round
  std::size_t next_ = 0;                        // how many were ever written
  std::size_t first_ = 0;                       // that Snapshot has
};

}  // namespace gluon_syncbn
