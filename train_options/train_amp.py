"""train_baseline with mixed precision: the launcher's --mixed_precision, or bf16 if it sets none.

accelerate launch --quiet train_options/train_amp.py --model DiT-XL/2 --data-path /path/to/imagenet/train
accelerate launch --quiet -m train_options.train_amp --model DiT-XL/2 --data-path /path/to/imagenet/train
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it can be launched by path

from train_diffusion import main
from train_options.train_baseline import OPTIONS as BASELINE

OPTIONS = dict(BASELINE, precision="amp")

if __name__ == "__main__":
    main(**OPTIONS)
