"""The rules of the house, read from its source: direction of imports, pure maths, no pickles, fast --help."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from waiting import HANGING

PACKAGE = Path(__file__).parent.parent / "src/steersman"
FILES = sorted(PACKAGE.rglob("*.py"))

# Each room may import those to its left in this order, and itself.
ORDER = (
    "errors",
    "certainty",
    "showing",
    "stand_ins",
    "cache",
    "ties",
    "limits",
    "edits",
    "steering",
    "shards",
    "chat_record",
    "progress",
    "pairs",
    "chats",
    "rendering",
    "texts",
    "models",
    "experts",
    "concepts",
    "artifacts",
    "interop",
    "lab",
    "evaluation",
    "harnesses",
    "vllm",
    "cli",
)
# An import inside a function, where a method of the plan hands over to the room that does the work.
HANDED_OVER = {
    ("steering", "models"),
    ("steering", "artifacts"),
    ("experts", "artifacts"),
    ("concepts", "artifacts"),
    ("artifacts", "evaluation"),
    ("pairs", "lab"),
    ("texts", "lab"),
    ("models", "lab"),
}
# Files that are mathematics, and what they may import beyond the standard library.
PURE = {
    "showing.py": set(),
    "ties.py": {"numpy"},
    "certainty.py": set(),
    "limits.py": set(),
    "edits.py": {"torch"},
    "interop/inert_pickle.py": set(),
    "interop/pickled_arrays.py": {"numpy"},
    "interop/pickled_frame.py": set(),
    "interop/pickled_tensors.py": {"numpy"},
    "concepts/relabelling.py": {"numpy"},
    "experts/bounds.py": {"torch"},
    "experts/adjustment.py": {"numpy"},
    "experts/bootstrap.py": {"numpy"},
    "experts/estimate.py": {"numpy", "scipy"},
    "experts/moments.py": {"numpy"},
    "experts/risk_difference.py": {"numpy"},
    "experts/strata.py": {"numpy"},
    "concepts/joint_moments.py": {"torch"},
    "concepts/regression.py": {"torch"},
    "concepts/norms.py": {"torch"},
    "concepts/directions.py": {"numpy", "scipy"},
    "concepts/separation.py": {"numpy", "scipy"},
    "lab/carved_layer.py": {"torch"},
    "evaluation/statistics.py": {"numpy", "scipy", "statsmodels"},
    "evaluation/judges/matching.py": set(),
    "evaluation/measures/diversity.py": {"numpy"},
    "vllm/request.py": set(),
    "vllm/roles.py": set(),
    "vllm/cache_keys.py": set(),
    "vllm/routing.py": {"torch"},
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "__import__",
    "torch.load",
    "torch.save",
    "numpy.load",
    "np.load",
    "pd.read_pickle",
}

# Where a format of others is written that only torch.save writes: plain data and tensors, which its reader
# loads with weights_only=True. Writing runs nothing; reading such files stays forbidden here, too.
WRITTEN_FOR_OTHERS = {"interop/lm_eval.py": {"torch.save"}}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imports(path: Path) -> list[tuple[str, int, bool]]:
    """(module, line, whether a function holds the import), without those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, node.lineno, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}:{node.lineno}: imports are absolute here"
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            whole = node.module in ("steersman", "steersman.evaluation")
            names = [f"{node.module}.{alias.name}" for alias in node.names] if whole else [node.module]
            found.extend((name, node.lineno, inside) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(tree, False)
    return found


def room(module: str) -> str | None:
    """The room of a module of ours; None for the package's face, which gives out everybody's names."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else None


@pytest.mark.parametrize("path", [p for p in FILES if p.parent != PACKAGE or p.stem in ORDER], ids=name_of)
def test_arrows_point_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    allowed = set(ORDER[: ORDER.index(own) + 1])
    wrong = [
        f"line {line} imports {module}"
        for module, line, inside in imports(path)
        if module.startswith("steersman.")
        and (target := room(module)) is not None
        and target not in allowed
        and not (inside and (own, target) in HANDED_OVER)
    ]
    assert not wrong


def test_every_room_has_its_place() -> None:
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    rooms |= {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms == set(ORDER)


@pytest.mark.parametrize("name", PURE)
def test_mathematics_is_pure(name: str) -> None:
    modules = {module for module, _, _ in imports(PACKAGE / name)}
    own = {module for module in modules if module.startswith("steersman.")}
    files = {module.removeprefix("steersman.").replace(".", "/") + ".py" for module in own}
    assert files <= {*PURE, "errors.py"}  # mathematics may rest on mathematics
    foreign = {module.partition(".")[0] for module in modules - own} - set(sys.stdlib_module_names)
    assert foreign <= PURE[name]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_runs_what_it_reads(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    called = {ast.unparse(call.func) for call in calls}
    modules = {module.partition(".")[0] for module, _, _ in imports(path)}
    assert not called & (FORBIDDEN_CALLS - WRITTEN_FOR_OTHERS.get(name_of(path), set()))
    assert not modules & FORBIDDEN_MODULES
    assert "trust_remote_code=True" not in {
        ast.unparse(keyword) for call in calls for keyword in call.keywords
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_first_line_says_the_subject(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert len(docstring or "") > 10


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from steersman.cli import main; status = main(['--help']); "
        "slow = sorted({'torch', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)); "
        "sys.exit(f'imported {slow}' if slow else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGING)
    assert done.returncode == 0, done.stderr
    assert "describe" in done.stdout


def test_limits_of_tests_are_one_constant() -> None:
    """Whoever waits for another process waits as long as `waiting.HANGING` says: busy machines are slow."""
    literal = re.compile(r"timeout=\d{2,}|= time.monotonic\(\) \+ \d|\.wait\(\d|\.join\(\d")
    found = [
        f"{path.name}:{number}"
        for path in sorted(Path(__file__).parent.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if literal.search(line)
    ]
    assert not found
