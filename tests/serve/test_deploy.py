"""The deployment files match the server: settings, probes, metrics and times."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from gpt_dist.inference.decoder import Decoder
from gpt_dist.model.gpt import GPT
from gpt_dist.v1 import generation_service_pb2 as api
from serve.engine.scheduler import Scheduler
from serve.metrics import Metrics
from serve.options import PREFIX, Options
from tests.components import require

LAUNCH = Path(__file__).parents[2] / "launch"


def manifests() -> dict[str, Any]:
    """Kubernetes objects by kind."""
    found = {}
    for path in sorted((LAUNCH / "k8s").glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            found.setdefault(document["kind"], document)  # of two services the headless one
    return found


def test_the_deployment_fits_the_server() -> None:
    pod = manifests()["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    names = {PREFIX + field.name.upper() for field in fields(Options)}
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert set(environment) <= names | {"XDG_CACHE_HOME"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert str(ports["grpc"]) == environment[f"{PREFIX}PORT"]
    assert str(ports["http"]) == environment[f"{PREFIX}HTTP_PORT"]
    assert str(ports["metrics"]) == environment[f"{PREFIX}METRICS_PORT"]
    services = api.DESCRIPTOR.services_by_name
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == ports["grpc"]
        assert container[probe]["timeoutSeconds"] >= 5  # the default, 1, ends in a busy second
        assert container[probe]["failureThreshold"] >= 3
        name = container[probe]["grpc"].get("service", "")
        assert name in ("", services["GenerationService"].full_name)
    wait = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    grace = float(environment[f"{PREFIX}GRACE"])
    assert pod["terminationGracePeriodSeconds"] >= wait + grace + 5


def test_the_service_is_headless_and_finds_the_pods() -> None:
    found = manifests()
    service, deployment = found["Service"]["spec"], found["Deployment"]["spec"]
    assert service["clusterIP"] == "None"
    labels = deployment["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    [metric] = found["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "gpt_dist_load"
    labels = deployment["selector"]["matchLabels"]
    [spread] = deployment["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    budget = found["PodDisruptionBudget"]["spec"]
    assert budget["selector"]["matchLabels"] == labels
    assert budget["maxUnavailable"] < deployment["replicas"]
    allowed = found["NetworkPolicy"]["spec"]["ingress"][0]["ports"]
    assert [port["port"] for port in allowed] == ["grpc", "http"]


@pytest.mark.slow
def test_kustomize_builds_it() -> None:
    kubectl = require("kubectl")
    built = subprocess.run(
        [kubectl, "kustomize", LAUNCH / "k8s"], capture_output=True, text=True, check=True
    )
    kinds = {document["kind"] for document in yaml.safe_load_all(built.stdout)}
    assert kinds == set(manifests()) - {"Kustomization"}


def test_rules_and_dashboard_use_metrics_that_exist(model: GPT) -> None:
    metrics = Metrics()
    metrics.watch(Scheduler(Decoder(model, max_slots=1, dtype="fp32")))
    metrics.calls.labels("x", "OK")
    metrics.call_seconds.labels("x")
    metrics.rejections.labels("queue_full")
    metrics.caller_tokens.labels("x", "prompt")
    text = generate_latest(metrics.registry).decode()
    exist = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"}
    rules = yaml.safe_load((LAUNCH / "monitoring/gpt_dist.rules.yaml").read_text())
    every = [rule for group in rules["groups"] for rule in group["rules"]]
    exist |= {rule["record"] for rule in every if "record" in rule}
    dashboard = json.loads((LAUNCH / "monitoring/gpt_dist.json").read_text())
    expressions = [rule["expr"] for rule in every] + [
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    ]
    used = {name for text in expressions for name in re.findall(r"\bgpt_dist[_:][\w:]+", text)}
    assert used - exist == set()
    unused = {name for name in exist if re.fullmatch(r"gpt_dist_\w+(?<!_created)(?<!_sum)", name)}
    assert len(used & unused) > 12


@pytest.mark.slow
def test_the_slurm_script_is_sound() -> None:
    script = LAUNCH / "slurm/serve.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    checked = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), script], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    flags = set(re.findall(r"(?<=\s)--[a-z-]+", script.read_text().split("-m serve", 2)[-1]))
    known = {f"--{field.name.replace('_', '-')}" for field in fields(Options)}
    assert {"--host", "--auth-token-file", "--grace"} <= flags & known
