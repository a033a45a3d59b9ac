"""mean@n and unbiased pass@k on held-out problems: in all, by level, by task and by difficulty bin, with intervals.

A problem's result is its number c of correct samples among n, so every rate is the mean over problems of a function of
c: mean@n of c / n, pass@k of 1 - C(n - c, k) / C(n, k). Standard errors and intervals are over problems, the sampled
answers included: what another draw of as many problems like these would give.

A success probability p needs no samples: mean@n is the mean of p, pass@k that of 1 - (1 - p)^k, which is what sampling
estimates. It is known where the correct completions can be listed (`no_exact_rates`), by teacher forcing of each.

Draws depend on the seed, the name of the set, and the place of a problem in it; never on other sets, nor on problems
that come later. This assumes of the sampler that the draws of a row depend on the seed of the call, the row's number
and its prompt (the transformers sampler also needs the same `sample_rows`).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gdro_core import pass_at_k
from gdro_llm.config import Config, UsageError
from gdro_llm.engine.policy import Policy, success_probability, tokenizations
from gdro_llm.engine.rollouts import Decoding
from gdro_llm.engine.sampler import Sampler
from gdro_llm.engine.workers import SINGLE_PROCESS, Workers, whole_weights
from gdro_llm.intervals import bca_intervals
from gdro_llm.problems.problem import Problem
from gdro_llm.problems.prompting import prompt_tokens
from gdro_llm.problems.rewards import Grader

Floats = NDArray[np.float64]

ROWS = 2048  # completions in one call of the sampler: bounds memory, and the bar moves
RESAMPLES = 9999
OWN_BINS = 4
FEW = 32  # correct token sequences of a problem, on average, up to which its success probability is computed


@dataclass(frozen=True)
class Scores:
    """The outcome of N samples of each of P problems."""

    problems: tuple[Problem, ...]
    correct_P_N: NDArray[np.bool_]
    length_P_N: NDArray[np.int64]  # [tokens], the stop token included
    truncated_P_N: NDArray[np.bool_]
    exact_P: Floats | None  # success probabilities, where `has_exact_rates`

    def part(self, rows: Any = slice(None), samples: Any = slice(None)) -> Scores:
        """Some of the problems, some of the samples."""
        exact = None if self.exact_P is None else self.exact_P[rows]
        problems = tuple(self.problems[i] for i in np.arange(len(self.problems))[rows])
        tables = (self.correct_P_N, self.length_P_N, self.truncated_P_N)
        correct, length, truncated = (table[rows][:, samples] for table in tables)
        return Scores(problems, correct, length, truncated, exact)

    @property
    def correct_P(self) -> NDArray[np.int64]:
        """Correct samples of each problem."""
        return self.correct_P_N.sum(-1)


def evaluate(
    policy: Policy,
    problems: Sequence[Problem],
    config: Config,
    sampler: Sampler,
    grader: Grader,
    workers: Workers = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Sample `eval_samples` completions a problem as `config` wants them for evaluation, and `tabulate` the correct.

    With `eval_exact`, and where it is unset and success probabilities are known, nothing is sampled: rates are computed
    from these, see `tabulate_exact`.
    """
    exact = has_exact_rates(policy, problems, config) if config.eval_exact is None else config.eval_exact
    if exact:
        return tabulate_exact(problems, exact_rates(policy, problems, config, workers), config.eval_samples)
    return tabulate(score(policy, problems, config, sampler, grader, workers))


