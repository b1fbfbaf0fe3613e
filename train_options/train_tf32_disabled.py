"""train_features without TF32: on GPUs, float32 matrix products keep full precision and are slower.

accelerate launch --quiet train_options/train_tf32_disabled.py --features-path /path/to/store/features
accelerate launch --quiet -m train_options.train_tf32_disabled --features-path /path/to/store/features
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be launched by path

from train_diffusion import main
from train_options.train_features import OPTIONS as FEATURES

OPTIONS = dict(FEATURES, tf32=False)

if __name__ == "__main__":
    main(**OPTIONS)
