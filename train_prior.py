"""Train a prior over discrete latent codes, p(code), to draw new codes from: masked diffusion by a transformer.

    accelerate launch --quiet --mixed_precision bf16 train_prior.py --model DLCPrior-M --features-path /path/to/features
    accelerate launch --multi_gpu --num_processes N --mixed_precision bf16 train_prior.py --model DLCPrior-M ...

In: the codes of FEATURES/; a share of them is held out. Out: RESULTS/ as train_diffusion.py writes it, with the bound
on the held-out codes in metrics.jsonl and log.txt, and the weights of its lowest value in best/{step:07d}/. The same
command, run again, resumes from the newest checkpoint. Ctrl-C or a scheduler's signal ends the run after the current
step, with a checkpoint.

Row, time, mask and class dropout of each sample are functions of (seed, global sample index) alone: neither the number
of processes nor a restart changes what is trained on. Dropout is a function of (seed, step, process).
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch

from diffusion.masked import MaskedDiffusion, stratified_times
from diffusion.process_table import create_process
from dlc.machine.cli import ArgumentParser, needs, number
from dlc.machine.files import recorded_id
from dlc.machine.noise import Stream, seed_torch, uniforms
from dlc.training.batches import TrainingBatches
from dlc.training.heldout import HeldOutCodes
from dlc.training.preview import CodePreview
from dlc.training.run import Run
from dlc.training.run_flags import add_run_flags, warmup
from dlc.training.split import add_heldout_flags, settle_heldout, split_codes
from prior import DLCPrior_models

HOLDOUT = 0.01  # the default of --holdout
MASKING = "counted"  # the same mean loss as independent masks, and less variance
STRATA = 64  # consecutive samples that share the range of times evenly


def argument_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        default="DLCPrior-M",
        choices=DLCPrior_models,
        metavar="MODEL",
        help="build this model of DLCPrior_models",
    )
    add(
        "--shared-embedding",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="use one table of tokens and one output layer for all positions, as the published prior does, instead of "
        "one per position [%(default)s]",
    )
    add("--dropout", type=number(float, 0, 0.9), default=0.1, help="drop this share of the blocks' updates in training")
    add(
        "--class-conditional",
        action="store_true",
        help="condition on the features' classes as well, for sample_prior.py --class and guidance [no]",
    )
    add(
        "--label-dropout",
        type=number(float, 0, 1),
        help="with --class-conditional: hide the class of this share of the samples [0.1]",
    )
    add(
        "--score-entropy",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train on SEDD's loss in full, which also normalises the score, for weights that SEDD's own samplers "
        "will use; the default loss is the bound [%(default)s]",
    )

    add = parser.add_argument_group("data").add_argument
    add("--features-path", "--feature-path", default="features", help="train on the codes of these features")
    add("--V", type=number(int, 1), help="tokens per position, for features without a manifest [the manifest's]")
    add_heldout_flags(add, "codes", "bound", HOLDOUT)

    add = add_run_flags(parser, epochs=200)
    add(
        "--eval-levels",
        type=number(int, 1),
        help="measure each held-out code at this many numbers of masked tokens; L measures at all of them [8]",
    )
    add("--preview-ckpt", help="draw the previews' codes as pictures with this DiTSEM checkpoint [no previews]")
    add(
        "--vae",
        help="decode the previews with this VAE: ema, mse, a directory or a hub id [that of --preview-ckpt, or ema]",
    )
    parser.set_defaults(global_batch_size=512, lr=3e-4, warmup_steps=2500, grad_clip=1.0, results_dir="results_prior")
    return parser


def settle_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that would have no effect; give the others that were left out their values."""
    needs(args, "preview_ckpt", "vae")
    needs(args, "class_conditional", "label_dropout")
    if args.sample_every and not args.preview_ckpt:
        raise ValueError("previews need the --preview-ckpt of a DiTSEM beside --sample-every")
    args.sample_every = args.sample_every if args.preview_ckpt else 0
    settle_heldout(args, HOLDOUT)
    if args.eval_levels is not None and not (args.holdout or args.heldout_path):
        raise ValueError("--eval-levels needs held-out codes, but --holdout is 0")
    default = dict(label_dropout=0.1 if args.class_conditional else 0.0, eval_levels=8)
    vars(args).update({name: value for name, value in default.items() if getattr(args, name) is None})


