"""The one data flow: ids -> plan -> (sample, grade) -> observe. Adapters own nothing else.

`plan` uses past information only and changes nothing; `observe` learns from the graded rollouts of a plan. With a pilot
there are two stages: ids -> plan -> (sample, grade) -> replan -> (sample, grade) -> observe.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from gdro_core._old_states import controller_1, controller_2, controller_3, controller_4, controller_5
from gdro_core._validate import (
    Floats,
    Ints,
    check_number,
    check_state,
    floats,
    integer,
    integers,
    load_parts,
    number,
    unique_ids,
)
from gdro_core.adversaries import Adversary, Entropic
from gdro_core.components import VarianceComponents
from gdro_core.costs import TokenBudget
from gdro_core.difficulty import OnlineDifficultyClassifier, equal_edges
from gdro_core.grpo import gradient_weight
from gdro_core.prior import LearntPrior
from gdro_core.prompt_game import PromptGDRO
from gdro_core.rollout_game import RolloutGDRO
from gdro_core.theory.frontier import best_group_size
from gdro_core.theory.two_stage import pilot_gain
from gdro_core.utilities import VARIANCE, Utility, signal


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a step decides.

    >>> plan = GDROController.uniform(mean_rollouts=2).plan(["a", "b"])
    >>> plan.counts, plan.owner  # rollout j belongs to prompt owner[j]
    (array([2, 2]), array([0, 0, 1, 1]))
    """

    ids: tuple[Hashable, ...]  # N unique prompt ids
    bins: Ints  # (N,) difficulty bins the plan was made with, −1 = unseen
    weights: Floats  # (N,) factor on each prompt's advantages
    counts: Ints  # (N,) rollouts of each prompt
    price: float  # shadow price [utility / rollout]; 0 without a rollout game
    step: int  # number of observations the controller had made
    rest: int = 0  # rollouts that `GDROController.replan` will hand out once these are graded
    first: Ints | None = None  # (N,) of the counts, those of the first stage; None: all
    batch: int | None = None  # the first so many prompts set a budget of tokens by n_bar rollouts each; None: no such

    @property
    def owner(self) -> Ints:
        """(sum of counts,) flat rollout row -> prompt row."""
        return np.repeat(np.arange(len(self.ids)), self.counts)

    @property
    def more(self) -> Ints:
        """(N,) rollouts of the second stage."""
        return np.zeros_like(self.counts) if self.first is None else self.counts - self.first

    @property
    def stage(self) -> Ints:
        """(sum of counts,) 0 or 1 for each flat rollout row; a prompt's first stage comes first."""
        owner, first = self.owner, self.counts if self.first is None else self.first
        place = np.arange(owner.size) - (np.cumsum(self.counts) - self.counts)[owner]
        return np.asarray(place >= first[owner], dtype=np.int64)

    def same(self, other: Plan) -> bool:
        """Whether both were made for the same batch at the same step, here or on another worker."""
        return self is other or (
            self.step == other.step and self.ids == other.ids and np.array_equal(self.counts, other.counts)
        )


