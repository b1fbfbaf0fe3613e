"""What the VAE keeps of images: reconstructions of the images that features were extracted from, against the images.

    python evaluate.py reconstruction features --data-path /path/to/imagenet/val

In: FEATURES/, which say which images, crop and VAE, and the images. Out: a table and FEATURES/reconstruction.json:
PSNR, SSIM, the Frechet distance of reconstructions to the same crops (rFID, where the features are Inception's), and,
where the features hold codes, the share of tokens that reconstructions keep. It bounds what samples of a model of these
latents can reach. The same command run again continues, and repeats nothing that is done.
"""

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from dlc.data import Features
from dlc.machine.cli import ArgumentParser, number
from dlc.machine.files import check_writable, recorded_id, write_bytes, write_json
from dlc.machine.processes import PRECISIONS, agree, create_logger, start_processes, versions
from dlc.nets.digest import weights_sha256
from dlc.weights.foreign.safe import load_tensors
from dlc.weights.networks import add_encoder_flags, vae_id
from evaluation.feature_images import FeatureImages, Reconstructor, open_vae
from evaluation.measuring import counts_of, merge, outputs_of, share
from evaluation.metrics import FeatureStatistics, frechet_distance
from evaluation.networks import NETWORKS, check_weights_flags, open_networks
from evaluation.similarity import psnr, ssim
from evaluation.tokens import (
    BATCH,
    CodeReader,
    EncoderNetwork,
    gathered,
    in_batches_of_images,
    open_encoder_of,
    token_agreement,
)

SETS = ("originals", "reconstructions")
SAVE_SECONDS = 60  # between two writes of what is done so far, at least

#################################################################################
#                                   Measuring                                   #
#################################################################################


class Measured:
    """What one process knows of its share of the images, in order. It can be written to a file and read back.

    rows: per image, (n, ...): "psnr", "ssim", and with an encoder "codes". statistics: of the features of each network,
    {"NAME.originals": FeatureStatistics, "NAME.reconstructions": ...}.

    Args:
        networks: of the Frechet distances; may be none.
        L: positions of the codes; None: there are none.
        settings: what decides the numbers; a file of others is not continued.
    """

    def __init__(self, networks, L: int | None, settings: dict):
        self.settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()
        self.rows = {name: [torch.zeros(0, dtype=torch.float64)] for name in ("psnr", "ssim")}
        if L:
            self.rows["codes"] = [torch.zeros(0, L, dtype=torch.int64)]
        self.statistics = {
            f"{one.name}.{which}": FeatureStatistics(one.outputs["pool"]) for one in networks for which in SETS
        }

    @property
    def done(self) -> int:
        return sum(map(len, self.rows["psnr"]))

    def add(self, rows: dict[str, torch.Tensor], features: dict[str, torch.Tensor]) -> None:
        """Add a batch, by the names of `rows` and `statistics`."""
        for name, value in rows.items():
            self.rows[name].append(value)
        for name, value in features.items():
            self.statistics[name].update(value)

    def save(self, path: Path) -> None:
        tensors = {name: torch.cat(parts) for name, parts in self.rows.items()}
        for name, one in self.statistics.items():
            tensors.update({f"{name}.mean": one.mean.contiguous(), f"{name}.scatter": one.scatter.contiguous()})
        tensors["settings"] = torch.frombuffer(bytearray(self.settings), dtype=torch.uint8)
        write_bytes(path, safetensors.torch.save(tensors))

    def load(self, path: Path) -> None:
        """Continue from a file of `save`; from nothing where there is none, or one of other settings or damaged."""
        try:
            tensors = load_tensors(path)
            if bytes(tensors["settings"].tolist()) != self.settings:
                return
            rows = {name: [tensors[name].clone()] for name in self.rows}
            count, statistics = len(tensors["psnr"]), {}
            if {len(parts[0]) for parts in rows.values()} != {count}:
                return
            for name, one in self.statistics.items():
                statistics[name] = FeatureStatistics(one.dim)
                statistics[name].add_moments(count, tensors[f"{name}.mean"], tensors[f"{name}.scatter"])
        except (ValueError, KeyError, RuntimeError, TypeError):
            return
        self.rows, self.statistics = rows, statistics


def measure(measured: Measured, images: FeatureImages, reconstruct, state, networks=(), read=None, save_to=None):
    """Add to `measured` what is missing of this process's share of the images.

    Args:
        reconstruct: a Reconstructor.
        networks: of the Frechet distances, as those of evaluation/networks.py.
        read: a CodeReader; None: no codes.
        save_to: file to write what is done to from time to time, and when the work is interrupted.
    """

    @torch.inference_mode()
    def work(indices, crops):
        found = torch.from_numpy(reconstruct(crops))  # (n, S, S, 3)
        pair = crops.to(reconstruct.device), found.to(reconstruct.device)
        rows = dict(psnr=psnr(*pair).cpu(), ssim=ssim(*pair).cpu())
        if read is not None:
            rows["codes"] = read(found.numpy())
        features = {
            f"{one.name}.{which}": outputs_of(one, images, BATCH)["pool"]
            for one in networks
            for which, images in zip(SETS, pair)
        }
        return rows, features

    start, stop = share(len(images), BATCH, state.process_index, state.num_processes)
    due = time.monotonic() + SAVE_SECONDS
    try:
        for rows, features in in_batches_of_images(
            images.crops, work, start + measured.done, stop, state, "reconstructing"
        ):
            measured.add(rows, features)
            if save_to is not None and time.monotonic() > due:
                began = time.monotonic()
                measured.save(save_to)  # all that is done: of many images, so rarely that it takes 5% of the time
                due = time.monotonic() + max(SAVE_SECONDS, 20 * (time.monotonic() - began))
    except BaseException:
        if save_to is not None and measured.done:
            measured.save(save_to)
        raise


