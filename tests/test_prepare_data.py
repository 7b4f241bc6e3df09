"""Documents to shards: tokens, byte side-cars, files, the split, what is refused, and the demo
corpus.
"""

import hashlib
import io
import json
import random
import re
from pathlib import Path

import caseops_reference
import numpy as np
import pytest
import sentencepiece
from data_helpers import (
    PUBLISHED,
    TEXTS,
    TINY_TOKENIZER,
    build,
    needs_published,
    refused,
    stream,
    write_docs,
)

import prepare_caseops_data as prepare
from lossless_caps import CONTROLS
from prepare_caseops_data import (
    DEFAULT_TOKENIZER,
    DataError,
    encode_document,
    encode_document_with_bytes,
    load_tokenizer,
    main,
    read_shard,
    write_shard,
)

VECTORS = json.loads(
    (Path(__file__).parent / "data" / "caseops_vectors.json").read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def sp():
    return load_tokenizer(DEFAULT_TOKENIZER)


# ---- the format as published ---------------------------------------------------------------------


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["name"])
def test_texts_of_the_published_vectors_give_the_ids_and_bytes_of_the_reference(sp, vector):
    """With our tokenizer, so nothing from outside is needed.

    The published ids hold the reference itself, below.
    """
    expected_ids, expected_costs = caseops_reference.tokens_and_bytes(sp, vector["text"])
    ids, costs = encode_document_with_bytes(sp, vector["text"])
    assert ids.tolist() == expected_ids
    assert costs.tolist() == expected_costs
    assert encode_document(sp, vector["text"]).tolist() == expected_ids


def test_random_texts_give_the_ids_and_bytes_of_the_reference(sp):
    rng = random.Random(12)
    texts = [vector["text"] for vector in VECTORS["vectors"]]
    words = " ".join(texts).split(" ")
    alphabet = "".join(texts) + "  \n\u0301\u3000\u200b"
    for number in range(300):
        text = (
            " ".join(rng.choices(words, k=8))
            if number % 2
            else "".join(rng.choices(alphabet, k=40))
        )
        expected_ids, expected_costs = caseops_reference.tokens_and_bytes(sp, text)
        ids, costs = encode_document_with_bytes(sp, text)
        assert (ids.tolist(), costs.tolist()) == (expected_ids, expected_costs), ascii(text)


@pytest.mark.parametrize("shard_tokens", [50, 100_000_000])
def test_shards_are_those_of_the_reference_byte_for_byte(sp, tmp_path, shard_tokens):
    docs, val_docs = VECTORS["shards"]["docs"], VECTORS["shards"]["num_val_docs"]
    encoded = [caseops_reference.tokens_and_bytes(sp, text) for text in docs]
    streams = {
        "val": [token for ids, _ in encoded[:val_docs] for token in ids],
        "val_bytes": [cost for _, costs in encoded[:val_docs] for cost in costs],
        "train": [token for ids, _ in encoded[val_docs:] for token in ids],
    }
    expected = {}
    for name, values in streams.items():
        for number, start in enumerate(range(0, len(values), shard_tokens)):
            content = caseops_reference.shard(values[start : start + shard_tokens])
            expected[f"fineweb_{name}_{number:06d}.bin"] = content
    path = write_docs(tmp_path / "docs.jsonl", docs)
    files = build(
        tmp_path / "out", "--docs", path, "--val-docs", val_docs, "--shard-tokens", shard_tokens
    )
    del files["manifest.json"]
    assert files == expected


@needs_published
def test_published_vectors_give_their_ids_and_bytes():
    published = load_tokenizer(PUBLISHED)
    for vector in VECTORS["vectors"]:
        ids, costs = encode_document_with_bytes(published, vector["text"])
        assert ids.tolist() == [1, *vector["ids"]], vector["name"]
        assert costs.tolist() == [0, *vector["bytes"]], vector["name"]
        assert encode_document(published, vector["text"]).tolist() == ids.tolist(), vector["name"]
        reference = caseops_reference.tokens_and_bytes(published, vector["text"])
        assert reference == (ids.tolist(), costs.tolist()), vector["name"]


