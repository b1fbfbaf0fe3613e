"""Sets of codes: what is compared, and what a set says of itself. Reading each layout: tests of sampling."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import refusal

from dlc.data.codes import CodeSpec, compare
from dlc.sampling.code_folder import digest_of, open_codes

MODEL = CodeSpec(owner="the model", L=4, V=8, encoder_sha256="a")


@pytest.mark.parametrize(
    "different, words",
    [
        (dict(L=5), "codes of the set have L=5, but those of the model have L=4"),
        (dict(V=9), "codes of the set have V=9, but those of the model have V=8"),
        (dict(encoder_sha256="b"), "codes of the set come from another encoder than those of the model"),
    ],
)
def test_comparison(different, words):
    refusal(compare, replace(MODEL, owner="the set", **different), MODEL, words=words)


def test_what_a_set_says(tmp_path):
    codes = np.arange(12).reshape(3, 4) % 8
    np.save(tmp_path / "000000.npy", codes)
    alone = open_codes(tmp_path / "000000.npy")
    (note,) = compare(alone, MODEL)
    assert note == f"the codes of {tmp_path}/000000.npy do not say which encoder made them: it was not compared"
    np.testing.assert_array_equal(alone.gather([2, 0], 8), codes[[2, 0]])
    refusal(alone.gather, [1], 4, words="000000.npy, row 1: value 4 outside 0..3")
    record = dict(
        format_version=1, L=4, V=8, encoder_sha256="a", num=3, codes_sha256=digest_of(alone.gather, np.arange(3))
    )
    (tmp_path / "codes.json").write_text(json.dumps(record))
    (tmp_path / "._000000.npy").write_bytes(b"a Mac's")
    assert compare(open_codes(tmp_path), MODEL) == [] and len(open_codes(tmp_path)) == 3
    for change, words in (
        (dict(num=300), "1 shards of codes, but codes.json says 2"),
        (dict(codes_sha256=None), "yet"),
        (dict(codes_sha256="b"), "are not those that were drawn"),
    ):
        (tmp_path / "codes.json").write_text(json.dumps(record | change))
        refusal(open_codes, tmp_path, words=words)
