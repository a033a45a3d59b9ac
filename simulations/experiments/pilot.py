"""Does a pilot pay where prompts are seen once or twice? Plans of one and two stages at equal rollouts, in few epochs.

The reported populations of `frontier`, with as many prompts as the epochs ask for: a step has 512 rollouts (480 and 256
on some) on 512 / n_bar prompts, and every rule gets the batch alone. n_max is 3 n_bar. Advantages are against the mean
of the whole group, which gained more than stage by stage on all tuning populations tried (rewards are 0 or 1).
`recommended` has one stage: where nothing is known of any prompt it is uniform. `pilot, own choice` decides by theorem
21 whether to have a first stage; `pilot` always has one, of n_bar / 2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from gdro_core import GDROController, Planner
from gdro_llm.intervals import mean_interval
from gdro_llm.measuring.tables import markdown, with_interval
from simulations.controls import GroupsOf
from simulations.harness import Row, Verdict
from simulations.peers import AR3PO, DAPO, PilotCommit, ReinforceAda, Uniform
from simulations.race import own_stream, race
from simulations.testbeds import AdamLike, Ground, Learner, Normalised, Plain, Steps, cells, ladder, skilled

CLAIM = (
    "In one or two epochs the controller with a pilot of its own choice is nowhere more than .3 points below uniform "
    "GRPO, above it in mean@8 where it acts, and in many epochs not below the rule of one stage"
)
SOURCE = "theorem 21"
COLUMNS = {
    "seed": "of population, batches and outcomes",
    "population": "name",
    "mean_rollouts": "n_bar [rollouts / prompt]",
    "epochs": "visits of each prompt under uniform rollouts",
    "rule": "name",
    "pass_at_8": "held-out, at the uniform run's rollouts (1)",
    "mean_at_8": "held-out mean pass rate, there (1)",
    "rollouts": "in all",
}
SEEDS, BLOCK = 10, 2
CASES = [(1, 4), (1, 8), (1, 16), (2, 4), (2, 8), (2, 16), (8, 8)]  # epochs, n_bar
MEASURES = {"pass_at_8": "pass@8", "mean_at_8": "mean@8"}
OURS = "pilot, own choice"

Setting = tuple[Callable[[int, int], Learner], int, int]  # from a seed and prompts; steps; rollouts a step


def _learner(
    ground: Callable[[int, int], Ground],
    rate: float,
    own: float,
    noise: float,
    *,
    kind: Callable[[], Steps] = AdamLike,
    **nuisance: float,
) -> Callable[[int, int], Learner]:
    """The learner of `frontier` on a ground of a seed and a number of prompts."""
    return lambda seed, prompts: Learner(
        ground(seed, prompts), steps=kind(), learning_rate=rate, own=own, noise=noise, **nuisance
    )


def _cells(transfer: float, dead: float = 0.0, opposed: float = 0.0) -> Callable[[int, int], Ground]:
    return lambda seed, prompts: cells(
        seed, kinds=30, transfer=transfer, dead=dead, opposed=opposed, prompts=prompts
    )  # fmt: skip


def _traces(seed: int, prompts: int) -> Ground:
    return skilled(seed, tail=3.0, prompts=prompts)


def _pretrained(seed: int, prompts: int) -> Ground:
    return ladder(seed, common=0.24, prompts=prompts)


_WRONG = {"false_positive": 0.05, "false_negative": 0.05}
POPULATIONS: dict[str, Setting] = {
    "little transfer, κ .04": (_learner(_cells(0.1), 0.25, 1.2, 30), 80, 512),
    "strong transfer, κ .04": (_learner(_cells(0.7), 0.065, 1.2, 30), 80, 512),
    "κ .4": (_learner(_cells(0.1), 0.25, 8, 20), 80, 512),
    "κ 2": (_learner(_cells(0.1), 0.25, 24, 12), 80, 512),
    "dead prompts": (_learner(_cells(0.3, dead=0.5), 0.2, 1.2, 30), 80, 512),
    "verifier errors": (
        _learner(_cells(0.2, dead=0.15), 0.25, 2.4, 30, false_positive=0.05, false_negative=0.05),
        80,
        512,
    ),
    "lucky guesses": (_learner(_cells(0.3, opposed=0.32), 0.15, 2.4, 20), 80, 512),
    "falling agreement": (_learner(_cells(0.3), 0.12, 2.4, 20, agreement=0.16), 80, 512),
    "forgetting": (_learner(_cells(0.3), 0.15, 2.4, 20, forgetting=0.016), 80, 512),
    "calibrated, plain steps": (_learner(_traces, 0.054, 0, 30, kind=Plain), 100, 480),
    "calibrated, normalised steps": (_learner(_traces, 0.013, 8, 20, kind=Normalised), 100, 480),
    "like a pretrained model": (_learner(_pretrained, 0.26, 0.24, 1.5, agreement=0.36, forgetting=0.08), 45, 256),
}

Build = Callable[[Learner, int, int, int], Planner]  # of the population, n_bar, prompts a batch and the seed


def _groups(factor: int) -> Build:
    return lambda population, mean, batch, seed: GroupsOf(factor * mean, mean, batch)


def _recommended(pilot: Callable[[int], int | None]) -> Build:
    return lambda population, mean, batch, seed: GDROController.recommended(
        mean, 0, 3 * mean, pilot=pilot(mean), seed=seed
    )


def _staged(population: Learner, mean: int, batch: int, seed: int) -> Planner:
    """Its own choice, advantages stage by stage."""
    population.staged = True
    return RULES[OURS](population, mean, batch, seed)


def _peer(kind: type[Uniform]) -> Build:
    return lambda population, mean, batch, seed: kind(population, mean, own_stream(seed))


RULES: dict[str, Build] = {
    "uniform": _groups(1),
    "groups twice as large": _groups(2),
    "groups three times as large": _groups(3),
    "recommended": _recommended(lambda mean: 0),
    OURS: _recommended(lambda mean: None),
    "pilot, own choice, stage by stage": _staged,
    "pilot": _recommended(lambda mean: mean // 2),
    "Reinforce-Ada": _peer(ReinforceAda),
    "Pilot-Commit": _peer(PilotCommit),
    "AR3PO": _peer(AR3PO),
    "DAPO refill": _peer(DAPO),
}


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """Every rule on the same populations, batches and streams."""
    rows: list[Row] = []
    for seed in map(int, seeds):
        for epochs, mean in [(1, 8)] if quick else CASES:
            for name, (build, steps, rollouts) in POPULATIONS.items():
                length, batch = 3 if quick else steps, rollouts // mean
                for rule, planner in RULES.items():
                    population = build(seed, length * batch // epochs)
                    total = length * batch * mean
                    run = race(population, planner(population, mean, batch, seed), total, batch, seed)
                    spent = [row["rollouts"] for row in run]
                    end = {m: float(np.interp(total, spent, [row[m] for row in run])) for m in MEASURES}
                    labels = {"seed": seed, "population": name, "mean_rollouts": mean, "epochs": epochs, "rule": rule}
                    rows.append(labels | end | {"rollouts": spent[-1]})
    return rows


def gain(rows: list[Row], case: tuple[int, int], population: str, rule: str, measure: str, over: str) -> np.ndarray:
    """(seeds,) measure of a rule minus another's [points], paired by seed."""

    def of(name: str) -> np.ndarray:
        place = (*case, population, name)
        return np.array(
            [r[measure] for r in rows if (r["epochs"], r["mean_rollouts"], r["population"], r["rule"]) == place]
        )

    return np.asarray(100 * (of(rule) - of(over)))


