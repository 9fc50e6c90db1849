"""Networks of equal names in one process: each gets its own sums, never the other's."""

import gc
from concurrent.futures import ThreadPoolExecutor

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon import nn

from gluon_syncbn import ModelDataParallel, SyncBatchNorm, parallel_backward
from gluon_syncbn.data_parallel.exchanges import exchanges_of
from networks import MODES, split
from reference import batch_norm, largest_error

STEPS = 5


def make(two, hybridize=None):
    net = nn.HybridSequential(prefix="net_")
    with net.name_scope():
        net.add(SyncBatchNorm(in_channels=3))
    net.initialize(ctx=two)
    if hybridize is not None:
        net.hybridize(**hybridize)
    return net


@pytest.fixture
def files(tmp_path):
    net = make(mx.cpu(), {})
    net(mx.nd.ones((2, 3)))
    net.export(str(tmp_path / "net"))
    return str(tmp_path / "net-symbol.json"), ["data"], str(tmp_path / "net-0000.params")


def train(models, two, data):
    """Train all models at once, each on its own data; check outputs, gradients and statistics."""
    means = np.zeros((len(models), 3))
    for step in range(STEPS):
        pending = []
        for model, of_model in zip(models, data):
            xs = split(of_model[step], two)
            for x in xs:
                x.attach_grad()
            with autograd.record():
                pending.append((xs, model(xs)))
        # Backward in another order than forward.
        for (_, ys), of_model in list(zip(pending, data))[::-1]:
            parallel_backward(ys, split(of_model[step] ** 2, two))
        for i, (of_model, (xs, ys)) in enumerate(zip(data, pending)):
            x = of_model[step]
            wanted = batch_norm([x], [x**2], np.ones(3), np.zeros(3))
            y = np.concatenate([y.asnumpy() for y in ys])
            dx = np.concatenate([x.grad.asnumpy() for x in xs])
            assert largest_error(y, wanted.y[0]) < 1e-5
            assert largest_error(dx, wanted.dx[0]) < 1e-4
            means[i] = 0.9 * means[i] + 0.1 * wanted.mean
    mx.nd.waitall()
    for model, mean in zip(models, means):
        (parameter,) = (p for n, p in model.collect_params().items() if n.endswith("running_mean"))
        for array in parameter.list_data():
            np.testing.assert_allclose(array.asnumpy(), mean, atol=1e-6)


def batches(count, rng):
    """Data of another mean and scale for each network, so that a wrong sum would show."""
    return [rng.randn(STEPS, 7, 3) * (i + 1) + 10 * i for i in range(count)]


@pytest.mark.parametrize("hybridize", MODES)
def test_blocks_of_one_prefix(hybridize, two, rng):
    nets = [make(two, hybridize) for _ in range(3)]
    models = [ModelDataParallel(net, two) for net in nets]
    assert len({e.key for net in nets for e in exchanges_of(net)}) == len(nets)
    train(models, two, batches(len(models), rng))


@pytest.mark.parametrize("hybridize", MODES)
def test_one_file_loaded_twice_and_the_block_it_is_of(hybridize, two, files, rng):
    nets = [gluon.SymbolBlock.imports(*files, ctx=two) for _ in range(2)]
    if hybridize is not None:
        for net in nets:
            net.hybridize(**hybridize)
    nets.append(make(two, hybridize))
    models = [ModelDataParallel(net, two) for net in nets]
    assert len({e.key for net in nets for e in exchanges_of(net)}) == len(nets)
    train(models, two, batches(len(models), rng))


@pytest.mark.parametrize("loaded", [False, True])
def test_one_network_in_two_models(loaded, two, files, rng):
    """Passes keep them apart; the statistics are those of one network that was called twice."""
    net = gluon.SymbolBlock.imports(*files, ctx=two) if loaded else make(two, {})
    models = [ModelDataParallel(net, two) for _ in range(2)]
    data = batches(2, rng)
    for step in range(STEPS):
        with autograd.record():
            outputs = [model(split(part[step], two)) for model, part in zip(models, data)]
        for ys, part in zip(outputs, data):
            x = part[step]
            wanted = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
            assert largest_error(np.concatenate([y.asnumpy() for y in ys]), wanted) < 1e-5


@pytest.mark.parametrize("loaded", [False, True])
def test_in_two_threads_at_once(loaded, two, files, rng):
    def make_one():
        return gluon.SymbolBlock.imports(*files, ctx=two) if loaded else make(two, {})

    models = [ModelDataParallel(make_one(), two) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for future in [
            pool.submit(train, [model], two, [part]) for model, part in zip(models, batches(2, rng))
        ]:
            future.result()


def test_one_is_deleted_and_another_made(two, files, rng):
    """Also while calls of the first are on their way."""
    for part in batches(6, rng):
        model = ModelDataParallel(make(two, {}), two)
        loaded = ModelDataParallel(gluon.SymbolBlock.imports(*files, ctx=two), two)
        with autograd.record():
            outputs = model(split(part[0], two)), loaded(split(part[0], two))
        del model, loaded, outputs
        gc.collect()
        train([ModelDataParallel(make(two, {}), two)], two, [part])
        train([ModelDataParallel(gluon.SymbolBlock.imports(*files, ctx=two), two)], two, [part])
