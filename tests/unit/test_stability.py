# SPDX-License-Identifier: Apache-2.0
"""Names that users build on stay: docs/stability.md says which. `stable_names.txt` has those of all versions so far.

`UPDATE_STABLE=1` adds new names to it. A line is only removed by hand, for what the page allows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec
import pytest
from prometheus_client import Metric

import ebpf_mig
from ebpf_mig import errors
from ebpf_mig.breakdown import Breakdown
from ebpf_mig.cli import COMMANDS, cli
from ebpf_mig.compare.benchmark import Benchmark
from ebpf_mig.exporter.metrics import Metrics
from ebpf_mig.recording.kinds import KINDS
from ebpf_mig.report.csv import COLUMNS as CSV
from ebpf_mig.report.schema import schema_of
from ebpf_mig.report.tables import MIGRATIONS, PHASES
from tests.unit.exporter.observations import observation, status

NAMES = Path(__file__).with_name("stable_names.txt")
ROOT = NAMES.parents[2]


def metrics() -> Iterator[str]:
    """Each family with its type and its labels."""
    served = Metrics()
    served.build("1", "2")
    served.migration(observation())
    served.status(status())
    for family in served.registry.collect():
        assert isinstance(family, Metric)
        labels = sorted({name for sample in family.samples for name in sample.labels} - {"le"})
        if family.name.startswith("ebpf_mig_"):
            yield f"{family.name} {family.type} {','.join(labels)}".strip()


def rules() -> Iterator[str]:
    """Recording rules and alerts."""
    text = (ROOT / "deploy" / "prometheus" / "ebpf-mig.rules.yml").read_text()
    yield from (f"{kind} {name}" for kind, name in re.findall(r"- (alert|record): (\S+)$", text, re.MULTILINE))


def json_fields() -> Iterator[str]:
    """Each field, and each value of an enum."""
    for struct in (Breakdown, Benchmark):
        for name, definition in schema_of(struct, "")["$defs"].items():
            yield from (f"{struct.__name__} {name}.{field}" for field in definition.get("properties", ()))
            yield from (f"{struct.__name__} {name} = {value}" for value in definition.get("enum", ()))


def columns() -> Iterator[str]:
    for table, names in (("migrations", MIGRATIONS), ("phases", PHASES), ("csv", CSV)):
        yield from (f"{table} {name}" for name in names)


def event_fields() -> Iterator[str]:
    """Each field with its place, since an event in a file is an array."""
    for kind in KINDS:
        tag = kind.event.__struct_config__.tag
        names = enumerate(field.name for field in msgspec.structs.fields(kind.event))
        yield from (f"{tag} {kind.event.__name__} {place} {name}" for place, name in names)


def options(command: click.Command, name: str) -> Iterator[str]:
    context = click.Context(command)
    for param in command.params:
        if isinstance(param, click.Option):
            yield from (f"option {name} {text}" for text in (*param.opts, *param.secondary_opts))
            if param.envvar:
                yield f"variable {param.envvar}"
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found
            yield from options(found, f"{name} {below}")


def everything() -> set[str]:
    found = {f"metric {line}" for line in metrics()} | {f"json {line}" for line in json_fields()}
    found |= {f"event {line}" for line in event_fields()} | {f"column {line}" for line in columns()} | set(rules())
    found |= {f"command {name}" for name in COMMANDS} | set(options(cli, "ebpf-mig"))
    found |= {f"library {name}" for name in ebpf_mig.__all__}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return found | {f"exit {kind.exit_code} {kind.__name__}" for kind in kinds}


def test_no_stable_name_is_gone() -> None:
    now = everything()
    if os.environ.get("UPDATE_STABLE"):
        NAMES.write_text("\n".join(sorted(now | set(NAMES.read_text().splitlines()))) + "\n")
    promised = set(NAMES.read_text().splitlines())
    assert not promised - now, "gone or changed; docs/stability.md says what may change"
    assert not now - promised, "new names: run again with UPDATE_STABLE=1, and check that they may stay for ever"


@pytest.mark.parametrize(
    "line",
    [
        "alert EbpfMigExporterDown",
        "column csv duration_ns",
        "column migrations blackout_ns",
        "command report",
        "event 1 Ioctl 0 begin_ns",
        "exit 5 IncompleteError",
        "json Benchmark Run.breakdown",
        "json Breakdown Breakdown.blackout_ns",
        "json Breakdown Verdict = complete",
        "library load",
        "metric ebpf_mig_up gauge",
        "option ebpf-mig report --format",
        "record migration:ebpf_mig_blackout_seconds",
        "variable EBPF_MIG_EXPORTER_KEEP",
    ],
)
def test_the_list_has_each_sort_of_name(line: str) -> None:
    """If a sort were no longer collected, its names would be reported as gone; this finds one that never was."""
    assert line in NAMES.read_text().splitlines()


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6])
def test_each_exit_code_has_one_meaning_in_the_readme(code: int) -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(re.findall(rf"^\| {code} \|", readme, re.MULTILINE)) == 1


def test_the_changelog_begins_with_the_programs_version() -> None:
    first = re.search(r"^## (.*)$", (Path(__file__).parents[2] / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert re.fullmatch(rf"{re.escape(ebpf_mig.__version__)} - \d{{4}}-\d\d-\d\d", first[1])
