"""One persistent thread a device.

MXNet's temporary space and random state belong to the thread that pushes an operator.  Pushed from
one thread, a device's later layers can hold the space that another's earlier layers wait for: with
layers that wait for each other, a deadlock.  A thread never gives back its space, so threads
are kept.  docs/architecture.md has the whole story.
"""

import os
import queue
import threading
import time
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import mxnet as mx
from mxnet import autograd, context
from mxnet.util import is_np_array, is_np_shape, np_array, np_shape

from .. import passes
from ..key_barrier import BARRIER
from . import random_state


class _Threads:
    """The threads, and the locks around them; a forked child begins with none of either."""

    def __init__(self):
        self.order = threading.RLock()  # all callers reach the devices in one order
        self.gluon = threading.RLock()  # around work that is not safe in several threads
        self.runs = weakref.WeakSet()
        self._executors = {}  # Context -> an executor of one thread

    def submit(self, device, function, *arguments):
        if device not in self._executors:
            name = f"gluon_syncbn-{device}"
            self._executors[device] = ThreadPoolExecutor(1, thread_name_prefix=name)
        return self._executors[device].submit(function, *arguments)


_threads = _Threads()
_device_thread = threading.local()
_forking = threading.local()


def _active_runs():
    return [run for run in list(_threads.runs) if run.is_active()]


def prepare_for_forks():
    """Fork between runs, and start afresh in every child.

    Within the fork, MXNet waits for everything that is pending, and Python's other threads stand
    still.  If one of them were running a network, a device could wait there for another whose part
    has not been called.  A child has no threads that could release its locks.
    """

    def before():
        _forking.held = False
        me, end = threading.get_ident(), time.monotonic() + BARRIER.timeout
        if random_state.is_device_thread() or any(run.caller == me for run in _active_runs()):
            return  # from within a run, it would wait for itself
        _forking.held = _threads.order.acquire(timeout=BARRIER.timeout)  # no other run begins
        while _active_runs() and time.monotonic() < end:
            time.sleep(0.0005)

    def in_parent():
        if _forking.held:
            _threads.order.release()

    def in_child():
        global _threads
        _threads = _Threads()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)


class _State:
    """MXNet's modes of a thread, so that another thread can run something as that one would."""

    def __init__(self):
        self._modes = autograd.is_recording(), autograd.is_training()
        self._context = context.current_context()
        self._numpy = is_np_shape(), is_np_array()  # mx.npx.set_np

    def run(self, function):
        before = autograd.is_recording(), autograd.is_training()
        self._set(*self._modes)
        try:
            with np_shape(self._numpy[0]), np_array(self._numpy[1]), self._context:
                return function()
        finally:
            self._set(*before)

    @staticmethod
    def _set(recording, training):
        autograd.set_recording(recording)
        autograd.set_training(training)


class _Request:
    """Work that a device's thread wants done in its caller's thread."""

    def __init__(self, function):
        self._function, self._state = function, _State()
        self._done = threading.Event()
        self._result = self._error = None

    def serve(self):
        try:
            with _threads.gluon:
                self._result = self._state.run(self._function)
        except BaseException as error:
            self.refuse(error)
            if not isinstance(error, Exception):
                raise  # Ctrl-C is the caller's
        self._done.set()

    def refuse(self, error):
        self._error = error
        self._done.set()

    def result(self):
        self._done.wait()
        try:
            if self._error is not None:
                raise self._error
            return self._result
        finally:
            self._error = None  # or it and its traceback would keep each other


def in_callers_thread(function):
    """Run a function alone among those of Gluon that are not safe in several threads.

    Called in a device's thread, it runs the function in the thread that called ``run``, which waits
    for the devices; called in any other, right there.
    """
    this_run = getattr(_device_thread, "run", None)
    if this_run is None:
        with _threads.gluon:
            return function()
    return this_run.ask(_Request(function))


def wait_for_all():
    """Wait for everything that MXNet has pending, and raise the first error in it.

    Waiting clears the errors, and the arrays that should have been written hold nothing.  So the
    error must not be dropped.
    """
    mx.nd.waitall()


class _Task:
    """One device's function, and what has become of it."""

    def __init__(self, device, function):
        self.device, self.function = device, function
        self.begun = self.done = False
        self.result = self.error = None


