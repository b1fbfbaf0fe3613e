"""The layouts in which weights of SEM encoders come: from a name to a configuration and tensors of `SEMEncoder`.

    found = read_encoder("lavoies/SEM_dinov2_L512")    # found.config, found.said; found.weights(backbone)

A folder with our own configuration is read as it is. Of everything else, LAYOUTS tells whose names the tensors have,
and the tensors' shapes tell width, depth, patch and registers, before any network is built. What shapes do not tell, a
config.json says, or a flag.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dlc.data.images import IMAGENET_MEAN, IMAGENET_STD
from dlc.machine.cli import one_line
from dlc.machine.files import read_json
from dlc.machine.records import SWITCH, check_values, one_of, real_number, whole_number
from dlc.weights.foreign.encoder_names import (
    from_dinov2,
    from_timm,
    from_transformers,
    serves_training_only,
    to_state_dict,
)
from dlc.weights.foreign.safe import (
    WEIGHTS_FILES,
    check_tensors,
    hub_patterns,
    plain_name,
    read_file,
    shown,
    weights_in,
)
from dlc.weights.hub import fetch, id_and_revision, is_id

SIZES = {384: ("small", 12, 6), 768: ("base", 12, 12), 1024: ("large", 24, 16), 1536: ("giant", 40, 24)}
DEFAULT_L, DEFAULT_V = 512, 256  # of the published encoder, where neither file nor flag says them
IMAGE_SIZE = 224  # pixels, at which DINOv2's encoders are read
HEAD = re.compile(r"(?:.*\.)?(sem_(?:embed|norm)\.\w+)")
TEMPERATURE = re.compile(r"(?:.*\.)?(?:temp|temperature|tau)")
# Names that configurations give to what shapes do not tell, in order. They may be nested.
L_NAMES, V_NAMES = ("L", "dlc_l", "sem_l", "sem_L"), ("V", "dlc_v", "sem_v", "sem_V")
TEMPERATURE_NAMES = ("temp", "temperature", "tau", "sem_temp")
LIBRARY_CONFIG = dict(
    hidden_act=one_of("gelu"),
    layer_norm_eps=real_number(0.99e-6, 1.01e-6),
    num_channels=whole_number(3, 3),
    num_attention_heads=whole_number(1, 1024),
    use_swiglu_ffn=SWITCH,
    **dict.fromkeys(L_NAMES, whole_number(1, 65536)),
    **dict.fromkeys(V_NAMES, whole_number(2, 65536)),
    **dict.fromkeys(TEMPERATURE_NAMES, real_number(1e-6)),
)


@dataclass(frozen=True)
class Layout:
    """A row of the table: whose names these are, the tensor that shows it, the way to DINOv2's names, the test."""

    name: str
    anchor: str
    rename: Callable[[dict], dict]
    test: str


@dataclass
class Found:
    """What a name stands for: the arguments of SEMEncoder, its state dict for a backbone of them, and words."""

    path: Path
    config: dict
    said: str
    weights: Callable = field(repr=False)


def read_encoder(name, given, flag="--encoder", ask=True) -> Found:
    """Recognise the encoder that a name stands for, without building it.

    Args:
        name: a folder, a file or a hub id.
        given: the flags' backbone, L and V, without those that were not given.
        ask: whether to ask the hub; see `dlc.weights.hub.fetch`.

    Raises ValueError, naming it, for what is missing and for what cannot be honoured.
    """
    path = fetch_encoder(name, flag, ask)
    said, config = ("from the hub, ",) if is_id(name) else (), {}
    if not path.is_dir() and path.name in WEIGHTS_FILES and (path.parent / "config.json").is_file():
        path = path.parent  # the weights of a folder, named by themselves
    if path.is_dir():
        file = weights_in(entry.name for entry in path.iterdir())
        missing = ["config.json"] if not (path / "config.json").is_file() else []
        missing += ["model.safetensors"] if file is None else []
        if missing:
            raise ValueError(f"encoder {name} has no {' and no '.join(missing)}")
        config = read_json(path / "config.json")
        if is_own(config):
            return own_folder(name, path, config, path / file)
        file = path / file
    else:
        file = path
    tensors, words = read_file(file)
    layout, tensors = recognise(name, file, tensors)
    config, described = settings(name, path, layout, tensors, config, given)
    said = "".join([*said, layout.name, f" ({words})" if words else "", f": {described}"])
    return Found(file, config, said, lambda backbone: to_state_dict(tensors, backbone))


def fetch_encoder(name, flag="--encoder", ask=True) -> Path:
    """The local path of a name; of a hub id, the folder of its weights in the hub's cache. See `hub.fetch`."""
    return fetch(name, ["config.json", (*hub_patterns(), "*.safetensors", "*.pth", "*.pt")], ["*.json"], flag, ask=ask)


