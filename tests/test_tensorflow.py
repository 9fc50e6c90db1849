"""The function with TensorFlow's arguments: what each of them does, or why it is refused."""

import gc
import inspect
import weakref

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon

from gluon_syncbn import ModelDataParallel, parallel_backward, sync_batch_norm
from gluon_syncbn.tensorflow import AUTO_REUSE, VARIABLES
from networks import split
from reference import batch_norm, largest_error


@pytest.fixture
def params():
    return gluon.ParameterDict()


def test_arguments_are_those_of_tensorflow():
    """In their order, with their defaults."""
    signature = inspect.signature(sync_batch_norm).parameters
    assert " ".join(signature) == (
        "inputs decay center scale epsilon activation_fn param_initializers param_regularizers "
        "updates_collections is_training reuse variables_collections outputs_collections trainable "
        "batch_weights fused data_format zero_debias_moving_mean scope renorm renorm_clipping "
        "renorm_decay adjustment num_dev params"
    )
    defaults = {name: p.default for name, p in signature.items() if p.default is not None}
    del defaults["inputs"]
    assert defaults == {
        "decay": 0.999,
        "center": True,
        "scale": False,
        "epsilon": 0.001,
        "is_training": True,
        "trainable": True,
        "data_format": "NHWC",
        "zero_debias_moving_mean": False,
        "renorm": False,
        "renorm_decay": 0.99,
        "num_dev": 1,
    }


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_an_array(data_format, dtype, params, rng):
    x, dy = (mx.nd.array(rng.randn(4, 3, 5) + 1, dtype=dtype) for _ in range(2))
    x.attach_grad()
    axis = -1 if data_format == "NHWC" else 1
    channels = x.shape[axis]
    options = dict(scope="bn", params=params, data_format=data_format, scale=True, decay=0.75)
    want = batch_norm(
        [x.asnumpy()], [dy.asnumpy()], np.ones(channels), np.zeros(channels), axis, epsilon=1e-3
    )
    for reuse in (None, True):
        with autograd.record(train_mode=False):  # is_training decides
            y = sync_batch_norm(x, reuse=reuse, **options)
        y.backward(dy)
    tolerance = {"float16": 5e-3, "float32": 1e-5, "float64": 1e-11}[dtype]
    assert largest_error(y.asnumpy(), want.y[0]) < tolerance
    assert largest_error(x.grad.asnumpy(), want.dx[0]) < tolerance
    assert largest_error(params["bn_gamma"].grad().asnumpy(), want.dgamma[0]) < tolerance
    moving = params["bn_running_mean"].data().asnumpy(), params["bn_running_var"].data().asnumpy()
    for got, start, value in zip(moving, (0, 1), (want.mean, want.var)):
        np.testing.assert_allclose(got, start * 0.75**2 + (1 - 0.75**2) * value, rtol=1e-5)
    with autograd.record():
        y = sync_batch_norm(x, reuse=True, is_training=False, **options)
    want = batch_norm(
        [x.asnumpy()], [dy.asnumpy()], np.ones(channels), np.zeros(channels), axis, 1e-3, moving
    )
    y.backward(dy)
    assert largest_error(y.asnumpy(), want.y[0]) < tolerance
    assert largest_error(x.grad.asnumpy(), want.dx[0]) < tolerance
    assert (params["bn_running_mean"].data().asnumpy() == moving[0]).all()


def test_center_scale_trainable_initializers_and_activation(params):
    x = mx.nd.array([[-1.0], [1.0]])

    def run(scope, **options):
        return sync_batch_norm(x, scope=scope, params=params, epsilon=1e-9, **options)

    start = {"gamma": mx.init.Constant(3), "beta": "ones", "moving_mean": mx.init.Constant(7)}
    y = run("a", scale=True, param_initializers=start, activation_fn=mx.nd.relu)
    np.testing.assert_allclose(y.asnumpy(), [[0], [4]], atol=1e-5)
    assert params["a_running_mean"].data().asscalar() == np.float32(7 * 0.999)
    requests = {
        (): ("null", "write"),
        ("scale",): ("write", "write"),
        ("center",): ("null", "null"),
        ("trainable",): ("null", "null"),
    }
    for i, (options, wanted) in enumerate(requests.items()):
        run(f"b{i}", **{name: name == "scale" for name in options})
        assert tuple(params[f"b{i}_{n}"].grad_req for n in ("gamma", "beta")) == wanted


