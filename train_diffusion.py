"""Train a DiT on labels, a DiTSEM on discrete latent codes or a DiTCONT on vectors, from features or from images.

    accelerate launch --quiet --mixed_precision fp16 train_diffusion.py --model DiTSEM-XL/2 --features-path features
    accelerate launch --multi_gpu --num_processes N --mixed_precision fp16 train_diffusion.py --model DiTSEM-XL/2 ...

In: FEATURES/, which also say L, V, image size and classes; or images (--data-path), whose latents and codes
are then made as training goes, which is slower. Out: RESULTS/ with args.json, log.txt, metrics.jsonl, loss.png,
checkpoints/{step:07d}/ and previews/. The same command, run again, resumes from the newest checkpoint. Ctrl-C
or a scheduler's signal ends the run after the current step, with a checkpoint.

Row, timestep, noise and condition dropout of each sample are functions of (seed, global sample index) alone, and so are
flips and draws from the VAE's posterior if they are made here: neither the number of processes nor a restart changes
what is trained on.
"""

import argparse
import hashlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusion.likelihoods import mean_flat
from diffusion.process_table import OBJECTIVE_OPTIONS, OBJECTIVES, PROCESSES, Process, create_process, describe_process
from dlc.data import Features
from dlc.data.convert import fetch_features
from dlc.data.images import add_background_flag, add_source_flags
from dlc.data.inputs import INPUTS, Inputs
from dlc.machine.cli import ArgumentParser, NotHere, add_option, excludes, flag, needs, number, warn_once
from dlc.machine.files import check_outside, recorded_id
from dlc.machine.noise import Stream, as_normals, in_unit_interval, words_for, words_of_streams
from dlc.machine.processes import done_by_rank_0, from_rank_0
from dlc.nets.pixels import PixelEncoder
from dlc.nets.vae import check_decodes
from dlc.training.alignment import Alignment, add_alignment_flags, open_alignment
from dlc.training.batches import TrainingBatches, draw_posterior
from dlc.training.heldout import HeldOutLatents
from dlc.training.image_batches import FLIPS, ImageBatches, Images
from dlc.training.preview import PREVIEW_SAMPLES, preview_sampler, save_preview
from dlc.training.run import Run
from dlc.training.run_flags import add_run_flags, warmup
from dlc.training.split import add_heldout_flags, split_features
from dlc.weights.networks import DEFAULT_ENCODER, VAE_HELP, add_encoder_flags, load_vae
from models import CODE_INITS, Condition, DiT, DiT_models, DiTCONT, DiTSEM

if TYPE_CHECKING:
    from accelerate import PartialState


HEAD_WEIGHT = 0.5  # of the intermediate head's loss (arXiv 2512.24176)


