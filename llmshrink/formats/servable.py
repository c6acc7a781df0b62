"""Which engine serves a grouped integer layer: asked before the work, for every fused layer at the TP the user names.

An engine joins sites into one layer (q/k/v, gate/up), splits that layer over tensor-parallel ranks, and picks the
first of its kernels that takes the resulting shape. The conditions below are those of vLLM 0.32 and 0.33, read from
their `can_implement` and `create_weights` and, on the CPU, tried. A kernel that only an optional package brings counts
only where no built-in one exists for that number of bits, and the verdict names the package.

    vllm-cpu    CPUWNA16   4 bit; even group or whole row; in % 32 = 0, out % 32 = 0; CPUs with AVX-512
    vllm-cuda   Machete    4, 8 bit; group 64, 128 or whole row; in % 64 = 0, out % 128 = 0 (Hopper)
                Marlin     4 bit, 8 bit symmetric; group 32, 64, 128 or whole row; any out, pads to its tiles
                Triton     4 bit; group 32, 64, 128, 256 or whole row; out % 8 = 0
                Humming    2, 3, 5, 6, 7 bit (optional package); any shape that the group divides

Exllama takes other groups too, but only in steps of 32 inputs and in float16, without saying so: not counted on.

On x86 the CPU build loads one of three extensions by the CPU's instructions; the one for AVX2 alone has no CPUWNA16,
though its check doesn't look. So a verdict names the instructions without which vLLM's own kernel isn't there, or is
wrong (`CPU_NEEDS`): a checkpoint is made for any machine, and `serving.processor` asks the one at hand.

llmshrink's plugin for vLLM brings three more, which `plugin_kernel`, `plugin_eight_bit` and `sparse24_kernel` ask: they
need the plugin where the checkpoint is served, so they aren't counted when a checkpoint is made.

    wna16       2, 3, 4, 8 bit; group 32, 64, 128, 256 or whole row; any shape that the group divides
    eight_bit   int8 on CPUs, exact on all of them; any shape that can be cut
    sparse24    2:4 of 4, 8, 16 bit; groups that are multiples of 32, or whole row; in % 4 = 0 (% 8 for a rank's share)

Products of 8 bits, weights and inputs (`eight_bit`), have kernels of their own for any shape that can be cut:

    vllm-cpu    int8 (oneDNN, or its own for AMX; without VNNI oneDNN adds pairs of products in 16 bits, and they
                overflow); FP8 by channel has none
    vllm-cuda   int8 on compute capability 7.5 to 9.0 (Turing to Hopper); FP8 from 8.9 (Ada), and before that, from 8.0,
                as FP8 weights with inputs of 16 bits

A cache of FP8 with the checkpoint's scales is part of attention; vLLM takes it from config.json where nobody asks for
another (`--kv-cache-dtype auto`, its default):

    vllm-cpu    heads of multiples of 32 values; AVX-512 or AMX; without the plugin numbers are cut off towards zero
    vllm-cuda   FP8 E4M3 from compute capability 8.9 (Ada); before that, where FlashInfer is installed

Attention is asked about too, once for a model: the CPU build's takes heads of some widths only, and every engine splits
heads evenly over ranks.

Two conditions come from how a checkpoint is cut and hold for every engine. The stream of codes of a row is cut between
ranks at a word, and the built-in kernels unpack whole words: so in * bits % 32 = 0 for them, and for all when the
inputs are split. The zero-points are packed along the outputs, one shard after the other: when there are several
shards or ranks, out * bits % 32 = 0 for each piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llmshrink.formats.bitpack import BITS, WORD
from llmshrink.weights import Activations

Parallel = Literal["column", "row"]

CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of a head that the attention of vLLM's CPU build takes."""
CPU_FP8_CACHE = 32
FP8_CACHE = (
    "keys and values are cached in FP8 with the checkpoint's scales, which vLLM does by itself unless another "
    "--kv-cache-dtype is given"
)
FP8_CACHE_NEEDS = "it takes a GPU of compute capability 8.9 or more, or a CPU with AVX-512"
FP8_CACHE_CUT = (
    "vLLM 0.32's CPU build without llmshrink's plugin cuts keys and values off towards zero instead of rounding them: "
    "what that costs isn't in the KL"
)
HUMMING = "vLLM's optional Humming kernels"
Instructions = Literal["AVX-512", "VNNI"]
CPU_NEEDS: dict[Instructions, str] = {
    "AVX-512": "vLLM's own int4 kernel for CPUs takes AVX-512",
    "VNNI": "vLLM's own int8 product for CPUs takes VNNI, and without it sums overflow without an error",
}
"""What an x86 CPU must have for vLLM's CPU build to compute a layer by itself, and why."""
FP8_ON_CPU = "the CPU build has no kernel for FP8 with a scale a row; a GPU of compute capability 8.9 or more has"


