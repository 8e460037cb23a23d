"""The processes of a run, as torchrun or SLURM started them; known before torch is imported."""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from lomar.errors import UserError

# By these torchrun and SLURM tell processes that they work together.
_TOGETHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
)


@dataclass(frozen=True)
class Launch:
    """What this process is among those of its run.

    Args:
        count: processes of the run, on all machines.
        rank: this one's number, from 0.
        local_count: processes on this machine.
        local_rank: this one's number among them.
        machine: this machine's number, from 0.
    """

    count: int = 1
    rank: int = 0
    local_count: int = 1
    local_rank: int = 0
    machine: int = 0

    @property
    def machines(self) -> int:
        """Machines, each with as many processes."""
        return self.count // self.local_count


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """How this process was started: by torchrun, by srun within a SLURM job, or alone.

    A command typed in a SLURM job without srun is alone, however many tasks the job has.

    Raises:
        UserError: what torchrun or SLURM tells cannot be used.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            count, rank = int(environment["WORLD_SIZE"]), int(environment["RANK"])
            local_count = int(environment.get("LOCAL_WORLD_SIZE", count))
            local_rank = int(environment.get("LOCAL_RANK", rank % local_count))
            machine = int(environment.get("GROUP_RANK", rank // local_count))
        elif _in_a_step(environment):
            count, rank = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_PROCID"])
            machines, machine = int(environment["SLURM_STEP_NUM_NODES"]), int(environment["SLURM_NODEID"])
            local_count, local_rank = count // machines, int(environment["SLURM_LOCALID"])
            if local_count * machines != count:
                raise UserError(
                    f"srun started {count} processes on {machines} machines; each must have as many: "
                    "give --ntasks-per-node"
                )
        else:
            return Launch()
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the variables of torchrun or SLURM for this process are not whole ({error}); "
            "start it with torchrun, with srun, or without either"
        ) from error
    if not (0 <= rank < count and 0 < local_count <= count and count % local_count == 0):
        raise UserError(
            f"process {rank} of {count}, {local_count} on this machine: these numbers do not fit each other"
        )
    return Launch(count, rank, local_count, local_rank, machine)


def alone(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a process that is to work alone, started by one that torchrun or srun started."""
    return {name: value for name, value in environment.items() if name not in _TOGETHER}


def _in_a_step(environment: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in environment and any(
        environment.get(name, "").isdigit() for name in ("SLURM_STEP_ID", "SLURM_STEPID")
    )


def tell_torch(launch: Launch, environment: MutableMapping[str, str] = os.environ) -> None:
    """Say in torchrun's variables what SLURM said in its own, so that all that follows knows one way.

    The address is that of the job step's first machine, the port depends on the job's number; MASTER_ADDR and
    MASTER_PORT, where they are set, win.
    """
    if launch.count == 1 or "RANK" in environment:
        return
    from lightning_fabric.plugins.environments import SLURMEnvironment

    machines = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "127.0.0.1")
    job = environment.get("SLURM_JOB_ID", "0")
    environment.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(machines))
    environment.setdefault("MASTER_PORT", str(15_000 + int(job[-4:]) if job.isdigit() else 15_000))
    told = {
        "RANK": launch.rank,
        "WORLD_SIZE": launch.count,
        "LOCAL_RANK": launch.local_rank,
        "LOCAL_WORLD_SIZE": launch.local_count,
        "GROUP_RANK": launch.machine,
    }
    environment.update({name: str(value) for name, value in told.items()})
