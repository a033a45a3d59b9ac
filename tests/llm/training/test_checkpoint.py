"""Checkpoints that cannot be trusted, full disks, runs that are busy or diverge: each is detected and reported."""

import contextlib
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from test_run_directory import assert_same_end, assert_same_run, files
from torch.distributed.fsdp import fully_shard

import gdro_llm.training.batch as batch
import gdro_llm.training.checkpoint as checkpoint
import gdro_llm.training.trainer as trainer
from gdro_llm.config import UsageError
from gdro_llm.engine.policy import load_policy
from gdro_llm.training.optimizer_state import load_optimizer_state, optimizer_state
from gdro_llm.training.trainer import train


@pytest.fixture
def finished(run_config, tmp_path):
    """An uninterrupted run with checkpoints at 4 and 6."""
    train(run_config(), tmp_path / "finished")
    return tmp_path / "finished"


def in_a_child(work, *, wait: bool = True):
    """The message of the UsageError that `work` raises in a child process ("" if none); without `wait` its id.

    The child's exit code is 1 where it raised something else.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        message, code = b"another exception", 1
        try:
            work()
            message, code = b"", 0
        except UsageError as error:
            message, code = str(error).encode(), 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os.write(write, message)
            os._exit(code)
    os.close(write)
    if not wait:
        os.close(read)
        return child
    with open(read, "rb") as pipe:
        message = pipe.read().decode()
    os.waitpid(child, 0)
    return message


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": (truncate, r"model.safetensors has 1000 bytes instead of \d+"),
    "flipped": (
        lambda folder: flip(folder / "optimizer.safetensors", -1),
        "the content of optimizer.safetensors has ch",
    ),
    "missing": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (lambda folder: os.truncate(folder / "manifest.json", 50), "manifest.json is unreadable"),
    "empty manifest": (
        lambda folder: (folder / "manifest.json").write_text('{"files": {}, "logs": {}}'),
        "manifest.json is incomplete",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered(run_config, finished, tmp_path, name):
    """Nothing is touched; the offered command, run as it stands, leads to the same end as the uninterrupted run."""
    spoil, reason = DAMAGES[name]
    out = tmp_path / "a run"  # the space wants quoting
    train(run_config(), out)
    spoil(out / "checkpoint-000006")
    before = files(out)
    with pytest.raises(UsageError, match=rf"checkpoint-000006 is damaged \({reason}.*checkpoint-000004 is whole") as e:
        train(run_config(), out, resume=True)
    assert files(out) == before
    command = re.search(r"To go on from that one: (.*), then --resume", str(e.value))[1]
    subprocess.run(command, shell=True, check=True)
    train(run_config(), out, resume=True)
    assert_same_end(out, finished)


def test_where_all_checkpoints_are_damaged_the_run_says_so(run_config, finished):
    """With what is wrong with each; --fresh, as it says, starts over."""
    expected = files(finished)
    truncate(finished / "checkpoint-000004")
    (finished / "checkpoint-000006" / "config.json").unlink()
    with pytest.raises(UsageError, match=r"000006 is damaged \(config.*000004 is damaged \(model.*no other.*--fresh"):
        train(run_config(), finished, resume=True)
    train(run_config(), finished, fresh=True)
    assert files(finished) == expected


def test_one_flipped_bit_anywhere_in_a_checkpoint_is_found(finished):
    """Every file, manifest included (where a flip in white space or the like may be harmless), at random places."""
    folder = finished / "checkpoint-000006"
    assert checkpoint.verify_checkpoint(folder) == ""
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        for at in rng.integers(path.stat().st_size, size=5).tolist():
            flip(path, at)
            assert checkpoint.verify_checkpoint(folder) or path.name == "manifest.json", (path, at)
            flip(path, at)
    detected = 0
    manifest = folder / "manifest.json"
    places = [match.start() + 10 for match in re.finditer('"sha256": "', manifest.read_text())]
    for at in places:
        flip(manifest, at + 2)
        detected += bool(checkpoint.verify_checkpoint(folder))
        flip(manifest, at + 2)
    assert detected == len(places) >= 6


def test_lost_log_lines_are_noticed(run_config, finished):
    """A log that is shorter than at the checkpoint; deleting it, as the message says, goes on without them."""
    log = finished / "samples.jsonl"
    os.truncate(log, 10)
    with pytest.raises(UsageError, match=r"samples.jsonl has lost lines \(10 bytes, \d+ at the checkpoint\).*delete"):
        train(run_config(), finished, resume=True)
    log.unlink()
    train(run_config(), finished, resume=True)


def test_an_unreadable_config_is_a_mistake_with_a_remedy(run_config, finished):
    (finished / "config.json").write_text('{"half": ')
    with pytest.raises(UsageError, match=r"config.json is not valid JSON; put it back"):
        train(run_config(), finished, resume=True)


def limit_file_size(limit: int) -> None:
    """Writing beyond so many bytes fails with EFBIG (Python ignores SIGXFSZ): a full disk without a disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [500, 20_000])