@dataclass(frozen=True, eq=False)
class Observation:
    """The graded rollouts of a plan: per prompt the summed rewards and the number of rollouts graded.

    These are sufficient: a controller learns from nothing else. So workers that grade parts of a batch merge what they
    have by addition, in any order and grouping (theorem 12; to the bit where sums of rewards are exact, as of 0 and 1).

    >>> plan = GDROController.uniform(mean_rollouts=2).plan(["a", "b"])
    >>> here = Observation.of(plan, [1, 0], rows=[0, 3])  # rollout 0 belongs to a, rollout 3 to b
    >>> elsewhere = Observation.of(plan, [1], rows=[1])
    >>> here.merge(elsewhere).correct, here.merge(elsewhere).trials
    (array([2., 0.]), array([2, 1]))
    """

    plan: Plan
    correct: Floats  # (N,) summed rewards
    trials: Ints  # (N,) rollouts graded, at most plan.counts
    tokens: Floats | None = None  # (N,) tokens of the graded rollouts, if they were counted

    @classmethod
    def of(
        cls, plan: Plan, rewards: ArrayLike, rows: ArrayLike | None = None, *, tokens: ArrayLike | None = None
    ) -> Observation:
        """Sum the rewards of some rollouts, or of all, by prompt.

        Args:
            plan: what `plan` returned.
            rewards: (M,) in [0, 1]; 1 is correct, fractions are partial credit. Map a ±1 reward by (r + 1) / 2.
            rows: (M,) distinct flat rollout rows as in `plan.owner`; None: all, in plan order.
            tokens: (M,) above 0, of prompt and completion (`gdro_core.costs`); only a budget of tokens needs them.

        Raises:
            ValueError: rewards of another length, outside [0, 1] or not finite; rows out of range or repeated; tokens
                of another length or not above 0.
        """
        owner = plan.owner
        if rows is not None:
            flat = integers("rows", rows, (-1,), 0, owner.size - 1)
            if np.unique(flat).size != flat.size:
                raise ValueError("rows must be distinct, got a rollout twice")
            owner = owner[flat]
        reward = floats("rewards", rewards, owner.shape, 0.0, 1.0)
        size = len(plan.ids)
        correct = np.bincount(owner, weights=reward, minlength=size).astype(np.float64)
        trials = plan.counts.copy() if rows is None else np.bincount(owner, minlength=size)
        if tokens is None:
            return cls(plan, correct, trials)
        length = floats("tokens", tokens, owner.shape, 0.0)
        if not length.all():
            raise ValueError("tokens must be above 0, got 0.0")
        return cls(plan, correct, trials, np.bincount(owner, length, size).astype(np.float64))

    @classmethod
    def of_plan(cls, plan: Plan, rewards: ArrayLike | Observation) -> Observation:
        """What a planner was given to observe, if it is of this plan.

        Raises:
            ValueError: as `of`, or an observation of another plan.
        """
        observation = rewards if isinstance(rewards, Observation) else cls.of(plan, rewards)
        if not observation.plan.same(plan):
            raise ValueError(f"rewards must be an observation of this plan, got one of step {observation.plan.step}")
        return observation

    def merge(self, other: Observation) -> Observation:
        """Both together.

        Raises:
            ValueError: they are of different plans, or hold more rollouts of a prompt than were planned.
        """
        if not self.plan.same(other.plan):
            raise ValueError(f"observations must be of one plan, got steps {self.plan.step} and {other.plan.step}")
        trials = self.trials + other.trials
        if (trials > self.plan.counts).any():
            repeated = self.plan.ids[int(np.argmax(trials > self.plan.counts))]
            raise ValueError(f"observations must not share rollouts, got too many of {repeated!r}")
        if (self.tokens is None) != (other.tokens is None):
            raise ValueError("observations must both have tokens or none, got one with and one without")
        tokens = None if self.tokens is None or other.tokens is None else self.tokens + other.tokens
        return Observation(self.plan, self.correct + other.correct, trials, tokens)

    def by_bin(self, num_bins: int) -> dict[str, Any]:
        """What the batch was, per bin (lists of B, None for a bin without prompts) and in all.

        Returns:
            bin_share, unseen_share: share of the batch's prompts; bin_error: 1 - mean reward (of prompts with a graded
            rollout); bin_rollouts: mean count; wasted_share: share of the rollouts whose group has one outcome only.
            Where tokens were observed, of a rollout rollout_tokens in the mean and bin_tokens; wasted_tokens_share.
        """
        plan, graded = self.plan, self.trials > 0
        error = 1.0 - self.correct / np.maximum(self.trials, 1)
        mixed = (self.correct > 0) & (self.correct < self.trials)
        rows = _rows_of(plan.bins, num_bins)
        cost = {}
        if self.tokens is not None:
            drawn = np.bincount(plan.bins + 1, self.trials, num_bins + 1).astype(np.int64)
            cost = {
                "rollout_tokens": float(self.tokens.sum() / max(int(self.trials.sum()), 1)),
                "bin_tokens": _means(plan.bins, self.tokens, drawn),
                "wasted_tokens_share": float(self.tokens[~mixed].sum() / (self.tokens.sum() or 1.0)),
            }
        return {
            "bin_share": (rows[1:] / len(plan.ids)).tolist(),
            "unseen_share": float(rows[0] / len(plan.ids)),
            "bin_error": _means(plan.bins, error * graded, _rows_of(plan.bins[graded], num_bins)),
            "bin_rollouts": _means(plan.bins, plan.counts, rows),
            "wasted_share": float(self.trials[~mixed].sum() / max(int(self.trials.sum()), 1)),
            **cost,
        }

    def steering(self, num_bins: int) -> dict[str, Any]:
        """What the games did with the batch.

        Returns:
            bin_weight: mean weight per bin; shadow_price; lead_lag: mean bin index under the weights minus under the
            data (Eq. 32), below 0 when the weights lean to harder bins.
        """
        plan = self.plan
        seen = plan.bins >= 0
        b, weights = plan.bins[seen], plan.weights[seen]
        return {
            "bin_weight": _means(plan.bins, plan.weights, _rows_of(plan.bins, num_bins)),
            "shadow_price": plan.price,
            "lead_lag": float((b * weights).sum() / weights.sum() - b.sum() / b.size) if b.size else None,
        }


