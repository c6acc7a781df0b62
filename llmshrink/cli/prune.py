"""`llmshrink prune`: a model in, the same model with most of its weights' worth in half of them out."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llmshrink.cli import quantize as shared
from llmshrink.cli.show import JsonFlag, show

Repair = Annotated[
    bool | None,
    typer.Option("--repair/--no-repair", help="Exact least squares on what is kept, instead of the recipe's choice."),
]

StoredAs = Annotated[
    Literal["compressed-tensors", "llmshrink"],
    typer.Option(
        "--format", help="How OUT lies on disk: a standard checkpoint, zeros and all; or 2:4 without its zeros."
    ),
]


def prune(
    model: shared.Model,
    output: shared.Output,
    recipe: shared.RecipeName = "alps-2of4",
    calibration: shared.Calibration = None,
    samples: shared.Samples = None,
    seq_len: shared.SeqLen = None,
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
    strict: shared.Strict = False,
    verify: shared.Verify = True,
    json: JsonFlag = False,
) -> int:
    """Prune MODEL's weights into OUT. A run that was stopped goes on when the same command is given again."""
    from llmshrink import api
    from llmshrink.run.progress import Shown

    with Shown(json=json) as progress:
        report = api.prune(
            model,
            output=output,
            recipe=recipe,
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
            strict=strict,
            verify=verify,
            progress=progress,
        )
    show(report, as_json=json)
    return 0 if report.ok else 1
