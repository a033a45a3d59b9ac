"""One module per claim; see `simulations.harness` for what such a module holds."""
