"""What `validate` takes where the user says nothing."""

__all__ = ["BATCHES", "FP32_TOLERANCE", "PHOTOGRAPHS", "SELF_TEST_BATCHES"]

BATCHES = (1, 2, 3, 8)
SELF_TEST_BATCHES = (1, 2, 3)
PHOTOGRAPHS = 8

# In float32 two runtimes differ by the order of summation alone, about 2e-6 here; 1e-4 leaves room for other CPUs and
# is far below what moves a prediction. In a lower precision an engine may err twice as much as eager PyTorch does in
# that precision on the same inputs, both measured against float32.
FP32_TOLERANCE = 1e-4
