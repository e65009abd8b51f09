# SPDX-License-Identifier: Apache-2.0
"""The support table is made only from what ran."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm import results
from tests.vm.catalogue import KERNELS, USERLANDS

SUBJECT = '<property name="subject" value="{}"/>'
DEMO, RING = SUBJECT.format("demo"), SUBJECT.format("ring")
JUNIT = f"""<testsuites><testsuite>
<testcase name="a"><properties>{DEMO}<property name="attach" value="{{}}"/></properties></testcase>
<testcase name="b"><properties>{DEMO}</properties><failure message="1 != 2&#10;more">x</failure></testcase>
<testcase name="c"><properties>{RING}</properties><skipped message="missing feature: ring"/></testcase>
<testcase name="d"><properties>{RING}</properties><error message="no setup"/></testcase>
</testsuite></testsuites>"""
GOOD = results.Subject({"test_a": "passed"})


def test_the_documents_table_is_that_of_the_results() -> None:
    text = results.SUPPORT_MD.read_text()
    assert results.document(results.load(), text) == text, "run: python -m tests.vm table"


def test_a_kernel_that_was_not_run_is_said_to_be_so() -> None:
    nothing = results.table([])
    assert nothing.count(" not run |\n") == len(KERNELS) + len(USERLANDS)
    row = results.Row("6.1", "bookworm", "emulated", "6.1.0-1", subjects={"demo": GOOD})
    one = results.table([row])
    assert one.count(" not run |\n") == len(KERNELS) + len(USERLANDS) - 1
    assert "| 6.1.0-1 (emulated) |" in one and "| passed 1 |" in one


def test_junit_is_counted_by_subject(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    found = results.read_junit(path)
    assert found["demo"].tests == {"a": "passed", "b": "failed: 1 != 2"}
    assert found["ring"].tests == {"c": "skipped: missing feature: ring", "d": "failed: no setup"}
    assert [found["ring"].count(ending) for ending in ("passed", "failed", "skipped")] == [0, 1, 1]
    assert results.read_property(path, "attach") == "{}"


@pytest.mark.parametrize("failed", [0, 1])
def test_failures_are_in_the_table_and_make_a_row_bad(failed: int) -> None:
    tests = {"a": "passed", "b": "passed", "c": "skipped: missing feature: z"} | ({"x": "failed: y"} if failed else {})
    subject = results.Subject(tests)
    row = results.Row("6.1", "bookworm", "emulated", "6.1", subjects={"demo": subject}, infrastructure=["lost once"])
    table = results.table([row])
    assert row.good is (failed == 0)
    assert ("**1 of 3 failed**" in table and "demo: x: y" in table) is bool(failed)
    assert "lost once" in table and "skipped, missing feature: z: c" in table
    assert not results.Row("6.1", "bookworm", "emulated").good, "nothing ran"


def test_a_new_row_replaces_the_old_one_of_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "support.json"
    results.save([results.Row("6.1", "bookworm", "emulated", "old"), results.Row("own", "sid", "native", "x")], path)
    results.save([results.Row("6.1", "bookworm", "emulated", "new", subjects={"demo": GOOD})], path)
    assert [(row.release, row.userland) for row in results.load(path)] == [("new", "bookworm"), ("x", "sid")]
    assert results.load(path)[0].subjects["demo"] == GOOD


def test_a_choice_of_tests_replaces_those_that_it_ran_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "support.json"
    both = {"demo": GOOD, "ring": results.Subject({"b": "failed: x", "c": "passed"})}
    results.save([results.Row("6.1", "bookworm", "emulated", "r", attach="fentry", subjects=both)], path)
    part = results.Row("6.1", "bookworm", "emulated", "r", subjects={"ring": results.Subject({"b": "passed"})})
    results.save([part], path, whole=False)
    (row,) = results.load(path)
    assert row.subjects["demo"] == GOOD and row.subjects["ring"].tests == {"b": "passed", "c": "passed"}
    assert (row.attach, row.again) == ("fentry", ["b"])
    assert "run again by themselves, later: b\n" in results.table([row])
    results.save([results.Row("6.1", "bookworm", "emulated", "newer", subjects={})], path, whole=False)
    assert results.load(path)[0].subjects == {}, "a run on another kernel proves nothing about this one"


def test_a_kernel_that_is_no_distributions_is_told_by_its_version() -> None:
    assert results.plain_release("6.18.44-something-v1") == "6.18"
