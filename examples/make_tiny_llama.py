"""Make a small LLaMA with random weights and a SentencePiece tokenizer of its own, for the demo.

    python examples/make_tiny_llama.py --data_path examples/facts.csv --output_dir demo_output/tiny-llama

The folder looks like the models of 2023: `config.json`, weights, and `tokenizer.model` alone, so that a run has to
convert the tokenizer as it does for open_llama_7b.
"""

import argparse
import csv
import io
import os
from pathlib import Path

import sentencepiece
import torch
import transformers


def train_tokenizer(texts: list[str], vocab_size: int) -> bytes:
    """A SentencePiece BPE model with LLaMA's settings: <unk> 0, <s> 1, </s> 2, unknown characters as bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", default="examples/facts.csv", help="CSV whose texts the tokenizer is trained on")
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output/tiny-llama"))
    parser.add_argument("--vocab_size", type=int, default=1024)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # where DeepSpeed is installed, it warns that it found no GPU (0.19.8)

    with open(args.data_path, encoding="utf-8", newline="") as file:
        texts = [text for row in list(csv.reader(file))[1:] for text in row]
    tokenizer_model = train_tokenizer(texts, args.vocab_size)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "tokenizer.model").write_bytes(tokenizer_model)

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 8 // 3 // 32 * 32,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden_size // 64,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: LLaMA, {args.layers} layers, {model.num_parameters():,} parameters, random weights")


if __name__ == "__main__":
    main()
