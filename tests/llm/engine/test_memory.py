"""The estimate agrees with what can be counted without a GPU, and its remedies are true."""

import re
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gdro_llm.cli import main
from gdro_llm.config import Config, UsageError
from gdro_llm.engine.memory import (
    CHUNK,
    activation_bytes,
    check_fits,
    estimate,
    remedies,
    saved_per_token,
    summary,
    table,
    trained_parameters,
)
from gdro_llm.engine.precision import working_copy
from gdro_llm.engine.shapes import (
    EMBEDDED_MODEL,
    QWEN3,
    Shape,
    UnknownShape,
    flops_per_token,
    mfu,
    peak_flops,
    shape_of,
)

GB = 1e9
BF16 = {"dtype": "bfloat16", "engine": "vllm", "gradient_checkpointing": True, "max_new_tokens": 4096}
QWEN_4B = Config(model="Qwen/Qwen3-4B-Base", optimizer="adamw8bit", update_tokens=16384, **BF16)


def qwen3_config(shape: Shape) -> Qwen3Config:
    keys = ("qk_norm", "qkv_bias")
    return Qwen3Config(**{key: value for key, value in vars(shape).items() if key not in keys})


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),  # in all, as the model cards and keras-hub's list of presets count them
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-1.7B", 1_720_574_976),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
    ],
)
def test_parameters_are_those_of_transformers_models(name, parameters):
    """Exactly, for the four Qwen3 models, tied and untied; -Base has the same shape."""
    shape = shape_of(name)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(qwen3_config(shape))
    assert shape.parameters == count(model) == parameters
    assert shape.block_parameters == count(model.model.layers[0])
    assert shape_of(f"{name}-Base") == shape


def test_a_folder_is_known_by_its_config(tmp_path):
    """Of any model of the Llama family: biases, norms and tied heads are counted as they are."""
    small = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    for kind, config in (
        (Qwen2ForCausalLM, Qwen2Config(**small, tie_word_embeddings=False)),
        (LlamaForCausalLM, LlamaConfig(**small, tie_word_embeddings=True)),
        (Qwen3ForCausalLM, Qwen3Config(**small, head_dim=16, tie_word_embeddings=False)),
    ):
        config.save_pretrained(tmp_path)
        assert shape_of(str(tmp_path)).parameters == count(kind(config))
    assert shape_of("embedded").parameters == count(Qwen3ForCausalLM.from_pretrained(EMBEDDED_MODEL))
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnknownShape, match=r"model_type must be one of qwen3, .*, got 'mamba'"):
        shape_of(str(tmp_path))


def test_a_model_that_is_not_known_is_no_reason_to_refuse_a_run(tmp_path):
    """`check_fits` says that it cannot tell."""
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert check_fits(Config(model=str(tmp_path)), 1.0).startswith("memory is not estimated: the shape of model")


