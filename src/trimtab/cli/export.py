"""trimtab export: an adapter in another tool's format."""

from __future__ import annotations

import dataclasses
from typing import Literal

from trimtab.cli.common import Screen, options, refuse_taken
from trimtab.cli.delivering import AdapterFlags, load_adapted
from trimtab.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFlags(AdapterFlags):
    out: str = option(help="folder for the exported adapter")
    format: Literal["peft", "dense"] = option(
        "peft", "peft: a standard LoRA that PEFT and others load; dense: ΔW of each weight, as method full saves it"
    )


def run(name: str, summary: str, argv: list[str]) -> None:
    """Load the adapter on its model, so that it is known to fit, and write it anew."""
    flags, output = options(ExportFlags, name, summary, argv)
    refuse_taken(flags.out)
    screen = Screen(output)
    _, adapter = load_adapted(flags, screen)
    from trimtab.formats.dense import export_dense
    from trimtab.formats.peft import export_peft

    with screen.progress("writing the adapter"):
        folder = (export_dense if flags.format == "dense" else export_peft)(adapter, flags.out)
    screen.outcome(f"{flags.format} adapter: {folder}")
    screen.result({"adapter": str(folder), "format": flags.format})
