"""Paired differences between two controllers over seeds: `make seeds`, or `python -m gdro_llm.seeds FOLDER`.

FOLDER holds runs named SEED-CONTROLLER; the first controller is `grpo`. Runs of one seed share warm start, prompt order
and total rollouts, so their difference is free of what the seed does to both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from gdro_llm.config import UsageError


def paired_table(folder: Path, controller: str = "recommended", baseline: str = "grpo") -> str:
    """Mean ± standard error over seeds of the last evaluations' exact rates, `controller` minus `baseline` [points].

    Raises:
        UsageError: fewer than two seeds have both runs, or a pair did not spend the same rollouts.
    """
    seeds = sorted(p.name.removesuffix(f"-{baseline}") for p in folder.glob(f"*-{baseline}"))
    seeds = [seed for seed in seeds if (folder / f"{seed}-{controller}" / "evaluations.jsonl").is_file()]
    if len(seeds) < 2:
        raise UsageError(f"{folder} must hold runs SEED-{baseline} and SEED-{controller} of two seeds or more")
    last = {
        name: [
            json.loads((folder / f"{seed}-{name}" / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()[-1])
            for seed in seeds
        ]
        for name in (baseline, controller)
    }
    for seed, one, other in zip(seeds, last[baseline], last[controller], strict=True):
        if one["rollouts"] != other["rollouts"]:
            raise UsageError(f"seed {seed}: the runs spent {one['rollouts']} and {other['rollouts']} rollouts")
    lines = [f"{controller} minus {baseline}, seeds {', '.join(seeds)}, points ± standard error over seeds"]
    for metric in [key for key in last[baseline][0] if key.startswith("exact_")]:
        for level in ("all", *last[baseline][0]["by_level"]):
            rates = [
                np.array([(row if level == "all" else row["by_level"][level])[metric] for row in last[name]])
                for name in (baseline, controller)
            ]
            gain = 100 * (rates[1] - rates[0])
            lines.append(f"{metric:14} {level:7} {gain.mean():+6.1f} ± {gain.std(ddof=1) / np.sqrt(len(seeds)):.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(paired_table(Path(sys.argv[1])))
