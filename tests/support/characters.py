"""A tokenizer whose ids can be read: the id of an ASCII character is its code, of any other text the bytes of its UTF-8."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

BOS, EOS, PAD = 256, 257, 258  # <s>, </s>, <pad>; merged tokens follow


def character_tokenizer(*merges: str) -> PreTrainedTokenizerFast:
    """The tokenizer; each merge is two characters that become one token, 259 the first."""
    letters = bytes_to_unicode()
    vocabulary = {letters[byte]: byte for byte in range(256)} | {"<s>": BOS, "</s>": EOS, "<pad>": PAD}
    vocabulary |= {merge: PAD + 1 + index for index, merge in enumerate(merges)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>", "<pad>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
