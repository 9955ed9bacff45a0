"""The same training function as a worker group of Ray Train."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from actors.training.settings import SettingsModel, TrainSettings


class RaySettings(SettingsModel):
    """How many workers train, and what each reserves. All must reach the base, the data and the output folder
    under the same paths."""

    workers: int = Field(1, ge=1)
    gpu: bool = Field(False, description="One GPU a worker.")
    cpus: float = Field(1.0, gt=0, description="CPUs a worker reserves.")
    address: str | None = Field(None, description="Address of the Ray cluster; null: a local one.")
    max_failures: int = Field(2, ge=0, description="Restarts of the group, each from the last checkpoint.")


class RayTrainUnavailableError(RuntimeError):
    """Ray Train's own dependencies are not installed."""


def train_on_ray(settings: TrainSettings, cluster: RaySettings) -> None:
    """Run `train` on a worker group, and wait for its end.

    Raises RayTrainUnavailableError, and Ray Train's own TrainingFailedError.
    """
    if settings.batch_rows % cluster.workers:
        raise ValueError(f"batch_rows {settings.batch_rows} is not a multiple of {cluster.workers} workers")
    if settings.minutes is not None and cluster.workers > 1:
        raise ValueError("minutes: the clocks of several workers do not agree on the last step")
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise RayTrainUnavailableError(f"{error}; or: pip install 's2d-serve[train]'") from error
    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=True)
    # Other workers may share the machine: a worker takes what it reserves.
    settings = settings.model_copy(update={"threads": settings.threads or max(1, int(cluster.cpus))})
    resources = {"CPU": cluster.cpus, **({"GPU": 1.0} if cluster.gpu else {})}
    trainer = TorchTrainer(
        worker,
        train_loop_config={"settings": settings.model_dump(mode="json")},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=cluster.gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="s2d-draft",
            storage_path=str((settings.out / "ray").resolve()),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    trainer.fit()


def worker(config: dict[str, Any]) -> None:
    """What each worker runs. Our own checkpoints, in the output folder, are what a restart goes on from."""
    import torch
    from ray import train as ray_train
    from ray.train import torch as ray_torch

    from actors.training.loop import Record, Workers, train
    from actors.training.run import build_run

    settings = TrainSettings.model_validate(config["settings"])
    torch.set_num_threads(settings.threads)
    context = ray_train.get_context()
    device = str(ray_torch.get_device())
    run = build_run(settings.model_copy(update={"device": device}))
    last: Record = {}

    def on_step(record: Record) -> None:
        last.update({k: v for k, v in record.items() if isinstance(v, int | float)})

    train(
        run,
        on_step=on_step,
        workers=Workers(
            rank=context.get_world_rank(),
            world=context.get_world_size(),
            wrap=ray_torch.prepare_model,
            # Every worker reports at every checkpoint, and none goes on before all have.
            barrier=lambda: ray_train.report(dict(last)),
        ),
    )
