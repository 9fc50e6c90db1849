"""All-reduces when the engine or the system fails, or the process forks.

Each test has a process of its own, because its bug would hang it or corrupt its memory.
"""

import faults


def test_a_call_is_not_complete_while_its_thread_is_inside():
    """Even if its device has another worker: MXNet would free what it still needs."""
    faults.run(
        """
import threading
x = mx.sym.contrib.KeyBarrierSum(mx.sym.var("x"), key="k", num_devices=1)
executor = x.bind(mx.cpu(0), {"x": mx.nd.ones(3)})
mx.nd.waitall()
faults.hold_push.value = 1
executor.forward()
wait_for(faults.hold_push, 2)
reader = threading.Thread(target=executor.outputs[0].wait_to_read)
reader.start()
reader.join(0.3)
assert reader.is_alive()
faults.hold_push.value = 0
reader.join(30)
assert not reader.is_alive()
assert executor.outputs[0].asnumpy().tolist() == [1, 1, 1]
""",
        MXNET_CPU_WORKER_NTHREADS="2",
    )


def test_a_push_that_fails_fails_its_call_and_the_next_one_works():
    """The push that queues the completion, from the call's own thread or from another device's."""
    faults.run(
        """
def bind(number, devices):
    y = mx.sym.contrib.KeyBarrierSum(mx.sym.var("x"), key="k", num_devices=devices)
    return y.bind(mx.cpu(number), {"x": mx.nd.ones(3, ctx=mx.cpu(number))})

def read(executor):
    try:
        return executor.outputs[0].asnumpy().tolist()
    except mx.MXNetError as error:
        return str(error)

lone = bind(0, 1)
first, second = bind(0, 2), bind(1, 2)
mx.nd.waitall()
for fail in (1, 0, 1, 0):
    faults.pushes.value = fail
    lone.forward()
    result = read(lone)
    assert "Non-negative number of const vars" in result if fail else result == [1, 1, 1], result
for fail in (1, 0, 1, 0):
    first.forward()
    mx.nd.ones(1, ctx=mx.cpu(0)).wait_to_read()  # the worker has left the call
    faults.pushes.value = fail
    second.forward()
    result = read(first)
    assert "Non-negative number of const vars" in result if fail else result == [2, 2, 2], result
    assert read(second) == [2, 2, 2]
"""
    )


FORK = """
import os
import signal
import sys
import threading
from gluon_syncbn.library import DONE, LIBRARY

def exchange():
    xs = [mx.nd.ones(3, ctx=mx.cpu(i)) for i in range(2)]
    ys = [mx.nd.contrib.KeyBarrierSum(x, key="k", num_devices=2) for x in xs]
    assert [y.asnumpy().tolist() for y in ys] == [[2, 2, 2]] * 2

def in_child(function):
    process = os.fork()
    if process == 0:
        signal.alarm(60)  # ends it even where it holds the GIL
        function()
        sys.exit(0)
    return os.waitpid(process, 0)[1]
"""


def test_a_forked_child_exchanges_and_ends():
    faults.run(
        FORK
        + """
def exchange_and_set():
    assert gluon_syncbn.get_timeout() == 23
    exchange()
    gluon_syncbn.set_timeout(7)

def fork_again():
    assert in_child(exchange) == 0

gluon_syncbn.set_timeout(23)
exchange()  # the barrier's own thread runs from here on, in the parent
for child in (int, exchange, exchange_and_set, fork_again):
    assert in_child(child) == 0, child
exchange()
""",
    )


def test_a_fork_while_another_thread_is_in_the_barrier():
    """It holds the barrier's lock, and does not exist in the child to release it."""
    faults.run(
        FORK
        + """
def arrive():
    faults.hold_thread.value = 1
    LIBRARY.BarrierArrive(
        None, b"other", 0, 0, 0, b"cpu", b"device 0", 2, 0, (ctypes.c_double * 1)(1), 1, done, None
    )

def run():
    gluon_syncbn.set_timeout(7)
    exchange()

done = DONE(lambda *_: None)
for i in range(2):
    mx.nd.ones(3, ctx=mx.cpu(i)).wait_to_read()  # the engine has its threads
thread = threading.Thread(target=arrive)
thread.start()
wait_for(faults.hold_thread, 2)
assert in_child(run) == 0
thread.join()
"""
    )


def test_a_thread_that_cannot_be_started_fails_the_exchange_and_the_next_one_works():
    """The barrier's own thread, which enforces the deadline."""
    faults.run(
        """
def exchange(first, last):
    xs = [mx.nd.ones(3, ctx=mx.cpu(i)) for i in range(first, last)]
    mx.nd.waitall()
    return [mx.nd.contrib.KeyBarrierSum(x, key="k", num_devices=2) for x in xs]

for i in range(2):
    mx.nd.ones(3, ctx=mx.cpu(i)).wait_to_read()  # the engine has its threads
faults.threads.value = 1
(y,) = exchange(0, 1)
assert faults.threads.value == 0
try:
    y.asnumpy()
    raise AssertionError("it succeeded")
except mx.MXNetError as error:
    assert "no thread could be started" in str(error) and "ulimit" in str(error), error
assert [y.asnumpy().tolist() for y in exchange(0, 2)] == [[2, 2, 2]] * 2
gluon_syncbn.set_timeout(0.3)
(y,) = exchange(1, 2)
try:
    y.asnumpy()
    raise AssertionError("it succeeded")
except mx.MXNetError as error:
    assert "within 0.3 s" in str(error), error
"""
    )
