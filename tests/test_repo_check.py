"""``nemobuild repo check``: what nemobuild emits passes for all runtimes, and each rule finds what it is for."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb
from typer.testing import CliRunner

from nemobuild.cli.app import app
from nemobuild.convert.executor import convert
from nemobuild.engine.cpu.checkpoint_config import read_config
from nemobuild.errors import IntegrityError, UsageError
from nemobuild.triton import check_files
from nemobuild.triton.check import RULES, check_repository
from nemobuild.triton.contract import CPP_PRESENT
from nemobuild.triton.opened import open_repository
from nemobuild.triton.repository import manifest_key, plan_repository, write_repository
from nemobuild.weights.snapshot import open_snapshot
from tests import templates
from tests.plans import planned
from tests.tiny import write_model

RUNTIMES = ("cpu", "tensorrt", "llmapi")


def write_engine(folder: Path, checkpoint: Path, **build) -> Path:
    """The files of an engine of one rank, as far as a repository looks at them."""
    read_config(checkpoint)
    folder.mkdir()
    config = {
        "version": "1.2.1",
        "pretrained_config": json.loads((checkpoint / "config.json").read_text()),
        "build_config": {"max_batch_size": 4, "kv_cache_type": "PAGED"} | build,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "rank0.engine").write_bytes(b"a serialized plan")
    return folder


@pytest.fixture(scope="module")
def emitted(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("repositories")
    source = write_model(folder / "hf", template=templates.SUPER_V15.replace("tool_notes", "''"))
    checkpoint = convert(open_snapshot(source), folder / "checkpoint").output
    served = {"cpu": checkpoint, "llmapi": source, "tensorrt": write_engine(folder / "engine", checkpoint)}
    return {
        runtime: write_repository(plan_repository(planned(runtime), source, served[runtime]), folder / runtime)
        for runtime in RUNTIMES
    }


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_is_emitted_passes(emitted, runtime, tmp_path):
    assert check_repository(emitted[runtime]) == ()
    moved = shutil.copytree(emitted[runtime], tmp_path / "elsewhere")
    (moved / "chat" / "1" / "__pycache__").mkdir()
    (moved / "chat" / "1" / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"\0")  # what a server leaves
    assert check_repository(moved) == ()


Damage = Callable[[Path], object]


def config(model: str, change: Callable[[pb.ModelConfig], object]) -> Damage:
    """A repository whose ``config.pbtxt`` of ``model`` was changed through Triton's own schema."""

    def apply(folder: Path) -> None:
        file = folder / model / "config.pbtxt"
        message = text_format.Parse(file.read_text(), pb.ModelConfig())
        change(message)
        file.write_text(text_format.MessageToString(message))

    return apply


def edit(name: str, change: Callable[[str], str]) -> Damage:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def arguments(**changes) -> Damage:
    return edit("tensorrt_llm/1/model.yaml", lambda text: yaml.safe_dump(yaml.safe_load(text) | changes))


def ours(**changes) -> Damage:
    def change(text: str) -> str:
        value = yaml.safe_load(text)
        value["triton_config"] = {k: v for k, v in (value["triton_config"] | changes).items() if v is not None}
        return yaml.safe_dump(value)

    return edit("tensorrt_llm/1/model.yaml", change)


def parameter(key: str, value: str | None) -> Damage:
    def change(message: pb.ModelConfig) -> None:
        if value is None:
            del message.parameters[key]
        else:
            message.parameters[key].string_value = value

    return config("tensorrt_llm", change)


def step(message: pb.ModelConfig, name: str):
    return next(s for s in message.ensemble_scheduling.step if s.model_name == name)


def rewire(model: str, kind: str, inner: str, outer: str | None) -> Damage:
    def change(message: pb.ModelConfig) -> None:
        wires = getattr(step(message, model), f"{kind}_map")
        if outer is None:
            del wires[inner]
        else:
            wires[inner] = outer

    return config("ensemble", change)


def retype(message: pb.ModelConfig, kind: str, name: str, data_type: int) -> None:
    next(t for t in getattr(message, kind) if t.name == name).data_type = data_type


