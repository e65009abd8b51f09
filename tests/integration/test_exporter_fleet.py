# SPDX-License-Identifier: Apache-2.0
"""A fleet of two nodes: two network namespaces, an exporter in each that sees its side only, and one real Prometheus.

VMs migrate from one to the other. The shipped rules are loaded, sped up: see `FASTER`. Each alert fires, and each query
of the dashboard is answered. When each alert must not fire is held by `promtool test rules`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ebpf_mig.analysis.parts import Parts, observe
from ebpf_mig.collector import analyse
from ebpf_mig.lab.netns import ADDRESSES, Link
from ebpf_mig.lab.scenario import MIB, Scenario
from ebpf_mig.recording.file import read_recording
from ebpf_mig.vmm.qemu.lab import QemuPair
from ebpf_mig.vmm.qemu.migration import QemuMigration
from tests.conftest import TRACING, requires
from tests.integration.exporters import NAMED, OURS, PROGRAM, fetch, quietly, running, until
from tests.integration.migrations import LASTING

pytestmark = requires(*TRACING, "prometheus")
ROOT = Path(__file__).parents[2]
PORT = 9974
FASTER = (
    (r"\[1[hd]\]", "[1m]"),
    (r"offset 7d", "offset 2s"),
    (r"for: \w+", "for: 1s"),
    (r">= (2|5|10|20)\b", ">= 1"),
    (r"> 0\.3\b", "> 0.0001"),
    (r"> 2 \*", "> 0.01 *"),
    (r"share_1h > 0\.5", "share_1h > 0.000001"),
    (r"ratio_1h > 0\.[25]", "ratio_1h > 0.1"),
    (r"> 0\.001\b", "> -10"),
    (r"(\[1m\]\)+) > 0$", r"\1 >= 0"),
    (r"== 0 or ebpf_mig_probe_attached == 0", ">= 0"),
)
"""Windows, waits and thresholds of the rules that the test cannot wait for or provoke. Names and joins stay."""
ALWAYS = {"EbpfMigIncomplete", "EbpfMigProbesDetached"}
"""Alerts that fire with these changes as soon as an exporter answers."""


class Fleet:
    """Two nodes with an exporter each, and a Prometheus on the source's node."""

    def __init__(self, link: Link, directory: Path, stack: contextlib.ExitStack) -> None:
        self.link = link
        self.directory = directory
        self.exporters: dict[str, subprocess.Popen[str]] = {}
        for role, address in ADDRESSES.items():
            options = ["--web.listen-address", f"{address}:{PORT}", "--state-directory", str(directory / role)]
            with link.inside(role):
                self.exporters[role] = stack.enter_context(
                    running(*PROGRAM, "exporter", *options, "--vm", f"{OURS}{role}")
                )
        for role in ADDRESSES:
            until(lambda role=role: self.page(role, "/-/ready") == "ready\n")  # type: ignore[misc]
        targets = ", ".join(f"'{address}:{PORT}'" for address in ADDRESSES.values())
        rules = (ROOT / "deploy/prometheus/ebpf-mig.rules.yml").read_text()
        for pattern, faster in FASTER:
            rules, changed = re.subn(pattern, faster, rules, flags=re.MULTILINE)
            assert changed, pattern
        (directory / "rules.yml").write_text(rules)
        (directory / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [rules.yml]\n"
            f"scrape_configs: [{{job_name: fleet, static_configs: [{{targets: [{targets}]}}]}}]\n"
        )
        command = ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/tsdb"]
        command += ["--web.listen-address=127.0.0.1:9090", "--enable-feature=exemplar-storage", "--log.level=error"]
        with link.inside("source"):
            stack.enter_context(running(*command))

    def stop(self, role: str) -> None:
        """Ends an exporter."""
        self.exporters.pop(role).terminate()

    def page(self, role: str, path: str) -> str:
        with contextlib.suppress(OSError), self.link.inside(role):
            return fetch(f"http://{ADDRESSES[role]}:{PORT}{path}")
        return ""

    def value(self, role: str, series: str) -> float:
        found = re.search(rf"^{re.escape(series)} (\S+)$", self.page(role, "/metrics"), re.MULTILINE)
        return float(found[1]) if found else -1

    def ask(self, path: str, **parameters: Any) -> Any:
        with contextlib.suppress(OSError), self.link.inside("source"):
            url = f"http://127.0.0.1:9090/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
            return json.loads(fetch(url))["data"]
        return {}

    def query(self, text: str) -> list[Any]:
        return list(self.ask("query", query=text).get("result", []))

    def firing(self) -> set[str]:
        found = self.query('ALERTS{alertstate="firing"}')
        return {one["metric"]["alertname"] for one in found}

    def settled(self) -> None:
        """Both VMs are known, and no longer suspected because they are new."""
        for role in self.exporters:
            until(lambda role=role: self.value(role, "ebpf_mig_vms") == 1)  # type: ignore[misc]
            until(lambda role=role: self.value(role, "ebpf_mig_armed") == 0)  # type: ignore[misc]

    @contextlib.contextmanager
    def migration(self, scenario: Scenario) -> Iterator[tuple[QemuPair, QemuMigration]]:
        with QemuPair(scenario, None, NAMED, link=self.link) as pair:
            self.settled()
            driver = QemuMigration(pair.source.qmp, pair.destination.qmp, pair.uri, pair.options())
            with contextlib.closing(driver) as migration:
                migration.prepare()
                yield pair, migration
        for role in self.exporters:
            until(lambda role=role: self.value(role, "ebpf_mig_vms") == 0)  # type: ignore[misc]

    def migrate(self, scenario: Scenario) -> None:
        before = {role: self.completed(role) for role in self.exporters}
        with self.migration(scenario) as (_, migration):
            assert migration.run(60).result == "completed"
            for role in self.exporters:
                until(lambda role=role: self.completed(role) == before[role] + 1)  # type: ignore[misc]

    def completed(self, role: str) -> float:
        return self.value(role, f'ebpf_mig_migrations_total{{result="completed",role="{role}",vmm="qemu"}}')

    def fail(self) -> None:
        """The destination is killed while the source still sends."""
        slow = Scenario(128 * MIB, 16 * MIB, 20_000, bandwidth_bytes=8 << 20)
        with self.migration(slow) as (pair, migration):
            thread = threading.Thread(target=quietly, args=(migration,))
            thread.start()
            until(lambda: self.value("source", "ebpf_mig_armed") == 1)
            time.sleep(1)
            os.kill(pair.destination.pid, signal.SIGKILL)
            thread.join()

    def parts(self, role: str) -> list[Parts]:
        kept = sorted((self.directory / role).glob("*.rec"))
        found = [analyse(read_recording(path)) for path in kept]
        return [observe(one.traced, one.attribution) for one in found]


