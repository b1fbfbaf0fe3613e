"""What each sample is drawn for: a class, a code or a vector, as a function of (global seed, sample index)."""

import hashlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from dlc.data.codes import SHARD, CodeSpec, compare
from dlc.data.rows import NpyRows, open_rows
from dlc.machine.cli import NotHere
from dlc.machine.files import recorded_id
from dlc.machine.noise import Stream, integers, permutation
from dlc.machine.processes import done_by_rank_0, wait_for_all
from dlc.sampling.code_folder import CodeFolder, open_codes, refuse_changed
from dlc.sampling.prior_draw import PriorDraw, draw_into
from dlc.sampling.prior_options import PriorOptions, add_prior_flags, flags_of
from dlc.weights.meta import RunMeta
from models import DiT

if TYPE_CHECKING:
    from accelerate import PartialState

    from dlc.sampling.samples_record import SampleFolder


class Conditions:
    """What samples are drawn for. Called with indices (N,) it gives their conditions y, a tensor (N, ...) or a tree.

    A tree is for example a dict of tensors {"codes": (N, L), "text": (N, T, D)}; see `model.embed_condition`.

    Attributes and methods beside those below:
        key, script: the key of samples.json that lists values(indices); the script that draws from such models.
        flags: those that only such models take; add_flags(add) adds them to the script's parser.
        open(args, model, meta): returns the object.
        recorded: the object in samples.json: `kind`, `source`, and everything else that decides them.
        sentence: a format string that makes the line of the log from `recorded`.
        notes: what could not be compared with the checkpoint, lines.
        block: samples whose conditions are made together, so that one part of a set draws them.
    """

    key: str
    script: str
    flags: tuple[str, ...] = ()
    recorded: dict
    sentence: str
    notes: Sequence[str] = ()
    block: int = 1

    def describe(self) -> str:
        """What samples are drawn for, in words."""
        return self.sentence.format(**self.recorded)

    def digest(self, count: int) -> str | None:
        """A digest of the conditions of samples 0..count-1, which reads and checks all of them.

        None where `recorded` alone decides them.
        """
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

    sentence = "{count:,} {kind} of {source} in {order} order"

    def __init__(self, kind: str, source: str | Path, rows: NpyRows, order: str, seed: int, **recorded):
        self.source, self.rows = recorded_id(str(source)), rows
        self.order = permutation(seed, Stream.SAMPLE_ORDER, 0, len(rows)) if order == "random" else np.arange(len(rows))
        self.recorded = dict(kind=kind, source=self.source, count=len(rows), order=order, **recorded)

    def values(self, indices: np.ndarray) -> np.ndarray:
        """The row of each sample, (N,)."""
        return self.order[indices % len(self.order)]

    def words(self, indices: np.ndarray) -> list[str]:
        """See `Conditions`."""
        return [f"row {row}" for row in self.values(indices)]


def compare_with_model(codes: CodeSpec, model: DiT, meta: RunMeta) -> list[str]:
    """See `compare`: codes and those that a DiTSEM was trained on, by its checkpoint's meta."""
    L, V = model.sem_embedder.L, model.sem_embedder.V
    return compare(codes, CodeSpec(owner="the checkpoint's model", L=L, V=V, encoder_sha256=meta.encoder_sha256))