@pytest.mark.parametrize("is_training", [True, False])
def test_a_symbol(is_training, params, rng):
    x = mx.sym.var("x")
    options = {"scope": "bn", "params": params, "is_training": is_training, "scale": True}
    y = sync_batch_norm(x, **options)
    again = sync_batch_norm(y, reuse=True, **options)
    assert again.list_arguments() == ["x", "bn_gamma", "bn_beta"]
    assert again.list_auxiliary_states() == ["bn_running_mean", "bn_running_var"]
    assert list(params) == ["bn_gamma", "bn_beta", "bn_running_mean", "bn_running_var"]
    executor = y.simple_bind(mx.cpu(), x=(6, 2, 3))
    data = rng.randn(6, 2, 3) + 1
    for name, value in (("x", data), ("bn_gamma", 1)):
        executor.arg_dict[name][:] = value
    executor.aux_dict["bn_running_var"][:] = 1
    got = executor.forward(is_train=True)[0].asnumpy()
    mean, var = (data.mean((0, 1)), data.var((0, 1))) if is_training else (0, 1)
    np.testing.assert_allclose(got, (data - mean) / np.sqrt(var + 1e-3), rtol=1e-4, atol=1e-5)
    moved = executor.aux_dict["bn_running_mean"].asnumpy()
    np.testing.assert_allclose(moved, 0.001 * mean * np.ones(3), rtol=1e-4)


def test_names_without_a_scope_and_the_default_place():
    names = [sync_batch_norm(mx.sym.var("x")).list_arguments()[1] for _ in range(2)]
    assert names == ["BatchNorm_gamma", "BatchNorm_1_gamma"]
    assert all(name in VARIABLES for name in names)


def test_reuse(params):
    x = mx.nd.ones((2, 3))

    def run(**options):
        return sync_batch_norm(x, params=params, **options)

    with pytest.raises(ValueError, match="scope 'bn' does not exist and cannot be reused"):
        run(scope="bn", reuse=True)
    run(scope="bn")
    for again in (None, False):
        with pytest.raises(ValueError, match="scope 'bn' exists already; give another one, or reu"):
            run(scope="bn", reuse=again)
    run(scope="bn", reuse=True)
    for _ in range(2):
        run(scope="loop", reuse=AUTO_REUSE)
    run(scope="bn", reuse=True, epsilon=0.1)  # the variables are shared, whatever the rest
    assert len(list(params)) == 8
    with pytest.raises(ValueError, match="scope 'bn' was made with scale=False; a reuse must say"):
        run(scope="bn", reuse=True, scale=True)
    sync_batch_norm(x, scope="bn", params=gluon.ParameterDict())
    with pytest.raises(ValueError, match="reuse must be None, False, True or AUTO_REUSE"):
        run(scope="bn", reuse="yes")
    with pytest.raises(ValueError, match="scope must be given for an array"):
        run()
    with pytest.raises(ValueError, match="reuse needs a scope"):
        sync_batch_norm(mx.sym.var("x"), reuse=True)


@pytest.mark.parametrize("in_a_model", [False, True])
def test_two_devices(in_a_model, two, params, rng):
    class Net(gluon.Block):
        def forward(self, x):
            options = {"scope": "bn", "reuse": AUTO_REUSE, "params": self.params, "scale": True}
            return sync_batch_norm(x, num_dev=2, **options)

    x = (rng.randn(7, 3) + 3).astype("float32")
    net = Net(prefix="net_")
    model = ModelDataParallel(net, two)
    for _ in range(2):
        with autograd.record():
            outs = model(split(x, two)) if in_a_model else [net(part) for part in split(x, two)]
        parallel_backward(outs)
    got = np.concatenate([out.asnumpy() for out in outs])
    np.testing.assert_allclose(got, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3), atol=1e-4)
    assert net.collect_params()["net_bn_gamma"].list_ctx() == two


