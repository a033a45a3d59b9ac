"""The weights that are best on the validation problems, kept in the run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdro_llm.engine.workers import Workers
from gdro_llm.training.checkpoint import best_folder, drop_best, save_best


class BestWeights:
    """The highest validation pass@k so far (the first, of equal ones), and where its weights are.

    The best weights of the last checkpoint are kept beside them: a run that resumes from it needs them.
    """

    def __init__(self, out: Path, workers: Workers) -> None:
        self.out, self.workers = out, workers
        self.step, self.rollouts, self.rate = 0, 0, -1.0
        self._of_checkpoint = 0  # step of the best weights that the last checkpoint names

    @property
    def folder(self) -> Path:
        """The weights."""
        return best_folder(self.out, self.step)

    def offer(self, rate: float, step: int, rollouts: int, write_model: Callable[[Path], None]) -> None:
        """Keep the present weights if they are better than all before; all processes call it together.

        Args:
            rate: validation pass@k.
            step: steps done.
            rollouts: spent.
            write_model: writes the model into a folder; gathers the weights, so that every process has to call it.
        """
        if rate <= self.rate:
            return
        self.step, self.rollouts, self.rate = step, rollouts, rate
        if self.workers.rank == 0:
            save_best(self.folder, write_model)
            drop_best(self.out, {step, self._of_checkpoint})
        else:
            write_model(self.out)  # takes part in gathering the weights, writes nothing
        self.workers.barrier()

    def checkpoint_saved(self) -> None:
        """The last checkpoint names the present best weights: delete the others. On one process only."""
        drop_best(self.out, {self.step})
        self._of_checkpoint = self.step

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"step": self.step, "rollouts": self.rollouts, "rate": self.rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's."""
        self.step, self.rollouts, self.rate = state["step"], state["rollouts"], state["rate"]
        self._of_checkpoint = self.step
