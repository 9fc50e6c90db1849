"""What a network needs before devices may run it side by side: its parameters and its graphs.

Gluon initializes deferred parameters and traces hybridized blocks inside the first call, and
neither is safe in several threads.  So before a network's first call, in training and in inference,
and again when it is hybridized or cast anew, one device runs it alone in the caller's thread, and
the statistics that this run moved are put back.
"""

from mxnet import autograd
from mxnet.gluon import HybridBlock, SymbolBlock

from .device_threads import settle
from .exchanges import blocks_of
from .key_barrier import BARRIER


def _unready(net):
    """Parameters without values and blocks whose graph is still to be traced, as a set.

    Below a block that is traced as a whole its children stay without a graph; that is why what is
    left after a run is remembered.
    """
    found = set()
    for block in blocks_of(net):
        found.update(p for p in block.params.values() if p._deferred_init)
        traced = isinstance(block, SymbolBlock) or (
            isinstance(block, HybridBlock) and block._active
        )
        if traced and block._cached_op is None:
            found.add(block)
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
        # Training or not -> what a run in that mode leaves unready, because it does not use it.
        self._left = {}

    def prepare(self, share, contexts):
        """Run the network once on one device if it is not ready; raise what that raises.

        Parameters
        ----------
        share : Share
            What to run it on.
        contexts : list of Context
            All devices.
        """
        training = autograd.is_training()
        unready = _unready(self._net)
        if not unready - self._left.get(training, set()):
            return
        settle()
        statistics = [p for p in self._net.collect_params().values() if p.grad_req == "null"]
        before = {
            p: p.data(share.context).detach().copy()
            for p in statistics
            if p._data and not p._deferred_init
        }
        # Recorded if the caller records: GluonCV's YOLO3 is traced differently.  Nobody keeps it.
        BARRIER.set_members([""], 1)  # whatever it meets others for, in this run nobody comes
        try:
            with share.context:
                self._call(share)
            settle()
        finally:
            BARRIER.set_members([""], 0)
        other = next(c for c in contexts if c != share.context)
        with autograd.pause(train_mode=autograd.is_training()):
            for p in statistics:
                if p in before:
                    before[p].copyto(p.data(share.context))
                elif p._data:
                    p.data(other).copyto(p.data(share.context))
        self._left[training] = _unready(self._net)
