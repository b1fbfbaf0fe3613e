"""The table of processes: what a model can be trained on, by the name that its checkpoint records.

    process = create_process("gaussian", timestep_respacing="")
    process.config                          # {"process": "gaussian", "arguments": {...}}: builds it again
    samplers_of(process)                    # those that draw from models trained on it, by name

To add one, write its class in a file beside this one and give it a row in PROCESSES. A process of latents has
    training_times(u)                       # (N,) uniforms in [0, 1), float64, to times t (N,)
    training_losses(model, x_start, t, model_kwargs, noise)     # dict of (N,): "loss", then its main part, if any
    target(x_start, noise, t)               # what its models' first C channels are to be
    num_timesteps, last_time                # t is below the one in training, and up to the other in its samplers
    model_arguments                         # dict, of the constructor of its models
"""
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from . import GaussianDiffusion, create_diffusion
from .flow import FLOW_OPTIONS, FLOW_SAMPLERS, Flow
from .masked import MaskedDiffusion
from .masked_samplers import CODE_SAMPLERS
from .options import Option, uses_of
from .samplers import SAMPLERS, SamplerSpec

Process = GaussianDiffusion | Flow | MaskedDiffusion


@dataclass(frozen=True)
class ProcessRow:
    """What a name in PROCESSES stands for."""
    build: Callable                                 # the process from its arguments
    objective: str | None = None                    # its name for --objective; None: not of latents
    about: str = ""                                 # completes "--objective NAME: …" in the scripts' help
    options: dict[str, Option] = field(default_factory=dict)        # arguments that are flags in training
    samplers: dict[str, SamplerSpec] = field(default_factory=dict)  # the first is the default


PROCESSES = {
    "gaussian": ProcessRow(create_diffusion, "ddpm", "predict noise and variance", samplers=SAMPLERS),
    "flow": ProcessRow(Flow, "flow", "flow matching, predict a velocity", FLOW_OPTIONS, FLOW_SAMPLERS),
    "masked": ProcessRow(MaskedDiffusion, samplers=CODE_SAMPLERS),
}
OBJECTIVES = {row.objective: name for name, row in PROCESSES.items() if row.objective}
# the samplers of all of them by name, of which two may have the same; and the options of objectives and of samplers
OF_LATENTS = [PROCESSES[name] for name in OBJECTIVES.values()]
LATENT_SAMPLERS = {name: [row.samplers[name] for row in OF_LATENTS if name in row.samplers]
                   for name in dict.fromkeys(name for row in OF_LATENTS for name in row.samplers)}
OBJECTIVE_OPTIONS = uses_of((row.objective, row.build, row.options) for row in OF_LATENTS)
SAMPLER_OPTIONS = uses_of((name, spec.build, spec.options) for name, specs in LATENT_SAMPLERS.items()
                          for spec in specs)


def create_process(name: str, **arguments) -> Process:
    """A process by its name in PROCESSES. It keeps the name and all arguments, with the defaults, as `config`.

    Raises ValueError for a name or arguments that do not exist.
    """
    if name not in PROCESSES:
        raise ValueError(f"there is no process called {name!r}: {', '.join(PROCESSES)}")
    build = PROCESSES[name].build
    try:
        process = build(**arguments)
    except TypeError as error:      # other arguments, or a value of another type, as from an edited config.json
        raise ValueError(f"process {name}: {error}") from None
    own = inspect.signature(build).parameters.values()      # what **kwargs passes on to a base is in arguments
    defaults = {one.name: one.default for one in own if one.kind is not one.VAR_KEYWORD}
    process.config = dict(process=name, arguments=defaults | arguments)
    return process


def predicted_by(config: dict) -> dict:
    """Of a process's `config`, what decides the output of models that are trained on it."""
    options = PROCESSES[config["process"]].options
    only = {name for name, option in options.items() if option.training_only}
    return dict(config, arguments={name: value for name, value in config["arguments"].items() if name not in only})


def describe_process(process: Process) -> str:
    """A process in words: its name and its arguments."""
    arguments = ", ".join(f"{name} {value!r}" for name, value in process.config["arguments"].items())
    return f"process {process.config['process']} ({arguments})"


def samplers_of(process: Process) -> dict[str, SamplerSpec]:
    """The samplers that draw from models trained on a process, by name, the default first."""
    return {name: spec for name, spec in PROCESSES[process.config["process"]].samplers.items()
            if spec.assumed.items() <= process.config["arguments"].items()}
