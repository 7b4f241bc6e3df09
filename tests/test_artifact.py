"""The artifact: exact round trips, damaged and hostile files, compressors and their tools, row
order.
"""

import json
import lzma
import math
import os
import random
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact_helpers import model_arrays, published_arrays
from quantization_helpers import small_model

import train_gpt
from presets import published
from train_gpt import ArtifactError

brotli = pytest.importorskip("brotli")

GOLDEN = (
    Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "data" / "golden"))
    / "quantization.npz"
)
needs_lrzip = pytest.mark.skipif(
    shutil.which("lrzip") is None, reason="the lrzip program is not installed"
)
pytestmark = pytest.mark.usefixtures("published")  # which has two more compressors
COMPRESSORS = ["brotli", "lzma", "entropy", pytest.param("pergroup", marks=needs_lrzip)]


def odd_arrays():
    """Every dtype, empty and 0-d arrays, strides, byte orders, NaN payloads and negative zeros."""
    rng = np.random.default_rng(1)
    arrays = {
        f"dtype/{name}": rng.integers(0, 2, (3, 5)).astype(name) for name in train_gpt.ARRAY_DTYPES
    }
    arrays |= {f"scalar/{name}": np.array(1, name) for name in train_gpt.ARRAY_DTYPES}
    arrays |= {"empty": np.zeros((0,), np.int8), "empty/3d": np.zeros((4, 0, 2), np.float16)}
    arrays["nan"] = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x7FA00000], np.uint32).view(
        np.float32
    )
    arrays["strided"] = rng.integers(0, 9, (6, 8)).astype(np.int16)[::2, ::-3]
    arrays["fortran"] = np.asfortranarray(rng.random((4, 6)))
    arrays["big_endian"] = np.arange(6, dtype=">u4").reshape(2, 3)
    arrays["naïve/名前"] = np.arange(3, dtype=np.uint8)
    arrays["tok_emb.weight:codes"] = np.zeros((0, 16), np.int8)
    arrays["blocks.0.attn.c_q.weight:codes"] = np.zeros((4, 0), np.int8)
    arrays["blocks.1.attn.c_q.weight:codes"] = np.array([[-128, 127], [127, -128]], np.int8)
    arrays["blocks.0.attn.c_k.weight:codes"] = np.ones((2, 2), np.float32)
    return arrays | {"blocks.0.attn.c_v.weight:codes": np.array(3, np.int8)}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        native = array.astype(array.dtype.newbyteorder("="))
        assert found[name].dtype == native.dtype and found[name].shape == native.shape, name
        assert found[name].tobytes() == native.tobytes(), name


def kinds_of_fields(arrays):
    """{(field, dtype, number of dimensions)}"""
    return {(key.rpartition(":")[2], a.dtype.name, a.ndim) for key, a in arrays.items()}


def test_the_arrays_of_these_tests_have_the_fields_of_a_default_artifact(dist):
    """Or else nothing here would try how such fields are read."""
    weights, hessians = small_model(num_layers=1)
    weights["tok_emb.weight"][:, 3] *= 6  # wide codes, as a trained embedding has
    hessians["tok_emb.weight"][3, :] *= 60
    hessians["tok_emb.weight"][:, 3] *= 60
    weights["q_gain"] = torch.ones(1, 4)
    weights["smear_lambda"] = torch.ones(1)
    hp = train_gpt.Hyperparameters(device="cpu")
    made = train_gpt.quantize_weights(weights, hessians, hp, dist)
    assert kinds_of_fields(model_arrays()) == kinds_of_fields(made)


# --- round trips


@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("make", [model_arrays, published_arrays, odd_arrays, dict])
def test_pack_unpack_is_exact(compressor, make):
    arrays = make()
    assert_same(train_gpt.unpack_weights(train_gpt.pack_weights(arrays, compressor)), arrays)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_unpacked_arrays_are_contiguous_and_writable(compressor):
    for array in train_gpt.unpack_weights(
        train_gpt.pack_weights(model_arrays(), compressor)
    ).values():
        assert array.flags.c_contiguous and array.flags.writeable


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_packing_is_deterministic(compressor):
    first, second = (train_gpt.pack_weights(model_arrays(), compressor) for _ in range(2))
    assert_same(train_gpt.unpack_weights(first), train_gpt.unpack_weights(second))
    if compressor != "pergroup":  # lrzip writes the time and a hash of its own into its file
        assert first == second