def argument_parser(**defaults) -> ArgumentParser:
    """The flags. The files of train_options/ state other defaults."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--model", default="DiTSEM-XL/2", choices=DiT_models, metavar="MODEL", help="build this model of DiT_models")
    add(
        "--code-init",
        choices=CODE_INITS,
        default="unit",
        help="DiTSEM only: initialise the code table. unit: from N(0, 1). dlc: from N(0, 1/D) for width D, with one "
        "null row for all positions, as the DLC project does",
    )

    add(
        "--intermediate-head",
        type=number(int, 1),
        metavar="K",
        help="add a second output layer after block K, by which the model can guide itself (--internal-scale in "
        f"sampling); its loss has weight {HEAD_WEIGHT} [none]",
    )
    add(
        "--train-only",
        choices=["head"],
        help="train the intermediate head alone, and freeze the weights of --pretrained-path [train everything]",
    )

    add = parser.add_argument_group("objective").add_argument
    rows = {objective: PROCESSES[name] for objective, name in OBJECTIVES.items()}
    about = "; ".join(f"{objective}: {row.about}" for objective, row in rows.items())
    add("--objective", choices=OBJECTIVES, default="ddpm", help=f"train on this objective; {about}")
    for name, uses in OBJECTIVE_OPTIONS.items():
        add_option(add, name, uses, "--objective {} only: ")

    add_alignment_flags(parser.add_argument_group("alignment").add_argument)

    group = parser.add_argument_group("data")
    add, source = group.add_argument, group.add_mutually_exclusive_group()
    source.add_argument("--features-path", "--feature-path", default="features", help="train on these features")
    add_source_flags(add, source.add_argument, "train on images instead: ")
    add("--hf-dataset", help="first import features from the hub into --features-path, as import-hf does [none]")
    add(
        "--image-size", type=number(int, 1), help="with --data-path: crop images to this height and width, pixels [256]"
    )
    add("--flip", choices=FLIPS, help="with --data-path: flip images horizontally, drawn anew in each epoch [random]")
    add_background_flag(add, None, "with --data-path: ")
    add_encoder_flags(add, None, ", with --data-path, that makes a DiTSEM's codes and the targets of --align")
    add(
        "--condition-path",
        help="DiTCONT only: condition on the vectors of this .npy (n, in_dim) or folder of them, one row per row of "
        "the features [none]",
    )
    add(
        "--vae",
        help=f"{VAE_HELP}; it decodes previews and --eval-samples and, with --data-path, encodes the images [the "
        "features' own, or ema]",
    )
    add_heldout_flags(add, "rows", "loss", 0.0)
    add(
        "--eval-samples",
        type=number(int, 0),
        default=0,
        help="also draw this many samples every --eval-every steps, and log their Frechet distance and code "
        "agreement; 0 draws none",
    )
    add("--num-classes", type=number(int, 1), help="number of classes, for features without a manifest [1000]")
    add(
        "--dino-cfg",
        action=NotHere,
        help="leave it out: L and V come from the features, or from --V for the reference layout",
    )
    add("--sem-dir", action=NotHere, help="leave it out: the codes lie in --features-path")

    add_run_flags(parser, epochs=1400)
    parser.set_defaults(**defaults)
    if defaults:
        parser.epilog = "defaults of this variant: " + ", ".join(f"{name} {value}" for name, value in defaults.items())
    return parser


def open_data(args: argparse.Namespace, state: "PartialState") -> Features | Images:
    """The `Features` or `Images` to train on. Raises ValueError if they cannot be read or flags do not fit them."""
    needs(args, "data_path", "labels", "image_size", "flip", "background", "encoder", "encoder_backbone", "L")
    excludes(args, "data_path", "hf_dataset", "num_classes", "holdout", "heldout_path", "eval_samples", free=(None, 0))
    if args.eval_samples == 1:
        raise ValueError("--eval-samples 1: a Frechet distance needs at least 2 samples")
    if not args.data_path:
        if args.features_path is None:
            raise ValueError("this trains on images: give --data-path")
        if args.vae and args.sample_every == 0 and not args.eval_samples:
            raise ValueError("--vae decodes previews, and features have their latents: leave out --sample-every 0")
        if args.hf_dataset:
            fetch = partial(fetch_features, args.hf_dataset, args.features_path, args.V, args.num_classes)
            done_by_rank_0(state, fetch)
        return Features(args.features_path, args.V, args.num_classes)
    check_outside(args.results_dir, "--results-dir", args.data_path)
    on_codes = issubclass(DiT_models[args.model].family, DiTSEM)
    if on_codes and not args.encoder:
        raise ValueError(
            f"{args.model} is trained on codes: with --data-path it needs an --encoder, such as {DEFAULT_ENCODER}"
        )
    if args.encoder and not (on_codes or args.align):
        raise ValueError(f"--encoder is for DiTSEM models and for --align, not {args.model}")
    names = ("image_size", "flip", "background", "encoder", "L", "V", "labels")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return Images(state, args.data_path, vae=args.vae or "ema", backbone=args.encoder_backbone, **given)


def open_inputs(args: argparse.Namespace, features: Features | Images) -> Inputs:
    """What the model is conditioned on, `Inputs`. Raises ValueError if the features lack it, or flags do not fit it."""
    family = DiT_models[args.model].family
    if args.condition_path and not issubclass(family, DiTCONT):
        raise ValueError(f"--condition-path is for DiTCONT models, not {args.model}")
    needs(args, "intermediate_head", "train_only")
    needs(args, "pretrained_path", "train_only")
    if args.code_init != "unit" and not issubclass(family, DiTSEM):
        raise ValueError(f"--code-init {args.code_init} is for DiTSEM models, not {args.model}")
    return INPUTS[family.conditioning](features, args)


def check_patch(name: str, latent_size: int, data_path: str) -> None:
    """Raise ValueError, naming the models that would fit, where a model's patch does not divide latents so wide."""
    patch = DiT_models[name].patch_size
    if latent_size % patch:
        alike = (one for one in DiT_models if one.startswith(f"{name.rpartition('/')[0]}/"))
        fitting = [one for one in alike if latent_size % DiT_models[one].patch_size == 0]
        raise ValueError(
            f"latents of {data_path} are {latent_size} wide, not a multiple of {name}'s patch {patch}: take "
            f"{' or '.join([*fitting, 'another --image-size'])}"
        )


