"""playground.py: the page draws what the script draws; and the page itself in a real browser, where there is one.

The browser's test needs requirements-playground.txt, playwright (pip install playwright) and Debian's chromium.
"""

import shlex
import shutil
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from conftest import L, V, assert_codes
from PIL import Image
from tiny_prior import save_prior

import playground
from compose_dlc import compose

pytestmark = pytest.mark.slow
CHROMIUM = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
SETTINGS = ("dpmsolver++", 5, 1.5, 3)  # sampler, steps, guidance, seed


@pytest.fixture(scope="module")
def studio(workplace, tmp_path_factory):
    prior = save_prior(tmp_path_factory.mktemp("prior") / "results_prior/checkpoints/0000003")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["playground.py", "--ckpt", str(workplace / "results"), "--prior", str(prior)])
        return playground.Studio(playground.parse_args()[1])


def rows(*numbers):
    return [(None, str(number)) for number in numbers] + [(None, "")] * (3 - len(numbers))


def last(studio, do, sources, weights=(1.0, 1.0, 1.0), keep=2, num=3, settings=SETTINGS):
    *shown, end = studio.answer(do, sources, list(weights), num, keep, *settings)
    assert len(shown) >= playground.SHOWN and not any("files" in one for one in shown)
    return end, np.load(end["files"][1])


def test_the_same_as_the_script(studio, images, workplace, said_by, monkeypatch, tmp_path):
    """The same bytes by the command that the page shows; images and rows of the same pictures have the same codes."""
    files = [(str(images / "cat/3.png"), ""), *rows(7)[:2]]
    end, codes = last(studio, "mix", files, weights=(1.0, 0.5, 1.0))
    assert_codes(studio.code_of(None, "3")[0][None], studio.code_of(*files[0])[1].log()[None])
    sources = torch.stack([studio.code_of(*source)[0] for source in files[:2]])
    np.testing.assert_array_equal(codes, compose(sources, torch.tensor([1.0, 0.5]), 3, 3)[0])
    script, *words = shlex.split(end["command"])[1:]
    words[words.index("codes.npy")] = end["files"][1]
    monkeypatch.chdir(workplace)
    said_by(script.removesuffix(".py"), *words, "--sample-dir", tmp_path)
    drawn = np.load(next(tmp_path.glob("*.npz")))["arr_0"]
    np.testing.assert_array_equal(drawn, np.stack([image for image, _ in end["images"]]))
    assert Image.open(end["files"][0]).width >= 3 * 64 and len(end["strip"]) == 3 * 12


def test_new_codes_and_variations(studio):
    code = studio.code_of(None, "5")[0].numpy()
    end, codes = last(studio, "vary", rows(5), keep=2)
    assert ((codes == code).sum(axis=1) >= 2).all() and codes.max() < V and "drawn 67%" in end["said"]
    assert (last(studio, "vary", rows(5), keep=L)[1] == code).all()
    first, again, other = (last(studio, "new", rows(), settings=(*SETTINGS[:3], seed))[1] for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_mistakes_are_told_in_words(studio):
    for do, sources, more, words in (
        ("mix", rows(1), {}, "two or more to mix"),
        ("vary", rows(), {}, "one to vary"),
        ("mix", rows(1, 99), {}, "row 99: the features have rows 0 to 13"),
        ("mix", [("nowhere.png", ""), (None, "1")], {}, "cannot read nowhere.png"),
        ("mix", rows(1, 2), dict(weights=(0.0, 0.0, 1.0)), "raise one"),
        ("new", rows(), dict(settings=("heun", 5000, 1.5, 0)), "--num-sampling-steps: 5000: must be"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            last(studio, do, sources, **more)


def test_in_a_browser(studio, images, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no chromium")
    page = playground.build_page(studio)
    url = playground.launch(page, 0)
    assert url.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{url}gradio_api/file=/etc/hostname")
    outside = []
    with sync_api.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=CHROMIUM)
        tab = browser.new_page(viewport=dict(width=1280, height=900))
        tab.set_default_timeout(300_000)
        tab.on("request", lambda one: outside.append(one.url) if not one.url.startswith((url, "data:", "blob:")) else 0)
        tab.goto(url)
        tab.get_by_role("button", name="Mix").click()
        tab.get_by_text("upload images, or name rows: two or more to mix").wait_for()
        for number, name in ((1, "cat/3.png"), (2, "dog/2.png")):
            tab.set_input_files(f"#source-{number} input[type=file]", images / name)
            tab.locator(f"#source-{number} img").wait_for()
        tab.get_by_label("number input for share of tokens").nth(1).fill("0")
        tab.get_by_label("number input for steps").fill("3")
        tab.get_by_role("button", name="Mix").click()
        tab.get_by_text("Tokens: source 1 100%. Code agreement").wait_for()
        command = tab.locator("#command textarea").input_value()
        assert "--num-sampling-steps 3 " in command and "4 " in command
        with tab.expect_download() as download:
            tab.locator("a[download='codes.npy']").first.click()
        download.value.save_as(tmp_path / "codes.npy")
        browser.close()
    page.close()
    assert not outside
    code = studio.code_of(str(images / "cat/3.png"), "")[0].numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), np.tile(code, (4, 1)))
