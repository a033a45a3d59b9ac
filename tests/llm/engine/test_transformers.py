"""The sampler: its own log-probabilities, ragged counts, early ends, places taken by waiting rows, and seeds."""

import literal
import numpy as np
import pytest
import torch
from scipy.stats import chi2

from gdro_llm.config import UsageError
from gdro_llm.engine.policy import encode, load_policy
from gdro_llm.engine.rollouts import Decoding
from gdro_llm.engine.sampler import make_sampler
from gdro_llm.engine.transformers import HFSampler, invert_cdf, log_distribution, uniforms

COUNTS = np.array([3, 0, 7, 1, 5])


@pytest.fixture(params=[0.8, 1.0])
def policy(request, tiny_config):
    return load_policy(tiny_config(temperature=request.param))


def test_logprobs_of_the_sampler_equal_a_plain_forward_pass(policy):
    """For every row of a ragged batch, also after other rows have ended and were dropped."""
    rollouts = literal.sample(policy, literal.prompts(policy), COUNTS, 6, seed=0, rows=100)
    completions = literal.rows(rollouts.tokens_R_T, rollouts.mask_R_T)
    assert len({len(c) for c in completions}) >= 4, "the test needs rows of several lengths"
    for r, completion in enumerate(completions):
        with torch.no_grad():
            expected = literal.logprobs_of(policy, literal.PROMPTS[rollouts.owner_R[r]], completion)
        np.testing.assert_allclose(rollouts.logprobs_R_T[r, : len(completion)], expected, atol=2e-5)
        assert (rollouts.logprobs_R_T[r, len(completion) :] == 0).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 100])
def test_rows_texts_and_flags(tiny_config, rows):
    """Rows stand in plan order, counts[i] of prompt i (none for 0), whatever the chunks; a completion ends at its first
    stop token, which the text leaves out; without one it is truncated and has max_new_tokens tokens."""
    policy = load_policy(tiny_config(stop=","))
    rollouts = literal.sample(policy, literal.prompts(policy), 3 * COUNTS, 5, seed=3, rows=rows)
    assert rollouts.owner_R.tolist() == np.repeat(np.arange(5), 3 * COUNTS).tolist()
    assert rollouts.prompts == literal.prompts(policy)
    stop = set(policy.stop_ids.tolist())
    completions = literal.rows(rollouts.tokens_R_T, rollouts.mask_R_T)
    for completion, text, cut in zip(completions, rollouts.texts, rollouts.truncated_R.tolist(), strict=True):
        assert cut == (completion[-1] not in stop)
        assert not stop & set(completion[:-1])
        assert len(completion) == 5 if cut else len(completion) <= 5
        assert literal.token_ids(policy, text) == (completion if cut else completion[:-1])
    assert (rollouts.mask_R_T.diff(dim=1) <= 0).all(), "tokens first, then padding"
    assert 0 < rollouts.truncated_R.float().mean() < 1
    assert "" in rollouts.texts, "a completion can end at once"


def test_a_stop_token_in_the_last_place_is_no_truncation(tiny):
    """With one token allowed, exactly the rows that drew the end token are complete."""
    rollouts = literal.sample(tiny, literal.prompts(tiny, ["r5="]), np.array([400]), 1, seed=0, rows=100)
    assert rollouts.truncated_R.tolist() == (rollouts.tokens_R_T[:, 0] != tiny.tokenizer.eos_token_id).tolist()
    assert 0 < rollouts.truncated_R.float().mean() < 1


def test_the_seed_decides_the_draws(tiny):
    """Same seed, same tokens and log-probabilities bit for bit; torch's global generator is neither used nor moved."""
    before = torch.random.get_rng_state()
    first, again, other = (literal.sample(tiny, literal.prompts(tiny), COUNTS, 6, seed=s, rows=4) for s in (1, 1, 2))
    assert torch.equal(first.tokens_R_T, again.tokens_R_T)
    assert torch.equal(first.logprobs_R_T, again.logprobs_R_T)
    assert first.texts == again.texts != other.texts
    assert torch.equal(before, torch.random.get_rng_state())


def test_token_frequencies_follow_the_softmax_at_the_temperature(tiny_config):
    """Chi-square of 20000 first tokens, and of the second tokens after the likeliest first one, at temperature 0.6."""
    policy = load_policy(tiny_config(temperature=0.6))
    rollouts = literal.sample(
        policy, literal.prompts(policy, ["12+3=", "s5="]), np.array([0, 20000]), 2, seed=0, rows=5000
    )
    first = rollouts.tokens_R_T[:, 0]
    top = int(first[first != policy.tokenizer.eos_token_id].mode().values)
    prompt_and_top = "s5=" + policy.tokenizer.decode([top])
    for drawn, prompt in ((first, "s5="), (rollouts.tokens_R_T[first == top, 1], prompt_and_top)):
        with torch.no_grad():
            logits = encode(policy, literal.prompts(policy, [prompt])).logits_P_V
            expected = literal.log_softmax(policy, logits)[0].exp().double().numpy() * len(drawn)
        observed = np.bincount(drawn, minlength=32)
        rare = expected < 5
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum() + 1e-9)
        statistic = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
        assert statistic < chi2.ppf(1 - 1e-4, len(observed) - 1)
        assert len(observed) > 4


