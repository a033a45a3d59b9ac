"""Encoding prompts once (left padding, shared cache) gives what one plain forward pass per sequence gives."""

import json
from dataclasses import replace

import literal
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gdro_llm.config import UsageError
from gdro_llm.engine import scoring
from gdro_llm.engine.policy import completion_logprobs, encode, load_policy, success_probability
from gdro_llm.engine.scoring import positions

OWNER = [3, 0, 4, 0, 2, 2, 3, 1, 1, 0]  # any order, any number a prompt


@pytest.fixture(params=[0.7, 1.0])
def policy(request, tiny_config):
    return load_policy(tiny_config(temperature=request.param))


def random_completions(count: int, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 32, rng.integers(1, 7)).tolist() for _ in range(count)]


def test_logprobs_equal_a_plain_forward_pass(policy):
    """Values, for ragged completions in any order of owners, at the sampling temperature; padding holds exactly 0."""
    completions = random_completions(len(OWNER), 0)
    tokens, mask = literal.pad(completions)
    with torch.no_grad():
        logprobs = completion_logprobs(policy, literal.prompts(policy), torch.tensor(OWNER), tokens, mask)
        for r, (p, completion) in enumerate(zip(OWNER, completions, strict=True)):
            expected = literal.logprobs_of(policy, literal.PROMPTS[p], completion)
            np.testing.assert_allclose(logprobs[r, : len(completion)], expected, atol=2e-5)
            assert (logprobs[r, len(completion) :] == 0).all()


