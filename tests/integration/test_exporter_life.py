# SPDX-License-Identifier: Apache-2.0
"""The exporter's processes: their privileges, how they end, what they leave behind, and their overhead."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ebpf_mig.exporter.discovery import BUSY_TICKS
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.linux import procfs
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration
from tests.conftest import TRACING, requires
from tests.integration.exporters import (
    NAMED,
    OURS,
    PROGRAM,
    SETTLED_S,
    children,
    exporter,
    fetch,
    free_port,
    gone,
    migrate,
    quietly,
    report,
    running,
    until,
    value,
)
from tests.integration.migrations import LASTING

pytestmark = requires(*TRACING)
ENDLESS = Scenario(128 * MIB, 32 * MIB, 1000, bandwidth_bytes=1 << 20)
"""Dirties four times as much as the link carries: it lasts until the limit is lifted."""


def capabilities(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1], 16) for line in lines if line.startswith("Cap")}


def bpf_objects(pid: int) -> dict[str, set[int]]:
    """Ids of the BPF programs, maps and links that the process holds, from its fdinfo."""
    found: dict[str, set[int]] = {"prog": set(), "map": set(), "link": set()}
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            for line in info.read_text().splitlines():
                kind, _, number = line.partition("_id:")
                if kind in found:
                    found[kind].add(int(number))
    return found


def in_kernel(kind: str, number: int) -> bool:
    """Whether the kernel still has the object with this id. Asks through libbpf, as bpftool does."""
    lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    fd = getattr(lib, f"bpf_{kind}_get_fd_by_id")(ctypes.c_uint32(number))
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)


def resident_kb(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


def listening(pid: int) -> set[int]:
    """Inodes of the TCP sockets that the process holds and that listen."""
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    all_listening = {int(line.split()[9]) for line in lines if line.split()[3] == "0A"}
    links = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    return all_listening & {int(link[8:-1]) for link in links if link.startswith("socket:")}


def lift_limit(monitor: Path) -> None:
    """Lifts a QEMU's bandwidth limit, through a second monitor."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(monitor))
        with connection.makefile("rw") as stream:
            faster = {"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 1 << 30}}
            for command in ({"execute": "qmp_capabilities"}, faster):
                stream.write(json.dumps(command) + "\n")
                stream.flush()
                next(line for line in stream if "return" in json.loads(line))  # after the greeting, or an event


def test_no_process_has_more_than_it_needs_and_a_kill_leaves_nothing(tmp_path: Path) -> None:
    with exporter(tmp_path / "state") as (process, port):
        others = children(process.pid)
        assert set(others) == {"serve", "watch_process"}, "the loader has ended, and nothing is to be analysed"
        watch, listener = others["watch_process"], others["serve"]
        assert not any(capabilities(listener).values())
        status = Path(f"/proc/{listener}/status").read_text()
        assert "NoNewPrivs:\t1" in status and "Uid:\t65534\t65534\t65534\t65534" in status
        for pid in (process.pid, listener):
            assert not any(bpf_objects(pid).values()), "it inherited a descriptor that it does not need"
        for pid in (process.pid, *others.values()):
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert "LLVM" not in maps and "libbcc" not in maps
        assert not listening(watch) and listening(process.pid) == listening(listener)
        held = capabilities(watch)
        assert held["CapEff"] == held["CapBnd"] and not held["CapEff"] >> 21 & 1
        above = capabilities(process.pid)
        most = sum(1 << bit for bit in (2, 6, 7, 8, 19, 21, 24, 34, 38, 39))
        assert above["CapEff"] == above["CapBnd"] and not above["CapEff"] & ~most
        assert sum(map(resident_kb, (process.pid, *others.values()))) < 80_000
        objects = bpf_objects(watch)
        assert len(objects["prog"]) >= 8
        on_kvm = value(port, "ebpf_mig_trigger_info", trigger="logging")
        assert len(objects["link"]) == 3 + on_kvm, "the standing probes alone, that on KVM's own function among them"
        assert all(in_kernel(kind, number) for kind, numbers in objects.items() for number in numbers)
        process.kill()
        until(lambda: all(map(gone, others.values())))
        process.wait()
        until(lambda: not any(in_kernel(kind, number) for kind, numbers in objects.items() for number in numbers))
        with pytest.raises(OSError):
            fetch(f"http://127.0.0.1:{port}/metrics")


@pytest.mark.long
def test_one_that_is_killed_and_started_again_picks_up_and_one_that_is_terminated_keeps_what_it_saw(
    tmp_path: Path,
) -> None:
    state = tmp_path / "state"
    monitors = ["-qmp", f"unix:{tmp_path}/{{role}}.more,server=on,wait=off"]
    with QemuPair(ENDLESS, None, NAMED + monitors) as pair:
        time.sleep(SETTLED_S)
        with contextlib.closing(
            QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())
        ) as migration:
            migration.prepare()
            thread = threading.Thread(target=quietly, args=(migration,))
            with exporter(tmp_path / "killed") as (first, port):
                thread.start()
                until(lambda: value(port, "ebpf_mig_armed") == 1)
                first.kill()
            with exporter(tmp_path / "terminated") as (second, port):
                until(lambda: value(port, "ebpf_mig_armed") == 1)
                time.sleep(4)  # one VM must first send another more bytes than a VMM otherwise sends
                second.send_signal(signal.SIGTERM)
                assert second.wait(15) == 0
            with exporter(state) as (_, port):
                until(lambda: value(port, "ebpf_mig_armed") == 1)
                time.sleep(3)  # longer than a suspected migration is traced
                assert value(port, "ebpf_mig_armed") == 1
                lift_limit(tmp_path / "source.more")
                thread.join()
                until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1, 15)
                (kept,) = state.iterdir()
                blackout = report(kept).blackout_ns
                assert blackout is not None
                assert value(port, "ebpf_mig_blackout_seconds_sum") == blackout / 1e9
                assert value(port, "ebpf_mig_migrations_begin_missed_total") == 1
    (cut,) = (tmp_path / "terminated").iterdir()
    assert report(cut).migration.result == "unknown" and report(cut).blackout_ns is None
    assert not list((tmp_path / "killed").iterdir())


