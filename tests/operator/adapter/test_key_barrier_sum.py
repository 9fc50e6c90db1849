"""KeyBarrierSum as users call it, imperatively and in a graph."""

from concurrent.futures import ThreadPoolExecutor

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

import fresh_process
import gluon_syncbn
from held import held

CONTEXTS = [mx.cpu(i) for i in range(4)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_sum_and_gradient(dtype, devices, shape, rng):
    values = [rng.randn(*shape).astype(dtype) for _ in range(devices)]
    heads = [rng.randn(*shape).astype(dtype) for _ in range(devices)]
    xs = [mx.nd.array(v, ctx=c, dtype=dtype) for v, c in zip(values, CONTEXTS)]
    for x in xs:
        x.attach_grad()
    with autograd.record():
        ys = [mx.nd.contrib.KeyBarrierSum(x, key="k", num_devices=devices) for x in xs]
    for y, head in zip(ys, heads):
        y.backward(mx.nd.array(head, ctx=y.ctx, dtype=dtype))
    tolerance = 1e-6 if dtype == "float32" else 1e-14
    for x, y in zip(xs, ys):
        assert y.dtype == x.grad.dtype == np.dtype(dtype)
        np.testing.assert_allclose(y.asnumpy(), sum(values), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(x.grad.asnumpy(), sum(heads), rtol=tolerance, atol=tolerance)


def test_gradient_is_added_where_asked():
    xs = [mx.nd.ones(3, ctx=c) for c in CONTEXTS[:2]]
    for x in xs:
        x.attach_grad("add")
    for _ in range(2):
        with autograd.record():
            ys = [mx.nd.contrib.KeyBarrierSum(x, key="k", num_devices=2) * 3 for x in xs]
        for y in ys:
            y.backward()
    for x in xs:
        np.testing.assert_array_equal(x.grad.asnumpy(), [12, 12, 12])


def test_backward_belongs_to_its_own_forward_in_any_order():
    xs = [[mx.nd.full(1, 10**i, ctx=c) for i in range(3)] for c in CONTEXTS[:2]]
    ys = []
    for row in xs:
        for x in row:
            x.attach_grad()
        with autograd.record():
            ys.append([mx.nd.contrib.KeyBarrierSum(x, key="k", num_devices=2) for x in row])
    for i in (0, 1, 2):  # one device backward in one order, the other in the opposite
        ys[0][i].backward(mx.nd.full(1, 10**i, ctx=CONTEXTS[0]))
    for i in (2, 1, 0):
        ys[1][i].backward(mx.nd.full(1, 2 * 10**i, ctx=CONTEXTS[1]))
    for row in xs:
        assert [x.grad.asscalar() for x in row] == [3, 30, 300]


def test_calls_are_matched_in_the_order_of_the_program(rng):
    """Even if their inputs become ready in another order."""
    for _ in range(20):
        ys = []
        for i, context in enumerate(CONTEXTS[:2]):
            slow = mx.nd.array(rng.rand(300, 300), ctx=context)
            for _ in range(3):
                slow = mx.nd.dot(slow, slow) / 100
            late, ready = mx.nd.ones(2, ctx=context) + 0 * slow[0, :2], mx.nd.ones(2, ctx=context)
            ready.wait_to_read()
            first, second = (late, 100 * ready) if i == 0 else (ready, 100 * late)
            ys.append(
                [mx.nd.contrib.KeyBarrierSum(x, key="k", num_devices=2) for x in (first, second)]
            )
        for first, second in ys:
            np.testing.assert_array_equal(first.asnumpy(), [2, 2])
            np.testing.assert_array_equal(second.asnumpy(), [200, 200])


def test_a_call_that_waits_for_an_earlier_one_names_it():
    """Calls of a key keep their order, so later ones wait for it, up to the deadline."""
    gluon_syncbn.set_timeout(0.3)
    with held(mx.nd.ones(2)) as late:
        first = mx.nd.contrib.KeyBarrierSum(late, key="idle", num_devices=1)
        second = mx.nd.contrib.KeyBarrierSum(mx.nd.full(2, 2), key="idle", num_devices=1)
        with pytest.raises(mx.MXNetError, match=r"An earlier call with this key on cpu\(0\)"):
            second.asnumpy()
    np.testing.assert_array_equal(first.asnumpy(), [1, 1])
    third = mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2), key="idle", num_devices=1)
    np.testing.assert_array_equal(third.asnumpy(), [1, 1])


