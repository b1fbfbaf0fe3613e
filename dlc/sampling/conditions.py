"""What each sample is drawn for: a class, a code or a vector, as a function of (global seed, sample index)."""

import hashlib
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from dlc.data.codes import SHARD, CodeSpec, compare
from dlc.data.rows import NpyRows, open_rows
from dlc.machine.cli import NotHere, excludes
from dlc.machine.files import recorded_id
from dlc.machine.noise import Stream, integers, permutation
from dlc.machine.processes import done_by_rank_0
from dlc.sampling.code_folder import CodeFolder, open_codes
from dlc.sampling.prior_draw import PriorDraw, draw_into
from dlc.sampling.prior_options import PriorOptions, class_number, prior_flags
from dlc.weights.meta import RunMeta
from models import DiT

if TYPE_CHECKING:
    from accelerate import PartialState

    from dlc.sampling.samples_record import SampleFolder


class Conditions:
    """What samples are drawn for. Called with indices (N,) it gives their conditions y, a tensor (N, ...) or a tree.

    A tree is for example a dict of tensors {"codes": (N, L), "text": (N, T, D)}; see `model.embed_condition`. Made from
    (args, model, meta): the flags, and the model and its RunMeta.

    Attributes, beside the methods below:
        key, script: the key of samples.json that lists values(indices); the script that draws from such models.
        flags: of that script, the arguments of `add_argument` by names; only such models take them.
        recorded: the object in samples.json: `kind`, `source`, and everything else that decides them.
        said: what samples are drawn for, in words for the log.
        notes: what could not be compared with the checkpoint, lines.
        block: samples whose conditions are made together, so that one part of a set draws them.
    """

    key: str
    script: str
    flags: dict[str, dict] = {}
    recorded: dict
    said: str
    notes: Sequence[str] = ()
    block: int = 1

    def digest(self, count: int) -> str | None:
        """A digest of samples 0..count-1, all of which are read and checked; None where `recorded` decides them."""
        digest = hashlib.sha256()
        for start in range(0, count, 4096):
            for leaf in tree_leaves(self(np.arange(start, min(start + 4096, count)))):
                digest.update(leaf.numpy())
        return digest.hexdigest()

    def prepare(self, folder: "SampleFolder", state: "PartialState", launch: dict) -> None:
        """Make what has to exist before the first call, of the folder's part. Every process calls this."""

    def words(self, indices: np.ndarray) -> list[str]:
        """What each sample is drawn for, in a word or two for the contact sheet; "" where there is nothing to say."""
        return [""] * len(indices)

    def latents(self, indices: np.ndarray, vae_sha256: str) -> torch.Tensor | None:
        """Latents (N, C, h, w) float32 of the images that samples are drawn for; None if this VAE made none."""
        return None


class RowConditions(Conditions):
    """Conditions that are rows of files: sample i gets row order(i), cycling where there are fewer rows than samples.

    Args:
        kind: what a row is, in the plural.
        order: "random", a permutation of all rows keyed by the seed, or "sequential".
        recorded: more keys of the object in samples.json.
    """

    script = "sample_ddp_computed_dlc.py"
    flags = {
        "--dlc-order --condition-order": dict(
            choices=["random", "sequential"],
            help="draw sample i for entry i of a seeded permutation of the rows, or for row i, cycling [random]",
        )
    }

    def __init__(self, kind: str, source: str | Path, rows: NpyRows, order: str | None, seed: int, **recorded):
        self.source, self.rows, order = recorded_id(str(source)), rows, order or "random"
        self.order = permutation(seed, Stream.SAMPLE_ORDER, 0, len(rows)) if order == "random" else np.arange(len(rows))
        self.recorded = dict(kind=kind, source=self.source, count=len(rows), order=order, **recorded)
        self.said = f"{len(rows):,} {kind} of {self.source} in {order} order"

    def values(self, indices: np.ndarray) -> np.ndarray:
        """The row of each sample, (N,)."""
        return self.order[indices % len(self.order)]

    def words(self, indices: np.ndarray) -> list[str]:
        return [f"row {row}" for row in self.values(indices)]


def compare_with_model(codes: CodeSpec, model: DiT, meta: RunMeta) -> list[str]:
    """See `compare`: codes and those that a DiTSEM was trained on, by its checkpoint's meta."""
    L, V = model.sem_embedder.L, model.sem_embedder.V
    return compare(codes, CodeSpec(owner="the checkpoint's model", L=L, V=V, encoder_sha256=meta.encoder_sha256))


