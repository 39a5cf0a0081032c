"""FSDP2 that shards over gloo where users have no such thing: on a CPU, or two ranks on one GPU.

A rank calls `prepare_rank` before it trains; run as a script, this file is llama_training.py after that call.

On the CPU torch.distributed shards; Accelerate (1.15, state.py) turns FSDP on beside an accelerator only, and the scripts say so
and drop the flag. Both are undone here, so that what a run does under FSDP2 can be tested without a GPU: two ranks that hold
half of each weight, gathers in saving, rehearsal, resume, evaluation. Offloading runs without the pinned memory that takes a GPU.

On one GPU gloo takes two ranks, which NCCL refuses, but dies of SIGSEGV where a DTensor is gathered: see `gather_by_itself`.
"""

import os
import runpy
import sys

import accelerate.accelerator
import accelerate.state
import torch
from accelerate.utils import DistributedType
from scripts import ROOT
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import CPUOffloadPolicy

sys.path.insert(0, str(ROOT))

import utils
from sft import flags, job

train, load_model, recompute = utils.train, utils.load_model, accelerate.accelerator.fsdp2_apply_ac
prepare = accelerate.state.AcceleratorState.__init__
library = torch.library.Library("_c10d_functional", "IMPL")  # lives as long as what it changes
gathered = 0


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


def shard_on_a_cpu() -> None:
    """Undo Accelerate's refusal and the scripts' own."""
    accelerate.state.AcceleratorState.__init__ = prepare_and_shard
    flags.drop_fsdp_where_nothing_is_sharded = lambda flags: []


def load_and_say_how_much(*args):
    """Print how many bytes of the model this rank holds, adapters left out, once it is loaded."""
    model = load_model(*args)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for n, t in tensors if "lora_" not in n}
    print(f"rank {job.rank()} holds {sum(held.values())} bytes of the model\n", end="", flush=True)
    return model


def recompute_and_say_how_much(*args):
    """Print how many layers recompute their activations through FSDP."""
    model = recompute(*args)
    print(f"FSDP recomputes {sum(isinstance(module, CheckpointWrapper) for module in model.modules())} layers")
    return model


def gather_by_itself(shard: torch.Tensor, ranks: int, group) -> torch.Tensor:
    """What `_c10d_functional::all_gather_into_tensor` does, without gloo's coalesced all-gather, and count it.

    DTensor's gathers (`full_tensor`, `redistribute`: in a run the saving of weights and optimizer) come to that function. torch
    (2.11 and 2.13, Functional.cpp) hands it to `allgather_into_tensor_coalesced`, which gloo runs on a GPU's addresses as if
    they were the host's (pytorch issue 152645, open); its plain all-gather, FSDP's own in training, copies through the host.
    """
    global gathered
    gathered += 1
    whole = shard.new_empty((ranks * shard.shape[0], *shard.shape[1:]))
    return torch.ops._c10d_functional.all_gather_into_tensor_out(shard, ranks, group, out=whole)


def train_and_say_how_often(*args):
    """Print how many tensors `gather_by_itself` gathered, at the end."""
    train(*args)
    print(f"rank {job.rank()} gathered {gathered} tensors by themselves\n", end="", flush=True)


def prepare_rank() -> None:
    """In a rank, before it trains; GATHER_BY_ITSELF is the device whose tensors are, CUDA or CPU."""
    accelerate.accelerator.fsdp2_apply_ac = recompute_and_say_how_much
    utils.load_model, utils.train = load_and_say_how_much, train_and_say_how_often
    if "--use_cpu" in sys.argv:
        shard_on_a_cpu()
    if "GATHER_BY_ITSELF" in os.environ:
        # Accelerate (1.15, state.py) names the GPU of a rank's number, which a shared GPU has not
        torch.distributed.barrier = lambda *args, device_ids=None, wait=torch.distributed.barrier: wait(*args)
        library.impl("all_gather_into_tensor", gather_by_itself, os.environ["GATHER_BY_ITSELF"])


if __name__ == "__main__":
    prepare_rank()
    runpy.run_path(str(ROOT / "llama_training.py"), run_name="__main__")
