"""From a GGUF file to a safetensors folder in the user's cache: once, and never halfway."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.errors import FormatError, OutOfMemory, TrimtabError, UsageError, ran_out_of_memory
from trimtab.files import StorageError, cache_root, disk_errors, whole_folder
from trimtab.models.checkpoint import check_folder

# Part of each folder's name: raised when what is written changes, so that older folders are not taken for new ones.
LAYOUT = 1


def cache_folder(cache: Path | None = None) -> Path:
    """Where converted models are kept."""
    return cache_root(cache) / "models"


def safetensors_folder(gguf: Path, *, cache: Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """The folder with `gguf` as safetensors, tokenizer, chat template and generation config; made if need be.

    The folder's name holds a hash of the file's content. Converting takes tens of seconds, and about four bytes of
    disk a parameter; `progress` is then told so. Several processes may ask at once: one converts, the others wait.
    Raises FormatError for a file that is no GGUF or of an unknown architecture, UsageError for a cache that cannot
    be written or is full.
    """
    check_gguf(gguf)
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", gguf.stem)
    folder = cache_folder(cache) / f"{name}-{digest}-{LAYOUT}"
    if _whole(folder):
        return folder
    try:
        return _convert_once(gguf, folder, progress or (lambda message: None))
    except OSError as error:
        met = error.__cause__ if isinstance(error, StorageError) else error
        reason, number = (met.strerror, met.errno) if isinstance(met, OSError) else (None, None)
        raise _unwritable(folder, gguf, reason or str(error), number) from error


def check_gguf(file: Path) -> None:
    """Raise unless `file` can be read and begins as a GGUF does."""
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    if start != b"GGUF":
        raise FormatError(f"{file} is not a GGUF file; give a GGUF file, a model folder, or a model's name")


def _convert_once(gguf: Path, folder: Path, progress: Callable[[str], None]) -> Path:
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        progress(f"waiting for another process that is converting {gguf.name}")
        lock.acquire()
    try:
        if not _whole(folder):
            _convert(gguf, folder, progress)
    finally:
        # Its empty file stays: with it gone, a process that waits and one that comes would each hold a lock.
        lock.release()
    return folder


def _convert(gguf: Path, folder: Path, progress: Callable[[str], None]) -> None:
    if folder.exists():
        shutil.rmtree(folder)  # it is damaged, and under the lock no one else is writing it
    progress(f"converting {gguf.name} to safetensors, once (under a minute for a small model)")
    with whole_folder(folder) as partial:
        _write(gguf, partial)
    progress(f"kept as {folder}")


def _write(gguf: Path, folder: Path) -> None:
    from trimtab.quiet import quiet

    model, tokenizer = _read_gguf(gguf)
    with quiet(), disk_errors(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    _forget_origin(folder)
    if not _whole(folder):
        raise TrimtabError(f"the conversion of {gguf} wrote an incomplete folder; try it again")


def _read_gguf(gguf: Path) -> tuple[Any, Any]:
    """The dequantised model and its tokenizer."""
    import importlib.util

    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f"reading GGUF files needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    import torch
    import transformers

    from trimtab.quiet import quiet

    # A 4- or 8-bit block is scale × integer + offset with 16-bit scale and offset. The result needs more bits than
    # fp16 or bf16 have (rounding would change 42% and 79% of SmolLM2's weights), so fp32 is what loses nothing.
    source = gguf.resolve()
    common: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    weights: dict[str, Any] = {"dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        # Without it, whether the blocks stay packed depends on which kernels are installed.
        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(str(source.parent), **common, **weights)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.parent), **common)
    except Exception as error:  # the reader raises whatever its parsing meets
        if ran_out_of_memory(error):
            raise OutOfMemory(f"not enough memory to convert {gguf}: it takes about 8 bytes a parameter") from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise FormatError(f"{gguf} cannot be converted (truncated, or a kind not known here): {reason}") from error
    # The weights are plain now, and a model that says it is quantised cannot be saved.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model, tokenizer


def _forget_origin(folder: Path) -> None:
    """Take the GGUF's place on this machine out of the tokenizer's configuration: the copy stands by itself."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    kept = {k: v for k, v in config.items() if k not in ("gguf_file", "name_or_path", "local_files_only", "is_local")}
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _whole(folder: Path) -> bool:
    try:
        check_folder(folder)
    except UsageError:
        return False
    return True


def _unwritable(folder: Path, gguf: Path, reason: str, number: int | None) -> UsageError:
    need = ""
    if number == errno.ENOSPC:
        need = f"; it takes up to {gguf.stat().st_size * 8 / 1e9:.1f} GB there"
    return UsageError(
        f"cannot write the converted {gguf.name} under {folder.parent}: {reason}{need}; make room, or set "
        f"TRIMTAB_CACHE to another folder"
    )
