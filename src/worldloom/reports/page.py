"""Pages: self-contained HTML files."""

import base64
from typing import Any

from worldloom.reports.figures import Themed


def render_page(template: str, **values: Any) -> str:
    """Return an HTML page from a template in this folder; every value is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("worldloom.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def embedded(figure: Themed | None) -> dict[str, str] | None:
    """Return the data URIs of a figure for light and dark pages; None without a figure."""
    if figure is None:
        return None
    return {theme: data_uri("image/svg+xml", content) for theme, content in figure._asdict().items()}


def data_uri(kind: str, content: bytes) -> str:
    """Return content as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
