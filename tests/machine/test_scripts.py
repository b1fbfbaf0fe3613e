"""A mistake is one line under a launcher, too; and ruff's rules."""

import subprocess
import sys

import pytest
from conftest import ROOT, launch, save_images


@pytest.mark.slow
def test_one_line_under_the_launcher(tmp_path):
    """Among what torchrun says of a failed child, the line appears once, and nothing is left behind."""
    save_images(tmp_path / "images", per_class=1)
    flags = ("--data-path", "images", "--image-size", 100)
    result = launch(("torchrun", 2, "extract_features_withdlc.py", *flags), tmp_path, check=False)
    assert result.returncode != 0
    assert result.stderr.count("error: --image-size 100 is not a multiple of 8") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_sources_are_clean(command):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], text=True, capture_output=True)
    assert result.returncode == 0, result.stdout
