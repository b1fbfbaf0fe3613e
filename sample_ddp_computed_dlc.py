"""Draw images from a DiTSEM for discrete latent codes computed beforehand: a folder of PNGs and an .npz for FID.

    torchrun --nnodes=1 --nproc_per_node=N sample_ddp_computed_dlc.py --model DiTSEM-XL/2 --num-fid-samples 50000

In: a checkpoint [the newest under results/] and codes [those of the features it was trained on]. Out: SAMPLES/, see
dlc/sampling/. The same command run again draws what is missing; the images do not depend on the number of processes.
"""
from dlc.sampling.command import argument_parser, run
from models import DiT_models
from dlc.sampling.conditions import ComputedCodes


def open_codes(args, model, meta):
    if DiT_models[args.model].conditioning != "codes":
        raise ValueError(f"--model {args.model} is not conditioned on codes; sample_ddp.py draws from a DiT, and "
                         "dlc.sampling.sample_latents from any model")
    source = args.dlc_dir or meta.features_path
    if source is None:
        raise ValueError("this checkpoint does not say which features it was trained on: name codes with --dlc-dir")
    return ComputedCodes(source, model, meta, args.dlc_order, args.global_seed)


def main():
    parser = argument_parser(__doc__, model="DiTSEM-XL/2")
    parser.add_argument("--dlc-dir", "--sem-dir", help="codes: a features directory, a folder of .npy or of .pt files "
                                                       "(n, L) or (n, k, L), or one such file [the features the "
                                                       "checkpoint was trained on]")
    parser.add_argument("--dlc-order", choices=["random", "sequential"], default="random",
                        help="row of sample i: a seeded permutation, or row i; cycling [%(default)s]")
    run(parser, parser.parse_args(), open_codes)


if __name__ == "__main__":
    main()