@needs_published
def test_published_shards_are_reproduced_byte_for_byte(tmp_path):
    assert hashlib.sha256(PUBLISHED.read_bytes()).hexdigest() == VECTORS["tokenizer_sha256"]
    expected = VECTORS["shards"]
    docs = write_docs(tmp_path / "docs.jsonl", expected["docs"])
    files = build(
        tmp_path / "out",
        "--docs",
        docs,
        "--val-docs",
        expected["num_val_docs"],
        "--tokenizer",
        PUBLISHED,
    )
    assert set(files) == {*expected["files"], "manifest.json"}
    for name, facts in expected["files"].items():
        assert len(files[name]) == facts["size"]
        assert files[name][:16].hex() == facts["header_first16_hex"]
        assert hashlib.sha256(files[name]).hexdigest() == facts["sha256"]
        assert read_shard(tmp_path / "out" / name).tolist() == facts["values"]


# ---- tokenizers ----------------------------------------------------------------------------------


def test_our_tokenizer_has_the_caseops_layout(sp):
    assert sp.get_piece_size() == 8192
    assert [sp.id_to_piece(index) for index in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [sp.is_control(index) for index in range(5)] == [
        True,
        True,
        True,
        False,
        False,
    ] and sp.is_unknown(3)
    assert "".join(sp.id_to_piece(index) for index in range(4, 8)) == CONTROLS
    assert [sp.id_to_piece(index) for index in range(8, 264)] == [
        f"<0x{byte:02X}>" for byte in range(256)
    ]
    assert all(sp.is_byte(index) == (8 <= index < 264) for index in range(8192))
    assert sp.get_score(264) == 0 and sp.get_score(265) == -1


def test_our_pieces_hold_no_capitals_markers_or_runs_of_digits(sp):
    pieces = [sp.id_to_piece(index) for index in range(264, 8192)]
    assert not [
        piece for piece in pieces if re.search(f"[A-Z{CONTROLS}]|[0-9].|.[0-9]|.\u2581", piece)
    ]
    assert "\u2581" in pieces and len(set(pieces)) == len(pieces)


@needs_published
def test_our_first_264_ids_are_the_published_ones(sp):
    published = load_tokenizer(PUBLISHED)
    assert [sp.id_to_piece(i) for i in range(264)] == [published.id_to_piece(i) for i in range(264)]


def test_readme_states_the_hash_of_our_tokenizer():
    readme = (DEFAULT_TOKENIZER.parent / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(DEFAULT_TOKENIZER.read_bytes()).hexdigest() in readme
    assert DEFAULT_TOKENIZER.stat().st_size < 1_000_000


def train_tiny(path, **changes):
    model = io.BytesIO()
    sentences = iter(["the cat sat on the mat and the dog ran"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, **(TINY_TOKENIZER | changes)
    )
    path.write_bytes(model.getvalue())
    return path


def test_another_caseops_tokenizer_is_taken(tmp_path):
    tiny = load_tokenizer(train_tiny(tmp_path / "tiny.model"))
    assert encode_document(tiny, "The").tolist()[:2] == [1, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user_defined_symbols": []}, "id 4 is '<0x00>', not '\\ue001'"),
        ({"user_defined_symbols": list(reversed(CONTROLS))}, "id 4 is '\\ue004', not '\\ue001'"),
        ({"byte_fallback": False, "vocab_size": 30}, "CaseOps takes 265 to 65,536"),
        ({"pad_id": -1, "unk_id": 0}, "id 0 is '<unk>', not '<pad>'"),
        (
            {"user_defined_symbols": [], "control_symbols": list(CONTROLS)},
            "not user-defined symbols",
        ),
    ],
)
def test_a_tokenizer_of_another_layout_is_refused(tmp_path, changes, message):
    with pytest.raises(DataError) as error:
        load_tokenizer(train_tiny(tmp_path / "other.model", **changes))
    assert message in str(error.value) and "other.model" in str(error.value)


def test_what_is_no_tokenizer_is_refused(tmp_path, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    text_file = tmp_path / "text.model"
    text_file.write_text("no model")
    for tokenizer in (text_file, tmp_path / "missing.model"):
        message = refused(
            capsys,
            "--docs",
            docs,
            "--out",
            tmp_path / "out",
            "--val-docs",
            3,
            "--tokenizer",
            tokenizer,
        )
        assert message.startswith("error: ") and tokenizer.name in message
    assert not (tmp_path / "out").exists()


# ---- the byte side-car ---------------------------------------------------------------------------


def test_side_car_sums_to_the_bytes_of_the_text_minus_the_trim(sp):
    rng = random.Random(11)
    alphabet = "abcdEFGH  \n.,1é東🗼½ﬁ…\u0301" + CONTROLS
    for _ in range(500):
        text = "".join(rng.choices(alphabet, k=rng.randrange(80)))
        ids, costs = encode_document_with_bytes(sp, text)
        assert costs.sum() == len(text.strip().encode()), ascii(text)
        assert ids.tolist() == encode_document(sp, text).tolist()
        assert ids.dtype == costs.dtype == np.uint16 and len(ids) == len(costs)


@pytest.mark.parametrize("point", [0xA1, 0x7FF, 0x800, 0x915, 0xFFF, 0x1000, 0xFFEE, 0x10000])
def test_a_character_costs_its_utf8_bytes_on_both_sides_of_each_border(sp, point):
    text = f"one {chr(point)} two"
    assert encode_document_with_bytes(sp, text)[1].sum() == len(text.encode())


def test_side_car_is_zero_at_bos_and_at_markers(sp):
    markers = 0
    for text in (text for text in TEXTS if not set(text) & set(CONTROLS)):
        ids, costs = encode_document_with_bytes(sp, text)
        assert ids[0] == 1 and costs[0] == 0 and 1 not in ids[1:]
        is_marker = (ids >= 4) & (ids <= 7)
        assert not costs[is_marker].any()
        markers += is_marker.sum()
    assert markers > 50


def test_an_escaped_marker_is_charged_where_it_stands_and_not_at_esc(sp):
    ids, costs = encode_document_with_bytes(sp, "\ue004\ue001A")
    assert ids[1:6].tolist() == [7, 7, 7, 4, 4]
    assert costs[1:6].tolist() == [0, 3, 0, 3, 0]


def test_more_bytes_than_a_side_car_value_holds_are_refused_with_the_document(sp, tmp_path, capsys):
    _, costs = encode_document_with_bytes(sp, "a" + " " * 65_534 + "b c")
    assert costs.max() == 65_535
    docs = write_docs(tmp_path / "docs.jsonl", ["one", "two", "a" + " " * 65_535 + "b c"])
    message = refused(capsys, "--docs", docs, "--out", tmp_path / "out", "--val-docs", 3)
    assert "val document 2 (" in message and "65,536 bytes" in message and "line 4" in message


# ---- shards --------------------------------------------------------------------------------------


def test_shard_header_and_round_trip(tmp_path):
    values = np.random.default_rng(0).integers(0, 1 << 16, 1000, dtype=np.uint16)
    path = tmp_path / "x.bin"
    entry = write_shard(path, values)
    content = path.read_bytes()
    assert np.frombuffer(content[:1024], "<i4").tolist() == [20240520, 1, 1000] + [0] * 253
    assert len(content) == 1024 + 2 * 1000
    assert entry == {"values": 1000, "sha256": hashlib.sha256(content).hexdigest()}
    assert (read_shard(path) == values).all()
    assert [file.name for file in tmp_path.iterdir()] == ["x.bin"]  # no temporary file left


@pytest.mark.parametrize("damage", [b"", b"short", "magic", "version", "cut", "longer"])
def test_a_damaged_shard_is_refused(tmp_path, damage):
    path = tmp_path / "x.bin"
    write_shard(path, np.arange(10))
    content = path.read_bytes()
    damaged = {
        "magic": b"\0" + content[1:],
        "version": content[:4] + b"\2" + content[5:],
        "cut": content[:-1],
        "longer": content + b"\0\0",
    }.get(damage, damage)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="x.bin"):
        read_shard(path)


@pytest.mark.parametrize("value", [-1, 65_536])
def test_values_outside_uint16_are_not_written(tmp_path, value):
    with pytest.raises(DataError, match="outside"):
        write_shard(tmp_path / "x.bin", np.array([0, value]))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shard_tokens", [1, 7, 64, 10_000])
def test_documents_straddle_shards_that_are_full_but_for_the_last(sp, tmp_path, shard_tokens):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    build(tmp_path / "out", "--docs", docs, "--val-docs", 6, "--shard-tokens", shard_tokens)
    expected = {
        "val": [encode_document_with_bytes(sp, text)[0] for text in TEXTS[:6]],
        "val_bytes": [encode_document_with_bytes(sp, text)[1] for text in TEXTS[:6]],
        "train": [encode_document(sp, text) for text in TEXTS[6:]],
    }
    for name, documents in expected.items():
        values, sizes = stream(tmp_path / "out", name)
        assert values.tolist() == np.concatenate(documents).tolist()
        assert all(size == shard_tokens for size in sizes[:-1]) and 0 < sizes[-1] <= shard_tokens


def test_no_empty_file_is_written_when_the_tokens_fill_the_shards_exactly(sp, tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", ["same words", "same number", "same size"])
    size = len(encode_document(sp, "same words"))
    files = build(tmp_path / "out", "--docs", docs, "--val-docs", 1, "--shard-tokens", size)
    assert [name for name in files if "train" in name] == [
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
    ]
    assert [name for name in files if "val" in name] == [
        "fineweb_val_000000.bin",
        "fineweb_val_bytes_000000.bin",
    ]


# ---- the split and the manifest ------------------------------------------------------------------


def test_the_split_is_exact_over_several_files(sp, tmp_path, capsys):
    first = write_docs(tmp_path / "a.jsonl.gz", TEXTS[:5])
    second = write_docs(tmp_path / "b.jsonl.xz", TEXTS[5:])
    build(tmp_path / "out", "--docs", first, second, "--val-docs", 8, "--train-docs", 10)
    assert "the first 8 documents are validation" in capsys.readouterr().out
    val, _ = stream(tmp_path / "out", "val")
    train, _ = stream(tmp_path / "out", "train")
    assert (
        val.tolist() == np.concatenate([encode_document(sp, text) for text in TEXTS[:8]]).tolist()
    )
    assert (
        train.tolist()
        == np.concatenate([encode_document(sp, text) for text in TEXTS[8:18]]).tolist()
    )


def test_packed_and_plain_documents_give_the_same_shards(tmp_path):
    shards = []
    for suffix in ("", ".gz", ".xz"):
        docs = write_docs(tmp_path / f"docs.jsonl{suffix}", TEXTS)
        files = build(tmp_path / f"out{suffix}", "--docs", docs, "--val-docs", 4)
        shards.append({name: content for name, content in files.items() if name != "manifest.json"})
    assert shards[0] == shards[1] == shards[2] and len(shards[0]) == 3


def test_validation_from_a_file_of_its_own(sp, tmp_path):
    docs, val = (
        write_docs(tmp_path / "docs.jsonl", TEXTS[6:]),
        write_docs(tmp_path / "val.jsonl.xz", TEXTS[:6]),
    )
    files = build(tmp_path / "out", "--docs", docs, "--val-file", val)
    tokens, _ = stream(tmp_path / "out", "val")
    assert (
        tokens.tolist()
        == np.concatenate([encode_document(sp, text) for text in TEXTS[:6]]).tolist()
    )
    manifest = json.loads(files["manifest.json"])
    assert manifest["splits"]["train"]["documents"] == len(TEXTS) - 6
    assert [(source["file"], source["role"]) for source in manifest["sources"]] == [
        ("val.jsonl.xz", "val"),
        ("docs.jsonl", "docs"),
    ]


def test_the_training_file_is_not_taken_as_validation_too(tmp_path, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    copy = write_docs(tmp_path / "copy.jsonl", TEXTS)
    assert "same file" in refused(
        capsys, "--docs", docs, "--val-file", copy, "--out", tmp_path / "out"
    )


def test_too_few_documents_for_the_validation_split_are_an_error(tmp_path, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    assert "fewer than the 50,000" in refused(capsys, "--docs", docs, "--out", tmp_path / "out")


def test_the_manifest_states_what_is_in_the_folder(tmp_path):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    files = build(tmp_path / "out", "--docs", docs, "--val-docs", 6, "--shard-tokens", 50)
    manifest = json.loads(files.pop("manifest.json"))
    assert set(manifest["files"]) == set(files) and len(files) > 10
    for name, content in files.items():
        assert manifest["files"][name]["sha256"] == hashlib.sha256(content).hexdigest()
        assert manifest["files"][name]["values"] == (len(content) - 1024) // 2
    for split, texts in (("val", TEXTS[:6]), ("train", TEXTS[6:])):
        counts = manifest["splits"][split]
        assert counts["documents"] == len(texts)
        assert counts["bytes"] == sum(len(text.encode()) for text in texts)
        assert counts["tokens"] == len(stream(tmp_path / "out", split)[0])
    assert (
        manifest["splits"]["val"]["charged_bytes"] == stream(tmp_path / "out", "val_bytes")[0].sum()
    )
    assert manifest["text_transform"] == "lossless_caps_caseops_v1"
    assert (manifest["format"], manifest["version"], manifest["shard_tokens"]) == (
        "caseops_shards",
        1,
        50,
    )
    assert manifest["tokenizer"] == {
        "file": "caseops_8192.model",
        "sha256": hashlib.sha256(DEFAULT_TOKENIZER.read_bytes()).hexdigest(),
        "vocab_size": 8192,
    }
    source = hashlib.sha256(Path(docs).read_bytes()).hexdigest()
    assert manifest["sources"] == [{"file": "docs.jsonl", "role": "docs", "sha256": source}]
    assert "first 6 documents" in manifest["split_rule"]


def test_any_number_of_workers_gives_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_BYTES", 300)
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS * 3)
    one = build(
        tmp_path / "one", "--docs", docs, "--val-docs", 20, "--shard-tokens", 100, "--workers", "1"
    )
    two = build(
        tmp_path / "two", "--docs", docs, "--val-docs", 20, "--shard-tokens", 100, "--workers", "2"
    )
    assert one == two


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["fineweb_train_000007.bin", "fineweb_val_000000.bin.tmp", "manifest.json"]
)
def test_a_folder_in_use_is_refused_and_left_alone(tmp_path, capsys, name):
    docs = write_docs(tmp_path / "docs.jsonl", TEXTS)
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("earlier")
    message = refused(capsys, "--docs", docs, "--val-docs", 3, "--out", out)
    assert f"already holds {name}" in message and "--out" in message
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "earlier")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "\xff"}', "not JSON"),
        (b'{"title": "none"}', "no 'text'"),
        (b'{"text": null}', "NoneType"),
        (b'{"text": 5}', "int"),
        (b'["text"]', "list"),
        (b"null", "NoneType"),
    ],
)
def test_a_bad_line_is_an_error_that_names_file_and_line(tmp_path, capsys, line, message):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n"good too"\n' + line + b"\n")
    error = refused(capsys, "--docs", path, "--val-docs", 1, "--out", tmp_path / "out")
    assert "docs.jsonl, line 4" in error and message in error
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_error_in_a_worker_comes_back(tmp_path, capsys):
    docs = write_docs(tmp_path / "docs.jsonl", ["good", None])
    assert (
        main(["--docs", docs, "--val-docs", "1", "--out", str(tmp_path / "out"), "--workers", "2"])
        == 1
    )
    assert "docs.jsonl, line 3: the text is NoneType" in capsys.readouterr().err


