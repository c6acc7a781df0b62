"""The model as a chain of blocks, against transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, make_model
from safetensors.torch import load_file, save_file

from llmshrink.calibration.activations import Batch
from llmshrink.checkpoint.index import CheckpointIndex, check_finite
from llmshrink.errors import CheckpointError, UnsupportedModelError
from llmshrink.model.chain import Chain
from llmshrink.model.paused import PausedForward, pausing_at
from llmshrink.model.skeleton import Skeleton

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True, "mlp_bias": True},
    "llama odd heads": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32},
    "llama one block": {"num_hidden_layers": 1},
    "qwen2": {},
    "qwen2 window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {"num_hidden_layers": 3, "sliding_window": 8},
    "gemma3_text": {"num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 3},
    "granite": {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    },
    "olmo2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "opt norms after": {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "phi3": {"sliding_window": 8},
    "phi3 turned in part": {"partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    "smollm3": {"num_hidden_layers": 4},
}  # fmt: skip


def chain_of(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Chain, CheckpointIndex]:
    from transformers import AutoConfig

    index = CheckpointIndex.open(folder)
    config = AutoConfig.from_pretrained(folder)
    return Chain(Skeleton(config, index, device=torch.device("cpu"), dtype=dtype)), index


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(1, 300, (batch, length), generator=torch.Generator().manual_seed(0))


def walk(chain: Chain, batch: Batch) -> torch.Tensor:
    chain.load_outside()
    hidden = chain.embed(batch)
    for number, block in enumerate(chain.blocks):
        chain.skeleton.load(chain.name(number))
        with torch.no_grad():
            hidden = chain.calls(batch)[number].run(block, hidden)
        chain.skeleton.release(chain.name(number))
    return chain.logits(hidden)


@pytest.mark.parametrize("case", FAMILIES)
def test_chain_of_blocks_equals_the_model(case: str, model_of: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = model_of(case.split()[0], **FAMILIES[case])
    chain, _ = chain_of(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
    assert torch.equal(walk(chain, Batch(ids, None, False)), expected)


def test_padding_reaches_the_blocks_as_the_model_passes_it(model_of: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    folder = model_of("llama")
    chain, _ = chain_of(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, mask = tokens(), torch.ones(2, 24, dtype=torch.bool)
    mask[1, 10:] = False
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    assert torch.equal(walk(chain, Batch(ids, mask, False))[mask], expected[mask])


def test_stages_are_those_of_a_llama_block(model_of: Callable[..., Path]) -> None:
    chain, index = chain_of(model_of("qwen3"))
    stages = chain.analyse(Batch(tokens(1), None, False), check_finite)
    found = [[site.local.rpartition(".")[2] for site in stage.sites] for stage in stages[1]]
    assert found == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert set(index.reads.values()) == {1}
    assert all(parameter.is_meta for parameter in chain.skeleton.model.parameters())


def test_a_nan_is_found_by_name(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    chain, _ = chain_of(folder)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        chain.analyse(Batch(tokens(1), None, False), check_finite)


def test_paused_forward_is_the_forward_cut_in_pieces(model_of: Callable[..., Path]) -> None:
    chain, _ = chain_of(model_of("llama"), torch.bfloat16)
    batch = Batch(tokens(), None, False)
    chain.skeleton.load(chain.name(0))
    block, call = chain.blocks[0], chain.calls(batch)[0]
    hidden = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        expected = call.run(block, hidden)
    with pausing_at(block, ["self_attn.q_proj", "mlp.down_proj"]):
        first, second = PausedForward(block, call, hidden), PausedForward(block, call, hidden)
        shapes = [tuple(forward.advance().shape) for forward in (first, second, first, second)]
        out = first.advance()
        second.close()
    assert shapes == [(2, 24, 64), (2, 24, 64), (2, 24, 96), (2, 24, 96)]
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "gpt2"),
        ("mixtral", {"num_local_experts": 2}, "mixtral"),
        ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 32}, "qwen3_moe"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(family: str, changes: dict[str, Any], named: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**TINY, "vocab_size": 512, **changes})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    names = [name for name, _ in model.named_parameters()]

    class Reader:
        def keys(self) -> list[str]:
            return names

        def read(self, key: str) -> torch.Tensor:
            raise AssertionError("nothing is read of a model that isn't covered")

    with pytest.raises(UnsupportedModelError, match=named):
        Chain(Skeleton(config, Reader(), device=torch.device("cpu"), dtype=torch.float32))


def test_a_matrix_that_is_no_linear_is_refused_by_name() -> None:
    from transformers.pytorch_utils import Conv1D

    from llmshrink.model.uncovered import refuse_uncovered

    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.fc\.weight: a Conv1D"):
        refuse_uncovered(torch.nn.ModuleDict({"fc": Conv1D(8, 4)}), "model.layers.0")


def test_of_many_other_matrices_the_experts_are_named() -> None:
    from llmshrink.model.uncovered import refuse_uncovered

    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2, 8))

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(torch.zeros(2, 4, 8))

    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.experts\.up: fused experts, 2 in one tensor"):
        refuse_uncovered(torch.nn.ModuleDict({"gate": Router(), "experts": Experts()}), "layers.0")


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        (
            "gpt2",
            {"n_embd": 64, "n_layer": 2, "n_head": 4},
            r"transformer\.h\.0\.attn\.c_attn\.weight: a Conv1D of shape .* compress the weights of nn.Linear alone",
        ),
        ("mixtral", {"num_local_experts": 2}, r"layers\.0\.mlp\.experts\.gate_up_proj: fused experts, 2 in one tensor"),
        ("gemma3n_text", {"num_hidden_layers": 30}, r"its last 15 layers share the keys and values of earlier ones"),
        ("gemma3", {}, "it reads more than text"),
        ("stablelm", {}, "no test has taken it from a checkpoint to logits"),
    ],
)
def test_why_a_family_is_not_covered_is_said(family: str, changes: dict[str, Any], why: str) -> None:
    from transformers import AutoConfig

    from llmshrink.model.uncovered import refuse_family

    config = AutoConfig.for_model(family, **{**TINY, "vocab_size": 512, **changes})
    with pytest.raises(UnsupportedModelError, match=f"architecture '{family}' isn't covered yet: .*{why}"):
        refuse_family(config)


def test_experts_in_a_list_are_named() -> None:
    from llmshrink.model.uncovered import listed_experts

    experts = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])
    block = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": experts})})
    assert listed_experts(block, "layers.1") == "layers.1.mlp.experts: 3 experts, of which a token reaches only some"
    assert listed_experts(torch.nn.ModuleDict({"up": torch.nn.Linear(4, 4)}), "layers.1") is None


def test_a_matrix_that_other_tensors_stand_for_is_quantized_already(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight; it doesn't match"
    ):
        chain_of(folder)
    for name in ("qweight", "scales"):
        tensors[f"model.layers.1.mlp.up_proj.{name}"] = torch.zeros(8, 8, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"instead model\..*up_proj\.qweight, .*scales: it is already quantized"):
        chain_of(folder)


def test_checkpoint_without_the_base_prefix_is_found(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tie_word_embeddings=True)
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    chain, _ = chain_of(folder)
    assert chain.skeleton.key_of["model.layers.0.mlp.up_proj.weight"] == "layers.0.mlp.up_proj.weight"
    assert chain.skeleton.key_of["lm_head.weight"] == "embed_tokens.weight"
