"""The model card: what this checkpoint is, what it cost, and how to use it, in the Hub's metadata and in words.

Names come from models, folders, texts and records that anybody may have made, and a card is rendered on someone's
site: in the metadata they are quoted by YAML, in the text they are escaped (`inert`), and a link is made of an id of
the Hub's alone.

It is made from the folder alone (the record, the recipe, the seal, the original's licence), so that the same folder has
the same card to the byte, and no path of a machine is in it. What only others know is handed in: what was evaluated,
and under which name it is published.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmshrink_eval.bounded import Unreadable, parse_yaml
from llmshrink_eval.inert import code, escaped, fenced

from llmshrink.errors import CheckpointError, SourceError
from llmshrink.run import disk
from llmshrink.run.inspect import InspectReport, inspect
from llmshrink.run.licence import Licence, licence_of
from llmshrink.run.original import Original, original_of
from llmshrink.run.output import RECORD
from llmshrink.run.report import SiteRow, VerifyReport, changes, size
from llmshrink.run.seal import known_files, note_files, read_seal, seal_of, weight_bytes, write_seal
from llmshrink.run.storage import format_of
from llmshrink.run.verify import read_record

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
HERE = "<this folder>"
INTERVAL = 1.96
"""Standard errors to either side of a mean, for 95 %."""
LAYOUTS: dict[str, str] = {
    "compressed-tensors": "compressed-tensors {formats}",
    "llmshrink": "llmshrink `sparse24`: 2:4 without its zeros",
    "bitsandbytes": "bitsandbytes' own, as transformers saves it",
}


@dataclass(frozen=True)
class Figure:
    """One number for the Hub's `model-index`. data: what it was measured on; kind: the metric; title: in words."""

    data: str
    kind: str
    title: str
    value: float


@dataclass(frozen=True)
class Evaluation:
    """What `llmshrink eval` found of a checkpoint: Markdown, and the figures in it."""

    lines: tuple[str, ...]
    figures: tuple[Figure, ...]


def complete(folder: Path, verified: VerifyReport | None, more: str | None = None) -> None:
    """The last of an output: its files in the record, the seal when it read back as it was computed, and the card.

    more: Markdown that goes on where the card ends; None: what README.md has there already.
    """
    more = beyond(folder) or "" if more is None else more
    note_files(folder)
    if verified is not None:
        write_seal(folder, seal_of(folder, verified, known_files(read_record(folder), None) or ()))
    write_card(folder, more)


def write_card(folder: Path, more: str = "") -> None:
    """README.md; more: Markdown of whoever knows more, which goes on where the card ends."""
    disk.write_text(folder / CARD, card(folder) + more)


def beyond(folder: Path) -> str | None:
    """What README.md has after the card; None where it doesn't begin with that, as somebody edited it."""
    own = card(folder)
    try:
        text = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    except UnicodeDecodeError:
        return None
    return text.removeprefix(own) if text.startswith(own) else None


@dataclass(frozen=True)
class Subject:
    """All that a card is made of. recipe: recipe.yaml, where there is one; weights: bytes of their files."""

    record: dict[str, Any]
    made: InspectReport
    licence: Licence
    recipe: str | None
    weights: int
    original: Original = field(default_factory=Original)

    @classmethod
    def of(cls, folder: Path) -> Subject:
        """What a checkpoint's folder says of it. Raises SourceError when it isn't an output, or no card can say it."""
        record = read_record(folder)
        if (said := disk.unwritable(record)) is not None:
            raise SourceError(f"{folder / RECORD}: {said}; correct that, or make it again")
        file = folder / "recipe.yaml"
        recipe = file.read_text(encoding="utf-8", errors="replace").rstrip() if file.is_file() else None
        return cls(record, inspect(folder), licence_of(folder), recipe, weight_bytes(folder), original_of(folder))


def card(
    folder: Path,
    *,
    name: str | None = None,
    evaluation: Evaluation | None = None,
    seal: Mapping[str, Any] | None = None,
) -> str:
    """The text. name: the repository that it is published as; None: not yet. seal: None: the one in the folder."""
    return compose(Subject.of(folder), name=name, evaluation=evaluation, seal=seal or read_seal(folder))


