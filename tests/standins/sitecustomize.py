"""What Python runs at the start of every process that has this folder in its PYTHONPATH."""

import rounding

rounding.install()
