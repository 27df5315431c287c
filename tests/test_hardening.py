"""What must hold of the code itself: nothing in it runs what strangers wrote, and the page runs only its own script."""

from __future__ import annotations

import ast
import base64
import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = sorted([*(ROOT / "nemobuild").rglob("*.py"), *(ROOT / "triton_repo").rglob("*.py")])
MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
CALLS = {"eval", "exec", "os.popen", "os.system", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"}
FLAGS = {"allow_pickle", "shell", "trust_remote_code"}


def found_in(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] * (name in CALLS)
            for word in node.keywords:
                off = isinstance(word.value, ast.Constant) and word.value.value is False
                found += [f"{name}({word.arg}=...)"] * (word.arg in FLAGS and not off)
    return found


@pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_runs_what_came_as_data(file):
    assert found_in(ast.parse(file.read_text(encoding="utf-8"))) == []


def test_the_search_finds_what_it_looks_for():
    bad = (
        "import pickle\nfrom marshal import loads\neval('1')\nos.system('x')\nf(trust_remote_code=True)\nf(shell=False)"
    )
    assert found_in(ast.parse(bad)) == ["pickle", "marshal", "eval", "os.system", "f(trust_remote_code=...)"]


def test_the_page_runs_its_own_script_only():
    page = (ROOT / "nemobuild" / "gateway" / "page.html").read_text(encoding="utf-8")
    (script,) = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert f"script-src 'sha256-{digest}';" in policy  # after a change of the script, put this digest there
    assert policy.startswith("default-src 'none';") and "connect-src 'self'" in policy
    assert not re.findall(r"(?:src|href)=\"(?!data:)|innerHTML|insertAdjacentHTML|document\.write| on\w+=\"", page)
    assert len(page) < 24_000