@pytest.mark.long
def test_one_that_starts_while_a_destination_is_loaded_has_its_half(tmp_path: Path) -> None:
    """Its multifd threads have been busy by then, and its vCPU has not: its guest has not run."""
    monitors = ["-qmp", f"unix:{tmp_path}/{{role}}.more,server=on,wait=off"]
    slow = Scenario(128 * MIB, 64 * MIB, 20_000, multifd_channels=2, bandwidth_bytes=20 << 20, downtime_ms=1)
    with (
        QemuPair(slow, None, ["-name", OURS + "{role},debug-threads=on", *monitors]) as pair,
        contextlib.closing(QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())) as migration,
    ):
        migration.prepare()
        thread = threading.Thread(target=quietly, args=(migration,))
        thread.start()
        pid = pair.destination.pid

        def loaded_ticks() -> int:
            loaders = [tid for tid in procfs.threads_of(pid) if procfs.comm(pid, tid).startswith("multifd")]
            return max((procfs.cpu_ticks(pid, tid) for tid in loaders), default=0)

        until(lambda: loaded_ticks() >= BUSY_TICKS, 60)
        with exporter(tmp_path / "state", vms="destination") as (_, port):
            until(lambda: value(port, "ebpf_mig_armed") == 1)
            lift_limit(tmp_path / "source.more")
            thread.join()
            until(lambda: value(port, "ebpf_mig_migrations_total", role="destination") == 1, 15)


