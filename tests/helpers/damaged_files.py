"""Exported networks with something wrong in them: load each, train a step, and see what is raised.

    python tests/helpers/damaged_files.py SAMPLE LAYER...

prints a line for each; SAMPLE: how many of each layer's, always the same ones, or "all".  A crash
ends the process, a hang too, after 60 seconds, with the stacks of its threads.

Symbols are JSON, in which anything can stand.  Damaged bytes, and numbers of nodes and outputs that
do not exist, are left out: MXNet does not check them, and crashes with its own operators as well.
"""

import faulthandler
import json
import pathlib
import random
import sys
import tempfile

import mxnet as mx
import numpy as np
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import (
    MABN2d,
    ModelDataParallel,
    SyncBatchNorm,
    parallel_backward,
    set_timeout,
)

CONTEXTS = [mx.cpu(0), mx.cpu(1)]
LAYERS = {
    "synchronized": lambda: SyncBatchNorm(),
    "renormalized": lambda: SyncBatchNorm(renorm=True, momentum=None, activation="relu"),
    "local": lambda: SyncBatchNorm(num_devices=1),
    "groups": lambda: SyncBatchNorm(group_size=1),
    "averages": lambda: MABN2d(4, 2, 8, num_devices=None),
}
# What an option could have.
VALUES = [
    *("", "-1", "0", "3", "-7", "1.5", "99999999999999999999", "2147483647", "-2147483648"),
    *("1e400", "nan", "-inf", "None", "True", "x", "%s%n", "(1,2)", "0x10", "é", "٣", "\n", '"'),
    "a" * 100000,
]
OPERATORS = "moments", "sum", "normalize", "batch_norm", "mabn_moments", "mabn_normalize"


def exported(layer, folder):
    """What a network with this layer exports: the JSON as objects, and the parameters."""
    net = nn.HybridSequential(prefix="net_")
    net.add(nn.Dense(36, prefix="dense_"))
    net.add(nn.HybridLambda(lambda F, x: F.reshape(x, (-1, 4, 3, 3)), prefix="reshape_"))
    net.add(layer)
    net.initialize()
    net.hybridize()
    net(mx.nd.ones((2, 3)))
    net.export(str(folder / "net"))
    content = json.loads((folder / "net-symbol.json").read_text(encoding="utf-8"))
    return content, mx.nd.load(str(folder / "net-0000.params"))


def mutations(content, parameters):
    """Yield (what, JSON, parameters)."""

    def changed(change):
        new = json.loads(json.dumps(content))
        change(new["nodes"])
        return new, parameters

    for i, node in enumerate(content["nodes"]):
        if not node["op"].startswith("_syncbn"):
            continue
        options = {*node["attrs"], "weighted", "add", "renorm", "ndim", "__group_size__", "?"}
        for option in sorted(options):
            for value in VALUES:

                def set_option(nodes, i=i, option=option, value=value):
                    nodes[i]["attrs"][option] = value

                yield (f"{node['op']} {option}={value[:20]!r}", *changed(set_option))
        for k, entry in enumerate(node["inputs"]):

            def leave_out(nodes, i=i, k=k):
                del nodes[i]["inputs"][k]

            def repeat(nodes, i=i, entry=entry):
                nodes[i]["inputs"].append(entry)

            if len(node["inputs"]) > 1:  # MXNet crashes on loading a node without any
                yield (f"{node['op']} without input {k}", *changed(leave_out))
            yield (f"{node['op']} input {k} twice", *changed(repeat))
            for source in range(i):

                def connect(nodes, i=i, k=k, source=source):
                    nodes[i]["inputs"][k] = [source, 0, 0]

                yield (f"{node['op']} input {k} is node {source}", *changed(connect))
        for op in OPERATORS:
            for prefix in ("_syncbn_", "_backward__syncbn_"):

                def be(nodes, i=i, op=prefix + op):
                    nodes[i].update(op=op, attrs={"key": "k"} if op.endswith("sum") else {})

                yield (f"{node['op']} is {prefix}{op}", *changed(be))
    yield from _with_context_of_its_own(content, parameters)
    for name, array in parameters.items():
        values = array.asnumpy()
        for new in (
            *(np.full_like(values, v) for v in (np.nan, np.inf, 3e38, -5)),
            *(values.astype(dtype) for dtype in ("float16", "float64", "int32", "uint8")),
            *(values[:-1], np.concatenate([values, values]), values[None]),
        ):
            if new.size:
                array = mx.nd.array(new, dtype=new.dtype)
                what = f"{name} {new.dtype} {new.shape} {new.ravel()[0]}"
                yield what, content, {**parameters, name: array}
        yield f"{name} missing", content, {k: v for k, v in parameters.items() if k != name}


