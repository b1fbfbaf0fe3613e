"""What each sample is drawn for: a class, a code or a vector, as a function of (global seed, sample index)."""

import hashlib

import numpy as np
import torch

from dlc.disk import recorded_id
from dlc.features.rows import NpyRows, check_finite, open_vectors
from dlc.noise import Stream, integers, permutation
from dlc.sampling.code_folder import finished_record, load_codes, open_codes
from dlc.sampling.prior import PriorCodes
from dlc.sampling.prior_options import PriorOptions, add_prior_flags

__all__ = ["CONDITIONINGS", "conditions_sha256", "load_codes", "open_codes"]


def conditions_sha256(conditions, count: int) -> str:
    """A digest of what samples 0..count-1 are drawn for, which also reads and checks all of it.

    Of codes that are yet to be drawn it is the digest of all that decides them.
    """
    if isinstance(conditions, PriorCodes):
        return conditions.digest
    digest = hashlib.sha256()
    for start in range(0, count, 4096):
        digest.update(conditions(np.arange(start, min(start + 4096, count))).numpy())
    return digest.hexdigest()


#################################################################################
#                          One class per conditioning                           #
#################################################################################


class RowConditions:
    """Conditions that are rows of files: sample i gets row order(i), cycling where there are fewer rows than samples.

    Args:
        rows: a `NpyRows`.
        what: what a row is, in the plural.
        order: "random", a permutation of all rows keyed by the seed, or "sequential".
    """

    def __init__(self, source, rows: NpyRows, what: str, order: str, seed: int):
        self.source, self.rows, self.what, self.order_name = recorded_id(str(source)), rows, what, order
        self.order = permutation(seed, Stream.SAMPLE_ORDER, 0, len(rows)) if order == "random" else np.arange(len(rows))

    def describe(self) -> str:
        return f"{len(self.order):,} {self.what} of {self.source} in {self.order_name} order"

    @staticmethod
    def described(what: str) -> str:
        """A regular expression of what `describe` says of such rows: its groups are the source and the order."""
        return rf"[\d,]+ {what} of (.+) in (random|sequential) order"

    def values(self, indices: np.ndarray) -> np.ndarray:
        """The row of each sample, (N,)."""
        return self.order[indices % len(self.order)]


class ComputedCodes(RowConditions):
    """Discrete latent codes that were computed before: rows of a features directory, a folder or a file.

    Args:
        source: as in `open_codes`.
        meta: of the model's checkpoint, to compare the encoders.
        order, seed: as in `RowConditions`.

    Raises ValueError where the source has no codes, or not such as the model was trained on.
    """

    key, script = "code_rows", "sample_ddp_computed_dlc.py"
    flags, notes = ("--dlc-dir", "--prior"), ()

    @staticmethod
    def add_flags(add) -> None:
        add(
            "--dlc-dir",
            "--sem-dir",
            help="DiTSEM only: codes, as a features directory, a folder of .npy or of .pt "
            "files (n, L) or (n, k, L), or one such file [the features it was trained "
            "on]",
        )
        add(
            "--dlc-order",
            "--condition-order",
            choices=["random", "sequential"],
            default="random",
            help="row of sample i: entry i of a seeded permutation, or row i; cycling [%(default)s]",
        )
        add(
            "--prior",
            metavar="CKPT",
            help="DiTSEM only: draw the codes from this prior first, as sample_prior.py does, into a folder beside the "
            "samples; sample i gets code i [none]",
        )
        add_prior_flags(add, "prior-")

    @classmethod
    def open(cls, args, model, meta) -> "ComputedCodes | PriorCodes":
        options = PriorOptions.of(args, "prior-")
        if args.prior:
            if args.dlc_dir:
                raise ValueError("--prior draws codes, --dlc-dir names codes that are there: give one of them")
            return PriorCodes(args, options, model, meta)
        if options != PriorOptions():
            raise ValueError("the flags --prior-... say how to draw from a prior: name it with --prior")
        source = args.dlc_dir or meta.features_path
        if source is None:
            raise ValueError("this checkpoint does not say which features it was trained on: name codes with --dlc-dir")
        return cls(source, model, meta, args.dlc_order, args.global_seed)

    def __init__(self, source, model, meta, order: str, seed: int):
        codes, features = open_codes(source)
        super().__init__(source, codes, "codes", order, seed)
        self.V = model.sem_embedder.V
        # of extracted codes, or of drawn ones
        origin = features.manifest if features is not None else finished_record(source)
        if origin is not None and origin.V != self.V:
            raise ValueError(f"codes of {source} have V={origin.V}, the checkpoint's model V={self.V}")
        encoder, models_encoder = origin and origin.encoder_sha256, meta.encoder_sha256
        if encoder is None or models_encoder is None:
            self.notes = [
                f"{'the codes do' if encoder is None else 'the checkpoint does'} not say which encoder made "
                "them: it was not compared"
            ]
        elif encoder != models_encoder:
            raise ValueError(f"codes of {source} come from another encoder than those the model was trained on")
        L = codes.array(0).shape[1]
        if L != model.sem_embedder.L:
            raise ValueError(f"codes of {source} have L={L}, the checkpoint's model L={model.sem_embedder.L}")

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        """Codes (N, L) int64 of the samples. Raises ValueError, naming file and row, for a value outside 0..V-1."""
        return torch.from_numpy(self.rows.gather(self.values(indices), limit=self.V).astype(np.int64))


