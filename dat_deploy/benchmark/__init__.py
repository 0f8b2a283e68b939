"""How fast engines are, side by side, in a record that can be kept and compared."""

from dat_deploy.benchmark.measure import benchmark
from dat_deploy.benchmark.plotting import check_plot, plot
from dat_deploy.benchmark.record import Record, RecordComparison, compare

__all__ = ["Record", "RecordComparison", "benchmark", "check_plot", "compare", "plot"]
