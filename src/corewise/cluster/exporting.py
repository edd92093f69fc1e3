"""A replica's metrics among Ray's, which Prometheus reads from each node: a proxy's ``/metrics`` is one replica's."""

import asyncio
from typing import Any

from corewise.serving.metrics import Metrics

EACH_S = 5.0
PREFIX = "corewise_"


class Exporter:
    """Hands the figures of ``/metrics`` to Ray, under the same names behind Ray's own ``ray_``.

    All are gauges to Ray, whose counters would get other names; Prometheus takes their rates all the same.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._gauges: dict[str, Any] = {}

    async def run(self) -> None:
        """Do so until it is cancelled."""
        while True:
            self.export()
            await asyncio.sleep(EACH_S)

    def export(self) -> None:
        """Once."""
        from ray.serve.metrics import Gauge

        for family in self._metrics.families():
            for sample in family.samples:
                if not sample.name.startswith(PREFIX) or sample.name.endswith("_created"):
                    continue
                gauge = self._gauges.get(sample.name)
                if gauge is None:
                    gauge = Gauge(sample.name, family.documentation, tag_keys=tuple(sorted(sample.labels)))
                    self._gauges[sample.name] = gauge
                gauge.set(sample.value, dict(sample.labels))
