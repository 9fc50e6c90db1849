"""What MXNet's tests download, made here where there is no network: networks, with random weights.

The tests take a pretrained network only to compare it with its copies and conversions.  Without a
network they would all fail at the download, whatever the operators.
"""

import glob
import os

import mxnet as mx
from mxnet.gluon.model_zoo import model_store, vision


def stand_in():
    """Let what is made here, the same in every run, stand in for what cannot be downloaded."""
    get_model_file, download_model = model_store.get_model_file, mx.test_utils.download_model

    def model_file(name, root=None):
        root = os.path.expanduser(root or os.path.join(mx.base.data_dir(), "models"))
        try:
            return get_model_file(name, root)
        except OSError:  # and so are the errors of requests
            return _parameters(name, root)

    def model(model_name, dst_dir="./", meta_info=None):
        for file in glob.glob(os.path.join(glob.escape(dst_dir), f"{model_name}-*")):
            os.remove(file)  # of an earlier run, with other operators
        try:
            return download_model(model_name, dst_dir, meta_info)
        except OSError:
            assert model_name == "imagenet1k-resnet-18", model_name
            prefix = os.path.join(dst_dir, model_name)
            _save_checkpoint(_resnet18(), prefix)
            return prefix, 0

    model_store.get_model_file, mx.test_utils.download_model = model_file, model


def _parameters(name, root):
    """Save random parameters of a model-zoo network, once, and return the file."""
    path = os.path.join(root, f"{name}-random.params")
    if not os.path.exists(path):
        net = vision.get_model(name)
        with mx.util.np_array(False), mx.util.np_shape(False):
            mx.random.seed(1)
            net.initialize(mx.init.Xavier())
            net(mx.nd.zeros((1, 3, 224, 224)))
            net.save_parameters(path)
    return path


def _resnet18():
    """A symbol of the form, and with the names, of MXNet's published ResNet-18."""

    def normalized(x, name):
        x = mx.sym.BatchNorm(x, fix_gamma=False, eps=2e-5, name=name)
        return mx.sym.Activation(x, act_type="relu", name=name.replace("bn", "relu"))

    def convolution(x, filters, kernel, stride, name):
        sizes = {size: (value,) * 2 for size, value in (("kernel", kernel), ("stride", stride))}
        pad = (kernel // 2,) * 2
        return mx.sym.Convolution(
            x, num_filter=filters, pad=pad, no_bias=True, name=name, workspace=256, **sizes
        )

    x = mx.sym.BatchNorm(mx.sym.var("data"), fix_gamma=True, eps=2e-5, name="bn_data")
    x = normalized(convolution(x, 64, 7, 2, "conv0"), "bn0")
    x = mx.sym.Pooling(x, kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type="max")
    for stage, filters in enumerate((64, 128, 256, 512), 1):
        for unit in (1, 2):
            name = f"stage{stage}_unit{unit}_"
            stride = 2 if stage > 1 and unit == 1 else 1
            first = normalized(x, f"{name}bn1")
            y = convolution(first, filters, 3, stride, f"{name}conv1")
            y = convolution(normalized(y, f"{name}bn2"), filters, 3, 1, f"{name}conv2")
            x = y + (convolution(first, filters, 1, stride, f"{name}sc") if unit == 1 else x)
    x = mx.sym.Pooling(normalized(x, "bn1"), global_pool=True, kernel=(7, 7), pool_type="avg")
    x = mx.sym.FullyConnected(mx.sym.Flatten(x), num_hidden=1000, name="fc1")
    return mx.sym.SoftmaxOutput(x, name="softmax")


def _save_checkpoint(sym, prefix):
    module = mx.mod.Module(sym)
    module.bind([("data", (1, 3, 224, 224))], [("softmax_label", (1,))])
    mx.random.seed(1)
    module.init_params(mx.init.Xavier())
    module.save_checkpoint(prefix, 0)