def model_arguments(args: argparse.Namespace) -> dict:
    """The arguments of the model's constructor that flags decide: to add one, add a line here and its flag."""
    given = dict(code_init=args.code_init) if issubclass(DiT_models[args.model].family, DiTSEM) else {}
    return dict(given, intermediate_head=args.intermediate_head) if args.intermediate_head else given


def frozen(args: argparse.Namespace, model: DiT) -> DiT:
    """The model, with all but the part of --train-only frozen."""
    if args.train_only:
        model.requires_grad_(False)
        model.intermediate_layer.requires_grad_(True)
    return model


def open_process(args: argparse.Namespace) -> Process:
    """What the flags ask to train on. Raises ValueError for an option that --objective does not have."""
    given = {name: getattr(args, name) for name in OBJECTIVE_OPTIONS if getattr(args, name) is not None}
    for name in given.keys() - PROCESSES[OBJECTIVES[args.objective]].options.keys():
        have = " or ".join(one for had in OBJECTIVE_OPTIONS[name].values() for one in had)
        raise ValueError(f"{flag(name)} {given[name]} goes with --objective {have}, not {args.objective}")
    return create_process(OBJECTIVES[args.objective], **given)


def build_optimizer(
    args: argparse.Namespace, model: torch.nn.Module, projector: torch.nn.Module | None = None
) -> torch.optim.Optimizer | list[torch.optim.Optimizer]:
    """The optimizer, or a list of them. A schedule, which is given to `Run.optimize`, scales each group's own learning
    rate."""
    # fused: it skips a step on the device, where the fp16 scaler would wait to find out
    weights = [*model.parameters(), *(projector.parameters() if projector else ())]
    trained = [weight for weight in weights if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)


NOTED = ("vae", "encoder")  # of `Features.source`, which a run may resume without


def data_record(args: argparse.Namespace, features: Features | Images, inputs: Inputs) -> tuple[dict, dict]:
    """What the features are, as RunMeta records and compares it; and what it only notes: where the data lies, what its
    classes are called, and the names of its networks."""
    source, known, first = features.source(), features.manifest, np.arange(min(64, features.count))
    vectors = inputs.arrays["vectors"].gather(first) if args.condition_path else None
    compared = dict(
        image_size=features.image_size,
        features_count=features.count,
        latents=features.latent_kind,
        **{key: value for key, value in source.items() if key not in NOTED},
        holdout=args.holdout or None,
        heldout_path=args.heldout_path and recorded_id(args.heldout_path),
        first_vectors_sha256=None if vectors is None else hashlib.sha256(vectors.tobytes()).hexdigest(),
    )
    on_images = dict(data_path=args.data_path, labels=args.labels)
    paths = on_images if args.data_path else dict(features_path=args.features_path)
    paths = {key: recorded_id(path) for key, path in paths.items() if path}
    return compared, dict(paths, classes=known and known.classes, **{key: source[key] for key in NOTED})


