"""ABSLD on eight GPUs of a SLURM node, from Python: pip install submitit; python examples/cluster/absld_submitit.py

submitit starts one task a GPU and hears SLURM's SIGUSR2 before the time is over; the run is then saved, ends with 75,
and submitit queues it again. Data, cache and runs lie where every node sees them.
"""

import signal
import subprocess
import sys

import submitit

PREEMPTED = 75


class Train:
    """The task that runs `retemper train WORDS`, on every GPU."""

    def __init__(self, *words: str) -> None:
        self.words = words
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        self.process = subprocess.Popen([sys.executable, "-m", "retemper", "train", *self.words])
        code = self.process.wait()
        if code not in (0, PREEMPTED):
            raise RuntimeError(f"retemper train ended with {code}: its own line says why")
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Return the job to queue again. submitit asks one task; its processes agree on a step and end together."""
        if self.process is not None:
            self.process.send_signal(signal.SIGUSR2)
            self.process.wait()
        return submitit.helpers.DelayedSubmission(Train(*self.words))


if __name__ == "__main__":
    executor = submitit.AutoExecutor("runs/slurm", slurm_max_num_timeout=100)
    executor.update_parameters(
        nodes=1, tasks_per_node=8, gpus_per_node=8, cpus_per_task=8, timeout_min=240, slurm_signal_delay_s=120
    )
    command = "absld:cifar10_resnet18 --data-root data --teacher model_cifar_wrn.pt --cache cache --out runs/absld"
    job = executor.submit(Train(*command.split(), "--batch-size", "1024", "--lr", "0.4"))
    print(job.job_id)
