"""How often batch normalization runs, forward, in this process: by our operators and by MXNet's.

MXNet's profiler would tell, but with it MXNet ends the process where a test uses more CPU contexts
than there are cores (a failed check in profiler.h).  So what runs them is counted: the functions of
arrays of ours, the graphs of Gluon's networks, and executors.
"""

import re
from collections import Counter

import mxnet as mx

# In the JSON of a graph, which has the graphs of loops and partitions inside.
_NODE = re.compile(r'"op": "(_syncbn_|(?:_contrib_)?(?:Sync)?BatchNorm)')

#: "ours": how many of our operators have run; "mxnets": how many of MXNet's, in graphs alone;
#: "symbols": how many of ours have been put into symbols.
counts = Counter()

_in_graphs = {}  # handle of a CachedOp -> Counter of its nodes


def watch_graphs():
    """Count what runs in graphs from now on."""
    CachedOp, Executor = mx.nd.CachedOp, mx.executor.Executor
    made, called, forward = CachedOp.__init__, CachedOp.__call__, Executor.forward

    def __init__(self, sym, *args, **kwargs):
        made(self, sym, *args, **kwargs)
        _in_graphs[self.handle.value] = _nodes(sym)

    def __call__(self, *args, **kwargs):
        counts.update(_in_graphs[self.handle.value])
        return called(self, *args, **kwargs)

    def run(self, *args, **kwargs):
        if not hasattr(self, "nodes_to_count"):
            self.nodes_to_count = _nodes(self._symbol)
        counts.update(self.nodes_to_count)
        return forward(self, *args, **kwargs)

    CachedOp.__init__, CachedOp.__call__, Executor.forward = __init__, __call__, run


def watch_functions():
    """Count the uses of our operators from now on, by arrays, where they run, and by symbols."""
    from gluon_syncbn import operators  # the package changes MXNet when it is imported

    operator = operators.operator

    def counted(F, name):
        counts["ours" if F is mx.nd else "symbols"] += 1
        return operator(F, name)

    operators.operator = counted


def _nodes(sym):
    kinds = ("ours" if op == "_syncbn_" else "mxnets" for op in _NODE.findall(sym.tojson()))
    return Counter(kinds)
