"""cluster.yaml and cluster/kuberay.yaml against the installed Ray: nobody can try a cloud in a test."""

import copy
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import hash_runtime_conf, prepare_config, validate_config
from ray.scripts.scripts import start

from rayltr import command, search
from rayltr.machines import DRIVER

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()
KUBERAY = (ROOT / "cluster/kuberay.yaml").read_text()
MANUAL = (ROOT / "docs/cluster.md").read_text()
MARKS = r"^# --- your own machines: begin ---\n(.*)^# --- your own machines: end ---$"
(RAY,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
INSTALL = f'"ray[default,train,tune]=={RAY}" /home/ray/rayltr/rayltr-*.whl'


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


def docker_options(whole: dict) -> list[list[str]]:
    return [shlex.split(option) for option in whole["docker"]["run_options"]]


def environment(whole: dict) -> dict[str, str]:
    """What every process in a container finds in its environment."""
    return dict(words[1].split("=", 1) for words in docker_options(whole) if words[0] == "--env")


@every_variant
def test_ray_accepts_it(variant):
    amounts = [
        n for kind in valid(WRITTEN[variant])["available_node_types"].values() for n in kind["resources"].values()
    ]
    assert all(isinstance(amount, int) for amount in amounts)


@every_variant
def test_every_node_installs_the_wheel_and_the_ray_of_the_constraints(variant):
    """Without setup commands Ray's defaults would install a nightly build of Ray."""
    whole = valid(WRITTEN[variant])
    for kind in ("head_setup_commands", "worker_setup_commands"):
        install, again = whole[kind][:2]
        assert install == f"pip install --constraint /home/ray/rayltr/constraints.txt {INSTALL}"
        assert "--no-deps --force-reinstall /home/ray/rayltr/rayltr-*.whl" in again
    assert whole["file_mounts"]["/home/ray/rayltr"] == "dist"
    assert whole["docker"]["image"].startswith(f"rayproject/ray:{RAY}-")
    assert f'"ray[default]=={RAY}"' in TEXT


def test_the_constraints_are_the_ray_that_is_installed():
    assert version("ray") == RAY


@every_variant
def test_what_is_mounted_can_be_hashed_once_it_is_built(variant, tmp_path, monkeypatch):
    """`ray up` reads every mounted path: those that the steps above the file make are all it wants."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    mounts = valid(WRITTEN[variant])["file_mounts"]
    with pytest.raises(FileNotFoundError, match="dist"):
        hash_runtime_conf(mounts, None, variant)
    for made in ("dist/rayltr-0.1.0-py3-none-any.whl", "dist/constraints.txt", ".ray/auth_token"):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        (tmp_path / made).write_text("made")
    assert hash_runtime_conf(mounts, None, variant)[0]


@every_variant
def test_nothing_is_open_to_the_outside(variant):
    whole = valid(WRITTEN[variant])
    (begin,) = [command for command in whole["head_start_ray_commands"] if "ray start" in command]
    assert begin.count("--dashboard-host=") == begin.count("--dashboard-host=127.0.0.1") == 1
    assert "security_group" not in whole["provider"]
    assert not {"-p", "-P", "--publish", "--publish-all"} & {words[0] for words in docker_options(whole)}


@every_variant
def test_a_token_is_asked_for_and_none_is_written_down(variant):
    whole = valid(WRITTEN[variant])
    found = environment(whole)
    assert found["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in found
    assert whole["file_mounts"][found["RAY_AUTH_TOKEN_PATH"]] == "~/.ray/auth_token"
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"


@every_variant
@pytest.mark.parametrize("kind", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_start_knows_its_options(variant, kind):
    """Read by the command itself, which is not run."""
    stop, begin = valid(WRITTEN[variant])[kind]
    assert stop == "ray stop"
    words = shlex.split(begin.split("; ")[-1])
    asked = start.make_context("ray start", words[2:]).params
    assert words[:2] == ["ray", "start"] and asked["disable_usage_stats"]
    assert asked["head"] == (kind == "head_start_ray_commands") == (asked["address"] is None)


@every_variant
def test_trials_of_several_workers_are_steered_from_the_head(variant):
    whole = valid(WRITTEN[variant])
    head = whole["available_node_types"][whole["head_node_type"]]
    assert DRIVER in head["resources"] or f'--resources=\'{{"{DRIVER}":' in whole["head_start_ray_commands"][1]


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


CLAIM, CLUSTER, JOB = yaml.safe_load_all(KUBERAY)
HEAD, WORKERS = CLUSTER["spec"]["headGroupSpec"], CLUSTER["spec"]["workerGroupSpecs"]
every_group = pytest.mark.parametrize("group", [HEAD, *WORKERS], ids=lambda own: own.get("groupName", "head"))


def container(group: dict) -> dict:
    """The one container of a group's pods, the one in which KubeRay starts Ray."""
    (own,) = group["template"]["spec"]["containers"]
    return own


def test_kubernetes_is_asked_for_a_claim_a_cluster_and_a_job():
    about = [(own["apiVersion"], own["kind"], own["metadata"]["labels"]["part"]) for own in (CLAIM, CLUSTER, JOB)]
    assert about == [
        ("v1", "PersistentVolumeClaim", "cluster"),
        ("ray.io/v1", "RayCluster", "cluster"),
        ("ray.io/v1", "RayJob", "search"),
    ]
    assert {own["metadata"]["name"] for own in (CLAIM, CLUSTER, JOB)} == {"rayltr-shared", "rayltr", "rayltr-search"}


def test_the_autoscaler_reads_the_ray_cluster():
    """By the function with which it does so on Kubernetes, which also validates what it found."""
    whole = copy.deepcopy(CLUSTER)
    whole["metadata"]["namespace"] = "default"
    found = _derive_autoscaling_config_from_ray_cr(whole)
    head, gpu = found["available_node_types"]["headgroup"], found["available_node_types"]["gpu"]
    assert (head["resources"]["CPU"], head["resources"][DRIVER]) == (0, 1000) and "GPU" not in head["resources"]
    assert (gpu["resources"]["CPU"], gpu["resources"]["GPU"]) == (8, 1)
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8) and found["idle_timeout_minutes"] == 10


