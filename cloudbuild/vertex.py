"""Trains on Vertex AI: starts a custom job, and waits until it has ended, with a bound.

python3 cloudbuild/vertex.py --region=… --project=… --image=… --account=… --output=gs://BUCKET/runs/ID
"""

import argparse
import json
import shlex
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloud import StepError, ask, gcloud, reason, run_step, tell

GOOD = "JOB_STATE_SUCCEEDED"
BAD = ("JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED", "JOB_STATE_PARTIALLY_SUCCEEDED")
FAULTS = 5  # looks in a row that may fail before a job counts as lost
WRAPPER = Path(__file__).with_name("with_secret.py")


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The step's options; what has no default is given by the build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("region", "project", "image", "account", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--machine-type", default="n1-standard-8")
    parser.add_argument("--accelerator", default="", help="NVIDIA_TESLA_T4, NVIDIA_L4, …; empty: none")
    parser.add_argument("--accelerator-count", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1, help="machines that train together")
    parser.add_argument("--timeout-s", type=float, default=7200, help="of the training")
    parser.add_argument("--queue-s", type=float, default=1800, help="more for machines to be found")
    parser.add_argument("--poll-s", type=float, default=20)
    parser.add_argument("--wandb-secret", default="", help="a secret with W&B's key; empty: no W&B")
    parser.add_argument("--args", default="", help="of sodaops train, as one would type them")
    return parser.parse_args(given)


def job_spec(asked: argparse.Namespace) -> dict[str, Any]:
    """Vertex AI's CustomJobSpec."""
    machine: dict[str, Any] = {"machineType": asked.machine_type}
    n_devices = 1
    if asked.accelerator:
        machine |= {"acceleratorType": asked.accelerator, "acceleratorCount": asked.accelerator_count}
        n_devices = asked.accelerator_count
    container: dict[str, Any] = {"imageUri": asked.image, "args": _train(asked, n_devices)}
    if asked.wandb_secret:
        secret = f"WANDB_API_KEY=projects/{asked.project}/secrets/{asked.wandb_secret}/versions/latest"
        container["command"] = ["python", "-c", WRAPPER.read_text(encoding="utf-8")]
        container["args"] = [secret, "sodaops", *container["args"]]
    pools = [{"machineSpec": machine, "replicaCount": 1, "containerSpec": container}]
    if asked.replicas > 1:
        pools.append({**pools[0], "replicaCount": asked.replicas - 1})
    return {
        "workerPoolSpecs": pools,
        "scheduling": {"timeout": f"{asked.timeout_s:.0f}s", "restartJobOnWorkerRestart": True},
        "serviceAccount": asked.account,
        "baseOutputDirectory": {"outputUriPrefix": asked.output},
        "enableWebAccess": False,
    }


def _train(asked: argparse.Namespace, n_devices: int) -> list[str]:
    command = ["train", f"run_dir={asked.output}", "ckpt_path=last"]  # a job that is started again goes on
    if asked.replicas > 1 or n_devices > 1:
        command += ["trainer=ddp", f"trainer.num_nodes={asked.replicas}"]
    if asked.wandb_secret:
        command.append("logger=wandb")
    return command + shlex.split(asked.args)


def create(asked: argparse.Namespace) -> str:
    """Starts the job, and returns its name, projects/…/customJobs/…"""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as config:
        json.dump(job_spec(asked), config, indent=1)
        config.flush()
        name = asked.output.rstrip("/").rpartition("/")[2]
        return gcloud([
            "ai", "custom-jobs", "create", f"--project={asked.project}", f"--region={asked.region}",
            f"--display-name=sodaops-{name}", f"--config={config.name}", "--format=value(name)",
        ])  # fmt: skip


def wait(job: str, asked: argparse.Namespace) -> None:
    """Waits for the job's end; one that takes too long is cancelled.

    Raises:
        StepError: the job failed, ended in another way than well, could not be looked at, or did not end in time.
    """
    began, state, faults = time.monotonic(), "", 0
    look = ["ai", "custom-jobs", "describe", job, f"--region={asked.region}", "--format=json"]
    bound_s = asked.timeout_s + asked.queue_s
    while True:
        answer = ask(look)
        faults = faults + 1 if answer.code else 0
        if faults == FAULTS:
            _cancel(job, asked)
            raise StepError(f"{reason(look, answer)}\n{FAULTS} looks in a row failed, so {job} was cancelled.")
        found = {} if answer.code else json.loads(answer.out)
        if found and found["state"] != state:
            state = found["state"]
            tell(f"{time.monotonic() - began:6.0f} s  {state}")
        if state == GOOD:
            return
        if state in BAD:
            said = found.get("error", {}).get("message", "it gave no reason")
            raise StepError(f"{job}: {state}: {said}\nIts log: {shlex.join(['gcloud', *_log(job, asked)])}")
        if time.monotonic() - began > bound_s:
            _cancel(job, asked)
            raise StepError(
                f"{job}: still {state or 'unseen'} after {bound_s:.0f} s, so it was cancelled. Give it more time "
                "(_TRAIN_TIMEOUT_S), a faster machine (_MACHINE_TYPE, _ACCELERATOR), or less to do (_TRAIN_ARGS)."
            )
        time.sleep(asked.poll_s)


def _log(job: str, asked: argparse.Namespace) -> list[str]:
    return ["ai", "custom-jobs", "stream-logs", job, f"--region={asked.region}"]


def _cancel(job: str, asked: argparse.Namespace) -> None:
    answer = ask(["ai", "custom-jobs", "cancel", job, f"--region={asked.region}"])
    if answer.code:  # it ends by its own timeout
        tell(f"warning: {job} could not be cancelled, and costs until {asked.timeout_s:.0f} s are over: {answer.said[-500:]}")


def main(given: Sequence[str]) -> int:
    """Trains, and says where the run is."""
    asked = arguments(given)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a build that is cancelled: as Ctrl-C
    job = create(asked)
    try:
        tell(f"{job}: started; its log: {shlex.join(['gcloud', *_log(job, asked)])}")
        wait(job, asked)
    except KeyboardInterrupt:
        _cancel(job, asked)
        raise StepError(f"{job}: stopped from outside, so it was cancelled.") from None
    tell(f"trained: {asked.output}")
    return 0


if __name__ == "__main__":
    run_step(main)