def drop_input(message: pb.ModelConfig, name: str) -> None:
    del message.input[[t.name for t in message.input].index(name)]


def undecoupled(message: pb.ModelConfig) -> None:
    message.model_transaction_policy.decoupled = False


def streaming_step(message: pb.ModelConfig) -> None:
    message.model_transaction_policy.decoupled = True


def logits(message: pb.ModelConfig) -> None:
    retype(message, "output", "context_logits", pb.TYPE_FP16)


def way(value: str) -> Callable[[pb.ModelConfig], None]:
    def change(message: pb.ModelConfig) -> None:
        message.parameters["engine_way"].string_value = value

    return change


ENGINE, CONFIG, YAML = "tensorrt_llm/1", "tensorrt_llm/config.pbtxt", "tensorrt_llm/1/model.yaml"


def loop(path: Path) -> None:
    """A link that leads to itself, in place of a file."""
    path.unlink()
    path.symlink_to(path.name)


BROKEN: list[tuple[str, str, Damage, str, str]] = [
    # rule, runtime, damage, file, words
    ("schema", "cpu", edit("chat/config.pbtxt", lambda t: t + "colour: 3\n"), "chat/config.pbtxt", "colour"),
    ("schema", "cpu", edit(CONFIG, lambda t: t.replace("TYPE_INT32", "TYPE_INT33", 1)), CONFIG, "TYPE_INT33"),
    ("schema", "cpu", config("chat", lambda m: setattr(m, "name", "talk")), "chat/config.pbtxt", "'talk'"),
    ("schema", "cpu", lambda f: (f / "chat/config.pbtxt").unlink(), "chat", "without config.pbtxt"),
    ("schema", "cpu", lambda f: (f / "chat/1/model.py").unlink(), "chat/1", "no model.py"),
    ("schema", "cpu", lambda f: shutil.rmtree(f / "ensemble/1"), "ensemble", "no version folder"),
    ("schema", "cpu", config("chat", lambda m: m.ClearField("backend")), "chat/config.pbtxt", "neither"),
    ("schema", "cpu", config("chat", lambda m: m.output.append(m.output[0])), "chat/config.pbtxt", "2 times"),
    ("placeholder", "tensorrt", parameter("tokenizer_dir", "${tokenizer_dir}"), CONFIG, "${tokenizer_dir}"),
    (
        "placeholder",
        "tensorrt",
        edit(CONFIG, lambda t: t.replace("max_batch_size: 4", "max_batch_size: ${n}", 1)),
        CONFIG,
        "${n}",
    ),
    ("placeholder", "llmapi", arguments(guided_decoding_backend="${backend}"), YAML, "${backend}"),
    *(("parameters", "tensorrt", parameter(key, None), CONFIG, f"{key} is missing") for key in CPP_PRESENT),
    ("parameters", "tensorrt", parameter("gpt_model_path", ""), CONFIG, "gpt_model_path is empty"),
    ("parameters", "tensorrt", parameter("gpt_model_type", "V1"), CONFIG, "'V1'"),
    (
        "parameters",
        "tensorrt",
        parameter("exclude_input_in_output", None),
        CONFIG,
        "exclude_input_in_output is missing",
    ),
    (
        "parameters",
        "tensorrt",
        parameter("kv_cache_free_gpu_mem_fractoin", "0.5"),
        CONFIG,
        "kv_cache_free_gpu_mem_fraction",
    ),
    ("parameters", "tensorrt", config("tensorrt_llm", lambda m: m.ClearField("dynamic_batching")), CONFIG, "queue"),
    ("parameters", "tensorrt", config("tensorrt_llm", lambda m: setattr(m, "max_batch_size", 0)), CONFIG, "batch axis"),
    (
        "parameters",
        "llmapi",
        config("tensorrt_llm", lambda m: drop_input(m, "input_ids")),
        CONFIG,
        "'input_ids' is missing",
    ),
    (
        "parameters",
        "cpu",
        config("tensorrt_llm", lambda m: retype(m, "input", "seed", pb.TYPE_INT64)),
        CONFIG,
        "'seed' is TYPE_INT64",
    ),
    ("parameters", "cpu", parameter("cpu_engine", '{"max_batch_size": 1}'), CONFIG, "kv_cache_tokens"),
    ("parameters", "cpu", lambda f: shutil.rmtree(f / "tensorrt_llm"), "tensorrt_llm", "no such model"),
    (
        "wiring",
        "cpu",
        lambda f: shutil.rmtree(f / "postprocessing"),
        "ensemble/config.pbtxt",
        "'postprocessing': there is no such",
    ),
    (
        "wiring",
        "cpu",
        rewire("postprocessing", "input", "output_ids", None),
        "ensemble/config.pbtxt",
        "needs 'output_ids'",
    ),
    (
        "wiring",
        "cpu",
        rewire("postprocessing", "input", "output_idz", "_output_ids"),
        "ensemble/config.pbtxt",
        "Did you mean 'output_ids'",
    ),
    (
        "wiring",
        "cpu",
        rewire("preprocessing", "output", "seeds", "_seed2"),
        "ensemble/config.pbtxt",
        "no output 'seeds'",
    ),
    (
        "wiring",
        "cpu",
        rewire("postprocessing", "input", "output_ids", "_nowhere"),
        "ensemble/config.pbtxt",
        "nothing has made",
    ),
    (
        "wiring",
        "cpu",
        rewire("postprocessing", "output", "text_output", "_output_ids"),
        "ensemble/config.pbtxt",
        "made twice",
    ),
    (
        "wiring",
        "cpu",
        rewire("postprocessing", "output", "text_output", "_text"),
        "ensemble/config.pbtxt",
        "'text_output' is made by no step",
    ),
    (
        "wiring",
        "cpu",
        rewire("tensorrt_llm_collect", "output", "sequence_length", "_unused"),
        "ensemble/config.pbtxt",
        "read by nobody",
    ),
    (
        "wiring",
        "cpu",
        config("postprocessing", lambda m: retype(m, "input", "output_ids", pb.TYPE_INT64)),
        "ensemble/config.pbtxt",
        "TYPE_INT32",
    ),
    (
        "wiring",
        "cpu",
        config(
            "ensemble",
            lambda m: retype(m, "output", "text_output", pb.TYPE_BYTES if hasattr(pb, "TYPE_BYTES") else pb.TYPE_FP32),
        ),
        "ensemble/config.pbtxt",
        "output 'text_output' is",
    ),
    (
        "wiring",
        "cpu",
        config("preprocessing", lambda m: setattr(m.input[0], "optional", False)),
        "ensemble/config.pbtxt",
        "is optional, but",
    ),
    ("decoupled", "tensorrt", config("tensorrt_llm", undecoupled), CONFIG, "decoupled"),
    ("decoupled", "llmapi", config("chat", undecoupled), "chat/config.pbtxt", "chat streams"),
    ("decoupled", "cpu", config("tensorrt_llm_collect", streaming_step), "ensemble/config.pbtxt", "beside a stream"),
    ("engine", "llmapi", ours(decoupled=False), YAML, "decoupled is False"),
    ("engine", "llmapi", ours(max_batch_size=5), YAML, "triton_config.max_batch_size is 5"),
    ("engine", "llmapi", ours(logprobs=None), YAML, "triton_config.logprobs is missing"),
    ("engine", "llmapi", arguments(max_batch_size=5), YAML, "max_batch_size is 5"),
    ("engine", "llmapi", arguments(triton_config=None), YAML, "triton_config"),
    ("engine", "llmapi", arguments(max_seq_length=9), YAML, "Did you mean 'max_seq_len'"),
    ("engine", "llmapi", arguments(enable_trtllm_sampler=True), YAML, "does not know enable_trtllm_sampler"),
    ("engine", "llmapi", arguments(kv_cache_config={"fraction": 0.5}), YAML, "kv_cache_config.fraction"),
    ("engine", "llmapi", arguments(model="nvidia/model"), YAML, "'nvidia/model'"),
    ("engine", "llmapi", lambda f: (f / YAML).unlink(), YAML, "missing"),
    ("engine", "tensorrt", lambda f: (f / ENGINE / "rank0.engine").unlink(), f"{ENGINE}/rank0.engine", "missing"),
    ("engine", "tensorrt", lambda f: (f / ENGINE / "config.json").unlink(), f"{ENGINE}/config.json", "missing"),
    (
        "engine",
        "tensorrt",
        config("tensorrt_llm", lambda m: setattr(m, "max_batch_size", 9)),
        CONFIG,
        "was built for 4",
    ),
    ("engine", "tensorrt", config("tensorrt_llm", logits), CONFIG, "TYPE_FP16"),
    (
        "engine",
        "tensorrt",
        edit(f"{ENGINE}/config.json", lambda t: t.replace("PAGED", "CONTINUOUS")),
        f"{ENGINE}/config.json",
        "CONTINUOUS",
    ),
    (
        "engine",
        "cpu",
        lambda f: (f / ENGINE / "checkpoint/rank0.safetensors").unlink(),
        f"{ENGINE}/checkpoint/rank0.safetensors",
        "missing",
    ),
    ("parameters", "tensorrt", config("chat", way("lane")), "chat/config.pbtxt", "'lane', which the backend"),
    ("parameters", "cpu", config("chat", way("bls")), "chat/config.pbtxt", "'bls', not one of lane, grpc"),
    ("parameters", "cpu", config("tensorrt_llm_collect", way("")), "tensorrt_llm_collect/config.pbtxt", "engine_way"),
    ("self-contained", "tensorrt", parameter("gpt_model_path", "/models/engine"), CONFIG, "'/models/engine'"),
    ("self-contained", "llmapi", arguments(model="/models/hf"), YAML, "'/models/hf'"),
    (
        "self-contained",
        "cpu",
        edit("chat/1/model.py", lambda t: "import torch\n" + t),
        "chat/1/model.py",
        "imports torch",
    ),
    (
        "self-contained",
        "cpu",
        edit("chat/1/model.py", lambda t: "from nemobuild.errors import UsageError\n" + t),
        "chat/1/model.py",
        "imports nemobuild",
    ),
    (
        "self-contained",
        "cpu",
        edit("chat/1/model.py", lambda t: "from .elsewhere import x\n" + t),
        "chat/1/model.py",
        "elsewhere",
    ),
    (
        "self-contained",
        "cpu",
        edit("chat/1/lib/runtime/stops.py", lambda t: "from ....preprocessing import x\n" + t),
        "chat/1/lib/runtime/stops.py",
        "outside",
    ),
    ("self-contained", "cpu", edit("chat/1/model.py", lambda t: "def (:\n" + t), "chat/1/model.py", "not Python"),
    (
        "self-contained",
        "cpu",
        lambda f: (f / "chat/1/assets/extra.txt").symlink_to("/etc/hostname"),
        "chat/1/assets/extra.txt",
        "link out",
    ),
    (
        "self-contained",
        "cpu",
        lambda f: (f / "chat/1/assets/loop.txt").symlink_to("loop.txt"),
        "chat/1/assets/loop.txt",
        "link to nowhere",
    ),
    ("manifest", "cpu", lambda f: (f / "manifest.json").unlink(), "manifest.json", "missing"),
    ("manifest", "cpu", lambda f: (f / "manifest.json").write_text("{"), "manifest.json", "unreadable"),
    ("manifest", "cpu", edit("manifest.json", lambda t: t.replace('"Tiny."', '"Huge."')), "manifest.json", "key"),
    ("manifest", "cpu", lambda f: (f / "chat/1/more.json").write_text("{}"), "chat/1/more.json", "not in manifest"),
    ("manifest", "cpu", lambda f: (f / "README.md").unlink(), "README.md", "not there"),
    ("manifest", "cpu", lambda f: loop(f / "README.md"), "README.md", "but not there"),
    ("manifest", "cpu", edit("README.md", lambda t: t + "x"), "README.md", "bytes"),
    ("manifest", "cpu", edit("README.md", lambda t: t.swapcase()), "README.md", "another content"),
    (
        "manifest",
        "cpu",
        lambda f: (f / ENGINE / "checkpoint/rank0.safetensors").write_bytes(b"short"),
        f"{ENGINE}/checkpoint/rank0.safetensors",
        "5 bytes",
    ),
]