def test_an_executor_that_never_runs_does_not_block_other_calls():
    """It is bound long before it runs, so it cannot have a place in the order of the calls."""
    gluon_syncbn.set_timeout(5)
    y = mx.sym.contrib.KeyBarrierSum(mx.sym.var("x"), key="bound", num_devices=1)
    first, second = (y.simple_bind(CONTEXTS[0], x=(2,)) for _ in range(2))
    called = mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2), key="bound", num_devices=1)
    np.testing.assert_array_equal(called.asnumpy(), [1, 1])
    for executor in (second, first, second):
        executor.forward(x=mx.nd.full(2, 3))
        np.testing.assert_array_equal(executor.outputs[0].asnumpy(), [3, 3])


def test_calls_tell_the_uses_of_a_key_apart():
    """Uses are matched by `call`, though the devices run them in different orders."""
    ys = {}
    for context, order in ((CONTEXTS[0], (0, 1)), (CONTEXTS[1], (1, 0))):
        for call in order:
            x = mx.nd.full(1, 10**call, ctx=context)
            ys[context, call] = mx.nd.contrib.KeyBarrierSum(x, key="k", num_devices=2, call=call)
    assert [y.asscalar() for y in ys.values()] == [2, 20, 20, 2]


def test_in_a_symbol():
    x = mx.sym.var("x")
    y = mx.sym.contrib.KeyBarrierSum(x, key="k", num_devices=2) * 2
    y = mx.sym.load_json(y.tojson())
    executors = [y.simple_bind(c, x=(2,)) for c in CONTEXTS[:2]]
    for i, executor in enumerate(executors):
        executor.forward(is_train=True, x=mx.nd.array([1 + i, 10 + i], ctx=executor._ctx))
    for executor in executors:
        executor.backward(mx.nd.ones(2, ctx=executor._ctx))
    for executor in executors:
        np.testing.assert_array_equal(executor.outputs[0].asnumpy(), [6, 42])
        np.testing.assert_array_equal(executor.grad_dict["x"].asnumpy(), [4, 4])


def test_deadline_raises_on_every_device_that_waited_and_the_next_round_works():
    gluon_syncbn.set_timeout(0.3)

    def exchange(contexts):
        xs = [mx.nd.ones(2, ctx=c) for c in contexts]
        for x in xs:
            x.attach_grad()
        with autograd.record():
            return xs, [mx.nd.contrib.KeyBarrierSum(x, key="late", num_devices=3) for x in xs]

    _, ys = exchange(CONTEXTS[:2])
    for y in ys:
        with pytest.raises(mx.MXNetError, match=r"forward.*'late'.*cpu\(0\) cpu\(1\).*1 of 3"):
            y.asnumpy()
    gluon_syncbn.set_timeout(30)
    xs, ys = exchange(CONTEXTS[:3])
    for y in ys:
        np.testing.assert_array_equal(y.asnumpy(), [3, 3])
    gluon_syncbn.set_timeout(0.3)
    ys[0].backward()
    with pytest.raises(mx.MXNetError, match=r"backward.*'late'.*cpu\(0\); missing: 2 of 3"):
        xs[0].grad.asnumpy()


def test_a_device_that_comes_after_the_deadline_joins_no_later_round():
    def call(x):
        return mx.nd.contrib.KeyBarrierSum(x, key="too late", num_devices=2)

    for _ in range(3):
        gluon_syncbn.set_timeout(0.2)
        with held(mx.nd.ones(2, ctx=CONTEXTS[1])) as late:
            ys = [call(mx.nd.ones(2, ctx=CONTEXTS[0])), call(late)]
            with pytest.raises(mx.MXNetError, match=r"Arrived: cpu\(0\); missing: 1 of 2"):
                ys[0].asnumpy()
            gluon_syncbn.set_timeout(30)
        zs = [call(mx.nd.full(2, 10, ctx=c)) for c in CONTEXTS[:2]]  # the step is run again
        with pytest.raises(mx.MXNetError, match=r"cpu\(1\) came after its round had failed"):
            ys[1].asnumpy()
        for z in zs:
            np.testing.assert_array_equal(z.asnumpy(), [20, 20])


@pytest.mark.parametrize("dtype", ["int32", "float16"])
def test_other_types_are_refused(dtype):
    with pytest.raises(mx.MXNetError, match="float32 or float64"):
        mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2, dtype=dtype), key="k", num_devices=1)


def test_a_key_is_needed():
    with pytest.raises(mx.MXNetError, match="key"):
        mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2), num_devices=1)
    with pytest.raises(mx.MXNetError, match="key must not be empty"):
        mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2), key="", num_devices=1)
    with pytest.raises(mx.MXNetError, match="num_devices must say how many"):
        mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2), key="k")


