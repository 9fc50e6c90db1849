// How processes send each other messages, as the all-reduce between them sees it.
#pragma once

#include <string>

namespace gluon_syncbn {

// Belongs to one thread.  All functions return at once; they throw std::exception if the
// connection fails.
class Mail {
 public:
  virtual ~Mail() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual void Send(int to, std::string message) = 0;
  // Takes the next message that is there.  Two messages of one sender keep their order.
  virtual bool Receive(int* from, std::string* message) = 0;
  // Whether everything has been sent.
  virtual bool Sent() = 0;
};

}  // namespace gluon_syncbn
