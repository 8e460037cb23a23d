"""Claims about how a process learns what it is among those of its run."""

import pytest

from lomar.errors import UserError
from lomar.launch import Launch, launched, tell_torch

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}
# What srun of SLURM 23 sets in task 5 of `srun --nodes 2 --ntasks-per-node 4`.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "bash",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN, SRUN | TORCHRUN])
def test_torchrun_and_srun_say_the_same(environment: dict[str, str]) -> None:
    launch = launched(environment)
    assert launch == Launch(count=8, rank=5, local_count=4, local_rank=1, machine=1) and launch.machines == 2


@pytest.mark.parametrize(
    "environment",
    [{}, {"WORLD_SIZE": "4"}, {name: value for name, value in SRUN.items() if not name.startswith("SLURM_STEP")}],
)
def test_a_command_typed_in_a_job_is_alone(environment: dict[str, str]) -> None:
    """The shell of `sbatch` and `salloc` has SLURM_PROCID and SLURM_NTASKS; only a step's tasks are processes."""
    assert launched(environment) == Launch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": "7"}, "srun started 7 processes on 2 machines; each must have as many"),
        ({"SLURM_LOCALID": "x"}, "are not whole"),
        ({"SLURM_PROCID": "8"}, "process 8 of 8"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        launched(SRUN | change)


def test_what_slurm_says_is_told_to_torch() -> None:
    """One address for all: the first machine's."""
    environment = dict(SRUN)
    tell_torch(launched(environment), environment)
    told = TORCHRUN | {"MASTER_ADDR": "gpu07", "MASTER_PORT": "19711"}
    assert {name: environment[name] for name in told} == told
    chosen = SRUN | {"MASTER_PORT": "1234"}
    tell_torch(launched(chosen), chosen)
    assert chosen["MASTER_PORT"] == "1234"


def test_one_process_tells_nothing() -> None:
    environment: dict[str, str] = {}
    tell_torch(launched(environment), environment)
    assert environment == {}
