"""The counts that the house is kept by: `python -m tests.house_counts` prints the table of docs/house.md.

Each count has the number it had before the house was rebuilt, and the most it may be now; tests/test_house.py holds it to that.
"""

import ast
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fewstep.settings import PretrainSettings, TrainSettings, describe_settings

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
# what a reader opens to follow one training step, beside the family's network
STEP = (
    "training/step.py", "distillation/inputs.py", "distillation/terms.py", "losses.py", "diffusion/denoiser.py",
    "diffusion/schedules.py", "diffusion/draws.py", "families/edm/denoiser.py",
)  # fmt: skip


@dataclass(frozen=True)
class Count:
    """One promise.

    Attributes:
        what: is counted.
        before: its number before, as far as it was measured.
        limit: what it may be at most.
        found: the places, "file:line words".
    """

    what: str
    before: str
    limit: int
    found: Callable[[], list[str]]


def place(path: Path) -> str:
    """A file below the package."""
    return path.relative_to(ROOT / "src/fewstep").as_posix()


def lines(pattern: str, *, outside: tuple[str, ...] = ()) -> list[str]:
    """Lines of code in src that a pattern is found in, those of some folders or files left out."""
    wanted, found = re.compile(pattern), []
    for path in SOURCES:
        if not place(path).startswith(outside or ("-",)):
            rows = path.read_text(encoding="utf-8").splitlines()
            found += [f"{place(path)}:{n} {row.strip()}" for n, row in enumerate(rows, 1) if wanted.search(row)]
    return found


def twins() -> list[str]:
    """Modules of one folder that do one thing for classes and for text: `x.py` beside `x_text.py` or `text_x.py`."""
    paths = {place(path) for path in SOURCES}
    halves = [(re.sub(r"(text_|_text|class_|_class)", "", path), path) for path in paths]
    return sorted(path for bare, path in halves if bare != path and bare in paths)


def functions() -> Iterator[tuple[str, int]]:
    """(where and name, lines) of every function."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{place(path)} {node.name}", node.end_lineno - node.lineno + 1


def sizes() -> dict[str, int]:
    """Lines of every file."""
    return {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}


def unused() -> list[str]:
    """Functions, classes and constants of modules that no other words of src, examples, benchmarks or the packaging name."""
    texts = [path.read_text(encoding="utf-8") for folder in ("src", "examples", "benchmarks") for path in
             sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".jinja", ".html", ".js")]  # fmt: skip
    words: dict[str, int] = {}
    for word in re.findall(r"\w+", "\n".join([*texts, (ROOT / "pyproject.toml").read_text(encoding="utf-8")])):
        words[word] = words.get(word, 0) + 1
    found = []
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("__"):
                called = any(".command(" in ast.unparse(decorator) for decorator in node.decorator_list)  # a command
                if words[node.name] == 1 and not called:
                    found.append(f"{place(path)} {node.name}")
    return found


def default_sampling() -> list[str]:
    """Default steps (18 and 50) and guidance (7.5) of many-step samplers."""
    return lines(
        r"steps\w*(: int)? ?(=|or) ?(18|50)\b|\bor (18|50)\b|guidance\w*(: float)? ?= ?7\.5|(18 Heun|50 DDIM)|\b7\.5 ",
        outside=("families/",),
    )


_KINDS = "Teacher|Generator|TextModel|TextTeacher|TextGenerator|EDMDenoiser|DiffusersDenoiser"
COUNTS = [
    Count("`isinstance` branches on class or text, teacher or generator, outside families", "25 in ten files, and 4", 0,
          lambda: [row for row in lines(rf"isinstance\(.*\b({_KINDS})\b", outside=("families/",)) if ":assert" not in row
                   and " assert " not in row]),
    Count("twin modules, one for classes and one for text", "7 pairs", 0, twins),
    Count("modules that reach into one family's folder", "20 named SD3", 0,
          lambda: lines(r"fewstep\.families\.(edm|stable_diffusion|sd3)\b", outside=("families/",))),
    Count("`copy.deepcopy`", "3 files", 0, lambda: lines(r"deepcopy")),
    Count("`mock` and `torch._C`", "852 lines rested on them", 0, lambda: lines(r"unittest|\bmock\b|torch\._C\b")),
    Count("`__dict__` surgery", "text_model.py", 0, lambda: lines(r"__dict__")),
    Count("places that call `backward` on a training loss", "3 files", 0,
          # the two others train a small classifier before any run, and measure a precision's speed
          lambda: lines(r"(?<!update)\.backward\(", outside=("training/update.py", "preparation/features.py", "devices.py"))),
    Count("places that ask for gradients at x", "in terms, unscaled", 1, lambda: lines(r"= torch\.autograd\.grad\(")),
    Count("guesses whether a string is a hub id", "6", 1,
          lambda: [row for row in lines(r"""count\(['"]/['"]\)|fullmatch\(.*/.*(words|base|source|path)\b""")
                   if "torch_archive" not in row]),
    Count("comparisons of a state with another network's outside compare.py", "9 files", 0,
          lambda: lines(r"set\((\w+\.)*state_dict|state_dict\(\)(\.keys\(\))? [-^!=]")),
    Count("default steps and guidance of samplers outside families", "14", 0, default_sampling),
    Count("settings of `fewstep train`", "64", 55, lambda: [row[0] for row in describe_settings(TrainSettings)]),
    Count("settings of `fewstep pretrain`", "not recorded", 33, lambda: [row[0] for row in describe_settings(PretrainSettings)]),
    Count("functions and classes that nothing uses", "not counted", 0, unused),
    Count("files above 400 lines", "not recorded", 0, lambda: [path for path, count in sizes().items() if count > 400]),
    Count("functions above 60 lines", "not recorded", 0, lambda: [name for name, count in functions() if count > 60]),
]  # fmt: skip


def table() -> str:
    """The counts as a Markdown table, and the sizes."""
    rows = [f"| {count.what} | {count.before} | {len(count.found())} |" for count in COUNTS]
    size = sizes()
    largest, longest = max(size, key=lambda path: size[path]), max(functions(), key=lambda entry: entry[1])
    facts = [
        f"| files to open for one step | - | {len(STEP)} |",
        f"| median file | - | {statistics.median(size.values()):.0f} lines of {len(size)} files |",
        f"| largest file | - | {largest}, {size[largest]} lines |",
        f"| longest function | - | {longest[0]}, {longest[1]} lines |",
    ]
    return "\n".join(["| What | Before | Now |", "| --- | --- | --- |", *rows, *facts])


if __name__ == "__main__":
    print(table())
