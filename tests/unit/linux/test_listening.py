# SPDX-License-Identifier: Apache-2.0
"""Listening sockets of real processes: this one and another one."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ebpf_mig.linux.listening import listens


def test_a_tcp_port_listens_once_it_does() -> None:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        url = f"tcp:127.0.0.1:{made.getsockname()[1]}"
        assert not listens(os.getpid(), url), "bound is not listening"
        made.listen()
        assert listens(os.getpid(), url)
        assert not listens(1, url), "another process does not listen"
    assert not listens(os.getpid(), url)


def test_tcp_over_ipv6() -> None:
    with socket.socket(socket.AF_INET6) as made:
        made.bind(("::1", 0))
        made.listen()
        assert listens(os.getpid(), f"tcp:[::1]:{made.getsockname()[1]}")


def test_a_path_listens_once_it_does(tmp_path: Path) -> None:
    path = tmp_path / "a b"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        assert path.exists() and not listens(os.getpid(), f"unix:{path}"), "there is a path, but nobody accepts"
        made.listen()
        assert listens(os.getpid(), f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert listens(os.getpid(), f"unix:{path}"), "a connection that waits has the same path"


def test_nonsense_does_not_listen() -> None:
    assert not listens(os.getpid(), "tcp:host:port")
    assert not listens(os.getpid(), "")
    assert not listens(1 << 22, "tcp:127.0.0.1:80")


@pytest.mark.parametrize(
    "name", [b"\0\xff\xfe", b"\0a\n0: 0 0 zz 0 0 1 x", b"\0" + b"\n" * 50, b"\0a b \x1b[2J"], ids=repr
)
def test_sockets_of_others_may_have_any_name(tmp_path: Path, name: bytes) -> None:
    """Any process may bind an abstract socket to any bytes. They are in the same table as the wanted path."""
    path = tmp_path / "caf\udcc3"
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as made:
        other.bind(name)
        other.listen()
        assert not listens(os.getpid(), f"unix:{path}")
        made.bind(bytes(path))
        made.listen()
        assert listens(os.getpid(), f"unix:{path}")
