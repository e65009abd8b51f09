# SPDX-License-Identifier: Apache-2.0
"""A real listener is killed again and again at random instants while it counts: each migration is counted once."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.request
from random import Random

import msgspec

from ebpf_mig.exporter import checkpoint
from ebpf_mig.exporter.analyst import socket_pair
from ebpf_mig.exporter.child import Child
from ebpf_mig.exporter.listener_messages import Found
from ebpf_mig.exporter.observation import vmms
from tests.unit.exporter.observations import observation, status

KILLS = 6
SEED = 17


def test_each_migration_is_counted_once() -> None:
    inbox, outbox = socket_pair()
    listener, counters, random = socket.create_server(("127.0.0.1", 0)), checkpoint.create(), Random(SEED)

    def argument(ready: int) -> str:
        fds = {"listener": listener.fileno(), "inbox": inbox.fileno(), "counters": counters, "ready": ready}
        settings = {
            "parent": os.getpid(),
            "vm_label": "name",
            "vmms": vmms(),
            "web_config": "",
            "otlp": "",
            "log_format": "json",
        }
        return json.dumps(fds | settings)

    child = Child("listener", "ebpf_mig.exporter.serve", argument, [listener.fileno(), inbox.fileno(), counters])
    sent = kills = 0
    deadline = time.monotonic() + 60
    try:
        while kills < KILLS or child.missing:
            assert time.monotonic() < deadline, child.missing
            assert not child.look(), child.missing
            child.start()
            if sent < 5000:
                sent += 1
                found = Found(run="a", number=sent, observation=observation(), trace=None)
                outbox.send(msgspec.json.encode(found))
                outbox.send(msgspec.json.encode(status(run="a")))
            if not child.missing and kills < KILLS and random.random() < 0.1:
                kills += 1
                assert child._process is not None
                os.kill(child._process.pid, signal.SIGKILL)
                child.wait(5)
                child.start_now()
            time.sleep(random.random() * 0.005)

        def counted() -> float:
            with urllib.request.urlopen(f"http://127.0.0.1:{listener.getsockname()[1]}/metrics", timeout=10) as answer:
                lines = answer.read().decode().splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith("ebpf_mig_migrations_total{"))

        while counted() < sent:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert counted() == sent > KILLS
    finally:
        child.kill()
        child.wait(5)
