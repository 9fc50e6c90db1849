"""Reference: moving average batch normalization in NumPy and float64, one batch at a time.

Written from algorithm 1 of Yan et al., https://arxiv.org/abs/2001.06838, and the details of their
code: where the iterations are counted from, which slot is written, when averaging begins.
"""

import numpy as np


class MovingAverage:
    """The states of a layer of ``channels``, and its two passes for (N, C, H, W)."""

    def __init__(self, channels, size, momentum=0.98, epsilon=1e-5, warmup_iters=100):
        self.size, self.momentum, self.epsilon = size, momentum, epsilon
        self.warmup_iters = warmup_iters
        self.iters, self.r = 0, 1.0
        self.running_var = np.ones(channels)
        self.buffer_x2, self.buffer_gz = np.zeros((2, size, channels))

    @staticmethod
    def _per_channel(array):
        return array.reshape(1, -1, 1, 1)

    def _averaged(self, buffer, own, iteration):
        buffer[iteration % self.size] = own
        if iteration <= self.size or iteration < self.warmup_iters:
            return own
        return buffer.mean(0)

    def forward(self, x, gamma, beta):
        """Return y and what backward needs."""
        self.iters += 1
        var = self._averaged(self.buffer_x2, (x**2).mean((0, 2, 3)), self.iters)
        z = x / np.sqrt(self._per_channel(var) + self.epsilon)
        r = np.ones_like(var)
        if self.iters > max(1000, self.warmup_iters):
            r = np.sqrt(var + self.epsilon) / np.sqrt(self.running_var + self.epsilon)
            r = r.clip(1 / 5, 5)
        self.running_var = self.momentum * self.running_var + (1 - self.momentum) * var
        self.r = r
        y = self._per_channel(r) * z
        saved = z, y, var, r * gamma, self.iters
        return self._per_channel(gamma) * y + self._per_channel(beta), saved

    def backward(self, dy, saved):
        """Return dx, dgamma and dbeta."""
        z, y, var, scale, iteration = saved
        g = dy * self._per_channel(scale)
        mean_gz = self._averaged(self.buffer_gz, (g * z).mean((0, 2, 3)), iteration)
        dx = (g - z * self._per_channel(mean_gz)) / np.sqrt(self._per_channel(var) + self.epsilon)
        return dx, (dy * y).sum((0, 2, 3)), dy.sum((0, 2, 3))

    def inference(self, x, gamma, beta):
        scale = gamma / np.sqrt(self.running_var + self.epsilon)
        return self._per_channel(scale) * x + self._per_channel(beta)

    @property
    def states(self):
        """The arrays by the names of the layer's parameters."""
        return {
            "running_var": self.running_var,
            "buffer_x2": self.buffer_x2,
            "buffer_gz": self.buffer_gz,
            "iters": np.array([self.iters]),
        }
