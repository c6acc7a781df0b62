"""`llmshrink.load`: the model that transformers would have, with its weights packed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmshrink_kernels import device as where
from packed import pack_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmshrink
from llmshrink.errors import CheckpointError, LlmshrinkError, SourceError
from llmshrink.formats.compressed_tensors import GroupedIntScheme
from llmshrink.runtime.linear import QuantLinear

ModelOf = Callable[..., Path]
W4 = GroupedIntScheme(4, 32, True)
IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 200, 33]])


def dense(folder: Path) -> Any:
    """The same checkpoint in float32, decompressed by the evaluation's reader."""
    from llmshrink_eval.model import LoadOptions

    from llmshrink.evaluation.loader import load

    return load(str(folder), LoadOptions()).eval()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(ids).logits.float()
    return found


def off(found: Tensor, exact: Tensor) -> float:
    """The root of the mean square of the difference."""
    return float((found - exact).square().mean().sqrt())


def greedy(model: Any) -> Tensor:
    found: Tensor = model.generate(IDS, max_new_tokens=24, do_sample=False)
    return found


def packed_modules(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("scheme", [W4, GroupedIntScheme(3, -1, False), GroupedIntScheme(8, 32, False)])
def test_says_what_the_dequantized_model_says(
    family: str, scheme: GroupedIntScheme, model_of: ModelOf, tmp_path: Path
) -> None:
    out = pack_checkpoint(model_of(family), tmp_path / "out", scheme)
    model, expected = llmshrink.load(out, device="cpu", dtype="float32"), dense(out)
    assert len(packed_modules(model)) == 14
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert (logits(model) - logits(expected)).abs().max() < 1e-4 * logits(expected).std()
    assert torch.equal(greedy(model), greedy(expected))


@pytest.mark.parametrize("symmetric", [True, False])
def test_bfloat16_is_no_further_off_than_a_dense_model_in_it(
    symmetric: bool, model_of: ModelOf, tmp_path: Path
) -> None:
    out = pack_checkpoint(model_of("llama"), tmp_path / "out", GroupedIntScheme(4, 32, symmetric))
    exact = logits(dense(out))
    model = llmshrink.load(out, device="cpu")
    assert {module.words.dtype for module in packed_modules(model).values()} == {torch.uint8}
    assert off(logits(model), exact) < 1.2 * off(logits(dense(out).to(torch.bfloat16)), exact)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_stay_as_they_were_tied(tied: bool, model_of: ModelOf, tmp_path: Path) -> None:
    out = pack_checkpoint(model_of("llama", tie_word_embeddings=tied), tmp_path / "out", W4)
    model = llmshrink.load(out, device="cpu", dtype="float32")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(greedy(model), greedy(dense(out)))


def test_memory_is_the_compressed_size(model_of: ModelOf, tmp_path: Path) -> None:
    """4 bits and a scale for each 128; on the CPU in bfloat16 each scale once more, with its zero."""
    source = model_of("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    out = pack_checkpoint(source, tmp_path / "out", GroupedIntScheme(4, 128, True))
    for dtype, bits in (("bfloat16", 4 + 16 / 128 + 32 / 128), ("float32", 4 + 16 / 128)):
        modules = packed_modules(llmshrink.load(out, device="cpu", dtype=dtype))
        assert 8 * modules["model.layers.0.mlp.up_proj"].nbytes / 256**2 == bits


def test_other_tools_name_classes_and_patterns(model_of: ModelOf, tmp_path: Path) -> None:
    written = pack_checkpoint(model_of("llama"), tmp_path / "literal", W4)
    group = json.loads((written / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    group = {**group, "targets": ["Linear"], "weights": {**group["weights"], "actorder": "weight"}}
    other = pack_checkpoint(
        model_of("llama"), tmp_path / "class", W4, config_groups={"group_0": group}, ignore=["re:.*lm_head"]
    )
    first, second = (llmshrink.load(each, device="cpu") for each in (written, other))
    assert torch.equal(logits(first), logits(second))


def test_a_packed_head_and_one_projection(model_of: ModelOf, tmp_path: Path) -> None:
    out = pack_checkpoint(
        model_of("llama", tie_word_embeddings=False),
        tmp_path / "out",
        W4,
        chosen=lambda name: name == "lm_head" or name.endswith("0.mlp.up_proj"),
        ignore=[],
    )
    document = json.loads((out / "config.json").read_text())
    document["quantization_config"]["config_groups"]["group_0"]["targets"] = ["Linear"]
    (out / "config.json").write_text(json.dumps(document))
    model = llmshrink.load(out, device="cpu")
    assert set(packed_modules(model)) == {"lm_head", "model.layers.0.mlp.up_proj"}
    assert logits(model).isfinite().all()


def test_a_cpu_loads_in_what_it_multiplies_fastest(model_of: ModelOf, tmp_path: Path, cpu_with: Any) -> None:
    """Dense, or of bits that torch has no product for, that is float32 without bfloat16 instructions."""
    by_bits = {
        bits: pack_checkpoint(model_of("llama"), tmp_path / str(bits), GroupedIntScheme(bits, 32, True))
        for bits in (3, 4)
    }
    found = {}
    for flags in ("avx2", "avx2 avx512_bf16"):
        cpu_with(flags)
        models = [llmshrink.load(each, device="cpu") for each in (model_of("llama"), by_bits[3], by_bits[4])]
        asked = llmshrink.load(by_bits[3], device="cpu", dtype="bfloat16")
        halves = llmshrink.load(model_of("llama", dtype="float16"), device="cpu")
        found[flags] = [each.dtype for each in (*models, asked, halves)]
    narrow, wide = torch.bfloat16, torch.float32
    assert found["avx2"] == [wide, wide, narrow, narrow, wide]
    assert found["avx2 avx512_bf16"] == [narrow, narrow, narrow, narrow, wide]


def test_an_uncompressed_model_loads_as_it_is(
    model_of: ModelOf, tmp_path: Path, caplog: pytest.LogCaptureFixture, cpu_with: Any
) -> None:
    cpu_with("avx512_bf16")
    with caplog.at_level(logging.WARNING, "llmshrink"):
        model = llmshrink.load(model_of("llama"), device="cpu")
    assert "isn't compressed: loaded as it is" in caplog.text
    assert model.dtype == torch.bfloat16 and not packed_modules(model) and not model.training


def test_a_change_of_dtype_is_a_load_in_it(model_of: ModelOf, tmp_path: Path) -> None:
    out = pack_checkpoint(model_of("llama"), tmp_path / "out", GroupedIntScheme(4, 32, False))
    moved, loaded = (
        llmshrink.load(out, device="cpu").to(torch.float32),
        llmshrink.load(out, device="cpu", dtype="float32"),
    )
    assert torch.equal(logits(moved), logits(loaded))


def test_state_goes_from_model_to_model(model_of: ModelOf, tmp_path: Path) -> None:
    out = pack_checkpoint(model_of("llama"), tmp_path / "out", W4)
    first, second = (llmshrink.load(out, device="cpu") for _ in range(2))
    for module in packed_modules(second).values():
        module.words.zero_()
    assert not torch.equal(logits(second), logits(first))
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(second), logits(first))


def test_the_checkpoints_own_generation_config_is_kept(model_of: ModelOf, tmp_path: Path) -> None:
    out = pack_checkpoint(model_of("llama"), tmp_path / "out", W4)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8], "max_new_tokens": 3}))
    model = llmshrink.load(out, device="cpu")
    assert model.generation_config.eos_token_id == [7, 8] and model.config.use_cache
    assert model.generate(IDS, do_sample=False).shape[1] <= IDS.shape[1] + 3


