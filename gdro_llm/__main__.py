"""What `gdro` and `python -m gdro_llm` start: the command, or one line that says how to install it."""

from __future__ import annotations

import os
import sys

# Read when torch loads OpenMP: threads that wait for work sleep. Spinning ones take the cores from each other as soon
# as another program runs, and a step takes many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> int:
    """The exit code of `gdro_llm.cli.main`; 2 where the packages of its command line are missing."""
    try:
        from gdro_llm.cli import main as command
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("pydantic", "click"):
            raise
        print(f"gdro: error: the command needs the package {package}: pip install 'gdro[llm]'", file=sys.stderr)
        return 2
    return command()


if __name__ == "__main__":
    sys.exit(main())
