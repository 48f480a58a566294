"""Trains on Vertex AI: starts a custom job and waits for its end, up to a time limit.

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

from cloud import StepError, as_shell, ask, explain_failure, gcloud, log, run_step, undo_on_failure, warn

GOOD = "JOB_STATE_SUCCEEDED"
BAD = ("JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_EXPIRED", "JOB_STATE_PARTIALLY_SUCCEEDED")
WRAPPER = Path(__file__).with_name("with_secret.py")


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The step's options; the build sets those without a default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("region", "project", "image", "account", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--machine-type", default="n1-standard-8")
    parser.add_argument("--accelerator", default="", help="NVIDIA_TESLA_T4, NVIDIA_L4, …; empty: none")
    parser.add_argument("--accelerator-count", type=int, default=1)
    parser.add_argument("--replicas", type=int, default=1, help="machines that train together")
    parser.add_argument("--timeout-s", type=float, default=7200, help="seconds for the training")
    parser.add_argument("--queue-s", type=float, default=1800, help="further seconds for machines to become available")
    parser.add_argument("--poll-s", type=float, default=20)
    parser.add_argument("--wandb-secret", default="", help="a secret with W&B's key; empty: no W&B")
    parser.add_argument("--args", default="", help="arguments of sodaops train, as in a shell")
    return parser.parse_args(given)


def job_spec(options: argparse.Namespace) -> dict[str, Any]:
    """Vertex AI's CustomJobSpec."""
    machine: dict[str, Any] = {"machineType": options.machine_type}
    n_devices = 1
    if options.accelerator:
        machine |= {"acceleratorType": options.accelerator, "acceleratorCount": options.accelerator_count}
        n_devices = options.accelerator_count
    container: dict[str, Any] = {"imageUri": options.image, "args": _train(options, n_devices)}
    if options.wandb_secret:
        secret = f"WANDB_API_KEY=projects/{options.project}/secrets/{options.wandb_secret}/versions/latest"
        container["command"] = ["python", "-c", WRAPPER.read_text(encoding="utf-8")]
        container["args"] = [secret, "sodaops", *container["args"]]
    pools = [{"machineSpec": machine, "replicaCount": 1, "containerSpec": container}]
    if options.replicas > 1:
        pools.append({**pools[0], "replicaCount": options.replicas - 1})
    return {
        "workerPoolSpecs": pools,
        "scheduling": {"timeout": f"{options.timeout_s:.0f}s", "restartJobOnWorkerRestart": True},
        "serviceAccount": options.account,
        "baseOutputDirectory": {"outputUriPrefix": options.output},
        "enableWebAccess": False,
    }


def _train(options: argparse.Namespace, n_devices: int) -> list[str]:
    command = ["train", f"run_dir={options.output}", "ckpt_path=last"]  # a restarted job continues
    if options.replicas > 1 or n_devices > 1:
        command += ["trainer=ddp", f"trainer.num_nodes={options.replicas}"]
    if options.wandb_secret:
        command.append("logger=wandb")
    return command + shlex.split(options.args)


def create(options: argparse.Namespace) -> str:
    """Starts the job and returns its name, projects/…/customJobs/…"""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as config:
        json.dump(job_spec(options), config, indent=1)
        config.flush()
        return gcloud([
            "ai", "custom-jobs", "create", f"--project={options.project}", f"--region={options.region}",
            f"--display-name={_name(options)}", f"--config={config.name}", "--format=value(name)",
        ])  # fmt: skip


def _name(options: argparse.Namespace) -> str:
    return f"sodaops-{options.output.rstrip('/').rpartition('/')[2]}"


def wait(job: str, options: argparse.Namespace) -> dict[str, Any]:
    """Waits for the job's end and returns Vertex AI's description of it.

    Raises:
        StepError: the job cannot be read, does not exist, or did not end in time.
    """
    began, state, description = time.monotonic(), "", {}
    look = ["ai", "custom-jobs", "describe", job, f"--region={options.region}", "--format=json"]
    bound_s = options.timeout_s + options.queue_s
    while True:
        result = ask(look, timeout_s=60)
        if result.denied or result.missing:
            raise StepError(explain_failure(look, result))
        if result.code:
            warn(f"warning: {job} could not be read: {result.stderr[-500:]}")
        else:
            description = json.loads(result.stdout)
        if description and description["state"] != state:
            state = description["state"]
            log(f"{time.monotonic() - began:6.0f} s  {state}")
        if state in (GOOD, *BAD):
            return description
        if time.monotonic() - began > bound_s:
            raise StepError(
                f"{job}: still {state or 'unread'} after {bound_s:.0f} s. Give it more time (_TRAIN_TIMEOUT_S), a faster "
                "machine (_MACHINE_TYPE, _ACCELERATOR), or less to do (_TRAIN_ARGS)."
            )
        time.sleep(options.poll_s)


def _cancel(options: argparse.Namespace) -> None:
    """Cancels the job by its display name, since it may run even if its creation was not confirmed."""
    where = [f"--project={options.project}", f"--region={options.region}"]
    name = _name(options)
    listed = ask(["ai", "custom-jobs", "list", *where, f"--filter=displayName={name}", "--format=value(name)"])
    cancelled = [ask(["ai", "custom-jobs", "cancel", job, *where]) for job in listed.stdout.split()]
    for result in [listed] if listed.code else cancelled:
        if result.code:  # the job ends by its own timeout
            warn(f"warning: {name} was not cancelled and may cost for {options.timeout_s:.0f} s: {result.stderr[-500:]}")
        else:
            warn(f"{name}: cancelled")


def main(given: Sequence[str]) -> int:
    """Trains and prints where the run is."""
    options = arguments(given)
    with undo_on_failure(lambda: _cancel(options)):
        job = create(options)
        log_command = as_shell(["ai", "custom-jobs", "stream-logs", job, f"--region={options.region}"])
        log(f"{job}: started; its log: {log_command}")
        ended = wait(job, options)
    if ended["state"] != GOOD:
        message = ended.get("error", {}).get("message", "no reason given")
        raise StepError(f"{job}: {ended['state']}: {message}\nIts log: {log_command}")
    log(f"trained: {options.output}")
    return 0


if __name__ == "__main__":
    run_step(main)
