"""The plumbing between the scripts: encoder, features on disk, VAE, checkpoints, sampling engine, runtime."""

import os
import sys

if sys.platform == "win32":
    sys.exit("DLC-DiT runs on Linux and macOS, not on Windows: use the Windows Subsystem for Linux (WSL 2)")

# A stream that the shell closed (2>&-) leads nowhere; otherwise its number, and so what is printed, would go to the
# next file that is opened.
for _number, _name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, _name) is None:
        _null = os.open(os.devnull, os.O_RDWR)
        if _null > _number:
            try:
                os.fstat(_number)
            except OSError:
                os.dup2(_null, _number)
        setattr(sys, _name, os.fdopen(_null, "w" if _number else "r"))
