"""The layers of DESIGN.md: imports point down, nothing goes in circles, and importing the package is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "fewstep"

TOP = {"cli", "app", "demos", "__main__"}
LAYERS = [  # top to bottom
    TOP,
    {"estimate"},  # rehearses the real step, so it stands on training
    {"training"},
    {"preparation", "evaluation", "export"},
    {"models"},
    {"distillation"},  # builds roles of any family from their descriptions
    {"families"},
    {"networks"},
    {"formats", "data"},
    {"diffusion", "losses", "devices"},
    {"settings", "shared_work", "progress"},
    {"parallel"},
    {"errors"},
]
LEVEL = {room: -number for number, layer in enumerate(LAYERS) for room in layer}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names a module imports anywhere, functions included, except under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                package = module.split(".")[: None if is_package and child.level == 1 else is_package - child.level]
                base = ".".join([*package, *([child.module] if child.module else [])])
            yield from (f"{base}.{alias.name}" for alias in child.names)
        elif is_type_checking(child):
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from imports_of(ast.Module([other], []), module, is_package)
        else:
            yield from imports_of(child, module, is_package)


def all_imports() -> dict[str, set[str]]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[module_name(path)] = set(imports_of(tree, module_name(path), path.name == "__init__.py"))
    return found


IMPORTS = all_imports()


def resolve(name: str) -> str | None:
    """The module of ours that an imported dotted name lies in."""
    while name not in IMPORTS and "." in name:
        name = name.rpartition(".")[0]
    return name if name in IMPORTS else None


def own_imports(module: str) -> set[str]:
    """The modules of ours that a module imports."""
    return {other for name in IMPORTS[module] if (other := resolve(name)) is not None}


def room(module: str) -> str:
    """The folder or file directly under fewstep/ that a module lies in; "" is the package itself."""
    return module.partition(".")[2].partition(".")[0]


# the root itself is left out: a facade that hands out the public names when they are asked for
MODULES = [module for module in IMPORTS if room(module)]


def test_every_room_has_a_layer() -> None:
    unknown = {room(module) for module in MODULES} - set(LEVEL)
    assert not unknown, f"{unknown} are new: say in DESIGN.md and here which layer they belong to"


def test_imports_point_down() -> None:
    """Also between neighbours of one layer nothing points up; circles among them are tested below."""
    wrong = [
        f"{module} imports {other}"
        for module in MODULES
        for other in sorted(own_imports(module) - {"fewstep"})
        if room(other) != room(module) and LEVEL[room(other)] > LEVEL[room(module)]
    ]
    assert not wrong


def test_only_the_version_comes_from_the_root() -> None:
    """The root's public names lead up again, to generator and training."""
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if room(module) not in TOP
        for name in IMPORTS[module]
        if resolve(name) == "fewstep" and name != "fewstep.__version__"
    ]
    assert not wrong


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a directed graph, or nothing."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph[node]):
            if found := visit(following, [*path, node]):
                return found
        done.add(node)
        return []

    for node in graph:
        if found := visit(node, []):
            return found
    return []


def test_no_module_imports_itself_through_others() -> None:
    assert not circle({module: own_imports(module) - {"fewstep"} for module in MODULES})


def test_neighbours_in_a_layer_import_in_one_direction() -> None:
    graph: dict[str, set[str]] = {room(module): set() for module in MODULES}
    for module in MODULES:
        graph[room(module)] |= {room(other) for other in own_imports(module) if room(other)} - {room(module)}
    assert not circle(graph)


def test_process_groups_have_one_user() -> None:
    """Ranks come from parallel.py; sharded checkpoints, and FSDP with its meshes and tensors, have modules of their own."""
    allowed = (
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch.distributed.device_mesh",
    )
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        if room(module) != "parallel"
        for name in IMPORTS[module]
        if name.startswith("torch.distributed") and not name.startswith(allowed)
    ]
    assert not wrong
    assert any(name.startswith("torch.distributed") for name in IMPORTS["fewstep.parallel"])


@pytest.mark.parametrize("banned", ["torchvision", "torch_fidelity", "lpips", "cleanfid", "pytorch_fid", "timm"])
def test_libraries_that_do_not_work_together_stay_out(banned: str) -> None:
    assert not [module for module in IMPORTS if any(name.split(".")[0] == banned for name in IMPORTS[module])]


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    source = """
import a.b
from c import d as e
from . import near
from ..far import away
if TYPE_CHECKING:
    from hidden import x
else:
    import shown
def f():
    try:
        from late import y
    except ImportError:
        import later
"""
    found = set(imports_of(ast.parse(source), "fewstep.room.module", is_package=False))
    assert found == {"a.b", "c.d", "fewstep.room.near", "fewstep.far.away", "shown", "late.y", "later"}
    assert "fewstep.room.near" in set(imports_of(ast.parse("from . import near"), "fewstep.room", is_package=True))
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


HEAVY = ["torch", "datasets", "diffusers", "transformers", "numpy", "PIL", "gradio", "tensorboard"]


@pytest.mark.parametrize(
    "module", ["fewstep", "fewstep.settings", "fewstep.errors", "fewstep.progress", "fewstep.cli.main"]
)
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_the_public_names_are_found_and_others_are_not() -> None:
    import fewstep

    for name in fewstep.__all__:
        assert getattr(fewstep, name) is not None
    with pytest.raises(AttributeError, match="module 'fewstep' has no attribute 'load_everything'"):
        fewstep.load_everything  # noqa: B018
