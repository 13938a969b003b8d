"""What the tests of publishing share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from contentvec_parity.publishing import package as packaging
from contentvec_parity.report import page
from contentvec_parity.report.plots import stage_plot, stage_svg


@pytest.fixture(scope="session", autouse=True)
def a_report_is_drawn_once() -> Iterator[None]:
    """The same report gives the same plots, and most packages here are made with the same."""
    pages: dict[str, dict[str, str]] = {}
    pictures: dict[str, bytes] = {}

    def svg(document: Mapping[str, Any]) -> dict[str, str]:
        key = repr(document)
        if key not in pages:
            pages[key] = stage_svg(document)
        return dict(pages[key])

    def plot(document: Mapping[str, Any], path: Path) -> None:
        key = repr(document)
        if key not in pictures:
            stage_plot(document, path)
            pictures[key] = path.read_bytes()
        path.write_bytes(pictures[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "stage_svg", svg)
        patch.setattr(packaging, "stage_plot", plot)
        yield
