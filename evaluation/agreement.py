"""Code agreement: does encoding a sample give back the code that it was drawn for? The DLC's own measure of control.

    python evaluate.py agreement samples/FOLDER --encoder pretrained/dlc_encoder.pth
    python evaluate.py agreement samples/FOLDER --data-path /path/to/imagenet/train

In: a folder of samples of a DiTSEM, whose samples.json says which code each was drawn for, and the SEM encoder that
makes such codes. Out: a line, and in FOLDER.metrics.json the share of tokens that come back, in all and for each
position; the level of chance; and, given the images of the codes' features, the ceiling: the same share for the VAE's
reconstructions of these images, since no sample that this VAE decodes can be expected to keep more.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dlc.data import Features
from dlc.data.codes import CodeSet, compare
from dlc.machine.cli import number
from dlc.machine.files import check_output
from dlc.machine.processes import agree, create_logger, start_processes
from dlc.sampling.code_folder import CodesRecord, open_codes
from dlc.sampling.conditions import RowConditions
from dlc.sampling.samples_record import SamplesRecord
from dlc.weights.networks import add_encoder_flags
from evaluation.feature_images import FeatureImages, Reconstruction, vae_of
from evaluation.measuring import measure
from evaluation.reconstruction import numbers_of
from evaluation.report import METRICS_FILE, metrics_path, write_metrics
from evaluation.sets import ImageSet, open_images
from evaluation.tokens import BATCH, EncoderNetwork, codes_of, encoder_of, token_agreement

if TYPE_CHECKING:
    from accelerate import PartialState

#################################################################################
#                            The codes of the samples                           #
#################################################################################


def open_samples(path: str | Path) -> tuple[Path, ImageSet, SamplesRecord]:
    """The folder of PNGs, which may be gone, that a user names by itself, or by its .npz; the images; their record.

    Raises ValueError where we wrote none there.
    """
    path = Path(path)
    folder = path.with_suffix("") if path.suffix == ".npz" else path
    unwritten = folder.is_dir() and not path.exists()  # an .npz
    images = open_images(folder if unwritten else path, "SAMPLES")
    if images.record is None:
        raise ValueError(
            f"{path}: no samples.json says what its {images.count:,} images were drawn for: name a folder, or an .npz, "
            "that a sampling script wrote"
        )
    return folder, images, SamplesRecord.from_json(images.record, f"the samples.json of {path}")


class DrawnCodes(RowConditions):
    """The codes that samples were drawn for, found again from their record. Called with indices, gives (N, L) int64.

    Args:
        folder, record: of the samples.
        dlc_dir: where the codes lie now; None: where samples.json says.

    Raises ValueError where the samples were not drawn for codes, or where the codes are not those by their digest.
    """

    def __init__(self, folder: Path, record: SamplesRecord, dlc_dir: str | None = None):
        conditions = record.conditions
        if conditions["kind"] != "codes":
            raise ValueError(f"{folder}: its samples were drawn for {conditions['kind']}, not for codes")
        prior = conditions.get("prior")  # drew them beside the samples
        source = dlc_dir or (folder.with_name(f"{folder.name}.codes") if prior else str(conditions.get("source")))
        try:
            self.codes = open_codes(source)
        except ValueError as error:
            raise ValueError(f"{error}; name the codes that {folder} was drawn for with --dlc-dir") from None
        order = conditions.get("order", "sequential")
        super().__init__("codes", source, self.codes.rows, order, record.global_seed)
        if prior:
            drawn = CodesRecord.finished(source)
            agrees = drawn is not None and drawn.settings() == prior and drawn.num >= record.num_fid_samples
        else:
            agrees = self.digest(record.num_fid_samples) == conditions.get("sha256")
        if not agrees:
            raise ValueError(
                f"the codes of {source} are not those that {folder} was drawn for, by the digest in samples.json: "
                "name them with --dlc-dir"
            )

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.codes.gather(self.values(indices)))


#################################################################################
#                                    Command                                    #
#################################################################################


def line_of(result: dict) -> str:
    """The numbers that a person reads, in one line."""
    by_position, ceiling = np.array(result["share_by_position"]), result.get("ceiling")
    low, high = int(by_position.argmin()), int(by_position.argmax())
    error = f" +- {result['standard_error']:.3f}" if result["standard_error"] is not None else ""
    return (
        f"code agreement {result['share']:.3f}{error} over {result['images']:,} samples of {result['L']} tokens; "
        f"chance {result['chance']:.3f}"
        + (f"; VAE reconstructions of {ceiling['images']:,} images {ceiling['share']:.3f}" if ceiling else "")
        + f"; by position {by_position[low]:.3f} (number {low}) to {by_position[high]:.3f} (number {high}); "
        f"{result['whole_codes']:.1%} of the codes come back whole"
    )


def add_agreement_flags(add: Callable) -> None:
    """Add all but the samples; evaluate.py sweep hands them on."""
    add_encoder_flags(add, None, " that made the codes; default: the one that the features or the checkpoint name")
    add("--dlc-dir", help="compare with these codes, if the samples' codes have moved [those that samples.json names]")
    add("--data-path", help="also measure the ceiling on these images, from which the features were extracted [none]")
    add("--features-path", help="with --data-path: take the images of these features [the features of the codes]")
    add(
        "--vae",
        help="with --data-path: reconstruct with this VAE: ema, mse, a directory or a hub id [that of the features]",
    )
    add(
        "--num-images",
        type=number(int, 1),
        help="with --data-path: use this many images, spread over all [one per sample]",
    )


def check_agreement_flags(args: Namespace) -> None:
    """Raise ValueError for flags that nothing would read."""
    for flag in ("features-path", "vae", "num-images"):
        if getattr(args, flag.replace("-", "_")) is not None and not args.data_path:
            raise ValueError(f"--{flag} sets up the ceiling, which needs images: add --data-path")


def add_flags(add: Callable) -> None:
    add("samples", help="measure this folder of samples of a DiTSEM, or its .npz")
    add_agreement_flags(add)


def open_ceiling(args: Namespace, drawn: DrawnCodes, read: EncoderNetwork, count: int, state: "PartialState") -> tuple:
    """The images to measure the ceiling on, the network that reconstructs them, their codes (n, L), and notes.

    Raises ValueError where there are none whose codes the encoder made.
    """
    features = Features(args.features_path) if args.features_path else drawn.codes.features
    if features is None:
        raise ValueError(
            f"--data-path: {drawn.source} is no features directory; name that of the images with --features-path"
        )
    codes = CodeSet.of_features(features)
    compare(codes, codes_of(read.encoder, "the samples"))
    images = FeatureImages(features, args.data_path, args.num_images)
    if args.num_images is None and images.count > count:
        images = FeatureImages(features, args.data_path, count)
    vae, _, notes = vae_of(args.vae, features, state)
    return images, Reconstruction(vae, state.device, read=read), codes.gather(images.rows, read.encoder.V), notes


def run(args: Namespace) -> None:
    """Measure, and write the numbers beside the samples."""
    check_agreement_flags(args)
    folder, samples, record = open_samples(args.samples)
    path, drawn = metrics_path(folder), DrawnCodes(folder, record, args.dlc_dir)
    check_output(path, "the numbers' file", own=METRICS_FILE)
    state = start_processes()
    encoder, notes = encoder_of(args, drawn.codes, record.checkpoint)
    read, ceiling = EncoderNetwork(encoder, state.device), None
    if args.data_path:
        images, network, codes, more = open_ceiling(args, drawn, read, samples.count, state)
        notes += more
    wanted = drawn.codes.gather(drawn.values(np.arange(samples.count)), encoder.V)  # (count, L)
    agree("samples, codes and encoder", (record.conditions, read.digest))
    logger = create_logger(state)
    for note in notes:
        logger.info(f"note: {note}")
    key = read.name, "codes"
    measured = measure(samples, [read], state, [], [key], BATCH, "encoding samples")
    if args.data_path:
        ceiling = numbers_of(images, network, state, codes)
    if state.is_main_process:
        result = token_agreement(wanted, measured.rows[key].numpy(), encoder.V)
        if ceiling:
            result["ceiling"] = ceiling["code_agreement"]
        logger.info(line_of(result))
        logger.info(write_metrics(path, samples, measured, dict(code_agreement=result)))
    state.destroy_process_group()
