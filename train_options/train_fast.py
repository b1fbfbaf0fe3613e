"""Everything on: features, mixed precision, compiled blocks (on GPUs), TF32, no activation checkpointing.

    accelerate launch --quiet train_options/train_fast.py --features-path /path/to/store/features
    accelerate launch --quiet -m train_options.train_fast --features-path /path/to/store/features

This is train_diffusion.py with its defaults, except that the precision is bf16 if the launcher's --mixed_precision sets
none.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be launched by path

from train_diffusion import main

OPTIONS = dict(precision="amp")

if __name__ == "__main__":
    main(**OPTIONS)
