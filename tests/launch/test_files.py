"""Scripts, manifests and images pass linters and schemas."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
KUBERNETES = "1.34"
DOCKERFILES = sorted((LAUNCH / "docker").glob("*.Dockerfile"))


def closed(**properties):
    """An object with these properties and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


# The part of JobSet v1alpha2 that is used here; a job's own template is checked as a Job.
RULE = closed(
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons={"type": "array", "items": {"type": "string"}},
)
JOB = closed(
    name={"type": "string"},
    replicas={"type": "integer"},
    template=closed(spec={"type": "object"}),
)
JOBSET = closed(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata={"type": "object"},
    spec=closed(
        network=closed(enableDNSHostnames={"type": "boolean"}),
        failurePolicy=closed(
            maxRestarts={"type": "integer"}, rules={"type": "array", "items": RULE}
        ),
        replicatedJobs={"type": "array", "items": JOB},
    ),
)


def tool(name):
    """Returns the path of a linter that the extra `dev` brings."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"make install installs {name}"
    return found


def manifests(name):
    text = (LAUNCH / "gke" / name).read_text()
    return list(yaml.safe_load_all(text))


def jobs(jobset):
    return [each["template"]["spec"] for each in jobset["spec"]["replicatedJobs"]]


def test_shell_scripts_pass_shellcheck():
    subprocess.run([tool("shellcheck"), str(LAUNCH / "slurm" / "train.sbatch")], check=True)


def test_storage_is_what_kubernetes_takes():
    for manifest in manifests("storage.yaml"):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["gpu.yaml", "tpu.yaml"])
def test_jobs_are_what_kubernetes_and_jobset_take(name):
    [jobset] = manifests(name)
    jsonschema.validate(jobset, JOBSET)
    for spec in jobs(jobset):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", ["gpu.yaml", "tpu.yaml"])
def test_jobs_heed_exit_codes_and_agree_with_themselves(name):
    [jobset] = manifests(name)
    [spec] = jobs(jobset)
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert 65 in rule["onExitCodes"]["values"] and 75 not in rule["onExitCodes"]["values"]
    # Any other failure ends the job with another reason, and the set starts again.
    assert spec["backoffLimit"] == 0
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == [
        "PodFailurePolicy"
    ]
    assert spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    claims = {each["metadata"]["name"] for each in manifests("storage.yaml")}
    for volume in pod["volumes"]:
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in claims


def test_gpu_pods_find_the_coordinator():
    [jobset] = manifests("gpu.yaml")
    [job], [spec] = jobset["spec"]["replicatedJobs"], jobs(jobset)
    name = jobset["metadata"]["name"]
    values = {each["name"]: each for each in spec["template"]["spec"]["containers"][0]["env"]}
    assert values["JAXTUNE_COORDINATOR"]["value"] == f"{name}-{job['name']}-0-0.{name}:8476"
    assert int(values["JAXTUNE_PROCESSES"]["value"]) == spec["completions"]
    assert "job-completion-index" in str(values["JAXTUNE_PROCESS"]["valueFrom"])


def test_slices_have_as_many_chips_as_hosts_ask_for():
    [jobset] = manifests("tpu.yaml")
    [spec] = jobs(jobset)
    pod = spec["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert rows * columns == chips * spec["completions"]


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_images_are_linted_pinned_and_not_root(file):
    subprocess.run([tool("hadolint"), str(file)], check=True)
    text = file.read_text()
    assert re.search(r"^FROM python:\d+\.\d+\.\d+-slim-\w+$", text, re.MULTILINE)
    assert "--constraint constraints.txt" in text
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000"
    extra = re.search(r'"\.\[(\w+)\]"', text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extra and extra[1] in project["optional-dependencies"]


def test_images_install_versions_that_the_package_allows():
    lines = (LAUNCH / "docker" / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pinned[wanted.name.lower()]), text