def is_own(config):
    """Whether a config.json is `save_encoder`'s, rather than transformers'."""
    return "backbone_args" in config or ("backbone" in config and not {"model_type", "architectures"} & config.keys())


def own_folder(name, path, config, file):
    def weights(backbone):
        return check_tensors(read_file(file)[0], file)

    return Found(path, config, "a folder of this program", weights)


#################################################################################
#                                     Names                                     #
#################################################################################


def recognise(name, file, tensors):
    """The layout of a file's tensors, and the tensors under DINOv2's names and the head's, checked.

    Raises ValueError if there are not exactly one backbone and one head.
    """
    for wrapper in ("teacher", "state_dict", "model"):
        inner = tensors.get(wrapper)
        tensors = inner if isinstance(inner, dict) else tensors
    tensors = {plain_name(key): value for key, value in tensors.items()}
    row, prefix = next(
        (
            (row, key[: -len(row.anchor)])
            for row in LAYOUTS
            for key in sorted(tensors, key=lambda key: ("teacher" not in key, "ema" not in key, key))
            if key == row.anchor or key.endswith(f".{row.anchor}")
        ),
        (None, ""),
    )
    lack = [words for words, there in (("ViT backbone (cls_token)", row), (HEAD_WORDS, has_head(tensors))) if not there]
    if lack:
        whose = f"has {row.name}, but no" if row else "has no"
        raise ValueError(
            f"encoder {name} {whose} {' and no '.join(lack)}: wanted the weights of a SEM encoder"
            + (", which DINOv2 alone is not" if row else "")
        )
    backbone, head, others = {}, {}, {}
    for key, value in tensors.items():
        if HEAD.fullmatch(key):
            head[HEAD.fullmatch(key)[1]] = value
        elif key.startswith(prefix) and not serves_training_only(key[len(prefix) :]):
            backbone[key[len(prefix) :]] = value
        elif key.startswith(prefix) or serves_training_only(key):
            continue
        else:
            others[key] = value
    unknown = next((key for key in others if not TEMPERATURE.fullmatch(key)), None)
    if unknown is not None:
        raise ValueError(f"encoder {name} has unknown {shown(unknown)} beside its backbone and SEM head")
    others |= {key: backbone.pop(key) for key in list(backbone) if TEMPERATURE.fullmatch(key)}
    check_tensors({**backbone, **head, **others}, file)
    temperature = next((value for value in others.values() if value.numel() == 1), None)
    tensors = {**row.rename(backbone), **head}
    return row, tensors if temperature is None else {**tensors, "temperature": temperature}


HEAD_WORDS = "SEM head (sem_embed, sem_norm)"


def has_head(tensors):
    return any(key == "sem_embed.weight" or key.endswith(".sem_embed.weight") for key in tensors)


LAYOUTS = (
    Layout("transformers' names", "embeddings.cls_token", from_transformers, "test_transformers"),
    Layout("timm's names", "reg_token", from_timm, "test_timm"),
    Layout("DINOv2's names", "cls_token", from_dinov2, "test_reference_checkpoint_file"),
)


#################################################################################
#                                 Configuration                                 #
#################################################################################


def settings(name, path, layout, tensors, config, given):
    """The arguments of SEMEncoder for tensors under DINOv2's names, and words for them.

    Raises ValueError for sizes that neither tensors nor config nor flags tell, and where two of them disagree.
    """
    where = path / "config.json" if config else name
    said = {key: value for key in LIBRARY_CONFIG if (value := lookup(config, [key])) is not None}
    check_values(where, said, LIBRARY_CONFIG)
    check_preprocessing(path)

    def size(key, dimension, ndim):
        if key not in tensors or tensors[key].ndim != ndim:
            raise ValueError(f"encoder {name} ({layout.name}) has no {key} of {ndim} dimensions")
        return tensors[key].shape[dimension]

    width, patch = size("cls_token", 2, 3), size("patch_embed.proj.weight", 3, 4)
    registers = size("register_tokens", 1, 3) if "register_tokens" in tensors else 0
    depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    hidden = size("blocks.0.mlp.fc1.weight", 0, 2)
    gated = hidden != size("blocks.0.mlp.fc2.weight", 1, 2)
    for key, value in dict(hidden_size=width, num_hidden_layers=depth, patch_size=patch).items():
        if lookup(config, [key]) not in (None, value, [value, value]):
            raise ValueError(f"{where}: {key} is {shown(lookup(config, [key]))}, but its weights have {value}")
    arguments = dict(L=given.get("L"), V=given.get("V"))
    source = code_size(name, arguments, config, size("sem_embed.weight", 0, 2))
    own = tensors.pop("temperature", None)
    temperature = lookup(config, TEMPERATURE_NAMES) or (None if own is None else float(own))
    if temperature is not None:
        arguments["temperature"] = temperature
    if "backbone" in given:
        arguments["backbone"] = given["backbone"]
    else:
        arguments |= backbone_of(
            name, width, depth, patch, registers, hidden, gated, lookup(config, ["num_attention_heads"])
        )
    arguments["image_size"] = image_size(path)
    described = (
        f"ViT of width {width} with {depth} blocks and {registers} registers, L={arguments['L']}, "
        f"V={arguments['V']} ({source}), {arguments['image_size']}x{arguments['image_size']} pixels"
    )
    return arguments, described


