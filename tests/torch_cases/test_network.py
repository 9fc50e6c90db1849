"""A converted network, trained on 1, 2 and 4 devices, is the one that torch trains on one."""

import mxnet as mx
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import (
    DataParallelCriterion,
    ModelDataParallel,
    convert_sync_batchnorm,
    parallel_backward,
)
from torch_cases import NETWORKS

# After five steps, in which a rounding error of one is the input of the next.
TOLERANCE = {"float32": 1e-5, "float64": 1e-13}


@pytest.mark.parametrize(
    "case, devices",
    [
        pytest.param(case, devices, id=f"{case.name}-{devices}")
        for case in NETWORKS
        for devices in case.devices
    ],
)
def test_as_torch(case, devices, expected, check):
    given, wanted = expected(case, devices)
    check(case, run(case, devices, given), wanted, TOLERANCE)


def run(case, devices, given):
    """Return what `torch_expected.network` does, by our layer."""
    contexts = [mx.cpu(device) for device in range(devices)]
    net = nn.HybridSequential()
    net.add(
        nn.Dense(8, use_bias=False, in_units=2),
        nn.BatchNorm(center=case.affine, scale=case.affine, in_channels=8),
        nn.Activation("relu"),
        nn.Dense(4, use_bias=False, in_units=8),
    )
    net.initialize(ctx=contexts)
    net.cast(case.dtype)
    first, norm, _, last = net
    first.weight.set_data(array(given["first"]))
    last.weight.set_data(array(given["last"]))
    net = convert_sync_batchnorm(net)
    norm = net[1]
    net.hybridize()
    model = ModelDataParallel(net, contexts)
    criterion = DataParallelCriterion(gluon.loss.L2Loss(), contexts)
    trainer = gluon.Trainer(
        net.collect_params(),
        "sgd",
        {"learning_rate": case.learning_rate, "momentum": case.sgd_momentum},
    )
    found = {}
    for step in range(case.steps):
        present = [device for device in range(devices) if case.rows(step, device)]
        xs, targets = (
            [array(given[f"{kind} {step} {device}"], contexts[device]) for device in present]
            for kind in ("x", "target")
        )
        with autograd.record():
            outputs = model(xs)
            losses = criterion(outputs, targets)
        parallel_backward(losses)
        trainer.step(1)
        for device, output in zip(present, outputs):
            found[f"output {step} {device}"] = output.asnumpy()
    parameters = {"first": first.weight, "last": last.weight}
    parameters.update(mean=norm.running_mean, var=norm.running_var)
    if case.affine:
        parameters.update(gamma=norm.gamma, beta=norm.beta)
    for name, parameter in parameters.items():
        values = [parameter.data(context).asnumpy() for context in contexts]
        assert len({value.tobytes() for value in values}) == 1
        found[name] = values[0]
    return found


def array(values, context=None):
    return mx.nd.array(values, ctx=context, dtype=values.dtype)
