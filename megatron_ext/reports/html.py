"""Rendering of HTML pages from jinja2 templates.

Pages need no other file and fetch nothing. They extend `templates/document.html` and take tables
and pictures from `templates/macros.html`. All values are escaped.
"""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_SHARED = Path(__file__).with_name("templates")


def render(template: Path, **values: Any) -> str:
    """Return the page of a template.

    Args:
        template: File of the template, which may extend and import the shared templates.
        values: Values of the template by name.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, _SHARED]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template(template.name).render(**values)
