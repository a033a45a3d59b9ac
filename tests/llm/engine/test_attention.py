"""Attention on a CPU gives what transformers gives: to the bit in float32, closely in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gdro_llm.engine import attention
from gdro_llm.engine.attention import NAME, cpu_attention, use_cpu_attention

MODULE = nn.Module()
MODULE.num_key_value_groups = 3
MODULE.is_causal = True
SHAPES = [(1, 7), (4, 7), (7, 7)]  # queries, keys


def inputs(queries, keys, dtype, *, masked):
    """Two rows of six heads in two groups; the first row has two columns of padding on the left."""
    drawn = torch.Generator().manual_seed(keys + queries)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=drawn).to(dtype).requires_grad_()
        for heads, length in ((6, queries), (2, keys), (2, keys))
    )
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(2, 1, -1, -1).clone()
    mask[0, :, :, :2] = False
    return query, key, value, mask if masked else None


def seeing(mask, out):
    """The outputs of queries that see a key; those of padding are nobody's."""
    return out if mask is None else out * mask.any(-1).transpose(1, 2)[..., None]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_without_gradients_it_is_the_same_to_the_bit(queries, keys, masked):
    """So sampling in float32 draws what it drew."""
    if not masked and 1 < queries < keys:
        pytest.skip("transformers aligns such a mask with the first keys")
    for dtype in (torch.float32, torch.bfloat16):
        query, key, value, mask = inputs(queries, keys, dtype, masked=masked)
        with torch.no_grad():
            ours, theirs = (
                seeing(mask, f(MODULE, query, key, value, mask, scaling=0.3)[0])
                for f in (cpu_attention, sdpa_attention_forward)
            )
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("longest", [512, 3])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_with_gradients_in_bfloat16_it_is_as_near_to_float32(monkeypatch, queries, keys, masked, longest):
    """As transformers' own way: values and gradients err by no more than half as much again."""
    if not masked and 1 < queries < keys:
        pytest.skip("transformers aligns such a mask with the first keys")
    monkeypatch.setattr(attention, "LONGEST", longest)

    def run(attend, dtype):
        *qkv, mask = inputs(queries, keys, torch.bfloat16, masked=masked)
        qkv = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out = seeing(mask, attend(MODULE, *qkv, mask, scaling=0.3)[0])
        pull = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)
        return [x.float() for x in (out, *torch.autograd.grad(out, qkv, pull))]

    truth = run(sdpa_attention_forward, torch.float32)
    ours, theirs = run(cpu_attention, torch.bfloat16), run(sdpa_attention_forward, torch.bfloat16)
    for x, y, z in zip(ours, theirs, truth, strict=True):
        assert (x - z).norm() <= 1.5 * (y - z).norm() + 0.004 * z.norm()


def test_float32_with_gradients_is_left_alone():
    """The bits of earlier runs."""
    query, key, value, mask = inputs(4, 7, torch.float32, masked=True)
    results = []
    for attend in (cpu_attention, sdpa_attention_forward):
        out = seeing(mask, attend(MODULE, query, key, value, mask, scaling=0.3)[0])
        results.append([out, *torch.autograd.grad(out.square().sum(), (query, key, value))])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_a_model_attends_by_it_if_it_used_the_kernel_of_torch():
    """A model that was loaded with another implementation keeps it."""
    small = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    ids = torch.arange(12).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2)).eval()
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        use_cpu_attention(model)
        assert model.config._attn_implementation == NAME
        assert torch.equal(model(ids, attention_mask=mask).logits[mask.bool()], before[mask.bool()])
    eager = LlamaForCausalLM._from_config(LlamaConfig(**small), attn_implementation="eager")
    use_cpu_attention(eager)
    assert eager.config._attn_implementation == "eager"
