# SPDX-License-Identifier: Apache-2.0
"""Files shipped with the program: each passes its ecosystem's own checker and matches the metrics served."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from prometheus_client.exposition import generate_latest

import ebpf_mig
from ebpf_mig.cli import cli
from ebpf_mig.commands.exporter import command
from ebpf_mig.exporter.metrics import Metrics
from ebpf_mig.exporter.process_metrics import ProcessMetrics
from ebpf_mig.linux.capabilities import ENGINE
from tests.conftest import requires
from tests.unit.exporter.observations import observation, status

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "systemd" / "ebpf-mig-exporter.service"
BOOK = "https://github.com/ebpf-mig/ebpf-mig/blob/main/docs/runbook.md"
GIVEN_UP = {"CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"}


def served() -> set[str]:
    metrics = Metrics()
    metrics.build("1", "2")
    metrics.migration(observation())
    metrics.status(status())
    metrics.registry.register(ProcessMetrics(os.getpid()))
    return set(re.findall(r"^((?:ebpf_mig|process)_\w+)", generate_latest(metrics.registry).decode(), re.MULTILINE))


def recorded() -> set[str]:
    """Names of the series that the recording rules make."""
    return set(re.findall(r"record: (\S+)", (DEPLOY / "prometheus" / "ebpf-mig.rules.yml").read_text()))


def run(*command: str, cwd: Path = DEPLOY) -> tuple[int, str]:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


@requires("promtool")
def test_rules_are_valid_and_each_alert_fires_and_does_not() -> None:
    code, said = run("promtool", "check", "rules", "ebpf-mig.rules.yml", cwd=DEPLOY / "prometheus")
    assert code == 0, said
    code, said = run("promtool", "test", "rules", "ebpf-mig.test.yml", cwd=DEPLOY / "prometheus")
    assert code == 0, said
    alerts = re.findall(r"alert: (\w+)", (DEPLOY / "prometheus" / "ebpf-mig.rules.yml").read_text())
    tested = re.findall(r"alertname: (\w+)", (DEPLOY / "prometheus" / "ebpf-mig.test.yml").read_text())
    assert len(alerts) == 10 and set(alerts) == set(tested)


def test_rules_and_dashboard_name_only_metrics_that_are_served() -> None:
    known = served()
    for path in (DEPLOY / "prometheus" / "ebpf-mig.rules.yml", DEPLOY / "grafana" / "ebpf-mig.json"):
        named = set(re.findall(r"(?<![:\w])((?:ebpf_mig|process)_\w+)\s*[\[{ =)]", path.read_text()))
        assert named and named <= known, named - known
        used = set(re.findall(r"\b(?:migration|job|instance):ebpf_mig_[\w:]+", path.read_text()))
        assert used and used <= recorded(), used - recorded()


def test_the_dashboard_has_units_and_no_fixed_data_source() -> None:
    dashboard: dict[str, Any] = json.loads((DEPLOY / "grafana" / "ebpf-mig.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}" and panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        counts = panel["fieldConfig"]["defaults"]["unit"] == "short"
        assert not counts or panel["fieldConfig"]["defaults"]["decimals"] == 0
        increases = [target["expr"] for target in panel["targets"] if "increase(" in target["expr"]]
        assert all(text.startswith("round(") or ">=" in text for text in increases), "it shows fractions of migrations"
        assert all(target["expr"] and target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    for one in panels:
        a = one["gridPos"]
        assert a["x"] + a["w"] <= 24
        for other in panels:
            b = other["gridPos"]
            apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
            assert one is other or apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]


@requires("Grafana's schema (tools/grafana_dashboard)")
@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("", "", ""),
        ('"colorMode"', '"colourMode"', "unexpected field 'colourMode'"),
        ('"legendFormat"', '"legend"', "Dataquery: unexpected field 'legend'"),
        ('"instant": true', '"instant": "yes"', "panels[7].targets[0].instant: json: cannot unmarshal string"),
        ('"type": "heatmap"', '"type": "heat"', 'no panel of the kind "heat"'),
        ('"templating"', '"variables"', "unexpected field 'variables'"),
    ],
)
def test_the_dashboard_is_what_grafana_takes(right: str, wrong: str, said: str, tmp_path: Path) -> None:
    """Grafana's schema accepts the dashboard, each panel's options and each query, and it rejects a fault."""
    file = tmp_path / "dashboard.json"
    file.write_text((DEPLOY / "grafana" / "ebpf-mig.json").read_text().replace(right, wrong))
    code, heard = run("grafana-dashboard", str(file))
    assert code == bool(wrong) and said in heard, heard


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_each_alert_and_each_panel_has_its_section_in_the_runbook() -> None:
    page = (DEPLOY.parent / "docs" / "runbook.md").read_text()
    sections = {anchor(part.split("\n")[0]): part for part in re.split(r"^#+ ", page, flags=re.MULTILINE)[1:]}
    rules = (DEPLOY / "prometheus" / "ebpf-mig.rules.yml").read_text()
    alerts = re.findall(r"alert: (\w+)", rules)
    assert re.findall(r"runbook_url: (\S+)$", rules, re.MULTILINE) == [f"{BOOK}#{anchor(alert)}" for alert in alerts]
    for alert in alerts:
        section = sections[anchor(alert)]
        causes = re.findall(r"^(\d)\. ", section, re.MULTILINE)
        assert "Likely causes, in order:" in section and causes == [str(n + 1) for n in range(len(causes))] and causes
        assert re.search(r"^    (ssh NODE |curl |ebpf-mig )\S+", section, re.MULTILINE), f"{alert}: nothing to run"
    assert {name for name in sections if name.startswith("ebpfmig")} == set(map(anchor, alerts)), (
        "an alert that is gone"
    )
    dashboard = json.loads((DEPLOY / "grafana" / "ebpf-mig.json").read_text())
    links = [link["url"] for link in dashboard["links"]]
    for panel in dashboard["panels"]:
        assert [link["url"] for link in panel["links"]] == [f"{BOOK}#{anchor('Panel: ' + panel['title'])}"]
        links += [panel["links"][0]["url"]]
    links += re.findall(rf'"{re.escape(BOOK)}[^"]*"', json.dumps(dashboard))
    for link in links:
        assert link.strip('"').removeprefix(BOOK).lstrip("#") in {"", *sections}, link


def test_the_units_environment_file_has_every_option_with_its_default() -> None:
    unit = UNIT.read_text()
    assert "EnvironmentFile=-/etc/default/ebpf-mig-exporter\n" in unit
    assert "ExecStart=/usr/bin/ebpf-mig exporter\n" in unit, "an option there has priority over the file"
    given = dict(re.findall(r"^#(EBPF_MIG_\w+)=(.*)$", UNIT.with_suffix(".env").read_text(), re.MULTILINE))
    options = {str(param.envvar): param.name for param in command.params if param.envvar}
    assert list(given) == list(options)
    with mock.patch.dict(os.environ, {name: value for name, value in given.items() if value}):
        said = command.make_context("exporter", [], **cli.context_settings).params
    assert said == command.make_context("exporter", [], **cli.context_settings).params


def test_the_units_toml_file_has_every_key_with_its_default(tmp_path: Path) -> None:
    given = re.sub(r"^#(?=\S+ = )", "", UNIT.with_suffix(".toml").read_text(), flags=re.MULTILINE)
    file = tmp_path / "exporter.toml"
    file.write_text(given)
    variables = re.findall(r"^#EBPF_MIG_EXPORTER_(\w+)=", UNIT.with_suffix(".env").read_text(), re.MULTILINE)
    keys = re.findall(r"^(\S+) = ", given, re.MULTILINE)
    assert [re.sub(r"\W", "_", key).upper() for key in keys] == [name for name in variables if name != "CONFIG_FILE"]
    said = command.make_context("exporter", ["--config.file", str(file)], **cli.context_settings).params
    plain = command.make_context("exporter", [], **cli.context_settings).params
    assert said | {"web_config": said["web_config"] or None} == plain


@requires("systemd-analyze")
def test_the_unit_is_hardened() -> None:
    code, said = run("systemd-analyze", "security", "--no-pager", "--offline=true", "--threshold=30", str(UNIT))
    assert code == 0, said


def test_every_form_of_deployment_grants_what_the_exporter_keeps_and_gives_up() -> None:
    wanted = set(ENGINE) | GIVEN_UP
    unit = re.search(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert unit and set(unit[1].split()) == wanted
    pod = (DEPLOY / "kubernetes" / "daemonset.yaml").read_text()
    assert {f"CAP_{name}" for name in re.findall(r"^ +- ([A-Z_]+) +#", pod, re.MULTILINE)} == wanted
    said = (DEPLOY / "container" / "Containerfile").read_text()
    container = re.search(r"--cap-add=([A-Z_,]+)", said)
    assert container and {f"CAP_{name}" for name in container[1].split(",")} == wanted
    assert "Unconfined" not in pod and "--security-opt=seccomp=deploy/kubernetes/seccomp.json" in said


@requires("PyYAML")
def test_manifests_fit_together() -> None:
    import yaml

    directory = DEPLOY / "kubernetes"
    resources = yaml.safe_load((directory / "kustomization.yaml").read_text())["resources"]
    assert {path.name for path in directory.iterdir()} == {*resources, "kustomization.yaml", "seccomp.json"}
    pod = yaml.safe_load((directory / "daemonset.yaml").read_text())["spec"]["template"]["spec"]
    (container,), (first,) = pod["containers"], pod["initContainers"]
    mounts = [mount["name"] for mount in (*container["volumeMounts"], *first["volumeMounts"])]
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]} and len(mounts) == len(set(mounts))
    assert container["securityContext"]["privileged"] is False and pod["hostPID"] is True
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    profile = container["securityContext"]["seccompProfile"]["localhostProfile"]
    assert f"/var/lib/kubelet/seccomp/{profile}" == f"{paths['kubelet']}/seccomp.json"
    assert first["command"][2].endswith("/node/seccomp.json")
    template = yaml.safe_load((directory / "daemonset.yaml").read_text())["spec"]["template"]
    annotations = template["metadata"]["annotations"]
    assert annotations[f"container.apparmor.security.beta.kubernetes.io/{container['name']}"] == "unconfined"


def test_the_seccomp_profile_allows_only_what_is_listed() -> None:
    """What the kernel answers under it is tested in tests/integration/test_exporter_seccomp.py."""
    profile = json.loads((DEPLOY / "kubernetes" / "seccomp.json").read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    allowed = [name for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]]
    plain = [name for name in allowed if name != "socket"]
    assert len(plain) == len(set(plain))
    for name in ("mount", "ptrace", "unshare", "setns", "init_module", "keyctl", "io_uring_setup", "process_vm_readv"):
        assert name not in allowed
    same = DEPLOY / "helm" / "ebpf-mig" / "seccomp.json"
    assert same.read_text() == (DEPLOY / "kubernetes" / "seccomp.json").read_text(), "the chart needs its own copy"


@requires("kubernetes-validate", "PyYAML")
@pytest.mark.parametrize("version", ["1.28", "1.33", "1.37"])
def test_manifests_are_what_kubernetes_takes(version: str) -> None:
    import kubernetes_validate
    import yaml

    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        manifest = yaml.safe_load(path.read_text())
        if manifest["kind"] != "Kustomization":
            kubernetes_validate.validate(manifest, version, strict=True)
    misspelt = yaml.safe_load((DEPLOY / "kubernetes" / "daemonset.yaml").read_text())
    misspelt["spec"]["template"]["spec"]["containers"][0]["securityContext"]["privilegd"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, version, strict=True)


@requires("kustomize", "PyYAML")
def test_kustomize_builds_what_is_in_the_files() -> None:
    import yaml

    code, said = run("kustomize", "build", "kubernetes")
    assert code == 0, said
    built = list(yaml.safe_load_all(said))
    assert [one["kind"] for one in built] == ["Namespace", "ConfigMap", "DaemonSet"]
    assert built[1]["data"]["seccomp.json"] == (DEPLOY / "kubernetes" / "seccomp.json").read_text()
    assert all(one["metadata"].get("namespace", "ebpf-mig") == "ebpf-mig" for one in built)


def bundled(directory: Path, version: str, names: Iterable[str]) -> str:
    """Kubernetes' schemas of kubernetes-validate, each with its definitions inside, as kubeconform reads them."""
    import kubernetes_validate

    source = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{version}-local-strict"
    definitions = json.loads((source / "_definitions.json").read_text())["$defs"]
    for name in names:
        schema = json.loads((source / f"{name}.json").read_text()) | {"$defs": definitions}
        (directory / f"{name}.json").write_text(json.dumps(schema).replace("/api/_definitions.json#", "#"))
    return f"{directory}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"


