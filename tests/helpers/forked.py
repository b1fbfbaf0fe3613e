"""Processes of the real scripts, forked from one that has everything imported, so that dozens can be killed per minute.

`Run` gives a script N ranks, as torchrun would, each a process of its own that may be killed at any moment.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import connection

from conftest import HELPERS, ROOT, TESTS, check_marked, free_port

context = multiprocessing.get_context("forkserver")
SCRIPTS = "extract_features_withdlc train_diffusion sample_ddp_computed_dlc train_prior sample_prior faulty".split()
# what they import where they use it
LATER = """accelerate.utils diffusers.models.autoencoders.autoencoder_kl matplotlib.backends.backend_agg
    matplotlib.figure timm.models.vision_transformer torch.distributed.fsdp torchvision tqdm""".split()
context.set_forkserver_preload([*SCRIPTS, *LATER, "forked"])
gc.freeze()  # in that server, too: its children do not look through what it has imported
# the server that is forked from looks for what it preloads here
PATHS = map(str, (ROOT, TESTS, HELPERS))
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])


def _run(script, arguments, environment, output, cwd, copy):
    multiprocessing.set_start_method("fork", force=True)  # a forked server's children would start workers by it
    os.setpgid(0, 0)  # with its data loader's workers, a group
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(cwd)
    sys.argv = [script, *arguments]
    if copy:
        sys.path.insert(0, copy)
        ours = {path.stem for path in ROOT.iterdir()}
        for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
            del sys.modules[name]
    if "ROUNDED" in environment:
        importlib.import_module("rounding").change_networks()
    module = importlib.import_module(script)
    module.main(**getattr(module, "OPTIONS", {}))


class Run:
    """The ranks of one launch of a script, or another module with a main, their output in the file `output`.

    fault: as `faulty` has them. copy: a folder of another copy of this repository, whose script it is.
    """

    def __init__(self, script, arguments, output, processes=1, cwd=".", environment=None, fault=None, copy=""):
        check_marked()
        self.output, port = output, str(free_port())
        script, arguments = ("faulty", [fault, script, *arguments]) if fault else (script, arguments)
        self.ranks = []
        for rank in range(processes):
            variables = dict(HF_HUB_OFFLINE="1", GOMP_SPINCOUNT="1000", OMP_NUM_THREADS="1", **(environment or {}))
            if "ROUNDED" in os.environ:
                variables["ROUNDED"] = "1"
            if processes > 1:
                variables.update(dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes)))
                variables.update(dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)))
                variables.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            arguments = [str(word) for word in arguments]
            words = (script, arguments, variables, str(output), str(cwd), str(copy))
            self.ranks.append(context.Process(target=_run, args=words))
        for rank in self.ranks:
            rank.start()

    def said(self):
        return self.output.read_text()

    def wait(self, seconds=300):
        """Whether all ranks ended well in that time."""
        deadline = time.time() + seconds
        for rank in self.ranks:
            rank.join(max(0, deadline - time.time()))
        return all(rank.exitcode == 0 for rank in self.ranks)

    def dies(self):
        """Wait until a rank was killed, at a point that `faulty` names, and kill the others as a launcher would."""
        while all(rank.exitcode != -signal.SIGKILL for rank in self.ranks):
            alive = [rank.sentinel for rank in self.ranks if rank.is_alive()]
            assert alive and connection.wait(alive, timeout=300), self.said()
        self.end()

    def end(self):
        """Kill all ranks and their data loaders' workers."""
        for rank in self.ranks:
            rank.kill()
            try:
                os.killpg(rank.pid, signal.SIGKILL)
            except ProcessLookupError:  # no workers, or no group yet
                pass
            rank.join()
