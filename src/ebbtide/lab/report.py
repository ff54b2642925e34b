"""A report as one HTML file with everything in it: no other file, no script, no network."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ebbtide.lab.pictures import DARK, LIGHT, Draw, to_png, to_svg

__all__ = ["Listing", "Picture", "Report", "Section", "Table", "picture_files", "render"]

_LARGEST = 1.5  # times its natural size, beyond which a small picture shouts


@dataclass(frozen=True)
class Picture:
    """A picture and the one sentence it comes to.

    Attributes:
        name: File name without its ending.
        draw: Draws it.
        conclusion: Said under it, and read aloud in its place.
    """

    name: str
    draw: Draw
    conclusion: str


@dataclass(frozen=True)
class Table:
    """Text in rows.

    Attributes:
        columns: Headings.
        rows: Cells, as many in each row as there are headings.
        caption: What the table holds.
        emphasised: Index of a row to stress, if any.
        links: Where the first cell of each row leads, within the report; none if empty.
        tones: Colour of each row's beginning: good, mixed, bad or none; none if empty.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    emphasised: int | None = None
    links: Sequence[str] = ()
    tones: Sequence[str] = ()


@dataclass(frozen=True)
class Listing:
    """Text as a program printed it, folded away under its heading."""

    heading: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading and what belongs under it, in this order; links find it by its anchor."""

    title: str
    text: str = ""
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    listings: Sequence[Listing] = ()
    anchor: str = ""


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        title: Heading.
        lead: What it is about.
        findings: The conclusions, most important first, as (heading, sentence).
        sections: The body.
        method: How the numbers came about, a sentence an item.
        facts: Versions, seeds and the like.
    """

    title: str
    lead: str
    findings: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    method: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def render(report: Report) -> bytes:
    """Return the report as an HTML file; every text in it is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ebbtide.lab"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sources"] = _sources
    return environment.get_template("report.html").render(report=report).encode()


def picture_files(report: Report) -> dict[str, bytes]:
    """Return every picture as a PNG file by its name."""
    pictures = [picture for section in report.sections for picture in section.pictures]
    return {f"{picture.name}.png": to_png(picture.draw) for picture in pictures}


def _sources(picture: Picture) -> dict[str, str]:
    """Return the picture as data addresses, light and dark, wide and narrow; and its width."""
    drawn = {
        f"{theme.name}_{'narrow' if narrow else 'wide'}": to_svg(
            picture.draw, theme=theme, narrow=narrow
        )
        for theme in (LIGHT, DARK)
        for narrow in (False, True)
    }
    width = f"{_LARGEST * _natural_width(drawn['light_wide']):.0f}px"
    return {**{name: _address(svg) for name, svg in drawn.items()}, "width": width}


def _natural_width(svg: bytes) -> float:
    """Return the width at which the letters have the size they were drawn in, in CSS pixels."""
    found = re.search(rb'<svg[^>]* width="([0-9.]+)pt"', svg)
    return float(found[1]) * 4 / 3 if found else 0.0


def _address(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
