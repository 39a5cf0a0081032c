"""Who imports whom: each file of sft/ reads on its own."""

import ast

from conftest import ROOT

JOIN_OTHERS = {"trainer", "generate", "report"}  # the Trainer, and two commands


def imported(source: str) -> set[str]:
    """The project's modules that a source imports, wherever in it.

    "from sft.rows import read_csv\\nfrom sft import lora\\nimport utils" -> {"rows", "lora", "utils"}
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "sft":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.removeprefix("sft.") if node.module.startswith(("sft.", "utils")) else "")
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.removeprefix("sft.") for alias in node.names if alias.name.startswith(("sft.", "utils"))
            }
    return names - {""}


def test_imported():
    assert imported("from sft.rows import read_csv\nfrom sft import lora\nimport utils") == {"rows", "lora", "utils"}


def test_a_room_imports_arguments_alone():
    for path in sorted((ROOT / "sft").glob("*.py")):
        found = imported(path.read_text(encoding="utf-8"))
        assert "utils" not in found, path
        assert path.stem in JOIN_OTHERS or found <= {"arguments"}, f"{path.name} imports {found - {'arguments'}}"
