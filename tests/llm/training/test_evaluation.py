"""mean@n, pass@k and their intervals: by hand from the same samples, from exact probabilities, and as statistics."""

import json
from dataclasses import replace
from math import comb

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import beta
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from gdro_llm.config import Config, UsageError, load_preset
from gdro_llm.engine.policy import load_policy, sequence_logprobs, success_probability
from gdro_llm.engine.rollouts import decode_texts
from gdro_llm.engine.tokenizations import Tokenizations
from gdro_llm.engine.transformers import HFSampler
from gdro_llm.intervals import bca_intervals
from gdro_llm.problems import rewards as grading
from gdro_llm.problems.cells import cell_problems
from gdro_llm.problems.load import load_problems
from gdro_llm.problems.problem import Problem
from gdro_llm.training import evaluation
from gdro_llm.training.evaluation import (
    Scores,
    _by_bin,
    by_own_pass_rate,
    draw_seed,
    exact_rates,
    has_exact_rates,
    no_exact_rates,
    rate_values,
    rates_of,
    tabulate,
)


def by_hand(correct, n):
    """Plain averages and standard errors over problems of some problems' numbers of correct samples."""
    columns = {f"mean@{n}": [c / n for c in correct]}
    for k in (1, 2, 4, n):
        columns[f"pass@{k}"] = [1 - comb(n - c, k) / comb(n, k) for c in correct]
    rates = {"problems": len(correct)}
    for name, values in columns.items():
        size = len(values)
        rates[name] = sum(values) / size
        squares = sum((v - rates[name]) ** 2 for v in values)
        rates[f"{name}_se"] = (squares / (size - 1) / size) ** 0.5 if size > 1 else None
    return rates


def scores_of(correct_P_N, levels=None) -> Scores:
    """Scores of made-up samples, 3 tokens each."""
    correct = np.asarray(correct_P_N, dtype=bool)
    levels = levels or [""] * len(correct)
    problems = tuple(Problem(f"p{i}", "?", "!", level=level) for i, level in enumerate(levels))
    return Scores(problems, correct, np.full(correct.shape, 3), np.zeros(correct.shape, dtype=bool), None)


def test_rates_by_level_and_task_equal_those_counted_by_hand(run_config):
    """Over all problems, each level and each task; the same call gives the same numbers."""
    config = run_config(eval_samples=6)
    problems = load_problems(config)[1]
    policy = load_policy(config)
    table_of = literal.evaluate(policy, problems, config)
    drawn = literal.sample(
        policy,
        literal.prompts(policy, [p.prompt for p in problems]),
        np.full(len(problems), 6),
        1,
        seed=draw_seed(config.seed, "", 0),
        rows=1024,
    )
    correct = [0] * len(problems)
    for row, text in enumerate(drawn.texts):
        correct[row // 6] += text == problems[row // 6].answer
    assert 0 < sum(correct) < 6 * len(problems)
    for kind, parts in (("by_level", "level"), ("by_task", "task")):
        names = {getattr(p, parts) for p in problems}
        assert table_of[kind].keys() == names
        for name in names:
            mine = [i for i, p in enumerate(problems) if getattr(p, parts) == name]
            expected = by_hand([correct[i] for i in mine], 6)
            assert {key: table_of[kind][name][key] for key in expected} == pytest.approx(expected)
    whole = by_hand(correct, 6)
    assert {key: table_of[key] for key in whole} == pytest.approx(whole)
    rates = {key for key in table_of if "@" in key and key.count("_") == 0}
    assert rates == {"mean@6", "pass@1", "pass@2", "pass@4", "pass@6"}
    assert all(table_of[f"{rate}_low"] < table_of[rate] < table_of[f"{rate}_high"] for rate in rates)
    assert table_of["correct"] == {problem.id: c for problem, c in zip(problems, correct, strict=True)}
    assert table_of["completion_length"] == drawn.mask_R_T.sum().item() / len(drawn.texts)
    assert table_of["truncated_share"] == drawn.truncated_R.double().mean().item()
    json.dumps(table_of, allow_nan=False)
    assert table_of == literal.evaluate(policy, problems, config)


def test_runs_are_compared_on_the_same_draws_of_the_seed(run_config):
    """Other steps or controllers do not change an evaluation, another seed does."""
    policy = load_policy(run_config())
    problems = load_problems(run_config())[1]
    first = literal.evaluate(policy, problems, run_config(controller="grpo"))
    assert literal.evaluate(policy, problems, run_config(controller="published-prompt", steps=99)) == first
    assert literal.evaluate(policy, problems, run_config(seed=1)) != first


def test_one_problem_has_no_standard_error(run_config):
    """None instead of a NaN that JSON cannot hold."""
    rates = literal.evaluate(load_policy(run_config()), load_problems(run_config())[1][:1], run_config())
    assert rates["mean@4_se"] is rates["mean@4_low"] is rates["pass@4_high"] is None
    assert rates["problems"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"grader": "number"}, "grader 'number' takes more completions for correct than a list can hold"),
        ({"eval_top_p": 0.9}, "eval_top_p and eval_top_k must leave the whole distribution"),
        ({"eval_top_k": 5}, "eval_top_p and eval_top_k must leave the whole distribution"),
    ],
)
def test_exact_rates_are_given_only_where_they_describe_the_grading(tiny_config, change, reason):
    """Elsewhere evaluation samples, and says why it must where it was told not to."""
    problems = cell_problems("test", {"easy": 1}, seed=0)
    plain, changed = tiny_config(max_new_tokens=14), tiny_config(max_new_tokens=14, **change)
    policy = load_policy(plain)
    assert "exact_mean@8" in literal.evaluate(policy, problems, plain)
    assert "exact_mean@8" not in literal.evaluate(policy, problems, changed)
    with grading.Grader(changed) as grader:
        sampled = evaluation.evaluate(policy, problems, changed, HFSampler(policy, changed), grader)
    assert "correct" in sampled
    assert no_exact_rates(policy, problems, plain) == ""
    assert no_exact_rates(policy, problems, changed).startswith(reason)
    with pytest.raises(UsageError, match=f"success probabilities are unknown: {reason}"):
        evaluation.evaluate(policy, problems, replace(changed, eval_exact=True), None, None)


