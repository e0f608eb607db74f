"""Lets accelerate shard on CPUs, where it would train with plain data parallelism and not say so.

Python imports this module at the start of every process that has this folder on its path. Accelerate reads FSDP's
settings only for the kinds of devices it lists; torch's ``fully_shard`` accepts any.
"""

import os

if "LOCAL_RANK" in os.environ:  # one of the processes that train, not the one that starts them
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import CPUOffloadPolicy

    initialise = AcceleratorState.__init__

    def shard_on_cpus(self, *args, **kwargs) -> None:
        """Initialises the state as if the processes had a GPU each; offloaded weights are not pinned for one."""
        first = not AcceleratorState._shared_state  # later ones read from PartialState what the first made of it
        if first and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            PartialState().distributed_type = DistributedType.MULTI_GPU
        initialise(self, *args, **kwargs)
        if first and isinstance(getattr(self.__dict__.get("fsdp_plugin"), "cpu_offload", None), CPUOffloadPolicy):
            self.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)

    AcceleratorState.__init__ = shard_on_cpus