def _rows_of(bins: Ints, num_bins: int) -> Ints:
    """(B + 1,) prompts that were never seen, then those of each bin."""
    return np.bincount(bins + 1, minlength=num_bins + 1)


def _means(bins: Ints, values: Floats | Ints, rows: Ints) -> list[float | None]:
    """Sum of the values in each bin over (B + 1,) `rows`; None where there are none."""
    total = np.bincount(bins + 1, values, rows.size)
    return [t / n if n else None for t, n in zip(total[1:].tolist(), rows[1:].tolist(), strict=True)]


def _batch_weights(utility: Utility, a: Floats, b: Floats, counts: Ints, omega: Floats) -> Floats:
    """omega times the utility's shrinkage, with mean 1 over the rollouts that are expected to have a gradient."""
    weights = omega * utility.shrinkage(a[:, None], b[:, None], counts[:, None])[:, 0]
    some = np.flatnonzero(counts)
    rollouts = counts.astype(np.float64)
    rollouts[some] *= utility.information(a[some, None], b[some, None], counts[some, None])[:, 0]
    total = rollouts.sum()
    return np.asarray(weights / ((weights * rollouts).sum() / total if total else weights.mean()))


def _even_odds(n: float) -> float:
    """The p above 1/2 at which n rollouts are as likely as not to have one outcome only: p^n + (1 - p)^n = 1/2."""
    low, high = 0.5, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if middle**n + (1.0 - middle) ** n < 0.5 else (low, middle)
    return low


IDLE_DISCOUNT = 0.9  # of what is known about a prompt, each time that it is passed over
FORGOTTEN = 0.5  # x n_bar rollouts: a prompt of which less is known counts as unseen, where prompts can be passed over
COMPONENTS_DISCOUNT = 0.9  # of what is known about variance components, at each measurement
FEWEST_PILOT, LEAST_GAIN = 4, 0.05  # rollouts of a first stage, and its gain, for a controller to choose one itself
MOST_KAPPA = 2.5  # that the recommended controller plans with, see `GDROController.kappa`


class Planner(Protocol):
    """Decides a batch's weights and rollouts, and learns from the rewards; every controller is one.

    >>> planner: Planner = GDROController.uniform(mean_rollouts=2)
    >>> planner.plan(["a", "b"]).counts
    array([2, 2])
    """

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """Decide weights and counts for a batch, from past observations only; learns nothing.

        With a budget of fewer rollouts than n_bar an id, the ids are candidates: the planner chooses among them.
        """

    def observe(self, plan: Plan, rewards: ArrayLike | Observation) -> dict[str, Any]:
        """Learn from the graded rollouts of a plan; returns metrics."""


