"""The run directory: append-only logs and checkpoints that are either whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gdro_llm.config import Config, UsageError
from gdro_llm.policy import Policy

LOGS = ("metrics.jsonl", "evaluations.jsonl", "timing.jsonl", "samples.jsonl")


def open_run(out: Path, config: Config, *, resume: bool, fresh: bool) -> Path | None:
    """Make the run directory ready; the checkpoint to continue from, or None to start at step 0.

    An existing run is neither overwritten nor continued unless asked for, nor continued under another configuration.
    """
    if fresh and (out / "config.json").is_file():
        shutil.rmtree(out)
    if out.is_dir() and any(out.iterdir()):
        if not (out / "config.json").is_file():
            raise UsageError(f"{out} is not empty and not a run directory; choose another --out")
        if not resume:
            raise UsageError(f"{out} holds a run already: --resume continues it, --fresh deletes it and starts over")
        before, now = json.loads((out / "config.json").read_text(encoding="utf-8")), asdict(config)
        changed = [f"{key} {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]
        if changed:
            raise UsageError(
                f"{out} was started with another configuration ({', '.join(changed)}); choose another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "config.json", config.to_json())
    checkpoints = _checkpoints(out)
    step = int(checkpoints[-1].name.split("-")[1]) if checkpoints else -1
    for name in LOGS:
        if (out / name).is_file():
            _keep_until(out / name, step)
    return checkpoints[-1] if checkpoints else None


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a log."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def save_checkpoint(
    out: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int = 2
) -> None:
    """Write `checkpoint-<step>` (model in Hugging Face format, optimizer, state), then drop all but the last `keep`."""
    scratch, final = out / f".checkpoint-{step:06d}.tmp", out / f"checkpoint-{step:06d}"
    shutil.rmtree(scratch, ignore_errors=True)
    policy.save(scratch)
    torch.save(optimizer.state_dict(), scratch / "optimizer.pt")
    (scratch / "state.json").write_text(json.dumps(state), encoding="utf-8")
    if final.exists():
        shutil.rmtree(final)
    os.replace(scratch, final)
    for old in _checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def load_state(checkpoint: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore the optimizer; the state that was saved with it."""
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def _checkpoints(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("checkpoint-*") if path.is_dir())


def _keep_until(log: Path, step: int) -> None:
    """Drop what a log says of steps after `step`, and a last line that was cut off."""
    lines = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    write_text(log, "".join(line for line in lines if json.loads(line)["step"] <= step))
