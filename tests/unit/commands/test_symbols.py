# SPDX-License-Identifier: Apache-2.0
"""`report --symbols`: names that were not known when the recording was made. Witness: a program built by gcc."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from msgspec.structs import replace

from ebpf_mig.commands.symbols import DEBUGINFOD, LOCAL, named
from ebpf_mig.errors import UsageError
from ebpf_mig.linux.elf import Elf
from ebpf_mig.recording.events import Header, Module, UserStack
from ebpf_mig.recording.file import Recording

pytest.importorskip("elftools", reason="missing feature: pyelftools")


@pytest.fixture
def recorded(tmp_path: Path) -> Recording:
    """A stack in `inner` and `main`, of which only the places are known, and the program on this machine."""
    if shutil.which("gcc") is None:
        pytest.skip("missing feature: gcc")
    program = tmp_path / "program"
    text = '__attribute__((noinline)) void inner(void) { asm(""); } int main(void) { inner(); return 0; }'
    command = ["gcc", "-Wl,--build-id", "-x", "c", "-o", str(program), "-"]
    subprocess.run(command, input=text, text=True, check=True)
    with program.open("rb") as file:
        elf = Elf(file)
        places = [next(at for at, _, name in elf.functions if name == one) - elf.bias for one in ("inner", "main")]
        module = Module(7, 3, elf.build_id, str(program), elf.bias)
    stack = UserStack(9, 7, 8, ("", "known", ""), (3, 4, 3), (places[0], 5, places[1]))
    return Recording(header=Header(), events=[module, stack], truncated=False, reason="", unknown=0)


def test_names_are_found_in_the_same_file(recorded: Recording) -> None:
    (stack,) = [event for event in named(recorded, LOCAL).events if isinstance(event, UserStack)]
    assert stack.names == ("inner", "known", "main")


def test_another_file_at_that_path_is_not_used(recorded: Recording) -> None:
    module, stack = recorded.events
    assert isinstance(module, Module)
    os.mkfifo(f"{module.path}.fifo")
    changes = [{"build_id": "00" * 20}, {"build_id": ""}, {"build_id": "../" * 9}, {"path": "/no/file"}, {"path": "/"}]
    for change in [*changes, {"path": f"{module.path}.fifo"}, {"path": "a\0b"}]:
        other = replace(module, **change)
        assert named(replace(recorded, events=[other, stack]), LOCAL).events == [other, stack]


def test_places_without_a_module_stay(recorded: Recording) -> None:
    stack = UserStack(9, 7, 8, ("",), (99,), (1 << 62,))
    assert named(replace(recorded, events=[stack]), LOCAL).events == [stack]


@pytest.mark.skipif(shutil.which("debuginfod-find") is not None, reason="debuginfod-find is installed")
def test_debuginfod_needs_its_client(recorded: Recording) -> None:
    with pytest.raises(UsageError, match="debuginfod-find is not installed"):
        named(recorded, DEBUGINFOD)
