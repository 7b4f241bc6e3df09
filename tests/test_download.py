"""data/download.py against a small hub on localhost that drops connections, cuts files and refuses."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import numpy as np
import pytest
from conftest import install_published, load_script, tiny_hp
from data_helpers import TEXTS, build, write_docs

import train_gpt
from prepare_caseops_data import (
    DEFAULT_TOKENIZER,
    only_run_in,
    read_manifest,
    read_shard,
    write_shard,
)
from prepare_caseops_data import main as prepare
from tools.dataset import check_dataset

ROOT = Path(__file__).resolve().parents[1]
download = load_script("data/download.py")

REVISION = "a" * 40
FOLDER = f"datasets/datasets/{download.CASEOPS[1]}"


class Handler(BaseHTTPRequestHandler):
    """The few requests that huggingface_hub makes for files of a dataset repository."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refused(self):
        if self.server.status:
            code = {401: "RepoNotFound", 404: "RepoNotFound", 403: "GatedRepo"}[self.server.status]
            self.answer(self.server.status, X_Error_Code=code, X_Error_Message="no")
        return self.server.status

    def do_POST(self):  # noqa: N802, the name is the base class's
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if self.refused():
            return
        entries = [
            {
                "type": "file",
                "path": path,
                "size": len(data),
                "oid": "0" * 40,
                "lfs": {
                    "size": len(data),
                    "oid": hashlib.sha256(data).hexdigest(),
                    "pointerSize": 130,
                },
            }
            for path in form["paths"]
            if (data := self.server.files.get(path)) is not None
        ]
        self.answer(200, json.dumps(entries).encode())

    def do_GET(self):  # noqa: N802
        if self.refused():
            return
        if "/api/" in self.path:
            self.answer(200, json.dumps({"id": "x/y", "sha": REVISION}).encode())
            return
        path = unquote(re.fullmatch(rf"/datasets/[\w./-]+?/resolve/{REVISION}/(.+)", self.path)[1])
        data = self.server.served.get(path, self.server.files[path])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.requests.append((Path(path).name, start))
        body, whole = data[start:], len(data)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        self.end_headers()
        if self.server.drops.get(Path(path).name, 0):
            self.server.drops[Path(path).name] -= 1
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(body)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{path on the hub: bytes}: six validation documents, training in shards of 100 values, a
    tokenizer, a manifest.
    """
    folder = tmp_path_factory.mktemp("hub")
    docs = write_docs(folder / "docs.jsonl", TEXTS)
    files = build(folder / "data", "--docs", docs, "--val-docs", 6, "--shard-tokens", 200)
    manifest = json.loads(files.pop("manifest.json"))
    streams = [name.rsplit("_", 1)[0] for name in files]
    stats = {
        "docs_val": 6,
        "docs_train": manifest["splits"]["train"]["documents"],
        "tokens_val": manifest["splits"]["val"]["tokens"],
        "tokens_train": manifest["splits"]["train"]["tokens"],
        "files_val": streams.count("fineweb_val"),
        "files_train": streams.count("fineweb_train"),
    }
    assert stats["files_train"] > 3
    entry = {
        "name": download.CASEOPS[1],
        "path": FOLDER.removeprefix("datasets/"),
        "tokenizer_name": "t",
        "val_bytes_glob": "fineweb_val_bytes_*.bin",
        "text_transform": "lossless_caps_caseops_v1",
        "stats": stats,
    }
    index = {
        "datasets": [entry],
        "tokenizers": [{"name": "t", "vocab_size": 8192, "model_path": "tokenizers/t.model"}],
    }
    hub = {"datasets/manifest.json": json.dumps(index).encode()}
    hub["datasets/tokenizers/t.model"] = DEFAULT_TOKENIZER.read_bytes()
    return hub | {f"{FOLDER}/{name}": data for name, data in files.items()}


@pytest.fixture
def hub(published, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.served, server.drops, server.status, server.requests = (
        dict(published),
        {},
        {},
        None,
        [],
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between attempts
    yield server
    server.shutdown()
    server.server_close()


def fetch(folder, *arguments):
    return download.main(["--local-dir", str(folder), *map(str, arguments)])


def failed(capsys, folder, *arguments):
    capsys.readouterr()
    assert fetch(folder, *arguments) == 1
    assert not (folder / "manifest.json").exists()
    return capsys.readouterr().err


def test_a_dataset_is_fetched_verified_and_read_by_the_trainer(hub, tmp_path, capsys):
    assert fetch(tmp_path) == 0
    assert (
        "0 training documents are validation documents too; canonical: no"
        in capsys.readouterr().out
    )
    for path, data in hub.files.items():
        if FOLDER in path:
            assert (tmp_path / Path(path).name).read_bytes() == data
    assert not list(tmp_path.glob("*.part"))
    assert prepare(["verify", str(tmp_path), "--workers", "1"]) == 0
    hp = tiny_hp(data_path=str(tmp_path), vocab_size=8192)
    assert train_gpt.find_tokenizer(hp) == tmp_path / "t.model"
    assert len(train_gpt.ValidationSet(hp).starts) == 6
    assert read_manifest(tmp_path)["sources"][0]["revision"] == REVISION


def test_a_plain_variant_has_no_side_car(hub, tmp_path, capsys, monkeypatch):
    install_published(monkeypatch)
    index = json.loads(hub.files["datasets/manifest.json"])
    entry = index["datasets"][0]
    entry["name"] = "fineweb10B_sp1024"
    del entry["val_bytes_glob"], entry["text_transform"]
    hub.files["datasets/manifest.json"] = json.dumps(index).encode()
    assert fetch(tmp_path, "--variant", "sp1024") == 0
    assert (
        not list(tmp_path.glob("*bytes*"))
        and "charged_bytes" not in read_manifest(tmp_path)["splits"]["val"]
    )
    hp = tiny_hp(data_path=str(tmp_path), vocab_size=8192, caseops_enabled=False)
    # this hub has no other tokens
    with pytest.raises(train_gpt.DataError, match="tokens hold CaseOps' markers"):
        train_gpt.ValidationSet(hp)
    assert fetch(tmp_path) == 1 and "no fineweb10B_sp8192_lossless" in capsys.readouterr().err


def test_default_folders_are_where_the_trainer_looks():
    default = train_gpt.Hyperparameters.__dataclass_fields__["data_path"].default
    assert f"data/datasets/{download.source_of('caseops')[2]}" == default
    assert download.source_of("sp1024") == (
        "willdepueoai/parameter-golf",
        "fineweb10B_sp1024",
        "fineweb10B_sp1024",
    )


def test_more_shards_come_later_and_what_is_there_stays(hub, tmp_path, capsys):
    assert fetch(tmp_path, "--train-shards", 1) == 0
    assert [path.name for path in tmp_path.glob("*train*")] == ["fineweb_train_000000.bin"]
    hub.requests.clear()
    assert fetch(tmp_path, "--train-shards", 3) == 0
    assert [name for name, _ in hub.requests if name.endswith(".bin")] == [
        "fineweb_train_000001.bin",
        "fineweb_train_000002.bin",
    ]
    assert read_manifest(tmp_path)["train_shards"] == 3
    assert (
        fetch(tmp_path, "--train-shards", 2) == 1
        and "000002.bin, which is not asked for" in capsys.readouterr().err
    )
    assert read_manifest(tmp_path)["train_shards"] == 3
    assert (
        fetch(tmp_path, "--train-shards", 999) == 1
        and "the repository has" in capsys.readouterr().err
    )


def test_a_damaged_file_is_fetched_again(hub, tmp_path):
    assert fetch(tmp_path) == 0
    (tmp_path / "manifest.json").unlink()
    path = tmp_path / "fineweb_train_000001.bin"
    data = bytearray(path.read_bytes())
    data[1500 % len(data)] ^= 1
    path.write_bytes(data)
    hub.requests.clear()
    assert fetch(tmp_path) == 0
    assert [name for name, _ in hub.requests if name.endswith(".bin")] == [path.name]


def test_a_dropped_connection_goes_on_by_range(hub, tmp_path, monkeypatch):
    # what is kept of a broken answer
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 64)
    hub.drops = {"fineweb_train_000000.bin": 2}
    assert fetch(tmp_path) == 0
    starts = [start for name, start in hub.requests if name == "fineweb_train_000000.bin"]
    assert len(starts) == 3 and starts[0] == 0 and 0 < starts[1] < starts[2]


def test_a_broken_attempt_is_gone_on_with_by_the_next(hub, tmp_path, capsys):
    name = "fineweb_train_000001.bin"
    (tmp_path / f"{name}.part").write_bytes(hub.files[f"{FOLDER}/{name}"][:700])
    assert fetch(tmp_path) == 0 and (name, 700) in hub.requests
    assert (tmp_path / name).read_bytes() == hub.files[f"{FOLDER}/{name}"]


def test_a_truncated_file_is_an_error_and_the_next_attempt_mends_it(hub, tmp_path, capsys):
    path = f"{FOLDER}/fineweb_train_000002.bin"
    hub.served[path] = hub.files[path][:-10]
    assert "should be of size" in failed(capsys, tmp_path)
    hub.served.clear()
    assert fetch(tmp_path) == 0


def test_bytes_that_are_not_the_hubs_are_thrown_away(hub, tmp_path, capsys):
    path = f"{FOLDER}/fineweb_val_bytes_000000.bin"
    hub.served[path] = bytes(len(hub.files[path]))
    assert "another sha256" in failed(capsys, tmp_path)
    assert not (tmp_path / "fineweb_val_bytes_000000.bin").exists() and not list(
        tmp_path.glob("*bytes*.part")
    )
    hub.served.clear()
    assert fetch(tmp_path) == 0


@pytest.mark.parametrize(
    "status, words", [(401, "HF_TOKEN"), (404, "no such repository"), (403, "permission")]
)
def test_a_repository_that_is_refused_says_what_to_do(hub, tmp_path, capsys, status, words):
    hub.status = status
    assert words in failed(capsys, tmp_path)


def test_a_missing_file_is_named(hub, tmp_path, capsys):
    del hub.files[f"{FOLDER}/fineweb_train_000001.bin"]
    assert "has no datasets/datasets" in failed(capsys, tmp_path)


def test_no_server_is_one_message(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert failed(capsys, tmp_path).startswith("error: ")


@pytest.mark.parametrize(
    "variable, value, words",
    [
        ("ALL_PROXY", "socks5://localhost:1", "pip install socksio, or unset ALL_PROXY"),
        ("HTTP_PROXY", "http://localhost:x", "through the proxy of HTTP_PROXY: Invalid port"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named(tmp_path, variable, value, words):
    if "socksio" in words and importlib.util.find_spec("socksio"):
        pytest.skip("socksio is installed")
    environ = {
        key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ
    }
    environ |= {"HF_ENDPOINT": "http://hub.invalid", variable: value}
    command = [sys.executable, str(ROOT / "data" / "download.py"), "--local-dir", str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_too_little_space_is_said_before_anything_is_fetched(hub, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "GB free" in failed(capsys, tmp_path)
    assert [name for name, _ in hub.requests] == ["manifest.json"]


@pytest.mark.parametrize(
    "key, words",
    [
        ("docs_val", "val: 6 documents, the publisher states 10"),
        ("tokens_train", "the publisher states 10"),
    ],
)
def test_counts_other_than_the_publishers_are_an_error(hub, tmp_path, capsys, key, words):
    index = json.loads(hub.files["datasets/manifest.json"])
    index["datasets"][0]["stats"][key] = 10
    hub.files["datasets/manifest.json"] = json.dumps(index).encode()
    assert words in failed(capsys, tmp_path)


def test_a_published_leak_is_counted_and_refused_by_the_trainer(hub, tmp_path, capsys):
    name = f"{FOLDER}/fineweb_train_000000.bin"
    val = np.concatenate(
        [
            np.frombuffer(hub.files[f"{FOLDER}/fineweb_val_{n:06d}.bin"], "<u2")[512:]
            for n in range(1)
        ]
    )
    first = val[: np.flatnonzero(val == 1)[1]]
    shard = tmp_path / "shard.bin"
    old = np.frombuffer(hub.files[name], "<u2")[512:]
    write_shard(shard, np.concatenate([first, old]))
    assert len(read_shard(shard)) == len(first) + len(old)
    hub.files[name] = shard.read_bytes()
    index = json.loads(hub.files["datasets/manifest.json"])
    index["datasets"][0]["stats"].update(docs_train=None, tokens_train=None)
    hub.files["datasets/manifest.json"] = json.dumps(index).encode()
    assert fetch(tmp_path / "data") == 0
    assert "1 training documents are validation documents too" in capsys.readouterr().out
    hp = tiny_hp(data_path=str(tmp_path / "data"), vocab_size=8192)
    with pytest.raises(train_gpt.DataError, match="1 training documents are validation documents"):
        check_dataset(hp, train_gpt.ValidationSet(hp))


@pytest.mark.parametrize(
    "content", [b"<html>not here</html>", b"[]", b"{}", b'{"datasets": [1]}', b"\xff\xfe"]
)
def test_an_index_that_is_none_is_one_message(hub, tmp_path, capsys, content):
    hub.files["datasets/manifest.json"] = content
    assert "published_manifest.json: not the index" in failed(capsys, tmp_path)


def test_validation_of_empty_documents_is_an_error(hub, tmp_path, capsys):
    for name, value in (("val", 1), ("val_bytes", 0)):
        shard = tmp_path / "shard.bin"
        write_shard(shard, np.full(50, value))
        hub.files[f"{FOLDER}/fineweb_{name}_000000.bin"] = shard.read_bytes()
    (tmp_path / "data").mkdir()
    assert "validation holds empty documents only" in failed(capsys, tmp_path / "data")


@pytest.mark.parametrize("value", ["-1", "all", "1e2"])
def test_a_number_of_shards_that_makes_no_sense_is_refused_by_its_name(tmp_path, capsys, value):
    with pytest.raises(SystemExit):
        fetch(tmp_path, f"--train-shards={value}")
    assert f"argument --train-shards: {value} is not a whole number" in capsys.readouterr().err


def test_a_full_disk_is_named(hub, tmp_path, capsys, monkeypatch):
    def no_room(url, file, **arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "http_get", no_room)
    message = failed(capsys, tmp_path)
    assert "No space left" in message and f"{tmp_path}/published_manifest.json.part" in message
    assert "Run the command again" in message


def test_control_c_is_one_message(hub, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "http_get", interrupted)
    assert fetch(tmp_path) == 130
    assert "error: interrupted\nRun the command again" in capsys.readouterr().err


@pytest.mark.parametrize("what", [[], ["--docs"]])
def test_two_downloads_do_not_write_into_one_folder(hub, tmp_path, capsys, what):
    """Both append to the same unfinished files."""
    publish_documents(hub)
    with only_run_in(tmp_path):
        assert f"{tmp_path} is in use by another run" in failed(capsys, tmp_path, *what)
    assert not list(tmp_path.iterdir())


# ---- documents


def publish_documents(hub, **changes):
    docs = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)
    facts = {"num_docs": len(TEXTS), "docs_val": 2, "docs_sha256": hashlib.sha256(docs).hexdigest()}
    hub.files["datasets/docs_selected.jsonl"] = docs
    hub.files["datasets/docs_selected.source_manifest.json"] = json.dumps(facts | changes).encode()
    return docs


def test_documents_are_fetched_and_shards_can_be_made_of_them(hub, tmp_path, capsys):
    docs = publish_documents(hub)
    hub.drops["docs_selected.jsonl"] = 1
    assert fetch(tmp_path, "--docs") == 0
    path = tmp_path / "docs_selected.jsonl"
    told = capsys.readouterr().out
    assert f"{len(TEXTS)} documents, the first 2 for validation; {path}" in told
    assert path.read_bytes() == docs
    hub.requests.clear()
    assert fetch(tmp_path, "--docs") == 0
    assert hub.requests == []  # whole files are not fetched again
    out = tmp_path / "shards"
    assert prepare(["--docs", str(path), "--val-docs", "2", "--out", str(out)]) == 0


def test_documents_stand_beside_shards(hub, tmp_path):
    publish_documents(hub)
    assert fetch(tmp_path) == 0
    assert fetch(tmp_path, "--docs") == 0
    assert (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"docs_sha256": "0" * 64},
            "not the file that docs_selected.source_manifest.json describes",
        ),
        ({"num_docs": "many"}, "not what such a file holds"),
        ({"docs_val": None}, "not what such a file holds"),
    ],
)
def test_documents_that_are_not_those_described_are_an_error(hub, tmp_path, capsys, changes, words):
    publish_documents(hub, **changes)
    assert words in failed(capsys, tmp_path, "--docs")


def test_a_repository_without_documents_is_named(hub, tmp_path, capsys):
    assert "has no datasets/docs_selected.jsonl" in failed(capsys, tmp_path, "--docs")


@pytest.mark.parametrize("more", [["--train-shards", "1"], ["--variant", "sp1024"]])
def test_documents_and_shards_are_two_commands(tmp_path, capsys, more):
    with pytest.raises(SystemExit) as ended:
        fetch(tmp_path, "--docs", *more)
    assert ended.value.code == 2 and "--docs fetches no shards" in capsys.readouterr().err
