"""Keyword arguments for blocks: MXNet 1.9.1's ``Block.__call__`` takes positional ones only."""

import inspect

from mxnet.gluon import Block, HybridBlock


def call(block, args, kwargs):
    """Call a block with keyword arguments that its ``forward`` or ``hybrid_forward`` names.

    Raises
    ------
    TypeError
        If an argument has no such name, or can only be given by name.
    """
    plain = type(block).__call__ in (Block.__call__, HybridBlock.__call__)
    if not kwargs or not plain:
        return block(*args, **kwargs)
    hybrid = isinstance(block, HybridBlock) and type(block).forward is HybridBlock.forward
    signature = inspect.signature(block.hybrid_forward if hybrid else block.forward)
    parameters = list(signature.parameters.values())[1 if hybrid else 0 :]  # without F
    bound = inspect.Signature(parameters).bind_partial(*args, **kwargs)
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = sorted(set(kwargs) - set(positional))
    if by_name:
        raise TypeError(
            f"{block.name}: {by_name} cannot be passed by position, which is all that "
            "MXNet's Block.__call__ can do"
        )
    last = max(positional.index(name) for name in kwargs)
    bound.apply_defaults()  # for the arguments before it that were not given
    return block(*bound.args[: max(last + 1, len(args))])