def draws(
    seed: int, indices: torch.Tensor, x: torch.Tensor, process: Process, dropout: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Times (n,), noise (n, C, S/f, S/f) and whether to drop the condition (n,), for samples with latents x."""
    counts = {Stream.TRAIN_TIMESTEP: 1, Stream.TRAIN_NOISE: words_for(x.shape[1:]), Stream.TRAIN_DROP: 1}
    t, noise, drop = words_of_streams(seed, counts, indices)
    t = process.training_times(t[:, 0].double() / 2**32)
    return t, as_normals(noise, x.shape[1:]), in_unit_interval(drop[:, 0]) < dropout


def losses_of(
    model: Callable,
    process: Process,
    indices: torch.Tensor,
    x: torch.Tensor,
    y: Condition,
    *,
    seed: int,
    dropout: float,
    draw_latents: bool,
    head: bool = False,
    alignment: Alignment | None = None,
    targets: torch.Tensor | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A micro-batch's losses (n,) by name, and its times (n,).

    Args:
        indices, x, y: sample indices (n,), latents or moments (n, C or 2C, S/f, S/f), conditions, all on one device.
        dropout: share of the samples whose condition is dropped.
        draw_latents: whether x are moments, from which latents are drawn.
        head: whether the model has an intermediate head, whose squared error is then the loss "head".
        alignment, targets: what --align asks for, whose loss is then "align", and its targets (n, T, width); without
            them it is 0.
    """
    x = x.float()
    if draw_latents:
        x = draw_posterior(x, seed, indices)  # (n, C, S/f, S/f)
    t, noise, drop = draws(seed, indices, x, process, dropout)
    asked, inner, aligned = dict(head=True) if head else {}, {}, targets is not None
    if aligned:
        asked["tap"] = alignment.block

    def network(x_t, t, **kwargs):
        out = model(x_t, t, **asked, **kwargs)
        if aligned:
            out, inner["tokens"] = out
        if head:
            out, inner["head"] = out.tensor_split([-x.shape[1]], dim=1)
        return out

    terms = process.training_losses(network, x, t, dict(y=y, drop=drop), noise)
    if head or alignment:  # what they add is not part of the process's own loss, which is logged, too
        terms.setdefault("mse", terms["loss"])
    if head:
        terms["head"] = mean_flat((inner["head"].float() - process.target(x, noise, t)) ** 2)
        terms["loss"] = terms["loss"] + HEAD_WEIGHT * terms["head"]
    if alignment:
        terms["align"] = alignment(inner["tokens"], targets) if aligned else torch.zeros_like(terms["loss"])
        terms["loss"] = terms["loss"] + alignment.weight * terms["align"]
    return terms, t


def preview_vae(
    args: argparse.Namespace,
    run: Run,
    process: Process,
    name: str,
    encode: PixelEncoder | None,
    channels: int,
    source: dict,
) -> torch.nn.Module | None:
    """The VAE that decodes previews, in rank 0. If it cannot be had, or no sampler draws them, there are none, unless a
    flag asks for them."""
    vae = None
    if args.sample_every != 0 and run.state.is_main_process:
        try:
            preview_sampler(process)
            vae = encode.vae if encode else load_vae(name, run.device)
            check_decodes(vae, name, channels, source, "the features")
        except (ValueError, OSError) as error:
            if args.sample_every or args.vae:
                raise
            warn_once("previews", f"there will be no previews ({error})")
            vae, args.sample_every = None, 0
    args.sample_every = from_rank_0(args.sample_every)
    return vae


def main(**defaults) -> None:
    # ---------------------------------------------------------------------- flags
    parser = argument_parser(**defaults)
    args = parser.parse_args()
    with Run(parser, args) as run:
        train(parser, args, run)


def train(parser: ArgumentParser, args: argparse.Namespace, run: Run) -> None:
    """The run that args ask for."""
    with parser.one_line_errors():
        # ---------------------------------------------------------------------- data
        features, data_path = open_data(args, run.state), args.data_path or args.features_path
        inputs, (channels, latent_size, _) = open_inputs(args, features), features.latent_shape
        split = split_features(args, features)
        measured_on = inputs if split.other is features else open_inputs(args, split.other)
        spec, process = DiT_models[args.model], open_process(args)
        alignment = open_alignment(args, features, spec.depth)
        sizes = {**inputs.sizes, **model_arguments(args), **process.model_arguments}
        build = partial(spec, input_size=latent_size, in_channels=channels, **sizes)
        check_patch(args.model, latent_size, data_path)
        source = features.source()
        settings, notes = data_record(args, features, inputs)
        run.claim(args.model, build, process, dict(settings, alignment=alignment and alignment.settings), notes)
        if run.state.is_main_process:
            split.validate()
            if args.condition_path:
                inputs.arrays["vectors"].check()
        encode = PixelEncoder(features.vae, features.encoder, run.device) if args.data_path else None
        vae_name = args.vae or source["vae"] or "ema"
        vae = preview_vae(args, run, process, vae_name, encode, channels, source)
        draw_latents = features.latent_kind in ("moments", "images")

        # ---------------------------------------------------------------------- model
        run.start()
        model = run.adopt(frozen(args, build()))
    if alignment:
        alignment.begin(run, model)
    kept = dict(seed=args.global_seed, dropout=model.class_dropout_prob, head=bool(args.intermediate_head))
    optimizers = build_optimizer(args, model, alignment and alignment.projector)
    run.optimize(optimizers, warmup)

    # ---------------------------------------------------------------------- run
    arrays = {**inputs.arrays, "tokens": alignment.stored} if alignment else inputs.arrays
    if encode:
        batches = ImageBatches(features, arrays, **run.share)
    else:
        batches = TrainingBatches(features, dict(arrays, latents=features.latents), only=split.rows, **run.share)
    losses = partial(losses_of, draw_latents=draw_latents)
    measured = [HeldOutLatents(run, split, measured_on, process, losses)] if len(split.heldout) else []
    if args.eval_samples:
        from evaluation.in_training import SampleMetrics  # whose networks no other run needs

        with parser.one_line_errors():
            measured.append(SampleMetrics(run, split, measured_on, process, vae_name))
    parameters = sum(weight.numel() for weight in model.parameters())
    run.logger.info(
        f"model: {args.model}, {parameters / 1e6:.1f} M parameters, image size {features.image_size}, "
        + ", ".join(f"{key}={value}" for key, value in sizes.items())
    )
    run.logger.info(f"objective: {args.objective}, {describe_process(process)}")
    run.logger.info(
        f"data: {batches.rows_per_epoch:,} {'images' if encode else 'rows'} of {data_path}, "
        f"{batches.rows_per_epoch / args.global_batch_size:.1f} steps per epoch, {len(split.heldout):,} held out"
    )
    networks = (("VAE", vae_name, encode.vae if encode else vae), ("encoder", args.encoder, encode and encode.encoder))
    for what, name, network in networks:
        if network is not None:
            run.logger.info(f"{what} {name}: {network.said}")

    def seen(batch):
        """Latents or moments, and conditions, of a batch."""
        y = inputs.of(batch)
        return encode(batch["images"], y) if encode else (batch["latents"], y)

    # ---------------------------------------------------------------------- loop
    for step, batch in run.steps(batches, measured):
        for part in run.micro_batches(batch):
            latents, y = seen(part)
            targets = alignment and alignment.targets(part, step, encode)
            aligned = dict(alignment=alignment, targets=targets)
            terms, t = losses(run.model, process, part["indices"], latents, y, **kept, **aligned)
            run.backward(terms, t, process.num_timesteps)
        run.update(step)
        run.report(step)
        if run.preview_due(step):
            with run.whole_ema() as ema:
                if ema is not None:
                    with parser.one_line_errors():
                        batch = batches.shown(PREVIEW_SAMPLES, run.device)
                    latents, y = seen(batch)
                    path = run.folder / f"previews/{step:07d}.png"
                    shown, classes = latents[:, :channels].float(), features.manifest and features.manifest.classes
                    drawn = (ema, process, shown, y, vae, args.global_seed, classes or (), run.go_on)
                    run.record(save_preview, path, *drawn)


if __name__ == "__main__":
    main()
