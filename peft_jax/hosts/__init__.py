"""Several processes, on one machine or on many: how they find one another, and which rows each of them reads.

    hosts.start()                         # reads what Slurm, Kubernetes, Open MPI or torchrun have set; else nothing
    mesh = sharding.mesh(fsdp=-1)         # the devices of all processes
    data = hosts.batches(data, mesh)      # each process reads its part of every batch

Every process runs the same script, and one script serves one device, several, and several hosts.
`python -m peft_jax.launch` starts several processes on one machine and watches over them.
"""

from peft_jax.hosts.data import Batches, Loader, Share, batches, loader
from peft_jax.hosts.process import start
from peft_jax.hosts.variables import Place, read
from peft_jax.sharding import rows

__all__ = ["Batches", "Loader", "Place", "Share", "batches", "loader", "read", "rows", "start"]
