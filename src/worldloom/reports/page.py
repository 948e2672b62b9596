"""Pages: one HTML file that holds everything it shows and asks the network for nothing."""

import base64
from typing import Any

from worldloom.reports.figures import Themed


def render_page(template: str, **values: Any) -> str:
    """Return a page as HTML from a template of this room; every value is escaped."""
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
    """Return the addresses of a figure for light and dark pages, which hold the figure itself."""
    if figure is None:
        return None
    return {theme: data_uri("image/svg+xml", content) for theme, content in figure._asdict().items()}


def data_uri(kind: str, content: bytes) -> str:
    """Return an address that is its own content."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
