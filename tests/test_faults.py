"""What becomes of exchanges where the engine, the system or a fork gets in their way.

Each test has a process of its own: what it is about hangs it, or damages its memory.
"""

import faults


def test_a_call_is_not_complete_while_its_thread_is_inside():
    """Though its device has another worker: what MXNet still needs could be freed then."""
    faults.run(
        """
import threading
x = mx.sym.contrib.KeyBarrierSum(mx.sym.var("x"), key="k", num_devices=1)
executor = x.bind(mx.cpu(0), {"x": mx.nd.ones(3)})
mx.nd.waitall()
faults.hold_push.value = 1
executor.forward()
while faults.hold_push.value != 2:
    pass
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
