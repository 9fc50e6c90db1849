"""Compute with torch, in float64, what the cases should give.

    python torch_expected.py INPUTS EXPECTED

Runs in an environment with torch (`make torch`), whose NumPy is not MXNet's.  Both are .npz files.
Their arrays are named KIND NUMBER DEVICES/NAME, after the case's place in `torch_cases.py`, the
number of devices, and what `LayerCase.inputs`, or a function of this file, calls them.
"""

import sys

import numpy as np
import torch
from torch.nn import functional

from torch_cases import LAYERS, NETWORKS


def layer(case, devices, given):
    """Return y, dx, dz, the gradients of gamma and beta, and the moving statistics.

    And the largest gamma * dy / sqrt(var + epsilon): dx is a difference of such terms, and may be
    much smaller than they are.
    """
    found = {}
    for number, group in enumerate(case.groups(devices)):
        gamma, beta = (given[name].clone().requires_grad_() for name in ("gamma", "beta"))
        mean, var = given["mean"].clone(), given["var"].clone()
        for step in range(case.steps):
            shards = [given[f"x {step} {device}"].requires_grad_() for device in group]
            # A row per position: shards may differ in height, and any axis may be the channels'.
            batch = torch.cat([_rows(shard, case) for shard in shards])
            moving = case.track_running_stats
            y = functional.batch_norm(
                batch,
                mean if moving else None,
                var.clone() if moving else None,  # torch moves it by the unbiased variance
                gamma,
                beta,
                training=case.training or not moving,
                momentum=1 - case.momentum,
                eps=1e-5,
            )
            if moving and case.training:
                biased = batch.detach().var(0, unbiased=False)
                var = case.momentum * var + (1 - case.momentum) * biased
            residuals = []
            if case.residual:
                residuals = [given[f"z {step} {device}"].requires_grad_() for device in group]
                y = y + torch.cat([_rows(z, case) for z in residuals])
            if case.activation == "relu":
                y = torch.relu(y)
            dy = torch.cat([_rows(given[f"dy {step} {device}"], case) for device in group])
            inputs = [*shards, *residuals, gamma, beta]
            gradients = torch.autograd.grad(y, inputs, dy)
            ends = np.cumsum([_rows(shard, case).shape[0] for shard in shards])[:-1]
            for i, (device, part) in enumerate(zip(group, np.split(y.detach().numpy(), ends))):
                found[f"y {step} {device}"] = _unrows(part, shards[i], case)
                found[f"dx {step} {device}"] = gradients[i]
                if case.residual:
                    found[f"dz {step} {device}"] = gradients[len(group) + i]
            own = case.training or not moving
            used = batch.detach().var(0, unbiased=False) if own else var
            terms = (gamma.detach() / (used + 1e-5).sqrt() * dy).abs()
            for device in group:
                found[f"terms {step} {device}"] = terms.max()
            if case.affine:
                found[f"dgamma {step} {number}"], found[f"dbeta {step} {number}"] = gradients[-2:]
        found[f"mean {number}"], found[f"var {number}"] = mean, var
    return found


def _rows(shard, case):
    return shard.movedim(case.axis, -1).reshape(-1, case.channels)


def _unrows(flat, like, case):
    shape = like.movedim(case.axis, -1).shape
    return np.moveaxis(flat.reshape(shape), -1, case.axis)


def network(case, devices, given):
    """Return each step's outputs where there are any, and all parameters after the last step."""
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 8, bias=False),
        torch.nn.BatchNorm1d(8, affine=case.affine),
        torch.nn.ReLU(),
        torch.nn.Linear(8, 4, bias=False),
    ).double()
    with torch.no_grad():
        net[0].weight.copy_(given["first"])
        net[3].weight.copy_(given["last"])
    sgd = torch.optim.SGD(net.parameters(), lr=case.learning_rate, momentum=case.sgd_momentum)
    var, found = torch.ones(8, dtype=torch.float64), {}
    for step in range(case.steps):
        xs = [given[f"x {step} {device}"] for device in range(devices)]
        targets = torch.cat([given[f"target {step} {device}"] for device in range(devices)])
        batch = torch.cat(xs)
        with torch.no_grad():  # torch's own moves by the unbiased variance
            var = 0.9 * var + 0.1 * net[0](batch).var(0, unbiased=False)
        out = net(batch)
        loss = ((out - targets) ** 2).mean(1).sum() / 2
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        for device, part in enumerate(torch.split(out.detach(), [len(x) for x in xs])):
            if len(part):
                found[f"output {step} {device}"] = part
    found.update(first=net[0].weight, last=net[3].weight, mean=net[1].running_mean, var=var)
    if case.affine:
        found.update(gamma=net[1].weight, beta=net[1].bias)
    return found


def main(inputs, expected):
    given = {}
    with np.load(inputs) as file:
        for name in file.files:
            case, array = name.split("/")
            given.setdefault(case, {})[array] = torch.tensor(file[name].astype("float64"))
    results = {}
    for name, arrays in given.items():
        kind, number, devices = name.split()
        compute, cases = {"layer": (layer, LAYERS), "network": (network, NETWORKS)}[kind]
        for array, value in compute(cases[int(number)], int(devices), arrays).items():
            results[f"{name}/{array}"] = np.asarray(
                value.detach() if isinstance(value, torch.Tensor) else value
            )
    np.savez(expected, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
