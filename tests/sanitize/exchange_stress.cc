// A stress test of the exchange for the sanitizers: many participants, keys and passes at once, in
// random order, forward and backward; aborted passes, participants that never arrive, changing
// deadlines, a barrier that is closed.  Every completion must be called once, with the right sum,
// or with an error where one is possible.
//
//   exchange_stress [seed] [rounds]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "exchange/key_barrier.h"

namespace {

using gluon_syncbn::Arrival;
using gluon_syncbn::KeyBarrier;
using gluon_syncbn::Pass;
using gluon_syncbn::Result;

constexpr int kParticipants = 5;
constexpr int kKeys = 7;

struct Answer {
  std::atomic<int> times{0};
  std::atomic<std::uint64_t> round{0};
  std::atomic<bool> right{false};
};

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "exchange_stress: %s\n", what);
  std::abort();
}

std::string Key(int key) { return "key" + std::to_string(key); }

Arrival NewArrival(int key, std::uint64_t pass, int participant, double value) {
  Arrival arrival;
  arrival.key = Key(key);
  arrival.phase = arrival.pass = pass;
  arrival.participant = static_cast<std::uint64_t>(participant);
  arrival.name = "device " + std::to_string(participant);
  arrival.num_devices = kParticipants;
  arrival.values = {value, -value, 1.0};
  return arrival;
}

// Every participant arrives under every key in every pass, in an order of its own, and then does
// the backward exchange of each round.
void AllArrive(unsigned seed, int rounds) {
  KeyBarrier barrier(60.0);
  std::vector<std::uint64_t> passes;
  for (int i = 0; i < rounds; ++i) passes.push_back(barrier.NewPass());
  const double sum = kParticipants * (kParticipants - 1) / 2.0;
  std::vector<Answer> forward(rounds * kKeys * kParticipants), backward(forward.size());
  const auto at = [](int round, int key, int p) {
    return (round * kKeys + key) * kParticipants + p;
  };

  std::vector<std::thread> threads;
  for (int p = 0; p < kParticipants; ++p) {
    threads.emplace_back([&, p] {
      std::mt19937 random(seed + static_cast<unsigned>(p));
      for (int round = 0; round < rounds; ++round) {
        std::vector<int> keys(kKeys);
        for (int k = 0; k < kKeys; ++k) keys[k] = k;
        std::shuffle(keys.begin(), keys.end(), random);
        for (const int key : keys) {
          barrier.NoteCall(Key(key), static_cast<std::uint64_t>(p), "device", 1);
          Answer& answer = forward[at(round, key, p)];
          barrier.Arrive(NewArrival(key, passes[round], p, p + 1000.0 * round),
                         [&, round](const Result& result) {
                           const double wanted = sum + kParticipants * 1000.0 * round;
                           answer.right = result.total != nullptr && (*result.total)[0] == wanted &&
                                          (*result.total)[1] == -wanted &&
                                          (*result.total)[2] == kParticipants;
                           answer.round = result.round;
                           ++answer.times;
                         });
        }
        for (const int key : keys) {
          Answer& answer = forward[at(round, key, p)];
          while (answer.times.load() == 0) std::this_thread::yield();
          Arrival arrival = NewArrival(key, passes[round], p, p);
          arrival.phase = answer.round;
          arrival.backward = true;
          Answer& back = backward[at(round, key, p)];
          barrier.Arrive(std::move(arrival), [&back, sum](const Result& result) {
            back.right = result.total != nullptr && (*result.total)[0] == sum;
            ++back.times;
          });
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto* answers : {&forward, &backward}) {
    for (const auto& answer : *answers) {
      if (answer.times != 1) Fail("a completion was not called exactly once");
      if (!answer.right) Fail("a sum is wrong");
    }
  }
}

// Passes are aborted, participants are absent, deadlines are short, and at last the barrier is
// closed.
void SomeFail(unsigned seed, int rounds) {
  auto barrier = std::make_unique<KeyBarrier>(0.005);
  std::vector<std::uint64_t> passes;
  for (int i = 0; i < rounds; ++i) passes.push_back(barrier->NewPass());
  std::vector<Answer> answers(rounds * kKeys * kParticipants);
  std::vector<char> arrived(answers.size(), 0);
  std::vector<std::thread> threads;
  for (int p = 0; p < kParticipants; ++p) {
    threads.emplace_back([&, p] {
      std::mt19937 random(seed + 100 + static_cast<unsigned>(p));
      for (int round = 0; round < rounds; ++round) {
        for (int key = 0; key < kKeys; ++key) {
          if (random() % 20 == 0) continue;
          const int i = (round * kKeys + key) * kParticipants + p;
          arrived[i] = 1;
          const std::uint64_t who = static_cast<std::uint64_t>(p);
          barrier->Announce({Key(key)}, who, {passes[round], kParticipants});
          barrier->SetPass(Key(key), who, {passes[round], kParticipants});
          if (barrier->PassOf(Key(key), who).id != passes[round]) Fail("a pass is wrong");
          Arrival arrival = NewArrival(key, passes[round], p, 1.0);
          if (random() % 8 == 0) arrival.ticket = barrier->TakeTicket(arrival.key, 0, who);
          if (random() % 50 == 0) {
            barrier->ReturnTicket(arrival.key, 0, who, barrier->TakeTicket(arrival.key, 0, who));
          }
          barrier->Arrive(std::move(arrival), [&answers, i](const Result& result) {
            answers[i].right = result.total == nullptr ? !result.error.empty()
                                                       : (*result.total)[0] == kParticipants;
            ++answers[i].times;
          });
        }
        if (p == 0 && random() % 4 == 0) barrier->Abort({passes[round]}, "told to.");
        if (p == 1 && random() % 16 == 0) barrier->SetTimeout(0.001 * (1 + random() % 8));
        if (p == 2 && barrier->Failures() < barrier->Failures(Key(0))) Fail("failures");
      }
    });
  }
  for (auto& thread : threads) thread.join();
  barrier->Close("the end");
  barrier.reset();
  for (std::size_t i = 0; i < answers.size(); ++i) {
    if (answers[i].times != arrived[i]) Fail("a completion was not called exactly once");
    if (arrived[i] != 0 && !answers[i].right) Fail("a sum is wrong, or an error has no reason");
  }
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed =
      argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : std::random_device()();
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 300;
  std::printf("exchange_stress: seed %u, %d rounds of %d keys and %d participants\n", seed, rounds,
              kKeys, kParticipants);
  AllArrive(seed, rounds);
  SomeFail(seed, rounds);
  std::printf("exchange_stress: every completion was called once, every sum was right\n");
}
