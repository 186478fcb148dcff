"""``python -m retrieval``: the ``omni`` command."""

from retrieval.cli import main

if __name__ == "__main__":
    main(prog_name="python -m retrieval")
