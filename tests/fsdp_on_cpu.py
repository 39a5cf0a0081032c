"""Run llama_training.py with FSDP2 that really shards on the CPU, over gloo.

torch.distributed shards there; Accelerate (1.15, state.py) turns FSDP on beside an accelerator only, and the scripts say so and
drop the flag. Both are undone here, so that what a run does under FSDP2 can be tested without a GPU: two ranks that hold
half of each weight, gathers in saving, rehearsal, resume, evaluation. Offloading is not: it pins memory for a GPU.
"""

import runpy
import sys

import accelerate.state
from accelerate.utils import DistributedType
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from sft import arguments

prepare = accelerate.state.AcceleratorState.__init__


def prepare_and_shard(self, *args, fsdp_plugin=None, **kwargs):
    prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    accelerate.state.AcceleratorState.__init__ = prepare_and_shard
    arguments._drop_fsdp_where_nothing_is_sharded = lambda flags: []
    runpy.run_path(str(ROOT / "llama_training.py"), run_name="__main__")
