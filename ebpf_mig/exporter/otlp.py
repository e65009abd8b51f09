# SPDX-License-Identifier: Apache-2.0
"""`--otlp-endpoint`: the listener sends each migration as OpenTelemetry spans.

In: `Trace`s. Out: OTLP over HTTP. OpenTelemetry's SDK batches and retries, and drops spans that cannot be delivered.
Needs the extra `ebpf-mig[otlp]`. Headers, certificates and time-outs are set by OpenTelemetry's environment variables,
OTEL_EXPORTER_OTLP_*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from ebpf_mig import __version__
from ebpf_mig.errors import PreflightError, UsageError
from ebpf_mig.exporter.otel_spans import Span, Trace
from ebpf_mig.linux.procfs import host_name
from ebpf_mig.text import printable

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
    from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, Tracer, set_span_in_context
except ImportError as error:
    raise PreflightError(f"--otlp-endpoint needs OpenTelemetry: {error}", "pip install 'ebpf-mig[otlp]'") from error

PATH = "/v1/traces"
TIMEOUT_S = 5
QUIT_MS = 3000
"""Milliseconds: how long queued spans may take to be sent when we end."""


def url_of(endpoint: str) -> str:
    """The URL for traces of an OTLP endpoint, as OpenTelemetry's specification builds it. UsageError if it is no
    URL.
    """
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good:
        raise UsageError(f"{printable(endpoint)!r} is not an OTLP endpoint", "e.g. http://127.0.0.1:4318")
    return endpoint if parts.path.endswith(PATH) else endpoint.rstrip("/") + PATH


class Sender:
    """Sends traces in the background. For one thread."""

    def __init__(self, endpoint: str, count: Callable[[bool, int], None]) -> None:
        """`count` is called with whether spans arrived, and how many."""
        self._ids = _Ids()
        resource = Resource.create(
            {"service.name": "ebpf-mig", "service.version": __version__, "host.name": host_name()}
        )
        self._provider = TracerProvider(id_generator=self._ids, resource=resource, shutdown_on_exit=False)
        exporter = _Counted(OTLPSpanExporter(url_of(endpoint), timeout=TIMEOUT_S), count)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000))
        self._tracer: Tracer = self._provider.get_tracer("ebpf-mig", __version__)

    def send(self, trace: Trace, vm: str) -> None:
        """Queues one host's part of a migration. `vm`: its name as metrics show it."""
        trace_id = int(trace.trace_id, 16)
        self._ids.next_trace, self._ids.next_span = trace_id, int(trace.span_id, 16) if trace.span_id else 0
        above = None
        if trace.parent_id:
            parent = SpanContext(trace_id, int(trace.parent_id, 16), True, TraceFlags(TraceFlags.SAMPLED))
            above = set_span_in_context(NonRecordingSpan(parent))
        root = self._tracer.start_span(trace.root.name, above, start_time=trace.root.begin_ns)
        root.set_attributes(trace.root.attributes | ({"ebpf_mig.vm": vm} if vm else {}))
        below = set_span_in_context(root)
        for span in trace.spans:
            self._child(span, below)
        root.end(trace.root.end_ns)

    def _child(self, span: Span, below: object) -> None:
        made = self._tracer.start_span(span.name, below, start_time=span.begin_ns)  # type: ignore[arg-type]
        made.set_attributes(span.attributes)
        made.end(span.end_ns)

    def close(self) -> None:
        """Tries once more to send what is queued."""
        self._provider.force_flush(QUIT_MS)
        self._provider.shutdown()


class _Ids(IdGenerator):
    """Random ids, unless the next one is set."""

    def __init__(self) -> None:
        self.next_trace = self.next_span = 0
        self._random = RandomIdGenerator()

    def generate_trace_id(self) -> int:
        """The id set for the next trace, else a random one."""
        taken, self.next_trace = self.next_trace, 0
        return taken or self._random.generate_trace_id()

    def generate_span_id(self) -> int:
        """The id set for the next span, else a random one."""
        taken, self.next_span = self.next_span, 0
        return taken or self._random.generate_span_id()


class _Counted(SpanExporter):
    """Counts spans that arrived, and spans that did not."""

    def __init__(self, inner: SpanExporter, count: Callable[[bool, int], None]) -> None:
        self._inner = inner
        self._count = count

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Sends a batch."""
        result = self._inner.export(spans)
        self._count(result is SpanExportResult.SUCCESS, len(spans))
        return result

    def shutdown(self) -> None:
        """Ends the connection."""
        self._inner.shutdown()