@requires("bcrypt", "PyYAML")
def test_sighup_reads_the_web_configuration_again(tmp_path: Path) -> None:
    import bcrypt

    def secret(password: str) -> str:
        return bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()

    def status(password: str, page: str = "/metrics") -> int:
        url = f"http://127.0.0.1:{port}{page}"
        manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
        manager.add_password(None, url, "anna", password)
        opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(manager))
        try:
            with opener.open(url, timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def users(password: str) -> str:
        return f"basic_auth_users: {{anna: '{secret(password)}'}}\n"

    tmp_path.chmod(0o755)
    for above in tmp_path.parents[:2]:
        above.chmod(0o755)
    config, said, port = tmp_path / "web.yml", tmp_path / "said", free_port()
    config.write_text(users("first"))
    options = ["--web.listen-address", f"127.0.0.1:{port}", "--web.config.file", str(config)]
    options += ["--state-directory", str(tmp_path / "state"), "--vm", f"{OURS}*"]
    with said.open("w") as stderr, running(*PROGRAM, "exporter", *options, stderr=stderr) as process:
        until(lambda: status("first") == 200)
        assert status("second") == 401
        config.write_text(users("second"))
        process.send_signal(signal.SIGHUP)  # probably while it is still starting
        until(lambda: status("second") == 200)
        assert status("first") == 401
        until(lambda: status("second", "/-/ready") == 200)
        config.write_text(users("third"))
        process.send_signal(signal.SIGHUP)  # now that all privileges are dropped
        until(lambda: status("third") == 200)
        assert status("second") == 401
        config.write_text("basic_auth_userz: {}\n")
        process.send_signal(signal.SIGHUP)
        until(lambda: "the web configuration stays as it was" in said.read_text())
        assert status("third") == 200 and status("second") == 401 and process.poll() is None


@pytest.mark.long
@requires("OpenTelemetry")
@pytest.mark.parametrize(
    "collected",
    [False, pytest.param(True, marks=requires("otelcol"))],
    ids=["direct", "collector"],
)
def test_two_exporters_with_one_side_each_make_one_trace(collected: bool, tmp_path: Path) -> None:
    from tests.integration.otlp_receiver import attributes, collector, receiving

    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(receiving())
        endpoint = stack.enter_context(collector(tmp_path, receiver.endpoint)) if collected else receiver.endpoint
        option = ("--otlp-endpoint", endpoint)
        with (
            exporter(tmp_path / "here", *option, vms="source") as (_, here),
            exporter(tmp_path / "there", *option, vms="destination") as (_, there),
        ):
            migrate(LASTING)
            until(lambda: value(here, "ebpf_mig_migrations_total", role="source") == 1, 15)
            until(lambda: value(there, "ebpf_mig_migrations_total", role="destination") == 1, 15)
            until(lambda: len(receiver.named("migration")) == 2, 15)

            def sent() -> float:
                return sum(value(port, "ebpf_mig_exporter_spans_total", outcome="sent") for port in (here, there))

            until(lambda: len(receiver.spans) == sent() > 2)
    roots = {attributes(span)["ebpf_mig.role"]: span for span in receiver.named("migration")}
    source, destination = roots["source"], roots["destination"]
    assert source.trace_id == destination.trace_id and len(source.trace_id) == 16
    assert destination.parent_span_id == source.span_id and not source.parent_span_id
    assert {span.trace_id for span in receiver.spans} == {source.trace_id}
    found = report(next((tmp_path / "here").iterdir()))
    fetched = [s for s in receiver.named("fetch.kernel") if s.parent_span_id == source.span_id]
    assert sum(s.end_time_unix_nano - s.start_time_unix_nano for s in fetched) == found.phase_ns("fetch.kernel")
    loaded = receiver.named("state.load")
    assert loaded and {span.parent_span_id for span in loaded} == {destination.span_id}
    assert abs(source.end_time_unix_nano / 1e9 - time.time()) < 60
    assert attributes(source)["ebpf_mig.vm"] == f"{OURS}source"
    assert {resource["service.name"] for resource in receiver.resources} == {"ebpf-mig"}


@pytest.mark.long
@requires("OpenTelemetry")
def test_a_tracing_back_end_that_is_down_costs_spans_and_nothing_else(tmp_path: Path) -> None:
    with exporter(tmp_path / "state", "--otlp-endpoint", f"http://127.0.0.1:{free_port()}") as (process, port):
        migrate(LASTING)
        until(lambda: value(port, "ebpf_mig_migrations_total") == 1, 15)
        until(lambda: value(port, "ebpf_mig_exporter_spans_total", outcome="failed") > 0, 30)
        assert value(port, "ebpf_mig_blackout_seconds_count") == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@requires("setpriv")
def test_what_deploy_grants_is_enough(tmp_path: Path) -> None:
    unit = Path(__file__).parents[2] / "deploy" / "systemd" / "ebpf-mig-exporter.service"
    granted = re.search(r"^CapabilityBoundingSet=(.*)$", unit.read_text(), re.MULTILINE)
    assert granted
    names = ",".join("+" + name.removeprefix("CAP_").lower() for name in granted[1].split())
    confined = ["setpriv", f"--bounding-set=-all,{names}", "--inh-caps=-all", "--no-new-privs"]
    with exporter(tmp_path / "state", before=confined) as (process, port):
        assert capabilities(process.pid)["CapBnd"] == capabilities(process.pid)["CapEff"] != 0
        migrate(LASTING)
        until(lambda: value(port, "ebpf_mig_migrations_total", role="both", result="completed") == 1, 15)
        assert value(port, "ebpf_mig_errors_total") == 0 and value(port, "ebpf_mig_blackout_seconds_count") == 1
