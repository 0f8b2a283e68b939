"""The kinds of checks of `validate`, by name, in the order in which they run; what each does is in `checks`."""

__all__ = ["CHECKS", "FP32_TOLERANCE", "OF_ENGINE", "OF_SIZE", "PHOTOGRAPHS"]

OF_SIZE = ("preprocessing", "photographs", "stress", "slots", "repeats")  # at each image size
OF_ENGINE = ("precision", "coordinates")
CHECKS = (*OF_SIZE, *OF_ENGINE, "drift", "data")

PHOTOGRAPHS = 8  # that are looked at where the user names none

# In float32 two runtimes differ by the order of summation alone, about 2e-6 here; 1e-4 leaves room for other CPUs and
# is far below what moves a prediction. In a lower precision an engine may err twice as much as eager PyTorch does in
# that precision on the same inputs, both measured against float32.
FP32_TOLERANCE = 1e-4