class _Run:
    """One function per device, each in its device's thread; see :func:`run`.

    Ctrl-C may interrupt the caller between any two steps.  So what is to be done and what has been
    is in lists, which it leaves alone; the queue only wakes the caller.
    """

    def __init__(self):
        self._wake = queue.SimpleQueue()
        self._tasks = []
        self._failed = []  # tasks, in the order in which they raised
        self._requests = deque()  # not yet served
        self._lock = threading.Lock()
        self._given_up = False  # tasks that have not begun never will
        self.caller = threading.get_ident()

    def submit(self, tasks, a_pass):
        state = _State()
        self._tasks = [_Task(*task) for task in tasks]
        with _threads.order:  # or two callers could each wait for a thread that the other has
            _threads.runs.add(self)
            for task in self._tasks:
                _threads.submit(task.device, self._in_device_thread, task, state, a_pass)

    def _in_device_thread(self, task, state, a_pass):
        with self._lock:
            if self._given_up:
                return
            task.begun = True
        try:
            random_state.follow(task.device)
            _device_thread.run = self
            with passes.running(a_pass):
                task.result = state.run(lambda: _on(task.device, task.function))
        except BaseException as error:
            task.error = error
            self._failed.append(task)
        finally:
            _device_thread.run = None
            task.done = True
            self._wake.put(None)

    def is_active(self):
        """Whether a device is running its part, or will."""
        return any(not t.done and (t.begun or not self._given_up) for t in self._tasks)

    def ask(self, request):
        """Let the caller serve a request of a device's thread."""
        self._requests.append(request)
        self._wake.put(None)
        return request.result()

    def first_error(self):
        """Serve the devices until all are done, or one has failed; return its exception."""
        while True:
            if self._failed:
                return self._failed[0].error
            if self._requests:
                self._requests[0].serve()
                self._requests.popleft()
            elif all(task.done for task in self._tasks):
                return None
            else:
                self._wake.get()

    def give_up(self, error):
        """Wait until the other devices have ended; refuse what they ask for."""
        with self._lock:
            self._given_up = True
        while any(task.begun and not task.done for task in self._tasks):
            for request in list(self._requests):
                request.refuse(error)
            try:
                self._wake.get(timeout=0.1)
            except queue.Empty:
                pass  # an interruption may have taken what was in it

    def where(self, error):
        """The number of the task that raised."""
        return next((i for i, task in enumerate(self._tasks) if task.error is error), None)

    def results(self):
        return [task.result for task in self._tasks]

    def forget(self):
        """Forget what was run, which exceptions keep alive by their tracebacks, and they it."""
        self._tasks, self._failed = [], []
        self._requests.clear()


def _on(device, function):
    with device:
        return function()


def run_on(device, function):
    """Run a function in a device's thread, and give its result or raise what it raises.

    In the caller's modes.  From a device's thread it runs right there: two that waited for each
    other would do so for ever.
    """
    if random_state.is_device_thread():
        return function()
    this_run = _Run()
    try:
        this_run.submit([(device, function)], passes.current())
        error = this_run.first_error()
    except BaseException as interruption:
        this_run.give_up(interruption)
        raise
    try:
        if error is not None:
            raise error
        return this_run.results()[0]
    finally:
        error = None
        this_run.forget()


def run(tasks, a_pass=None, fail=None):
    """Run one function per device, each in its device's thread, and give their results.

    The functions run in the caller's modes.  If one raises, no device may wait for it any longer:
    ``fail`` tells the exchange.  Then everything pending runs out, and the exception is raised
    here; after that everything works as before.

    Parameters
    ----------
    tasks : list of (Context, callable)
    a_pass : Pass, optional
        The pass that they are parts of.
    fail : callable, optional
        Called with the reason; by default the pass's ``fail``.

    Returns
    -------
    list
        In the order of ``tasks``.
    """
    if random_state.is_device_thread():
        raise RuntimeError(
            "a device's thread cannot run all devices: it would wait for itself; call "
            "ModelDataParallel and parallel_backward from outside of networks"
        )
    this_run = _Run()
    try:
        this_run.submit(tasks, a_pass)
        error = this_run.first_error()
    except BaseException as interruption:  # Ctrl-C while the devices run
        error = interruption
    if error is None:
        return this_run.results()
    number = this_run.where(error)
    why = "the call was interrupted."
    if number is not None:
        why = f"{tasks[number][0]} raised {type(error).__name__}."
    (fail or a_pass.fail)(why)
    this_run.give_up(error)
    try:
        wait_for_all()
    except mx.MXNetError:
        pass  # what `error` brought about
    try:
        raise error
    finally:
        error = None
        this_run.forget()
