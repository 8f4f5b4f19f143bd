"""The cluster files against their programs' schemas, and against each other. Nothing is started."""

import copy
import gzip
import hashlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
SCHEMAS = ROOT.parent / "shared/schemas"
RAY_UP = ("aws", "gcp", "onprem")
CLOUDS = ("aws", "gcp")
FILES = sorted(CLUSTER.rglob("*.yaml"))
SCHEDULES = sorted((CLUSTER / "schedules").glob("*.*"))
KUBERNETES = (
    "kuberay/rayjob",
    "kuberay/raycluster",
    *(f"schedules/{file.stem}" for file in SCHEDULES if file in FILES),
)


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the file as `ray up` parses it, before any request to a cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    made = prepare_config(config)
    validate_config(made)
    return made


@cache
def kubernetes(name: str) -> dict[str, dict[str, Any]]:
    """Return the documents of a file by `kind/name`."""
    found = yaml.safe_load_all((CLUSTER / f"{name}.yaml").read_text())
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in found}


def rayjob() -> dict[str, Any]:
    account, job = kubernetes("kuberay/rayjob").values()
    assert (account["kind"], job["kind"]) == ("ServiceAccount", "RayJob")
    return job


def raycluster() -> dict[str, Any]:
    return kubernetes("kuberay/raycluster")["RayCluster/fracture"]


def cronjob() -> dict[str, Any]:
    return kubernetes("schedules/cronjob-submit")["CronJob/fracture-retrain"]["spec"]


def cronjob_pod() -> dict[str, Any]:
    return cronjob()["jobTemplate"]["spec"]["template"]["spec"]


RAYCRONJOB = kubernetes("schedules/raycronjob")["RayCronJob/fracture-retrain"]


def clusters() -> dict[str, dict[str, Any]]:
    return {
        "rayjob": rayjob()["spec"]["rayClusterSpec"],
        "raycluster": raycluster()["spec"],
        "raycronjob": RAYCRONJOB["spec"]["jobTemplate"]["rayClusterSpec"],
    }


def pods(name: str = "rayjob") -> dict[str, dict[str, Any]]:
    cluster = clusters()[name]
    (gpu,) = cluster["workerGroupSpecs"]
    return {"head": cluster["headGroupSpec"]["template"]["spec"], "gpu": gpu["template"]["spec"]}


