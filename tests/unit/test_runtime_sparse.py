"""2:4 without its zeros, running in torch: by `llmshrink.load`, and by transformers itself."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llmshrink_kernels.wna16.naive import allowed_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import llmshrink
from llmshrink.errors import CheckpointError, LlmshrinkError
from llmshrink.formats import sparse24
from llmshrink.formats.sparse24 import Sparse24Scheme
from llmshrink.runtime import sparse
from llmshrink.runtime.sparse import SparseLinear
from llmshrink.weights import Dense, GroupedInt, Sparse24

ModelOf = Callable[..., Path]
IDS = torch.tensor([[5, 17, 80, 3, 41, 9, 200, 33]])
KINDS = [(4, 32), (4, -1), (8, 32), (16, None)]


def pruned(weight: Tensor, bits: int, group_size: int | None) -> Sparse24:
    """The two largest of every four, rounded to the nearest code; every other scale is negative."""
    fours = weight.float().view(weight.shape[0], -1, 4)
    kept = torch.zeros_like(fours).scatter_(-1, fours.abs().topk(2, -1).indices, 1.0)
    whole = (fours * kept).view(weight.shape) + 0.0
    if group_size is None:
        return Sparse24.of(Dense(whole.to(weight.dtype)))
    size = weight.shape[1] if group_size == -1 else group_size
    groups = whole.view(len(whole), -1, size)
    scale = (groups.abs().amax(-1) / ((1 << (bits - 1)) - 1)).clamp(min=1e-5)
    scale[:, ::2] *= -1
    scale = scale.to(weight.dtype)
    codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return Sparse24.of(GroupedInt(codes.view(weight.shape).to(torch.int8), scale, None, bits, size))


def checkpoints(source: Path, folder: Path, bits: int, group_size: int | None) -> tuple[Path, Path]:
    """(a sparse24 copy of a model, the plain model that it means, in float32). The last down_proj stays dense."""
    tensors = load_file(source / "model.safetensors")
    names = [key.removesuffix(".weight") for key in tensors if "layers" in key and key.endswith("proj.weight")]
    stays = [name for name in names if "1.mlp.down" in name]
    stored = dict(tensors)
    meant = {key: tensor.float() for key, tensor in tensors.items()}
    sites: dict[str, Sparse24Scheme | None] = dict.fromkeys(names)
    for name in names:
        if name not in stays:
            weight = pruned(stored.pop(f"{name}.weight"), bits, group_size)
            sites[name] = Sparse24Scheme.of(weight)
            stored |= sparse24.tensors(name, weight)
            meant[f"{name}.weight"] = weight.dequantize()
    config = json.loads((source / "config.json").read_text())
    described = sparse24.quantization_config(sites, ["lm_head"])
    for target, contents, changes in (
        (folder / "sparse", stored, {"quantization_config": described}),
        (folder / "dense", meant, {"dtype": "float32"}),
    ):
        shutil.copytree(source, target)
        save_file(contents, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps({**config, **changes}))
    return folder / "sparse", folder / "dense"


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IDS).logits.float()
    return found


def greedy(model: Any) -> Tensor:
    found: Tensor = model.generate(IDS, max_new_tokens=24, do_sample=False)
    return found


def sparse_modules(model: Any) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer as on CUDA: the kernels' layout and operator, which computes by plain torch here."""
    monkeypatch.setattr(sparse, "has_kernel", lambda device: True)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_says_what_the_dequantized_model_says(
    family: str, bits: int, group_size: int | None, model_of: ModelOf, tmp_path: Path
) -> None:
    stored, meant = checkpoints(model_of(family), tmp_path, bits, group_size)
    model, expected = llmshrink.load(stored, device="cpu", dtype="float32"), plain(meant)
    assert len(sparse_modules(model)) == 13
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert (logits(model) - logits(expected)).abs().max() < 1e-4 * logits(expected).std()
    assert torch.equal(greedy(model), greedy(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
@pytest.mark.parametrize("inputs", [96, 100])
def test_every_output_is_within_the_stated_error(
    bits: int, group_size: int | None, inputs: int, dtype: torch.dtype
) -> None:
    if inputs == 100 and group_size == 32:
        group_size = -1
    generator = torch.Generator().manual_seed(bits)
    weight = pruned(torch.randn(37, inputs, generator=generator).bfloat16(), bits, group_size)
    bias = nn.Parameter(torch.randn(37, generator=generator).to(dtype), requires_grad=False)
    layer = SparseLinear.of(weight, bias, dtype=dtype)
    x = torch.randn(2, 5, inputs, generator=generator).to(dtype)
    exact = weight.dequantize(torch.float64)
    if bits == 16 and dtype == torch.float16:
        exact = exact.to(dtype).double()
    y = layer(x)
    assert y.shape == (2, 5, 37) and y.dtype == dtype
    product = x.double() @ exact.T
    limit = 2.0**-21 * (x.double().abs() @ exact.abs().T) + 1e-30
    if dtype != torch.float32:
        limit = limit + allowed_error(x.view(-1, inputs), exact, dtype).view(2, 5, 37)
    without = SparseLinear.of(weight, None, dtype=dtype)(x)
    assert ((without.double() - product).abs() <= limit).all()
    assert torch.equal(y, without + bias)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_the_kernels_layout_is_the_same_layer(
    bits: int, group_size: int | None, model_of: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, meant = checkpoints(model_of("llama"), tmp_path, bits, group_size)
    model = llmshrink.load(stored, device="cpu", dtype="bfloat16")
    assert all(module.words is not None and module.weight_shape is None for module in sparse_modules(model))
    off = (logits(model) - logits(plain(meant))).square().mean().sqrt()
    rounded = (logits(plain(meant).to(torch.bfloat16)) - logits(plain(meant))).square().mean().sqrt()
    assert off < 1.2 * rounded
    # What is saved is the checkpoint, whichever layout it lay in; and it loads into the other.
    files, state = load_file(stored / "model.safetensors"), model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in files.items())
    assert state.keys() - files.keys() <= {"lm_head.weight"}
    with monkeypatch.context() as patch:
        patch.setattr(sparse, "has_kernel", lambda device: False)
        other = llmshrink.load(stored, device="cpu", dtype="bfloat16")
        for module in sparse_modules(other):
            module.weight_values.zero_()
        other.load_state_dict(state)
        again = llmshrink.load(stored, device="cpu", dtype="bfloat16")
        assert torch.equal(logits(other), logits(again))
        # A move between devices changes the layout.
        back = model.to("cpu")
        assert all(module.words is None for module in sparse_modules(back))
        assert torch.equal(logits(back), logits(again))


@pytest.mark.usefixtures("kernels")
def test_sixteen_bits_follow_the_dtype_as_a_dense_layer_does() -> None:
    weight = pruned(torch.randn(8, 64).bfloat16() * 1e-6, 16, None)
    layer = SparseLinear.of(weight, None, dtype=torch.bfloat16)
    dense = weight.dequantize(torch.bfloat16)
    assert torch.equal(layer.weight().dequantize(torch.bfloat16), dense)
    half = copy.deepcopy(layer).to(torch.float16)
    assert half.weight().values.dtype == torch.float16
    assert torch.equal(half.weight().dequantize(torch.float16), dense.to(torch.float16))
    assert half(torch.ones(1, 64).half()).dtype == torch.float16


def test_a_change_of_dtype_never_touches_scales_and_values(model_of: ModelOf, tmp_path: Path) -> None:
    for number, (bits, group_size) in enumerate(((4, 32), (16, None))):
        stored, _ = checkpoints(model_of("llama"), tmp_path / str(number), bits, group_size)
        moved = llmshrink.load(stored, device="cpu").to(torch.float32)
        loaded = llmshrink.load(stored, device="cpu", dtype="float32")
        assert torch.equal(logits(moved), logits(loaded))
        back = moved.to(torch.bfloat16)
        files = load_file(stored / "model.safetensors")
        state = back.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in files.items() if "proj" in key)


def test_memory_is_the_stored_size(model_of: ModelOf, tmp_path: Path) -> None:
    source = model_of("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    stored, _ = checkpoints(source, tmp_path, 4, 128)
    module = llmshrink.load(stored, device="cpu").get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(module, SparseLinear)
    assert 8 * (module.nbytes - 16) / 256**2 == 3 + 16 / 128
    assert "bits=4, group_size=128, pattern=2:4" in repr(module)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (16, None)])
