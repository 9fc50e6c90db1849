// Messages between processes by MPI.
#pragma once

#include <mpi.h>

#include <list>
#include <string>

#include "processes/mail.h"

namespace gluon_syncbn {

class MpiMail : public Mail {
 public:
  // `comm` is for these messages alone.  It is not freed here.
  explicit MpiMail(MPI_Comm comm);
  ~MpiMail() override;
  MpiMail(const MpiMail&) = delete;
  MpiMail& operator=(const MpiMail&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  void Send(int to, std::string message) override;
  bool Receive(int* from, std::string* message) override;
  bool Sent() override;

 private:
  struct Transfer {
    int peer;
    std::string message;
    MPI_Request request;
  };

  MPI_Comm comm_;
  int rank_ = 0, size_ = 1;
  std::list<Transfer> outgoing_, incoming_;  // lists: MPI keeps addresses of their entries
};

}  // namespace gluon_syncbn
