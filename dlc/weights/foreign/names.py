"""Other people's weights: from a path or hub id to tensors under our names, what to build for them, and words.

    tensors, config, file = read_foreign("owner/name", folder, "model")       # file.said: what was recognised

TABLE has a row for each set of names that tensors come under: what it is, a tensor by which it is recognised, and the
function that gives our names. CONFIGS has, for each kind of network, the function that reads its constructor's
arguments off the tensors' shapes and the JSON beside them. A new layout is one row and one function. Our own
checkpoints and exports never come here: `dlc.weights.load` builds those from their config.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dlc.weights.foreign import dits, encoders, priors, vaes
from dlc.weights.foreign.layouts import FLAGS, KINDS, File, OtherKind, open_weights
from dlc.weights.foreign.safe import check_tensors


@dataclass(frozen=True)
class Row:
    """kind: a key of KINDS. anchor: the end of a tensor's name. rename(file, tensors) gives tensors under our names;
    only those are read whose name is wanted."""

    kind: str
    name: str
    anchor: str
    rename: Callable[[File, dict], dict]
    wanted: Callable[[str], bool] = lambda name: True


TABLE = (
    Row("model", "DiT under diffusers' names", dits.ANCHOR, dits.from_diffusers),
    Row("model", "DiT's names", "x_embedder.proj.weight", dits.under_our_names),
    Row("prior", "SEDD's names", "vocab_embed.embedding", priors.under_our_names),
    Row("encoder", "transformers' names", "embeddings.cls_token", encoders.under_our_names, encoders.is_wanted),
    Row("encoder", "timm's names", "reg_token", encoders.under_our_names, encoders.is_wanted),
    Row("encoder", "DINOv2's names", "cls_token", encoders.under_our_names, encoders.is_wanted),
    Row("encoder", "a SEM head", "sem_embed.weight", encoders.under_our_names, encoders.is_wanted),
    Row("vae", "LDM's names", "encoder.down.0.block.0.conv1.weight", vaes.from_ldm, vaes.is_part),
    Row("vae", "diffusers' names", "encoder.conv_out.weight", vaes.from_diffusers),
    Row("encoder", "DINOv2", "blocks.0.ls1.gamma", encoders.under_our_names),
    Row("vae", "VAE", "decoder.conv_in.weight", vaes.from_diffusers),
)
CONFIGS = dict(model=dits.config_of, prior=priors.config_of, encoder=encoders.config_of, vae=vaes.config_of)


def read_foreign(named: object, path: Path, kind: str, ema: bool = True, **options) -> tuple[dict, dict, File]:
    """Recognise weights: tensors under our names, what to build for them, and the file, which says what was recognised.

    Args:
        named, path: what the user called them, for errors, and where they are, by `dlc.weights.hub.locate`.
        kind, options: a key of CONFIGS, and options of its function.
        ema: the EMA weights rather than the raw ones, where there are both.

    Raises ValueError, naming path and tensor or key; OtherKind for another kind of network.
    """
    file = open_weights(named, path, kind, ema)
    tensors = names_of(file)
    return tensors, CONFIGS[kind](file, tensors, **options), file


def names_of(file: File) -> dict:
    """A file's tensors under our names, checked. Raises as `read_foreign` does."""
    # a row of the wanted kind first: a whole Stable Diffusion has a UNet and a VAE in it
    for row in sorted(TABLE, key=lambda row: row.kind != file.kind):
        if any(f".{name}".endswith(f".{row.anchor}") for name in file.tensors):
            if row.kind != file.kind:
                words = f"is {KINDS[row.kind]}, which {FLAGS[row.kind]} takes: wanted {KINDS[file.kind]}"
                file.refuse(words, OtherKind, row.kind)
            tensors = {name: value for name, value in file.under(row.anchor).items() if row.wanted(name)}
            file.words.append(row.name)
            return row.rename(file, check_tensors(tensors, file.path))
    file.refuse(f"is not {KINDS[file.kind]}: no tensor in it has a name that is known")
