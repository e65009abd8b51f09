# SPDX-License-Identifier: Apache-2.0
"""A table of typed columns that converts to pandas, polars and Arrow.

In: rows, and the type of each column. Out: `Table`. Conversions use Arrow if pyarrow is installed, otherwise a list of
dicts; the result has the same columns and types. Values that were not measured are null, and integers stay integers.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ebpf_mig.errors import PreflightError, RecordingError
from ebpf_mig.text import printable

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow

Cell = int | float | str | bool | list[str] | None
Row = dict[str, Cell]

STRINGS = list[str]
"""The type of a column with lists of text."""


class Unsigned(int):
    """The type of a column with integers that may not fit into 63 bits: addresses, inode numbers."""


_SHOWN = 20
"""Number of rows that a notebook shows."""
_PANDAS = {int: "Int64", Unsigned: "UInt64", float: "Float64", str: "string", bool: "boolean"}
"""Nullable pandas types. The other types turn integers with nulls into floats."""


class Table(Sequence[Row]):
    """A sequence of rows, each a dict of plain Python values. Rows are built on first use."""

    def __init__(self, columns: Mapping[str, Any], make: Callable[[], list[Row]]) -> None:
        """`columns`: the type of each column. `make`: returns the rows, each with a cell for every column."""
        self.columns = dict(columns)
        self._make = make

    @cached_property
    def _rows(self) -> list[Row]:
        return self._make()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        """An index returns one row, a slice a list of rows, and a column name the list of its cells."""
        if isinstance(at, str):
            if at not in self.columns:
                raise KeyError(at)
            return [row[at] for row in self._rows]
        return self._rows[at]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"<Table: {len(self)} rows; {', '.join(self.columns)}>"

    def to_dicts(self) -> list[Row]:
        """The rows as a new list of dicts."""
        return [dict(row) for row in self._rows]

    def to_arrow(self) -> pyarrow.Table:
        """A pyarrow table. PreflightError without pyarrow."""
        found = self._arrow()
        if found is None:
            raise PreflightError("pyarrow is not installed", "pip install 'ebpf-mig[parquet]'")
        return found

    def to_pandas(self) -> pandas.DataFrame:
        """A pandas DataFrame with nullable types. PreflightError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise PreflightError("pandas is not installed", "pip install pandas") from error
        arrow = self._arrow()
        if arrow is not None:
            types = {name: pandas.array([], dtype=_PANDAS[kind]).dtype for name, kind in _by_arrow(arrow).items()}
            frame = arrow.to_pandas(types_mapper=types.get)
        else:
            frame = pandas.DataFrame(self._rows, columns=list(self.columns))
        return frame.astype({name: _PANDAS[kind] for name, kind in self.columns.items() if kind in _PANDAS})

    def to_polars(self) -> polars.DataFrame:
        """A polars DataFrame. PreflightError without polars."""
        try:
            import polars
        except ImportError as error:
            raise PreflightError("polars is not installed", "pip install polars") from error
        arrow = self._arrow()
        if arrow is not None:
            return polars.DataFrame(arrow)
        types = {
            int: polars.Int64,
            Unsigned: polars.UInt64,
            float: polars.Float64,
            str: polars.String,
            bool: polars.Boolean,
        }
        schema = {name: types.get(kind, polars.List(polars.String)) for name, kind in self.columns.items()}
        return polars.DataFrame(self._rows, schema=schema)

    def _arrow(self) -> Any:
        """A pyarrow table; None without pyarrow."""
        try:
            import pyarrow as pa
        except ImportError:
            return None
        types = {int: pa.int64(), Unsigned: pa.uint64(), float: pa.float64(), str: pa.string(), bool: pa.bool_()}
        fields = [(name, types.get(kind, pa.list_(pa.string()))) for name, kind in self.columns.items()]
        try:
            return pa.Table.from_pydict({name: self[name] for name in self.columns}, schema=pa.schema(fields))
        except (OverflowError, pa.ArrowInvalid) as error:
            raise RecordingError(f"its figures are beyond 64 bits: {error}") from error

    def _repr_html_(self) -> str:
        """The first rows, for notebooks."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{_shown(row[name])}</td>" for name in self.columns) + "</tr>"
            for row in self._rows[:_SHOWN]
        )
        more = f"<p>{len(self)} rows, the first {_SHOWN} are shown</p>" if len(self) > _SHOWN else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


def _by_arrow(arrow: Any) -> dict[Any, type]:
    """Arrow's types in a table, those that have a nullable one in pandas."""
    import pyarrow as pa

    known = {pa.int64(): int, pa.uint64(): Unsigned, pa.float64(): float, pa.bool_(): bool}
    return {kind: known[kind] for kind in arrow.schema.types if kind in known}


def _shown(cell: Cell) -> str:
    """Escapes text from a recording."""
    if cell is None:
        return ""
    return html.escape(printable(", ".join(cell) if isinstance(cell, list) else str(cell)))
