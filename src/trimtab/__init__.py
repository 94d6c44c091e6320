"""trimtab: low-rank adaptation you can trust. Adapt, measure and deliver large pretrained models.

The public names are loaded when they are first used, so that `import trimtab` and the command line stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trimtab.deltas import METHODS

__version__ = "0.1.0"

_PLACES = {
    "Adapter": "trimtab.adapt.adapter",
    "adapters": "trimtab.adapt.adapter",
    "attach": "trimtab.adapt.attach",
    "rows": "trimtab.adapt.adapter",
    "switch": "trimtab.adapt.adapter",
    "merge": "trimtab.adapt.merge",
    "unmerge": "trimtab.adapt.merge",
    "save_merged": "trimtab.adapt.merge",
    "MergeAudit": "trimtab.adapt.merge",
    "load": "trimtab.formats.peft",
    "fit": "trimtab.train.loop",
    "FitResult": "trimtab.train.loop",
    "Settings": "trimtab.train.settings",
    "read": "trimtab.data.read",
    "encode": "trimtab.data.encode",
    "TrimtabError": "trimtab.errors",
    "UsageError": "trimtab.errors",
}

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter as Adapter
    from trimtab.adapt.adapter import adapters as adapters
    from trimtab.adapt.adapter import rows as rows
    from trimtab.adapt.adapter import switch as switch
    from trimtab.adapt.attach import attach as attach
    from trimtab.adapt.merge import MergeAudit as MergeAudit
    from trimtab.adapt.merge import merge as merge
    from trimtab.adapt.merge import save_merged as save_merged
    from trimtab.adapt.merge import unmerge as unmerge
    from trimtab.data.encode import encode as encode
    from trimtab.data.read import read as read
    from trimtab.errors import TrimtabError as TrimtabError
    from trimtab.errors import UsageError as UsageError
    from trimtab.formats.peft import load as load
    from trimtab.train.loop import FitResult as FitResult
    from trimtab.train.loop import fit as fit
    from trimtab.train.settings import Settings as Settings

_PLACES |= {cls: module for module, _, cls in (place.partition(":") for place in METHODS.values())}
__all__ = sorted(_PLACES)  # every registered method is a public name


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'trimtab' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
