r"""Plans at equal rollouts and at equal tokens, where hard prompts have long answers.

The accuracy traces of the real run hold no lengths, and no other log is at hand: what follows is an assumption, of the
order that reasoning models report. A rollout has PROMPT tokens of prompt and an answer of gamma distribution with
coefficient of variation .5 and mean

    own_i (HARDEST - (HARDEST - EASIEST) p_i) 1.25^wrong growth^(t / T)

own_i log-normal with spread .35, p_i the present pass rate, so that what is learnt is answered shorter. Runs are those
of the frontier experiment, on some of its reported populations; the recommended controller is offered two prompts for
each one of a batch. A run goes on until it has spent the rollouts and the tokens of the uniform run of its seed, and
is read off, between steps, where it has spent the one and where it has spent the other. `in tokens` has the default
evenness of `TokenBudget`; the two ends of it are beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from gdro_core import GDROController, Observation, Plan, TokenBudget
from gdro_llm.intervals import mean_interval
from gdro_llm.measuring.tables import markdown, with_interval
from simulations.controls import Choosing
from simulations.experiments.frontier import MEAN, REPORT
from simulations.harness import Row, Verdict
from simulations.race import race
from simulations.testbeds import Learner

CLAIM = (
    "With a budget of tokens runs cost on average within 2 % of what their uniform plans would have cost over 50 "
    "steps, and end above uniform GRPO in pass@8 at equal tokens on every population"
)
SOURCE = "theorem 22"
COLUMNS = {
    "seed": "of population, batches, outcomes and lengths",
    "population": "name, of the frontier experiment",
    "rule": "name",
    "pass_at_8_rollouts": "held-out, at the uniform run's rollouts (1)",
    "mean_at_8_rollouts": "held-out mean pass rate, there (1)",
    "pass_at_8_tokens": "held-out, at the uniform run's tokens (1)",
    "mean_at_8_tokens": "held-out mean pass rate, there (1)",
    "cost": "tokens after the first STEPS steps over what n_bar rollouts for each prompt of these would have cost (1)",
    "rollouts": "in these steps, over n_bar a prompt (1)",
    "length": "mean tokens of a rollout in these steps",
}
SEEDS, BLOCK = 10, 1
OURS = "in tokens"
PROMPT, HARDEST, EASIEST, GROWTH = 120, 900, 250, 1.5  # tokens; growth of answers over a run
STEPS = 50  # of which costs are compared
MORE = 2.0  # rollouts of a run over the uniform one's: enough to spend its tokens
POPULATIONS = (
    "little transfer, κ .05", "κ 2.5", "dead prompts", "verifier errors", "forgetting", "calibrated, normalised steps",
    "like a pretrained model",
)  # fmt: skip


class Worded(GDROController):
    """A controller in a world where rollouts have lengths: draws them, observes them, and keeps the accounts."""

    def enter(self, population: Learner, steps: int, batch: int, seed: int) -> None:
        """The world: its population, length of a run, prompts of a batch, and seed of all lengths."""
        rng = np.random.default_rng([seed, 5])
        self.population, self.length_of_run, self.batch = population, steps, batch
        self.own = rng.lognormal(0.0, 0.35, population.prompts)
        self.rng = rng
        self.spent, self.planned, self.drawn = [0.0], [0.0], [0]  # by step, tokens, expected tokens, rollouts

    def plan(self, ids: Sequence[Hashable], *, budget: int | None = None) -> Plan:
        """See `GDROController.plan`; remembers what an answer to each prompt takes now."""
        rows, p = np.asarray(ids, dtype=np.int64), self.population.pass_rate
        growth = GROWTH ** (len(self.drawn) / self.length_of_run)
        self.right = growth * self.own * (HARDEST - (HARDEST - EASIEST) * p)
        expected = MEAN * (PROMPT + self.right * (1.25 - 0.25 * p))
        self.planned.append(float(expected[rows[: self.batch]].sum()))
        return super().plan(ids, budget=budget)

    def observe(self, plan: Plan, rewards: ArrayLike | Observation) -> dict[str, Any]:
        """See `GDROController.observe`; the answers' lengths are drawn here."""
        owner = np.asarray(plan.ids, dtype=np.int64)[plan.owner]
        mean = self.right[owner] * np.where(self.population.correct, 1.0, 1.25)
        tokens = PROMPT + np.ceil(self.rng.gamma(4.0, mean / 4.0))
        self.spent.append(float(tokens.sum()))
        self.drawn.append(owner.size)
        return super().observe(plan, Observation.of(plan, np.asarray(rewards, dtype=np.float64), tokens=tokens))


