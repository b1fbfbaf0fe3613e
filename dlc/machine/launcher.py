"""What accelerate's launcher asks for through the environment, and what of it goes with our flags."""

import os

# `accelerate launch` passes its configuration through these variables, on which accelerate's classes act by themselves.
# A setting that none of our flags covers is refused: otherwise it would be ignored in silence, or override a flag.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed: shard with FSDP (train_options/fsdp.yaml)",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM: shard with FSDP (train_options/fsdp.yaml)",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism: use --multi_gpu",
    "FSDP_OFFLOAD_PARAMS": "FSDP with parameters offloaded to the CPU: leave out fsdp_offload_params",
}
WANTED = {  # accepted values; the first is also the launcher's default
    "FSDP_SHARDING_STRATEGY": (("full_shard", "1"), "all parameters are sharded: fsdp_sharding_strategy FULL_SHARD"),
    "FSDP_RESHARD_AFTER_FORWARD": (("true", "full_shard", "1"), "blocks reshard: fsdp_reshard_after_forward true"),
    "FSDP_IGNORED_MODULES": (("none", ""), "all modules are sharded: leave out fsdp_ignored_modules"),
}


def environment(variable: str, default: str = "") -> str:
    """An environment variable in lower case. Unset and empty are the same, as for accelerate."""
    return (os.environ.get(variable) or default).lower()


def is_on(variable: str) -> bool:
    return environment(variable) in ("1", "true", "yes", "on", "y", "t")


def local_world_size() -> int | None:
    """The number of processes of this launch on this machine; None where LOCAL_WORLD_SIZE is no such number."""
    text = environment("LOCAL_WORLD_SIZE", "1")
    return int(text) if text.isascii() and text.isdigit() and int(text) else None


def refuse_launcher():
    """Raise ValueError if the launcher's variables ask for something that this program does not have."""
    if local_world_size() is None:
        raise ValueError(
            f"LOCAL_WORLD_SIZE {os.environ['LOCAL_WORLD_SIZE']} is no number of processes: unset it, or start the "
            "script with torchrun or accelerate launch"
        )
    if environment("ACCELERATE_FP8_BACKEND", "no") != "no":
        raise ValueError(
            f"ACCELERATE_FP8_BACKEND {os.environ['ACCELERATE_FP8_BACKEND']} asks for 8-bit training, which this "
            "program does not have: unset it"
        )
    for variable, what in REFUSED.items():
        if is_on(variable) and (is_on("ACCELERATE_USE_FSDP") or not variable.startswith("FSDP_")):
            raise ValueError(f"accelerate's configuration ({variable}) asks for {what}")
    if environment("ACCELERATE_TORCH_DEVICE"):
        raise ValueError(
            f"ACCELERATE_TORCH_DEVICE {os.environ['ACCELERATE_TORCH_DEVICE']} is set: unset it, and "
            "choose GPUs by CUDA_VISIBLE_DEVICES or the launcher's --cpu"
        )
    if is_on("ACCELERATE_USE_FSDP"):
        for variable, (values, what) in WANTED.items():
            if environment(variable, values[0]) not in values:
                raise ValueError(f"accelerate's configuration has {variable} {os.environ[variable]}, here {what}")
    if is_on("ACCELERATE_USE_PARALLELISM_CONFIG"):
        for kind in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP"):
            if environment(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") not in ("1", "none"):
                raise ValueError(
                    f"accelerate's configuration asks for PARALLELISM_CONFIG_{kind}_SIZE "
                    f"{os.environ[f'PARALLELISM_CONFIG_{kind}_SIZE']}: use --multi_gpu, or FSDP "
                    "(train_options/fsdp.yaml)"
                )


def asked_to_compile(flag: bool | None, on_gpu: bool) -> bool:
    """Whether to compile the blocks: --compile decides, else accelerate's dynamo backend, else the kind of device.

    Raises ValueError if the backend decides and is not supported.
    """
    if flag is not None:
        return flag
    backend, mode = environment("ACCELERATE_DYNAMO_BACKEND", "no"), environment("ACCELERATE_DYNAMO_MODE", "default")
    if backend not in ("no", "inductor") or backend == "inductor" and mode not in ("default", "none"):
        raise ValueError(
            f"accelerate's configuration asks for the dynamo backend {backend} in mode {mode}, wanted no, "
            "or inductor in mode default; --compile and --no-compile override it"
        )
    return on_gpu or backend == "inductor"


def unused_launcher_settings(grad_accum: int, checkpoint_activations: bool) -> list[str]:
    """Warnings about settings of accelerate's configuration that contradict our flags, which override them."""
    lines, steps = [], environment("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(grad_accum)):
        lines.append(f"accelerate's {steps} gradient accumulation steps are not used: --grad-accum {grad_accum} is")
    if is_on("ACCELERATE_USE_FSDP") and is_on("FSDP_ACTIVATION_CHECKPOINTING") and not checkpoint_activations:
        lines.append("accelerate's fsdp_activation_checkpointing is not used: give --checkpoint-activations")
    return lines


def asked_precision(precision: str | None = None) -> str:
    """What --precision and the launcher's --mixed_precision together ask for: "fp32", "bf16" or "fp16".

    Args:
        precision: one of these; or "amp": the launcher's 16 bits, else bf16; or None: the launcher decides. Its "no" is
            also its default, so it contradicts nothing.

    Raises ValueError if they contradict each other.
    """
    launchers = environment("ACCELERATE_MIXED_PRECISION", "no")
    if launchers not in ("no", "fp16", "bf16"):
        raise ValueError(f"the launcher's --mixed_precision {launchers}: this trains in fp16, bf16 or, by no, in fp32")
    if precision == "amp":
        return "bf16" if launchers == "no" else launchers
    if precision and launchers not in ("no", precision):
        raise ValueError(
            f"the launcher's --mixed_precision {launchers} contradicts --precision {precision}, which the "
            "files of train_options/ set, too: launch with --mixed_precision no, or leave the flag out"
        )
    return precision or ("fp32" if launchers == "no" else launchers)
