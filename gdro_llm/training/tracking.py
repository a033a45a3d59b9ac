"""Scalars of a run to TensorBoard and Weights & Biases, besides the files that every run writes (`log_to`).

Both get the same numbers under the names of `flatten`, as TRL and verl are by the adapters, with `gdro/` before
them. A list is one number a bin, `bin_error/bin00`, and a `None` in it (a bin without prompts) is a point that is not
drawn. A resumed run continues its curves: TensorBoard drops what came after the checkpoint, W&B gets the same run
again, whose id lies in the run directory, with `step` as its axis.
"""

from __future__ import annotations

import importlib
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdro_llm.config import Config, UsageError

RUN_ID = "wandb-run-id.txt"


class Tracker:
    """Sends metrics to what `config.log_to` names, and nowhere where it names nothing. One process of a run holds one.

    Args:
        config: of the run.
        out: run directory, which exists.
        step: of the checkpoint that the run continues from; 0 for a new run.

    Raises:
        UsageError: a package is missing.
    """

    def __init__(self, config: Config, out: Path, *, step: int = 0) -> None:
        modules = import_trackers(config)
        self._wandb = _open_wandb(modules["wandb"], config, out) if "wandb" in modules else None
        self._tensorboard: Any = None
        if "tensorboard" in modules:
            purge = step + 1 if step else None
            self._tensorboard = modules["tensorboard"].SummaryWriter(str(out / "tensorboard"), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the finite numbers in `metrics`; texts and missing values are left out."""
        if self._tensorboard is None and self._wandb is None:
            return
        numbers = flatten(metrics)
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": step})

    def close(self) -> None:
        """Write out what is still held back."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def flatten(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Finite numbers by name: lists become `name/bin00` ..., mappings `name/key`; texts and None are left out.

    >>> flatten({"reward": 0.5, "bin_error": [0.25, None], "time": {"sample": 2}, "note": "x"})
    {'reward': 0.5, 'bin_error/bin00': 0.25, 'time/sample': 2.0}
    """
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, (list, tuple)):
            value = {f"bin{i:02d}": entry for i, entry in enumerate(value)}
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{key}": number for key, number in flatten(value).items()}
        elif isinstance(value, (int, float)) and math.isfinite(value):
            numbers[name] = float(value)
    return numbers


def import_trackers(config: Config) -> dict[str, Any]:
    """The modules of what `log_to` names, or a UsageError that says which package to install."""
    names = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
    modules = {}
    for name in filter(None, config.log_to.split(",")):
        try:
            modules[name] = importlib.import_module(names[name])
        except ImportError as error:
            raise UsageError(f"log_to {name} needs the package {name}: pip install {name}") from error
    return modules


def _open_wandb(wandb: Any, config: Config, out: Path) -> Any:
    path = out / RUN_ID
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "gdro"),
        name=out.name,
        id=path.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(out),
        config=asdict(config),
    )
    run.define_metric("*", step_metric="step")  # W&B's own counter cannot go back to a checkpoint
    return run
