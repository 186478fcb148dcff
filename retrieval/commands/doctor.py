"""``omni doctor``: check the machine, the installation and a store, and say what to do."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import click

from encoders.commands.console import handle_errors, json_option, print_json, print_table, say
from encoders.errors import OmniError

PORTS = {"gRPC": 50051, "page and metrics": 9464}
"""Those that ``omni serve`` listens on unless told otherwise."""
EXTRAS = {
    "train": ("torch", "omni train, embed, evaluate, export, rebuild, demo and start"),
    "redis": ("redis", "a cache of query vectors shared by servers"),
    "ray": ("ray", "omni pairs --ray on many machines"),
    "otel": ("opentelemetry", "traces"),
    "faiss": ("faiss", "comparison with FAISS"),
    "captions": ("PIL", "omni enrich captions"),
}
"""Extra -> module that it brings, and what it is for."""
PACKAGES = ("omnisearchsage", "torch", "onnxruntime", "polars", "pyarrow", "numpy", "grpcio")
NOT_NEEDED = {
    "omnisearchsage": "runs from a source folder",
    "torch": "this machine serves, and does not train",
}
"""Packages that a server can do without, and what their absence means."""
LITTLE_MEMORY_GIB = 4
LITTLE_DISK_GIB = 5
FEWEST_OPEN_FILES = 4096
_GIB = 2**30


class Finding(NamedTuple):
    """What one check found."""

    name: str
    state: Literal["ok", "note", "problem"]
    found: str
    advice: str = ""


@click.command()
@click.option(
    "--store",
    "store_path",
    type=click.Path(path_type=Path, file_okay=False),
    envvar="OMNI_STORE",
    help="Also check this store's releases (also read from OMNI_STORE).",
)
@json_option
@handle_errors
def command(store_path: Path | None, as_json: bool) -> None:
    """Check CPU, memory, disk, versions, extras, ports and a store, and say what to do.

    Exit code 1 if anything would keep training, building or serving from working.

    Example: omni doctor --store store
    """
    findings = [finding for check in CHECKS for finding in check()]
    if store_path is not None:
        findings += check_store(store_path)
    problems = [finding for finding in findings if finding.state == "problem"]
    if as_json:
        print_json({"findings": [f._asdict() for f in findings], "problems": len(problems)})
    else:
        print_table("", ["", "what", "found"], ((f.state, f.name, f.found) for f in findings))
        for finding in findings:
            if finding.advice:
                say(f"{finding.state}: {finding.name}: {finding.advice}")
        if not problems:
            say("nothing is in the way")
    if problems:
        sys.exit(1)


def check_python() -> Iterator[Finding]:
    """Check the interpreter and the versions of what matters most."""
    yield Finding("Python", "ok", sys.version.split()[0])
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            absence = NOT_NEEDED.get(name)
            yield Finding(
                name,
                "note" if absence else "problem",
                "not installed",
                absence or "pip install 'omnisearchsage[serve]'",
            )


def check_extras() -> Iterator[Finding]:
    """Say which optional parts are there."""
    for extra, (module, purpose) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        found = "installed" if there else f"not installed ({purpose})"
        yield Finding(f"extra {extra}", "ok" if there else "note", found)


def check_cpu() -> Iterator[Finding]:
    """Check the number of cores that this process may use, and their instructions."""
    from index_builder.ann.cpu import cpu_features

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", "ok", str(cores))
    features = cpu_features()
    known = [
        name
        for name in ("avx2", "avx512f", "avx512_vnni", "amx_int8", "asimd", "sve")
        if name in features
    ]
    slow = bool(features) and not {"avx2", "asimd"} & features
    advice = "without AVX2 or NEON, searching takes several times as long" if slow else ""
    yield Finding(
        "vector instructions", "note" if slow else "ok", ", ".join(known) or "none", advice
    )
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and cores and int(threads) > cores:
        yield Finding(
            "OMP_NUM_THREADS", "note", threads, f"more threads than the {cores} cores: unset it"
        )


def check_gpu() -> Iterator[Finding]:
    """Say whether training and embedding would use a GPU."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    found = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none: the CPU is used"
    yield Finding("GPU", "ok", found)


def check_memory() -> Iterator[Finding]:
    """Check the memory that is free, within the limit of a container."""
    free = _free_memory()
    if free is None:
        return
    little = free < LITTLE_MEMORY_GIB * _GIB
    advice = "training on own data wants 4 GiB or more; serving takes 1 to 1.5 kB an entity"
    yield Finding(
        "free memory",
        "note" if little else "ok",
        f"{free / _GIB:.1f} GiB",
        advice if little else "",
    )


def _free_memory() -> int | None:
    """Return bytes: what is available, at most what a control group leaves; None: unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    free = values.get("MemAvailable")
    try:
        folder = Path("/sys/fs/cgroup")
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free
    if free is None or limit == "max":
        return free
    return min(free, int(limit) - used)


def check_disk() -> Iterator[Finding]:
    """Check the free space of the working and the temporary folder, and that they are writable."""
    for name, folder in (("this folder", Path.cwd()), ("temporary folder", _temporary())):
        free = shutil.disk_usage(folder).free
        state: Literal["ok", "note", "problem"] = "ok"
        advice = ""
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            state, advice = "problem", f"{folder} is not writable ({error.strerror})"
        if state == "ok" and free < LITTLE_DISK_GIB * _GIB:
            state, advice = "note", "a release of a million entities takes about 2 GiB"
        yield Finding(f"disk, {name}", state, f"{free / _GIB:.1f} GiB free in {folder}", advice)


def _temporary() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return Path(os.environ.get("TMPDIR", "/"))


def check_open_files() -> Iterator[Finding]:
    """Check how many files and connections a server may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    little = limit < FEWEST_OPEN_FILES
    yield Finding(
        "open files",
        "note" if little else "ok",
        "no limit" if limit == resource.RLIM_INFINITY else f"{limit:,}",
        f"raise it before serving many clients: ulimit -n {FEWEST_OPEN_FILES}" if little else "",
    )


def check_ports() -> Iterator[Finding]:
    """Check that the ports of ``omni serve`` are free."""
    for name, port in PORTS.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                used = error.errno == errno.EADDRINUSE
                found = "in use" if used else str(error.strerror)
                option = "--port" if name == "gRPC" else "--metrics-port"
                advice = f"a server runs there, or another program: omni serve {option} 0 picks one"
                yield Finding(f"port {port} ({name})", "note", found, advice)
                continue
        yield Finding(f"port {port} ({name})", "ok", "free")


def check_store(path: Path) -> Iterator[Finding]:
    """Check a store: which release is active, whether its files are whole, what is damaged."""
    from index_builder.releases.store import ReleaseStore

    if not (path / "releases").is_dir():
        advice = "omni rebuild makes a store; is the path right?"
        yield Finding(f"store {path}", "problem", "no releases/ in it", advice)
        return
    store = ReleaseStore(path)
    try:
        current = store.current()
        damaged = store.damaged_ids()
        yield Finding(f"store {path}", "ok", f"{len(store.ids())} release(s)")
        for name in damaged:
            yield Finding(f"release {name}", "note", "damaged", "omni release gc removes it")
        if current is None:
            yield Finding("active release", "problem", "none", "omni rebuild publishes one")
            return
        store.verify(current)
        yield Finding("active release", "ok", f"{current}: all checksums hold")
    except (OmniError, OSError) as error:
        yield Finding("active release", "problem", str(error), "omni release rollback")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_extras,
    check_cpu,
    check_gpu,
    check_memory,
    check_disk,
    check_open_files,
    check_ports,
)
