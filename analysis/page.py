"""The parts that a report is made of; the template shows each `kind`, `analysis.numbers` writes the tables to files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from analysis.cards import Card
from analysis.figures.draw import Figure
from analysis.tables import Table


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    text: str
    kind = "note"


@dataclass(frozen=True)
class Missing:
    """Why there is nothing to show, in one sentence."""

    text: str
    kind = "missing"


@dataclass(frozen=True)
class Listing:
    """A table with a heading.  name: of the files that hold it.  folded: shown only when it is opened."""

    name: str
    title: str
    table: Table
    caption: str = ""
    folded: bool = False
    kind = "listing"


@dataclass(frozen=True)
class Deck:
    """The decision cards."""

    cards: Sequence[Card]
    kind = "deck"


@dataclass(frozen=True)
class Light:
    """A warning.  level: "red" (do not rely on it) or "amber" (know it)."""

    level: str
    text: str


@dataclass(frozen=True)
class Strip:
    """What was run and how far it can be trusted: facts by name, and warning lights."""

    facts: Sequence[tuple[str, str]]
    lights: Sequence[Light]
    kind = "strip"


@dataclass(frozen=True)
class Code:
    """Text as it is, such as a command (with a button that copies it) or a recipe (folded)."""

    title: str
    text: str
    folded: bool = False
    kind = "code"


@dataclass(frozen=True)
class Terms:
    """Words and what they mean here."""

    title: str
    entries: Sequence[tuple[str, str]]
    kind = "terms"


Block = Note | Missing | Listing | Deck | Strip | Code | Terms | Figure


@dataclass(frozen=True)
class Section:
    """A part of the report.  name: its address within the page.  short: its name in the list of contents."""

    name: str
    title: str
    short: str
    blocks: Sequence[Block]
    lead: str = ""

    def tables(self) -> Iterator[tuple[str, Table]]:
        """The numbers of the section, by the name of their files."""
        for block in self.blocks:
            if isinstance(block, Figure | Listing):
                yield block.name, block.table

    @property
    def drawn(self) -> bool:
        return any(isinstance(block, Figure) for block in self.blocks)


@dataclass(frozen=True)
class Page:
    """A whole report.  more: tables that are too long for people, for the files only."""

    title: str
    lede: str
    sections: Sequence[Section]
    versions: dict[str, str] = field(default_factory=dict)
    more: dict[str, Table] = field(default_factory=dict)


def blocks(*parts: "Block | Sequence[Block] | None") -> list[Block]:
    """Blocks and lists of them, without what is None."""
    found: list[Block] = []
    for part in parts:
        found += [] if part is None else list(part) if isinstance(part, (list, tuple)) else [part]  # type: ignore[list-item]
    return found