def test_answers_of_too_many_tokenizations_are_sampled(tiny_config, monkeypatch):
    """The bound is on their average over problems."""
    config = tiny_config(max_new_tokens=14)
    problems = [Problem("a", "1+1=", "2", accepted=("2", "02", "002")), Problem("b", "2+2=", "4")]
    policy = load_policy(config)
    monkeypatch.setattr(evaluation, "FEW", 2)
    assert has_exact_rates(policy, problems, config)
    assert not has_exact_rates(policy, problems[:1], config)
    assert no_exact_rates(policy, problems[:1], config).startswith("a problem has 3 correct token sequences on average")


def byte_level_model(folder, characters, merges) -> str:
    """A random model whose tokens are these byte-level characters, the merged ones, an end, and a second blank."""
    tokens = [*characters, *(one + other for one, other in merges), "<eos>"]
    built = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_tokens([" "])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=32,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 10.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


BLANK, NEWLINE = "\u0120", "\u010a"  # as byte-level tokens write them


@pytest.fixture(scope="module")
def ambiguous(tmp_path_factory) -> str:
    """A model of 9 tokens, some of several characters."""
    return byte_level_model(tmp_path_factory.mktemp("model"), f"12{BLANK}=", [("1", "2"), ("2", "1"), (BLANK, "1")])


AMBIGUOUS = [
    Problem("one", "12=", " 1"),
    Problem("several", "21=", "?", accepted=("1", "122", "12", "12", "", " 12", "2 ")),
    Problem("never", "2=", "2" * 8),
]


def completions(policy, ids, longest, before=()):
    """Chance and tokens, without the stop token, of every completion that can be drawn after `ids`, one by one."""
    logits = policy.model(torch.tensor([[*ids, *before]]), use_cache=False).logits[0, -1]
    for token, chance in enumerate(torch.softmax(logits.double(), -1).tolist()):
        if token in policy.stop_ids:
            yield chance, before
        elif len(before) + 1 == longest:
            yield chance, (*before, token)
        else:
            yield from ((chance * p, rest) for p, rest in completions(policy, ids, longest, (*before, token)))


