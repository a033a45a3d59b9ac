"""Every claim reproduced without a GPU: one file per experiment."""
