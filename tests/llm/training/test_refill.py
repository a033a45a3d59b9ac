"""`refill` (DAPO): only mixed groups are trained on, gathered until a batch is full; every rollout counts."""

import dataclasses
import itertools
import signal

import literal
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_run_directory import assert_same_end, die_at, fork_and_die

import gdro_llm.training.trainer as trainer
from gdro_llm.engine.rollouts import Rollouts, joined
from gdro_llm.measuring.report import write_report
from gdro_llm.training.batch import Refill
from gdro_llm.training.trainer import train

FIELDS = [field.name for field in dataclasses.fields(Rollouts)]


def assert_same(rollouts: Rollouts, expected: Rollouts) -> None:
    for name in FIELDS:
        one, other = getattr(rollouts, name), getattr(expected, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name


def part(rollouts: Rollouts, kept: list[int]) -> Rollouts:
    """Some rows, one by one; prompts without any are left out."""
    owners = [int(rollouts.owner_R[r]) for r in kept]
    used = sorted(set(owners))
    tensors = [
        torch.stack([getattr(rollouts, name)[r] for r in kept])
        for name in ("tokens_R_T", "mask_R_T", "logprobs_R_T", "truncated_R")
    ]
    owner = torch.tensor([used.index(owner) for owner in owners])
    return Rollouts([rollouts.prompts[p] for p in used], owner, *tensors, [rollouts.texts[r] for r in kept])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_select_takes_rows_and_joined_puts_parts_together_again(tiny, data):
    """Against row by row; whole prompts, cut anywhere between two and joined, are as before."""
    counts = np.array(data.draw(st.lists(st.integers(1, 3), min_size=5, max_size=5)))
    whole = literal.sample(tiny, literal.prompts(tiny), counts, 6, seed=data.draw(st.integers(0, 3)), rows=100)
    rows = data.draw(st.lists(st.sampled_from(range(counts.sum())), min_size=1, unique=True).map(sorted))
    assert_same(whole.select(np.array(rows)), part(whole, rows))
    cuts = sorted({0, 5, *data.draw(st.lists(st.integers(1, 4)))})
    owner = whole.owner_R.numpy()
    parts = [whole.select(np.flatnonzero((owner >= a) & (owner < b))) for a, b in itertools.pairwise(cuts)]
    assert_same(joined(parts), whole)


def test_parts_of_different_width_and_empty_ones_are_joined(tiny):
    """Shorter completions are padded with nothing; a step without a mixed group adds nothing."""
    ids, two = literal.prompts(tiny), np.full(5, 2)
    short, long = (literal.sample(tiny, ids, two, width, seed=0, rows=100) for width in (2, 6))
    both = joined([short, long.select(np.zeros(0, np.int64)), long])
    assert both.tokens_R_T.shape == both.mask_R_T.shape == both.logprobs_R_T.shape == (20, 6)
    assert (both.mask_R_T[:10, 2:] == 0).all()
    assert (both.logprobs_R_T[:10, 2:] == 0).all()
    assert both.mask_R_T.dtype == short.mask_R_T.dtype
    assert_same(both.select(np.arange(10, 20)), long)
    assert both.owner_R.tolist() == [p for p in range(10) for _ in range(2)]
    assert both.prompts == [*ids, *ids]


@pytest.fixture
def config(run_config):
    """Half of the groups or so are mixed: some steps fill a batch, others wait."""
    return run_config(steps=8, save_every=1, eval_every=4, refill=True, controller="recommended")


def test_a_batch_is_the_next_mixed_groups(config, tmp_path, monkeypatch):
    """What the update gets equals the mixed groups put together by hand, exactly batch_size of them, in the order in
    which they were sampled; what is over is dropped; all rollouts count; nothing is saved while groups wait."""
    sampled, trained, steps, saved = [], [], [], []
    add, update, save = Refill.add, trainer.update, trainer.save_checkpoint

    def spied_add(self, batch):
        sampled.append(batch)
        whole = add(self, batch)
        assert (whole is None) == bool(self.waiting)
        steps.append(whole is not None)
        return whole

    def spied_update(policy, optimizer, batch, config, workers):
        trained.append((batch, len(sampled)))
        return update(policy, optimizer, batch, config, workers)

    monkeypatch.setattr(Refill, "add", spied_add)
    monkeypatch.setattr(trainer, "update", spied_update)
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *args: (saved.append(args[1]), save(*args))[1])
    train(config, tmp_path)
    assert 0 < sum(steps) < 8, "some steps must wait and some must train for this to tell anything"
    begin = 0
    for batch, end in trained:
        groups = []
        for waited in sampled[begin:end]:
            drawn, a, s = waited.rollouts, waited.advantages_R, waited.scale_R
            owner = drawn.owner_R.tolist()
            for p in range(len(drawn.prompts)):
                rows = [r for r in range(len(owner)) if owner[r] == p]
                if any(a[r] > 0 for r in rows) and any(a[r] < 0 for r in rows):
                    groups.append((part(drawn, rows), [a[r] for r in rows], [s[r] for r in rows]))
        assert sum(len(waited.rollouts.prompts) for waited in sampled[begin:end]) > len(groups) >= 8
        by_hand = joined([group for group, _, _ in groups[:8]])
        assert_same(batch.rollouts, by_hand)
        assert len(batch.rollouts.prompts) == 8
        assert batch.advantages_R.tolist() == [x for _, a, _ in groups[:8] for x in a]
        assert batch.scale_R.tolist() == [x for _, _, s in groups[:8] for x in s]
        assert batch.included_R.all()
        begin = end
    rows = literal.read_log(tmp_path / "metrics.jsonl")
    assert [row["rollouts"] for row in rows] == [32 * step for step in range(1, 9)]
    assert ["grad_norm" in row for row in rows] == steps
    assert saved == [step for step in range(1, 9) if steps[step - 1] or step == 8]
    write_report([tmp_path], tmp_path)  # which must do with steps that have no update


@pytest.mark.parametrize("call", [9, 14, 21])
def test_a_killed_run_goes_on_as_if_it_had_not_been(config, tmp_path, call):
    """From the last step at which no group waited, with the same updates."""
    train(config, tmp_path / "whole")
    assert fork_and_die(config, tmp_path / "killed", lambda: die_at(trainer, "append", call)) == signal.SIGKILL
    train(config, tmp_path / "killed", resume=True)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def test_a_request_to_stop_waits_for_the_groups_that_wait(config, tmp_path, monkeypatch):
    """The run ends after the next step that trains, and resumed equals an uninterrupted one."""
    train(config, tmp_path / "whole")
    steps = ["grad_norm" in row for row in literal.read_log(tmp_path / "whole" / "metrics.jsonl")]
    asked = steps.index(False)
    with monkeypatch.context() as patch:
        summarise, calls = trainer.summarise, iter(range(99))

        def interrupted(*args):
            if next(calls) == asked:
                signal.raise_signal(signal.SIGINT)
            return summarise(*args)

        patch.setattr(trainer, "summarise", interrupted)
        with pytest.raises(trainer.Stopped, match=f"after step {steps.index(True, asked) + 1}, which is saved"):
            train(config, tmp_path / "stopped")
    train(config, tmp_path / "stopped", resume=True)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
