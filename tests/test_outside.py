"""What comes from outside is read, printed and refused in sentences."""

import pytest

from sft import outside
from sft.outside import UserError


def test_a_json_file_that_holds_no_object_is_a_value_error(tmp_path):
    file = tmp_path / "a.json"
    for text in ("", "[1]", "null", "[" * 100_000, '{"a": 1'):
        file.write_text(text)
        with pytest.raises(ValueError):
            outside.read_object(file)
    file.write_text('{"a": 1}')
    assert outside.read_object(file) == {"a": 1}


def test_whatever_a_library_says_of_a_damaged_file_is_one_sentence():
    with pytest.raises(UserError) as raised, outside.reading("model: its files"):
        raise TypeError("argument of type 'int' is not iterable\nand more")
    assert raised.value.problems == [
        "model: its files cannot be loaded: TypeError: argument of type 'int' is not iterable"
    ]
    with pytest.raises(UserError, match=r"^as it was$"), outside.reading("model: its files"):
        raise UserError("as it was")


def test_passwords_and_secrets_are_known():
    assert outside.without_password("s3://me:pass@host/a b") == "s3://***@host/a b"
    assert outside.without_password("a@b https://host/x@y") == "a@b https://host/x@y"
    secret = ["hub_token", "push_to_hub_token", "WANDB_API_KEY", "password", "aws-secret"]
    assert [outside.is_secret(name) for name in (*secret, "tokens_per_micro_batch", "tokenizer", "keyboard")] == [
        True
    ] * 5 + [False] * 3


def test_one_is_not_several():
    assert [outside.counted(n, "row") for n in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
