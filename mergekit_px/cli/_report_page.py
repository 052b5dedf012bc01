"""The pages of ``pxmerge report``: one HTML file with everything in it, no script, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mergekit_px.cli._units import show_bytes, show_count, show_seconds
from mergekit_px.escaping import escaped_line
from mergekit_px.inspection.changes import CellChange
from mergekit_px.inspection.merge_report import MergeReport
from mergekit_px.pictures.heat_map import SHADES, HeatMap, heat_map

if TYPE_CHECKING:
    from mergekit_px.learn.result import LearnedReport

SOURCES_DRAWN = 12
"""Sources with heat maps of their own; the JSON has all."""
_COSINES = (-1.0, 1.0)
_SHARES = (0.0, 1.0)


def merge_page(report: MergeReport) -> str:
    """The page of a merge."""
    changes = report.changes
    stacks = list(dict.fromkeys(cell.stack for cell in changes.cells if cell.layer is not None))
    return _page(
        "merge",
        report=report,
        grids=[(stack, _maps(report, [cell for cell in changes.cells if cell.stack == stack])) for stack in stacks],
        experts=_maps(report, changes.experts),
        outside=[cell for cell in changes.cells if cell.layer is None],
        undrawn=changes.sources[SOURCES_DRAWN:],
        totals=list(zip(changes.sources, changes.total.sources, strict=True)),
    )


def learned_page(report: LearnedReport) -> str:
    """The page of what was learned."""
    return _page("learned", report=report)


def _page(name: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("mergekit_px.cli", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["shades"] = SHADES
    environment.filters.update(
        bytes=show_bytes,
        count=show_count,
        seconds=show_seconds,
        number=_number,
        share=_share,
        sentence=lambda text: text[:1].upper() + text[1:],
        tick=lambda value: f"{value:.6g}",
    )
    return environment.get_template(f"{name}.html.jinja").render(**values)


def _maps(report: MergeReport, cells: list[CellChange]) -> list[HeatMap]:
    """Measures of the merge first, then those of each source."""
    return [grid for grid in (*_merge_maps(cells), *_source_maps(report, cells)) if grid is not None]


def _merge_maps(cells: list[CellChange]) -> Iterator[HeatMap | None]:
    def grid(measure: str, name: str, limits: tuple[float, float] | None = None) -> HeatMap | None:
        return heat_map(measure, ((cell.module, cell.layer, getattr(cell, name)) for cell in cells), limits=limits)

    yield grid("relative change", "relative")
    yield grid("sign conflicts between sources", "sign_conflicts", _SHARES)
    yield grid("energy kept", "energy")
    yield grid("explained by a weighted sum of the sources", "explained", _SHARES)


def _source_maps(report: MergeReport, cells: list[CellChange]) -> Iterator[HeatMap | None]:
    subject = "change" if report.changes.base is not None else "weights"
    for measure, name, limits in (
        (f"cosine with the source's {subject}", "cosine", _COSINES),
        ("share of the source", "share", _SHARES),
        ("distance to the source", "distance", None),
    ):
        for place, source in enumerate(report.changes.sources[:SOURCES_DRAWN]):
            values = ((cell.module, cell.layer, getattr(cell.sources[place], name)) for cell in cells)
            yield heat_map(measure, values, of=source, limits=limits)


def _printable(value: Any) -> Any:
    return escaped_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
