"""What `quantize`, `prune` and `compress` share: their options, and how they call their twin and say what it found."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmshrink.cli.sharing import sharing
from llmshrink.cli.show import show

if TYPE_CHECKING:
    from llmshrink.distillation.report import DistillReport
    from llmshrink.planning.report import Plan
    from llmshrink.run.report import QuantizeReport


def shipped_recipes(incomplete: str) -> list[str]:
    """What a shell may complete the name of a recipe to; a file, where it is none of these."""
    from llmshrink.recipe.read import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hub id (owner/name or owner/name@revision), a folder, or `demo`.")
]
Output = Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="The folder to write; it appears whole.")]
RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe", help="A shipped recipe (`llmshrink recipes`) or a YAML file.", autocompletion=shipped_recipes
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="A name from `datasets`, a .txt, .jsonl or .parquet file, or `demo`; else a public mix."),
]
Samples = Annotated[int | None, typer.Option(min=1, help="Calibration sequences (256 for a real model).")]
SeqLen = Annotated[int | None, typer.Option(min=1, help="Tokens in each (2048, or the model's limit where shorter).")]
Begins = Annotated[
    Literal["auto", "always", "never"],
    typer.Option("--bos", help="Whether each window begins with BOS; auto: where family or tokenizer need it."),
]
Bits = Annotated[int | None, typer.Option(help="Bits of a weight: 2, 3, 4 or 8, instead of the recipe's.")]
GroupSize = Annotated[
    int | None, typer.Option(help="Inputs that share a scale (-1: a whole row), instead of the recipe's.")
]
Asymmetric = Annotated[
    bool | None, typer.Option("--asymmetric/--symmetric", help="With or without zero-points, instead of the recipe's.")
]
Method = Annotated[
    str | None, typer.Option(help="gptq or rtn, instead of the recipe's; what only the old one reads is left out.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PATH=VALUE", help="Any field of the recipe, as steps.0.quantize.bits=3. Repeatable."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; left out: the fastest that is there.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16: what the model computes in; auto: what is fastest on this machine."
    ),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Sequences in a forward; left out: chosen by their length.")]
Seed = Annotated[int, typer.Option(min=0, help="Which calibration text is drawn.")]
WorkDir = Annotated[str | None, typer.Option(help="Where what a run keeps on disk meanwhile goes; else beside OUT.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if llmshrink made it.")]
MaxShardSize = Annotated[str, typer.Option(help="The largest file of weights, as 5GB or 500MB.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's repository run its own Python here.")
]
ServeTp = Annotated[int, typer.Option(min=1, help="Over how many devices it will be served (tensor parallel).")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse when a site can't be quantized exactly as asked.")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Reload the result and compare, before OUT appears.")
]
Push = Annotated[
    str | None, typer.Option(metavar="OWNER/NAME", help="Publish OUT on the Hub at the end, as `llmshrink push` does.")
]
Private = Annotated[bool, typer.Option("--private", help="With --push: only its owner sees a repository made now.")]
Yes = Annotated[
    bool, typer.Option("--yes", help="With --push: publish what would be asked about, as under a licence that binds.")
]
KvCacheAs = Annotated[
    str | None,
    typer.Option(
        "--kv-cache", help="fp8: keys and values are cached in FP8, with scales in OUT; none: as the recipe's."
    ),
]
Repair = Annotated[
    bool | None,
    typer.Option("--repair/--no-repair", help="Least squares on what is kept, instead of the recipe's choice."),
]

StoredAs = Annotated[
    Literal["compressed-tensors", "llmshrink"],
    typer.Option(
        "--format", help="How OUT lies on disk: a standard checkpoint, zeros and all; or 2:4 without its zeros."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what the run would need and yield (`llmshrink plan`), and do nothing.")
]


def settings(
    calibration: Calibration = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    bos: Begins = "auto",
    set_: Set = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    work_dir: WorkDir = None,
    overwrite: Overwrite = False,
    max_shard_size: MaxShardSize = "5GB",
    trust_remote_code: TrustRemoteCode = False,
    serve_tp: ServeTp = 1,
    strict: Strict = False,
    verify: Verify = True,
    push: Push = None,
    private: Private = False,
    yes: Yes = False,
) -> None:
    """Never called: its signature is what `with_settings` gives a verb."""


with_settings = sharing(settings)


def show_plan(plan: Plan, *, json: bool) -> int:
    """Print a plan; returns the exit code."""
    show(plan, as_json=json)
    return 0 if plan.ok else 1


def carry_out(
    twin: Callable[..., QuantizeReport | DistillReport | None],
    model: str,
    *,
    json: bool,
    set_: list[str] | None,
    dry_run: bool = False,
    **given: Any,
) -> int:
    """Run a verb's Python twin with progress on the screen, and print its report; returns the exit code.

    dry_run: print the plan instead; 1 where it doesn't fit this machine.
    """
    from llmshrink.run.progress import Shown

    if dry_run:
        from llmshrink import api
        from llmshrink.api.publishing import check_publishing

        check_publishing(given["push"], private=given["private"], yes=given["yes"])
        verb: Any = twin.__name__
        return show_plan(api.plan(model, verb=verb, set=tuple(set_ or ()), **given), json=json)
    with Shown(json=json) as progress:
        report = twin(model, set=tuple(set_ or ()), progress=progress, **given)
    if report is None:  # of several processes another one speaks
        return 0
    show(report, as_json=json)
    return 0 if report.ok else 1
