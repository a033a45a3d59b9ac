"""The small parts: shadow price, pass@k, what an import pulls in, and every example in a docstring."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from math import comb
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

import gdro_core
from gdro_core import ShadowPrice, pass_at_k

MODULES = [m.name for m in pkgutil.walk_packages(gdro_core.__path__, "gdro_core.") if not m.ispkg]


@given(st.lists(st.floats(0, 20), min_size=1, max_size=50), st.floats(0.01, 2), st.floats(0, 3))
def test_theorem_7_average_violation_telescopes(demand, step_size, start):
    """Theory test 7: mean(n - n_bar) <= (mu_T - mu_0)/(alpha T) on every sequence, and the price is never negative."""
    price = ShadowPrice(4.0, step_size, start)
    assert min(price.update(n) for n in demand) >= 0
    assert np.mean(demand) - 4.0 <= (price.price - start) / (step_size * len(demand)) + 1e-9


def test_the_price_finds_the_square_root_law():
    """Eq. 21 with the demand n(mu) = sqrt(v/mu) of Eq. 31 settles where the budget is met, at Theorem 4.2's price."""
    variance, share = np.array([0.25, 0.04, 0.01]), np.array([0.2, 0.3, 0.5])
    price = ShadowPrice(4.0, step_size=1e-4, price=1.0)
    for _ in range(3000):
        price.update(float(share @ np.sqrt(variance / max(price.price, 1e-4))))
    assert price.price == pytest.approx((share @ np.sqrt(variance) / 4.0) ** 2, rel=1e-6)


def test_price_state_round_trips_and_is_checked():
    """Same settings continue; others, and a negative price, are refused without a change."""
    price = ShadowPrice(4.0, 0.05, 0.3)
    price.update(6.0)
    restored = ShadowPrice(4.0, 0.05)
    restored.load_state_dict(price.state_dict())
    assert restored == price
    for change in ({"version": 2}, {"target": 5.0}, {"step_size": 0.1}, {"price": -1.0}, {"price": np.nan}):
        with pytest.raises(ValueError, match=next(iter(change))):
            restored.load_state_dict({**price.state_dict(), **change})
    assert restored == price


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ShadowPrice(0.0, 0.1), r"target must lie in \(0, inf\], got 0.0"),
        (lambda: ShadowPrice(4.0, 0.0), "step_size must lie in .*0.0"),
        (lambda: ShadowPrice(4.0, 0.1, -1.0), "price must lie in .*-1.0"),
        (lambda: ShadowPrice(4.0, 0.1).update(np.nan), "realised must lie in .*nan"),
        (lambda: pass_at_k([1], [4], 0), "k must be an integer >= 1, got 0"),
        (lambda: pass_at_k([1], [4], 5), "trials must be at least k = 5, got 4"),
        (lambda: pass_at_k([1, 5], 4, 2), "correct must be at most trials, got 5 of 4"),
        (lambda: pass_at_k([0.5], 4, 2), "correct must hold integers, got 0.5"),
        (lambda: pass_at_k([-1], 4, 2), "correct must hold .*-1"),
        (lambda: pass_at_k([1], np.nan, 2), "trials must hold .*nan"),
    ],
)
def test_bad_input_is_refused(call, message):
    """Errors name argument, rule and value."""
    with pytest.raises(ValueError, match=message):
        call()


@given(st.integers(1, 60), st.data())
def test_pass_at_k_is_the_ratio_of_binomials(n, data):
    """1 - C(n - c, k)/C(n, k) in exact arithmetic, for every c."""
    k = data.draw(st.integers(1, n))
    exact = [1 - comb(n - c, k) / comb(n, k) for c in range(n + 1)]
    np.testing.assert_allclose(pass_at_k(np.arange(n + 1), n, k), exact, atol=1e-12)


@given(st.integers(1, 20), st.floats(0, 1).map(lambda p: round(p, 12)), st.data())
def test_theorem_14_pass_at_k_is_unbiased(n, p, data):
    """Theory test 14: the expectation over c ~ Bin(n, p) is 1 - (1 - p)^k."""
    k, c = data.draw(st.integers(1, n)), np.arange(n + 1)
    assert binom.pmf(c, n, p) @ pass_at_k(c, n, k) == pytest.approx(1 - (1 - p) ** k, abs=1e-9)


def test_pass_at_k_broadcasts():
    """Counts against a column of trials; scalars give a 0-d array."""
    assert pass_at_k([0, 1, 2], [[2], [4]], 2).shape == (2, 3)
    assert pass_at_k(1, 2, 1).shape == ()


def test_import_pulls_in_numpy_and_nothing_heavy():
    """A fresh interpreter that imports gdro_core has loaded no deep-learning, plotting or scipy module."""
    code = "import sys; before = set(sys.modules); import gdro_core; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    third_party = {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    assert {name for name in third_party if "cython" not in name} == {"gdro_core", "numpy"}


def test_every_public_name_is_exported_and_documented():
    """`__all__` holds all public functions and classes, and records; each docstring has an example."""
    records = {"ERROR", "LEARNABILITY", "VARIANCE", "MIXED", "HIT", "SIGNAL", "UTILITIES"}
    modules = [importlib.import_module(name) for name in MODULES]
    public = [
        name
        for module in modules
        if "._" not in module.__name__
        for name, thing in vars(module).items()
        if callable(thing) and not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
    ]
    assert sorted([*public, *records]) == sorted(gdro_core.__all__)
    assert [name for name in public if ">>>" not in (getattr(gdro_core, name).__doc__ or "")] == []


def test_every_theorem_has_a_test_named_after_it():
    """Theorems 1 to 20 of the project each have at least one test `test_theorem_<number>_...`."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.rglob("test_*.py")))
    numbers = {int(number) for number in re.findall(r"def test_theorem_(\d+)_", text)}
    assert set(range(1, 21)) <= numbers


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    """Every `>>>` shows what it says; every public module but the checks has one."""
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
    assert result.attempted > 0 or "._" in name
