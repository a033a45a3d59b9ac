"""The copy that computes: what it holds, where its gradients go, and when it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from gdro_llm.config import Config
from gdro_llm.engine import policy as policy_module
from gdro_llm.engine.policy import load_policy, settled
from gdro_llm.engine.precision import refresh, working_copy

IDS = torch.arange(2, 14).view(2, 6)


def small(*, tied: bool) -> Qwen3ForCausalLM:
    """A random model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Qwen3ForCausalLM(
        Qwen3Config(**sizes, num_key_value_heads=1, head_dim=16, vocab_size=40, tie_word_embeddings=tied)
    ).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_the_copy_is_the_model_in_another_format(tied):
    """Weights are rounded once, tied ones stay tied, buffers keep their format, and freezing is kept."""
    model = small(tied=tied)
    model.model.layers[0].requires_grad_(False)
    copy = working_copy(model, torch.bfloat16)
    for (name, weight), (same, mine) in zip(model.named_parameters(), copy.named_parameters(), strict=True):
        assert name == same
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, weight.to(torch.bfloat16))
        assert mine.requires_grad == weight.requires_grad
        assert mine.data_ptr() != weight.data_ptr()
    assert (copy.lm_head.weight is copy.model.embed_tokens.weight) == tied
    assert copy.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(copy.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_the_copy_are_added_to_the_weights_in_float32(tied):
    """Each backward pass adds what it has; the copy keeps none."""
    model = small(tied=tied)
    model.model.layers[0].requires_grad_(False)
    copy = working_copy(model, torch.bfloat16)
    sums: dict[str, torch.Tensor] = {}
    for rows in (IDS[:1], IDS[1:]):
        copy(rows, labels=rows).loss.backward()
        trained = [(name, mine) for name, mine in copy.named_parameters() if mine.requires_grad]
        gradients = torch.autograd.grad(copy(rows, labels=rows).loss, [mine for _, mine in trained])
        for (name, _), gradient in zip(trained, gradients, strict=True):
            sums[name] = sums.get(name, 0.0) + gradient.float()
    for name, weight in model.named_parameters():
        assert (weight.grad is None) == (name not in sums)
        if name in sums:
            assert weight.grad.dtype == torch.float32
            assert torch.equal(weight.grad, sums[name])
    assert all(mine.grad is None for mine in copy.parameters())


def test_the_copy_hears_of_new_weights_when_it_is_told():
    """Only those that are trained can have moved."""
    model = small(tied=True)
    model.model.layers[0].requires_grad_(False)
    copy = working_copy(model, torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    before = copy.model.layers[0].mlp.up_proj.weight.clone()
    refresh(copy, model)
    assert torch.equal(copy.model.layers[0].mlp.up_proj.weight, before)
    assert torch.equal(copy.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight.bfloat16())


def test_there_is_no_copy_in_float32_and_none_under_adapters(tiny_config):
    """The model itself computes; with LoRA its frozen weights are in the format of compute already."""
    plain, half = load_policy(tiny_config()), load_policy(tiny_config(dtype="bfloat16"))
    assert plain.working is plain.model
    assert half.working is not half.model
    adapted = load_policy(tiny_config(dtype="bfloat16", lora_rank=2))
    assert adapted.working is adapted.model
    assert adapted.model.dtype == torch.bfloat16


@pytest.mark.parametrize("units", [True, False])
def test_auto_takes_bfloat16_where_the_machine_has_units_for_it(monkeypatch, units):
    """A run that goes on keeps its own."""
    monkeypatch.setattr(policy_module.torch.cpu, "get_capabilities", lambda: {"amx_bf16": units})
    auto = Config(device="cpu")
    assert auto.dtype == "auto"
    assert settled(auto).dtype == ("bfloat16" if units else "float32")
    for own in ("float32", "bfloat16"):
        assert settled(auto, {"dtype": own}).dtype == own
        assert settled(replace(auto, dtype=own), {"dtype": "float32"}).dtype == own
        assert not auto.conflicts({**vars(auto), "dtype": own})
    assert set(replace(auto, dtype="float32").conflicts({**vars(auto), "dtype": "bfloat16"})) == {"dtype"}
