"""train_features without TF32: on GPUs, products of float32 numbers keep all their bits, and are slower.

    accelerate launch train_options/train_tf32_disabled.py --features-path /path/to/store/features
    accelerate launch -m train_options.train_tf32_disabled --features-path /path/to/store/features
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))              # launched by its path, it finds the rest

from train_diffusion import main
from train_options.train_features import OPTIONS as FEATURES

OPTIONS = dict(FEATURES, tf32=False)

if __name__ == "__main__":
    main(**OPTIONS)
