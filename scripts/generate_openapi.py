"""Write docs/reference/openapi.json from the contract; with --check fail if it is not fresh."""

import json
import sys
from pathlib import Path

from protos import retrieval_pb2 as pb
from retrieval.web.openapi import openapi_document

PATH = Path(__file__).parent.parent / "docs" / "reference" / "openapi.json"


def main() -> None:
    """Write or check the document."""
    content = json.dumps(openapi_document(pb.DESCRIPTOR), indent=1, ensure_ascii=False) + "\n"
    if "--check" not in sys.argv:
        PATH.write_text(content, encoding="utf-8")
    elif not PATH.exists() or PATH.read_text(encoding="utf-8") != content:
        sys.exit(f"{PATH.name} is not what protos/retrieval.proto gives; run: make protos")


if __name__ == "__main__":
    main()
