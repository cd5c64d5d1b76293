"""Key of an endpoint, from the environment."""

import os

from megatron_ext.errors import UserError

API_KEY_VARIABLE = "MEGATRON_ET_JUDGE_API_KEY"
"""Default environment variable with the key of an endpoint."""


def read_api_key(variable: str = API_KEY_VARIABLE) -> str | None:
    """Return the key of an endpoint, or None without one.

    Keys are not accepted on the command line, which other users of the machine can read.

    Args:
        variable: Name of the environment variable with the key.

    Raises:
        UserError: If the key is empty or not ASCII.
    """
    key = os.environ.get(variable)
    if key is not None and (not key.strip() or not key.isascii()):
        raise UserError(
            f"The key in the environment variable {variable} is empty or not ASCII. Set it to the "
            "key of the endpoint, or unset it."
        )
    return key and key.strip()
