"""Other people's weights: from a path or hub id to tensors under our names, what to build for them, and words.

    found = read_foreign("owner/name", folder, "model")
    found.tensors, found.config, found.said

TABLE has a row for each set of names that tensors come under: what it is, a tensor by which it is recognised, and the
function that gives our names. CONFIGS has, for each kind of network, the function that reads its constructor's
arguments off the tensors' shapes and the JSON beside them. A new layout is one row and one function. Our own
checkpoints and exports never come here: `dlc.weights.load` builds those from their config.json.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dlc.weights.foreign import dits, encoders, priors, vaes
from dlc.weights.foreign.layouts import FLAGS, KINDS, File, OtherKind, open_weights
from dlc.weights.foreign.safe import check_tensors


@dataclass(frozen=True)
class Row:
    """kind: a key of KINDS. anchor: the end of a tensor's name. rename(file, tensors) gives tensors under our names."""

    kind: str
    name: str
    anchor: str
    rename: Callable[[File, dict], dict]


@dataclass
class Found:
    """What a name stands for: tensors under our names, checked; what to build for them; the file; words."""

    tensors: dict = field(repr=False)
    config: dict
    file: File = field(repr=False)
    said: str


def as_they_are(file: File, tensors: dict) -> dict:
    return check_tensors(tensors, file.path)


TABLE = (
    Row("model", "DiT under diffusers' names", dits.ANCHOR, dits.from_diffusers),
    Row("model", "DiT's names", "x_embedder.proj.weight", dits.under_our_names),
    Row("prior", "SEDD's names", "vocab_embed.embedding", priors.under_our_names),
    Row("encoder", "transformers' names", "embeddings.cls_token", encoders.under_our_names),
    Row("encoder", "timm's names", "reg_token", encoders.under_our_names),
    Row("encoder", "DINOv2's names", "cls_token", encoders.under_our_names),
    Row("encoder", "a SEM head", "sem_embed.weight", encoders.under_our_names),
    Row("vae", "LDM's names", "encoder.down.0.block.0.conv1.weight", vaes.from_ldm),
    Row("vae", "diffusers' names", "encoder.conv_out.weight", vaes.from_diffusers),
    Row("encoder", "DINOv2", "blocks.0.ls1.gamma", as_they_are),
    Row("vae", "VAE", "decoder.conv_in.weight", as_they_are),
)
CONFIGS = dict(model=dits.config_of, prior=priors.config_of, encoder=encoders.config_of, vae=vaes.config_of)


def read_foreign(named: object, path: Path, kind: str, ema: bool = True, **options) -> Found:
    """Recognise weights, and read what to build for them.

    Args:
        named, path: what the user called them, for errors, and where they are, by `dlc.weights.hub.locate`.
        kind: "model", "prior", "encoder" or "vae".
        ema: the EMA weights rather than the raw ones, where there are both.
        options: of the kind's function in CONFIGS.

    Raises ValueError, naming path and tensor or key; OtherKind for another kind of network.
    """
    file = open_weights(named, path, kind, ema)
    tensors, row = names_of(file)
    config, words = CONFIGS[kind](file, tensors, **options)
    return Found(tensors, config, file, ", ".join(filter(None, [*file.words, row.name, words])))


def names_of(file: File) -> tuple[dict, Row]:
    """A file's tensors under our names, checked, and the row that recognised them. Raises as `read_foreign` does."""
    # a row of the wanted kind first: a whole Stable Diffusion has a UNet and a VAE in it
    for row in sorted(TABLE, key=lambda row: row.kind != file.kind):
        if any(f".{name}".endswith(f".{row.anchor}") for name in file.tensors):
            if row.kind != file.kind:
                words = f"is {KINDS[row.kind]}, which {FLAGS[row.kind]} takes: wanted {KINDS[file.kind]}"
                file.refuse(words, OtherKind, row.kind)
            return row.rename(file, file.under(row.anchor)), row
    file.refuse(f"is not {KINDS[file.kind]}: no tensor in it has a name that is known")