def draws(
    seed: int, indices: torch.Tensor, L: int, label_dropout: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The randomness of training samples with these indices (n,).

    In every STRATA consecutive samples the times are spread evenly, so that the mean loss of a batch varies less.

    Returns times t (n,) in (0, 1]; uniform numbers (n, L) in [0, 1), by which tokens are masked; and whether to drop
    the label (n,) bool.
    """
    offset = uniforms(seed, Stream.TRAIN_TIMESTEP, indices // STRATA, 1)[:, 0]
    t = stratified_times(offset, indices % STRATA, STRATA)
    u = uniforms(seed, Stream.TRAIN_MASK, indices, L)
    return t, u, uniforms(seed, Stream.TRAIN_DROP, indices, 1)[:, 0] < label_dropout


def losses_of(
    model: Callable,
    diffusion: MaskedDiffusion,
    indices: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    *,
    seed: int,
    label_dropout: float,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A micro-batch's losses (n,) by name, and its times (n,).

    Args:
        indices, x, y: sample indices (n,), codes (n, L), classes (n,) or None, all on one device.
        label_dropout: share of the samples whose class is hidden.
    """
    t, u, drop = draws(seed, indices, x.shape[1], label_dropout)
    x_t = diffusion.corrupt(x, t, u)  # (n, L), some of them masked
    kwargs = {} if y is None else dict(y=y, drop=drop)
    return diffusion.training_losses(model, x, t, x_t, kwargs), t


def main() -> None:
    # ---------------------------------------------------------------------- flags
    parser = argument_parser()
    args = parser.parse_args()
    with Run(parser, args) as run:
        train(parser, args, run)


def train(parser: ArgumentParser, args: argparse.Namespace, run: Run) -> None:
    """The run that args ask for."""
    with parser.one_line_errors():
        # ---------------------------------------------------------------------- data
        settle_flags(args)
        split = split_codes(args.features_path, args.V, args.holdout, args.heldout_path)
        features, source, count = split.features, split.features.source(), len(split.rows)
        sizes = dict(
            L=features.L,
            V=features.V,
            num_classes=features.num_classes if args.class_conditional else None,
            shared_embedding=args.shared_embedding,
            scale_by_sigma=args.score_entropy,
        )
        build = partial(DLCPrior_models[args.model], **sizes, dropout=args.dropout)
        diffusion = create_process(
            "masked",
            V=features.V,
            masking=MASKING,
            time_conditioning=args.score_entropy,
            score_entropy=args.score_entropy,
        )
        run.claim(
            args.model,
            build,
            diffusion,
            settings=dict(
                features_count=count,
                latents="codes",
                holdout=args.holdout,
                heldout_path=args.heldout_path and recorded_id(args.heldout_path),
                eval_levels=args.eval_levels if len(split.heldout) else None,
                label_dropout=args.label_dropout if args.class_conditional else None,
                **{key: source[key] for key in ("encoder_sha256", "listing_sha256", "flip")},
            ),
            notes=dict(features_path=recorded_id(args.features_path), encoder=source["encoder"]),
        )
        if run.state.is_main_process:
            split.validate()
        preview = None
        if args.preview_ckpt and run.state.is_main_process:
            preview = CodePreview(args.preview_ckpt, args.vae, split, run.device, args.global_seed)

        # ---------------------------------------------------------------------- model
        run.start()
        model = run.adopt(build())
    # fused: it skips a step on the device, where the fp16 scaler would wait to find out
    adamw = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    run.optimize(adamw, warmup, unit="codes")

    # ---------------------------------------------------------------------- run
    arrays = dict(codes=features.codes, **(dict(labels=features.labels) if args.class_conditional else {}))
    batches = TrainingBatches(features, arrays, only=split.rows, **run.share)
    run.logger.info(
        f"model: {args.model}, {sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters, "
        + ", ".join(f"{key}={value}" for key, value in sizes.items() if value is not None)
    )
    run.logger.info(
        f"data: {count:,} codes of {args.features_path}, {count / args.global_batch_size:.1f} steps per epoch"
    )
    measured = [HeldOutCodes(run, split, diffusion)] if len(split.heldout) else []

    # ---------------------------------------------------------------------- loop
    for step, batch in run.steps(batches, measured):
        seed_torch(args.global_seed, Stream.TRAIN_DROPOUT, step, run.state.process_index)
        for part in run.micro_batches(batch):
            terms, t = losses_of(
                run.model,
                diffusion,
                part["indices"],
                part["codes"].long(),
                part["labels"].long() if args.class_conditional else None,
                seed=args.global_seed,
                label_dropout=args.label_dropout,
            )
            run.backward(terms, t, 1)
        run.update(step)
        run.report(step)
        if run.preview_due(step):
            with run.whole_ema() as ema:
                if ema is not None:
                    run.record(preview.save, run.folder / f"previews/{step:07d}.png", ema, diffusion, run.go_on)


if __name__ == "__main__":
    main()
