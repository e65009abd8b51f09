# SPDX-License-Identifier: Apache-2.0
"""Dropping privileges is final, and some things must still work afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import ebpf_mig
from tests.conftest import requires

SCRIPT = """
import os, sys
from ebpf_mig.linux import capabilities
capabilities.become_nobody()
assert not os.access(sys.argv[1], os.R_OK | os.X_OK), "the place itself stays closed"
import ebpf_mig.exporter.messages, ebpf_mig.collector
print(os.getuid(), capabilities.permitted())
"""


@requires("root")
def test_nobody_imports_from_where_only_root_may_look(tmp_path: Path) -> None:
    """As in a clone under /root, whose directory nobody else can enter."""
    closed = tmp_path / "closed"
    shutil.copytree(Path(ebpf_mig.__file__).parent, closed / "ebpf_mig")
    closed.chmod(0o700)
    command = [sys.executable, "-c", SCRIPT, str(closed)]
    environment = dict(os.environ, PYTHONPATH=str(closed), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "65534 0\n"), done.stderr
