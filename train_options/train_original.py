"""The first row of the table of training options: images in, VAE (and encoder) at each step, float32, no option on.

accelerate launch --quiet train_options/train_original.py --model DiT-XL/2 --data-path /path/to/imagenet/train
accelerate launch --quiet -m train_options.train_original --model DiT-XL/2 --data-path /path/to/imagenet/train
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be launched by path

from train_diffusion import main

# features_path=None: the user has to pass --data-path or --features-path
OPTIONS = dict(features_path=None, precision="fp32", checkpoint_activations=False, compile=False)

if __name__ == "__main__":
    main(**OPTIONS)
