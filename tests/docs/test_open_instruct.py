"""The dataset that the original names, from the hub."""

import json
import sys
from types import SimpleNamespace

import pytest
from scripts import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import open_instruct

from sft.data.files import read_rows
from sft.job import UserError

RECORDS = [  # of the hub's form
    {"alpaca_prompt": "### A,\n### Response:", "instruction": "A,", "response": 'says "1"\r\n', "source": "x"},
    {"alpaca_prompt": "é{input}", "instruction": "B", "response": None, "source": "y"},
]
ROWS = [(2, ("### A,\n### Response:", 'says "1"\r\n')), (3, ("é{input}", ""))]


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Convert what the hub gives as the command does; the rows that training reads then."""

    def convert(names_there):
        import huggingface_hub

        def dataset_info(self, repo_id, *, timeout):
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names_there(repo_id)])

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, repo_type: str(tmp_path / name))
        monkeypatch.setattr(sys, "argv", ["open_instruct.py", "--output", str(tmp_path / "out.csv")])
        open_instruct.main()
        return list(read_rows(str(tmp_path / "out.csv"), {"prompt": "--source", "response": "--target"}))

    return convert


def test_from_the_hub(convert, tmp_path):
    for number, record in enumerate(RECORDS):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(record))
    asked = []

    def names_there(repo_id):
        asked.append(repo_id)
        return ["README.md", "part-1.jsonl", "part-0.jsonl"]

    assert convert(names_there) == ROWS
    assert asked == ["VMware/open-instruct-v1-oasst-dolly-hhrlhf"]


def test_what_it_refuses_leaves_the_old_csv(convert, tmp_path):
    class ConnectError(Exception):
        """The HTTP library's own (httpx 2), which is no OSError."""

    def no_network(repo_id):
        raise ConnectError

    (tmp_path / "out.csv").write_text("old")
    for hub, said in ((lambda repo_id: ["README.md"], "no file ending in"), (no_network, r"hub .* \(ConnectError\)")):
        with pytest.raises(UserError, match=f"^VMware/open-instruct.*{said}"):
            convert(hub)
    assert (tmp_path / "out.csv").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
