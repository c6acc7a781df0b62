"""The original's pass on disk: exact, or with an error bound that holds; resumed, and damage noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_oracle import a_text, disturbed
from llmshrink_eval import baseline as baselines
from llmshrink_eval.baseline import Baseline, rounding_bound
from llmshrink_eval.divergence import divergence
from llmshrink_eval.errors import EvalError, EvalFailed
from llmshrink_eval.head import Head, Tail, split
from llmshrink_eval.model import LoadOptions, load_model
from llmshrink_eval.passes import run_pass
from llmshrink_eval.protocol import Windows, build_windows
from llmshrink_eval.results import Divergence
from llmshrink_kernels import products

from llmshrink.demo.tokenizer import build

TOKENIZER: Any = build(128)


@pytest.fixture
def windows(story: Path) -> Windows:
    text = a_text([story.read_text()[:900], story.read_text()[900:1000]])
    return build_windows(text, TOKENIZER, protocol="sliding", window=29, stride=12, limit=128)


def loaded(folder: Path) -> Any:
    return load_model(folder, LoadOptions())


def compared(model: Any, windows: Windows, folder: Path) -> Divergence:
    made = run_pass(model, windows, TOKENIZER, against=folder)
    return divergence(windows, [one.divergence for one in made.windows if one.divergence], TOKENIZER)


FAMILIES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "none"),
    ("llama", {"tie_word_embeddings": True}, "none"),
    ("gemma2", {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}, "cap"),
    ("granite", {"logits_scaling": 3.0}, "divide"),
    ("cohere", {"logit_scale": 0.25}, "multiply"),
    ("phi", {}, "none"),  # its output layer has a bias
    ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, "none"),
]


def test_a_head_of_usual_width_is_the_models_own_whatever_multiplies(
    model_of: Callable[..., Path], windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(model_of("llama", hidden_size=1024))
    weight = model.get_output_embeddings().weight
    weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))  # logits up to 150
    assert products.one_dnn() is not None
    for operator in (None, products.one_dnn()):
        monkeypatch.setattr(products, "_operator", lambda operator=operator: operator)
        with torch.no_grad():
            splitter = split(model, windows.input_ids[:1])
        assert splitter is not None
        with splitter.head() as head:
            assert head.tail.kind == "none"


@pytest.mark.parametrize(("family", "changes", "tail"), FAMILIES)
def test_the_head_gives_the_models_own_logits(
    family: str, changes: dict[str, Any], tail: str, model_of: Callable[..., Path], windows: Windows
) -> None:
    model = loaded(model_of(family, **changes))
    splitter = split(model, windows.input_ids[:1])
    assert splitter is not None
    ids = windows.input_ids[:3]
    mask = (torch.arange(ids.shape[1]) < windows.lengths[:3, None]).long()
    with torch.no_grad(), splitter.head() as head:
        own = model(input_ids=ids, attention_mask=mask).logits
        made = head(splitter.hidden(ids, mask))
    assert head.tail.kind == tail
    assert (made - own).abs().max() <= 1e-5 * own.abs().max()
    assert "forward" not in model.get_output_embeddings().__dict__


@pytest.mark.parametrize(("family", "changes", "tail"), FAMILIES)
def test_logits_come_back_as_they_were(
    family: str, changes: dict[str, Any], tail: str, model_of: Callable[..., Path], windows: Windows, tmp_path: Path
) -> None:
    model = loaded(model_of(family, **changes))
    run_pass(model, windows, TOKENIZER, keep=tmp_path)
    store = Baseline.open(tmp_path, windows)
    assert store is not None and store.complete and store.exact
    assert store.header.tail.kind == tail
    with torch.no_grad():
        for window in (0, 3, len(windows) - 1):
            length = int(windows.lengths[window])
            own = model(input_ids=windows.input_ids[window : window + 1, :length]).logits[0]
            own = own[windows.compared[window][:length]]
            assert (store.logits(window, 0, len(own)) - own).abs().max() < 1e-4
    assert compared(model, windows, tmp_path).kl_max == 0.0


def test_a_bfloat16_head_takes_half_the_room(model_of: Callable[..., Path], windows: Windows, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = loaded(model_of("llama"))
    run_pass(model, windows, TOKENIZER, keep=tmp_path / "a")
    assert load_file(tmp_path / "a" / "head.safetensors")["weight"].dtype == torch.bfloat16
    wide = disturbed(model, 0.01)
    run_pass(wide, windows, TOKENIZER, keep=tmp_path / "b")
    assert load_file(tmp_path / "b" / "head.safetensors")["weight"].dtype == torch.float32
    assert compared(wide, windows, tmp_path / "b").kl_max == 0.0


def without_a_head(model: Any) -> Any:
    """Whose logits depend on more than its last hidden states, as far as anyone can tell."""
    forward = model.forward

    def changed(**arguments: Any) -> Any:
        out = forward(**arguments)
        out.logits = out.logits - 0.5 * out.logits.mean(1, keepdim=True).abs() * out.logits.sign()
        return out

    model.forward = changed
    return model


@pytest.mark.parametrize("scale", [0.0, 0.02, 0.5])
def test_log_probabilities_in_float16_stay_within_their_stated_error(
    scale: float, model_of: Callable[..., Path], windows: Windows, tmp_path: Path
) -> None:
    original = without_a_head(loaded(model_of("llama")))
    run_pass(original, windows, TOKENIZER, keep=tmp_path)
    store = Baseline.open(tmp_path, windows)
    assert store is not None and not store.exact and store.header.dtype == "float16"
    compressed = without_a_head(disturbed(loaded(model_of("llama")), scale))
    found = compared(compressed, windows, tmp_path)
    true = []
    # The same batches: without a causal model another batch is another input.
    order = windows.lengths.sort(descending=True, stable=True).indices
    ids = windows.input_ids[order]
    mask = (torch.arange(ids.shape[1]) < windows.lengths[order][:, None]).long()
    with torch.no_grad():
        p, q = (
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits.double().log_softmax(-1)
            for model in (original, compressed)
        )
    kl = (p.exp() * (p - q)).sum(-1)
    for row, window in enumerate(order.tolist()):
        true.append(kl[row, windows.compared[window]])
    expected = float(torch.cat(true).mean())
    assert abs(found.kl_mean - expected) <= found.baseline_error
    assert 0 < found.baseline_error < 1e-5 + 0.02 * expected
    if scale == 0.0:
        assert found.kl_mean < 1e-6
        assert found.top1_agreement > 0.99


@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0])
@pytest.mark.parametrize("apart", [0.0, 0.01, 2.0])
def test_the_bound_holds_row_by_row(spread: float, apart: float) -> None:
    torch.manual_seed(0)
    p = (spread * torch.randn(200, 300)).log_softmax(-1)
    q = p + apart * torch.randn(200, 300)
    p[:, 7] = -math.inf
    p = p.log_softmax(-1)

    def kl(reference: torch.Tensor) -> torch.Tensor:
        a, b = reference.double().log_softmax(-1), q.double().log_softmax(-1)
        return (a.exp() * (a - b)).nansum(-1)

    stored = p.half().float()
    bound = rounding_bound(stored, q)
    assert bound.isfinite().all()
    assert ((kl(p) - kl(stored)).abs() <= bound).all()
    assert bound.mean() < 0.005 * (1 + apart)


def test_an_interrupted_original_goes_on(model_of: Callable[..., Path], windows: Windows, tmp_path: Path) -> None:
    model = loaded(model_of("llama"))
    folders: dict[str, Path] = {"keep": tmp_path / "base", "folder": tmp_path / "results"}

    def stop(done: int, _total: int, _nats: float) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pass(model, windows, TOKENIZER, batch_size=2, on_progress=stop, **folders)
    store = Baseline.open(folders["keep"], windows)
    assert store is not None and len(store.done) == 4 and not store.complete
    # A window whose rows were kept but whose result wasn't, and the other way round.
    done = folders["keep"] / "done.jsonl"
    done.write_bytes(b"".join(done.read_bytes().splitlines(keepends=True)[:-1]))
    again = run_pass(model, windows, TOKENIZER, batch_size=2, **folders)
    assert again.resumed == 3
    assert compared(model, windows, folders["keep"]).kl_max == 0.0


def test_damage_is_noticed_and_named(model_of: Callable[..., Path], windows: Windows, tmp_path: Path) -> None:
    model = loaded(model_of("llama"))
    run_pass(model, windows, TOKENIZER, keep=tmp_path)
    data = bytearray((tmp_path / "rows.bin").read_bytes())
    start = int(windows.compared[:5].sum()) * 64 * 4  # the sixth window's first row
    data[start + 10] ^= 1
    (tmp_path / "rows.bin").write_bytes(data)
    with pytest.raises(EvalFailed, match=r"is damaged at window 5; run again"):
        compared(model, windows, tmp_path)
    (tmp_path / "rows.bin").write_bytes(data[:1000])
    with pytest.raises(EvalFailed, match=r"is damaged at window"):
        compared(model, windows, tmp_path)


def test_what_was_started_differently_is_started_anew(windows: Windows, tmp_path: Path) -> None:
    head = Head(torch.randn(512, 8), None, Tail())
    first = Baseline.create(tmp_path, windows, head=head, width=8, dtype=torch.float32)
    count = int(windows.compared[0].sum())
    first.write(0, [torch.randn(count - 1, 8), torch.randn(1, 8)])
    first.check(0)
    same = Baseline.create(tmp_path, windows, head=head, width=8, dtype=torch.float32)
    assert list(same.done) == [0]
    other = Baseline.create(tmp_path, windows, head=head, width=8, dtype=torch.bfloat16)
    assert not other.done
    header = json.loads((tmp_path / "header.json").read_text())
    (tmp_path / "header.json").write_text(json.dumps({**header, "version": 0}))
    assert Baseline.open(tmp_path, windows) is None


def test_a_full_disk_is_refused_before_anything_runs(
    windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(baselines.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(EvalError, match=r"takes .* GB at .*; ask for fewer tokens \(--max-tokens\)"):
        Baseline.create(tmp_path / "x", windows, head=None, width=512, dtype=torch.float16)


def test_rows_in_bfloat16_are_kept_to_the_bit(windows: Windows, tmp_path: Path) -> None:
    head = Head(torch.eye(8, dtype=torch.bfloat16), None, Tail("divide", 2.0))
    store = Baseline.create(tmp_path, windows, head=head, width=8, dtype=torch.bfloat16)
    rows = torch.randn(int(windows.compared[2].sum()), 8).bfloat16()
    store.write(2, [rows])
    opened = Baseline.open(tmp_path, windows)
    assert opened is not None
    assert torch.equal(opened.logits(2, 1, 4), rows[1:4].float() / 2)
    assert (tmp_path / "rows.bin").stat().st_size == int(windows.compared.sum()) * 8 * 2
