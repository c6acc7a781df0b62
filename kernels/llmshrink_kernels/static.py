"""What the compiler made of a kernel: facts that need no GPU, from the machine code of any target.

`compile_for` compiles a Triton function for a compute capability and reads the SASS back. Most of a memory-bound
kernel's time is its main loop, so that is what is counted: the longest span between a branch and the label behind it
to which it jumps. A count is of one warp's instructions, which is what each of its 32 threads goes through; divided by
the weights that a thread's share of a step comes to, it is the figure of the instruction budget. Static counts say
what must be issued, not how long it waits.

TRITON_INTERPRET must not have been set when the kernel was imported: an interpreted function has nothing to compile.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
"""Bytes of shared memory that one program may have, by compute capability (CUDA C Programming Guide, table of technical
specifications: 163 KB and 227 KB)."""

INSTRUCTION = re.compile(r"^[^\t]*\t\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
LABEL = re.compile(r"^\s*(LBB\w+):")
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclass(frozen=True)
class Facts:
    """One kernel, compiled for one target.

    shared: bytes of shared memory. registers: of a thread. stack: bytes of a thread, where spilled registers go.
    whole, loop: how often each instruction occurs in the kernel and in its main loop (the name before the first dot).
    """

    shared: int
    registers: int
    stack: int
    whole: Mapping[str, int]
    loop: Mapping[str, int]

    @property
    def loop_length(self) -> int:
        """Instructions of the main loop."""
        return sum(self.loop.values())

    def per_weight(self, weights: float) -> float:
        """Instructions of the main loop for each of the `weights` that one thread's share of a step comes to."""
        return self.loop_length / weights


@dataclass(frozen=True)
class Case:
    """A kernel and what it is to be compiled for, in words that survive JSON.

    kernel: "module:function". capability: 80, 90, 100. arguments: the function's runtime arguments in order, name ->
    Triton's type ("*fp16", "i32"), or None for a pointer that isn't given; pointers are taken as aligned to 16 bytes
    and integers as multiples of 16, unless the type ends in "?". constants: its constexpr arguments.
    """

    kernel: str
    capability: int
    arguments: Mapping[str, str | None]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int

    def compile(self) -> Facts:
        """Compile, and count."""
        module, name = self.kernel.split(":")
        return compile_for(
            self.capability,
            getattr(importlib.import_module(module), name),
            self.arguments,
            self.constants,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


def compile_for(
    capability: int,
    function: Any,
    arguments: Mapping[str, str | None],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int,
) -> Facts:
    """Compile `function` for compute capability `capability` (80, 90, 100) and count.

    The arguments are those of a `Case`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if kind is None else kind.rstrip("?") for name, kind in arguments.items()}
    aligned = [name for name, kind in arguments.items() if kind is not None and not kind.endswith("?")]
    source = ASTSource(
        fn=function,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs={**constants, **{name: None for name, kind in arguments.items() if kind is None}},
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    instructions, main = _read(compiled.asm["sass"])
    registers, stack = _resources(compiled.asm["cubin"])
    return Facts(compiled.metadata.shared, registers, stack, dict(Counter(instructions)), dict(Counter(main)))


def _read(sass: str) -> tuple[list[str], list[str]]:
    """All instructions, and those of the main loop (none, if nothing branches back)."""
    names: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[str, int]] = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := INSTRUCTION.match(line):
            names.append(instruction[1].split(".")[0])
            if names[-1] == "BRA" and (target := re.search(r"LBB\w+", instruction[2])):
                branches.append((target[0], len(names)))
    spans = [(labels[target], end) for target, end in branches if labels.get(target, end) < end]
    start, end = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))
    return names, names[start:end]


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread, as cuobjdump (Triton ships it) tells them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = RESOURCES.search(told)
    assert found is not None, told
    return int(found[1]), int(found[2])