class ComputedCodes(RowConditions):
    """Discrete latent codes that were computed before: rows of a source as in `open_codes`.

    Raises ValueError where the source has no codes, or not such as the model was trained on.
    """

    key = "code_rows"
    flags = {
        "--dlc-dir --sem-dir": dict(
            help="DiTSEM only: draw for these codes: a features directory, a folder of .npy or of .pt files (n, L) or "
            "(n, k, L), or one such file [the features that the checkpoint was trained on]"
        ),
        "--dino-cfg": dict(action=NotHere, help="leave it out: L and V come from the checkpoint"),
        **RowConditions.flags,
        "--prior": dict(
            metavar="CKPT",
            help="DiTSEM only: draw the codes from this prior first, as sample_prior.py does, into a folder beside the "
            "samples; sample i gets code i [none]",
        ),
        **prior_flags("prior-"),
    }

    def __init__(self, args: Namespace, model: DiT, meta: RunMeta):
        if PriorOptions.of(args, "prior-") != PriorOptions():
            raise ValueError("the flags --prior-... say how to draw from a prior: name it with --prior")
        source = args.dlc_dir or meta.features_path
        if source is None:
            raise ValueError("this checkpoint does not say which features it was trained on: name codes with --dlc-dir")
        codes = open_codes(source)
        self.features = codes.features
        self.V, self.notes = model.sem_embedder.V, compare_with_model(codes, model, meta)
        codes.rows.limit = self.V
        known = dict(L=codes.L, V=self.V, encoder_sha256=codes.encoder_sha256)
        super().__init__("codes", source, codes.rows, args.dlc_order, args.global_seed, **known)

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        """Codes (N, L) int64 of the samples. Raises ValueError, naming file and row, for a value outside 0..V-1."""
        return torch.from_numpy(self.rows.gather(self.values(indices)).astype(np.int64))

    def latents(self, indices: np.ndarray, vae_sha256: str) -> torch.Tensor | None:
        if self.features is None or self.features.source()["vae_sha256"] != vae_sha256:
            return None
        stored = self.features.latents.gather(self.values(indices))  # of moments: the mean, then the std
        return torch.from_numpy(stored[:, : self.features.latent_shape[0]]).float()


