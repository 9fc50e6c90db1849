"""Training by MXNet's own loops and stores: Estimator, and Trainer with every kind of kvstore."""

import mxnet as mx
import numpy as np
import pytest
from mxnet import autograd, gluon
from mxnet.gluon.contrib.estimator import CheckpointHandler, Estimator

from gluon_syncbn import DataParallelCriterion, ModelDataParallel, SyncBatchNorm, parallel_backward
from gluon_syncbn.estimator import DataParallelBatchProcessor
from networks import STATIC, assert_same_training, convolutional, data_for, split


def parameters_of(net):
    mx.nd.waitall()
    return {
        name: [array.asnumpy() for array in p.list_data()]
        for name, p in net._collect_params_with_prefix().items()
    }


def initialized(contexts, hybridize=None, norm=SyncBatchNorm, seed=3):
    mx.random.seed(seed)
    net = convolutional(norm, widths=(8, 8))
    net.initialize(mx.init.Xavier(), ctx=contexts)
    if hybridize is not None:
        net.hybridize(**hybridize)
    return net


def loader(count, batch, seed):
    (arrays,) = data_for(1, count, seed)
    return gluon.data.DataLoader(gluon.data.ArrayDataset(*arrays), batch, last_batch="keep")


def estimator_for(net, contexts, processor=None, **options):
    block = net.net if isinstance(net, ModelDataParallel) else net
    trainer = gluon.Trainer(block.collect_params(), "sgd", {"learning_rate": 0.05, "momentum": 0.9})
    estimator = Estimator(
        net,
        gluon.loss.SoftmaxCrossEntropyLoss(),
        trainer=trainer,
        context=contexts,
        batch_processor=processor,
        **options,
    )
    estimator.logger.handlers.clear()
    return estimator


def metrics_of(estimator):
    return {m.get()[0]: m.get()[1] for m in estimator.train_metrics + estimator.val_metrics}


def fit(estimator, net, count):
    """Fit and validate; the metrics are those of the last epoch."""
    estimator.fit(loader(count, 6, 0), val_data=loader(7, 4, 1), epochs=2)
    metrics = metrics_of(estimator)
    assert len(metrics) == 4
    return list(metrics.values()), parameters_of(net)


# The last batch of 6: 5 do not divide evenly; 1 leaves a device without input.
@pytest.mark.parametrize("count", [17, 13])
@pytest.mark.parametrize("hybridize", [None, STATIC])
def test_estimator_trains_several_devices_as_one(count, hybridize):
    one = [mx.cpu(0)]
    net = initialized(one)
    wanted = fit(estimator_for(net, one), net, count)  # by MXNet's own BatchProcessor
    for devices in (2, 3):
        contexts = [mx.cpu(i) for i in range(devices)]
        net = initialized(contexts, hybridize)
        estimator = estimator_for(net, contexts, DataParallelBatchProcessor())
        assert_same_training(fit(estimator, net, count), wanted)


def test_metrics_are_those_of_the_whole_data(two):
    """Computed by hand, from what a network without Estimator gives."""
    net = initialized(two)
    estimator = estimator_for(net, two, DataParallelBatchProcessor())
    estimator.evaluate(loader(7, 4, 1))
    (arrays,) = data_for(1, 7, 1)
    outputs = net(mx.nd.array(arrays[0]))
    losses = gluon.loss.SoftmaxCrossEntropyLoss()(outputs, mx.nd.array(arrays[1])).asnumpy()
    metrics = metrics_of(estimator)
    assert metrics["validation accuracy"] == (outputs.asnumpy().argmax(1) == arrays[1]).mean()
    np.testing.assert_allclose(metrics["validation softmaxcrossentropyloss"], losses.mean(), 1e-5)


def test_estimator_takes_a_model_and_a_network_and_a_loss_for_validation(two):
    net = initialized(two)
    doubled = gluon.nn.HybridSequential(prefix="doubled_")
    doubled.add(net, gluon.nn.HybridLambda(lambda F, x: 2 * x))
    estimator = estimator_for(
        ModelDataParallel(net, two),
        two,
        DataParallelBatchProcessor(),
        val_net=doubled,
        val_loss=gluon.loss.SoftmaxCrossEntropyLoss(weight=10),
    )
    got, _ = fit(estimator, net, 13)
    (arrays,) = data_for(1, 7, 1)
    loss = gluon.loss.SoftmaxCrossEntropyLoss()(
        2 * net(mx.nd.array(arrays[0])), mx.nd.array(arrays[1])
    )
    np.testing.assert_allclose(got[3], 10 * loss.mean().asscalar(), rtol=1e-5)


def test_checkpoints_of_an_estimator_go_on(two, tmp_path):
    """Two epochs at once are one epoch, a checkpoint, and one more in a new estimator."""

    def run(epochs, folder, resume=False):
        net = initialized(two, {}, seed=4 if resume else 3)
        handler = CheckpointHandler(str(folder), "net", resume_from_checkpoint=resume)
        estimator = estimator_for(net, two, DataParallelBatchProcessor())
        estimator.fit(loader(13, 6, 0), epochs=epochs, event_handlers=[handler])
        return parameters_of(net)

    wanted = run(2, tmp_path / "whole")
    run(1, tmp_path / "parts")
    got = run(2, tmp_path / "parts", resume=True)
    assert (tmp_path / "parts" / "net-symbol.json").exists()
    for name, arrays in got.items():
        np.testing.assert_array_equal(arrays, wanted[name], err_msg=name)