@every_group
def test_pods_run_the_pinned_ray_and_see_the_shared_folder(group):
    own, spec = container(group), group["template"]["spec"]
    assert str(CLUSTER["spec"]["rayVersion"]) == RAY and own["image"].endswith(f"-ray{RAY}")
    mounted = {each["name"]: each["mountPath"] for each in own["volumeMounts"]}
    volumes = {each["name"]: each for each in spec["volumes"]}
    assert mounted == {"shared": "/mnt/shared", "shm": "/dev/shm"} and set(volumes) == set(mounted)
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    assert spec["restartPolicy"] == "Never"


def test_the_image_is_built_from_the_wheel_on_the_pinned_ray():
    recipe = KUBERAY.split("\napiVersion")[0]
    assert re.findall(r"FROM rayproject/ray:(\S+?)-py", recipe) == [RAY]
    assert INSTALL in recipe
    assert set(re.findall(r"-ray(\d[\d.]*\d)", KUBERAY)) == {RAY}


@every_group
def test_pods_ask_for_what_they_may_use(group):
    """Otherwise Ray counts on CPUs and memory that Kubernetes gives to others."""
    resources = container(group)["resources"]
    assert resources["limits"] == resources["requests"] and {"cpu", "memory"} <= set(resources["limits"])
    assert all(isinstance(amount, str) for amount in resources["limits"].values())


def test_many_nodes_write_to_the_claim():
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    assert {"storageClassName", "resources"} <= set(CLAIM["spec"])


@every_group
def test_ray_start_knows_the_parameters_of_the_pods(group):
    """Strings, as the operator makes a command line of them."""
    assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    start.make_context("ray start", [f"--{name}={value}" for name, value in group["rayStartParams"].items()])


@every_group
def test_pods_ask_for_a_token_and_report_nothing(group):
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    found = {own["name"]: own["value"] for own in container(group)["env"]}
    assert found["RAY_USAGE_STATS_ENABLED"] == "0" and not any("TOKEN" in name for name in found)


def test_the_head_is_reached_from_inside_alone():
    assert HEAD["serviceType"] == "ClusterIP" and "enableIngress" not in HEAD
    assert {own["containerPort"] for own in container(HEAD)["ports"]} == {6379, 8265}


def test_the_job_runs_on_the_cluster_above():
    assert JOB["spec"]["clusterSelector"] == {"ray.io/cluster": CLUSTER["metadata"]["name"]}


def searches(text: str) -> list[list[str]]:
    """The arguments of every search command in a text; lines that end in a backslash go on in the next one."""
    text = re.sub(r"\\\n#?\s*", "", text)
    return [shlex.split(found) for found in re.findall(r"python -m rayltr\.search ([^\"\n`#]+)", text)]


COMMANDS = [
    pytest.param(words, id=name)
    for name, text in {"cluster.yaml": TEXT, "kuberay.yaml": JOB["spec"]["entrypoint"], "cluster.md": MANUAL}.items()
    for words in searches(text)
]


def test_commands_were_found_in_every_file():
    assert {own.id for own in COMMANDS} == {"cluster.yaml", "kuberay.yaml", "cluster.md"}


@pytest.mark.parametrize("words", COMMANDS)
def test_the_search_is_one_that_can_be_asked_for(words):
    """On a cluster that grows from nothing, the number of trials and their GPUs must be said."""
    options = command.checked(search.parser().parse_args(words))
    assert options.address == "auto" and options.storage == "/mnt/shared/runs"
    assert options.concurrent > 0 and options.gpus_per_trial is not None
    assert str(options.data).startswith("/mnt/shared/")


def test_a_trial_fits_the_machines_that_are_asked_for():
    (words,) = searches(JOB["spec"]["entrypoint"])
    options = search.parser().parse_args(words)
    limits = container(WORKERS[0])["resources"]["limits"]
    assert options.cpus_per_trial <= int(limits["cpu"]) and options.gpus_per_trial <= int(limits["nvidia.com/gpu"])
    assert options.concurrent <= WORKERS[0]["maxReplicas"]