class ComputedCodes(RowConditions):
    """Discrete latent codes that were computed before: rows of a source as in `open_codes`.

    Raises ValueError where the source has no codes, or not such as the model was trained on.
    """

    key, script = "code_rows", "sample_ddp_computed_dlc.py"
    flags = ("--dlc-dir", "--prior", *(f"--prior-{flags_of(one)[0]}" for one in fields(PriorOptions)))

    @staticmethod
    def add_flags(add: Callable) -> None:
        add(
            "--dlc-dir",
            "--sem-dir",
            help="DiTSEM only: draw for these codes: a features directory, a folder of .npy or of .pt files (n, L) or "
            "(n, k, L), or one such file [the features that the checkpoint was trained on]",
        )
        add("--dino-cfg", action=NotHere, help="leave it out: L and V come from the checkpoint")
        add(
            "--dlc-order",
            "--condition-order",
            choices=["random", "sequential"],
            help="draw sample i for entry i of a seeded permutation of the rows, or for row i, cycling [random]",
        )
        add(
            "--prior",
            metavar="CKPT",
            help="DiTSEM only: draw the codes from this prior first, as sample_prior.py does, into a folder beside the "
            "samples; sample i gets code i [none]",
        )
        add_prior_flags(add, "prior-")

    @classmethod
    def open(cls, args: Namespace, model: DiT, meta: RunMeta) -> "ComputedCodes | PriorCodes":
        options = PriorOptions.of(args, "prior-")
        if args.prior:
            if args.dlc_dir:
                raise ValueError("--prior draws codes, --dlc-dir names existing codes: give one of them")
            if args.dlc_order == "random":
                raise ValueError("--dlc-order random: with --prior, sample i gets code i: leave it out")
            return PriorCodes(args, options, model, meta)
        if options != PriorOptions():
            raise ValueError("the flags --prior-... say how to draw from a prior: name it with --prior")
        source = args.dlc_dir or meta.features_path
        if source is None:
            raise ValueError("this checkpoint does not say which features it was trained on: name codes with --dlc-dir")
        return cls(source, model, meta, args.dlc_order or "random", args.global_seed)

    def __init__(self, source: str | Path, model: DiT, meta: RunMeta, order: str, seed: int):
        codes = open_codes(source)
        refuse_changed(source, codes.rows)
        self.features = codes.features
        self.V, self.notes = model.sem_embedder.V, compare_with_model(codes, model, meta)
        codes.rows.limit = self.V
        known = dict(L=codes.L, V=self.V, encoder_sha256=codes.encoder_sha256)
        super().__init__("codes", source, codes.rows, order, seed, **known)

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        """Codes (N, L) int64 of the samples. Raises ValueError, naming file and row, for a value outside 0..V-1."""
        return torch.from_numpy(self.rows.gather(self.values(indices)).astype(np.int64))

    def latents(self, indices: np.ndarray, vae_sha256: str) -> torch.Tensor | None:
        """See `Conditions`: those of the features."""
        if self.features is None or self.features.source()["vae_sha256"] != vae_sha256:
            return None
        stored = self.features.latents.gather(self.values(indices))  # of moments: the mean, then the std
        return torch.from_numpy(stored[:, : self.features.latent_shape[0]]).float()


