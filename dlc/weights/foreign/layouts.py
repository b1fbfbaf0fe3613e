"""The layouts in which weights of diffusion transformers come: one table, LAYOUTS.

    source = read_layout("DiT-XL-2-256x256.pt")        # source.values: tensors under our names; source.said: in words

A row says what a layout is called, how it is recognised, how the next step is made from it, and which test proves it.
Reading takes steps: for example, from a diffusers pipeline to its transformer folder, to the tensors of its shards, to
tensors under our names. At each step the first row that recognises the source takes it. A row that cannot be honoured
raises ValueError in one line. A new layout is one row and one function.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

from dlc.weights.foreign.diffusers_dit import ANCHORS, FIXED, from_diffusers
from dlc.weights.foreign.folders import (
    dlc_checkpoints,
    finished,
    is_dlc_checkpoint,
    opened,
    read_dlc_checkpoint,
    read_dlc_run,
    read_pipeline,
    read_weights_file,
    read_weights_folder,
    with_kind,
)
from dlc.weights.foreign.safe import WEIGHTS_FILES, WRAPPERS, check_tensors, plain_name, weights_in
from dlc.weights.foreign.sedd import read_sedd, read_sedd_training
from dlc.weights.foreign.source import AVAE, BESIDE, ON_HUB, AnEncoder, APrior, NoRawWeights, Source, run_meta
from dlc.weights.hub import fetch, is_id

MOST_STEPS = 8
ANCHOR = "x_embedder.proj.weight"  # a tensor of every DiT under our names


@dataclass(frozen=True)
class Layout:
    """A row of the table: name, recognised(source) -> bool, read(source) -> the next source, and the test's name."""

    name: str
    recognised: Callable[[Source], bool]
    read: Callable[[Source], Source]
    test: str


def locate(named, flag: str = "checkpoint", ask: bool = True):
    """The local path of a name; of a hub id, the folder of its weights in the hub's cache. See `hub.fetch`."""
    try:
        return fetch(named, [ON_HUB], BESIDE, flag, ask=ask)
    except ValueError as error:  # which may name all alternatives
        raise ValueError(str(error).replace(" or ".join(ON_HUB), "file of weights")) from None


def read_layout(named, ema: bool = True, flag: str = "checkpoint", ask: bool = True, prior: bool = False) -> Source:
    """Follow the table from a path or hub id to tensors under our names.

    Where no row knows a file's names, its tensors come back as they are.

    Args:
        ema: the EMA weights rather than the raw ones, where there are both.
        flag: what the user gave the name to, for errors.
        ask: whether to ask the hub; see `dlc.weights.hub.fetch`.
        prior: whether a prior over codes is wanted, rather than a diffusion transformer.

    Raises ValueError, naming the path, for what is no weights, is damaged, or is a layout that cannot be honoured.
    """
    at = locate(named, flag, ask)
    source = Source(named, at, ema, said=("from the hub",) if is_id(named) else (), prior=prior)
    if not at.is_dir():
        known = at.name in WEIGHTS_FILES and source.config_path.is_file()
        source = read_weights_file(source) if known else opened(source)
    for _ in range(MOST_STEPS):
        if source.done:
            break
        row = next((row for row in LAYOUTS if row.recognised(source)), None)
        if row is None:
            break
        source = row.read(source)
    if source.values is None:
        source.refuse(
            "is a folder of no layout that is known: it has no meta.json, no model_index.json and no file of weights"
        )
    return source if source.done else dataclasses.replace(source, values=check_tensors(source.values, source.at))


#################################################################################
#                             Files with more in them                           #
#################################################################################


