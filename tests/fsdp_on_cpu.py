"""Lets the Trainer shard a model by FSDP2 on CPU processes, which accelerate refuses: its state never leaves MULTI_CPU."""

import os

import accelerate.state
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

LAUNCHED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What `accelerate launch` with accelerate_configs/fsdp2.yaml puts into the environment."""


def install():
    os.environ |= LAUNCHED
    initialise = accelerate.state.AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if (
            isinstance(fsdp_plugin, FullyShardedDataParallelPlugin)
            and self.distributed_type == DistributedType.MULTI_CPU
        ):
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if isinstance(fsdp_plugin.cpu_offload, CPUOffloadPolicy):
                fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # which takes a GPU

    accelerate.state.AcceleratorState.__init__ = with_plugin
