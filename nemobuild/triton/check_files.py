"""Rules of ``repo check`` over the files beside the configurations: what is served, imported and listed."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from nemobuild.engine.llmapi import known_arguments, parse_version
from nemobuild.errors import NemobuildError, ToolchainError, nearest
from nemobuild.model.hf_config import load_json
from nemobuild.triton.check_models import CPP_BACKEND, ENGINE
from nemobuild.triton.engine_files import CHECKPOINT, MODEL_YAML, VERSION_FOLDER
from nemobuild.triton.opened import CONFIG, Opened
from nemobuild.triton.repository import MANIFEST, manifest_key

Found = Iterator[tuple[str, str]]
# What the server's Python has; everything else must lie in the model's own folder.
_PACKAGES = frozenset("numpy tokenizers jinja2 yaml grpc tritonclient tensorrt_llm triton_python_backend_utils".split())
_IN_THE_IMAGE = "/opt/tritonserver/"
_YAML_FILE = f"{VERSION_FOLDER}/{MODEL_YAML}"
_LOGITS = {"float32": "TYPE_FP32", "float16": "TYPE_FP16"}
_MOST_RANKS = 4096
_OURS = ("max_batch_size", "decoupled", "max_queue_size", "vocab_size", "logprobs")


def engine(repository: Opened) -> Found:
    """What the engine model serves is there, whole, and agrees with its configuration."""
    model = repository.models.get(ENGINE)
    if model is None:
        return
    if model.backend == CPP_BACKEND:
        yield from _cpp_engine(repository, model)
    elif repository.runtime == "llmapi" or (repository.folder / _YAML_FILE).exists():
        yield from _llm_arguments(repository, model)
    elif repository.runtime == "cpu":
        yield from _ranks(repository, f"{VERSION_FOLDER}/{CHECKPOINT}", "safetensors", _world_size)


def self_contained(repository: Opened) -> Found:
    """No link out of the folder, no absolute path but into the server's image, no import of what is not there."""
    home = repository.folder.resolve()
    for name in repository.names("**/*"):
        path = repository.folder / name
        if path.is_symlink() and not path.exists():  # also one that leads to itself
            yield name, "a link to nowhere"
        elif path.is_symlink() and not path.resolve().is_relative_to(home):
            yield name, "a link out of the repository"
    for name, model in repository.models.items():
        for key, parameter in model.parameters.items():
            if _is_absolute(parameter.string_value):
                yield f"{name}/{CONFIG}", f"the parameter {key} is the absolute path {parameter.string_value!r}"
    arguments = _read_yaml(repository)
    if isinstance(arguments, dict):
        for key, value in arguments.items():
            if isinstance(value, str) and _is_absolute(value):
                yield _YAML_FILE, f"{key} is the absolute path {value!r}"
    for name in repository.names("*/1/**/*.py"):
        if not name.startswith(f"{VERSION_FOLDER}/{CHECKPOINT}/"):  # the model's own code, which LLM loads
            yield from ((name, what) for what in _import_problems(repository, name))


def manifest(repository: Opened) -> Found:
    """The manifest is whole and names every file, with its size and (for all but weights) its digest."""
    if not isinstance(repository.manifest.get("files"), dict):
        yield MANIFEST, "missing or unreadable; so nobody can tell what the repository is made from"
        return
    if repository.manifest.get("key") != manifest_key(repository.manifest):
        yield MANIFEST, "its key is not the digest of its content"
    listed: Mapping[str, Any] = repository.manifest["files"]
    present = set(repository.names("**/*")) - {MANIFEST}
    for name in sorted(present - set(listed)):
        yield name, f"not in {MANIFEST}"
    for name, given in sorted(listed.items()):
        if name not in present or not (repository.folder / name).exists():
            yield name, f"in {MANIFEST}, but not there"
            continue
        path, entry = repository.folder / name, _dict(given)
        size_bytes = path.stat().st_size
        if size_bytes != entry.get("bytes"):
            yield name, f"{size_bytes} bytes, {entry.get('bytes')} in {MANIFEST}"
        elif "sha256" in entry and hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            yield name, f"another content than {MANIFEST} says"


def _cpp_engine(repository: Opened, model: Any) -> Found:
    file, place = f"{ENGINE}/{CONFIG}", model.parameters["gpt_model_path"].string_value
    if not place or _is_absolute(place):
        return  # other rules say so
    yield from _ranks(repository, place, "engine", lambda config: _world_size(_dict(config.get("pretrained_config"))))
    config = _json(repository, f"{place}/config.json")
    build, pretrained = _dict(config.get("build_config")), _dict(config.get("pretrained_config"))
    built_for = build.get("max_batch_size")
    if not isinstance(built_for, int) or built_for < model.max_batch_size:
        yield file, f"max_batch_size is {model.max_batch_size}, the engine was built for {built_for}"
    if build.get("kv_cache_type") != "PAGED":
        yield f"{place}/config.json", f"kv_cache_type is {build.get('kv_cache_type')}; batching in flight needs PAGED"
    wanted = _LOGITS.get(str(pretrained.get("logits_dtype", "float32")))
    found = {t.name: _type_name(t) for t in model.output if t.name.endswith("_logits")}
    for name, kind in found.items():
        if kind != wanted:
            yield file, f"output {name!r} is {kind}, the engine's logits are {wanted}"


