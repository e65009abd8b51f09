# SPDX-License-Identifier: Apache-2.0
"""A room imports only the rooms below it. Every import is checked, also those inside functions.

The table is also drawn in docs/design.md, and the two are compared. Names of VMMs stay in `vmm/`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebpf_mig import vmm
from tests.unit.commands.test_cli import ROOT

PACKAGE = ROOT / "ebpf_mig"
BASE = ("errors", "text", "files")
"""Modules of the package root that every room may use, like the version in `__init__`."""
FACE = ("__init__", "__main__", "cli")
"""Modules of the package root that may use every room."""

_BELOW = {
    "base": "",
    "breakdown": "base",
    "linux": "base",
    "recording": "base linux",
    "analysis": "base breakdown linux recording",
    "joining": "base breakdown linux recording analysis",
    "lab": "base linux",
    "vmm": "base breakdown linux recording analysis lab",
    "collector": "base breakdown linux recording analysis joining vmm",
    "compare": "base breakdown",
    "report": "base breakdown linux recording analysis vmm collector compare",
    "library": "base breakdown linux recording analysis joining vmm collector compare report",
    "probes": "base linux recording",
    "tracing": "base linux recording analysis vmm probes",
    "exporter": "base breakdown linux recording analysis vmm collector report probes tracing",
    "commands": "base breakdown linux recording analysis joining lab vmm collector compare report probes tracing"
    " exporter",
}  # fmt: skip
ROOMS = {name: frozenset(below.split()) for name, below in _BELOW.items()} | {"face": frozenset(_BELOW)}
"""Each room, the lowest first, and those that it may import."""
MOST_ROOT_FILES = 7


def room(module: str) -> str:
    """The room of a module, e.g. of `ebpf_mig.vmm.qemu.lab`."""
    parts = module.split(".")
    if len(parts) == 1:
        return "face"
    if (PACKAGE / parts[1]).is_dir():
        return parts[1]
    of_root = {"base": BASE, "face": FACE}
    return next((name for name, modules in of_root.items() if parts[1] in modules), parts[1])


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of each import of our modules, also of those made from strings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("ebpf_mig"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "ebpf_mig":
                for alias in node.names:
                    yield node.lineno, "ebpf_mig.errors" if alias.name == "__version__" else f"ebpf_mig.{alias.name}"
            elif node.module and node.module.startswith("ebpf_mig."):
                yield node.lineno, node.module
        elif isinstance(node, ast.Constant) and _is_module(node.value):
            yield node.lineno, str(node.value)


def _is_module(name: object) -> bool:
    """Whether the text names one of our modules, as in strings that are imported or started later."""
    if not isinstance(name, str) or not re.fullmatch(r"ebpf_mig(\.\w+)+", name):
        return False
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").exists()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def upward(path: Path, name: str) -> list[str]:
    """The imports of a module that its room may not have."""
    own = room(name)
    allowed = ROOMS[own] | {own}
    return [
        f"{path}:{line}: {own} imports {module} ({room(module)})"
        for line, module in imports(path)
        if room(module) not in allowed
    ]


FILES = sorted(PACKAGE.rglob("*.py"))
WORDS = re.compile(r"\b(?:qmp|ch|libvirt|virsh)\b", re.IGNORECASE)
"""Names of VMMs and their protocols that are not in the registry."""


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of each string of a module except docstrings, and of each module that it imports."""
    tree = ast.parse(path.read_text())
    bodies = [node.body for node in ast.walk(tree) if hasattr(node, "body") and isinstance(node.body, list)]
    about = {id(node.value) for body in bodies for node in body if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in about:
            yield node.lineno, node.value
    yield from imports(path)


def named(path: Path) -> list[str]:
    """Where a module names a VMM."""
    folders = [module.split(".")[2] for module in vmm.ADAPTERS.values()]
    names = "|".join({*map(re.escape, vmm.ADAPTERS), *folders, *(re.escape(one.title) for one in vmm.adapters())})
    name = re.compile(names, re.IGNORECASE)
    return [f"{path}:{line}: {text[:60]!r}" for line, text in texts(path) if name.search(text) or WORDS.search(text)]


def test_each_import_leads_down() -> None:
    found = [text for path in FILES for text in upward(path, module_of(path))]
    assert not found, "\n".join(found)


def test_the_table_has_every_room_and_no_cycle() -> None:
    assert {room(module_of(path)) for path in FILES} == set(ROOMS)
    order = list(ROOMS)
    for name, below in ROOMS.items():
        assert below <= set(order[: order.index(name)]), f"{name} may import what lies above it"


def test_the_root_stays_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_ROOT_FILES


def test_only_adapters_name_a_vmm() -> None:
    found = [text for path in FILES if PACKAGE / "vmm" not in path.parents for text in named(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "line", "bad"),
    [
        ("analysis.waits", "from ebpf_mig.vmm import adapters", 1),
        ("analysis.waits", "def f() -> None:\n    from ebpf_mig import collector", 1),
        ("linux.kvm", "import ebpf_mig.recording.events", 1),
        ("tracing.session", "start('ebpf_mig.exporter.node')", 1),
        ("commands.run", "from ebpf_mig.cli import cli", 1),
        ("errors", "import ebpf_mig.text", 0),
        ("commands.run", "from ebpf_mig.vmm import adapters", 0),
        ("linux.kvm", "from ebpf_mig import __version__", 0),
    ],
)
def test_an_import_that_leads_up_is_found(tmp_path: Path, module: str, line: str, bad: int) -> None:
    path = tmp_path / "planted.py"
    path.write_text(line)
    assert len(upward(path, f"ebpf_mig.{module}")) == bad


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("vmm = 'qemu'", 1),
        ("if mark.name.startswith('ch.event.'): pass", 1),
        ("print(f'asks {path} by QMP')", 1),
        ("def f() -> None:\n    from ebpf_mig.vmm.cloud_hypervisor import api", 1),
        ("'A docstring may say qemu.'", 0),
        ("def f() -> None:\n    'QEMU does so.'", 0),
        ("word = 'which chair'  # qemu", 0),
    ],
)
def test_a_name_outside_is_found(tmp_path: Path, line: str, bad: int) -> None:
    path = tmp_path / "planted.py"
    path.write_text(line)
    assert len(named(path)) == bad


def test_the_design_page_has_the_same_table() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| `(\w+)/?` \|.*\| ([^|]*) \|$", page, re.MULTILINE)
    written = {name: frozenset(re.findall(r"\w+", below)) - {"nothing"} for name, below in rows if name in ROOMS}
    assert written == ROOMS
