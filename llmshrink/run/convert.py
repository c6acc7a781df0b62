"""A 2:4 checkpoint of llmshrink's from one format to the other: every weight the same, to the bit; there and back too.

A file of weights becomes a file of the same name, so that nothing is ever whole in memory but one of them. Everything
else is carried over as it is, the run's reference under `verify/` too: the result is verified against it, as the
original was, before it gets its name. A conversion that was killed goes on from the last finished file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from llmshrink_eval.bounded import parse_json
from torch import Tensor

from llmshrink.checkpoint.beside import NOTHING, LeftBehind, belongs, check_side_files
from llmshrink.checkpoint.index import INDEX_FILE, CheckpointIndex
from llmshrink.checkpoint.links import check_link
from llmshrink.checkpoint.preflight import check_room
from llmshrink.checkpoint.unchanged import Watched
from llmshrink.errors import CheckpointError, SourceError
from llmshrink.formats import kv_cache, stored
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.formats.sparse24 import PATTERN, Sparse24Scheme
from llmshrink.formats.stored import Format, Layout, Scheme
from llmshrink.run import disk
from llmshrink.run.asked import check_apart
from llmshrink.run.card import beyond, complete
from llmshrink.run.finish import TIMING, left_out_of, pieces, published, serve_line
from llmshrink.run.journal import Workspace
from llmshrink.run.output import RECORD, partial_folder
from llmshrink.run.rehearse import config_bytes, rehearse
from llmshrink.run.report import VerifyReport, rows_of, size, summary_of
from llmshrink.run.seal import files_of, known_files, read_seal, shard_sums, weight_bytes
from llmshrink.run.shards import layout_of, open_shards, write_part
from llmshrink.run.storage import BITS, GROUP_STEP, format_of
from llmshrink.run.verify import read_record, verify_reload
from llmshrink.weights import Dense, GroupedInt, Sparse24
from llmshrink.weights.sparse24 import VALUE_DTYPES

WHOLE = 1 << 62
"""A limit on shards that none reaches: files stay as they are cut."""
REWRITTEN = ("config.json", "README.md", INDEX_FILE)


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did. Sizes in bytes, of all weights; sites: how many linears changed their form."""

    source: Path
    output: Path
    format: Format
    bytes_before: int
    bytes_after: int
    sites: int
    notes: tuple[str, ...]
    seconds: float
    serve: str
    verification: VerifyReport
    left_behind: LeftBehind = NOTHING

    @property
    def ok(self) -> bool:
        """Whether the result read back as the original run computed it."""
        return self.verification.ok

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {**asdict(self), "source": str(self.source), "output": str(self.output), "ok": self.ok}

    def lines(self) -> list[str]:
        """The report for a person."""
        return [
            f"{self.source} -> {self.output}  ({self.format})",
            f"size        {size(self.bytes_before)} -> {size(self.bytes_after)}",
            f"sites       {self.sites} stored anew, every weight as it was",
            *self.verification.lines(),
            *(f"note        {note}" for note in [*self.notes, *self.left_behind.lines()]),
            f"serve       {self.serve}",
        ]


def convert(source: Path, output: Path, format: Format, *, overwrite: bool) -> ConvertReport:
    """Write `source`, an output of llmshrink, as `output` in the other format.

    Raises SourceError when it isn't one or is in that format already, CheckpointError naming the first layer that the
    format can't hold, OutputError when `output` is in the way. A result that doesn't verify isn't published.
    """
    started = time.perf_counter()
    record, config = check(source, output, format)
    with Watched.open(source) as index, Workspace(output, overwrite=overwrite) as workspace:
        plan = Conversion.of(record, config, index, format)
        done = workspace.finished_bytes()
        check_room(output, max(0, plan.nbytes() - done))
        sums = {name: disk.sha256_of(source / name) for name in ("config.json", RECORD)}
        identity = {"convert": index.fingerprint(), **sums, "record": record["identity"], "format": format}
        beside = {name: disk.sha256_of(source / name) for name in _carried(source, record)}
        parts = workspace.begin(identity, {"model": index}, beside)
        if parts is None:
            folder = output
        else:
            folder = workspace.checkpoint
            _write(plan, workspace, source, record, config)
        report = _report(plan, source, folder, output, started)
        if report.ok and parts is not None:
            complete(folder, report.verification, beyond(source) or "")
            disk.fsync_folder(folder)
            workspace.publish()
    return report