@cache
def schema(kind: str) -> jsonschema.Draft7Validator:
    """Return KubeRay's schema of a kind. A RayJob's `submitterPodTemplate` has Kubernetes' own schema of a pod."""
    file = SCHEMAS / f"ray.io_{kind.lower()}s.yaml.gz"
    if not file.is_file():
        pytest.skip(f"KubeRay's schemas are not in {SCHEMAS}")
    crd = yaml.load(gzip.decompress(file.read_bytes()), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (v1,) = (version for version in crd["spec"]["versions"] if version["name"] == "v1")
    return jsonschema.Draft7Validator(closed(v1["schema"]["openAPIV3Schema"]))


def rayjob_schema() -> jsonschema.Draft7Validator:
    return schema("RayJob")


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with unknown keys refused, which Kubernetes would drop silently."""
    made = dict(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(made.get(key), dict):
            made[key] = closed(made[key])
    if "properties" in made:
        made["properties"] = {name: closed(value) for name, value in made["properties"].items()}
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


@cache
def dockerfile() -> str:
    return (CLUSTER / "Dockerfile").read_text()


@cache
def locked() -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def dry_make(*arguments: str) -> str:
    """Return the commands that make would run; `-o` makes it skip the installation."""
    command = ["make", "--dry-run", "--no-print-directory", "-o", ".venv/installed", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_takes_the_file(name: str):
    assert prepared(load(name))["cluster_name"] == "fracture"


@pytest.mark.parametrize("typo", [{"idle_timeout_minuets": 5}, {"docker": {"imgae": "x"}}, {"auth": {"user": "x"}}])
def test_ray_up_refuses_a_mistyped_key(typo: dict[str, Any]):
    with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
        prepared(load("aws") | typo)


@pytest.mark.parametrize("name", CLOUDS)
def test_gpu_machines_come_and_go(name: str):
    config = prepared(load(name))
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert {kind: (types[kind]["min_workers"], types[kind]["max_workers"]) for kind in types} == {
        "head": (0, 0),  # besides the head itself
        "gpu": (0, 4),
    }
    assert types["gpu"]["resources"] == {"CPU": 4, "GPU": 1}
    assert "GPU" not in types["head"]["resources"]
    assert config["idle_timeout_minutes"] == 10


def test_gpu_machines_are_spot_machines():
    aws, gcp = (load(name)["available_node_types"] for name in CLOUDS)
    assert aws["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gcp["gpu"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "InstanceMarketOptions" not in aws["head"]["node_config"]
    assert "scheduling" not in gcp["head"]["node_config"]


@pytest.mark.parametrize("kind", ["head", "gpu"])
def test_machines_have_the_named_accounts(kind: str):
    aws, gcp = (load(name)["available_node_types"][kind]["node_config"] for name in CLOUDS)
    account = {"head": "fracture-head", "gpu": "fracture-worker"}[kind]
    assert aws["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{account}")
    assert [a["email"] for a in gcp["serviceAccounts"]] == [f"{account}@PROJECT.iam.gserviceaccount.com"]


def test_no_port_but_ssh_is_opened():
    assert load("aws")["provider"]["security_group"] == {"GroupName": "fracture"}  # IpPermissions would add ports
    for kind in ("head", "gpu"):
        aws, gcp = (load(name)["available_node_types"][kind]["node_config"] for name in CLOUDS)
        assert {"SecurityGroupIds", "NetworkInterfaces", "UserData"}.isdisjoint(aws)
        assert "tags" not in gcp  # by which a firewall's rules find a machine
        (network,) = gcp["networkInterfaces"]
        assert network.keys() == {"network", "accessConfigs"}


WIDE_OPEN = (
    *("0.0.0.0", "::/0", "IpPermissions", "CidrIp", "sourceRanges", "hostPort", "hostNetwork", "NodePort"),
    *("LoadBalancer", "Ingress:", "kind: Ingress", "kind: Service\n", "--publish", " -p ", "EXPOSE"),
)


@pytest.mark.parametrize("file", [*FILES, CLUSTER / "Dockerfile", ROOT / "Makefile"], ids=lambda file: file.name)
def test_no_file_opens_a_port_to_everyone(file: Path):
    """No file opens 6379, 8265, 10001 or any other port."""
    text = file.read_text()
    if file.name == "Makefile":
        text = text.replace("ps -p ", "")
    assert [word for word in WIDE_OPEN if word in text] == []


def one_line(file: Path) -> list[str]:
    """Return the lines of a file, with commands of several lines joined, also in comments."""
    return re.sub(r"\\\n[#\s]*", " ", re.sub(r"(ulimit -n 65536;)\n\s+", r"\1 ", file.read_text())).splitlines()


OTHERS = [CLUSTER / "Dockerfile", ROOT / "Makefile", ROOT / "README.md", ROOT / "job/train.py"]
DOCUMENTS = sorted({*FILES, *SCHEDULES, *OTHERS})


def test_every_ray_that_is_started_keeps_its_dashboard_to_itself():
    starts = [line for file in DOCUMENTS for line in one_line(file) if re.search(r"(ray|\$\(RAY\)) start --head", line)]
    assert len(starts) == 4
    assert [re.findall(r"--dashboard-host=(\S+)", line) for line in starts] == [["127.0.0.1"]] * 4


def test_every_job_is_submitted_with_the_token_through_this_machine():
    shown = [line for file in DOCUMENTS for line in one_line(file) if "ray job submit --" in line]
    shown = [line for line in shown if not line.startswith("|")]  # a table of results
    assert len(shown) == 6
    assert [line for line in shown if "RAY_AUTH_MODE=token ray job submit" not in line] == []
    addresses = {a for line in shown for a in re.findall(r"--address (\S+)", line)}
    assert addresses == {"http://127.0.0.1:8265"}


def test_every_cluster_file_is_tested():
    assert {str(file.relative_to(CLUSTER)) for file in FILES} == {
        f"{n}.yaml" for n in (*RAY_UP, *KUBERNETES, "runtime-env")
    }
    assert {file.name for file in SCHEDULES} == {
        *("cronjob-submit.yaml", "submit.py", "raycronjob.yaml", "local.py", "cloud.sh"),
    }
    assert "ray start" not in (CLUSTER / "runtime-env.yaml").read_text()


def test_no_file_holds_a_secret_or_switches_the_token_off():
    for file in DOCUMENTS:
        text = file.read_text()
        assert set(re.findall(r"RAY_AUTH_MODE[=: ]+(\S+?)[\]\s\"]", text)) <= {"token"}, file
        assert not re.search(r"RAY_AUTH_TOKEN=|AKIA[0-9A-Z]{16}|PRIVATE KEY", text), file


@pytest.mark.parametrize("name", RAY_UP)
def test_every_node_has_the_token_and_asks_for_it(name: str):
    config = prepared(load(name))
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert re.search(r"^ENV .*\bRAY_AUTH_MODE=token\b", dockerfile(), re.MULTILINE)  # also started in other ways
    assert "HOME=/home/fracture" in dockerfile()  # where `ray up` puts ~/ of the container


@pytest.mark.parametrize("name", clusters())
def test_kuberay_asks_for_a_token(name: str):
    assert clusters()[name]["authOptions"] == {"mode": "token"}


def test_make_starts_a_ray_that_asks_for_a_token():
    starts, submits = dry_make("cluster-up"), dry_make("submit")
    assert "RAY_AUTH_MODE=token" in next(line for line in starts.splitlines() if "ray start --head" in line)
    assert "get-auth-token --generate" in starts
    assert "RAY_AUTH_MODE=token" in submits


@pytest.mark.parametrize("name", RAY_UP)
def test_the_dashboard_listens_on_the_machine_only(name: str):
    config = prepared(load(name))
    (head,) = (command for command in config["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1 " in head
    assert not any("dashboard-host" in command for command in config["worker_start_ray_commands"])


def test_the_dashboard_of_make_listens_on_the_machine_only():
    assert re.findall(r"--dashboard-host=(\S+)", dry_make("cluster-up")) == ["127.0.0.1"]


@pytest.mark.parametrize("name", clusters())
def test_the_dashboard_of_kuberay_stays_in_the_kubernetes_cluster(name: str):
    head = clusters()[name]["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert "enableIngress" not in head
    assert "hostNetwork" not in head["template"]["spec"]


@pytest.mark.parametrize("file", [*FILES, CLUSTER / "Dockerfile", ROOT / "Makefile"], ids=lambda file: file.name)
def test_no_file_names_every_address(file: Path):
    assert "0.0.0.0" not in file.read_text()


@pytest.mark.parametrize("made", [rayjob(), raycluster(), RAYCRONJOB], ids=lambda made: made["kind"])
def test_kuberay_files_follow_their_schemas(made: dict[str, Any]):
    schema(made["kind"]).validate(made)


# Keys of batch/v1: https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/cron-job-v1/ and job-v1.
CRONJOB_KEYS = {
    *("schedule", "timeZone", "startingDeadlineSeconds", "concurrencyPolicy", "suspend", "jobTemplate"),
    *("successfulJobsHistoryLimit", "failedJobsHistoryLimit"),
}
JOB_KEYS = {"activeDeadlineSeconds", "backoffLimit", "podFailurePolicy", "template"}


def test_the_cronjob_has_only_keys_of_kubernetes():
    assert cronjob().keys() <= CRONJOB_KEYS
    job = cronjob()["jobTemplate"]["spec"]
    assert job.keys() <= JOB_KEYS
    for rule in job["podFailurePolicy"]["rules"]:
        assert rule.keys() < {"action", "onExitCodes", "onPodConditions"}
        assert rule["action"] in ("FailJob", "Ignore", "Count", "FailIndex")
    made = rayjob()["spec"] | {"submitterPodTemplate": job["template"]}
    rayjob_schema().validate(rayjob() | {"spec": made})
    made["submitterPodTemplate"] = {"spec": cronjob_pod() | {"restartPolcy": "Never"}}
    with pytest.raises(jsonschema.ValidationError, match="'restartPolcy' was unexpected"):
        rayjob_schema().validate(rayjob() | {"spec": made})


def test_a_cronjob_starts_one_retraining_at_a_time_and_ends_it():
    spec = cronjob()
    assert spec["concurrencyPolicy"] == "Forbid"
    assert (spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) == (3, 3)
    assert 0 < spec["startingDeadlineSeconds"] < 7 * 86400
    job = spec["jobTemplate"]["spec"]
    assert job["backoffLimit"] == 2
    assert job["activeDeadlineSeconds"] < 7 * 86400  # it is over when the next one is due


def test_a_rejection_and_a_mistake_are_not_tried_again():
    fail, ignore = cronjob()["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert fail == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 10]}}
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert cronjob_pod()["restartPolicy"] == "Never"


def test_the_tick_is_the_name_of_the_job_that_its_retries_share():
    (container,) = cronjob_pod()["containers"]
    (tick,) = (each for each in container["env"] if each["name"] == "TICK")
    assert tick["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    assert [part for part in container["args"] if "TICK" in part] == ["--submission-id=$(TICK)", "--tick=$(TICK)"]


def test_the_cronjob_finds_the_permanent_cluster():
    """KubeRay names the service and the secret after the RayCluster."""
    name = raycluster()["metadata"]["name"]
    (container,) = cronjob_pod()["containers"]
    assert f"--address=http://{name}-head-svc:8265" in container["args"]
    (token,) = (each for each in container["env"] if each["name"] == "RAY_AUTH_TOKEN")
    assert token["valueFrom"] == {"secretKeyRef": {"name": name, "key": "auth_token"}}
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


def test_an_evicted_pod_stays_until_the_training_has_saved():
    from cluster.schedules import submit

    (head,) = pods("raycluster")["head"]["containers"]
    (saving,) = (int(each["value"]) for each in head["env"] if each["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    assert saving < submit.STOPPING < cronjob_pod()["terminationGracePeriodSeconds"]


def test_the_pod_that_submits_has_no_access_to_kubernetes():
    assert cronjob_pod()["automountServiceAccountToken"] is False


def test_clusters_for_one_job_are_equal():
    made = clusters()
    assert made["raycronjob"] == made["rayjob"]


def test_the_permanent_cluster_adds_gpus_on_demand():
    spec = raycluster()["spec"]
    (group,) = spec["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 4)
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 600
    assert spec["autoscalerOptions"]["securityContext"] == pods()["head"]["containers"][0]["securityContext"]
    # The autoscaler on the head needs access to the Kubernetes API, the workers do not.
    assert kubernetes("kuberay/raycluster")["ServiceAccount/fracture"]["automountServiceAccountToken"] is False
    assert pods("raycluster")["head"]["automountServiceAccountToken"] is True
    assert "automountServiceAccountToken" not in pods("raycluster")["gpu"]


def test_only_failures_that_a_retry_can_fix_get_a_new_cluster():
    """A RayJob knows no exit codes, so its entrypoint turns two of them into success."""
    assert RAYCRONJOB["spec"]["jobTemplate"]["backoffLimit"] == 2
    entrypoint = RAYCRONJOB["spec"]["jobTemplate"]["entrypoint"]
    for left, kept in {0: 0, 10: 0, 2: 0, 1: 1}.items():
        script = re.sub(r"python /app/job/retrain.py [^;]*;", f"(exit {left});", entrypoint)
        assert script != entrypoint
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (kept, f"exit code {left}\n")


def test_every_schedule_of_kubernetes_is_the_same():
    made = [cronjob(), RAYCRONJOB["spec"]]
    assert {(each["schedule"], each["timeZone"]) for each in made} == {("17 3 * * 1", "Etc/UTC")}


def test_the_header_of_raycronjob_names_what_it_lacks():
    lacking = CRONJOB_KEYS - {"schedule", "timeZone", "suspend", "jobTemplate"}
    header = (CLUSTER / "schedules/raycronjob.yaml").read_text().partition("apiVersion")[0]
    assert all(word in header for word in ("alpha", "feature-gates", "startingDeadlineSeconds", "concurrencyPolicy"))
    assert "history limits" in header
    known = schema("RayCronJob").schema["properties"]["spec"]["properties"]
    assert lacking.isdisjoint(known)
    assert "timeZone" in known


@pytest.mark.parametrize(
    "path",
    [
        ("spec", "backofLimit"),
        ("spec", "rayClusterSpec", "authOption"),
        ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "serviceAcountName"),
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limit"),
    ],
    ids=lambda path: path[-1],
)
def test_a_mistyped_key_of_the_rayjob_is_found(path: tuple[str | int, ...]):
    job = copy.deepcopy(rayjob())
    at: Any = job
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = 1
    with pytest.raises(jsonschema.ValidationError, match=rf"Additional properties.*'{path[-1]}' was unexpected"):
        rayjob_schema().validate(job)


def test_an_evicted_machine_is_drained_and_stays_until_the_job_has_saved():
    (container,) = pods()["gpu"]["containers"]
    command = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    drained, slept = re.search(r"--deadline-remaining-seconds (\d+); sleep (\d+)$", command).groups()
    assert int(drained) <= int(slept) < pods()["gpu"]["terminationGracePeriodSeconds"]
    for cloud in CLOUDS:
        assert f"python /app/cluster/spot_notice.py {cloud} " in load(cloud)["worker_start_ray_commands"][-1]
        assert load(cloud)["worker_start_ray_commands"][-1].endswith("&")


def test_a_job_that_is_stopped_has_time_to_save():
    from fracture.config import RecoveryConfig

    stated = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S\D+(\d+)", "".join(file.read_text() for file in FILES))
    stated += re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", (ROOT / "Makefile").read_text())
    assert len(stated) == 7
    assert all(int(seconds) > RecoveryConfig().grace_seconds for seconds in stated)


def test_the_rayjob_ends_and_a_retry_resumes():
    spec = rayjob()["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert (spec["ttlSecondsAfterFinished"], spec["activeDeadlineSeconds"], spec["backoffLimit"]) == (300, 86400, 2)
    assert " --run first " in spec["entrypoint"]


def test_the_rayjob_has_a_gpu_for_each_worker():
    spec = rayjob()["spec"]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 2
    assert spec["entrypoint"].endswith(" --workers 2 --gpu")
    assert pods()["gpu"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


PODS = {f"{name}-{kind}": made for name in clusters() for kind, made in pods(name).items()}
PODS["cronjob-submit"] = cronjob_pod()


@pytest.mark.parametrize("made", PODS.values(), ids=PODS)
def test_pods_are_bounded_and_not_root(made: dict[str, Any]):
    (container,) = made["containers"]
    assert made["securityContext"]["runAsNonRoot"] is True
    assert made["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert f"USER {made['securityContext']['runAsUser']}\n" in dockerfile()
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert made.get("serviceAccountName") in ("fracture", None)


def test_ray_is_one_version():
    assert {cluster["rayVersion"] for cluster in clusters().values()} == {locked()["ray"]}
    assert "requirements.lock" in dockerfile()  # the image takes its Ray from there
    (wanted,) = (line for line in project()["dependencies"] if line.startswith("ray["))
    assert wanted.split("==")[1].rstrip("*") in locked()["ray"]


def test_the_image_has_a_supported_version_of_python():
    assert project()["requires-python"] == ">=3.11,<3.14"
    assert re.findall(r"^FROM python:(\d+\.\d+)\.\d+-slim", dockerfile(), re.MULTILINE) == ["3.11"]


@pytest.mark.parametrize("name", RAY_UP)
def test_images_are_of_this_version(name: str):
    docker = load(name)["docker"]
    image = f"REGISTRY/fracture:{project()['version']}"
    assert (docker["head_image"], docker["worker_image"]) == (image, f"{image}-gpu")
    assert {name: made["containers"][0]["image"] for name, made in PODS.items()} == {
        name: f"{image}-gpu" if name.endswith("-gpu") else image for name in PODS
    }
    assert f"-t {image} ." in dockerfile()
    assert f"-t {image}-gpu --build-arg GPU=1 ." in dockerfile()


def test_only_the_code_enters_the_image():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    programs = [f"cluster/{name}.py" for name in ("spot_notice", "schedules/submit")]
    wanted = ["requirements.lock", "pyproject.toml", "README.md", "LICENSE", "job", "fracture", *programs]
    assert rules == ["*", *(f"!{name}" for name in wanted), "**/__pycache__"]
    copies = re.findall(r"^COPY (.+) \S+$", dockerfile(), re.MULTILINE)
    assert " ".join(copies).split() == wanted
    assert cronjob_pod()["containers"][0]["command"][1].removeprefix("/app/") in wanted


def test_the_image_ends_as_a_user_who_is_not_root():
    assert dockerfile().splitlines()[-1] == "USER 1000"
    assert re.findall(r"^USER (\S+)", dockerfile(), re.MULTILINE) == ["1000"]


def test_the_image_checks_the_hash_of_every_dependency():
    """But for the CUDA libraries: pip refuses, beside hashes, a requirement that has none."""
    installs = re.findall(r"pip install --no-cache-dir (.*?)(?:;.*)?$", dockerfile(), re.MULTILINE)
    assert installs == [
        "--require-hashes -r requirements.lock",
        '--constraint /tmp/pins.txt "tensorflow[and-cuda]"',
        "--no-deps --no-build-isolation --editable .",
    ]


def test_the_cuda_libraries_are_installed_beside_the_locked_versions():
    (pattern,) = re.findall(r"grep -oE '(.*)' requirements.lock", dockerfile())
    command = ["grep", "-oE", pattern, str(ROOT / "requirements.lock")]
    pins = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert pins == [f"{name}=={version}" for name, version in locked().items()]


def test_the_lock_is_read_on_the_node():
    """Ray puts `pip: requirements.lock` into an environment variable; Linux allows 128 KiB there."""
    read, name = load("runtime-env")["pip"]
    assert read == "-r ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/requirements.lock"
    lock = (ROOT / "requirements.lock").read_bytes()
    assert name == f"# lock {hashlib.sha256(lock).hexdigest()[:12]}"  # `make lock` writes it
    assert len(lock) > 128 * 1024


def flags_of_the_job(file: Path) -> list[str]:
    text = re.sub(r"\\\n[# ]*", "", file.read_text())  # a command on two lines, in a comment or not
    return re.findall(r"(?<!\S)--[\w-]+", " ".join(re.findall(r"job/train\.py (.*)", text)))


def flags_of_retraining() -> set[str]:
    """Return the flags of every command that a schedule runs."""
    from cluster.schedules import local

    parts = local.build_command(*["s3://b/d"] * 2, "week", "seed", "2", "https://example.org")
    parts += cronjob_pod()["containers"][0]["args"][3:]
    parts += RAYCRONJOB["spec"]["jobTemplate"]["entrypoint"].split()
    parts += re.search(r"#   cluster/schedules/cloud.sh (.*\n.*)", (CLUSTER / "schedules/cloud.sh").read_text())[
        1
    ].split()
    return {re.sub("=.*", "", part).rstrip(";") for part in parts if part.startswith("--") and part != "--"}


def test_every_flag_of_a_schedule_is_one_of_the_retraining():
    flags = flags_of_retraining()
    assert flags == {"--data", "--registry", "--tick", "--every", "--workers", "--gpu", "--config", "--notify"}
    if not (ROOT / "job/retrain.py").exists():
        pytest.skip("job/retrain.py is not here yet")
    command = [sys.executable, str(ROOT / "job/retrain.py"), "--help"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [flag for flag in flags if f"\n  {flag}" not in known] == []


def test_every_flag_in_a_cluster_file_is_one_of_the_job():
    used = {file.name: flags_of_the_job(file) for file in FILES}
    flags = ["--data", "--storage", "--run", "--workers", "--gpu"]
    named = {"aws.yaml", "gcp.yaml", "onprem.yaml", "rayjob.yaml", "raycluster.yaml"}
    assert used == {name: flags if name in named else [] for name in used}
    command = [sys.executable, str(ROOT / "job/train.py"), "--help"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [flag for flag in flags if f"\n  {flag}" not in known] == []


def test_submit_takes_what_local_train_takes():
    given = ("DATA=/my data", "CONFIG=seed", "WORKERS=3", "RUN=first")
    flags = 'job/train.py --data "/my data" --config "seed" --workers 3 --run "first"'
    for target in ("local-train", "submit"):
        assert flags in re.sub(" +", " ", dry_make(target, *given))


def test_schedule_takes_what_its_program_does():
    command = re.sub(
        " +", " ", dry_make("schedule", "DATA=/my data", "REGISTRY=/a registry", "EVERY=day", "CONFIG=seed")
    )
    assert 'local.py --data "/my data" --registry "/a registry" --every "day" --config "seed"' in command.replace(
        " \\\n", ""
    )
    assert "/schedule/" in (ROOT / ".gitignore").read_text().splitlines()