@pytest.mark.parametrize(("val_docs", "document"), [(1, "train document 1"), (3, "val document 2")])
def test_a_lone_surrogate_is_refused_naming_the_document(tmp_path, capsys, val_docs, document):
    path = tmp_path / "docs.jsonl"
    path.write_text('"one"\n"a pair \\ud83d\\ude00 is fine"\n"a lone \\ud83d is not"\n')
    message = refused(capsys, "--docs", path, "--val-docs", val_docs, "--out", tmp_path / "out")
    assert document in message and "U+D83D at character 7" in message and "line 3" in message


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_damaged_archive_is_refused_by_name(tmp_path, capsys, suffix):
    docs = Path(write_docs(tmp_path / f"docs.jsonl{suffix}", TEXTS * 20))
    docs.write_bytes(docs.read_bytes()[:-40])
    assert docs.name in refused(capsys, "--docs", docs, "--val-docs", 3, "--out", tmp_path / "out")


def test_a_missing_file_is_refused_by_name(tmp_path, capsys):
    assert "nowhere.jsonl" in refused(
        capsys, "--docs", tmp_path / "nowhere.jsonl", "--out", tmp_path / "out"
    )


# ---- the demo ------------------------------------------------------------------------------------

WORDS = "the shape of an array is kept while rows and columns are read from left to right".split()