def test_a_full_disk_while_saving_leaves_the_last_checkpoint_and_no_scraps(run_config, finished, tmp_path, limit):
    """The message has the remedy; once there is room, --resume leads to the uninterrupted run."""
    out = tmp_path / "full"

    def work() -> None:
        save, calls = trainer.save_checkpoint, iter(range(10**9))

        def save_on_a_full_disk(*args):
            if next(calls) == 1:
                limit_file_size(limit)
            save(*args)

        trainer.save_checkpoint = save_on_a_full_disk
        train(run_config(), out)

    message = in_a_child(work)
    assert re.search(r"cannot write .*checkpoint-000004 \(.*File too large.*make room.*checkpoint-000002 is w", message)
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-000002"]
    assert [path.name for path in out.glob(".*")] == [".lock"]
    assert checkpoint.verify_checkpoint(out / "checkpoint-000002") == ""
    train(run_config(), out, resume=True)
    assert_same_run(out, finished)


def test_a_full_disk_is_recognised_in_what_a_tokenizer_raises(tiny, tmp_path):
    """It comes as a bare Exception from Rust; other exceptions of the writer are passed on as they are."""

    def work() -> None:
        limit_file_size(300)
        checkpoint.save_checkpoint(tmp_path, 1, tiny.tokenizer.backend_tokenizer_save, {}, {})

    def save(folder: Path) -> None:
        tiny.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))

    tiny.tokenizer.backend_tokenizer_save = save
    (tmp_path / "config.json").write_text("{}")
    message = in_a_child(work)
    assert re.search(r"cannot write .*checkpoint-000001 \(File too large.*no checkpoint yet", message)

    def bug(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        checkpoint.save_checkpoint(tmp_path, 1, bug, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_full_disk_while_logging_stops_the_run_and_loses_nothing(run_config, finished, tmp_path):
    """Half a line stays; the resumed run cuts it off."""
    out = tmp_path / "full"

    def work() -> None:
        append = trainer.append

        def append_on_a_full_disk(path, row):
            if path.name == "metrics.jsonl" and row["step"] == 4:
                limit_file_size(path.stat().st_size + 50)
            append(path, row)

        trainer.append = append_on_a_full_disk
        train(run_config(), out)

    assert re.search(r"cannot write .*metrics.jsonl \(File too large\).*checkpoint-000002 is whole", in_a_child(work))
    assert not (out / "metrics.jsonl").read_bytes().endswith(b"\n")
    train(run_config(), out, resume=True)
    assert_same_run(out, finished)


def test_a_loss_that_is_no_number_stops_the_run_before_the_weights_are_spoiled(
    run_config, finished, tmp_path, monkeypatch
):
    """The message names the step and the remedy; the run as it was can go on from its checkpoint."""
    out, advantages, calls = tmp_path / "diverged", batch.group_advantages, iter(range(10**9))
    steps = []
    with monkeypatch.context() as patch:

        def infinite_in_step_4(*args, **kwargs):
            centred = advantages(*args, **kwargs)
            return np.full_like(centred, np.inf) if next(calls) == 3 else centred

        patch.setattr(batch, "group_advantages", infinite_in_step_4)
        step = torch.optim.AdamW.step
        patch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (steps.append(1), step(*a, **k))[1])
        with pytest.raises(
            UsageError, match=r"step 4: mini-batch 1 .*loss .*lower --learning-rate.*--model .*checkpoint-000002"
        ):
            train(run_config(), out)
    assert len(steps) == 3
    train(run_config(), out, resume=True)
    assert_same_run(out, finished)


def test_one_process_at_a_time_trains_in_a_run_directory(run_config, finished, tmp_path):
    """A second one is refused whatever its flags, and let in as soon as the first is gone, even by SIGKILL."""
    out = tmp_path / "busy"

    def work() -> None:
        append = trainer.append

        def slow(path, row):
            append(path, row)
            if row["step"] == 3:
                (tmp_path / "reached").touch()
                time.sleep(60)

        trainer.append = slow
        train(run_config(), out)

    child = in_a_child(work, wait=False)
    try:
        while not (tmp_path / "reached").exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.002)
        before = files(out)
        for flags in ({"resume": True}, {"fresh": True}):
            with pytest.raises(UsageError, match=rf"busy is in use by process {child} on .*wait until"):
                train(run_config(), out, **flags)
        assert files(out) == before
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    train(run_config(), out, resume=True)
    assert_same_run(out, finished)


