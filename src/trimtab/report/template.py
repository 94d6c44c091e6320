"""A page made of a template and the style that all pages share."""

from __future__ import annotations

import importlib.resources
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from trimtab.errors import UsageError


def check_plots() -> None:
    """UsageError when pages cannot be made here; asked before long work, it is told before it and not after."""
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "jinja2")):
        raise UsageError('the report needs matplotlib and jinja2; run: pip install "trimtab[plots]"')


def filled(name: str, context: Mapping[str, Any], **filters: Callable[..., Any]) -> str:
    """The template `name` of this folder with what it shows. What is no Markup is escaped; a name that is missing is
    an error."""
    import jinja2
    import markupsafe

    files = importlib.resources.files("trimtab.report")
    loader = jinja2.FunctionLoader(lambda part: files.joinpath(part).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(svg=markupsafe.Markup, **filters)
    template = environment.get_template(name)
    style = markupsafe.Markup(files.joinpath("page.css").read_text(encoding="utf-8"))
    page = template.render(style=style, **context)
    # A lone surrogate, which JSON can spell and UTF-8 cannot, may stand in a name or a path.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")
