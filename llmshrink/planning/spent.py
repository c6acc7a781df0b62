"""Seconds of wall time and of the processor, measured together: on a busy machine they differ."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")
LONG_ENOUGH = 0.15
"""Seconds over which something short is repeated."""
MOST = 20
"""Times that it is repeated at most."""


@dataclass(frozen=True)
class Spent:
    """wall, cpu: seconds; cpu of all of this process's threads."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(max(0.0, self.wall - other.wall), max(0.0, self.cpu - other.cpu))

    def __mul__(self, times: float) -> Spent:
        return Spent(self.wall * times, self.cpu * times)

    __rmul__ = __mul__


@dataclass
class Measured:
    """parts: what the run is made of, by name; took: the probe itself."""

    parts: dict[str, Spent] = field(default_factory=dict)
    took: Spent = field(default_factory=Spent)

    def add(self, name: str, spent: Spent) -> None:
        self.parts[name] = self.parts.get(name, Spent()) + spent

    @property
    def total(self) -> Spent:
        return sum(self.parts.values(), Spent())


def now(device: torch.device | None = None) -> Spent:
    """The clocks. device: one whose work must be done before they are read."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return Spent(time.perf_counter(), time.process_time())


def once(work: Callable[[], T], device: torch.device | None = None) -> tuple[Spent, T]:
    """What one call takes, and its result."""
    start = now(device)
    result = work()
    return now(device) - start, result


def often(work: Callable[[], object], device: torch.device | None = None) -> Spent:
    """What a call takes on average, after one that isn't counted if it was short."""
    first, _ = once(work, device)
    if first.wall > 4 * LONG_ENOUGH:
        return first
    start, times = now(device), 0
    while times < MOST:
        work()
        times += 1
        if (now(device) - start).wall >= LONG_ENOUGH:
            break
    return (now(device) - start) * (1 / times)
