"""Models out of weights, by path or hub id: our own by the record beside them, others' through `dlc.weights.foreign`.

model, name, meta = load_model("results/checkpoints/0400000")
model, name, meta = load_model("facebook/DiT-XL-2-256")
"""

import contextlib
import dataclasses
import hashlib
import math
from pathlib import Path

import torch

from diffusion.processes import create_process
from dlc.machine.files import read_json
from dlc.machine.records import check_values, one_of, real_number, whole_number
from dlc.weights.checkpoint import newest_of_run, run_checkpoints
from dlc.weights.foreign.diffusers_dit import DIFFUSERS_EPS, use_diffusers_function, uses_diffusers_function
from dlc.weights.foreign.layouts import locate, read_layout
from dlc.weights.foreign.prior_weights import foreign_prior
from dlc.weights.foreign.probe import predicts_velocity
from dlc.weights.foreign.safe import check_tensors, differences_from, load_tensors
from dlc.weights.foreign.source import APrior, NoRawWeights, Source
from dlc.weights.hub import fetched_by_node, is_id
from dlc.weights.meta import ModelConfig, RunMeta, read_config, read_meta
from models import FAMILIES, SIZES, DiT, DiT_models, ModelSpec, build_model, sincos_position_embedding
from prior import DLCPrior

DEFAULT_INPUT = 32  # cells of a latent's side where nothing tells: 256 pixels at 8 a cell
DEEPEST = 256  # blocks
LARGEST_POSITIONS = 2**27  # values of a pos_embed that is made here; a DiT-XL/2 of 1024 pixels has 2**22
VELOCITY = (
    "predicts a velocity by its outputs, as SiT and REPA do under DiT's very names: only models that predict noise, as "
    "DiT, are read"
)
# The keys of a transformer's config.json that are read; the tensors' shapes say the rest.
HEADS = ("num_heads", "num_attention_heads")
CONFIG = dict(
    num_heads=whole_number(1, 1024),
    num_attention_heads=whole_number(1, 1024),
    input_size=whole_number(1, 65536),
    sample_size=whole_number(1, 65536),
    norm_eps=real_number(0, 1),
    trained_with=one_of("dit", "diffusers"),
    _trained_with=one_of("dit", "diffusers"),
)


#################################################################################
#                                  Our own weights                              #
#################################################################################

OWN_FILES = "ema.safetensors", "model.safetensors"


def read_own(named, at: Path, ema: bool = True) -> tuple[dict, ModelConfig, RunMeta] | None:
    """The tensors, config and meta of a run, a checkpoint or an export of ours, or of a file in one; else None.

    Args:
        named: what the user called it, for errors.
        at: where it is.
        ema: the EMA weights rather than the raw ones, if there are both.

    Raises ValueError, naming the file, for what is damaged; NoRawWeights if only EMA weights are there.
    """
    words = "checkpoint of this program"
    if at.is_dir() and run_checkpoints(at):
        at = newest_of_run(at, ("config.json", "meta.json", OWN_FILES[0 if ema else 1]))
        words = f"newest checkpoint of the run, {at.name}, {words}"
    folder = at if at.is_dir() else at.parent
    config = read_config(folder) if at.is_dir() or at.name in OWN_FILES else None
    if config is None:
        return None
    meta = read_meta(folder) if (folder / "meta.json").is_file() else RunMeta()
    exported = meta.noted.get("weights")
    file = at if at.is_file() else folder / OWN_FILES[0 if ema and not exported else 1]
    if not file.is_file() and not ema or at.is_file() and not ema and at.name == OWN_FILES[0]:
        raise NoRawWeights(f"{named} has no raw weights (model.safetensors): leave out --no-ema")
    tensors = check_tensors(load_tensors(file), file)
    kind = exported or ("ema" if file.name == OWN_FILES[0] else "raw")
    meta = dataclasses.replace(meta, model=config.model, process=config.process, weights=kind)
    return tensors, config, dataclasses.replace(meta, layout="exported by this program" if exported else words)


def filled(config: ModelConfig, tensors: dict, named) -> torch.nn.Module:
    """The model of a config, in eval mode and float32, with these tensors, which must be all of its own and no others.

    Raises ValueError, naming `named`, if they are not.
    """
    if config.arguments.get("depth", 0) > len(tensors):  # before so many blocks are built
        raise ValueError(f"{named} has {len(tensors)} tensors for {config.arguments['depth']} blocks")

    def refuse_others(state):
        different = differences_from(state, tensors)
        if different:
            raise ValueError(f"{named} does not fit the {config.model} that its config.json describes: it {different}")

    outline = {}
    with contextlib.suppress(Exception), torch.device("meta"):  # not every constructor can be run on it
        outline = build_model(config.built).state_dict()
    if outline:
        refuse_others(outline)  # before memory is taken
    model = config.build()
    refuse_others(model.state_dict())
    # copied: a mapped file that another program overwrites would end this process
    dtypes = {name: torch.float32 if value.is_floating_point() else value.dtype for name, value in tensors.items()}
    model.load_state_dict({name: value.to(dtypes[name], copy=True) for name, value in tensors.items()}, assign=True)
    return model.eval()


