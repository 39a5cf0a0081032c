"""Write docs/models.md: which architectures are packed, tried on tiny random models by the proof that each run makes of its own.

python .ci/models.py
"""

import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402

from sft import IGNORE_INDEX  # noqa: E402
from sft.job import UserError  # noqa: E402
from sft.plan.proof import Proof, prove  # noqa: E402

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


def tried(kind: str, kernel: str | None) -> Proof | str:
    """The proof, or why there is none."""
    model_args = SimpleNamespace(model_name_or_path=None, trust_remote_code=False)
    args = SimpleNamespace(
        device=torch.device("cpu"), bf16=False, fp16=False, deepspeed=None, per_device_train_batch_size=2
    )
    try:
        config = transformers.AutoConfig.for_model(kind, **(SIZES | MODELS[kind]))
        return prove(model_args, args, config, examples(), kernel)[-1]
    except Exception as error:
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0][:120]


def row(kind: str) -> str:
    packed = tried(kind, "per_example")
    if isinstance(packed, Proof) and not packed.fault:
        return f"| {kind} | packed | {packed.loss:.0e} | |"
    padded = tried(kind, None)
    why = packed.fault if isinstance(packed, Proof) else packed
    if isinstance(padded, Proof) and not padded.fault:
        return f"| {kind} | padded | {padded.loss:.0e} | {why} |"
    return f"| {kind} | refused | | {padded.fault if isinstance(padded, Proof) else padded} |"


def page() -> str:
    head = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").split("\n| architecture")[0]
    rows = "\n".join(row(kind) for kind in MODELS)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, on a CPU"
    return f"{head}\n| architecture | a run is | loss, largest relative difference | why not packed |\n|---|---|---|---|\n{rows}\n\n{versions}.\n"


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    (ROOT / "docs" / "models.md").write_text(page(), encoding="utf-8")
