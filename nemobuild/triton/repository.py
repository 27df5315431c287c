"""Emit the Triton model repository: first as a plan (path -> content, pure), then written whole or not at all.

The emitted folder stands alone. It imports nothing of nemobuild (the modules that it runs are carried in ``1/lib``),
holds no absolute path, can be moved, and can be read. Each model folder is complete in itself, because Triton
copies model folders one by one when the repository lies in object storage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemobuild import __version__
from nemobuild.config import EngineConfig, reasoning_policy
from nemobuild.errors import IntegrityError, UsageError, from_os_error
from nemobuild.model.hf_config import load_json, load_spec
from nemobuild.model.tokenizer import chat_template, load_tokenizer, special_token
from nemobuild.resources import data_folder, package_folder
from nemobuild.runtime.settings import Limits, Sampling, Settings
from nemobuild.triton.models import repository_models
from nemobuild.triton.pbtxt import render

_TEXT_LIB = ("__init__.py", "runtime/*.py")
_CPU_LIB = (
    "__init__.py",
    "errors.py",
    "model/__init__.py",
    "model/spec.py",
    "model/forward.py",
    "weights/__init__.py",
    "weights/safetensors.py",
    "engine/__init__.py",
    "engine/cpu/*.py",
    "runtime/__init__.py",
    "runtime/wire.py",
)
# Model -> (adapter files of triton_repo/, modules of nemobuild, does it need tokenizer and settings).
_PYTHON_MODELS: dict[str, tuple[tuple[str, ...], tuple[str, ...], bool]] = {
    "chat": (("chat/model.py", "common.py", "engine_calls.py"), _TEXT_LIB, True),
    "preprocessing": (("preprocessing/model.py", "common.py"), _TEXT_LIB, True),
    "postprocessing": (("postprocessing/model.py", "common.py"), _TEXT_LIB, True),
    "tensorrt_llm_collect": (("tensorrt_llm_collect/model.py", "common.py", "engine_calls.py"), _TEXT_LIB, False),
}
_CPU_MODEL = ("tensorrt_llm/model.py",)
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class RepositoryPlan:
    """Files of the repository: small ones as bytes, large ones as the path that they are taken from."""

    files: Mapping[str, bytes | Path]

    @property
    def size_bytes(self) -> int:
        return sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in self.files.values())


def plan_repository(profile: EngineConfig, source: Path, engine: Path, name: str = "model") -> RepositoryPlan:
    """Everything that the repository will hold. ``source`` is the Hugging Face folder (tokenizer, template), ``engine``
    the checkpoint (``cpu``) or the engine folder (``tensorrt``). ``name`` is shown to readers of the repository.

    Raises ``UsageError`` or ``IntegrityError`` when a part is missing or does not fit the profile.
    """
    settings, assets = _text_assets(profile, source, name)
    files: dict[str, bytes | Path] = {}
    for model in repository_models(profile):
        files[f"{model.name}/config.pbtxt"] = render(model).encode()
        adapters, library, needs_assets = _PYTHON_MODELS.get(model.name, ((), (), False))
        if model.name == "tensorrt_llm" and profile.runtime == "cpu":
            adapters, library = _CPU_MODEL, _CPU_LIB
        for adapter in adapters:
            content = (data_folder("triton_repo") / adapter).read_bytes()
            files[f"{model.name}/1/{Path(adapter).name}"] = content
        for pattern in library:
            for module in sorted(package_folder().glob(pattern)):
                name = module.relative_to(package_folder()).as_posix()
                # The package's own front says which version is installed; here it only marks a package.
                files[f"{model.name}/1/lib/{name}"] = b"" if name == "__init__.py" else module.read_bytes()
        if needs_assets:
            files |= {f"{model.name}/1/assets/{name}": content for name, content in assets.items()}
        if not (adapters or model.name == "tensorrt_llm"):
            files[f"{model.name}/1/.keep"] = b""  # an ensemble needs an empty version folder
    files |= _engine_files(profile, source, engine)
    files["README.md"] = _readme(profile, settings).encode()
    files[MANIFEST] = _manifest(profile, engine, files)
    return RepositoryPlan(files)


def write_repository(plan: RepositoryPlan, target: Path) -> Path:
    """Write ``plan`` as the folder ``target``, which must not exist; it appears whole, by rename."""
    if target.exists():
        raise UsageError(
            "target-exists", f"{target} exists already.", next=f"Remove it (`rm -r {target}`) or choose another folder."
        )
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        for name, content in plan.files.items():
            path = partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                _link_or_copy(content, path)
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise from_os_error(error, target, "writing") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _text_assets(profile: EngineConfig, source: Path, name: str) -> tuple[Settings, dict[str, bytes | Path]]:
    spec = load_spec(source)
    tokenizer = load_tokenizer(source, spec)
    if profile.limits.max_context_tokens > spec.max_context_tokens:
        raise UsageError(
            "context-too-long",
            f"limits.max_context_tokens is {profile.limits.max_context_tokens}.",
            why=f"The model was made for {spec.max_context_tokens} tokens.",
            next="Lower it in the profile.",
        )
    config = load_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").exists() else {}
    limits, reasoning = profile.limits, profile.reasoning
    settings = Settings(
        model_name=name,
        vocab_size=spec.vocab_size,
        bos_token=special_token(config, "bos_token", tokenizer),
        end_token_ids=_end_token_ids(source, spec.end_token_ids, spec.vocab_size),
        limits=Limits(
            max_context_tokens=limits.max_context_tokens,
            max_prompt_tokens=limits.prompt_limit,
            default_max_tokens=limits.default_max_tokens,
            max_request_bytes=limits.max_request_bytes,
            max_concurrent_requests=limits.max_batch_size + limits.max_queue_size,
        ),
        reasoning=reasoning_policy(reasoning.policy),
        default_mode=reasoning.default,
        sampling_on=Sampling(**reasoning.sampling_on.model_dump()),
        sampling_off=Sampling(**reasoning.sampling_off.model_dump()),
        template_variables={"eos_token": special_token(config, "eos_token", tokenizer) or ""},
    )
    template = chat_template(source, config)
    assets: dict[str, bytes | Path] = {
        "tokenizer.json": source / "tokenizer.json",
        "runtime.json": settings.dump().encode(),
    }
    if template is not None:
        _try_template(template, settings, tokenizer)
        assets["chat_template.jinja"] = template.encode()
    return settings, assets


def _try_template(template: str, settings: Settings, tokenizer: Any) -> None:
    """Prove at emission, not at the first request, that template and reasoning policy work together."""
    from nemobuild.runtime.fields import RequestError
    from nemobuild.runtime.prompt import PromptBuilder
    from nemobuild.runtime.template import ChatTemplate

    hello = [{"role": "user", "content": "Hello"}]
    try:
        builder = PromptBuilder(tokenizer, settings, ChatTemplate(template))
        modes = ("auto",) if settings.reasoning.switch == "none" else ("on", "off")
        prompts = [builder.from_messages(hello, None, mode).text for mode in modes]
    except (RequestError, ValueError) as error:
        raise IntegrityError("bad-template", "The model's chat template does not work.", why=f"{error}.") from error
    if "Hello" not in prompts[0]:
        raise IntegrityError("bad-template", "The model's chat template does not work.", why="It drops the messages.")
    policy = settings.reasoning
    if len(set(prompts)) < len(modes) or (policy.switch == "directive" and policy.off in prompts[-1]):
        raise UsageError(
            "policy-mismatch",
            "reasoning.policy does not fit the model's chat template.",
            why="The template does not react to the switch of that policy.",
            next="Name the policy of this model in the profile (see engine_configs/reasoning.yaml).",
        )


def _end_token_ids(source: Path, from_config: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """End ids of ``generation_config.json`` first, then those of ``config.json``."""
    file = source / "generation_config.json"
    value = load_json(file).get("eos_token_id") if file.exists() else None
    listed = value if isinstance(value, list) else [] if value is None else [value]
    for token in listed:
        if not isinstance(token, int) or not 0 <= token < vocab_size:
            raise IntegrityError("bad-end-id", f"eos_token_id in {file} holds {token!r}, which is no token id.")
    return tuple(dict.fromkeys([*listed, *from_config]))


def _engine_files(profile: EngineConfig, source: Path, engine: Path) -> dict[str, bytes | Path]:
    if not (engine / "config.json").is_file():
        raise UsageError(
            "no-engine", f"{engine} has no config.json.", next="Give the folder that convert or build made."
        )
    folder = "tensorrt_llm/1/checkpoint" if profile.runtime == "cpu" else "tensorrt_llm/1"
    suffix = "safetensors" if profile.runtime == "cpu" else "engine"
    ranks = profile.checkpoint.tensor_parallel * profile.checkpoint.pipeline_parallel
    names = ["config.json", *(f"rank{rank}.{suffix}" for rank in range(ranks))]
    for name in names:
        if not (engine / name).is_file():
            raise IntegrityError("rank-missing", f"{engine} has no {name}.", why=f"The profile has {ranks} rank(s).")
    if profile.runtime == "cpu":
        _check_same_model(profile, source, engine)
    return {f"{folder}/{name}": engine / name for name in names}


def _check_same_model(profile: EngineConfig, source: Path, checkpoint: Path) -> None:
    """The tokenizer's model and the checkpoint's must be one, in the split that the profile says."""
    from nemobuild.engine.cpu.checkpoint_config import read_config

    split, made = read_config(checkpoint)
    wanted = load_spec(source)
    for field in ("hidden_size", "vocab_size", "query_heads", "head_size", "blocks", "rope", "norm_epsilon"):
        if getattr(made, field) != getattr(wanted, field):
            raise IntegrityError(
                "another-model",
                f"{checkpoint} is not a checkpoint of the model in {source}.",
                why=f"Their {field} differ.",
                next="Convert that model, or name the right folders.",
            )
    if (split.tp, split.pp) != (profile.checkpoint.tensor_parallel, profile.checkpoint.pipeline_parallel):
        raise IntegrityError(
            "another-split",
            f"{checkpoint} was converted with tp {split.tp} and pp {split.pp}.",
            why="The profile's checkpoint section says otherwise.",
        )


def _manifest(profile: EngineConfig, engine: Path, files: Mapping[str, bytes | Path]) -> bytes:
    """What the folder is made from, and the digest or (for weights) size of every file."""
    entries = {}
    for name, content in sorted(files.items()):
        if isinstance(content, bytes):
            entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        else:
            entries[name] = {"bytes": content.stat().st_size}
    made = engine / MANIFEST  # the weights' own identity; their digest would cost another reading of all of them
    body = {
        "kind": "repository",
        "nemobuild": __version__,
        "profile": profile.model_dump(),
        "engine": load_json(made).get("key") if made.is_file() else None,
        "files": entries,
    }
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return json.dumps({"key": hashlib.sha256(canonical).hexdigest()} | body, indent=1).encode() + b"\n"


def _link_or_copy(source: Path, target: Path) -> None:
    """Weights are never changed in place, so a hard link is as good as a copy where the file system allows it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _readme(profile: EngineConfig, settings: Settings) -> str:
    return f"""# Triton model repository of {settings.model_name}

{profile.description}

Start it from this folder:

    ulimit -s 262144    # Triton copies a request's body to the stack; the usual 8 MiB are too few for long prompts
    tritonserver --model-repository .

`chat` streams; `ensemble` gives whole answers. Both take `messages` (JSON) or `text_input`:

    curl -s localhost:8000/v2/models/ensemble/generate -d '{{"text_input": "Hello", "max_tokens": 20}}'

Context: {settings.limits.max_context_tokens} tokens. Reasoning switch: {settings.reasoning.switch}.
Runtime: {profile.runtime}.
The Python steps need numpy, tokenizers and jinja2 in the server's Python.
"""
