"""Clients for Node: their packages, and the descriptors from which they read the contract."""

import shutil
import subprocess
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from protos import retrieval_pb2 as pb

NODE = Path(__file__).parent / "node"
INSTALL_SECONDS = 200


def install_node_clients(folder: Path) -> Path:
    """Copy the scripts to ``folder`` and install their packages beside them; skips without npm."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed (Debian: apt-get install nodejs npm)")
    shutil.copytree(NODE, folder)
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock", "--silent"]
    installed = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS
    )
    if installed.returncode:
        pytest.skip(f"npm could not install the clients: {installed.stderr[-200:]}")
    return folder


def descriptor_set(folder: Path) -> Path:
    """Write the contract, health and reflection as protoc would; returns the file."""
    files = FileDescriptorSet()
    for module in (pb, health_pb2, reflection_pb2):
        module.DESCRIPTOR.CopyToProto(files.file.add())
    for file in files.file:
        for message in file.message_type:
            for fields in (message.field, *(nested.field for nested in message.nested_type)):
                for field in fields:
                    first, *others = field.name.split("_")
                    field.json_name = first + "".join(map(str.title, others))
    path = folder / "descriptors.bin"
    path.write_bytes(files.SerializeToString())
    return path
