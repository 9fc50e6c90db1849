"""A callable around a network, as a Block.

GluonCV's ``SegEvalModel`` calls another method of a network and is not a Block itself; but running
a network needs its blocks, wherever they are.
"""

from mxnet.gluon import Block

from ..mxnet_private import children


class CallableBlock(Block):
    """Calls something that is not a Block; its children are the blocks found in it.

    Parameters
    ----------
    function : callable
        With ``collect_params``, if it has parameters.

    Raises
    ------
    TypeError
        If a parameter belongs to none of the blocks found.
    """

    def __init__(self, function):
        super().__init__(prefix="")
        self.function = function
        for block in _blocks_in(function, set()):
            self.register_child(block)
        found = {p for child in children(self) for p in child.collect_params().values()}
        missing = [p.name for p in self.collect_params().values() if p not in found]
        if missing:
            raise TypeError(
                f"{type(function).__name__} has the parameter {missing[0]}, but the Block that it "
                "belongs to is not found; keep the network as an attribute"
            )

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def __getattr__(self, name):
        if name == "function":  # not set yet: copying or unpickling
            raise AttributeError(name)
        return getattr(self.function, name)

    def collect_params(self, select=None):
        if not hasattr(self.function, "collect_params"):
            return super().collect_params(select)
        selected = () if select is None else (select,)
        return self.function.collect_params(*selected)

    def __repr__(self):
        return repr(self.function)


def as_block(network):
    """Return a Block as it is, and wrap anything else that can be called and has parameters."""
    if isinstance(network, Block):
        return network
    if not callable(network) or not hasattr(network, "collect_params"):
        raise TypeError(
            "the network must be a gluon Block, or a callable with collect_params, but is "
            f"{type(network).__name__}"
        )
    return CallableBlock(network)


def _blocks_in(value, seen):
    """Yield the outermost blocks that an object holds: in its attributes and closures."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Block):
        yield value
        return
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        parts = list(value)
    elif callable(value) or hasattr(value, "collect_params"):
        parts = list(getattr(value, "__dict__", {}).values())
        parts.append(getattr(value, "__self__", None))  # of a bound method
        parts += _closure_of(value)
        parts += [getattr(value, name, None) for name in ("func", "args", "keywords")]  # partial
    else:
        return
    for part in parts:
        yield from _blocks_in(part, seen)


def _closure_of(function):
    """The variables of a function's closure that have a value yet."""
    values = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:
            pass
    return values
