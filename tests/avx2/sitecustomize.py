"""Python runs this at its start where the folder is on PYTHONPATH: torch then says that the CPU has AVX2 alone.

vLLM loads its extension by what torch says, and llmshrink's checks ask the same function; no variable of either changes
it. `served.AVX2` has the variables that keep torch's and oneDNN's own code from newer instructions.
"""

import sys

from llmshrink.serving.vllm import compat

NEWER = ("avx512", "avx10", "amx", "avx_vnni", "avx_ifma", "avx_ne_convert")


def _pretend() -> None:
    cpu = sys.modules["torch.cpu"]
    own = cpu.get_capabilities
    cpu.get_capabilities = lambda: {  # type: ignore[attr-defined]
        name: said if said is not True else not name.startswith(NEWER) for name, said in own().items()
    }
    for name in list(vars(cpu)):  # vLLM asks some of them one by one
        if name.startswith(tuple(f"_is_{newer}" for newer in NEWER)) or name == "_is_vnni_supported":
            setattr(cpu, name, lambda: False)


compat.once_imported("torch.cpu", _pretend)
