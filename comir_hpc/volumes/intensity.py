"""How the values of a channel become input of a network, by numbers that belong to the volume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Intensity:
    """How one channel's values become network input: clip to [low, high], subtract mean, divide by std.

    The numbers belong to the volume, never to a window: a window's own statistics would make the result depend
    on how the volume is cut. `foreground_above` separates specimen from background in the original values.
    """

    low: float
    high: float
    mean: float
    std: float
    foreground_above: float

    def normalise(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Scale values of any shape and dtype to float32 with zero mean and unit variance over the foreground."""
        result = values.astype(np.float32)
        np.clip(result, self.low, self.high, out=result)
        result -= np.float32(self.mean)
        result /= np.float32(self.std)
        return result

    def foreground(self, values: NDArray[Any]) -> NDArray[np.bool_]:
        """Return the mask of the values that belong to the specimen, of the same shape."""
        mask: NDArray[np.bool_] = values > self.foreground_above
        return mask