@pytest.mark.parametrize(("rule", "runtime", "damage", "file", "words"), BROKEN, ids=[f"{b[0]}-{b[4]}" for b in BROKEN])
def test_each_rule_finds_what_it_is_for(emitted, tmp_path, rule, runtime, damage, file, words):
    broken = shutil.copytree(emitted[runtime], tmp_path / "broken")
    damage(broken)
    found = [f for f in check_repository(broken) if f.rule == rule]
    assert any(f.file == file and words in f.what for f in found), found


def test_every_rule_has_a_broken_repository():
    assert {rule for rule, *_ in BROKEN} == set(RULES)


def test_a_manifest_that_was_made_to_fit_still_shows_the_weights(emitted, tmp_path):
    """The key alone proves nothing to someone who can compute it; sizes and digests do."""
    broken = shutil.copytree(emitted["cpu"], tmp_path / "broken")
    file = broken / "manifest.json"
    body = json.loads(file.read_text())
    body["files"]["README.md"]["sha256"] = hashlib.sha256(b"").hexdigest()
    body["key"] = manifest_key(body)
    file.write_text(json.dumps(body))
    assert [(f.rule, f.file) for f in check_repository(broken)] == [("manifest", "README.md")]


@pytest.mark.parametrize(
    ("runtime", "name"),
    [
        ("cpu", "manifest.json"),
        ("cpu", f"{ENGINE}/checkpoint/config.json"),
        ("tensorrt", f"{ENGINE}/config.json"),
        ("llmapi", YAML),
        ("llmapi", "manifest.json"),
    ],
)
def test_no_content_of_a_file_stops_the_check(emitted, tmp_path, runtime, name):
    broken = shutil.copytree(emitted[runtime], tmp_path / "broken")
    good = yaml.safe_load((broken / name).read_text())
    opened = open_repository(broken)

    def found(text: str) -> list[tuple[str, str]]:
        (broken / name).write_text(text)
        repository = open_repository(broken) if name == "manifest.json" else opened
        return [*check_files.engine(repository), *check_files.manifest(repository)]

    for key in good:
        for value in (None, 7, "x", [1], {"x": {"y": 1}}):
            found(json.dumps(good | {key: value}))
    for text in ("", "[]", "{", "\0", "&a [*a]", "x: !!python/object/apply:os.system [true]"):
        assert found(text)


