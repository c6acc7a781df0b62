"""A quantization job, ready to start: everything named, checked and decided, and nothing written yet.

All that a user can do wrong is found here, before the first byte of output: the model's files, the recipe's patterns,
the calibration text's length, a NaN in a weight, the room on the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from llmshrink_kernels.products import product

import llmshrink
from llmshrink.calibration.activations import Batch, batches_of
from llmshrink.calibration.reading import Reading
from llmshrink.calibration.text import load_documents
from llmshrink.calibration.tokens import TokenWindows, beginning_for, build_windows, window_shape
from llmshrink.checkpoint.index import CheckpointIndex, check_finite, not_finite
from llmshrink.checkpoint.preflight import check_dtypes, check_source, load_config, load_tokenizer, model_limit
from llmshrink.checkpoint.source import Source, resolve
from llmshrink.checkpoint.unchanged import Watched
from llmshrink.errors import CheckpointError, RecipeError
from llmshrink.formats.servable import FP8_CACHE, FP8_CACHE_CUT, FP8_CACHE_NEEDS, attention
from llmshrink.formats.stored import Format, Scheme
from llmshrink.methods import SiteSpec
from llmshrink.model.caches import CacheSite, find_caches
from llmshrink.model.chain import Chain
from llmshrink.model.folds import find_folds
from llmshrink.model.outline import Blank, outlined_stages
from llmshrink.model.sites import Site, Stage, linears_outside, sites_of
from llmshrink.model.skeleton import Skeleton, TensorReader
from llmshrink.model.uncovered import refuse_family
from llmshrink.recipe.assign import Assigned, Outside, SiteShape, assign, cpu_notes
from llmshrink.recipe.read import load_recipe, made_for, recipe_hash
from llmshrink.recipe.schema import Recipe
from llmshrink.run.arithmetic import Arithmetic, instructions
from llmshrink.run.asked import (
    DTYPES,
    Options,
    check_apart,
    check_verb,
    check_vocabulary,
    check_work_dir,
    pick_arithmetic,
    pick_device,
    stored_dtype,
)
from llmshrink.run.rehearse import config_bytes
from llmshrink.run.smooth import Smoothing, smoothed_taps
from llmshrink.run.storage import (
    as_sparse24,
    check_bitsandbytes,
    check_methods,
    check_recipe,
    format_for,
    format_notes,
    require_tools,
    scheme_of,
)
from llmshrink.run.structure import Structure, structure_of

HELD_OUT_TOKENS = 1024
"""About as many tokens are held out as the closing summary needs to tell a good result from a bad one."""
BATCH_TOKENS = 2048
PROBE_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Job:
    """config_json: of the original, as it was read. arithmetic: what the model is computed in meanwhile, and why.

    stages: of each block. assigned: by site name.

    calibration, held_out: windows; batches: of both, in order.

    structure: what the result has fewer of; None where it has the model's shape. caches: where each block's keys and
    values are rounded to FP8; empty where they aren't. smoothing: by the name of a tap's first site; empty where no
    input is smoothed. unsmoothed: in words, which inputs the recipe would smooth that aren't, and why not. spoilt: what
    is wrong with tensors that no module of the model reads, which are copied as they are.
    """

    options: Options
    source: Source
    index: CheckpointIndex
    config_json: bytes
    recipe: Recipe
    chain: Chain
    arithmetic: Arithmetic
    stages: list[list[Stage]]
    assigned: dict[str, Assigned]
    calibration: TokenWindows
    held_out: TokenWindows
    batches: list[Batch]
    batch_size: int
    other_linears: list[str]
    structure: Structure | None
    caches: list[CacheSite]
    smoothing: dict[str, Smoothing]
    unsmoothed: list[str]
    spoilt: tuple[str, ...] = ()

    @property
    def sites(self) -> list[Site]:
        return [site for stages in self.stages for site in sites_of(stages)]

    @property
    def specs(self) -> dict[str, SiteSpec]:
        """Site name -> what happens to it; the others stay."""
        found = {name: a.spec for name, a in self.assigned.items() if a.spec is not None}
        trained = self.recipe.tune is not None or self.recipe.teaches_codes
        return {name: spec.to_tune() for name, spec in found.items()} if trained else found

    @property
    def reads(self) -> dict[str, frozenset[str]]:
        """Site name -> the statistics that are gathered for it; the others need none."""
        if self.structure is not None:
            return {name: spec.reads for name, spec in self.structure.narrow.items()}
        return {name: spec.reads for name, spec in self.specs.items()}

    @property
    def calibrates(self) -> bool:
        """Whether anything is found by the calibration text, so that it runs through the model."""
        return self.recipe.tune is not None or bool(self.caches or self.smoothing) or any(self.reads.values())

    @property
    def format(self) -> Format:
        """In which the result is stored."""
        return format_for(self.recipe, self.options.format)

    @property
    def schemes(self) -> dict[str, Scheme | None]:
        """Site name -> how it will be stored; None: as a plain weight."""
        specs = {site: self.assigned[site.name].spec for site in self.sites}
        return {
            site.name: scheme_of(spec, site.in_features, self.format, self.scale_dtype) for site, spec in specs.items()
        }

    @property
    def format_notes(self) -> dict[Format, list[str]]:
        """What a user should know of each format in which the result can lie."""
        return format_notes(list(self.assigned.values()))

    @property
    def cpu_notes(self) -> list[str]:
        """On which CPUs vLLM serves a result in the standard format by itself: for the plan and the card."""
        return cpu_notes(list(self.assigned.values()))

    @property
    def notes(self) -> list[str]:
        """What a user should know before the work: who won't serve the result, and a recipe that suits better."""
        notes = []
        config = self.chain.skeleton.model.config.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        if self.structure is not None:
            heads = self.structure.heads.after
            notes += self.structure.notes(self.options.serve_tp)
        for engine, why in attention(width, heads, self.options.serve_tp, fp8_cache=bool(self.caches)).items():
            notes.append(f"{engine} won't serve this checkpoint: {why}")
        if self.caches:
            notes += [f"{FP8_CACHE}; {FP8_CACHE_NEEDS}", FP8_CACHE_CUT]
        notes += [f"not smoothed: {said}" for said in self.unsmoothed]
        other = made_for(self.options.recipe, self.recipe)
        if other is not None:
            notes.append(
                f"{self.options.recipe} was measured at other bits; --recipe {other} is the one made for these"
            )
        notes += self.calibration.reading.notes(self.calibration.name)
        notes += [f"copied as it is, as no module of the model reads it: {said}" for said in self.spoilt]
        return [*notes, *self.index.notes(), *self.format_notes[self.format]]

    @property
    def scale_dtype(self) -> torch.dtype:
        """Scales are stored in the dtype of the weights that they replace; no engine reads wider ones than float32."""
        dtype = self.index.entry(self.sites[0].key).dtype
        return dtype if dtype in DTYPES.values() else torch.float32

    def identity(self) -> dict[str, Any]:
        """Everything that a bit-identical result depends on, in words that a person can compare."""
        assert isinstance(self.index, Watched), "a plan has read nothing"
        return {
            "model": self.source.name if self.source.kind == "hub" else self.source.kind,
            "revision": self.source.revision,
            "checkpoint": self.index.fingerprint(),
            "weights": self.index.digest(),
            "config": hashlib.sha256(self.config_json).hexdigest(),
            "format": self.format,
            "recipe": recipe_hash(self.recipe),
            "sites": _hash({name: None if a.spec is None else asdict(a.spec) for name, a in self.assigned.items()}),
            "calibration": self.calibration.fingerprint,
            "held_out": self.held_out.fingerprint,
            "bos": self.calibration.reading.bos,
            "template_date": self.calibration.reading.date,
            "seed": self.options.seed,
            "dtype": str(self.chain.skeleton.dtype),
            "batch_size": self.batch_size,
            "max_shard_size": self.options.max_shard_size,
            **here(self.chain.skeleton.device),
            **({"bitsandbytes": version("bitsandbytes")} if self.format == "bitsandbytes" else {}),
        }


