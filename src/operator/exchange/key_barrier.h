// An asynchronous all-reduce between the devices of one process: the key-barrier sum exchange.  A
// key with a transport (transport.h) goes on to the same key in other processes.
//
// Every participant contributes a vector under a key; when all have arrived, each gets the sum of
// all vectors, or whatever else they are merged to (merge.h).  No thread ever waits: an arrival
// registers a completion and returns, so no order of arrivals can deadlock.  The class knows of no
// framework and no device.  To it, a participant is a number, which determines its place in the
// sum, and a name for messages.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "exchange/merge.h"
#include "exchange/transport.h"

namespace gluon_syncbn {

// What one participant contributes to a round, that is, to one all-reduce.
struct Arrival {
  std::string key;
  int call = 0;  // tells apart the uses of a key that is used in several places
  // Arrivals join a round of the same key, call and phase.  The phase of a forward exchange is its
  // pass, or 0 outside of one.  The phase of a backward exchange is the id of the forward round, so
  // that it finds the same participants, in whatever order the devices run backward.
  std::uint64_t phase = 0;
  bool backward = false;
  std::uint64_t pass = 0;  // for Abort; 0: none
  std::uint64_t participant = 0;
  std::string kind;  // must be the same for all arrivals of a round, for example "cpu"
  std::string name;  // for messages
  int num_devices = 1;
  std::vector<double> values;
  // From TakeTicket: the arrival waits for those of its participant with earlier tickets.
  // 0: it does not wait.
  std::uint64_t ticket = 0;
  // From Now, when the program made the call; 0: unknown.
  std::uint64_t called = 0;
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

// What every participant of a round gets.
struct Result {
  const std::vector<double>* total = nullptr;  // null if the round failed; valid during the call
  std::uint64_t round = 0;                     // its id; never 0 if it succeeded
  int num_devices = 0;                         // how many took part
  std::string error;                           // the message if it failed
  Failure failure = Failure::kNone;
  // With kDeadline: several participants of the key share a sender (see SetSender).
  bool shared_sender = false;
};

// A pass is one run of a program, forward and backward, on several participants.  Their arrivals
// join rounds of this pass only.
struct Pass {
  std::uint64_t id = 0;  // from NewPass; 0: none
  int expected = 0;      // the number of participants
};

// Called exactly once per arrival, never under the barrier's lock: by the thread of the last
// arrival, by the thread that ended the round otherwise, or by the barrier's own thread.
using Completion = std::function<void(const Result&)>;

// All functions may be called from any thread.
class KeyBarrier {
 public:
  // A round fails if it is not complete `timeout_seconds` after its first arrival.
  explicit KeyBarrier(double timeout_seconds);
  ~KeyBarrier();
  KeyBarrier(const KeyBarrier&) = delete;
  KeyBarrier& operator=(const KeyBarrier&) = delete;

  // Joins the oldest open round of the arrival's key, call and phase in which its participant is
  // not present, or opens one.  Values are merged in the order of the participants' numbers, not of
  // their arrival: the result is the same, bit for bit, on every run.  An arrival that contradicts
  // its round in kind, num_devices, merge or length fails the round.
  //
  // A round that fails ends its pass (Abort).  Outside of a pass, an arrival that comes late to a
  // round that has failed gets an error, and joins no later round, if it was called before that.
  // If it was called after that, the program has begun anew.
  void Arrive(Arrival arrival, Completion done);

  // A number that is greater than all that were given before: a time, for Arrival::called.
  std::uint64_t Now();

  // Takes a ticket for a later arrival.  The arrivals of a participant under this key and call join
  // rounds in the order of their tickets, even if they come in a different order.  A ticket of a
  // pass (0: of none) holds up nothing once that has ended.
  std::uint64_t TakeTicket(const std::string& key, int call, std::uint64_t participant,
                           std::uint64_t pass = 0);
  // Returns a ticket that no arrival will use.
  void ReturnTicket(const std::string& key, int call, std::uint64_t participant,
                    std::uint64_t ticket);

  // An id that no other pass or round has.
  std::uint64_t NewPass();
  // Records that `pass` is announced to a participant.  Returns whether SetPass has to be called
  // for these keys: always in a pass; outside of one (id 0) if a pass was announced before.
  bool Announce(const std::vector<std::string>& keys, std::uint64_t participant, const Pass& pass);
  // Sets the pass of the participant's next forward arrivals under this key.
  void SetPass(const std::string& key, std::uint64_t participant, const Pass& pass);
  Pass PassOf(const std::string& key, std::uint64_t participant) const;
  // Fails all open rounds of these passes, and every later arrival in them.
  void Abort(const std::vector<std::uint64_t>& passes, const std::string& why);

