"""Draw images from a DiTSEM for computed codes, or from a DiTCONT for vectors: a folder of PNGs and an .npz for FID.

    torchrun --nnodes=1 --nproc_per_node=N sample_ddp_computed_dlc.py --model DiTSEM-XL/2 --num-fid-samples 50000
    torchrun --nnodes=1 --nproc_per_node=N sample_ddp_computed_dlc.py --model DiTCONT-XL/2 --condition-path vectors ...

In: a checkpoint [the newest of the run under results/] and codes [those of the features it was trained on] or vectors.
Out: SAMPLES/, see dlc/sampling/. The same command run again draws what is missing; the images do not depend on the
number of processes.
"""

from dlc.sampling.command import sample


def main() -> None:
    sample(__doc__, "sample_ddp_computed_dlc.py", model="DiTSEM-XL/2")


if __name__ == "__main__":
    main()