class PriorCodes(Conditions):
    """The codes of a prior, in the place of `ComputedCodes`: sample i gets code i. `prepare` draws them into a folder.

    Raises ValueError where the prior's codes are not such as the model was trained on.
    """

    key, block = ComputedCodes.key, SHARD

    def __init__(self, args: Namespace, model: DiT, meta: RunMeta):
        excludes(args, "prior", "dlc_dir")
        if args.dlc_order == "random":
            raise ValueError("--dlc-order random: with --prior, sample i gets code i: leave it out")
        options = PriorOptions.of(args, "prior-")
        settings = dict(seed=args.global_seed, precision=args.precision, tf32=args.tf32)
        self.draw, self.compiled = PriorDraw(args.prior, args.ema, options, **settings), args.compile
        self.notes = compare_with_model(self.draw.spec, model, meta)
        self.record = record = self.draw.record(args.num_fid_samples)
        self.recorded = dict(kind="codes", source=record.checkpoint, prior=record.settings())
        how = "{sampler}, {steps} steps".format(**record.options)
        self.said = f"codes drawn from {record.model} of {record.checkpoint}: {how}"

    def digest(self, count: int) -> None:
        """None: the codes are yet to be drawn."""

    def values(self, indices: np.ndarray) -> np.ndarray:
        return indices

    def words(self, indices: np.ndarray) -> list[str]:
        return [f"class {self.record.labels[i]}" for i in indices] if self.record.labels else super().words(indices)

    def prepare(self, folder: "SampleFolder", state: "PartialState", launch: dict) -> None:
        self.folder = folder
        codes = CodeFolder(folder.codes, self.record.num, folder.part, folder.block // SHARD)
        missing = done_by_rank_0(state, lambda: codes.open(self.record, launch))
        draw_into(codes, missing, self.draw, state, compiled=self.compiled)
        done_by_rank_0(state, codes.finish)
        self.rows, self.draw = codes.rows(), None  # the prior's memory is free

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        """Codes (N, L) int64 of the samples, once they are prepared. Those of other parts, which may be missing, are
        the first one's: a batch at the edge of a block is drawn whole, but only its own samples are written."""
        own = self.folder.part.share(indices.tolist(), self.folder.block)
        indices = np.where(np.isin(indices, own), indices, own[0])
        return torch.from_numpy(self.rows.gather(indices).astype(np.int64))


class ComputedVectors(RowConditions):
    """Vectors that were computed before, for example by another encoder: rows of `.npy` files (n, in_dim).

    They need not be those that the model was trained on. Raises ValueError where there are none of its width.
    """

    key = "vector_rows"
    flags = {
        "--condition-path": dict(
            help="DiTCONT only: draw for these vectors: a folder of .npy files (n, in_dim), or one such file; "
            "--dlc-order sets the row of sample i [none]"
        ),
        **RowConditions.flags,
    }

    def __init__(self, args: Namespace, model: DiT, meta: RunMeta):
        source = args.condition_path
        if not source:
            raise ValueError(f"{args.model} is conditioned on vectors: name them with --condition-path")
        rows = open_rows("--condition-path", source, 1, "f")
        width, wanted = rows.array(0).shape[1], model.y_embedder.embedding_table.in_features
        super().__init__("vectors", source, rows, args.dlc_order, args.global_seed, in_dim=width)
        if width != wanted:
            raise ValueError(f"vectors of {source} have in_dim={width}, the checkpoint's model in_dim={wanted}")

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        """Vectors (N, in_dim) float32. Raises ValueError, naming file and row, for one that is not finite."""
        rows = self.values(indices)
        vectors = self.rows.gather(rows)
        self.rows.check_values(vectors, rows)
        return torch.from_numpy(vectors.astype(np.float32))


class ClassLabels(Conditions):
    """A class for each sample: "random"; "equal", its index modulo the number of classes, so each equally often; or
    "given", each of some classes in turn."""

    key, script = "labels", "sample_ddp.py"
    flags = {
        "--label-sampling": dict(
            choices=["random", "equal"],
            help="draw the class of sample i uniformly, or take i modulo the number of classes, each class equally "
            "often [random]",
        ),
        "--class": dict(
            dest="classes",
            nargs="+",
            help="draw these classes in turn, given by number or, if the model's run recorded the names, by name [any "
            "class]",
        ),
    }

    def __init__(self, args: Namespace, model: DiT, meta: RunMeta):
        if args.classes and args.label_sampling:
            raise ValueError("--class says which classes to draw, --label-sampling draws all: give one of them")
        self.num_classes, self.seed, names = model.y_embedder.num_classes, args.global_seed, meta.noted.get("classes")
        self.names = names if isinstance(names, list) and len(names) == self.num_classes else None
        given = [class_number(one, self.num_classes, self.names or ()) for one in args.classes or ()]
        self.given, self.order = torch.tensor(given), "given" if given else args.label_sampling or "random"
        self.recorded = dict(kind="labels", num_classes=self.num_classes, order=self.order)
        self.said = f"{self.order} labels of {self.num_classes} classes"
        if given:
            self.recorded["given"] = given
            named = [f"{one} {self.names[one]!r}" if self.names else str(one) for one in given]
            self.said = f"class {', '.join(named)} of {self.num_classes} classes"

    def values(self, indices: np.ndarray) -> np.ndarray:
        """The label of each sample, (N,)."""
        return self(indices).numpy()

    def words(self, indices: np.ndarray) -> list[str]:
        return [self.names[label] if self.names else f"class {label}" for label in self.values(indices)]

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        """Labels (N,) int64 of the samples."""
        indices = torch.from_numpy(indices)
        if len(self.given):
            return self.given[indices % len(self.given)]
        if self.order == "equal":
            return indices % self.num_classes
        return integers(self.seed, Stream.SAMPLE_LABEL, indices, self.num_classes)


# By a model's `conditioning`.
CONDITIONINGS = {"labels": ClassLabels, "codes": ComputedCodes, "vectors": ComputedVectors}


def open_conditions(args: Namespace, model: DiT, meta: RunMeta) -> Conditions:
    """What the flags say that a model's samples are drawn for."""
    kind = PriorCodes if getattr(args, "prior", None) else CONDITIONINGS[model.conditioning]
    return kind(args, model, meta)