def compose(
    about: Subject,
    *,
    name: str | None = None,
    evaluation: Evaluation | None = None,
    seal: Mapping[str, Any] | None = None,
) -> str:
    """The text, from what it is made of. Raises CheckpointError for a recipe.yaml that is none."""
    record = about.record
    title = name.rpartition("/")[2] if name else f"{record['model']}, {record['recipe']}"
    parts = (
        ["---", *_metadata(about, title, evaluation), "---", "", f"# {escaped(title)}", ""],
        _what(about),
        _quality(about, evaluation),
        _recipe(about),
        _use(record, name or HERE),
        _layers(about.made),
        _origin(record, seal),
        _limits(record, evaluation),
    )
    return "\n".join(line for part in parts for line in part)


def _metadata(about: Subject, title: str, evaluation: Evaluation | None) -> list[str]:
    """The Hub's front matter, through its own classes, which refuse what it wouldn't read."""
    from huggingface_hub import EvalResult, ModelCardData

    record = about.record
    figures = [*(evaluation.figures if evaluation else ()), *_figures(record)]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", figure.data).strip("-") or "text",
            dataset_name=figure.data,
            metric_type=figure.kind,
            metric_name=figure.title,
            metric_value=figure.value,
        )
        for figure in figures
    ]
    stated: dict[str, Any] = dict(about.licence.front_matter())
    if _on_the_hub(record):
        stated = {"base_model": record["model"], "base_model_relation": _relation(about.made.sites), **stated}
    elif about.original.bases:  # what the original was made of, since it has no page of its own
        stated = {"base_model": list(about.original.bases), **stated}
    if about.original.languages:
        stated["language"] = list(about.original.languages)
    own = _tags(record, about.made)
    data = ModelCardData(
        **stated,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*own, *(tag for tag in about.original.tags if tag not in own)],
        model_name=title,
        eval_results=results,
    )
    return data.to_yaml().splitlines()


def _on_the_hub(record: Mapping[str, Any]) -> bool:
    """Whether the original has a page there."""
    return bool(record["revision"]) and _HUB_ID.fullmatch(record["model"]) is not None


