"""Figures and pages that need no other file: pictures are embedded, styles are inside."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any


def render(template: str, **values: Any) -> str:
    """A page from one of the templates that lie beside this file."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    return environment.get_template(template).render(**values)


def series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a metric."""
    chosen = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in chosen], [row[name] for row in chosen]


def new_figure() -> tuple[Any, Any]:
    """A figure of the size that pages show, and its axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axis = figure.subplots()
    axis.grid(alpha=0.25)
    return figure, axis


def scale(axis: Any, values: list[float]) -> None:
    """A logarithmic axis for positive values over more than a decade."""
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axis.set_yscale("log")


def embed_figure(figure: Any) -> str:
    """A figure as the address of an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return embed(buffer.getvalue(), "svg+xml")


def embed(picture: bytes, kind: str = "png") -> str:
    """The bytes of a picture as the address of an image."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
