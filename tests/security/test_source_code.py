"""The source unpickles nothing, extracts no archive and runs no downloaded code."""

import ast
from pathlib import Path

from transformers import CLIPTokenizer, T5Tokenizer

from lcm.models.families import families

ROOT = Path(__file__).parents[2]
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "jsonpickle", "shelve", "marshal"}
FORBIDDEN = {
    *("eval", "exec", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "torch.export.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "shutil.unpack_archive", "tar.extract"),
}
FORBIDDEN_METHODS = {"extractall", "load_from_checkpoint", "from_single_file", "read_pickle"}
REQUIRED = {"torch.load": ("weights_only", True), "load_checkpoint": ("weights_only", True)}
REQUIRED |= {name: ("allow_pickle", False) for name in ("np.load", "numpy.load", "read_array")}
ALLOWED = {"lcm/models/single_file.py": ["pipeline.from_single_file"]}  # it loads a .safetensors file with a checked header
TOKENIZERS = {"CLIPTokenizer", "CLIPTokenizerFast", "tokenizer_class"}  # these tokenizers read JSON, text and protobuf


def dangers(source: str) -> list[str]:
    return [danger for node in ast.walk(ast.parse(source)) if (danger := danger_of(node))]


def danger_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in PICKLES:
        names = {alias.name for alias in node.names} - {"UnpicklingError", "PicklingError"}
        return f"from {node.module} import {names}" if names else None
    if not isinstance(node, ast.Call):
        return None
    name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
    head, _, method = name.rpartition(".")
    if name in FORBIDDEN or method in FORBIDDEN_METHODS or (head in PICKLES and method not in ("dump", "dumps")):
        return name
    if keywords.get("trust_remote_code", "False") != "False":
        return f"{name} runs downloaded code"
    for call, (option, value) in REQUIRED.items():
        if (name == call or name.endswith(f".{call}")) and keywords.get(option) != str(value):
            return f"{name} without {option}={value}"
    if method == "from_pretrained" and head not in TOKENIZERS and keywords.get("use_safetensors") != "True":
        return f"{name} without use_safetensors=True"
    return None


def test_source_has_no_dangers():
    files = [*(ROOT / "lcm").rglob("*.py"), *ROOT.glob("*.py")]
    dangers_of_files = {str(file.relative_to(ROOT)): dangers(file.read_text()) for file in files}
    assert len(dangers_of_files) > 50
    assert {file: names for file, names in dangers_of_files.items() if names} == ALLOWED


def test_tokenizers_of_families_have_no_code():
    assert {tower.tokenizer_class for kind in families() for tower in kind.towers} <= {CLIPTokenizer, T5Tokenizer}


def test_dangers_are_found():
    sources = [
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
    ]
    assert [source for source in sources if not dangers(source)] == []
