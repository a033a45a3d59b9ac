"""What the tuning experiment calls recommended is what the core ships."""

import numpy as np

from gdro_core import GDROController
from simulations.experiments.tuning import BUDGET, RECOMMENDED, controller


def test_the_recommended_choice_is_the_recommended_preset():
    """The same plans over ten batches of prompts that come back."""
    ours, shipped = controller(RECOMMENDED, 3), GDROController.joint_play(BUDGET, seed=3)
    rng = np.random.default_rng(0)
    for _ in range(10):
        ids = rng.choice(40, 20, replace=False).tolist()
        one, other = ours.plan(ids), shipped.plan(ids)
        assert one.same(other)
        assert np.array_equal(one.weights, other.weights)
        rewards = (rng.random(one.counts.sum()) < np.linspace(0, 1, 40)[np.array(ids)[one.owner]]).astype(float)
        ours.observe(one, rewards)
        shipped.observe(other, rewards)
