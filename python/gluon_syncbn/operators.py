"""A layer composed of this package's operators: for arrays (``F`` is mx.nd) and for symbols."""

from __future__ import annotations

from typing import Any

from .library import operator


def local_batch_norm(
    F: Any, x: Any, parameters: dict, options: dict, use_global_stats: bool, name: str = "fwd"
) -> Any:
    """Compose a layer without all-reduce: one operator.

    ``parameters``: gamma, beta, moving_mean, moving_var, and what there is beyond.  ``options`` are
    the operator's: axis, eps, momentum, fix_gamma, and what there is beyond.
    """
    return operator(F, "_syncbn_batch_norm")(
        data=x, use_global_stats=use_global_stats, name=name, **parameters, **options
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


def _moments(F, x, options, weights, name):
    given = {name: options[name] for name in ("axis", "use_batch_stats") if name in options}
    if weights is not None:
        given.update(weights=F.BlockGrad(weights), weighted=True)
    return operator(F, "_syncbn_moments")(data=x, name=name, **given)


def weighted_batch_norm(F: Any, x: Any, parameters: dict, options: dict, weights: Any) -> Any:
    """Compose a layer with weights without all-reduce: moments, normalization."""
    data, moments, backward_context = _moments(F, x, options, weights, "moments")
    return operator(F, "_syncbn_normalize")(
        data=data,
        statistics=moments,
        backward_context=backward_context,
        name="fwd",
        **parameters,
        **options,
    )


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
) -> Any:
    """Compose a synchronized layer: moments, the all-reduce, normalization.

    ``num_devices`` may be None; ``call`` tells apart a key's uses in a graph.  ``weights``: of
    samples or positions, or None.
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
    )
    return operator(F, "_syncbn_normalize")(
        data=data,
        statistics=total,
        backward_context=backward_context,
        name=names[2],
        **parameters,
        **options,
    )
