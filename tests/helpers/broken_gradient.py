"""train_diffusion.py whose gradients are NaN at step 4, though the loss is finite."""

import math

from accelerate import Accelerator

import train_diffusion


def main():
    backward = Accelerator.backward

    def broken_backward(self, loss, **kwargs):
        self.count = getattr(self, "count", 0) + 1
        backward(self, loss * (math.nan if self.count == 4 else 1), **kwargs)

    Accelerator.backward = broken_backward
    train_diffusion.main()
