# SPDX-License-Identifier: Apache-2.0
"""Results of the suite by kernel and user land, and their table in docs/support.md.

In: JUnit files. Out: `docs/support.json`, with one row per pair of kernel and user land, and the table made from it. A
kernel or user land of the catalogue without a row is shown as not run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from tests.vm.catalogue import EMULATED, KERNELS, USERLANDS

ROOT = Path(__file__).parents[2]
SUPPORT_JSON = ROOT / "docs" / "support.json"
SUPPORT_MD = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- table: python -m tests.vm table -->\n", "<!-- end of table -->\n"
SUBJECTS = ("install", "doctor", "demo", "migrate", "record", "truth", "dirty log", "ring", "loss", "tiers")
"""The possible subjects of a test: arguments of the marker, and columns of the table."""


PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
_MISSING = "missing feature: "


@dataclass
class Subject:
    """The results of one subject's tests, by name: `passed`, `failed: WHY` or `skipped: WHY`."""

    tests: dict[str, str] = field(default_factory=dict)

    def count(self, ending: str) -> int:
        """The number of tests with this result."""
        return sum(said.partition(":")[0] == ending for said in self.tests.values())


@dataclass
class Row:
    """One run of the suite. `how` is `emulated` or `native`; `release` is uname's, `attach` the doctor's."""

    kernel: str
    userland: str
    how: str
    release: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    seconds: int = 0
    attach: str = ""
    subjects: dict[str, Subject] = field(default_factory=dict)
    infrastructure: list[str] = field(default_factory=list)
    """Failures of the emulator, not of the product. Each was followed by another try."""
    again: list[str] = field(default_factory=list)
    """Tests that were run again by themselves after the row's run. Their result is that of the later run."""
    slowness: float = 1
    """Run time of a loop relative to a slow real machine. The truth's tolerances are multiplied by it."""

    @property
    def good(self) -> bool:
        """Whether tests ran and none failed."""
        return bool(self.subjects) and not any(subject.count(FAILED) for subject in self.subjects.values())

    def add(self, later: Row) -> None:
        """Takes over the results of a later run of some tests. `attach` stays that of the whole run's demo."""
        for name, subject in later.subjects.items():
            before = self.subjects.setdefault(name, Subject())
            self.again += [test for test in subject.tests if test in before.tests and test not in self.again]
            before.tests |= subject.tests
        self.attach = self.attach or later.attach
        self.date, self.seconds = later.date, self.seconds + later.seconds
        self.infrastructure += later.infrastructure
        self.slowness = max(self.slowness, later.slowness)


def read_junit(path: Path) -> dict[str, Subject]:
    """The tests of a JUnit file, by their property `subject`."""
    found: dict[str, Subject] = {}
    for case in ElementTree.parse(path).iter("testcase"):  # noqa: S314  our own machine's pytest wrote it
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        subject = found.setdefault(properties.get("subject") or "other", Subject())
        bad = [child for child in case if child.tag in {"failure", "error"}]
        skipped = case.find("skipped")
        ending = PASSED
        if bad:
            ending = f"{FAILED}: {_first_line(bad[0].get('message'))}"
        elif skipped is not None:
            ending = f"{SKIPPED}: {_first_line(skipped.get('message'))}"
        subject.tests[case.get("name") or ""] = ending
    return found


def plain_release(text: str) -> str:
    """The short release of a kernel that is not a distribution's: `6.18` for `6.18.44-anything`."""
    return ".".join(text.split("-", maxsplit=1)[0].split(".")[:2])


def read_property(path: Path, name: str) -> str:
    """The value of that property in a JUnit file, or empty."""
    found = [p.get("value") or "" for p in ElementTree.parse(path).iter("property") if p.get("name") == name]  # noqa: S314
    return found[0] if found else ""


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0][:160]


def load(path: Path = SUPPORT_JSON) -> list[Row]:
    """The rows of the file; none if it is missing."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text())["rows"]
    return [Row(**row | {"subjects": {k: Subject(**v) for k, v in row["subjects"].items()}}) for row in rows]


def save(fresh: Iterable[Row], path: Path = SUPPORT_JSON, *, whole: bool = True) -> None:
    """Puts rows into the file. A row of the same kernel, user land and kind is replaced.

    Rows of a choice of tests (not `whole`) replace only the tests that they ran, if the versions are the same.
    """
    rows = {(row.how, row.kernel, row.userland): row for row in load(path)}
    for row in fresh:
        before = rows.get((row.how, row.kernel, row.userland))
        if not whole and before and (before.release, before.versions) == (row.release, row.versions):
            before.add(row)
        else:
            rows[row.how, row.kernel, row.userland] = row
    order = [*KERNELS, "own", *EMULATED]
    listed = sorted(rows.values(), key=lambda r: (r.how, order.index(r.kernel), order.index(r.userland)))
    document = {"schema": "ebpf-mig/support/1", "rows": [asdict(row) for row in listed]}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def table(rows: list[Row]) -> str:
    """The Markdown table, with the tests that did not pass below it."""
    have = {(row.how, row.kernel) for row in rows}
    missing = [Row(name, "", "emulated") for name in KERNELS if ("emulated", name) not in have]
    done = {row.userland for row in rows if row.how == "native"}
    missing += [Row("own", name, "native") for name in USERLANDS if name not in done]
    subjects = [name for name in SUBJECTS if any(name in row.subjects for row in rows)]
    head = ["kernel", "user land", *subjects, "probes attached by", "run"]
    lines = [head, ["---"] * len(head), *(_cells(row, subjects) for row in rows)]
    lines += [[_kernel(row), row.userland or "-", *["not run"] * len(subjects), "", "not run"] for row in missing]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    notes = [note for row in rows for note in _notes(row)]
    return text + ("\n" + "\n".join(f"- {note}" for note in notes) + "\n" if notes else "")


def _kernel(row: Row) -> str:
    name = row.release or row.kernel
    return f"{name} ({row.how})"


def _cells(row: Row, subjects: list[str]) -> list[str]:
    has = ", ".join(f"{name} {version}" for name, version in row.versions.items())
    return [
        _kernel(row),
        f"{row.userland}: {has}",
        *(_cell(row.subjects.get(name)) for name in subjects),
        row.attach or "-",
        f"{row.date}, {row.seconds} s" + (f", {row.slowness:.1f} times slower" if row.slowness > 1 else ""),
    ]


def _cell(subject: Subject | None) -> str:
    if subject is None:
        return "not run"
    failed = subject.count(FAILED)
    ran = subject.count(PASSED) + failed
    if not ran:
        return "skipped"
    return f"**{failed} of {ran} failed**" if failed else f"passed {ran}"


def _notes(row: Row) -> list[str]:
    """Details below the table: each failure, and skipped tests by missing feature."""
    where = f"{_kernel(row)}, {row.userland}"
    found = [f"{where}: {line}" for line in row.infrastructure]
    skipped: dict[str, list[str]] = {}
    for name, subject in row.subjects.items():
        for test, said in subject.tests.items():
            ending, _, why = said.partition(": ")
            if ending == FAILED:
                found.append(f"{where}, {name}: {test}: {why}")
            elif ending == SKIPPED:
                skipped.setdefault(why.removeprefix(_MISSING), []).append(test)
    found += [f"{where}: skipped, missing feature: {why}: {', '.join(tests)}" for why, tests in skipped.items()]
    if row.again:
        found.append(f"{where}: run again by themselves, later: {', '.join(row.again)}")
    return found


def document(rows: list[Row], text: str) -> str:
    """`text` with the table of `rows` between its two marks."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(rows) + END + after
