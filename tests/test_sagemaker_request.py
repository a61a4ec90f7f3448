"""What the SageMaker job asks AWS for, through botocore's stubs: `make test-sagemaker`.

Needs the packages `sagemaker<3` and `sagemaker-training` (300 MB), not torch, and no account.
"""

import io
import json
import tarfile

import pytest

from examples.launch import sagemaker_job
from examples.smp_style.arguments import make_parser

sagemaker = pytest.importorskip("sagemaker", reason="make test-sagemaker installs it")

REGION = "us-east-1"
ROLE = "arn:aws:iam::123456789012:role/train"
IMAGE = f"763104351884.dkr.ecr.{REGION}.amazonaws.com/pytorch-training:2.11.0-gpu"
NO_TELEMETRY = {
    "SchemaVersion": "1.0",
    "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}},
}


class Empty(io.BytesIO):
    """The body of an answer, as botocore reads it."""

    def stream(self, *_args: int):
        yield b""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Starts the job against stubs: the request for it, and the archive put into S3."""
    import boto3
    from botocore.awsrequest import AWSResponse
    from botocore.stub import ANY, Stubber

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")  # plain bodies
    found: dict = {"puts": {}}
    boto = boto3.Session(region_name=REGION)

    def answer_s3(request, **_):
        if request.method == "PUT":
            body = request.body
            found["puts"][request.url] = body if isinstance(body, bytes) else body.read()
        return AWSResponse(request.url, 200, {}, Empty())

    boto.events.register("before-send.s3", answer_s3)
    client = boto.client("sagemaker")
    client.meta.events.register(
        "before-parameter-build.sagemaker.CreateTrainingJob",
        lambda params, **_: found.update(job=params),
    )
    names = ("TrainingJobName", "AlgorithmSpecification", "RoleArn", "InputDataConfig",
             "OutputDataConfig", "ResourceConfig", "StoppingCondition", "HyperParameters",
             "CheckpointConfig", "Environment", "ProfilerConfig")  # fmt: skip
    with Stubber(client) as stub:
        stub.add_response(
            "create_training_job",
            {"TrainingJobArn": f"arn:aws:sagemaker:{REGION}:123456789012:training-job/x"},
            dict.fromkeys(names, ANY),  # these parameters, and no others
        )
        session = sagemaker.Session(boto, sagemaker_client=client, sagemaker_config=NO_TELEMETRY)
        arguments = ["--role", ROLE, "--image_uri", IMAGE, "--data", "s3://bucket/sst2"]
        arguments += ["--output", "s3://bucket/runs", "--set", "max_steps=17"]
        sagemaker_job.start(sagemaker_job.parse_arguments(arguments), session)
        stub.assert_no_pending_responses()
    return found


def test_request_is_for_two_p4d_with_torchrun_and_checkpoints(asked: dict) -> None:
    job = asked["job"]
    resources = job["ResourceConfig"]
    assert (resources["InstanceType"], resources["InstanceCount"]) == ("ml.p4d.24xlarge", 2)
    assert job["AlgorithmSpecification"]["TrainingImage"] == IMAGE
    assert job["CheckpointConfig"] == {
        "S3Uri": "s3://bucket/runs/checkpoints",
        "LocalPath": "/opt/ml/checkpoints",
    }
    sources = {
        channel["ChannelName"]: channel["DataSource"]["S3DataSource"]["S3Uri"]
        for channel in job["InputDataConfig"]
    }
    assert sources == {
        name: f"s3://bucket/sst2/{name}" for name in ("train", "validation", "tokenizer")
    }
    hyperparameters = {name: json.loads(v) for name, v in job["HyperParameters"].items()}
    assert hyperparameters["sagemaker_torch_distributed_enabled"] is True
    assert hyperparameters["sagemaker_program"] == "sagemaker_entry.py"
    environment = job["Environment"]
    assert environment["TORCH_CUDA_ARCH_LIST"] == "8.0"
    assert environment["CHECKPOINT_DIR"] == job["CheckpointConfig"]["LocalPath"]
    assert not [name for name in environment if name.startswith(("FI_", "NCCL_"))]


def test_request_hyperparameters_reach_the_script_as_the_platform_passes_them(asked: dict) -> None:
    """The platform's own mapping makes the arguments; the script's own parser reads them."""
    from sagemaker_training import mapping

    hyperparameters = {
        name: json.loads(value)
        for name, value in asked["job"]["HyperParameters"].items()
        if not name.startswith("sagemaker_")
    }
    given = make_parser().parse_args(mapping.to_cmd_args(hyperparameters))
    assert given.max_steps == 17
    assert given.param_dtype == "bfloat16"
    assert (given.expert_parallel_degree, given.hybrid_shard_degree) == (8, 2)
    assert (given.hidden_width, given.num_layers, given.max_context_width) == (4096, 32, 2048)


def test_request_archive_in_s3_is_the_source_folder(asked: dict) -> None:
    job = asked["job"]
    location = json.loads(job["HyperParameters"]["sagemaker_submit_directory"])
    key = location.removeprefix("s3://bucket/")
    [archive] = [body for url, body in asked["puts"].items() if url.split("?")[0].endswith(key)]
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        names = {name.removeprefix("./") for name in tar.getnames()}
    assert {"sagemaker_entry.py", "requirements.txt", "examples/smp_style/train.py"} <= names
    assert "setup.py" not in names
    assert f"{sagemaker_job.PACKAGE}/setup.py" in names
