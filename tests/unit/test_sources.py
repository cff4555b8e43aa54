"""Rows from files, folders and the hub; every kind of broken file is a DataError that names file and row."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import socket
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thriftune import hub
from thriftune.data import load_file, load_rows
from thriftune.data.sources import Rows
from thriftune.errors import DataError, InputError, ModelError
from thriftune.recipe import DataRecipe

ROWS = [{"prompt": "Hi, you", "completion": "Yo\nthere"}, {"prompt": "Zo\u00eb\u2028", "completion": '"quoted"'}]


def load(path: Path | str, split: str = "train", **options: Any) -> Rows:
    return load_rows(DataRecipe(name=str(path), **options), split)


def refused(path: Path | str, *parts: str, **options: Any) -> DataError:
    """The error about `path`; every part stands in what was given, and all three things are said."""
    with pytest.raises(DataError) as caught:
        load(path, **options)
    for part in parts:
        assert part in caught.value.given, caught.value.given
    assert caught.value.allowed
    assert caught.value.do
    return caught.value


def as_json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    kind = path.suffix
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind in (".csv", ".tsv"):
        write_csv(path, rows, "\t" if kind == ".tsv" else ",")
    else:
        path.write_bytes(json.dumps(rows).encode() if kind == ".json" else as_json_lines(rows))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_packed_or_not(tmp_path: Path, kind: str, packed: str) -> None:
    path = tmp_path / f"rows{kind}"
    write(path, ROWS)
    path = path.rename(tmp_path / f"rows{kind}{packed}")
    path.write_bytes(PACKERS[packed](path.read_bytes()))
    rows = load(path)
    assert rows.rows == ROWS
    assert rows.places[1] == f"{path} row 2"
    assert rows.description == f"{path.name}, 2 rows"
    assert load_file(str(path), "--input").rows == ROWS


def test_folder_by_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.csv", ROWS[:1])
    (tmp_path / "README.md").write_text("not rows")
    assert load(tmp_path).rows == ROWS
    assert load(tmp_path, "test").rows == ROWS[:1]
    assert load_rows(DataRecipe(name="gsm8k", path=str(tmp_path)), "test").rows == ROWS[:1]
    refused(tmp_path / "nothing.jsonl", "not an existing file")
    with pytest.raises(DataError, match=r"'validation'.*test\.csv, train\.jsonl"):
        load(tmp_path, "validation")
    write(tmp_path / "train.csv", ROWS)
    refused(tmp_path, "2 files for split 'train'")


def test_shards_of_a_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in (0, 1):
        write(tmp_path / "data" / f"train-0000{number}-of-00002.parquet", ROWS[number : number + 1])
    rows = load(tmp_path)
    assert rows.rows == ROWS
    assert rows.places[1].endswith("train row 2")


def test_a_file_has_no_other_split(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match="single file") as caught:
        load(tmp_path / "rows.jsonl", "test")
    assert "eval_path" in caught.value.do


def test_builtin_sets() -> None:
    rows = load("sums")
    assert rows.rows[0].keys() == {"question", "answer"}
    assert rows.places[0] == "sums train row 1"
    assert rows.description == f"sums train, {len(rows):,} rows"


def test_places_survive_selection(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a": 3}\n')
    rows = load(path)
    assert list(rows.places) == [f"{path} row {line}" for line in (1, 3, 4)]
    chosen = rows.select([2, 1], "two of them")
    assert list(chosen.places) == [f"{path} row 4", f"{path} row 3"]
    assert list(rows.places[1:]) == [f"{path} row 3", f"{path} row 4"]
    assert chosen.description.endswith("two of them")


# ---------------------------------------------------------------- broken files

BROKEN = [
    ("rows.jsonl", b"", ["is empty"]),
    ("rows.jsonl", b" \n\n", ["is empty"]),
    ("rows.json", b"[]", ["no rows"]),
    ("rows.csv", b"a,b\n", ["no rows"]),
    ("rows.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', ["row 2", "byte 19 (0xe9) is not UTF-8"]),
    ("rows.csv", b"a\nb\ncaf\xe9\n", ["row 3", "byte 7"]),
    ("rows.jsonl", b'\xef\xbb\xbf{"a": "\xe9"}\n', ["row 1", "byte 10 (0xe9)"]),
    ("rows.jsonl", '{"a": 1}'.encode("utf-16"), ["UTF-16"]),
    ("rows.jsonl", b'{"a": 1}\n[1]\n', ["row 2", "not an object but list"]),
    ("rows.jsonl", b'{"a": 1}\nnull\n', ["row 2", "not an object"]),
    ("rows.json", b'[{"a": 1}, 3]', ["row 2", "not an object but int"]),
    ("rows.json", b'"text"', ["a single str"]),
    ("rows.jsonl", b'{"a": 1}\n{"a": }\n', ["row 2", "Expecting value"]),
    ("rows.jsonl", b'{"a": 1}\n{"a": 1', ["row 2"]),
    ("rows.jsonl", b'{"a": 1} {"a": 2}\n', ["row 1", "Extra data"]),
    ("rows.jsonl", b'{"a": 1, "a": 2}\n', ["row 1", "'a' stands there twice"]),
    ("rows.jsonl", b'{"m": [{"a": 1, "a": 2}]}\n', ["row 1", "twice"]),
    ("rows.jsonl", b'{"a": 1}\n{"a": NaN}\n', ["row 2", "NaN"]),
    ("rows.jsonl", b'{"a": -Infinity}\n', ["row 1", "-Infinity"]),
    ("rows.jsonl", b'{"a": ' + b"[" * 100_000, ["row 1", "nested"]),
    ("rows.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ["row 1"]),
    ("rows.csv", b"a,b\n1,2\n1,2,3\n", ["row 2 (line 3)", "3 values"]),
    ("rows.csv", b"a,b\n1\n", ["row 1 (line 2)", "1 values"]),
    ("rows.csv", b'a,b\n"x"y,2\n', ["row 1"]),
    ("rows.csv", b'a,b\n1,"never closed\n', ["row 1"]),
    ("rows.csv", b"a,a\n1,2\n", ["header"]),
    ("rows.parquet", b"PAR1 but no more", ["no whole Parquet file"]),
    ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 500, mtime=0)[:-20], ["cannot be unpacked"]),
    ("rows.jsonl.gz", b'{"a": 1}\n', ["cannot be unpacked"]),
    ("rows.jsonl.xz", lzma.compress(b'{"a": 1}\n')[:-9], ["cannot be unpacked"]),
    ("rows.jsonl.bz2", bz2.compress(b'{"a": 1}\n')[:-9], ["cannot be unpacked"]),
    ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd", ["zstd"]),
    ("rows.txt", b"a text", ["of a kind that is not read"]),
]


@pytest.mark.parametrize(("name", "content", "parts"), BROKEN)
def test_broken_files(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, str(path), *parts)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    write(path, ROWS)
    path.write_bytes(path.read_bytes()[:-10])
    refused(path, str(path), "Parquet")


def test_a_byte_order_mark_is_no_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfa,b\r\n1,2\r\n")
    assert load(tmp_path / "rows.csv").rows == [{"a": "1", "b": "2"}]
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert load(tmp_path / "rows.jsonl").rows == [{"a": 1}]


def test_json_lines_under_the_name_of_json(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(as_json_lines(ROWS))
    assert load(tmp_path / "rows.json").rows == ROWS


def test_row_of_ten_megabytes(tmp_path: Path) -> None:
    row = {"prompt": "word " * 2_000_000, "completion": "Yo"}
    started = time.monotonic()
    for name in ("rows.jsonl", "rows.csv"):
        write(tmp_path / name, [row])
        assert load(tmp_path / name).rows == [row]
    assert time.monotonic() - started < 10
    assert csv.field_size_limit() == 131_072  # the process-wide limit is as it was


def test_things_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")  # reading it would wait for ever
    refused(tmp_path / "rows.jsonl", "not a regular file")
    nowhere = ["../../no/such", "/nowhere/rows.jsonl", "a/b/c", "a b", "a--b/c", "nobody\0", "~nobody-here", "x" * 5000]
    for name in nowhere:
        refused(name, "no hub id")
    with pytest.raises(DataError, match=r"data\.path"):
        load_rows(DataRecipe(name="gsm8k", path=str(tmp_path / "missing")), "train")
    with pytest.raises(DataError, match=r"--input .* is a folder"):
        load_file(str(tmp_path), "--input")


@given(content=st.binary(max_size=60) | st.text(alphabet='{}[]":,a1\n\\', max_size=30).map(str.encode))
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz", "rows.parquet"])
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory: Any, name: str, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        rows = load(path)
    except DataError as error:
        assert str(path) in error.given
        return
    assert rows.rows
    assert all(isinstance(row, dict) for row in rows.rows)
    assert len(rows.places) == len(rows)


# ---------------------------------------------------------------- the hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if HF_HUB_OFFLINE and a proxy had never been set."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.mark.usefixtures("online")
def test_unreachable_hub_is_said_within_three_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(*_: Any, **__: Any) -> Any:
        time.sleep(5)
        raise socket.gaierror("no such name")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr("thriftune.data.sources._is_cached", lambda _: False)
    started = time.monotonic()
    error = refused("imdb", "'stanfordnlp/imdb'", "https://huggingface.co", "no answer within 2.5 s")
    assert time.monotonic() - started < 3
    assert "HF_HUB_OFFLINE=1" in error.do


@pytest.mark.usefixtures("online")
def test_the_endpoint_is_asked_and_any_answer_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    import threading

    def answer() -> None:
        connection, _ = server.accept()
        connection.recv(1000)
        connection.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    hub.ensure_hub_reachable("the model 'a/b'", ModelError)
    thread.join()
    server.close()
    with pytest.raises(ModelError, match=f"the model 'a/b'.*127.0.0.1:{port}"):
        hub.ensure_hub_reachable("the model 'a/b'", ModelError)
    with pytest.raises(InputError):
        hub.ensure_hub_reachable("the model 'a/b'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.ensure_hub_reachable("the model 'a/b'")


@pytest.mark.usefixtures("online")
def test_an_unknown_certificate_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")

    monkeypatch.setattr(urllib.request, "urlopen", unknown)
    hub.ensure_hub_reachable("the model 'a/b'")


class FakeDatasets(types.ModuleType):
    """Stands in for the `datasets` library: what it was asked, and what it answers."""

    def __init__(self, cache: Path, answer: Callable[[], Any]) -> None:
        super().__init__("datasets")
        self.config = types.SimpleNamespace(HF_HUB_OFFLINE=False, HF_DATASETS_CACHE=str(cache))
        self.exceptions = types.SimpleNamespace(DatasetsError=ValueError)
        self.asked: list[tuple[Any, ...]] = []
        self._answer = answer

    def load_dataset(self, name: str, subset: str | None, split: str) -> Any:
        self.asked.append((name, subset, split, self.config.HF_HUB_OFFLINE))
        return self._answer()


def fail() -> Any:
    raise FileNotFoundError("no such data set\nand a long story")


def test_named_sets_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = FakeDatasets(tmp_path, lambda: [{"question": "1+1", "answer": "2"}])
    monkeypatch.setitem(sys.modules, "datasets", library)
    rows = load("gsm8k", "test")
    load("some-org/some.set", "train", subset="small")
    assert library.asked == [("openai/gsm8k", "main", "test", False), ("some-org/some.set", "small", "train", False)]
    assert rows.description == "openai/gsm8k (main) test, 1 rows"
    assert rows.places[0] == "openai/gsm8k (main) test row 1"


def test_problems_of_the_hub_are_data_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(tmp_path, fail))
    error = refused("some/set", "'some/set'", "no such data set")
    assert "long story" not in error.given
    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets(tmp_path, list))
    refused("some/set", "no rows")


@pytest.mark.usefixtures("online")
def test_cached_data_set_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    library = FakeDatasets(tmp_path, lambda: [{"text": "a"}])
    monkeypatch.setitem(sys.modules, "datasets", library)
    refused("some/set", "cannot be reached")
    (tmp_path / "some___set").mkdir()
    assert load("some/set").rows == [{"text": "a"}]
    assert library.asked == [("some/set", None, "train", True)]  # the cache alone was asked
    assert library.config.HF_HUB_OFFLINE is False


@pytest.mark.shared
def test_real_sets(shared: Path) -> None:
    rows = load_rows(DataRecipe(name="imdb", path=str(shared / "data/imdb")), "train")
    assert len(rows) == 25_000
    assert rows.rows[0].keys() >= {"text", "label"}
    assert len(load(shared / "data/gsm8k", "test")) == 1319
