"""Draw images from a class-conditional DiT: a folder of PNGs and an .npz for FID.

    torchrun --nnodes=1 --nproc_per_node=N sample_ddp.py --model DiT-XL/2 --num-fid-samples 50000

In: a checkpoint [the newest under results/], ours or a published DiT-XL-2-256x256.pt. Out: SAMPLES/, see
dlc/sampling/.
"""
from dlc.sampling.command import argument_parser, run
from models import DiT_models
from dlc.sampling.conditions import ClassLabels


def open_labels(args, model, meta):
    if DiT_models[args.model].conditioning != "labels":
        raise ValueError(f"--model {args.model} is not conditioned on labels; sample_ddp_computed_dlc.py draws from a "
                         "DiTSEM, and dlc.sampling.sample_latents from any model")
    return ClassLabels(model, args.label_sampling, args.global_seed)


def main():
    parser = argument_parser(__doc__, model="DiT-XL/2")
    parser.add_argument("--label-sampling", choices=["random", "equal"], default="random",
                        help="class of sample i: drawn uniformly, or i modulo the classes, so each equally often "
                             "[%(default)s]")
    run(parser, parser.parse_args(), open_labels)


if __name__ == "__main__":
    main()
