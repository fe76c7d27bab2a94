"""Numbers from wherever they come, as float64 arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from leibler.errors import DataError


def array(values: Any, name: str) -> np.ndarray:
    """``values`` as a float64 array, off the graph and off the device.

    Raises:
        DataError: there are none.
    """
    if isinstance(values, torch.Tensor):
        values = (
            values.detach().cpu().numpy() if values.dtype != torch.bfloat16 else values.detach().cpu().float().numpy()
        )
    result = np.asarray(values, dtype=np.float64)
    if not result.size:
        raise DataError(f"there is no {name} to measure; give at least one number.")
    return result