@dataclass(frozen=True)
class Verdict:
    """What the engines say of one layer.

    engines: engine -> None when it serves the layer, else why not. needs: an optional package of the engine without
    which it does not, or None. cpu: the instructions without which the CPU build, where it serves the layer, has no
    right kernel of its own for it, or None.
    """

    engines: dict[str, str | None]
    needs: str | None = None
    cpu: Instructions | None = None

    @property
    def served(self) -> bool:
        """Whether at least one engine serves the layer."""
        return None in self.engines.values()

    @property
    def count(self) -> int:
        """How many engines serve the layer."""
        return sum(why is None for why in self.engines.values())


def attention(head_dim: int, heads: int, tp: int = 1, *, fp8_cache: bool = False) -> dict[str, str]:
    """The engines that can't compute a model's attention, and why. heads: query heads; tp: tensor-parallel ranks.

    fp8_cache: whether keys and values are cached in FP8.
    """
    if heads % tp:
        reason = f"{heads} attention heads can't be split over {tp} ranks"
        return {"vllm-cpu": reason, "vllm-cuda": reason}
    if head_dim not in CPU_HEADS:
        widths = ", ".join(map(str, CPU_HEADS))
        return {"vllm-cpu": f"its attention takes heads of {widths} values, and this model's have {head_dim}"}
    if fp8_cache and head_dim % CPU_FP8_CACHE:
        return {
            "vllm-cpu": f"its cache of FP8 takes heads of a multiple of {CPU_FP8_CACHE} values, and this model's have "
            f"{head_dim}"
        }
    return {}


@dataclass(frozen=True)
class _Piece:
    """A fused layer as one rank holds it."""

    bits: int
    group: int  # inputs a group; -1 is one group a row
    symmetric: bool
    outputs: int
    inputs: int


def servable(
    bits: int,
    group_size: int,
    symmetric: bool,
    shards: Sequence[tuple[int, int]],
    tp: int = 1,
    parallel: Parallel | None = None,
) -> Verdict:
    """Ask every engine about one layer.

    group_size: inputs a group, -1 or the number of inputs for one group a row. shards: (out_features, in_features) of
    every site that the engine fuses into the layer. tp: tensor-parallel ranks. parallel: whether those split the
    outputs ("column") or the inputs ("row"); when it isn't known, a fused layer is "column", as all are, and a single
    site must hold both ways. Engines that replicate key and value heads when there are fewer than ranks are held to an
    even split all the same.
    """
    assert bits in BITS, bits
    assert shards and tp >= 1 and (group_size == -1 or group_size > 0), (shards, tp, group_size)
    if parallel is None and tp > 1 and len(shards) == 1:
        column = servable(bits, group_size, symmetric, shards, tp, "column")
        return column if not column.served else servable(bits, group_size, symmetric, shards, tp, "row")
    row_split, column_split = _splits(tp, parallel)
    fault = _cut(bits, group_size, symmetric, shards, row_split, column_split)
    if fault is not None:
        return Verdict({"vllm-cpu": fault, "vllm-cuda": fault})
    inputs = shards[0][1]
    piece = _Piece(
        bits=bits,
        group=-1 if group_size == inputs else group_size,
        symmetric=symmetric,
        outputs=sum(outputs for outputs, _ in shards) // column_split,
        inputs=inputs // row_split,
    )
    cpu, (cuda, needs) = _cpu(piece), _cuda(piece)
    return Verdict({"vllm-cpu": cpu, "vllm-cuda": cuda}, needs, "AVX-512" if cpu is None else None)


def _cut(
    bits: int,
    group_size: int,
    symmetric: bool,
    shards: Sequence[tuple[int, int]],
    row_split: int,
    column_split: int,
) -> str | None:
    """What keeps the layer from being fused and cut into the ranks' pieces, whatever the kernel; None if nothing."""
    inputs = shards[0][1]
    group = inputs if group_size == -1 else group_size
    if any(shard_inputs != inputs for _, shard_inputs in shards):
        return f"fused sites have different inputs: {[shard_inputs for _, shard_inputs in shards]}"
    if inputs % group:
        return f"group {group} doesn't divide {inputs} inputs"
    if inputs % row_split:
        return f"{inputs} inputs can't be split over {row_split} ranks"
    part = inputs // row_split
    if row_split > 1 and group != inputs and part % group:
        return f"group {group} doesn't divide the {part} inputs of one of {row_split} ranks"
    if row_split > 1 and part * bits % WORD:
        return f"the {part} inputs of one of {row_split} ranks end inside a word at {bits} bits"
    for outputs, _ in shards:
        if outputs % column_split:
            return f"{outputs} outputs can't be split over {column_split} ranks"
        joined = len(shards) > 1 or column_split > 1
        if joined and not symmetric and outputs // column_split * bits % WORD:
            return f"the zero-points of {outputs // column_split} outputs end inside a word at {bits} bits"
    return None


def _cpu(piece: _Piece) -> str | None:
    """CPUWNA16, the only kernel of vLLM's CPU build; None when it takes the piece."""
    if piece.bits != 4:
        return f"the CPU kernel takes 4 bits, not {piece.bits}"
    if piece.group != -1 and piece.group % 2:
        return f"the CPU kernel takes even groups, not {piece.group}"
    if piece.inputs % 32:
        return f"the CPU kernel takes multiples of 32 inputs, not {piece.inputs}"
    if piece.outputs % 32:
        return f"the CPU kernel takes multiples of 32 outputs, not {piece.outputs}"
    return None


