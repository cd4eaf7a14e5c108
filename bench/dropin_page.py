"""The programs of docs/drop-in.md: the loops as they stand there, and the same after a diff."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "drop-in.md"
LOOPS = ("diffusers", "dmd2")
CHANGES = ("loss", "optimizer", "layers")


def blocks() -> dict[tuple[str, str], str]:
    """Fenced blocks of the page, by what they are and the loop that they belong to."""
    found = re.findall(
        r"^```(?:python|diff) (\w+) of (\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    return {(kind, loop): text for kind, loop, text in found}


def program(loop: str, *changes: str) -> str:
    """A loop of the page after some of its diffs, in turn.

    Raises:
        ValueError: for a diff that does not apply to the loop exactly once.
    """
    text = blocks()["loop", loop]
    for change in changes:
        for hunk in blocks()[change, loop].split("@@\n"):
            text = _apply(text, hunk, f"{change} of {loop}")
    return text


def _apply(text: str, hunk: str, name: str) -> str:
    """Replace a hunk's old lines by its new ones.

    Old lines are looked for in turn, so that those of one hunk need not be neighbours, and new ones
    follow what stands before them in the hunk.
    """
    old, lines, place = text.splitlines(), hunk.splitlines(), 0
    for line in lines:
        mark, content = line[:1], line[1:]
        if mark == "+":
            old.insert(place, content)
            place += 1
            continue
        try:
            place = old.index(content, place)
        except ValueError:
            raise ValueError(f"diff {name}: the loop has no line {content!r}") from None
        if mark == "-":
            del old[place]
        else:
            place += 1
    return "\n".join(old) + "\n"