@pytest.mark.parametrize("compressor", ["brotli", "lzma"])
def test_compressed_arrays_are_smaller_than_raw(compressor):
    arrays = {"x": np.tile(np.arange(64, dtype=np.float16), 500)}
    assert len(train_gpt.pack_weights(arrays, compressor)) < 0.1 * arrays["x"].nbytes


def test_byte_shuffle_puts_low_bytes_before_high_bytes():
    specs = [train_gpt.ArraySpec("a", "uint16", (2,)), train_gpt.ArraySpec("b", "uint16", (1,))]
    arrays = {"a": np.array([0x0102, 0x0304], np.uint16), "b": np.array([0x0506], np.uint16)}
    assert train_gpt.join_arrays(arrays, specs) == bytes([2, 4, 6, 1, 3, 5])


def test_pergroup_gathers_roles_in_order_and_layers_by_number(published):
    arrays = model_arrays(num_layers=12)
    specs = [
        train_gpt.ArraySpec(name, array.dtype.name, array.shape) for name, array in arrays.items()
    ]
    plan = train_gpt.plan_sections(specs, "pergroup")
    assert [kind for kind, _, _ in plan] == ["codes"] * 7 + ["orders", "rest"]
    assert [codec for _, codec, _ in plan] == ["lrzip"] * 7 + ["brotli"] * 2
    firsts = ["tok_emb"] + [
        f"blocks.0.{n}" for n in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj")
    ]
    firsts += ["blocks.0.mlp.c_fc", "blocks.0.mlp.c_proj"]
    assert [members[0].name for _, _, members in plan[:7]] == [
        f"{name}.weight:codes" for name in firsts
    ]
    for _, _, members in plan[1:7]:
        assert [int(spec.name.split(".")[1]) for spec in members] == list(range(12))
        assert members[0].shape == arrays[members[0].name].shape[::-1]
    assert {spec.name.split(".")[-2] for spec in plan[7][2]} == {"tok_emb", "c_q", "c_fc"}
    members = [spec.name for kind, _, part in plan if kind != "orders" for spec in part]
    assert sorted(members) == sorted(arrays)


@pytest.mark.parametrize("array", [np.array([object()]), np.array([1j]), np.array(["text"])])
def test_unknown_dtype_is_refused_at_packing(array):
    with pytest.raises(ValueError, match="odd"):
        train_gpt.pack_weights({"odd": array}, "lzma")


# --- damage


def assert_refused(blob):
    with pytest.raises(ArtifactError):
        train_gpt.unpack_weights(blob)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_what_a_model_was_trained_on_costs_no_byte(compressor):
    silent = train_gpt.pack_weights(model_arrays(), compressor)
    for trained_on in (1, 2):
        blob = train_gpt.pack_weights(model_arrays(), compressor, trained_on=trained_on)
        assert len(blob) == len(silent)
        assert blob[4] == silent[4] + 64 * trained_on
        assert_same(train_gpt.unpack_weights(blob), model_arrays())


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_damage_in_any_part_is_refused(compressor):
    blob = train_gpt.pack_weights(model_arrays(), compressor)
    header = train_gpt.read_header(blob)
    start = header.start
    places = [*range(train_gpt.PREFIX.size + train_gpt.DIGEST_BYTES), start - 1]
    for size, _, _ in header.records:
        places += [start, start + size // 2, start + size - 1] if size else []
        start += size
    for place in places:
        assert_refused(blob[:place] + bytes([blob[place] ^ 0x10]) + blob[place + 1 :])


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_truncated_or_lengthened_file_is_refused(compressor):
    blob = train_gpt.pack_weights(model_arrays(), compressor)
    chance = random.Random(2)
    for length in [0, 1, 4, 12, 13, 20, 21, len(blob) - 1] + [
        chance.randrange(len(blob)) for _ in range(100)
    ]:
        assert_refused(blob[:length])
    assert_refused(blob + b"\0")


def test_random_bytes_are_refused():
    chance = random.Random(3)
    for size in [0, 5, 21, 22, 100, 5000] * 10:
        noise = chance.randbytes(size)
        assert_refused(noise)
        assert_refused(train_gpt.MAGIC + noise)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_random_flips_never_end_in_another_error_or_other_weights(compressor):
    arrays, chance = model_arrays(), random.Random(4)
    blob = train_gpt.pack_weights(arrays, compressor)
    for _ in range(100):
        damaged = bytearray(blob)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(blob))] ^= chance.randint(1, 255)
        if damaged != blob:
            assert_refused(bytes(damaged))


