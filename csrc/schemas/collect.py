"""Writes the schemas of tokenprune_ext/ops/*.py, the first arguments of ``define(...)``, as C++ string literals.

usage: collect.py OPS_FOLDER OUTPUT      run by CMake; needs no torch
"""

import ast
import json
import sys
from pathlib import Path


def schemas(folder: Path) -> list[str]:
    """The schema of every operator, by file name."""
    calls = [
        node
        for path in sorted(folder.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "define"
    ]
    return [ast.literal_eval(call.args[0]) for call in calls]


if __name__ == "__main__":
    lines = [f"{json.dumps(schema)},\n" for schema in schemas(Path(sys.argv[1]))]
    Path(sys.argv[2]).write_text("".join(lines), "utf-8")
