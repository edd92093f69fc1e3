"""The files of ``deploy/``: what Kubernetes and its linters take, and names that the server really has."""

import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from places import ROOT

import corewise.cluster
from corewise.batching.requests import WORDS
from corewise.cli.quantities import duration
from corewise.cluster.serving import SERVICER
from corewise.serving import health
from corewise.serving.metrics import Metrics
from corewise.serving.models import Models
from corewise.serving.traces import Traces

DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(DEPLOY.glob("*.yaml"))
OTHERS = ("serving.kserve.io/", "keda.sh/", "ray.io/")
"""Kinds that a plain Kubernetes does not know."""


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@pytest.fixture(scope="module")
def deployment():
    (found,) = (each for each in documents(DEPLOY / "kubernetes.yaml") if each["kind"] == "Deployment")
    return found["spec"]["template"]["spec"]


def test_yamllint_has_nothing_to_say():
    command = [sys.executable, "-m", "yamllint", "--strict", "-c", DEPLOY.parent / ".yamllint.yaml", DEPLOY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_takes_every_manifest(path):
    for document in documents(path):
        if not document["apiVersion"].startswith(OTHERS):
            kubernetes_validate.validate(document, "1.34", strict=True)


def test_hadolint_has_nothing_to_say():
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DEPLOY / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_image_is_built_from_all_that_the_package_needs_and_nothing_else():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {Path(name).parts[0] for name in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]}
    assert kept == needed


def test_ray_serve_takes_the_configuration_of_the_ray_service():
    schema = pytest.importorskip("ray.serve.schema")
    (service,) = (each for each in documents(DEPLOY / "kuberay.yaml") if each["kind"] == "RayService")
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    config = schema.ServeDeploySchema(**yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "corewise.cluster:application"
    inspect.signature(corewise.cluster.deployment).bind(**application.args)
    (servicer,) = config.grpc_options.grpc_servicer_functions
    assert servicer == SERVICER
    assert callable(getattr(importlib.import_module(servicer.rpartition(".")[0]), servicer.rpartition(".")[2]))
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert application.args["cpus"] == int(container["resources"]["limits"]["cpu"])
    assert group["maxReplicas"] > application.args["replicas"][1]


def test_what_is_scaled_by_are_metrics_and_outcomes_of_the_server():
    text = Metrics(Models([], lambda source: pytest.fail("nothing is opened")), Traces()).text().decode()
    families = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    ours = {"corewise_queue_seconds_mean"}  # made by the adapter's rule
    used = {name for path in MANIFESTS for name in re.findall(r"corewise_[a-z_]+", path.read_text())}
    assert {re.sub("_(sum|count|bucket)$", "", name) for name in used - ours} <= families
    (outcomes,) = re.findall(r'outcome=~"([^"]+)"', (DEPLOY / "keda.yaml").read_text())
    assert set(outcomes.split("|")) <= {reason.replace(" ", "_") for reason in WORDS}


def test_probes_ask_for_services_that_there_are(deployment):
    (container,) = deployment["containers"]
    asked = {kind: container[kind]["grpc"]["service"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert asked["startupProbe"] in health.READINESS
    assert asked["readinessProbe"] in health.READINESS
    assert asked["livenessProbe"] == health.LIVENESS


def test_a_pod_has_the_time_to_finish_what_it_accepted(deployment):
    (container,) = deployment["containers"]
    drain_s = duration("--drain", container["args"][container["args"].index("--drain") + 1])
    (_, before_s) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert deployment["terminationGracePeriodSeconds"] >= float(before_s) + drain_s + 10
    assert container["resources"]["requests"] == container["resources"]["limits"]
