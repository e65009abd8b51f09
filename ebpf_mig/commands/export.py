# SPDX-License-Identifier: Apache-2.0
"""`ebpf-mig export`: writes a directory of recordings as two tables, for DuckDB, a warehouse or a spreadsheet.

In: recordings. Out: `migrations.FORMAT` and `phases.FORMAT`. A recording that cannot be read has a row with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from ebpf_mig.commands.options import examples, strict_option, write_result
from ebpf_mig.errors import IncompleteError, RecordingError, UsageError
from ebpf_mig.recording.redact import Names, redacted
from ebpf_mig.report import tables
from ebpf_mig.report.tables import Row
from ebpf_mig.text import printable
from ebpf_mig.vmm import words

_WRITERS: dict[str, Callable[[dict[str, type], Sequence[Row]], bytes]] = {
    "parquet": tables.to_parquet,
    "csv": tables.to_csv,
}
_EXAMPLES = examples(
    "ebpf-mig export /var/lib/ebpf-mig -o tables",
    "ebpf-mig export recordings --format csv -o tables --redact",
    "duckdb -c \"SELECT vmm, median(blackout_ns) FROM 'tables/migrations.parquet'",
    '           GROUP BY vmm"',
)


@click.command("export", epilog=_EXAMPLES)
@click.argument("directory", type=click.Path(exists=True, file_okay=False), metavar="DIR")
@click.option("--format", "form", type=click.Choice(list(_WRITERS)), default="parquet", show_default=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False),
    default=".",
    show_default=True,
    help="Write the tables to this directory; created if missing.",
)
@click.option("--force", is_flag=True, help="Overwrite existing tables.")
@click.option("--redact", is_flag=True, help="Omit names of hosts and files.")
@strict_option
def command(directory: str, form: str, output: str, force: bool, redact: bool, strict: bool) -> None:
    """Write a table of migrations and a table of their phases.

    Reads every *.rec below DIR. The columns are described in docs/fleet.md.
    """
    if form == "parquet":
        tables.require_parquet()
    names = {what: os.path.join(output, f"{what}.{form}") for what in ("migrations", "phases")}  # noqa: PTH118
    for name in names.values():
        if not force and os.path.lexists(name):
            raise UsageError(f"{name} exists; not overwritten", "name another directory with -o, or use --force")
    files = sorted(Path(directory).rglob("*.rec"))
    if not files:
        raise UsageError(f"there is no *.rec below {printable(directory)}")
    migrations, phases = _tables(Path(directory), files, redact)
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make {printable(output)}: {error.strerror}") from error
    write_result(_WRITERS[form](tables.MIGRATIONS, migrations), names["migrations"], force=force)
    write_result(_WRITERS[form](tables.PHASES, phases), names["phases"], force=force)
    _say(f"{len(migrations)} migrations in {names['migrations']}, {len(phases)} phases in {names['phases']}")
    bad = [row for row in migrations if row["verdict"] in {"incomplete", "unreadable"}]
    if strict and bad:
        raise IncompleteError(f"{len(bad)} of {len(migrations)} are incomplete or unreadable: {bad[0]['recording']}")


def _tables(directory: Path, files: Sequence[Path], redact: bool) -> tuple[list[Row], list[Row]]:
    migrations: list[Row] = []
    phases: list[Row] = []
    names = Names(words()) if redact else None
    for number, file in enumerate(files, 1):
        name = f"recording-{number}" if redact else file.relative_to(directory).as_posix()
        try:
            migration, its_phases = _rows(name, file, names)
        except RecordingError as error:
            _say(str(error))
            why = "redacted" if redact else printable(str(error))
            migration, its_phases = tables.unreadable_row(name, why), []
        migrations.append(migration)
        phases += its_phases
    return migrations, phases


def _rows(name: str, file: Path, names: Names | None) -> tuple[Row, list[Row]]:
    from ebpf_mig.collector import analyse_file

    analysis = analyse_file(str(file), lambda read: read if names is None else redacted(read, names))
    breakdown = analysis.breakdown
    migration, phases = tables.migration_row(name, analysis.header, breakdown), tables.phase_rows(name, breakdown)
    if not tables.fits([migration, *phases]):
        raise RecordingError(f"{printable(str(file))}: its figures are beyond 64 bits")
    return migration, phases


def _say(text: str) -> None:
    click.echo(f"ebpf-mig: {text}", err=True)
