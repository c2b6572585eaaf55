"""JSON schema of the part of kubeflow.org/v1 PyTorchJob (and of core/v1 PodTemplateSpec inside it) that
launch/kubernetes uses; anything else is an error."""

from typing import Any


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
COUNT = {"type": "integer", "minimum": 0}
QUANTITY = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9.]+(m|k|Ki|M|Mi|G|Gi|T|Ti)?$"}]
}
RESOURCES = {
    "type": "object",
    "propertyNames": {"pattern": "^(cpu|memory|ephemeral-storage|[a-z0-9.-]+/[a-z0-9.-]+)$"},
    "additionalProperties": QUANTITY,
}

CONTAINER = closed(
    ["name", "image"],
    name={"const": "pytorch"},  # the operator finds its container by this name
    image=TEXT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    workingDir=TEXT,
    command={"type": "array", "items": TEXT},
    args={"type": "array", "items": TEXT},
    env={"type": "array", "items": closed(["name"], name=TEXT, value={"type": "string"})},
    resources=closed([], limits=RESOURCES, requests=RESOURCES),
    volumeMounts={
        "type": "array",
        "items": closed(["name", "mountPath"], name=NAME, mountPath=TEXT, subPath=TEXT, readOnly={"type": "boolean"}),
    },
)
VOLUME = {
    **closed(
        ["name"],
        name=NAME,
        persistentVolumeClaim=closed(["claimName"], claimName=NAME, readOnly={"type": "boolean"}),
        emptyDir=closed([], medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
    ),
    "minProperties": 2,
    "maxProperties": 2,
}
POD = closed(
    ["containers"],
    containers={"type": "array", "items": CONTAINER, "minItems": 1},
    volumes={"type": "array", "items": VOLUME},
    terminationGracePeriodSeconds=COUNT,
    nodeSelector={"type": "object", "additionalProperties": {"type": "string"}},
)
REPLICA = closed(
    ["template"],
    replicas=COUNT,
    restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
    template=closed(["spec"], metadata={"type": "object"}, spec=POD),
)
PYTORCH_JOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "kubeflow.org/v1"},
    kind={"const": "PyTorchJob"},
    metadata=closed(
        ["name"], name=NAME, namespace=NAME, labels={"type": "object", "additionalProperties": {"type": "string"}}
    ),
    spec=closed(
        ["pytorchReplicaSpecs"],
        nprocPerNode={"type": "string", "pattern": "^(auto|cpu|gpu|[0-9]+)$"},
        runPolicy=closed(
            [],
            cleanPodPolicy={"enum": ["None", "All", "Running"]},
            backoffLimit=COUNT,
            ttlSecondsAfterFinished=COUNT,
            activeDeadlineSeconds=COUNT,
            suspend={"type": "boolean"},
        ),
        pytorchReplicaSpecs=closed(["Master"], Master=REPLICA, Worker=REPLICA),
    ),
)
