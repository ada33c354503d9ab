"""What a policy server counts, as Prometheus reads it; each server has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Counters of one server.

    Attributes:
        requests: observations received.
        superseded: observations that a newer one of the same connection replaced.
        refused: by reason: host, origin, token, full, path, stopping, rate, malformed, too_large, unfinished, unread,
            silent, handshake.
        errors: by kind: ``user`` (a request that the policy cannot answer) or ``internal``.
        connections: clients at present.
        inference: seconds of the policy for one request.
        queue: seconds that a request waited for the policy.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own, ours = self.registry, "robopolicy"
        self.requests = Counter("requests", "Observations received.", namespace=ours, registry=own)
        self.superseded = Counter("superseded", "Observations replaced by newer ones.", namespace=ours, registry=own)
        self.refused = Counter("refused", "Refused connections, requests.", ["reason"], namespace=ours, registry=own)
        self.errors = Counter("errors", "Requests that ended in an error.", ["kind"], namespace=ours, registry=own)
        self.connections = Gauge("connections", "Clients at present.", namespace=ours, registry=own)
        self.inference = Histogram(
            "inference_seconds", "Time of the policy.", namespace=ours, registry=own, buckets=SECONDS
        )
        self.queue = Histogram(
            "queue_seconds", "Time waited for the policy.", namespace=ours, registry=own, buckets=SECONDS
        )

    def text(self) -> str:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry).decode()
