"""Files under deploy/ name only metrics, flags and paths that exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from retrieval.commands.serve import command
from retrieval.observability.metric_catalogue import CATALOGUE, FORMER_NAMES

DEPLOY = Path(__file__).parents[2] / "deploy"
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
EXPOSED = {
    name + suffix: definition.labels
    for name, definition in CATALOGUE.items()
    for suffix in SUFFIXES[definition.kind]
}
NAME = re.compile(r"\bomni_\w+")
LABELS = re.compile(r"(omni_\w+)\{([^}]*)\}")


def expressions() -> list[str]:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
    found = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    found += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return found


@pytest.mark.parametrize("expression", expressions())
def test_expressions_name_metrics_and_labels_that_exist(expression: str) -> None:
    names = NAME.findall(expression)
    assert names and set(names) <= set(EXPOSED), set(names) - set(EXPOSED)
    assert not set(names) & set(FORMER_NAMES)
    for name, conditions in LABELS.findall(expression):
        for condition in conditions.split(","):
            label = re.split(r"[=!~]", condition, maxsplit=1)[0].strip()
            assert label in EXPOSED[name], f"{name} has no label {label}"


def test_alert_of_not_serving_notices_a_server_that_is_gone() -> None:
    """Its own metrics are gone with it; what is left is what Prometheus says of the job."""
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text())
    scraping = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    alerts = {rule.get("alert"): rule["expr"] for g in rules["groups"] for rule in g["rules"]}
    (job,) = [config["job_name"] for config in scraping["scrape_configs"]]
    assert f'up{{job="{job}"}} == 0' in alerts["OmniNotServing"]


def test_dashboard_panels_have_places_of_their_own() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) and len({p["id"] for p in dashboard["panels"]}) == len(
        places
    )


def serve_arguments() -> dict[str, list[str]]:
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "omnisearchsage.yml").read_text())
    deployment = next(one for one in documents if one["kind"] == "Deployment")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    return {"compose": compose["services"]["omni"]["command"], "kubernetes": container["args"]}


@pytest.mark.parametrize("which", ["compose", "kubernetes"])
def test_serve_takes_the_flags_of_the_files(which: str, tmp_path: Path) -> None:
    name, *arguments = serve_arguments()[which]
    assert name == "serve"
    tokens = tmp_path / "tokens.toml"
    tokens.touch()
    given = [
        re.sub(r"=/(run/secrets/tokens|secrets/tokens.toml)$", f"={tokens}", a) for a in arguments
    ]
    with command.make_context("serve", given) as context:
        params: dict[str, Any] = context.params
    assert params["host"] == "0.0.0.0" and params["tokens"] == tokens
    assert params["probe_port"] == 9465


def test_mounted_files_exist() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
