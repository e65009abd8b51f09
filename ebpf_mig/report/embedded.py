# SPDX-License-Identifier: Apache-2.0
"""The style sheets and scripts that drawn reports embed. In: a file's name in `assets/`. Out: its text."""

from importlib.resources import files


def asset(name: str) -> str:
    """The text of the file."""
    return (files("ebpf_mig.report") / "assets" / name).read_text("utf-8")
