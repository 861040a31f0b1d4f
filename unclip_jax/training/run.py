"""A training run, from its last checkpoint to its last step, with everything that a user sees on the way.

The run's folder holds `checkpoints/` (orbax; the last and the best), `metrics.jsonl` (one line per report) and
`samples/`.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from PIL import Image

from unclip_jax.checkpoints.atomic import replaced_file
from unclip_jax.compilation import compiler_options
from unclip_jax.distributed.hosts import each
from unclip_jax.distributed.mesh import batch_sharding, fully_sharded, placed, replicated
from unclip_jax.progress import Progress
from unclip_jax.training.step import Losses, TrainState, train_step

# (step, metrics) -> None: what else happens with each report, such as `unclip_jax.training.reports.tensorboard`.
Report = Callable[[int, Mapping[str, float]], None]


class Data(Protocol):
    """Endless batches whose state is a mapping of JSON types, as from `unclip_jax.training.data.batches`.

    `set_state` takes the states of all hosts of the run that was saved, of which there may have been more or fewer.
    """

    def __next__(self) -> Any: ...
    def get_state(self) -> Any: ...
    def set_state(self, states: Sequence[Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The length of a run, and what it writes.

    Args:
        total_steps: The last step.
        save_every: Steps between checkpoints; each is validated first.
        report_every: Steps between lines of metrics.
        sample_every: Steps between images; None for none.
        ema_decay: The EMA's highest decay.
        shard_parameters: Whether every device holds only its part of the weights and of the optimiser's state.

    Raises:
        ValueError: A number is out of range.
    """

    total_steps: int
    save_every: int = 1000
    report_every: int = 10
    sample_every: int | None = None
    ema_decay: float = 0.9999
    shard_parameters: bool = False

    def __post_init__(self) -> None:
        for name in ("total_steps", "save_every", "report_every", "sample_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; want at least 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}; want 0 or more, and less than 1")


