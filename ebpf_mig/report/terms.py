# SPDX-License-Identifier: Apache-2.0
"""What each phase, row and column of the HTML report means, for readers who do not know the words.

In: a phase's or a row's name, or the head of a column. Out: a button that carries its explanation, and the list of all
explanations that a page uses. The words are those of docs/concepts.md.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from ebpf_mig.breakdown import PhaseName
from ebpf_mig.report.rows import PHASE_WORDS
from ebpf_mig.report.schema import field_docs

_BLACKOUT = (
    "From the last vCPU's stop on the source to the first vCPU's start on the destination. No vCPU runs anywhere: "
    "this is the downtime that the guest sees."
)
TERMS: dict[str, str] = {
    "mostly": "The phase with the largest share of the downtime.",
    "because": "The cause that explains most of the downtime, and its evidence in the recording.",
    "not": "What people often suspect, and what took less than 5 % of this downtime.",
    "help": "What would make this downtime shorter.",
    "downtime": _BLACKOUT,
    "blackout": _BLACKOUT,
    "window": "From the pause request to the last vCPU's start. The phases partition it, to the nanosecond.",
    "total": "From the begin of the migration to its end.",
    "fetch": "The final dirty-log fetch: fetch.kernel and fetch.user together.",
    "phase": "A part of the window. Each instant belongs to exactly one phase.",
    "side": "src is the source, the host that the VM leaves; dst is the destination.",
    "share": "The part of the downtime. What lies outside of the downtime says before or after.",
    "dirty log": "KVM's list of pages that the guest has written to. The VMM reads it in each pass, and once more "
    "after the stop: the final fetch.",
    "longest ioctl": "The longest call of the final fetch.",
    "on CPU in ioctls": "What the final fetch did inside the kernel while it had a CPU.",
    "re-arming": "Write-protecting pages again in the final fetch. No vCPU runs any more, so this work is avoidable.",
    "brownout": "Time in which vCPUs were outside of guest code during pre-copy, next to the same time before logging.",
    "throttled": "The VMM slowed the guest down so that pre-copy can end. It is not part of the downtime.",
    "network": "How long sends were blocked, and how long bytes were on their way or lay unread.",
    "also waited": "Other threads that were off the CPU for 0.1 ms or more while the window lasted.",
    "off CPU": "Time in which a thread slept, or could run and had no CPU.",
    "cross-check": "What the VMM or another tool says about the same time, and why it differs.",
    "tracing": "What our own programs cost.",
    "manager": "The VMM was ready and waited for the program that manages it.",
    "postcopy": "The guest starts before all of its memory has arrived.",
    "page faults": "Memory that the guest touched before it was there: a vCPU waited until it came.",
    "pages from": "A userfaultfd handler, the file that is mapped there, or another source.",
    "minor": "Page faults that the kernel counted and that read nothing.",
    "major": "Page faults for which a file was read, or that were tried again after a wait.",
    "not seen": "Phases that did not occur or were not measured.",
    "clocks": "How far the clocks of two hosts can differ. Figures across hosts carry this bound.",
    "pause": "From the pause request to the last vCPU's stop.",
    "incomplete": "Events were lost, so figures can be too small.",
    "bounded": "A part was not traced, so the result covers only the rest.",
    "kick to stop": "From the pause request to the stop of this vCPU.",
    "stop at": "The return of the last KVM_RUN that ran guest code on the source.",
    "start at": "The entry of the first KVM_RUN that ran guest code on the destination.",
    "ioctl": "A call to KVM, by its kernel name without the prefix KVM_.",
    "slot": "The memslot: a range of guest memory that KVM knows by a number.",
    "lock waits": "Time in which the call waited for a lock of the kernel.",
    "inside": "The parts of the call: walk the page tables, flush the TLBs, copy the bitmap, and the rest.",
    "inside the ioctls": "The parts of the calls: walk the page tables, flush the TLBs, copy the bitmap, and the rest.",
    "pass": "One round of fetching the dirty log and sending the pages while the guest runs.",
    "kernel": "Time inside the dirty-log ioctls.",
    "user": "The VMM's work on the bitmap between these ioctls.",
    "whole pages, at most": "The most whole pages that fit into what was sent.",
    "dirty pages/s": "How many pages the guest wrote to per second before this pass.",
    "vCPUs out, longest": "The share of time in which vCPUs were outside of guest code, and the longest stretch.",
    "before logging": "The same before dirty logging was on, for comparison.",
    "TCP": "What limited TCP, as the kernel counts it: the receiver's window or the send buffer.",
    "blocked": "Time in which a send was off the CPU, since the socket took no more bytes.",
    "copying": "Time of a send or receive on the CPU.",
    "between": "The VMM's time between two calls.",
    "in calls": "Time inside of the calls.",
    "in flight": "From the end of the send to the begin of the receive.",
    "reason": "Why bytes were on their way for long.",
    "evidence": "What in the recording shows the reason.",
    "kernel stack, innermost first": "The functions of the kernel in which the thread slept.",
    "witness": "A measurement of the same thing by someone else: the VMM, the guest, another tool.",
    "logging": "KVM's dirty log was switched on or off.",
    "wish": "A change that was asked for with --what-if.",
    "95 % interval of the median": "The median lies in it with 95 % confidence (bootstrap).",
    "distribution": "A dot for each run, from the shortest to the longest of all; a line at the median.",
    "median": "Half of the runs took longer, half shorter.",
    "p95": "95 of 100 runs were shorter.",
    "noise": "How far the medians of two series like A differ by chance, 95 times in 100.",
    "p": "How likely ranks this far apart are if A and B do not differ.",
    "p corr": "The same probability, corrected for the number of figures, or of conditions (Holm).",
    "verdict": "Slower or faster only if chance and noise do not explain the change.",
}
"""Explanations by word. Columns carry their unit in the head; it is not part of the word."""
_USED = re.compile(r"aria-describedby='term-([^']+)'")


def _explanation(word: str) -> str | None:
    if word in PHASE_WORDS:
        phase = PhaseName(word)
        return f"{PHASE_WORDS[phase][0].upper()}{PHASE_WORDS[phase][1:]}. {field_docs(PhaseName)[phase.name]}"
    return TERMS.get(word)


def term(text: str) -> str:
    """The text for HTML; a button that explains it, if there is an explanation."""
    shown, word = html.escape(text), text.removesuffix(" ms")
    if _explanation(word) is None:
        return shown
    return f"<button type='button' class='term' aria-describedby='term-{_id(word)}'>{shown}</button>"


def plain(page: str) -> str:
    """HTML without these buttons, for a page without the list."""
    return re.sub(r"<button type='button' class='term'[^>]*>(.*?)</button>", r"\1", page)


def glossary(page: str) -> Iterator[str]:
    """The explanations that a page uses, as a list."""
    used = set(_USED.findall(page))
    words = [word for word in (*map(str, PhaseName), *TERMS) if _id(word) in used]
    if words:
        yield "<dl id='terms'>\n"
        for word in dict.fromkeys(words):
            about = html.escape(_explanation(word) or "")
            yield f"<dt>{html.escape(word)}</dt><dd id='term-{_id(word)}'>{about}</dd>\n"
        yield "</dl>\n"


def _id(word: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")