#################################################################################
#                                   Any weights                                 #
#################################################################################


def load_weights(path, use_ema: bool = True) -> tuple[dict, RunMeta]:
    """A model's state dict under our names, and what is recorded of it: of a lone file only `weights` and `layout`.

    Args:
        path: a file, a folder or a hub id, in any layout of `dlc.weights.foreign.layouts`.
        use_ema: the EMA weights rather than the raw ones, if there are both.

    Raises ValueError if path is none of these.
    """
    own = read_own(path, locate(path), use_ema)
    if own is not None:
        return own[0], own[2]
    source = read_layout(path, use_ema)
    return source.values, with_layout(source)


def load_model(
    path,
    ema: bool = True,
    *,
    diffusers_time: str | None = None,
    input_size: int | None = None,
    flag: str = "checkpoint",
    ask: bool = True,
):
    """The model that a path or hub id holds, in eval mode; its name; and its RunMeta.

    The name is one of DiT_models, or for another size such as "DiT-2x16/2": depth, width, patch size.

    Args:
        ema: the EMA weights rather than the raw ones, if there are both.
        diffusers_time: of weights in diffusers' layout, whose function to compute, "dit" or "diffusers"
            [what the folder says, else "dit"].
        input_size: height and width of the latents, for weights that do not tell [32].
        flag, ask: see `read_layout`.

    Raises ValueError, naming path, if it is no model that predicts noise, or is damaged.
    """
    own = read_own(path, locate(path, flag, ask), ema)
    if own is not None:
        tensors, config, meta = own
        if diffusers_time == "diffusers":
            raise ValueError(f"{path} is not in diffusers' layout: --diffusers-time diffusers is for those")
        model = filled(config, tensors, path)
        if not isinstance(model, DiT):
            raise APrior(f"{path} is a {config.model}, a prior over codes, no diffusion transformer")
        if meta.noted.get("trained_with") == "diffusers":
            use_diffusers_function(model, meta.noted.get("norm_eps", DIFFUSERS_EPS)).eval()
        return model, config.model, meta
    source = read_layout(path, ema, flag, ask)
    weights, config = dict(source.values), checked_config(source)
    if "pos_embed" not in weights and getattr(weights.get("x_embedder.proj.weight"), "ndim", 0) == 4:
        source = with_positions(source, weights, config, input_size)
    model, name = model_from_weights(weights, path, config, source.config_path)
    source = with_function(source, model, config, diffusers_time)
    if not source.is_eps and type(model) is DiT and predicts_velocity(model):
        source.refuse(VELOCITY)
    return model, name, with_layout(source)


def load_prior(named, ema: bool = True, flag: str = "checkpoint", ask: bool = True):
    """The prior over codes that a path or hub id holds, in eval mode, and its RunMeta, whose process is known.

    Arguments and errors are as of `load_model`.
    """
    own = read_own(named, locate(named, flag, ask), ema)
    if own is None:
        return foreign_prior(named, ema, flag, ask)
    tensors, config, meta = own
    model = filled(config, tensors, named)
    if not isinstance(model, DLCPrior):
        raise ValueError(f"{named} is not a prior over codes, but a {config.model}")
    return model, meta


def process_of(meta: RunMeta):
    """The process that a model was trained on, by its meta; that of DiT's weights if nothing says one."""
    config = meta.process or dict(process="gaussian", arguments=dict(timestep_respacing=""))
    return create_process(config["process"], **config["arguments"])


def describe_prior(model: DLCPrior, meta: RunMeta) -> str:
    """What a prior is, in words, beside its name."""
    tables = "one table for all positions" if model.shared_embedding else "a table per position"
    classes = f"{model.num_classes} classes" if model.num_classes else "no classes"
    told = "told" if meta.process["arguments"]["time_conditioning"] else "not told"
    return f"prior over codes of L {model.L}, V {model.V}, {tables}, {classes}, {told} the noise level"


def with_layout(source: Source) -> RunMeta:
    said = source.said if set(source.said) - {"from the hub"} else (*source.said, "state dict")
    return dataclasses.replace(source.meta, layout=", ".join(said))