def read_training_file(source):
    """{"model": …, "ema": …, "opt": …, "args": …}, as the training scripts of DiT, fast-DiT and SiT save it."""
    name, other = ("ema", "model") if source.ema else ("model", "ema")
    wanted, instead = source.values.get(name), source.values.get(other)
    kind, words = "ema" if source.ema else "raw", "training checkpoint"
    if wanted is None and name in source.values and isinstance(instead, dict):
        wanted, kind, words = instead, "ema" if other == "ema" else "raw", f"{words} whose {name!r} is empty"
    if wanted is None:
        source.refuse(
            f"has no {kind} weights, only {other!r}: "
            f"{'give --no-ema' if source.ema else 'leave out --no-ema'} to sample from those",
            ValueError if source.ema else NoRawWeights,
        )
    if not isinstance(wanted, dict):
        source.refuse(f"does not hold a dict of named tensors under {name!r}")
    check_predicts_eps(source)
    step = int(source.at.stem) if re.fullmatch(r"\d{7,12}", source.at.stem, re.ASCII) else None
    return source.saying(
        words,
        values=wanted,
        meta=run_meta(source.arguments, step=step, weights=kind),
        is_eps={"model", "global_seed"} <= source.arguments.keys(),  # DiT's: SiT's and REPA's say more
    )


def read_state_dict(source):
    """{"state_dict": …}, as Lightning saves it beside the trainer's state."""
    if not isinstance(source.values["state_dict"], dict):
        source.refuse("does not hold a dict of named tensors under 'state_dict'")
    check_predicts_eps(source)
    return source.saying("state_dict of a training checkpoint", values=source.values["state_dict"])


def read_prefixed(source):
    """Tensors of a module's attributes, such as "model." and "ema_model.": the names of one of them, without it."""
    prefixes = [str(name)[: -len(ANCHOR)] for name in source.values if str(name).endswith(ANCHOR)]
    averaged = [prefix for prefix in prefixes if "ema" in prefix]
    raw = [prefix for prefix in prefixes if prefix not in averaged]
    prefix = ((averaged or raw) if source.ema else (raw or averaged))[0]
    kind = source.meta.weights or ("as in the file" if len(prefixes) == 1 else "ema" if prefix in averaged else "raw")
    return source.saying(
        f"its {prefix[:40]}*",
        values={name[len(prefix) :]: value for name, value in source.values.items() if str(name).startswith(prefix)},
        meta=with_kind(source, kind),
    )


def check_predicts_eps(source):
    """Raise ValueError where the arguments in a training checkpoint are those of a velocity model, SiT or REPA."""
    if {"path_type", "prediction"} & source.arguments.keys():
        refuse_velocity(source, "REPA" if {"enc_type", "proj_coeff"} & source.arguments.keys() else "SiT")


def refuse_velocity(source, name):
    source.refuse(f"is a {name} model, which predicts a velocity: only models that predict noise, as DiT, are read")


#################################################################################
#                                Names of tensors                               #
#################################################################################


def unwrap(source):
    plain = {plain_name(key): value for key, value in source.values.items()}
    if len(plain) < len(source.values):
        source.refuse("holds tensors of one name twice, with and without module. or _orig_mod. before it")
    return dataclasses.replace(source, values=plain)


def read_dit(source):
    return finished(source, check_tensors(source.values, source.at))


def read_diffusers_dit(source):
    for key, wanted in FIXED.items():
        if key in source.config and source.config[key] not in (wanted, None):
            source.refuse(f"is no DiT: {key} in its config.json is {str(source.config[key])[:40]!r}, wanted {wanted!r}")
    values = from_diffusers(check_tensors(source.values, source.at), source.named, source.config.get("_num_classes"))
    name = "DiT" if "y_embedder.embedding_table.weight" in values else "DLC DiT"
    return finished(source.saying(f"{name} under diffusers' names"), values, is_eps=True, in_diffusers=True)


#################################################################################
#                                   The table                                   #
#################################################################################


def has_file(*names):
    return lambda source: not source.files.isdisjoint(names)


def has_name(pattern):
    return lambda source: source.any_name(pattern)


def has_key(*keys):
    """Recognises a file with more in it than a model's tensors, by what that more is called."""
    return lambda source: source.values is not None and not source.values.keys().isdisjoint(keys)