def _figures(record: dict[str, Any]) -> list[Figure]:
    """The run's own, on text that it held out."""
    quality, data = record["quality"], f"{record['held_out']}, held out"
    return [
        Figure(data, "perplexity", "Perplexity", _rounded(quality["ppl_after"])),
        Figure(data, "kl_divergence", "KL from the original, nats/token", _rounded(quality["kl_mean"])),
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _relation(rows: Iterable[SiteRow]) -> str:
    """The Hub knows finetune, adapter, merge and quantized; a pruned or taught model is nearest to a finetune."""
    return "quantized" if any(row.bits is not None for row in rows) else "finetune"


def _tags(record: dict[str, Any], made: InspectReport) -> list[str]:
    format = format_of(record)
    quantized = any(row.bits is not None for row in made.sites)
    pruned = made.structure is not None or any(row.pruned is not None for row in made.sites)
    found = ["llmshrink", *([format] if quantized and format != "llmshrink" else [])]
    found += ["quantized"] if quantized else []
    return [*found, *(["pruned"] if pruned else []), *(["distilled"] if "distill" in record else [])]


def _what(about: Subject) -> list[str]:
    record, made, licence = about.record, about.made, about.licence
    quantized = [row for row in made.sites if row.bits is not None]
    schemes = "; ".join(sorted({_scheme(row) for row in quantized}))
    format = format_of(record)
    plain = format == "compressed-tensors" and not quantized
    names = {None: "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
    formats = ", ".join(f"`{names[kind]}`" for kind in dict.fromkeys(row.activations for row in quantized))
    layout = "plain safetensors, in the original's dtype" if plain else LAYOUTS[format].format(formats=formats)
    base = escaped(record["model"])
    if _on_the_hub(record):
        base = f"[{base}](https://huggingface.co/{record['model']})"
    revision = f" at revision {code(record['revision'])}" if record["revision"] else ""
    others = "embeddings and the head are as they were" if "distill" in record else "all else is as it was"
    by = f" (says the original's {escaped(licence.said_by.removeprefix('SOURCE_'))})" if licence.said_by else ""
    return [
        f"{base}{revision}, made smaller by llmshrink {escaped(record['identity']['versions']['llmshrink'])} "
        f"with the recipe {code(record['recipe'])}.",
        "",
        *([f"- Shape: {escaped(made.structure)}; its config.json says so."] if made.structure else []),
        f"- Weights: of {len(made.sites)} linear layers in the blocks {escaped(changes(made.sites))}"
        + (f" ({escaped(schemes)})" if schemes else "")
        + f"; {others}.",
        *([f"- Keys and values are cached in {escaped(made.kv_cache)}."] if made.kv_cache else []),
        *_distilled(record),
        f"- Format: {layout}.",
        f"- Licence: {escaped(str(licence))}{by}."
        if licence.id
        else "- Licence: the original names none that llmshrink finds.",
        "",
    ]


def _distilled(record: dict[str, Any]) -> list[str]:
    """What a distillation did, as a line of the list; the whole of it goes on where the card ends."""
    if "distill" not in record:
        return []
    made = record["distill"]
    return [
        f"- Distilled from {escaped(made['teacher'])}: {made['steps']:,} steps on {escaped(made['data'])}; "
        f"KL on held-out text {made['before']['kl_mean']:.5f} before, {record['quality']['kl_mean']:.5f} after."
    ]


def _scheme(row: SiteRow) -> str:
    names = {"bnb-nf4": "NF4", "bnb-nf4-double": "NF4, their absmax in 8 bits", "bnb-int8": "LLM.int8"}
    method = names.get(row.method or "")
    if row.activations is not None:
        kind = "8-bit integers" if row.activations == "int8" else "FP8 (E4M3)"
        return f"{kind} with one scale a row, activations rounded to the same token by token"
    return f"{row.bits}-bit, groups of {row.group_size}" + (f", {method}" if method else "")


def _quality(about: Subject, evaluation: Evaluation | None) -> list[str]:
    record, made = about.record, about.made
    quality = record["quality"]
    return [
        "## What it costs",
        "",
        *(
            ["Measured by `llmshrink eval`:", "", *evaluation.lines, "", "And by the run itself:", ""]
            if evaluation
            else []
        ),
        "| | original | this checkpoint |",
        "|---|---:|---:|",
        f"| weights on disk | {size(record['bytes_before'])} | {size(about.weights)} |",
        f"| bits per weight, all | | {made.bits_per_weight:.2f} |",
        f"| bits per weight, linear layers of the blocks | | {made.linear_bits_per_weight:.2f} |",
        f"| perplexity | {quality['ppl_before']:.3f} | {quality['ppl_after']:.3f} |",
        f"| KL from the original, nats/token | | {quality['kl_mean']:.5f} ± {INTERVAL * quality['kl_stderr']:.5f} |",
        f"| same likeliest next token | | {quality['top1_agreement']:.1%} |",
        "",
        f"Perplexity and KL are of {quality['tokens']:,} tokens of {escaped(record['held_out'])} that the run held out "
        "(± is a 95 % interval): a first look, on text like that which it was calibrated on.",
        "",
    ]


def _recipe(about: Subject) -> list[str]:
    calibration = about.record["calibration"]
    return [
        "## Recipe",
        "",
        *_steps(about.recipe),
        f"It was calibrated on {calibration['tokens']:,} tokens of {escaped(calibration['name'])}"
        f"{', each window beginning with BOS' if calibration.get('bos') else ''}.",
        "",
        *([*fenced(about.recipe, "yaml"), ""] if about.recipe else []),
    ]


def _steps(text: str | None) -> list[str]:
    """Each step as a sentence. Raises CheckpointError where the text isn't a recipe's."""
    try:
        recipe = parse_yaml(text) if text else {}
        found = [f"{escaped(recipe['summary'])}.", ""] if recipe.get("summary") else []
        for number, step in enumerate(recipe.get("steps", []), 1):
            for verb, fields in step.items():
                told = [_told(key, value) for key, value in fields.items() if value is not None]
                found.append(f"{number}. {escaped(verb)}: {escaped(', '.join(told))}.")
        overrides = [code(override["match"]) for override in recipe.get("overrides", [])]
        if overrides:
            found.append(f"{len(recipe['steps']) + 1}. otherwise for {', '.join(overrides)}, see below.")
    except (Unreadable, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError("recipe.yaml: isn't the recipe of a run: it is damaged; copy the folder again") from error
    return [*found, *([""] if found else [])]


def _told(key: str, value: object) -> str:
    """A field of a recipe in words."""
    words = key.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"not {words}"
    return str(value) if key == "method" else f"{words} {value}"


def _use(record: dict[str, Any], name: str) -> list[str]:
    """How to load and serve it, in each way that takes its format."""
    format = format_of(record)
    own = "import llmshrink  # reads the 2:4 format\n" if format == "llmshrink" else ""
    needs = {"llmshrink": " llmshrink", "bitsandbytes": " accelerate bitsandbytes"}.get(format, " compressed-tensors")
    found = ["## How to use it", "", f"With transformers (`pip install transformers{needs}`):", "", "```python"]
    found += f"{own}from transformers import AutoModelForCausalLM, AutoTokenizer\n".splitlines()
    found += ["", f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    found += [f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")', "```", ""]
    if format != "bitsandbytes":
        refused = [note for note in record["notes"] if re.match(r"vllm-\w+ won't", note)]
        beside = "pip install llmshrink  # beside vLLM, which finds its plugin" if format == "llmshrink" else None
        found += [f"With vLLM{' (not everywhere: see the limits below)' if refused else ''}:", ""]
        found += ["```", *([beside] if beside else []), f"vllm serve {name}", "```", ""]
    found += [
        "With llmshrink:",
        "",
        "```python",
        "import llmshrink",
        "",
        f'model = llmshrink.load("{name}")',
        "```",
        "",
    ]
    return found


def _layers(made: InspectReport) -> list[str]:
    """Every compressible layer, folded."""
    lines = ["| layer | shape | bits | group | pruned | bytes | error |", "|---|---|---:|---:|---|---:|---:|"]
    for row in made.sites:
        error = "" if row.error is None else f"{row.error:.3g}"
        pruned = (
            ""
            if row.pruned is None
            else escaped(row.pruned) + ("" if row.zeros is None else f" ({row.zeros:.0%} zeros)")
        )
        bits, group = (
            (row.bits, row.group_size) if row.bits is not None else ("as it was" if not row.pruned else "", "")
        )
        lines.append(
            f"| {escaped(row.name)} | {row.shape[0]} x {row.shape[1]} | {bits} | {group} | {pruned} "
            f"| {row.bytes:,} | {error} |"
        )
    return [
        "<details>",
        f"<summary>All {len(made.sites)} linear layers: how each is stored, and the error of its output</summary>",
        "",
        *lines,
        "",
        "The error is ||(W - Q) X||² / ||W X||² on the calibration text.",
        "",
        "</details>",
        "",
    ]


def _origin(record: dict[str, Any], seal: Mapping[str, Any] | None) -> list[str]:
    """What it was made and verified with."""
    identity = record["identity"]
    lines = ["## Made and verified with", "", f"- Made on {_machine(identity)}."]
    if seal is None:
        return [*lines, "- Not verified: the run was told not to reload what it wrote.", ""]
    return [
        *lines,
        f"- Verified on {_machine(seal['with'])}: {escaped(seal['by'])}, against {escaped(seal['against'])}, on "
        f"{seal['positions']:,} "
        f"next-token log-probabilities (mean difference of at most {seal['tolerance']:g} nats).",
        f"- `verify/` holds those tokens and log-probabilities: `llmshrink verify {HERE}` does it again anywhere.",
        "",
    ]


def _machine(identity: dict[str, Any]) -> str:
    device, threads = identity["device"], identity["threads"]
    where = (
        f"CPU ({identity['instructions']}, {threads} thread{'s' if threads > 1 else ''})" if device == "cpu" else device
    )
    versions = ", ".join(f"{name} {version}" for name, version in identity["versions"].items())
    return escaped(f"{where} with {versions}")


def _begun(note: str) -> str:
    """As a sentence begins; a name stays as its owners write it."""
    return note if re.match(r"vllm|llmshrink", note, re.IGNORECASE) else note[:1].upper() + note[1:]


def _limits(record: dict[str, Any], evaluation: Evaluation | None) -> list[str]:
    # A record of before they were kept has none.
    on_cpus = record.get("cpu_notes", []) if format_of(record) == "compressed-tensors" else []
    notes: Sequence[str] = [*record["notes"], *on_cpus]
    found = [f"- {escaped(_begun(note).rstrip('.'))}." for note in notes]
    found.append(
        f"- It was held to the original on text like {escaped(record['held_out'])}: on text unlike that it may lose "
        "more."
    )
    if evaluation is None or not any("task" in figure.title.lower() for figure in evaluation.figures):
        found.append("- No tasks were run on it: what it lost there isn't known.")
    found.append("- Whatever the original says wrongly, unfairly or unsafely, this says too.")
    return ["## Known limits", "", *found, ""]
