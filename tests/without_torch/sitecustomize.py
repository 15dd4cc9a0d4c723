"""On the path of the processes that tests start: transformers would import torch, which takes longer than the test."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