class GDROController:
    r"""Two games over one difficulty classifier; either may be absent, and without both it is plain GRPO.

    Weights have mean 1 over the batch's rollouts (sum_i n_i w_i = sum_i n_i), so that in a loss averaged over rollouts
    the games steer directions, not the learning rate. In one averaged over prompts (n_bar / n_i on each rollout) the
    mean that counts is 1 - Cov(n, w) / n_bar, below 1 where heavy prompts get more rollouts: a shorter step, unless the
    optimizer normalises its steps, as Adam does. Ratios of weights never depend on the batch, but for
    `preserve_objective`. Counts always sum to n_bar N.

    Departs: the paper's own controller, whose weights are unnormalised (Eq. 16), is `PublishedController`.

    Several workers with the same state make the same plan: ties are broken by a generator seeded with (seed, step).

    Args:
        classifier: difficulty bins.
        prompt: Prompt-GDRO, or None for weights 1.
        rollout: Rollout-GDRO, or None for n_bar rollouts each.
        mean_rollouts: n_bar, a whole number; needed only without `rollout`.
        joint: rollouts follow the prompt weights (n ∝ ω√v, F7) when both games are on.
        preserve_objective: rollouts change the variance of the update, not what it ascends (F6). Std-normalised GRPO
            pulls a prompt by w_n(p) grad p (`gradient_weight`), which grows with n; its weight is therefore multiplied
            by w_nbar(p) / w_n(p) at the posterior mean of p, after the weights have got mean 1 over the *prompts* of
            the batch. Where that is the true p, the expected update is the one of n_bar rollouts each. Holds for
            advantages divided by the group's population std and losses averaged over a prompt's rollouts first; a mean
            over all rollouts pulls by n w_n, and needs n_bar / n on top. Needs n_min >= 2 (a single rollout has no
            gradient) and a whole n_bar.
        components: estimates the kappa of a rollout game with a `signal` utility from what `observe_gradients` is told.
            Until that has been known well enough once, the utility's own kappa is used.
        pilot: n_1, rollouts of a prompt of which nothing is known before `replan` decides about its others, at least 2
            and n_min, at most n_bar. 0: one stage. None: n_bar / 2 rollouts, from 4 on, while `pilot_gain` promises 5 %
            under the prior of unseen prompts and the present kappa. Needs a `signal` utility, and neither `per_bin`,
            `permute` nor `preserve_objective`.
        tokens: the budget is not rollouts but what they cost: the expected tokens of a plan are those of n_bar rollouts
            for each prompt of the batch, and errors of that are paid back. `observe` then needs tokens. Needs a rollout
            game per prompt.
        seed: decides ties.

    >>> controller = GDROController.recommended(mean_rollouts=4, seed=0)
    >>> plan = controller.plan(["gsm8k/17", "gsm8k/4", "aime/3"])
    >>> plan.counts, plan.weights, plan.bins
    (array([4, 4, 4]), array([1., 1., 1.]), array([-1, -1, -1]))
    >>> metrics = controller.observe(plan, rewards=[1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0])  # flat, in plan order
    >>> controller.plan(["gsm8k/17", "gsm8k/4", "aime/3"]).counts  # all for the prompt that was solved sometimes
    array([ 0, 12,  0])
    """

    def __init__(
        self,
        classifier: OnlineDifficultyClassifier,
        prompt: PromptGDRO | None = None,
        rollout: RolloutGDRO | None = None,
        *,
        mean_rollouts: int | None = None,
        joint: bool = True,
        preserve_objective: bool = False,
        components: VarianceComponents | None = None,
        pilot: int | None = 0,
        tokens: TokenBudget | None = None,
        seed: int = 0,
    ) -> None:
        if prompt is not None and prompt.num_bins != classifier.num_bins:
            raise ValueError(
                f"prompt.num_bins must equal the classifier's {classifier.num_bins}, got {prompt.num_bins}"
            )
        self.pilot = None if pilot is None else integer("pilot", pilot, 0)
        self._chosen: tuple[tuple[float, ...], int] | None = None  # the first stage, and what it was chosen for
        if self.pilot != 0:
            whole = rollout is None or rollout.per_bin or rollout.permute or preserve_objective
            if rollout is None or whole or rollout.utility.further is None:
                raise ValueError(f"pilot must be 0 without a signal utility and a count for each prompt, got {pilot!r}")
            if self.pilot is not None:
                check_number("pilot", self.pilot, max(2, rollout.min_rollouts), rollout.mean_rollouts)
        if tokens is not None:
            if rollout is None or rollout.per_bin or rollout.permute:
                raise ValueError(f"tokens need a rollout game per prompt, got {rollout!r}")
            if tokens.costs.num_bins != classifier.num_bins:
                raise ValueError(
                    f"num_bins of tokens must equal the classifier's {classifier.num_bins}, got {tokens.costs.num_bins}"
                )
        self.tokens = tokens
        if (rollout is None) == (mean_rollouts is None):
            raise ValueError(
                f"exactly one of rollout and mean_rollouts must be given, got mean_rollouts={mean_rollouts!r}"
            )
        if prompt is not None:
            least = mean_rollouts if rollout is None else rollout.min_rollouts
            if prompt.payoff.fewest > 1:
                check_number(f"min_rollouts with payoff {prompt.payoff.name!r}", least or 0, prompt.payoff.fewest)
        if components is not None and (rollout is None or rollout.utility.at_kappa is None):
            raise ValueError(f"components need a rollout game with a signal utility, got {rollout!r}")
        self.classifier, self.prompt, self.rollout, self.components = classifier, prompt, rollout, components
        if preserve_objective and rollout is not None:
            check_number("min_rollouts with preserve_objective", rollout.min_rollouts, 2)
            if not rollout.mean_rollouts.is_integer():
                raise ValueError(
                    f"mean_rollouts must be a whole number with preserve_objective, got {rollout.mean_rollouts}"
                )
        self.joint = joint
        self.preserve_objective = bool(preserve_objective)
        self.seed = integer("seed", seed, 0)
        self._mean_rollouts = None if mean_rollouts is None else integer("mean_rollouts", mean_rollouts, 1)
        self._step = 0
        self._kappa: float | None = None
        self._kappa = self._learnt_kappa()
        self._solved_from = _even_odds(max(2.0, self.mean_rollouts))

    @classmethod
    def uniform(cls, mean_rollouts: int, *, num_bins: int = 10, seed: int = 0) -> Self:
        """Plain GRPO: weight 1 and n_bar rollouts for all; difficulty is observed for the metrics only."""
        return cls(OnlineDifficultyClassifier(equal_edges(num_bins)), mean_rollouts=mean_rollouts, seed=seed)

    @classmethod
    def recommended(
        cls,
        mean_rollouts: int,
        min_rollouts: int = 0,
        max_rollouts: int = 12,
        *,
        num_bins: int = 10,
        adversary: Adversary = Entropic(0.6),
        kappa: float = 0.5,
        error: float = 0.0,
        pilot: int | None = 0,
        prior: tuple[float, float] | LearntPrior = (0.5, 0.5),
        tokens: TokenBudget | None = None,
        seed: int = 0,
    ) -> Self:
        """What measured best so far: counts by the frontier law (theorem 16), with a mild tilt to hard prompts.

        Prompts that are almost surely solved or hopeless get no rollout. What is known of them fades, and at last they
        count as unseen and get n_bar again. What is left goes to groups of up to n_max where both outcomes are likely.
        Average the loss over rollouts, so that a prompt counts by its rollouts.

        Chosen on the tuning populations of `simulations/experiments/frontier.py`, which reports it on others, and by a
        tiny model: a sharper adversary gains more where hits are rare and honest, less where they are lucky,
        and loses where agreement falls and what is not practised is forgotten.

        Args:
            mean_rollouts: n_bar.
            min_rollouts: n_min, 0 or at least 2.
            max_rollouts: n_max.
            num_bins: difficulty bins, equal in pass rate.
            adversary: of the prompt game, on the error payoff.
            kappa: of `signal`, until `observe_gradients` has told enough to estimate it.
            error: probability that the verifier turns a grade round.
            pilot: rollouts of unseen prompts in a first stage, see `replan`; 0 for one stage, None for its own choice.
            prior: of unseen prompts. A `LearntPrior()` predicts better (`simulations/experiments/learnt_prior.py`), and
                changes plans: the adversary's step was chosen without it, and a smaller one, .3, seems due with it.
            tokens: `TokenBudget()` for steps that cost n_bar rollouts each in tokens; None: in rollouts.
            seed: decides ties.

        Raises:
            ValueError: a number out of range.
        """
        if min_rollouts == 1:
            raise ValueError(
                "min_rollouts must be 0 or at least 2, got 1: a rollout alone in its group teaches nothing"
            )
        return cls(
            OnlineDifficultyClassifier(equal_edges(num_bins), prior=prior, idle_discount=IDLE_DISCOUNT),
            PromptGDRO(num_bins, adversary=adversary),
            RolloutGDRO(mean_rollouts, min_rollouts, max_rollouts, signal(kappa, error)),
            components=VarianceComponents(num_bins, discount=COMPONENTS_DISCOUNT),
            pilot=pilot,
            tokens=tokens,
            seed=seed,
        )

    @classmethod
    def joint_play(
        cls,
        mean_rollouts: int,
        min_rollouts: int = 2,
        max_rollouts: int = 12,
        *,
        num_bins: int = 10,
        prompt: bool = True,
        rollout: bool = True,
        adversary: Adversary = Entropic(2.0),
        utility: Utility = VARIANCE,
        preserve_objective: bool = False,
        seed: int = 0,
    ) -> Self:
        """Both games of the paper, repaired and coupled by n ∝ ω√v (F7): what was recommended before the frontier law.

        Chosen by `simulations/experiments/tuning.py` among 54 on populations that no report uses. It gains where little
        transfers between kinds of problems and all can be learnt, and loses where many cannot: it spends most rollouts
        on prompts that are never solved.

        Differs from `PublishedController` in: bins by a Beta posterior of the pass rate instead of any-of-n (F10); a
        payoff that sees difficulty (F1); weights e^{ηS} normalised to mean 1; counts from the posterior variance (F2)
        for each prompt instead of each bin; both games together.
        """
        return cls(
            OnlineDifficultyClassifier(equal_edges(num_bins)),
            PromptGDRO(num_bins, adversary=adversary) if prompt else None,
            RolloutGDRO(mean_rollouts, min_rollouts, max_rollouts, utility) if rollout else None,
            mean_rollouts=None if rollout else mean_rollouts,
            preserve_objective=preserve_objective,
            seed=seed,
        )

    @property
    def mean_rollouts(self) -> float:
        """n_bar [rollouts / prompt]."""
        return float(self._mean_rollouts or 0) if self.rollout is None else self.rollout.mean_rollouts

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """Decide weights and counts for a batch, from past observations only. Changes nothing.

        Args:
            ids: N unique ids.
            budget: rollouts in all, n_bar N if None; see `RolloutGDRO.allocate`. Needs a rollout game with n_min = 0.

        Raises:
            ValueError: ids empty or not unique, or a budget that cannot be met.
        """
        names = unique_ids(ids)
        bins = self.classifier.bins(names)
        a, b = self.classifier.posterior(names)
        weights = np.ones(len(names)) if self.prompt is None else self.prompt.weights(bins)
        rollout, price, rest, batch = self._rollout_game(), 0.0, 0, None
        if rollout is None:
            if budget not in (None, len(names) * self.mean_rollouts):
                raise ValueError(f"budget must be None without a rollout game, got {budget}")
            counts = np.full(len(names), self._mean_rollouts, dtype=np.int64)
        else:
            rng = np.random.default_rng([self.seed, self._step])
            groups = bins
            if rollout.min_rollouts == 0:
                evidence = a + b - sum(self.classifier.prior)
                groups = np.where(evidence < FORGOTTEN * rollout.mean_rollouts, -1, bins)
            omega = weights if self.joint else None
            if self.tokens is None:
                counts, price = rollout.allocate(groups, a, b, omega, budget=budget, rng=rng)
            else:
                batch = len(names) if budget is None else min(len(names), int(budget / rollout.mean_rollouts + 1e-9))
                costs, tokens, most = self.tokens.limits(names, batch, rollout.mean_rollouts)
                even = self.tokens.evenness
                counts, price = rollout.allocate_tokens(
                    groups, a, b, omega, costs=costs, tokens=tokens, most=most, evenness=even, budget=budget, rng=rng
                )
            if first := self._first_stage(rollout) if (groups < 0).any() else 0:
                whole = int(counts.sum())
                counts = np.where(groups < 0, np.minimum(counts, first), counts)
                rest = whole - int(counts.sum())
        if rollout is not None and self.preserve_objective:
            p = a / (a + b)
            weights = weights / weights.mean()
            weights = weights * gradient_weight(rollout.mean_rollouts, p) / gradient_weight(counts, p)
        else:
            weights = _batch_weights(VARIANCE if rollout is None else rollout.utility, a, b, counts, weights)
        return Plan(tuple(names), bins, weights, counts, price, self._step, rest, batch=batch)

    def replan(self, plan: Plan, rewards: ArrayLike | Observation) -> Plan:
        """Commit: the same plan with the rest of its budget handed out by what its first stage has shown.

        Every prompt with rollouts may get more, by what further ones are worth under the posterior that the first stage
        left. A step without unseen prompts has no rest: its plan comes back as it is. Changes nothing; `observe` learns
        from both stages at once.

        Args:
            plan: what `plan` returned for this batch.
            rewards: (sum of counts,) of the first stage, in plan order, or an `Observation` of it.

        Returns:
            the whole plan: `counts` of both stages with the sum of the budget, of which `first` are graded and `more`
            are to be sampled; `stage` tells them apart in plan order, for `staged_advantages`.

        Raises:
            ValueError: bad rewards, or rewards of another plan.

        >>> controller = GDROController.recommended(mean_rollouts=8, pilot=2)
        >>> plan = controller.plan(["a", "b"])
        >>> whole = controller.replan(plan, [1, 0, 1, 1])
        >>> plan.counts, plan.rest, whole.more, whole.stage
        (array([2, 2]), 12, array([7, 5]), array([0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]))
        """
        observation, game = Observation.of_plan(plan, rewards), self._rollout_game()
        if plan.rest == 0 or game is None:
            return plan
        a, b = self.classifier.posterior(plan.ids)
        a, b = a + observation.correct, b + observation.trials - observation.correct
        weights = np.ones(a.size) if self.prompt is None else self.prompt.weights(plan.bins)
        rng = np.random.default_rng([self.seed, self._step, 1])
        omega = weights if self.joint else None
        if self.tokens is None or plan.batch is None:
            counts, price = game.extend(plan.counts, observation.correct, plan.rest, a, b, omega, rng=rng)
        else:
            costs, tokens, most = self.tokens.limits(plan.ids, plan.batch, game.mean_rollouts)
            even, shown = self.tokens.evenness, observation.correct
            counts, price = game.extend_tokens(
                plan.counts, shown, a, b, omega, costs=costs, tokens=tokens, most=most, evenness=even, rng=rng
            )
        weights = _batch_weights(game.utility, a, b, counts, weights)
        return replace(plan, weights=weights, counts=counts, price=price, rest=0, first=plan.counts)

    @property
    def kappa(self) -> float | None:
        """The estimated kappa that the next plan uses, at most 2.5; None while the rollout game's own is used.

        Departs from theorem 16 by the cap: large kappa makes utilities flat in v, so that omega alone would choose, and
        prompts that are solved by luck or never would get most rollouts. Below it a wrong kappa costs little.
        """
        return self._kappa

    def _first_stage(self, game: RolloutGDRO) -> int:
        """n_1 of unseen prompts, 0 for one stage: as given, or n_bar / 2 while that promises enough (theorem 21)."""
        kappa = game.utility.kappa
        if self.pilot is not None or kappa is None:
            return self.pilot or 0
        first = max(game.min_rollouts, int(game.mean_rollouts) // 2)
        if first < FEWEST_PILOT:
            return 0
        known = tuple(np.exp(np.round(np.log([*self.classifier.prior, kappa + 1e-3]), 1)).tolist())
        if self._chosen is None or self._chosen[0] != known:
            a, b, ratio = known
            gain = pilot_gain(first, game.mean_rollouts, game.max_rollouts, a, b, ratio)
            self._chosen = known, first if gain >= LEAST_GAIN else 0
        return self._chosen[1]

    def _learnt_kappa(self) -> float | None:
        """The present estimate, once it has been useful: an interval that widens later makes it little worse."""
        if self.components is None or self.components.kappa is None:
            return None
        known = self.kappa is not None or self.components.useful
        return min(self.components.kappa, MOST_KAPPA) if known else None

    def _rollout_game(self) -> RolloutGDRO | None:
        """The rollout game at the present estimate of kappa."""
        at_kappa = None if self.rollout is None else self.rollout.utility.at_kappa
        if self.rollout is None or at_kappa is None or self.kappa is None:
            return self.rollout
        return replace(self.rollout, utility=at_kappa(self.kappa))

    def observe(self, plan: Plan, rewards: ArrayLike | Observation) -> dict[str, Any]:
        """Learn from the graded rollouts of a plan.

        Batches may be observed late, after further plans were made: what each teaches is the same. What delay costs is
        proved for Hedge on bounded losses of all arms (`regret.delayed_hedge_bound`, theorem 12), not for the others.

        Args:
            plan: what `plan` returned for this batch.
            rewards: (sum of counts,) in [0, 1], in plan order (`plan.owner`); 1 is correct, fractions are partial
                credit. Or an `Observation` of this plan, merged from what workers report; prompts of which it holds no
                rollout are skipped.

        Returns:
            metrics: see `metrics`.

        Raises:
            ValueError: rewards of another length, outside [0, 1] or not finite, or an observation of another plan;
                nothing has changed then.
        """
        observation = Observation.of_plan(plan, rewards)
        if plan.rest:
            raise ValueError(f"plan must be whole, got one with {plan.rest} rollouts left for `replan`")
        if self.tokens is not None and observation.tokens is None:
            raise ValueError("rewards must be an observation with tokens: Observation.of(plan, rewards, tokens=...)")
        if self.prompt is not None:
            payoff = self.prompt.payoff
            graded = observation.trials >= payoff.fewest
            gains = payoff.of(observation.correct[graded], observation.trials[graded])
            self.prompt.observe(plan.bins[graded], gains)
        self.classifier.observe(plan.ids, observation.correct, observation.trials)
        if self.tokens is not None and observation.tokens is not None:
            self._settle(self.tokens, observation, observation.tokens)
        self._step += 1
        return self.metrics(observation)

    def _settle(self, budget: TokenBudget, observation: Observation, tokens: Floats) -> None:
        """Count the step's tokens, and what n_bar rollouts of each prompt of the batch would have cost."""
        plan, trials = observation.plan, observation.trials
        budget.costs.observe(plan.ids, self.classifier.bins(plan.ids), trials, tokens)
        costs = np.where(trials > 0, tokens / np.maximum(trials, 1), budget.costs.expected(plan.ids))
        budget.settle(float(tokens.sum()), self.mean_rollouts * float(costs[: plan.batch].sum()))

    def observe_gradients(
        self, plan: Plan, rows: ArrayLike, first: ArrayLike, second: ArrayLike, correct: ArrayLike, trials: ArrayLike
    ) -> None:
        """Learn the variance components from the gradients of some prompts of a plan, each from two halves of a group.

        Args:
            plan: what `plan` returned.
            rows: (M,) rows of the prompts in the plan.
            first, second, correct, trials: of these prompts, see `VarianceComponents.observe`.

        Raises:
            ValueError: a controller without components, or a bad argument; nothing has changed then.
        """
        if self.components is None:
            raise ValueError("observe_gradients needs a controller with components, got one without")
        chosen = integers("rows", rows, (-1,), 0, len(plan.ids) - 1)
        self.components.observe(plan.bins[chosen], first, second, correct, trials)
        self._kappa = self._learnt_kappa()

    def measures(self, plan: Plan, every: int) -> bool:
        """Whether a loop that can measure gradients should show those of a plan to `observe_gradients`.

        Every `every` steps, and at each of the first `every` steps until kappa is known: rollouts planned by a wrong
        kappa cost most at the start, and this costs at most `every` - 1 measurements in a run.

        Args:
            plan: what `plan` returned.
            every: >= 0; 0 for never. Without components it is never, too.

        >>> controller = GDROController.recommended(mean_rollouts=4)
        >>> controller.measures(controller.plan(["a", "b"]), every=10)
        True
        """
        period = integer("every", every, 0)
        if self.components is None or period == 0:
            return False
        return plan.step % period == 0 or (plan.step < period and self.kappa is None)

    def metrics(self, observation: Observation) -> dict[str, Any]:
        """What a step did: `Observation.by_bin`, and with a game `Observation.steering`.

        Returns:
            these, and learnable_share, solved_share, unsolved_share: of the batch's prompts, by whether n_bar rollouts
            are now more likely than not to have both outcomes, else by the pass rate (the rest was never sampled);
            bin_probability: q_b (prompt game only); kappa, cosine between the gradients of two prompts, and group_size,
            the best one at p = 1/2 (with components only; None while unknown); tokens_excess, those of the run so far
            over the uniform plans', less 1 (with a budget of tokens only).
        """
        plan = observation.plan
        metrics = observation.by_bin(self.classifier.num_bins)
        p = self.classifier.pass_rate(plan.ids)
        known = (plan.bins >= 0) | (observation.trials > 0)
        solved, unsolved = known & (p >= self._solved_from), known & (p <= 1.0 - self._solved_from)
        kinds = {"learnable": known & ~solved & ~unsolved, "solved": solved, "unsolved": unsolved}
        metrics |= {f"{name}_share": np.count_nonzero(rows) / rows.size for name, rows in kinds.items()}
        if self.prompt is not None:
            metrics["bin_probability"] = self.prompt.probabilities.tolist()
        if self.prompt is not None or self.rollout is not None:
            metrics |= observation.steering(self.classifier.num_bins)
        if self.components is not None:
            size = None if not self.kappa else float(best_group_size(self.kappa, 0.25))
            metrics |= {"kappa": self.kappa, "cosine": self.components.cosine, "group_size": size}
        if self.tokens is not None:
            metrics["tokens_excess"] = self.tokens.excess
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """All memory as plain lists and numbers; `load_state_dict` continues bit for bit."""
        saved = {name: None if part is None else part.state_dict() for name, part in self._parts().items()}
        return {**self._settings(), "step": self._step, "kappa": self._kappa, **saved}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a controller with the same parts and settings.

        Raises:
            ValueError: other parts, settings, shapes or version; nothing has changed then.
        """
        for version, newer in enumerate((controller_1, controller_2, controller_3, controller_4, controller_5), 1):
            if saved.get("version") == version:
                saved = newer(saved)
        parts = self._parts()
        check_state("GDROController", saved, self._settings(), ("step", "kappa", *parts))
        step = integer("step", saved["step"], 0)
        kappa = saved["kappa"]
        if kappa is not None:
            kappa = number("kappa", kappa, 0.0, MOST_KAPPA)
        load_parts("GDROController", parts, saved)
        self._step, self._kappa = step, kappa
        self._kappa = self._learnt_kappa()

    def _parts(self) -> dict[str, Any]:
        parts = {"classifier": self.classifier, "prompt": self.prompt}
        return {**parts, "components": self.components, "tokens": self.tokens}

    def _settings(self) -> dict[str, Any]:
        names = ("seed", "joint", "preserve_objective", "pilot")
        settings = {"version": 6, **{name: getattr(self, name) for name in names}}
        rollout = None if self.rollout is None else self.rollout.settings()
        return {**settings, "mean_rollouts": self._mean_rollouts, "rollout": rollout}
