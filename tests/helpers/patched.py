"""Run scripts of a patched copy of this repository: `python patched.py ROOT < commands.json`, each `[script, flags…]`.

Libraries are imported once, and each command is a forked child: a process of its own with the copy's modules. Prints
one line of JSON for each: its exit status and its output.
"""

import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback

HEAVY = """accelerate.utils diffusers.models.autoencoders.autoencoder_kl matplotlib.backends.backend_agg
    timm.models.vision_transformer torch.distributed.fsdp torchvision tqdm""".split()
for name in HEAVY:  # what the scripts import, partly where they use it
    importlib.import_module(name)


def run(root, script, flags):
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.path[0] = root
                sys.argv = [script, *flags]
                if script.startswith("-m "):
                    runpy.run_module(script[3:], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(os.path.join(root, script), run_name="__main__")
                status = 0
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else int(error.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return dict(script=script, status=os.waitstatus_to_exitcode(status), output=output.read())


if __name__ == "__main__":
    for script, *flags in json.load(sys.stdin):
        print(json.dumps(run(sys.argv[1], script, flags)), flush=True)
