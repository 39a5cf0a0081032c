"""What ranks send each other in a packed optimizer step, message by message: whoever adds one meets this test.

Elements by hand, for conftest's LLaMA: 2 layers, 32 wide, 64 in the MLP, 4 heads of 8, 2 key heads, 320 words. With gloo a
reduce-scatter is an all-reduce of the whole.
"""

import json

import collectives
import jobs
import pytest

EMBEDDING = 320 * 32
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
HEAD = 320 * 32 + 32  # with the final norm
RUN = "--use_cpu True --max_steps 4 --model_max_length 64 --save_strategy no --logging_steps 10 --save_rehearsal False"
RUN += " --per_device_train_batch_size 8 --tokens_per_micro_batch 64"
IN_EVERY_STEP = {"all_gather 1": 1, "all_gather 10": 1}  # trained tokens (the Trainer's own); the step's message


def counted(prepare, model, csv, folder, *more: str) -> tuple[int, dict[str, int]]:
    flags = ["--model_name_or_path", str(model), "--data_path", str(csv), "--output_dir", str(folder / "out"), *more]
    printed = jobs.run([*flags, "--data_cache_dir", str(folder / "cache"), *RUN.split()], 2, folder / "log", prepare)
    line = next(line for line in printed.splitlines() if line.startswith("COUNTED "))
    found = json.loads(line.removeprefix("COUNTED "))
    return found["micro_batches"], found["sent"]


@pytest.mark.slow
def test_ddp_adds_the_gradients_up_once_in_each_step(tiny_llama, questions_csv, tmp_path):
    micro_batches, sent = counted(collectives.count_collectives, tiny_llama, questions_csv, tmp_path)
    assert micro_batches > 1
    buffers = {"broadcast 8": 1}  # rotary frequencies; DDP's own, in the micro-batch that adds up
    assert sent == {f"all_reduce {EMBEDDING + 2 * LAYER + HEAD}": 1} | buffers | IN_EVERY_STEP


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
def test_fsdp_gathers_each_unit_twice_for_each_micro_batch_or_keeps_it_and_adds_its_gradient_up_once(
    tiny_llama, questions_csv, tmp_path, kept
):
    flags = "--fsdp", "true", "--keep_gathered_weights", str(kept)
    each = 1 if kept else 2
    micro_batches, sent = counted(collectives.shard_and_count, tiny_llama, questions_csv, tmp_path, *flags)
    assert micro_batches > 1
    gathers = {  # halves: of two ranks
        f"all_gather {EMBEDDING // 2}": each * micro_batches,
        f"all_gather {LAYER // 2}": 2 * each * micro_batches,
        f"all_gather {HEAD // 2}": micro_batches,  # the root of the model keeps it for the backward pass
    }
    sums = {f"all_reduce {EMBEDDING}": 1, f"all_reduce {LAYER}": 2, f"all_reduce {HEAD}": 1}
    assert sent == gathers | sums | {"all_reduce 21": 1} | IN_EVERY_STEP  # the norm of 21 gradients
