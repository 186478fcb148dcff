"""Make pip and uv install the same versions: constraints.txt -> pyproject.toml -> uv.lock.

python scripts/lock_versions.py            # after a change of constraints.txt or of an extra
python scripts/lock_versions.py --check    # fails where the three differ; CI runs this

`constraints.txt` is what is edited. uv reads constraints from pyproject.toml alone, so they are
copied there. The lock names the public index, whatever index this machine has.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PUBLIC_INDEX = "https://pypi.org/simple"
BLOCK = re.compile(r"^constraint-dependencies = \[\n.*?^\]\n", re.MULTILINE | re.DOTALL)


def pinned(root: Path = ROOT) -> dict[str, str]:
    """Read constraints.txt: name in its normal form -> version."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in pairs}


def normal(name: str) -> str:
    """Return the one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def with_constraints(project: str, versions: dict[str, str]) -> str:
    """Return the text of pyproject.toml with these constraints for uv."""
    lines = "".join(f'    "{name}=={version}",\n' for name, version in sorted(versions.items()))
    return BLOCK.sub(lambda _: f"constraint-dependencies = [\n{lines}]\n", project)


def disagreements(root: Path = ROOT) -> list[str]:
    """Name what differs between the three files; empty: nothing.

    Args:
        root: Folder that holds constraints.txt, pyproject.toml and uv.lock.
    """
    versions = pinned(root)
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    found = []
    if with_constraints(project, versions) != project:
        found.append("pyproject.toml: [tool.uv] does not hold the versions of constraints.txt")
    lock = tomllib.loads((root / "uv.lock").read_text(encoding="utf-8"))
    for package in lock["package"]:
        name, version = package["name"], package.get("version")
        wanted = versions.get(name, version)
        if version != wanted:
            found.append(f"uv.lock: {name} {version}, but constraints.txt has {wanted}")
        source = package["source"].get("registry", PUBLIC_INDEX)
        if source != PUBLIC_INDEX:
            found.append(f"uv.lock: {name} comes from another index than {PUBLIC_INDEX}")
    return found


def run_uv(*arguments: str) -> int:
    """Run uv against the public index, with the certificates of this machine."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if uv is None:
        print("uv is not installed: whether uv.lock follows from pyproject.toml is not checked.")
        return 0
    command = [uv, *arguments, "--no-config", "--system-certs", "--default-index", PUBLIC_INDEX]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> None:
    """Write the constraints and lock them, or check both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if not fresh")
    if parser.parse_args().check:
        found = disagreements()
        print(*found, sep="\n", end="\n" if found else "")
        sys.exit(bool(found) or run_uv("lock", "--check"))
    project = ROOT / "pyproject.toml"
    text = with_constraints(project.read_text(encoding="utf-8"), pinned())
    project.write_text(text, encoding="utf-8")
    sys.exit(run_uv("lock"))


if __name__ == "__main__":
    main()