@pytest.mark.parametrize(("longest", "stop"), [(1, ""), (2, ""), (3, ""), (3, " ")])
@torch.no_grad()
def test_the_exact_rate_is_the_chance_of_all_completions_that_are_graded_correct(ambiguous, longest, stop):
    """Every completion of a small vocabulary is decoded and graded: of all tokenizations, and those cut off, too."""
    plain = {"threads": 1, "device": "cpu", "dtype": "float32"}
    config = Config(model=ambiguous, max_new_tokens=longest, stop=stop, **plain)
    policy = load_policy(config)
    assert len(policy.stop_ids) == (4 if stop else 1)
    rates, right = exact_rates(policy, AMBIGUOUS, config), []
    for problem, rate in zip(AMBIGUOUS, rates, strict=True):
        ids = literal.token_ids(policy, problem.prompt)
        chances, drawn = zip(*completions(policy, ids, longest), strict=True)
        texts = decode_texts(policy, [*map(list, drawn)], [*map(len, drawn)], [True] * len(drawn))
        grades = np.array([grading.grade_exact(problem, text) for text in texts])
        assert sum(chances) == pytest.approx(1.0)
        assert rate == pytest.approx(grades @ chances, rel=1e-4, abs=1e-12)
        right.append({row for row, grade in zip(drawn, grades, strict=True) if grade})
    if longest == 3 and not stop:
        assert len(right[0]) == 3, "of one text"
        assert len(right[1]) == 13, "of six texts"
    assert right[2] == set()


def test_the_exact_rate_is_the_frequency_of_sampled_success(ambiguous):
    """4,000 draws a problem at another temperature, within 4 standard errors; one tokenization alone gives less."""
    n, build = 4000, {"model": ambiguous, "threads": 1, "device": "cpu", "dtype": "float32", "max_new_tokens": 3}
    config = Config(**build, eval_samples=n, sample_rows=n, eval_temperature=1.3)
    policy = load_policy(config)
    scores = literal.score(policy, AMBIGUOUS, config)
    p, frequency = scores.exact_P, scores.correct_P / n
    assert (abs(frequency - p) <= 4 * np.sqrt(p * (1 - p) / n)).all()
    assert (p[:2] > 0.01).all()
    one = [(0, literal.token_ids(policy, " 1"))]
    with torch.no_grad():
        canonical = sequence_logprobs(policy, [literal.token_ids(policy, "12=")], one, 3, 1.3).exp().item()
    assert frequency[0] - canonical > 4 * np.sqrt(p[0] * (1 - p[0]) / n)


def test_the_ladder_is_evaluated_without_samples(tmp_path):
    """By its preset: a blank, the digits and any token that holds a line break, from one plain pass a problem."""
    merges = [(BLANK, "1"), (NEWLINE, NEWLINE), ("1", NEWLINE)]
    model = byte_level_model(tmp_path, sorted(pre_tokenizers.ByteLevel.alphabet()), merges)
    config = Config(**{**load_preset("smollm2-arith"), "model": model, "trainable_layers": 0, "dtype": "float32"})
    policy = load_policy(config)
    problems = load_problems(config)[1][::30]
    assert {problem.accepted for problem in problems} == {(f" {problem.answer}",) for problem in problems}
    table = evaluation.evaluate(policy, problems, config, None, None)
    assert len(policy.stop_ids) == 4
    for problem in problems:
        expected = 0.0
        for opening in [BLANK, " ", *[BLANK + "1"] * problem.answer.startswith("1")]:
            ids = policy.tokenizer.convert_tokens_to_ids([opening, *problem.answer[len(opening) - 1 :]])
            for stop in policy.stop_ids.tolist():
                with torch.no_grad():
                    expected += literal.logprobs_of(policy, problem.prompt, [*ids, stop]).exp().prod().item()
        assert table["success"][problem.id] == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert max(table["success"].values()) > 0


def test_what_a_tokenizer_leaves_open_is_sampled(ambiguous, tiny_config):
    """Ids without a text could stand anywhere; a text that stands for broken bytes is not one byte string."""
    policy = load_policy(Config(model=ambiguous, threads=1, device="cpu", dtype="float32"))
    unclear = [Problem("a", "1=", "\ufffd")]
    assert "U+FFFD" in no_exact_rates(policy, unclear, Config())
    with pytest.raises(ValueError, match="token 9 of the model has no text in its tokenizer"):
        Tokenizations(policy.tokenizer, 10, policy.stop_ids.tolist())
    policy.tokenizer.backend_tokenizer.decoder = decoders.Metaspace()
    assert no_exact_rates(policy, AMBIGUOUS, Config()).startswith("the tokenizer decodes by Metaspace")


