"""Runs a command in this process, as ``omni`` would."""

from click import Command
from click.testing import CliRunner, Result


def run(command: Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments], prog_name="omni")