def test_different_shapes_and_numbers_are_refused():
    ys = [
        mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2 + i, ctx=c), key="k", num_devices=2)
        for i, c in enumerate(CONTEXTS[:2])
    ]
    for y in ys:
        with pytest.raises(mx.MXNetError, match="brings 3"):
            y.asnumpy()
    ys = [
        mx.nd.contrib.KeyBarrierSum(mx.nd.ones(2, ctx=c), key="k", num_devices=2 + i)
        for i, c in enumerate(CONTEXTS[:2])
    ]
    for y in ys:
        with pytest.raises(mx.MXNetError, match="same num_devices"):
            y.asnumpy()


# MXNet looks at its own record of a call when that returns.  When calls were complete before that,
# the graph could be gone by then, and the heap was corrupted.
SUMS_FREED_AT_ONCE = """
import mxnet as mx
import gluon_syncbn
contexts = [mx.cpu(0), mx.cpu(1)]
x = mx.sym.Variable("x")
for i in range(400):
    y = mx.sym.contrib.KeyBarrierSum(x, key=f"k{i}", num_devices=2)
    executors = [
        y.bind(c, {"x": mx.nd.ones(3, ctx=c)}, {"x": mx.nd.zeros(3, ctx=c)}) for c in contexts
    ]
    for executor in executors:
        executor.forward(is_train=True)
    for executor, context in zip(executors, contexts):
        executor.backward(mx.nd.ones(3, ctx=context))
    gradients = [executor.grad_dict["x"].asnumpy().tolist() for executor in executors]
    assert gradients == [[2, 2, 2]] * 2, gradients
    del executors, executor
"""
NOTHING_TO_SUM_FREED_AT_ONCE = """
import mxnet as mx
import gluon_syncbn
contexts = [mx.cpu(0), mx.cpu(1)]
x, mean = mx.sym.var("x"), mx.sym.var("mean")
for i in range(800):
    y = mx.sym._internal._syncbn_sum(x, mean, key=f"k{i}", num_devices=2)
    executors = [
        y.bind(c, {"x": mx.nd.zeros(3, c, "float64")}, aux_states={"mean": mx.nd.zeros(1, c)})
        for c in contexts
    ]
    for executor in executors:
        executor.forward()
    outputs = [executor.outputs[0].asnumpy().tolist() for executor in executors]
    assert outputs == [[0, 0, 0]] * 2, outputs
    del executors, executor
"""


def test_graphs_that_are_freed_as_soon_as_their_result_is_there():
    """More processes than cores, so that a thread is held up anywhere; freed memory is cleared."""

    def run(script, workers):
        fresh_process.run(script, MALLOC_PERTURB_="255", MXNET_CPU_WORKER_NTHREADS=workers)

    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(run, script, workers)
            for script in (SUMS_FREED_AT_ONCE, NOTHING_TO_SUM_FREED_AT_ONCE)
            for workers in ("1", "2")
        ]
    for done in runs:
        done.result()


def test_a_process_that_ends_in_the_middle():
    """Queued work is dropped then; what waits for it must end all the same."""
    script = """
import mxnet as mx
import gluon_syncbn
contexts = [mx.cpu(0), mx.cpu(1)]
large = [mx.nd.ones((2000, 2000), ctx=c) for c in contexts]
xs = [mx.nd.ones(3, ctx=c) for c in contexts]
mx.nd.waitall()
for x in large:
    mx.nd.dot(x, x)  # keeps the device's worker busy until the process ends
for x in xs:
    mx.nd.contrib.KeyBarrierSum(x, key="k", num_devices=2)
"""
    fresh_process.run(script, timeout=60)


def test_a_device_that_is_late_for_very_many_rounds():
    """More than are remembered one by one: it gets no other round's sum."""
    two, count = [mx.cpu(0), mx.cpu(1)], 100

    def exchange(contexts, arrays):
        xs = [array.as_in_context(c) for array in arrays for c in contexts]
        return [mx.nd.contrib.KeyBarrierSum(x, key="very late", num_devices=2) for x in xs]

    def failures(arrays):
        failed = 0
        for array in arrays:
            try:
                array.wait_to_read()
            except mx.MXNetError:
                failed += 1
        return failed

    gluon_syncbn.set_timeout(0.3)
    one = mx.nd.ones(1)
    with held(mx.nd.ones(1, ctx=two[1])) as late:
        early_ones = exchange(two[:1], [one] * count)
        late_ones = exchange(two[1:], [late] * count)
        assert failures(early_ones) == count
    assert failures(late_ones) == count
    gluon_syncbn.set_timeout(30)
    again = exchange(two, [one])
    assert [y.asscalar() for y in again] == [2, 2]
