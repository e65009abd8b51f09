# SPDX-License-Identifier: Apache-2.0
"""Draws docs/dashboard.png: the panels of the Grafana dashboard with data from a real Prometheus.

    python tools/dashboard_picture.py http://127.0.0.1:9090 MINUTES docs/dashboard.png

Needs matplotlib. The picture is not drawn by Grafana, but the layout, queries, legends and units are the dashboard's.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

DASHBOARD = Path(__file__).parents[1] / "deploy" / "grafana" / "ebpf-mig.json"
STEP_S = 5


def ask(server: str, path: str, **parameters: Any) -> list[dict[str, Any]]:
    """The result of one query."""
    url = f"{server}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310
        return list(json.load(answer)["data"]["result"])


def filled(text: str, seconds: int) -> str:
    """A panel's query with Grafana's variables filled in."""
    text = re.sub(r"\$(job|node|vmm)\b", ".+", text)
    return text.replace("$__rate_interval", "60s").replace("$__range", f"{seconds}s").replace("$__interval", "15s")


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    """The legend of a series in the panel."""
    pattern = target.get("legendFormat") or ", ".join(f"{k}={v}" for k, v in labels.items())
    return re.sub(r"{{\s*(\w+)\s*}}", lambda m: labels.get(m[1], ""), pattern)


def draw(axes: Any, panel: dict[str, Any], server: str, seconds: int) -> None:
    """Draws one panel."""
    axes.set_title(panel["title"], loc="left", fontsize=10)
    unit = {"s": 1e3, "percentunit": 100}.get(panel["fieldConfig"]["defaults"]["unit"], 1)
    end = time.time()
    if panel["type"] in ("stat", "table"):
        rows = []
        for target in panel["targets"]:
            for one in ask(server, "query", query=filled(target["expr"], seconds), time=end):
                name = legend(target, one["metric"])
                rows.append([name[:40], f"{float(one['value'][1]) * unit:.4g}{' ms' if unit == 1e3 else ''}"])
        axes.axis("off")
        if rows:
            axes.table(rows[:9], loc="upper center", edges="horizontal").scale(1, 1.3)
        return
    series = []
    for target in panel["targets"]:
        query = filled(target["expr"], seconds)
        for one in ask(server, "query_range", query=query, start=end - seconds, end=end, step=STEP_S):
            points = [(float(at) - end, float(value) * unit) for at, value in one["values"]]
            series.append((legend(target, one["metric"]), [p for p in points if p[1] == p[1]]))
    if panel["type"] == "heatmap":
        edges = {name: dict(points) for name, points in series}
        order = sorted(edges, key=float)
        times = sorted({at for points in edges.values() for at in points})
        below = [[0.0] * len(times), *([edges[name].get(at, 0) for at in times] for name in order)]
        cells = [[up - low for low, up in zip(one, two, strict=True)] for one, two in itertools.pairwise(below)]
        axes.imshow(cells, aspect="auto", origin="lower", cmap="Oranges", extent=(times[0], times[-1], 0, len(order)))
        axes.set_yticks(range(1, len(order) + 1), [f"{float(n) * 1e3:g} ms" for n in order], fontsize=6)
        return
    for name, points in sorted(series, key=lambda one: one[0]):
        axes.plot(*zip(*points, strict=True), label=name, lw=1.2) if points else None
    axes.grid(alpha=0.3)
    axes.set_ylabel({1e3: "ms", 100: "%"}.get(unit, ""), fontsize=7)
    axes.tick_params(labelsize=7)
    if 0 < len(series) <= 14:
        axes.legend(fontsize=6, ncol=2, loc="upper left")


def main(server: str, minutes: str, output: str) -> None:
    """Draws all panels at their places in the dashboard."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = plt.figure(figsize=(13, height * 0.42))
    for panel in panels:
        at = panel["gridPos"]
        place = (at["x"] / 24 + 0.035, 1 - (at["y"] + at["h"]) / height + 0.03)
        size = (at["w"] / 24 - 0.05, at["h"] / height - 0.065)
        draw(figure.add_axes((*place, *size)), panel, server, int(float(minutes) * 60))
    figure.savefig(output, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
