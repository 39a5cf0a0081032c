"""What other programs make of the folder that a run leaves: transformers, peft and lm_eval, each by its own loader."""

import pytest
import torch
import transformers

from sft.step import attention

PROMPT, RESPONSE = "Question: What is 1 plus 2?\nAnswer:", " 1 plus 2 is 3."


def log_likelihood(model, tokenizer) -> float:
    """Of the response after the prompt, from the whole logits."""
    ids, prompt = tokenizer(PROMPT + RESPONSE).input_ids, len(tokenizer(PROMPT).input_ids)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return float(logits.log_softmax(-1)[range(prompt - 1, len(ids) - 1), ids[prompt:]].sum())


def as_trained(run) -> float:
    """The same of the model that is still in memory."""
    model = run.trainer.model.eval()
    with attention.stock_attention(model):
        return log_likelihood(model, run.trainer.processing_class)


def test_transformers_loads_the_trained_weights(watched, tiny_llama):
    tokenizer = transformers.AutoTokenizer.from_pretrained(watched.folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(watched.folder)
    assert log_likelihood(loaded, tokenizer) == pytest.approx(as_trained(watched), rel=1e-5)
    untuned = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert log_likelihood(untuned, tokenizer) < log_likelihood(loaded, tokenizer) - 5


def test_a_pipeline_answers_as_the_samples_do(watched):
    pipe = transformers.pipeline("text-generation", model=str(watched.folder), device="cpu")
    for sample in watched.record["samples"][-2:]:
        (answer,) = pipe(sample["prompt"], return_full_text=False, do_sample=False, max_new_tokens=128)
        assert answer["generated_text"] == sample["answer"]


def test_peft_loads_an_adapter(watched_adapter):
    peft = pytest.importorskip("peft")
    tokenizer = transformers.AutoTokenizer.from_pretrained(watched_adapter.folder)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(watched_adapter.folder)
    in_memory = as_trained(watched_adapter)
    assert log_likelihood(loaded, tokenizer) == pytest.approx(in_memory, rel=1e-5)
    with loaded.disable_adapter():
        assert log_likelihood(loaded, tokenizer) < in_memory - 0.5


def test_lm_eval_opens_the_folder(watched):
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    program = HFLM(pretrained=str(watched.folder), device="cpu", batch_size=1, dtype="float32")
    request = Instance(request_type="loglikelihood", doc={}, arguments=(PROMPT, RESPONSE), idx=0)
    ((found, _),) = program.loglikelihood([request])
    assert found == pytest.approx(as_trained(watched), rel=1e-5)
