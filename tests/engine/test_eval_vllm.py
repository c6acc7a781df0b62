"""The evaluation says the same with the real vLLM as with transformers, up to the engines' arithmetic."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from llmshrink_eval.divergence import divergence
from llmshrink_eval.engines import Engine, open_engine
from llmshrink_eval.engines.vllm import VllmEngine
from llmshrink_eval.errors import EvalError, EvalFailed
from llmshrink_eval.options import ModelSpec, Running
from llmshrink_eval.perplexity import perplexity
from llmshrink_eval.progress import Silent
from llmshrink_eval.protocol import Windows, build_windows
from llmshrink_eval.results import Divergence, Perplexity
from llmshrink_eval.tasks import TaskOptions, TaskRun
from llmshrink_eval.text import Text
from safetensors.torch import load_file, save_file

from llmshrink.demo import language
from llmshrink.demo.tasks import write_tasks

DEMO = Path(language.__file__).parent / "model"
PROMPTS = ("Once upon a time", "Who was the", "The baker loved the")


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


def _windows(protocol: Any, window: int, stride: int | None, stories: int) -> Windows:
    text = Text("demo", tuple(islice(language.stories(7), stories)))
    return build_windows(text, _tokenizer(), protocol=protocol, limit=256, window=window, stride=stride)


GPTQ = ("gptq", 256, None, 60)
"""Windows as long as the model's own limit."""
SLIDING = ("sliding", 61, 23, 9)
"""Odd lengths and short last windows."""


@dataclass
class Asked:
    """An engine with a model, and what it said of the windows."""

    engine: Engine
    folder: Path

    def read(self, windows: Windows, name: str, against: Path | None = None, progress: Any = None) -> Any:
        keep = None if against is not None else self.folder / name / "baseline"
        return self.engine.read(
            windows, keep=keep, against=against, folder=self.folder / name, progress=progress or Silent()
        )

    def perplexity(self, windows: Windows, name: str) -> Perplexity:
        return perplexity(windows, self.read(windows, name).window_nats)

    def divergence(self, windows: Windows, name: str, against: Path) -> Divergence:
        parts = [record.divergence for record in self.read(windows, name, against).windows]
        return divergence(windows, parts, _tokenizer())


def _asked(folder: Path, engine: Any, out: Path, batch_size: int | None = None) -> Asked:
    spec = ModelSpec(name=folder.name, folder=folder)
    return Asked(open_engine(spec, Running(engine=engine, batch_size=batch_size), _tokenizer()), out)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Asked]]:
    """The demo model, by both."""
    found = {name: _asked(DEMO, name, tmp_path_factory.mktemp(name)) for name in ("transformers", "vllm")}
    yield found
    for one in found.values():
        one.engine.close()


@pytest.fixture(scope="module")
def packed(demo_w4: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Asked]]:
    """The demo model in 4 bits, by both."""
    found = {name: _asked(demo_w4, name, tmp_path_factory.mktemp(name)) for name in ("transformers", "vllm")}
    yield found
    for one in found.values():
        one.engine.close()


@pytest.mark.parametrize("shape", [GPTQ, SLIDING], ids=["gptq", "sliding"])
def test_perplexity_is_that_of_transformers(plain: dict[str, Asked], shape: tuple[Any, ...]) -> None:
    windows = _windows(*shape)
    ours, theirs = (plain[name].perplexity(windows, shape[0]) for name in ("vllm", "transformers"))
    assert plain["vllm"].engine.dtype == "float32"
    assert ours.nats_per_token == pytest.approx(theirs.nats_per_token, rel=1e-6)
    assert ours.stderr == pytest.approx(theirs.stderr, rel=1e-4)


def test_a_model_is_no_different_from_itself_and_hardly_from_itself_in_transformers(plain: dict[str, Asked]) -> None:
    windows = _windows(*GPTQ)
    for name in ("vllm", "transformers"):
        plain[name].read(windows, "gptq")
    itself = plain["vllm"].divergence(windows, "itself", plain["vllm"].folder / "gptq" / "baseline")
    other = plain["vllm"].divergence(windows, "other", plain["transformers"].folder / "gptq" / "baseline")
    assert (itself.method, itself.kl_max, itself.top1_agreement, itself.baseline_error) == ("full", 0.0, 1.0, 0.0)
    assert other.kl_max < 1e-8


def test_four_bits_in_float16_are_those_of_transformers(plain: dict[str, Asked], packed: dict[str, Asked]) -> None:
    windows = _windows(*GPTQ)
    plain["transformers"].read(windows, "gptq")
    against = plain["transformers"].folder / "gptq" / "baseline"
    ours, theirs = (packed[name].divergence(windows, "w4", against) for name in ("vllm", "transformers"))
    nats = [packed[name].perplexity(windows, "plain").nats_per_token for name in ("vllm", "transformers")]
    apart = packed["vllm"].divergence(windows, "apart", packed["transformers"].folder / "plain" / "baseline")
    assert packed["vllm"].engine.dtype == "float16"
    assert nats[0] == pytest.approx(nats[1], rel=1e-4)
    assert apart.kl_mean < 1e-5
    assert 1e-4 < theirs.kl_mean == pytest.approx(ours.kl_mean, rel=0.02)


