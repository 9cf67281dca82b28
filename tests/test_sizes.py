"""A file that wants to be longer wants to be two ideas: limits on files and functions."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREES = ("glm45_jax", "experiments", "notebooks", "tests")
FILE_LINES, KERNEL_FILE_LINES, FUNCTION_LINES = 500, 600, 60


def is_kernel_body(path: Path) -> bool:
    """Pallas files: one loop nest may be longer than a function should be."""
    return path.parent.name == "kernels" and path.stem.endswith(("_gpu", "_tpu"))


def too_long(root: Path) -> list[str]:
    """'file:line: what is too long' for each file and function over its limit."""
    found = []
    for path in sorted(path for tree in TREES for path in (root / tree).rglob("*.py")):
        text, file = path.read_text(encoding="utf-8"), path.relative_to(root)
        lines = len(text.splitlines())
        limit = KERNEL_FILE_LINES if "kernels" in file.parts else FILE_LINES
        if lines > limit:
            found.append(f"{file}:{limit + 1}: {lines} lines, limit {limit}")
        if is_kernel_body(path):
            continue
        for node in ast.walk(ast.parse(text, filename=str(file))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    found.append(
                        f"{file}:{node.lineno}: {node.name} {lines} lines, limit {FUNCTION_LINES}"
                    )
    return found


def function_of(lines: int) -> str:
    """Source of one function of exactly that many lines."""
    return "def f():\n" + "    pass\n" * (lines - 1)


def plant(root: Path, files: dict[str, str]) -> list[str]:
    """Those planted files that are too long, each once, without the reason."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [line.rpartition(": ")[0] for line in too_long(root)]


def test_files_and_functions_are_short():
    found = too_long(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_a_file_one_line_over_is_caught_and_kernels_get_a_hundred_more(tmp_path):
    found = plant(
        tmp_path,
        {
            "glm45_jax/ok.py": "\n" * 500,
            "glm45_jax/long.py": "\n" * 501,
            "glm45_jax/kernels/ok.py": "\n" * 600,
            "glm45_jax/kernels/long_gpu.py": "\n" * 601,
            "tests/test_long.py": "\n" * 501,
        },
    )
    assert found == [
        "glm45_jax/kernels/long_gpu.py:601",
        "glm45_jax/long.py:501",
        "tests/test_long.py:501",
    ]


def test_a_function_one_line_over_is_caught_except_in_a_kernel_body(tmp_path):
    found = plant(
        tmp_path,
        {
            "experiments/ok.py": function_of(60),
            "experiments/long.py": "x = 1\n" + function_of(61),
            "glm45_jax/kernels/routing.py": "async " + function_of(61),
            "glm45_jax/kernels/routing_tpu.py": function_of(300),
            "glm45_jax/model/routing_gpu.py": function_of(61),
        },
    )
    assert found == [
        "experiments/long.py:2",
        "glm45_jax/kernels/routing.py:1",
        "glm45_jax/model/routing_gpu.py:1",
    ]
