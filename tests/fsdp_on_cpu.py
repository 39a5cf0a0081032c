"""Run llama_training.py with FSDP2 that really shards on the CPU, over gloo.

torch.distributed shards there; Accelerate (1.15, state.py) turns FSDP on beside an accelerator only, and the scripts say so and
drop the flag. Both are undone here, so that what a run does under FSDP2 can be tested without a GPU: two ranks that hold
half of each weight, gathers in saving, rehearsal, resume, evaluation. Offloading runs without the pinned memory that takes a GPU.
"""

import runpy
import sys

import accelerate.accelerator
import accelerate.state
from accelerate.utils import DistributedType
from conftest import ROOT
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import CPUOffloadPolicy

sys.path.insert(0, str(ROOT))

import utils
from sft import arguments

load_model, recompute = utils.load_model, accelerate.accelerator.fsdp2_apply_ac
prepare = accelerate.state.AcceleratorState.__init__


def prepare_and_shard(self, *args, fsdp_plugin=None, **kwargs):
    prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        if isinstance(fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
            print("FSDP offloads")
        self.fsdp_plugin = fsdp_plugin


def load_and_say_how_much(*args):
    """Print how many bytes of the model this rank holds, adapters left out, once it is loaded."""
    model = load_model(*args)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for n, t in tensors if "lora_" not in n}
    print(f"rank {arguments.rank()} holds {sum(held.values())} bytes of the model\n", end="", flush=True)
    return model


def recompute_and_say_how_much(*args):
    """Print how many layers recompute their activations through FSDP."""
    model = recompute(*args)
    print(f"FSDP recomputes {sum(isinstance(module, CheckpointWrapper) for module in model.modules())} layers")
    return model


if __name__ == "__main__":
    accelerate.accelerator.fsdp2_apply_ac = recompute_and_say_how_much
    utils.load_model = load_and_say_how_much
    accelerate.state.AcceleratorState.__init__ = prepare_and_shard
    arguments._drop_fsdp_where_nothing_is_sharded = lambda flags: []
    runpy.run_path(str(ROOT / "llama_training.py"), run_name="__main__")
