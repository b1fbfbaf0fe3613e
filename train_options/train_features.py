"""train_baseline on features instead of images: no decoding, no VAE and no encoder at each step.

accelerate launch --quiet train_options/train_features.py --features-path /path/to/store/features
accelerate launch --quiet -m train_options.train_features --features-path /path/to/store/features
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be launched by path

from train_diffusion import main
from train_options.train_baseline import OPTIONS as BASELINE

OPTIONS = dict(BASELINE, features_path="features")

if __name__ == "__main__":
    main(**OPTIONS)