@settings(deadline=None, max_examples=50)
@given(text=st.text(max_size=4), longest=st.integers(0, 6))
def test_tokenizations_are_those_whose_decoding_is_the_text(text, longest):
    """As many as counted, all different, each decoded to the text; the tokenizer's own is one of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("0", "0"), ("00", "0"), (BLANK, "0")]
    built = Tokenizer(models.BPE({t: i for i, t in enumerate([*alphabet, *map("".join, merges)])}, merges))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=built)
    every = Tokenizations(tokenizer, len(tokenizer), [])
    if "\ufffd" in text:
        return
    found = every.of(text, longest)
    assert len({tuple(ids) for ids in found}) == len(found) == every.count(text, longest)
    assert all(len(ids) <= longest and tokenizer.decode(ids) == text for ids in found)
    own = tokenizer.encode(text)
    assert (own in found) == (len(own) <= longest)


def test_sampled_rates_of_the_shipped_model_agree_with_the_exact_ones(embedded):
    """mean@8 and pass@8 per level lie within 4 standard errors of the exact ones, which are the literal sums."""
    config = Config(threads=1, device="cpu", seed=3)
    problems = cell_problems("test", {"easy": 10, "middle": 10, "hard": 10}, seed=5)
    rates = literal.evaluate(embedded, problems, config)
    prompts, accepted = literal.prompts(embedded, [x.prompt for x in problems]), [x.accepted for x in problems]
    p = success_probability(embedded, prompts, accepted, max_new_tokens=14, temperature=1.0, rows=64).numpy()
    for level in ("easy", "middle", "hard"):
        mine = np.array([x.level == level for x in problems])
        table = rates["by_level"][level]
        assert table["exact_mean@8"] == pytest.approx(p[mine].mean(), rel=1e-5)
        assert table["exact_pass@8"] == pytest.approx((1 - (1 - p[mine]) ** 8).mean(), rel=1e-5)
        solved = 1 - (1 - p[mine]) ** 8
        noise = (
            np.sqrt((p[mine] * (1 - p[mine]) / 8).sum()) / mine.sum(),
            np.sqrt((solved * (1 - solved)).sum()) / mine.sum(),
        )
        assert abs(table["mean@8"] - table["exact_mean@8"]) < 4 * noise[0] + 1e-3
        assert abs(table["pass@8"] - table["exact_pass@8"]) < 4 * noise[1] + 1e-3
    levels = [rates["by_level"][level]["exact_mean@8"] for level in ("easy", "middle", "hard")]
    assert levels == sorted(levels, reverse=True)
    problem = problems[-1]
    expected = 0.0
    for text in problem.accepted:
        ids = [*literal.token_ids(embedded, text), embedded.tokenizer.eos_token_id]
        expected += literal.logprobs_of(embedded, problem.prompt, ids).exp().prod().item()
    assert p[-1] == pytest.approx(expected, rel=1e-3)


def test_the_temperature_of_evaluation_is_its_own(embedded):
    """Neither `temperature` nor the policy's matters; a colder evaluation has other samples and other exact rates."""
    problems = cell_problems("test", {"middle": 5}, seed=5)
    build = {"threads": 1, "device": "cpu", "eval_samples": 2}
    first = literal.evaluate(embedded, problems, Config(**build))
    assert literal.evaluate(embedded, problems, Config(**build, temperature=0.3)) == first
    cold = literal.evaluate(embedded, problems, Config(**build, eval_temperature=0.3))
    assert cold["exact_mean@2"] != first["exact_mean@2"]
    assert cold["correct"] != first["correct"]
    nucleus = literal.evaluate(embedded, problems, Config(**build, eval_top_p=0.5))
    assert nucleus["mean@2"] != first["mean@2"]
    assert "exact_mean@2" not in nucleus


def test_draws_depend_on_the_seed_the_set_and_the_place_in_it(run_config, monkeypatch):
    """Later blocks of problems change nothing in earlier ones; seeds of runs, sets and blocks differ, below 2**63."""
    config = run_config(eval_samples=4)
    policy, problems = load_policy(config), load_problems(config)[1]
    monkeypatch.setattr(evaluation, "ROWS", 4 * 5)
    first, more = literal.score(policy, problems[:5], config), literal.score(policy, problems, config)
    assert np.array_equal(more.correct_P_N[:5], first.correct_P_N)
    assert not np.array_equal(more.correct_P_N, literal.score(policy, problems, config, "other").correct_P_N)
    seeds = {draw_seed(s, n, b) for s in (0, 1, 2**32 - 1) for n in ("", "math500", "aime24") for b in range(50)}
    assert len({seed % 2**32 for seed in seeds}) == len(seeds) == 450, "torch's CPU generator takes the low 32 bits"
    assert min(seeds) >= 0
    assert max(seeds) < 2**63


