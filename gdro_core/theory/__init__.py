"""Bandits, regret bounds, budgets as paths, robust means: the theory that the games rest on."""
