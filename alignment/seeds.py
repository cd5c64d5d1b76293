"""Seeds that depend on their purpose alone, so that every layout and order has the same ones."""

import json
from hashlib import sha256


def derive_seed(*parts: object) -> int:
    """Return a seed below 2**56 that depends on these parts, plain data, and on nothing else."""
    digest = sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:7])