def _cuda(piece: _Piece) -> tuple[str | None, str | None]:
    """(None or why not, the optional package that it takes) for vLLM on CUDA."""
    if piece.bits not in (4, 8):
        return None, HUMMING
    if piece.inputs * piece.bits % WORD:
        return f"{piece.inputs} inputs at {piece.bits} bits end inside a word", None
    machete = piece.group in (-1, 64, 128) and piece.inputs % 64 == 0 and piece.outputs % 128 == 0
    whole_zeros = piece.symmetric or piece.outputs * piece.bits % WORD == 0
    marlin = (piece.bits == 4 or piece.symmetric) and piece.group in (-1, 32, 64, 128) and whole_zeros
    triton = piece.bits == 4 and piece.group in (-1, 32, 64, 128, 256) and piece.outputs % 8 == 0
    if machete or marlin or triton:
        return None, None
    kind = "symmetric" if piece.symmetric else "asymmetric"
    group = "one group a row" if piece.group == -1 else f"group {piece.group}"
    return f"no kernel takes {piece.bits} bits, {kind}, {group}, for {piece.inputs} -> {piece.outputs}", None


def eight_bit(
    activations: Activations, shards: Sequence[tuple[int, int]], tp: int = 1, parallel: Parallel | None = None
) -> Verdict:
    """The engines' verdict on a layer of 8-bit products; the other arguments are `servable`'s."""
    fault = _first_cut(8, -1, True, shards, tp, parallel)
    cpu = fault or (FP8_ON_CPU if activations == "fp8" else None)
    return Verdict({"vllm-cpu": cpu, "vllm-cuda": fault}, None, "VNNI" if cpu is None else None)


def plugin_eight_bit(
    activations: Activations, shards: Sequence[tuple[int, int]], tp: int = 1, parallel: Parallel | None = None
) -> str | None:
    """Why the plugin's product of 8 bits, on CPUs, doesn't take a layer; None when it does. Asked as `eight_bit`."""
    return FP8_ON_CPU if activations == "fp8" else _first_cut(8, -1, True, shards, tp, parallel)


def plugin_kernel(
    bits: int,
    group_size: int,
    symmetric: bool,
    shards: Sequence[tuple[int, int]],
    tp: int = 1,
    parallel: Parallel | None = None,
) -> str | None:
    """Why the plugin's kernel for grouped integers doesn't take a layer; None when it does. Asked as `servable` is."""
    if bits not in (2, 3, 4, 8):
        return f"llmshrink's kernel takes 2, 3, 4 and 8 bits, not {bits}"
    inputs = shards[0][1]
    if group_size not in (-1, inputs, 32, 64, 128, 256):
        return f"llmshrink's kernel takes groups of 32, 64, 128, 256 or one a row, not {group_size}"
    return _first_cut(bits, group_size, symmetric, shards, tp, parallel)


def sparse24_kernel(
    group_size: int | None,
    shards: Sequence[tuple[int, int]],
    tp: int = 1,
    parallel: Parallel | None = None,
) -> str | None:
    """Why the plugin's 2:4 kernel doesn't take a layer; None when it does.

    group_size: -1 is one group a row, None no scales. The others as `servable`'s.
    """
    inputs = shards[0][1]
    if group_size not in (None, -1, inputs) and (group_size < 32 or group_size % 32):
        return f"llmshrink's 2:4 kernel takes groups that are multiples of 32 or one a row, not {group_size}"
    cuts = [(1, tp), (tp, 1)] if parallel is None and tp > 1 and len(shards) == 1 else [_splits(tp, parallel)]
    for row_split, column_split in cuts:
        # 16 bits never end inside a word: where a row may be cut is asked below.
        fault = _cut(16, -1 if group_size is None else group_size, True, shards, row_split, column_split)
        step = 4 if row_split == 1 else 8
        if fault is None and inputs // row_split % step:
            fault = f"{inputs // row_split} inputs of {inputs} aren't a multiple of {step}, where 2:4 is cut"
        if fault is not None:
            return fault
    return None


def _first_cut(
    bits: int,
    group_size: int,
    symmetric: bool,
    shards: Sequence[tuple[int, int]],
    tp: int,
    parallel: Parallel | None,
) -> str | None:
    """The first fault in the ways in which a layer may be cut; None if there is none."""
    cuts = [(1, tp), (tp, 1)] if parallel is None and tp > 1 and len(shards) == 1 else [_splits(tp, parallel)]
    faults = (_cut(bits, group_size, symmetric, shards, row_split, column_split) for row_split, column_split in cuts)
    return next((fault for fault in faults if fault is not None), None)


def _splits(tp: int, parallel: Parallel | None) -> tuple[int, int]:
    """How many ranks split (inputs, outputs)."""
    return (tp, 1) if parallel == "row" else (1, tp)
