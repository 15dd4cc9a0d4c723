"""What a scheduler tells the processes that it starts, read from a dict of environment variables: a pure function.

    who                         this process        how many                        where process 0 is
    torchrun and its like       RANK                WORLD_SIZE                      MASTER_ADDR
    Open MPI (mpirun)           OMPI_COMM_WORLD_*   OMPI_COMM_WORLD_SIZE            mpirun's own address
    Slurm (srun)                SLURM_PROCID        SLURM_STEP_NUM_TASKS            the first of SLURM_STEP_NODELIST
    Kubernetes (indexed Jobs)   JOB_COMPLETION_INDEX    WORLD_SIZE                  MASTER_ADDR

MASTER_ADDR and MASTER_PORT win over what a scheduler says of the address, whichever it is.
"""

import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

PORT = 29500
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_PORTS = range(61440, 65536)  # above what Linux gives to outgoing connections


class Place(NamedTuple):
    """One process among several.

    coordinator     ``host:port`` of process 0
    processes       how many there are
    process         which one this is, from 0
    local           which one it is on its machine, from 0
    neighbours      how many there are on its machine, this one included
    told_by         who said so
    """

    coordinator: str
    processes: int
    process: int
    local: int = 0
    neighbours: int = 1
    told_by: str = "the arguments"


def read(variables: Mapping[str, str]) -> Place | None:
    """The place that a scheduler's variables give, or None where there is no sign of several processes.

    Raises:
        ValueError: if the variables of a scheduler are there in part, are no numbers, or contradict one another.

    >>> from peft_jax import hosts
    >>> hosts.read({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"})[:3]
    ('10.0.0.1:29500', 2, 1)
    >>> hosts.read({}) is None
    True
    """
    if "RANK" in variables:
        return check(_torchrun(variables))
    if "OMPI_COMM_WORLD_RANK" in variables:  # before Slurm: mpirun may itself have been started by srun
        return check(_open_mpi(variables))
    if "SLURM_PROCID" in variables and "SLURM_STEP_NODELIST" in variables:  # without a step: no srun, so one process
        return check(_slurm(variables))
    if "JOB_COMPLETION_INDEX" in variables:
        return check(_kubernetes(variables))
    if "WORLD_SIZE" in variables:
        raise ValueError("WORLD_SIZE is set and RANK is not: set RANK, from 0, for each process, or unset WORLD_SIZE")
    return None


def check(place: Place) -> Place:
    """Raises on a place that cannot be."""
    said = f"{place.told_by} says process {place.process} of {place.processes}"
    if place.processes < 1 or not 0 <= place.process < place.processes:
        raise ValueError(f"{said}: processes count from 0 to one below their number")
    if place.processes > 1 and not re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:\[\]]+):\d+", place.coordinator):
        raise ValueError(f"{said} at {place.coordinator!r}, which is no address: give host:port of process 0")
    return place


def _torchrun(v: Mapping[str, str]) -> Place:
    who = "RANK"
    processes, process = _number(v, "WORLD_SIZE", who), _number(v, "RANK", who)
    # torchrun itself listens at MASTER_PORT for as long as it lives.
    taken = v.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    coordinator = _address(v, who, None, PORT, needed=processes > 1, shift=int(taken))
    local, neighbours = _number(v, "LOCAL_RANK", who, 0), _number(v, "LOCAL_WORLD_SIZE", who, 1)
    return Place(coordinator, processes, process, local, neighbours, who)


def _open_mpi(v: Mapping[str, str]) -> Place:
    who = "OMPI_COMM_WORLD_RANK"
    processes, process = _number(v, "OMPI_COMM_WORLD_SIZE", who), _number(v, who, who)
    local = _number(v, "OMPI_COMM_WORLD_LOCAL_RANK", who, 0)
    neighbours = _number(v, "OMPI_COMM_WORLD_LOCAL_SIZE", who, 1)
    uri = v.get("OMPI_MCA_orte_hnp_uri", "")  # Open MPI 4: "12.0;tcp://10.0.0.1,10.1.0.1:34911"
    found = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    host = None
    if found:
        host = found[1] or f"[{found[2]}]"
    elif neighbours == processes:
        host = "127.0.0.1"
    job = uri.split(";")[0] or v.get("PMIX_NAMESPACE", "")
    return Place(_address(v, who, host, _port(job), processes > 1), processes, process, local, neighbours, who)


def _slurm(v: Mapping[str, str]) -> Place:
    who = "SLURM_PROCID"
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in v else "SLURM_NTASKS"
    processes, process = _number(v, count, who), _number(v, who, who)
    host = first_node(v["SLURM_STEP_NODELIST"])
    port = _port(f"{v.get('SLURM_JOB_ID', '')}.{v.get('SLURM_STEP_ID', '')}")
    per_node = _tasks(v.get("SLURM_STEP_TASKS_PER_NODE", v.get("SLURM_TASKS_PER_NODE", "")))
    node = _number(v, "SLURM_NODEID", who, 0)
    neighbours = per_node[node] if node < len(per_node) else 1
    local = _number(v, "SLURM_LOCALID", who, 0)
    return Place(_address(v, who, host, port, processes > 1), processes, process, local, neighbours, who)


def _kubernetes(v: Mapping[str, str]) -> Place:
    who = "JOB_COMPLETION_INDEX"
    processes = _number(v, "WORLD_SIZE", who)
    return Place(_address(v, who, None, PORT, processes > 1), processes, _number(v, who, who), told_by=who)


def first_node(nodes: str) -> str:
    """The first host of Slurm's short form: ``gpu[003-005,009],login1`` gives ``gpu003``."""
    found = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _tasks(text: str) -> list[int]:
    """``4(x2),3`` gives 4, 4, 3."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]


def _port(job: str) -> int:
    """The same on all processes of a job; another job on the machine very likely has another."""
    return _PORTS[zlib.crc32(job.encode()) % len(_PORTS)] if job.strip(".") else PORT


def _number(v: Mapping[str, str], name: str, who: str, default: int | None = None) -> int:
    text = v.get(name, "")
    if not text.strip() and default is not None:
        return default
    if not text.strip():
        raise ValueError(f"{who} is set and {name} is not: set both, or call hosts.start(processes=1) to run alone")
    if not re.fullmatch(r"\s*-?\d+\s*", text):
        raise ValueError(f"{name} is {text!r}: give a whole number")
    return int(text)


def _address(v: Mapping[str, str], who: str, host: str | None, port: int, needed: bool, shift: int = 0) -> str:
    host = v.get("MASTER_ADDR") or host
    if host is None:
        if needed:
            raise ValueError(f"{who} is set and MASTER_ADDR is not: set it to the host name or address of process 0")
        return ""
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"  # an IPv6 address
    return f"{host}:{_number(v, 'MASTER_PORT', who, port) + shift}"
