"""The emitted repository: stands alone, has no path of this machine, is wired without a gap, and appears whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from nemobuild.config import profile_names, reasoning_policy
from nemobuild.convert.executor import convert
from nemobuild.errors import DoesNotFit, IntegrityError, UsageError
from nemobuild.places import load_plan
from nemobuild.triton.contract import CPP_PARAMETERS, ENGINE_INPUTS, ENGINE_OUTPUTS, Tensor
from nemobuild.triton.models import repository_models
from nemobuild.triton.pbtxt import TritonModel, render, to_message
from nemobuild.triton.repository import RepositoryPlan, plan_repository, write_repository
from nemobuild.weights.snapshot import open_snapshot
from tests import templates
from tests.plans import planned
from tests.tiny import tiny_config, write_model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("hf") / "tiny", template=templates.SUPER_V15.replace("tool_notes", "''"))


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    return convert(open_snapshot(source), tmp_path_factory.mktemp("trt") / "checkpoint").output


def test_every_config_parses_and_says_what_the_record_says():
    for name in profile_names():
        for model in repository_models(load_plan(name)):
            message = text_format.Parse(render(model), pb.ModelConfig())
            assert message == to_message(model)
            assert [i.name for i in message.input] == [t.name for t in model.inputs]
            assert message.max_batch_size > 0


@pytest.mark.parametrize("runtime", ["cpu", "tensorrt", "llmapi"])
def test_the_ensemble_is_wired_without_a_gap(runtime):
    """Every inner tensor has one producer and the type and shape its consumers ask for; nothing is left over."""
    models = {m.name: m for m in repository_models(planned(runtime))}
    ensemble = models["ensemble"]
    known = {t.name: t for t in ensemble.inputs}
    used = {t.name for t in ensemble.outputs}.union(*(step.inputs.values() for step in ensemble.steps))
    for step in ensemble.steps:
        inner = models[step.model]
        takes, makes = ({t.name: t for t in tensors} for tensors in (inner.inputs, inner.outputs))
        if "ticket" in takes:  # it waits with a ticket, or begins; it has the tokens, or not yet
            first, last = "ticket" not in step.inputs, "ticket" not in step.outputs
            takes = {name: t for name, t in takes.items() if (name == "ticket") != first}
            makes = {name: t for name, t in makes.items() if (name == "ticket") != last}
        assert set(step.inputs) == set(takes) and set(step.outputs) == set(makes)
        for name, tensor in takes.items():
            outer = known[step.inputs[name]]
            assert (outer.type, outer.dims) == (tensor.type, tensor.dims), name
            assert tensor.optional or not outer.optional, name
        for name, tensor in makes.items():
            made = step.outputs[name]
            assert made not in known and made in used
            known[made] = tensor
        assert not inner.decoupled
    for tensor in ensemble.outputs:
        assert (known[tensor.name].type, known[tensor.name].dims) == (tensor.type, tensor.dims)


def test_the_engine_has_the_tensors_of_the_contract_on_all_runtimes():
    cpu, llm, cpp = (repository_models(planned(r))[-1] for r in ("cpu", "llmapi", "tensorrt"))
    for model in (cpu, llm, cpp):
        assert (model.inputs, model.outputs) == (ENGINE_INPUTS, ENGINE_OUTPUTS)
        assert model.decoupled and model.max_batch_size == 4
    assert (cpu.backend, llm.backend, cpp.backend) == ("python", "python", "tensorrtllm")
    required = {t.name for t in cpp.inputs if not t.optional}
    assert required == {"input_lengths", "request_output_len"}
    message = to_message(cpp)
    for key in ("gpt_model_type", "gpt_model_path", "tokenizer_dir", "guided_decoding_backend"):
        assert message.parameters[key].string_value == CPP_PARAMETERS[key]
    assert "xgrammar_tokenizer_info_path" in message.parameters
    assert message.dynamic_batching.default_queue_policy.max_queue_size == 128
    assert len({t.name for t in ENGINE_INPUTS}) == len(ENGINE_INPUTS)
    assert len({t.name for t in ENGINE_OUTPUTS}) == len(ENGINE_OUTPUTS)


def test_the_parameters_of_the_cpp_backend_follow_the_plan():
    plan = planned("tensorrt")
    parameters = to_message(repository_models(plan)[-1]).parameters
    assert float(parameters["kv_cache_free_gpu_mem_fraction"].string_value) == plan.profile.build.kv_cache_fraction
    assert "max_tokens_in_paged_kv_cache" not in parameters and "gpu_weights_percent" not in parameters
    limits = {"max_batch_size": 4, "max_context_tokens": 256, "default_max_tokens": 32, "kv_cache_tokens": 2048}
    streamed = {"weight_streaming": True, "gemm_plugin": "disable"}
    plan = planned("tensorrt", limits=limits, build=streamed)
    parameters = to_message(repository_models(plan)[-1]).parameters
    assert parameters["max_tokens_in_paged_kv_cache"].string_value == "2048"
    assert float(parameters["gpu_weights_percent"].string_value) == plan.weights_on_gpu


def test_a_value_that_the_schema_does_not_know_fails():
    with pytest.raises(ValueError, match="TYPE_FLOAT"):
        render(TritonModel("m", (Tensor("x", "FLOAT"),), ()))


def test_it_stands_alone_wherever_it_is_put(source, checkpoint, tmp_path):
    made = write_repository(plan_repository(planned(), source, checkpoint), tmp_path / "here")
    moved = tmp_path / "there" / "renamed"
    shutil.copytree(made, moved)
    shutil.rmtree(made)
    for file in moved.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8")
            assert str(tmp_path) not in text and str(source.parent) not in text, file
            if file.suffix == ".py":
                assert "from nemobuild" not in text and "import nemobuild" not in text, file
    for file in moved.glob("*/1/lib/*/"):
        assert (file / "__init__.py").exists() or file.name == "__pycache__"
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "class Blocked:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.split('.')[0] == 'nemobuild': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import importlib, pathlib\n"
        "for f in pathlib.Path(sys.argv[1], 'lib').rglob('*.py'):\n"
        "    importlib.import_module('.'.join(f.relative_to(sys.argv[1]).with_suffix('').parts))\n"
        "heavy = {'torch', 'pydantic', 'tritonclient', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for model in ("chat", "preprocessing", "postprocessing", "tensorrt_llm_collect", "tensorrt_llm"):
        folder = moved / model / "1"
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_same_inputs_give_the_same_bytes(source, checkpoint):
    first, second = (plan_repository(planned(), source, checkpoint).files for _ in range(2))
    assert first == second
    other = plan_repository(planned(reasoning={"policy": "nemotron-super-v1.5", "default": "off"}), source, checkpoint)
    differing = {name for name, content in other.files.items() if first[name] != content}
    models = ("chat", "preprocessing", "postprocessing")
    assert differing == {"manifest.json", *(f"{m}/1/assets/runtime.json" for m in models)}


def test_the_manifest_names_every_file(source, checkpoint):
    files = plan_repository(planned(), source, checkpoint).files
    manifest = json.loads(files["manifest.json"])
    assert set(manifest["files"]) == set(files) - {"manifest.json"}
    assert len(manifest["key"]) == 64 and manifest["profile"]["runtime"] == "cpu"
    assert manifest["engine"]["key"] == json.loads((checkpoint / "manifest.json").read_text())["key"]


def test_end_ids_of_the_generation_config_come_first(source, checkpoint, tmp_path):
    folder = shutil.copytree(source, tmp_path / "hf")
    (folder / "generation_config.json").write_text('{"eos_token_id": [261, 260]}')
    files = plan_repository(planned(), folder, checkpoint).files
    assert json.loads(files["chat/1/assets/runtime.json"])["end_token_ids"] == [261, 260, 257]


def test_named_templates_and_template_files(source, checkpoint, tmp_path):
    folder = shutil.copytree(source, tmp_path / "hf")
    text = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": text}]})
    )
    assert plan_repository(planned(), folder, checkpoint).files["chat/1/assets/chat_template.jinja"] == text.encode()
    (folder / "chat_template.jinja").write_text(text + "{# file #}")
    assert (
        plan_repository(planned(), folder, checkpoint)
        .files["chat/1/assets/chat_template.jinja"]
        .endswith(b"{# file #}")
    )


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), IntegrityError, "tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), IntegrityError, "tokenizer.json"),
        (
            lambda f: (f / "config.json").write_text(json.dumps(tiny_config(vocab_size=264, eos_token_id=1))),
            IntegrityError,
            "more tokens",
        ),
        (lambda f: (f / "chat_template.jinja").write_text("{% if %}"), IntegrityError, "chat template"),
        (
            lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no') }}"),
            IntegrityError,
            "chat template",
        ),
        (lambda f: (f / "chat_template.jinja").write_text(templates.PLAIN), UsageError, "reasoning.policy"),
        (lambda f: (f / "chat_template.jinja").write_text("always the same"), IntegrityError, "drops the messages"),
        (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff"), IntegrityError, "UTF-8"),
        (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'), IntegrityError, "eos_token_id"),
        (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [999]}'), IntegrityError, "999"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"bos_token": "<none>"}'), IntegrityError, "bos_token"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"bos_token": 5}'), IntegrityError, "bos_token"),
        (lambda f: (f / "tokenizer_config.json").write_text('{"chat_template": 5}'), IntegrityError, "chat_template"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), IntegrityError, "tokenizer_config.json"),
    ],
)
def test_a_broken_source_is_found_before_anything_is_written(source, checkpoint, tmp_path, damage, kind, words):
    folder = shutil.copytree(source, tmp_path / "hf")
    damage(folder)
    with pytest.raises(kind, match=words):
        plan_repository(planned(), folder, checkpoint)


def test_policies_and_ranks_must_fit(source, checkpoint, tmp_path):
    with pytest.raises(UsageError, match=r"nemotron-v1"):
        reasoning_policy("nemotron-v2")  # a profile cannot name it: see the tests of its fields
    with pytest.raises(IntegrityError, match="rank1"):
        plan_repository(planned(checkpoint={"tensor_parallel": 2}), source, checkpoint)
    with pytest.raises(UsageError, match=r"config\.json"):
        plan_repository(planned(), source, tmp_path)


def test_the_checkpoint_must_be_of_the_same_model_and_split(source, checkpoint, tmp_path):
    other = write_model(tmp_path / "other", tiny_config(rope_theta=20000.0), template=templates.SUPER_V15)
    with pytest.raises(IntegrityError, match="rope"):
        plan_repository(planned(), other, checkpoint)
    made = convert(open_snapshot(other), tmp_path / "made").output
    with pytest.raises(IntegrityError, match="rope"):
        plan_repository(planned(), source, made)
    split = convert(open_snapshot(source), tmp_path / "split", pp=2).output
    with pytest.raises(IntegrityError, match="pp 2"):
        plan_repository(planned(checkpoint={"tensor_parallel": 2}), source, split)


def test_other_weights_give_another_key(source, checkpoint, tmp_path):
    other = write_model(tmp_path / "other", seed=1, template=templates.SUPER_V15.replace("tool_notes", "''"))
    made = convert(open_snapshot(other), tmp_path / "checkpoint").output
    first, second = (
        json.loads(plan_repository(planned(), s, c).files["manifest.json"])["key"]
        for s, c in ((source, checkpoint), (other, made))
    )
    assert first != second


def test_the_target_is_whole_or_not_there(source, checkpoint, tmp_path):
    plan = plan_repository(planned(), source, checkpoint)
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        write_repository(plan, tmp_path / "taken")
    broken = RepositoryPlan({**plan.files, "zz": tmp_path / "missing"})
    with pytest.raises(UsageError):
        write_repository(broken, tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        write_repository(plan, tmp_path / "file" / "below")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small file system")
def test_a_full_disk_leaves_nothing(source, checkpoint, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(DoesNotFit, match="disk is full"):
            write_repository(plan_repository(planned(), source, checkpoint), small / "repository")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
