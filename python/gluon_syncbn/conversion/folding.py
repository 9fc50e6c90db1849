"""Batch normalization folded into the layer before it: in inference it is one scale and shift.

With k = gamma / sqrt(var + epsilon), a layer Wx + b followed by batch normalization is
(kW)x + k(b - mean) + beta; see Jacob et al., https://arxiv.org/abs/1712.05877, section 3.2.
"""

import numpy as np
from mxnet import ndarray

from .graph import Node

_PLAIN_LAYOUTS = (None, "None", "NCW", "NCHW", "NCDHW")


class _Fold:
    """One batch normalization and the layer before it, which may become one."""

    def __init__(self, norm, uses, parameters):
        self.norm, self.parameters = norm, parameters
        self.layer, output = norm.inputs[0]
        self._uses = uses
        self.possible = output == 0 and self._layer_fits() and self._parameters_fit()

    def _layer_fits(self):
        layer, axis = self.layer, int(self.norm.attrs["axis"])
        if len(self._uses[id(layer)]) != 1:
            return False  # something else reads the output before normalization
        if layer.op in ("Convolution", "Deconvolution"):
            return axis == 1 and layer.attrs.get("layout") in _PLAIN_LAYOUTS
        if layer.op == "FullyConnected":
            # Without flatten the output may have any number of dimensions, channels last.
            return axis == (1 if layer.flag("flatten", True) else -1) or (
                axis == -1 and layer.flag("flatten", True)
            )
        return False

    def _parameters_fit(self):
        # A weight that another layer shares must stay as it is.
        return all(
            node.is_variable and node.name in self.parameters and len(self._uses[id(node)]) == 1
            for node, _ in self.layer.inputs[1:]
        )

    def _value(self, node):
        return self.parameters[node.name].asnumpy().astype("float64")

    def _scaled(self, weight, k):
        if self.layer.op != "Deconvolution":  # (out, in / groups, ...)
            return weight * k.reshape(-1, *[1] * (weight.ndim - 1))
        groups = int(self.layer.attrs.get("num_group", 1))  # (in, out / groups, ...)
        rest = [1] * (weight.ndim - 2)
        split = weight.reshape(groups, -1, *weight.shape[1:])
        return (split * k.reshape(groups, 1, -1, *rest)).reshape(weight.shape)

    def apply(self):
        """Change the layer and its parameters, so that the normalization can be left out."""
        gamma, beta, mean, var = (self._value(node) for node, _ in self.norm.inputs[1:])
        k = gamma / np.sqrt(var + float(self.norm.attrs["eps"]))
        layer = self.layer
        weight = layer.inputs[1][0]
        context, dtype = self.parameters[weight.name].context, self.parameters[weight.name].dtype
        without_bias = layer.flag("no_bias", layer.op == "Deconvolution")
        bias = 0 if without_bias else self._value(layer.inputs[2][0]).reshape(-1)

        def put(name, value):
            self.parameters[name] = ndarray.array(value, ctx=context, dtype=dtype)

        put(weight.name, self._scaled(self._value(weight), k))
        if without_bias:
            name = f"{layer.name}_folded_bias"
            layer.attrs["no_bias"] = "False"
            layer.inputs.append((Node("null", name), 0))
        else:
            name = layer.inputs[2][0].name
        put(name, (bias - mean) * k + beta)
        if any(reader is None for reader, _ in self._uses[id(self.norm)]):
            layer.name = self.norm.name  # the name of the network's output stays


def fold(graph, parameters):
    """Fold every BatchNorm of a graph that follows a convolution or a dense layer.

    Where fix_gamma is set, gamma must be written as 1 already.

    Parameters
    ----------
    graph : Graph
        Changed in place; normalizations that cannot be folded stay.
    parameters : dict
        Name to NDArray, arguments and auxiliary states alike.  Weights are changed and biases
        added; parameters that the graph no longer needs stay in it.

    Returns
    -------
    int
        How many were folded.
    """
    uses = graph.uses()
    folds = [
        _Fold(node, uses, parameters)
        for node in graph.nodes
        if node.op == "BatchNorm" and all(output == 0 for _, output in uses[id(node)])
    ]
    folds = [one for one in folds if one.possible]
    for one in folds:
        one.apply()
    graph.replace({one.norm: one.layer for one in folds})
    return len(folds)
