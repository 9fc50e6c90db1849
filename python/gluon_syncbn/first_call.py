"""What a network needs before devices may run it side by side: its parameters and its graphs.

Gluon initializes deferred parameters and traces hybridized blocks inside the first call, and
neither is safe in several threads.  So before a network's first call, and again when it is
hybridized or cast anew, one device runs it alone in the caller's thread, and the statistics that
this run moved are put back.
"""

from mxnet import autograd
from mxnet.gluon import HybridBlock

from .device_threads import settle
from .key_barrier import BARRIER


def _unready(block):
    """Parameters without values and active blocks without graphs, as a set."""
    found = {p for p in block.collect_params().values() if p._deferred_init}
    stack, seen = [block], set()
    while stack:
        block = stack.pop()
        if id(block) in seen:
            continue
        seen.add(id(block))
        if isinstance(block, HybridBlock) and (block._active or not block._children):
            # Below an active block all is part of its graph.  A SymbolBlock always has one.
            if block._active and block._cached_op is None:
                found.add(block)
        else:
            stack.extend(block._children.values())
    return found


class FirstCall:
    """Makes a network ready for parallel calls.

    Parameters
    ----------
    net : Block
    call : callable
        Runs the network on a share.
    """

    def __init__(self, net, call):
        self._net, self._call = net, call
        self._unused = set()  # what stayed unready, because the network does not use it

    def prepare(self, share, contexts, keys):
        """Run the network once on one device if it is not ready; raise what that raises.

        Parameters
        ----------
        share : Share
            What to run it on.
        contexts : list of Context
            All devices.
        keys : list of str
            The network's exchanges; in this run nobody else comes to them.
        """
        if not _unready(self._net) - self._unused:
            return
        settle()
        BARRIER.set_members(keys, 1)
        statistics = [p for p in self._net.collect_params().values() if p.grad_req == "null"]
        before = {p: p.data(share.context).copy() for p in statistics if not p._deferred_init}
        recording = autograd.set_recording(False)
        try:
            with share.context:
                self._call(share)
        finally:
            settle()
            other = next((c for c in contexts if c != share.context), None)
            for p in statistics:
                if p in before:
                    before[p].copyto(p.data(share.context))
                elif not p._deferred_init and other is not None:
                    p.data(other).copyto(p.data(share.context))
            autograd.set_recording(recording)
        self._unused = _unready(self._net)
