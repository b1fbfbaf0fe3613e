"""Sets of codes: what is compared, and what a set says of itself. Reading each layout: tests of sampling."""

import json

import numpy as np
from conftest import refusal

from dlc.data.codes import CodeSpec, compare
from dlc.sampling.code_folder import open_codes


def spec(owner="the model", **values):
    return CodeSpec(owner=owner, **{**dict(L=4, V=8, encoder_sha256="a"), **values})


def test_comparison():
    assert compare(spec(), spec("the prior")) == []
    for different, message in (
        (dict(L=5), "codes of the model have L=4, but those of the prior have L=5"),
        (dict(V=9), "codes of the model have V=8, but those of the prior have V=9"),
        (dict(encoder_sha256="b"), "codes of the model come from another encoder than those of the prior"),
    ):
        refusal(compare, spec(), spec("the prior", **different), words=message)
    (note,) = compare(spec(), spec("the prior", encoder_sha256=None, V=None))
    assert note == "the codes of the prior do not say which encoder made them: it was not compared"


def test_what_a_set_says(tmp_path):
    codes = np.arange(12).reshape(3, 4) % 8
    np.save(tmp_path / "000000.npy", codes)
    alone = open_codes(tmp_path / "000000.npy")
    assert (alone.L, alone.V, alone.encoder_sha256, alone.features, len(alone)) == (4, None, None, None, 3)
    np.testing.assert_array_equal(alone.gather([2, 0], 8), codes[[2, 0]])
    refusal(alone.gather, [1], 4, words="000000.npy, row 1: value 4 outside 0..3")
    record = dict(format_version=1, L=4, V=8, encoder_sha256="a", num=3, codes_sha256="b")
    (tmp_path / "codes.json").write_text(json.dumps(record))
    (tmp_path / "._000000.npy").write_bytes(b"a Mac's")
    assert compare(open_codes(tmp_path), spec()) == []
    for change, message in (
        (dict(num=300), "1 shards of codes, but codes.json says 2"),
        (dict(codes_sha256=None), "yet"),
    ):
        (tmp_path / "codes.json").write_text(json.dumps({**record, **change}))
        refusal(open_codes, tmp_path, words=message)