KINDS = ["configmap-v1", "daemonset-apps-v1", "namespace-v1"]


def conform(directory: Path, text: str) -> tuple[int, str]:
    """What kubeconform says of manifests."""
    (directory / "built.yaml").write_text(text)
    place = bundled(directory, "1.37.0", KINDS)
    return run("kubeconform", "-strict", "-summary", "-schema-location", place, str(directory / "built.yaml"))


@requires("kustomize", "kubeconform", "kubernetes-validate")
def test_what_kustomize_builds_is_what_kubernetes_takes(tmp_path: Path) -> None:
    code, built = run("kustomize", "build", "kubernetes")
    assert code == 0, built
    code, said = conform(tmp_path, built)
    assert code == 0 and "Valid: 3" in said, said
    code, said = conform(tmp_path, built.replace("privileged: false", "privilegd: false"))
    assert code == 1 and "'privilegd' not allowed" in said


def rendered(*options: str, namespace: str = "ebpf-mig", name: str = "ebpf-mig") -> str:
    code, said = run("helm", "template", name, "helm/ebpf-mig", "-n", namespace, "--kube-version=1.33.0", *options)
    assert code == 0, said
    return said


@requires("helm", "kubeconform", "kubernetes-validate")
def test_the_chart_passes_lint_and_is_what_kubernetes_takes(tmp_path: Path) -> None:
    code, said = run("helm", "lint", "--strict", "helm/ebpf-mig")
    assert code == 0 and "0 chart(s) failed" in said, said
    options = ["--set=args={--keep-size,4GiB}", "--set=tolerations[0].operator=Exists", "--set=image.pullPolicy=Always"]
    for chosen in ([], options):
        code, said = conform(tmp_path, rendered(*chosen))
        assert code == 0 and "Valid: 2" in said, said
    code, said = run("helm", "lint", "--strict", "helm/ebpf-mig", "--set=prot=1")
    assert code == 1 and "prot" in said


