"""Where the table of training options begins: images in, VAE (and encoder) on the fly, float32, all else off.

    accelerate launch train_options/train_original.py --model DiT-XL/2 --data-path /path/to/imagenet/train
    accelerate launch -m train_options.train_original --model DiT-XL/2 --data-path /path/to/imagenet/train
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))              # launched by its path, it finds the rest

from train_diffusion import main

# features_path=None: --data-path has to be given, or features after all
OPTIONS = dict(features_path=None, precision="fp32", checkpoint_activations=False, compile=False)

if __name__ == "__main__":
    main(**OPTIONS)
