"""The CUDA kernels of moving average batch normalization; see gpu_kernels.py."""

import ctypes

import numpy as np

from gpu_kernels import (
    DOUBLE,
    INT,
    NO_STATISTICS,
    POINTER,
    SIZE,
    TOLERANCE,
    TYPES,
    WRITE,
    FeatureShape,
    MomentsForwardParams,
    feature_shape,
    structure,
)
from moving_average_reference import MovingAverage
from reference import largest_error

MovingAverages = structure("MovingAverages", buffer_size=SIZE, warmup_iters=SIZE)
MovingAverageForwardParams = structure(
    "MovingAverageForwardParams",
    type=INT,
    shape=FeatureShape,
    averages=MovingAverages,
    epsilon=DOUBLE,
    momentum=DOUBLE,
    fix_gamma=ctypes.c_bool,
    x=POINTER,
    statistics=POINTER,
    gamma=POINTER,
    beta=POINTER,
    running_var=POINTER,
    buffer_x2=POINTER,
    iters=POINTER,
    scales=POINTER,
    y_mode=INT,
    y=POINTER,
)
MovingAverageSumsParams = structure(
    "MovingAverageSumsParams",
    type=INT,
    shape=FeatureShape,
    fix_gamma=ctypes.c_bool,
    dy=POINTER,
    x=POINTER,
    statistics=POINTER,
    gamma=POINTER,
    scales=POINTER,
    dy_copy=POINTER,
    backward_sums=POINTER,
    backward_context=POINTER,
    gamma_grad_mode=INT,
    gamma_grad=POINTER,
    beta_grad_mode=INT,
    beta_grad=POINTER,
)
MovingAverageBackwardParams = structure(
    "MovingAverageBackwardParams",
    type=INT,
    shape=FeatureShape,
    averages=MovingAverages,
    dy=POINTER,
    x=POINTER,
    backward_sums=POINTER,
    backward_context=POINTER,
    buffer_gz=POINTER,
    dx_mode=INT,
    dx=POINTER,
)


def check_steps(kernels, dtype, shape, first=998, steps=6, size=3):
    """Steps from iteration ``first`` on, across the switch of r, and inference, against NumPy."""
    channels, rng, array = shape[1], np.random.RandomState(0), kernels.device.array
    kind = "float64" if dtype == "float64" else "float32"
    reference = MovingAverage(channels, size)
    reference.iters = first
    reference.buffer_x2[:], reference.buffer_gz[:] = rng.rand(2, size, channels).astype(kind)
    states = {name: array(value.astype(kind)) for name, value in reference.states.items()}
    gamma, beta = (rng.rand(2, channels) + 0.5).astype(kind)
    gammas, betas = array(gamma), array(beta)
    statistics, scales, sums, context = (array(np.full(2 * channels + 1, np.nan)) for _ in range(4))
    gradients = [array(np.full(channels, np.nan, kind)) for _ in range(2)]
    step, averages = (TYPES[dtype], feature_shape(shape, 1)), MovingAverages(size, 100)

    def forward(x, y):
        kernels.run(
            MovingAverageForwardParams(
                *step,
                averages,
                1e-5,
                0.98,
                False,
                x.pointer,
                statistics.pointer,
                gammas.pointer,
                betas.pointer,
                states["running_var"].pointer,
                states["buffer_x2"].pointer,
                states["iters"].pointer,
                scales.pointer,
                WRITE,
                y.pointer,
            )  # fmt: skip
        )

    for _ in range(steps):
        values, dvalues = (rng.randn(*shape).astype(dtype) for _ in range(2))
        x, dy, y, dx = array(values), array(dvalues), array(values * 0), array(values * 0)
        kernels.run(MomentsForwardParams(*step, x.pointer, x.pointer, True, statistics.pointer))
        forward(x, y)
        kernels.run(
            MovingAverageSumsParams(
                *step,
                False,
                dy.pointer,
                x.pointer,
                statistics.pointer,
                gammas.pointer,
                scales.pointer,
                dy.pointer,
                sums.pointer,
                context.pointer,
                WRITE,
                gradients[0].pointer,
                WRITE,
                gradients[1].pointer,
            )  # fmt: skip
        )
        kernels.run(
            MovingAverageBackwardParams(
                *step,
                averages,
                dy.pointer,
                x.pointer,
                sums.pointer,
                context.pointer,
                states["buffer_gz"].pointer,
                WRITE,
                dx.pointer,
            )  # fmt: skip
        )
        wanted, saved = reference.forward(values.astype("float64"), gamma, beta)
        wanted = wanted, *reference.backward(dvalues.astype("float64"), saved)
        tolerance = 10 * TOLERANCE[dtype]
        for got, want in zip((y, dx, *gradients), wanted):
            assert largest_error(got.numpy(), want) < tolerance
        for name, want in reference.states.items():
            assert largest_error(states[name].numpy(), want) < tolerance, name
    statistics = array(np.append(np.zeros(2 * channels), NO_STATISTICS))
    forward(x, y)
    wanted = reference.inference(values.astype("float64"), gamma, beta)
    assert largest_error(y.numpy(), wanted) < tolerance
    assert states["iters"].numpy().tolist() == [first + steps]
