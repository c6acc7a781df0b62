"""`llmshrink quantize`: a model in, an int4 (or 2, 3, 8 bit) checkpoint out."""

from __future__ import annotations

from typing import Any

from llmshrink.cli import runs
from llmshrink.cli.show import JsonFlag


@runs.with_settings
def quantize(
    model: runs.Model,
    output: runs.Output,
    recipe: runs.RecipeName = "gptq-w4a16",
    bits: runs.Bits = None,
    group_size: runs.GroupSize = None,
    asymmetric: runs.Asymmetric = None,
    method: runs.Method = None,
    kv_cache: runs.KvCacheAs = None,
    dry_run: runs.DryRun = False,
    json: JsonFlag = False,
    **settings: Any,
) -> int:
    """Quantize MODEL's weights into OUT. A run that was stopped goes on when the same command is given again."""
    from llmshrink import api

    return runs.carry_out(
        api.quantize,
        model,
        output=output,
        recipe=recipe,
        bits=bits,
        group_size=group_size,
        asymmetric=asymmetric,
        method=method,
        kv_cache=kv_cache,
        dry_run=dry_run,
        json=json,
        **settings,
    )
