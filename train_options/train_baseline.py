"""train_original with activation checkpointing: less memory for a third more computation.

accelerate launch --quiet train_options/train_baseline.py --model DiT-XL/2 --data-path /path/to/imagenet/train
accelerate launch --quiet -m train_options.train_baseline --model DiT-XL/2 --data-path /path/to/imagenet/train
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be launched by path

from train_diffusion import main
from train_options.train_original import OPTIONS as ORIGINAL

OPTIONS = dict(ORIGINAL, checkpoint_activations=True)

if __name__ == "__main__":
    main(**OPTIONS)
