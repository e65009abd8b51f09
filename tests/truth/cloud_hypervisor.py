# SPDX-License-Identifier: Apache-2.0
"""The truth machine as Cloud Hypervisor: `python -m tests.truth.cloud_hypervisor ROLE PLAN`.

In: a role and a `ChPlan` as JSON. Out: a VMM with an API socket, an event monitor and a log in the plan's directory. It
migrates a real KVM guest by Cloud Hypervisor's protocol, with its order of ioctls, messages and threads, and with known
delays. It writes a file with the instants at which each phase began.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.truth import ch_api, ch_wire
from tests.truth.ch_api import Monitor, RefusedError
from tests.truth.ch_destination import ChDestination
from tests.truth.ch_parts import ChPlan, FailedError
from tests.truth.ch_source import ChSource
from tests.truth.parts import KICK, say


class Vmm:
    """The process: API, `vmm` thread and VM."""

    def __init__(self, role: str, plan: ChPlan) -> None:
        self.role, self.plan = role, plan
        self.monitor = Monitor(plan.path(f"{role}.events"), plan.path(f"{role}.log"))
        self.machine: ChSource | ChDestination | None = None
        self._work: queue.Queue[tuple[Callable[[], Any], queue.Queue[Any]]] = queue.Queue()
        if role == "source":
            self.machine = ChSource(plan, self.monitor)
        ch_api.Server(plan.path(f"{role}.api"), plan.manner, self.answer)

    def run(self) -> None:
        """The `vmm` thread: handles requests in turn."""
        while True:
            act, reply = self._work.get()
            try:
                reply.put(act())
            except RefusedError as error:
                reply.put(error)

    def answer(self, call: str, body: bytes) -> Any:
        """Answers a request. Runs on the `http-server` thread, which waits for the `vmm` thread."""
        calls: dict[str, Callable[[], Any]] = {
            "vmm.ping": lambda: ch_api.ping(self.plan.manner),
            "vm.info": self._info,
            "vm.send-migration": lambda: self._send(ch_api.read_body(self.plan.manner, call, body)),
            "vm.receive-migration": lambda: self._receive(ch_api.read_body(self.plan.manner, call, body)),
        }
        if call not in calls:
            raise RefusedError(404, "Not Found")
        reply: queue.Queue[Any] = queue.Queue()
        self._work.put((calls[call], reply))
        if isinstance(answer := reply.get(), RefusedError):
            raise answer
        return answer

    def _info(self) -> dict[str, Any]:
        if self.machine is None:
            raise RefusedError(500, "The VM info is not available", "VM is not created")
        return {"state": "Running", "memory_actual_size": 0, "config": {}}

    def _send(self, body: dict[str, Any]) -> None:
        if not isinstance(self.machine, ChSource):
            raise RefusedError(500, "Error starting migration sender", "VM is not running")
        if self.plan.manner == "v53":
            threading.Thread(target=self._migrate, args=(body["destination_url"], True), daemon=True).start()
        else:
            self._migrate(body["destination_url"], False)

    def _migrate(self, url: str, worker: bool) -> None:
        """Runs on a worker thread from v53 on, whose name is cut to 15 characters; on `vmm` in older versions."""
        assert isinstance(self.machine, ChSource)
        if worker:
            ctypes.CDLL(None).prctl(15, b"migration-worke")
        try:
            self.machine.send(url)
        except (FailedError, OSError, EOFError, ch_wire.AnsweredNoError) as error:
            self.machine.take_back()
            chain = [str(part) for part in error.args] if isinstance(error, FailedError) else [str(error)]
            if not worker:
                raise RefusedError(500, "Error starting migration sender", *chain) from error
            self.monitor.log(f"Migration failed: {': '.join(chain)}")
            return
        self._tell(fetched=self.machine.fetched)
        # The response to the send call must be sent before the process ends.
        threading.Timer(0.02, lambda: os._exit(0)).start()

    def _receive(self, body: dict[str, Any]) -> None:
        listener = ch_wire.listen(body["receiver_url"])
        if self.plan.manner == "v53":
            self.monitor.event("migration-receive-ready")
        connection, _ = listener.accept()
        listener.close()
        self.monitor.event("migration-receive-started")
        try:
            assert ch_wire.next_request(connection).command == ch_wire.START
            ch_wire.respond(connection)
            asked = ch_wire.next_request(connection)
            ch_wire.exactly(connection, asked.length)
            destination = ChDestination(self.plan, self.monitor)
            ch_wire.respond(connection)
            destination.receive(connection)
        except (FailedError, OSError, EOFError) as error:
            if self.plan.manner != "v53":
                return  # up to v52 an aborted receive call reports success
            chain = [str(part) for part in error.args] if isinstance(error, FailedError) else [str(error)]
            raise RefusedError(500, "Error receiving migration", *chain) from error
        self.machine = destination
        self.monitor.event("migration-receive-finished")
        self._tell()

    def _tell(self, **more: Any) -> None:
        """Writes the truth to a file for the harness, atomically."""
        assert self.machine is not None
        truth = {"marks": self.machine.marks, "injected": self.machine.injected, "checksum": self.machine.checksum()}
        new = Path(self.plan.path(f"{self.role}.new"))
        new.write_text(json.dumps(truth | more))
        new.rename(self.plan.path(f"{self.role}.truth"))


def encode(plan: ChPlan) -> str:
    """A plan as a command-line argument."""
    return json.dumps(asdict(plan))


def main(role: str, plan: ChPlan) -> None:
    """Serves until the source's migration has succeeded, or a line or EOF arrives on stdin."""
    sys.setswitchinterval(0.0001)
    signal.signal(KICK, lambda *_: None)
    vmm = Vmm(role, plan)
    threading.Thread(target=vmm.run, name="vmm", daemon=True).start()
    say("ready")
    sys.stdin.readline()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], ChPlan(**json.loads(sys.argv[2])))
