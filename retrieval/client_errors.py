"""Old import path of ``retrieval.client.errors``; kept for one version."""

from retrieval.client.errors import *  # noqa: F403
from retrieval.client.errors import __all__ as __all__
