"""trimtab merge: an adapter put into the weights, audited, as a folder plain transformers loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from trimtab.cli.common import Screen, options, refuse_taken
from trimtab.cli.delivering import AdapterFlags, load_adapted
from trimtab.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeFlags(AdapterFlags):
    out: str = option(help="folder for the merged model")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"] = option(
        "auto", "dtype of the merged model; auto keeps the checkpoint's, float32 loses nothing of the change"
    )


def run(name: str, summary: str, argv: list[str]) -> None:
    """Load, merge, audit, save."""
    flags, output = options(MergeFlags, name, summary, argv)
    refuse_taken(flags.out)
    screen = Screen(output)
    loaded, adapter = load_adapted(flags, screen)
    import trimtab
    from trimtab.models.dtypes import torch_dtype
    from trimtab.report.record import write_audit

    dtype = None if flags.dtype == "auto" else torch_dtype(flags.dtype)
    with screen.progress("merging and auditing"):
        audit = trimtab.merge(adapter, dtype=dtype, tokenizer=loaded.tokenizer)
    screen.outcome(audit.summary())
    with screen.progress("writing the merged model"):
        folder = trimtab.save_merged(loaded.model, flags.out, tokenizer=loaded.tokenizer)
    run_folder = Path(flags.adapter).parent
    for place in (folder, run_folder) if (run_folder / "config.yaml").exists() else (folder,):
        # Beside the run the adapter came from, too, so that its report shows what the merge came to.
        write_audit(place, audit)
    screen.outcome(f"merged model: {folder} (audit in {folder / 'audit.json'})")
    screen.result({"merged": str(folder), "audit": audit.to_dict()})