def _llm_arguments(repository: Opened, model: Any) -> Found:
    arguments = _read_yaml(repository)
    if not isinstance(arguments, dict) or not isinstance(arguments.get("triton_config"), dict):
        yield _YAML_FILE, "missing, or no mapping with a triton_config"
        return
    ours = arguments.pop("triton_config")
    for key in _OURS:
        if key not in ours:
            yield _YAML_FILE, f"triton_config.{key} is missing"
    said = {
        "decoupled": model.model_transaction_policy.decoupled,
        "max_batch_size": model.max_batch_size,
    }
    for key, value in said.items():
        if key in ours and ours[key] != value:
            yield _YAML_FILE, f"triton_config.{key} is {ours[key]}, in {CONFIG} it is {value}"
    if arguments.get("max_batch_size") != model.max_batch_size:
        yield (
            _YAML_FILE,
            f"max_batch_size is {arguments.get('max_batch_size')}, in {CONFIG} it is {model.max_batch_size}",
        )
    place = str(arguments.get("model", ""))
    if not _is_absolute(place) and not (repository.folder / VERSION_FOLDER / place / "config.json").is_file():
        yield _YAML_FILE, f"model is {place!r}, which is no folder with a config.json beside this file"
    version = repository.manifest.get("trtllm")
    try:
        known = known_arguments(parse_version(str(version)))
    except ToolchainError:
        yield MANIFEST, f"trtllm is {version!r}, which is no version; so nobody can tell what LLM understands"
    else:
        for key in _flat(arguments, known):
            yield _YAML_FILE, f"TensorRT-LLM {version} does not know {key}, and stops at it. {nearest(key, known)}"


def _flat(arguments: Mapping[str, Any], known: frozenset[str]) -> Iterator[str]:
    """Names that are not known, nested ones with dots where their outer one has known parts."""
    nested = {name.split(".")[0] for name in known if "." in name}
    for key, value in arguments.items():
        if key not in known:
            yield str(key)
        elif key in nested and isinstance(value, dict):
            yield from (f"{key}.{part}" for part in value if f"{key}.{part}" not in known)


def _ranks(repository: Opened, place: str, suffix: str, ranks: Callable[[dict[str, Any]], int]) -> Found:
    config = _json(repository, f"{place}/config.json")
    if not config:
        yield f"{place}/config.json", "missing or unreadable"
        return
    for rank in range(ranks(config)):
        if not (repository.folder / place / f"rank{rank}.{suffix}").is_file():
            yield f"{place}/rank{rank}.{suffix}", "missing"


def _world_size(config: Mapping[str, Any]) -> int:
    size = _dict(config.get("mapping")).get("world_size")
    return size if isinstance(size, int) and 0 < size <= _MOST_RANKS else 1


def _dict(value: Any) -> dict[str, Any]:
    """``value`` where it is an object, else an empty one: a wrong type is as good as nothing there."""
    return value if isinstance(value, dict) else {}


def _import_problems(repository: Opened, name: str) -> Iterator[str]:
    path = PurePosixPath(name)
    try:
        tree = ast.parse(repository.text(name))
    except SyntaxError as error:
        yield f"not Python: {error.msg} in line {error.lineno}"
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            tops = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            tops = [(node.module or "").split(".")[0]]
        elif isinstance(node, ast.ImportFrom):
            yield from _relative_problems(repository, path, node)
            continue
        else:
            continue
        for top in tops:
            if top not in _PACKAGES and top not in sys.stdlib_module_names:
                yield f"line {node.lineno} imports {top}, which the server's Python need not have"


def _relative_problems(repository: Opened, path: PurePosixPath, node: ast.ImportFrom) -> Iterator[str]:
    # parts[0] is the model, parts[1] the version: the package that Triton loads.
    depth = len(path.parts) - 1 - (node.level - 1)
    if depth < 2:
        yield f"line {node.lineno} imports from outside of the model's folder"
        return
    base = repository.folder.joinpath(*path.parts[:depth])
    target = base.joinpath(*(node.module or "").split("."))
    wanted = [target] if node.module else [base / alias.name for alias in node.names]
    for module in wanted:
        if not (module.with_suffix(".py").is_file() or (module / "__init__.py").is_file()):
            yield f"line {node.lineno} imports {module.name}, which is not in the repository"


def _is_absolute(value: str) -> bool:
    return value.startswith(("/", "~")) and not value.startswith(_IN_THE_IMAGE)


def _read_yaml(repository: Opened) -> Any:
    try:
        return yaml.safe_load(repository.text(_YAML_FILE))
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _json(repository: Opened, name: str) -> dict[str, Any]:
    try:
        return load_json(repository.folder / name)
    except NemobuildError:
        return {}


def _type_name(tensor: Any) -> str:
    from tritonclient.grpc import model_config_pb2 as pb

    return str(pb.DataType.Name(tensor.data_type))
