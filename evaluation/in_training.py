"""Metrics of a model in training (--eval-samples): samples of its EMA, compared with images of the rows they are for.

Samples are drawn for the conditions of held-out rows, or of rows that are trained on if none are held out, without
guidance and from the same noise every time. They are compared with what the VAE makes of these rows' latents: by the
Frechet distance of Inception's features where its weights are on this machine, else of DINOv2's, else of the encoder's;
and by the share of the codes' tokens that the encoder reads off them.
"""

from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from diffusion.process_table import Process
from dlc.data.codes import CodeSet, compare
from dlc.data.images import to_uint8
from dlc.data.inputs import Inputs
from dlc.machine.cli import warn_once
from dlc.machine.processes import done_by_rank_0
from dlc.nets.vae import check_decodes, decode
from dlc.sampling.latents import sample_latents
from dlc.training.batches import gather
from dlc.training.heldout import SEED, Measurement
from dlc.training.preview import preview_sampler
from dlc.training.split import Split
from dlc.weights.networks import load_encoder, load_vae
from evaluation.feature_networks import NETWORKS, feature_networks, weights_here
from evaluation.metrics import FeatureStatistics, frechet_distance
from evaluation.tokens import BATCH, EncoderNetwork, codes_of

if TYPE_CHECKING:
    from dlc.training.run import Run


class SampleMetrics(Measurement):
    """Draws as many samples as the flags say, and measures them.

    Args:
        run: the `Run`.
        split: the rows that are held out and those that are not.
        inputs: what the model is conditioned on there.
        process: what the model is trained on.
        vae: the name of the VAE of the latents.

    Raises ValueError where no network to compare by is on this machine, or the VAE cannot be loaded
    or does not decode these latents.
    """

    key = "frechet_distance"

    def __init__(self, run: "Run", split: Split, inputs: Inputs, process: Process, vae: str):
        super().__init__(run, run.args.eval_samples)
        features, self.inputs, self.process = split.other, inputs, process
        rows = split.heldout if len(split.heldout) else split.rows
        self.rows, self.shape = rows[self.places.numpy() % len(rows)], features.latent_shape
        self.arrays = dict(inputs.arrays, latents=features.latents)
        preview_sampler(process)  # raises, before the work, if there is none
        self.vae, self.reference = load_vae(vae, run.device), None
        check_decodes(self.vae, vae, self.shape[0], features.source(), "the features")
        encoder = None
        if features.codes is not None and features.manifest is not None and features.manifest.encoder:
            try:
                found = load_encoder(features.manifest.encoder)
                compare(CodeSet.of_features(features), codes_of(found, f"the encoder {features.manifest.encoder}"))
                encoder = found
            except (ValueError, OSError) as error:
                warn_once("agreement", f"samples are not compared with their codes: {error}")
        reader = EncoderNetwork(encoder, run.device) if encoder else None
        self.reader = reader if "codes" in self.inputs.arrays else None
        here = done_by_rank_0(run.state, lambda: [name for name in NETWORKS if weights_here(name)])
        if here:
            self.network = feature_networks(Namespace(weights=[]), here[:1], run.state)[here[0]]
        elif reader is not None:
            self.network = reader
        else:
            raise ValueError(
                f"--eval-samples compares by the features of {' or '.join(NETWORKS)}, whose weights are not on this "
                "machine, or of the encoder of the features' codes: evaluate.py fetches the former"
            )

    def split(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Batches for the networks that compare, unless a stop is asked for."""
        for some in rows.split(BATCH):
            self.run.go_on()
            yield some

    def decoded(self, latents: list[torch.Tensor]) -> torch.Tensor:
        """Latents (n, C, h, w) as images (n, H, W, 3) uint8, on the CPU."""
        whole = torch.cat(latents).to(self.run.device).float()
        return torch.cat([to_uint8(decode(self.vae, some)).cpu() for some in self.split(whole)])

    def statistics(self, images: torch.Tensor) -> FeatureStatistics:
        """Of the features of all processes' images; this one's are (n, H, W, 3)."""
        pool = torch.cat([self.network(some)["pool"] for some in self.split(images)])
        everywhere = self.run.accelerator.gather((pool, self.counted))
        return FeatureStatistics.of(everywhere[0][everywhere[1]].cpu())

    def drawn(self, ema: torch.nn.Module) -> tuple[list, list, list]:
        """Latents, conditions, and unless the reference has them the rows' own latents, by micro-batches, on the
        CPU."""
        run, samples, real, wanted = self.run, [], [], []
        sampler = preview_sampler(self.process)
        for start in range(0, len(self.rows), run.micro_batch_size):
            part = slice(start, start + run.micro_batch_size)
            batch = {name: one.to(run.device) for name, one in gather(self.arrays, self.rows[part]).items()}
            y = self.inputs.of(batch)
            drawing = dict(y=y, seed=SEED, indices=self.places[part].to(run.device), on_step=run.go_on)
            samples.append(sample_latents(ema, sampler, **drawing).cpu())
            wanted += [batch["codes"].cpu()] if self.reader else []
            real += [] if self.reference else [batch["latents"][:, : self.shape[0]].cpu()]
        return samples, wanted, real

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """Draw, measure, and write a line. Every process calls this."""
        with self.run.whole_ema(everywhere=True) as ema:
            with self.run.accelerator.autocast():
                samples, wanted, real = self.drawn(ema)
            images = self.decoded(samples)
            if self.reference is None:
                self.reference = self.statistics(self.decoded(real))
            distance = frechet_distance(self.statistics(images), self.reference)
            words = f"{self.size:,} samples, Frechet distance {distance:.4f} ({self.network.name})"
            line = dict(samples=self.size, features=self.network.name, frechet_distance=distance)
            if self.reader:
                found = torch.cat([self.reader(some)["codes"] for some in self.split(images)])
                share = (found == torch.cat(wanted)).double().mean(dim=1).to(self.run.device)
                agreeing = self.run.accelerator.reduce(share[self.counted].sum(), "sum").item()
                line["code_agreement"] = agreeing / self.size
                words += f", code agreement {line['code_agreement']:.4f}"
            self.note(step, line, words)
