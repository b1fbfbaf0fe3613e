"""--stop-after: a chain of launches that each end in time, with a checkpoint."""

import time

import pytest
from forked import Run

from dlc.training.stop import StopRequest


def test_the_end_of_the_time(monkeypatch):
    monkeypatch.setattr("dlc.training.stop.on_first_signal", lambda *_: None)
    assert StopRequest().agreed() is None
    request = StopRequest(time.monotonic() - 1)
    assert request.agreed() == "--stop-after"
    request.ask("the disk is full")
    assert request.agreed() == "an error"


@pytest.mark.slow
def test_a_chain(features, tmp_path):
    flags = ("--model", "DiTSEM-Ti/4", "--features-path", features, "--results-dir", tmp_path / "run", "--max-steps", 2)
    flags += ("--global-batch-size", 4, "--num-workers", 0, "--sample-every", 0)
    for said in ("stopped by --stop-after after step 1; the same command continues", "continued from"):
        run = Run("train_diffusion", [*flags, "--stop-after", 0], tmp_path / "output.txt")
        assert run.wait() and said in run.said(), run.said()
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == ["0000001", "0000002"]
