"""Code agreement: does encoding a sample give back the code that it was drawn for? The DLC's own measure of control.

    python evaluate.py agreement samples/FOLDER --encoder pretrained/dlc_encoder.pth
    python evaluate.py agreement samples/FOLDER --data-path /path/to/imagenet/train

In: a folder of samples of a DiTSEM, whose samples.json says which code each was drawn for, and the SEM encoder that
makes such codes. Out: a line, and in FOLDER.metrics.json the share of tokens that come back, in all and for each
position; the level of chance; and, given the images of the features that the codes are of, the ceiling: the same share
for the VAE's reconstructions of images, since no sample that this VAE decodes can be expected to keep more.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from dlc.data import Features
from dlc.data.images import read_png
from dlc.machine.cli import ArgumentParser, number
from dlc.machine.files import check_writable
from dlc.machine.processes import agree, create_logger, start_processes
from dlc.nets.digest import weights_sha256
from dlc.sampling.code_folder import CodesRecord
from dlc.sampling.conditions import ComputedCodes, RowConditions, open_codes
from dlc.sampling.opening import open_model
from dlc.sampling.pictures import missing_indices, png_path
from dlc.sampling.samples_record import SamplesRecord
from dlc.weights.networks import add_encoder_flags
from evaluation.feature_images import FeatureImages, Reconstructor, open_vae
from evaluation.report import metrics_path, write_metrics
from evaluation.tokens import CodeReader, agreement_of_images, open_encoder_of

#################################################################################
#                            The codes of the samples                           #
#################################################################################


def samples_folder(path) -> Path:
    """The folder of PNGs that a user names by itself, or by its .npz. Raises ValueError where there is none of ours."""
    folder = Path(path)
    if folder.suffix == ".npz":
        folder = folder.with_suffix("")
    if not (folder / "samples.json").is_file():
        raise ValueError(
            f"{path}: there is no {folder / 'samples.json'}, which says what the samples were drawn for: name a "
            "folder that a sampling script wrote"
        )
    return folder


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
            codes = open_codes(source)
        except ValueError as error:
            raise ValueError(f"{error}; name the codes that {folder} was drawn for with --dlc-dir") from None
        super().__init__("codes", source, codes.rows, conditions.get("order", "sequential"), record.global_seed)
        self.features, self.L, self.V = codes.features, codes.L, None
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
        return torch.from_numpy(self.rows.gather(self.values(indices), limit=self.V).astype(np.int64))


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


def add_agreement_flags(add) -> None:
    """Add all but the samples; evaluate.py sweep hands them on."""
    add_encoder_flags(add, None, " that made the codes; default: the one that the codes' features name")
    add("--dlc-dir", help="codes that the samples were drawn for, if they have moved [those that samples.json names]")
    add("--data-path", help="also measure the ceiling on these images, which the features were extracted from [none]")
    add("--features-path", help="with --data-path: the features that say which images [those that the codes are of]")
    add("--vae", help="with --data-path: ema, mse, a directory or a hub id [that of the features]")
    add("--num-images", type=number(int, 1), help="with --data-path: images to use, spread over all [one per sample]")


def check_agreement_flags(args) -> None:
    """Raise ValueError for flags that nothing would read."""
    for flag in ("features-path", "vae", "num-images"):
        if getattr(args, flag.replace("-", "_")) is not None and not args.data_path:
            raise ValueError(f"--{flag} is of the ceiling, which is measured on images: give --data-path")


def parse_args():
    parser = ArgumentParser(__doc__)
    parser.add_argument("samples", help="folder of samples of a DiTSEM, or its .npz")
    add_agreement_flags(parser.add_argument)
    return parser, parser.parse_args()


def open_judges(args, drawn, count: int, device):
    """The encoder that reads `count` samples for codes, notes on it, and what `open_ceiling` gives, or None.

    drawn: the codes: DrawnCodes, or what else has their source, features (or None) and L.
    """
    manifest = drawn.features.manifest if drawn.features is not None else None
    encoder, notes = open_encoder_of(args, manifest, drawn.L, f"the codes of {drawn.source}")
    return encoder, notes, open_ceiling(args, drawn, encoder, count, device) if args.data_path else None


def open_ceiling(args, drawn, encoder, count: int, device):
    """The images to measure the ceiling on, their codes (n, L), the Reconstructor, and notes.

    Raises ValueError where there are none whose codes the encoder made.
    """
    features = Features(args.features_path) if args.features_path else drawn.features
    if features is None:
        raise ValueError(
            f"--data-path: {drawn.source} is not of features; name those of the images with --features-path"
        )
    if features.codes is None or features.L != drawn.L:
        raise ValueError(f"features {features.root} have no codes of L={drawn.L}, as the samples were drawn for")
    if features.manifest is not None and features.manifest.encoder_sha256 not in (None, weights_sha256(encoder)):
        raise ValueError(f"the codes of features {features.root} are of another encoder than those of {drawn.source}")
    images = FeatureImages(features, args.data_path, args.num_images)
    if args.num_images is None and len(images) > count:
        images = FeatureImages(features, args.data_path, count)
    vae, _, notes = open_vae(args.vae, features, device)
    codes = features.codes.gather(images.rows, limit=encoder.V).astype(np.int64)
    return images, codes, Reconstructor(vae, device), notes


def check_before_drawing(args, sampling, default: str) -> None:
    """Raise ValueError for what would hinder measuring the agreement of samples that are yet to be drawn.

    Args:
        args: flags of `add_agreement_flags`.
        sampling: flags of the sampling script. default: the model that it draws from without --model and --ckpt.
    """
    _, model, meta = open_model(sampling, ComputedCodes.script, default)
    if model.conditioning != "codes":
        raise ValueError(f"--agreement is of samples for codes: {sampling.model} draws for {model.conditioning}")
    conditions, count = ComputedCodes.open(sampling, model, meta), sampling.num_fid_samples
    if args.dlc_dir:
        moved = ComputedCodes.open(SimpleNamespace(**{**vars(sampling), "dlc_dir": args.dlc_dir}), model, meta)
        if moved.digest(count) != conditions.digest(count):
            raise ValueError(f"--dlc-dir {args.dlc_dir}: the samples are to be drawn for other codes")
    source = sampling.prior or conditions.source
    features = None if sampling.prior else open_codes(source).features
    codes = SimpleNamespace(source=source, features=features, L=model.sem_embedder.L)
    open_judges(args, codes, count, torch.device("cpu"))


def main():
    parser, args = parse_args()
    with parser.one_line_errors():
        check_agreement_flags(args)
        folder = samples_folder(args.samples)
        record, path = SamplesRecord.read(folder / "samples.json"), metrics_path(folder)
        count, drawn = record.num_fid_samples, DrawnCodes(folder, record, args.dlc_dir)
        missing = missing_indices(folder, count)
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing):,} of its {count:,} images: run the sampling command again to draw them"
            )
        check_writable(path, "the numbers' file")
        state = start_processes()
        encoder, notes, ceiling = open_judges(args, drawn, count, state.device)
        drawn.V = encoder.V
        wanted = drawn(np.arange(count)).numpy()  # (count, L)
        agree("samples, codes and encoder", (record.conditions, weights_sha256(encoder)))

    def load(indices):
        return np.stack([read_png(png_path(folder, index)) for index in indices.tolist()])

    logger = create_logger(state)
    for note in [*notes, *(ceiling[3] if ceiling else [])]:
        logger.info(f"note: {note}")
    with parser.kept_on_error("nothing is written", "the number of other programs", (ValueError, OSError)):
        read = CodeReader(encoder, state.device)
        result = agreement_of_images(load, wanted, read, state, "encoding samples")
        if ceiling:
            images, codes, reconstruct, _ = ceiling
            found = agreement_of_images(images.crops, codes, read, state, "encoding reconstructions", reconstruct)
        if state.is_main_process:
            if ceiling:
                result["ceiling"] = found
            write_metrics(path, dict(code_agreement=result))
            logger.info(line_of(result))
            logger.info(f"written to {path}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
