"""The cases of PyTorch's and Apex's tests of SyncBatchNorm, as data: shapes, types, options.

The tests of both compare GPUs, each in a process of its own, with one that has the whole batch.
Here their cases are written anew for the devices of one process.  ``source`` names the test that a
case is learned from.  PyTorch's are in its distributed tests, where "DDP" stands for
``test_DistributedDataParallel_SyncBatchNorm``, and in those of ``torch.nn``; Apex's are in
``tests/distributed/synced_batchnorm``.

Both sides import this file: the tests, with MXNet, and `torch_expected.py`, with torch.
"""

import zlib
from dataclasses import dataclass
from typing import Callable, Optional

import numpy as np


def rows(*counts, of=(3, 4, 4)):
    """Return a function from devices to shapes; the last count is that of all further devices."""
    return lambda device: (counts[min(device, len(counts) - 1)], *of)


def normal(rng, device, shape):
    """Draw data whose mean and deviation differ between devices."""
    return rng.randn(*shape) * (1 + device) + device


@dataclass(frozen=True)
class LayerCase:
    """One layer; what is expected is torch's, on all rows of a group of devices at once."""

    name: str
    source: str
    shape: Callable = rows(2)  # of a device's shard
    axis: int = 1
    dtype: str = "float32"
    devices: tuple = (1, 2, 4)
    steps: int = 2
    draw: Callable = normal
    momentum: float = 0.9  # MXNet's: torch's is 1 minus it
    affine: bool = True
    training: bool = True
    track_running_stats: bool = True
    group_size: Optional[int] = None
    activation: Optional[str] = None
    residual: bool = False

    @property
    def channels(self):
        return self.shape(0)[self.axis]

    def groups(self, devices):
        """Return the devices that have their statistics in common."""
        alone = not (self.training or self.track_running_stats)
        size = 1 if alone else min(self.group_size or devices, devices)
        return [list(range(first, first + size)) for first in range(0, devices, size)]

    def inputs(self, devices):
        """Draw gamma, beta and the moving statistics; x, dy and z of each step and device."""
        rng = np.random.RandomState(zlib.crc32(self.name.encode()))
        states = {
            "gamma": rng.uniform(0.5, 1.5, self.channels),
            "beta": rng.randn(self.channels),
            "mean": rng.randn(self.channels),
            "var": rng.uniform(0.5, 1.5, self.channels),
        }
        if not self.affine:
            states.update(gamma=np.ones(self.channels), beta=np.zeros(self.channels))
        parameter = "float64" if self.dtype == "float64" else "float32"
        drawn = {name: value.astype(parameter) for name, value in states.items()}
        for step in range(self.steps):
            for device in range(devices):
                shape = self.shape(device)
                maps = {"x": self.draw(rng, device, shape), "dy": rng.randn(*shape)}
                if self.residual:
                    maps["z"] = rng.randn(*shape)
                for name, value in maps.items():
                    drawn[f"{name} {step} {device}"] = value.astype(self.dtype)
        return drawn


@dataclass(frozen=True)
class NetworkCase:
    """A dense layer, a normalization, a relu and a dense layer, trained by SGD.

    The network has an ``nn.BatchNorm`` and is converted.
    """

    name: str
    source: str
    rows: Callable  # (step, device) -> rows of the shard; 0: the device gets no input
    dtype: str = "float64"
    affine: bool = True
    devices: tuple = (1, 2, 4)
    steps: int = 5
    learning_rate: float = 2.0**-6  # for the sum of the losses; exact in MXNet's float32
    sgd_momentum: float = 0.875

    def inputs(self, devices):
        """Draw the weights; x and the targets of each step and device."""
        rng = np.random.RandomState(zlib.crc32(self.name.encode()))
        drawn = {"first": rng.randn(8, 2), "last": rng.randn(4, 8)}
        for step in range(self.steps):
            for device in range(devices):
                count = self.rows(step, device)
                drawn[f"x {step} {device}"] = rng.randn(count, 2) * (1 + device) + device
                drawn[f"target {step} {device}"] = rng.randn(count, 4)
        return {name: value.astype(self.dtype) for name, value in drawn.items()}


def _halves(rng, device, shape):
    """Constant channels whose level and length differ between devices."""
    levels = np.array([0.1, 0.3]) ** (device - 1)
    return np.broadcast_to(levels[None, :, None], shape)


def _far_from_zero(rng, device, shape):
    return rng.randn(*shape) + 1000