def _with_context_of_its_own(content, parameters):
    """What one operator hands to the next as a parameter instead, of any type and size."""
    for i, node in enumerate(content["nodes"]):
        for k, (source, _, _) in enumerate(node["inputs"]):
            if not node["op"].startswith("_syncbn") or content["nodes"][source]["op"] == "null":
                continue
            for number, dtype in enumerate(("float32", "float64", "float16")):
                for shape in ((1, 8), (1, 9), (1, 1000), (8,), (2, 4, 3, 3)):
                    new = json.loads(json.dumps(content))
                    for other in new["nodes"]:
                        other["inputs"] = [[s + 1, o, v] for s, o, v in other["inputs"]]
                    new["nodes"][i]["inputs"][k] = [0, 0, 0]
                    variable = {"op": "null", "name": "own", "inputs": []}
                    new["nodes"].insert(0, {**variable, "attrs": {"__dtype__": str(number)}})
                    new["heads"] = [[s + 1, o, v] for s, o, v in new["heads"]]
                    numbers = range(len(new["nodes"]))
                    new["arg_nodes"] = [n for n in numbers if new["nodes"][n]["op"] == "null"]
                    new["node_row_ptr"] = [*numbers, len(new["nodes"])]
                    own = {**parameters, "arg:own": mx.nd.ones(shape, dtype=dtype)}
                    yield f"{node['op']} input {k} of its own, {dtype} {shape}", new, own


def attempt(content, parameters, folder):
    """Train a step on two devices, and by an executor; return what was raised."""
    text = json.dumps(content, ensure_ascii=False)
    (folder / "symbol.json").write_text(text, encoding="utf-8")
    mx.nd.save(str(folder / "parameters"), parameters)
    files = str(folder / "symbol.json"), ["data"], str(folder / "parameters")

    def step():
        net = gluon.SymbolBlock.imports(*files, ctx=CONTEXTS)
        model = ModelDataParallel(net, CONTEXTS)
        for _ in range(2):
            with autograd.record():
                ys = model([mx.nd.ones((2, 3), ctx=c) for c in CONTEXTS])
            parallel_backward([y[0] if isinstance(y, (list, tuple)) else y for y in ys])

    def bind():
        executor = mx.sym.load(files[0]).simple_bind(mx.cpu(), data=(2, 3))
        executor.forward(is_train=True)
        executor.backward([mx.nd.ones(y.shape, dtype=y.dtype) for y in executor.outputs])

    raised = []
    for action in (step, bind):
        try:
            action()
            mx.nd.waitall()
        except Exception as error:
            raised.append(error)
            try:
                mx.nd.waitall()
            except mx.MXNetError:
                pass
    return raised


def main():
    sample, *names = sys.argv[1:]
    set_timeout(0.2)  # some wait for a device that does not exist
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for name in names or LAYERS:
            content, parameters = exported(LAYERS[name](), folder)
            before = repr(attempt(content, parameters, folder))  # executors have no groups
            every = list(mutations(content, parameters))
            if sample != "all":
                every = random.Random(0).sample(every, int(sample))
            for what, changed, arrays in every:
                print(name, what, end=": ", flush=True)
                faulthandler.dump_traceback_later(60, exit=True)
                raised = attempt(changed, arrays, folder)
                print([f"{type(e).__name__}: {str(e)[:200]}" for e in raised], flush=True)
            assert repr(attempt(content, parameters, folder)) == before, "what is right fails now"
    print("all were survived")


if __name__ == "__main__":
    main()
