"""Lets the Trainer shard a model by FSDP2 on CPU processes, which accelerate refuses: its state never leaves MULTI_CPU."""

import accelerate.state
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType


def install():
    initialise = accelerate.state.AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if (
            isinstance(fsdp_plugin, FullyShardedDataParallelPlugin)
            and self.distributed_type == DistributedType.MULTI_CPU
        ):
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = with_plugin
