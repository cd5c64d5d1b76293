"""Rendering of HTML pages from jinja2 templates.

Pages need no other file and fetch nothing. They extend `templates/document.html` and take tables
and pictures from `templates/macros.html`. All values are escaped.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

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


def script_json(content: Any) -> Markup:
    """Return JSON for a script element, in which no text can end the element."""
    encoded = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        encoded = encoded.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(encoded)


def script_hash(script: str) -> str:
    """Return the source of a content security policy that permits this script and no other."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
