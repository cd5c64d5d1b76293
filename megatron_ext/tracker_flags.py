"""Flags of `pretrain_et.py` for experiment trackers, next to those of Megatron."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megatron_ext.trackers import Trackers, TrackerSettings
from megatron_ext.training.launch import Launch
from megatron_ext.training.run_folder import plain


def add_tracker_arguments(parser: ArgumentParser) -> None:
    """Add the flags that Megatron lacks."""
    group = parser.add_argument_group("experiment trackers")
    group.add_argument(
        "--mlflow-experiment",
        metavar="NAME",
        help="Experiment of MLflow to which the metrics are sent, next to TensorBoard and to the "
        "--wandb-project. Default: do not use MLflow.",
    )
    group.add_argument(
        "--mlflow-tracking-uri",
        metavar="URI",
        help="Address of MLflow's server, or folder of its files. Default: the environment "
        "variable MLFLOW_TRACKING_URI, or mlflow/ in the run directory.",
    )
    group.add_argument(
        "--log-layers",
        action="store_true",
        help="Send the router metrics of every layer to the trackers. metrics.jsonl always has "
        "them. Default: send the means over the layers and a picture of the experts' loads.",
    )


def tracker_settings(args: Namespace) -> TrackerSettings:
    """Return which experiment trackers a run uses."""
    return TrackerSettings(
        run_dir=None if args.run_dir is None else Path(args.run_dir),
        tensorboard_dir=Path(args.tensorboard_dir) if args.tensorboard_dir else None,
        wandb_project=args.wandb_project,
        wandb_name=args.wandb_exp_name,
        wandb_entity=args.wandb_entity,
        wandb_dir=Path(args.wandb_save_dir) if args.wandb_save_dir else None,
        mlflow_experiment=args.mlflow_experiment,
        mlflow_uri=args.mlflow_tracking_uri,
    )


def open_trackers(args: Namespace, launch: Launch) -> Trackers | None:
    """Return the trackers of a run on the last rank, where Megatron has the losses, or None.

    Raises:
        UserError: A tracker does not start; raised on every rank.
    """
    opened: list[Trackers] = []

    def start() -> None:
        if launch.rank == launch.size - 1:
            settings = {name: plain(value) for name, value in sorted(vars(args).items())}
            opened.append(Trackers(tracker_settings(args), settings))

    launch.agree("trackers", start)
    return opened[0] if opened else None
