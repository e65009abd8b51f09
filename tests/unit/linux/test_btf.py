# SPDX-License-Identifier: Apache-2.0
"""The BTF reader against blobs assembled here by the documented layout, and against the running kernel."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from ebpf_mig.errors import PreflightError
from ebpf_mig.linux import btf

STRUCT, UNION, INT, ENUM = 4, 5, 1, 6


def blob(types: bytes, strings: bytes) -> bytes:
    return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


def a_type(name: int, kind: int, vlen: int, size: int, rest: bytes = b"", flag: int = 0) -> bytes:
    return struct.pack("=III", name, flag << 31 | kind << 24 | vlen, size) + rest


def member(name: int, kind: int, bits: int) -> bytes:
    return struct.pack("=III", name, kind, bits)


STRINGS = b"\0int\0outer\0first\0inner\0last\0"
INT_T, OUTER, FIRST, INNER, LAST = 1, 5, 11, 17, 23


@pytest.fixture
def base(tmp_path: Path) -> str:
    """int; enum with one value; union {int inner; int inner2}; struct outer {int first; union; int last}."""
    types = (
        a_type(INT_T, INT, 0, 4, struct.pack("=I", 32))
        + a_type(0, ENUM, 1, 4, struct.pack("=II", FIRST, 1))
        + a_type(0, UNION, 1, 4, member(INNER, 1, 0))
        + a_type(OUTER, STRUCT, 3, 16, member(FIRST, 1, 0) + member(0, 3, 64) + member(LAST, 1, 96))
    )
    path = tmp_path / "vmlinux"
    path.write_bytes(blob(types, STRINGS))
    return str(path)


def test_plain_and_anonymous_members(base: str) -> None:
    wanted = [("outer", "first"), ("outer", "inner"), ("outer", "last"), ("outer", "none"), ("nobody", "first")]
    assert list(btf.offsets(base, wanted).values()) == [0, 8, 12, None, None]


def test_bitfield_flag_masks_the_size(base: str, tmp_path: Path) -> None:
    types = a_type(INT_T, INT, 0, 4, struct.pack("=I", 32))
    types += a_type(OUTER, STRUCT, 1, 8, member(LAST, 1, 3 << 24 | 32), flag=1)
    path = tmp_path / "bits"
    path.write_bytes(blob(types, STRINGS))
    assert btf.offsets(str(path), [("outer", "last")]) == {("outer", "last"): 4}


def test_a_name_may_be_the_end_of_a_longer_string(tmp_path: Path) -> None:
    types = a_type(INT_T, INT, 0, 4, struct.pack("=I", 32)) + a_type(OUTER, STRUCT, 1, 8, member(OUTER + 4, 1, 64))
    path = tmp_path / "shared"
    path.write_bytes(blob(types, b"\0int\0not_outer\0"))
    wanted = [("not_outer", "outer"), ("outer", "outer")]
    assert btf.offsets(str(path), wanted) == {("not_outer", "outer"): 8, ("outer", "outer"): None}


def test_module_blob_continues_ids_and_strings_of_its_base(base: str, tmp_path: Path) -> None:
    own = b"kvm\0lock\0"
    start = len(STRINGS)
    types = a_type(start, STRUCT, 2, 24, member(start + 4, 1, 64) + member(0, 3, 128))
    path = tmp_path / "kvm"
    path.write_bytes(blob(types, own))
    wanted = [("kvm", "lock"), ("kvm", "inner"), ("outer", "last")]
    assert list(btf.offsets(str(path), wanted, base=base).values()) == [8, 16, 12]


@pytest.mark.parametrize("garbage", [b"", b"\0" * 64, b"\x9f\xeb" + b"\xff" * 40])
def test_garbage_is_one_clear_error(garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(garbage)
    with pytest.raises(PreflightError, match="not valid BTF"):
        btf.offsets(str(path), [("a", "b")])


def test_every_truncation_is_refused_or_harmless(base: str) -> None:
    whole = Path(base).read_bytes()
    for cut in range(len(whole)):
        Path(base).write_bytes(whole[:cut])
        with pytest.raises(PreflightError):
            btf.offsets(base, [("outer", "last")])


def test_absent_file_names_the_remedy() -> None:
    with pytest.raises(PreflightError) as caught:
        btf.offsets("/nonexistent/btf", [("a", "b")])
    assert "CONFIG_DEBUG_INFO_BTF" in str(caught.value.remedy)


@pytest.mark.skipif(not Path(btf.VMLINUX).exists(), reason="needs kernel BTF (/sys/kernel/btf/vmlinux)")
def test_the_running_kernel() -> None:
    found = btf.offsets(
        btf.VMLINUX, [("task_struct", "files"), ("sock_common", "skc_dport"), ("sock_common", "skc_num")]
    )
    files, dport, num = found.values()
    assert files is not None and files > 0
    assert (dport, num) == (
        12,
        14,
    )  # include/net/sock.h: skc_portpair is dport then num, behind the 8-byte addrpair and hash


def test_functions_and_their_arguments(base: str, tmp_path: Path) -> None:
    """A function's type is a prototype. The ids of a module's functions follow those of the base BTF."""
    proto = a_type(0, 13, 2, 1, struct.pack("=4I", 0, 1, 0, 1))
    path = tmp_path / "module"
    path.write_bytes(blob(proto + a_type(len(STRINGS), 12, 0, 5), b"send\0"))
    found = btf.functions(str(path), {"send", "outer"}, base=base)
    assert found == {"send": btf.FunctionType(btf_id=6, arguments=2, module="module")}


def test_arguments_of_a_tracepoint(tmp_path: Path) -> None:
    """A typedef of a pointer to a prototype, whose first argument is the tracepoint's own. const and typedef vanish."""
    strings = b"\0int\0btf_trace_done\0size_t\0"
    types = (
        a_type(1, INT, 0, 4, struct.pack("=I", 32))  # 1
        + a_type(0, 2, 0, 1)  # 2: int *
        + a_type(0, 10, 0, 2)  # 3: int *const
        + a_type(strings.index(b"size_t"), 8, 0, 1)  # 4: a typedef of int
        + a_type(
            0, 13, 5, 0, struct.pack("=10I", 0, 2, 0, 3, 0, 1, 0, 4, 0, 2)
        )  # 5: (data, int *const, int, size_t, int *)
        + a_type(0, 2, 0, 5)
        + a_type(strings.index(b"btf_trace_done"), 8, 0, 6)
    )
    path = tmp_path / "vmlinux"
    path.write_bytes(blob(types, strings))
    assert btf.tracepoint_arguments(str(path), "done") == (True, False, False, True)
    assert btf.tracepoint_arguments(str(path), "other") == ()
