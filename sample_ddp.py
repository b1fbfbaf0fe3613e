"""Draw images from a class-conditional DiT for random labels: a folder of PNGs and an .npz for FID.

    torchrun --nnodes=1 --nproc_per_node=N sample_ddp.py --model DiT-XL/2 --num-fid-samples 50000

In: a checkpoint [the newest under results/], ours or a published DiT-XL-2-256x256.pt. Out: SAMPLES/, see
dlc/sampling.py.
"""
from dlc.sampling import RandomLabels, argument_parser, run


def open_labels(args, model, meta):
    if not args.model.startswith("DiT-"):
        raise ValueError(f"--model {args.model} is not conditioned on labels; sample_ddp_computed_dlc.py draws from a "
                         "DiTSEM")
    return RandomLabels(model, args.global_seed)


def main():
    parser = argument_parser(__doc__, model="DiT-XL/2")
    run(parser, parser.parse_args(), open_labels)


if __name__ == "__main__":
    main()
