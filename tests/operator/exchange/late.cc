// Participants that come late to the exchange, outside of passes: most calls are delayed, some
// beyond the deadline, and some participants stop in the middle.  Every completion is called once,
// with the right sum of its own round or with an error; never with the sum of another round.
//
//   late SEED [BATCHES]
//
// As in a program, a batch of calls is made on all participants in one order, and its arrivals then
// come in any order.  When all have ended, the program begins anew with the next batch.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "exchange/key_barrier.h"

namespace {

using gluon_syncbn::Arrival;
using gluon_syncbn::KeyBarrier;
using gluon_syncbn::Result;

constexpr int kParticipants = 3;
constexpr int kCalls = 6;  // of a key in a batch

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "late: %s\n", what.c_str());
  std::abort();
}

struct Call {
  Arrival arrival;
  int delay;  // microseconds
};

}  // namespace

int main(int argc, char** argv) {
  const unsigned seed =
      argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : std::random_device{}();
  const int batches = argc > 2 ? std::atoi(argv[2]) : 300;
  std::printf("late: seed %u\n", seed);
  std::fflush(stdout);
  std::mt19937 random(seed);
  constexpr int kDeadline = 3000;  // microseconds
  KeyBarrier barrier(1e-6 * kDeadline);
  std::atomic<int> ended{0}, right{0}, late{0};
  int calls = 0;
  double base = 0;
  for (int batch = 0; batch < batches; ++batch) {
    const bool in_order = random() % 2 == 0;  // with tickets, or as a layer's calls: by the engine
    const int slow = static_cast<int>(random() % 4);  // 3: nobody
    const int stops = static_cast<int>(random() % 6);
    const int stops_at = static_cast<int>(random() % kCalls);
    std::vector<std::vector<Call>> of(kParticipants);
    for (int i = 0; i < kCalls; ++i) {
      for (int p = 0; p < kParticipants; ++p) {
        if (p == stops && i >= stops_at) continue;
        Call call;
        Arrival& arrival = call.arrival;
        arrival.key = "key";
        arrival.participant = static_cast<std::uint64_t>(p);
        arrival.name = "device " + std::to_string(p);
        arrival.num_devices = kParticipants;
        arrival.values = {base + i};
        arrival.called = gluon_syncbn::Clock::now();
        if (in_order) arrival.ticket = barrier.TakeTicket("key", 0, arrival.participant);
        const int longest = p == slow && random() % 3 == 0 ? 2 * kDeadline : 300;
        call.delay = static_cast<int>(random() % static_cast<unsigned>(longest));
        of[static_cast<std::size_t>(p)].push_back(std::move(call));
        ++calls;
      }
    }
    if (in_order) {
      for (auto& queue : of) std::shuffle(queue.begin(), queue.end(), random);
    }
    std::vector<std::thread> threads;
    for (auto& queue : of) {
      threads.emplace_back([&] {
        for (auto& call : queue) {
          std::this_thread::sleep_for(std::chrono::microseconds(call.delay));
          const double wanted = kParticipants * call.arrival.values[0];
          barrier.Arrive(std::move(call.arrival), [&, wanted](const Result& result) {
            if (result.total == nullptr) {
              if (result.error.empty()) Fail("an error without a reason");
              if (result.error.find("came after its round") != std::string::npos) ++late;
            } else if ((*result.total)[0] != wanted) {
              Fail("a sum of another round");
            } else {
              ++right;
            }
            ++ended;
          });
        }
      });
    }
    for (auto& thread : threads) thread.join();
    while (ended < calls) std::this_thread::yield();
    base += kCalls;
  }
  if (right == 0 || late == 0) Fail("nothing succeeded, or nothing was late");
  std::printf("late: %d calls: %d right, %d late, %d other errors\n", calls, right.load(),
              late.load(), calls - right - late);
}
