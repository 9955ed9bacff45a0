"""Starting Ray and the Serve application on this machine, and leaving nothing of them behind."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from actors.models.cores import check_cpus
from actors.models.threads import takes_every_core
from cluster.cli.priorities import give_way
from cluster.config import ClusterConfig, DraftPoolConfig, GatewayConfig, ModelConfig
from cluster.processes import descendants, end_processes, names_of

OBJECT_STORE_BYTES = 200 * 1024 * 1024
START_TIMEOUT_S = 900.0
"""Includes the first download or conversion of weights."""
SERVE_SHUTDOWN_S = 30.0
PROCESS_EXIT_S = 10.0
POLL_S = 0.2
SPARE_CPUS = 8
"""Ray's CPUs, which are only counted here, for models that may be loaded later."""
CONTROL_PROCESSES = {"raylet", "gcs_server"}
"""Without either, nothing in the cluster answers any more."""
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers are the service here, not batch jobs that give way to others.
    "RAY_worker_niceness": "0",
    # A machine that is busy loading weights may be slow to start Ray.
    "RAY_raylet_start_wait_time_s": "120",
    # Chunks travel from worker to gateway to proxy as gRPC messages, not as objects of Ray's store.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Of those messages; the limit of Serve's own gRPC proxy. With 4 MiB, the default, neither a request of
    # gateway.max_body_bytes nor the log-probabilities of a long prompt would get through.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # How soon the first request to a sleeping model is noticed. 10 s by default.
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    # A worker that does not answer would keep its requests and CPUs for as long as a healthy one gets to end
    # its requests. They are resumed elsewhere.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
CROWDED_ENVIRONMENT = {
    # Ten times a second by default, which takes 3 % of a core. Health is looked at every few seconds.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    # What only debugging Ray itself needs: statistics of its event loops, task events for `ray list tasks`.
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_timeline": "0",
}
"""Where compute threads take every core, whatever else runs stops all of them. Together these took the idle
cluster from 22 to 16 % of a core."""
PRIORITY_CHECK_S = 10.0
Phase = Callable[[str], AbstractContextManager[object]]


class StartupError(Exception):
    """Why the cluster did not come up, in one line."""


class StopSignal:
    """SIGINT and SIGTERM as a flag. A third signal ends the process at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._count = 0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    @property
    def urgent(self) -> bool:
        """Asked a second time: do not wait for running requests."""
        return self._count > 1

    def wait(self, seconds: float) -> bool:
        return self._event.wait(seconds)

    def install(self) -> None:
        """May be called again: Ray replaces the SIGTERM handler when it starts."""
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, self._handle)
            self._previous.setdefault(number, previous)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self._event.set()
        if self._count > 2:
            os._exit(130)


def port_problem(gateway: GatewayConfig) -> str | None:
    """Why a port cannot be listened on, or None."""
    if gateway.http_port == gateway.grpc_port:
        return f"port {gateway.http_port} cannot serve both HTTP and gRPC"
    # Serve's gRPC proxy listens on every interface, whatever the host.
    wildcard = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    http, grpc = (gateway.host, gateway.http_port, "--port"), (wildcard, gateway.grpc_port, "--grpc-port")
    for host, port, name in (http, grpc):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            try:
                probe.bind((host, port))
                probe.listen(1)
            except OSError as error:
                return f"cannot listen on {host}:{port} ({error.strerror}); choose another with {name}"
    return None


def cpus_needed(config: ClusterConfig) -> float:
    targets = sum(m.num_cpus * m.most_replicas for m in config.models)
    pool, gateway = config.draft_pool, config.gateway
    loaded = SPARE_CPUS if gateway.admin_endpoints else 0
    return targets + pool.num_cpus * pool.most_replicas + gateway.num_cpus + loaded


def _kinds(config: ClusterConfig) -> tuple[ModelConfig | DraftPoolConfig, ...]:
    """Of workers that may compute on GPUs."""
    return (*config.models, config.draft_pool)


def gpus_needed(config: ClusterConfig) -> float:
    """Before everything is up: what autoscaling adds or wakes later may wait."""
    return sum(kind.gpus * kind.first_replicas for kind in _kinds(config))


def check_gpus(config: ClusterConfig, there: float) -> None:
    """Raises StartupError where replicas would wait for GPUs that this machine does not have."""
    needed = gpus_needed(config)
    if needed > there:
        raise StartupError(f"models and draft workers need {needed:g} GPUs, this machine has {there:g}")


def spread_over_gpus(config: ClusterConfig, there: int) -> ClusterConfig:
    """Models with device auto reserve what nobody has asked for of so many GPUs: one for each replica, equal
    shares where there are fewer, and of one that others share what they leave. Those that say what they
    reserve, or that only CPUs run, stay as they are, and so does the draft pool: shallow drafts are small,
    and on a CPU they take nothing from targets."""

    def takes(model: ModelConfig) -> bool:
        return model.device == "auto" and model.num_gpus is None and model.why_on_cpus is None

    taken, spare = 0, 0.0
    for kind in _kinds(config):
        gpus, spare_here = _held(kind.gpus, kind.most_replicas)
        taken, spare = taken + gpus, max(spare, spare_here)
    left = there - taken
    workers = sum(model.most_replicas for model in config.models if takes(model))
    if not workers:
        return config
    # Every worker's share lies on one GPU.
    share = 1.0 / math.ceil(workers / left) if left >= 1 else _rounded_down(spare / workers)
    if share == 0.0:
        return config
    models = tuple(m.model_copy(update={"num_gpus": share}) if takes(m) else m for m in config.models)
    return config.model_copy(update={"models": models})


def _held(gpus: float, replicas: int) -> tuple[int, float]:
    """GPUs that replicas of so many each keep from others, and what they leave of the last one."""
    if gpus == 0.0 or gpus >= 1.0:
        return math.ceil(gpus * replicas), 0.0
    on_one = math.floor(1.0 / gpus)
    held = math.ceil(replicas / on_one)
    return held, 1.0 - gpus * (replicas - (held - 1) * on_one) if held else 0.0


def _rounded_down(gpus: float) -> float:
    """To what Ray can count."""
    return math.floor(round(gpus * 1e4, 6)) / 1e4


def usable_gpus(there: float) -> int:
    """Of the GPUs that Ray finds, those that this torch can use: none without CUDA."""
    if there < 1:
        return 0
    import torch  # takes seconds, which machines without a GPU are spared

    return min(int(there), torch.cuda.device_count())


def resources_needed(config: ClusterConfig) -> dict[str, float]:
    """Ray's custom resources, which stand for nodes: one machine has all of them."""
    needed: dict[str, float] = {}
    for kind in _kinds(config):
        for name, amount in kind.resources.items():
            needed[name] = needed.get(name, 0.0) + amount * kind.most_replicas
    return needed