def test_a_run_that_moved_on_while_another_process_loaded_its_model_is_not_rewound(run_config, finished):
    """The checkpoint found before loading must still be the newest when the directory is locked."""
    before = files(finished)
    for newest in (None, finished / "checkpoint-000004"):
        with pytest.raises(UsageError, match="another process trained in"):
            checkpoint.open_run(finished, run_config(), newest, fresh=False)
    assert files(finished) == before
    train(run_config(), finished, resume=True)  # the refusal gave the lock back


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_nothing_in_a_run_directory_is_unpickled(run_config, finished, tmp_path):
    """Pickles in place of any file, under the names that torch, transformers and trainers use, with a manifest made to
    fit: none is run, by anything that a resumed run reads with."""
    marker, folder = tmp_path / "unpickled", finished / "checkpoint-000006"
    torch.save(Bomb(marker), tmp_path / "bomb")
    torch.load(tmp_path / "bomb", weights_only=False)
    assert marker.exists(), "the trap works"
    marker.unlink()
    original = {path.name: path.read_bytes() for path in folder.iterdir()}
    extra = ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
    for name in [*(set(original) - {"manifest.json"}), *extra]:
        if name in extra:
            (folder / "model.safetensors").unlink()
            if name == "optimizer.pt":
                (folder / "optimizer.safetensors").unlink()
        for content in ((tmp_path / "bomb").read_bytes(), pickle.dumps(Bomb(marker))):
            (folder / name).write_bytes(content)
            manifest = json.loads(original["manifest.json"])
            manifest["files"] = {
                path.name: {"bytes": path.stat().st_size, "sha256": checkpoint._sha256(path)}
                for path in folder.iterdir()
                if path.name != "manifest.json"
            }
            (folder / "manifest.json").write_text(json.dumps(manifest))
            for read in (
                lambda: checkpoint.find_checkpoint(finished, run_config(), resume=True, fresh=False),
                lambda: load_policy(run_config(), folder),
                lambda: checkpoint.load_checkpoint(folder),
            ):
                with contextlib.suppress(Exception):  # some files are refused, some not looked at
                    read()
            assert not marker.exists(), name
        for path in folder.iterdir():
            path.unlink()
        for kept, content in original.items():
            (folder / kept).write_bytes(content)
    train(run_config(), finished, resume=True)


def trained(config, optimizer_class=torch.optim.AdamW, steps: int = 2, shard: bool = False):
    """Model, optimizer and named parameters after a few steps on fixed gradients; one parameter never gets any."""
    model = load_policy(config).model
    if shard:
        fully_shard(model)
    named = list(model.named_parameters())
    optimizer = optimizer_class([p for _, p in named], lr=0.01)
    for step in range(steps):
        for i, (_, parameter) in enumerate(named[1:]):
            full = torch.full(parameter.shape, float(np.sin(step + i)))
            parameter.grad = checkpoint_like(full, parameter)
        optimizer.step()
    return model, optimizer, named


