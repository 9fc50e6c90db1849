// See mpi_mail.h.
#include "processes/mpi_mail.h"

#include <memory>
#include <set>
#include <stdexcept>
#include <utility>

namespace gluon_syncbn {
namespace {

constexpr int kTag = 0;

void Check(int code) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw std::runtime_error(std::string(text, static_cast<std::size_t>(length)));
}

bool Done(MPI_Request* request) {
  int done = 0;
  Check(MPI_Test(request, &done, MPI_STATUS_IGNORE));
  return done != 0;
}

}  // namespace

MpiMail::MpiMail(MPI_Comm comm) : comm_(comm) {
  Check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN));
  Check(MPI_Comm_rank(comm_, &rank_));
  Check(MPI_Comm_size(comm_, &size_));
}

MpiMail::~MpiMail() {
  if (outgoing_.empty() && incoming_.empty()) return;
  // To a process that takes nothing any more.  MPI may still use the buffers, so they stay for
  // good.
  std::make_unique<std::list<Transfer>>(std::move(outgoing_)).release();
  std::make_unique<std::list<Transfer>>(std::move(incoming_)).release();
}

void MpiMail::Send(int to, std::string message) {
  outgoing_.push_back({to, std::move(message), MPI_REQUEST_NULL});
  Transfer& transfer = outgoing_.back();
  Check(MPI_Isend(transfer.message.data(), static_cast<int>(transfer.message.size()), MPI_BYTE, to,
                  kTag, comm_, &transfer.request));
}

bool MpiMail::Sent() {
  outgoing_.remove_if([](Transfer& transfer) { return Done(&transfer.request); });
  return outgoing_.empty();
}

bool MpiMail::Receive(int* from, std::string* message) {
  Sent();
  for (;;) {
    int there = 0, bytes = 0;
    MPI_Message handle;
    MPI_Status status;
    Check(MPI_Improbe(MPI_ANY_SOURCE, kTag, comm_, &there, &handle, &status));
    if (!there) break;
    Check(MPI_Get_count(&status, MPI_BYTE, &bytes));
    incoming_.push_back(
        {status.MPI_SOURCE, std::string(static_cast<std::size_t>(bytes), '\0'), MPI_REQUEST_NULL});
    Transfer& transfer = incoming_.back();
    Check(MPI_Imrecv(&transfer.message[0], bytes, MPI_BYTE, &handle, &transfer.request));
  }
  std::set<int> earlier;  // senders of messages that are still arriving
  for (auto transfer = incoming_.begin(); transfer != incoming_.end(); ++transfer) {
    if (earlier.count(transfer->peer) == 0 && Done(&transfer->request)) {
      *from = transfer->peer;
      *message = std::move(transfer->message);
      incoming_.erase(transfer);
      return true;
    }
    earlier.insert(transfer->peer);
  }
  return false;
}

}  // namespace gluon_syncbn
