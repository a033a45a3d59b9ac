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


def find_checkpoint(out: Path, config: Config, *, resume: bool, fresh: bool) -> Path | None:
    """The checkpoint to continue from, or None to start at step 0. Changes nothing.

    An existing run is neither overwritten nor continued unless asked for, nor continued under another configuration.
    """
    if not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= {".config.json.tmp"}):
        return None  # nothing, or a run killed before its first file stood
    before = _read_config(out)
    if before is None:  # a model folder, say, which --fresh must not delete
        raise UsageError(f"{out} is not empty and not a run directory; choose another --out")
    if fresh:
        return None
    if not resume:
        raise UsageError(f"{out} holds a run already: --resume continues it, --fresh deletes it and starts over")
    now = asdict(config)
    changed = [f"{key} {before.get(key)!r} -> {now[key]!r}" for key in now if before.get(key) != now[key]]
    if changed:
        raise UsageError(f"{out} was started with another configuration ({', '.join(changed)}); choose another --out")
    return max(_checkpoints(out), default=None)


def open_run(out: Path, config: Config, checkpoint: Path | None, *, fresh: bool) -> None:
    """Make the run directory ready: logs as they were at the checkpoint, empty without one."""
    if fresh and out.exists():
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the run directory {out} ({error.strerror}); choose another --out") from error
    write_text(out / "config.json", config.to_json())
    step = -1 if checkpoint is None else int(checkpoint.name.split("-")[1])
    for name in LOGS:
        if (out / name).is_file():
            _keep_until(out / name, step)


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
    os.replace(scratch, final)
    for old in _checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def load_state(checkpoint: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore the optimizer; the state that was saved with it."""
    optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def _read_config(out: Path) -> dict[str, Any] | None:
    """The configuration of a run; None where `out` is none."""
    if not (out / "config.json").is_file():
        return None
    found = json.loads((out / "config.json").read_text(encoding="utf-8"))
    return found if {"controller", "mean_rollouts"} <= found.keys() else None


def _checkpoints(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("checkpoint-*") if path.is_dir())


def _keep_until(log: Path, step: int) -> None:
    """Drop what a log says of steps after `step`, and a last line that was cut off."""
    lines = log.read_bytes().split(b"\n")[:-1]  # only "\n" ends a line: texts may hold other line separators
    write_text(log, "".join(f"{line.decode()}\n" for line in lines if json.loads(line)["step"] <= step))
