"""What `gdro` and `python -m gdro_llm` start: the command, or one line that says how to install it."""

from __future__ import annotations

import sys


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
