"""Nothing here unpickles, extracts an archive or runs what it downloads: read off the source."""

import ast
from pathlib import Path

import pytest
from transformers import CLIPTokenizer, T5Tokenizer

from lcm.models.families import families

ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "lcm").rglob("*.py")), *sorted(ROOT.glob("*.py"))]
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "jsonpickle", "shelve", "marshal"}
NEVER = {
    *("eval", "exec", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "torch.export.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "shutil.unpack_archive", "tar.extract"),
}
NEVER_METHODS = {"extractall", "load_from_checkpoint", "from_single_file", "read_pickle"}
REQUIRED = {"torch.load": ("weights_only", True), "load_checkpoint": ("weights_only", True)}
REQUIRED |= {name: ("allow_pickle", False) for name in ("np.load", "numpy.load", "read_array")}
OF_FAMILIES = {CLIPTokenizer, T5Tokenizer}  # json, text and sentencepiece's protobuf; models are weights
TOKENIZERS = {"CLIPTokenizer", "CLIPTokenizerFast", "tokenizer_class"}


def dangers(source: str) -> list[str]:
    return [said for node in ast.walk(ast.parse(source)) for said in (found(node),) if said]


def found(node: ast.AST) -> str | None:
    if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in PICKLES:
        names = {alias.name for alias in node.names} - {"UnpicklingError", "PicklingError"}
        return f"from {node.module} import {names}" if names else None
    if not isinstance(node, ast.Call):
        return None
    name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
    head, _, method = name.rpartition(".")
    if name in NEVER or method in NEVER_METHODS or (head in PICKLES and method not in ("dump", "dumps")):
        return name
    if keywords.get("trust_remote_code", "False") != "False":
        return f"{name} runs code that it downloads"
    for call, (option, value) in REQUIRED.items():
        if (name == call or name.endswith(f".{call}")) and keywords.get(option) != str(value):
            return f"{name} without {option}={value}"
    if method == "from_pretrained" and head not in TOKENIZERS and keywords.get("use_safetensors") != "True":
        return f"{name} without use_safetensors=True"
    return None


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(file: Path) -> None:
    assert dangers(file.read_text()) == []


def test_every_tokenizer_of_a_family_is_one_without_code() -> None:
    assert {tower.tokenizer_class for kind in families() for tower in kind.towers} <= OF_FAMILIES


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=option)",
        "io.load_checkpoint(f)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "pickle.loads(x)",
        "pickle.Unpickler(f).load()",
        "from pickle import loads",
        "joblib.load(f)",
        "torch.hub.load('a', 'b')",
        "tar.extractall(folder)",
        "UNet.from_pretrained(folder)",
        "Model.from_pretrained(folder, use_safetensors=True, trust_remote_code=True)",
        "LightningModule.load_from_checkpoint(f)",
        "eval(text)",
    ],
)
def test_a_danger_is_seen(source: str) -> None:
    assert dangers(source)
