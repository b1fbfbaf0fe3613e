"""All scripts: a mistake is one line under a launcher, too; every flag has help and is read; ruff's rules."""

import ast
import importlib
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT, launch, save_images

from diffusion.process_table import PROCESSES, SAMPLER_OPTIONS
from dlc.machine.cli import NotHere
from dlc.sampling.command import FLAGS
from dlc.sampling.prior_options import PriorOptions, flags_of

SCRIPTS = (
    *("extract_features_withdlc", "train_diffusion", "sample_ddp_computed_dlc", "sample_ddp", "compose_dlc"),
    *("train_prior", "sample_prior", "playground", "evaluate", "demo.networks"),
)


@pytest.mark.slow
def test_one_line_under_the_launcher(tmp_path):
    """Among what torchrun says of a failed child, the line appears once, and nothing is left behind."""
    save_images(tmp_path / "images", per_class=1)
    flags = ("--data-path", "images", "--image-size", 100)
    result = launch(("torchrun", 2, "extract_features_withdlc.py", *flags), tmp_path, check=False)
    assert result.returncode != 0
    assert result.stderr.count("error: --image-size 100 is not a multiple of 8") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_is_read(script, monkeypatch):
    parsers = []

    def parse_args(parser, argv=None):
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr("dlc.machine.cli.ArgumentParser.parse_args", parse_args)
    with pytest.raises(SystemExit):
        importlib.import_module(script).main()
    places = ("*.py", "dlc/**/*.py", "evaluation/*.py", "demo/*.py")
    read = {
        node.attr
        for path in [path for place in places for path in ROOT.glob(place)]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    read |= {f"prior_{flags_of(one)[0].replace('-', '_')}" for one in fields(PriorOptions)} | {*FLAGS}  # read in a loop
    read |= {*SAMPLER_OPTIONS} | {name for row in PROCESSES.values() for name in row.options}
    actions = [one for one in parsers[0]._actions if one.dest != "help" and not isinstance(one, NotHere)]
    assert len(actions) > 8
    for action in actions:
        assert action.help and action.dest in read, action.option_strings


@pytest.mark.slow
@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_sources_are_clean(command):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, ROOT], text=True, capture_output=True)
    assert result.returncode == 0, result.stdout