# --- hostile files: every digest is right, what they cover is not


def forge(header, sections=b"", number=1, raw_size=None):
    """An lzma artifact (or another `number`) around any header, with the right digest."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    stored = train_gpt.ENCODERS["lzma"](raw) if number == 1 else train_gpt.ENCODERS["brotli"](raw)
    prefix = train_gpt.PREFIX.pack(
        train_gpt.MAGIC, number, len(stored), len(raw) if raw_size is None else raw_size
    )
    return prefix + train_gpt.digest(prefix + stored) + stored + sections


def section_of(stored, raw):
    return [len(stored), train_gpt.digest(stored).hex(), train_gpt.digest(raw).hex()]


def test_forged_file_with_right_content_is_read():
    stored = train_gpt.ENCODERS["lzma"](b"\1\2")
    found = train_gpt.unpack_weights(
        forge([[["x", "int8", [2]]], [section_of(stored, b"\1\2")]], stored)
    )
    assert found["x"].tolist() == [1, 2]


GOOD = ["x", "int8", [2]]
EMPTY = [0, "", ""]
HOSTILE_HEADERS = {
    "no json": b"\xff\xfe{",
    "deep nesting": b"[" * 200_000,
    "number": 7,
    "null": None,
    "object": {"arrays": []},
    "one part": [[GOOD]],
    "array fields": [[["x", "int8"]], [EMPTY]],
    "name no text": [[[7, "int8", [2]]], [EMPTY]],
    "name a list": [[[["x"], "int8", [2]]], [EMPTY]],
    "dtype object": [[["x", "object", [2]]], [EMPTY]],
    "dtype a list": [[["x", ["int8"], [2]]], [EMPTY]],
    "dtype a record": [[["x", "i1,i1", [2]]], [EMPTY]],
    "negative size": [[["x", "int8", [-1]]], [EMPTY]],
    "fraction": [[["x", "int8", [1.5]]], [EMPTY]],
    "bool size": [[["x", "int8", [True]]], [EMPTY]],
    "shape a number": [[["x", "int8", 2]], [EMPTY]],
    "shape text": [[["x", "int8", "22"]], [EMPTY]],
    "huge array": [[["x", "int8", [2**62]]], [EMPTY]],
    "huge product": [[["x", "float64", [2**20, 2**20]]], [EMPTY]],
    "huge empty": [[["x", "int8", [0, 2**62, 2**62]]], [EMPTY]],
    "huge sum": [[[f"x{i}", "int8", [2**29]] for i in range(4)], [EMPTY]],
    "many dimensions": [[["x", "int8", [1] * 100]], [EMPTY]],
    "twice": [[GOOD, GOOD], [EMPTY]],
    "no section": [[GOOD], []],
    "two sections": [[GOOD], [EMPTY, EMPTY]],
    "section fields": [[GOOD], [[0, ""]]],
    "section a number": [[GOOD], [0]],
    "section size text": [[GOOD], [["0", "", ""]]],
    "section size negative": [[GOOD], [[-1, "", ""]]],
    "section size huge": [[GOOD], [[2**62, "", ""]]],
    "section digest": [[GOOD], [EMPTY]],
    "digest no text": [[GOOD], [[0, 0, None]]],
    "long integer": b'[[["x","int8",[' + b"9" * 5000 + b']]],[[0,"",""]]]',
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_hostile_header_is_refused(case):
    assert_refused(forge(HOSTILE_HEADERS[case]))


@pytest.mark.parametrize("number", [0, 1])
def test_header_that_expands_too_far_is_refused(number):
    bomb = b" " * (train_gpt.MAX_HEADER_BYTES + 1)
    assert_refused(forge(bomb, number=number))
    assert_refused(forge(bomb, number=number, raw_size=10))
    assert_refused(forge(b'[[],[[0,"",""]]]', number=number, raw_size=train_gpt.MAX_HEADER_BYTES))


def test_a_header_may_be_as_long_as_the_limit_and_no_longer():
    stored = train_gpt.ENCODERS["lzma"](b"\1\2")
    header = json.dumps([[GOOD], [section_of(stored, b"\1\2")]]).encode()
    longest = header.ljust(train_gpt.MAX_HEADER_BYTES)
    assert train_gpt.unpack_weights(forge(longest, stored))["x"].tolist() == [1, 2]
    assert_refused(forge(longest + b" ", stored))


def test_unknown_compressor_number_is_refused():
    prefix = train_gpt.PREFIX.pack(train_gpt.MAGIC, 9, 0, 0)
    assert_refused(prefix + train_gpt.digest(prefix))


def codec_forgery(codec, stored, raw, shape):
    """A file whose only array stands in a section of `codec`."""
    return forge(
        [[["x", "int8", shape]], [section_of(stored, raw)]], stored, ["brotli", "lzma"].index(codec)
    )


@pytest.mark.parametrize("codec", ["brotli", "lzma"])
def test_section_of_another_size_or_no_stream_is_refused(codec):
    compress = train_gpt.ENCODERS[codec]
    for stored, raw, size in [
        (compress(b"ab"), b"ab", 3),
        (compress(b"abc"), b"abc", 2),
        (b"junk", b"junk", 4),
    ]:
        assert_refused(codec_forgery(codec, stored, raw, [size]))
    assert_refused(codec_forgery(codec, compress(b"abc")[:-2], b"abc", [3]))
    assert_refused(codec_forgery(codec, b"", b"", [3]))


@pytest.mark.parametrize("codec", ["brotli", "lzma"])
def test_section_bomb_stops_near_the_size_it_claims(codec):
    bomb = train_gpt.ENCODERS[codec](bytes(20_000_000))
    with pytest.raises(ArtifactError):
        train_gpt.expand(codec, bomb, 1000)


def test_a_bomb_of_lzma_takes_little_memory():
    bomb = lzma.compress(bytes(2**26), preset=0)  # a small dictionary, which takes memory too
    assert len(bomb) < 20_000
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match="does not expand"):
            train_gpt.expand("lzma", bomb, 1000)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_bytes_behind_a_section_of_lzma_are_refused():
    stored = train_gpt.ENCODERS["lzma"](b"abc")
    assert train_gpt.expand("lzma", stored, 3) == b"abc"
    for more in (b"\0", b"abc", stored):
        assert_refused(codec_forgery("lzma", stored + more, b"abc", [3]))


def test_a_section_that_expands_to_other_bytes_is_refused():
    """As a decoder of another version would give them: the size is right, the digest is not."""
    stored = train_gpt.ENCODERS["lzma"](b"abc")
    with pytest.raises(ArtifactError, match="lzma data is damaged"):
        train_gpt.unpack_weights(codec_forgery("lzma", stored, b"abd", [3]))


def test_a_section_that_holds_no_array_is_refused():
    """Everything else about it is right."""
    stored = train_gpt.ENCODERS["lzma"](b"ab")
    more = train_gpt.ENCODERS["lzma"](b"")
    sections = [section_of(stored, b"ab"), section_of(more, b"")]
    with pytest.raises(ArtifactError, match="sections are not those of its arrays"):
        train_gpt.unpack_weights(forge([[GOOD], sections], stored + more))


def test_two_arrays_of_one_name_are_refused():
    stored = train_gpt.ENCODERS["lzma"](b"abcd")
    header = [[GOOD, GOOD], [section_of(stored, b"abcd")]]
    with pytest.raises(ArtifactError, match="two arrays have one name"):
        train_gpt.unpack_weights(forge(header, stored))


@pytest.mark.parametrize(
    "shape", [(-1,), (2, -3), (True,), (2.0,), (2**31,), (0, 2**31), (1,) * 9], ids=str
)
def test_an_array_that_no_artifact_holds_is_refused_by_its_name(shape):
    with pytest.raises(ValueError, match="any: an artifact cannot hold int8"):
        train_gpt.check_specs([train_gpt.ArraySpec("any", "int8", shape)])


@needs_lrzip
def test_hostile_lrzip_section_is_refused():
    good = train_gpt.ENCODERS["lrzip"](b"abcdef" * 50)
    assert train_gpt.expand("lrzip", good, 300) == b"abcdef" * 50
    for stored, size in [
        (good, 299),
        (good, 2**29),
        (good[: len(good) // 2], 300),
        (b"junk", 4),
        (b"", 4),
    ]:
        with pytest.raises(ArtifactError):
            train_gpt.expand("lrzip", stored, size)


@needs_lrzip
def test_row_order_that_is_no_permutation_is_refused():
    codes, order, header = (
        bytes(range(6)),
        bytes([0, 0, 0, 0]),
        [["tok_emb.weight:codes", "int8", [2, 3]]],
    )
    stored = [train_gpt.ENCODERS["lrzip"](codes), train_gpt.ENCODERS["brotli"](order), b""]
    sections = [section_of(*pair) for pair in zip(stored, [codes, order, b""], strict=True)]
    assert_refused(forge([header, sections], b"".join(stored), 2))


# --- the entropy coder


def entropy_trip(matrices):
    """Matrices int8 -> the size of their stream, after it was read back exactly.

    Stored are their transposes.
    """
    raw, shapes = (
        b"".join(matrix.T.tobytes() for matrix in matrices),
        [matrix.shape[::-1] for matrix in matrices],
    )
    stored = train_gpt.ENCODERS["entropy"](raw, shapes)
    assert train_gpt.expand("entropy", stored, len(raw), shapes) == raw
    return len(stored)


def uneven_codes(rows, columns, seed=0, row_octaves=0):
    """Gaussian codes (rows, columns) with a deviation of each column, and their deviations.

    The deviations (1 or rows, columns) of rows differ by up to row_octaves.
    """
    rng = np.random.default_rng(seed)
    deviation = 3 * np.exp(0.5 * rng.normal(size=(1, columns)))
    if row_octaves:
        deviation = deviation * 2 ** rng.uniform(-row_octaves / 2, row_octaves / 2, (rows, 1))
    codes = np.rint(rng.normal(size=(rows, columns)) * deviation)
    return np.clip(codes, -127, 127).astype(np.int8), deviation


def entropy_bytes(codes, deviation):
    """The information of Gaussian codes (R, C) given their deviations (1 or R, C), in bytes."""
    edges = np.stack([codes - 0.5, codes + 0.5]) / (deviation * math.sqrt(2))
    below, above = torch.from_numpy(edges).erf().numpy() / 2
    return -np.log2(np.maximum(above - below, 1e-12)).sum() / 8


LANES = 6 * train_gpt.RANS_STATES  # bytes that each lane's state holds beyond the codes


def test_entropy_coder_is_exact_on_any_codes():
    rng = np.random.default_rng(5)
    every = np.arange(-128, 128).astype(np.int8)
    matrices = [rng.integers(-128, 128, (40, 90)).astype(np.int8), every[None], every[:, None]]
    matrices += [np.zeros(shape, np.int8) for shape in ((700, 3), (0, 4), (4, 0))] + [
        np.full((5, 5), -128, np.int8)
    ]
    matrices += [np.repeat(rng.integers(-128, 128, (400, 5)), 3, axis=1).astype(np.int8)]
    matrices += [
        uneven_codes(int(rng.integers(1, 300)), int(rng.integers(1, 70)), seed)[0]
        for seed in range(5)
    ]
    far_more_rows = rng.choice([-127, 127], (65_536, 2)).astype(np.int8)
    matrices += [far_more_rows, far_more_rows.T.copy(), np.zeros((1, 1), np.int8)]
    matrices += [uneven_codes(300, 40, row_octaves=12)[0], np.zeros((1, 700), np.int8)]
    for matrix in matrices:
        entropy_trip([matrix])
    entropy_trip(matrices)


def test_entropy_coder_is_within_half_a_percent_of_the_entropy_given_the_columns_deviations():
    codes, deviation = uneven_codes(4096, 256)
    expected = entropy_bytes(codes, deviation)
    assert expected < entropy_trip([codes]) < 1.005 * expected + LANES


@pytest.mark.parametrize("row_octaves, most", [(2, 1.01), (4, 1.0125)])
def test_entropy_coder_is_within_about_a_percent_of_the_entropy_given_all_deviations(
    row_octaves, most
):
    """Those of rows and columns. The variances of rows, which go ahead, take a third of it."""
    codes, deviation = uneven_codes(4096, 256, row_octaves=row_octaves)
    expected = entropy_bytes(codes, deviation)
    assert expected < entropy_trip([codes]) < most * expected + LANES


def test_sums_of_the_coder_do_not_overflow():
    """65,536 rows of the largest code, each as if the rest of its row were zeros."""
    model = train_gpt.MatrixModel(None, None, 1)
    model.add(np.full((65_536, 1), -128), np.zeros((65_536, 1), np.int64))
    weight = round(train_gpt.ONE_RATIO / train_gpt.VARIANCES[0])
    assert int(model.sum_ratios[0]) == 16 * train_gpt.ONE_RATIO + 65_536 * 128**2 * weight


def test_entropy_coder_learns_what_the_columns_of_an_embedding_share():
    rng = np.random.default_rng(7)
    mix = np.linalg.qr(rng.normal(size=(48, 48)))[0] * np.exp(rng.normal(size=48))
    codes = np.clip(np.rint(4 * rng.normal(size=(3000, 48)) @ mix.T), -127, 127).astype(np.int8)
    correlations = np.corrcoef(codes.astype(float).T)
    alone = entropy_trip([np.stack([rng.permutation(column) for column in codes.T], axis=1)])
    # bytes, if they were Gaussian
    shared = -np.linalg.slogdet(correlations)[1] / 2 / math.log(2) / 8 * len(codes)
    assert shared > 0.1 * alone and entropy_trip([codes]) < alone - 0.5 * shared


def test_predictor_is_the_conditional_mean_in_fixed_point():
    x = np.random.default_rng(8).normal(size=(5000, 12)) @ np.random.default_rng(9).normal(
        size=(12, 12)
    )
    x = np.rint(5 * x)
    predictor = train_gpt.column_predictor(x.T @ x, 10**9)
    assert (
        np.array_equal(predictor * 4096, np.rint(predictor * 4096)) and not np.triu(predictor).any()
    )
    for j in range(1, 12):
        expected = np.linalg.lstsq(x[:, :j], x[:, j], rcond=None)[0]
        assert np.allclose(predictor[j, :j], expected, atol=3e-3)


def test_entropy_stream_is_the_same_on_every_machine():
    rng = np.random.default_rng(6)
    codes = [
        (rng.integers(-9, 10, (40, 700)) * np.arange(1, 41)[:, None] // 7).astype(np.int8)
        for _ in range(2)
    ]
    # 700 rows once transposed; of 40 columns one follows another, and rows differ
    codes[1][1:] = codes[1][1:] // 2 + codes[1][:-1]
    codes.append((codes[0] // (1 + np.arange(700) % 7)).astype(np.int8))
    stored = train_gpt.ENCODERS["entropy"](
        b"".join(x.tobytes() for x in codes), [x.shape for x in codes]
    )
    assert train_gpt.digest(stored).hex() == "9849d2ef29b4e4dc"


def test_damaged_or_hostile_entropy_stream_is_refused():
    codes = uneven_codes(200, 30)[0]
    raw, shapes = codes.tobytes(), [codes.shape]
    good = train_gpt.ENCODERS["entropy"](raw, shapes)
    assert train_gpt.expand("entropy", good, len(raw), shapes) == raw
    for stored in (
        b"",
        b"junk",
        good[:-4],
        good[:-3],
        good + bytes(4),
        good[: 8 * train_gpt.RANS_STATES - 1],
        bytes(10**5),
    ):
        with pytest.raises(ArtifactError):
            train_gpt.expand("entropy", stored, len(raw), shapes)
    started = time.process_time()  # not what other processes take
    with pytest.raises(ArtifactError):  # a small file that claims the most an artifact may hold
        train_gpt.expand("entropy", good, 2**30, [(2**16, 2**14)])
    assert time.process_time() - started < 60  # usually 3; hours if it believed the claim


class WrongRows(train_gpt.SymbolEncoder):
    """Encodes codes as they are, but any variances of rows."""

    def __init__(self, rng):
        super().__init__()
        self.rng = rng

    def code(self, contexts, symbols):
        if train_gpt.ROW_CONTEXT in contexts:
            symbols = self.rng.integers(-128, 128, len(contexts))
        return super().code(contexts, symbols)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(30, 200), (1, 50), (50, 1), (8, 700)])  # transposed
def test_rows_of_any_variance_leave_the_codes_as_they_are(shape):
    rng = np.random.default_rng(10)
    raw = rng.integers(-128, 128, shape).astype(np.int8).tobytes()
    encoder = WrongRows(rng)
    train_gpt.code_matrices(encoder, raw, [shape])
    assert train_gpt.expand("entropy", encoder.finish(), len(raw), [shape]) == raw


@pytest.mark.filterwarnings("error")
def test_a_hostile_entropy_stream_gives_other_codes_or_an_artifact_error():
    rng = np.random.default_rng(11)
    shapes = [(30, 200), (1, 50), (50, 1), (0, 5), (5, 0), (8, 700)]
    raw_size = sum(map(math.prod, shapes))
    raw = rng.integers(-9, 10, raw_size).astype(np.int8).tobytes()
    good = train_gpt.ENCODERS["entropy"](raw, shapes)
    outcomes = set()
    for _ in range(100):
        stream = np.frombuffer(good, np.uint8).copy()
        start = rng.integers(len(stream))  # damaged from here on: states, or words alone
        damaged = rng.integers(0, 256, len(stream) - start)
        stream[start:] = [0, 255, damaged, damaged][rng.integers(4)]
        try:
            found = train_gpt.entropy_decompress(stream.tobytes(), raw_size, shapes)
        except ArtifactError:
            outcomes.add("error")
        else:
            outcomes.add(len(found))
            assert found != raw or np.array_equal(stream, np.frombuffer(good, np.uint8))
    assert outcomes <= {"error", 0, raw_size} and len(outcomes) > 1


# --- compressors


@pytest.mark.parametrize("name", ["zip", "", "Brotli"])
def test_unknown_compressor_is_an_error(name):
    with pytest.raises(ValueError, match="COMPRESSOR.*must be one of entropy, "):
        train_gpt.Hyperparameters.from_env({"COMPRESSOR": name})


def test_missing_lrzip_is_an_early_error_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    hp = train_gpt.Hyperparameters(compressor="pergroup")
    with pytest.raises(ValueError, match=r"lrzip.*apt-get install lrzip.*COMPRESSOR=entropy"):
        train_gpt.check_all(hp, None)


def test_an_lrzip_that_cannot_start_is_an_early_error(monkeypatch, tmp_path):
    (tmp_path / "lrzip").write_text(
        "#!/bin/sh\necho cannot open shared object file >&2\nexit 127\n"
    )
    (tmp_path / "lrzip").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(train_gpt.SettingError, match="lrzip ended with 127.*shared object"):
        published.check_lrzip()


def test_an_lrzip_that_alters_bytes_is_an_early_error(monkeypatch):
    monkeypatch.setattr(published.shutil, "which", lambda name: name)
    monkeypatch.setattr(published, "run_lrzip", lambda flags, data: bytes(32))
    with pytest.raises(train_gpt.SettingError, match="pergroup does not work here: other bytes"):
        published.check_lrzip()


# --- row order


def plain_row_order(codes):
    wide, order = codes.astype(np.int64), [0]
    while len(order) < len(wide):
        rest = [row for row in range(len(wide)) if row not in order]
        order.append(min(rest, key=lambda row: (np.abs(wide[row] - wide[order[-1]]).sum(), row)))
    return order


def test_row_order_equals_golden():
    with np.load(GOLDEN) as archive:
        order = published.greedy_row_order(archive["row_order/codes"])
        assert order.dtype == np.uint16 and np.array_equal(order, archive["row_order/order"])


@pytest.mark.parametrize("seed", range(5))
def test_row_order_equals_the_plain_search_with_ties(seed):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 40)), int(rng.integers(1, 6)))
    codes = rng.integers(-3, 4, shape).astype(np.int8) * np.int8(rng.choice([1, 42]))
    assert published.greedy_row_order(codes).tolist() == plain_row_order(codes)


def test_row_order_distances_are_wide():
    codes = np.array([[-128, -128], [127, 127], [-128, 127], [-127, -127]], np.int8)
    assert published.greedy_row_order(codes).tolist() == [0, 3, 2, 1]
