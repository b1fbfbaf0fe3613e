"""FEATURES/manifest.json: what the rows are, how they were made, and which shards hold them."""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from dlc.machine.files import is_plain_name
from dlc.machine.records import TEXT, Record, key, list_of, one_of, or_null, real_number, whole_number

DTYPES = ("float16", "float32")  # of stored latents
LATENTS = ("sample", "mean", "moments")  # of the VAE's posterior; moments: mean, then std


@dataclass(frozen=True)
class ArrayKind:
    """A kind of array in FEATURES/: the files imagenet{S}_{name}/{shard}.npy, whose row i belongs to image i."""

    ndim: int  # dimensions of one row
    dtype: str  # NumPy's letters for its types: "f" floats, "ui" integers, "U" text
    needed: bool = False  # in every features directory; others are read where their folder is there


# To store more per image, such as text tokens (n, T, D), add a row and write its files beside the others.
KINDS = dict(
    features=ArrayKind(3, "f", needed=True),  # latents (n, C, S/f, S/f)
    labels=ArrayKind(0, "ui", needed=True),  # classes (n,)
    sem=ArrayKind(1, "ui"),  # codes (n, L)
    tokens=ArrayKind(2, "f"),  # the encoder's patch tokens (n, T, width)
    path=ArrayKind(0, "U"),  # image paths (n,)
)
TOKEN_NORMS = ("learned", "plain")  # the final norm of patch tokens: with the encoder's scale and shift, or without
WRITTEN_LAST = ("count", "shards", "skipped")
SCALE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # of latents
SOURCE = ("vae", "vae_sha256", *SCALE, "encoder", "encoder_sha256", "listing_sha256", "flip", "background")

COUNT, SIZE, ID = whole_number(0, 2**40), or_null(whole_number(1, 2**32)), or_null(TEXT)
SHARD = (
    lambda value: (
        isinstance(value, dict)
        and is_plain_name(value.get("name"))
        and all(COUNT[0](value.get(name, 0)) for name in ("skipped", "transparent"))
        and COUNT[0](value.get("rows"))
        and isinstance(value.get("sha256", {}), dict)
    ),
    "an object of a plain name, a number of rows, how many images are skipped and transparent, and sha256 by kind",
)
PATH_AND_REASON = (
    lambda value: isinstance(value, list) and [type(one) for one in value] == [str, str],
    "a path and a reason",
)


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """Every key of manifest.json but format_version. None stands for "not known", as of features from elsewhere.

    In manifest.json WRITTEN_LAST is needed, too; a writer's settings lack these keys.
    """

    image_size: int = key(whole_number(1, 2**20))  # pixels
    shard_size: int | None = key(SIZE, None)  # images that a shard covers, skipped ones included
    # the VAE, and what became of its posterior
    vae: str | None = key(ID, None, decides=False)  # where it lay, not what it was: hub id or path
    vae_sha256: str | None = key(ID, None)
    scaling_factor: float | None = key(or_null(real_number(1e-30)), None)
    shift_factor: float = key(real_number(-1e30, 1e30), 0.0)  # known where scaling_factor is
    latents_mean: list[float] | None = key(or_null(list_of(real_number(-1e30, 1e30), 1, 8192)), None)
    latents_std: list[float] | None = key(or_null(list_of(real_number(1e-30, 1e30), 1, 8192)), None)
    latent_channels: int = key(whole_number(1, 8192), 4)
    latents: str = key(one_of(*LATENTS))
    dtype: str = key(one_of(*DTYPES))
    # the encoder and its codes; L and V are None where there are none
    encoder: str | None = key(ID, None, decides=False)
    encoder_sha256: str | None = key(ID, None)
    L: int | None = key(SIZE)
    V: int | None = key(or_null(whole_number(1, 65536)))
    tokens: list[int] | None = key(or_null(list_of(whole_number(1, 2**20), 2, 2)), None)  # patches, and their width
    tokens_norm: str | None = key(or_null(one_of(*TOKEN_NORMS)), None)
    precision: str | None = key(ID, None)  # of both networks
    flip: str | None = key(ID, None)
    background: list[int] | None = key(or_null(list_of(whole_number(0, 255), 3, 3)), None)  # behind transparent images
    seed: int | None = key(or_null(whole_number(0)), None)
    # the images
    classes: list[str] = key(list_of(TEXT))
    images: int = key(COUNT)  # skipped ones included
    listing_sha256: str | None = key(ID, None)  # of the images' paths, in order
    converted_from: str | None = key(ID, None, name="source")  # features or dataset
    # the rows; known when all shards are written
    count: int = key(COUNT, 0, decides=False)
    shards: list[dict] = key(list_of(SHARD), [], decides=False)
    skipped: list[list[str]] = key(list_of(PATH_AND_REASON), [], decides=False)  # [path, reason] each

    def source(self) -> dict:
        """What a training run records of its data: a dict with the keys of SOURCE."""
        return {name: getattr(self, name) for name in SOURCE}

    @classmethod
    def unknown_source(cls) -> dict:
        """The same of features without a manifest."""
        return {one.name: one.default for one in fields(cls) if one.name in SOURCE}

    @property
    def num_shards(self) -> int:
        return -(-self.images // (self.shard_size or self.images or 1))

    @property
    def transparent(self) -> int:
        """How many images were blended on the background."""
        return sum(shard.get("transparent", 0) for shard in self.shards)

    @property
    def kinds(self) -> list[str]:
        """The kinds of arrays that extraction writes for each shard."""
        return [*self.dtypes, "path"]

    @property
    def stored_channels(self) -> int:
        """Channels of a stored row of latents: of moments, those of the mean and those of the std."""
        return 2 * self.latent_channels if self.latents == "moments" else self.latent_channels

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """The types of the stored arrays, by kind; paths are unicode of any length."""
        found = dict(features=self.dtype, labels=np.int64, sem=self.V and code_dtype(self.V))
        found["tokens"] = self.tokens and np.float16
        return {kind: np.dtype(dtype) for kind, dtype in found.items() if dtype}


def code_dtype(V: int) -> type:
    """The type that codes of V tokens are stored in."""
    return np.uint8 if V <= 256 else np.uint16


def kind_dir(root: str | Path, image_size: int, kind: str) -> Path:
    """The folder of FEATURES/ with the shards of a kind, a key of KINDS."""
    return Path(root) / f"imagenet{image_size}_{kind}"


def read_manifest(root: str | Path) -> Manifest:
    """The `Manifest` of FEATURES/. Raises ValueError if it cannot be read."""
    return Manifest.read(Path(root) / "manifest.json", also_needed=WRITTEN_LAST)
