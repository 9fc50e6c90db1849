"""Weights for ``pretrained=True`` where there is no network to download them from.

Several of MXNet's tests take a pretrained network, only to compare it with its copies.  Without a
network they would all fail at the download, whatever the operators.
"""

import os

import mxnet as mx
from mxnet.gluon.model_zoo import model_store, vision


def stand_in():
    """Let random weights, the same in every run, stand in for those that cannot be downloaded."""
    download = model_store.get_model_file

    def get_model_file(name, root=None):
        root = root or os.path.join(mx.base.data_dir(), "models")
        try:
            return download(name, root)
        except OSError:  # and so are the errors of requests
            return _random_weights(name, os.path.expanduser(root))

    model_store.get_model_file = get_model_file


def _random_weights(name, root):
    path = os.path.join(root, f"{name}-random.params")
    if not os.path.exists(path):
        net = vision.get_model(name)
        with mx.util.np_array(False), mx.util.np_shape(False):
            mx.random.seed(1)
            net.initialize(mx.init.Xavier())
            net(mx.nd.zeros((1, 3, 224, 224)))
            net.save_parameters(path)
    return path
