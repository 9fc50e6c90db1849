"""The operators that make up a layer, composed: for arrays (``F`` is mx.nd) and for symbols."""


def alone(F, x, gamma, beta, moving_mean, moving_var, options, use_global_stats, name="fwd"):
    """A layer that meets nobody: one operator.

    ``options`` are the operator's: axis, eps, momentum, fix_gamma and what there is beyond.
    """
    return F._internal._syncbn_batch_norm(
        x,
        gamma,
        beta,
        moving_mean,
        moving_var,
        use_global_stats=use_global_stats,
        name=name,
        **options,
    )


def together(
    F,
    x,
    gamma,
    beta,
    moving_mean,
    moving_var,
    options,
    key,
    num_devices,
    call,
    names=("moments", "sum", "fwd"),
):
    """A layer whose devices meet: moments, the exchange, normalization.

    ``num_devices`` may be None; ``call`` tells apart a key's uses in a graph.
    """
    of_moments = {name: options[name] for name in ("axis", "use_batch_stats") if name in options}
    data, local, coefficients = F._internal._syncbn_moments(x, name=names[0], **of_moments)
    total = F._internal._syncbn_sum(
        local, moving_mean, key=key, num_devices=num_devices or 0, call=call, name=names[1]
    )
    return F._internal._syncbn_normalize(
        data,
        total,
        coefficients,
        gamma,
        beta,
        moving_mean,
        moving_var,
        name=names[2],
        **options,
    )
