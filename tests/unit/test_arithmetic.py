"""What a model is computed in where nobody asks: by the CPU's flags and the variables that cap them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmshrink.errors import LlmshrinkError
from llmshrink.run import arithmetic
from llmshrink.run.arithmetic import Arithmetic, Processor, automatic, automatic_training, instructions, processor
from llmshrink.run.asked import pick_arithmetic

HASWELL = "flags\t\t: fpu sse2 avx fma avx2 f16c\n"
SKYLAKE = "flags\t\t: fpu avx2 avx512f avx512bw avx512_vnni\n"
ARROW_LAKE = "flags\t\t: fpu avx2 avx_vnni avx_ne_convert avx_vnni_int8\n"
ZEN5 = (
    "processor\t: 0\nflags\t\t: fpu avx2 avx_vnni avx512f avx512_vnni avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n"
)
SAPPHIRE = "flags\t\t: fpu avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile amx_int8\n"
GRAVITON2 = "Features\t: fp asimd evtstrm aes asimdhp asimddp\n"
GRAVITON3 = "Features\t: fp asimd asimdhp asimddp sve i8mm bf16\n"

TABLE = [
    # cpuinfo, environment, the flag by which it multiplies bfloat16
    (HASWELL, {}, ""),
    (SKYLAKE, {}, ""),
    (ARROW_LAKE, {}, ""),
    (ZEN5, {}, "avx512_bf16"),
    (SAPPHIRE, {}, "amx_bf16"),
    (GRAVITON2, {}, ""),
    (GRAVITON3, {}, "bf16"),
    ("", {}, ""),
    (ZEN5, {"ATEN_CPU_CAPABILITY": "avx2"}, ""),
    (ZEN5, {"ATEN_CPU_CAPABILITY": "default"}, ""),
    (ZEN5, {"ATEN_CPU_CAPABILITY": "avx512"}, "avx512_bf16"),
    (ZEN5, {"ATEN_CPU_CAPABILITY": "AVX2"}, "avx512_bf16"),  # torch takes its names in small letters alone
    (ZEN5, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, ""),
    (ZEN5, {"ONEDNN_MAX_CPU_ISA": "avx2_vnni_2"}, ""),
    (ZEN5, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, ""),
    (ZEN5, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16"),
    (ZEN5, {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, "avx512_bf16"),
    (ZEN5, {"ONEDNN_MAX_CPU_ISA": "NONSENSE"}, "avx512_bf16"),
    (ZEN5, {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, ""),
    (ZEN5, {"DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "avx512_bf16"),
    (ZEN5, {"DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": ""}, ""),
    (SAPPHIRE, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, ""),
    (GRAVITON3, {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"}, "bf16"),  # names of x86
]


@pytest.mark.parametrize(("cpuinfo", "environment", "flag"), TABLE)
def test_flags_and_caps_say_whether_bfloat16_is_multiplied(
    cpuinfo: str, environment: dict[str, str], flag: str
) -> None:
    here = processor(cpuinfo, environment)
    assert here.bfloat16 == flag
    fast = "bfloat16" if flag else "float32"
    assert automatic("bfloat16", "cpu", here) == Arithmetic(fast, here.why)
    assert automatic_training("cpu", here) == Arithmetic(fast, here.why)
    # Neither of these changes with the CPU.
    assert automatic("float16", "cpu", here).dtype == automatic("float32", "cpu", here).dtype == "float32"
    assert automatic("bfloat16", "cpu", here, int4=True).dtype == "bfloat16"


def test_the_reason_names_the_flag_or_what_caps_it() -> None:
    assert processor(ZEN5, {}).why == "this CPU multiplies bfloat16 (avx512_bf16)"
    assert processor(HASWELL, {"ATEN_CPU_CAPABILITY": "avx2"}).why == "this CPU has no bfloat16 instructions"
    caps = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    said = "ATEN_CPU_CAPABILITY=avx2 and ONEDNN_MAX_CPU_ISA=AVX2 keep torch from this CPU's bfloat16 instructions"
    assert processor(ZEN5, caps) == Processor("", said, ("ATEN_CPU_CAPABILITY=avx2", "ONEDNN_MAX_CPU_ISA=AVX2"))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_a_gpu_computes_as_stored_and_trains_in_bfloat16(stored: str) -> None:
    assert automatic(stored, "cuda") == Arithmetic(stored, "as it is stored")
    assert automatic_training("cuda").dtype == "bfloat16"


def test_what_nothing_computes_in_is_computed_in_float32() -> None:
    assert automatic("float8_e4m3fn", "cpu").dtype == automatic("float64", "cuda").dtype == "float32"


def test_without_cpuinfo_it_is_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arithmetic, "CPUINFO", tmp_path / "none")
    assert automatic("bfloat16", "cpu") == Arithmetic("float32", processor().why)
    assert "none" in processor().why


def test_what_is_asked_for_is_taken_and_what_isn_t_a_dtype_refused() -> None:
    cpu = torch.device("cpu")
    for name in ("float32", "bfloat16", "float16"):
        assert pick_arithmetic(name, torch.bfloat16, cpu) == Arithmetic(name, "as asked for")
    with pytest.raises(LlmshrinkError, match=r"--dtype int8: choose one of float32, bfloat16, float16, or auto"):
        pick_arithmetic("int8", torch.bfloat16, cpu)


def test_the_instruction_set_tells_cpus_of_one_level_apart() -> None:
    assert instructions("AVX512", processor(ZEN5, {})) == "AVX512 with avx512_bf16"
    assert instructions("AVX512", processor(SKYLAKE, {})) == "AVX512"


@pytest.mark.parametrize(
    "caps",
    [
        {},
        {"ATEN_CPU_CAPABILITY": "avx2"},
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"DNNL_MAX_CPU_ISA": "AVX2"},
    ],
)
def test_torch_reads_the_caps_as_we_do(caps: dict[str, str]) -> None:
    """Where torch says that its level is below AVX-512, or oneDNN that it has no bfloat16, neither do we; and the other
    way round where the CPU has it."""
    code = (
        "import json, torch; from llmshrink.run.arithmetic import processor, BFLOAT16, CPUINFO;"
        "print(json.dumps([processor().bfloat16, torch.backends.cpu.get_cpu_capability(),"
        "torch.ops.mkldnn._is_mkldnn_bf16_supported(), any(f in CPUINFO.read_text() for f in BFLOAT16)]))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.endswith(("_CAPABILITY", "_CPU_ISA"))}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **caps}, capture_output=True, text=True)
    flag, level, onednn, has = json.loads(done.stdout)
    if not has:
        pytest.skip("this CPU has no bfloat16 instructions to keep torch from")
    assert bool(flag) == (level == "AVX512" and onednn)
