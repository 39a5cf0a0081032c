"""docs/upgrading.md against the sources: every private name of a library, and every object of a library that is changed, is on the page."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from scripts import ROOT

PAGE = ROOT / "docs" / "upgrading.md"
SOURCES = [ROOT / "utils.py", *sorted(ROOT.glob("sft/**/*.py"))]
PRIVATE = re.compile(r"\b_[A-Za-z]\w*")
DOCUMENTED = {"_asdict", "_fields", "_replace", "_exit", "_local"}  # by Python
WORDS = {"_token", "_key"}  # ends of flags, no names
INNER_MODULES = ("deepspeed.runtime", "deepspeed.utils", "liger_kernel.ops", "transformers.integrations.deepspeed")
OWN = {"self", "cls", "ctx", "flags"}  # objects of this project by these names
EVENTS = ("AttentionInterface.register", "register_forward_hook", "filterwarnings", "field_size_limit", "signal.signal")


def own_names(trees: list[ast.Module]) -> tuple[set[str], set[str]]:
    """Private names that these sources define and transformers' Trainer has not, and attributes of their classes."""
    defined, attributes = set(), set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) in OWN:
            attributes.add(node.attr)
        if isinstance(node, ast.ClassDef):
            for line in node.body:
                targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
                attributes |= {target.id for target in targets if isinstance(target, ast.Name)}
    return (defined | attributes) - set(PRIVATE.findall(inspect.getsource(transformers.Trainer))), attributes


def written(node: ast.AST, constants: dict[str, str]) -> Iterator[str]:
    """What a node changes of an object that is not its own: attributes, by assignment, `swapped` or `patch`; the environment."""
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        if ast.unparse(node.value) not in OWN:
            yield node.attr
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and "environ" in ast.unparse(node.value):
        yield key_of(node.slice, constants)
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        if called == "swapped" or called.endswith(".patch"):
            yield from (keyword.arg for keyword in node.keywords if keyword.arg)
        elif called == "os.environ.setdefault":
            yield key_of(node.args[0], constants)
        elif called == "setattr" and isinstance(node.args[1], ast.Constant):
            yield node.args[1].value
        elif called.endswith(EVENTS):
            yield next(event for event in EVENTS if called.endswith(event))


def key_of(node: ast.expr, constants: dict[str, str]) -> str:
    return constants.get(node.id, node.id) if isinstance(node, ast.Name) else ast.literal_eval(node)


def private(node: ast.AST) -> Iterator[str]:
    """Private names in a node: attributes, methods, imports, keyword arguments, texts."""
    names: list[str] = []
    if isinstance(node, ast.Attribute):
        names = [node.attr]
    elif isinstance(node, ast.FunctionDef):
        names = [node.name]
    elif isinstance(node, ast.Call):
        names = [keyword.arg or "" for keyword in node.keywords]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        names = node.value.split(".")
    elif isinstance(node, ast.Import | ast.ImportFrom):
        module = (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        names = [*module.split("."), *(alias.name for alias in node.names)]
        if module.startswith(INNER_MODULES):
            yield module
    yield from (name for name in names if PRIVATE.fullmatch(name))


def found_in(source: str, own: tuple[set[str], set[str]] = (set(), set())) -> set[str]:
    """Every private name of a library in a source, and everything of a library that it changes."""
    tree = ast.parse(source)
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    defined, attributes = own
    nodes = list(ast.walk(tree))
    names = {name for node in nodes for name in private(node)} - defined - DOCUMENTED - WORDS
    return names | {name for node in nodes for name in written(node, constants)} - attributes


def rows() -> list[tuple[list[str], list[str], list[str]]]:
    """(names, files, tests) of each row of the page's tables; `tests` is empty in the table of public settings."""
    cells = [
        line.strip("| ").split(" | ")
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    return [
        tuple(re.findall("`([^`]+)`", cell) for cell in (row[0], row[1], row[4] if len(row) == 6 else ""))
        for row in cells
    ]


def test_every_private_name_and_every_changed_object_is_on_the_page():
    own = own_names([ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES])
    on_the_page = {(name, file) for names, files, _ in rows() for name in names for file in files}
    found = {(name, str(path.relative_to(ROOT))) for path in SOURCES for name in found_in(path.read_text("utf-8"), own)}
    assert len(found) > 50
    assert sorted(found - on_the_page) == []


def test_every_row_is_still_true():
    """Its names stand in one of the files that it names, and each of these holds one of them; its tests exist."""
    for names, files, tests in rows():
        sources = [(ROOT / file).read_text(encoding="utf-8") for file in files]
        assert [name for name in names if not any(name in source for source in sources)] == []
        assert [file for file, source in zip(files, sources) if not any(name in source for name in names)] == []
        for test in tests:
            file, name = test.split("::")
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), test
    assert {len(tests) for _, _, tests in rows()} == {0, 1}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("deepspeed.launcher.launch", "current_env[CROSS_RANK]"),
        ("deepspeed.runtime.zero.stage3", "self.overflow = "),
        ("deepspeed.accelerator.real_accelerator", "DS_ACCELERATOR"),
        ("transformers.integrations.integration_utils", "TENSORBOARD_LOGGING_DIR"),
        ("transformers.configuration_utils", '"_name_or_path"'),
        ("torch._inductor.config", "mix_order_reduction"),
        ("torch._inductor.config", "joint_custom_post_pass"),
        ("torch._inductor.graph", "eager_input_vals"),
        ("torch.distributed.elastic.agent.server.local_elastic_agent", "TORCHELASTIC_USE_AGENT_STORE"),
        ("torch.serialization", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"),
    ],
)
def test_names_that_would_vanish_without_an_error(module, name):
    """A variable that nothing reads any more, a key that is called otherwise: the library's source still has the name."""
    spec = importlib.util.find_spec(module.split(".")[0]) or pytest.skip(f"{module} is not installed")
    path = Path(spec.origin).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert name in path.read_text(encoding="utf-8")


def test_the_rule_can_fail():
    assert found_in("import torch._inductor\ntrainer._save(x)\nmodel.config.use_cache = False") == {
        "_inductor", "_save", "use_cache"
    }  # fmt: skip
    assert found_in('NAME = "A"\nos.environ[NAME] = "1"\nos.environ.setdefault("B", "2")') == {"A", "B"}
    assert found_in("with swapped(args, output_dir=x), config.patch(limit=3): cached_file(x, _raise=False)") == {
        "output_dir", "limit", "_raise"
    }  # fmt: skip
    assert found_in("from deepspeed.runtime.zero import config\nhead.__class__ = Other") == {
        "deepspeed.runtime.zero", "__class__"
    }  # fmt: skip
    assert found_in("self.own = 1\nx = rows._replace(a=1)\ns = '_token'") == set()
    mine = own_names(
        [ast.parse("class Mine:\n    kept = 1\n    def _save(self): self._x = 1\n    def _helper(self): ...")]
    )
    assert "_helper" in mine[0] and "_x" in mine[0] and "kept" in mine[1]
    assert found_in("trainer.control = 1", mine) == {"control"} and "_save" not in mine[0], (
        "an override of the Trainer's"
    )


@pytest.mark.slow
def test_the_fault_is_reproduced_as_the_page_shows(tmp_path):
    """Until torch or transformers changes: then the page's last part goes."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    (tmp_path / "fault.py").write_text(code.replace("29517", "0"))
    ended = subprocess.run([sys.executable, str(tmp_path / "fault.py")], capture_output=True, text=True)
    assert ended.stdout == "torch.bfloat16 4352.0\n", ended.stderr
