"""What a server measures, for Prometheus.

The names and buckets are vLLM's where they mean the same, so that boards work. A job is measured by
its `Meter`: from being taken to its last event. What the engine counts itself is asked of it when a
page is made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsv4.serve.jobs import Event, Finish, Job, Stats

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LATENCIES = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
_FIRST = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_BETWEEN = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_FAST = (0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.015, 0.025, 0.05, 0.1)


def _tokens(most: int) -> list[float]:
    """1-2-5 per decade up to `most`."""
    edges = (mantissa * 10**power for power in range(8) for mantissa in (1, 2, 5))
    return [edge for edge in edges if edge <= most] or [1]


class Metrics:
    """All figures of one server. Touched on the event loop alone."""

    def __init__(self, model: str, max_seq_len: int) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model, "engine": "0"}
        lengths = _tokens(max_seq_len)
        self.running = self._gauge("vllm:num_requests_running", "Sequences being computed")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Sequences that wait for a slot")
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated")
        self.cached = self._counter("vllm:prompt_tokens_cached", "Prompt tokens from the cache")
        self.queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up")
        self.hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache")
        self.first = self._seconds("vllm:time_to_first_token_seconds", "To the first token", _FIRST)
        between = "Between tokens"
        self.between = self._seconds("vllm:inter_token_latency_seconds", between, _BETWEEN)
        self.fast_between = self._seconds("dsv4:inter_token_latency_seconds", between, _FAST)
        self.each = self._seconds(
            "vllm:request_time_per_output_token_seconds", "A request's mean token", _BETWEEN
        )
        self.whole = self._seconds("vllm:e2e_request_latency_seconds", "Whole jobs", _LATENCIES)
        self.queued = self._seconds("vllm:request_queue_time_seconds", "In the queue", _LATENCIES)
        self.inference = self._seconds(
            "vllm:request_inference_time_seconds", "Out of the queue", _LATENCIES
        )
        self.decode = self._seconds(
            "vllm:request_decode_time_seconds", "After the first token", _LATENCIES
        )
        self.prompts = self._seconds("vllm:request_prompt_tokens", "Tokens of a prompt", lengths)
        self.answers = self._seconds(
            "vllm:request_generation_tokens", "Tokens of an answer", lengths
        )
        self.asked = self._seconds("vllm:request_params_max_tokens", "Tokens asked for", lengths)
        names = (*self._labels, "finished_reason")
        self._success = Counter(
            "vllm:request_success", "Jobs that ended", names, registry=self.registry
        )
        self._rejected = Counter(
            "vllm:admission_rejections",
            "Jobs that were not taken",
            (*self._labels, "reason"),
            registry=self.registry,
        )

    def watch(self, stats: Callable[[], Stats]) -> None:
        """There is an engine, and this is what it has done. Called once."""
        self.registry.register(_EngineFigures(stats, self._labels))

    def success(self, reason: str) -> None:
        """One more job ended for `reason`."""
        self._success.labels(**self._labels, finished_reason=reason).inc()

    def rejected(self, reason: str) -> None:
        """One more job was not taken."""
        self._rejected.labels(**self._labels, reason=reason).inc()

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(name, about, tuple(self._labels), registry=self.registry).labels(
            **self._labels
        )

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(name, about, tuple(self._labels), registry=self.registry).labels(
            **self._labels
        )

    def _seconds(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(
            name, about, tuple(self._labels), buckets=tuple(buckets), registry=self.registry
        )
        return made.labels(**self._labels)


class _EngineFigures(Collector):
    """What an engine counts itself."""

    def __init__(self, stats: Callable[[], Stats], labels: dict[str, str]) -> None:
        self._stats, self._names, self._values = stats, tuple(labels), tuple(labels.values())

    def collect(self) -> Iterator[Metric]:
        """Its figures now."""
        stats = self._stats()
        for name, about, field in _GAUGES:
            gauge = GaugeMetricFamily(name, about, labels=self._names)
            gauge.add_metric(self._values, getattr(stats, field))
            yield gauge
        for name, about, field in _COUNTERS:
            counter = CounterMetricFamily(name, about, labels=self._names)
            counter.add_metric(self._values, getattr(stats, field))
            yield counter
        places = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts that were right, by their place",
            labels=(*self._names, "position"),
        )
        for place, count in enumerate(stats.right_at):
            places.add_metric((*self._values, str(place)), count)
        yield places


_GAUGES = (
    ("dsv4:slots", "Sequences that the engine holds at most", "slots"),
    ("dsv4:slots_kept", "Slots that keep an ended sequence", "kept"),
    ("dsv4:prompts_being_read", "Sequences whose prompt is being read", "reading"),
    ("dsv4:remembered_blocks", "Blocks of tokens that are remembered", "remembered_blocks"),
    ("dsv4:remembered_bytes", "Host memory that they take", "remembered_bytes"),
)
_COUNTERS = (
    ("dsv4:steps", "Steps of sequences that answer", "steps"),
    ("dsv4:step_rows", "Rows of these", "rows"),
    ("vllm:spec_decode_num_drafts", "Steps of a sequence that had drafts", "drafted"),
    ("vllm:spec_decode_num_draft_tokens", "Drafts", "draft_tokens"),
    ("vllm:spec_decode_num_accepted_tokens", "Drafts that were right", "right_drafts"),
)


class Meter:
    """One job's times. cached, generated: tokens so far; first: seconds to the first one."""

    def __init__(self, metrics: Metrics, job: Job) -> None:
        self._metrics = metrics
        self._begun = time.monotonic()
        self._started: float | None = None
        self._last: float | None = None
        self.cached = self.generated = 0
        self.queued: float | None = None
        self.first: float | None = None
        self._prompt = len(job.ids)
        self._open = True
        metrics.waiting.inc()
        metrics.prompts.observe(self._prompt)
        metrics.asked.observe(job.max_new_tokens)

    def note(self, event: Event) -> None:
        """The job's next event."""
        now = time.monotonic()
        if self._started is None:
            self._start(now, event.cached_tokens or 0)
        if event.tokens:
            self._tokens(now, len(event.tokens))
        if event.finish is not None:
            self.end(event.finish)

    def end(self, finish: Finish) -> None:
        """The job is over, or nobody wants more of it. Counts once."""
        if not self._open:
            return
        self._open = False
        metrics, now = self._metrics, time.monotonic()
        (metrics.waiting if self._started is None else metrics.running).dec()
        metrics.success("abort" if finish is Finish.CANCELLED else _REASONS[finish])
        metrics.whole.observe(now - self._begun)
        metrics.answers.observe(self.generated)
        if self._started is not None:
            metrics.inference.observe(now - self._started)
        if self.first is not None:
            decode = now - self._begun - self.first
            metrics.decode.observe(decode)
            metrics.each.observe(decode / max(self.generated - 1, 1))

    def _start(self, now: float, cached: int) -> None:
        metrics = self._metrics
        self._started, self.cached, self.queued = now, cached, now - self._begun
        metrics.waiting.dec()
        metrics.running.inc()
        metrics.queued.observe(self.queued)
        metrics.prompt_tokens.inc(self._prompt)
        metrics.queries.inc(self._prompt)
        metrics.cached.inc(cached)
        metrics.hits.inc(cached)

    def _tokens(self, now: float, count: int) -> None:
        metrics = self._metrics
        if self._last is None:
            self.first = now - self._begun
            metrics.first.observe(self.first)
        else:
            metrics.between.observe((now - self._last) / count)
            metrics.fast_between.observe((now - self._last) / count)
        self._last = now
        self.generated += count
        metrics.generation_tokens.inc(count)


_REASONS = {
    Finish.STOP: "stop",
    Finish.LENGTH: "length",
    Finish.FAILED: "error",
    Finish.CANCELLED: "abort",
}
