"""Models that tell classes of text apart: an encoder, or a causal model, under a head that is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import FormatError, UsageError
from trimtab.models.checkpoint import check_folder
from trimtab.models.dtypes import torch_dtype
from trimtab.models.load import LoadedModel, config_of, find, finished, from_checkpoint, from_config

if TYPE_CHECKING:
    import torch

log = logging.getLogger("trimtab")


@dataclass(frozen=True)
class Classifier(LoadedModel):
    """A sequence-classification model of transformers', and what it came from.

    classes: the names of its classes, in the order of its logits. head: the paths of the modules above the backbone,
    and of a pooler that the checkpoint lacks: what is to be trained whole. fresh: the weights that the checkpoint
    lacks, drawn from the seed. max_length: the most tokens it reads.
    """

    classes: tuple[str, ...]
    head: tuple[str, ...]
    fresh: tuple[str, ...]
    max_length: int


def load_classifier(
    name: str,
    classes: int | Sequence[str],
    seed: int = 0,
    *,
    pretrained: bool = True,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Classifier:
    """The model called `name`, as `models.load` finds it, with a head for `classes` (names, or how many).

    What the checkpoint lacks, the head as a rule, is drawn from `seed`; a head of the same number of classes that it
    has is kept, with its order of the classes where it names the same. pretrained False: all weights are drawn, in
    fp32 unless a dtype is named. dtype, device: as for `load`.
    Raises UsageError for fewer than two classes, a model without such a class and a tokenizer that cannot pad;
    FormatError for a checkpoint that lacks more than a head and a pooler.
    """
    import torch

    names = tuple(str(i) for i in range(classes)) if isinstance(classes, int) else tuple(classes)
    if len(set(names)) != len(names) or len(names) < 2:
        raise UsageError(
            f"a classifier needs two classes or more, each once, but was given: {', '.join(names) or 'none'}"
        )
    wanted = torch_dtype(dtype) if isinstance(dtype, str) else dtype
    path = find(name, kind="classifier", trust_remote_code=trust_remote_code, progress=progress)
    check_folder(path)
    config = config_of(name, path, "classifier", trust_remote_code)
    own = tuple(str(label) for _, label in sorted(config.id2label.items()))
    names = own if set(own) == set(names) else names
    config.id2label, config.label2id = dict(enumerate(names)), {label: i for i, label in enumerate(names)}
    config.use_cache = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if pretrained:
            model, fresh = _pretrained(path, config, wanted, trust_remote_code)
        else:
            model = from_config(path, config, "classifier", trust_remote_code).to(wanted or torch.float32)
            fresh = tuple(key for key, _ in model.named_parameters())
    head = _head(model, fresh if pretrained else ())
    loaded = finished(model, name, path, device, trust_remote_code)
    _let_pad(loaded)
    return Classifier(loaded.model, loaded.tokenizer, name, path, names, head, fresh, _room(loaded))


def _pretrained(path: Path, config: Any, dtype: Any, trust_remote_code: bool) -> tuple[Any, tuple[str, ...]]:
    model, found = from_checkpoint(path, config, "classifier", dtype, trust_remote_code, ignore_mismatched_sizes=True)
    other = [key for key, *_ in found["mismatched_keys"]]
    fresh = tuple(sorted({*found["missing_keys"], *other}))
    heads = _above_backbone(model)
    foreign = [key for key in fresh if key.partition(".")[0] not in heads and "pooler" not in key.split(".")]
    if foreign:
        raise FormatError(f"{path} lacks {len(foreign)} weights of the model below its head, the first {foreign[0]}")
    if fresh:
        log.info("drawn at random, to be trained: %s", ", ".join(fresh))
    return model, fresh


def _above_backbone(model: Any) -> tuple[str, ...]:
    """The names of the modules with parameters that stand beside the backbone: the head."""
    children = model.named_children()
    return tuple(
        n for n, child in children if child is not model.base_model and next(child.parameters(), None) is not None
    )


def _head(model: Any, fresh: Sequence[str]) -> tuple[str, ...]:
    poolers = (key.split(".") for key in fresh if "pooler" in key.split("."))
    lacking = (".".join(parts[: parts.index("pooler") + 1]) for parts in poolers)
    return tuple(dict.fromkeys([*lacking, *_above_backbone(model)]))


def _let_pad(loaded: LoadedModel) -> None:
    """Let tokenizer and model agree on the padding token, by which a causal model finds the last token of a text."""
    tokenizer, config = loaded.tokenizer, loaded.model.config
    if tokenizer is None:
        raise UsageError(f"{loaded.name} has no tokenizer, so it cannot read text")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UsageError(f"the tokenizer of {loaded.name} has neither a padding token nor one that ends a text")
        tokenizer.pad_token = tokenizer.eos_token
    config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _room(loaded: LoadedModel) -> int:
    positions = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    return int(min(loaded.tokenizer.model_max_length, positions or 2**31))
