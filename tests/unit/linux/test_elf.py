# SPDX-License-Identifier: Apache-2.0
"""What an executable says of itself. Witnesses: gcc's options, and binutils' readelf."""

from __future__ import annotations

import io
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from ebpf_mig.linux.elf import RETURN_ADDRESS, Elf, _readable

pytest.importorskip("elftools", reason="missing feature: pyelftools")
SOURCE = """
#include <unistd.h>
static volatile int sum;
__attribute__((noinline)) void inner(int n) { for (int i = 0; i < n; i++) sum += i; usleep(1); }
__attribute__((noinline)) int outer(int n) { inner(n + sum); sum += n; inner(n); return sum; }
int main(int argc, char **argv) { int n = outer(argc); return outer(n) + sum; }
"""


def built(directory: Path, *options: str) -> Path:
    """The program, built by gcc with these options."""
    if shutil.which("gcc") is None or shutil.which("readelf") is None:
        pytest.skip("missing feature: gcc and binutils")
    program = directory / "program"
    command = ["gcc", "-O1", "-fno-inline", *options, "-x", "c", "-o", str(program), "-"]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    return program


def elf(program: Path) -> Elf:
    return Elf(io.BytesIO(program.read_bytes()))


def readelf(program: Path, *options: str) -> str:
    return subprocess.run(["readelf", *options, str(program)], capture_output=True, text=True, check=True).stdout


def test_the_build_id_and_the_functions_are_those_of_readelf(tmp_path: Path) -> None:
    program = built(tmp_path, "-Wl,--build-id")
    found = re.search(r"Build ID: ([0-9a-f]+)", readelf(program, "-nW"))
    assert found is not None and elf(program).build_id == found[1]
    rows = re.findall(r"\d+: ([0-9a-f]{16}) +(\d+) FUNC .* (inner|outer|main)$", readelf(program, "-sW"), re.MULTILINE)
    assert len(rows) == 3
    for address, size, name in rows:
        begin = int(address, 16)
        assert elf(program).function(begin) == elf(program).function(begin + int(size) - 1) == name
        assert elf(program).function(begin + int(size)) != name


@pytest.mark.parametrize(("options", "keeps"), [(["-fno-omit-frame-pointer"], True), (["-fomit-frame-pointer"], False)])
def test_frame_pointers_are_seen_in_the_code(tmp_path: Path, options: Sequence[str], keeps: bool) -> None:
    program = elf(built(tmp_path, *options, "-nostartfiles", "-Wl,--entry=main"))
    assert program.frame_pointers is keeps


def test_a_caller_is_where_readelf_says(tmp_path: Path) -> None:
    program = built(tmp_path, "-fomit-frame-pointer")
    one = elf(program)
    begin = next(address for address, _, name in one.functions if name == "outer")
    table = readelf(program, "--debug-dump=frames-interp").split(f"pc={begin:016x}..")[1].split("\n\n")[0]
    rows = re.findall(r"^([0-9a-f]{16}) rsp\+(\d+) ", table, re.MULTILINE)
    assert len(rows) > 2
    for address, offset in rows:
        rules = one.rules(int(address, 16))
        assert rules is not None
        assert (rules.register, rules.offset, rules.saved[RETURN_ADDRESS]) == (7, int(offset), -8)


def test_code_without_unwind_tables_has_no_rules(tmp_path: Path) -> None:
    one = elf(built(tmp_path, "-fno-asynchronous-unwind-tables", "-fno-unwind-tables"))
    begin = next(address for address, _, name in one.functions if name == "outer")
    assert one.rules(begin) is None


def test_a_damaged_file_is_refused_or_says_less(tmp_path: Path) -> None:
    whole = built(tmp_path).read_bytes()
    draw = random.Random(1)
    for _ in range(60):
        data = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(draw.randrange(1, 200)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            one = Elf(io.BytesIO(data))
        except ValueError:
            continue
        assert isinstance(one.build_id, str) and one.frame_pointers in (True, False, None)
        for address in (0, 0x1139, 0x1150, 1 << 63):
            assert isinstance(one.function(address), str)
            one.rules(address)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bdrv_drain_all", "bdrv_drain_all"),
        ("pause_all_vcpus@@Base", "pause_all_vcpus"),
        ("_ZN3vmm2vm2Vm5pause17h0123456789abcdefE", "vmm::vm::Vm::pause"),
        ("_ZN54_$LT$vmm..vm..Vm$u20$as$u20$vm_migration..Pausable$GT$5pause17h0123456789abcdefE",
         "<vmm::vm::Vm as vm_migration::Pausable>::pause"),
        ("_ZN9999vmmE", "_ZN9999vmmE"),
        ("_ZNE", "_ZNE"),
    ],
)  # fmt: skip
def test_names_of_rust_are_readable(name: str, text: str) -> None:
    assert _readable(name) == text
