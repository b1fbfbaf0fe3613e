"""Everything on: features, mixed precision, compiled blocks (on GPUs), TF32, no activation checkpointing.

    accelerate launch train_options/train_fast.py --features-path /path/to/store/features
    accelerate launch -m train_options.train_fast --features-path /path/to/store/features

That is train_diffusion.py as it is, but for the precision, bf16 where the launcher's --mixed_precision says none.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))              # launched by its path, it finds the rest

from train_diffusion import main

OPTIONS = dict(precision="amp")

if __name__ == "__main__":
    main(**OPTIONS)
