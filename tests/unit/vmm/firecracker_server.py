# SPDX-License-Identifier: Apache-2.0
"""A process that serves a UNIX socket as Firecracker does, or as it should not.

Arguments: the socket's path, and JSON: `state`, the state of its VM; `misbehave`, by call (`instance`,
`machine-config`, `pause`, `resume`, `create`, `load`) what it does instead: `delay_s` before the answer, `status` and
`body` of the answer, `raw` text instead of it, `drip` text for ever, `die` so many seconds after it closed its sockets,
or `state` afterwards. Each call's name and body are written to standard output as it arrives. One call is served at a
time, as by the VMM.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import time
from typing import Any

MACHINE = {"vcpu_count": 1, "mem_size_mib": 1}


def received(client: socket.socket) -> tuple[str, dict[str, Any]]:
    """The name of the call, and its body."""
    asked = b""
    while part := client.recv(65536):
        asked += part
        head, end, body = asked.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        if end and len(body) >= (int(length[1]) if length else 0):
            break
    if not asked:
        return "", {}
    method, path = asked.split(b" ", 2)[:2]
    values = json.loads(body) if body else {}
    if method == b"PATCH":
        return {"Paused": "pause", "Resumed": "resume"}[values["state"]], values
    return {b"/": "instance", b"/machine-config": "machine-config"}.get(path, path.decode().rpartition("/")[2]), values


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Server:
    """One VMM."""

    def __init__(self, state: str, misbehave: dict[str, dict[str, Any]]) -> None:
        self.state, self.misbehave = state, misbehave

    def serve(self, client: socket.socket) -> None:
        name, values = received(client)
        if not name:
            return
        _say(f"{name} {json.dumps(values)}")
        wrong = self.misbehave.get(name, {})
        time.sleep(wrong.get("delay_s", 0))
        status, body = wrong.get("status", 204), wrong.get("body", "")
        if not wrong.keys() & {"status", "body"}:
            status, body = self.act(name, status)
        self.state = wrong.get("state", self.state)
        if "die" in wrong:
            os.closerange(3, 1 << 10)
            time.sleep(wrong["die"])
            os._exit(1)
        if "drip" in wrong:
            while True:
                client.sendall(wrong["drip"].encode())
                time.sleep(0.05)
        if "raw" in wrong:
            client.sendall(wrong["raw"].encode())
            return
        text = (body if isinstance(body, str) else json.dumps(body)).encode()
        client.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text)

    def act(self, name: str, status: int) -> tuple[int, Any]:
        """What Firecracker does: the answer's status and body."""
        match name:
            case "instance":
                return 200, {"app_name": "Firecracker", "id": "x", "state": self.state, "vmm_version": "1.16.1"}
            case "machine-config":
                return 200, MACHINE
            case "pause":
                self.state = "Paused"
            case "resume" | "load":
                self.state = "Running"
        return status, ""


def main(path: str, text: str) -> None:
    """Serves until it is killed."""
    given = json.loads(text)
    server = Server(given["state"], given["misbehave"])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        _say("ready")
        while True:
            client, _ = listener.accept()
            with client, contextlib.suppress(OSError):
                server.serve(client)


if __name__ == "__main__":
    main(*sys.argv[1:])