def test_a_grade_between_0_and_1_is_refused(run_config, monkeypatch):
    """It could not be counted."""
    monkeypatch.setitem(grading.GRADERS, "exact", lambda problem, text: 0.5)
    config = run_config()
    with pytest.raises(ValueError, match="grades must be 0 or 1"):
        literal.score(load_policy(config), load_problems(config)[1], config)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12])
def test_rates_are_given_at_the_powers_of_two_and_at_n(n):
    """pass@1 is mean@n; pass@n is whether any sample is right."""
    values = rate_values(n)
    ks = [k for k in range(1, n + 1) if k == n or k & (k - 1) == 0]
    assert list(values) == [f"mean@{n}", *(f"pass@{k}" for k in ks)]
    assert values["pass@1"] == pytest.approx(values[f"mean@{n}"])
    assert values[f"pass@{n}"] == pytest.approx((np.arange(n + 1) > 0).astype(float))


@pytest.mark.parametrize("power", [0.1, 1, 8])
def test_intervals_agree_with_scipy(power):
    """Its BCa of single problems, within .15 standard errors, on values skewed left, even and skewed right.

    The Monte-Carlo error of an end is about .03 standard errors; percentile ends of the skewed values are .3 off.
    """
    rates = np.random.default_rng(0).random(24) ** power
    theirs = stats.bootstrap((rates,), np.mean, n_resamples=20_000, rng=0)
    plain = stats.bootstrap((rates,), np.mean, n_resamples=20_000, rng=0, method="percentile").confidence_interval
    mine = np.array(bca_intervals(np.ones(24, dtype=int), rates[None], resamples=9999)[0])
    gaps = (mine - np.array(theirs.confidence_interval)) / theirs.standard_error
    assert abs(gaps).max() < 0.15
    if power != 1:
        assert abs(mine - np.array(plain)).max() / theirs.standard_error > 0.25


def test_a_tally_resamples_its_problems():
    """Counts of equal problems give the interval of the problems one by one, up to Monte-Carlo error and one step."""
    correct = np.random.default_rng(1).binomial(8, 0.2, 40)
    low, high = bca_intervals(np.bincount(correct, minlength=9), np.arange(9)[None] / 8, resamples=9999)[0]
    theirs = stats.bootstrap((correct / 8,), np.mean, n_resamples=20_000, rng=0).confidence_interval
    assert abs(np.array([low, high]) - theirs).max() <= 1 / 8 / 40 + 1e-12


def test_95_percent_intervals_cover_the_truth_95_percent_of_the_time():
    """60 problems with pass rates Beta(1/2, 3/2), 8 samples each: mean@8 and pass@8 of the population are known.

    Of 1,000 evaluations 92.5 to 97 % must cover; where the truth is 95 %, one seed in 500 would fail. In 2,000 others
    BCa covered 95.4 and 95.4 %, percentile intervals 94.5 and 94.8 %, missing on one side.
    """
    truth = {"mean@8": 0.25, "pass@8": 1 - beta(0.5, 9.5) / beta(0.5, 1.5)}
    rng = np.random.default_rng(0)
    values = np.array([rate_values(8)[name] for name in truth])
    below, above = np.zeros(2), np.zeros(2)
    for _ in range(1000):
        tally = np.bincount(rng.binomial(8, rng.beta(0.5, 1.5, 60)), minlength=9)
        low, high = np.array(bca_intervals(tally, values, resamples=999)).T
        below += high < list(truth.values())
        above += low > list(truth.values())
    assert (below + above >= 30).all()
    assert (below + above <= 75).all()


def test_the_same_tally_has_the_same_interval_and_no_problem_order():
    """Bootstrap draws are fixed; no interval where resampling could not learn of one."""
    rng = np.random.default_rng(3)
    correct = rng.random((40, 4)) < 0.3
    first = rates_of(scores_of(correct))
    assert first == rates_of(scores_of(correct))
    assert first == pytest.approx(rates_of(scores_of(correct[::-1])))
    sure = rates_of(scores_of(np.ones((40, 4))))
    assert sure["mean@4"] == 1
    assert sure["mean@4_se"] == 0
    assert sure["mean@4_low"] is None


