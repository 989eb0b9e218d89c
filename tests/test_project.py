"""What the repository promises about itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PINNED = re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
# Imports flow one way: a file at the top, or any file of a folder, imports only from those before it.
ORDER = [
    "machine", "diffusion", "pde_ssm_attention", "pde_ssm_kernels", "pde_ssm", "mixers", "backbones", "models", "images",
    "checkpoints", "download", "evaluation", "training", "train", "sample", "sample_ddp", "evaluate", "comparing", "overlay",
]  # fmt: skip


def test_pins_lie_in_the_ranges_that_are_promised():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [r for group in [project["dependencies"], *project["optional-dependencies"].values()] for r in group]
    lowest = dict(requirement.split(">=") for requirement in ranges)
    assert lowest.keys() == dict(PINNED).keys()
    for name, version in PINNED:
        assert tuple(map(int, version.split("."))) >= tuple(map(int, lowest[name].split("."))), name


@pytest.mark.parametrize("name", ORDER)
def test_imports_flow_one_way(name):
    files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else (ROOT / name).glob("*.py")
    imported = set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text()))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
    assert imported & set(ORDER) <= set(ORDER[: ORDER.index(name) + 1])    # files of a folder import one another
    if name == "pde_ssm":
        assert imported == {"math", "pde_ssm_attention", "pde_ssm_kernels", "torch"}       # for other people's projects


@pytest.mark.parametrize(
    ("module", "others"),
    [("images.folders", {"pde_ssm", "models", "mixers", "timm"}), ("train", {"accelerate", "diffusers", "tensorboard"})],
)
def test_what_nobody_asked_for_is_not_imported(module, others):
    command = f"import sys, {module}; print({others} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_page_on_design_has_the_same_order():
    listed = re.search(r"\n\n((?:    .+\n)+)\nNothing in a folder", (ROOT / "docs" / "design.md").read_text()).group(1)
    assert re.findall(r"\w+", listed) == ORDER


def test_the_readmes_tree_is_the_tree():
    named = set(re.findall(r"^    (\w[\w./-]*)(?:  |$)", (ROOT / "README.md").read_text(), re.MULTILINE))
    kept = {path.name for path in ROOT.glob("*.py")}
    kept |= {"requirements.txt", "environment.yml", "pyproject.toml", "Makefile", "LICENSE", "train.slurm"}
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")} | {"docs/"}
    assert kept | folders == named


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert links or page.name != "README.md"
    assert [link for link in links if not (page.parent / link).is_file()] == []
