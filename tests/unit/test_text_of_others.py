# SPDX-License-Identifier: Apache-2.0
"""Text of others may have any bytes: the output of other programs, files, and the command line.

Python's defaults end with a UnicodeDecodeError. Calls that leave it at these are found in the source.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator

import pytest

from ebpf_mig.vmm import adapters
from ebpf_mig.vmm.adapter import Kind, Option
from tests.unit.commands.test_cli import ROOT, run

OWN_FILES = {
    "ebpf_mig/commands/version.py", "ebpf_mig/probes/source.py", "ebpf_mig/probes/loader.py", "ebpf_mig/linux/perf.py",
    "ebpf_mig/report/schema.py", "ebpf_mig/report/embedded.py",
}  # fmt: skip
"""They read files of ours, or numbers of the kernel."""


def strict(source: str) -> Iterator[int]:
    """Lines of calls that decode text and do not say what happens to bytes that are none."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg for keyword in node.keywords}
        as_text = given & {"text", "universal_newlines", "encoding"}
        reads = isinstance(node.func, ast.Attribute) and node.func.attr == "read_text"
        if (as_text or reads) and "errors" not in given:
            yield node.lineno


def test_what_this_finds() -> None:
    assert list(strict("run(a, text=True)\nrun(a, text=True, errors='replace')\nPath(a).read_text()\nrun(a)")) == [1, 3]


def test_no_call_leaves_it_at_pythons_default() -> None:
    files = [path for path in (ROOT / "ebpf_mig").rglob("*.py") if str(path.relative_to(ROOT)) not in OWN_FILES]
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in strict(path.read_text())]
    assert len(files) > 200 and not found


TEXTS = [
    pytest.param(one.name, option, id=f"{one.name} {option.name}")
    for one in adapters()
    for option in one.options
    if option.kind is Kind.TEXT
]


@pytest.mark.parametrize(("vmm", "option"), TEXTS)
def test_a_name_or_address_that_is_not_utf_8_is_one_clear_line(vmm: str, option: Option) -> None:
    """The VMM cannot be given it. A path that we open ourselves may have any bytes."""
    wrong = os.fsdecode(b"unix:/\xff")
    arguments = []
    for one in next(a for a in adapters() if a.name == vmm).options:
        value = wrong if one is option else "unix:/gone"
        if one.argument:
            arguments.append(value)
        elif one.required or one is option:
            arguments += [one.name, value]
    done = run("migrate", vmm, *arguments)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    if option.opened:
        assert done.returncode in (2, 3, 4)
    else:
        assert (done.returncode, done.stderr) == (
            2, f"ebpf-mig: {option.name} is not UTF-8: unix:/\\udcff; VMMs take only UTF-8\n",
        )  # fmt: skip
