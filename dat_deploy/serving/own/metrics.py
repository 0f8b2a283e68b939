"""What a server counts, for Prometheus."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

from dat_deploy.serving.own.replica import Reply

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._requests = Counter(
            "dat_deploy_requests", "Requests answered.", ["endpoint", "code"], registry=self._registry
        )
        self._seconds = Histogram(
            "dat_deploy_request_seconds",
            "From a request's header to its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.in_progress = Gauge(
            "dat_deploy_requests_in_progress", "Requests read, waiting or worked on.", registry=self._registry
        )
        self.ready = Gauge("dat_deploy_ready", "1 if requests are taken.", registry=self._registry)
        self.replicas = Gauge("dat_deploy_replicas", "Running copies of the engine.", registry=self._registry)
        self.retries = Counter(
            "dat_deploy_retries", "Requests given to another replica, theirs having died.", registry=self._registry
        )
        self._images = Counter("dat_deploy_images", "Images answered.", registry=self._registry)
        self._padding = Counter(
            "dat_deploy_padding_images", "Images added to fill a batch of the engine.", registry=self._registry
        )
        self._batch = Histogram(
            "dat_deploy_batch_images",
            "Images in one call of the engine, padding left out.",
            buckets=_IMAGES,
            registry=self._registry,
        )
        self._prepare, self._queue, self._compute = (
            Histogram(f"dat_deploy_{name}_seconds", meaning, buckets=_SECONDS, registry=self._registry)
            for name, meaning in (
                ("prepare", "Reading and preprocessing a request."),
                ("queue", "A request's wait for the engine."),
                ("compute", "One call of the engine."),
            )
        )

    def count(self, endpoint: str, code: int, seconds: float) -> None:
        """An answer that went out."""
        self._requests.labels(endpoint, str(code)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def count_reply(self, reply: Reply) -> None:
        """What a replica tells of its work."""
        if not reply.images:
            return
        self._images.inc(reply.images)
        self._prepare.observe(reply.prepare_s)
        self._queue.observe(reply.queue_s)
        for call in reply.calls:
            self._batch.observe(call.images)
            self._padding.inc(call.padding)
            self._compute.observe(call.seconds)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return prometheus_client.generate_latest(self._registry)