LAYERS = [
    LayerCase("float32", "Apex two_gpu_unit_test"),
    LayerCase("float64", "Apex two_gpu_unit_test", dtype="float64"),
    LayerCase("float16", "PyTorch DDP_half; Apex two_gpu_unit_test --fp16", dtype="float16"),
    LayerCase("no affine", "PyTorch DDP_No_Affine", affine=False),
    LayerCase("(N, C)", "PyTorch DDP_2D_Input; Apex test_batchnorm1d", rows(2, of=(5,))),
    LayerCase("(N, C, L)", "Apex test_batchnorm1d", rows(2, of=(5, 7))),
    LayerCase("(N, C, D, H, W)", "Apex single_gpu_unit_test", rows(2, of=(3, 2, 3, 4))),
    LayerCase(
        "channels last",
        "PyTorch DDP_Channels_Last, test_sync_batchnorm_backward_elemt; Apex single_gpu_unit_test",
        rows(2, of=(4, 4, 3)),
        axis=-1,
    ),
    LayerCase(
        "channels last, 3 dimensions",
        "PyTorch DDP_Channels_Last (channels_last_3d)",
        rows(2, of=(3, 4, 4, 2)),
        axis=-1,
    ),
    LayerCase(
        "a row per device",
        "PyTorch DDP_Single_Input_Per_Process",
        rows(1, of=(5,)),
        devices=(2, 4),  # one value per channel in all is an error in torch
    ),
    LayerCase(
        "constant shards of different length",
        "PyTorch DDP_Diff_Input_Sizes_Running_Value",
        lambda device: (2, 2, 10 ** (device + 1)),
        steps=5,
        draw=_halves,
        momentum=0.01,
    ),
    LayerCase(
        "shards of different size",
        "PyTorch DDP_Diff_Input_Sizes_gradient; Apex two_gpu_test_different_batch_size",
        rows(2, 3, 4, 5),
    ),
    LayerCase(
        "shards of different height",
        "Apex two_gpu_test_different_batch_size",
        lambda device: (2, 3, 4 + device, 5),
    ),
    LayerCase(
        "an empty shard",
        "PyTorch test_sync_batch_norm_empty_input",
        rows(2, 0, 3),
        devices=(2, 4),
    ),
    LayerCase(
        "an empty shard first",
        "PyTorch test_sync_batch_norm_empty_input",
        rows(0, 2),
        devices=(2, 4),
    ),
    LayerCase(
        "groups of two",
        "PyTorch test_SyncBatchNorm_process_group; Apex test_groups",
        rows(2, 3),
        devices=(2, 4),
        group_size=2,
    ),
    LayerCase(
        "relu",
        "Apex fuse_relu",
        activation="relu",
    ),
    LayerCase(
        "residual and relu",
        "Apex fuse_relu with z",
        activation="relu",
        residual=True,
    ),
    LayerCase(
        "residual and relu, float16",
        "Apex fuse_relu with z",
        dtype="float16",
        activation="relu",
        residual=True,
    ),
    LayerCase(
        "residual and relu, channels last",
        "Apex fuse_relu with z, channel_last",
        rows(2, of=(4, 4, 3)),
        axis=-1,
        activation="relu",
        residual=True,
    ),
    LayerCase("only the batch's statistics", "Apex single_gpu_unit_test, welford", momentum=0.0),
    LayerCase(
        "far from zero",
        "PyTorch test_sync_batchnorm_accuracy_cuda",
        rows(2, of=(3, 16, 16)),
        draw=_far_from_zero,
    ),
    LayerCase(
        "large",
        "Apex single_gpu_unit_test",
        rows(8, of=(28, 28, 28)),
        steps=1,
    ),
    LayerCase("inference", "PyTorch test_ddp_inference", training=False, steps=1),
    LayerCase(
        "inference by the batch",
        "PyTorch test_ddp_sync_bn_training_vs_eval",
        rows(2, 3),
        training=False,
        track_running_stats=False,
        steps=1,
    ),
    LayerCase(
        "training without moving statistics",
        "PyTorch test_ddp_sync_bn_training_vs_eval",
        track_running_stats=False,
    ),
]

NETWORKS = [
    NetworkCase("network", "PyTorch DDP, test_convert_sync_batchnorm", lambda step, device: 2),
    NetworkCase("network, float32", "PyTorch DDP", lambda step, device: 2, dtype="float32"),
    NetworkCase(
        "network, no affine", "PyTorch DDP_No_Affine", lambda step, device: 2, affine=False
    ),
    NetworkCase(
        "network, a row per device",
        "PyTorch DDP_Single_Input_Per_Process",
        lambda step, device: 1,
        devices=(2, 4),
    ),
    NetworkCase(
        "network, shards of different size",
        "PyTorch DDP_Diff_Input_Sizes_gradient",
        lambda step, device: device + 2,
    ),
    NetworkCase(
        "network, devices that run out of data",
        "PyTorch test_ddp_uneven_inputs_stop_iteration_sync_bn",
        lambda step, device: 2 if step < 3 or device == 0 else 0,
        devices=(2, 4),
    ),
]