def test_gradients_through_the_shared_cache_equal_those_of_plain_forward_passes(policy):
    """Every parameter's gradient of a random weighting of the token log-probabilities."""
    completions = random_completions(len(OWNER), 1)
    tokens, mask = literal.pad(completions)
    weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0))
    (weight * completion_logprobs(policy, literal.prompts(policy), torch.tensor(OWNER), tokens, mask)).sum().backward()
    gradient_of = literal.gradients(policy)
    policy.model.zero_grad()
    for r, (p, completion) in enumerate(zip(OWNER, completions, strict=True)):
        terms = literal.logprobs_of(policy, literal.PROMPTS[p], completion)
        (weight[r, : len(completion)] * terms).sum().backward()
    expected = literal.gradients(policy)
    assert gradient_of.keys() == expected.keys() == literal.weights(policy).keys()
    for name in expected:
        error = (gradient_of[name] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, f"{name}: {error}"


def test_positions_count_tokens_and_not_padding():
    """0 at the first token, whatever stands left of it: models with absolute positions depend on it."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    assert positions(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]


def test_completions_of_one_token_need_no_second_pass(policy):
    """T = 1 is answered from the prompt's last logits."""
    tokens = torch.tensor([[4], [31]])
    with torch.no_grad():
        logprobs = completion_logprobs(
            policy, literal.prompts(policy, ["12+3=", "s5="]), torch.tensor([1, 0]), tokens, torch.ones_like(tokens)
        )
        expected = [literal.logprobs_of(policy, p, t.tolist()) for p, t in zip(["s5=", "12+3="], tokens, strict=True)]
    np.testing.assert_allclose(logprobs, torch.stack(expected), atol=2e-5)


def test_temperature_divides_the_logits(tiny_config):
    """The scored distribution is softmax(logits / temperature), normalised."""
    cold, warm = (load_policy(tiny_config(temperature=t)) for t in (0.5, 1.0))
    with torch.no_grad():
        logits = encode(warm, literal.prompts(warm, ["12+3="])).logits_P_V
        np.testing.assert_allclose(literal.log_softmax(cold, logits), torch.log_softmax(2 * logits, -1), atol=1e-6)
        assert literal.log_softmax(cold, logits).exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_success_probability_is_the_sum_of_products_of_token_probabilities(policy, rows):
    """Completion and end token, multiplied out, for zero to three accepted completions a prompt, in any chunks."""
    prompts = ["12+3=", "s5=", "7*8=", "d123="]
    accepted = [("15", "?51=15"), ("5",), (), ("6", "7", "?06")]
    how = {"max_new_tokens": 9, "temperature": policy.temperature, "rows": rows}
    probabilities = success_probability(policy, literal.prompts(policy, prompts), accepted, **how)
    for p, texts in enumerate(accepted):
        expected = 0.0
        for text in texts:
            completion = [*literal.token_ids(policy, text), policy.tokenizer.eos_token_id]
            with torch.no_grad():
                expected += literal.logprobs_of(policy, prompts[p], completion).exp().prod().item()
        assert probabilities[p].item() == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_success_probability_is_the_frequency_of_sampled_success(policy):
    """For likely completions the frequency in 4000 draws lies within 4 binomial standard errors."""
    n, prompts = 4000, ["r5=", "12+3="]
    first = literal.sample(policy, literal.prompts(policy, prompts), np.array([300, 300]), 6, seed=5, rows=1000)
    accepted = []
    for p in range(2):
        texts = [
            text
            for text, owner, cut in zip(first.texts, first.owner_R, first.truncated_R, strict=True)
            if owner == p and not cut
        ]
        accepted.append(tuple(sorted(set(texts), key=texts.count)[-3:]))
    how = {"max_new_tokens": 6, "temperature": policy.temperature, "rows": 100}
    probability = success_probability(policy, literal.prompts(policy, prompts), accepted, **how).numpy()
    drawn = literal.sample(policy, literal.prompts(policy, prompts), np.array([n, n]), 6, seed=6, rows=1000)
    hits = [
        not cut and text in accepted[p]
        for p, text, cut in zip(drawn.owner_R, drawn.texts, drawn.truncated_R, strict=True)
    ]
    frequency = np.array(hits).reshape(2, n).mean(1)
    assert (probability > 0.01).all()
    assert (np.abs(frequency - probability) < 4 * np.sqrt(probability * (1 - probability) / n)).all()


def test_stop_ids_are_the_end_token_and_every_token_that_holds_the_stop_text(tiny_config):
    """`stop` adds tokens by their text; without it only the model's own end stops."""
    plain, comma = load_policy(tiny_config()), load_policy(tiny_config(stop=","))
    end = plain.tokenizer.eos_token_id
    assert plain.stop_ids.tolist() == [end]
    assert comma.stop_ids.tolist() == sorted([end, *literal.token_ids(plain, ",")])


def test_a_stop_text_that_no_token_holds_is_refused(tiny_config):
    """It could never stop anything."""
    with pytest.raises(UsageError, match="stop"):
        load_policy(tiny_config(stop="\n"))


@pytest.mark.parametrize("layers", [1, 2])
def test_trainable_layers_frees_the_last_blocks_and_the_final_norm_only(tiny_config, layers):
    """Everything else gets no gradient; more layers than there are is an error."""
    policy = load_policy(tiny_config(trainable_layers=layers))
    free = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    allowed = tuple(f"model.layers.{i}." for i in range(2 - layers, 2))
    assert free == {n for n, _ in policy.model.named_parameters() if n.startswith(allowed) or n == "model.norm.weight"}
    with pytest.raises(UsageError, match="trainable_layers must be at most 2, got 3"):
        load_policy(tiny_config(trainable_layers=3))


def test_a_saved_policy_loads_as_the_same_one(tiny, tiny_config, tmp_path):
    """Weights bit for bit, tokenizer, stop ids, evaluation mode."""
    with torch.no_grad():
        tiny.model.lm_head.weight += 0.1
    tiny.save(tmp_path / "again")
    again = load_policy(tiny_config(), tmp_path / "again")
    before, after = literal.weights(tiny), literal.weights(again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.stop_ids.tolist() == tiny.stop_ids.tolist()
    assert literal.token_ids(again, "12+3=") == literal.token_ids(tiny, "12+3=")
    assert not again.model.training


def both_paths(scorer, policy, completions, owner=OWNER):
    tokens, mask = literal.pad(completions)
    return [how(literal.prompts(policy), torch.tensor(owner), tokens, mask) for how in (scorer.plain, scorer.shared)]


@pytest.mark.parametrize("chunk", [32, 7 * 32, scoring.CHUNK])
def test_rows_alone_and_prompts_shared_score_alike_in_any_chunks(policy, monkeypatch, chunk):
    """Log-probabilities, entropies of the whole distribution, and gradients, as one plain forward pass a row."""
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    completions = random_completions(len(OWNER), 2)
    results = []
    for logprobs, entropy in both_paths(policy.scorer, policy, completions):
        policy.model.zero_grad()
        assert not entropy.requires_grad
        (logprobs * torch.arange(logprobs.numel()).reshape(logprobs.shape)).sum().backward()
        results.append((logprobs.detach(), entropy, literal.gradients(policy)))
    np.testing.assert_allclose(results[0][0], results[1][0], atol=2e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=2e-5)
    for name, gradient in results[0][2].items():
        assert (gradient - results[1][2][name]).norm() < 1e-4 * gradient.norm(), name
    for r, (p, completion) in enumerate(zip(OWNER, completions, strict=True)):
        with torch.no_grad():
            expected = literal.logprobs_of(policy, literal.PROMPTS[p], completion)
            ids = torch.tensor([[*literal.token_ids(policy, literal.PROMPTS[p]), *completion]])
            logits = policy.model(ids).logits[0, -len(completion) - 1 : -1] / policy.temperature
        np.testing.assert_allclose(results[0][0][r, : len(completion)], expected, atol=2e-5)
        entropies = torch.distributions.Categorical(logits=logits).entropy()
        np.testing.assert_allclose(results[0][1][r, : len(completion)], entropies, atol=2e-5)
        assert (results[0][1][r, len(completion) :] == 0).all()


class Largest(TorchDispatchMode):
    """Sees every tensor that an operation makes, and remembers the largest of the vocabulary's width."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,) and tensor.ndim > 1:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return made


def test_logits_of_all_tokens_never_exist(monkeypatch, tiny_config):
    """Qwen3's vocabulary, 151 936 tokens: neither pass makes a tensor of more rows of it than a chunk has."""
    vocabulary, chunk = 151_936, 16
    monkeypatch.setattr(scoring, "CHUNK", chunk * vocabulary)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=8,
    )
    scorer = scoring.TokenLogprobs(Qwen3ForCausalLM(config).eval(), 1.0)
    tokens = torch.randint(0, vocabulary, (10, 9))
    for how in (scorer.plain, scorer.shared):
        with Largest(vocabulary) as largest:
            logprobs, _ = how([[5, 6], [7]], torch.tensor([0, 1] * 5), tokens, torch.ones_like(tokens))
            logprobs.sum().backward()
        assert largest.rows == chunk
    assert torch.isfinite(logprobs).all()


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}])
def test_gradient_checkpointing_changes_memory_and_no_number(tiny_config, settings):
    """The same log-probabilities and gradients, with the layers' activations computed again; sampling still caches."""
    results = []
    for checkpointing in (False, True):
        policy = load_policy(tiny_config(gradient_checkpointing=checkpointing, **settings))
        calls = []
        for layer in policy.model.base_model.layers:
            layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        tokens, mask = literal.pad(random_completions(len(OWNER), 3))
        logprobs, _ = policy.scorer.plain(literal.prompts(policy), torch.tensor(OWNER), tokens, mask)
        logprobs.sum().backward()
        assert len(calls) == (4 if checkpointing else 2)
        assert not any(module.training for module in policy.model.modules())
        results.append((logprobs.detach(), literal.gradients(policy)))
        assert encode(policy, literal.prompts(policy)).cache.get_seq_length() == 9
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.allclose(gradient, results[1][1][name], rtol=1e-5, atol=1e-7), name


