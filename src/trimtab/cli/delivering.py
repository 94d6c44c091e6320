"""What merge and export share: an adapter on the model it was trained on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from trimtab.cli.answering import ANY_BASE
from trimtab.cli.common import ModelName, Screen, load_model
from trimtab.options import option
from trimtab.tasks.nlu import class_record

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterFlags(ModelName):
    """Which adapter, and its model."""

    adapter: str = option(help="the adapter's folder")
    any_base: bool = option(False, ANY_BASE)


def load_adapted(flags: AdapterFlags, screen: Screen) -> tuple[Any, Adapter]:
    """The loaded model and the adapter on it; an adapter that tells classes apart is put on a classifier of them."""
    record = class_record(flags.adapter)
    loaded = load_model(flags, screen, classes=record.classes if record else ())
    import trimtab
    from trimtab.tasks.classify import refuse_random

    with screen.progress("loading the adapter"):
        adapter = trimtab.load(loaded.model, flags.adapter, any_base=flags.any_base)
    if record:
        refuse_random(loaded, adapter)
    return loaded, adapter
