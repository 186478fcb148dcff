"""Run `omni` and `python` in forks of one process that has imported the heavy libraries.

An `omni` command spends seconds on importing torch; the pages of the manual call it some eighty
times. Programs called `omni` and `python`, for the front of PATH, send their arguments, folder,
environment and standard streams to the preloaded process, which forks, runs the command on them and
reports its exit code. Signals are passed on.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CLIENT = """\
#!{python} -IS
import json, os, signal, socket, struct, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
job = {{"program": {program!r}, "arguments": sys.argv[1:], "folder": os.getcwd()}}
message = json.dumps({{**job, "environment": dict(os.environ)}}).encode()
socket.send_fds(server, [struct.pack("!I", len(message))], [0, 1, 2])
server.sendall(message)
command = struct.unpack("!i", server.recv(4, socket.MSG_WAITALL))[0]
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(command, number))
answer = server.recv(4, socket.MSG_WAITALL)
os._exit(struct.unpack("!i", answer)[0] if len(answer) == 4 else 1)
"""


@contextmanager
def preloaded_commands(folder: Path) -> Iterator[Path]:
    """Start the preloaded process; give the folder for the front of PATH."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    address = str(folder / "commands.sock")
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, __file__, address],
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", "the preloaded process did not start"
        for program in ("omni", "python"):
            script = programs / program
            text = CLIENT.format(python=sys.executable, address=address, program=program)
            script.write_text(text, encoding="utf-8")
            script.chmod(0o755)
        yield programs
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _serve(address: str) -> None:
    """Accept commands until killed, and watch each in a process of its own."""
    import grpc  # noqa: F401
    import onnxruntime  # noqa: F401
    import polars  # noqa: F401
    import torch  # noqa: F401
    import transformers

    _ = transformers.DistilBertModel  # transformers imports its parts when they are named
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(connection)
        connection.close()


def _watch(connection: socket.socket) -> None:
    """Fork the command, tell its process id, wait for it and tell its exit code."""
    length, streams, _, _ = socket.recv_fds(connection, 4, 3)
    job = json.loads(connection.recv(int.from_bytes(length), socket.MSG_WAITALL))
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os._exit(_run(job))
    for stream in streams:
        os.close(stream)
    connection.sendall(child.to_bytes(4))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(BrokenPipeError):
        connection.sendall((code if code >= 0 else 128 - code).to_bytes(4))
    os._exit(0)


def _run(job: dict) -> int:
    """Run one command in this process and return its exit code."""
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    arguments = job["arguments"]
    code: object = 0
    try:
        if job["program"] == "omni":
            from retrieval.cli import main

            if arguments[:1] == ["serve"] and "OMNI_TEST_PORTS" in os.environ:
                port, metrics_port = os.environ["OMNI_TEST_PORTS"].split()
                arguments = [
                    "serve",
                    "--port",
                    port,
                    "--metrics-port",
                    metrics_port,
                    *arguments[1:],
                ]
            sys.argv = ["omni", *arguments]
            main(arguments, prog_name="omni")
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] in ("-", "-c"):
            sys.argv = arguments
            source = sys.stdin.read() if arguments[0] == "-" else arguments[1]
            exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if isinstance(code, str):
        print(code, file=sys.stderr, flush=True)
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    _serve(sys.argv[1])