def score(
    policy: Policy,
    problems: Sequence[Problem],
    config: Config,
    sampler: Sampler,
    grader: Grader,
    workers: Workers = SINGLE_PROCESS,
    name: str = "",
) -> Scores:
    """Sample and grade `eval_samples` completions a problem; `name` is that of the set, for its seeds and the bar.

    All processes call it and get the same result; each samples and grades the problems assigned to it.

    Exact success probabilities are added where `has_exact_rates`.
    """
    samples, size = config.eval_samples, len(problems)
    decoding = Decoding(config.max_new_tokens, config.eval_temperature, config.eval_top_p, config.eval_top_k)
    prompts = [prompt_tokens(policy.tokenizer, problem, config) for problem in problems]
    answers: list[tuple[float, int, bool]] = []
    per_block = max(1, ROWS // samples)
    hidden = True if workers.rank else None  # None: shown on a terminal
    bar = tqdm(total=size * samples, desc=f"evaluate {name}".strip(), unit="answer", leave=False, disable=hidden)
    for block, start in enumerate(range(0, size, per_block)):
        asked = prompts[start : start + per_block]
        counts = np.full(len(asked), samples)
        mine = workers.assign(counts)
        rollouts = sampler.sample(asked, counts, decoding, seed=draw_seed(config.seed, name, block), rows=mine)
        owners = [problems[start + p] for p in rollouts.owner_R.tolist()]
        columns = grader.grade(owners, rollouts.texts), rollouts.mask_R_T.sum(-1), rollouts.truncated_R
        answers += workers.collect(mine, zip(*(column.tolist() for column in columns), strict=True), counts.sum())
        bar.update(int(counts.sum()))
    bar.close()
    rewards, length, truncated = (np.array(column).reshape(size, samples) for column in zip(*answers, strict=True))
    if not np.isin(rewards, (0, 1)).all():
        raise ValueError(f"grades must be 0 or 1 to be counted, got {rewards}")
    exact = exact_rates(policy, problems, config, workers) if has_exact_rates(policy, problems, config) else None
    return Scores(tuple(problems), rewards == 1, length, truncated, exact)


def no_exact_rates(policy: Policy, problems: Sequence[Problem], config: Config) -> str:
    """Why success probabilities of these problems cannot be computed; "" where they can.

    They can where a sampled completion is correct if and only if its tokens are one of few known sequences.
    """
    if config.grader != "exact":
        return f"grader {config.grader!r} takes more completions for correct than a list can hold; exact does not"
    if config.eval_top_p < 1 or config.eval_top_k:
        return "eval_top_p and eval_top_k must leave the whole distribution"
    try:
        every = tokenizations(policy)
        counts = [every.count(text, config.max_new_tokens) for problem in problems for text in problem.correct]
    except ValueError as error:
        return str(error)
    mean = sum(counts) / len(problems)
    return f"a problem has {mean:.4g} correct token sequences on average, more than {FEW}" if mean > FEW else ""


def has_exact_rates(policy: Policy, problems: Sequence[Problem], config: Config) -> bool:
    """Whether success probabilities can be computed, see `no_exact_rates`."""
    return not no_exact_rates(policy, problems, config)


def exact_rates(
    policy: Policy, problems: Sequence[Problem], config: Config, workers: Workers = SINGLE_PROCESS
) -> Floats:
    """(P,) chances that a completion sampled for evaluation is graded correct.

    Each process computes those of its problems, and all get the same.

    Raises:
        UsageError: they cannot be computed, see `no_exact_rates`, or the model's logits are not finite.
    """
    if reason := no_exact_rates(policy, problems, config):
        raise UsageError(f"success probabilities are unknown: {reason}")
    mine = workers.assign(np.ones(len(problems), int))
    prompts = [prompt_tokens(policy.tokenizer, problems[i], config) for i in mine]
    with whole_weights(policy.scorer):
        p = success_probability(
            policy,
            prompts,
            [problems[i].correct for i in mine],
            max_new_tokens=config.max_new_tokens,
            temperature=config.eval_temperature,
            rows=config.sample_rows,
        )
    p_P = np.array(workers.collect(mine, p.tolist(), len(problems)))
    if not np.isfinite(p_P).all():
        raise UsageError("the model's logits are not finite; go back to an earlier checkpoint and lower learning_rate")
    return np.minimum(p_P, 1.0)  # a sum of roundings


def tabulate_exact(problems: Sequence[Problem], p_P: Floats, n: int) -> dict[str, Any]:
    """As `tabulate`, of success probabilities p: mean@n is their mean, pass@k that of 1 - (1 - p)^k.

    `success` has p of every problem by id; standard errors are over problems.
    """

    def of_rows(rows: NDArray[np.int64]) -> dict[str, Any]:
        p, size = p_P[rows], len(rows)
        rates: dict[str, Any] = {"problems": size}
        for name in rate_values(n):
            kind, _, k = name.partition("@")
            values = p if kind == "mean" else 1.0 - (1.0 - p) ** int(k)
            rates[name] = float(values.mean())
            rates[f"{name}_se"] = float(values.std(ddof=1) / np.sqrt(size)) if size > 1 else None
        return rates

    return {
        **of_rows(np.arange(len(problems))),
        "by_level": _parts([problem.level for problem in problems], of_rows),
        "by_task": _parts([problem.task for problem in problems], of_rows),
        "success": {problem.id: float(p) for problem, p in zip(problems, p_P, strict=True)},
    }


def draw_seed(seed: int, name: str, block: int) -> int:
    """Seed of a block of a set's draws, the same in every run, at every step; hashed: some generators use 32 bits."""
    key = (zlib.crc32(name.encode()), block)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0] >> 1)