def test_draws_depend_on_seed_and_row_only(tiny_config):
    """Whatever number of rows stands side by side and whichever rows are drawn, in any order: the same tokens."""
    policy = load_policy(tiny_config(stop=","))
    prompts, counts, decoding = literal.prompts(policy), 6 * COUNTS, Decoding(9, 1.0)
    samplers = {n: HFSampler(policy, tiny_config(sample_rows=n)) for n in (1, 3, 8, 1000)}
    whole = samplers[1000].sample(prompts, counts, decoding, seed=7)
    expected = literal.rows(whole.tokens_R_T, whole.mask_R_T)
    assert len({len(row) for row in expected}) > 4, "rows must end at several steps"
    for sampler in samplers.values():
        rollouts = sampler.sample(prompts, counts, decoding, seed=7)
        assert torch.equal(rollouts.tokens_R_T, whole.tokens_R_T)
        assert torch.equal(rollouts.mask_R_T, whole.mask_R_T)
        assert torch.equal(rollouts.truncated_R, whole.truncated_R)
        assert rollouts.texts == whole.texts
        torch.testing.assert_close(rollouts.logprobs_R_T, whole.logprobs_R_T, atol=2e-5, rtol=0)
    for rows in ([0], [95, 3, 40, 41], list(range(1, 96, 2))):
        rollouts = samplers[8].sample(prompts, counts, decoding, seed=7, rows=rows)
        assert literal.rows(rollouts.tokens_R_T, rollouts.mask_R_T) == [expected[r] for r in rows]
        assert rollouts.texts == [whole.texts[r] for r in rows]
        assert rollouts.owner_R.tolist() == whole.owner_R[rows].tolist()
    shorter = samplers[8].sample(prompts, counts, Decoding(4, 1.0), seed=7)
    assert literal.rows(shorter.tokens_R_T, shorter.mask_R_T) == [row[:4] for row in expected]


def test_waiting_rows_take_the_places_of_finished_ones(tiny_config):
    """With 8 places and 96 ragged rows the model runs at least 1.25 times less often than it would for 12 chunks one
    after another, and never on more than 8 rows."""
    policy = load_policy(tiny_config(stop=","))
    prompts, counts = literal.prompts(policy), 6 * COUNTS
    widths = []
    handle = policy.model.model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    rollouts = HFSampler(policy, tiny_config(sample_rows=8)).sample(prompts, counts, Decoding(40, 1.0), seed=7)
    handle.remove()
    assert max(rows for rows, _ in widths) <= 8
    lengths = rollouts.mask_R_T.sum(-1)
    one_after_another = sum(int(chunk.max()) for chunk in lengths.split(8))
    assert sum(columns == 1 for _, columns in widths) < one_after_another / 1.25


def test_uniforms_are_a_function_of_seed_row_and_place():
    """Also for the largest seeds, and whatever other rows and later places are asked for; they lie in [0, 1)."""
    for seed in (0, 2**32 + 5, 2**64 - 1):
        numbers = uniforms(seed, np.arange(50), 40)
        assert numbers.min() >= 0
        assert numbers.max() < 1
        np.testing.assert_array_equal(uniforms(seed, np.array([49, 3]), 7), numbers[[49, 3], :7])
        assert len(np.unique(numbers)) == numbers.size
    assert (uniforms(0, np.arange(2), 3) != uniforms(1, np.arange(2), 3)).all()