def here(device: torch.device) -> dict[str, Any]:
    """What of the machine and its software decides the last bits of a sum."""
    import transformers

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": instructions(torch.backends.cpu.get_cpu_capability()),
        "products": product(),
        "threads": torch.get_num_threads(),
        "versions": {
            "llmshrink": llmshrink.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def prepare(options: Options) -> Job:
    """Resolve and check everything. Raises LlmshrinkError subclasses; writes nothing."""
    recipe = _recipe(options)
    require_tools(recipe)
    source = resolve(options.model, trust_remote_code=options.trust_remote_code, stream=True)
    check_apart(options.output, (("the model", source.folder),))
    check_source(source, trust_remote_code=options.trust_remote_code)
    index = Watched.open(source.folder, source.arriving)
    index.verify_blobs()

    def survey(chain: Chain, calibration: TokenWindows) -> list[list[Stage]]:
        return chain.analyse(Batch(calibration.input_ids[:1, :PROBE_TOKENS], None, held_out=False), check_finite)

    job = _decided(options, recipe, source, index, index, survey)
    return replace(job, spoilt=_spoilt(job.chain, index))


def outline(options: Options, source: Source, index: CheckpointIndex, *, text_here: bool) -> Job:
    """The same decisions from the headers of the weights alone, none of which is read: what a plan goes by.

    source: a folder with config.json and the tokenizer; index: of its weights, wherever they are. text_here: whether
    the calibration text is on this machine; one that isn't is stood in for by windows of the right number.
    """

    def survey(chain: Chain, calibration: TokenWindows) -> list[list[Stage]]:
        return outlined_stages(chain, PROBE_TOKENS)

    check_source(source, trust_remote_code=options.trust_remote_code)
    return _decided(options, _recipe(options), source, index, Blank(index), survey, text_here=text_here)


def _recipe(options: Options) -> Recipe:
    recipe = load_recipe(options.recipe, flags=options.flags or {}, sets=options.sets)
    check_verb(options.verb, recipe)
    check_bitsandbytes(recipe, options.format)
    if options.format == "llmshrink":
        check_recipe(recipe)
    return recipe


def _windows(
    options: Options, source: Source, shape: tuple[int, int], model_type: str, *, text_here: bool
) -> tuple[TokenWindows, TokenWindows]:
    """The calibration and held-out windows; blank ones where the text isn't here."""
    samples, seq_len = shape
    held_out = max(1, HELD_OUT_TOKENS // seq_len)
    tokenizer = load_tokenizer(source, options.trust_remote_code)
    documents = load_documents(options.calibration, source_kind=source.kind)
    if text_here:
        return build_windows(
            documents, tokenizer, samples=samples, seq_len=seq_len, held_out=held_out, seed=options.seed,
            bos=options.bos, model_type=model_type,
        )  # fmt: skip
    ids = torch.zeros(samples + held_out, seq_len, dtype=torch.int64)
    reading = Reading(beginning_for(tokenizer, model_type, options.bos, seq_len))
    every = [
        TokenWindows(part, torch.ones_like(part, dtype=torch.bool), documents.name, "", reading=reading)
        for part in (ids[:samples], ids[samples:])
    ]
    return every[0], every[1]


def _decided(
    options: Options,
    recipe: Recipe,
    source: Source,
    index: CheckpointIndex,
    reader: TensorReader,
    survey: Callable[[Chain, TokenWindows], list[list[Stage]]],
    *,
    text_here: bool = True,
) -> Job:
    raw = config_bytes(source.folder)
    config = load_config(source, options.trust_remote_code)
    samples, seq_len = window_shape(options.samples, options.seq_len, limit=model_limit(config))
    check_work_dir(options.work_dir)
    device = pick_device(options.device)
    arithmetic = pick_arithmetic(options.dtype, stored_dtype(index), device)
    refuse_family(config, trust_remote_code=options.trust_remote_code)
    chain = Chain(
        Skeleton(
            config,
            reader,
            device=device,
            dtype=DTYPES[arithmetic.dtype],
            trust_remote_code=options.trust_remote_code,
        )
    )
    check_dtypes(source, index, chain.skeleton.key_of.values())
    calibration, held_out = _windows(options, source, (samples, seq_len), config.model_type, text_here=text_here)
    check_vocabulary(calibration, config.get_text_config().vocab_size, source)
    stages = survey(chain, calibration)
    batch_size = options.batch_size or max(1, BATCH_TOKENS // seq_len)
    outside = modules_outside(chain)
    sites = [site for block in stages for site in sites_of(block)]
    shapes = [_shape(site, chain) for site in sites]
    structure = structure_of(recipe, chain, stages)
    if structure is not None:
        assigned = [Assigned(shape, None, None) for shape in shapes]
    else:
        assigned = assign(
            recipe, shapes, outside=outside, tp=options.serve_tp, strict=options.strict, format=options.format
        )
    check_methods(recipe, assigned, index.entry(sites[0].key).dtype)
    if options.format == "llmshrink":
        dtypes = {site.name: index.entry(site.key).dtype for site in sites}
        assigned = as_sparse24(recipe.name, assigned, dtypes, strict=options.strict)
    if structure is None and not any(decision.spec for decision in assigned):
        why = next((f"{a.site.name} {a.note}" for a in assigned if a.note), "the recipe ignores every site")
        raise RecipeError([f"{recipe.name}: nothing would change: {why}; choose other bits, group_size or pattern"])
    decided = {a.site.name: a for a in assigned}
    smoothing, unsmoothed = _smoothing(recipe, chain, stages, decided, index)
    return Job(
        options=options,
        source=source,
        index=index,
        config_json=raw,
        recipe=recipe,
        chain=chain,
        arithmetic=arithmetic,
        stages=stages,
        assigned=decided,
        calibration=calibration,
        held_out=held_out,
        batches=[
            *batches_of(calibration, batch_size, held_out=False),
            *batches_of(held_out, batch_size, held_out=True),
        ],
        batch_size=batch_size,
        other_linears=linears_outside(chain.skeleton.model, chain.prefix),
        structure=structure,
        caches=_caches(recipe, chain, stages, decided, index),
        smoothing=smoothing,
        unsmoothed=unsmoothed,
    )


def _smoothing(
    recipe: Recipe, chain: Chain, stages: list[list[Stage]], assigned: Mapping[str, Assigned], index: CheckpointIndex
) -> tuple[dict[str, Smoothing], list[str]]:
    """Which inputs are smoothed, if the recipe says so, and which aren't that it would smooth."""
    specs = {name: each.spec for name, each in assigned.items() if each.spec is not None}
    if all(spec.smooth is None for spec in specs.values()):
        return {}, []
    folds = find_folds(chain, stages, Blank(index), PROBE_TOKENS)
    return smoothed_taps(recipe.name, stages, specs, folds, chain.skeleton.key_of)


def _caches(
    recipe: Recipe, chain: Chain, stages: list[list[Stage]], assigned: Mapping[str, Assigned], index: CheckpointIndex
) -> list[CacheSite]:
    """Where keys and values are rounded, if the recipe says so.

    Raises CheckpointError where there are scales, RecipeError where no weight is quantized.
    """
    if recipe.kv_cache == "none":
        return []
    if not any(each.spec is not None and each.spec.quantize is not None for each in assigned.values()):
        raise RecipeError(
            [
                f"{recipe.name}: kv_cache {recipe.kv_cache}: nothing of this model can be quantized as asked, and a "
                "checkpoint of plain weights has no word for it; leave it out"
            ]
        )
    found = find_caches(chain, stages, Blank(index), PROBE_TOKENS)
    there = next((key for cache in found for key in cache.scales if key in index), None)
    if there is not None:
        raise CheckpointError(f"{there}: the model has scales of a cache already; leave kv_cache out")
    return found


def _shape(site: Site, chain: Chain) -> SiteShape:
    family, (heads, kv_heads) = chain.family, chain.heads
    parts = family.parts(site.name, site.out_features, heads, kv_heads)
    fused, parallel = family.fused_name(site.name), family.parallel(site.name)
    return SiteShape(site.name, site.out_features, site.in_features, fused, parallel, parts if len(parts) > 1 else ())


def modules_outside(chain: Chain) -> Outside:
    """What a recipe may name beside the sites."""
    skeleton = chain.skeleton
    head = skeleton.model.get_output_embeddings()
    linears = [n for n in linears_outside(skeleton.model, chain.prefix) if skeleton.model.get_submodule(n) is head]
    shares = {one.rpartition(".")[0]: other.rpartition(".")[0] for one, other in skeleton.tied.items()}
    others = [name for name in skeleton.outside(chain.prefix) if name not in linears]
    return Outside(linears, others, {**{other: one for one, other in shares.items()}, **shares})


def _spoilt(chain: Chain, index: CheckpointIndex) -> tuple[str, ...]:
    """What isn't finite of the tensors that the model's class doesn't know: they are copied, and nothing reads them."""
    known = set(chain.skeleton.key_of.values())
    found = (not_finite(key, index.read(key)) for key in index if key not in known)
    return tuple(said for said in found if said is not None)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
