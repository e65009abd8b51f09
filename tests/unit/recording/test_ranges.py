# SPDX-License-Identifier: Apache-2.0
"""Every integer of a recording has a range. A value outside it is damage: reported once, used in no figure."""

import io
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest

from ebpf_mig.collector import analyse
from ebpf_mig.errors import RecordingError
from ebpf_mig.recording.events import Event, Header
from ebpf_mig.recording.file import RecordingReader, RecordingWriter, read_recording
from ebpf_mig.recording.kinds import BY_TYPE, KINDS, ranges
from ebpf_mig.report import json
from tests.unit.recording.samples import STRUCTS, filled

DATA = Path(__file__).parents[2] / "data"
LEAST, MOST = -(1 << 63), (1 << 64) - 1


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda s: s.__name__)
def test_every_integer_has_a_range(struct: type[msgspec.Struct]) -> None:
    hints = get_type_hints(struct)
    numbers = {name for name, hint in hints.items() if hint is int or int in get_args(hint)}
    assert numbers == set(ranges(struct))


def written(*events: Event) -> bytes:
    stream = io.BytesIO()
    with RecordingWriter(stream, Header()) as writer:
        writer.write_many(events)
    return stream.getvalue()


def put(event: Event, field: str, value: int) -> Event:
    """The event with this value in a field, or as the only item of it."""
    was = getattr(event, field)
    new = {"x": value} if isinstance(was, dict) else (value,) if isinstance(was, tuple) else value
    return msgspec.structs.replace(event, **{field: new})


FIELDS = [(kind.event, name) for kind in KINDS for name in kind.ranges]


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=lambda x: getattr(x, "__name__", x))
def test_what_is_out_of_range_is_damage_and_the_rest_is_read(kind: type[Event], field: str) -> None:
    good = filled(kind, "x")
    found = BY_TYPE[kind].ranges[field]
    wrong = [put(good, field, value) for value in (found.least - 1, found.most + 1) if LEAST <= value <= MOST]
    edges = [put(good, field, found.least), put(good, field, found.most)]
    recording = read_recording(written(good, *wrong, *edges, good))
    assert recording.events == [good, *edges, good]
    if wrong:
        assert recording.truncated and recording.reason.count("damaged") == 1
        assert f"left out: {len(wrong)}" in recording.reason


def test_a_header_out_of_range_is_refused() -> None:
    for wrong in (Header(page_size=-1), Header(begin_ns=-1), Header(begin_ns=MOST)):
        stream = io.BytesIO()
        RecordingWriter(stream, wrong).close()
        with pytest.raises(RecordingError, match="header"):
            read_recording(stream.getvalue())


def test_events_at_the_edges_of_their_ranges_make_a_report() -> None:
    """No sum of such values overflows, and no duration or count is negative."""
    for edge in ("least", "most"):
        events = []
        for kind in KINDS:
            event = filled(kind.event, "x")
            changes = {name: getattr(found, edge) for name, found in kind.ranges.items() if name not in ("pid", "tid")}
            events += [put(event, name, value) for name, value in changes.items()] * 3
        recording = read_recording(written(*events))
        assert not recording.reason
        header = filled(Header, "x")
        for one in (header, msgspec.structs.replace(header, remote=None)):
            json.render(analyse(msgspec.structs.replace(recording, header=one)).breakdown)


@pytest.mark.parametrize("file", sorted(DATA.rglob("*.rec")), ids=lambda f: f.stem)
def test_recordings_of_earlier_versions_are_within(file: Path) -> None:
    with RecordingReader(file) as reader:
        assert sum(map(len, reader.blocks())) > 50
    assert "damaged" not in reader.reason
