# SPDX-License-Identifier: Apache-2.0
"""The link's use by the sequence numbers of segments, of which the kernel does not report all."""

from __future__ import annotations

import msgspec

from ebpf_mig.analysis import bandwidth
from ebpf_mig.analysis.bandwidth import LinkUse
from ebpf_mig.collector import analyse
from ebpf_mig.recording import events as ev
from tests.unit.analysis.test_whatif import migration
from tests.unit.script import Script, at

FIRST = (1 << 32) - 3_000_000
"""The stream wraps within the last pages."""


def numbered(script: Script, first: int = FIRST) -> Script:
    """The same migration with sequence numbers, all in order."""
    reached = first
    for index, one in enumerate(script.vms[1].events):
        if isinstance(one, ev.Segment):
            seq = reached % (1 << 32)
            script.vms[1].events[index] = msgspec.structs.replace(one, seq=seq, received=seq)
            reached += one.payload
    return script


def used(script: Script) -> LinkUse:
    found = bandwidth.observe(analyse(script.recording).traced)
    assert not isinstance(found, str), found
    return found


def without_some(script: Script) -> Script:
    """Of the last third of the pages, only each fourth segment was reported."""
    events = script.vms[1].events
    late = [e for e in events if isinstance(e, ev.Segment)][41:-1]
    script.vms[1].events = [e for e in events if e not in late or late.index(e) % 4 == 3]
    return script


def test_numbers_give_what_payloads_give() -> None:
    assert used(numbered(migration())) == used(migration())


def test_segments_that_were_not_reported_do_not_make_the_link_uneven() -> None:
    """Without numbers, the missing bytes are spread over all others, and so some arrive before they were sent."""
    whole, some = used(numbered(migration())), used(without_some(numbered(migration())))
    assert some.limited == whole.limited and some.limited_bytes == whole.limited_bytes
    assert some.steadiness > 0.6
    assert used(without_some(migration())).steadiness < 0.4


def test_a_segment_out_of_order_counts_once_the_one_before_it_is_there() -> None:
    script = numbered(migration(), first=1000)
    late, early = [e for e in script.vms[1].events if isinstance(e, ev.Segment)][10:12]
    swapped = [
        msgspec.structs.replace(early, at_ns=late.at_ns, received=late.received),
        msgspec.structs.replace(late, at_ns=early.at_ns),
    ]
    found = [one.payload for one in bandwidth._arrivals([late, *swapped])]
    assert found[1] == 0, "its bytes are not in order"


def test_what_has_arrived_and_is_not_read() -> None:
    """Of 6 MB that arrive from 2.5 to 61.5 ms, the destination reads all at the end."""
    ((begin, end),) = used(numbered(migration())).unread
    assert (begin, end) == (at(2500), at(61_510))


def test_what_is_read_as_it_arrives_is_never_unread() -> None:
    script = numbered(migration())
    destination = script.vms[1]
    whole = next(e for e in destination.events if isinstance(e, ev.Transfer) and e.bytes > 5_000_000)
    destination.events.remove(whole)
    late = [e for e in destination.events if isinstance(e, ev.Segment) and at(2000) < e.at_ns < at(62_000)]
    for one in late:
        destination.receive(0, (one.at_ns - at(0)) // 1000 + 1, one.payload, socket=80)
    assert sum(e - b for b, e in used(script).unread) <= len(late) * 1000


def test_what_was_not_reported_at_the_end_does_not_seem_unread_before() -> None:
    """The last segments of the pages are missing, so their bytes seem to have come before the first segment."""
    script = numbered(migration())
    destination = script.vms[1]
    whole = next(e for e in destination.events if isinstance(e, ev.Transfer) and e.bytes > 5_000_000)
    destination.events.remove(whole)
    pages = [e for e in destination.events if isinstance(e, ev.Segment) and at(2000) < e.at_ns < at(62_000)]
    for one in pages:
        destination.receive(0, (one.at_ns - at(0)) // 1000 + 1, one.payload, socket=80)
    destination.events = [e for e in destination.events if not (isinstance(e, ev.Segment) and e.at_ns > at(60_000))]
    assert sum(e - b for b, e in used(script).unread) <= len(pages) * 1000
