# SPDX-License-Identifier: Apache-2.0
"""The state directory: limits, other people's files, permissions; and VM names in command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_mig.errors import UsageError
from ebpf_mig.exporter.discovery import name_in, vm_of
from ebpf_mig.exporter.store import Store
from ebpf_mig.recording.events import Ending, Header, Mark
from ebpf_mig.recording.file import read_recording


def test_the_newest_are_kept_within_both_limits(tmp_path: Path) -> None:
    (tmp_path / "mine.rec").write_text("not ours")
    store = Store(tmp_path, keep=3)
    kept = [store.keep(Header(), [Ending(1, "migrated")], pid) for pid in range(5)]
    assert [path.exists() for path in kept] == [False, False, True, True, True]
    assert (tmp_path / "mine.rec").read_text() == "not ours"
    assert store.size()[0] == 3
    assert not read_recording(kept[-1]).truncated
    Store(tmp_path, keep=3, keep_bytes=1).prune()
    assert [path.exists() for path in kept] == [False, False, False, False, True]


def test_recordings_are_for_their_owner_only(tmp_path: Path) -> None:
    path = Store(tmp_path / "a" / "b").keep(Header(), [Mark(1, 1, "x")], 1)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UsageError, match="writable for others"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("qemu -name vm1", "vm1"),
        ("qemu -name guest=web-1,debug-threads=on -m 1", "web-1"),
        ("qemu -name vm1,debug-threads=on", "vm1"),
        ("qemu -name first -name last", "last"),
        ("qemu -uuid 12345678-1234-1234-1234-123456789abc", "12345678-1234-1234-1234-123456789abc"),
        ("qemu -uuid ../../etc", ""),
        ("cloud-hypervisor --api-socket x", ""),
        ("-name", ""),
        ("", ""),
    ],
)
def test_names(line: str, name: str) -> None:
    assert name_in(line.split(" ")) == name


def test_we_own_no_vm_and_neither_does_a_pid_that_is_not() -> None:
    assert vm_of(1 << 22) is None
    import os

    assert vm_of(os.getpid()) is None
