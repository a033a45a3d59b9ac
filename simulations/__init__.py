"""Every claim of the paper and of this project, reproduced without a GPU: `python -m simulations list`.

One module per experiment in `simulations/experiments`; environments beside this file; numpy, scipy, matplotlib and
`gdro_core` only.
"""