def test_bfloat16_computes_in_bfloat16_over_float32_weights(tiny_config):
    """Both paths are near float32 and not equal to it; weights and gradients are float32."""
    exact, policy = load_policy(tiny_config()), load_policy(tiny_config(dtype="bfloat16"))
    completions = random_completions(len(OWNER), 4)
    for (logprobs, entropy), (expected, _) in zip(
        both_paths(policy.scorer, policy, completions), both_paths(exact.scorer, exact, completions), strict=True
    ):
        assert logprobs.dtype == entropy.dtype == torch.float32
        assert 0 < (logprobs - expected).abs().max() < 0.5
        logprobs.sum().backward()
    assert {(p.dtype, p.grad.dtype) for p in policy.model.parameters()} == {(torch.float32, torch.float32)}


def train_a_little(policy) -> None:
    """Random steps of everything that is trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def score(policy, scorer=None) -> torch.Tensor:
    with torch.no_grad():
        return both_paths(scorer or policy.scorer, policy, random_completions(len(OWNER), 6))[0][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_train_alone_start_as_nothing_and_save_as_a_plain_model(tiny_config, tmp_path, dtype):
    """Only adapters have gradients, in float32; at first the policy is its base; the saved folder is a plain model with
    them merged and, with `lora_rank`, the same policy bit for bit."""
    config = tiny_config(lora_rank=3, lora_alpha=6.0, dtype=dtype)
    policy, base = load_policy(config), load_policy(tiny_config(dtype=dtype))
    assert policy.source == config.model
    free = {n: p.dtype for n, p in policy.model.named_parameters() if p.requires_grad}
    assert len(free) == 2 * 7 * 2, "two matrices for each of seven linear layers in two blocks"
    assert all(".lora_" in name and kind == torch.float32 for name, kind in free.items())
    assert torch.allclose(score(policy), score(base), atol=1e-6 if dtype == "float32" else 0.2)
    train_a_little(policy)
    before = literal.weights(policy)
    policy.save(tmp_path / "saved")
    assert all(torch.equal(before[name], weight) for name, weight in literal.weights(policy).items())

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in policy.named_weights()}
    plain = load_policy(tiny_config(dtype=dtype), tmp_path / "saved")
    difference = (score(plain) - score(policy)).abs().max()
    assert difference < (1e-4 if dtype == "float32" else 0.5)
    assert (score(plain) - score(base)).abs().max() > 0.5
    again = load_policy(config, tmp_path / "saved")
    assert all(torch.equal(before[name], weight) for name, weight in literal.weights(again).items())
    with pytest.raises(UsageError, match="lora_rank 2"):
        load_policy(tiny_config(lora_rank=2), tmp_path / "saved")
    base.save(tmp_path / "base")
    with pytest.raises(UsageError, match="holds no adapters"):
        load_policy(config, tmp_path / "base")


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 3}, {"trainable_layers": 1}])
def test_the_reference_is_the_policy_that_training_started_from(tiny_config, tmp_path, settings):
    """Before, during and after training, and after a resumption, when the policy is another one."""
    config = tiny_config(kl_coef=0.1, **settings)
    policy, start = load_policy(config), score(load_policy(tiny_config()))
    for _ in range(2):
        with policy.reference() as reference:
            assert torch.allclose(score(policy, reference), start, atol=1e-6)
        assert torch.allclose(score(policy), start, atol=1e-6) == (_ == 0)
        train_a_little(policy)
    policy.save(tmp_path / "saved")
    again = load_policy(config, tmp_path / "saved")
    with again.reference() as reference:
        assert torch.allclose(score(again, reference), start, atol=1e-6)
    assert torch.equal(score(again), score(policy))
    with pytest.raises(RuntimeError, match="kl_coef"), load_policy(tiny_config()).reference():
        pass


def test_a_generation_configuration_can_name_further_ends(tiny, tiny_config, tmp_path):
    """One number or several, as Qwen3's does."""
    end = tiny.tokenizer.eos_token_id
    for ends in (5, [end, 7, 9]):
        tiny.model.generation_config.eos_token_id = ends
        tiny.save(tmp_path / "ends")
        ids = load_policy(tiny_config(model=str(tmp_path / "ends"))).stop_ids.tolist()
        assert ids == sorted({end, *(ends if isinstance(ends, list) else [ends])})


