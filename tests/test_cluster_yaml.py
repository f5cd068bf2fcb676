"""cluster.yaml against the schema of the installed Ray: nobody can try `ray up` in a test."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()
MARKS = r"^# --- your own machines: begin ---\n(.*)^# --- your own machines: end ---$"


def own_machines() -> str:
    """The variant that stands in comments, without its comment marks."""
    (block,) = re.findall(MARKS, TEXT, re.MULTILINE | re.DOTALL)
    return re.sub("^# ?", "", block, flags=re.MULTILINE)


WRITTEN = {"aws": yaml.safe_load(TEXT), "own machines": yaml.safe_load(own_machines())}
every_variant = pytest.mark.parametrize("variant", WRITTEN)


def valid(written: dict) -> dict:
    """The whole configuration as `ray up` would use it.  Raises what Ray raises for one that it refuses."""
    whole = prepare_config(copy.deepcopy(written))
    validate_config(whole)
    return whole


@every_variant
def test_ray_accepts_it(variant):
    whole = valid(WRITTEN[variant])
    assert whole["file_mounts"] == {"/home/ray/rayltr": "."}
    amounts = [n for kind in whole["available_node_types"].values() for n in kind["resources"].values()]
    assert all(isinstance(amount, int) for amount in amounts)


@every_variant
def test_every_node_installs_the_ray_of_the_constraints(variant):
    """Without setup commands Ray's defaults would install a nightly build of Ray."""
    (version,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    whole = valid(WRITTEN[variant])
    for kind in ("head_setup_commands", "worker_setup_commands"):
        install = whole[kind][0]
        assert f'"ray[default,train,tune]=={version}"' in install
        assert "cd /home/ray/rayltr &&" in install and "--constraint constraints.txt" in install
    assert whole["docker"]["image"].startswith(f"rayproject/ray:{version}-")


@every_variant
def test_nothing_is_open_to_the_outside(variant):
    whole = valid(WRITTEN[variant])
    (start,) = [command for command in whole["head_start_ray_commands"] if "ray start" in command]
    assert start.count("--dashboard-host=") == start.count("--dashboard-host=127.0.0.1") == 1
    assert "security_group" not in whole["provider"]
    assert not any(re.search(r"(^|\s)(-p|-P|--publish)", option) for option in whole["docker"]["run_options"])


@every_variant
def test_trials_of_several_workers_are_steered_from_the_head(variant):
    """The name of the resource is the one that `rayltr.machines` looks for."""
    (name,) = re.findall(r'^DRIVER = "(\w+)"$', (ROOT / "rayltr/machines.py").read_text(), re.MULTILINE)
    whole = valid(WRITTEN[variant])
    head = whole["available_node_types"][whole["head_node_type"]]
    assert name in head["resources"] or f'--resources=\'{{"{name}":' in whole["head_start_ray_commands"][1]


def test_gpu_workers_come_when_they_are_asked_for_and_the_head_trains_nothing():
    kinds = valid(WRITTEN["aws"])["available_node_types"]
    assert kinds["head"]["resources"]["CPU"] == 0 and kinds["head"]["max_workers"] == 0
    assert kinds["gpu_spot"]["min_workers"] == 0 < kinds["gpu_spot"]["max_workers"]
    assert kinds["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in kinds["gpu_on_demand"]["node_config"]


@every_variant
@pytest.mark.parametrize("key", ["file_mount", "setup_command", "max_worker", "dashboard_host"])
def test_a_misspelt_key_is_refused(variant, key):
    with pytest.raises(ValidationError, match=key):
        valid({**WRITTEN[variant], key: 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_worker": 2}, "max_worker"),
        ({"resources": {"GPU": 0.5}}, "0.5 is not of type 'integer'"),
        ({"min_workers": 9}, "smaller than the sum of `min_workers`"),
    ],
)
def test_a_node_type_that_cannot_be_is_refused(change, message):
    written = copy.deepcopy(WRITTEN["aws"])
    written["available_node_types"]["gpu_spot"] |= change
    with pytest.raises((ValidationError, ValueError), match=message):
        valid(written)
