"""Diffusion transformers of others: DiT's names, which are ours, and those of diffusers' DiTTransformer2DModel.

diffusers' network and DiT differ only in two constants. diffusers spaces the 128 frequencies of the time embedding over
127 steps, DiT over 128; and its blocks' second norm has the eps of the configuration, 1e-5 by default, where DiT has
1e-6. Weights that were trained in DiT and converted are right under DiT's constants, weights that were trained in
diffusers under its own; a folder of diffusers does not record which.
"""

import math
import re
from functools import partial

import torch

from diffusion.process_table import create_process
from dlc.weights.foreign import sits
from dlc.weights.foreign.layouts import File, blocks_in
from dlc.weights.foreign.safe import shown
from models import FAMILIES, SIZES, DiT, sincos_position_embedding

DEEPEST, WIDEST = 256, 2**16  # blocks; of every other size that a file asks for
DEFAULT_INPUT = 32  # cells of a latent's side where nothing tells: 256 pixels at 8 pixels per cell
DIFFUSERS_TIMES = ("dit", "diffusers")  # --diffusers-time
DIFFUSERS_EPS = 1e-5  # of each block's second norm; DiT's is 1e-6
# Names of modules, ours and theirs: at the top, and in block N. Theirs has the embedders in every block.
TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
ANCHOR = "proj_out_2.weight"  # by which it is recognised
# what config.json may not have otherwise, though the tensors would be the same
FIXED = dict(
    norm_type="ada_norm_zero",
    activation_fn="gelu-approximate",
    norm_elementwise_affine=False,
    only_cross_attention=False,
    double_self_attention=False,
)
THIRDS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")  # of attn.qkv


def from_diffusers(file: File, tensors: dict) -> dict:
    """Tensors under diffusers' names, under ours; those with other names stay as they are.

    A code table (L, V+1, D) in the place of the labels' is a DiTSEM's. The rows of the label table that our export adds
    between the last class, which it records, and the null label are left out.

    Raises ValueError where the blocks' copies of the embedders differ: such a model was trained in diffusers, and no
    DiT computes its function.
    """
    for key, wanted in FIXED.items():
        if file.config.get(key) not in (wanted, None):
            file.refuse(f"is not a DiT: {key} in its config.json is {str(file.config[key])[:40]!r}, wanted {wanted!r}")
    named = {}
    ours = {theirs: ours for names in (TOP, BLOCK, EMBEDDERS) for ours, theirs in names.items()}
    for key, value in tensors.items():
        inner = re.fullmatch(r"transformer_blocks\.(0|[1-9]\d{0,3})\.(.+)", key, re.ASCII)
        module, _, kind = (inner[2] if inner else key).rpartition(".")
        if inner and kind == "embedding_table":  # a parameter of its own, as of a code table
            module, kind = inner[2], "weight"
        name = f"{ours.get(module, module)}.{kind}"
        if not inner:
            named[name if module in TOP.values() else key] = value
        elif module in EMBEDDERS.values():
            first = named.setdefault(name, value)
            if first.dtype != value.dtype or not torch.equal(first, value):
                file.refuse(
                    f"has different copies of the time and label embedders in its blocks ({shown(key)}), as training "
                    "in diffusers makes them; DiT has one for all blocks, and cannot compute this model"
                )
        elif module == THIRDS[0]:
            parts = [tensors.get(key.replace(module, third)) for third in THIRDS]
            if any(part is None or part.shape != value.shape for part in parts) or not value.ndim:
                file.refuse(f"has to_q, to_k and to_v of different shapes in block {inner[1]}")
            named[f"blocks.{inner[1]}.attn.qkv.{kind}"] = torch.cat(parts)
        elif module not in THIRDS:
            named[f"blocks.{inner[1]}.{name}"] = value
    table, classes = named.get("y_embedder.embedding_table.weight"), file.config.get("_num_classes")
    if table is not None and table.ndim == 3:
        named["sem_embedder.embedding_table"] = named.pop("y_embedder.embedding_table.weight")
    elif table is not None and table.ndim and type(classes) is int and 0 < classes < len(table):
        named["y_embedder.embedding_table.weight"] = table[: classes + 1]
    return named


