# SPDX-License-Identifier: Apache-2.0
"""Lockdown and AppArmor as the kernel writes them, and what doctor makes of it. The texts are from Debian's 6.1."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_mig.commands import confinement
from ebpf_mig.linux import procfs


@pytest.mark.parametrize(
    ("text", "state", "words"),
    [
        ("[none] integrity confidentiality\n", "ok", "none"),
        ("none [integrity] confidentiality\n", "ok", "integrity: BPF may read kernel memory"),
        ("none integrity [confidentiality]\n", "missing", "confidentiality: BPF may not read kernel memory"),
        (None, "ok", "not known: "),
    ],
)
def test_lockdown(text: str | None, state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "SECURITYFS", str(tmp_path))
    if text:
        (tmp_path / "lockdown").write_text(text)
    found = confinement.lockdown()
    assert found.state == state and found.fact.startswith(words)
    assert (found.remedy, found.required) == (
        ("boot with lockdown=integrity", True) if text and "[c" in text else ("", False)
    )


@pytest.mark.parametrize(
    ("enabled", "text", "fact"),
    [
        ("N\n", "", "not in force on this machine"),
        (None, "", "not in force on this machine"),
        ("Y\n", "unconfined\n", "unconfined"),
        ("Y\n", "docker-default (complain)\n", "docker-default (complain): nothing is refused"),
        ("Y\n", "docker-default (enforce)\n", "docker-default (enforce), which refuses nothing that was tried"),
    ],
)
def test_apparmor(enabled: str | None, text: str, fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "_APPARMOR", tmp_path / "enabled")
    monkeypatch.setattr(confinement, "_refused", lambda: "")
    if enabled:
        (tmp_path / "enabled").write_text(enabled)
    true_text = procfs.text

    def said(*parts: int | str) -> str:
        return text if parts == ("self", "attr", "current") else true_text(*parts)

    monkeypatch.setattr(procfs, "text", said)
    found = confinement.apparmor()
    assert (found.state, found.fact, found.required) == ("ok", fact, False)


def test_a_profile_that_refuses_has_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "_APPARMOR", tmp_path / "enabled")
    (tmp_path / "enabled").write_text("Y\n")
    monkeypatch.setattr(confinement, "_refused", lambda: "BPF programs")
    monkeypatch.setattr(procfs, "text", lambda *_: "cri-containerd.apparmor.d (enforce)\n")
    found = confinement.apparmor()
    assert (found.state, found.fact) == ("warn", "cri-containerd.apparmor.d (enforce) refuses BPF programs")
    assert "appArmorProfile: Unconfined" in found.remedy
