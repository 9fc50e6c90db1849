"""The layer as a function with the arguments of TensorFlow's, for programs that are ported from it.

TensorFlow 1 keeps variables in a graph, by the names of their scopes.  Here they are in a
``ParameterDict``, and behind each scope is a :class:`SyncBatchNorm`.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from typing import Any, Callable

from mxnet import autograd
from mxnet.context import Context
from mxnet.gluon import ParameterDict
from mxnet.ndarray import NDArray
from mxnet.symbol import Symbol

from . import passes
from .mxnet_private import contexts_of
from .sync_batch_norm import SyncBatchNorm, checked_num_devices

__all__ = ["AUTO_REUSE", "VARIABLES", "sync_batch_norm"]

#: For ``reuse``: make the variables of a scope at its first use, and take them from then on.
AUTO_REUSE = "AUTO_REUSE"

#: The variables of :func:`sync_batch_norm` that were given no ``params``.
VARIABLES = ParameterDict()

_AXES = {"NHWC": -1, "NCHW": 1}
_INITIALIZERS = {  # TensorFlow's names -> those of the layer
    "beta": "beta_initializer",
    "gamma": "gamma_initializer",
    "moving_mean": "running_mean_initializer",
    "moving_variance": "running_variance_initializer",
}

_scopes: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # ParameterDict -> {name: _Scope}
_lock = threading.RLock()


def sync_batch_norm(
    inputs: Any,
    decay: float = 0.999,
    center: bool = True,
    scale: bool = False,
    epsilon: float = 0.001,
    activation_fn: Callable | None = None,
    param_initializers: dict | None = None,
    param_regularizers: None = None,
    updates_collections: None = None,
    is_training: bool = True,
    reuse: Any = None,
    variables_collections: None = None,
    outputs_collections: None = None,
    trainable: bool = True,
    batch_weights: Any = None,
    fused: bool | None = None,
    data_format: str = "NHWC",
    zero_debias_moving_mean: bool = False,
    scope: str | None = None,
    renorm: bool = False,
    renorm_clipping: dict | None = None,
    renorm_decay: float = 0.99,
    adjustment: None = None,
    num_dev: int | None = 1,
    *,
    params: ParameterDict | None = None,
) -> Any:
    """Normalize a batch, with the arguments of ``tf.contrib.layers.batch_norm`` and ``num_dev``.

    For code that is ported from TensorFlow 1, or from syncbn-tensorflow's function of this name:
    the same arguments in the same order.  The defaults differ from those of :class:`SyncBatchNorm`:
    channels come last, the moving averages are slower, epsilon is larger, there is no gamma, and
    one device takes part.

    Parameters
    ----------
    inputs : NDArray or Symbol
        Of shape ``(N, *, C)``, or ``(N, C, *)`` with ``data_format='NCHW'``: 2 or more dimensions.
    decay : float, default 0.999
        ``moving = decay * moving + (1 - decay) * batch``.  The variance is the biased one.
    center : bool, default True
        Learn ``beta``; otherwise it is 0.
    scale : bool, default False
        Learn ``gamma``; otherwise it is 1.
    epsilon : float, default 0.001
        Added to the variance.
    activation_fn : callable, optional
        Applied to the result, for example ``mx.nd.relu``.
    param_initializers : dict, optional
        MXNet's initializers by TensorFlow's names: beta, gamma, moving_mean, moving_variance.
    is_training : bool, default True
        Normalize by the batch and update the moving averages; otherwise by the moving averages.
        An array is treated so whatever autograd's mode is.  A symbol with True still uses the
        moving averages when its graph is run for inference, as all of MXNet's graphs do.
    reuse : bool or AUTO_REUSE, optional
        True: take the variables of a scope that exists.  None or False: make them; the scope must
        be new.  ``AUTO_REUSE``: make them the first time, as in a training loop with arrays.
    trainable : bool, default True
        False: beta and gamma get no gradient, in every use of the scope; to change that later, set
        their ``grad_req`` in ``params``.  (For symbols: Module's ``fixed_param_names``.)
    batch_weights : NDArray or Symbol, optional
        Of the kind of ``inputs``, of shape ``(N,)``: how much each sample counts; see
        :class:`SyncBatchNorm`.
    fused : bool, optional
        Any; there is one implementation, which is fused.
    data_format : {'NHWC', 'NCHW'}, default 'NHWC'
        Whether channels come last or second, for any number of dimensions.
    scope : str, optional
        Names the variables: ``SCOPE_gamma``, ``SCOPE_beta``, ``SCOPE_running_mean`` and
        ``SCOPE_running_var``, for checkpoints of the Gluon layer.  None, for symbols only:
        ``BatchNorm``, ``BatchNorm_1``, ...
    renorm : bool, default False
        Batch renormalization, with ``renorm_clipping`` and, as ``renorm_momentum``,
        ``renorm_decay`` as for :class:`SyncBatchNorm`.
    renorm_clipping : dict, optional
    renorm_decay : float, default 0.99
    num_dev : int or None, default 1
        Number of devices that take part.  None: determined by :class:`ModelDataParallel`.
    params : ParameterDict, optional
        Where the variables are; by default ``gluon_syncbn.tensorflow.VARIABLES``.  A scope is new
        in each of them.
    param_regularizers, updates_collections, variables_collections, outputs_collections, \
zero_debias_moving_mean, adjustment
        Refused unless they have their defaults; the error says what to do instead.
        (``updates_collections`` is None here: the forward pass updates the moving averages.)

    Returns
    -------
    NDArray or Symbol
        Of the kind, shape and dtype of ``inputs``.

    Raises
    ------
    TypeError
        If ``inputs`` is neither an array nor a symbol, ``is_training`` not a bool, or
        ``activation_fn`` cannot be called.
    ValueError
        If an argument is refused; if a scope exists that should not, does not and should, or was
        made with another ``center``, ``scale`` or ``trainable``; if ``renorm_clipping`` comes
        without ``renorm``, or an array without a scope.  A scope that was new is not made then.

    Notes
    -----
    For an array, variables are initialized when they are made: on the devices of
    :class:`ModelDataParallel` within one, otherwise on the devices 0 to ``num_dev - 1`` of the
    input's kind, or the input's own if ``num_dev`` is 1.  ``gluon.Trainer(VARIABLES, ...)`` trains
    them.  For a symbol, MXNet initializes them, as those of any operator.

    Examples
    --------
    >>> import mxnet as mx
    >>> from gluon_syncbn import sync_batch_norm
    >>> from gluon_syncbn.tensorflow import AUTO_REUSE
    >>> params = mx.gluon.ParameterDict()
    >>> for x in (mx.nd.array([[0, 1], [2, 5]]), mx.nd.array([[4, 1], [2, 5]])):
    ...     y = sync_batch_norm(x, scope='bn', reuse=AUTO_REUSE, params=params)
    >>> y.asnumpy().round(2).tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    >>> sync_batch_norm(mx.sym.var('x'), scope='first').list_arguments()
    ['x', 'first_gamma', 'first_beta']
    """
    _refuse(
        param_regularizers=(param_regularizers, None, "use wd_mult of the parameters in params"),
        updates_collections=(
            updates_collections,
            None,
            "leave it out: the forward pass updates the moving averages, nothing is left to run",
        ),
        variables_collections=(variables_collections, None, "the variables are in params"),
        outputs_collections=(outputs_collections, None, "keep what the function returns"),
        zero_debias_moving_mean=(
            zero_debias_moving_mean,
            False,
            "the moving mean is not corrected for its start at 0; if training is so short that "
            "this matters, use a smaller decay",
        ),
        adjustment=(adjustment, None, "transform what the function returns"),
    )
    symbolic = isinstance(inputs, Symbol)
    if not symbolic and not isinstance(inputs, NDArray):
        raise TypeError(f"inputs must be an NDArray or a Symbol, but is a {type(inputs).__name__}")
    kind = Symbol if symbolic else NDArray
    if batch_weights is not None and not isinstance(batch_weights, kind):
        raise TypeError(
            f"batch_weights must be of the kind of inputs, but is a {type(batch_weights).__name__}"
        )
    if not isinstance(is_training, (bool, int)):
        raise TypeError(
            f"is_training must be True or False, but is a {type(is_training).__name__}; a graph "
            "learns from MXNet, when it runs, whether that is for training"
        )
    if activation_fn is not None and not callable(activation_fn):
        raise TypeError(f"activation_fn must be callable, but is {activation_fn!r}")
    if data_format not in _AXES:
        raise ValueError(f"data_format must be 'NHWC' or 'NCHW', but is {data_format!r}")
    if symbolic and not trainable:
        raise ValueError(
            "trainable=False says nothing in a symbol; give Module the names of the variables as "
            "fixed_param_names"
        )
    if renorm_clipping is not None and not renorm:
        raise ValueError("renorm_clipping is given without renorm=True; add it")
    # A graph for inference normalizes by the moving averages, which renormalization leaves alone.
    renormalizes = bool(renorm) and (bool(is_training) or not symbolic)
    settings = {
        "num_devices": checked_num_devices(num_dev),
        "momentum": decay,
        "epsilon": epsilon,
        "center": bool(center),
        "scale": bool(scale),
        "axis": _AXES[data_format],
        # An array's mode is set for its call; a graph's is not known yet.
        "use_global_stats": symbolic and not is_training,
        "renorm": renormalizes,
        "renorm_clipping": renorm_clipping if renormalizes else None,
        "renorm_momentum": renorm_decay,
    }
    initializers = _initializers(param_initializers)
    params = VARIABLES if params is None else params
    with _scope(params, scope, reuse, symbolic) as found:
        with _lock:  # the devices of ModelDataParallel come at the same time
            layer = found.layer(settings, initializers, bool(trainable))
            if not symbolic:
                found.prepare(layer, inputs)
        if symbolic:
            y = layer(inputs, batch_weights)
        else:
            with autograd.train_mode() if is_training else autograd.predict_mode():
                y = layer(inputs, batch_weights)
        if activation_fn is not None:
            y = activation_fn(y)
        with _lock:
            params.update(layer.params)
    return y


class _Scope:
    """The variables of a scope, and the layers over them: one for each choice of settings.

    It does not hold the ParameterDict, which is the weak key that it is found by.
    """

    def __init__(self, name, prefix):
        self.calls, self.has_served = 0, False  # calls on their way; whether one has succeeded
        self._name, self._prefix = name, prefix
        self._layers = []  # (settings, layer)
        self._made = {}  # what a reuse must say again

    def layer(self, settings, initializers, trainable):
        same = {"center": settings["center"], "scale": settings["scale"], "trainable": trainable}
        for name, made in self._made.items():
            if made != same[name]:
                raise ValueError(
                    f"scope {self._name!r} was made with {name}={made}; a reuse must say the same"
                )
        for made, layer in self._layers:
            if made == settings:
                return layer
        layer = SyncBatchNorm(
            prefix=f"{self._prefix}{self._name}_",
            params=self._layers[0][1].params if self._layers else None,
            **settings,
            **initializers,
        )
        if not self._layers and not trainable:
            layer.gamma.grad_req = layer.beta.grad_req = "null"
        self._layers.append((settings, layer))
        self._made = same
        return layer

    def prepare(self, layer, inputs):
        """Initialize the variables for an array, if they are not yet."""
        new = [p for p in layer.params.values() if contexts_of(p) is None]
        if new:
            layer.cast(inputs.dtype)
            for parameter in new:
                parameter.initialize(ctx=_devices(layer, inputs.context))


def _devices(layer, here):
    a_pass = passes.current()
    if a_pass is not None:
        return a_pass.devices
    if layer.num_devices in (None, 1):
        return [here]
    return [Context(here.device_type, i) for i in range(layer.num_devices)]


@contextmanager
def _scope(params, name, reuse, symbolic):
    """Give the scope of a call; one that the call has made goes again if the call fails."""
    with _lock:
        scopes = _scopes.setdefault(params, {})
        name = _checked_scope(scopes, name, reuse, symbolic)
        found = scopes.setdefault(name, _Scope(name, params.prefix))
        found.calls += 1
    try:
        yield found
        found.has_served = True
    finally:
        with _lock:
            found.calls -= 1
            if not found.has_served and not found.calls:
                del scopes[name]


def _checked_scope(scopes, name, reuse, symbolic):
    """Return the name of a call's scope; raise ValueError if ``reuse`` does not allow it."""
    if name is None:
        if not symbolic:
            raise ValueError(
                "scope must be given for an array: without one, every call would make variables of "
                "its own"
            )
        if reuse:
            raise ValueError("reuse needs a scope")
        names = (f"BatchNorm_{i}" if i else "BatchNorm" for i in range(len(scopes) + 1))
        name = next(free for free in names if free not in scopes)
    if reuse not in (None, False, True, AUTO_REUSE):
        raise ValueError(f"reuse must be None, False, True or AUTO_REUSE, but is {reuse!r}")
    if name in scopes and not reuse:
        raise ValueError(
            f"scope {name!r} exists already; give another one, or reuse=True (AUTO_REUSE in a loop)"
        )
    if name not in scopes and reuse is True:
        raise ValueError(f"scope {name!r} does not exist and cannot be reused; make it first")
    return name


def _initializers(given):
    unknown = sorted(set(given or ()) - _INITIALIZERS.keys())
    if unknown:
        raise ValueError(
            f"param_initializers has {', '.join(unknown)}; the variables are "
            f"{', '.join(_INITIALIZERS)}"
        )
    return {_INITIALIZERS[name]: value for name, value in (given or {}).items()}


def _refuse(**arguments):
    """Raise ValueError for the first of {name: (value, default, advice)} without its default."""
    for name, (value, default, advice) in arguments.items():
        if value is not default and (default is None or value != default):
            raise ValueError(f"{name} must be {default!r}, the default; {advice}")
