"""What of this CPU decides which kernels vLLM's CPU build has on it, asked as vLLM itself asks.

On x86 vLLM loads `_C` (AVX-512 with bfloat16), `_C_AVX512` or `_C_AVX2`, by what `torch.cpu` says of the CPU. Of what
our checkpoints and models need, read from vLLM 0.32 and tried, the one for AVX2 lacks two things: the int4 kernel and
the cache of FP8. Attention, norms and the rest are there, and tensor parallelism goes through gloo instead of shared
memory. Products of int8 are oneDNN's everywhere, and overflow without VNNI. Other architectures than x86 have one
extension; nothing is said of them.

Dense products of 16 bits are torch's on such CPUs, several times slower than in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # which brings torch, and the doctor answers without it
    from llmshrink.formats.servable import Instructions

_HAS: dict[Instructions, frozenset[str]] = {
    "AVX-512": frozenset({"avx512_f", "avx512f"}),
    "VNNI": frozenset({"avx512_vnni", "avx_vnni"}),
}
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True)
class Processor:
    """A CPU as vLLM's CPU build sees it.

    lacks: which of the instructions that its kernels need it hasn't. multiplies_bfloat16: whether it has instructions
    for products in bfloat16, without which 16 bits are slower than float32.
    """

    lacks: frozenset[Instructions] = frozenset()
    multiplies_bfloat16: bool = True


def of_flags(flags: Collection[str]) -> Processor:
    """An x86 CPU by its flags, as /proc/cpuinfo or torch spell them."""
    has = set(flags)
    lacks = frozenset(name for name, spellings in _HAS.items() if not spellings & has)
    return Processor(lacks, bool(_BFLOAT16 & has))


def processor_here() -> Processor:
    """This CPU, by the function of torch that vLLM asks."""
    import torch

    said: Mapping[str, Any] = torch.cpu.get_capabilities()
    if said.get("architecture") != "x86_64":
        return Processor()
    return of_flags([name for name, there in said.items() if there is True])
