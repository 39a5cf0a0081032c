"""The floors of sft/: imports go downwards, the recipe knows no guard, and the path stays short enough to read."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FLOORS: list[set[str]] = [  # from the ground up; those on one line do not import each other
    {"outside"},
    {"launchers"},
    {"job"},
    {"flags_2023"},
    {"trainer_flags"},
    {"flags"},
    {"arithmetic"},
    {"data", "model", "step"},
    {"plan"},
    {"saving", "report"},
    {"run"},
    {"generate", "merge_lora"},
]
GUARDS = {"plan", "saving", "report"}


def imports(source: str, modules: set[str]) -> set[str]:
    """The files of sft that a file imports, anywhere in it.

    "from sft.data import csv_rows\\nfrom sft.job import say" -> {"sft.data.csv_rows", "sft.job"}
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in modules else node.module)
    return {name for name in found if name.split(".")[0] == "sft" and name != "sft"}


def graph() -> dict[str, set[str]]:
    """Every file of sft, and the files of sft that it imports."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("sft/**/*.py")}
    files.pop("sft.__init__")
    return {name: imports(path.read_text(encoding="utf-8"), set(files)) for name, path in files.items()}


def floor(module: str) -> str:
    return module.split(".")[1]


def upward(arrows: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that go to a floor above, or to a neighbour on the same one."""
    height = {name: level for level, names in enumerate(FLOORS) for name in names}
    return [
        (module, target)
        for module, targets in arrows.items()
        for target in targets
        if floor(module) != floor(target) and height[floor(module)] <= height[floor(target)]
    ]


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Files that import themselves through others."""

    def reach(module: str, seen: set[str]) -> set[str]:
        for target in arrows.get(module, set()) - seen:
            seen.add(target)
            reach(target, seen)
        return seen

    return [module for module in arrows if module in reach(module, set())]


def test_floors_import_downwards_and_without_circles():
    arrows = graph()
    assert {floor(module) for module in arrows} == set().union(*FLOORS)
    assert upward(arrows) == []
    assert circles(arrows) == []


def test_the_recipe_knows_no_guard():
    for module, targets in graph().items():
        if module == "sft.run.trainer" or (module.split(".")[1:2] and floor(module) in ("data", "model", "step")):
            assert not {floor(target) for target in targets} & GUARDS, module


def test_the_rule_can_fail():
    assert imports("from sft.data import rows\nfrom sft.job import say\nimport json", {"sft.data.rows", "sft.job"}) == {
        "sft.data.rows",
        "sft.job",
    }
    assert upward({"sft.data.a": {"sft.plan.b"}, "sft.plan.b": {"sft.data.a"}}) == [("sft.data.a", "sft.plan.b")]
    assert upward({"sft.data.a": {"sft.step.b"}}) == [("sft.data.a", "sft.step.b")]
    assert circles({"sft.a": {"sft.b"}, "sft.b": {"sft.a"}, "sft.c": {"sft.a"}}) == ["sft.a", "sft.b"]


def test_files_are_short_and_few_lie_outside_of_the_floors():
    lines = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in ROOT.glob("sft/**/*.py")}
    assert {path: count for path, count in lines.items() if count > 400} == {}
    assert len(list(ROOT.glob("sft/*.py"))) <= 10


def test_the_path_stays_readable():
    source = (ROOT / "utils.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    names = [
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "sft"
        for alias in node.names
    ]
    (train,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert len(source.splitlines()) <= 320
    assert len(names) <= 16, names
    assert train.end_lineno - train.lineno + 1 <= 30
    assert sum(isinstance(node, ast.With) for node in ast.walk(train)) <= 3
