// The cross-device key-barrier sum exchange.
//
// Every participant brings a vector under a key; when all that are expected have come, each
// gets the sum over all, or what else all come to (merge.h).  Nobody blocks: an arrival leaves a
// completion behind and returns, so no order of arrival can deadlock.  The class knows neither
// MXNet nor any device; a participant is a number, which fixes its place in the sum, and a name for
// messages.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "merge.h"

namespace gluon_syncbn {

// What one participant brings.
struct Arrival {
  std::string key;
  // A key that is used in several places tells them apart by this number.
  int call = 0;
  // Arrivals meet within a lane of their key and call.  Lane 0 is the forward exchange; the
  // backward exchange of a round uses the round's own number, so that it meets its own round's
  // participants in whatever order the devices run backward.
  std::uint64_t lane = 0;
  std::uint64_t participant = 0;
  std::string kind;  // only participants of one kind meet; "" for none in particular
  std::string name;
  int num_devices = 1;
  std::vector<double> values;
  // From Reserve: the arrival waits for those of its participant that were reserved before it.
  // 0: it may go at once.
  std::uint64_t turn = 0;
  Merge merge = Merge::kSum;  // of its values with the others'
};

// What every participant of a round gets.
struct Outcome {
  const std::vector<double>* total = nullptr;  // null when the round failed; valid during the call
  std::uint64_t round = 0;                     // never 0 for a round that succeeded
  int num_devices = 0;                         // how many took part
  std::string error;                           // says what failed and what to do
};

// Called exactly once per arrival, from the thread of the last arrival, from the thread of
// whoever ended the round, or from the barrier's own thread; never under its lock.
using Completion = std::function<void(const Outcome&)>;

class KeyBarrier {
 public:
  // A round that is not complete `timeout_seconds` after its first arrival fails.
  explicit KeyBarrier(double timeout_seconds);
  ~KeyBarrier();
  KeyBarrier(const KeyBarrier&) = delete;
  KeyBarrier& operator=(const KeyBarrier&) = delete;

  // Joins the oldest open round of its lane in which this participant is not yet present,
  // or opens one.  Values are merged in the order of the participants' numbers, not of arrival: the
  // result is the same, bit for bit, on every run.
  // An arrival whose length or number of devices contradicts its round fails the round.
  void Arrive(Arrival arrival, Completion done);

  // Takes a turn for a later arrival.  Whoever takes turns in the order of its program meets the
  // others in that order, though its arrivals may become ready in another one.
  std::uint64_t Reserve(const std::string& key, int call, std::uint64_t participant);
  // Gives a turn back that no arrival will use.
  void Release(const std::string& key, int call, std::uint64_t participant, std::uint64_t turn);

  // How many devices come to the forward rounds of this key (the key "" stands for all), whatever
  // the arrivals say; 0 lets the arrivals decide again.  Open rounds keep their own number.
  void SetMembers(const std::string& key, int num_devices);
  int Members(const std::string& key) const;

  // Fails the open rounds of these keys (the key "" stands for all), and every arrival under them
  // until Resume.
  void Abort(const std::vector<std::string>& keys, const std::string& why);
  void Resume(const std::vector<std::string>& keys);
  // Fails every open round and every later arrival: the process is going away.
  void Close(const std::string& why);

  void SetTimeout(double seconds);
  double Timeout() const;
  // Rounds that have failed so far.
  std::uint64_t Failures() const;

 private:
  using Clock = std::chrono::steady_clock;

  struct Present {
    Arrival arrival;
    Completion done;
  };
  struct Waiting {
    Clock::time_point since;
    Present present;
  };
  struct Round {
    std::uint64_t id;
    int num_devices;
    Clock::time_point opened;
    std::vector<Present> present;
  };
  struct FailedRound {
    Round round;
    std::string error;
  };
  using Lane = std::tuple<std::string, int, std::uint64_t>;   // key, call, lane
  using Queue = std::tuple<std::string, int, std::uint64_t>;  // key, call, participant
  // What ends while the lock is held, and is told to the participants after that.
  struct Ended {
    std::vector<Round> complete;
    std::vector<FailedRound> failed;
  };

  bool HasTurn(const Arrival& arrival) const;
  void DropTurn(const Queue& queue, std::uint64_t turn);
  void Advance(Ended* ended);
  void Join(Present present, Ended* ended);
  static void Tell(Ended ended);
  static void SortByParticipant(std::vector<Present>* present);
  static void Complete(Round round);
  // `pause`: see the definition.
  static void Fail(std::vector<FailedRound> failed, std::chrono::milliseconds pause);
  int MembersOf(const std::string& key) const;
  static std::string Describe(const Arrival& first);
  template <typename Predicate>
  std::vector<FailedRound> TakeRounds(Predicate predicate, const std::string& why);
  void StartWatch();
  void Watch();

  mutable std::mutex mutex_;
  std::map<Lane, std::vector<Round>> open_;         // the rounds of a lane, oldest first
  std::map<Queue, std::set<std::uint64_t>> turns_;  // reserved and not yet used
  std::vector<Waiting> waiting_;                    // for their turn
  std::uint64_t next_turn_ = 1;
  std::map<std::string, int> members_;
  std::map<std::string, std::string> aborted_;  // key -> why
  std::string closed_;                          // why; empty while open
  std::uint64_t next_round_ = 1;
  std::uint64_t failures_ = 0;
  Clock::duration timeout_;

  std::thread watch_;  // started by the first round that has to wait
  int watch_pid_ = 0;
  std::condition_variable wake_;
  Clock::time_point next_look_ = Clock::time_point::max();
  bool stop_ = false;
};

}  // namespace gluon_syncbn