def test_the_command_lists_all_findings_and_says_it_by_its_status(emitted, tmp_path):
    runner = CliRunner()
    good = runner.invoke(app, ["repo", "check", str(emitted["llmapi"]), "--json"])
    assert good.exit_code == 0 and json.loads(good.stdout)["findings"] == []
    broken = shutil.copytree(emitted["llmapi"], tmp_path / "broken")
    ours(decoupled=False)(broken)
    (broken / "README.md").unlink()
    bad = runner.invoke(app, ["repo", "check", str(broken), "--json"])
    assert isinstance(bad.exception, IntegrityError) and bad.exception.exit_status == 5
    findings = json.loads(bad.stdout)["findings"]
    assert {f["rule"] for f in findings} == {"engine", "manifest"} and len(findings) == 3
    shown = runner.invoke(app, ["repo", "check", str(broken)])
    assert "README.md" in shown.stdout and "decoupled" in shown.stdout
    nothing = runner.invoke(app, ["repo", "check", str(tmp_path)])
    assert isinstance(nothing.exception, UsageError)


def test_repo_alone_still_emits(emitted):
    unknown = CliRunner().invoke(app, ["repo", "no-such-profile", "-o", "x"])
    assert isinstance(unknown.exception, UsageError) and unknown.exception.code == "unknown-profile"
    assert CliRunner().invoke(app, ["repo", "check"]).exit_code == 2
