"""Measure the errors of our, MXNet's and PyTorch's batch normalization, for docs/numerics.md.

    python docs/errors.py [--torch .venv-torch/bin/python]

All get the same inputs, made here, and are compared with the formula in NumPy's extended precision.
Each runs in a process of its own, since PyTorch needs another NumPy (`make torch` installs both).
The tables replace those in docs/numerics.md.  Takes a minute.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
PAGE = HERE / "numerics.md"
EPSILON, MOMENTUM = 1e-5, 0.9
DTYPES = "float16", "float32", "float64"
KINDS = [
    *("standard", "offset 100", "offset 10,000", "scale 0.001"),
    *("small batch", "constant", "large map"),
]
RESULTS = "y", "dx", "dgamma", "dbeta", "moving_mean", "moving_var"


def make_inputs(kind, dtype):
    rng = np.random.RandomState(0)
    shapes = {"small batch": (2, 16, 1, 1), "large map": (2, 4, 512, 512)}
    shape = shapes.get(kind, (32, 16, 14, 14))
    x = rng.randn(*shape)
    if kind.startswith("offset"):
        x += float(kind.split()[1].replace(",", ""))
    if kind.startswith("scale"):
        x *= float(kind.split()[1])
    if kind == "constant":
        x[:, ::2] = 3.3
    parameter = "float64" if dtype == "float64" else "float32"
    return {
        "x": x.astype(dtype),
        "dy": rng.randn(*shape).astype(dtype),
        "gamma": (rng.rand(shape[1]) + 0.5).astype(parameter),
        "beta": rng.randn(shape[1]).astype(parameter),
    }


def exact(x, dy, gamma, beta, unbiased):
    """The formula; `unbiased`: the variance that PyTorch moves towards."""
    axes, per_channel = (0, 2, 3), (1, -1, 1, 1)
    x, dy, gamma, beta = (a.astype("longdouble") for a in (x, dy, gamma, beta))
    n = x.size // x.shape[1]
    mean = x.mean(axes)
    centered = x - mean.reshape(per_channel)
    var = (centered**2).mean(axes)
    r = 1 / np.sqrt(var + EPSILON)
    hat, scale = centered * r.reshape(per_channel), (gamma * r).reshape(per_channel)
    dbeta, dgamma = dy.sum(axes), (dy * hat).sum(axes)
    dx = scale * (dy - (dbeta.reshape(per_channel) + hat * dgamma.reshape(per_channel)) / n)
    moved = var * n / (n - 1) if unbiased else var
    return {
        "y": hat * gamma.reshape(per_channel) + beta.reshape(per_channel),
        "dx": dx,
        "dgamma": dgamma,
        "dbeta": dbeta,
        "moving_mean": (1 - MOMENTUM) * mean,
        "moving_var": MOMENTUM + (1 - MOMENTUM) * moved,
    }


def run_mxnet(layer, x, dy, gamma, beta, devices=1):
    """On several devices, one gets a quarter of the batch."""
    import mxnet as mx

    from gluon_syncbn import ModelDataParallel, parallel_backward

    contexts = [mx.cpu(i) for i in range(devices)]
    layer.cast(x.dtype)
    layer.initialize(ctx=contexts)
    layer.gamma.set_data(mx.nd.array(gamma, dtype=gamma.dtype))
    layer.beta.set_data(mx.nd.array(beta, dtype=beta.dtype))
    model = (lambda xs: [layer(xs[0])]) if devices == 1 else ModelDataParallel(layer, contexts)

    def shards(array):
        parts = [array] if devices == 1 else np.split(array, [max(len(array) // 4, 1)])
        return [mx.nd.array(p, ctx=c, dtype=p.dtype) for p, c in zip(parts, contexts)]

    xs = shards(x)
    for array in xs:
        array.attach_grad()
    with mx.autograd.record():
        ys = model(xs)
    parallel_backward(ys, shards(dy))
    mx.nd.waitall()
    return {
        "y": np.concatenate([y.asnumpy() for y in ys]),
        "dx": np.concatenate([array.grad.asnumpy() for array in xs]),
        "dgamma": sum(g.asnumpy().astype("float64") for g in layer.gamma.list_grad()),
        "dbeta": sum(g.asnumpy().astype("float64") for g in layer.beta.list_grad()),
        "moving_mean": layer.running_mean.data(contexts[0]).asnumpy(),
        "moving_var": layer.running_var.data(contexts[0]).asnumpy(),
    }


def run_ours(**inputs):
    from gluon_syncbn import SyncBatchNorm

    return run_mxnet(SyncBatchNorm(in_channels=len(inputs["gamma"])), devices=2, **inputs)


def run_batch_norm(**inputs):
    from mxnet.gluon import nn

    return run_mxnet(nn.BatchNorm(in_channels=len(inputs["gamma"])), **inputs)


def run_contrib(**inputs):
    from mxnet.gluon import contrib

    layer = contrib.nn.SyncBatchNorm(in_channels=len(inputs["gamma"]), num_devices=1)
    return run_mxnet(layer, **inputs)


def run_torch(x, dy, gamma, beta):
    import torch

    layer = torch.nn.BatchNorm2d(len(gamma), eps=EPSILON, momentum=1 - MOMENTUM)
    layer = layer.to(torch.from_numpy(gamma).dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(gamma))
        layer.bias.copy_(torch.from_numpy(beta))
    x = torch.from_numpy(x).requires_grad_()
    y = layer(x)
    y.backward(torch.from_numpy(dy))
    results = y.detach(), x.grad, layer.weight.grad, layer.bias.grad
    results += layer.running_mean, layer.running_var
    return dict(zip(RESULTS, (array.numpy() for array in results)))


IMPLEMENTATIONS = {
    "this package": run_ours,
    "`nn.BatchNorm`": run_batch_norm,
    "MXNet's SyncBatchNorm": run_contrib,
    "PyTorch": run_torch,
}


def run_all(implementation, folder):
    """In a process of its own: from the inputs in a folder to the results there."""
    for path in sorted(folder.glob("inputs *.npz")):
        inputs = dict(np.load(path))
        if implementation == "MXNet's SyncBatchNorm" and inputs["x"].dtype != "float32":
            continue  # it takes nothing else
        results = IMPLEMENTATIONS[implementation](**inputs)
        np.savez(folder / path.name.replace("inputs", implementation), **results)


def error(got, wanted):
    """The largest difference, on the scale of the largest exact value."""
    return float(np.abs(got.astype("longdouble") - wanted).max() / np.abs(wanted).max())


def text(value):
    """Write a number to one digit, as 2·10⁻⁷."""
    if np.isnan(value):
        return "NaN"
    if value == 0 or 0.1 <= value < 10:
        return f"{value:.1g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}·10" + str(int(exponent)).translate(
        str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    )


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def tables(errors):
    """Markdown; `errors`: {(dtype, kind, implementation): [an error per result]}."""

    def header(first):
        return [row(*first, *RESULTS), row(*["---"] * (len(first) + len(RESULTS)))]

    lines = ["## Worst errors by dtype", "", *header(["dtype", "implementation"])]
    for dtype in DTYPES:
        for name in IMPLEMENTATIONS:
            found = [e for (d, _, n), e in errors.items() if (d, n) == (dtype, name)]
            if found:
                lines.append(row(dtype, name, *map(text, np.max(found, axis=0))))
    for dtype in DTYPES:
        lines += ["", f"### {dtype}", "", *header(["input", "implementation"])]
        for kind in KINDS:
            for name in IMPLEMENTATIONS:
                if (dtype, kind, name) in errors:
                    lines.append(row(kind, name, *map(text, errors[dtype, kind, name])))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default=HERE.parent / ".venv-torch" / "bin" / "python")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_all(args.run[0], pathlib.Path(args.run[1]))
        return
    errors = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for dtype in DTYPES:
            for kind in KINDS:
                np.savez(folder / f"inputs {dtype} {kind}.npz", **make_inputs(kind, dtype))
        for implementation in IMPLEMENTATIONS:
            python = args.torch if implementation == "PyTorch" else sys.executable
            subprocess.run([python, __file__, "--run", implementation, folder], check=True)
        for dtype in DTYPES:
            for kind in KINDS:
                inputs = make_inputs(kind, dtype)
                for implementation in IMPLEMENTATIONS:
                    path = folder / f"{implementation} {dtype} {kind}.npz"
                    if path.exists():
                        got = np.load(path)
                        wanted = exact(**inputs, unbiased=implementation == "PyTorch")
                        found = [error(got[result], wanted[result]) for result in RESULTS]
                        errors[dtype, kind, implementation] = found
    begin, end = "<!-- errors.py writes what follows -->\n", "<!-- until here -->"
    page = PAGE.read_text(encoding="utf-8")
    found = re.search(f"(?s){re.escape(begin)}.*{re.escape(end)}", page)
    page = page[: found.start()] + f"{begin}\n{tables(errors)}\n\n{end}" + page[found.end() :]
    PAGE.write_text(page, encoding="utf-8")
    print(tables(errors))


if __name__ == "__main__":
    main()