RULES: dict[str, Callable[[int], Worded]] = {
    "uniform": lambda seed: Worded.uniform(MEAN, seed=seed),
    "recommended": lambda seed: Worded.recommended(MEAN, seed=seed),
    OURS: lambda seed: Worded.recommended(MEAN, tokens=TokenBudget(), seed=seed),
    "by gain per token": lambda seed: Worded.recommended(MEAN, tokens=TokenBudget(evenness=0.0), seed=seed),
    "by gain per rollout": lambda seed: Worded.recommended(MEAN, tokens=TokenBudget(evenness=1.0), seed=seed),
}
MEASURES = {"pass_at_8": "pass@8", "mean_at_8": "mean@8"}
BUDGETS = ("rollouts", "tokens")


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Every rule on the same populations, batches and streams."""
    rows: list[Row] = []
    for seed in map(int, seeds):
        for name in POPULATIONS[:2] if quick else POPULATIONS:
            budget: dict[str, float] = {}
            for rule, build in RULES.items():
                labels = {"seed": seed, "population": name, "rule": rule}
                rows.append(labels | _run(name, build(seed), rule, seed, budget, quick))
    return rows


def _run(name: str, controller: Worded, rule: str, seed: int, budget: dict[str, float], quick: bool) -> Row:
    """One run; the first, uniform one sets the budgets."""
    setting, steps = REPORT[name], 6 if quick else REPORT[name].steps
    population = setting.build(seed)
    controller.enter(population, steps, setting.batch, seed)
    total = steps * setting.batch * MEAN
    planner = controller if rule == "uniform" else Choosing(controller, MEAN, setting.batch)
    states = race(population, planner, total if rule == "uniform" else round(MORE * total), setting.batch, seed)
    spent = {"rollouts": np.cumsum(controller.drawn), "tokens": np.cumsum(controller.spent)}
    if rule == "uniform":
        budget |= {kind: float(of_kind[-1]) for kind, of_kind in spent.items()}
    if any(spent[kind][-1] < budget[kind] * (1 - 1e-9) for kind in BUDGETS):
        raise ValueError(f"runs must spend the uniform run's rollouts and tokens, got {name!r} {rule!r} seed {seed}")
    ends = {
        f"{measure}_{kind}": float(np.interp(budget[kind], spent[kind], [row[measure] for row in states]))
        for measure in MEASURES
        for kind in BUDGETS
    }
    first = slice(0, STEPS + 1)
    tokens, rollouts = sum(controller.spent[first]), sum(controller.drawn[first])
    done = len(controller.drawn[first]) - 1
    cost = {"cost": tokens / sum(controller.planned[first]), "rollouts": rollouts / (done * setting.batch * MEAN)}
    return {**ends, **cost, "length": tokens / rollouts}


def values(rows: list[Row], population: str, rule: str, column: str) -> np.ndarray:
    """(seeds,) a column of a rule on a population."""
    return np.array([row[column] for row in rows if (row["population"], row["rule"]) == (population, rule)])


def gain(rows: list[Row], population: str, rule: str, measure: str, kind: str) -> np.ndarray:
    """(seeds,) measure of a rule minus uniform's [points] at equal rollouts or tokens, paired by seed."""
    column = f"{measure}_{kind}"
    return np.asarray(100 * (values(rows, population, rule, column) - values(rows, population, "uniform", column)))


def _names(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["population"] for row in rows))


