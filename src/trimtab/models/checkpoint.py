"""Looking at a model folder before anything heavy reads it. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.errors import FormatError, UsageError
from trimtab.files import read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def check_safetensors(file: Path) -> None:
    """Raise FormatError, naming `file`, unless its header is sound and its length is what the header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise FormatError(f"{file} is truncated or not a safetensors file ({size} bytes); get it again")
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file} is not a safetensors file: its header is not readable; get it again") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise FormatError(f"{file} is {state}: {size} bytes, but its header tells of {expected}; get it again")


def check_folder(folder: Path) -> None:
    """Raise unless `folder` is a whole model: a readable config.json and every safetensors file it needs.

    FormatError names the file at fault; UsageError says what the folder is when it is no model.
    """
    read_config(folder)
    if (folder / INDEX).is_file():
        weights = [folder / name for name in _shards(folder / INDEX)]
        for file in weights:
            if not file.is_file():
                raise FormatError(f"{folder} lacks {file.name}, which {INDEX} names; get the folder again")
    elif (folder / WEIGHTS).is_file():
        weights = [folder / WEIGHTS]
    else:
        raise _no_weights(folder)
    for file in weights:
        check_safetensors(file)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. UsageError for an adapter, FormatError for anything that is no model folder."""
    adapter = (folder / "adapter_config.json").is_file()
    if not (folder / "config.json").is_file():
        if adapter:
            raise UsageError(f"{folder} is an adapter, not a model; give the base model here and this as the adapter")
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"; to use {ggufs[0].name}, give the path of the file itself" if ggufs else ""
        raise FormatError(f"{folder} is not a model folder: it has no config.json{hint}")
    if adapter:
        # transformers would load such an adapter by itself, when peft happens to be installed.
        raise UsageError(
            f"{folder} holds a model and an adapter (adapter_config.json) at once; move the adapter to its own folder"
        )
    return read_json(folder / "config.json")


def _shards(index: Path) -> list[str]:
    """The names of the files that an index tells of, each once."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise FormatError(f"{index} has no 'weight_map'; get it again")
    return sorted({str(name) for name in names.values()})


def _no_weights(folder: Path) -> UsageError:
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        return UsageError(
            f"{folder} has its weights only in {pickled[0]}, and not in safetensors; such a file can run code when it "
            f"is opened, so it is never read: save the model with save_pretrained in transformers, or get the "
            f"safetensors version"
        )
    return FormatError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}")