def prose(seed, words=90):
    return " ".join(random.Random(seed).choices(WORDS, k=words)).capitalize() + "."


@pytest.fixture
def packages(tmp_path):
    """A tree of packages with documentation; modules 0 and 1 hold the same."""
    root = tmp_path / "site"
    for number in range(30):
        seed = 10 * max(number, 1)
        package = root / f"package{number % 4}"
        package.mkdir(parents=True, exist_ok=True)
        source = (
            f'"""{prose(seed)}"""\nraise RuntimeError("never run")\nclass Thing:\n   '
            f' """{prose(seed + 1)}"""\n    def act(self):\n        """{prose(seed + 2)}\n\n       '
            " >>> x[0], y[1:2], z = (1, 2, 3), [4, 5], {}  # == != <= >= no prose at all here\n "
            '       """\n'
        )
        (package / f"module{number}.py").write_text(source)
    (root / "package0" / "broken.py").write_text('"""' + prose(999) * 2 + '"""\ndef (:\n')
    (root / "package0" / "tests").mkdir()
    (root / "package0" / "tests" / "test_x.py").write_text(f'"""{prose(998, 200)}"""\n')
    info = root / "thing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n\n{prose(997, 200)}\n"
    )
    return root


def test_demo_takes_docstrings_and_descriptions_once(packages):
    documents = prepare.demo_documents([packages], 1_000_000)
    assert len(documents) == 30  # 29 different modules and a description
    joined = "\n".join(documents)
    assert all(prose(10 * number + part) in joined for number in range(1, 30) for part in range(3))
    assert prose(997, 200) in documents
    assert prose(998, 200) not in joined and prose(999) not in joined and ">>>" not in joined


