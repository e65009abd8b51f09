# SPDX-License-Identifier: Apache-2.0
"""Listening sockets of real processes: this one, and one that is not ours to ask."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from ebpf_mig.linux.listening import listens


def test_a_tcp_port_listens_once_it_does() -> None:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        url = f"tcp:127.0.0.1:{made.getsockname()[1]}"
        assert not listens(os.getpid(), url), "bound is not listening"
        made.listen()
        assert listens(os.getpid(), url)
        assert not listens(1, url), "another process does not"
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
