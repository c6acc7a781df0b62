"""What a plan says: to the screen and to `--json`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from llmshrink.planning.engines import Engine
from llmshrink.planning.spent import Measured
from llmshrink.run.arithmetic import Arithmetic
from llmshrink.run.progress import duration, size


@dataclass(frozen=True)
class Plan:
    """What a run will need and yield. Bytes; seconds of wall time as the run's own report counts them.

    download_bytes: what must still come from the Hub. peak_ram_bytes: of the whole process. peak_vram_bytes: on a CUDA
    device, else 0. disk_bytes: the most that OUT and the work-dir take at any moment. output_bytes: of the
    safetensors. bits_per_weight: over all weights; linear_bits_per_weight: of the blocks' linears. seconds: None where
    nothing was measured. cpu_seconds: of all threads. parts: seconds by what they go to. arithmetic: in which dtype
    each part computes (model, tuning, teaching, verification), and why. engines: what each makes of the result.
    faults: why the run doesn't fit this machine, and what to change; empty where it does.
    """

    model: str
    recipe: str
    download_bytes: int
    peak_ram_bytes: int
    peak_vram_bytes: int
    disk_bytes: int
    output_bytes: int
    source_bytes: int
    bits_per_weight: float
    linear_bits_per_weight: float
    seconds: float | None
    cpu_seconds: float | None
    parts: dict[str, float]
    activations: str
    arithmetic: dict[str, Arithmetic]
    engines: dict[str, Engine]
    notes: tuple[str, ...]
    faults: tuple[str, ...]
    probe_seconds: float

    @property
    def ok(self) -> bool:
        """Whether the run fits this machine."""
        return not self.faults

    def timed(self, times: Measured) -> Plan:
        """With what was measured, beside what was measured before."""
        parts = dict(self.parts)
        for name, spent in times.parts.items():
            parts[name] = parts.get(name, 0.0) + spent.wall
        return replace(
            self,
            seconds=(self.seconds or 0.0) + times.total.wall,
            cpu_seconds=(self.cpu_seconds or 0.0) + times.total.cpu,
            parts=parts,
            probe_seconds=self.probe_seconds + times.took.wall,
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        return {**asdict(self), "ok": self.ok}

    def _computed_in(self) -> list[str]:
        """A line for each dtype and reason, which names what computes so where that isn't all."""
        by: dict[Arithmetic, list[str]] = {}
        for name, each in self.arithmetic.items():
            by.setdefault(each, []).append(name)
        found = [(each, f" ({' and '.join(names)})" if len(by) > 1 else "") for each, names in by.items()]
        return [f"computed in {each.dtype}{whose}: {each.why}" for each, whose in found]

    def lines(self) -> list[str]:
        """The plan for a person."""
        found = [
            f"{self.model}  ({self.recipe})",
            *([f"download    {size(self.download_bytes)}"] if self.download_bytes else []),
            f"output      {size(self.source_bytes)} -> {size(self.output_bytes)}, {self.linear_bits_per_weight:.3f} "
            f"bits a weight in the blocks' linears, {self.bits_per_weight:.3f} over all",
            f"disk        {size(self.disk_bytes)} at OUT at most",
            f"memory      {size(self.peak_ram_bytes)} at most, {self.activations}",
            *self._computed_in(),
            *([f"GPU memory  {size(self.peak_vram_bytes)} at most"] if self.peak_vram_bytes else []),
        ]
        if self.seconds is not None:
            parts = ", ".join(f"{name} {duration(part)}" for name, part in self.parts.items() if part >= 0.5)
            found.append(f"time        {duration(self.seconds)} on this machine as busy as it is now ({parts})")
            found.append(f"            measured on one block in {self.probe_seconds:.1f} s")
        found += [f"{name:11} {engine}" for name, engine in self.engines.items()]
        found += [f"note        {note}" for note in self.notes]
        found += [f"won't fit   {fault}" for fault in self.faults]
        return found