def test_demo_corpus_is_deterministic_and_its_splits_are_apart(packages):
    corpora = [prepare.demo_corpus([packages], 1_000_000, 5) for _ in range(2)]
    assert corpora[0][:3] == corpora[1][:3] and corpora[0].sources() == corpora[1].sources()
    val, train = ({prepare.parse_text(line) for line in split} for split in corpora[0][:2])
    assert len(val) == 5 and len(train) == 25
    paragraphs = [{part for text in split for part in text.split("\n\n")} for split in (val, train)]
    assert not paragraphs[0] & paragraphs[1]


def test_demo_stops_at_its_size(packages):
    documents = prepare.demo_documents([packages], 5_000)
    assert 5_000 <= sum(map(len, documents)) < 5_000 + 2_200


def test_demo_writes_the_same_dataset_twice(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "demo_roots", lambda: [packages])
    runs = [build(tmp_path / name, "--demo", "--val-docs", 4) for name in ("one", "two")]
    assert runs[0] == runs[1]
    manifest = json.loads(runs[0]["manifest.json"])
    assert manifest["splits"]["val"]["documents"] == 4
    assert manifest["splits"]["val"]["charged_bytes"] == manifest["splits"]["val"]["bytes"]


def test_demo_with_too_little_documentation_is_an_error(packages, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "demo_roots", lambda: [packages / "package1"])
    assert "--val-docs 10" in refused(capsys, "--demo", "--out", tmp_path / "out")
