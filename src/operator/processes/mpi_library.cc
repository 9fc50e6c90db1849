// The C functions of libgluon_syncbn_mpi.so, which gluon_syncbn.distributed loads.
//
// A library of its own, so that everything else works without MPI.  It does not link the main
// library: what they share are the classes of exchange/transport.h.
#include <mpi.h>

#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "processes/mpi_mail.h"
#include "processes/process_all_reduce.h"

#define GLUON_SYNCBN_API extern "C" __attribute__((visibility("default")))

namespace gluon_syncbn {
namespace {

thread_local std::string last_error;

// A network's connection to other processes.
struct Attachment {
  std::shared_ptr<Transport> transport;
  std::shared_ptr<ProcessAllReduce> all_reduce;
};

// MPI_Finalize first deletes the attributes of MPI_COMM_SELF: the last moment at which messages can
// be sent, whoever calls it (MPI 4.0, section 11.2.4).  Horovod calls it in a thread of its own, at
// any time, when another process has ended; so the attribute stays until then, even if the
// attachment is freed, and nothing else here asks MPI whether it is finalized.
int EndAtFinalize(MPI_Comm, int, void* attribute, void*) {
  const std::unique_ptr<std::weak_ptr<ProcessAllReduce>> all_reduce{
      static_cast<std::weak_ptr<ProcessAllReduce>*>(attribute)};
  if (const auto alive = all_reduce->lock()) alive->End("MPI was finalized");
  return MPI_SUCCESS;
}

void EndAtFinalize(const std::shared_ptr<ProcessAllReduce>& all_reduce) {
  int key = MPI_KEYVAL_INVALID;
  MPI_Comm_create_keyval(MPI_COMM_NULL_COPY_FN, EndAtFinalize, &key, nullptr);
  MPI_Comm_set_attr(MPI_COMM_SELF, key,
                    std::make_unique<std::weak_ptr<ProcessAllReduce>>(all_reduce).release());
  MPI_Comm_free_keyval(&key);  // takes effect when no attribute has it
}

std::vector<std::string> Strings(const char* const* strings, int count) {
  return std::vector<std::string>(strings, strings + count);
}

}  // namespace
}  // namespace gluon_syncbn

using gluon_syncbn::Attachment;
using gluon_syncbn::Strings;

GLUON_SYNCBN_API const char* GluonSyncBNMpiLastError() { return gluon_syncbn::last_error.c_str(); }

// The family of MPI that this library was compiled for: handles and constants differ between them.
GLUON_SYNCBN_API const char* GluonSyncBNMpiFamily() {
#if defined(OPEN_MPI)
  return "Open MPI";
#elif defined(MPICH_VERSION)  // also of Intel MPI and MVAPICH, which share its binary interface
  return "MPICH";
#else
  return "another MPI";
#endif
}

// Which MPI was loaded for this library, to be compared with mpi4py's.
GLUON_SYNCBN_API const char* GluonSyncBNMpiVersion() {
  static char version[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(version, &length);
  return version;
}

// Connects the `count` keys over a communicator, given by its Fortran handle, that is used for
// nothing else.  `names`: of its ranks.  Null on failure.
GLUON_SYNCBN_API void* GluonSyncBNMpiAttach(int comm, const char* const* keys, int count,
                                            const char* const* names, double timeout_seconds) {
  try {
    auto mail = std::make_unique<gluon_syncbn::MpiMail>(MPI_Comm_f2c(comm));
    auto rank_names = Strings(names, mail->size());
    auto attachment = std::make_unique<Attachment>();
    attachment->all_reduce = std::make_shared<gluon_syncbn::ProcessAllReduce>(
        std::move(mail), Strings(keys, count), std::move(rank_names), timeout_seconds);
    attachment->transport = attachment->all_reduce;
    gluon_syncbn::EndAtFinalize(attachment->all_reduce);
    return attachment.release();
  } catch (const std::exception& e) {
    gluon_syncbn::last_error = e.what();
    return nullptr;
  }
}

// What the main library takes.
GLUON_SYNCBN_API const void* GluonSyncBNMpiTransport(void* attachment) {
  return &static_cast<Attachment*>(attachment)->transport;
}

// See process_all_reduce.h for these.
GLUON_SYNCBN_API void GluonSyncBNMpiNumberCall(void* attachment, const char* key, int call,
                                               int use) {
  static_cast<Attachment*>(attachment)->all_reduce->NumberCall(key, call, use);
}

GLUON_SYNCBN_API void GluonSyncBNMpiSetSilent(void* attachment, int silent) {
  static_cast<Attachment*>(attachment)->all_reduce->SetSilent(silent != 0);
}

// Stops an attachment; returns whether it had failed.
GLUON_SYNCBN_API int GluonSyncBNMpiStop(void* attachment, const char* why) {
  auto& all_reduce = *static_cast<Attachment*>(attachment)->all_reduce;
  all_reduce.Stop(why);
  return all_reduce.failed() ? 1 : 0;
}

// Of one that was stopped: returns whether the other processes have stopped theirs within
// `seconds`, or MPI has been finalized.
GLUON_SYNCBN_API int GluonSyncBNMpiWaitForGoodbyes(void* attachment, double seconds) {
  return static_cast<Attachment*>(attachment)->all_reduce->WaitForGoodbyes(seconds) ? 1 : 0;
}

// Ends all processes.
GLUON_SYNCBN_API void GluonSyncBNMpiAbort() { MPI_Abort(MPI_COMM_WORLD, 1); }

// Frees one that was stopped.
GLUON_SYNCBN_API void GluonSyncBNMpiFree(void* attachment) {
  std::unique_ptr<Attachment>{static_cast<Attachment*>(attachment)};
}