def test_compiles(backend: str, bits: int, group_size: int | None, model_of: ModelOf, tmp_path: Path) -> None:
    stored, _ = checkpoints(model_of("llama"), tmp_path, bits, group_size)
    model = llmshrink.load(stored, device="cpu", dtype="float32")
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    assert (logits(compiled) - logits(model)).abs().max() <= 1e-5 * logits(model).std()


def test_x_that_does_not_fit_is_said() -> None:
    layer = SparseLinear.of(pruned(torch.randn(8, 64).bfloat16(), 4, 32), None, dtype=torch.bfloat16)
    for x in (torch.ones(1, 64), torch.ones(1, 32).bfloat16()):
        with pytest.raises(ValueError, match=r"this layer takes torch.bfloat16 \[..., 64\]"):
            layer(x)


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("weight_positions", lambda t: t * 0, "weight_positions"),
        ("weight_values", lambda t: t[:, :-1], "weight_values is"),
        ("weight_scale", lambda t: None, "no tensor model.layers.0.self_attn.q_proj.weight_scale"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    key: str, change: Callable[[Tensor], Tensor | None], said: str, model_of: ModelOf, tmp_path: Path
) -> None:
    stored, _ = checkpoints(model_of("llama"), tmp_path, 4, 32)
    tensors = load_file(stored / "model.safetensors")
    changed = change(tensors.pop(f"model.layers.0.self_attn.q_proj.{key}"))
    if changed is not None:
        tensors[f"model.layers.0.self_attn.q_proj.{key}"] = changed.contiguous()
    save_file(tensors, stored / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as refused:
        llmshrink.load(stored, device="cpu")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_linear_that_the_config_forgets_is_named(model_of: ModelOf, tmp_path: Path) -> None:
    stored, _ = checkpoints(model_of("llama"), tmp_path, 4, 32)
    config = json.loads((stored / "config.json").read_text())
    gone = config["quantization_config"]["config_groups"]["group_0"]["targets"].pop()
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{gone} is packed, but no config group targets it"):
        llmshrink.load(stored, device="cpu")


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_transformers_loads_and_saves_it(bits: int, group_size: int | None, model_of: ModelOf, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    stored, meant = checkpoints(model_of("llama"), tmp_path, bits, group_size)
    model: Any = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    assert len(sparse_modules(model)) == 13
    assert torch.equal(logits(model), logits(llmshrink.load(stored, device="cpu", dtype="float32")))
    assert torch.equal(greedy(model), greedy(plain(meant)))
    model.save_pretrained(tmp_path / "again")
    files, again = (load_file(folder / "model.safetensors") for folder in (stored, tmp_path / "again"))
    assert all(torch.equal(again[key], tensor) for key, tensor in files.items() if "weight_" in key)
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", device_map="cpu")
    assert torch.equal(logits(saved), logits(model))
    headless: Any = AutoModel.from_pretrained(stored, dtype=torch.float32)
    assert len(sparse_modules(headless)) == 13
    with torch.inference_mode():
        assert torch.equal(headless(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_transformers_is_told_what_it_can_not_do(model_of: ModelOf, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    stored, _ = checkpoints(model_of("llama"), tmp_path, 4, 32)
    with pytest.raises(LlmshrinkError, match="loaded onto one device"):
        AutoModelForCausalLM.from_pretrained(stored, device_map={"model": "cpu", "lm_head": "disk"})
    with pytest.raises(LlmshrinkError, match=r"dtype torch.float64"):
        AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float64)


@pytest.mark.parametrize("order", ["import llmshrink, transformers", "import transformers.quantizers.auto, llmshrink"])
def test_it_is_registered_whichever_is_imported_first(order: str, model_of: ModelOf, tmp_path: Path) -> None:
    stored, _ = checkpoints(model_of("llama"), tmp_path, 4, 32)
    code = (
        f"{order}\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(stored)!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["SparseLinear"], done.stderr


def test_importing_llmshrink_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, llmshrink; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_import_of_transformers_survives_a_registry_of_another_kind() -> None:
    """Whoever imports transformers for something else gets one warning, and transformers."""
    code = (
        "import sys, llmshrink\n"
        "sys.modules['transformers.utils.quantization_config'] = None\n"
        "from llmshrink.runtime import register\n"
        "register._register()\n"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "can't be taught llmshrink's format" in done.stderr
