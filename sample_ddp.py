"""Draw images from a class-conditional DiT: a folder of PNGs and an .npz for FID.

    torchrun --nnodes=1 --nproc_per_node=N sample_ddp.py --model DiT-XL/2 --num-fid-samples 50000

In: weights in any layout of docs/weights.md [the newest of the run under results/; for DiT-XL/2 without a run, the
published weights, which are fetched]. Out: SAMPLES/, see dlc/sampling/. The same command run again draws what is
missing; the images do not depend on the number of processes.
"""

from dlc.sampling.command import sample


def main() -> None:
    sample(__doc__, "sample_ddp.py", model="DiT-XL/2")


if __name__ == "__main__":
    main()
