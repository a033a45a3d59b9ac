"""The run directory: append-only logs and checkpoints that are whole, absent, or known to be damaged.

1. A checkpoint is written into a hidden folder; its files, their manifest (size and SHA-256 of each) and the folder
   are flushed to the disk; one rename makes it `checkpoint-<step>`. A kill or a power cut at any moment leaves the old
   state or the new one.
2. It holds the model in Hugging Face format, `optimizer.safetensors`, `state.json` (progress and controller) and
   `manifest.json`. Nothing in it is ever unpickled.
3. It holds no scheduler, no random state and no data order: the learning rate is a function of the step, every draw is
   seeded by (seed, step) on every process, and so is the batch. The optimizer's settings are the configuration's.
4. The manifest also holds how long each log was, so that a resumed run goes on from exactly those lines.
5. One process trains in a run directory; the operating system gives up its lock when the process is gone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gdro_llm.config import Config, UsageError

KEEP = 2  # checkpoints of a run
LOGS = ("metrics.jsonl", "evaluations.jsonl", "timing.jsonl", "samples.jsonl")


def find_checkpoint(out: Path, config: Config, *, resume: bool, fresh: bool) -> Path | None:
    """The checkpoint to continue from, or None to start at step 0. Changes nothing.

    An existing run is neither overwritten nor continued unless asked for, nor continued under another configuration
    (`Config.conflicts`), from a damaged checkpoint, or while another process trains in it.
    """
    if not out.exists() or (out.is_dir() and {path.name for path in out.iterdir()} <= {".config.json.tmp", ".lock"}):
        return None  # nothing, or a run that was killed before it wrote its first file
    before = read_config(out)
    if before is None:  # a model folder, say, which --fresh must not delete
        raise UsageError(f"{out} is not empty and not a run directory; choose another --out")
    if not (fresh or resume):
        raise UsageError(f"{out} holds a run already: --resume continues it, --fresh deletes it and starts over")
    if (out / ".lock").exists():
        _lock(out).close()
    if fresh:
        return None
    if changed := [f"{key} {old!r} -> {new!r}" for key, (old, new) in config.conflicts(before).items()]:
        raise UsageError(f"{out} was started with another configuration ({', '.join(changed)}); choose another --out")
    return _newest_whole(out)


def open_run(out: Path, config: Config, checkpoint: Path | None, *, fresh: bool) -> IO[str]:
    """Make the run directory ready, logs as they were at the checkpoint (empty without one), and lock it.

    Returns:
        The lock: it holds until this is closed or the process ends.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = _lock(out)
    except OSError as error:
        raise UsageError(f"cannot make the run directory {out} ({error.strerror}); choose another --out") from error
    try:
        if not fresh and _newest(out) != checkpoint:
            raise UsageError(f"another process trained in {out} while this one started; --resume goes on from there")
        for path in out.iterdir():
            if (fresh and path.name != ".lock") or path.name.endswith(".tmp"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _rotate(out)  # a run killed before it could
        lengths = {} if checkpoint is None else json.loads((checkpoint / "manifest.json").read_bytes())["logs"]
        for name in LOGS:
            _cut(out / name, lengths.get(name, 0))
        write_file(out / "config.json", config.to_json())
    except BaseException:
        lock.close()
        raise
    return lock


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a log, and hand it to the operating system."""
    bad = [f"{key} = {value}" for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise UsageError(f"step {row['step']}: {', '.join(bad)}: not a number to log; {other_settings(path.parent)}")
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise _cannot_write(path, path.parent, str(error.strerror)) from error


def other_settings(out: Path) -> str:
    """The remedy for a run that diverges: a resumed one would do so again."""
    last = _newest(out)
    start = f" --model {last}" if last else ""
    return f"lower --learning-rate, or --passes and --minibatches, in another run: --out NEW{start}"


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, also after a power cut, sees the old one or the new one, never a part."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        _flush(scratch)
        os.replace(scratch, path)
        _flush(path.parent)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise _cannot_write(path, path.parent, str(error.strerror)) from error


def save_checkpoint(
    out: Path,
    step: int,
    write_model: Callable[[Path], None],
    optimizer: dict[str, torch.Tensor],
    state: dict[str, Any],
) -> None:
    """Write `checkpoint-<step>`, then drop all but the last `KEEP`. On one process only.

    Args:
        out: the run directory.
        step: steps done.
        write_model: writes the model in Hugging Face format into a folder.
        optimizer: of `optimizer_state.optimizer_state`.
        state: what else the run has to remember; JSON.

    Raises:
        UsageError: the disk does not take it. Earlier checkpoints stay as they are, the part is removed.
    """
    scratch, final = out / f".checkpoint-{step:06d}.tmp", out / f"checkpoint-{step:06d}"
    logs = [out / name for name in LOGS if (out / name).is_file()]
    try:
        with _disk_errors(final, out):
            scratch.mkdir()
            write_model(scratch)
            save_file(optimizer, scratch / "optimizer.safetensors")
            (scratch / "state.json").write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
            manifest = {
                "files": {
                    str(path.relative_to(scratch)): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                    for path in sorted(scratch.rglob("*"))
                    if path.is_file()
                },
                "logs": {log.name: log.stat().st_size for log in logs},
            }
            (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for path in [*logs, *scratch.rglob("*"), scratch]:
                _flush(path)
            os.replace(scratch, final)
            _flush(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _rotate(out)


def _rotate(out: Path) -> None:
    """Drop all checkpoints but the last `KEEP`."""
    for old in _checkpoints(out)[:-KEEP]:
        leaving = old.with_name(f".{old.name}.tmp")  # so that one deleted in part does not look damaged
        os.replace(old, leaving)
        shutil.rmtree(leaving)


def best_folder(out: Path, step: int) -> Path:
    """Where the weights lie that are the best so far."""
    return out / f"best-{step:06d}"


def save_best(best: Path, write_model: Callable[[Path], None]) -> None:
    """Write the model into a `best_folder`, in place of what an earlier run of this step left. On one process only.

    Raises:
        UsageError: the disk does not take it.
    """
    out = best.parent
    scratch, old = out / ".best.tmp", out / ".best-before.tmp"
    try:
        with _disk_errors(best, out):
            for left in (scratch, old):
                shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
            write_model(scratch)
            for path in (*scratch.rglob("*"), scratch):
                _flush(path)
            if best.exists():
                best.rename(old)
            scratch.rename(best)
            _flush(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def drop_best(out: Path, keep: set[int]) -> None:
    """Delete the best weights of all other steps. A checkpoint goes on from the best that it names: keep that, too."""
    for path in set(out.glob("best-*")) - {best_folder(out, step) for step in keep}:
        leaving = path.with_name(f".{path.name}.tmp")
        os.replace(path, leaving)
        shutil.rmtree(leaving)


def load_checkpoint(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's tensors, for `optimizer_state.load_optimizer_state`, and the state that were saved."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return load_file(checkpoint / "optimizer.safetensors"), state


def verify_checkpoint(checkpoint: Path) -> str:
    """What is wrong with a checkpoint by its manifest; "" if nothing is."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        lengths = {name: int(manifest["logs"][name]) for name in manifest["logs"]}
    except FileNotFoundError:
        return "manifest.json is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is unreadable"
    if not {"config.json", "optimizer.safetensors", "state.json"} <= expected.keys() or not lengths.keys() <= set(LOGS):
        return "manifest.json is incomplete"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != digest:
            return f"the content of {name} has changed"
    return ""


def _newest_whole(out: Path) -> Path | None:
    """The newest checkpoint, if it is whole; a damaged one is an error that names the newest whole one."""
    checkpoints = _checkpoints(out)
    if not checkpoints or not (wrong := verify_checkpoint(checkpoints[-1])):
        return checkpoints[-1] if checkpoints else None
    damaged = [f"{checkpoints[-1]} is damaged ({wrong})"]
    for index in range(len(checkpoints) - 2, -1, -1):
        if not (wrong := verify_checkpoint(checkpoints[index])):
            moves = " && ".join(
                f"mv {shlex.quote(str(path))} {shlex.quote(str(path.with_name('damaged-' + path.name)))}"
                for path in checkpoints[index + 1 :]
            )
            raise UsageError(
                f"{', '.join(damaged)}; {checkpoints[index].name} is whole. To go on from that one: {moves}, "
                "then --resume"
            )
        damaged.append(f"{checkpoints[index]} is damaged ({wrong})")
    raise UsageError(f"{', '.join(damaged)}, and there is no other; put back a copy, or start over with --fresh")


def _lock(out: Path) -> IO[str]:
    """Take the run directory for this process.

    A POSIX record lock: it works on network file systems, too, and a child process that outlives its parent does not
    inherit it.
    """
    file = (out / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "?"
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise UsageError(
            f"{out} is in use by process {holder}; wait until that one is done, or stop it; to train beside it, choose "
            "another --out"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def read_config(out: Path) -> dict[str, Any] | None:
    """The configuration of a run; None where `out` is none."""
    path = out / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON; put it back as it was, or choose another --out") from error
    return config if isinstance(config, dict) and {"controller", "mean_rollouts"} <= config.keys() else None


def _checkpoints(out: Path) -> list[Path]:
    """Oldest first."""
    named = [path for path in out.glob("checkpoint-*") if path.is_dir() and re.fullmatch(r"\d+", path.name[11:])]
    return sorted(named, key=lambda path: int(path.name[11:]))


def _newest(out: Path) -> Path | None:
    checkpoints = _checkpoints(out)
    return checkpoints[-1] if checkpoints else None


def _cut(log: Path, length: int) -> None:
    """Drop what a log says of steps after a checkpoint."""
    if not log.is_file():
        return
    if log.stat().st_size < length:
        raise UsageError(
            f"{log} has lost lines ({log.stat().st_size} bytes, {length} at the checkpoint); "
            "put it back, or delete it to go on without its earlier lines"
        )
    os.truncate(log, length)


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _disk_errors(what: Path, out: Path) -> Iterator[None]:
    """A UsageError for a disk that does not take a model; tokenizers report a full one as a bare Exception."""
    try:
        yield
    except Exception as error:  # re-raised, all of them
        if not isinstance(error, OSError | SafetensorError) and "(os error " not in str(error):
            raise
        raise _cannot_write(what, out, str(getattr(error, "strerror", None) or error)) from error


def _cannot_write(what: Path, out: Path, reason: str) -> UsageError:
    last, kept = _newest(out), ""
    if last:
        kept = f": {last} is whole and --resume goes on from it"
    elif (out / "config.json").is_file():
        kept = ": there is no checkpoint yet; start with --resume"
    return UsageError(f"cannot write {what} ({reason}); make room on the disk or repair it{kept}")
