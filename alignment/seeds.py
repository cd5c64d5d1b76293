"""Seeds that depend on what they are for, so that they are the same in every layout and order."""

import json
from hashlib import sha256


def derive_seed(*parts: object) -> int:
    """A seed below 2**56 that these parts, of plain data, alone decide."""
    digest = sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:7])
