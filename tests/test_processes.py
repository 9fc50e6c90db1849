"""Which all-reduces go on to other processes, and how their calls are numbered."""

import mxnet as mx

from gluon_syncbn import processes
from networks import Shared


class Recorder:
    """A connection that notes what it is told."""

    def __init__(self):
        self.calls = []

    def number_call(self, key, call, use):
        self.calls.append((key, call, use))


def test_calls_are_numbered_within_a_graph():
    connection = Recorder()
    processes.connect(["a", "b"], connection)
    try:
        assert processes.any_connected() and processes.connection_of("a") is connection
        processes.number_calls([("b", 9), ("a", 12), ("a", 7), ("a", 12), ("elsewhere", 3)])
        assert sorted(connection.calls) == [("a", 7, 0), ("a", 12, 1), ("b", 9, 0)]
    finally:
        processes.disconnect(["a", "b"])
    assert processes.connection_of("a") is None and not processes.any_connected()


def test_a_traced_network_numbers_its_calls_each_time():
    connection, net = Recorder(), Shared()
    net.initialize()
    processes.connect([net.norm.key], connection)
    try:
        for _ in range(2):
            net.hybridize()  # traced anew at the next call
            net(mx.nd.ones((2, 3, 4, 4)))
    finally:
        processes.disconnect([net.norm.key])
    calls = [call for _, call, _ in connection.calls]
    assert len(set(calls)) == 4 and [use for _, _, use in connection.calls] == [0, 1, 0, 1]
