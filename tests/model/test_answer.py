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


def test_inputs_arrive_where_the_run_computes_though_the_weights_lie_elsewhere():
    """transformers moves them to the weights, which are in the host when FSDP or ZeRO-3 offloads them."""

    class Offloaded(torch.nn.Module):
        def generate(self, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
            self(input_ids=torch.zeros(input_ids.shape), cache=None)
            return torch.zeros(1, input_ids.shape[1] + 2, dtype=torch.long)

        def forward(self, input_ids: torch.Tensor, cache: None) -> None:
            arrived.append(input_ids.device.type)

    arrived: list[str] = []
    model = Offloaded()
    greedy_answers(model, Ids, [[1, 3]], torch.device("meta"), 2)
    model(input_ids=torch.zeros(1), cache=None)
    assert arrived == ["meta", "cpu"], "and only while it answers"