def checkpoint_like(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, sharded as a parameter is."""
    if not hasattr(parameter, "placements"):
        return full
    return torch.distributed.tensor.distribute_tensor(full, parameter.device_mesh, parameter.placements)


def test_optimizer_state_makes_the_round_trip_by_name(tiny_config):
    """Into a fresh optimizer with groups in another order; no state stays no state; unknown names are refused."""
    _, optimizer, named = trained(tiny_config())
    state = optimizer_state(optimizer, named)
    assert {key.split(":")[1] for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert len(state) == 3 * (len(named) - 1)
    other = torch.optim.AdamW([p for _, p in reversed(named)], lr=0.5)
    load_optimizer_state(other, named, state)
    assert other.param_groups[0]["lr"] == 0.5, "settings are the configuration's"
    for _, parameter in named:
        assert other.state.get(parameter, {}).keys() == optimizer.state.get(parameter, {}).keys()
        for key, value in optimizer.state.get(parameter, {}).items():
            assert torch.equal(other.state[parameter][key], value)
    with pytest.raises(UsageError, match="optimizer state of unknown, which this model does not train"):
        load_optimizer_state(other, named, {**state, "unknown:step": torch.tensor(1.0)})
    name = named[1][0]
    with pytest.raises(UsageError, match=rf"exp_avg of {name} has shape \(3,\)"):
        load_optimizer_state(other, named, {**state, f"{name}:exp_avg": torch.zeros(3)})
    assert optimizer_state(optimizer, named, main=False) == {}


def test_optimizer_state_of_two_processes_is_that_of_one_and_loads_either_way(tiny_config, tmp_path):
    """FSDP2 on two gloo processes: what they gather equals one process's, bit for bit; what one wrote, both shard."""
    _, optimizer, named = trained(tiny_config())
    alone = optimizer_state(optimizer, named)
    torch.save(alone, tmp_path / "alone.pt")

    def work(rank: int) -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        _, optimizer, named = trained(tiny_config(), shard=True)
        gathered = optimizer_state(optimizer, named, main=rank == 0)
        assert rank == 0 or not gathered
        _, fresh, named = trained(tiny_config(), steps=0, shard=True)
        load_optimizer_state(fresh, named, torch.load(tmp_path / "alone.pt", weights_only=True))
        held = sum(fresh.state[p]["exp_avg"].to_local().numel() for _, p in named[1:])
        again = optimizer_state(fresh, named, main=rank == 0)
        torch.save((gathered, again, held), tmp_path / f"{rank}.pt")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()

    children = [in_a_child(lambda rank=rank: work(rank), wait=False) for rank in (0, 1)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    gathered, again, held = torch.load(tmp_path / "0.pt", weights_only=True)
    assert held < 0.6 * sum(parameter.numel() for _, parameter in named[1:])
    for tensors in (gathered, again):
        assert tensors.keys() == alone.keys()
        assert all(torch.equal(tensors[key], alone[key]) for key in alone)


def test_eight_bit_moments_make_the_round_trip_bit_for_bit():
    """Codes and scales are kept as they are: to quantise again what was read would move them."""
    optim = pytest.importorskip("torchao.optim")
    subclass = pytest.importorskip("torchao.optim.subclass_8bit")
    layer = torch.nn.Linear(64, 128)
    named = list(layer.named_parameters())
    first, second = (optim.AdamW8bit(layer.parameters(), lr=0.01) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in named:  # as its first step would; the step itself wants a compiler
        for key in ("exp_avg", "exp_avg_sq"):
            moment = first._new_buffer(parameter, key == "exp_avg")
            values = torch.randn(parameter.shape, generator=generator)
            first.state[parameter][key] = moment.copy_(values if key == "exp_avg" else values**2)
        first.state[parameter]["step"] = torch.tensor(3.0)
        assert isinstance(first.state[parameter]["exp_avg"], subclass.OptimState8bit) == (name == "weight")
    load_optimizer_state(second, named, optimizer_state(first, named))
    again, want = optimizer_state(second, named), optimizer_state(first, named)
    assert again.keys() == want.keys()
    assert all(torch.equal(again[key], want[key]) for key in want)
    for key in ("exp_avg", "exp_avg_sq"):
        a, b = (optimizer.state[layer.weight][key] for optimizer in (first, second))
        assert type(a) is type(b)
        assert (a.signed, a.block_size, a.dtype) == (b.signed, b.block_size, b.dtype)
