"""PyTorch's GPU as a device of gpu_kernels.py."""

import numpy as np
import torch


class TorchArray:
    def __init__(self, tensor):
        self.tensor, self.pointer = tensor, tensor.data_ptr()
        self.dtype = str(tensor.dtype).replace("torch.", "")

    def numpy(self):
        torch.cuda.synchronize()
        return self.tensor.cpu().numpy()


class TorchDevice:
    index = 0

    @property
    def stream(self):
        return torch.cuda.current_stream().cuda_stream

    def array(self, values):
        array = TorchArray(torch.from_numpy(np.ascontiguousarray(values)).to("cuda"))
        self.synchronize()
        return array

    def synchronize(self):
        torch.cuda.synchronize()
