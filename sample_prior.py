"""Draw codes from a prior over discrete latent codes: a folder of .npy files that --dlc-dir takes.

    torchrun --nproc_per_node=N sample_prior.py --num-codes 50000 --steps 512 --out prior_codes
    torchrun --nproc_per_node=N sample_ddp_computed_dlc.py --model DiTSEM-XL/2 --dlc-dir prior_codes

In: a prior [the best by its held-out bound under results_prior/, or the newest] and, for comparison, the codes that it
was trained on. Out: OUT/{shard:06d}.npy and codes.json: exactly --num-codes codes, what made them, and how they use
their tokens, beside the training codes. The same command, run again, draws what is missing. The codes do not depend on
the number of processes.

With --given and --keep-tokens, parts of given codes are kept and the rest is drawn: variations of an image.
"""

import argparse
from pathlib import Path

import numpy as np

from dlc.data.codes import CodeSet, compare
from dlc.machine.cli import SEED, ArgumentParser, number, one_line
from dlc.machine.files import check_apart
from dlc.machine.part import add_part_flag, asked_part
from dlc.machine.processes import PRECISIONS, add_speed_flags, agree, create_logger, done_by_rank_0, start_processes
from dlc.sampling.code_folder import SHARD, CodeFolder, CodesRecord
from dlc.sampling.prior_draw import BATCH, PriorDraw, draw_into, newest_prior
from dlc.sampling.prior_options import PriorOptions, prior_flags
from dlc.sampling.samples_record import this_launch
from dlc.sampling.usage import usage, usage_lines
from dlc.training.split import Split, copies_of, split_codes

RESULTS, KEPT = "results_prior", "what is drawn is kept"  # the default of --results-dir; and after an error


def parse_args() -> tuple[ArgumentParser, argparse.Namespace]:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("prior").add_argument
    add(
        "--ckpt",
        help="draw from this prior: a checkpoint directory, a file or a hub id [under --results-dir, the weights of "
        "the lowest held-out bound, or the newest]",
    )
    add("--results-dir", default=RESULTS, help="look for the prior here")
    add("--no-ema", dest="ema", action="store_false", help="use the raw weights instead of the EMA weights")
    add = parser.add_argument_group("codes").add_argument
    for flag, argument in prior_flags().items():
        add(*flag.split(), **argument)
    add = parser.add_argument_group("run").add_argument
    # torchrun takes --num for the start of its own --numa-binding and gives up; it has no such trouble with --num-codes
    add("--num-codes", "--num", dest="num", type=number(int, 1), default=50000, help="draw this many codes")
    add("--out", default="prior_codes", help="write the codes into this folder")
    add_part_flag(add, "shards of codes")
    add(
        "--batch-size", type=number(int, 1, SHARD), default=BATCH, help="draw this many at once; rounding depends on it"
    )
    text = "compare with the codes of these features [those that the prior was trained on, if they are there]"
    add("--features-path", "--feature-path", help=text)
    switch = dict(action=argparse.BooleanOptionalAction, default=True)
    add("--usage", **switch, help="print at the end how the codes use their tokens [%(default)s]")
    add("--precision", choices=PRECISIONS, default="fp32", help="set the precision of the network")
    add_speed_flags(add)
    add("--global-seed", type=SEED, default=0, help="seed all draws")
    return parser, parser.parse_args()


def open_training_codes(args: argparse.Namespace, prior: PriorDraw) -> tuple[Split | None, str | None]:
    """The codes to compare with, or None with a reason. Raises ValueError if those of --features-path do not fit."""
    path = args.features_path or prior.meta.features_path
    if not args.usage or path is None:
        return None, args.usage and "the prior does not say its training codes: name them with --features-path"
    heldout, note = prior.meta.heldout_path, None
    if heldout and not Path(heldout).exists():
        heldout, note = None, f"no comparison with the held-out codes: {heldout} is not there"
    try:
        split = split_codes(path, prior.model.V, prior.meta.holdout or 0.0, heldout)
        compare(CodeSet.of_features(split.features), prior.spec)
    except ValueError as error:
        if args.features_path:
            raise
        return None, f"no comparison with the training codes: {error}"
    return split, note


def count_usage(folder: CodeFolder, V: int, split: Split | None) -> dict:
    """See `usage`, of a folder of codes and those that the prior was trained on."""
    training = heldout = None
    if split is not None:
        training = split.features.codes.gather(split.rows[:: copies_of(split.features)])
        heldout = split.other.codes.gather(split.heldout)
    return usage(folder.rows().gather(np.arange(folder.num)), V, training, heldout)


def main() -> None:
    parser, args = parse_args()
    with parser.one_line_errors(KEPT, "--batch-size"):
        run(parser, args)


def run(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Check, draw and finish."""
    # ---------------------------------------------------------------------- checks
    with parser.one_line_errors("nothing was drawn; what was there is kept"):
        options, part = PriorOptions.of(args), asked_part(args.part)
        folder = CodeFolder(args.out, args.num, part)
        if args.ckpt and args.results_dir != RESULTS:
            raise ValueError("--results-dir is where a prior is looked for, --ckpt names one: give one of them")
        if args.features_path and not args.usage:
            raise ValueError("--features-path names codes to compare the usage of tokens with: leave out --no-usage")
        check_apart(args.out, "--out", [args.ckpt, args.results_dir, args.features_path])
        state = start_processes(precisions=[args.precision])
        path = args.ckpt or done_by_rank_0(state, lambda: newest_prior(args.results_dir, args.ema))
        prior = PriorDraw(path, args.ema, options, seed=args.global_seed, precision=args.precision, tf32=args.tf32)
        training, reason = open_training_codes(args, prior)
        record = prior.record(args.num)
        agree("prior and codes", record)
        missing = done_by_rank_0(state, lambda: folder.open(record, this_launch(state, args.batch_size, part)))
    logger, told = create_logger(state), {name: one for name, one in record.options.items() if one is not None}
    step = "unknown" if record.step is None else f"{record.step:,}"
    for line in (
        f"{record.model}, step {step}, {record.weights} weights of {record.checkpoint}: L={record.L}, V={record.V}",
        f"{args.num:,} codes into {args.out}, {len(missing)} of {len(folder.shards)} shards to draw, "
        f"on {state.num_processes} x {state.device.type}; "
        + ", ".join(f"{name} {one_line(value, 60)}" for name, value in told.items()),
        *part.said("codes"),
        *([f"note: {reason}"] if reason else []),
    ):
        logger.info(line)

    # ---------------------------------------------------------------------- codes
    draw_into(folder, missing, prior, state, args.batch_size, args.compile)

    # ---------------------------------------------------------------------- what they are
    if state.is_main_process:
        with parser.one_line_errors(KEPT, "--num-codes"):
            # without a usage, what an earlier launch found stays
            folder.finish(lambda: dict(usage=count_usage(folder, record.V, training)) if args.usage else {})
            found = args.usage and not folder.left_over and CodesRecord.read(folder.record_path).usage
        for line in usage_lines(found, record.V) if found else ():
            logger.info(line)
        logger.info(
            part.said_left(folder.left_over, "shards")
            if folder.left_over
            else f"done: {args.num:,} codes of {record.checkpoint}, step {step}, in {args.out}: draw their images with "
            f"sample_ddp_computed_dlc.py --dlc-dir {args.out} --num-fid-samples {args.num}"
        )
    state.destroy_process_group()


if __name__ == "__main__":
    main()
