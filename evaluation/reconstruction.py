"""What the VAE keeps of images: reconstructions of the images that features were extracted from, against the images.

    python evaluate.py reconstruction features --data-path /path/to/imagenet/val

In: FEATURES/, which say which images, crop and VAE, and the images. Out: a table and FEATURES/reconstruction.json:
PSNR, SSIM, the Frechet distance of reconstructions to the same crops (rFID, where the features are Inception's), and,
where the features hold codes, the share of tokens that reconstructions keep. It bounds what samples of a model of these
latents can reach.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlc.data import Features
from dlc.data.codes import CodeSet
from dlc.machine.cli import number
from dlc.machine.files import check_output, recorded_id, write_json
from dlc.machine.processes import PRECISIONS, agree, create_logger, start_processes, versions
from dlc.weights.networks import add_encoder_flags, vae_id
from evaluation.feature_images import FeatureImages, Reconstruction, vae_of
from evaluation.feature_networks import NETWORKS, add_weights_flags, check_weights_flags, feature_networks
from evaluation.measuring import measure
from evaluation.metrics import frechet_distance
from evaluation.tokens import BATCH, EncoderNetwork, encoder_of, token_agreement

if TYPE_CHECKING:
    from accelerate import PartialState


def add_flags(add: Callable) -> None:
    add("features", help="measure the VAE on the images of these features, with a manifest.json")
    add("--data-path", required=True, help="read the images that the features were extracted from in this folder")
    add("--vae", help="reconstruct with this VAE: ema, mse, a directory or a hub id [that of the features]")
    add("--num-images", type=number(int, 2), help="use this many images, spread evenly over the features [all]")
    add(
        "--features",
        dest="networks",
        nargs="+",
        choices=[*NETWORKS, "encoder", "none"],
        default=["inception"],
        help="compute the Frechet distance of these features; encoder: the SEM encoder's class and register tokens "
        "[inception]",
    )
    add_weights_flags(add)
    add_encoder_flags(add, None, " that made the codes; none: leave codes out; default: the one that the features name")
    add("--precision", choices=PRECISIONS, default="fp32", help="set the precision of the VAE")
    add("--out", help="write the numbers to this .json [FEATURES/reconstruction.json]")


def chosen_networks(args: Namespace, read: EncoderNetwork | None, state: "PartialState") -> list:
    """The networks of --features. Raises ValueError where their weights are not to be had.

    read: the encoder of the features' codes.
    """
    names = [] if args.networks == ["none"] else list(dict.fromkeys(args.networks))
    if "none" in names:
        raise ValueError("--features none goes with no other")
    if "encoder" in names and read is None:
        raise ValueError(
            "--features encoder needs the encoder of the features' codes: there are none, or it is left out"
        )
    networks = feature_networks(args, [name for name in names if name in NETWORKS], state)
    return [networks.get(name, read) for name in names]


def lines_of(result: dict) -> list[str]:
    """The numbers as lines."""
    rows = {"images": f"{result['images']:,}", "PSNR, dB": f"{result['psnr']:.3f}", "SSIM": f"{result['ssim']:.4f}"}
    for name, value in result["frechet_distances"].items():
        rows["rFID" if name == "inception" else f"FD of {name} features"] = f"{value:.4f}"
    if agreement := result.get("code_agreement"):
        rows |= {"tokens kept": f"{agreement['share']:.4f}", "tokens kept by chance": f"{agreement['chance']:.4f}"}
    return [f"{name:28}{value:>12}" for name, value in rows.items()]


def numbers_of(
    images: FeatureImages, network: Reconstruction, state: "PartialState", codes: np.ndarray | None = None
) -> dict | None:
    """The numbers of all images, as reconstruction.json holds them, on rank 0; None elsewhere.

    codes: (n, L), those of the images; None: they are not compared.
    """
    name, outputs = network.name, [(network.name, output) for output in network.outputs]
    keep = [key for key in outputs if key[1] in ("psnr", "ssim", "codes")]
    statistics = [key for key in outputs if key not in keep]
    measured = measure(images, [network], state, statistics, keep, BATCH, "reconstructing")
    if not state.is_main_process:
        return None
    result = dict(images=images.count, **{key: float(measured.rows[name, key].mean()) for key in ("psnr", "ssim")})
    result["frechet_distances"] = {
        one.name: frechet_distance(
            *(measured.statistics[name, f"{one.name}.{which}"] for which in ("originals", "reconstructions"))
        )
        for one in network.networks
    }
    if codes is not None:
        found = measured.rows[name, "codes"].numpy()
        result["code_agreement"] = token_agreement(codes, found, network.read.encoder.V)
    return result


def run(args: Namespace) -> None:
    """Measure, and write the numbers."""
    check_weights_flags(args, args.networks)
    features = Features(args.features)
    images = FeatureImages(features, args.data_path, args.num_images)
    if images.count < 2 and args.networks != ["none"]:
        raise ValueError(f"features {args.features} come from 1 image, and a Frechet distance needs 2: --features none")
    out = Path(args.out) if args.out else features.root / "reconstruction.json"
    check_output(out, "--out", own=("listing_sha256", "psnr", "ssim"))
    if features.codes is None and args.encoder not in (None, "none"):
        raise ValueError(f"--encoder {args.encoder}: features {args.features} hold no codes to compare with")
    state, read, codes, notes = start_processes(precisions=[args.precision]), None, None, []
    if features.codes is not None and args.encoder != "none":
        encoder, notes = encoder_of(args, codes := CodeSet.of_features(features))
        read, codes = EncoderNetwork(encoder, state.device), codes.gather(images.rows, encoder.V)
    vae, digest, more = vae_of(args.vae, features, state)
    networks = chosen_networks(args, read, state)
    settings = dict(
        listing_sha256=features.manifest.listing_sha256,
        image_size=features.image_size,
        features_count=features.count,
        num_images=images.count,
        vae_sha256=digest,
        precision=args.precision,
        networks={one.name: one.digest for one in networks},
        encoder_sha256=read.digest if read else None,
    )
    agree("features, VAE and networks", settings)
    logger = create_logger(state)
    for note in [*notes, *more, *(note for one in networks for note in one.notes)]:
        logger.info(f"note: {note}")
    network = Reconstruction(vae, state.device, args.precision, networks, read)
    result = numbers_of(images, network, state, codes)
    if state.is_main_process:
        record = dict(
            format_version=1,
            features=recorded_id(args.features),
            data_path=recorded_id(args.data_path),
            vae=recorded_id(vae_id(args.vae or features.manifest.vae)),
            **settings,
            **result,
            versions=versions(),
        )
        write_json(out, record)
        print(f"reconstructions of the images of {args.features} by {record['vae']}")
        print("\n".join(lines_of(result)))
        logger.info(f"written to {out}")
    state.destroy_process_group()
