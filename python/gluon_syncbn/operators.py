"""A layer composed of this package's operators: for arrays (``F`` is mx.nd) and for symbols."""

from __future__ import annotations

from typing import Any

from mxnet import symbol

from .library import operator

# An attribute of the all-reduce's node in a graph (with groups of one, of the layer's).  It is no
# parameter of the operator, which learns its group from the pass.
GROUP_SIZE = "__group_size__"


def group_size_of(attributes: dict) -> int | None:
    """Return the group size of a node of a graph, or None."""
    return int(attributes[GROUP_SIZE]) if GROUP_SIZE in attributes else None


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


def synchronized_batch_norm(
    F: Any,
    x: Any,
    parameters: dict,
    options: dict,
    key: str,
    num_devices: int | None,
    call: int,
    names: tuple = ("moments", "sum", "fwd"),
    group_size: int | None = None,
) -> Any:
    """Compose a synchronized layer: moments, the all-reduce, normalization.

    ``options`` are those of :func:`local_batch_norm`.
    ``num_devices`` may be None; ``call`` tells apart a key's uses in a graph; ``group_size`` is
    noted in a graph, for the pass to read.
    """
    options = dict(options)
    of_moments = {name: options[name] for name in ("axis", "use_batch_stats") if name in options}
    if "spatial_dims" in options:
        of_moments["spatial_dims"] = options.pop("spatial_dims")
    data, moments, backward_context = operator(F, "_syncbn_moments")(x, name=names[0], **of_moments)
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
    return operator(F, "_syncbn_normalize")(
        data=data,
        statistics=total,
        backward_context=backward_context,
        name=names[2],
        **parameters,
        **options,
    )


def _attr(F, group_size):
    return {"attr": group_attributes(group_size)} if F is symbol and group_size else {}