def joined(
    measured: Measured, images: FeatureImages, state, networks=(), codes=None, V: int | None = None
) -> dict | None:
    """The numbers of all processes' images, as reconstruction.json holds them, on rank 0; None elsewhere.

    codes: the features' codes, a `NpyRows` of values in 0..V-1; None: they are not compared.
    """
    count = len(images)
    rows = {name: gathered(parts, count, state) for name, parts in measured.rows.items()}
    counts = counts_of(count, BATCH, state)
    statistics = {name: merge(one, counts, state) for name, one in measured.statistics.items()}
    if not state.is_main_process:
        return None
    result = dict(images=count, psnr=float(rows["psnr"].mean()), ssim=float(rows["ssim"].mean()))
    result["frechet_distances"] = {
        one.name: frechet_distance(*(statistics[f"{one.name}.{which}"] for which in SETS)) for one in networks
    }
    if codes is not None:
        wanted = codes.gather(images.rows, limit=V).astype(np.int64)
        result["code_agreement"] = token_agreement(wanted, rows["codes"].numpy(), V)
    return result


#################################################################################
#                                    Command                                    #
#################################################################################


def parse_args():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("features", help="FEATURES/, with a manifest.json")
    add("--data-path", required=True, help="folder of the images that the features were extracted from")
    add("--vae", help="VAE to reconstruct with: ema, mse, a directory or a hub id [that of the features]")
    add("--num-images", type=number(int, 2), help="use so many images, spread evenly over the features [all]")
    add(
        "--features",
        dest="networks",
        nargs="+",
        choices=[*NETWORKS, "encoder", "none"],
        default=["inception"],
        help="features of the Frechet distance; encoder: the SEM encoder's class and register tokens [inception]",
    )
    add("--inception", help="read Inception's weights from this file [torch's hub cache, or fetched]")
    add("--dinov2", help="read DINOv2's weights from this file [torch's hub cache, or fetched]")
    add_encoder_flags(add, None, " that made the codes; none: leave codes out; default: the one that the features name")
    add("--precision", choices=PRECISIONS, default="fp32", help="precision of the VAE")
    add("--out", help="write the numbers to this .json [FEATURES/reconstruction.json]")
    return parser, parser.parse_args()


def open_all(args, encoder, state) -> list:
    """The networks of --features. Raises ValueError where their weights are not to be had."""
    names = [] if args.networks == ["none"] else list(dict.fromkeys(args.networks))
    if "none" in names:
        raise ValueError("--features none goes with no other")
    if "encoder" in names and encoder is None:
        raise ValueError(
            "--features encoder needs the encoder of the features' codes: there are none, or it is left out"
        )
    networks = open_networks(args, [name for name in names if name in NETWORKS], state)
    return [networks[name] if name in networks else EncoderNetwork(encoder, state.device) for name in names]


def table_of(result: dict) -> list[str]:
    """The numbers as lines."""
    rows = [
        ("images", f"{result['images']:,}"),
        ("PSNR, dB", f"{result['psnr']:.3f}"),
        ("SSIM", f"{result['ssim']:.4f}"),
    ]
    for name, value in result["frechet_distances"].items():
        rows.append(("rFID" if name == "inception" else f"FD of {name} features", f"{value:.4f}"))
    if "code_agreement" in result:
        rows.append(("tokens kept", f"{result['code_agreement']['share']:.4f}"))
        rows.append(("tokens kept by chance", f"{result['code_agreement']['chance']:.4f}"))
    return [f"{name:28}{value:>12}" for name, value in rows]


def main():
    parser, args = parse_args()
    with parser.one_line_errors():
        check_weights_flags(args, args.networks)
        features = Features(args.features)
        images = FeatureImages(features, args.data_path, args.num_images)
        out = Path(args.out) if args.out else features.root / "reconstruction.json"
        check_writable(out, "--out")
        encoder, notes = None, []
        if features.codes is None and args.encoder not in (None, "none"):
            raise ValueError(f"--encoder {args.encoder}: features {args.features} hold no codes to compare with")
        if features.codes is not None and args.encoder != "none":
            encoder, notes = open_encoder_of(args, features.manifest, features.L, f"the codes of {args.features}")
        state = start_processes()
        vae, digest, more = open_vae(args.vae, features, state.device)
        networks = open_all(args, encoder, state)
        settings = dict(
            listing_sha256=features.manifest.listing_sha256,
            image_size=features.image_size,
            features_count=features.count,
            num_images=len(images),
            vae_sha256=digest,
            precision=args.precision,
            networks={one.name: one.digest for one in networks},
            encoder_sha256=weights_sha256(encoder) if encoder else None,
        )
        agree("features, VAE and networks", settings)
    logger = create_logger(state)
    for note in [*notes, *more, *(note for one in networks for note in one.notes)]:
        logger.info(f"note: {note}")
    measured = Measured(networks, encoder.L if encoder else None, settings)
    partial = out.with_name(f"{out.stem}.{state.process_index}-of-{state.num_processes}.partial.safetensors")
    measured.load(partial)
    with parser.kept_on_error("what is done is kept", "--precision", (ValueError, OSError)):
        read = CodeReader(encoder, state.device) if encoder else None
        measure(measured, images, Reconstructor(vae, state.device, args.precision), state, networks, read, partial)
        codes = features.codes if encoder else None
        result = joined(measured, images, state, networks, codes, encoder and encoder.V)
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
            for path in out.parent.glob(f"{out.stem}.*-of-*.partial.safetensors"):
                path.unlink()
            print(
                "\n".join([f"reconstructions of the images of {args.features} by {record['vae']}", *table_of(result)])
            )
            logger.info(f"written to {out}")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