def _cases(rows: list[Row]) -> list[tuple[int, int]]:
    return sorted({(r["epochs"], r["mean_rollouts"]) for r in rows})


def tabulate(rows: list[Row]) -> str:
    """Points minus uniform's, paired means with their 95 % intervals."""
    text = ["# Pilot and commit in few epochs", tabulate.__doc__ or ""]
    for case in _cases(rows):
        for measure, label in MEASURES.items():
            lines = [["population", *[rule for rule in RULES if rule != "uniform"]]]
            for population in POPULATIONS:
                parts = [mean_interval(gain(rows, case, population, rule, measure, "uniform")) for rule in lines[0][1:]]
                lines.append([population, *[with_interval(*part, "+.2f") for part in parts]])
            text += [f"## {label}, {case[0]} epochs, {case[1]} rollouts a prompt", markdown(lines, "<" * len(lines[0]))]
    return "\n\n".join(text) + "\n"


def judge(rows: list[Row]) -> Verdict:
    """Mean of both measures above -.3 everywhere; where the plan is not uniform's, the interval of mean@8 above 0.

    In more than two epochs the difference is from the rule of one stage.
    """
    holds, text = True, []
    for case in _cases(rows):
        over = "uniform" if case[0] <= 2 else "recommended"
        for population in POPULATIONS:
            solved, mean = (mean_interval(gain(rows, case, population, OURS, m, over)) for m in MEASURES)
            acts = case[0] <= 2 and float(np.abs(gain(rows, case, population, OURS, "mean_at_8", over)).max()) > 1e-6
            good = min(solved[0], mean[0]) > -0.3 and (mean[1] > 0 or not acts)
            holds &= bool(good)
            label = f"{population}, {case[0]} epochs, n_bar {case[1]}"
            points = f"{with_interval(*solved, '+.2f')} pass@8, {with_interval(*mean, '+.2f')} mean@8"
            text.append(f"{label}: {points}{'' if good else ' FAILS'}")
    return Verdict(holds, "; ".join(text))


def draw(rows: list[Row]) -> Figure:
    """Paired differences from uniform in one epoch, with 95 % intervals."""
    cases = [case for case in _cases(rows) if case[0] == 1]
    figure = Figure(figsize=(3.0 + 1.5 * len(cases), 3.8))
    axes = np.atleast_1d(figure.subplots(1, len(cases), sharey=True))
    for axis, case in zip(axes, cases, strict=True):
        for k, rule in enumerate((OURS, "pilot", "groups three times as large", "Pilot-Commit")):
            dots = np.array(
                [mean_interval(gain(rows, case, name, rule, "mean_at_8", "uniform")) for name in POPULATIONS]
            )
            place = np.arange(len(POPULATIONS)) + 0.15 * (k - 1.5)
            error = np.abs(dots[:, 1:].T - dots[:, 0])
            axis.errorbar(dots[:, 0], place, xerr=error, fmt="o", markersize=3, capsize=2, label=rule)
        axis.axvline(0, color="#555555", linewidth=0.8, linestyle="--", label="uniform")
        axis.set(title=f"{case[1]} rollouts a prompt", xlabel="mean@8 minus uniform's [points]")
    axes[0].set_yticks(range(len(POPULATIONS)), list(POPULATIONS))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure
