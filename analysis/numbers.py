"""The numbers of a report as files: every table as Parquet and CSV, and all of it as one JSON file."""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from analysis.cards import Card
from analysis.page import Deck, Page, Strip
from analysis.tables import Cell, Table
from rayltr import records

ENDS = ("low", "high")
GREEK = {"τ": "tau", "×": "x"}


def write(folder: str, page: Page) -> None:
    """Write `report.json`, and a Parquet and a CSV file for every table of a page, into a folder."""
    named = dict(tables(page))
    for name, table in named.items():
        names, rows = flat(table)
        records.save(records.within(folder, f"{name}.parquet"), _parquet(names, rows))
        records.save(records.within(folder, f"{name}.csv"), _csv(names, rows))
    records.save(records.within(folder, "report.json"), json.dumps(summary(page), indent=1, allow_nan=False).encode())


def tables(page: Page) -> Iterator[tuple[str, Table]]:
    """Every table of a page that has rows, by the name of its files."""
    for section in page.sections:
        yield from ((name, table) for name, table in section.tables() if table.rows)
    yield from ((name, table) for name, table in page.more.items() if table.rows)


def summary(page: Page) -> dict[str, Any]:
    """The whole report as plain values; accuracies are fractions, what was not measured is null."""
    blocks = [block for section in page.sections for block in section.blocks]
    decks = [card for block in blocks if isinstance(block, Deck) for card in block.cards]
    strips = [block for block in blocks if isinstance(block, Strip)]
    found = {
        "title": page.title,
        "lede": page.lede,
        "cards": [_card(card) for card in decks],
        "facts": {name: value for strip in strips for name, value in strip.facts},
        "lights": [asdict(light) for strip in strips for light in strip.lights],
        "tables": {name: _records(table) for section in page.sections for name, table in section.tables()},
        "versions": page.versions,
    }
    return _plain(found)


def _card(card: Card) -> dict[str, Any]:
    return {**asdict(card), "claims": [{**asdict(claim), "optimism": claim.optimism} for claim in card.claims]}


def _records(table: Table) -> list[dict[str, Any]]:
    names, rows = flat(table)
    return [dict(zip(names, row, strict=True)) for row in rows]


def flat(table: Table) -> tuple[list[str], list[list[Any]]]:
    """Names and rows of plain values; a column of intervals has two more, `<name>_low` and `<name>_high`."""
    names: list[str] = []
    columns: list[list[Any]] = []
    for i, header in enumerate(table.columns):
        cells: Sequence[Cell] = [row[i] for row in table.rows]
        name = _unique(plain_name(header) or "note", names)
        names.append(name)
        columns.append(_one_kind([cell.value for cell in cells]))
        if any(cell.low is not None for cell in cells):
            names += [f"{name}_{end}" for end in ENDS]
            columns += [_one_kind([getattr(cell, end) for cell in cells]) for end in ENDS]
    return names, [list(row) for row in zip(*columns, strict=True)]


def plain_name(header: str) -> str:
    """A heading as the name of a column: `few of all %` is `few_of_all`.  Dots of parameters stay."""
    for sign, word in GREEK.items():
        header = header.replace(sign, word)
    header = re.sub(r" %|, points|%", "", header)
    return re.sub(r"[^\w.]+", "_", header).strip("_")


def _unique(name: str, taken: Sequence[str]) -> str:
    return name if name not in taken else _unique(f"{name}_", taken)


def _one_kind(values: list[Any]) -> list[Any]:
    """Numbers and gaps, or strings and gaps."""
    if any(isinstance(value, str) for value in values):
        return [None if value is None else str(value) for value in values]
    return [None if value is None or math.isnan(value) else value for value in values]


def _parquet(names: list[str], rows: list[list[Any]]) -> bytes:
    columns = list(zip(*rows, strict=True))
    kinds = [pa.string() if any(isinstance(v, str) for v in column) else pa.float64() for column in columns]
    arrays = [pa.array(_as(kind, column), kind) for kind, column in zip(kinds, columns, strict=True)]
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(zip(names, arrays, strict=True))), buffer, compression="zstd")
    return buffer.getvalue()


def _as(kind: pa.DataType, column: Sequence[Any]) -> list[Any]:
    return [None if value is None else float(value) if kind == pa.float64() else value for value in column]


def _csv(names: list[str], rows: list[list[Any]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([names, *rows])
    return buffer.getvalue().encode()


def _plain(value: Any) -> Any:
    """Without what JSON cannot say: nan is null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
