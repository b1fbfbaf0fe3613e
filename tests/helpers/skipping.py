"""train_diffusion.py whose optimizer says that it skipped steps 3 and 5 to 7, as the fp16 scaler makes it on a GPU."""

from accelerate.optimizer import AcceleratedOptimizer

import train_diffusion


def main():
    step = AcceleratedOptimizer.step

    def skipping_step(self, closure=None):
        self.count = getattr(self, "count", 0) + 1
        if self.count not in (3, 5, 6, 7):
            step(self, closure)

    AcceleratedOptimizer.step = skipping_step
    AcceleratedOptimizer.step_was_skipped = property(lambda self: self.count in (3, 5, 6, 7))
    train_diffusion.main()
