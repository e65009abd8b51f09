# SPDX-License-Identifier: Apache-2.0
"""The shipped image while real VMs migrate; podman grants it only the rights that the DaemonSet grants.

EBPF_MIG_TEST_IMAGE names the image, e.g. localhost/ebpf-mig, which `tools/build-image` makes.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.linux.capabilities import ENGINE, NUMBERS
from tests.conftest import TRACING, requires
from tests.integration.exporters import OURS, children, free_port, is_ready, migrate, report, running, until, value
from tests.integration.migrations import LASTING
from tests.integration.test_exporter_life import capabilities

IMAGE = os.environ.get("EBPF_MIG_TEST_IMAGE", "")
pytestmark = [
    requires(*TRACING, "podman", "PyYAML", "private mount namespaces"),
    pytest.mark.skipif(not IMAGE, reason="missing feature: EBPF_MIG_TEST_IMAGE"),
]
MANIFEST = Path(__file__).parents[2] / "deploy" / "kubernetes" / "daemonset.yaml"
MOST_PROCESSES = 4096
PLAIN_CGROUPS = 'umount /sys/fs/cgroup/unified 2>/dev/null; exec "$@"'
"""crun works with cgroups of version 1 or 2, but not with both mounted, as on some hosts."""


def as_granted(pod: dict[str, Any], state: Path) -> list[str]:
    """The options of podman that match the manifest's pod and container."""
    (container,) = pod["containers"]
    granted = container["securityContext"]
    assert granted["privileged"] is False and pod["hostPID"] is True and granted["readOnlyRootFilesystem"] is True
    options = ["--pid=host", "--network=host", "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp"]
    options += ["--security-opt=no-new-privileges", f"--user={granted['runAsUser']}"]
    assert granted["seccompProfile"]["type"] == "Localhost"
    options.append(f"--security-opt=seccomp={MANIFEST.with_name('seccomp.json')}")
    options += [f"--cap-drop={name}" for name in granted["capabilities"]["drop"]]
    options += [f"--cap-add={name}" for name in granted["capabilities"]["add"]]
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    for mount in container["volumeMounts"]:
        if mount["name"] in paths:
            here = state if mount["name"] == "state" else paths[mount["name"]]
            options.append(f"--volume={here}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}")
    # podman's default limits are higher than some hosts allow.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return [*options, f"--ulimit=nofile={most}:{most}", f"--ulimit=nproc={MOST_PROCESSES}:{MOST_PROCESSES}"]


def test_the_image_measures_a_migration_with_what_the_daemon_set_grants(tmp_path: Path) -> None:
    import yaml

    pod = yaml.safe_load(MANIFEST.read_text())["spec"]["template"]["spec"]
    state, port, name = tmp_path / "state", free_port(), f"{OURS}exporter"
    state.mkdir()
    command = ["unshare", "--mount", "sh", "-c", PLAIN_CGROUPS, "sh"]
    command += ["podman", "run", "--rm", f"--name={name}", *as_granted(pod, state), IMAGE]
    command += ["exporter", "--web.listen-address", f"127.0.0.1:{port}", "--vm", f"{OURS}*"]
    with running(*command) as process:
        until(lambda: is_ready(port) or process.poll() is not None)
        assert process.poll() is None
        pid = int(subprocess.check_output(["podman", "inspect", "--format={{.State.Pid}}", name], text=True))
        assert Path(f"/proc/{pid}/root").stat().st_dev != Path("/").stat().st_dev, (
            "it has a root file system of its own"
        )
        assert "Seccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text(), "a filter"
        kept = sum(1 << NUMBERS[capability] for capability in ENGINE)
        watch = children(pid)["watch_process"]
        assert capabilities(watch)["CapEff"] == capabilities(watch)["CapBnd"] == kept
        migrate(LASTING)
        until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1, 15)
        (recording,) = state.iterdir()
        blackout = report(recording).blackout_ns
        assert blackout is not None and value(port, "ebpf_mig_blackout_seconds_sum") == blackout / 1e9
        assert value(port, "ebpf_mig_errors_total") == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
