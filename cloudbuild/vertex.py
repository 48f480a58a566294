"""Trains on Vertex AI: starts a custom job, and waits until it has ended, with a bound.

python3 cloudbuild/vertex.py --region=… --project=… --image=… --account=… --output=gs://BUCKET/runs/ID
"""

import argparse
import json
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloud import StepError, ask, gcloud, reason, run_step, shown, tell, undone_by, warn

GOOD = "JOB_STATE_SUCCEEDED"
BAD = ("JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED", "JOB_STATE_PARTIALLY_SUCCEEDED")
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
        return gcloud([
            "ai", "custom-jobs", "create", f"--project={asked.project}", f"--region={asked.region}",
            f"--display-name={_name(asked)}", f"--config={config.name}", "--format=value(name)",
        ])  # fmt: skip


def _name(asked: argparse.Namespace) -> str:
    return f"sodaops-{asked.output.rstrip('/').rpartition('/')[2]}"


def wait(job: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Waits for the job's end, and returns what Vertex AI says of it then.

    Raises:
        StepError: the job may not be looked at, is not there, or did not end in time.
    """
    began, state, found = time.monotonic(), "", {}
    look = ["ai", "custom-jobs", "describe", job, f"--region={asked.region}", "--format=json"]
    bound_s = asked.timeout_s + asked.queue_s
    while True:
        answer = ask(look, timeout_s=60)
        if answer.denied or answer.missing:
            raise StepError(reason(look, answer))
        if answer.code:
            warn(f"warning: {job} could not be looked at: {answer.said[-500:]}")
        else:
            found = json.loads(answer.out)
        if found and found["state"] != state:
            state = found["state"]
            tell(f"{time.monotonic() - began:6.0f} s  {state}")
        if state in (GOOD, *BAD):
            return found
        if time.monotonic() - began > bound_s:
            raise StepError(
                f"{job}: still {state or 'unseen'} after {bound_s:.0f} s. Give it more time (_TRAIN_TIMEOUT_S), a faster "
                "machine (_MACHINE_TYPE, _ACCELERATOR), or less to do (_TRAIN_ARGS)."
            )
        time.sleep(asked.poll_s)


def _cancel(asked: argparse.Namespace) -> None:
    """Cancels the job, which may have begun also where its name was never heard."""
    where = [f"--project={asked.project}", f"--region={asked.region}"]
    found = ask(["ai", "custom-jobs", "list", *where, f"--filter=displayName={_name(asked)}", "--format=value(name)"])
    told = [found] if found.code else [ask(["ai", "custom-jobs", "cancel", job, *where]) for job in found.out.split()]
    for answer in told:
        if answer.code:  # it ends by its own timeout
            warn(f"warning: {_name(asked)} was not cancelled, and may cost for {asked.timeout_s:.0f} s: {answer.said[-500:]}")
        else:
            warn(f"{_name(asked)}: cancelled")


def main(given: Sequence[str]) -> int:
    """Trains, and says where the run is."""
    asked = arguments(given)
    with undone_by(lambda: _cancel(asked)):
        job = create(asked)
        log = shown(["ai", "custom-jobs", "stream-logs", job, f"--region={asked.region}"])
        tell(f"{job}: started; its log: {log}")
        ended = wait(job, asked)
    if ended["state"] != GOOD:
        said = ended.get("error", {}).get("message", "it gave no reason")
        raise StepError(f"{job}: {ended['state']}: {said}\nIts log: {log}")
    tell(f"trained: {asked.output}")
    return 0


if __name__ == "__main__":
    run_step(main)