def test_trained_parameters_are_those_of_the_adapters_or_layers():
    """LoRA on every matrix as peft counts it; the last blocks and the final norm."""
    shape = Shape(24, 40, 3, 4, 2, 16, 50, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(qwen3_config(shape))
    adapted = get_peft_model(model, LoraConfig(r=5, target_modules="all-linear"))
    assert trained_parameters(Config(lora_rank=5), shape) == adapted.get_nb_trainable_parameters()[0]
    blocks = count(model.model.layers[-1])  # of the base and its adapters
    adapters = trained_parameters(Config(lora_rank=5), shape) // 3
    assert trained_parameters(Config(trainable_layers=2), shape) == 2 * (blocks - adapters) + 24
    assert trained_parameters(Config(), shape) == shape.parameters


def saved_bytes(shape: Shape, rows: int, length: int, config: Config, *, padded: bool = True) -> int:
    """Bytes of the distinct tensors that a forward pass keeps for the backward pass, weights apart."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(qwen3_config(shape)).train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.dtype == "bfloat16":
        model = working_copy(model, torch.bfloat16)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, :3] = 0 if padded else 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(torch.randint(shape.vocab_size, (rows, length)), attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


SMALL = [  # hidden, intermediate, heads, key-value heads, head size: the ratios of 0.6B, 1.7B, 4B and 8B
    (64, 192, 4, 2, 32),
    (128, 384, 4, 2, 32),
    (80, 304, 8, 2, 16),
    (128, 384, 8, 2, 16),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", SMALL)
def test_activations_of_a_block_are_what_torch_saves(sizes, dtype):
    """Within 10 % of what one more block adds, padded; an estimate below 0.95 of it would let a run die."""
    config = Config(dtype=dtype)
    d, f, heads, groups, size = sizes
    shapes = [Shape(d, f, layers, heads, groups, size, 32, tie_word_embeddings=True) for layers in (1, 3)]
    one, three = (saved_bytes(shape, 3, 61, config) for shape in shapes)
    measured = (three - one) / 2 / (3 * 61)
    assert 0.95 * measured <= saved_per_token(config, shapes[0]) <= 1.1 * measured


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_with_checkpointing_a_block_keeps_its_input_only(dtype):
    """A number in the format of compute a token and hidden unit, exactly."""
    config = Config(dtype=dtype, gradient_checkpointing=True)
    shapes = [Shape(64, 192, layers, 4, 2, 32, 32, tie_word_embeddings=True) for layers in (1, 3)]
    one, three = (saved_bytes(shape, 3, 61, config) for shape in shapes)
    assert (three - one) / 2 == 3 * 61 * 64 * (2 if dtype == "bfloat16" else 4)
    deep = replace(shapes[0], num_hidden_layers=36)
    assert activation_bytes(config, deep) < 0.2 * activation_bytes(replace(config, gradient_checkpointing=False), deep)


def test_items_add_up_by_hand():
    """Qwen3-4B, adamw8bit, one GPU: each item as a person would reckon it."""
    needs = estimate(QWEN_4B, 80 * GB)
    parameters = 4_022_468_096
    assert needs.items["weights"] == (4 * parameters,) * 3
    assert needs.items["gradients"] == (0, 4 * parameters, 4 * parameters)
    assert needs.items["moments"] == (pytest.approx(2.03125 * parameters),) * 3
    assert needs.items["copy of the weights that computes"] == (2 * parameters,) * 3
    assert needs.items["logits"][1] == pytest.approx(CHUNK * 14 + 151936 * 2560 * 6)
    assert needs.items["vLLM (asleep outside of sampling)"][0] == 40 * GB
    cache_row = 2 * 36 * 1024 * 2 * 5120  # keys and values, blocks, width, bytes, tokens
    assert needs.sequences == int((40 * GB - 2 * parameters - 2 * GB) // cache_row)
    assert needs.phases["step"] == pytest.approx(sum(sizes[2] for sizes in needs.items.values()))
    assert needs.peak == max(needs.phases.values())
    assert "reference" not in needs.items
    with_reference = estimate(replace(QWEN_4B, kl_coef=0.001), 80 * GB)
    assert with_reference.items["reference"] == (2 * parameters,) * 3  # it only computes
    adapters = estimate(replace(QWEN_4B, kl_coef=0.001, lora_rank=32), 80 * GB)
    assert "reference" not in adapters.items, "the reference is the model without its adapters"
    trained = shape_of("Qwen/Qwen3-4B").adapter_parameters(32)
    assert adapters.items["weights"] == (2 * parameters + 4 * trained,) * 3
    assert adapters.items["gradients"][1] == 4 * trained


def test_gpus_share_weights_gradients_and_moments():
    """FSDP2 shards what belongs to parameters; activations, logits and vLLM stay on every GPU."""
    one, four = (estimate(replace(QWEN_4B, kl_coef=0.1), 80 * GB, gpus) for gpus in (1, 4))
    for item in ("weights", "gradients", "moments"):
        assert four.items[item] == pytest.approx([size / 4 for size in one.items[item]])
    assert four.items["reference"] == pytest.approx([size / 2 for size in one.items["reference"]])  # float32 in shards
    for item in ("activations", "logits", "vLLM (asleep outside of sampling)"):
        assert four.items[item] == one.items[item]


@pytest.mark.parametrize(
    ("change", "item", "phase"),
    [
        ({"gradient_checkpointing": False}, "activations", 1),
        ({"update_tokens": 32768}, "activations", 1),
        ({"max_new_tokens": 30000}, "activations", 1),
        ({"optimizer": "adamw"}, "moments", 0),
        ({"dtype": "float32"}, "logits", 1),
        ({"vllm_memory": 0.6}, "vLLM (asleep outside of sampling)", 0),
    ],
)
def test_what_costs_memory_is_seen(change, item, phase):
    """Each setting moves its item upwards."""
    assert estimate(replace(QWEN_4B, **change), GB).items[item][phase] > estimate(QWEN_4B, GB).items[item][phase]


def test_a_micro_batch_has_at_least_one_row():
    """However few tokens it is allowed."""
    shape, row = shape_of(QWEN_4B.model), QWEN_4B.max_prompt_tokens + QWEN_4B.max_new_tokens
    least = activation_bytes(replace(QWEN_4B, update_tokens=row), shape)
    assert activation_bytes(replace(QWEN_4B, update_tokens=1), shape) == least > 0


def test_the_hf_engine_needs_a_cache_for_its_rows():
    """Half the rows, half the cache and logits."""
    config = replace(QWEN_4B, engine="hf", sample_rows=64)
    full, half = estimate(config, 80 * GB), estimate(replace(config, sample_rows=32), 80 * GB)
    for item in ("key-value cache", "logits of the sampler"):
        assert half.items[item][0] == full.items[item][0] / 2
    assert full.items["key-value cache"][0] == pytest.approx(64 * 2 * 36 * 1024 * 2 * 5120, rel=0.03)


def changed(config: Config, text: str) -> tuple[Config, int]:
    """Configuration and GPUs after the remedies in a message, as a user would apply them."""
    gpus, changes = 1, {}
    for remedy in text.split(", "):
        if match := re.fullmatch(r"(\d+) GPUs", remedy):
            gpus = int(match[1])
            continue
        flag, _, value = remedy.removeprefix("--").replace("-", "_", remedy.count("-") - 2).partition(" ")
        kind = type(getattr(config, flag))
        changes[flag] = True if kind is bool else kind(value)
    return replace(config, **changes), gpus


@pytest.mark.parametrize(
    ("change", "gpu", "first"),
    [
        ({"gradient_checkpointing": False}, 80, "--gradient-checkpointing"),
        ({"update_tokens": 65536}, 80, "--update-tokens 32768"),
        ({"vllm_memory": 0.7}, 80, "--vllm-memory 0.55"),
        ({"vllm_memory": 0.1}, 80, "--vllm-memory 0.15"),
        ({"optimizer": "adamw"}, 80, "--optimizer adamw8bit"),
        ({"engine": "hf", "sample_rows": 512, "update_tokens": 5120}, 80, "--sample-rows 32"),
        ({"kl_coef": 0.001}, 72, "--kl-coef 0.0"),
        ({"model": "Qwen/Qwen3-8B"}, 80, "--lora-rank 32"),
    ],
)
def test_each_remedy_alone_makes_it_fit_and_the_cheapest_comes_first(change, gpu, first):
    """What `Any one of these` promises is computed, not guessed."""
    config = replace(QWEN_4B, **change)
    with pytest.raises(UsageError, match="does not fit on 1 GPU") as refused:
        check_fits(config, gpu * GB)
    text = str(refused.value).partition("Any one of these makes it fit: ")[2]
    assert text.startswith(first)
    for remedy in text.split(", "):
        assert check_fits(*(changed(config, remedy)[0], gpu * GB, changed(config, remedy)[1]))


def test_remedies_that_are_needed_together_fit_together_and_none_is_idle():
    """Qwen3-4B with everything on, on 24 GB."""
    config = replace(QWEN_4B, optimizer="adamw", gradient_checkpointing=False, kl_coef=0.1)
    text = remedies(config, 24 * GB).partition("These together make it fit: ")[2]
    needed = text.split(", ")
    assert len(needed) > 1
    for left_out in (None, *needed):
        after, gpus = changed(config, ", ".join(remedy for remedy in needed if remedy != left_out))
        assert bool(estimate(after, 24 * GB, gpus).shortage) == (left_out is not None)
    assert remedies(config, 1 * GB).startswith("No change of the settings makes it fit")


def test_vllm_needs_room_for_its_weights_and_a_sequence():
    """Else it would refuse to start, after minutes of loading."""
    config = replace(QWEN_4B, vllm_memory=0.1)  # 8 GB for 8 GB of weights
    with pytest.raises(UsageError, match=r"vLLM's 0.1 of 80.0 GB is .* short of its weights and one sequence"):
        check_fits(config, 80 * GB)


def test_plan_memory_prints_the_table_and_refuses_the_impossible(capsys):
    """Exit code 0 with a verdict, or 2 with one line of causes and remedies."""
    assert main(["plan-memory", "qwen3-4b-dapo", "--gpu-memory", "80"]) == 0
    out = capsys.readouterr().out
    assert "4,022,468,096 parameters" in out
    assert "fits: sample" in out
    assert main(["plan-memory", "qwen3-4b-dapo", "--gpu-memory", "40"]) == 2
    captured = capsys.readouterr()
    assert "weights" in captured.out
    assert captured.err.startswith("gdro: error: Qwen/Qwen3-4B-Base does not fit on 1 GPU: ")
    assert captured.err.count("\n") == 1
    assert main(["plan-memory", "qwen3-4b-dapo", "--gpu-memory", "40", "--gpus", "4", "--optimizer", "adamw"]) == 0
    for flags in (["--gpus", "0"], ["--gpu-memory", "nan"], ["--gpu-memory", "-1"]):
        assert main(["plan-memory", "qwen3-4b-dapo", *flags]) == 2
        assert f"{flags[0]} must be above 0 and finite" in capsys.readouterr().err


def test_table_and_summary_say_the_same():
    """Phases of the table's last row and of the line."""
    needs = estimate(QWEN_4B, 80 * GB)
    totals = next(line for line in table(QWEN_4B, 80 * GB).splitlines() if line.startswith("in all")).split()[2:]
    assert summary(needs, 1).startswith("sample {}, backward {}, step {} GB on 1 x 80 GB".format(*totals))


def test_flops_by_hand():
    """A model small enough for paper; Qwen3-1.7B against six times its parameters."""
    shape = Shape(4, 8, 2, 2, 1, 3, 10, tie_word_embeddings=False, qk_norm=True)
    # per block: q 4*6, k 4*3, v 4*3, o 6*4, gate, up, down 3*4*8, norms 2*4 + 2*3 = 182; two, final norm 4, head 40
    multiplying = 2 * 182 + 4 + 40
    assert flops_per_token(shape, 5) == 6 * multiplying + 6 * 2 * 6 * 5
    adapters = 2 * 3 * (10 + 7 + 7 + 10 + 12 + 12 + 12)
    assert flops_per_token(shape, 5, lora_rank=3) == 4 * multiplying + 6 * adapters + 6 * 2 * 6 * 5
    tied = replace(shape, tie_word_embeddings=True)
    assert flops_per_token(tied, 0) == flops_per_token(shape, 0), "a tied head multiplies as much"
    assert flops_per_token(QWEN3["Qwen/Qwen3-1.7B"], 0) == 6 * 1_720_574_976


def test_attention_counts_half_the_square():
    """6 L H T is what the causal triangle costs: scores and values, forward once and backward twice."""
    layers, heads, size, length = 3, 4, 16, 50
    shape = Shape(24, 40, layers, heads, 2, size, 50, tie_word_embeddings=True)
    pairs = length * length / 2
    by_pairs = 3 * layers * heads * pairs * (2 * size + 2 * size)  # a product of two numbers is two operations
    assert length * (flops_per_token(shape, length) - flops_per_token(shape, 0)) == by_pairs


def test_mfu_is_a_share_of_the_peak():
    """By the GPU's name; None where the peak is not known, so that no wrong number is logged."""
    shape = QWEN3["Qwen/Qwen3-1.7B"]
    tokens, length, seconds = 100_000, 2000.0, 4.0
    expected = tokens * flops_per_token(shape, length) / (4.0 * 989e12)
    assert mfu(shape, tokens, length, seconds, "NVIDIA H100 80GB HBM3") == pytest.approx(expected)
    assert mfu(shape, tokens, length, seconds, "NVIDIA H200", gpus=2) == pytest.approx(expected / 2)
    assert mfu(shape, tokens, length, seconds, "NVIDIA GeForce GTX 1080") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB") == peak_flops("NVIDIA A100 80GB PCIe") == 312e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("cpu") is None
