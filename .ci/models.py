"""Write docs/models.md: which architectures are packed, tried on tiny random models by the proof that each run makes of its own.

python .ci/models.py
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from sft import IGNORE_INDEX  # noqa: E402
from sft.job import UserError  # noqa: E402
from sft.plan import proof  # noqa: E402
from sft.step.modules import exchange  # noqa: E402
from sft.step.packed_rows import PackedCollator  # noqa: E402

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}
TOP_2 = {"num_experts_per_tok": 2}
EXPERTS = {"sliding_window": None} | TOP_2
MODELS = {
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 16}, "phi3": {}, "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 512}, "gemma3_text": {"head_dim": 16, "sliding_window": 512}, "olmo2": {}, "olmo3": {},
    "granite": {"logits_scaling": 8.0}, "cohere": {}, "smollm3": {}, "stablelm": {}, "starcoder2": {"sliding_window": None}, "glm4": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4} | EXPERTS, "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16} | EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16, "sliding_window": 512} | TOP_2, "olmoe": {"num_experts": 4} | TOP_2,
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16,
                    "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4} | TOP_2,
    "cohere2": {"sliding_window": 512}, "phi": {}, "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}, "exaone4": {}, "nemotron": {},
    "gpt_neox": {}, "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 64}, "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64}, "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"num_kv_heads": 2}, "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2}, "mamba": {"state_size": 8}, "mamba2": {"head_dim": 16, "num_heads": 8, "n_groups": 1}, "lfm2": {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip


def examples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 250, (length,), generator=generator) for length in (41, 23, 34)]
    return [{"input_ids": row, "labels": torch.cat([torch.full((9,), IGNORE_INDEX), row[9:]])} for row in ids]


MODEL_ARGS: Any = SimpleNamespace(model_name_or_path=None, trust_remote_code=False)
ARGS: Any = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False, deepspeed=None, per_device_train_batch_size=2)  # fmt: skip


def tried(kind: str, kernel: str | None) -> tuple[str, str]:
    """(what is wrong, or "", the columns of losses) of a way of computing: packed with this kernel, or padded (None)."""
    try:
        config = transformers.AutoConfig.for_model(kind, **(SIZES | MODELS[kind]))
        found = proof.prove(MODEL_ARGS, ARGS, config, examples(), kernel)[-1]
        return found.fault or "", f"{losses(config, kernel)} | {found.loss:.0e}"
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return said, " | | "


def losses(config: transformers.PreTrainedConfig, kernel: str | None) -> str:
    """The mean loss of the examples, computed together in this way and one by one by the model's own forward."""
    torch.manual_seed(0)
    model, rows = proof.random_layers(MODEL_ARGS, ARGS, config).eval(), examples()
    trained = sum(int((row["labels"][1:] != IGNORE_INDEX).sum()) for row in rows)
    alone = sum(loss for loss, _ in proof.losses_alone(model, rows))
    way = proof.padded(model, together=True)
    if kernel:
        model.set_attn_implementation(kernel)
        way = proof.packed(model, exchange(model), PackedCollator())
    with torch.no_grad():
        return f"{way(rows, None).item() / trained:.6f} | {alone / trained:.6f}"


def row(kind: str) -> str:
    why, columns = tried(kind, "per_example")
    if not why:
        return f"| {kind} | packed | {columns} | |"
    fault, columns = tried(kind, None)
    return f"| {kind} | refused | | | | {fault} |" if fault else f"| {kind} | padded | {columns} | {why} |"


def page() -> str:
    head = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").split("\n| architecture")[0]
    rows = [row(kind) for kind in MODELS]
    counts = ", ".join(
        f"{sum(f' | {how} | ' in line for line in rows)} {how}" for how in ("packed", "padded", "refused")
    )
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, on a CPU"
    names = "| architecture | a run is | its loss | the model's own | largest relative difference | why not packed |"
    return "\n".join([head, names, "|---|---|---|---|---|---|", *rows, "", f"{counts}. {versions}.\n"])


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    (ROOT / "docs" / "models.md").write_text(page(), encoding="utf-8")
