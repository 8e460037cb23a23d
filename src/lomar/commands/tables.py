"""Markdown tables, and what they were measured with."""

from collections.abc import Mapping, Sequence


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose columns are aligned.

    Args:
        cells: the titles, then a row's text for each of them.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def versions_and_date(packages: Mapping[str, str], lomar: str, date: str) -> str:
    """The versions that matter most to what was measured, and when that was."""
    named = (f"{name} {packages[name]}" for name in ("torch", "timm", "python") if name in packages)
    return ", ".join([*named, f"lomar {lomar}", f"{date}."])
