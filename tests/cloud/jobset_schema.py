"""What a JobSet may look like, as far as ours need it.

The facts are those of the published definition (kubernetes-sigs/jobset, release 0.9.1, JobSet v1alpha2): every field of
`spec` and of what lies in it, their types, which are required, the values that are allowed; pods, which the definition
takes from Kubernetes, with the fields that we write. A field that is not listed is an error here, where a
cluster would drop it without a word. The rules behind the schema (names, the coordinator) are in the tests.
"""

from typing import Any

TEXT = {"type": "string"}
FLAG = {"type": "boolean"}
INT32 = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
TEXTS = {"type": "array", "items": TEXT}
TEXT_TO_TEXT = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["integer", "string"]}}


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def several(item: dict[str, Any], **limits: int) -> dict[str, Any]:
    return {"type": "array", "items": item, **limits}


def one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


METADATA = fields(name=TEXT, namespace=TEXT, labels=TEXT_TO_TEXT, annotations=TEXT_TO_TEXT, finalizers=TEXTS)
CONTAINER = fields(
    ("name",),
    name=TEXT,
    image=TEXT,
    command=TEXTS,
    args=TEXTS,
    ports=several(fields(("containerPort",), containerPort=INT32, name=TEXT, protocol=TEXT)),
    resources=fields(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=several(fields(("mountPath", "name"), mountPath=TEXT, name=TEXT, readOnly=FLAG)),
    envFrom=several(fields(prefix=TEXT, secretRef=fields(name=TEXT, optional=FLAG))),
)
POD = fields(
    ("containers",),
    restartPolicy=one_of("Never", "OnFailure"),  # what a Job allows
    terminationGracePeriodSeconds={"type": "integer"},
    nodeSelector=TEXT_TO_TEXT,
    serviceAccountName=TEXT,
    hostNetwork=FLAG,
    dnsPolicy=one_of("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    containers=several(CONTAINER, minItems=1),
    volumes=several(
        fields(
            ("name",),
            name=TEXT,
            emptyDir=fields(medium=TEXT, sizeLimit=TEXT),
            configMap=fields(name=TEXT),
            hostPath=fields(("path",), path=TEXT, type=TEXT),
        )
    ),
)
EXIT_CODES = fields(
    ("operator", "values"),
    containerName=TEXT,
    operator=one_of("In", "NotIn"),
    values=several(INT32, minItems=1, maxItems=255),
)
JOB = fields(
    ("template",),
    activeDeadlineSeconds={"type": "integer"},
    backoffLimit=INT32,
    backoffLimitPerIndex=INT32,
    completionMode=one_of("Indexed", "NonIndexed"),
    completions=INT32,
    managedBy=TEXT,
    manualSelector=FLAG,
    maxFailedIndexes=INT32,
    parallelism=INT32,
    podFailurePolicy=fields(
        ("rules",),
        rules=several(
            fields(
                ("action",),
                action=one_of("FailJob", "FailIndex", "Ignore", "Count"),
                onExitCodes=EXIT_CODES,
                onPodConditions=several(fields(("status", "type"), status=TEXT, type=TEXT)),
            ),
            maxItems=20,
        ),
    ),
    podReplacementPolicy=TEXT,
    selector=fields(
        matchExpressions=several(fields(("key", "operator"), key=TEXT, operator=TEXT, values=TEXTS)),
        matchLabels=TEXT_TO_TEXT,
    ),
    successPolicy=fields(("rules",), rules=several(fields(succeededCount=INT32, succeededIndexes=TEXT))),
    suspend=FLAG,
    ttlSecondsAfterFinished=INT32,
    template=fields(metadata=METADATA, spec=POD),
)
SPEC = fields(
    coordinator=fields(("replicatedJob",), jobIndex=INT32, podIndex=INT32, replicatedJob=TEXT),
    failurePolicy=fields(
        maxRestarts=INT32,
        restartStrategy=one_of("Recreate", "BlockingRecreate"),
        rules=several(
            fields(
                ("action", "name"),
                action=one_of("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
                name=TEXT,
                onJobFailureReasons=TEXTS,
                targetReplicatedJobs=TEXTS,
            )
        ),
    ),
    managedBy=TEXT,
    network=fields(enableDNSHostnames=FLAG, publishNotReadyAddresses=FLAG, subdomain=TEXT),
    replicatedJobs=several(
        fields(
            ("name", "template"),
            dependsOn=several(fields(("name", "status"), name=TEXT, status=one_of("Ready", "Complete"))),
            groupName=TEXT,
            name=TEXT,
            replicas=INT32 | {"minimum": 0},
            template=fields(metadata=METADATA, spec=JOB),
        )
    ),
    startupPolicy=fields(("startupPolicyOrder",), startupPolicyOrder=one_of("AnyOrder", "InOrder")),
    successPolicy=fields(("operator",), operator=one_of("All", "Any"), targetReplicatedJobs=TEXTS),
    suspend=FLAG,
    ttlSecondsAfterFinished=INT32 | {"minimum": 0},
)
JOBSET = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=METADATA,
    spec=SPEC,
)
