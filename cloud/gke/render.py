"""`python3 cloud/gke/render.py --name NAME --tpu v5p-32 --image IMAGE [CONFIG.yaml] [key=value ...]`: prints a JobSet.

The JobSet runs `python -m jaxtune.train` on every machine of every slice; CONFIG travels in a ConfigMap beside it. The
configuration is checked first, as training would. What the flags mean: `--help`.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # a script: runs from a clone

from manifests import check_name, read_run, to_yaml
from tpu_names import Slice, slice_of

CONFIG_FOLDER = "/etc/jaxtune"
# Exit codes that come again however often one starts: error, usage, Ctrl-C. Others are restarted: 143 preempted and
# saved, 137 killed, 134 another machine gone. A machine that is killed fails its Job at once, before the others notice
# that it is gone and end with 1.
FINAL_CODES = (1, 2, 130)
TPU_PORT, SLICES_PORT = 8471, 8080  # libtpu's, within a slice and between slices


def jobset(
    flags: argparse.Namespace, *, tpu: Slice, words: Sequence[str], has_config: bool, final_codes: Sequence[int]
) -> dict[str, Any]:
    """The JobSet as a tree: one replicated Job, a replica for every slice, a pod for every machine."""
    several = tpu.topology.hosts > 1
    container = {
        "name": "train",
        "image": flags.image,
        "command": ["python", "-m", "jaxtune.train"],
        # Kubernetes would put variables in place of $(NAME).
        "args": [word.replace("$(", "$$(") for word in words],
        "ports": [{"containerPort": TPU_PORT}, {"containerPort": SLICES_PORT}],
        "resources": {
            "requests": {"google.com/tpu": tpu.chips_per_host},
            "limits": {"google.com/tpu": tpu.chips_per_host},
        },
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],  # row workers pass rows through it
    }
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    if flags.local_disk:  # of the machine, so that it outlives the pod
        container["volumeMounts"].append({"name": "local-disk", "mountPath": flags.local_disk})
        volumes.append({"name": "local-disk", "hostPath": {"path": flags.local_disk, "type": "DirectoryOrCreate"}})
    if has_config:
        container["volumeMounts"].append({"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True})
        volumes.append({"name": "config", "configMap": {"name": flags.name}})
    if flags.secret:
        container["envFrom"] = [{"secretRef": {"name": flags.secret}}]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # a policy on exit codes asks for it; the JobSet restarts all pods together
        "terminationGracePeriodSeconds": flags.grace,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": tpu.kind.gke,
            "cloud.google.com/gke-tpu-topology": tpu.shape,
        },
        "containers": [container],
        "volumes": volumes,
    }
    if flags.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    if flags.service_account:
        pod["serviceAccountName"] = flags.service_account
    if flags.slices > 1:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}  # more bandwidth between slices
    metadata: dict[str, Any] = {"name": flags.name, "namespace": flags.namespace}
    if flags.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": flags.queue}
    if several:  # a slice's pods on one slice's machines, and nobody else's there
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": flags.restarts,
                "rules": [
                    {
                        "name": "error_of_the_run",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "coordinator": {"replicatedJob": "slice", "jobIndex": 0, "podIndex": 0},
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": flags.slices,
                    "template": {
                        "spec": {
                            "parallelism": tpu.hosts,
                            "completions": tpu.hosts,
                            "completionMode": "Indexed",
                            "backoffLimit": 0,
                            "podFailurePolicy": {
                                "rules": [
                                    {
                                        "action": "FailJob",
                                        "onExitCodes": {
                                            "containerName": "train",
                                            "operator": "In",
                                            "values": list(final_codes),
                                        },
                                    }
                                ]
                            },
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }


def manifest(words: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the documents that the command line asks for.

    Raises:
        ValueError: a flag or the configuration is wrong.
    """
    flags = read_flags(words)
    tpu = slice_of(flags.tpu, flags.slices)
    if flags.slices > 1 and tpu.hosts == 1:
        raise ValueError(f"--slices {flags.slices}: GKE joins slices of several machines only, {flags.tpu} is one")
    config, file = read_run(flags.words)
    inside = [f"{CONFIG_FOLDER}/config.yaml" if word == file else word for word in flags.words]
    final_codes = [code for code in FINAL_CODES if code != config.train.preempted_exit_code]
    documents = [jobset(flags, tpu=tpu, words=inside, has_config=file is not None, final_codes=final_codes)]
    if file is not None:
        text = pathlib.Path(file).read_text(encoding="utf-8")
        metadata = {"name": flags.name, "namespace": flags.namespace}
        documents.insert(
            0, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"config.yaml": text}}
        )
    return documents


def read_flags(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="render.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--name", required=True, help="of the JobSet")
    parser.add_argument("--tpu", required=True, help="v4-N and v5p-N count TensorCores, v5e-N, v6e-N, tpu7x-N chips")
    parser.add_argument("--slices", type=int, default=1, help="so many slices as one run")
    parser.add_argument("--image", required=True, help="with jaxtune in it: cloud/docker")
    parser.add_argument("--namespace", default="default")
    parser.add_argument("--spot", action="store_true", help="on spot machines only")
    parser.add_argument("--queue", help="a LocalQueue of Kueue")
    parser.add_argument("--service-account", help="of Kubernetes, that may read and write the bucket")
    parser.add_argument("--secret", help="a Secret whose keys become variables, HF_TOKEN say")
    parser.add_argument("--restarts", type=int, default=20, help="after preemptions (20)")
    parser.add_argument("--grace", type=int, default=120, help="seconds from SIGTERM to SIGKILL (120)")
    parser.add_argument(
        "--local-disk", metavar="FOLDER", help="of the machine, /var/jaxtune say, for checkpoint.local.path=FOLDER"
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml|key=value")
    flags = parser.parse_intermixed_args(words)
    check_name(flags.name)
    for name, least in (("slices", 1), ("restarts", 0), ("grace", 1)):
        if getattr(flags, name) < least:
            raise ValueError(f"--{name}: found {getattr(flags, name)}; expected at least {least}")
    if flags.local_disk is not None and not flags.local_disk.startswith("/"):
        raise ValueError(f"--local-disk: found {flags.local_disk}; expected a path from the root on")
    return flags


def main(words: Sequence[str]) -> int:
    """Prints the manifest; returns 2 where the flags or the configuration are wrong."""
    try:
        documents = manifest(words)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(to_yaml(documents), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