class ComputedVectors(RowConditions):
    """Vectors that were computed before, of another encoder, say: rows of `.npy` files (n, in_dim).

    They need not be those that the model was trained on, so nothing but their width is compared with the checkpoint.

    Raises ValueError where the source has no vectors, or of another width than the model's.
    """

    key, script = "vector_rows", "sample_ddp_computed_dlc.py"
    flags, notes = ("--condition-path",), ()

    @staticmethod
    def add_flags(add) -> None:
        add(
            "--condition-path",
            help="DiTCONT only: a folder of .npy files of vectors (n, in_dim), or one such file; "
            "sample i gets a row as --dlc-order says [none]",
        )

    @classmethod
    def open(cls, args, model, meta) -> "ComputedVectors":
        if not args.condition_path:
            raise ValueError(f"{args.model} is conditioned on vectors: name them with --condition-path")
        return cls(args.condition_path, model, args.dlc_order, args.global_seed)

    def __init__(self, source, model, order: str, seed: int):
        super().__init__(source, open_vectors(source), "vectors", order, seed)
        width, wanted = self.rows.array(0).shape[1], model.y_embedder.embedding_table.in_features
        if width != wanted:
            raise ValueError(f"vectors of {source} have in_dim={width}, the checkpoint's model in_dim={wanted}")

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        """Vectors (N, in_dim) float32. Raises ValueError, naming file and row, for one that is not finite."""
        rows = self.values(indices)
        with np.errstate(over="ignore"):  # of float64, becoming infinite: refused next
            vectors = self.rows.gather(rows).astype(np.float32)
        check_finite(vectors, lambda i: self.rows.locate(rows[i]))
        return torch.from_numpy(vectors)


class ClassLabels:
    """A class for each sample: "random", or "equal", its index modulo the number of classes, so each equally often."""

    key, script = "labels", "sample_ddp.py"
    flags, notes = ("--label-sampling",), ()

    @staticmethod
    def add_flags(add) -> None:
        add(
            "--label-sampling",
            choices=["random", "equal"],
            default="random",
            help="class of sample i: drawn uniformly, or i modulo the classes, so that each is drawn equally often "
            "[%(default)s]",
        )

    @classmethod
    def open(cls, args, model, meta) -> "ClassLabels":
        return cls(model, args.label_sampling, args.global_seed)

    def __init__(self, model, sampling: str, seed: int):
        self.num_classes, self.sampling, self.seed = model.y_embedder.num_classes, sampling, seed

    def describe(self) -> str:
        return f"{self.sampling} labels of {self.num_classes} classes"

    def values(self, indices: np.ndarray) -> np.ndarray:
        """The label of each sample, (N,)."""
        return self(indices).numpy()

    def __call__(self, indices: np.ndarray) -> torch.Tensor:
        """Labels (N,) int64 of the samples."""
        indices = torch.from_numpy(indices)
        if self.sampling == "equal":
            return indices % self.num_classes
        return integers(self.seed, Stream.SAMPLE_LABEL, indices, self.num_classes)


# By a model's `conditioning`. A class has
#   key, script     under which samples.json lists values(indices), and which draws from such models
#   flags           of its own, which other models are refused; add_flags(add) adds them to the script's parser
#   open(args, model, meta)     gives the object; its notes say what could not be compared with the checkpoint
#   describe()      what samples.json says of the source, and compares
#   __call__(indices)           the conditions y of these samples, a tensor
# PriorCodes takes the place of ComputedCodes with --prior.
CONDITIONINGS = {"labels": ClassLabels, "codes": ComputedCodes, "vectors": ComputedVectors}
