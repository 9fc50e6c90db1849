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

#include "exchange/merge.h"

namespace gluon_syncbn {

// What one participant brings.
struct Arrival {
  std::string key;
  // A key that is used in several places tells them apart by this number.
  int call = 0;
  // Arrivals meet within a phase of their key and call.  A forward exchange uses the number of its
  // pass, or 0 outside of one; the backward exchange of a round uses the round's own number, so
  // that it meets its own round's participants in whatever order the devices run backward.
  std::uint64_t phase = 0;
  bool backward = false;
  std::uint64_t pass = 0;  // what Abort names; 0 outside of a pass
  std::uint64_t participant = 0;
  std::string kind;  // only participants of one kind meet; "" for none in particular
  std::string name;
  int num_devices = 1;
  std::vector<double> values;
  // From TakeTicket: the arrival waits for those of its participant that were reserved before it.
  // 0: it may go at once.
  std::uint64_t ticket = 0;
  Merge merge = Merge::kSum;  // of its values with the others'
};

// What every participant of a round gets.
struct Result {
  const std::vector<double>* total = nullptr;  // null when the round failed; valid during the call
  std::uint64_t round = 0;                     // never 0 for a round that succeeded
  int num_devices = 0;                         // how many took part
  std::string error;                           // says what failed
  bool expired = false;                        // it failed because not all came in time
  // Then also: one sender stands behind several participants of the key (see SetSender).
  bool shared_sender = false;
};

// A pass is one run of a program, forward and backward, on several participants, which meet each
// other in it and nobody else.
struct Pass {
  std::uint64_t id = 0;  // from NewPass; 0: none
  int expected = 0;      // how many participants take part
};

// Called exactly once per arrival, from the thread of the last arrival, from the thread of
// whoever ended the round, or from the barrier's own thread; never under its lock.
using Completion = std::function<void(const Result&)>;

class KeyBarrier {
 public:
  // A round that is not complete `timeout_seconds` after its first arrival fails.
  explicit KeyBarrier(double timeout_seconds);
  ~KeyBarrier();
  KeyBarrier(const KeyBarrier&) = delete;
  KeyBarrier& operator=(const KeyBarrier&) = delete;

  // Joins the oldest open round of its phase in which this participant is not yet present,
  // or opens one.  Values are merged in the order of the participants' numbers, not of arrival: the
  // result is the same, bit for bit, on every run.
  // An arrival whose length or number of devices contradicts its round fails the round.
  void Arrive(Arrival arrival, Completion done);

  // Takes a ticket for a later arrival.  Whoever takes tickets in the order of its program meets
  // the others in that order, though its arrivals may become ready in another one.
  std::uint64_t TakeTicket(const std::string& key, int call, std::uint64_t participant);
  // Gives a ticket back that no arrival will use.
  void ReturnTicket(const std::string& key, int call, std::uint64_t participant,
                    std::uint64_t ticket);

  // A number that no other pass or round has.
  std::uint64_t NewPass();
  // Notes which pass was last announced for a participant; says whether any of these keys is to be
  // told: always in a pass, and outside (id 0) where a pass was announced before.
  bool Announce(const std::vector<std::string>& keys, std::uint64_t participant, const Pass& pass);
  // Which pass a participant's next forward arrivals under this key belong to.
  void SetPass(const std::string& key, std::uint64_t participant, const Pass& pass);
  Pass PassOf(const std::string& key, std::uint64_t participant) const;
  // Fails what is open in these passes, and every later arrival in them.
  void Abort(const std::vector<std::uint64_t>& passes, const std::string& why);

  // Who sends a participant's arrivals, as a number without further meaning: participants that
  // share an sender may be unable to come at the same time, which Result tells when they did not.
  void SetSender(const std::string& key, std::uint64_t participant, std::uint64_t sender);

  // Fails every open round and every later arrival: the process is going away.
  void Close(const std::string& why);

  // A fork.  The child has this object as it is at that moment, perhaps in the middle of a change
  // by a thread that it does not have, and under its lock; the barrier's own thread it does not
  // have either.  So the thread that forks takes the deadline with it, and there the barrier
  // starts anew, in no pass.  (To hold the lock until the fork is no way: MXNet, which has been
  // told before us, lets the exchanges that are under way end first.)
  void RestartInChild(double timeout_seconds);

  void SetTimeout(double seconds);
  double Timeout() const;
  // How many rounds of this key (the key "" stands for all) have failed so far.
  std::uint64_t Failures(const std::string& key) const;

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
    bool expired = false;
    bool shared_sender = false;
  };
  // What is known of a key beyond its rounds.
  struct KeyNotes {
    std::map<std::uint64_t, Pass> passes;            // by participant
    std::set<std::uint64_t> announced;               // participants last announced in a pass
    std::map<std::uint64_t, std::uint64_t> senders;  // by participant
    std::uint64_t failures = 0;
  };
  using Phase = std::tuple<std::string, int, std::uint64_t>;  // key, call, phase
  using Queue = std::tuple<std::string, int, std::uint64_t>;  // key, call, participant
  // What ends while the lock is held, and is told to the participants after that.
  struct Ended {
    std::vector<Round> complete;
    std::vector<FailedRound> failed;
  };

  bool IsNext(const Arrival& arrival) const;
  void DropTicket(const Queue& queue, std::uint64_t ticket);
  void Advance(Ended* ended);
  void Join(Present present, Ended* ended);
  static void Notify(Ended ended);
  static void SortByParticipant(std::vector<Present>* present);
  static void Complete(Round round);
  static void Fail(std::vector<FailedRound> failed);
  void CountFailure(const std::string& key);
  bool SharesSender(const std::string& key) const;
  static std::string Describe(const Arrival& first);
  template <typename Predicate>
  std::vector<FailedRound> TakeRounds(Predicate predicate, const std::string& why);
  void StartWatch();
  void Watch();

  mutable std::mutex mutex_;
  std::map<Phase, std::vector<Round>> open_;          // the rounds of a phase, oldest first
  std::map<Queue, std::set<std::uint64_t>> tickets_;  // reserved and not yet used
  std::vector<Waiting> waiting_;                      // for their ticket
  std::uint64_t next_ticket_ = 1;
  std::map<std::string, KeyNotes> notes_;
  std::map<std::uint64_t, std::string> aborted_;  // pass -> why; the latest ones
  std::string closed_;                            // why; empty while open
  std::uint64_t next_number_ = 1;                 // of rounds and passes
  std::uint64_t failures_ = 0;
  Clock::duration timeout_;

  std::thread watch_;  // started by the first round that has to wait
  std::condition_variable wake_;
  Clock::time_point next_look_ = Clock::time_point::max();
  bool stop_ = false;
};

}  // namespace gluon_syncbn
