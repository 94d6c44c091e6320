"""trimtab: low-rank adaptation you can trust. Adapt, measure and deliver large pretrained models.

The public names are loaded when they are first used, so that `import trimtab` and the command line stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    "LoRA": "trimtab.deltas.lora",
    "Full": "trimtab.deltas.full",
    "TrimtabError": "trimtab.errors",
    "UsageError": "trimtab.errors",
}

__all__ = [
    "Adapter",
    "FitResult",
    "Full",
    "LoRA",
    "MergeAudit",
    "Settings",
    "TrimtabError",
    "UsageError",
    "adapters",
    "attach",
    "encode",
    "fit",
    "load",
    "merge",
    "read",
    "rows",
    "save_merged",
    "switch",
    "unmerge",
]

if TYPE_CHECKING:
    from trimtab.adapt.adapter import Adapter, adapters, rows, switch
    from trimtab.adapt.attach import attach
    from trimtab.adapt.merge import MergeAudit, merge, save_merged, unmerge
    from trimtab.data.encode import encode
    from trimtab.data.read import read
    from trimtab.deltas.full import Full
    from trimtab.deltas.lora import LoRA
    from trimtab.errors import TrimtabError, UsageError
    from trimtab.formats.peft import load
    from trimtab.train.loop import FitResult, fit
    from trimtab.train.settings import Settings


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'trimtab' has no attribute '{name}'")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
