"""trimtab selftest: the equivalences, on this machine and model."""

from __future__ import annotations

import dataclasses
from typing import Any

from trimtab.cli.common import ModelFlags, Screen, load_libraries, load_model, options
from trimtab.deltas import DEFAULT, METHODS, make_method, method_spec
from trimtab.errors import TrimtabError
from trimtab.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelftestFlags(ModelFlags):
    model: str = option("", "short name, folder, GGUF file or hub id; by default a tiny random model")
    method: str = option(DEFAULT, f"one of {', '.join(METHODS)}")


def run(name: str, summary: str, argv: list[str]) -> None:
    """Run the checks and print each with its difference; exit code 1 when one fails."""
    flags, output = options(SelftestFlags, name, summary, argv)
    method_spec(flags.method)
    screen = Screen(output)
    load_libraries(screen)
    import logging

    from trimtab.selftest import CHECKS, Check, selftest

    model: Any = load_model(flags, screen).model if flags.model else _tiny(flags)
    logging.getLogger("trimtab").setLevel(logging.WARNING)  # every check attaches and merges anew
    done = 0
    with screen.progress("checking", "checks") as update:

        def show(check: Check) -> None:
            nonlocal done
            done += 1
            limit = "every bit" if check.allowed == 0 else f"at most {check.allowed:.1e}"
            state, style = ("ok  ", None) if check.passed else ("FAIL", "bold red")
            screen.outcome(f"{state} {check.name}: {check.difference:.1e} ({limit})", style=style)
            update(done, len(CHECKS))

        update(0, len(CHECKS))
        checks = selftest(model, make_method(flags.method), show)
    screen.result({"passed": all(c.passed for c in checks), "checks": [dataclasses.asdict(c) for c in checks]})
    failed = [check.name.split(":")[0] for check in checks if not check.passed]
    if failed:
        raise TrimtabError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    screen.outcome(f"all {len(checks)} equivalences hold")


def _tiny(flags: SelftestFlags) -> Any:
    from trimtab.selftest import tiny_model
    from trimtab.train.machine import choose

    return tiny_model().to(choose(flags.threads, "float32" if flags.dtype == "auto" else flags.dtype).dtype)
