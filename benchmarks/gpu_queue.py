"""Runs the jobs of a plan on the GPUs of one machine, each as soon as what it needs is done.

    python benchmarks/gpu_queue.py plan.jsonl --gpus 0 1 --workers 3 --seconds 1600 --state DIR

A machine that is lent for half an hour should not wait for anybody: trainings first, one at a time
on a GPU, then quantizations and test-time training of their models, several at a time. A plan has
one JSON object a line, in the order of importance:

    {"name": "s4", "run": "RUN_ID=s4 SEED=4 python train_gpt.py", "alone": true}
    {"name": "s4_rows", "run": "...", "needs": ["s4"]}
    {"name": "tilt", "run": "...", "needs": ["s4"], "gpu": 1, "alone": true}

run: a command for bash, started here, with CUDA_VISIBLE_DEVICES; {state} in it is the folder of
--state, quoted for bash, so the plan puts no quotes around it. needs: jobs that must have
succeeded. gpu: the only GPU that may run it. alone: nothing else runs on its GPU meanwhile, so that
its seconds count. A job whose needs failed is skipped.

--state keeps NAME.log for each job and progress.jsonl: name, GPU, exit code, seconds. A job that is
in progress.jsonl with exit code 0 is not run again, so a plan can be continued; a training should
begin with `rm -rf` of its folder, as the RUN_ID of one that was stopped is refused. At the end of
--seconds, or when the queue itself is ended by Ctrl-C, SIGTERM or SIGHUP, running jobs are stopped
and no other begins. Exits with 1 unless every job succeeded.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.bench_recipe import append_record, whole_lines  # noqa: E402


class Job(NamedTuple):
    """A line of a plan."""

    name: str
    run: str
    needs: tuple = ()
    gpu: int | None = None
    alone: bool = False


class Running(NamedTuple):
    """A job that has been started."""

    job: Job
    gpu: int
    process: subprocess.Popen
    started: float


def read_plan(path: Path) -> list[Job]:
    """The jobs of a plan. ValueError for lines that are none, or that need what does not exist."""
    jobs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            job = Job(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not (isinstance(job.name, str) and isinstance(job.run, str)) or "/" in job.name:
            raise ValueError(f"{path}, line {number}: name and run are texts, name without /")
        jobs.append(job)
    names = [job.name for job in jobs]
    for job in jobs:
        if names.count(job.name) > 1:
            raise ValueError(f"{path}: two jobs are called {job.name}")
        if unknown := set(job.needs) - set(names):
            raise ValueError(f"{path}: {job.name} needs {', '.join(sorted(unknown))}, not in it")
    return jobs


class Queue:
    """Starts and watches the jobs of a plan."""

    def __init__(self, jobs: list[Job], gpus: list[int], workers: int, state: Path):
        self.gpus = gpus
        self.workers = workers
        self.state = state.absolute()  # a job may change its folder
        self.state.mkdir(parents=True, exist_ok=True)
        self.progress = self.state / "progress.jsonl"
        self.codes = {}  # name -> exit code
        for _, record in whole_lines(self.progress):
            if record["code"] == 0:
                self.codes[record["name"]] = 0
        self.waiting = [job for job in jobs if job.name not in self.codes]
        self.running = []

    def has_room(self, job: Job, gpu: int) -> bool:
        """Whether this GPU may take the job now."""
        beside = [other.job for other in self.running if other.gpu == gpu]
        if job.gpu not in (None, gpu) or any(other.alone for other in beside):
            return False
        return len(beside) < (1 if job.alone else self.workers)

    def start_ready(self) -> None:
        """Starts every job that can begin, in the order of the plan."""
        held = set()  # GPUs that become empty for a job that wants to be alone there
        for job in list(self.waiting):
            if any(self.codes.get(need, 0) for need in job.needs):
                self.waiting.remove(job)
                self.note(job, None, -1, 0.0)
            elif all(need in self.codes for need in job.needs):
                gpus = [gpu for gpu in self.gpus if gpu not in held]
                free = [gpu for gpu in gpus if self.has_room(job, gpu)]
                if free:
                    self.waiting.remove(job)
                    self.start(job, min(free, key=self.load))
                elif job.alone:
                    wanted = [gpu for gpu in gpus if job.gpu in (None, gpu)]
                    held |= {min(wanted, key=self.load)} if wanted else set()

    def load(self, gpu: int) -> int:
        """Jobs that run on a GPU."""
        return sum(other.gpu == gpu for other in self.running)

    def start(self, job: Job, gpu: int) -> None:
        """Starts a job in a process group of its own."""
        command = job.run.replace("{state}", shlex.quote(str(self.state)))
        with (self.state / f"{job.name}.log").open("w") as log:
            process = subprocess.Popen(
                ["bash", "-c", command],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
                start_new_session=True,
            )
        self.running.append(Running(job, gpu, process, time.monotonic()))

    def note(self, job: Job, gpu: int | None, code: int, seconds: float) -> None:
        """Keeps and prints how a job ended."""
        self.codes[job.name] = code
        record = {"name": job.name, "gpu": gpu, "code": code, "seconds": round(seconds, 1)}
        append_record(self.progress, record)
        print(json.dumps(record), flush=True)

    def collect(self) -> None:
        """Takes note of the jobs that have ended."""
        for item in list(self.running):
            code = item.process.poll()
            if code is not None:
                self.running.remove(item)
                self.note(item.job, item.gpu, code, time.monotonic() - item.started)

    def stop(self) -> None:
        """Stops the running jobs with all that they have started."""
        for item in self.running:
            os.killpg(item.process.pid, signal.SIGKILL)
            item.process.wait()
        self.collect()

    def run(self, seconds: float) -> bool:
        """Runs the plan for at most so long -> whether every job has succeeded."""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                self.collect()
                self.start_ready()
                if not self.running:
                    break
                time.sleep(0.2)
        finally:
            self.stop()
            if self.waiting:
                names = ", ".join(job.name for job in self.waiting)
                print(f"gpu_queue.py: not started: {names}", file=sys.stderr)
        return not self.waiting and not any(self.codes.values())


def main(argv=None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path)
    parser.add_argument("--gpus", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=2, help="jobs at a time on a GPU")
    parser.add_argument("--seconds", type=float, default=1500.0)
    parser.add_argument("--state", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        jobs = read_plan(args.plan)
    except (OSError, ValueError) as error:
        print(f"gpu_queue.py: {error}", file=sys.stderr)
        return 2
    # jobs have sessions of their own: without this they would outlive the queue
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda caught, frame: sys.exit(128 + caught))
    return 0 if Queue(jobs, args.gpus, args.workers, args.state).run(args.seconds) else 1


if __name__ == "__main__":
    sys.exit(main())
