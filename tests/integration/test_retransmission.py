# SPDX-License-Identifier: Apache-2.0
"""A link that drops only the segment with the VM's state: a network namespace with a rule on the packet length."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import msgspec
import pytest

from ebpf_mig.breakdown import Breakdown
from tests.conftest import requires
from tests.truth import kvm
from tests.truth.ch_source import DEVICES
from tests.truth.harness import ROOT

pytestmark = requires("root", "/dev/kvm", "bcc", "kernel BTF", "x86-64", "iptables with length and statistic")
HEADERS = 20 + 32
"""Headers of IP, and of TCP with time stamps."""
_RUN = """
import msgspec, sys
from tests.truth.ch_harness import migrate
from tests.truth.ch_parts import ChPlan
run = migrate(ChPlan(), tcp=True)
sys.stderr.write(run.stderr)
sys.stdout.write(msgspec.json.encode(run.breakdown).decode())
"""
MS = 1_000_000


@pytest.mark.parametrize("lossy", [False, True], ids=["whole", "lossy"])
def test_a_lost_segment_is_named(lossy: bool) -> None:
    state = base64.b64encode(bytes(sum(part.size for part in kvm.CPU.state))).decode()
    length = len(json.dumps({"vcpus": state, "devices": DEVICES})) + HEADERS
    first_of_two = "-m statistic --mode nth --every 2 --packet 0"  # the retransmission gets through
    lose = f"iptables -A INPUT -p tcp -m length --length {length} {first_of_two} -j DROP" if lossy else "true"
    script = f'ip link set lo up && {lose} && exec "$0" -c "$1"'
    command = ["unshare", "--net", "sh", "-c", script, sys.executable, _RUN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    b = msgspec.json.decode(done.stdout, type=Breakdown)
    assert b.migration.result == "completed", done.stderr
    stall = next(w for w in b.wire or [] if w.bytes == length - HEADERS)
    if not lossy:
        assert stall.reason == "Nagle, delayed ACK"
        return
    assert stall.reason == "retransmission" and f"{length - HEADERS} B sent again, once" in stall.evidence
    assert stall.in_flight_ns > 150 * MS, "Linux waits 200 ms before it takes a segment for lost (TCP_RTO_MIN)"
