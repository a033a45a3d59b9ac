"""What is known of a prompt before a visit, with a fixed and with a learnt prior, on the traces of a real GRPO run.

Every `spacing`-th visit of a trace is kept, other ones for other prompts, so that a prompt is seen again after as many
steps of training as in a run on more prompts. Steps are batches of about 100 prompts; of a visit's 8 rollouts a rule is
shown `rollouts`, drawn at random, and its prediction for the visit was made from the visits before. It is scored by all
8. Intervals are percentiles over resampled prompts: what another sample of prompts of the same run would have shown.
The constants of `LearntPrior` were set on these same traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gdro_core import LearntPrior, OnlineDifficultyClassifier
from simulations.experiments.trace_replay import GROUP, traces
from simulations.harness import Row, Verdict

CLAIM = (
    "On a real run a prior and a common improvement, learnt as it goes, predict first visits and visits from the "
    "fourth on better than a fixed prior, and no visit worse; the learnt prior alone does not"
)
SOURCE = "The learnt prior; traces"
COLUMNS = {
    "seed": "resample of the prompts",
    "spacing": "visits of the run from one kept visit of a prompt to the next",
    "rollouts": "that a rule is shown at a visit",
    "rule": "what is learnt",
    "visit": "1, 2, 3, or 4 for all later ones",
    "bin": "tenth of the prediction, lowest = 0; -1 for all",
    "measure": "log_loss [nats / rollout]; predicted, right: mean in a bin; share: of a bin among the visit's prompts",
    "value": "mean over prompts",
}
SEEDS, BLOCK = 200, 50
NEEDS_DATA = True
BATCH, LATER = 100, 4
SETTINGS = ((1, 8), (1, 4), (6, 8), (6, 4), (15, 4))  # spacing, rollouts
DRAWN = (6, 4)  # the setting of the figure's calibration


class _Resting(LearntPrior):
    """Learns the prior, and takes prompts to stand still."""

    def moved(
        self, a: NDArray[np.float64], b: NDArray[np.float64], age: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return a, b


class _Uninformed(LearntPrior):
    """Learns the improvement, and keeps the prior."""

    parameters = (0.5, 0.5)


RULES: dict[str, Callable[[], OnlineDifficultyClassifier]] = {
    "fixed": OnlineDifficultyClassifier,
    "prior alone": lambda: OnlineDifficultyClassifier(prior=_Resting()),
    "improvement alone": lambda: OnlineDifficultyClassifier(prior=_Uninformed()),
    "learnt": lambda: OnlineDifficultyClassifier(prior=LearntPrior()),
}


def simulate(seeds: np.ndarray, quick: bool) -> list[Row]:
    """One pass of every rule a block of seeds; a seed resamples the prompts that are scored."""
    right = traces()[:, : 13 if quick else None]
    weights = [np.bincount(np.random.default_rng(s).integers(right.shape[0], size=right.shape[0])) for s in seeds]
    sizes = [np.pad(w, (0, right.shape[0] - w.size)) for w in weights]
    rows: list[Row] = []
    for spacing, rollouts in SETTINGS:
        for rule, build in RULES.items():
            rng = np.random.default_rng([int(seeds[0]), spacing, rollouts])
            for visit, prompts, p, accuracy in _by_visit(_replayed(build(), right, spacing, rollouts, rng)):
                labels = {"spacing": spacing, "rollouts": rollouts, "rule": rule, "visit": visit}
                loss = -accuracy * np.log(p) - (1.0 - accuracy) * np.log1p(-p)
                tenth = np.minimum((10 * p).astype(np.int64), 9)
                for seed, size in zip(seeds, sizes, strict=True):
                    w = size[prompts]

                    def note(place: int, measure: str, value: float, labels: Row = labels, seed: int = seed) -> None:
                        rows.append({"seed": int(seed), **labels, "bin": place, "measure": measure, "value": value})

                    note(-1, "log_loss", float(np.average(loss, weights=w)))
                    if (spacing, rollouts) == DRAWN and rule in ("fixed", "learnt"):
                        inside = np.bincount(tenth, w, minlength=10)
                        for k in np.flatnonzero(inside):
                            note(int(k), "share", float(inside[k] / w.sum()))
                            for measure, values in (("predicted", p), ("right", accuracy)):
                                total = float((w * values)[tenth == k].sum())
                                note(int(k), measure, total / float(inside[k]))
    return rows


Visits = tuple[int, NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]  # visit, prompts, predicted, accuracy


def _replayed(
    classifier: OnlineDifficultyClassifier,
    right: NDArray[np.int64],
    spacing: int,
    rollouts: int,
    rng: np.random.Generator,
) -> Iterator[Visits]:
    phase = rng.integers(spacing, size=right.shape[0])
    for t in range(right.shape[1]):
        order = rng.permutation(np.flatnonzero(phase == t % spacing))
        for rows in np.array_split(order, max(1, order.size // BATCH)):
            hits = right[rows, t]
            yield t // spacing + 1, rows, classifier.pass_rate(rows), hits / GROUP
            classifier.observe(rows, rng.hypergeometric(hits, GROUP - hits, rollouts), np.full(rows.size, rollouts))


def _by_visit(steps: Iterator[Visits]) -> list[Visits]:
    """Batches of one visit joined; later ones count as `LATER`."""
    parts: dict[int, list[Visits]] = {}
    for step in steps:
        parts.setdefault(min(step[0], LATER), []).append(step)
    return [
        (visit, *(np.concatenate([part[k] for part in batches]) for k in (1, 2, 3)))  # type: ignore[misc]
        for visit, batches in sorted(parts.items())
    ]


def _losses(rows: list[Row], setting: tuple[int, int], rule: str, visit: int) -> NDArray[np.float64]:
    place = (*setting, rule, visit, "log_loss")
    return np.array(
        [r["value"] for r in rows if (r["spacing"], r["rollouts"], r["rule"], r["visit"], r["measure"]) == place]
    )


def _gain(rows: list[Row], setting: tuple[int, int], rule: str, visit: int) -> tuple[float, float, float]:
    """Log loss less the fixed prior's, with its 2.5 and 97.5 % points over resamples."""
    difference = _losses(rows, setting, rule, visit) - _losses(rows, setting, "fixed", visit)
    low, high = np.quantile(difference, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def _visits(rows: list[Row], setting: tuple[int, int]) -> list[int]:
    return sorted({r["visit"] for r in rows if (r["spacing"], r["rollouts"]) == setting})


def tabulate(rows: list[Row]) -> str:
    """Log loss of the next visit less the fixed prior's [nats / rollout], with 95 % intervals over prompts."""
    from gdro_llm.measuring.tables import markdown, with_interval

    lines = [["spacing", "rollouts", "visit", "fixed", *[rule for rule in RULES if rule != "fixed"]]]
    for setting in SETTINGS:
        for visit in _visits(rows, setting):
            level = _losses(rows, setting, "fixed", visit).mean()
            cells = [with_interval(*_gain(rows, setting, rule, visit), "+.4f") for rule in RULES if rule != "fixed"]
            lines.append([*map(str, setting), f"{visit}{'+' * (visit == LATER)}", f"{level:.4f}", *cells])
    return f"# Prediction of the next visit\n\n{tabulate.__doc__}\n\n{markdown(lines, '>>>>>>>')}\n"


def judge(rows: list[Row]) -> Verdict:
    """Learnt: intervals below 0 at visits 1 and 4+, none above 0. Prior alone: some interval above 0."""
    gains = {
        (setting, visit): {rule: _gain(rows, setting, rule, visit) for rule in RULES if rule != "fixed"}
        for setting in SETTINGS
        for visit in _visits(rows, setting)
    }
    learnt = {place: gain["learnt"] for place, gain in gains.items()}
    better = all(high < 0 for (_, visit), (_, _, high) in learnt.items() if visit in (1, LATER))
    holds = better and all(low <= 0 for _, low, _ in learnt.values())
    holds &= any(gain["prior alone"][1] > 0 for gain in gains.values())
    findings = []
    for (spacing, rollouts), visit in gains:
        for rule, (mean, low, high) in gains[(spacing, rollouts), visit].items():
            text = f"spacing {spacing}, {rollouts} rollouts, visit {visit}, {rule}"
            findings.append(f"{text} {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    return Verdict(bool(holds), "; ".join(findings) + " (log loss less the fixed prior's, intervals over prompts)")


def draw(rows: list[Row]) -> Figure:
    """Left: what each part brings, by visit. Right: right answers over predictions, by visit."""
    figure = Figure(figsize=(7.4, 3.2))
    left, *right = figure.subplots(1, 4, width_ratios=[1.6, 1, 1, 1])
    visits = _visits(rows, DRAWN)
    for k, rule in enumerate(rule for rule in RULES if rule != "fixed"):
        dots = np.array([_gain(rows, DRAWN, rule, visit) for visit in visits[1:]])
        error = np.abs(dots[:, 1:].T - dots[:, 0])
        left.errorbar(np.array(visits[1:]) + 0.15 * (k - 1), dots[:, 0], yerr=error, fmt="o", capsize=2, label=rule)
    left.axhline(0.0, color="black", linewidth=0.8)
    left.set(xlabel="visit", title="Log loss less the fixed prior's")
    left.set_xticks(visits[1:], [f"{visit}{'+' * (visit == LATER)}" for visit in visits[1:]])
    left.legend(loc="upper right")
    for axis, visit in zip(right, visits[1:], strict=False):
        for rule in ("fixed", "learnt"):
            axis.plot(*_calibration(rows, rule, visit), "o-", markersize=3, label=rule)
        axis.plot([0, 1], [0, 1], color="black", linewidth=0.8)
        axis.set(title=f"Visit {visit}{'+' * (visit == LATER)}", xlabel="predicted")
    right[0].set_ylabel("right")
    right[0].legend(loc="upper left")
    return figure


def _calibration(rows: list[Row], rule: str, visit: int) -> tuple[list[float], list[float]]:
    means: dict[str, list[float]] = {"predicted": [], "right": []}
    kept = [r for r in rows if r["bin"] >= 0 and (r["rule"], r["visit"]) == (rule, visit)]
    for k in sorted({r["bin"] for r in kept}):
        for measure, into in means.items():
            into.append(float(np.mean([r["value"] for r in kept if (r["bin"], r["measure"]) == (k, measure)])))
    return means["predicted"], means["right"]
