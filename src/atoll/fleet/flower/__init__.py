"""The Flower fleet: sites on machines of their own, over Flower's SuperLink.

Membership, node keys, transport and storage of messages are Flower's. Ours is a thin layer on its messages: payloads in
chunks that resume (calls.py, link.py), the SuperLink with its administration closed (superlink.py, front.py), the operator's
end that runs plans (operator.py, federation.py, tasks.py) and the site's end that answers (node.py). `quiet` must run before
anything of Flower is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from atoll.errors import AtollError


def quiet(home: Path) -> None:
    """Keeps Flower's files in `home` and Flower from calling home. Raises AtollError if it is not installed."""
    from importlib.util import find_spec

    if find_spec("flwr") is None:
        raise AtollError("this needs Flower", remedy="pip install 'atoll[flower]'")
    os.environ |= {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