  // Sets who sends a participant's arrivals, as any number.  Participants that share a sender may
  // be unable to arrive at the same time; if a deadline passes, Result says that they do.
  void SetSender(const std::string& key, std::uint64_t participant, std::uint64_t sender);

  // Sets what carries this key's rounds on to other processes; null: nothing, they end here.
  void SetTransport(const std::string& key, std::shared_ptr<Transport> transport);
  bool HasTransport(const std::string& key) const;

  // Fails all open rounds and every later arrival: the process is ending.
  void Close(const std::string& why);

  // Makes the barrier usable in the child after a fork, with no open round, pass or transport.  A
  // fork copies it in whatever state it is, perhaps locked and half changed by a thread that the
  // child does not have, so nothing but counters is read.  Read the timeout before the fork.
  void RestartInChild(double timeout_seconds);

  // Applies to open rounds as well.
  void SetTimeout(double seconds);
  double Timeout() const;

  // The number of rounds that have failed so far: of one key, and of all.
  std::uint64_t Failures(const std::string& key) const;
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
    std::string failed;  // why, if its deadline has passed: it keeps its place among the tickets
  };
  // A forward round outside of a pass that failed before all participants had come.
  struct Missed {
    std::uint64_t failed;  // when; see Now
    int num_devices;
    std::set<std::uint64_t> came;  // participants, also those that came late or began anew
    std::string error;
  };
  struct Round {
    std::uint64_t id;
    int num_devices;
    Clock::time_point opened;
    std::vector<Present> present;
  };
  struct CompleteRound {
    Round round;
    std::shared_ptr<Transport> transport;
  };
  struct FailedRound {
    Round round;
    std::string error;
    Failure failure = Failure::kOther;
    bool shared_sender = false;
    std::shared_ptr<Transport> transport;  // that does not know yet
  };
  // What is known of a key besides its rounds.
  struct KeyNotes {
    std::map<std::uint64_t, Pass> passes;            // by participant
    std::set<std::uint64_t> announced;               // participants whose last pass is not 0
    std::map<std::uint64_t, std::uint64_t> senders;  // by participant
    std::uint64_t failures = 0;
    std::shared_ptr<Transport> transport;
  };
  using Phase = std::tuple<std::string, int, std::uint64_t>;  // key, call, phase
  using Queue = std::tuple<std::string, int, std::uint64_t>;  // key, call, participant
  // Rounds that end while the lock is held; their participants are notified after that.
  struct Ended {
    std::vector<CompleteRound> complete;
    std::vector<FailedRound> failed;
  };

  bool IsNext(const Arrival& arrival) const;
  void DropTicket(const Queue& queue, std::uint64_t ticket);
  void DropTicketsOfEndedPasses();
  void Advance(Ended* ended);
  void Join(Present present, const std::string& failed, Ended* ended);
  std::string MissedBy(const Arrival& arrival, const Phase& phase, std::uint64_t before);
  bool EndPasses(std::vector<FailedRound>* failed);
  void Notify(Ended ended);
  static void SortByParticipant(std::vector<Present>* present);
  void Complete(CompleteRound complete);
  static void Succeed(const Round& round, const std::vector<double>& total, std::uint64_t id);
  void FailFrom(Round round, const Outcome& outcome);
  static void Fail(std::vector<FailedRound> failed);
  FailedRound CountedFailure(Round round, std::string error, Failure failure = Failure::kOther);
  std::shared_ptr<Transport> TransportOf(const std::string& key) const;
  bool SharesSender(const std::string& key) const;
  static std::string Describe(const Arrival& first);
  template <typename Predicate>
  std::vector<FailedRound> TakeRounds(Predicate predicate, const std::string& why);
  void StartWatch();
  void Watch();

  mutable std::mutex mutex_;
  std::map<Phase, std::vector<Round>> open_;  // oldest first
  // Taken and not yet used, with their passes.
  std::map<Queue, std::map<std::uint64_t, std::uint64_t>> tickets_;
  std::map<Phase, std::map<std::uint64_t, Missed>> missed_;  // by round; the latest ones
  std::vector<Waiting> waiting_;  // arrivals with earlier tickets before them
  std::uint64_t next_ticket_ = 1;
  std::map<std::string, KeyNotes> notes_;
  std::map<std::uint64_t, std::string> aborted_;  // pass -> why; the latest ones
  std::string closed_;                            // why; empty while open
  std::uint64_t next_id_ = 1;                     // of rounds and passes
  std::uint64_t failures_ = 0;
  Clock::duration timeout_;

  std::thread watch_;  // started by the first round that has to wait
  std::condition_variable wake_;
  Clock::time_point next_look_ = Clock::time_point::max();
  bool stop_ = false;
};

}  // namespace gluon_syncbn
