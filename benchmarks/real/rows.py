"""What is measured: a list of rows, ours and the peers', each a command line on the same model and text.

All calibrate on the same 128 windows of 256 tokens and compute in float32 on one thread. Weights are quantized in
groups of 64 unless a row says otherwise. A row marked `source_grid` stores what nearly reproduces the grid that the
original lies on: it decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SAMPLES, SEQ_LEN = 128, 256
OURS = "llmshrink"
LLM_COMPRESSOR, GPTQMODEL, AUTO_ROUND = PEERS = ("llm-compressor", "gptqmodel", "auto-round")
WEIGHTS_4, WEIGHTS_3, WEIGHTS_2 = "weights of 4 bits", "weights of 3 bits", "weights of 2 bits"
SPARSE, SMALLER, PRODUCTS, OTHERS = "2:4 and other zeros", "smaller shapes", "products of 8 bits", "others"
GROUPS = ("original", WEIGHTS_4, WEIGHTS_3, WEIGHTS_2, SPARSE, SMALLER, PRODUCTS, OTHERS)
TAUGHT_STEPS = 60
"""Of a distillation: what fits. Each is a batch of 8 windows of 256 tokens of the calibration text, which has more of
them than the 128 that are calibrated on."""
ORIGINAL = "original"


@dataclass(frozen=True)
class Row:
    """command: what follows `llmshrink` (or the peer's script), with {model}, {calibration}, {tokens} and {out} for the
    paths. what: of what the result is. minutes: of CPU, estimated, the judging included. usual: measured by `make
    real`; others where they are asked for. tasks: its checkpoint is kept and asked downstream tasks."""

    name: str
    group: str
    what: str
    command: tuple[str, ...]
    minutes: float
    tool: str = OURS
    source_grid: bool = False
    usual: bool = True
    tasks: bool = False
    packages: tuple[str, ...] = field(default=())
    """Beside torch and transformers, whose versions its numbers depend on."""
    student: Row | None = None
    """The row whose checkpoint is {student} in the command."""


def _ours(verb: str, recipe: str, *more: str) -> tuple[str, ...]:
    return (
        *(verb, "{model}", "--output", "{out}", "--recipe", recipe, "--dtype", "float32", "--no-verify"),
        *("--calibration", "{calibration}", "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), *more),
    )


def _quantized(recipe: str, *more: str, group_size: int | None = 64) -> tuple[str, ...]:
    return _ours("quantize", recipe, *(() if group_size is None else ("--group-size", str(group_size))), *more)


ONE_STREAM = ("--set", "steps.0.quantize.corrected=0", "--set", "steps.0.quantize.damp=0.01")
"""Without a corrected target less damping is better: .143 at .01, .158 at .1 (held-out calibration text)."""
TAUGHT = ("--data", "{calibration}", "--steps", str(TAUGHT_STEPS), "--batch-size", "8", "--seq-len", str(SEQ_LEN))
PRUNED = Row("sparsegpt-2of4", SPARSE, "2:4", _ours("prune", "sparsegpt-2of4"), 9, tasks=True)
G64 = "groups of 64"

OUR_ROWS = (
    Row("gptq-w4a16", WEIGHTS_4, G64, _quantized("gptq-w4a16"), 8, tasks=True),
    Row("gptq-w4a16, one stream", WEIGHTS_4, G64, _quantized("gptq-w4a16", *ONE_STREAM), 5),
    Row(
        "gptq-w4a16, groups of 128",
        WEIGHTS_4,
        "groups of 128",
        _quantized("gptq-w4a16", group_size=128),
        5,
        usual=False,
    ),
    Row("tuned-w4a16", WEIGHTS_4, G64, _quantized("tuned-w4a16"), 13, usual=False),
    Row("bnb-nf4", WEIGHTS_4, "blocks of 64", _quantized("bnb-nf4", group_size=None), 2, packages=("bitsandbytes",)),
    Row(
        "gptq-w4a16-asym, groups of 32",
        WEIGHTS_4,
        "groups of 32, with zero-points",
        _quantized("gptq-w4a16-asym", group_size=32),
        14,
        source_grid=True,
        usual=False,
    ),
    Row("gptq-w3a16", WEIGHTS_3, G64, _quantized("gptq-w3a16"), 8, tasks=True),
    Row("tuned-w3a16", WEIGHTS_3, G64, _quantized("tuned-w3a16"), 15, usual=False),
    Row("gptq-w2a16", WEIGHTS_2, G64, _quantized("gptq-w2a16"), 8, tasks=True),
    Row(
        f"tuned-w2a16, taught {TAUGHT_STEPS} steps",
        WEIGHTS_2,
        G64,
        _ours("compress", "tuned-w2a16", "--set", f"steps.2.distill.steps={TAUGHT_STEPS}"),
        75,
        usual=False,
    ),
    Row("magnitude-2of4", SPARSE, "2:4", _ours("prune", "magnitude-2of4"), 8),
    Row("wanda-2of4", SPARSE, "2:4", _ours("prune", "wanda-2of4"), 9),
    PRUNED,
    Row("alps-2of4", SPARSE, "2:4", _ours("prune", "alps-2of4"), 9),
    Row(
        "alps-2of4-gptq-w4a16",
        SPARSE,
        "2:4 with 4 bits, groups of 64",
        _ours("compress", "alps-2of4-gptq-w4a16", "--group-size", "64"),
        9,
    ),
    Row("sparsegpt-50", SPARSE, "half of each row", _ours("prune", "sparsegpt-50"), 9),
    Row(
        f"sparsegpt-2of4, taught {TAUGHT_STEPS} steps",
        SPARSE,
        f"2:4, taught by the original: {TAUGHT_STEPS} batches of 8 x {SEQ_LEN} tokens",
        ("distill", "{model}", "{student}", "--output", "{out}", "--dtype", "float32", *TAUGHT),
        35,
        tasks=True,
        student=PRUNED,
    ),
    Row("width-prune", SMALLER, "3/4 of the FFN channels", _ours("prune", "width-prune"), 8),
    Row("depth-prune", SMALLER, "3/4 of the blocks", _ours("prune", "depth-prune"), 3),
    Row("gptq-w8a8", PRODUCTS, "int8 by int8", _quantized("gptq-w8a8", group_size=None), 8),
    Row("smoothquant-w8a8", PRODUCTS, "int8 by int8, smoothed", _quantized("smoothquant-w8a8", group_size=None), 9),
    Row(
        "gptq-w4a16, FP8 cache",
        OTHERS,
        "groups of 64; keys and values in FP8",
        _quantized("gptq-w4a16", "--kv-cache", "fp8"),
        15,
        usual=False,
    ),
)


def _peer(tool: str, name: str, group: str, what: str, minutes: float, *options: str, usual: bool = True) -> Row:
    return Row(
        name,
        group,
        what,
        ("{model}", "{tokens}", "{out}", "--dtype", "float32", *options),
        minutes,
        tool=tool,
        usual=usual,
    )


PEER_ROWS = (
    *(
        _peer(LLM_COMPRESSOR, f"llm-compressor GPTQ, W{bits}", group, G64, 8, "--bits", str(bits), "--group-size=64")
        for bits, group in ((4, WEIGHTS_4), (3, WEIGHTS_3), (2, WEIGHTS_2))
    ),
    _peer(LLM_COMPRESSOR, "llm-compressor SparseGPT", SPARSE, "2:4", 17, "--sparse"),
    *(
        _peer(GPTQMODEL, f"GPTQModel, W{bits}", group, G64, 20, "--bits", str(bits), "--group-size=64")
        for bits, group in ((4, WEIGHTS_4), (3, WEIGHTS_3), (2, WEIGHTS_2))
    ),
    *(
        _peer(AUTO_ROUND, f"AutoRound, W{bits}", group, G64, 24, "--bits", str(bits), "--group-size=64", usual=False)
        for bits, group in ((4, WEIGHTS_4), (2, WEIGHTS_2), (3, WEIGHTS_3))
    ),
)
