# SPDX-License-Identifier: Apache-2.0
"""The state directory: limits, other people's files, permissions; and VM names in command lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebpf_mig.errors import UsageError
from ebpf_mig.exporter.discovery import vm_of
from ebpf_mig.exporter.store import Store
from ebpf_mig.recording.events import Ending, Header, Mark
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.processes import name_in
from tests.conftest import requires


def kept(store: Store, pid: int = 1) -> str:
    """The name of a recording that was just kept."""
    name, fd = store.keep(Header(), [Mark(1, 1, "x"), Ending(1, "migrated")], pid)
    with os.fdopen(fd, "rb") as stream:
        assert not read_recording(stream).truncated
    return name


def test_the_newest_are_kept_within_both_limits(tmp_path: Path) -> None:
    (tmp_path / "mine.rec").write_text("not ours")
    store = Store(tmp_path, keep=3)
    names = [kept(store, pid) for pid in range(5)]
    assert [(tmp_path / name).exists() for name in names] == [False, False, True, True, True]
    assert (tmp_path / "mine.rec").read_text() == "not ours"
    assert store.size()[0] == 3
    Store(tmp_path, keep=3, keep_bytes=1).prune()
    assert [(tmp_path / name).exists() for name in names] == [False, False, False, False, True]


def test_recordings_are_for_their_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / kept(Store(tmp_path / "a" / "b"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == path.parent.parent.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(UsageError, match="writable by others"):
        Store(tmp_path)
    with pytest.raises(UsageError, match="writable by others"):
        store.keep(Header(), [], 1)


@requires("root")
def test_a_directory_or_a_link_on_the_way_to_it_that_others_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    os.chown(tmp_path / "state", 65534, 65534)
    with pytest.raises(UsageError, match="belongs to user 65534"):
        Store(tmp_path / "state")
    (tmp_path / "link").symlink_to(tmp_path)
    assert kept(Store(tmp_path / "link" / "mine"))
    os.chown(tmp_path / "link", 65534, 65534, follow_symlinks=False)
    with pytest.raises(UsageError, match="a link that another user made"):
        Store(tmp_path / "link" / "mine")


@pytest.mark.parametrize("path", ["x\0y", "/dev/null/x", "/proc/1/x/y", "\udcff/\ud800"])
def test_a_path_that_cannot_be_is_an_error_of_the_user(path: str) -> None:
    with pytest.raises(UsageError, match="cannot use"):
        Store(path)


@pytest.mark.parametrize("swapped", ["link", "other", "gone", "parent"])
def test_who_writes_the_parent_leads_us_nowhere(swapped: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(0o700)
    files = [victim / f"20200101T00000{n}.000Z-1.rec" for n in range(3)]
    for file in files:
        file.write_text("the victim's")
    state = tmp_path / "parent" / "state"
    store = Store(state, keep=1)
    first = kept(store)
    state.rename(tmp_path / "moved")
    if swapped == "link":
        state.symlink_to(victim)
    elif swapped == "parent":
        state.parent.rmdir()
        state.parent.symlink_to(tmp_path)
        os.chown(state.parent, 65534, 65534, follow_symlinks=False)
        victim.rename(tmp_path / "state")
        files = [tmp_path / "state" / file.name for file in files]
    elif swapped == "other":
        state.mkdir(0o777)
        state.chmod(0o777)
    for _ in range(2):
        with pytest.raises(UsageError):
            store.keep(Header(), [Mark(1, 1, "x")], 1)
        with pytest.raises(UsageError):
            store.size()
    store.prune()
    assert [file.read_text() for file in files] == ["the victim's"] * 3 and (tmp_path / "moved" / first).exists()
    if swapped == "gone":
        state.mkdir(0o700)
        assert (state / kept(store)).exists() and store.size()[0] == 1


def test_what_is_no_file_of_ours_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=1)
    old = "20200101T000000.000Z-1.rec"
    (tmp_path / old).symlink_to("/etc/passwd")
    (tmp_path / "20200101T000001.000Z-1.rec").mkdir()
    os.mkfifo(tmp_path / "20200101T000002.000Z-1.rec")
    assert kept(store) and kept(store) and store.size()[0] == 1
    assert len(list(tmp_path.iterdir())) == 4


@requires("root", "private mount namespaces")
def test_a_full_disk_leaves_no_half_of_a_recording(tmp_path: Path) -> None:
    script = """
import os, sys
from ebpf_mig.errors import RecordingError
from ebpf_mig.exporter.store import Store
from ebpf_mig.recording.events import Header, Mark
from ebpf_mig.vmm.processes import name_in
store = Store(sys.argv[1] + "/state")
name, fd = store.keep(Header(), [Mark(1, 1, "x")], 1)
try:
    store.keep(Header(), [Mark(n, 1, os.urandom(40).hex()) for n in range(5000)], 2)
except RecordingError as error:
    assert "No space left" in str(error), error
    assert os.listdir(sys.argv[1] + "/state") == [name], os.listdir(sys.argv[1] + "/state")
    sys.exit(42)
"""
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0" && exec "$@"', str(tmp_path)]
    done = subprocess.run([*mounted, sys.executable, "-c", script, str(tmp_path)], check=False, capture_output=True)
    assert done.returncode == 42, done.stderr


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("qemu -name vm1", "vm1"),
        ("qemu -name guest=web-1,debug-threads=on -m 1", "web-1"),
        ("qemu -name vm1,debug-threads=on", "vm1"),
        ("qemu -name first -name last", "last"),
        ("qemu -name vm1 -name debug-threads=off,process=x", "vm1"),
        ("qemu -name debug-threads=on", ""),
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
    assert vm_of(os.getpid()) is None