def check_every_cpu(config: ClusterConfig) -> None:
    """Raises StartupError where workers are to be bound to CPUs that this machine does not have."""
    try:
        for model in config.models:
            check_cpus(model.engine.cpus, f"{model.name}: engine.cpus")
        check_cpus(config.draft_pool.cpus, "draft_pool.cpus")
    except ValueError as error:
        raise StartupError(str(error)) from error


class LocalCluster:
    """Ray, Serve and the application, started by this process and ended by it."""

    def __init__(self, config: ClusterConfig, stop: StopSignal) -> None:
        self._config = config
        self._stop = stop
        self._handle: Any = None
        self._ray_started = False

    @property
    def _crowded(self) -> bool:
        """Until GPUs are found, as if there were none."""
        models = self._config.models
        return any(m.torch_device == "cpu" and takes_every_core(m.engine.compute_threads) for m in models)

    def start(self, phase: Phase) -> None:
        """Returns when every model answers, or early when asked to stop. Raises `StartupError`."""
        check_every_cpu(self._config)
        self._start_ray(phase)
        if self._stop.requested:
            return
        self._run_application(phase)
        if self._stop.requested:
            return
        with phase("ready"):
            self._wait_ready()
        self._give_way()

    def _give_way(self) -> None:
        if self._crowded:
            give_way(descendants(os.getpid()))

    def _start_ray(self, phase: Phase) -> None:
        for name, value in (RAY_ENVIRONMENT | (CROWDED_ENVIRONMENT if self._crowded else {})).items():
            os.environ.setdefault(name, value)
        with phase("Ray's libraries"):
            import ray
            from ray import serve

            from cluster.app import serve_options

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        cores = len(os.sched_getaffinity(0))
        self._ray_started = True  # from here on there may be something to end
        try:
            with phase("Ray"):
                ray.init(
                    address="local",
                    num_cpus=max(cores, math.ceil(cpus_needed(self._config))),
                    resources=resources_needed(self._config),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    namespace="s2d",
                )
            self._stop.install()
            gpus = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
            check_gpus(self._config, gpus)
            self._config = spread_over_gpus(self._config, usable_gpus(gpus))
            with phase("Serve"):
                serve.start(**serve_options(self._config), logging_config={"log_level": "WARNING"})
        except StartupError:
            raise
        except Exception as error:  # Ray raises bare Exceptions too
            raise StartupError(f"Ray did not start: {_last_line(error)}") from error

    def _run_application(self, phase: Phase) -> None:
        """Deploy in a thread and show each deployment's progress meanwhile."""
        from ray import serve

        from cluster.app import DRAFT_POOL, GATEWAY, build_app
        from cluster.model_apps import APP_NAME, deployment_name

        failure: list[BaseException] = []

        def deploy() -> None:
            try:
                self._handle = serve.run(
                    build_app(self._config),
                    name=APP_NAME,
                    route_prefix="/",
                    logging_config={"log_level": "INFO", "enable_access_log": False},
                )
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=deploy, name="s2d-deploy", daemon=True)
        thread.start()
        waiting = {deployment_name(m.name): f"weights and engine of {m.name}" for m in self._config.models}
        if self._config.draft_pool.replicas:
            waiting[DRAFT_POOL] = "draft workers"
        waiting[GATEWAY] = "gateway"
        deadline = time.monotonic() + START_TIMEOUT_S
        with contextlib.ExitStack() as unfinished:
            shown = {name: contextlib.ExitStack() for name in waiting}
            for name, text in waiting.items():
                unfinished.enter_context(shown[name])
                shown[name].enter_context(phase(text))
            while thread.is_alive() and not self._stop.requested:
                if time.monotonic() > deadline:
                    raise StartupError(f"the models did not start within {START_TIMEOUT_S:.0f} s; {_logs()}")
                for name in _healthy_deployments(APP_NAME) & shown.keys():
                    shown.pop(name).close()
                self._stop.wait(POLL_S)
            if failure:
                raise StartupError(f"{_last_line(failure[0])}; {_logs()}") from failure[0]

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + 60.0
        names: list[str] = []
        while not self._stop.requested:
            with contextlib.suppress(TimeoutError):
                names = self._handle.unready.remote().result(timeout_s=10.0)
                if not names:
                    return
            if time.monotonic() > deadline:
                raise StartupError(f"models that do not answer: {', '.join(names)}; {_logs()}")
            self._stop.wait(POLL_S)

    def wait(self) -> None:
        """Until asked to stop. What Serve restarts meanwhile gives way again."""
        while not self._stop.wait(PRIORITY_CHECK_S):
            self._give_way()

    def close(self, drain_timeout_s: float) -> None:
        """Refuse new requests, wait for running ones, end every process. Safe in any state."""
        if not self._ray_started:
            return
        import ray

        processes = descendants(os.getpid())
        if ray.is_initialized() and names_of(processes) >= CONTROL_PROCESSES:
            self._drain(drain_timeout_s)
            # Serve's controller dies in the middle of its own shutdown, and Ray prints that it did.
            with contextlib.redirect_stdout(io.StringIO()):
                _within(SERVE_SHUTDOWN_S, _shutdown_serve)
                processes |= descendants(os.getpid())
                _within(PROCESS_EXIT_S, ray.shutdown)
        else:
            _within(PROCESS_EXIT_S, ray.shutdown)
        self._ray_started = False
        end_processes(processes, PROCESS_EXIT_S)

    def _drain(self, timeout_s: float) -> None:
        if timeout_s <= 0 or self._stop.urgent:
            return
        if self._handle is None:
            self._handle = _running_application()
        if self._handle is None:
            return
        response = self._handle.drain.remote(timeout_s)
        deadline = time.monotonic() + timeout_s + 5.0
        while time.monotonic() < deadline and not self._stop.urgent:
            try:
                response.result(timeout_s=POLL_S)
            except TimeoutError:
                continue
            except Exception as error:
                # Whatever failed there, what remains is to end the processes.
                logging.getLogger(__name__).warning("draining failed: %s", _last_line(error))
            return


def _within(seconds: float, action: Callable[[], object]) -> None:
    """In a thread, because it may wait for processes that are gone."""
    thread = threading.Thread(target=action, name="s2d-stop", daemon=True)
    thread.start()
    thread.join(seconds)


def _running_application() -> Any:
    """The gateway's handle, None before it exists. It answers clients a moment before `serve.run` returns."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from cluster.model_apps import APP_NAME

    try:
        return serve.get_app_handle(APP_NAME)
    except RayServeException:
        return None


def _shutdown_serve() -> None:
    from ray import serve

    try:
        serve.shutdown()  # type: ignore[no-untyped-call]
    except Exception as error:
        # The processes are ended right after this in any case.
        logging.getLogger(__name__).warning("Serve did not shut down by itself: %s", _last_line(error))


def _healthy_deployments(app: str) -> set[str]:
    from ray import serve

    try:
        application = serve.status().applications.get(app)
    except Exception:
        return set()  # not up yet; the deploying thread reports failures
    if application is None:
        return set()
    return {name for name, d in application.deployments.items() if d.status == "HEALTHY"}


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _logs() -> str:
    return "logs are in /tmp/ray/session_latest/logs/serve"