def tabulate(rows: list[Row]) -> str:
    """Points minus uniform's, paired means with their 95 % intervals, at equal rollouts and at equal tokens.

    `cost` is what 50 steps cost over what n̄ rollouts for each prompt of their batches would have cost [%].
    """
    text = ["# Budgets of rollouts and of tokens", (tabulate.__doc__ or "").replace("\n    ", "\n").strip()]
    rules = [rule for rule in RULES if rule != "uniform"]
    for measure, label in MEASURES.items():
        lines = [["population", *[f"{rule}, at equal {kind}" for kind in BUDGETS for rule in rules]]]
        for name in _names(rows):
            shown = [mean_interval(gain(rows, name, rule, measure, kind)) for kind in BUDGETS for rule in rules]
            lines.append([name, *[with_interval(*interval, "+.2f") for interval in shown]])
        text += [f"## {label}", markdown(lines, "<" * len(lines[0]))]
    lines = [
        ["population", *[f"{rule}: {what}" for rule in rules for what in ("cost", "rollouts [× n̄]", "worst cost")]]
    ]
    for name in _names(rows):
        cells = []
        for rule in rules:
            cost, most = _cost(rows, name, rule)
            size = values(rows, name, rule, "rollouts").mean()
            cells += [with_interval(*mean_interval(cost), "+.2f"), f"{size:.2f}", f"{most:+.2f}"]
        lines.append([name, *cells])
    return "\n\n".join([*text, "## Cost", markdown(lines, "<" * len(lines[0]))]) + "\n"


def _cost(rows: list[Row], population: str, rule: str) -> tuple[np.ndarray, float]:
    """(seeds,) cost of a run over its uniform plans', less 1 [%], and that of the seed farthest from 0."""
    cost = 100 * (values(rows, population, rule, "cost") - 1.0)
    return cost, float(cost[np.abs(cost).argmax()])


def judge(rows: list[Row]) -> Verdict:
    """Mean cost within 2 % and interval of pass@8 at equal tokens above 0, on every population."""
    holds, text = True, []
    for name in _names(rows):
        cost, worst = _cost(rows, name, OURS)
        ours = mean_interval(gain(rows, name, OURS, "pass_at_8", "tokens"))
        good = abs(cost.mean()) < 2.0 and ours[1] > 0
        holds &= bool(good)
        plain = [gain(rows, name, "recommended", "pass_at_8", kind).mean() for kind in BUDGETS]
        mean = gain(rows, name, OURS, "mean_at_8", "tokens").mean()
        text.append(
            f"{name}: {with_interval(*ours, '+.2f')} pass@8, {mean:+.2f} mean@8{'' if good else ' FAILS'} at equal "
            f"tokens, cost {cost.mean():+.2f} % (worst {worst:+.2f}); by rollouts {plain[1]:+.2f} pass@8 at equal "
            f"tokens, {plain[0]:+.2f} at equal rollouts, cost {_cost(rows, name, 'recommended')[0].mean():+.2f} %"
        )
    return Verdict(holds, "; ".join(text))


def draw(rows: list[Row]) -> Figure:
    """Paired differences from uniform with 95 % intervals, at equal rollouts and at equal tokens."""
    figure, names = Figure(figsize=(7.0, 3.6)), _names(rows)
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    kinds = [(rule, kind) for rule in RULES if rule != "uniform" for kind in BUDGETS]
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for k, (rule, kind) in enumerate(kinds):
            dots = np.array([mean_interval(gain(rows, name, rule, measure, kind)) for name in names])
            error = np.abs(dots[:, 1:].T - dots[:, 0])
            place = np.arange(len(names)) + 0.16 * (k - 1.5)
            axis.errorbar(
                dots[:, 0], place, xerr=error, fmt="o", markersize=3, capsize=2, label=f"{rule}; equal {kind}"
            )
        axis.axvline(0, color="#555555", linewidth=0.8, linestyle="--")
        axis.set_xlabel(f"{label} minus uniform's [points]")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