def holds(key, inner):
    return lambda source: has_key(key)(source) and isinstance(source.values[key], dict) and inner in source.values[key]


def called(pattern):
    """Recognises a DiT's tensors in a file of such a name: for what nothing but the name tells."""
    return lambda source: source.has(ANCHOR) and bool(re.match(pattern, source.at.name))


def refused(fault, error=ValueError):
    return lambda source: source.refuse(fault, error)


def velocity(name):
    return lambda source: refuse_velocity(source, name)


def if_prior(read):
    return lambda source: read(source) if source.prior else source.refuse(PRIOR, APrior)


ENCODER = "is an encoder of images, which --encoder takes, no diffusion transformer"
VAE = "is a VAE, which --vae takes, no diffusion transformer"
PRIOR = "is a prior over codes (SEDD), no diffusion transformer"
OTHER = "is another kind of diffusion model: wanted a DiT, DiTSEM or DiTCONT"

LAYOUTS = (
    # folders
    Layout("DLC checkpoint", is_dlc_checkpoint, read_dlc_checkpoint, "test_dlc_accelerate"),
    Layout("DLC run", lambda source: bool(dlc_checkpoints(source)), read_dlc_run, "test_dlc_accelerate"),
    Layout("diffusers pipeline", has_file("model_index.json"), read_pipeline, "test_diffusers_folders"),
    Layout(
        "folder of weights",
        lambda source: weights_in(source.files) is not None,
        read_weights_folder,
        "test_diffusers_folders",
    ),
    # files with more than a model's tensors in them
    Layout("SEDD training", holds("ema", "shadow_params"), if_prior(read_sedd_training), "test_other_kinds"),
    Layout("SEM encoder, teacher", has_key("teacher"), refused(ENCODER, AnEncoder), "test_other_kinds"),
    Layout("training checkpoint", has_key("model", "ema"), read_training_file, "test_training_files"),
    Layout("state_dict", has_key("state_dict"), read_state_dict, "test_training_files"),
    # names of tensors: wrapped
    Layout("DDP or torch.compile", has_name(WRAPPERS.pattern), unwrap, "test_training_files"),
    Layout("attribute of a module", has_name(rf"\.{re.escape(ANCHOR)}$"), read_prefixed, "test_training_files"),
    # names of tensors: what predicts something else than noise
    Layout("LightningDiT", has_name(r"\.mlp\.w12\.|^feat_rope\."), velocity("LightningDiT"), "test_velocity_by_names"),
    Layout("REPA", has_name(r"^projectors\.|^decoder_blocks\."), velocity("REPA"), "test_velocity_by_names"),
    Layout("SiT by its file's name", called(r"SiT-(XL|L|B|S)-\d"), velocity("SiT"), "test_velocity_by_names"),
    # names of tensors: diffusion transformers
    Layout("DiT of diffusers", lambda source: source.has(*ANCHORS), read_diffusers_dit, "test_diffusers_golden"),
    Layout("DiT", has_name(rf"^{re.escape(ANCHOR)}$"), read_dit, "test_bare_files"),
    # names of tensors: other kinds
    Layout("transformer of diffusers", has_name(r"^transformer_blocks\."), refused(OTHER), "test_other_kinds"),
    Layout(
        "encoder",
        has_name(r"(^|\.)sem_embed\.|\.ls1\.gamma$|\bembeddings\."),
        refused(ENCODER, AnEncoder),
        "test_other_kinds",
    ),
    Layout("VAE", has_name(r"^(first_stage_model\.)?decoder\.conv_in\."), refused(VAE, AVAE), "test_other_kinds"),
    Layout("SEDD", has_name(r"(^|\.)vocab_embed\.embedding$"), if_prior(read_sedd), "test_other_kinds"),
    Layout("UNet", has_name(r"^(model\.diffusion_model|down_blocks|unet)\."), refused(OTHER), "test_other_kinds"),
)
