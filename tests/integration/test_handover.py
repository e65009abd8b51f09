# SPDX-License-Identifier: Apache-2.0
"""One process loads the probes; another, without the privilege to load, attaches them again and again. All tiers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from ebpf_mig.linux import kvm
from tests.conftest import FEATURES, requires

SCRIPT = """
import collections, json, os, socket, time
from ebpf_mig.linux import capabilities
from ebpf_mig.exporter.loader_process import load_apart
from ebpf_mig.probes import selftest

node, tracer = load_apart()
capabilities.keep_only(capabilities.ENGINE)
ours = os.getpid()
rounds = []
for _ in range(3):
    tracer.arm()
    tracer.add(ours)
    selftest.fire_all()
    tracer.remove(ours)
    seen = collections.Counter()
    for event in tracer.poll(0):
        seen[type(event).__name__ + (":" + hex(event.cmd) if hasattr(event, "cmd") else "")] += 1
        if type(event).__name__ == "Transfer":
            seen[f"bytes {event.direction}"] += event.bytes
    tracer.disarm()
    selftest.fire_all()
    rounds.append(seen)
signs = [sign.kind for sign in node.poll(200) if sign.pid == ours]
said = {"signs": signs, "trigger": node.trigger, "attached": tracer.attached}
print(json.dumps(said | {"rounds": rounds, "lost": tracer.losses()[0]}))
"""


@pytest.mark.everywhere("tiers")
@pytest.mark.parametrize("tier", ["tracepoint", "kprobe", "fentry", "auto"])
@requires("root", "/dev/kvm", "bcc", "kernel BTF")
def test_what_was_handed_over_attaches_again_and_again(
    tier: str, record_property: Callable[[str, object], None]
) -> None:
    """The process that received the descriptors traces itself three times, and each time sees all of its own calls."""
    needs = {"kprobe": "kprobes", "fentry": "fentry on every function"}
    if tier in needs and not FEATURES[needs[tier]]():
        pytest.skip(f"missing feature: {needs[tier]}")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True, text=True, timeout=600, check=False, env=os.environ | {"EBPF_MIG_TIER": tier},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    if tier != "auto":
        assert said["attached"]["vcpu"] == said["attached"]["socket"] == tier
    else:
        record_property("attach", json.dumps(said["attached"]))
    first = said["rounds"][0]
    record_property(f"calls by {tier}", json.dumps(first))
    for cmd in (kvm.GET_DIRTY_LOG, kvm.CLEAR_DIRTY_LOG, kvm.CREATE_VM, kvm.CREATE_VCPU):
        assert first[f"Ioctl:{cmd:#x}"] >= 1, first
    machines = 1 + first.get(f"Ioctl:{kvm.RESET_DIRTY_RINGS:#x}", 0)  # Linux before 5.11 has no dirty ring
    assert first["VcpuExit"] == first["VcpuEnter"] == machines, "KVM_RUN returned -EINTR in each VM"
    assert first["Kick"] == 1
    for seen in said["rounds"]:
        for kind in ("Kick", "VcpuExit", "VcpuEnter", *(name for name in first if name.startswith("Ioctl"))):
            assert seen[kind] == first[kind], kind
    assert said["lost"] == {}
    functions = FEATURES["kprobes"]() or FEATURES["fentry on every function"]()
    assert said["trigger"] == ("logging" if functions else "signs")
    assert said["signs"].count("logging") == (6 if functions else 0), "once for each VM that is logged"
