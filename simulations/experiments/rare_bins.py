"""Rare bins: what debiasing, share normalisation and weighting by observation chance do to what the adversary believes.

Five bins fail 0.1, 0.3, 0.5, 0.7, 0.9 of the time; the easiest and the hardest hold 2 % of the prompts each and are
absent from half of the batches of 32. Payoffs are errors of 4 rollouts, or noise without any signal (as F1 leaves it).
F9: q means a mixture of bins; what the learner optimises is the mixture of the weighted prompts, p_b w_b / sum p w.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gdro_core import Entropic, Hedge, NoRegret, PromptGDRO, PublishedPromptGDRO
from gdro_llm.intervals import mean_interval
from simulations.harness import Row, Verdict, table

CLAIM = (
    "Debiased scores find a rare hardest bin sooner; share normalisation hides it and amplifies rare bins' noise; "
    "importance weights give it the share q means, published weights a tenth of that"
)
SOURCE = "F9, Eq. 12-16, toy MATH study"
COLUMNS = {
    "seed": "independent repetition",
    "game": "how payoffs become scores",
    "payoff": "error | noise (mean 0, standard deviation 0.05 per prompt)",
    "step": "batches seen",
    "easy": "score of the rare easiest bin minus that of the middle bin; truth -0.4 (payoff)",
    "hard": "score of the rare hardest bin minus that of the middle bin; truth 0.4 (payoff)",
    "common": "score of the second bin minus that of the middle bin; truth -0.2 (payoff)",
    "found": "1 if the rare hardest bin has the greatest probability, else 0",
    "meant": "probability q of the rare hardest bin (1)",
    "given": "its share of the summed weights of prompts drawn by true shares (1); empty for Hedge without 1/o",
}
SEEDS, BLOCK = 200, 50
FAILING, SHARE = np.array([0.1, 0.3, 0.5, 0.7, 0.9]), np.array([0.02, 0.32, 0.32, 0.32, 0.02])
PROMPTS, ROLLOUTS, STEP_SIZE = 32, 4, 0.65
STEPS = (2, 5, 10, 20, 50, 100)
GAMES = ("debiased", "undebiased", "share-normalised", "Hedge", "Hedge without 1/o")


class _Unweighted:
    """Hedge on the losses 1 - l of the bins present, as if absence were a loss of 0."""

    def __init__(self) -> None:
        self.hedge = Hedge(FAILING.size, STEP_SIZE)

    @property
    def probabilities(self) -> np.ndarray:
        return self.hedge.probabilities

    def observe(self, bins: np.ndarray, payoff: np.ndarray) -> None:
        size = np.bincount(bins, minlength=FAILING.size)
        gain = np.bincount(bins, weights=payoff, minlength=FAILING.size) / np.maximum(size, 1)
        self.hedge.update(np.where(size > 0, 1.0 - gain, 0.0))


def _game(name: str, payoff: str) -> Any:
    """None where the combination is refused: Hedge needs a bounded payoff."""
    if name.startswith("Hedge"):
        hedge = PromptGDRO(FAILING.size, adversary=NoRegret(STEP_SIZE), uniform_reference=True)
        return None if payoff == "noise" else hedge if name == "Hedge" else _Unweighted()
    if name == "debiased":
        return PromptGDRO(FAILING.size, adversary=Entropic(STEP_SIZE), uniform_reference=True)
    return PublishedPromptGDRO(
        FAILING.size, step_size=STEP_SIZE, exploration=0.0, share_normalised=name == "share-normalised"
    )


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """All games see the same batches."""
    rows: list[Row] = []
    steps = STEPS[:3] if quick else STEPS
    for seed, payoff in product(seeds, ("error", "noise")):
        rng = np.random.default_rng(seed)
        games = {name: _game(name, payoff) for name in GAMES}
        games = {name: game for name, game in games.items() if game is not None}
        for step in range(1, steps[-1] + 1):
            bins = rng.choice(FAILING.size, PROMPTS, p=SHARE)
            errors = rng.binomial(ROLLOUTS, FAILING[bins]) / ROLLOUTS
            seen = errors if payoff == "error" else rng.normal(0.0, 0.05, PROMPTS)
            for game in games.values():
                game.observe(bins, seen)
            if step not in steps:
                continue
            for name, game in games.items():
                q = game.probabilities
                rounds = step if name.startswith("Hedge") else 1  # Hedge's score is a sum
                score = np.log(q / q[2]) / (STEP_SIZE * rounds)
                log_ratios = {"easy": score[0], "hard": score[4], "common": score[1]}
                common = {"seed": int(seed), "game": name, "payoff": payoff, "step": step}
                first = bool(q[4] > q[:4].max() + 1e-12)
                pull = SHARE * game.bin_weights if isinstance(game, PromptGDRO | PublishedPromptGDRO) else None
                given = "" if pull is None else float(pull[4] / pull.sum())
                rows.append(
                    {**common, **{k: float(v) for k, v in log_ratios.items()}, "found": int(first)}
                    | {"meant": float(q[4]), "given": given}
                )
    return rows


def judge(rows: list[Row]) -> Verdict:
    """Paired over seeds: share of the first 20 batches' checks in which the hardest bin leads; noise; Hedge's bias.

    Hedge is unbiased but for the estimated share of the bin, so that it is asked to remove nine tenths of the bias.
    """
    early = {name: table(rows, "found", "step", game=name, payoff="error")[1][:, :4].mean(axis=1) for name in GAMES}
    sooner = {name: mean_interval(early["debiased"] - early[name]) for name in GAMES[1:3]}
    holds = all(low > 0 for _, low, _ in sooner.values())
    findings = [f"found early {early[n].mean():.2f}" + f" ({n})" for n in GAMES]
    findings += [f"debiased minus {n} {m:+.2f} [{a:+.2f}, {b:+.2f}]" for n, (m, a, b) in sooner.items()]
    amplified = {}
    for name in GAMES[:3]:
        rare, common = (
            table(rows, key, "step", game=name, payoff="noise")[1][:, -1].std() for key in ("hard", "common")
        )
        amplified[name] = rare / common
    holds &= amplified["share-normalised"] > 3 * amplified["undebiased"]
    findings.append("noise of rare over common bin " + ", ".join(f"{r:.1f} ({n})" for n, r in amplified.items()))
    bias = {}
    for name in GAMES[3:]:
        for key, truth in (("easy", -0.4), ("hard", 0.4)):
            middle, low, high = mean_interval(table(rows, key, "step", game=name, payoff="error")[1][:, -1] - truth)
            findings.append(f"{name}: bias of the rare {key} bin {middle:+.3f} [{low:+.3f}, {high:+.3f}]")
            bias[name, key] = abs(middle)
    holds &= bias["Hedge", "easy"] < 0.1 * bias["Hedge without 1/o", "easy"]
    ratios = {}
    for name in GAMES[:2]:
        meant, given = (table(rows, key, "step", game=name, payoff="error")[1][:, -1] for key in ("meant", "given"))
        ratios[name] = mean_interval(given / meant)
        middle, low, high = ratios[name]
        findings.append(f"{name}: the rare hardest bin gets {middle:.2f} [{low:.2f}, {high:.2f}] of the share q means")
    holds &= ratios["debiased"][1] > 0.9 and ratios["debiased"][2] < 1.1 and ratios["undebiased"][2] < 0.2
    return Verdict(bool(holds), "; ".join(findings))


def draw(rows: list[Row]) -> Figure:
    """How often the hardest bin is found; what is believed of rare bins; what noise does; the share meant and given."""
    figure = Figure(figsize=(12.4, 3.4))
    axes = figure.subplots(1, 4)
    for name in GAMES:
        x, shares = table(rows, "found", "step", game=name, payoff="error")
        (line,) = axes[0].semilogx(x, shares.mean(axis=0), marker="o", markersize=3, label=name)
        for key, style in (("hard", "-"), ("easy", "--")):
            score = table(rows, key, "step", game=name, payoff="error")[1].mean(axis=0)
            axes[1].semilogx(x, score, color=line.get_color(), linestyle=style)
    for name in GAMES[:3]:
        for key, style in (("hard", "-"), ("common", ":")):
            x, score = table(rows, key, "step", game=name, payoff="noise")
            axes[2].loglog(x, np.maximum(score.std(axis=0), 1e-4), linestyle=style)
            axes[2].get_lines()[-1].set_color(axes[0].get_lines()[GAMES.index(name)].get_color())
    for name in GAMES[:3]:
        for key, style in (("given", "-"), ("meant", ":")):
            x, share = table(rows, key, "step", game=name, payoff="error")
            axes[3].semilogx(x, share.mean(axis=0), linestyle=style)
            axes[3].get_lines()[-1].set_color(axes[0].get_lines()[GAMES.index(name)].get_color())
    axes[3].set_ylim(0, 0.3)
    for truth in (-0.4, 0.4):
        axes[1].axhline(truth, color="#555555", linewidth=0.8)
    axes[0].set(title="rare hardest bin leads", xlabel="batches", ylabel="share of runs", ylim=(-0.03, 1.03))
    axes[1].set(title="rare hard (solid), rare easy (dashed)", xlabel="batches", ylabel="score less the middle bin's")
    axes[2].set(title="noise: rare (solid), common (dotted)", xlabel="batches", ylabel="s.d. of the score")
    axes[3].set(title="share given (solid), meant (dotted)", xlabel="batches", ylabel="share of the hardest bin")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure
