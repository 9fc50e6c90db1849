"""A layer on 1, 2 and 4 devices gives what torch's gives for the whole batch, in float64."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd

from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from networks import STATIC
from torch_cases import LAYERS

# Sums are in float64, so each result is rounded once or twice.
TOLERANCE = {"float16": 6e-4, "float32": 2e-7, "float64": 1e-15}
PARAMETERS = [
    pytest.param(case, devices, hybridize, id=f"{case.name}-{devices}-{mode}")
    for case in LAYERS
    for devices in case.devices
    for mode, hybridize in (("imperative", None), ("static", STATIC))
    if hybridize or devices == 2
]


@pytest.mark.parametrize("case, devices, hybridize", PARAMETERS)
def test_as_torch(case, devices, hybridize, expected, check):
    given, wanted = expected(case, devices)
    with mx.util.np_shape(True):  # arrays may be empty
        got = run(case, devices, hybridize, given)
    check(case, got, wanted, TOLERANCE)


def run(case, devices, hybridize, given):
    """Return what `torch_expected.layer` does, by our layer."""
    contexts = [mx.cpu(device) for device in range(devices)]
    layer = SyncBatchNorm(
        axis=case.axis,
        momentum=case.momentum,
        center=case.affine,
        scale=case.affine,
        track_running_stats=case.track_running_stats,
        group_size=case.group_size,
        activation=case.activation,
        in_channels=case.channels,
    )
    layer.initialize(ctx=contexts)
    layer.cast(case.dtype)
    states = (layer.gamma, layer.beta, layer.running_mean, layer.running_var)
    for parameter, name in zip(states, ("gamma", "beta", "mean", "var")):
        parameter.set_data(mx.nd.array(given[name], dtype=given[name].dtype))
    if hybridize is not None:
        layer.hybridize(**hybridize)
    model = ModelDataParallel(layer, contexts)

    def arrays(kind, step):
        values = [given[f"{kind} {step} {device}"] for device in range(devices)]
        return [mx.nd.array(v, ctx=c, dtype=v.dtype) for v, c in zip(values, contexts)]

    found = {}
    for step in range(case.steps):
        xs = arrays("x", step)
        zs = arrays("z", step) if case.residual else []
        for array in [*xs, *zs]:
            array.attach_grad()
        with autograd.record(train_mode=case.training):
            ys = model(xs, None, zs) if zs else model(xs)
        parallel_backward(ys, arrays("dy", step))
        for device in range(devices):
            found[f"y {step} {device}"] = ys[device].asnumpy()
            found[f"dx {step} {device}"] = xs[device].grad.asnumpy()
            assert ys[device].dtype == xs[device].grad.dtype == np.dtype(case.dtype)
            if zs:
                found[f"dz {step} {device}"] = zs[device].grad.asnumpy()
        for number, group in enumerate(case.groups(devices)):
            for name, parameter in (("dgamma", layer.gamma), ("dbeta", layer.beta)):
                if parameter.grad_req != "null":
                    gradients = [parameter.grad(contexts[device]).asnumpy() for device in group]
                    found[f"{name} {step} {number}"] = sum(gradients)
    for number, group in enumerate(case.groups(devices)):
        for name, parameter in (("mean", layer.running_mean), ("var", layer.running_var)):
            values = [parameter.data(contexts[device]).asnumpy() for device in group]
            assert len({value.tobytes() for value in values}) == 1
            found[f"{name} {number}"] = values[0]
    return found
