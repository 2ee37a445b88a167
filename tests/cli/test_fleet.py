"""The files of docs/examples/fleet: metrics of iobmd for node_exporter, Prometheus and Grafana."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from iobmd.tools.bench.result import launcher

FLEET = Path(__file__).parents[2] / "docs" / "examples" / "fleet"
PAGE = FLEET.parents[1] / "howto" / "prometheus.md"
FILES = ("iobmd_host.prom", "iobmd_services.prom")
Samples = dict[str, list[dict[str, str]]]


def collect(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run `collect` with an `iobmd` that executes `command`."""
    program = folder / "bin" / "iobmd"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)
    target = folder / "textfile"
    target.mkdir(exist_ok=True)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["sh", FLEET / "collect", target], env=environment, capture_output=True, text=True, check=False, timeout=100
    )


def samples(folder: Path) -> Samples:
    """Return the labels of each sample of all files, by the name of the metric."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Samples = {}
    for path in (folder / "textfile").iterdir():
        for family in text_string_to_metric_families(path.read_text()):
            found.setdefault(family.name, []).extend(sample.labels for sample in family.samples)
    return found


def expressions() -> list[str]:
    """Return the queries of the dashboard, the page and the rules."""
    panels = json.loads((FLEET / "grafana.json").read_text())["panels"]
    of_page = re.findall(r"^\| .*? \| `(.*)` \|$", PAGE.read_text(), re.MULTILINE)
    of_rules = (FLEET / "iobmd.rules.yml").read_text()
    return [*(target["expr"] for panel in panels for target in panel["targets"]), *of_page, of_rules]


@pytest.mark.needs("root", "prometheus_client")
def test_every_metric_and_label_that_is_queried_exists(tmp_path: Path) -> None:
    done = collect(tmp_path, f'exec {" ".join(launcher())} "$@"')
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "textfile").iterdir()) == sorted(FILES)
    found = samples(tmp_path)
    queried = 0
    for expression in expressions():
        for name, matchers in re.findall(r"(?<![:\w])(iobmd_\w+)(?:\{([^}]*)\})?", expression):
            if "_process_" in name:
                continue
            queried += 1
            labelled = found[name]
            for label, operator, value in re.findall(r'(\w+)(=~?)"([^"]*)"', matchers):
                if label in ("instance", "service"):  # of Prometheus, and of the host
                    continue
                values = {labels[label] for labels in labelled}
                assert set(value.split("|") if operator == "=~" else [value]) <= values, (name, label)
    assert queried > 15


def test_a_command_that_fails_leaves_the_old_files(tmp_path: Path) -> None:
    first = collect(tmp_path, "echo first")
    assert first.returncode == 0, first.stderr
    failed = collect(tmp_path, "echo second; exit 3")
    assert failed.returncode == 3
    assert [(tmp_path / "textfile" / name).read_text() for name in FILES] == ["first\n", "first\n"]


@pytest.mark.needs("promtool")
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "rules", "iobmd.rules.yml"],
        ["test", "rules", "iobmd.rules.test.yml"],
        ["check", "config", "prometheus.yml"],
    ],
    ids=" ".join,
)
def test_promtool_accepts(arguments: list[str]) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=FLEET, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
