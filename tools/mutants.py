"""Changes one thing at a time in the Triton kernels, and tells which changes no test notices.

What is changed are the places where a kernel can be wrong by one: comparisons and logic of masks,
bounds that add or subtract one, strides, and the ends of splits. Each mutant is a copy of the
package, tested in a process of its own by Triton's interpreter.

    python tools/mutants.py [--file attention.py] [--every 3] [--tests "-k boundary"]
"""

from __future__ import annotations

import argparse
import ast
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
KERNELS = Path("vllm_lminf/kernels/triton")
FILES = ("attention.py", "tiles.py", "softmax.py", "reduce.py", "cache.py", "angles.py")
INTERPRETED = "tests/kernels/triton/interpreted"
TESTS = f"{INTERPRETED}/test_cache.py {INTERPRETED}/test_attention.py {INTERPRETED}/test_merge.py"

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_EXCHANGED = {"minimum": "maximum", "maximum": "minimum"}


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        file: a name of FILES.
        line: where.
        change: the text before and after.
        source: the file with it.
    """

    file: str
    line: int
    change: str
    source: str


def mutations(node: ast.AST) -> Iterator[Callable[[], None]]:
    """What changes a node in place, one thing each."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        yield lambda: node.ops.__setitem__(0, _COMPARISONS[type(node.ops[0])]())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield lambda: setattr(node, "op", ast.BitOr())
        # Either half alone.
        yield lambda: node.__dict__.update(left=ast.Constant(value=True))
        yield lambda: node.__dict__.update(right=ast.Constant(value=True))
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        if isinstance(node.right, ast.Constant) and node.right.value == 1:
            yield lambda: setattr(node.right, "value", 0)
        else:
            yield lambda: setattr(
                node, "op", ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            )
    if isinstance(node, ast.Attribute) and node.attr in _EXCHANGED:
        yield lambda: setattr(node, "attr", _EXCHANGED[node.attr])
    if isinstance(node, ast.Name) and node.id.startswith("stride_"):
        for one, other in (("key", "value"), ("token", "head"), ("block", "token")):
            if f"_{one}" in node.id:
                yield lambda one=one, other=other: setattr(
                    node, "id", node.id.replace(f"_{one}", f"_{other}")
                )


def mutants_of(file: str) -> Iterator[Mutant]:
    """All mutants of a file that are different from it."""
    text = (ROOT / KERNELS / file).read_text()
    original = ast.unparse(ast.parse(text))
    functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    nodes = sum(1 for function in functions for _ in ast.walk(function))
    for index in range(nodes):
        for choice in range(3):
            tree = ast.parse(text)
            inside = [n for f in tree.body if isinstance(f, ast.FunctionDef) for n in ast.walk(f)]
            node = inside[index]
            possible = list(mutations(node))
            if choice >= len(possible):
                break
            before = ast.unparse(node)
            possible[choice]()
            source = ast.unparse(tree)
            if source != original:
                yield Mutant(file, node.lineno, f"{before}  ->  {ast.unparse(node)}", source)


def is_noticed(mutant: Mutant | None, tests: str, seconds: float) -> bool:
    """Whether a test fails, or the time runs out."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("vllm_lminf", "tests"):
            shutil.copytree(ROOT / name, Path(folder, name))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant is not None:
            Path(folder, KERNELS, mutant.file).write_text(mutant.source)
        environ = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folder}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        try:
            ran = subprocess.run(
                [*command, *shlex.split(tests)],
                cwd=folder,
                env=environ,
                capture_output=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True
    return ran.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", choices=FILES, action="append", help="all by default")
    parser.add_argument("--every", type=int, default=1, help="test each so-manieth mutant only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--tests", default=TESTS, help="what pytest is given")
    parser.add_argument("--seconds", type=float, default=1800, help="that a mutant may take")
    arguments = parser.parse_args()
    if is_noticed(None, arguments.tests, arguments.seconds):
        print("the tests fail, or take too long, as things are", file=sys.stderr)
        return 2
    mutants = [m for file in arguments.file or FILES for m in mutants_of(file)]
    mutants = mutants[:: arguments.every]
    survived = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = pool.map(lambda m: is_noticed(m, arguments.tests, arguments.seconds), mutants)
        for mutant, noticed in zip(mutants, results, strict=True):
            survived += not noticed
            word = "noticed " if noticed else "SURVIVED"
            print(f"{word} {mutant.file}:{mutant.line}: {mutant.change}", flush=True)
    print(f"{len(mutants) - survived} of {len(mutants)} mutants noticed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