def check(source: Path, output: Path, format: Format) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record and config.json of a folder that can be converted. Raises SourceError and OutputError."""
    record = read_record(source)
    if not {"format_notes", "other_linears"} <= record.keys():
        raise SourceError(
            f"{source}: its {RECORD} is an earlier llmshrink's, which kept less: make the checkpoint again"
        )
    shape = summary_of(record)
    if shape is not None:
        raise SourceError(
            f"{source}: is a plain model of another shape ({shape}), which every engine reads: there is nothing to "
            "convert; prune or quantize it like any other model"
        )
    if format_of(record) == "bitsandbytes":
        raise SourceError(
            f"{source}: is bitsandbytes', whose codes neither format holds; quantize the original by another recipe"
        )
    if format_of(record) == format:
        raise SourceError(f"{source}: is stored as {format} already; name the other format with --format")
    check_apart(output, (("the model", source),))
    check_side_files(source, trust_remote_code=True, besides=(output, partial_folder(output)))
    data = config_bytes(source)
    config: dict[str, Any] = parse_json(data)
    recipe = source / "recipe.yaml"
    check_link(recipe, source)
    rehearse(record, source, recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None)
    return record, config


@dataclass(frozen=True, eq=False)
class Conversion:
    """before, after: scheme by linear, of those that are stored anew; shapes, dtypes: of their weights, or scales."""

    index: CheckpointIndex
    format: Format
    before: Mapping[str, Scheme | None]
    after: Mapping[str, Scheme | None]
    shapes: Mapping[str, tuple[int, int]]
    dtypes: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, record: dict[str, Any], config: dict[str, Any], index: CheckpointIndex, format: Format) -> Conversion:
        """Every changed linear, read once to see that the format can hold it. Raises CheckpointError where not."""
        schemes = stored.schemes(config.get("quantization_config"))
        if kv_cache.rounds(config.get("quantization_config")):
            raise CheckpointError(
                f"{index.folder}: caches keys and values in FP8, which the {format} format has no word for; compress "
                "the original without kv_cache"
            )
        rounded = next((name for name, scheme in schemes.items() if stored.activations_of(scheme)), None)
        if rounded is not None:
            raise CheckpointError(
                f"{rounded}: rounds its inputs to 8 bits, which the {format} format knows nothing of; quantize the "
                "original by a recipe without activations"
            )
        rows = {row.name: row for row in rows_of(record["sites"]) if row.changed or row.name in schemes}
        if not rows:
            raise CheckpointError(f"{index.folder}: no linear in it was changed; there is nothing to convert")
        before = {name: schemes.get(name) for name in rows}
        after, dtypes = {}, {}
        for name, scheme in before.items():
            weight = stored.whole(stored.read(name, index.read, scheme))
            assert isinstance(weight, Dense | GroupedInt), "a checkpoint of bitsandbytes isn't converted"
            after[name] = _sparse(name, weight) if format == "llmshrink" else _standard(scheme)
            dtypes[name] = weight.weight.dtype if isinstance(weight, Dense) else weight.scale.dtype
        return cls(index, format, before, after, {name: row.shape for name, row in rows.items()}, dtypes)

    def old_keys(self) -> dict[str, str]:
        """Key of the source -> the linear that it is a part of."""
        return {key: name for name, scheme in self.before.items() for key in stored.names(name, scheme)}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A linear's tensors in the new format."""
        weight = stored.whole(stored.read(name, self.index.read, self.before[name]))
        return stored.tensors(name, stored.as_stored(weight, self.after[name]))

    def layout(self, name: str) -> Layout:
        """What `tensors` gives, without reading anything."""
        return stored.layout(name, self.after[name], self.shapes[name], self.dtypes[name])

    def files(self) -> dict[str, Layout]:
        """Each file's tensors: a linear goes where its first tensor lay, all else stays where it is."""
        old = self.old_keys()
        first = {stored.names(name, scheme)[0]: name for name, scheme in self.before.items()}
        found: dict[str, Layout] = {file.name: {} for file in self.index.files()}
        for key in self.index:
            entry = self.index.entry(key)
            if key not in old:
                found[entry.file.name][key] = (entry.dtype, entry.shape)
            elif key in first:
                found[entry.file.name] |= self.layout(first[key])
        return found

    def nbytes(self) -> int:
        """Bytes of the result's weights, with a megabyte for all that is beside them."""
        return 1_000_000 + sum(stored.nbytes(layout) for layout in self.files().values())


def _sparse(name: str, weight: Dense | GroupedInt) -> Sparse24Scheme:
    """The scheme of a weight in the llmshrink format. Raises CheckpointError saying what of it doesn't fit."""
    fault = _fault(weight)
    if fault is None:
        try:
            return Sparse24Scheme.of(Sparse24.of(weight))
        except ValueError as error:
            fault = str(error).removeprefix(f"weight is not {PATTERN}: ")
    raise CheckpointError(
        f"{name}: can't be stored as {PATTERN}: {fault}; convert takes what a recipe such as alps-2of4 or "
        "alps-2of4-gptq-w4a16 makes"
    )


