"""Reload a checkpoint from disk and hold it to what the run that made it computed.

The packed weights are read back through our own reader (no compressed-tensors library takes part, and the report says
so), dequantized a block at a time, and the held-out windows run through them. Their next-token log-probabilities must
equal those that the run kept beside the weights: a bit lost in packing, a shard under the wrong name or a scale in the
wrong dtype shows here, before anyone serves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from llmshrink_eval.bounded import read_json
from llmshrink_eval.errors import EvalError
from torch import Tensor

from llmshrink.calibration.activations import Batch
from llmshrink.checkpoint.decompressed import Decompressed
from llmshrink.checkpoint.files import read_config
from llmshrink.checkpoint.header import read_header
from llmshrink.checkpoint.index import CheckpointIndex
from llmshrink.checkpoint.links import check_link
from llmshrink.checkpoint.preflight import unknown_type
from llmshrink.errors import CheckpointError, LlmshrinkError, SourceError
from llmshrink.formats import bitsandbytes
from llmshrink.model.chain import Chain
from llmshrink.model.skeleton import Skeleton
from llmshrink.run import by_transformers, heldout
from llmshrink.run.arithmetic import Arithmetic
from llmshrink.run.asked import DTYPES, dtype_name, pick_arithmetic, pick_device
from llmshrink.run.memory import give_back
from llmshrink.run.output import RECORD
from llmshrink.run.recordfile import Record
from llmshrink.run.report import VerifyReport, rows_of
from llmshrink.run.storage import format_of

OWN_READER = "the checkpoint reloaded from disk by llmshrink's own reader"
REFERENCE = Path("verify") / "held_out.safetensors"
ENGINE_PROMPTS = 8
ENGINE_PROMPT_TOKENS = 32
SAME_MACHINE = 1e-4
ELSEWHERE = 2e-2
ELSEWHERE_BFLOAT16 = 1e-1
"""Tolerances on the mean difference of next-token log-probabilities, in nats: with the same versions, device and
threads the sums are the same; elsewhere they are rounded otherwise. What a run computed in bfloat16 carries the error
of that: SmolLM2-135M in 4 bits differs by .031 where another CPU computes it in bfloat16 too, by .034 in float32."""


def read_record(folder: Path) -> dict[str, Any]:
    """llmshrink.json of an output. Raises SourceError when the folder isn't one, CheckpointError for a link."""
    check_link(folder / RECORD, folder)
    try:
        record: dict[str, Any] = read_json(folder / RECORD)
        dtype = getattr(torch, Record.model_validate(record).identity.dtype.removeprefix("torch."))
        rows_of(record["sites"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _no_output(folder) from error
    if not isinstance(dtype, torch.dtype):
        raise _no_output(folder)
    read_config(folder)
    return record


def _no_output(folder: Path) -> SourceError:
    return SourceError(f"{folder}: no readable {RECORD} there; name a folder that llmshrink wrote")


def read_reference(folder: Path) -> dict[str, Tensor]:
    """The held-out tokens and log-probabilities that the run kept."""
    path = folder / REFERENCE
    if not path.is_file():
        raise SourceError(f"{folder}: no {REFERENCE} there; only a folder that llmshrink wrote can be verified")
    with CheckpointIndex(folder, read_header(path).entries) as index:
        reference = {key: index.read(key) for key in index}
    shapes = [reference[key].shape for key in ("input_ids", "mask", "token_logprobs") if key in reference]
    if len(shapes) < 3 or shapes[0] != shapes[1] or [len(shape) for shape in shapes] != [2, 2, 1]:
        raise CheckpointError(f"{path}: isn't what a run keeps of its held-out windows: it is damaged; copy it again")
    return reference


def held_out_batches(reference: dict[str, Tensor], batch_size: int) -> list[Batch]:
    """The held-out windows in the batches in which the run computed them."""
    ids, mask = reference["input_ids"], reference["mask"].bool()
    return [
        Batch(ids[i : i + batch_size], None if bool(mask[i : i + batch_size].all()) else mask[i : i + batch_size], True)
        for i in range(0, len(ids), batch_size)
    ]


def recompute(
    folder: Path, record: dict[str, Any], batches: Sequence[Batch], device: torch.device
) -> dict[str, Tensor]:
    """The reference tensors again, from the checkpoint on disk, a block at a time."""
    with chain_of(folder, record, device) as chain:
        rows = chain.skeleton.model.get_input_embeddings().weight.shape[0]
        if any(int(batch.input_ids.min()) < 0 or int(batch.input_ids.max()) >= rows for batch in batches):
            raise CheckpointError(
                f"{folder / REFERENCE}: has tokens that the embedding's {rows} rows don't cover: it is damaged"
            )
        hidden = [chain.embed(batch) for batch in batches]
        chain.release_outside()
        for number, block in enumerate(chain.blocks):
            chain.load_block(number)
            with torch.no_grad():
                hidden = [chain.calls(batch)[number].run(block, h) for batch, h in zip(batches, hidden, strict=True)]
            chain.skeleton.release(chain.name(number))
            give_back()
        chain.load_tail()
        found = [heldout.reference(batch, h, chain.logits) for batch, h in zip(batches, hidden, strict=True)]
        return heldout.merge(found)


@contextmanager
def chain_of(folder: Path, record: dict[str, Any], device: torch.device) -> Iterator[Chain]:
    """The dense model of a checkpoint's config over its packed weights, what is outside the blocks loaded. Its files
    are open as long as this is.

    Raises CheckpointError or UnsupportedModelError when config and weights don't fit.
    """
    from llmshrink_eval.configured import running_config

    dtype = DTYPES[arithmetic_of(record, device).dtype]
    raw = read_config(folder)
    unknown = unknown_type(raw)
    if unknown is not None:
        raise CheckpointError(f"{folder / 'config.json'}: {unknown}: it is damaged; copy it again")
    with ExitStack() as stack:
        with _said_of(folder):
            reader = stack.enter_context(Decompressed(folder, raw, dtype))
            config = running_config(folder)
            if hasattr(config, "quantization_config"):
                del config.quantization_config  # the skeleton is the dense model; the reader decompresses
            chain = Chain(Skeleton(config, reader, device=device, dtype=dtype))
            reader.round_too(chain.skeleton.model, chain.skeleton.key_of)
            chain.load_outside()
        yield chain


@contextmanager
def _said_of(folder: Path) -> Iterator[None]:
    """While open, what is raised because config and weights don't fit names the folder, in one line."""
    try:
        yield
    except LlmshrinkError as error:
        if str(folder) in str(error):
            raise
        raise type(error)(f"{folder}: {error}") from error
    except EvalError as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # whatever the field at fault leads to, in transformers' own code
        said = " ".join(str(error).split()).rstrip(".")
        raise CheckpointError(
            f"{folder / 'config.json'}: no model can be built from it ({type(error).__name__}: {said}); "
            "it is damaged: copy the folder again"
        ) from error


def verify(folder: Path) -> VerifyReport:
    """Compare the checkpoint on disk with what its run kept; where it is bitsandbytes', plain transformers must then
    come near that too. Raises SourceError when nothing was kept, LlmshrinkError when bitsandbytes isn't there.
    """
    own = verify_reload(folder)
    record = read_record(folder)
    if not own.ok or format_of(record) != "bitsandbytes":
        return own
    reference = read_reference(folder)
    scheme = bitsandbytes.scheme_of(read_config(folder)["quantization_config"])
    found = by_transformers.token_logprobs(folder, scheme, held_out_batches(reference, 1), device_of(record))
    return compare(
        folder, reference, found, tolerance=by_transformers.TOLERANCE[scheme.kind], engine=by_transformers.library()
    )


def device_of(record: dict[str, Any]) -> torch.device:
    """Of the kind that the run was on, where there is one."""
    return pick_device("cpu" if record["identity"]["device"] == "cpu" else None)


def arithmetic_of(record: dict[str, Any], device: torch.device) -> Arithmetic:
    """What a reload is computed in: on a machine like the run's what the run computed in, since sums are then the same;
    elsewhere what this device computes fastest of it, which comes as near (`ELSEWHERE_BFLOAT16`)."""
    dtype = _run_dtype(record)
    if _made_here(record, device) and dtype in DTYPES.values():
        return Arithmetic(dtype_name(dtype), "as the run that made it")
    return pick_arithmetic(None, dtype, device)


def _run_dtype(record: dict[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, record["identity"]["dtype"].removeprefix("torch."))
    return dtype


def _made_here(record: dict[str, Any], device: torch.device) -> bool:
    """Whether the run was on a machine like this one, with the same versions: then bits are the same."""
    from llmshrink.run.job import here

    return all(record["identity"].get(key) == value for key, value in here(device).items())


def verify_reload(folder: Path) -> VerifyReport:
    """Compare the checkpoint on disk with what its run kept. Raises SourceError when nothing was kept."""
    record, reference = read_record(folder), read_reference(folder)
    device = device_of(record)
    batches = held_out_batches(reference, record["identity"]["batch_size"])
    again = recompute(folder, record, batches, device)
    elsewhere = ELSEWHERE_BFLOAT16 if _run_dtype(record) == torch.bfloat16 else ELSEWHERE
    tolerance = SAME_MACHINE if _made_here(record, device) else elsewhere
    return compare(folder, reference, again["token_logprobs"], tolerance=tolerance)


def compare(
    folder: Path, reference: dict[str, Tensor], found: Tensor, *, tolerance: float, engine: str = OWN_READER
) -> VerifyReport:
    """Hold next-token log-probabilities (float32 [positions]) to the reference's."""
    expected = reference["token_logprobs"]
    if found.shape != expected.shape:
        raise CheckpointError(
            f"{folder / REFERENCE}: has {len(expected)} positions, its tokens make {len(found)}: it is damaged"
        )
    difference = (found.double() - expected.double()).abs()
    difference = torch.where(difference.isnan(), torch.inf, difference)
    mean, worst = float(difference.mean()), int(difference.argmax())
    return VerifyReport(
        ok=mean <= tolerance,
        engine=engine,
        against="what its run computed",
        measure="mean difference",
        value=mean,
        tolerance=tolerance,
        positions=len(expected),
        mean_difference=mean,
        max_difference=float(difference[worst]),
        worst=_window_of(folder, reference, worst),
    )


def verify_vllm(folder: Path) -> VerifyReport:
    """Run the real vLLM on the checkpoint, in its own process, and hold it to transformers on the same checkpoint.

    The prompts are the beginnings of the held-out windows. A damaged weight reads alike in both, so the reload is held
    to the run first, and its report returned when it fails. Raises LlmshrinkError when no vLLM is installed or it
    refuses the checkpoint.
    """
    from llmshrink.serving.vllm.check import compare_with_transformers, cut_cache, only_we_read
    from llmshrink.serving.vllm.engine import EngineError

    reload = verify_reload(folder)
    if not reload.ok:
        return reload
    reference = read_reference(folder)
    rows = zip(reference["input_ids"].tolist(), reference["mask"].sum(1).tolist(), strict=True)
    prompts = [ids[: min(ENGINE_PROMPT_TOKENS, real)] for ids, real in rows][:ENGINE_PROMPTS]
    try:
        found = compare_with_transformers(folder, prompts)
    except EngineError as error:
        if "--engine transformers" in str(error):
            raise
        ways = "verify with --engine transformers, which needs no vLLM"
        if not _four_bits(folder):
            ways += ", or quantize again as vLLM serves it (--bits 4, and the notes of `llmshrink inspect`)"
        raise EngineError(f"{str(error).rstrip('. ')}; {ways}") from error
    config = read_config(folder)
    as_decoded = " as llmshrink decodes it" if only_we_read(config) or cut_cache(config) else ""
    if cut_cache(config):
        as_decoded += (
            ", with keys and values cut off towards zero, as this build of vLLM caches them without the plugin"
        )
    return VerifyReport(
        ok=found.ok,
        engine=found.engine,
        against=f"transformers on the same checkpoint{as_decoded}",
        measure="KL of the worst prompt",
        value=found.worst_kl,
        tolerance=found.tolerance,
        positions=found.positions,
        mean_difference=found.mean_abs_diff,
        max_difference=found.max_abs_diff,
        worst=_text(folder, found.worst_prompt, prompts[found.worst_prompt]),
    )


def _four_bits(folder: Path) -> bool:
    """Whether all that a checkpoint has quantized are weights of 4 bits, which vLLM serves best."""
    quantization = read_config(folder).get("quantization_config") or {}
    groups = (quantization.get("config_groups") or {}).values()
    return bool(groups) and all((group.get("weights") or {}).get("num_bits") == 4 for group in groups)


def _window_of(folder: Path, reference: dict[str, Tensor], position: int) -> str:
    """The held-out window that holds a position: its number and how it begins."""
    mask = reference["mask"].bool()
    ends = (mask[:, 1:] & mask[:, :-1]).sum(1).cumsum(0)
    window = int((ends <= position).sum())
    return _text(folder, window, reference["input_ids"][window].tolist())


def _text(folder: Path, window: int, ids: list[int]) -> str:
    try:
        from llmshrink_eval.configured import read_tokenizer

        text = repr(read_tokenizer(folder).decode(ids[:16]))
    except Exception:  # the tokenizers library raises bare ones; the tokens say as much
        text = f"with tokens {ids[:16]}"
    return f"held-out window {window}, which begins {text}"
