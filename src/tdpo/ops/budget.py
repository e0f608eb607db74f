"""The bytes that logits may take at a time, and what happens once when even they are too many."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from tdpo.ops.chunked import default_logits_budget

Result = TypeVar("Result")
logger = logging.getLogger("tdpo")


class LogitsBudget:
    """A number of bytes that is halved once, for good, when the device runs out of memory over the logits.

    Only work inside the head is done again, where nothing waits for other processes.

    Args:
        size: Bytes, or None for the device's default.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size = size
        self._halved = False

    def within(self, work: Callable[[int | None], Result], device: torch.device) -> Result:
        """Does ``work(bytes)``, and once more with half of them if the memory does not suffice.

        Raises:
            torch.OutOfMemoryError: the second time, for good.
        """
        try:
            return work(self.size)
        except torch.OutOfMemoryError:
            if self._halved:
                raise
        # Outside the handler, whose traceback would keep the failed attempt's tensors alive.
        self._halved, self.size = True, max((self.size or default_logits_budget(device)) // 2, 1)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("out of memory over the logits: --logits_budget is %d bytes from here on, half of it", self.size)
        return work(self.size)
