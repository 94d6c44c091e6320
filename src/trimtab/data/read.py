"""Reading training text: which container a file is, which layout its rows have, and what is wrong with it.

The container is told by the content, with the suffix as a hint. Imports neither torch nor transformers.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.data.layout import KNOWN, Layout, Record, Row, Turn, check_layout_name, detect, to_rows
from trimtab.errors import FormatError, UsageError, did_you_mean

__all__ = ["KNOWN", "Layout", "Row", "Source", "Turn", "read"]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz")
EXPECTED = "expected JSON, JSON Lines, CSV, TSV, Parquet or plain text, each possibly gzipped"
FOREIGN = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"%PDF", "a PDF document"),
    (b"PK\x03\x04", "a zip archive (also the container of .xlsx, .docx, .npz and .pt)"),
    (b"GGUF", "a GGUF model"),
    (b"ARROW1", "an Arrow file; write it as Parquet"),
    (b"\x93NUMPY", "a numpy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; decompress it or use gzip"),
    (b"BZh", "compressed with bzip2; decompress it or use gzip"),
    (b"\xfd7zXZ", "compressed with xz; decompress it or use gzip"),
    (b"\x80\x02", "a Python pickle, which is never loaded"),
    (b"\x80\x04", "a Python pickle, which is never loaded"),
    (b"\x80\x05", "a Python pickle, which is never loaded"),
    (b"\xff\xfe", "text in UTF-16; convert it to UTF-8"),
    (b"\xfe\xff", "text in UTF-16; convert it to UTF-8"),
)


@dataclass(frozen=True)
class Source:
    """The rows of one file or hub data set, and how it was read.

    keys: the keys the rows were made from. unused: the other keys there. incomplete: numbers of the rows
    without an answer, which are among `rows` (empty unless `read` was asked to keep them).
    """

    name: str
    container: str
    layout: str
    rows: tuple[Row, ...]
    keys: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    incomplete: tuple[int, ...] = ()

    def describe(self) -> str:
        """One line: 'train.jsonl: 2,251 rows, alpaca layout (instruction, input, output), JSON Lines gzipped'."""
        count = f"{len(self.rows):,} row{'' if len(self.rows) == 1 else 's'}"
        unused = f", unused keys: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.name}: {count}, {self.layout} layout ({', '.join(self.keys)}), {self.container}{unused}"


def read(
    source: str | Path,
    *,
    layout: str = "auto",
    limit: int | None = None,
    split: str = "train",
    keep_incomplete: bool = False,
) -> Source:
    """Read rows from a file, or from a hub data set through `datasets`.

    Files: JSON (an array of objects), JSON Lines, CSV, TSV, Parquet, each also gzipped, and .txt with one row
    a line (blank lines separate). layout: "auto", or a name out of KNOWN. limit: read the first so many rows
    and check no others. split: of a hub data set. keep_incomplete: keep rows without an answer and list them in
    `Source.incomplete`, for looking at a file; otherwise they are an error.

    Raises UsageError, which names the file, the row and what to do.
    """
    check_layout_name(layout)
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}, but must be at least 1 row")
    path = Path(source).expanduser()
    if path.is_dir():
        raise UsageError(f"{source} is a folder; give one file of rows")
    if path.exists():
        if split != "train":
            raise UsageError(f"split '{split}' is for hub data sets, but {source} is a file; give that split's file")
        name = path.name
        container, records = _read_file(path, limit)
    else:
        name = str(source)
        container, records = _read_hub(str(source), path, split, limit)
    records = records[:limit]
    if not records:
        raise UsageError(f"{name} is empty: it holds no rows")
    found = detect(records, layout, name)
    rows, incomplete = to_rows(records, found, name, keep_incomplete=keep_incomplete)
    unused = dict.fromkeys(key for _, record in records for key in record if key not in found.keys)
    return Source(name, container, found.name, rows, found.keys, tuple(unused), incomplete)


def _read_file(path: Path, limit: int | None) -> tuple[str, list[Record]]:
    name, suffix = path.name, path.suffix.lower()
    data, packed = _unpacked(path)
    gzipped = " gzipped" if packed else ""
    if suffix == ".gz":
        if not packed:
            raise FormatError(f"{name} is no gzip file, though its name says so; fetch it again, or rename it")
        suffix = path.with_suffix("").suffix.lower()
    if data.startswith(b"PAR1"):
        return "Parquet" + gzipped, _parquet(data, name, limit)
    _refuse_foreign(data, name)
    container, records = _from_text(_decode(data, name), name, suffix, limit)
    return container + gzipped, records


def read_text(path: Path) -> str:
    """The text of a file, gzipped or not. UsageError for one that is empty, or is no text in UTF-8."""
    data, _ = _unpacked(path)
    _refuse_foreign(data, path.name)
    return _decode(data, path.name)


def _unpacked(path: Path) -> tuple[bytes, bool]:
    """What a file holds, and whether it was gzipped."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    packed = data.startswith(b"\x1f\x8b")
    if packed:
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise FormatError(f"{path.name} is a broken or truncated gzip file ({error}); fetch it again") from error
    if not data.strip():
        raise UsageError(f"{path.name} is empty: it holds no rows")
    return data, packed


