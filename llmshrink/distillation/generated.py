"""Text that the teacher writes itself: windows sampled from it, begun by a few tokens of real text.

With little text a student learns the text by heart, and its distance from the teacher elsewhere stops falling. The
teacher's own samples at temperature 1 are as many as one has time for, and they are where the teacher's probabilities
are to be met. An end-of-text token doesn't end a window: the model goes on with another text, as in its training.
Where windows of text begin with BOS, so do these.

Windows are written a batch a file, each batch whole and with a seed of its own, so that an interrupted run goes on with
the same windows, and one that asks for more begins with those of one that asked for fewer. Beside each file lies its
sha256; a file that has another is made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llmshrink_eval.generation import follow
from torch import Tensor

from llmshrink.calibration.tokens import TokenWindows
from llmshrink.run import disk
from llmshrink.run.progress import Progress

PROMPT_TOKENS = 4
BATCH = 64
"""Windows that are sampled side by side."""


def generate_windows(
    model: Callable[[], Any],
    real: TokenWindows,
    tokens: int,
    *,
    teacher: str,
    folder: Path,
    seed: int,
    progress: Progress,
) -> TokenWindows:
    """At least `tokens` tokens in windows of the real text's length.

    model: gives a transformers model with its `generate`, where one is needed; teacher: what tells it from others.
    real: where prompts are taken from, in order, from places in the windows that differ from round to round. folder: of
    the finished batches of this teacher, text and seed, in a folder of their own there.
    """
    length = real.input_ids.shape[1]
    wanted = -(-tokens // length)
    opening = real.reading.beginning.opening
    begins = " ".join(map(str, opening)) or None
    key = f"{teacher} {real.fingerprint} {PROMPT_TOKENS} {BATCH} {seed} {begins}".encode()
    folder = folder / hashlib.sha256(key).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    batches = []
    for number in range(-(-wanted // BATCH)):
        path = folder / f"generated-{number:05}.safetensors"
        if not _is_whole(path, progress):
            prompts = _prompts(real, range(number * BATCH, (number + 1) * BATCH), opening)
            ids = _sample(model(), prompts, length, seed + number)
            digest, _ = disk.write_tensors(path, {"input_ids": ids})
            disk.write_text(_sum(path), digest + "\n")
            progress.note(f"generated   {min((number + 1) * BATCH, wanted) * length:,} of {wanted * length:,} tokens")
        batches.append(_read(path))
    ids = torch.cat(batches)[:wanted]
    whole = hashlib.sha256(key)
    whole.update(ids.numpy().tobytes())
    name = f"{real.name}, and {ids.numel():,} tokens by the teacher"
    every = torch.ones_like(ids, dtype=torch.bool)
    return TokenWindows(ids, every, name, whole.hexdigest(), reading=real.reading)


def _read(path: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(path)["input_ids"]


def _sum(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path, progress: Progress) -> bool:
    """Whether a batch is there as it was written. Its checksum is written after it: without one it isn't finished."""
    if not path.is_file() or not _sum(path).is_file():
        return False
    whole = disk.sha256_of(path) == _sum(path).read_text(encoding="utf-8", errors="replace").strip()
    if not whole:
        progress.note(f"generated   {path} isn't what was written there: its windows are generated again")
    return whole


def _prompts(real: TokenWindows, numbers: range, opening: tuple[int, ...]) -> Tensor:
    """int64 [windows, PROMPT_TOKENS], one for each number; with `opening`, BOS's marks, before them.

    A window may hold a conversation shorter than a prompt, and all may: prompts are as long as the longest allow.
    """
    lengths = real.mask.sum(1) - len(opening)
    tokens = min(PROMPT_TOKENS, int(lengths.max()))
    long_enough = (lengths >= tokens).nonzero().squeeze(-1).tolist()
    count = len(long_enough)
    found = []
    for number in numbers:
        window = long_enough[number % count]
        room = int(lengths[window]) - tokens
        start = len(opening) + (number // count * 37) % max(room, 1)
        found.append(real.input_ids[window, start : start + tokens])
    prompts = torch.stack(found)
    return torch.cat([torch.tensor(opening, dtype=torch.int64).expand(len(prompts), -1), prompts], 1)


def _sample(model: Any, prompts: Tensor, length: int, seed: int) -> Tensor:
    """int64 [windows, length], on the CPU, from a generator of its own seed."""
    device = next(model.parameters()).device
    follow(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        found: Tensor = model.generate(
            input_ids=prompts.to(device),
            attention_mask=torch.ones_like(prompts).to(device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length - prompts.shape[1],
            max_new_tokens=length - prompts.shape[1],
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
            return_dict_in_generate=False,
        )
    return found.cpu()


def together(real: TokenWindows, generated: TokenWindows) -> TokenWindows:
    """Both, one after the other; the trainer shuffles them. Of what the teacher wrote everything is learned."""
    digest = hashlib.sha256(f"{real.fingerprint} {generated.fingerprint}".encode())
    said = None if real.said is None else torch.cat([real.said, generated.mask])
    return TokenWindows(
        torch.cat([real.input_ids, generated.input_ids]),
        torch.cat([real.mask, generated.mask]),
        generated.name,
        digest.hexdigest(),
        said,
        real.reading,
    )