def test_transformers_does_not_save_it(model_of: ModelOf, tmp_path: Path) -> None:
    out = pack_checkpoint(model_of("llama"), tmp_path / "out", W4)
    with pytest.raises(LlmshrinkError, match="isn't saved by transformers; copy"):
        llmshrink.load(out, device="cpu").save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles(backend: str, dtype: str, model_of: ModelOf, tmp_path: Path) -> None:
    out = pack_checkpoint(model_of("llama"), tmp_path / "out", W4)
    model = llmshrink.load(out, device="cpu", dtype=dtype)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend=backend)
    if (backend, dtype) == ("inductor", "bfloat16"):
        # It keeps in float32 what eager rounds between two operations: other numbers, no worse ones.
        assert off(logits(compiled), logits(dense(out))) < 1.2 * off(logits(model), logits(dense(out)))
    else:
        assert (logits(compiled) - logits(model)).abs().max() <= 1e-5 * logits(model).std()


def damaged(folder: Path, key: str, change: Callable[[Tensor], Tensor | None]) -> Path:
    """The checkpoint with one tensor changed, or taken out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors.pop(key) if key in tensors else torch.zeros(0))
    if changed is not None:
        tensors[key] = changed.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        (f"{Q}.weight_scale", lambda t: None, f"no tensor {Q}.weight_scale"),
        (f"{Q}.weight_packed", lambda t: t[:, :-1], f"{Q}.weight_packed is"),
        (f"{Q}.weight_scale", lambda t: t[:-1], f"{Q}.weight_scale is"),
        (f"{Q}.weight_shape", lambda t: t - t, f"{Q}.weight_shape says"),
        (f"{Q}.weight_g_idx", lambda t: torch.arange(64), f"{Q}.weight_g_idx"),
        ("model.norm.weight", lambda t: t[:-1], "model.norm.weight: has shape"),
        ("model.norm.weight", lambda t: None, "no tensor for model.norm.weight"),
        (
            "model.layers.7.mlp.up_proj.weight_packed",
            lambda t: torch.zeros(64, 8, dtype=torch.int32),
            "model.layers.7.mlp.up_proj and 0 more are packed, and the model that config.json describes has no place",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    key: str, change: Callable[[Tensor], Tensor | None], said: str, model_of: ModelOf, tmp_path: Path
) -> None:
    out = damaged(pack_checkpoint(model_of("llama"), tmp_path / "out", W4), key, change)
    with pytest.raises(CheckpointError) as refused:
        llmshrink.load(out, device="cpu")
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": "int8"}, "--dtype int8: choose one of float32, bfloat16, float16, or auto"),
        ({"device": "tpu"}, "--device tpu: not a device here"),
        ({"device": "cuda:99"}, "--device cuda:99: not a device here"),
    ],
)
def test_bad_arguments(arguments: dict[str, str], said: str, model_of: ModelOf, tmp_path: Path) -> None:
    out = pack_checkpoint(model_of("llama"), tmp_path / "out", W4)
    with pytest.raises(LlmshrinkError) as refused:
        llmshrink.load(out, **arguments)
    assert said in str(refused.value)


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no config\.json"):
        llmshrink.load(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(SourceError, match="can't be read as JSON: it isn't JSON"):
        llmshrink.load(tmp_path)


def test_other_methods_are_refused_by_name(model_of: ModelOf, tmp_path: Path) -> None:
    out = pack_checkpoint(model_of("llama"), tmp_path / "out", W4, quant_method="awq")
    with pytest.raises(CheckpointError, match="quantized by awq"):
        llmshrink.load(out, device="cpu")


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"eos_token_id"', b"\xff\xfe"])
def test_a_broken_generation_config_is_one_line(text: str | bytes, model_of: ModelOf, tmp_path: Path) -> None:
    out = pack_checkpoint(model_of("llama"), tmp_path / "out", W4)
    (out / "generation_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        SourceError, match=r"generation_config\.json: (can't be read as JSON: it |not a JSON object; )"
    ) as refused:
        llmshrink.load(out, device="cpu")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("quantization", [None, {}])
def test_a_packed_folder_whose_config_does_not_say_so_is_refused(
    quantization: object, model_of: ModelOf, tmp_path: Path
) -> None:
    out = pack_checkpoint(model_of("llama"), tmp_path / "out", W4)
    document = json.loads((out / "config.json").read_text())
    document["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"_proj is packed, but config\.json has no quantization_config"):
        llmshrink.load(out, device="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bits", [3, 4])
def test_one_notice_where_there_are_no_kernels(
    bits: int, dtype: str, model_of: ModelOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever way of torch's is taken, and however often."""
    out = pack_checkpoint(model_of("llama"), tmp_path / "out", GroupedIntScheme(bits, 32, True))
    where.notice.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            greedy(llmshrink.load(out, device="cpu", dtype=dtype))
    said = "llmshrink kernels: cpu has no Triton kernels; computing by plain torch"
    assert [record.message for record in caplog.records if "kernels" in record.message] == [said]
