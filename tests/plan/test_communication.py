"""What GPUs send each other, by hand: 7B in bfloat16 on two machines or one."""

import json

import pytest
from plans import OPEN_LLAMA_7B, deepspeed_file, plan_of

from sft.plan import communication

FSDP = ["--fsdp", "true", "--tokens_per_micro_batch", "2048"]
P = 6_738_415_616


@pytest.fixture(autouse=True)
def _ranks_from_the_flag(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def sent(*words: str, step_tokens: int = 2048) -> dict[str, float]:
    return communication.bytes_of_a_step(plan_of(OPEN_LLAMA_7B, *words, step_tokens=step_tokens))


def test_fsdp_gathers_weights_for_each_micro_batch_and_adds_gradients_up_once():
    eight = [*FSDP, "--plan_world_size", "8"]
    keeps = ["--fsdp_config", '{"reshard_after_forward": false}']
    assert sent(*eight) == {"weights": 2 * 2 * P * 7 / 8, "gradients": 2 * P * 7 / 8, "between machines": 0}
    assert sent(*eight, step_tokens=4096)["weights"] == 2 * sent(*eight)["weights"]
    assert sent(*eight, *keeps)["weights"] == sent(*eight)["weights"] / 2
    inside = json.dumps({"hybrid_shard": True})
    two_machines = sent(*FSDP, "--plan_world_size", "16", "--fsdp_config", inside)
    assert two_machines == {"weights": 2 * 2 * P * 7 / 8, "gradients": 2 * P * 7 / 8, "between machines": 2 * P / 8}


def test_ddp_and_zero(tmp_path):
    two = ["--plan_world_size", "2", "--tokens_per_micro_batch", "2048"]
    assert sent(*two) == {"gradients": 4 * P}  # float32, to and fro
    zero2 = [*two, "--deepspeed", deepspeed_file(tmp_path)]
    assert sent(*zero2, step_tokens=4096) == {
        "weights": P,
        "gradients": 2 * P,
    }  # each micro-batch's gradients, each step's weights
    zero3 = [*two, "--deepspeed", deepspeed_file(tmp_path, stage=3)]
    assert sent(*zero3, step_tokens=4096) == {"weights": 4 * P, "gradients": 2 * P}
    assert sent(*two, "--use_lora", "True", "--lora_r", "8")["gradients"] < 1e8


def test_the_line_tells_whether_a_micro_batch_hides_it():
    def line(*words: str, tokens: int = 2048) -> str:
        plan = plan_of(OPEN_LLAMA_7B, *FSDP[:2], "--tokens_per_micro_batch", str(tokens), *words, step_tokens=tokens)
        return "".join(communication.lines(plan))

    assert line("--plan_world_size", "1") == ""
    two = line("--plan_world_size", "2", tokens=4096)
    assert two.startswith(
        "  communication: each GPU sends 20.2 GB in a step (weights 13.5, gradients 6.7), 81 ms at 250 GB/s."
    )
    assert two.endswith("It hides behind 1,200 tokens in a micro-batch; this run's have up to 4,096")
    few = line("--plan_world_size", "8", tokens=1024)
    assert "behind 2,100 tokens" in few
    assert few.endswith("What helps: a larger --per_device_train_batch_size, --keep_gathered_weights True")
    assert line("--plan_world_size", "16").endswith("--plan_network_gb_s tells what that costs")
    slow = line("--plan_world_size", "16", "--plan_network_gb_s", "12.5")
    assert "at 12.5 GB/s" in slow and slow.endswith('--fsdp "hybrid_shard auto_wrap"')
    hybrid = line("--plan_world_size", "16", "--plan_network_gb_s", "12.5", "--fsdp_config", '{"hybrid_shard": true}')
    inside = 3 * 2 * P * 7 / 8 / 2.5e11  # seconds
    assert f"{1e3 * (inside + 2 * P / 8 / 12.5e9):,.0f} ms" in hybrid and "between machines 1.7" in hybrid