def describe(meta: RunMeta) -> str:
    """What was recognised, in one line: layout, EMA or raw, step."""
    kind = {"ema": "EMA weights", "raw": "raw weights"}.get(meta.weights, "weights as in the file, EMA or raw unknown")
    return f"{meta.layout}; {kind}, step {'unknown' if meta.step is None else f'{meta.step:,}'}"


def checked_config(source: Source) -> dict:
    """Those values of a config.json that are read. Raises ValueError, naming file and key, for one of another kind."""
    config = {key: value for key, value in source.config.items() if key in CONFIG and value is not None}
    check_values(source.config_path, config, CONFIG)
    return config


def with_positions(source: Source, weights: dict, config: dict, input_size: int | None) -> Source:
    """Add the constant pos_embed to weights without it, for the latents that something tells the size of."""
    width, _, patch, _ = weights["x_embedder.proj.weight"].shape
    recorded = source.meta.image_size and source.meta.image_size // 8  # of DiT's training, whose VAEs have 8 a cell
    told = config.get("input_size") or config.get("sample_size") or recorded or input_size
    size = told or DEFAULT_INPUT
    if patch < 1 or width < 4 or width % 4 or size < patch or width * (size // patch) ** 2 > LARGEST_POSITIONS:
        source.refuse(f"has no pos_embed, and none fits width {width}, patch {patch} and latents of {size} cells")
    weights["pos_embed"] = sincos_position_embedding(width, size // patch)[None]
    # diffusers never saves it, and its config always says the size
    return source if told else source.saying(f"no pos_embed: taken to be of latents of {size} x {size} cells")


def with_function(source: Source, model, config: dict, diffusers_time: str | None) -> Source:
    """Have the model compute what it was trained to, where its layout leaves that open, and say so."""
    recorded = config.get("trained_with") or config.get("_trained_with")
    chosen = diffusers_time or recorded or "dit"
    if diffusers_time == "diffusers" and not (source.in_diffusers or recorded):
        source.refuse("is not in diffusers' layout: --diffusers-time diffusers is for those that were trained there")
    if chosen == "diffusers":
        use_diffusers_function(model, config.get("norm_eps", DIFFUSERS_EPS)).eval()
    if not source.in_diffusers and chosen == "dit":
        return source
    why = "as asked" if diffusers_time else "as recorded" if recorded else "--diffusers-time gives the other"
    return source.saying(f"with the time frequencies and eps of {'DiT' if chosen == 'dit' else 'diffusers'} ({why})")


#################################################################################
#                             From shapes to a model                            #
#################################################################################


def model_from_weights(weights: dict, path, config: dict | None = None, config_path: Path | None = None):
    """The model whose state dict these are, in eval mode, and its name.

    Family, size, patch size, L, V, classes and latent size are read off the tensors' shapes. All shapes are compared
    before memory is allocated for the model.

    Args:
        path: the weights' name, for errors.
        config: may have the number of heads, which no shape tells.
        config_path: of a file that may have it, if neither the config nor a published size tells it.

    Raises ValueError, naming path, if they are no model of ours.
    """

    def shape(name, ndim):
        if name not in weights or weights[name].ndim != ndim:
            raise ValueError(f"checkpoint {path} is not a DiT, DiTSEM or DiTCONT (no {name} of {ndim} dimensions)")
        return tuple(weights[name].shape)

    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    # not by the highest number, which may be any
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    arguments = dict(
        in_channels=in_channels,
        input_size=patch_size * math.isqrt(shape("pos_embed", 3)[1]),
        learn_sigma=shape("final_layer.linear.bias", 1)[0] == 2 * in_channels * patch_size**2,
    )
    # from the last: a DiTCONT's linear layer is called as a DiT's table
    family = next((family for family in reversed(FAMILIES) if family.table in weights), FAMILIES[0])
    arguments.update(family.sizes_of(shape(family.table, family.table_ndim)))
    sizes = dict(arguments, hidden_size=hidden_size, depth=depth, patch_size=patch_size)
    if min(value for key, value in sizes.items() if key != "learn_sigma") < 1 or depth > DEEPEST:
        raise ValueError(
            f"checkpoint {path} does not fit a {family.__name__}: by its shapes, "
            + ", ".join(f"{key} is {value}" for key, value in sizes.items())
        )
    beside = config_path or Path(path).with_name("config.json")
    name, spec = spec_of(family, hidden_size, depth, patch_size, config or {}, path, beside)
    fc1 = weights.get("blocks.0.mlp.fc1.bias", torch.empty(0))
    if name not in DiT_models and fc1.ndim == 1 and len(fc1) > 0:
        arguments["mlp_ratio"] = (len(fc1) + 0.5) / hidden_size  # of which the model takes the whole part
    with torch.device("meta"):
        model = spec(**arguments)
    different = differences_from(model.state_dict(), weights)
    if different:
        raise ValueError(f"checkpoint {path} does not fit {name}: it {different}")
    if model.build_embedder:  # anew, since it has values that are not in the weights
        setattr(model, model.embedder_name, model.build_embedder(hidden_size))
    # copied: a mapped file that another program overwrites would end this process
    model.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in weights.items()}, assign=True)
    return model.eval(), name


