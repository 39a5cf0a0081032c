"""Greedy answers: alone and in a padded batch, ended and cut."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sft.model.answer import greedy_answers


class Ids:
    pad_token_id, eos_token_id = 0, 2


def test_answers_in_a_padded_batch_are_those_of_each_prompt_alone():
    torch.manual_seed(2)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=12, **shape))  # 12 ids: some answers end in time, some do not
    model.train()
    prompts = [[1, 5, 7, 3], [1, 9], [1, 3, 4, 5, 6, 7, 8], [1]]
    expected = []
    for prompt in prompts:
        ids = model.eval().generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        answer = ids[0, len(prompt) :].tolist()
        expected.append((answer[: answer.index(2)] if 2 in answer else answer, 2 not in answer))
    model.train()
    assert greedy_answers(model, Ids, prompts, torch.device("cpu"), 9) == expected
    assert model.training
    assert greedy_answers(model.eval(), Ids, prompts[:1], torch.device("cpu"), 9) == expected[:1]
    assert not model.training
    assert len({tuple(answer) for answer, _ in expected}) > 1 and {cut for _, cut in expected} == {True, False}
