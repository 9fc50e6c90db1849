// Times one exchange between MPI ranks, by this package's transport and by MPI's collectives.
//
//   mpirun -n 4 ranks_bench VALUES ROUNDS PAUSE
//
// Prints, on rank 0, the median microseconds of each; they take turns.  Before each round the ranks
// meet.  With PAUSE microseconds they then sleep, so that every thread sleeps when the round
// begins, as between the layers of a slow network.
#include <mpi.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "exchange/key_barrier.h"
#include "exchange/merge.h"
#include "processes/mpi_mail.h"
#include "processes/process_all_reduce.h"

namespace {

using gluon_syncbn::Merge;
using gluon_syncbn::MergeInto;
using Values = std::vector<double>;
using Clock = std::chrono::steady_clock;

double Microseconds(Clock::time_point since) {
  return std::chrono::duration<double, std::micro>(Clock::now() - since).count();
}

double Median(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// The exchange's merge of moments as an MPI_Op: in = in (lower ranks) merged with inout.
void MergeMoments(void* in, void* inout, int* count, MPI_Datatype* type) {
  int bytes = 0;
  MPI_Type_size(*type, &bytes);
  const std::size_t n = static_cast<std::size_t>(bytes) / sizeof(double);
  for (int i = 0; i < *count; ++i) {
    double* const to = static_cast<double*>(inout) + static_cast<std::size_t>(i) * n;
    const double* const from = static_cast<double*>(in) + static_cast<std::size_t>(i) * n;
    Values total(from, from + n);
    MergeInto(Merge::kMoments, Values(to, to + n), &total);
    std::copy(total.begin(), total.end(), to);
  }
}

void Poll(MPI_Request request) {
  for (int done = 0; !done;) MPI_Test(&request, &done, MPI_STATUS_IGNORE);
}

}  // namespace

int main(int argc, char** argv) {
  int level = 0, rank = 0, size = 1;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &level);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  const std::size_t count = argc > 1 ? static_cast<std::size_t>(std::atoi(argv[1])) : 129;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 1000;
  const std::chrono::microseconds pause(argc > 3 ? std::atoi(argv[3]) : 0);

  MPI_Comm own;
  MPI_Comm_dup(MPI_COMM_WORLD, &own);
  const auto transport = std::make_shared<gluon_syncbn::ProcessAllReduce>(
      std::make_unique<gluon_syncbn::MpiMail>(own), std::vector<std::string>{"key"},
      std::vector<std::string>(static_cast<std::size_t>(size), "rank"), 60.0);
  gluon_syncbn::KeyBarrier barrier(60.0);
  barrier.SetTransport("key", transport);

  MPI_Datatype vector;
  MPI_Type_contiguous(static_cast<int>(count), MPI_DOUBLE, &vector);
  MPI_Type_commit(&vector);
  MPI_Op merge;
  MPI_Op_create(MergeMoments, 0, &merge);

  Values mine(count), total(count), all(count * static_cast<std::size_t>(size));
  for (std::size_t i = 0; i < count; ++i)
    mine[i] = 1.0 + static_cast<double>(rank) + 0.1 * static_cast<double>(i);

  const std::vector<std::pair<const char*, std::function<void()>>> ways = {
      {"exchange",
       [&] {
         std::atomic<bool> done{false};
         gluon_syncbn::Arrival arrival;
         arrival.key = "key";
         arrival.kind = arrival.name = "cpu";
         arrival.values = mine;
         arrival.merge = Merge::kMoments;
         arrival.spin = true;  // as on CPU contexts
         barrier.Arrive(std::move(arrival), [&](const gluon_syncbn::Result& result) {
           if (result.total == nullptr) {
             std::fprintf(stderr, "%s\n", result.error.c_str());
             std::exit(1);
           }
           total = *result.total;
           done = true;
         });
         while (!done) std::this_thread::yield();
       }},
      {"MPI_Allreduce",
       [&] {
         MPI_Allreduce(mine.data(), total.data(), static_cast<int>(count), MPI_DOUBLE, MPI_SUM,
                       MPI_COMM_WORLD);
       }},
      {"MPI_Iallreduce, merge as MPI_Op",
       [&] {
         MPI_Request request;
         MPI_Iallreduce(mine.data(), total.data(), 1, vector, merge, MPI_COMM_WORLD, &request);
         Poll(request);
       }},
      {"MPI_Iallgather, merged in rank order",
       [&] {
         MPI_Request request;
         MPI_Iallgather(mine.data(), static_cast<int>(count), MPI_DOUBLE, all.data(),
                        static_cast<int>(count), MPI_DOUBLE, MPI_COMM_WORLD, &request);
         Poll(request);
         total.assign(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(count));
         for (int r = 1; r < size; ++r) {
           const auto from = all.begin() + static_cast<std::ptrdiff_t>(count) * r;
           MergeInto(Merge::kMoments, Values(from, from + static_cast<std::ptrdiff_t>(count)),
                     &total);
         }
       }},
  };
  std::vector<std::vector<double>> times(ways.size());
  for (int round = 0; round < rounds; ++round) {
    for (std::size_t way = 0; way < ways.size(); ++way) {
      MPI_Barrier(MPI_COMM_WORLD);
      if (pause.count() != 0) std::this_thread::sleep_for(pause);
      const auto start = Clock::now();
      ways[way].second();
      times[way].push_back(Microseconds(start));
    }
  }
  for (std::size_t way = 0; rank == 0 && way < ways.size(); ++way) {
    std::printf("%s\t%.1f\n", ways[way].first, Median(times[way]));
  }
  transport->Stop("done");
  MPI_Op_free(&merge);
  MPI_Type_free(&vector);
  MPI_Finalize();
}
