"""FID, sFID, Inception Score, precision and recall of samples, with ADM's definitions; KID, density and coverage.

    python evaluate.py samples/FILE.npz --reference VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node=N evaluate.py samples/FOLDER --reference /path/to/imagenet/val --crop 256
    python evaluate.py make-reference /path/to/imagenet/train OUT.npz --image-size 256

In: samples and a reference, each an .npz or a folder of images. Out: a table, SAMPLES.metrics.json, and a line for a
paper. docs/evaluation.md says what the numbers compare with. `python evaluate.py COMMAND --help` for the others.
"""

import importlib
import sys

# name: the module whose main() it is, by sys.argv
COMMANDS = {
    "make-reference": "dlc.evaluation.make_reference",
    "reconstruction": "dlc.evaluation.reconstruction",
    "agreement": "dlc.evaluation.agreement",
    "sweep": "dlc.evaluation.sweep",
}


def main():
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        name = sys.argv.pop(1)
        sys.argv[0] += f" {name}"  # which argparse names in errors
        return importlib.import_module(COMMANDS[name]).main()
    raise SystemExit("not built yet")


if __name__ == "__main__":
    main()
