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
from nemobuild.model.hf_config import load_json, spec_from_config
from nemobuild.model.tokenizer import chat_template, load_tokenizer, special_token
from nemobuild.plan.planner import Plan
from nemobuild.resources import data_folder, package_folder
from nemobuild.runtime.settings import Limits, Sampling, Settings
from nemobuild.triton.engine_files import check_same_model, engine_files
from nemobuild.triton.models import repository_models
from nemobuild.triton.pbtxt import render

_TEXT_LIB = ("__init__.py", "runtime/*.py")
_ENGINE_LIB = (
    "__init__.py",
    "errors.py",
    "engine/__init__.py",
    "engine/request.py",
    "runtime/__init__.py",
    "runtime/wire.py",
)
_CPU_LIB = (
    *_ENGINE_LIB,
    "model/__init__.py",
    "model/spec.py",
    "model/forward.py",
    "weights/__init__.py",
    "weights/safetensors.py",
    "engine/cpu/*.py",
)
# Model -> (adapter files of triton_repo/, modules of nemobuild, does it need tokenizer and settings).
_PYTHON_MODELS: dict[str, tuple[tuple[str, ...], tuple[str, ...], bool]] = {
    "chat": (
        ("chat/model.py", "common.py", "engine_calls.py", "lane.py", "metrics.py", "outbox.py", "watchdog.py"),
        _TEXT_LIB,
        True,
    ),
    "preprocessing": (("preprocessing/model.py", "common.py"), _TEXT_LIB, True),
    "postprocessing": (("postprocessing/model.py", "common.py"), _TEXT_LIB, True),
    "tensorrt_llm_collect": (
        ("tensorrt_llm_collect/model.py", "common.py", "engine_calls.py", "lane.py"),
        _TEXT_LIB,
        False,
    ),
}
# Runtime -> the same of its ``tensorrt_llm``; the C++ backend needs neither.
_ENGINE_MODELS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cpu": (("tensorrt_llm/model.py", "engine_model.py", "lane.py"), _CPU_LIB),
    "llmapi": (("tensorrt_llm_llmapi/model.py", "engine_model.py", "lane.py"), _ENGINE_LIB),
    "tensorrt": ((), ()),
}
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class RepositoryPlan:
    """Files of the repository: small ones as bytes, large ones as the path that they are taken from."""

    files: Mapping[str, bytes | Path]

    @property
    def size_bytes(self) -> int:
        return sum(len(c) if isinstance(c, bytes) else c.stat().st_size for c in self.files.values())


def plan_repository(
    plan: Plan, source: Path, engine: Path, *, inputs: Mapping[str, Any] | None = None
) -> RepositoryPlan:
    """Everything that the repository will hold. ``source`` is the Hugging Face folder (tokenizer, template), ``engine``
    what serves: the checkpoint (``cpu``), the engine folder (``tensorrt``), or a Hugging Face folder (``llmapi``).
    ``inputs`` go to the manifest as they are, for whoever asks later what the repository was made from.

    Raises ``UsageError`` or ``IntegrityError`` when a part is missing or does not fit the plan.
    """
    settings, assets = _text_assets(plan, source)
    files: dict[str, bytes | Path] = {}
    for model in repository_models(plan):
        files[f"{model.name}/config.pbtxt"] = render(model).encode()
        adapters, library, needs_assets = _PYTHON_MODELS.get(model.name, ((), (), False))
        if model.name == "tensorrt_llm":
            adapters, library = _ENGINE_MODELS[plan.profile.runtime]
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
    files |= engine_files(plan, engine)
    files["README.md"] = _readme(plan.profile, settings).encode()
    files[MANIFEST] = _manifest(plan, engine, files, inputs)
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


def _text_assets(plan: Plan, source: Path) -> tuple[Settings, dict[str, bytes | Path]]:
    profile, described = plan.profile, load_json(source / "config.json")
    described.pop("quantization_config", None)  # of the weights; here it is about the text
    spec = spec_from_config(described, source=str(source / "config.json"))
    tokenizer = load_tokenizer(source, spec)
    check_same_model(plan, source, spec)
    config = load_json(source / "tokenizer_config.json") if (source / "tokenizer_config.json").exists() else {}
    limits, reasoning = profile.limits, profile.reasoning
    settings = Settings(
        model_name=plan.name,
        vocab_size=spec.vocab_size,
        bos_token=special_token(config, "bos_token", tokenizer),
        end_token_ids=_end_token_ids(source, spec.end_token_ids, spec.vocab_size),
        limits=Limits(
            max_context_tokens=limits.max_context_tokens,
            max_prompt_tokens=limits.prompt_limit,
            default_max_tokens=limits.default_max_tokens,
            max_request_bytes=limits.max_request_bytes,
            max_concurrent_requests=plan.max_batch_size + limits.max_queue_size,
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


def _manifest(plan: Plan, engine: Path, files: Mapping[str, bytes | Path], inputs: Mapping[str, Any] | None) -> bytes:
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
        "trtllm": plan.toolchain.trtllm if plan.toolchain else None,
        "profile": plan.profile.model_dump(),
        "inputs": dict(inputs or {}),
        "engine": load_json(made) if made.is_file() else None,
        "files": entries,
    }
    return json.dumps({"key": manifest_key(body)} | body, indent=1).encode() + b"\n"


def manifest_key(body: Mapping[str, Any]) -> str:
    """The repository's identity: of all that its manifest says but the key itself."""
    named = {name: value for name, value in body.items() if name != "key"}
    canonical = json.dumps(named, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return hashlib.sha256(canonical).hexdigest()


def _link_or_copy(source: Path, target: Path) -> None:
    """Weights are never changed in place, so a hard link is as good as a copy where the file system allows it."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


_NEEDS = {
    "cpu": "",
    "tensorrt": "; chat needs tritonclient",
    "llmapi": "; tensorrt_llm needs PyYAML and the TensorRT-LLM of manifest.json",
}


def _readme(profile: EngineConfig, settings: Settings) -> str:
    return f"""# Triton model repository of {settings.model_name}

{profile.description}

Start it from this folder:

    ulimit -s 262144    # Triton copies a request's body to the stack; the usual 8 MiB are too few for long prompts
    tritonserver --model-repository . --http-address 127.0.0.1 --grpc-address 127.0.0.1 --metrics-address 127.0.0.1

(`nemobuild serve` also closes the routes that no client needs.)

`chat` streams; `ensemble` gives whole answers. Both take `messages` (JSON) or `text_input`:

    curl -s localhost:8000/v2/models/ensemble/generate -d '{{"text_input": "Hello", "max_tokens": 20}}'

Context: {settings.limits.max_context_tokens} tokens. Reasoning switch: {settings.reasoning.switch}.
Runtime: {profile.runtime}.
The Python steps need numpy, tokenizers and jinja2 in the server's Python{_NEEDS[profile.runtime]}.
"""
