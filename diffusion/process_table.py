"""The table of processes: what a model can be trained on, by the name that its checkpoint records.

    process = create_process("gaussian", timestep_respacing="")
    process.config                          # {"process": "gaussian", "arguments": {...}}: builds it again

To add one, write its class in a file beside this one and give it a row in PROCESSES.
"""
import inspect

from . import GaussianDiffusion, create_diffusion
from .masked import MaskedDiffusion

Process = GaussianDiffusion | MaskedDiffusion
PROCESSES = {"gaussian": create_diffusion, "masked": MaskedDiffusion}


def create_process(name: str, **arguments) -> Process:
    """A process by its name in PROCESSES. It keeps the name and all arguments, with the defaults, as `config`.

    Raises ValueError for a name or arguments that do not exist.
    """
    if name not in PROCESSES:
        raise ValueError(f"there is no process called {name!r}: {', '.join(PROCESSES)}")
    try:
        bound = inspect.signature(PROCESSES[name]).bind(**arguments)
    except TypeError as error:
        raise ValueError(f"process {name}: {error}") from None
    bound.apply_defaults()
    try:
        process = PROCESSES[name](**arguments)
    except TypeError as error:      # a value of another type, as from an edited config.json
        raise ValueError(f"process {name}: {error}") from None
    process.config = dict(process=name, arguments=dict(bound.arguments))
    return process
