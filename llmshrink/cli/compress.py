"""`llmshrink compress`: whatever a recipe says, in one run."""

from __future__ import annotations

from typing import Annotated

import typer

from llmshrink.cli import quantize as shared
from llmshrink.cli.prune import Repair, StoredAs
from llmshrink.cli.show import JsonFlag, show


def compress(
    model: shared.Model,
    output: shared.Output,
    recipe: Annotated[str, typer.Option("--recipe", help="A shipped recipe (`llmshrink recipes`) or a YAML file.")],
    calibration: shared.Calibration = None,
    samples: shared.Samples = None,
    seq_len: shared.SeqLen = None,
    bits: shared.Bits = None,
    group_size: shared.GroupSize = None,
    asymmetric: shared.Asymmetric = None,
    method: shared.Method = None,
    repair: Repair = None,
    format: StoredAs = "compressed-tensors",
    set_: shared.Set = None,
    device: shared.Device = None,
    dtype: shared.Dtype = None,
    batch_size: shared.BatchSize = None,
    seed: shared.Seed = 0,
    work_dir: shared.WorkDir = None,
    overwrite: shared.Overwrite = False,
    max_shard_size: shared.MaxShardSize = "5GB",
    trust_remote_code: shared.TrustRemoteCode = False,
    serve_tp: shared.ServeTp = 1,
    strict: shared.Strict = False,
    verify: shared.Verify = True,
    json: JsonFlag = False,
) -> int:
    """Carry out a recipe on MODEL, into OUT. A run that was stopped goes on when the same command is given again."""
    from llmshrink import api
    from llmshrink.run.progress import Shown

    with Shown(json=json) as progress:
        report = api.compress(
            model,
            output=output,
            recipe=recipe,
            bits=bits,
            group_size=group_size,
            asymmetric=asymmetric,
            method=method,
            repair=repair,
            format=format,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            set=tuple(set_ or ()),
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            seed=seed,
            work_dir=work_dir,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
            serve_tp=serve_tp,
            strict=strict,
            verify=verify,
            progress=progress,
        )
    show(report, as_json=json)
    return 0 if report.ok else 1
