"""Loading a model by whatever a user calls it: short name, folder, GGUF file or hub id."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from trimtab.errors import FormatError, OutOfMemory, TrimtabError, UsageError, did_you_mean, ran_out_of_memory
from trimtab.models.checkpoint import check_folder, read_config
from trimtab.models.convert import check_gguf, safetensors_folder
from trimtab.models.dtypes import torch_dtype
from trimtab.models.embedded import EMBEDDED

if TYPE_CHECKING:
    import torch

Kind = Literal["causal-lm", "seq2seq-lm", "encoder", "classifier"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model", "tekken.json")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and what it came from.

    model: a transformers PreTrainedModel. tokenizer: its tokenizer, None where the folder has none.
    name: what the user called it. path: the folder its files are in.
    """

    model: Any
    tokenizer: Any
    name: str
    path: Path


def load(
    name: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    kind: Kind = "causal-lm",
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """The model and tokenizer called `name`: an embedded short name, a local folder, a GGUF file or a hub id.

    A hub id may name a revision: REPO@REVISION.
    dtype: float32, bfloat16, float16, or fp32, bf16, fp16 (or a torch.dtype); None is what the checkpoint stores.
    device: None is the CPU.
    Weights come from safetensors only, nothing is unpickled, and each one the model needs must be there (a missing
    pooler of an encoder is tolerated and logged: nothing but the pooled output uses it).
    Raises UsageError for a name that is nowhere, the wrong kind, dtype or device; FormatError, naming the file, for
    a damaged checkpoint; TrimtabError when memory runs out.
    """
    if kind not in get_args(Kind):
        raise UsageError(f"kind is '{kind}', but must be one of {', '.join(get_args(Kind))}")
    wanted = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    path = find(name, kind=kind, trust_remote_code=trust_remote_code, progress=progress)
    check_folder(path)
    config = config_of(name, path, kind, trust_remote_code)
    model, found = from_checkpoint(path, config, kind, wanted, trust_remote_code)
    _check_keys(path, kind, found)
    return finished(model, name, path, device, trust_remote_code)


def finished(model: Any, name: str, path: Path, device: str | None, trust_remote_code: bool) -> LoadedModel:
    """A model made from the folder `path`, with its tokenizer: in evaluation mode, on a device, with its name."""
    if device is not None:
        _move(model, device)
    _name(model, name, path)
    return LoadedModel(model.eval(), load_tokenizer(path, trust_remote_code=trust_remote_code), name, path)


def outline(
    name: str,
    *,
    trust_remote_code: bool = False,
    kind: Kind = "causal-lm",
    progress: Callable[[str], None] | None = None,
) -> Any:
    """The model called `name` as `load` finds it, on the meta device: its modules and shapes without any values."""
    import torch

    path = find(name, kind=kind, trust_remote_code=trust_remote_code, progress=progress)
    read_config(path)
    config = config_of(name, path, kind, trust_remote_code)
    with torch.device("meta"):
        return from_config(path, config, kind, trust_remote_code)


def _name(model: Any, name: str, path: Path) -> None:
    """Let adapters saved on this model tell of it: by `name` to trimtab, and to others by what they can load."""
    model._trimtab_name = name
    if path != Path(name).expanduser():
        # What was converted or fetched lies in this user's cache, which means nothing elsewhere.
        repository, model._trimtab_revision = hub_revision(name)
        model.config._name_or_path = EMBEDDED[name].hub_id if name in EMBEDDED else repository


def hub_revision(name: str) -> tuple[str, str | None]:
    """The two parts of REPO@REVISION; the revision is None for any other name, and for a file or folder here."""
    repository, _, revision = name.partition("@")
    return (repository, revision) if revision and not Path(name).expanduser().exists() else (name, None)


def find(
    name: str,
    *,
    kind: Kind = "causal-lm",
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """The local folder of the model called `name`; a GGUF file is converted and a hub id fetched if need be.

    An embedded short name goes before a folder of the same name, which is then written ./name.
    Python files are fetched from a hub only with `trust_remote_code`.
    """
    if name in EMBEDDED:
        embedded = EMBEDDED[name]
        if kind not in (embedded.kind, "classifier"):
            raise UsageError(f"'{name}' is of kind {embedded.kind}, but a model of kind {kind} is needed here")
        found = embedded.path()
        return safetensors_folder(found, progress=progress) if found.suffix == ".gguf" else found
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        check_gguf(path)
        if kind not in ("causal-lm", "classifier"):
            raise UsageError(f"{name} is a GGUF file, which is read as causal-lm, but {kind} is needed here")
        return safetensors_folder(path, progress=progress)
    if name.startswith((".", "/", "~")) or path.suffix == ".gguf" or len(Path(hub_revision(name)[0]).parts) > 2:
        raise UsageError(f"there is no file or folder {name}")
    return _fetch(name, trust_remote_code)


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in the folder `path`, or None when it has none. FormatError when it cannot be read."""
    if not any(next(path.glob(pattern), None) for pattern in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    from trimtab.quiet import quiet

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                str(path), trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
            )
    except Exception as error:  # tokenizer libraries raise bare Exceptions
        raise _explained(error, f"the tokenizer in {path} cannot be loaded") from error


def _fetch(name: str, trust_remote_code: bool) -> Path:
    nowhere = f"no model '{name}': it is no file or folder here, not an embedded model ({', '.join(EMBEDDED)})"
    near = did_you_mean(name, EMBEDDED)
    repository, revision = hub_revision(name)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository):
        raise UsageError(f"{nowhere}, and cannot be a hub id{near}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"] + ["*.py"] * trust_remote_code
    ignored = ["*/*", "consolidated*"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))
    except GatedRepoError as error:
        raise UsageError(f"'{name}' asks for its terms to be accepted on the hub, and for a login: {error}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(f"{nowhere}, and not on the hub (or private: log in){near}") from error
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"{nowhere}, and cannot be had from the hub: a hub id needs a connection, or an earlier download{near}"
        ) from error
    except Exception as error:  # connection libraries raise their own
        raise UsageError(f"{nowhere}, and the hub answered: {' '.join(str(error).split())[:200]}{near}") from error


def from_checkpoint(
    path: Path, config: Any, kind: Kind, dtype: torch.dtype | None, trust_remote_code: bool, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The model in a folder, and what transformers says of keys that are missing or too many. options: transformers'.

    Raises FormatError, naming the folder, for one that cannot be loaded.
    """
    from trimtab.quiet import quiet

    try:
        with quiet():
            model, found = _loader(kind).from_pretrained(
                str(path),
                config=config,
                dtype=dtype if dtype is not None else "auto",
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                local_files_only=not trust_remote_code,
                **options,
            )
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, KeyError for a bad folder
        raise _explained(error, f"the model in {path} cannot be loaded") from error
    return model, found


def from_config(path: Path, config: Any, kind: Kind, trust_remote_code: bool) -> Any:
    """The model of a configuration with weights drawn at random. FormatError, naming the folder, where it fails."""
    from trimtab.quiet import quiet

    try:
        with quiet():
            return _loader(kind).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as in loading
        raise _explained(error, f"the model in {path} cannot be made") from error


def _loader(kind: Kind) -> Any:
    """The class of transformers' that makes models of a kind."""
    import transformers

    return {
        "causal-lm": transformers.AutoModelForCausalLM,
        "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
        "encoder": transformers.AutoModel,
        "classifier": transformers.AutoModelForSequenceClassification,
    }[kind]


def config_of(name: str, path: Path, kind: Kind, trust_remote_code: bool) -> Any:
    """The configuration in a folder. UsageError when it is of a model of another kind, FormatError when it is none."""
    import transformers

    from trimtab.quiet import quiet

    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                str(path), trust_remote_code=trust_remote_code, local_files_only=not trust_remote_code
            )
    except Exception as error:  # as in loading
        raise _explained(error, f"the model in {path} cannot be loaded") from error
    if not trust_remote_code and type(config) not in _loader(kind)._model_mapping:
        raise UsageError(_wrong_kind(name, path, kind))
    return config


def _wrong_kind(name: str, path: Path, kind: Kind) -> str:
    config = read_config(path)
    what = ", ".join(config.get("architectures") or []) or f"of type {config.get('model_type')}"
    return f"'{name}' is {what}, which cannot be loaded as {kind}; give a model of that kind"


def _check_keys(path: Path, kind: Kind, found: dict[str, Any]) -> None:
    missing = sorted(found["missing_keys"])
    poolers = [key for key in missing if kind == "encoder" and "pooler" in key.split(".")]
    if poolers:
        log.warning("%s has no weights for the pooler (%s), which is random", path, ", ".join(poolers))
    missing = [key for key in missing if key not in poolers]
    if missing:
        raise FormatError(
            f"{path} lacks {len(missing)} of the model's weights, the first {missing[0]}; is it a model of kind {kind}?"
        )
    if unused := sorted(found["unexpected_keys"]):
        log.warning("%s holds %d weights that the model does not use, the first %s", path, len(unused), unused[0])


def _explained(error: Exception, what: str) -> TrimtabError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if ran_out_of_memory(error):
        return OutOfMemory(f"{what}: not enough memory; lower the dtype to bfloat16, or take a smaller model")
    if "trust_remote_code" in reason:
        return UsageError(
            f"{what}: it needs Python code that comes with it; read that code, and allow it with --trust-remote-code"
        )
    return FormatError(f"{what}: {reason[:400]}")


def _move(model: Any, device: str) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        if ran_out_of_memory(error):
            raise OutOfMemory(f"not enough memory on {device}; lower the dtype to bfloat16") from error
        raise UsageError(f"device '{device}' cannot be used: {' '.join(str(error).split())[:200]}") from error
