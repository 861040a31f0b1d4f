"""Where metrics go beside a run's own `metrics.jsonl`: TensorBoard and Weights & Biases, if they are installed."""

import atexit
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unclip_jax.training.run import Report


def tensorboard(folder: Path) -> Report:
    """Writes event files to a folder.

    Raises:
        ModuleNotFoundError: tensorboardX is missing. The message says what to install.
    """
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reports: tensorboard needs tensorboardX: pip install tensorboardX") from error
    writer = SummaryWriter(str(folder), flush_secs=1)
    atexit.register(writer.close)  # its thread writes what is left

    def report(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return report


def wandb(project: str, **settings: Any) -> Report:
    """Sends metrics to a project of Weights & Biases; settings are passed to `wandb.init`.

    Raises:
        ModuleNotFoundError: wandb is missing.
    """
    try:
        import wandb as service
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("reports: wandb is not installed: pip install wandb") from error
    run = service.init(project=project, resume="allow", **settings)
    return lambda step, metrics: run.log(dict(metrics), step=step)