def test_estimator_with_the_batch_on_another_axis(two):
    """As in sequences: time first, then the batch."""

    def run(contexts, processor):
        mx.random.seed(3)
        net = gluon.nn.HybridSequential(prefix="net_")
        net.add(SyncBatchNorm(axis=2), gluon.nn.Dense(1, flatten=False))
        net.initialize(mx.init.Xavier(), ctx=contexts)
        rng = np.random.RandomState(0)
        arrays = [rng.randn(5, *shape).astype("float32") for shape in [(3, 3), (3, 1)]]
        data = gluon.data.DataLoader(
            gluon.data.ArrayDataset(*arrays),
            3,
            batchify_fn=lambda samples: [
                mx.nd.stack(*map(mx.nd.array, a), axis=1) for a in zip(*samples)
            ],
        )
        estimator = Estimator(
            net,
            gluon.loss.L2Loss(batch_axis=1),
            trainer=gluon.Trainer(net.collect_params(), "sgd", {"learning_rate": 0.1}),
            context=contexts,
            batch_processor=processor,
        )
        estimator.logger.handlers.clear()
        estimator.fit(data, epochs=2, batch_axis=1)
        return list(metrics_of(estimator).values())[:1], parameters_of(net)

    assert_same_training(run(two, DataParallelBatchProcessor()), run(two[:1], None))


@pytest.mark.parametrize("there", [0, 1])
def test_parameters_on_one_device_are_put_on_all(there, two):
    """The Trainer was made for one as well."""

    def run(contexts):
        net = initialized(contexts)
        net(mx.nd.zeros((1, *next(iter(loader(1, 1, 0)))[0].shape[1:]), contexts[0]))
        estimator = estimator_for(net, two, DataParallelBatchProcessor())
        estimator.fit(loader(9, 4, 0), epochs=1)
        return [], parameters_of(net)

    assert_same_training(run([two[there]]), run(two), tolerance=0)


def test_errors_of_the_batch_processor_say_what_to_do(two):
    net = initialized(two)
    data = loader(4, 4, 0)

    def fails(kind, match, net=net, contexts=two, data=data):
        estimator = estimator_for(net, contexts, DataParallelBatchProcessor())
        for run in (lambda: estimator.fit(data, epochs=1), lambda: estimator.evaluate(data)):
            with pytest.raises(kind, match=match):
                run()

    with pytest.raises(TypeError, match="first argument must be a list with one NDArray per dev"):
        estimator_for(ModelDataParallel(net, two), two).fit(data, epochs=1)  # without ours

    # What Estimator takes without a context.
    fails(ValueError, r"lies on \[cpu\(0\), cpu\(1\)\], but.* is \[cpu\(0\)\]", contexts=None)
    model = ModelDataParallel(net, two)
    fails(ValueError, r"ctx_list is .*cpu\(1\)\], but", model, two[:1])
    fails(ValueError, r"give Estimator\(context=\.\.\.\) the model's list", model, two[::-1])

    def batches(batchify):
        dataset = gluon.data.ArrayDataset(*data_for(1, 4)[0])
        return gluon.data.DataLoader(dataset, 4, batchify_fn=batchify)

    pair = [mx.nd.ones((4, 3, 8, 8)), mx.nd.zeros(3)]
    fails(ValueError, r"\(4, 3, 8, 8\).*\(3,\).*same length", data=batches(lambda _: pair))
    nested = [[pair[0], pair[0]], mx.nd.zeros(4)]
    fails(TypeError, "its data is a list; override _get_data", data=batches(lambda _: nested))


def train_with(contexts, batches, kvstore, update_on_kvstore=None, by_hand=None):
    net = initialized(contexts)
    model = ModelDataParallel(net, contexts)
    criterion = DataParallelCriterion(gluon.loss.SoftmaxCrossEntropyLoss(), contexts)
    trainer = gluon.Trainer(
        net.collect_params(),
        "sgd",
        {"learning_rate": 0.05, "momentum": 0.9},
        kvstore=kvstore,
        update_on_kvstore=update_on_kvstore,
    )
    losses = []
    for data, label in batches:
        with autograd.record():
            parts = criterion(model(split(data, contexts)), split(label, contexts))
        parallel_backward(parts)
        if by_hand:
            by_hand(trainer, net, len(data))
        else:
            trainer.step(len(data))
        losses.append(sum(part.sum().asscalar() for part in parts))
    return losses, parameters_of(net)


def sum_gradients_and_step(trainer, net, size):
    for p in net.collect_params().values():
        if p.grad_req != "null":
            total = sum(g.asnumpy() for g in p.list_grad())
            for gradient in p.list_grad():
                gradient[:] = total
    trainer.step(size)


def clip_and_update(trainer, net, size):
    """What allreduce_grads and update are there for."""
    trainer.allreduce_grads()
    parameters = [p for p in net.collect_params().values() if p.grad_req != "null"]
    for context in parameters[0].list_ctx():
        gluon.utils.clip_global_norm([p.grad(context) for p in parameters], 0.5 * size)
    trainer.update(size)


@pytest.mark.parametrize(
    "kvstore, update_on_kvstore, by_hand",
    [
        ("device", None, None),
        ("device", True, None),
        ("device", False, None),
        ("local", True, None),
        ("local", False, None),
        (None, None, sum_gradients_and_step),
        ("device", False, clip_and_update),
    ],
)
def test_trainer_with_every_kvstore_trains_several_devices_as_one(
    kvstore, update_on_kvstore, by_hand
):
    batches = data_for(0, [6, 5, 1, 6])
    contexts = [mx.cpu(i) for i in range(2)]
    clips = by_hand if by_hand is clip_and_update else None
    wanted = train_with(contexts[:1], batches, None, by_hand=clips)
    assert_same_training(train_with(contexts, batches, kvstore, update_on_kvstore, by_hand), wanted)
