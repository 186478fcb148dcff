"""``omni``, also as ``python -m retrieval``."""

from __future__ import annotations

import sys

from encoders.errors import MissingDependency
from encoders.extras import extra_named


def main(prog_name: str | None = None) -> None:
    """Run the command; the client alone lacks its packages, and says in one line what to install.

    Args:
        prog_name: In the usage line; None: as it was called.
    """
    try:
        with extra_named("The command omni"):
            from retrieval.cli import main as omni
    except MissingDependency as error:
        sys.exit(f"error: {error}")
    omni(prog_name=prog_name)


if __name__ == "__main__":
    main("python -m retrieval")
