// Injects faults that a healthy machine never shows, into tests that preload this (faults.py).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <unistd.h>

// How many of the next calls are to fail.
atomic_int faults_pushes, faults_threads;
// Set to 1, the next push does not return after it has pushed: it sets this to 2 and waits for 0.
atomic_int faults_hold_push;
// Set to 1, the next start of a thread returns a second late, and sets this to 2 before.
atomic_int faults_hold_thread;

static bool Fails(atomic_int* left) {
  int n = atomic_load(left);
  while (n > 0) {
    if (atomic_compare_exchange_weak(left, &n, n - 1)) return true;
  }
  return false;
}

// The original is in libmxnet.so, which RTLD_NEXT does not find.
int MXEnginePushAsync(void* function, void* parameter, void* deleter, void* context,
                      void* const_vars, int num_const_vars, void* mutable_vars,
                      int num_mutable_vars, void* property, int priority, const char* name,
                      bool wait) {
  int (*push)(void*, void*, void*, void*, void*, int, void*, int, void*, int, const char*, bool) =
      dlsym(dlopen("libmxnet.so", RTLD_LAZY | RTLD_NOLOAD), "MXEnginePushAsync");
  if (Fails(&faults_pushes)) num_const_vars = -1;  // which MXNet refuses
  int once = 1;
  const bool hold = atomic_compare_exchange_strong(&faults_hold_push, &once, 0);
  const int failed = push(function, parameter, deleter, context, const_vars, num_const_vars,
                          mutable_vars, num_mutable_vars, property, priority, name, wait);
  if (hold) {
    atomic_store(&faults_hold_push, 2);
    while (atomic_load(&faults_hold_push) != 0) usleep(100);
  }
  return failed;
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                   void* argument) {
  int (*create)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) =
      dlsym(RTLD_NEXT, "pthread_create");
  if (Fails(&faults_threads)) return EAGAIN;
  int once = 1;
  const bool hold = atomic_compare_exchange_strong(&faults_hold_thread, &once, 0);
  const int failed = create(thread, attributes, start, argument);
  if (hold) {
    atomic_store(&faults_hold_thread, 2);
    sleep(1);
  }
  return failed;
}
