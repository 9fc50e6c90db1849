"""One persistent thread a device.

MXNet's temporary space and random state belong to the thread that pushes an operator.  Pushed from
one thread, a device's later layers can hold the space that another's earlier layers wait for: with
layers that wait for each other, a deadlock.  And what a thread once had is never given back, so
threads are kept.  docs/architecture.md has the whole story.
"""

import os
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import mxnet as mx
from mxnet import autograd

from . import random_state
from .key_barrier import BARRIER

_lock = threading.RLock()
_threads = {}  # Context -> an executor of one thread
if hasattr(os, "register_at_fork"):  # a forked child has none of the parent's threads
    os.register_at_fork(after_in_child=_threads.clear)


def _thread_of(context):
    with _lock:
        if context not in _threads:
            _threads[context] = ThreadPoolExecutor(1, thread_name_prefix=f"gluon_syncbn-{context}")
        return _threads[context]


def _in_state(context, function, recording, training):
    autograd.set_recording(recording)
    autograd.set_training(training)
    random_state.follow(context)
    with context:
        return function()


def run_on(context, function):
    """Run a function in a device's thread, and give its result or raise what it raises.

    In the caller's recording and training state.  From a device's thread it runs right there: two
    that waited for each other would do so for ever.
    """
    if random_state.is_device_thread():
        return function()
    state = autograd.is_recording(), autograd.is_training()
    return _thread_of(context).submit(_in_state, context, function, *state).result()


def settle():
    """Wait for everything that MXNet has pending, and raise the first error in it.

    Waiting clears the errors: what failed no longer stands in the way, and the arrays it should
    have written hold nothing.  So the error must not be dropped.
    """
    mx.nd.waitall()


def run(tasks, keys):
    """Run one function per device, each in its device's thread, and give their results.

    The functions run in the caller's recording and training state.  If one raises, the exchanges
    that the others wait in are ended, everything pending is let run out, and its exception is
    raised here; after that everything works as before.

    Parameters
    ----------
    tasks : list of (Context, callable)
    keys : list of str
        The exchanges that the functions may wait in; [""] for all.

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
    state = autograd.is_recording(), autograd.is_training()
    with _lock:  # two callers come to all devices in the same order, or they could wait crosswise
        futures = [
            _thread_of(context).submit(_in_state, context, function, *state)
            for context, function in tasks
        ]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
        failed = next((i for i, f in enumerate(futures) if f.done() and f.exception()), None)
        if failed is None:
            return [future.result() for future in futures]
        error, where = futures[failed].exception(), tasks[failed][0]
    except BaseException as interruption:  # Ctrl-C while the devices run
        error, where = interruption, None
    why = f"{where} raised {type(error).__name__}." if where else "the call was interrupted."
    BARRIER.abort(keys, why)
    try:
        wait(futures)
        try:
            settle()
        except mx.MXNetError:
            pass  # what `error` brought about
    finally:
        BARRIER.resume(keys)
    raise error