@requires("helm", "kustomize", "PyYAML")
def test_the_chart_makes_the_daemon_set_of_kustomize() -> None:
    import yaml

    ours = {one["kind"]: one for one in yaml.safe_load_all(rendered()) if one}
    code, built = run("kustomize", "build", "kubernetes")
    assert code == 0, built
    theirs = {one["kind"]: one for one in yaml.safe_load_all(built)}
    assert ours["ConfigMap"]["data"] == theirs["ConfigMap"]["data"]
    # kustomize puts the profile's hash into the name of the ConfigMap, the chart into an annotation.
    hashed = theirs["ConfigMap"]["metadata"]["name"]
    expected = json.loads(json.dumps(theirs["DaemonSet"]).replace(hashed, "ebpf-mig-seccomp"))
    assert ours["DaemonSet"]["spec"]["template"]["metadata"]["annotations"].pop("checksum/seccomp")
    assert ours["DaemonSet"] == expected


@requires("helm", "PyYAML")
def test_the_charts_values_are_used_and_two_releases_do_not_meet() -> None:
    import yaml

    options = ["--set=port=9000", "--set=stateDirectory=/srv/mig", "--set=kubeletDirectory=/var/lib/k0s/kubelet"]
    text = rendered(*options, "--set=image.repository=r.example/m", "--set=image.tag=1.2", namespace="n", name="other")
    made = {one["kind"]: one for one in yaml.safe_load_all(text) if one}
    pod = made["DaemonSet"]["spec"]["template"]["spec"]
    (container,), (first,) = pod["containers"], pod["initContainers"]
    assert container["args"] == ["exporter", "--web.listen-address", ":9000"]
    assert container["ports"][0]["containerPort"] == 9000
    assert container["image"] == first["image"] == "r.example/m:1.2"
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    assert paths["state"] == "/srv/mig" and paths["kubelet"] == "/var/lib/k0s/kubelet/seccomp/other"
    assert container["securityContext"]["seccompProfile"]["localhostProfile"] == "other/seccomp.json"
    (profile,) = [volume["configMap"]["name"] for volume in pod["volumes"] if volume["name"] == "profile"]
    assert made["ConfigMap"]["metadata"] == {"name": profile, "namespace": "n"}


@requires("PyYAML")
def test_the_chart_has_the_programs_version() -> None:
    import yaml

    chart = yaml.safe_load((DEPLOY / "helm" / "ebpf-mig" / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == ebpf_mig.__version__