def lookup(config, names):
    """The first value of a name in a configuration: at its top, else in one of the configurations within it."""
    for level in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in names:
            if level.get(name) is not None:
                return level[name]
    return None


def code_size(name, arguments, config, numbers):
    """Fill in L and V, whose product is the head's number of outputs. Gives words for where they are from."""
    source = "by the flags"
    for key, names in (("L", L_NAMES), ("V", V_NAMES)):
        value = lookup(config, names)
        if None not in (value, arguments[key]) and value != arguments[key]:
            raise ValueError(f"encoder {name}: {key} {value} there, {arguments[key]} here; leave out the flag")
        if arguments[key] is None and value is not None:
            arguments[key], source = value, "by its config.json"
    if arguments["L"] is arguments["V"] is None:
        in_name = re.search(r"[-_]L(\d{1,5})$", id_and_revision(name)[0]) if is_id(name) else None
        if in_name:
            arguments["L"], source = int(in_name[1]), "by its name"
        elif numbers == DEFAULT_L * DEFAULT_V:
            arguments["L"], source = DEFAULT_L, "the published size, as it does not say L"
        else:
            raise ValueError(f"encoder {name} does not say how its head's {numbers:,} numbers are L times V: give --L")
    for one, other in (("L", "V"), ("V", "L")):
        if arguments[one] is None:
            if not arguments[other] or numbers % arguments[other]:
                raise ValueError(
                    f"encoder {name}: its head has {numbers:,} numbers, no multiple of {other} {arguments[other]}"
                )
            arguments[one] = numbers // arguments[other]
    return source


def backbone_of(name, width, depth, patch, registers, hidden, gated, heads):
    """timm's name and arguments of a DINOv2 ViT of these sizes; heads: their number, or None if no config says it."""
    size, usual_depth, usual_heads = SIZES.get(width, ("small", None, None))
    if heads is None and usual_heads is None:
        raise ValueError(
            f"encoder {name} has width {width}, none of DINOv2's, and no config.json that says its "
            "number of heads: name its timm model with --encoder-backbone"
        )
    if gated != (size == "giant"):
        raise ValueError(
            f"encoder {name}, of width {width}, has {'a' if gated else 'no'} gated MLP, other than DINOv2's: name its "
            "timm model with --encoder-backbone"
        )
    arguments = {}
    for key, value, usual in (
        ("embed_dim", width, width if width in SIZES else None),
        ("depth", depth, usual_depth),
        ("num_heads", heads or usual_heads, usual_heads),
        ("patch_size", patch, 14),
        ("reg_tokens", registers, 4 if registers else 0),
        ("mlp_ratio", hidden / width, hidden / width if gated else 4),
    ):
        if value != usual:
            arguments[key] = value
    return dict(backbone=f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2", backbone_args=arguments)


def check_preprocessing(path):
    """Raise ValueError if a folder's preprocessor_config.json normalises images otherwise than ImageNet's way."""
    file = path / "preprocessor_config.json"
    values = read_json(file) if path.is_dir() and file.is_file() else {}
    for key, wanted in (("image_mean", IMAGENET_MEAN), ("image_std", IMAGENET_STD)):
        if key in values and list(map(float, wanted)) != values[key]:
            raise ValueError(
                f"{file}: {key} is {one_line(values[key], 60)}, wanted ImageNet's {list(wanted)}, which are used here"
            )


def image_size(path):
    """The pixels that a folder's preprocessor_config.json crops images to, else DINOv2's 224."""
    file = path / "preprocessor_config.json"
    values = read_json(file) if path.is_dir() and file.is_file() else {}
    for key in ("crop_size", "size"):
        sizes = values.get(key)
        height = sizes.get("height") if isinstance(sizes, dict) else sizes
        if type(height) is int and height > 0:
            return height
    return IMAGE_SIZE
