"""Damaged lines of metrics.jsonl."""

import re

from PIL import Image

from dlc.training.metrics_file import draw_losses, read_metrics


def test_metrics_that_are_not_finite(tmp_path, capsys):
    """Such lines are left out with one warning; the plot is drawn from the others."""
    lines = ['{"step": 1, "loss": 0.5}', '{"step": 2, "loss": 1e400}', '{"step": 3, "loss": NaN}']
    lines.append(f'{{"step": {10**30}, "loss": 0.25}}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics == [dict(step=1, loss=0.5)]
    assert re.fullmatch("warning: .*metrics.jsonl: 3 damaged lines.*\n", capsys.readouterr().err)
    draw_losses(metrics, tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (800, 400)