def test_batches_of_any_size_give_the_same(plain: dict[str, Asked], tmp_path: Path) -> None:
    windows = _windows(*SLIDING)
    engine = plain["vllm"].engine
    assert isinstance(engine, VllmEngine)
    found = []
    for batch_size in (1, 7):
        engine._running = Running(engine="vllm", batch_size=batch_size)
        found.append(plain["vllm"].perplexity(windows, f"batch-{batch_size}").nats_per_token)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_generations_are_the_same(plain: dict[str, Asked], packed: dict[str, Asked]) -> None:
    for engines in (plain, packed):
        ours, theirs = (engines[name].engine for name in ("vllm", "transformers"))
        for prompt, one, other in zip(PROMPTS, ours.generations(PROMPTS), theirs.generations(PROMPTS), strict=True):
            assert one["text"] == other["text"] or _tied(theirs, prompt, one["text"], other["text"])


def _tied(engine: Any, prompt: str, *texts: str) -> bool:
    """Whether two continuations part at tokens that are likelier than all others and that float16 can't tell apart."""
    tokenizer = _tokenizer()
    one, other = (tokenizer(prompt + text)["input_ids"] for text in texts)
    place = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    with torch.inference_mode():
        logits = engine.loaded(input_ids=torch.tensor([one[:place]])).logits[0, -1].float()
    best = logits.topk(2)
    return {one[place], other[place]} == set(best.indices.tolist()) and float(best.values[0] - best.values[1]) < 0.02


def test_tasks_are_answered_alike_item_by_item(packed: dict[str, Asked], tmp_path: Path) -> None:
    write_tasks(tmp_path)
    options = TaskOptions(names=("demo",), tasks_dir=tmp_path, limit=60)

    class Counted(Silent):
        steps: tuple[tuple[int, int], ...] = ()

        def step(self, done: int, total: int, state: str = "") -> None:
            self.steps += ((done, total),)

    progress = Counted()
    ours = packed["vllm"].engine.tasks(options, progress)
    theirs = packed["transformers"].engine.tasks(options, Silent())
    assert progress.steps[-1][0] == progress.steps[-1][1] > 60

    def answers(runs: dict[str, TaskRun]) -> list[tuple[str, str, float]]:
        return [(name, item.doc_hash, item.value) for name, run in runs.items() for item in run.items]

    different = sum(one != other for one, other in zip(answers(ours), answers(theirs), strict=True))
    assert len(answers(ours)) == 180
    # Two options whose likelihoods differ by less than float16 tells apart may change places.
    assert different <= 2


def test_cost_is_that_of_vllms_own_process(plain: dict[str, Asked]) -> None:
    found = plain["vllm"].engine.cost((1, 3))
    assert found["load_seconds"] > 0
    assert found["peak_rss_bytes"] > 2**29
    assert found["peak_vram_bytes"] is None or torch.cuda.is_available()
    assert [speed["batch_size"] for speed in found["speed"]] == [1, 3]
    assert all(speed["prefill_tokens_per_second"] > speed["decode_tokens_per_second"] > 0 for speed in found["speed"])


def test_reading_leaves_nothing_on_the_model(plain: dict[str, Asked]) -> None:
    """A hook that stayed would keep the hidden states of every step of the tasks after it."""
    engine = plain["vllm"].engine
    assert isinstance(engine, VllmEngine)
    plain["vllm"].read(_windows(*GPTQ), "gptq")
    worker = psutil.Process(engine._running_process()._process.pid)
    prompt, rows = list(range(2, 200)), 120
    engine._running_process().ask("generations", prompts=[prompt] * 10, new_tokens=[8] * 10, stop=[])
    before = worker.memory_info().rss
    engine._running_process().ask("generations", prompts=[prompt] * rows, new_tokens=[8] * rows, stop=[])
    assert worker.memory_info().rss - before < rows * len(prompt) * 128 * 4 / 2


def test_an_interrupted_pass_goes_on(plain: dict[str, Asked]) -> None:
    windows = _windows(*SLIDING)
    whole = plain["vllm"].read(windows, "whole")
    folder = plain["vllm"].folder / "whole"
    lines = (folder / "windows.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "windows.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    assert plain["vllm"].engine.finished(windows, folder, keep=None) is None
    assert plain["vllm"].read(windows, "whole").windows == whole.windows


def test_a_killed_worker_is_one_line_and_leaves_nothing_behind(plain: dict[str, Asked]) -> None:
    engine = plain["vllm"].engine
    assert isinstance(engine, VllmEngine)
    engine.generations(PROMPTS)
    assert engine._process is not None
    worker, folder = engine._process._process.pid, engine._process.folder
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(EvalFailed, match=r"^vLLM \S+ ended with status -9 for \S+: .*$"):
        engine.generations(PROMPTS)
    engine.close()
    assert not psutil.pid_exists(worker)
    assert not folder.exists()


def test_a_model_that_vllm_refuses_is_bad_input_with_its_reason(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "strange")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "of_my_own"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(EvalError, match=r"^vLLM \S+ doesn't serve \S+strange: .*of_my_own") as raised:
        _asked(folder, "vllm", tmp_path).engine.generations(PROMPTS)
    assert "\n" not in str(raised.value)


def test_broken_weights_are_named_with_the_window_and_its_text(tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    broken = _asked(folder, "vllm", tmp_path)
    with pytest.raises(EvalFailed, match=r"^NaN or infinite logits in window 0 of \d+, from its token 0 on \('"):
        broken.read(_windows(*GPTQ), "broken")
    broken.engine.close()