def spec_of(family, hidden_size, depth, patch_size, config, path, beside) -> tuple[str, ModelSpec]:
    """The name and the spec of a model of these sizes; its number of heads is the config's, or the one that fits.

    Raises ValueError, with the remedy, where nothing tells the number of heads.
    """
    heads = next((config[key] for key in HEADS if key in config), None)
    for name, spec in DiT_models.items():
        if (spec.family, spec.hidden_size, spec.depth, spec.patch_size) == (family, hidden_size, depth, patch_size):
            if heads in (None, spec.num_heads):
                return name, spec
    name = f"{family.__name__}-{depth}x{hidden_size}/{patch_size}"
    if heads is None and beside.is_file():
        values = read_json(beside)
        check_values(beside, values, {key: CONFIG[key] for key in HEADS})
        heads = next((values[key] for key in HEADS if key in values), None)
    if heads is None:
        named = {size[2] for size in SIZES.values() if size[:2] == (depth, hidden_size)}
        # heads of 64 and of 72 channels are the two widths that the published sizes have
        fitting = named or {hidden_size // width for width in (64, 72) if hidden_size % width == 0}
        if len(fitting) != 1:
            raise ValueError(
                f"checkpoint {path} is a {family.__name__} of depth {depth}, width {hidden_size}, patch {patch_size}, "
                f'which has no name in DiT_models and does not tell its heads: write {{"num_heads": N}} to {beside}'
            )
        (heads,) = fitting
    if hidden_size % heads:
        raise ValueError(f"checkpoint {path} has width {hidden_size}, which {heads} heads do not divide")
    return name, ModelSpec(family, patch_size, depth, hidden_size, heads)


def load_pretrained(path, model, state=None) -> str:
    """Load into a model to train those tensors of a checkpoint that fit. Returns a line that says what was taken.

    Raises ValueError if path holds no weights, or none that fit.
    """
    if state is not None and is_id(path):  # fetched by one process of each node, before the others read it
        fetched_by_node(state, lambda ask: locate(path, "--pretrained-path", ask))
    own, wanted = read_own(path, locate(path, "--pretrained-path")), model.state_dict()
    if own is not None:
        weights, _, meta = own
    else:
        source = read_layout(path, flag="--pretrained-path", prior=not isinstance(model, DiT))
        if source.in_diffusers:
            source = source.saying("trained on in DiT's function")
        weights, meta = source.values, with_layout(source)
        if not (source.is_eps or source.prior) and holds_velocity_model(source):
            source.refuse(VELOCITY)
    fit = {key: value for key, value in weights.items() if key in wanted and value.shape == wanted[key].shape}
    if not fit:
        raise ValueError(f"--pretrained-path {path} has no tensor that fits the model")
    model.load_state_dict(fit, strict=False)
    said = [f"{len(fit)} of {len(wanted)} tensors from {path} ({describe(meta)})"]
    said += [
        f"{key} not taken: {tuple(weights[key].shape)} there, {tuple(wanted[key].shape)} here"
        for key in sorted(
            (key for key in weights if key in wanted and key not in fit), key=lambda key: "embedding_table" not in key
        )[:5]
    ]
    for what, keys in (("left out", weights.keys() - wanted.keys()), ("new", wanted.keys() - weights.keys())):
        if keys:
            said.append(f"{what}: {', '.join(sorted(keys)[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}")
    return "; ".join(said)


def holds_velocity_model(source: Source) -> bool:
    """Whether weights are a whole DiT, by names and shapes, that predicts a velocity."""
    try:
        model, _ = model_from_weights(source.values, source.named, checked_config(source), source.config_path)
    except ValueError:  # a part of a model, of which what fits is taken
        return False
    return type(model) is DiT and predicts_velocity(model)


def weights_sha256(module) -> str:
    """A digest of a module's tensors and their names: it tells weights apart, whatever their file is called.

    A DiT that computes diffusers' function has another than with the same weights in DiT's.
    """
    digest = hashlib.sha256()
    if uses_diffusers_function(module):  # the same weights in another function
        digest.update(f"diffusers, eps {module.blocks[0].norm2.eps}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