class PriorCodes(Conditions):
    """The codes of a prior, in the place of `ComputedCodes`: sample i gets code i. `prepare` draws them into a folder.

    Raises ValueError where the prior's codes are not such as the model was trained on.
    """

    key, block = ComputedCodes.key, SHARD
    sentence = "codes drawn from {prior[model]} of {source}: {prior[options][sampler]}, {prior[options][steps]} steps"

    def __init__(self, args: Namespace, options: PriorOptions, model: DiT, meta: RunMeta):
        settings = dict(seed=args.global_seed, precision=args.precision, tf32=args.tf32)
        self.draw, self.compiled = PriorDraw(args.prior, args.ema, options, **settings), args.compile
        self.notes = compare_with_model(self.draw.spec, model, meta)
        self.record = self.draw.record(args.num_fid_samples)
        self.recorded = dict(kind="codes", source=self.record.checkpoint, prior=self.record.settings())

    def digest(self, count: int) -> None:
        """See `Conditions`: the codes are yet to be drawn."""

    def values(self, indices: np.ndarray) -> np.ndarray:
        """The row of each sample in the folder of codes, (N,)."""
        return indices

    def words(self, indices: np.ndarray) -> list[str]:
        """See `Conditions`: the class, of a prior that was asked for classes."""
        return [f"class {self.record.labels[i]}" for i in indices] if self.record.labels else super().words(indices)

    def prepare(self, folder: "SampleFolder", state: "PartialState", launch: dict) -> None:
        """Draw those codes that are not there yet."""
        self.folder, self.codes = folder, CodeFolder(folder.codes, folder.part, folder.block // SHARD)
        missing = done_by_rank_0(state, lambda: self.codes.open(self.record, launch))
        draw_into(self.codes, missing, self.draw, self.record.num, state, compiled=self.compiled)
        wait_for_all()
        done_by_rank_0(state, self.codes.finish)
        self.draw = None  # frees the prior's memory

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        """Codes (N, L) int64 of the samples, once they are prepared. Those of other parts, which may be missing, are
        the first one's: a batch at the edge of a block is drawn whole, but only its own samples are written."""
        own = self.folder.part.share(indices.tolist(), self.folder.block)
        indices = np.where(np.isin(indices, own), indices, own[0])
        return torch.from_numpy(self.codes.gather(indices).astype(np.int64))


class ComputedVectors(RowConditions):
    """Vectors that were computed before, for example by another encoder: rows of `.npy` files (n, in_dim).

    They need not be those that the model was trained on. Raises ValueError where there are none of its width.
    """

    key, script = "vector_rows", "sample_ddp_computed_dlc.py"
    flags = ("--condition-path",)

    @staticmethod
    def add_flags(add: Callable) -> None:
        add(
            "--condition-path",
            help="DiTCONT only: draw for these vectors: a folder of .npy files (n, in_dim), or one such file; "
            "--dlc-order sets the row of sample i [none]",
        )

    @classmethod
    def open(cls, args: Namespace, model: DiT, meta: RunMeta) -> "ComputedVectors":
        if not args.condition_path:
            raise ValueError(f"{args.model} is conditioned on vectors: name them with --condition-path")
        return cls(args.condition_path, model, args.dlc_order or "random", args.global_seed)

    def __init__(self, source: str | Path, model: DiT, order: str, seed: int):
        rows = open_rows("--condition-path", source, 1, "f")
        width, wanted = rows.array(0).shape[1], model.y_embedder.embedding_table.in_features
        super().__init__("vectors", source, rows, order, seed, in_dim=width)
        if width != wanted:
            raise ValueError(f"vectors of {source} have in_dim={width}, the checkpoint's model in_dim={wanted}")

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        """Vectors (N, in_dim) float32. Raises ValueError, naming file and row, for one that is not finite."""
        rows = self.values(indices)
        with np.errstate(over="ignore"):  # of float64, becoming infinite: refused next
            vectors = self.rows.gather(rows).astype(np.float32)
        self.rows.check_values(vectors, rows)
        return torch.from_numpy(vectors)


class ClassLabels(Conditions):
    """A class for each sample: "random"; "equal", its index modulo the number of classes, so each equally often; or
    "given", each of some classes in turn.

    Args:
        given: those classes [none].
        names: of all classes, if they are known.
    """

    key, script = "labels", "sample_ddp.py"
    flags = ("--label-sampling",)

    @staticmethod
    def add_flags(add: Callable) -> None:
        add(
            "--label-sampling",
            choices=["random", "equal"],
            help="draw the class of sample i uniformly, or take i modulo the number of classes, each class equally "
            "often [random]",
        )
        add(
            "--class",
            dest="classes",
            nargs="+",
            help="draw these classes in turn, given by number or, if the model's run recorded the names, by name [any "
            "class]",
        )

    @classmethod
    def open(cls, args: Namespace, model: DiT, meta: RunMeta) -> "ClassLabels":
        asked, order = args.classes, args.label_sampling
        if asked and order:
            raise ValueError("--class says which classes to draw, --label-sampling draws all: give one of them")
        count = model.y_embedder.num_classes
        names = class_names(count, meta)
        given = class_numbers(asked or (), count, names or ())
        return cls(model, "given" if asked else order or "random", args.global_seed, given, names)

    def __init__(
        self, model: DiT, sampling: str, seed: int, given: Sequence[int] = (), names: Sequence[str] | None = None
    ):
        self.num_classes, self.sampling, self.seed = model.y_embedder.num_classes, sampling, seed
        self.given, self.names = torch.tensor(given, dtype=torch.int64), names
        self.recorded = dict(kind="labels", num_classes=self.num_classes, order=sampling)
        if given:
            self.recorded["given"] = list(given)

    def describe(self) -> str:
        """See `Conditions`."""
        given = [f"{one} {self.names[one]!r}" if self.names else str(one) for one in self.given.tolist()]
        which = f"class {', '.join(given)}" if given else f"{self.sampling} labels"
        return f"{which} of {self.num_classes} classes"

    def values(self, indices: np.ndarray) -> np.ndarray:
        """The label of each sample, (N,)."""
        return self(indices).numpy()

    def words(self, indices: np.ndarray) -> list[str]:
        """See `Conditions`: the class."""
        return [self.names[label] if self.names else f"class {label}" for label in self.values(indices)]

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        """Labels (N,) int64 of the samples."""
        indices = torch.from_numpy(indices)
        if len(self.given):
            return self.given[indices % len(self.given)]
        if self.sampling == "equal":
            return indices % self.num_classes
        return integers(self.seed, Stream.SAMPLE_LABEL, indices, self.num_classes)


def class_names(num_classes: int, meta: RunMeta) -> list[str] | None:
    """The names of a model's classes, as its run recorded them; None if it did not."""
    names = meta.noted.get("classes")
    return names if isinstance(names, list) and len(names) == num_classes else None


def class_numbers(asked: Sequence[str], num_classes: int, names: Sequence[str]) -> list[int]:
    """The numbers of classes that a user names by number or by name.

    Args:
        asked, names: what the user says, and what all classes are called; () where that is not known.

    Raises ValueError for what is neither.
    """
    numbers = []
    for one in asked:
        if one.isdecimal() and int(one) < num_classes:
            numbers.append(int(one))
        elif one in names:
            numbers.append(names.index(one))
        else:
            known = f"or names such as {names[0]}" if names else "and their names are not known"
            raise ValueError(f"--class {one}: the model's classes are 0 to {num_classes - 1}, {known}")
    return numbers


# By a model's `conditioning`.
CONDITIONINGS = {"labels": ClassLabels, "codes": ComputedCodes, "vectors": ComputedVectors}