def panels() -> list[tuple[str, str]]:
    """(panel, query) pairs of the shipped dashboard, with Grafana's variables filled in and one migration enough."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "ebpf-mig.json").read_text())
    found = []
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            text = re.sub(r"\$(job|node|vmm)\b", ".+", target["expr"])
            text = re.sub(r"\$__(rate_interval|range|interval)\b", "1m", text)
            assert "$" not in text
            found.append((panel["title"], re.sub(r">= (5|10)\b", ">= 1", text)))
    return found


@pytest.mark.long
@pytest.mark.timeout(240)
def test_two_nodes_give_one_blackout_and_every_alert_and_panel_has_its_data(tmp_path: Path) -> None:
    begin = time.time()
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(Link())
        fleet = Fleet(link, tmp_path, stack)
        until(lambda: len(fleet.query("up == 1")) == 2)
        until(lambda: fleet.firing() >= ALWAYS)
        assert fleet.firing() == ALWAYS, "nothing has happened yet"

        fleet.migrate(LASTING)
        fleet.migrate(LASTING)
        assert fleet.query("sum(ebpf_mig_blackout_seconds_count)")[0]["value"][1] == "0", "it has two sides"
        (first, *_), (arrived, *_) = fleet.parts("source"), fleet.parts("destination")
        assert first.stop and arrived.start and first.source_ns and arrived.destination_ns
        joined = until(
            lambda: (
                len(fleet.query("migration:ebpf_mig_blackout_seconds")) == 2
                and fleet.query("sort(migration:ebpf_mig_blackout_seconds)")
            )
        )
        truth = sorted(
            (there.start - here.stop) / 1e9
            for here, there in zip(fleet.parts("source"), fleet.parts("destination"), strict=True)
            if there.start and here.stop
        )
        assert [float(one["value"][1]) for one in joined] == pytest.approx(truth, abs=1e-4)
        least = fleet.query("migration:ebpf_mig_blackout_seconds - migration:ebpf_mig_blackout_seconds:least")
        assert len(least) == 2 and all(float(one["value"][1]) >= 0 for one in least)
        until(lambda: not fleet.query("job:ebpf_mig_migrations_not_joined:ratio_1h"))

        for title, text in panels():
            assert until(lambda text=text: fleet.query(text)), title  # type: ignore[misc]
        rows = fleet.query(next(text for title, text in panels() if title == "Last migrations"))
        assert {row["metric"]["role"] for row in rows} == set(ADDRESSES) and len(rows) == 4
        recordings = {path.name for role in ADDRESSES for path in (tmp_path / role).iterdir()}
        assert {row["metric"]["recording"] for row in rows} == recordings
        window = {"start": begin, "end": time.time()}
        exemplars = fleet.ask("query_exemplars", query="ebpf_mig_downtime_part_seconds_bucket", **window)
        named = [exemplar["labels"] for series in exemplars for exemplar in series["exemplars"]]
        assert named and {one["recording"] for one in named} <= recordings
        assert {one["migration"] for one in named} == {row["metric"]["migration"] for row in rows}

        quiet = {"EbpfMigMigrationsFailing", "EbpfMigHalvesNotJoined", "EbpfMigExporterDown"}
        alerts = set(re.findall(r"alert: (\w+)", (tmp_path / "rules.yml").read_text()))
        until(lambda: fleet.firing() >= alerts - quiet)
        assert fleet.firing() == alerts - quiet, "these three need a reason"
        fleet.fail()
        until(lambda: "EbpfMigMigrationsFailing" in fleet.firing())
        fleet.stop("destination")
        until(lambda: "EbpfMigExporterDown" in fleet.firing())
        fleet.migrate(LASTING)
        until(lambda: "EbpfMigHalvesNotJoined" in fleet.firing())