def train(
    losses: Losses,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    data: Data,
    folder: Path,
    options: RunOptions,
    *,
    mesh: Mesh,
    validate: Callable[[TrainState], Mapping[str, float]] | None = None,
    samples: Callable[[TrainState], Image.Image] | None = None,
    reports: Sequence[Report] = (),
    progress: bool = True,
) -> TrainState:
    """Trains from the folder's last checkpoint, or from `state` if there is none.

    A run that is killed and restarted reaches the same weights, bit for bit, as an uninterrupted one on the same
    devices (GPUs: see docs/training.md). Lines in `metrics.jsonl` after the last checkpoint are then rewritten.

    Over several hosts, every one calls this, with a folder that all share; it may go on with another number of them.

    Args:
        losses: See `unclip_jax.training.step`. A `jax.tree_util.Partial` whose arguments are frozen weights keeps them
            out of the compiled program.
        optimizer: The optimiser.
        state: The initial state.
        data: Mappings of arrays whose first axis is this host's part of the batch.
        folder: The run's folder.
        options: The length of the run, and what it writes.
        mesh: The devices.
        validate: Its "loss" decides which checkpoint is the best.
        samples: Draws the images.
        reports: Other receivers of the metrics.
        progress: Show a progress bar.

    Returns:
        The last state.

    Raises:
        FloatingPointError: A loss or a gradient is not finite. The message names the step. The last good state is then
            saved and is the newest checkpoint.
        OSError: A checkpoint cannot be written; the one before is intact. May also be a ValueError.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    shardings = state_shardings(state, options, mesh)
    state = jax.tree.map(placed, state, shardings)
    losses = losses if isinstance(losses, jax.tree_util.Partial) else jax.tree_util.Partial(losses)
    losses = jax.tree.map(lambda leaf: _on_mesh(leaf, mesh), losses)
    move = step_program(optimizer, options, mesh, shardings)

    with _checkpoints(folder) as manager:
        start = manager.latest_step() or 0
        if start:
            state = _restore(manager, start, state, data)
        log = _MetricsFile(folder / "metrics.jsonl", start)
        meter = _Meter()
        with Progress("training (compiling)", options.total_steps, unit="step", enabled=progress) as bar:
            bar.update(start)
            pending: list[_Step] = []
            for step in range(start, options.total_steps):
                place = data.get_state()
                with meter.waiting():
                    batch = next(data)
                batch = jax.tree.map(functools.partial(_global, mesh), batch)
                meter.images += len(jax.tree.leaves(batch)[0])
                state, metrics = move(losses, state, batch, np.int32(step))
                pending.append(_Step(step, place, metrics))
                done = step + 1
                save = done % options.save_every == 0 or done == options.total_steps
                if save or done % options.report_every == 0 or step == start:
                    if (bad := next((s for s in pending if not s.finite()), None)) is not None:
                        _save(manager, bad.number, state, bad.place, {})
                        raise FloatingPointError(
                            f"training stopped at step {bad.number}: loss or gradient is not finite; the weights from "
                            f"before it are in {folder}"
                        )
                    seen = {**_mean([s.metrics for s in pending]), **meter.read(len(pending))}
                    pending = []
                    if save:
                        valid = {} if validate is None else dict(validate(state))
                        seen |= {f"validation_{name}": value for name, value in valid.items()}
                        _save(manager, done, state, data.get_state(), valid)
                    log.write(done, seen)
                    for report in reports:
                        report(done, seen)
                    bar.note(_line(seen, options.total_steps - done))
                if options.sample_every and samples and done % options.sample_every == 0:
                    _save_image(samples(state), folder / "samples" / f"{done:08d}.png")
                if save or (options.sample_every and done % options.sample_every == 0):
                    meter.restart()
                bar.stage("training")
                bar.update()
        manager.wait_until_finished()
    return state


def state_shardings(state: Any, options: RunOptions, mesh: Mesh) -> Any:
    """Where a run holds its state: every array whole on every device, or in parts. state: its arrays, or shapes."""
    return jax.tree.map(
        lambda leaf: fully_sharded(mesh, leaf.shape) if options.shard_parameters else replicated(mesh), state
    )


def step_program(optimizer: optax.GradientTransformation, options: RunOptions, mesh: Mesh, shardings: Any) -> Any:
    """The compiled step of a run: (losses, state, batch, step's number) -> (state, metrics).

    Args:
        optimizer, options, mesh: As of `train`.
        shardings: Of the state, from `state_shardings`; the state is donated.
    """
    out, for_compiler = (shardings, replicated(mesh)), compiler_options(mesh)

    @functools.partial(jax.jit, donate_argnums=1, out_shardings=out, compiler_options=for_compiler)
    def move(losses: Losses, state: TrainState, batch: Any, step: jax.Array) -> tuple[TrainState, dict[str, Any]]:
        return train_step(losses, optimizer, state, batch, ema_decay=options.ema_decay, expected_step=step)

    return move


class _Step(NamedTuple):
    """A started step: its number, the data's state before it, and its metrics to come."""

    number: int
    place: Any
    metrics: Mapping[str, jax.Array]

    def finite(self) -> bool:
        return bool(np.isfinite(self.metrics["loss"]) and np.isfinite(self.metrics["grad_norm"]))


class _Meter:
    """The speed, and how long the devices waited for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.started, self.images, self.waited = time.monotonic(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.monotonic()
        yield
        self.waited += time.monotonic() - before

    def read(self, steps: int) -> dict[str, float]:
        seconds = max(time.monotonic() - self.started, 1e-9)
        seen = {
            "images_per_second": self.images / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait": self.waited / seconds,
        }
        self.restart()
        stats = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
        return seen | ({"device_memory": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {})


class _MetricsFile:
    """Lines of JSON, one per report; what a killed run wrote after its last checkpoint is cut off."""

    def __init__(self, path: Path, step: int):
        self.path = path
        if jax.process_index() == 0 and path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = b"".join(line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step)
            with replaced_file(path) as partial:
                partial.write_bytes(kept)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if jax.process_index() == 0:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")


def _checkpoints(folder: Path) -> ocp.CheckpointManager:
    """Keeps the last checkpoint and the best; a newer one is complete before an older one is deleted."""
    kept = ocp.checkpoint_managers.AnyPreservationPolicy(
        [
            ocp.checkpoint_managers.LatestN(1),
            ocp.checkpoint_managers.BestN(
                get_metric_fn=lambda m: m["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
    )
    return ocp.CheckpointManager(folder / "checkpoints", options=ocp.CheckpointManagerOptions(preservation_policy=kept))


def _save(manager: ocp.CheckpointManager, step: int, state: TrainState, place: Any, valid: Mapping[str, float]) -> None:
    manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"hosts": each(place)})),
        metrics=dict(valid) or None,
        force=True,
    )


def _restore(manager: ocp.CheckpointManager, step: int, state: TrainState, data: Data) -> TrainState:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
    restored = manager.restore(step, args=args)
    data.set_state(restored.data.get("hosts", [restored.data]))  # before there were several: the state of the one
    return restored.state


def _global(mesh: Mesh, rows: Any) -> jax.Array:
    """This host's examples as its part of the global batch."""
    return jax.make_array_from_process_local_data(batch_sharding(mesh), np.asarray(rows))


def _on_mesh(leaf: Any, mesh: Mesh) -> jax.Array:
    """Frozen weights stay where they are; what is on one device only, or on none, goes to all."""
    there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(mesh.devices.flat)
    return leaf if there else placed(leaf, replicated(mesh))


def _mean(metrics: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    return {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}


def _line(seen: Mapping[str, float], steps_left: int) -> str:
    """What the progress line shows beside its bar."""
    parts = [f"loss {seen['loss']:.4f}", f"{seen['images_per_second']:.1f} images/s"]
    if "validation_loss" in seen:
        parts.append(f"validation {seen['validation_loss']:.4f}")
    if "device_memory" in seen:
        parts.append(f"{seen['device_memory'] / 2**30:.1f} GiB")
    left = datetime.timedelta(seconds=round(seen["seconds_per_step"] * steps_left))
    return ", ".join([*parts, f"{left} left"])


def _save_image(image: Image.Image, path: Path) -> None:
    if jax.process_index() == 0:
        path.parent.mkdir(exist_ok=True)
        with replaced_file(path) as partial:
            image.save(partial, "PNG")