def tabulate(scores: Scores) -> dict[str, Any]:
    """`rates_of` all problems, by_level and by_task the same for each part; correct.

    `correct` has the successes of every problem by id, so that two evaluations can be compared problem by problem.
    """
    return {
        **rates_of(scores),
        "by_level": _parts([problem.level for problem in scores.problems], lambda rows: rates_of(scores.part(rows))),
        "by_task": _parts([problem.task for problem in scores.problems], lambda rows: rates_of(scores.part(rows))),
        "correct": {p.id: int(c) for p, c in zip(scores.problems, scores.correct_P, strict=True)},
    }


def rates_of(scores: Scores) -> dict[str, Any]:
    """The rates of some problems.

    Returns:
        problems; mean@n and pass@k for k = 1, 2, 4, ... below n, and n, each with _se (standard error over problems;
        None for one problem) and _low, _high (95 % bootstrap interval; None where all problems have the same value, of
        which resampling learns nothing); exact_mean@n, exact_pass@n where known; completion_length [tokens] and
        truncated_share.
    """
    size, n = scores.correct_P_N.shape
    values = rate_values(n)
    tally = np.bincount(scores.correct_P, minlength=n + 1)
    intervals = bca_intervals(tally, np.array([*values.values()]), resamples=RESAMPLES)
    rates: dict[str, Any] = {"problems": size}
    for (name, of_c), (low, high) in zip(values.items(), intervals, strict=True):
        rate_P = of_c[scores.correct_P]
        rates[name] = float(rate_P.mean())
        rates[f"{name}_se"] = float(rate_P.std(ddof=1) / np.sqrt(size)) if size > 1 else None
        rates |= {f"{name}_low": low, f"{name}_high": high}
    if (p := scores.exact_P) is not None:
        rates |= {f"exact_mean@{n}": float(p.mean()), f"exact_pass@{n}": float((1.0 - (1.0 - p) ** n).mean())}
    rates["completion_length"] = float(scores.length_P_N.mean())
    rates["truncated_share"] = float(scores.truncated_P_N.mean())
    return rates


def rate_values(n: int) -> dict[str, Floats]:
    """mean@n and every pass@k as functions of the number of correct samples: (n + 1,), at 0, 1, ..., n."""
    correct = np.arange(n + 1)
    ks = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
    return {f"mean@{n}": correct / n, **{f"pass@{k}": pass_at_k(correct, n, k) for k in ks}}


def by_own_pass_rate(scores: Scores) -> dict[str, Any]:
    """By difficulty bin, difficulty known from these samples only: one half chooses the bin, the other reports.

    With the same samples for both, chance alone would make the lowest bin look hard and the highest easy. The first
    n // 2 samples of a problem choose among `OWN_BINS` bins of the pass rate; rates are of the other half. Empty for
    one sample.
    """
    half = scores.correct_P_N.shape[1] // 2
    if half == 0:
        return {}
    chosen = scores.part(samples=slice(0, half))
    return _by_bin(scores.part(samples=slice(half, None)), chosen.correct_P / half, OWN_BINS)


def _by_bin(scores: Scores, pass_rates_P: Floats, num_bins: int) -> dict[str, Any]:
    """Equal bins of the pass rate, the hardest first; empty ones are left out."""
    rates = np.asarray(pass_rates_P, dtype=np.float64)
    if rates.shape != (len(scores.problems),) or not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError(f"pass_rates_P must hold {len(scores.problems)} numbers in [0, 1], got {pass_rates_P!r}")
    bins = np.minimum((rates * num_bins).astype(int), num_bins - 1)
    return {
        f"{100 * b / num_bins:.3g}–{100 * (b + 1) / num_bins:.3g} %": rates_of(scores.part(bins == b))
        for b in np.unique(bins).tolist()
    }


def _parts(names: list[str], table_of: Callable[[NDArray[np.int64]], dict[str, Any]]) -> dict[str, Any]:
    """A table of each name's rows, in the order of the problems or of the numbers all names end with; "" is no name."""
    order = [name for name in dict.fromkeys(names) if name]
    numbers = [re.search(r"\d+$", name) for name in order]
    if all(numbers):
        order.sort(key=lambda name: int(re.search(r"\d+$", name)[0]))  # type: ignore[index]
    return {name: table_of(np.flatnonzero(np.array(names) == name)) for name in order}
