"""How fast engines are, side by side, in a record that can be kept and compared."""

from dat_deploy.benchmark.measure import benchmark
from dat_deploy.benchmark.plotting import check_plot, plot
from dat_deploy.benchmark.record import (
    Change,
    Comparison,
    EngineSettings,
    LatencyRatio,
    Record,
    Row,
    Settings,
    compare,
)

__all__ = [
    "Change",
    "Comparison",
    "EngineSettings",
    "LatencyRatio",
    "Record",
    "Row",
    "Settings",
    "benchmark",
    "check_plot",
    "compare",
    "plot",
]
