# SPDX-License-Identifier: Apache-2.0
"""The tiny guests for arm64: their instructions by LLVM's assembler, and the lab's ELF. That they run is shown in an
emulated machine: `python -m tests.vm run --kernel arm64`.
"""

from __future__ import annotations

import re
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpf_mig.errors import PreflightError
from ebpf_mig.lab import scenario
from ebpf_mig.lab.guest import FIRST_BYTE, PAGE
from ebpf_mig.lab.guest_arm64 import _CODE, RAM, build_arm64_guest
from ebpf_mig.vmm.cloud_hypervisor.lab import ChPair
from ebpf_mig.vmm.libvirt.lab import LibvirtHosts
from tests.conftest import requires
from tests.truth import cpu_arm64


@requires("llvm-mc")
@pytest.mark.parametrize(
    "code", [_CODE, cpu_arm64.WRITE_LIST, cpu_arm64.LEAVE, cpu_arm64.SPIN], ids=["guest", "list", "leave", "spin"]
)
def test_each_instruction_is_what_its_source_says(code: tuple[tuple[int, str], ...]) -> None:
    source = "".join(f"{text.partition(' - ')[0]}\n" for _, text in code) + "numbers:\n"
    plain = re.sub(r"#'(.)'", lambda found: f"#{ord(found[1])}", source)
    command = ["llvm-mc", "--triple=aarch64", "--filetype=obj"]
    made = subprocess.run(command, input=plain.encode(), capture_output=True, check=True).stdout
    words = struct.pack(f"<{len(code)}I", *(word for word, _ in code))
    assert words in made


@given(st.integers(1, 26), st.integers(1, 4096), st.none() | st.integers(1, 10**6))
def test_any_guest_is_an_elf_below_its_first_area(vcpus: int, pages: int, pace: int | None) -> None:
    data = build_arm64_guest(vcpus, pages * PAGE, pace)
    _, kind, machine, _, entry, phoff = struct.unpack_from("<16sHHIQQ", data)
    assert (kind, machine) == (2, 183), "an AArch64 executable"
    p_type, _, offset, _, physical, filesz, memsz, _ = struct.unpack_from("<IIQQQQQQ", data, phoff)
    assert (p_type, offset, filesz) == (1, 0, len(data)) and memsz == filesz
    assert RAM < physical < entry < physical + filesz < RAM + FIRST_BYTE
    at = entry - physical
    assert data[at : at + 4] == struct.pack("<I", _CODE[0][0])
    numbers = struct.unpack_from("<5Q", data, at + 4 * len(_CODE))
    assert numbers == (vcpus, pages * PAGE, pages, pace or 0, RAM + FIRST_BYTE) and (at + 4 * len(_CODE)) % 8 == 0


@pytest.mark.parametrize(
    ("vcpus", "size", "pace"), [(0, PAGE, 1), (27, PAGE, 1), (1, 0, 1), (1, PAGE, 0), (26, 1 << 30, 1)]
)
def test_numbers_out_of_range(vcpus: int, size: int, pace: int) -> None:
    with pytest.raises(ValueError, match=r"vCPUs|working sets|pace"):
        build_arm64_guest(vcpus, size, pace)


@pytest.mark.parametrize("pair", [ChPair, LibvirtHosts])
def test_labs_without_arm64_vms_say_so(pair: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenario, "ARM64", True)
    with pytest.raises(PreflightError, match=r"no VMs of .* for arm64") as caught:
        pair(scenario.Scenario())
    assert "default VMM" in str(caught.value.remedy)
