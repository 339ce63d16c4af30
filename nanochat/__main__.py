"""`python -m nanochat`: the command line.

Exported from chapters/A4_recipe.py (chapter A4, The recipe of a run); edit there, not here.
"""

import sys

__all__ = ["start"]


def start() -> int:
    """Import the command line and run it; say what is missing when that cannot be done."""
    if sys.version_info < (3, 10):  # noqa: UP036
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"nanochat: Python {found} is too old; install 3.10 or newer.", file=sys.stderr)
        return 2
    try:
        from nanochat.cli import main
    except ModuleNotFoundError as error:
        advice = "run `pip install -e .` in the folder of the book"
        print(f"nanochat: the package {error.name!r} is missing; {advice}.", file=sys.stderr)
        return 2
    return main()


if __name__ == "__main__":
    sys.exit(start())
