"""What can be known to be wrong before the first collective."""

from argparse import Namespace
from pathlib import Path

from megatron_ext.config import ETConfig


def check_run(args: Namespace, config: ETConfig) -> Path | None:
    if args.run_dir is None:
        return None
    path = Path(args.run_dir)
    path.mkdir(parents=True, exist_ok=True)
    return path