def save_random(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_models_that_change_their_logits_after_the_output_layer_are_refused(tiny, tiny_config, tmp_path):
    """Gemma 2 caps them; to score its tokens by the output layer alone would be wrong without a sign of it."""
    shape = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    capped = Gemma2ForCausalLM(Gemma2Config(**shape, **heads, final_logit_softcapping=1.0))
    with pytest.raises(UsageError, match="scales or caps"):
        load_policy(tiny_config(model=save_random(capped, tiny.tokenizer, tmp_path / "gemma")))


def test_other_decoders_train_whole_and_refuse_what_needs_their_blocks(tiny, tiny_config, tmp_path):
    """GPT-2 has its blocks elsewhere: log-probabilities work, trainable_layers is a clear error."""
    torch.manual_seed(0)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    config = tiny_config(model=save_random(other, tiny.tokenizer, tmp_path / "gpt2"))
    policy = load_policy(config)
    completions = random_completions(len(OWNER), 5)
    plain, shared = both_paths(policy.scorer, policy, completions)
    assert torch.allclose(plain[0], shared[0], atol=1e-5)
    with pytest.raises(UsageError, match=r"model\.layers"):
        load_policy(replace(config, trainable_layers=1))


def test_pickled_weights_are_refused(tiny, tiny_config, tmp_path):
    """Only safetensors are read."""
    folder = save_random(tiny.model, tiny.tokenizer, tmp_path / "pickled")
    torch.save(tiny.model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="cannot load model"):
        load_policy(tiny_config(model=folder))


def test_code_of_a_model_folder_runs_only_when_asked_for(tiny, tiny_config, tmp_path):
    """Without `trust_remote_code` the folder's code is not run and the error names the option."""
    folder = tmp_path / "custom"
    save_random(tiny.model, tiny.tokenizer, folder)
    marker = tmp_path / "ran"
    (folder / "custom_model.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class CustomConfig(Qwen3Config):\n    model_type = 'custom_for_test'\n"
        "class CustomModel(Qwen3ForCausalLM):\n    config_class = CustomConfig\n"
    )
    described = json.loads((folder / "config.json").read_text())
    described |= {
        "model_type": "custom_for_test",
        "architectures": ["CustomModel"],
        "auto_map": {"AutoConfig": "custom_model.CustomConfig", "AutoModelForCausalLM": "custom_model.CustomModel"},
    }
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(UsageError, match="--trust-remote-code"):
        load_policy(tiny_config(model=str(folder)))
    assert not marker.exists()
    policy = load_policy(tiny_config(model=str(folder), trust_remote_code=True))
    assert marker.exists()
    assert type(policy.model).__name__ == "CustomModel"