REFUSED = {
    "param_regularizers": {},
    "updates_collections": "update_ops",
    "variables_collections": [],
    "outputs_collections": "outputs",
    "zero_debias_moving_mean": True,
    "adjustment": len,
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": True, "param_initializers": {"gamma": "nonsense"}},
        {"epsilon": "small"},
        {"renorm": True, "renorm_decay": 7},
        {"batch_weights": mx.nd.ones((2, 2, 2, 2))},
        {"activation_fn": lambda y: y + "1"},
    ],
)
def test_a_scope_is_made_by_a_call_that_succeeds(wrong, params):
    x, errors = mx.nd.ones((2, 3)), (ValueError, AssertionError, mx.MXNetError, TypeError)
    with pytest.raises(errors):
        sync_batch_norm(x, scope="bn", params=params, **wrong)
    assert not list(params)
    sync_batch_norm(x, scope="bn", params=params)
    assert len(list(params)) == 4
    with pytest.raises(errors):
        sync_batch_norm(x, scope="bn", reuse=True, params=params, **wrong)
    sync_batch_norm(x, scope="bn", reuse=True, params=params)  # an older one stays


def test_variables_are_freed_with_their_dictionary():
    params = gluon.ParameterDict()
    sync_batch_norm(mx.nd.ones((2, 3)), scope="bn", params=params)
    freed = weakref.ref(params), weakref.ref(params["bn_beta"])
    del params
    gc.collect()
    assert [reference() for reference in freed] == [None, None]


@pytest.mark.parametrize("trainable", [True, False])
def test_a_reuse_says_the_same_of_trainable(trainable, params):
    x = mx.nd.ones((2, 3))
    options = {"scope": "bn", "params": params, "reuse": AUTO_REUSE}
    sync_batch_norm(x, trainable=trainable, **options)
    wanted = params["bn_beta"].grad_req
    with pytest.raises(ValueError, match=f"'bn' was made with trainable={trainable}; a reuse must"):
        sync_batch_norm(x, trainable=not trainable, **options)
    assert params["bn_beta"].grad_req == wanted == ("write" if trainable else "null")
    sync_batch_norm(x, trainable=trainable, **options)


def test_clipping_belongs_to_renormalization(params):
    x, clipping = mx.nd.ones((2, 3)), {"rmax": 3}
    with pytest.raises(ValueError, match="renorm_clipping is given without renorm=True"):
        sync_batch_norm(x, scope="bn", params=params, renorm_clipping=clipping)
    options = {"renorm": True, "renorm_clipping": clipping, "scope": "bn", "params": params}
    graph = sync_batch_norm(mx.sym.var("x"), is_training=False, **options)
    assert not any("renorm" in name for name in graph.list_auxiliary_states())
    graph = sync_batch_norm(mx.sym.var("x"), reuse=True, **options)
    assert "bn_renorm_mean" in graph.list_auxiliary_states()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_by_name(name, params):
    with pytest.raises(ValueError, match=f"^{name} must be .*, the default; "):
        sync_batch_norm(mx.nd.ones((2, 3)), scope="bn", params=params, **{name: REFUSED[name]})
    assert not list(params)


def test_batch_weights(params, rng):
    x, weights = rng.randn(4, 3).astype("float32"), np.array([1, 2, 0, 1], "float32")
    y = sync_batch_norm(
        mx.nd.array(x), scope="bn", params=params, batch_weights=mx.nd.array(weights)
    )
    repeated = np.repeat(x, weights.astype(int), axis=0)
    wanted = (x - repeated.mean(0)) / np.sqrt(repeated.var(0) + 1e-3)
    np.testing.assert_allclose(y.asnumpy(), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="batch_weights must be of the kind of inputs"):
        sync_batch_norm(mx.nd.array(x), scope="bn", params=params, batch_weights=weights)


def test_errors(params):
    x = mx.nd.ones((2, 3))
    for error, match, options in (
        (TypeError, "inputs must be an NDArray or a Symbol, but is a list", {"inputs": [1]}),
        (TypeError, "is_training must be True or False, but is a NDArray", {"is_training": x}),
        (TypeError, "activation_fn must be callable, but is 'relu'", {"activation_fn": "relu"}),
        (ValueError, "data_format must be 'NHWC' or 'NCHW', but is 'NC'", {"data_format": "NC"}),
        (ValueError, "num_devices must be a positive integer", {"num_dev": 0}),
        (ValueError, "param_initializers has mean; the var", {"param_initializers": {"mean": 0}}),
        (ValueError, "fixed_param_names", {"inputs": mx.sym.var("x"), "trainable": False}),
    ):
        with pytest.raises(error, match=match):
            sync_batch_norm(**{"inputs": x, "scope": "bn", "params": params, **options})