def _refuse_foreign(data: bytes, name: str) -> None:
    kind = next((kind for magic, kind in FOREIGN if data.startswith(magic)), None)
    if kind is None and data[257:262] == b"ustar":
        kind = "a tar archive"
    if kind is None and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < len(data):
        kind = "a safetensors file of weights"
    if kind is None and b"\0" in data[:4096]:
        kind = "a binary file of an unknown format"
    if kind is not None:
        raise FormatError(f"{name} is {kind}, not rows of text; {EXPECTED}")


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The signature is taken off before decoding, so the offset counts from behind it.
        offset = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        line = data.count(b"\n", 0, offset) + 1
        raise FormatError(
            f"{name} is not valid UTF-8: byte 0x{data[offset]:02x} at offset {offset:,} (line {line:,}); "
            "convert the file to UTF-8"
        ) from error


def _from_text(text: str, name: str, suffix: str, limit: int | None) -> tuple[str, list[Record]]:
    if not text.strip():
        raise UsageError(f"{name} is empty: it holds no rows")
    if suffix in (".txt", ".text"):
        lines = enumerate(text.split("\n"), start=1)
        return "plain text", [(n, {"text": line.rstrip("\r")}) for n, line in lines if line.strip()]
    first = text.lstrip()[0]
    if first == "[":
        return "JSON array", _json_array(text, name)
    if first == "{":
        _refuse_one_object(text, name, suffix)
        return "JSON Lines", _json_lines(text, name, limit)
    if suffix in (".csv", ".tsv"):
        return suffix[1:].upper(), _csv(text, name, suffix)
    if suffix == ".parquet":
        raise FormatError(f"{name} is text, not Parquet; name it for what it is")
    if suffix in (".json", ".jsonl", ".ndjson"):
        raise FormatError(f"{name} is not JSON: it begins with {text.lstrip()[:20]!r}, not with [ or {{; {EXPECTED}")
    raise FormatError(f"{name}: cannot tell its format from '{suffix}'; {EXPECTED}, with its usual suffix")


def _parse(text: str, what: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {line or error.lineno:,} column {error.colno:,}"
        raise FormatError(f"{what} is broken JSON at {place}: {error.msg}; mend or fetch it again") from error
    except (RecursionError, ValueError) as error:
        raise FormatError(f"{what} is JSON that cannot be read: {error}") from error


def _json_array(text: str, name: str) -> list[Record]:
    return [(number, _object(item, name, number)) for number, item in enumerate(_parse(text, name), start=1)]


def _json_lines(text: str, name: str, limit: int | None) -> list[Record]:
    records: list[Record] = []
    # Not splitlines: it also cuts at separators that stand unescaped inside JSON strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            records.append((number, _object(_parse(line, name, number), name, number)))
            if len(records) == limit:
                break
    return records


def _object(item: Any, name: str, number: int) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise FormatError(f"{name}: row {number} is a {type(item).__name__}, but every row must be an object with keys")
    return item


def _refuse_one_object(text: str, name: str, suffix: str) -> None:
    try:
        json.loads(text.lstrip().split("\n", 1)[0])
        return
    except (ValueError, RecursionError):
        if suffix in (".jsonl", ".ndjson"):
            return
    keys = ", ".join(list(_parse(text, name))[:12])
    raise FormatError(
        f"{name} is one JSON object over several lines (keys: {keys}), not rows; "
        "expected an array of objects, or one object a line"
    )


def _csv(text: str, name: str, suffix: str) -> list[Record]:
    header_line = text.split("\n", 1)[0]
    delimiter = "\t" if suffix == ".tsv" or "\t" in header_line else max(",;", key=header_line.count)
    before = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            lines = [fields for fields in reader if fields]
        except csv.Error as error:
            raise FormatError(f"{name}: broken CSV near line {reader.line_num:,}: {error}; mend its quotes") from error
    finally:
        csv.field_size_limit(before)
    header = lines[0]
    if len(set(header)) != len(header):
        raise FormatError(f"{name}: two columns have the same name in its header ({', '.join(header)})")
    for number, fields in enumerate(lines[1:], start=1):
        if len(fields) != len(header):
            raise FormatError(f"{name}: row {number} has {len(fields)} fields, but its header has {len(header)}")
    return [(number, dict(zip(header, fields, strict=True))) for number, fields in enumerate(lines[1:], start=1)]


def _parquet(data: bytes, name: str, limit: int | None) -> list[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"{name} is Parquet, which needs the extra 'data': pip install 'trimtab[data]'") from error
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise FormatError(f"{name} is broken or truncated Parquet ({_one_line(error)}); fetch it again") from error
    return _numbered((table if limit is None else table.slice(0, limit)).to_pylist())


def _numbered(records: Sequence[dict[str, Any]]) -> list[Record]:
    return list(enumerate(records, start=1))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _read_hub(source: str, path: Path, split: str, limit: int | None) -> tuple[str, list[Record]]:
    looks_like_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and path.suffix.lower() not in SUFFIXES
    if not looks_like_id or source.startswith("."):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UsageError(f"no such file: {source}{did_you_mean(path.name, siblings)}")
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"no such file: {source}; to read it as a hub data set, install the extra 'hub': pip install 'trimtab[hub]'"
        ) from error
    try:
        data = datasets.load_dataset(source, split=f"{split}[:{limit}]" if limit else split)
    except Exception as error:  # the hub client raises many unrelated types, for a network or a name alike
        raise UsageError(
            f"no such file: {source}; and split '{split}' of a hub data set of that name cannot be had: "
            f"{_one_line(error)}; check the name and the network, or give a file"
        ) from error
    return f"hub data set, split {split}", _numbered([dict(record) for record in data])
