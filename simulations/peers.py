"""Published ways to spend rollouts, each a small `gdro_core.Planner`.

Rules are short readings of the papers: whatever a paper knows of a prompt's pass rate (embeddings, a smaller model) is
replaced by the controller's own Beta posterior, and counts lie in 2..24 where a paper has another range. "Departs:"
marks what else is not the paper's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import binom, entr, psi
from scipy.stats import beta

from gdro_core import (
    HIT,
    Adversary,
    ChiSquare,
    CVaR,
    Entropic,
    GDROController,
    Observation,
    OnlineDifficultyClassifier,
    Plan,
    Planner,
    PromptGDRO,
    PublishedController,
    RolloutGDRO,
    greedy_allocation,
    mixed_group_probability,
    nearest_to_half,
    sqrt_allocation,
)
from simulations.population import Floats, Ints, Population
from simulations.race import Groups

LOW, HIGH = 2, 24  # rollouts of a prompt


class Uniform:
    """GRPO: n_i = n_bar. Every other peer starts from this one.

    Args:
        population: read for ids, and by those that say so for groups or true pass rates.
        mean_rollouts: n_bar.
        rng: of the peer's own draws (`race.own_stream`).
    """

    fills_batches = False  # whether only mixed groups are trained on, collected until a batch is full

    def __init__(self, population: Population, mean_rollouts: int, rng: np.random.Generator) -> None:
        self.population, self.mean, self.rng = population, mean_rollouts, rng
        self.memory, self.step = OnlineDifficultyClassifier(), 0

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """Which prompts, how many rollouts, which weights."""
        chosen = self.chosen(np.asarray(ids, dtype=np.int64))
        bins = self.memory.bins(chosen)
        return Plan(tuple(chosen.tolist()), bins, self.weights(chosen), self.counts(chosen), 0.0, self.step)

    def chosen(self, ids: Ints) -> Ints:
        """The prompts to train on, for the (N,) drawn ones."""
        return ids

    def pool(self, ids: Ints) -> Ints:
        """The drawn batch and as many other prompts as make 4 N."""
        others = self.rng.permutation(np.setdiff1d(self.population.ids, ids))
        return np.concatenate([ids, others])[: 4 * ids.size]

    def counts(self, ids: Ints) -> Ints:
        """(N,) rollouts."""
        return np.full(ids.size, self.mean)

    def weights(self, ids: Ints) -> Floats:
        """(N,) weights of mean 1."""
        return np.ones(ids.size)

    def more(self, groups: Groups, done: int) -> Ints | None:
        """(N,) further rollouts after `done` rounds, or None."""
        return None

    def keep(self, groups: Groups) -> Groups:
        """What is trained on."""
        return groups

    def observe(self, plan: Plan, rewards: ArrayLike | Observation) -> dict[str, Any]:
        """Learn from all rollouts of the plan."""
        observation = Observation.of_plan(plan, rewards)
        ids = np.asarray(plan.ids, dtype=np.int64)
        self.memory.observe(ids, observation.correct, observation.trials)
        self.learn(ids, observation)
        self.step += 1
        return {}

    def learn(self, ids: Ints, observation: Observation) -> None:
        """What a peer remembers besides the posteriors."""


class Greedy(Uniform):
    """max sum_i U_i(n_i) under the exact budget, for the utility of a subclass; n_bar for prompts never seen."""

    def utility(self, a: Floats, b: Floats) -> Floats:
        """(N, A) concave utilities of LOW..HIGH rollouts, for posteriors Beta(a, b)."""
        raise NotImplementedError

    def counts(self, ids: Ints) -> Ints:
        """(N,) rollouts by marginal gain."""
        a, b = self.memory.posterior(ids)
        seen, counts = self.memory.bins(ids) >= 0, np.full(ids.size, self.mean)
        if seen.any():
            budget = self.mean * int(seen.sum())
            counts[seen] = greedy_allocation(self.utility(a[seen], b[seen]), budget, min_rollouts=LOW, rng=self.rng)
        return counts


ARMS = np.arange(LOW, HIGH + 1)


class NeymanPlugIn(Greedy):
    """n ∝ √(p (1 - p)) (Theorem 4.2) with p the posterior mean."""

    def utility(self, a: Floats, b: Floats) -> Floats:
        """-p (1 - p) / n."""
        p = a / (a + b)
        return np.asarray(-(p * (1 - p))[:, None] / ARMS)


class NeymanOracle(Uniform):
    """n ∝ √(p (1 - p)) with the true pass rates: what no method can know."""

    def counts(self, ids: Ints) -> Ints:
        """(N,) whole counts that minimise sum p (1 - p) / n."""
        p = self.population.pass_rate[ids]
        utility = -(p * (1 - p))[:, None] / ARMS
        return greedy_allocation(utility, self.mean * ids.size, min_rollouts=LOW, rng=self.rng)


class VIP(Uniform):
    """VIP (arXiv 2602.01601): min sum 4 p (1 - p) / (n - 1), n_i = clip(1 + (C - N) √a_i / sum √a_j), a = p (1 - p).

    Departs: p by the posterior, not by a Gaussian process over embeddings; clipped counts share what the clip leaves
    over, and whole counts are by largest remainder.
    """

    def counts(self, ids: Ints) -> Ints:
        """(N,) rollouts."""
        a, b = self.memory.posterior(ids)
        real = 1 + sqrt_allocation(a * b / (a + b) ** 2, self.mean - 1, lower=LOW - 1, upper=HIGH - 1)
        return _rounded(real, self.mean * ids.size)


class Knapsack(Greedy):
    """Knapsack RL (2509.25849): max sum (1 - pⁿ - (1 - p)ⁿ) p (1 - p)²."""

    def utility(self, a: Floats, b: Floats) -> Floats:
        """Chance of a mixed group times its value."""
        p = a / (a + b)
        return np.asarray(mixed_group_probability(ARMS, p[:, None]) * (p * (1 - p) ** 2)[:, None])


class CoBA(Greedy):
    """CoBA-RL (2602.03048): (1 - e^{-n p (1 - p) / tau}) BetaPDF(p; alpha, 7 - alpha), greedy.

    alpha grows with the global failure rate F, so that easy prompts come first and hard ones later. Departs: the map is
    taken as alpha = 1 + 5 F, tau as 1.
    """

    failure = 0.5

    def utility(self, a: Floats, b: Floats) -> Floats:
        """Saturating gain times the value of the difficulty."""
        p, alpha = a / (a + b), 1 + 5 * self.failure
        return np.asarray(-np.expm1(-ARMS * (p * (1 - p))[:, None]) * beta.pdf(p, alpha, 7 - alpha)[:, None])

    def learn(self, ids: Ints, observation: Observation) -> None:
        """The failure rate is that of the last batch."""
        self.failure = 1.0 - float(observation.correct.sum() / observation.trials.sum())


class HORA(Greedy):
    """HORA (2605.07114): max sum P(a hit among n more) = 1 - prod_{j<n} (b + j) / (a + b + j), greedy."""

    def utility(self, a: Floats, b: Floats) -> Floats:
        """Posterior chance of a hit."""
        return HIT.of(a, b, ARMS)


class ReinforceAda(Uniform):
    """Reinforce-Ada, balanced (2510.04996): rounds of n_bar until half of k = n_bar right and half wrong; at most 4.

    Kept are k rollouts, half of either outcome where there are enough. Departs: the baseline is that of the kept group.
    """

    def more(self, groups: Groups, done: int) -> Ints | None:
        """A further round for prompts that lack either outcome."""
        half = self.mean / 2
        open_ = (groups.successes < half) | (groups.counts - groups.successes < half)
        return np.where(open_, self.mean, 0) if done < 4 and open_.any() else None

    def keep(self, groups: Groups) -> Groups:
        """At most k a prompt, the rarer outcome first up to a half."""
        right = np.minimum(groups.successes, np.maximum(self.mean / 2, self.mean - (groups.counts - groups.successes)))
        room = np.where(groups.rewards[:, None] == [1.0, 0.0], 1, 0).cumsum(axis=0)  # rank of a rollout among its kind
        start = np.concatenate([np.zeros((1, 2), dtype=int), room])[np.cumsum(groups.counts) - groups.counts]
        rank = (room - start[groups.owner])[np.arange(groups.rewards.size), (groups.rewards == 0).astype(int)]
        limit = np.where(groups.rewards == 1, right[groups.owner], (self.mean - right)[groups.owner])
        return groups.thinned(rank <= limit)


class DAPO(Uniform):
    """DAPO dynamic sampling (2503.14476): draw batches until N groups have mixed rewards; the surplus is dropped."""

    fills_batches = True

    def keep(self, groups: Groups) -> Groups:
        """Mixed groups."""
        return groups.of(groups.mixed)


class GRESO(DAPO):
    """GRESO (2506.02177): skip a prompt with probability 1 - max(p_s^streak, .01), streak of zero-variance groups.

    What is left fills batches as in DAPO. Departs: p_s = 0.5 throughout, where the paper steers it to a target share.
    """

    def __init__(self, population: Population, mean_rollouts: int, rng: np.random.Generator) -> None:
        super().__init__(population, mean_rollouts, rng)
        self.streak = np.zeros(population.prompts, dtype=np.int64)

    def chosen(self, ids: Ints) -> Ints:
        """The prompts that are not skipped; one at least."""
        chance = np.maximum(0.5 ** self.streak[ids], 0.01)
        draws = self.rng.random(ids.size)
        kept = draws < chance
        kept[np.argmin(draws / chance)] = True
        return np.asarray(ids[kept])

    def learn(self, ids: Ints, observation: Observation) -> None:
        """Streaks end with a mixed group."""
        mean = observation.correct / observation.trials
        self.streak[ids] = np.where((mean > 0) & (mean < 1), 0, self.streak[ids] + 1)


class MoPPS(Uniform):
    """MoPPS (2507.04632): of 4 N candidates the N that `nearest_to_half` draws."""

    def chosen(self, ids: Ints) -> Ints:
        """N of 4 N."""
        candidates = self.pool(ids)
        return np.asarray(candidates[nearest_to_half(*self.memory.posterior(candidates), ids.size, self.rng)])


class FrontierLearning(Uniform):
    """Frontier Learning (2609.35426): prompts drawn in proportion to E[regret of a group] = pass@n - pass@1.

    The regret of s hits in n is 1[s >= 1] - s / n. Departs: a reading of the idea only; its expectation is taken under
    the posterior, and N prompts are drawn without replacement from MoPPS's candidates.
    """

    def chosen(self, ids: Ints) -> Ints:
        """N of 4 N by the scores."""
        candidates = self.pool(ids)
        score = np.log(self.score(*self.memory.posterior(candidates))) + self.rng.gumbel(size=candidates.size)
        return np.asarray(candidates[np.argsort(-score, kind="stable")[: ids.size]])

    def score(self, a: Floats, b: Floats) -> Floats:
        """(C,) expected regret, above 0."""
        return np.asarray(HIT.of(a, b, np.array([self.mean]))[:, 0] - a / (a + b))


class InSight(Uniform):
    """InSight (2603.01907): the N prompts of greatest weighted information of n_bar rollouts about p.

    w(m) n [h(m) - E h(p)], h the entropy of a rollout, m = E p. Departs: a reading of the idea only; w = m (1 - m), and
    information is that of one rollout times n_bar.
    """

    def chosen(self, ids: Ints) -> Ints:
        """N of 4 N, the first among equals."""
        candidates = self.pool(ids)
        return np.asarray(
            candidates[np.argsort(-self.score(*self.memory.posterior(candidates)), kind="stable")[: ids.size]]
        )

    def score(self, a: Floats, b: Floats) -> Floats:
        """(C,) weighted information [nat]."""
        m, s = a / (a + b), a + b
        known = -m * (psi(a + 1) - psi(s + 1)) - (1 - m) * (psi(b + 1) - psi(s + 1))
        return np.asarray(self.mean * m * (1 - m) * (entr(m) + entr(1 - m) - known))


class FGRPO(Uniform):
    """F-GRPO (2602.06717): advantages times (1 - hits / n)^gamma. Departs: gamma = 1 everywhere."""

    def keep(self, groups: Groups) -> Groups:
        """All, weighted."""
        return replace(groups, weights=groups.weights * (1 - groups.successes / groups.counts))


class BBG(Uniform):
    """BBG (2606.15455): a rollout counts by its marginal contribution to pass@k.

    A hit adds to pass@k where the k - 1 others miss: (n - s choose k - 1) / (n - 1 choose k - 1). Departs: a reading of
    the idea only; the factor weights the group, and k is three quarters of n_bar.
    """

    def keep(self, groups: Groups) -> Groups:
        """All, weighted."""
        others, missed = groups.counts - 1, groups.counts - groups.successes
        k = 3 * self.mean // 4
        return replace(groups, weights=groups.weights * binom(missed, k - 1) / binom(others, k - 1))


class GroupWeights(Uniform):
    """Weights q_g / p_g of known groups (the difficulty at the start), mean 1 over the batch; a subclass moves q."""

    def __init__(self, population: Population, mean_rollouts: int, rng: np.random.Generator) -> None:
        super().__init__(population, mean_rollouts, rng)
        self.size = np.bincount(population.group)
        self.q = self.size / self.size.sum()

    def weights(self, ids: Ints) -> Floats:
        """(N,)."""
        raw = (self.q / np.maximum(self.size / self.size.sum(), 1e-12))[self.population.group[ids]]
        return np.asarray(raw / raw.mean())

    def group_losses(self, ids: Ints, observation: Observation) -> tuple[Floats, np.ndarray]:
        """(G,) 1 - mean reward, and which groups are in the batch."""
        group = self.population.group[ids]
        size = np.bincount(group, observation.trials, minlength=self.q.size)
        return 1 - np.bincount(group, observation.correct, minlength=self.q.size) / np.maximum(size, 1), size > 0


class Sagawa(GroupWeights):
    """Group DRO (1911.08731): q_g <- q_g exp(eta (loss_g + C / √n_g)), n_g training prompts; eta = .05, C = 1."""

    def learn(self, ids: Ints, observation: Observation) -> None:
        """One step up."""
        loss, present = self.group_losses(ids, observation)
        q = self.q * np.exp(np.where(present, 0.05 * (loss + 1.0 / np.sqrt(np.maximum(self.size, 1))), 0.0))
        self.q = q / q.sum()


class MTGRPO(GroupWeights):
    """MT-GRPO (2602.05547): weights move to the worst tasks, less so to tasks that improve.

        q_g <- q_g exp(eta (loss_g - lambda max(improvement_g, 0)))

    Departs: a reading of the idea only, with eta .05, lambda 1 and improvement against an average over about 10 steps.
    """

    def __init__(self, population: Population, mean_rollouts: int, rng: np.random.Generator) -> None:
        super().__init__(population, mean_rollouts, rng)
        self.past = np.full(self.q.size, np.nan)

    def learn(self, ids: Ints, observation: Observation) -> None:
        """One step up."""
        loss, present = self.group_losses(ids, observation)
        self.past = np.where(np.isnan(self.past), loss, self.past)
        gain = np.maximum(self.past - loss, 0.0)
        q = self.q * np.exp(np.where(present, 0.05 * (loss - gain), 0.0))
        self.q, self.past = q / q.sum(), np.where(present, 0.9 * self.past + 0.1 * loss, self.past)


class SEC(Uniform):
    """SEC (2505.14970): categories by softmax(Q / tau), Q_c <- (1 - beta) Q_c + beta mean |A|; tau .4, beta .5.

    Categories are the difficulty at the start; |A| is that of std-normalised GRPO, 2 √(m (1 - m)) a group on average.
    """

    def __init__(self, population: Population, mean_rollouts: int, rng: np.random.Generator) -> None:
        super().__init__(population, mean_rollouts, rng)
        self.members = [np.flatnonzero(population.group == g) for g in np.unique(population.group)]
        self.category = np.searchsorted(np.unique(population.group), population.group)
        self.value = np.zeros(len(self.members))

    def preference(self) -> Floats:
        """(C,) logits of the categories."""
        return self.value / 0.4

    def chosen(self, ids: Ints) -> Ints:
        """N distinct prompts: a category each by softmax, then a prompt of it."""
        logits = self.preference()
        law = np.exp(logits - logits.max())
        size = np.array([m.size for m in self.members])
        wanted = np.minimum(self.rng.multinomial(ids.size, law / law.sum()), size)
        while (left := ids.size - int(wanted.sum())) > 0:  # categories that ran out: the others share what is left
            room = np.where(wanted < size, law, 0.0)
            wanted = np.minimum(wanted + self.rng.multinomial(left, room / room.sum()), size)
        pairs = zip(self.members, wanted, strict=True)
        return np.concatenate([self.rng.choice(m, k, replace=False) for m, k in pairs])

    def learn(self, ids: Ints, observation: Observation) -> None:
        """Advantages seen, per category."""
        mean = observation.correct / observation.trials
        seen = 2 * np.sqrt(mean * (1 - mean))
        for c in np.unique(self.category[ids]):
            self.credit(int(c), seen[self.category[ids] == c])

    def credit(self, c: int, advantages: Floats) -> None:
        """Mean |A| of the prompts of category c."""
        self.value[c] += 0.5 * (advantages.mean() - self.value[c])


class DUMP(SEC):
    """DUMP (2504.09710): categories by softmax(UCB / .1), UCB_c = mean |A| of the last 300 + √(2 ln(n+1) / (n_c+1))."""

    def __init__(self, population: Population, mean_rollouts: int, rng: np.random.Generator) -> None:
        super().__init__(population, mean_rollouts, rng)
        self.window: list[deque[float]] = [deque(maxlen=300) for _ in self.members]
        self.visits = np.zeros(len(self.members))

    def preference(self) -> Floats:
        """(C,) logits; tau = 0.1."""
        mean = np.array([np.mean(seen) if seen else 0.0 for seen in self.window])
        return np.asarray((mean + np.sqrt(2 * np.log(self.visits.sum() + 1) / (self.visits + 1))) / 0.1)

    def credit(self, c: int, advantages: Floats) -> None:
        """A window per category."""
        self.window[c].extend(advantages.tolist())
        self.visits[c] += advantages.size


class VIGOR(Uniform):
    """VIGOR (2607.22002): m0 rollouts each, then rounds with the top-variance fraction alpha, × gamma = 1 / alpha.

    Here m0 = n_bar / 2 and one round with alpha = 1/2, gamma = 2, so that the budget is met exactly for even N. Groups
    are ranked by (c + 1/2)(n - c + 1/2); ties go to the first.
    """

    def counts(self, ids: Ints) -> Ints:
        """The first round."""
        return np.full(ids.size, self.mean // 2)

    def more(self, groups: Groups, done: int) -> Ints | None:
        """As many again in all, for the half of greatest variance."""
        if done > 1:
            return None
        c, n = groups.successes, groups.counts
        best = np.argsort(-(c + 0.5) * (n - c + 0.5), kind="stable")[: c.size // 2]
        return np.where(np.isin(np.arange(c.size), best), 2 * (self.mean // 2), 0)


class AR3PO(Uniform):
    """AR3PO's adaptive rollout (2509.25808): rounds of n_bar / 2, at most 4, until the first right answer.

    Departs: no reuse of earlier right answers.
    """

    def counts(self, ids: Ints) -> Ints:
        """The first round."""
        return np.full(ids.size, self.mean // 2)

    def more(self, groups: Groups, done: int) -> Ints | None:
        """A further round for prompts that were not solved yet."""
        unsolved = groups.successes == 0
        return np.where(unsolved, self.mean // 2, 0) if done < 4 and unsolved.any() else None


class PilotCommit(Uniform):
    """Pilot-Commit (2605.26606): n_bar / 2 rollouts each, then the rest for prompts with both outcomes alone.

    Departs: a reading of the idea only; those prompts share equally, up to 3 n_bar each, and are trained on.
    """

    def counts(self, ids: Ints) -> Ints:
        """The pilot."""
        return np.full(ids.size, self.mean // 2)

    def more(self, groups: Groups, done: int) -> Ints | None:
        """The rest of the budget, in equal shares."""
        open_ = np.flatnonzero(groups.mixed)
        if done > 1 or not open_.size:
            return None
        rest = min((self.mean - self.mean // 2) * groups.rows.size, (3 * self.mean - self.mean // 2) * open_.size)
        extra = np.zeros(groups.rows.size, dtype=np.int64)
        extra[open_] = rest // open_.size
        extra[open_[: rest % open_.size]] += 1
        return extra

    def keep(self, groups: Groups) -> Groups:
        """Mixed groups."""
        return groups.of(groups.mixed)


BINS = 10
Build = Callable[[Population, int, np.random.Generator], Planner]


def _core(
    adversary: Adversary | None = None, *, rollout: bool = False, permute: bool = False, preserve: bool = False
) -> Build:
    """A controller of gdro_core; its own seed decides ties only."""

    def build(population: Population, mean: int, rng: np.random.Generator) -> Planner:
        return GDROController(
            OnlineDifficultyClassifier(),
            None if adversary is None else PromptGDRO(BINS, adversary=adversary),
            RolloutGDRO(mean, LOW, HIGH, permute=permute) if rollout else None,
            mean_rollouts=None if rollout else mean,
            preserve_objective=preserve,
        )

    return build


def _published(prompt: bool) -> Build:
    return lambda population, mean, rng: PublishedController(mean, LOW, HIGH, prompt=prompt, rollout=not prompt)


PEERS: dict[str, Build] = {
    "uniform": Uniform,
    "zero-information null": _core(rollout=True, permute=True),
    "Neyman oracle": NeymanOracle,
    "Neyman plug-in": NeymanPlugIn,
    "VIP": VIP,
    "Knapsack RL": Knapsack,
    "CoBA-RL": CoBA,
    "HORA": HORA,
    "Reinforce-Ada": ReinforceAda,
    "GRESO": GRESO,
    "MoPPS": MoPPS,
    "DAPO refill": DAPO,
    "Frontier Learning": FrontierLearning,
    "InSight": InSight,
    "F-GRPO": FGRPO,
    "BBG": BBG,
    "MT-GRPO": MTGRPO,
    "SEC": SEC,
    "DUMP": DUMP,
    "VIGOR": VIGOR,
    "Sagawa": Sagawa,
    "CVaR": _core(CVaR(0.5)),
    "chi-square": _core(ChiSquare(0.5)),
    "published Prompt-GDRO": _published(True),
    "published Rollout-GDRO": _published(False),
    "joint, prompts only": _core(Entropic(2.0)),
    "joint, rollouts only": _core(rollout=True),
    "joint": _core(Entropic(2.0), rollout=True),
    "joint, objective preserved": _core(Entropic(2.0), rollout=True, preserve=True),
}


def _rounded(real: Floats, total: int) -> Ints:
    """Whole counts of the given sum by largest remainder."""
    counts = np.floor(real + 1e-9).astype(np.int64)
    counts[np.argsort(counts - real, kind="stable")[: total - int(counts.sum())]] += 1
    return counts
