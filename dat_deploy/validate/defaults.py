"""What `validate` takes where the user says nothing."""

__all__ = ["BATCHES", "FP32_TOLERANCE", "OF_FLOAT32", "OF_INT8", "OF_LOWER", "PHOTOGRAPHS", "SELF_TEST_BATCHES"]

BATCHES = (1, 2, 3, 8)
SELF_TEST_BATCHES = (1, 2, 3)
PHOTOGRAPHS = 8

# In float32 two runtimes differ by the order of summation alone, by 4e-6 of the spread of a class between images here;
# 1e-4 leaves room for other CPUs and is far below what moves a prediction. In a lower precision, and where float32
# itself errs more, an engine may err so many times as much as eager PyTorch does in that precision on the same inputs.
FP32_TOLERANCE = 1e-4
OF_FLOAT32, OF_LOWER, OF_INT8 = 8.0, 2.0, 4.0
