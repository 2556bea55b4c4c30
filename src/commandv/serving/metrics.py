"""What a server counts, in Prometheus' form. No label holds what a client made up."""

from __future__ import annotations

from typing import Any

import prometheus_client as prometheus

from commandv.serving.behaviours import BASE, Behaviour
from commandv.serving.engine import Engine

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The figures of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = prometheus.CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "commandv"}
        self.responses = prometheus.Counter("responses", "Responses by path and status.", ("path", "status"), **own)
        self.behaviours = prometheus.Counter("behaviours", "Answers asked for by adapter.", ("adapter",), **own)
        self.prompt_tokens = prometheus.Counter("prompt_tokens", "Prompt tokens read.", **own)
        self.answer_tokens = prometheus.Counter("answer_tokens", "Tokens generated in complete answers.", **own)
        self.cancelled = prometheus.Counter("cancelled", "Requests whose client went away.", **own)
        self.first = prometheus.Histogram(
            "first_text_seconds", "From a streamed request to its first text.", buckets=_SECONDS, **own
        )
        self.whole = prometheus.Histogram("answer_seconds", "From a request to its last text.", buckets=_SECONDS, **own)
        for name, what, value in (
            ("running", "Requests in the batch.", lambda: engine.n_running),
            ("waiting", "Requests that wait for a row.", lambda: engine.n_waiting),
            ("rows", "Most requests in a batch.", lambda: engine.max_rows),
        ):
            prometheus.Gauge(name, what, **own).set_function(value)

    def asked(self, behaviour: Behaviour, n_prompt: int, n: int) -> None:
        """Count `n` answers asked for, to prompts of so many tokens together."""
        for name in [one.adapter for one in behaviour] or [BASE]:
            self.behaviours.labels(name).inc(n)
        self.prompt_tokens.inc(n_prompt)

    def page(self) -> tuple[bytes, str]:
        """Return all figures, and the content type of their form."""
        return prometheus.generate_latest(self.registry), prometheus.CONTENT_TYPE_LATEST
