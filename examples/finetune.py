"""Fine-tune a network of MXNet's model zoo on several devices and export it for plain MXNet.

Downloads nothing by default: it starts from random weights, and the data are the handwritten digits
in scikit-learn.  See --help.

In the first epochs the test accuracy is much worse than the loss suggests, because the moving
statistics lag behind weights that still change quickly.  mxnet.gluon.nn.BatchNorm does the same.
"""

import os
import re
import subprocess
import sys
import tempfile

import mxnet as mx
import numpy as np
from mxnet.gluon.model_zoo import vision

from gluon_syncbn import (
    ModelDataParallel,
    SyncBatchNorm,
    convert_sync_batchnorm,
    export_for_inference,
)

# The script next to this one has the parts that every training shares.
from mnist import load_data, make_loaders, parse, set_up, split, train, training_arguments

# The zoo's networks with batch normalization; AlexNet, SqueezeNet and the plain VGG have none.
MODELS = [
    name
    for name in dir(vision)
    if re.fullmatch(r"(densenet|inception_v|mobilenet|resnet)\w*\d|vgg\d+_bn", name)
]

# Runs the exported files as a machine would that has MXNet, but not this package.
PREDICT = """
import sys, warnings
sys.modules["gluon_syncbn"] = None  # importing it would now fail
import mxnet as mx, numpy as np

symbol, parameters, images, outputs, batch_size = sys.argv[1:]
# MXNet warns that the file has no dtype for its input; it takes that of the parameters.
warnings.filterwarnings("ignore", message="(?s).*Cannot decide type")
net = mx.gluon.SymbolBlock.imports(symbol, ["data"], parameters)
net.hybridize()
loader = mx.gluon.data.DataLoader(np.load(images), int(batch_size))
np.save(outputs, np.concatenate([net(batch).asnumpy() for batch in loader]))
"""


def parse_arguments(argv=None):
    parser = training_arguments(__doc__, epochs=6, lr=0.05)
    parser.add_argument(
        "--model",
        default="mobilenet0_25",
        help="name of a function in mxnet.gluon.model_zoo.vision",
    )
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--params", metavar="FILE", help="start from a file written by the model's save_parameters"
    )
    weights.add_argument("--pretrained", action="store_true", help="download ImageNet weights")
    parser.add_argument("--image-size", type=int, default=64, help="size that images are scaled to")
    arguments = parse(parser, argv, ("epochs", "batch_size", "num_devices", "image_size"))
    if arguments.model not in MODELS:
        parser.error(
            f"--model {arguments.model} is not one of the zoo's networks with batch normalization: "
            + ", ".join(MODELS)
        )
    if arguments.params and not os.path.isfile(arguments.params):
        parser.error(f"--params {arguments.params}: there is no such file")
    return arguments


def prepare(images, size):
    """Turn 1 x H x W images in [0, 1] into inputs for ImageNet networks."""
    images = mx.nd.contrib.BilinearResize2D(mx.nd.array(images), height=size, width=size)
    rgb = mx.nd.broadcast_to(images, (0, 3, 0, 0)).asnumpy()
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 3, 1, 1)
    return ((rgb - mean) / std).astype("float32")


def load_base(arguments, ctx_list):
    """Make the zoo's network, with the weights that were asked for."""
    constructor = getattr(vision, arguments.model)
    if arguments.pretrained:
        try:
            return constructor(pretrained=True, ctx=ctx_list)
        except (OSError, RuntimeError, ValueError) as error:
            raise SystemExit(f"--pretrained: no weights of {arguments.model}: {error}") from None
    if not arguments.params:
        return constructor()
    try:
        # A checkpoint may have any number of classes; the last array has one row per class.
        *_, last = mx.nd.load(arguments.params).values()
        net = constructor(classes=len(last))
        net.load_parameters(arguments.params, ctx=ctx_list)
    except (AssertionError, AttributeError, TypeError, ValueError, mx.MXNetError) as error:
        reason = str(error).strip().splitlines()[-1]  # MXNet prepends a traceback
        raise SystemExit(
            f"--params {arguments.params} is no checkpoint of {arguments.model}: {reason}"
        ) from None
    return net


def make_network(arguments, ctx_list):
    """Return the synchronized network for ten classes, and its number of synchronized layers."""
    net = getattr(vision, arguments.model)(classes=10)
    # Everything but the output layer comes from the base, which has other classes.
    net.features = load_base(arguments, ctx_list).features
    convert_sync_batchnorm(net)
    size = arguments.image_size
    try:
        # (infer_shape would print its arguments before raising.)
        net(mx.sym.var("data")).infer_shape_partial(data=(arguments.batch_size, 3, size, size))
    except mx.MXNetError:
        raise SystemExit(
            f"--image-size {size} does not suit {arguments.model}; "
            "the zoo's networks are made for 224, inception_v3 for 299"
        ) from None
    with_weights = arguments.params or arguments.pretrained
    new = net.output if with_weights else net
    new.initialize(mx.init.Xavier(), ctx=ctx_list)
    synchronized = []
    net.apply(lambda block: synchronized.append(isinstance(block, SyncBatchNorm)))
    return net, sum(synchronized)


def predict(model, loader, ctx_list):
    outputs = [out.asnumpy() for data, _ in loader for out in model(split(data, ctx_list))]
    return np.concatenate(outputs)


def predict_elsewhere(files, images, batch_size):
    """Return the outputs of exported files in a Python process without this package."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = os.path.join(folder, "images.npy"), os.path.join(folder, "outputs.npy")
        np.save(source, images)
        command = [sys.executable, "-c", PREDICT, *files, source, target, str(batch_size)]
        subprocess.run(command, check=True)
        return np.load(target)


def main(argv=None):
    arguments = parse_arguments(argv)
    ctx_list = set_up(arguments)
    net, synchronized = make_network(arguments, ctx_list)
    start_from = "downloaded weights" if arguments.pretrained else arguments.params
    print(
        f"{arguments.model} from {start_from or 'random weights'}, "
        f"{synchronized} batch normalizations synchronized"
    )
    train_set, test_set = (
        (prepare(images, arguments.image_size), labels) for images, labels in load_data("digits")
    )
    loaders = make_loaders("digits", train_set, test_set, arguments, ctx_list)

    net.hybridize()  # exporting needs the graph
    model = ModelDataParallel(net, ctx_list)
    prefix = os.path.join(arguments.out, arguments.model)
    train(model, *loaders, arguments, f"{prefix}.png")
    print(f"saved {prefix}.png (curves)")

    expected = predict(model, loaders[1], ctx_list)
    print("exported; outputs of the files in a new Python process without gluon_syncbn:")
    for path, fold in ((prefix, False), (f"{prefix}-folded", True)):
        files = export_for_inference(model, path, fold=fold)
        outputs = predict_elsewhere(files, test_set[0], arguments.batch_size)
        same = (outputs.argmax(1) == expected.argmax(1)).sum()
        print(
            f"{'folded into the convolutions' if fold else 'batch normalization kept'}: "
            f"{files[0]}, {files[1]}\n"
            f"  same class for {same} of {len(expected)} test images; outputs, up to "
            f"{abs(expected).max():.1f}, differ by at most {abs(outputs - expected).max():.1e}"
        )


if __name__ == "__main__":
    main()
