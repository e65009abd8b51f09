# SPDX-License-Identifier: Apache-2.0
"""The words in a recording that identify nobody, and that redaction therefore keeps.

In: a text and the meaning of its field. Out: whether it is such a word. A recording is untrusted, so each text is
checked, not just its field. An unknown text gets a stand-in, which costs the reader of a report one word.
"""

from __future__ import annotations

import re

from ebpf_mig.recording.meaning import Meaning

_MACHINES = frozenset({"x86_64", "aarch64", "arm64", "i686", "riscv64", "ppc64le", "s390x", "loongarch64"})
_ROLES = frozenset({"source", "destination", "unknown", "both", "least", "most"})
_REASONS = frozenset({
    "migrated", "failed", "cancelled", "duration", "interrupted", "target-died", "command-ended", "unknown", "done",
    "completed", "logging-ended", "handed-over", "lost-sight", "saved",
})  # fmt: skip
_SIGNALS = frozenset({
    "dirty-log", "vcpu", "state", "kick", "socket", "wire", "lock", "off-cpu", "retransmits", "hidden-sends",
    "brownout", "split", "samples", "pipe", "file", "exec", "exec-begin", "vcpu-inside", "async-faults",
    "vsock", "io-uring", "aio-sync", "shutdown",
})  # fmt: skip
_TCP_INFO = frozenset({
    "busy_time", "rwnd_limited", "sndbuf_limited", "total_retrans", "bytes_retrans", "bytes_acked", "bytes_sent",
    "notsent_bytes", "rtt", "min_rtt", "snd_cwnd", "snd_mss", "snd_wnd", "delivery_rate", "queued", "jiffy_us",
})  # fmt: skip
_MARKS = frozenset({
    "session.trigger", "session.closed", "session.ended", "session.neighbour", "session.forwarder", "session.keeper",
    "session.hop",
})  # fmt: skip
_WORDS = _MACHINES | _ROLES | _REASONS | _SIGNALS | _TCP_INFO | _MARKS

_FUNCTION = r"[a-z_][a-z0-9_]{0,126}(?:\.(?:isra|constprop|part|cold|llvm|\d+))*"
"""A function name in the style of the kernel. Names with capitals are few and listed."""
_CAPITALS = r"(?:entry_SYSCALL_64_after_hwframe|entry_SYSCALL_64|do_SYSCALL_64|do_IRQ|common_IRQ|ret_from_fork_asm)"
_SYMBOL = re.compile(rf"{_FUNCTION}|{_CAPITALS}|\[unknown\]", re.ASCII)
_LOSSES = r"recursion-misses|thread-table|missed-return|vcpu-sleep"
_PROBE = re.compile(rf"on_[a-z0-9_]{{1,60}}(?::(?:{_FUNCTION}))?|{_LOSSES}", re.ASCII)
_VERSION = re.compile(r"(?:(?:ebpf-mig|v) ?)?\d{1,6}(?:\.\d{1,6}){0,4}(?:rc\d{1,3}|-rc\d{1,3})?", re.ASCII)
_PACKAGED = re.compile(
    r"(\d{1,3}(?:\.\d{1,4}){1,3})(?:[-+.](?:\d{1,6}|rc\d+|deb\d+|bpo\d+|el\d+(?:_\d+)?|fc\d+|cloud|generic|rt|amd64|arm64"
    r"|x86_64|aarch64|default|lts|aws|azure|gcp|kvm|pve|v\d+))*",
    re.ASCII,
)
"""Version suffixes of distributions. Other builders add names of their own."""
_WAY = r"(?:fentry|kprobe|tracepoint|samples|iterator)(?:\+(?:fentry|kprobe|tracepoint|samples|iterator))?"
_TIER = re.compile(
    rf"{_WAY}(?: and {_WAY})?|absent(?:: on the (?:source|destination))?"
    r"(?:: (?:no such tracepoint|not hooked|not known))?"
)


def safe(meaning: Meaning, text: str, probes: frozenset[str], others: frozenset[str]) -> bool:
    """Whether a text is a word of that meaning that identifies nobody.

    `probes`: the kinds of records. `others`: additional words from the caller, for example those of VMMs.
    """
    match meaning:
        case Meaning.WORD:
            return text in _WORDS or text in others
        case Meaning.SYMBOL:
            return _SYMBOL.fullmatch(text) is not None
        case Meaning.PROBE:
            return text in probes or _PROBE.fullmatch(text) is not None
        case Meaning.VERSION:
            return _VERSION.fullmatch(text) is not None or _PACKAGED.fullmatch(text) is not None
        case Meaning.TIER:
            return _TIER.fullmatch(text) is not None
        case _:
            return False
