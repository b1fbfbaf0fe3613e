"""train_amp with alignment: hidden tokens are pulled to the encoder's patch tokens (REPA), which needs an encoder.

accelerate launch --quiet train_options/train_repa.py --model DiT-XL/2 --data-path /path/to/imagenet/train --encoder ID
accelerate launch --quiet -m train_options.train_repa --model DiT-XL/2 --data-path /path/to/imagenet/train --encoder ID
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be launched by path

from train_diffusion import main
from train_options.train_amp import OPTIONS as AMP

OPTIONS = dict(AMP, align="repa")

if __name__ == "__main__":
    main(**OPTIONS)