@pytest.mark.parametrize("size", [2, 512, 513, 151_936])
def test_inversion_of_large_distributions(size):
    """The token whose cumulative interval holds u, against float64 over the whole vocabulary; at u = 0 and just below 1
    the first and the last token of positive probability, never one of probability 0 nor beyond the end."""
    generator = np.random.default_rng(size)
    probs = torch.from_numpy(generator.exponential(size=(40, size)) ** 4).float()
    probs[:, generator.random(size) < 0.4] = 0
    probs[:, -1] = 0  # the tail, where a float32 sum is most wrong, is of probability 0
    probs[:, 0] = 0
    probs[:, size // 2] = 1e-3
    probs /= probs.sum(-1, keepdim=True)
    u = torch.from_numpy(generator.random(40))
    u[:10] = 0.0
    u[10:20] = 1 - 2.0**-53
    tokens = invert_cdf(probs, u)
    assert (probs.gather(-1, tokens[:, None]) > 0).all()
    for row, token, quantile in zip(probs.double().numpy(), tokens.tolist(), u.tolist(), strict=True):
        ends = row.cumsum()
        assert ends[token] - row[token] <= quantile * ends[-1] + 1e-12
        assert quantile * ends[-1] <= ends[token] + 1e-12
        if quantile == 0:
            assert token == row.nonzero()[0][0]
        if quantile == 1 - 2.0**-53:
            assert token == row.nonzero()[0][-1]


def test_log_distribution_against_a_literal_one():
    """Temperature, then the k likeliest, then the fewest of them that reach top_p, renormalised."""
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    for temperature, top_p, top_k in (
        (1.0, 1.0, 0),
        (0.7, 1.0, 5),
        (1.3, 0.8, 0),
        (0.6, 0.5, 4),
        (1.0, 1e-6, 0),
        (1.0, 1.0, 99),
    ):
        distribution = log_distribution(logits, Decoding(1, temperature, top_p, top_k)).exp().double().numpy()
        for row, got in zip(logits.double().numpy(), distribution, strict=True):
            probs = np.exp(row / temperature) / np.exp(row / temperature).sum()
            kept = np.argsort(-probs)[: top_k or None]
            share = probs[kept] / probs[kept].sum()
            kept = kept[: int(np.searchsorted(share.cumsum(), top_p - 1e-9)) + 1]
            expected = np.zeros_like(probs)
            expected[kept] = probs[kept] / probs[kept].sum()
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_evaluation_decoding_draws_from_the_cut_distribution(tiny, tiny_config):
    """top_k = 1 is the likeliest token with log-probability 0; top_k = 3 draws the three likeliest and no other."""
    prompts = literal.prompts(tiny)
    sampler = make_sampler(tiny, tiny_config(sample_rows=64))
    logits = encode(tiny, prompts).logits_P_V
    greedy = sampler.sample(prompts, np.full(5, 2), Decoding(1, 1.0, top_k=1), seed=0)
    assert greedy.tokens_R_T[:, 0].tolist() == logits.argmax(-1).repeat_interleave(2).tolist()
    assert (greedy.logprobs_R_T == 0).all()
    three = sampler.sample(prompts, np.full(5, 300), Decoding(1, 0.7, top_k=3), seed=0)
    for p in range(5):
        drawn = three.tokens_R_T[three.owner_R == p, 0]
        assert set(drawn.tolist()) <= set(logits[p].topk(3).indices.tolist())
    assert three.logprobs_R_T[:, 0].exp().reshape(5, 300).unique().numel() > 5


def test_no_rows_at_all(tiny, tiny_config):
    """A process without a share of the plan gets empty tensors of the right shapes."""
    for counts, rows in ((np.zeros(5, int), None), (COUNTS, [])):
        rollouts = HFSampler(tiny, tiny_config()).sample(
            literal.prompts(tiny), counts, Decoding(4, 1.0), seed=0, rows=rows
        )
        assert rollouts.tokens_R_T.shape == rollouts.logprobs_R_T.shape == (0, 1)
        assert (rollouts.texts, len(rollouts.owner_R)) == ([], 0)


def test_bfloat16_runs_a_copy_of_the_model_and_samples_in_float32(tiny_config):
    """The trained weights stay float32; log-probabilities are near those of float32 and not equal."""
    config = tiny_config(dtype="bfloat16")
    policy, decoding = load_policy(config), Decoding(1, 1.0)
    half, full = (
        HFSampler(each, config).sample(literal.prompts(each), 40 * COUNTS, decoding, seed=0)
        for each in (policy, load_policy(tiny_config()))
    )
    assert half.logprobs_R_T.dtype == torch.float32
    assert policy.model.dtype == torch.float32
    same = half.tokens_R_T == full.tokens_R_T
    assert same.float().mean() > 0.8
    gap = (half.logprobs_R_T - full.logprobs_R_T)[same].abs()
    assert 1e-4 < gap.mean() < 0.1


def test_what_cannot_be_sampled_is_refused(tiny, tiny_config):
    sampler, one = HFSampler(tiny, tiny_config()), np.array([1, 1])
    with pytest.raises(UsageError, match="prompt 1 has no tokens"):
        sampler.sample([[3], []], one, Decoding(4, 1.0), seed=0)
    with pytest.raises(UsageError, match="10 tokens plus max_new_tokens = 55 exceeds the 64 positions"):
        sampler.sample([[3], [3] * 10], one, Decoding(55, 1.0), seed=0)
    sampler.sample([[3], [3] * 10], one, Decoding(54, 1.0), seed=0)
    sampler.sample([[3], []], np.array([1, 0]), Decoding(4, 1.0), seed=0)  # never encoded
    with torch.no_grad():
        tiny.model.lm_head.weight[3] = torch.nan
    with pytest.raises(UsageError, match="logits are not finite"):
        sampler.sample([[3]], np.array([1]), Decoding(4, 1.0), seed=0)