def to_diffusers(weights: dict) -> dict:
    """A DiT's state dict under diffusers' names: pos_embed left out, the embedders in every block."""
    named, depth = {}, len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    for key, value in weights.items():
        module, _, kind = key.rpartition(".")
        inner = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if module in TOP:
            named[f"{TOP[module]}.{kind}"] = value
        elif module in EMBEDDERS:
            for number in range(depth):
                named[f"transformer_blocks.{number}.{EMBEDDERS[module]}.{kind}"] = value.clone()
        elif inner and inner[2] == "attn.qkv":
            for third, part in zip(THIRDS, value.chunk(3)):
                named[f"transformer_blocks.{inner[1]}.{third}.{kind}"] = part.contiguous()
        elif inner:
            named[f"transformer_blocks.{inner[1]}.{BLOCK[inner[2]]}.{kind}"] = value
        else:
            assert key == "pos_embed", key
    return named


def use_diffusers_function(model: DiT, eps: float = DIFFUSERS_EPS) -> DiT:
    """Have a DiT compute what diffusers computes with the same weights. Returns the model."""
    from diffusers.models.embeddings import get_timestep_embedding

    model.t_embedder.timestep_embedding = partial(get_timestep_embedding, flip_sin_to_cos=True)
    for block in model.blocks:
        block.norm2.eps = eps
    model.function = f"diffusers, eps {eps}"  # for its digest
    return model


def uses_diffusers_function(model: torch.nn.Module) -> bool:
    """Whether `use_diffusers_function` was called for a model."""
    return getattr(model, "function", "").startswith("diffusers")


def under_our_names(file: File, tensors: dict) -> dict:
    """Tensors of DiT's names; SiT's and REPA's as `sits.as_flow` makes them. LightningDiT has other blocks: refused."""
    for name, pattern in (("LightningDiT", r".*\.mlp\.w12\.|feat_rope\."), ("DDT", r"decoder_blocks\.")):
        if any(re.match(pattern, key) for key in tensors):
            file.refuse(f"is a {name} model, whose blocks are not DiT's: it is not read")
    whose = sits.recognised(file, tensors)
    if whose:
        file.words.append(sits.as_flow(file, tensors, whose))
    kept = {key: value for key, value in tensors.items() if not key.startswith("projectors.")}
    file.words.append(len(kept) < len(tensors) and "its projectors left out")  # of its training, and of no sample
    return kept


