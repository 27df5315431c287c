"""What the ``tensorrt_llm`` model of a repository serves: a checkpoint, an engine or a Hugging Face folder, by runtime.

Each is looked at before it is taken: whether it is whole, of the same model as the tokenizer, and in the split and
precision of the plan.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from nemobuild.convert.modelopt_hf import carried_files
from nemobuild.engine.cpu.checkpoint_config import read_config
from nemobuild.engine.llmapi import model_yaml
from nemobuild.errors import IntegrityError, UsageError
from nemobuild.model.hf_config import load_json
from nemobuild.model.spec import ModelSpec
from nemobuild.plan.planner import Plan
from nemobuild.weights.quantized import QUANT_CONFIG
from nemobuild.weights.snapshot import INDEX, open_snapshot

VERSION_FOLDER = "tensorrt_llm/1"
CHECKPOINT = "checkpoint"
MODEL_YAML = "model.yaml"
Files = dict[str, bytes | Path]


def engine_files(plan: Plan, engine: Path) -> Files:
    """Files of the model by their path in the repository.

    Raises ``UsageError`` for a folder of another kind, ``IntegrityError`` for one that is not whole or does not fit.
    """
    if not (engine / "config.json").is_file():
        raise UsageError(
            "no-engine", f"{engine} has no config.json.", next="Give the folder that convert or build made."
        )
    files = _BY_RUNTIME[plan.profile.runtime](plan, engine)
    return {f"{VERSION_FOLDER}/{name}": content for name, content in files.items()}


def _cpu(plan: Plan, checkpoint: Path) -> Files:
    files = _rank_files(plan, checkpoint, "safetensors")
    split, made = read_config(checkpoint)
    check_same_model(plan, checkpoint, made)
    wanted = plan.profile.checkpoint
    if (split.tp, split.pp) != (wanted.tensor_parallel, wanted.pipeline_parallel):
        raise IntegrityError(
            "another-split",
            f"{checkpoint} was converted with tp {split.tp} and pp {split.pp}.",
            why="The profile's checkpoint section says otherwise.",
        )
    return {f"{CHECKPOINT}/{name}": path for name, path in files.items()}


def _tensorrt(plan: Plan, engine: Path) -> Files:
    files = _rank_files(plan, engine, "engine")
    made, wanted = load_json(engine / "config.json").get("pretrained_config"), plan.spec
    sizes = {
        "hidden_size": wanted.hidden_size,
        "vocab_size": wanted.vocab_size,
        "num_hidden_layers": len(wanted.blocks),
        "num_attention_heads": wanted.query_heads,
    }
    for name, value in sizes.items():
        if not isinstance(made, dict) or made.get(name) != value:
            raise _another_model(plan, engine, name)
    return files


def _llmapi(plan: Plan, folder: Path) -> Files:
    precision = plan.profile.checkpoint.precision
    snapshot = open_snapshot(folder, fp8=True)
    check_same_model(plan, folder, snapshot.spec)
    # TensorRT-LLM up to 1.2 reads one of the two, newer versions the other, and neither misses what is not there.
    said = {
        QUANT_CONFIG: (folder / QUANT_CONFIG).is_file(),
        "config.json": "quantization_config" in load_json(folder / "config.json"),
    }
    for name, fp8 in said.items():
        if fp8 != (precision == "fp8"):
            raise IntegrityError(
                "another-precision",
                f"{folder / name} {'says' if fp8 else 'does not say'} that the weights are FP8.",
                why=f"checkpoint.precision of the profile is {precision}.",
                next="Convert with that precision and `--format hf`, or name the right folder.",
            )
    weights = {info.file.name: info.file for info in snapshot.tensors.values()}
    described = {name: folder / name for name in (INDEX, QUANT_CONFIG) if (folder / name).is_file()}
    parts = carried_files(folder, written=()) | weights | described
    files: Files = {f"{CHECKPOINT}/{name}": path for name, path in sorted(parts.items())}
    return files | {MODEL_YAML: yaml.safe_dump(model_yaml(plan, CHECKPOINT), sort_keys=False).encode()}


_BY_RUNTIME = {"cpu": _cpu, "tensorrt": _tensorrt, "llmapi": _llmapi}


def _rank_files(plan: Plan, folder: Path, suffix: str) -> Files:
    ranks = plan.profile.checkpoint.ranks
    names = ["config.json", *(f"rank{rank}.{suffix}" for rank in range(ranks))]
    for name in names:
        if not (folder / name).is_file():
            raise IntegrityError("rank-missing", f"{folder} has no {name}.", why=f"The profile has {ranks} rank(s).")
    return {name: folder / name for name in names}


def check_same_model(plan: Plan, folder: Path, made: ModelSpec) -> None:
    """Raise ``IntegrityError`` unless ``made``, the model in ``folder``, is the one of the plan."""
    for field in ("hidden_size", "vocab_size", "query_heads", "head_size", "blocks", "rope", "norm_epsilon"):
        if getattr(made, field) != getattr(plan.spec, field):
            raise _another_model(plan, folder, field)


def _another_model(plan: Plan, folder: Path, field: str) -> IntegrityError:
    return IntegrityError(
        "another-model",
        f"{folder} does not hold the model of {plan.name}.",
        why=f"Its {field} is another.",
        next="Convert that model, or name the right folders.",
    )
