# SPDX-License-Identifier: Apache-2.0
"""Commands on the other host: their output is bounded, and the wait for it has a time-out."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ebpf_mig.tracing import ssh
from ebpf_mig.tracing.ssh import Remote, RemoteHost
from ebpf_mig.vmm.adapter import FarEnd
from ebpf_mig.vmm.cloud_hypervisor.log import LogPlace


@pytest.fixture
def there() -> Remote:
    """A host that is reached with `env` in place of ssh: this one."""
    return Remote(RemoteHost("pod", command="env"), "source", FarEnd(["--api-socket", "/none"], "/none"))


def test_an_endless_answer_is_cut(there: Remote) -> None:
    assert len(there.end.output("yes")) == 1 << 20


def test_no_answer_is_not_waited_for(there: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "CONNECT_S", 0.3)
    begin = time.monotonic()
    assert there.end.output("sleep", "60") == ""
    assert time.monotonic() - begin < 10
    assert there.end.output("no-such-program") == ""


def test_ssh_gets_each_word_as_it_is() -> None:
    line = RemoteHost("far").command_line(["cat", "a b", "$(reboot)"])
    assert line[-2:] == ["far", "cat 'a b' '$(reboot)'"]
    assert line[-3] == "--"


def test_a_log_there_is_read_from_where_it_ended_before(there: Remote, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Migration completed after 1s with a downtime of 999ms\n")
    place = LogPlace.now(str(log), there.end)
    assert place.figures() == {}
    with log.open("a") as more:
        more.write("Migration completed after 1s with a downtime of 12ms\nMigration failed: why\n")
    assert place.figures() == {"downtime": 12}
    assert place.failure() == "why"
    log.write_text("Receiving final state and resuming the VM took 3ms\n")
    assert place.figures() == {"state_to_resume": 3}, "it was begun anew"
    assert LogPlace.now(str(tmp_path / "none"), there.end).lines() == []