def config_of(
    file: File,
    tensors: dict,
    input_size: int | None = None,
    diffusers_time: str | None = None,
    process: str | None = None,
) -> dict:
    """What to build for a DiT's tensors, {"family", "arguments", "process"}. Adds a missing pos_embed.

    The options are those of `dlc.weights.load.load_model`. Raises ValueError if it is no DiT, DiTSEM or DiTCONT.
    """
    shape = partial(file.shape, tensors)
    trained_on = trained_process(file, process)
    if process == sits.PROCESS and file.process is None:
        file.words.append(f"taken to predict a {sits.as_flow(file, tensors, None)} (--objective)")
    elif process not in (None, file.process or process):
        file.refuse(f"says what it was trained on, the process {file.process}: leave out --objective")
    hidden_size, in_channels, patch_size, _ = shape("x_embedder.proj.weight", 4)
    # from the last: a DiTCONT's linear layer is called as a DiT's table
    own = [family for family in reversed(FAMILIES) if "table" in vars(family)]  # a researcher's subclass has none
    family = next((family for family in own if family.table in tensors), FAMILIES[0])
    depth = blocks_in(tensors)
    arguments = dict(
        family.sizes_of(shape(family.table, family.table_ndim)),
        in_channels=in_channels,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=heads_of(file, depth, hidden_size),
        mlp_ratio=mlp_ratio(tensors, hidden_size),
        learn_sigma=shape("final_layer.linear.bias", 1)[0] == 2 * in_channels * patch_size**2,
    )
    if family is DiT:
        file.words.append(check_classes(file, arguments["num_classes"]))
    if "pos_embed" in tensors:
        arguments["input_size"] = patch_size * math.isqrt(shape("pos_embed", 3)[1])
    else:
        recorded = file.arguments.get("image_size")
        recorded = recorded // 8 if type(recorded) is int else None  # of DiT's training, whose VAEs have 8 per cell
        told = [file.config.get("input_size"), file.config.get("sample_size"), recorded, input_size]
        arguments["input_size"] = next((size for size in told if size), DEFAULT_INPUT)
        if not any(told):
            file.words.append(f"no pos_embed: taken to be of latents of {DEFAULT_INPUT} x {DEFAULT_INPUT} cells")
    check_sizes(file, family.__name__, arguments)
    if "pos_embed" not in tensors:
        tensors["pos_embed"] = sincos_position_embedding(hidden_size, arguments["input_size"] // patch_size)[None]
    if any(name.endswith(ANCHOR) for name in file.tensors):
        file.words.append(function_of(file, diffusers_time))
    elif diffusers_time == "diffusers":
        file.refuse("is not in diffusers' layout: --diffusers-time diffusers is for those that were trained there")
    elif process is None and file.process is None and file.weights == "as in the file" and not file.arguments:
        file.words.append("taken to predict noise (--objective says another)")
    return dict(family=family.__name__, arguments=arguments, process=trained_on)


def trained_process(file: File, asked: str | None = None) -> dict | None:
    """What weights were trained on, as `create_process` describes it; None where nothing says it.

    Our export to diffusers records it, which is noted in the file. Else it is what was recognised, or asked for.
    """
    recorded, name = file.config.get("_process"), file.process or asked
    if recorded is None:
        return name and create_process(name).config
    try:
        config = create_process(recorded["process"], **recorded["arguments"]).config
    except (TypeError, KeyError, ValueError):
        file.refuse(f"says _process {shown(recorded)} in its config.json, which this program does not know")
    file.process = config["process"]
    return config


def check_classes(file: File, classes: int) -> str:
    """Compare the number of classes that a label table has beside its null row with what the file says. Returns words
    where it says nothing. Raises ValueError for another number, such as that of a table without a null row."""
    keys = ("num_classes", "num_embeds_ada_norm", "_num_classes")
    said = [where.get(key) for where in (file.arguments, file.config) for key in keys]
    said = [number for number in said if type(number) is int]
    if said and said[-1] != classes:
        null = ": it was trained without a null label, and is not read" if said[-1] == classes + 1 else ""
        file.refuse(f"says {said[-1]} classes, and its table of labels has {classes + 1} rows{null}")
    return "" if said else f"{classes:,} classes and the null label"


def function_of(file: File, diffusers_time: str | None) -> str:
    """Note whose function a file of diffusers computes, which its layout leaves open. Returns words for it."""
    recorded, eps = file.config.get("_trained_with"), file.config.get("norm_eps", DIFFUSERS_EPS)
    chosen = diffusers_time or (recorded if recorded in DIFFUSERS_TIMES else "dit")
    if chosen == "diffusers":
        if type(eps) not in (int, float) or not 0 < eps < 1:
            file.refuse(f"says norm_eps {shown(eps)} in its config.json, wanted a number between 0 and 1")
        file.noted.update(trained_with="diffusers", norm_eps=eps)
    why = "as asked" if diffusers_time else "as recorded" if recorded else "--diffusers-time gives the other"
    return f"with the time frequencies and eps of {'DiT' if chosen == 'dit' else 'diffusers'} ({why})"


def mlp_ratio(tensors: dict, hidden_size: int) -> float:
    """The width of the MLPs over that of the rest, such that the model, which takes the whole part, has that width."""
    inner = tensors["blocks.0.mlp.fc1.bias"].numel() if "blocks.0.mlp.fc1.bias" in tensors else 0
    exact = hidden_size > 0 and int(hidden_size * (inner / hidden_size)) == inner
    return inner / hidden_size if exact else (inner + 0.5) / max(hidden_size, 1)


def heads_of(file: File, depth: int, hidden_size: int) -> int:
    """The number of heads: the config's, or that of the published size of this depth and width."""
    heads = file.config.get("num_heads", file.config.get("num_attention_heads"))
    heads = heads or next((size[2] for size in SIZES.values() if size[:2] == (depth, hidden_size)), None)
    if heads is None:
        file.refuse(
            f"is a DiT of depth {depth} and width {hidden_size}, no published size, and does not tell its heads: write "
            f'{{"num_heads": N}} to {file.path.with_name("config.json")}'
        )
    return heads


def check_sizes(file: File, what: str, arguments: dict) -> None:
    """Refuse sizes that no model has, before anything is built for them. The only bounds on what a file asks for."""
    sizes = {key: value for key, value in arguments.items() if key not in ("learn_sigma", "mlp_ratio")}
    for key, value in sizes.items():
        if type(value) is not int or not 1 <= value <= (DEEPEST if key == "depth" else WIDEST):
            file.refuse(f"is no {what}: by its shapes and config, {key} is {shown(repr(value))}")
    if arguments["hidden_size"] % arguments["num_heads"]:
        file.refuse(f"has width {arguments['hidden_size']}, which {arguments['num_heads']} heads do not divide")
