"""A layer composed of this package's operators: for arrays (``F`` is mx.nd) and for symbols."""

from __future__ import annotations

from typing import Any

from mxnet import symbol

from .library import operator

# An attribute of the all-reduce's node in a graph (with groups of one, of the layer's).  It is no
# parameter of the operator, which learns its group from the pass.
GROUP_SIZE = "__group_size__"


def group_size_of(attributes: dict) -> int | None:
    """Return the group size of a node of a graph, or None; raise ValueError if it is not one."""
    if GROUP_SIZE not in attributes:
        return None
    text = attributes[GROUP_SIZE]
    if not (text.isdecimal() and len(text) <= 10 and int(text) > 0):
        raise ValueError(
            f"{GROUP_SIZE} must be a positive integer, but a node of the graph has {text[:20]!r}"
        )
    return int(text)


def group_attributes(group_size: int | None) -> dict:
    """Return the attributes of a node with this group size."""
    return {} if group_size is None else {GROUP_SIZE: str(group_size)}


def local_batch_norm(
    F: Any,
    x: Any,
    parameters: dict,
    options: dict,
    use_global_stats: bool,
    name: str = "fwd",
    group_size: int | None = None,
) -> Any:
    """Compose a layer without all-reduce: one operator.

    ``parameters``: gamma, beta, moving_mean, moving_var, and what there is beyond.  ``options`` are
    the operator's: axis, eps, momentum, fix_gamma, and what there is beyond.
    """
    return operator(F, "_syncbn_batch_norm")(
        data=x,
        use_global_stats=use_global_stats,
        name=name,
        **_attr(F, group_size),
        **parameters,
        **options,
    )


def moving_average_batch_norm(
    F: Any,
    x: Any,
    gamma: Any,
    beta: Any,
    states: tuple,
    options: dict,
    averages: dict,
    ndim: int,
    all_reduce: tuple | None,
) -> Any:
    """Compose moving average batch normalization: moments, perhaps the all-reduce, normalization.

    Parameters
    ----------
    states : tuple
        ``running_var, buffer_x2, iters, buffer_gz``.
    options, averages : dict
        ``eps, momentum, fix_gamma`` and ``buffer_size, warmup_iters``.
    ndim : int
        The number of dimensions that ``x`` must have, or 0.
    all_reduce : tuple or None
        The key, ``num_devices``, which may be None, and ``call``; see `synchronized_batch_norm`.
    """
    running_var, buffer_x2, iters, buffer_gz = states
    data, moments, backward_context = operator(F, "_syncbn_mabn_moments")(
        x, buffer_gz, ndim=ndim, name="moments", **averages
    )
    if all_reduce is not None:
        key, num_devices, call = all_reduce
        moments = operator(F, "_syncbn_sum")(
            moments, running_var, key=key, num_devices=num_devices or 0, call=call, name="sum"
        )
    return operator(F, "_syncbn_mabn_normalize")(
        data,
        moments,
        backward_context,
        gamma,
        beta,
        running_var,
        buffer_x2,
        iters,
        name="fwd",
        **options,
        **averages,
    )


_OF_MOMENTS_ALONE = "spatial_dims", "use_global_stats"
_OF_MOMENTS = ("axis", "use_batch_stats", *_OF_MOMENTS_ALONE)


def _normalized(F, data, statistics, backward_context, parameters, options, name):
    return operator(F, "_syncbn_normalize")(
        data=data,
        statistics=statistics,
        backward_context=backward_context,
        name=name,
        **parameters,
        **{k: value for k, value in options.items() if k not in _OF_MOMENTS_ALONE},
    )


def _moments(F, x, options, weights, name):
    given = {name: options[name] for name in _OF_MOMENTS if name in options}
    if weights is not None:
        given.update(weights=F.BlockGrad(weights), weighted=True)
    return operator(F, "_syncbn_moments")(data=x, name=name, **given)


def weighted_batch_norm(
    F: Any, x: Any, parameters: dict, options: dict, weights: Any, use_global_stats: bool = False
) -> Any:
    """Compose a layer with weights without all-reduce: moments, normalization."""
    if use_global_stats:
        options = {**options, "use_global_stats": True}
    data, moments, backward_context = _moments(F, x, options, weights, "moments")
    return _normalized(F, data, moments, backward_context, parameters, options, "fwd")


def synchronized_batch_norm(
    F: Any,
    x: Any,
    parameters: dict,
    options: dict,
    key: str,
    num_devices: int | None,
    call: int,
    names: tuple = ("moments", "sum", "fwd"),
    weights: Any = None,
    group_size: int | None = None,
) -> Any:
    """Compose a synchronized layer: moments, the all-reduce, normalization.

    ``options`` are those of :func:`local_batch_norm`.
    ``num_devices`` may be None; ``call`` tells apart a key's uses in a graph.  ``weights``: of
    samples or positions, or None.  ``group_size`` is noted in a graph, for the pass to read.
    """
    data, moments, backward_context = _moments(F, x, options, weights, names[0])
    # The sum neither reads nor writes the moving mean.  As an auxiliary state of it, it makes
    # MXNet's engine keep a layer's calls in order, and a pass is announced by writing it
    # (BeginPass).
    total = operator(F, "_syncbn_sum")(
        moments,
        parameters["moving_mean"],
        key=key,
        num_devices=num_devices or 0,
        call=call,
        name=names[1],
        **_attr(F, group_size),
    )
    return _normalized(F, data, total, backward_context, parameters, options, names[2])


def _attr(F, group_size):
    return {"attr": group_attributes(group_size)} if F is symbol and group_size else {}