def _fault(weight: Dense | GroupedInt) -> str | None:
    in_features = weight.weight.shape[1] if isinstance(weight, Dense) else weight.shape[1]
    if in_features % 4:
        return f"its {in_features} inputs aren't a multiple of 4"
    if isinstance(weight, Dense):
        kind = str(weight.weight.dtype).removeprefix("torch.")
        return None if weight.weight.dtype in VALUE_DTYPES else f"{kind}, and only bfloat16 and float16 can"
    if weight.zero_point is not None:
        return "asymmetric, and only symmetric integers can"
    if weight.bits not in BITS:
        return f"{weight.bits} bits, and only {' and '.join(map(str, BITS))} can"
    if weight.group_size % GROUP_STEP and weight.group_size != in_features:
        return f"groups of {weight.group_size}, and only multiples of {GROUP_STEP} and whole rows can"
    return None


def _standard(scheme: Scheme | None) -> GroupedIntScheme | None:
    assert isinstance(scheme, Sparse24Scheme), "an output in llmshrink's format lists its dense linears apart"
    return None if scheme.group_size is None else GroupedIntScheme(scheme.bits, scheme.group_size, True)


def _write(
    plan: Conversion, workspace: Workspace, source: Path, record: dict[str, Any], config: dict[str, Any]
) -> None:
    """Everything of the new folder, in the workspace."""
    folder = workspace.checkpoint
    for name in _carried(source, record):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        disk.write_file(folder / name, pieces(source / name), (source / name).stat().st_size)
    finished = {part.name for part in workspace.parts}
    for file in plan.index.files():
        if file.name not in finished:
            _write_file(plan, workspace, file)
    with open_shards(folder, [name for part in workspace.parts for name in part.shards]) as written:
        where = {key: written.entry(key).file.name for key in written}
        total = written.nbytes()
        sizes = {n: sum(written.entry(k).nbytes for k in stored.names(n, s)) for n, s in plan.after.items()}
    disk.write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
    disk.write_json(folder / "config.json", _config(plan, record, config))
    new = {**_record(plan, record, sizes), "shards": shard_sums(workspace.parts)}
    disk.write_json(folder / RECORD, new)


def _write_file(plan: Conversion, workspace: Workspace, file: Path) -> None:
    """One file of weights: a linear goes where its first tensor lay, all else is copied byte for byte."""
    old, index = plan.old_keys(), plan.index
    first = {name: stored.names(name, scheme)[0] for name, scheme in plan.before.items()}
    new: dict[str, Tensor] = {}
    copied = {}
    for key in index:
        entry = index.entry(key)
        if entry.file != file:
            continue
        if key not in old:
            copied[key] = (entry.dtype, entry.shape)
        elif first[old[key]] == key:
            new |= plan.tensors(old[key])

    def bytes_of(key: str) -> Iterator[memoryview | bytes]:
        return iter([disk.tensor_bytes(new[key])]) if key in new else index.read_bytes(key)

    layout = {**copied, **layout_of(new)}
    stem = file.stem.removeprefix("model-")
    part = write_part(workspace.checkpoint, file.name, stem, layout, bytes_of, limit=WHOLE, rows=[])
    workspace.finish_part(part)


def _config(plan: Conversion, record: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The source's config.json with the new quantization_config in the old one's place."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    sites = {row.name: plan.after.get(row.name) for row in rows_of(record["sites"])}
    described = stored.quantization_config(sites, record["other_linears"], plan.format)
    return config if described is None else {**config, "quantization_config": described}


def _record(plan: Conversion, record: dict[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """llmshrink.json, with the format, what is said of it, and the bytes changed; all else is the run's."""
    old, new = (record["format_notes"][name] for name in (format_of(record), plan.format))
    rows = [replace(row, bytes=sizes.get(row.name, row.bytes)) for row in rows_of(record["sites"])]
    return {
        **record,
        "identity": {**record["identity"], "format": plan.format},
        "notes": [*(note for note in record["notes"] if note not in old), *new],
        "sites": [asdict(row) for row in rows],
    }


def _carried(source: Path, record: dict[str, Any]) -> list[str]:
    """The files that stay as they are: what the run left beside the weights, of what belongs to a model. Raises
    CheckpointError for a link that isn't followed."""
    known = known_files(record, read_seal(source))
    found = [
        name
        for name in files_of(source)
        if (published(name) or name == TIMING)
        and name not in REWRITTEN
        and (name in {TIMING, *known} if known is not None else not name.endswith(".py"))
    ]
    for name in found:
        check_link(source / name, source, belongs)
    return found


def _report(plan: Conversion, source: Path, folder: Path, output: Path, started: float) -> ConvertReport:
    record = read_record(folder)
    return ConvertReport(
        source=source,
        output=output,
        format=plan.format,
        bytes_before=weight_bytes(source),
        bytes_after=weight_bytes(folder),
        sites=len(plan.after),
        notes=tuple(record["notes"]),
        verification=verify_reload(folder),
        left_behind=left_out_of(source, plan.index, trust_remote_code=True, besides=(output, partial_folder(output))),
        serve=serve_line(output, record),
        seconds=time.perf_counter() - started,
    )
