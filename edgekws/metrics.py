"""Figures for Prometheus, in its text format, at http://HOST:PORT/metrics. The only module that knows prometheus_client.

Nothing is counted on the listener's thread for this: what it knows anyway is read when somebody asks, and wakes are counted as a sink.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from edgekws import __version__
from edgekws.errors import ConfigError, NotInstalled
from edgekws.few_clients import FewClients
from edgekws.values import Event

LATENCY_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)  # bounds of the histogram


class Metrics:
    """A sink that counts wakes, and the page that shows them beside the listener's state.

    Raises:
        ConfigError: that address cannot be listened on.
        NotInstalled: the package is not installed.
    """

    def __init__(self, host: str, port: int, facts: Callable[[], Mapping[str, Any]]) -> None:
        """`facts` is `Status.report`."""
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise NotInstalled("the package prometheus-client", "metrics") from error
        registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self._wakes = prometheus.Counter("edgekws_wakes", "Wakes", ["keyword"], registry=registry)
        self._latency = prometheus.Histogram(
            "edgekws_wake_latency_seconds",
            "From a wake's last sample to the decision: computing only",
            buckets=LATENCY_S,
            registry=registry,
        )
        registry.register(_Facts(facts))

        class Handler(prometheus.MetricsHandler.factory(registry)):  # type: ignore[misc]
            """A site that makes its name point at this machine reads nothing here; who opened it to others may scrape by any name."""

            def do_GET(self) -> None:
                if not self.server.local or self.server.known(self.headers.get_all("Host", [])):
                    super().do_GET()
                else:
                    self.send_error(HTTPStatus.MISDIRECTED_REQUEST, "that is no name of this machine")

        try:
            # prometheus_client's own server bounds neither how many ask nor how long they may stay.
            self._server = FewClients(host, port, Handler, name="metrics")
        except (OSError, OverflowError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"metrics: cannot listen on {host} port {port} ({reason}). Accepted is a free port of this machine"
            ) from error
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def deliver(self, event: Event) -> None:
        """Counts it."""
        if event.kind == "wake":
            self._wakes.labels(event.keyword).inc()
            self._latency.observe(event.latency_ms / 1000)

    def close(self) -> None:
        """Nobody can ask any more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Facts:
    """What is read when somebody asks."""

    def __init__(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        self._facts = facts

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        facts = self._facts()
        yield InfoMetricFamily(
            "edgekws", "What listens", value={"version": __version__, "model": facts["model"], "source": facts["source"]}
        )
        yield GaugeMetricFamily("edgekws_listening", "1 while samples come", value=float(facts["listening"]))
        level = facts["level_dbfs"]
        yield GaugeMetricFamily("edgekws_level_dbfs", "Level of the last second", value=float("-inf") if level is None else level)
        for name, text, key in (
            ("edgekws_audio_seconds", "Audio heard", "audio_s"),
            ("edgekws_gaps", "Gaps in the audio", "gaps"),
            ("edgekws_lost_seconds", "Audio that the gaps took", "lost_s"),
            ("edgekws_hops", "Steps of the network", "hops"),
            ("edgekws_busy_seconds", "Time spent on the audio, of all hops", "busy_s"),
            ("edgekws_dropped_clips", "Clips to learn from that could not be kept", "clips_dropped"),
        ):
            yield CounterMetricFamily(name, text, value=float(facts[key]))
        dropped = CounterMetricFamily(
            "edgekws_dropped_events", "Events that did not arrive: a queue was full, or a sink failed", labels=["by"]
        )
        for name, count in facts["dropped_by"].items():
            dropped.add_metric([name], float(count))
        yield dropped