def test_bins_by_the_same_samples_would_lie_and_bins_by_the_other_half_do_not():
    """2,000 problems of pass rate 1/2, 8 samples: nothing is hard. The naive bins invent a slope, the halves none."""
    correct = np.random.default_rng(0).random((2000, 8)) < 0.5
    scores = scores_of(correct)
    naive = _by_bin(scores, correct.mean(-1), 4)
    honest = by_own_pass_rate(scores)
    assert list(honest) == list(naive) == ["0–25 %", "25–50 %", "50–75 %", "75–100 %"]
    assert naive["0–25 %"]["mean@8"] < 0.15
    assert naive["75–100 %"]["mean@8"] > 0.75
    for part in honest.values():
        assert abs(part["mean@4"] - 0.5) < 4 * part["mean@4_se"]
    assert sum(part["problems"] for part in honest.values()) == 2000
    assert "pass@8" not in honest["0–25 %"]
    assert by_own_pass_rate(scores.part(samples=slice(0, 1))) == {}


def test_halves_use_every_sample_once():
    """By hand: of 3 samples the first chooses the bin, the other two are reported, with their lengths."""
    scores = scores_of([[1, 0, 0], [1, 1, 1], [0, 1, 0]])
    by_bin = by_own_pass_rate(scores)
    assert list(by_bin) == ["0–25 %", "75–100 %"]
    assert (by_bin["0–25 %"]["mean@2"], by_bin["0–25 %"]["pass@2"]) == (0.5, 1)
    assert (by_bin["75–100 %"]["mean@2"], by_bin["75–100 %"]["pass@2"]) == (0.5, 0.5)


def test_bins_of_given_pass_rates():
    """Equal bins, hardest first, the edge in the upper one, 1 in the last, empty ones left out."""
    scores = scores_of([[1, 0], [0, 0], [1, 1], [0, 1]])
    by_bin = _by_bin(scores, np.array([1.0, 0.0, 0.1, 0.95]), 10)
    assert [(name, part["problems"]) for name, part in by_bin.items()] == [
        ("0–10 %", 1),
        ("10–20 %", 1),
        ("90–100 %", 2),
    ]
    assert by_bin["10–20 %"]["mean@2"] == 1
    assert by_bin["90–100 %"]["mean@2"] == 0.5
    for bad in ([0.5] * 3, [0.5, 0.5, 0.5, 1.1], [0.5, 0.5, 0.5, np.nan]):
        with pytest.raises(ValueError, match=r"pass_rates_P must hold 4 numbers in \[0, 1\]"):
            _by_bin(scores, np.array(bad), 10)


def test_levels_stand_in_the_order_of_their_numbers_or_of_the_problems():
    """Level 10 after level 9; words as they come; no level is no part."""
    correct = np.eye(4)
    assert list(tabulate(scores_of(correct, ["Level 10", "Level 9", "", "Level 1"]))["by_level"]) == [
        "Level 1",
        "Level 9",
        "Level 10",
    ]
    assert list(tabulate(scores_of(correct, ["middle", "easy", "hard 1", "easy"]))["by_level"]) == [
        "middle",
        "easy",
        "hard 1",
    ]


def test_exact_evaluation_equals_the_exact_rates_of_a_sampled_one(embedded):
    """All, by level and by task; the other pass@k and the standard errors by hand; nothing is sampled or graded."""
    problems = cell_problems("test", {"easy": 1, "middle": 1, "hard": 2}, seed=8)
    config = Config(threads=1, device="cpu", eval_samples=4)
    sampled = literal.evaluate(embedded, problems, config)
    table = evaluation.evaluate(embedded, problems, replace(config, eval_exact=True), None, None)
    assert list(table["success"]) == [problem.id for problem in problems]
    p = np.array([*table["success"].values()])
    for kind, level in [("", ""), *(("by_level", x) for x in sampled["by_level"]), ("by_task", problems[0].task)]:
        one, other = ((x[kind][level] if kind else x) for x in (table, sampled))
        assert one["problems"] == other["problems"]
        for rate in ("mean@4", "pass@4"):
            assert one[rate] == pytest.approx(other[f"exact_{rate}"], rel=1e-12)
        rows = [i for i, x in enumerate(problems) if not kind or level in (x.level, x.task)]
        for k in (1, 2, 4):
            passed = [1 - (1 - p[i]) ** k for i in rows]
            assert one[f"pass@{k}"] == pytest.approx(np.mean(passed))
            if len(rows) > 1:
                assert one[f"pass@{k}_se"] == pytest.approx(np.std(passed, ddof=1) / np.sqrt(len(rows)))
    assert table["by_level"].keys() == sampled["by_level"].keys()
    assert table["by_task"].keys() == sampled["by_task"].keys()
    assert table["by_task"][problems[0].task]["mean@4_se"] is None, "one problem has no standard error"
