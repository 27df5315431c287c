"""The command line: what is shown where, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nemobuild.config import EngineConfig, load_profile, profile_names
from nemobuild.errors import (
    ChildFailed,
    DoesNotFit,
    IntegrityError,
    NemobuildError,
    RemoteError,
    ToolchainError,
    UsageError,
    VerificationFailed,
)
from nemobuild.units import format_bytes, format_seconds
from tests.tiny import write_model


def run(*arguments: str, cwd=None, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nemobuild", *arguments], capture_output=True, text=True, cwd=cwd, check=False, **more
    )


def test_exit_statuses_are_the_published_ones():
    table = {
        UsageError: 2,
        DoesNotFit: 3,
        ToolchainError: 4,
        IntegrityError: 5,
        RemoteError: 6,
        VerificationFailed: 7,
        ChildFailed: 8,
    }
    assert {kind: kind.exit_status for kind in NemobuildError.__subclasses__()} == table


def test_convert_verify_and_what_they_print(tmp_path):
    write_model(tmp_path / "hf")
    done = run("convert", "hf", "-o", "out/checkpoint", "--tp", "2", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (
        set(report["files"]) == {"config.json", "rank0.safetensors", "rank1.safetensors"} or len(report["files"]) >= 2
    )
    assert done.stderr == ""
    done = run("verify", "out/checkpoint", "--against", "hf", cwd=tmp_path)
    assert done.returncode == 0 and "equal to its source" in done.stdout
    done = run("verify", "out/checkpoint", "--against", "hf", "--prompt", "Hi", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["passed"] is True


def test_a_checkpoint_that_differs_ends_with_7(tmp_path):
    write_model(tmp_path / "hf")
    write_model(tmp_path / "other", seed=1)
    assert run("convert", "hf", "-o", "checkpoint", cwd=tmp_path).returncode == 0
    done = run("verify", "checkpoint", "--against", "other", "--json", cwd=tmp_path)
    assert done.returncode == 7
    assert json.loads(done.stdout)["passed"] is False
    assert json.loads(done.stderr)["error"]["code"] == "checkpoint-differs"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("convert", "nowhere", "-o", "x"), 2, "nowhere"),
        (("convert", "hf"), 2, "-o FOLDER"),
        (("convert", "hf", "-o", "hf"), 2, "hf"),
        (("convert", "hf", "-o", "x", "--tp", "3"), 2, "3"),
        (("convert", "hf", "-o", "x", "--tp", "0"), 2, "--tp"),
        (("convert", "hf", "-o", "x", "--precision", "int4"), 2, "int4"),
        (("convert", "broken", "-o", "x"), 5, "config.json"),
        (("convert", "org/model", "-o", "x"), 2, "nemobuild fetch"),
        (("fetch", "org/model"), 2, "-o FOLDER"),
        (("inspect", "super-49b"), 2, "super-49b-v1"),
        (("repo", "smollm2-gpu"), 2, "smollm2-cpu"),
        (("verify", "hf"), 2, "--against"),
        (("serve", "hf"), 2, "not a model repository"),
        (("serve", "nowhere"), 2, "not a model repository"),
        (("chat", "hi", "--url", "127.0.0.1:9"), 6, "nemobuild serve"),
        (("chat", "hi", "--tools", "missing.json"), 2, "missing.json"),
        (("frobnicate",), 2, "frobnicate"),
        (("convert", "hf", "-o", "/etc/passwd/x/y"), 2, "/etc/passwd"),
        (("convert", "hf", "-o", "new/x", "--tp", "7"), 2, "7"),
        (("repo", "smollm2-cpu", "--source", "hf", "--engine", "hf", "-o", "x"), 5, "hidden_size"),
        (("verify", "hf", "--against", "bare", "--prompt", "hello"), 5, "tokenizer.json"),
        (("chat", "hi", "--tools", "bytes.json"), 5, "UTF-8"),
        (("chat", "hi", "--max-tokens", "99999999999"), 2, "max_tokens"),
        (("chat", "hi", "--seed", str(2**64)), 2, "seed"),
        (("fetch", "hf", "-o", "x"), 2, "nothing to fetch"),
        (("serve", "hf", "--http-port", "9000", "--grpc-port", "9000"), 2, "9000"),
    ],
)
def test_bad_use_ends_with_one_message_and_nothing_written(tmp_path, arguments, status, words):
    write_model(tmp_path / "hf")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    write_model(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    before = sorted(tmp_path.rglob("*"))
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_flag_as_json():
    done = run("convert", "x", "--tp", "x", "--json")
    assert done.returncode == 2 and json.loads(done.stderr)["error"]["code"] == "usage"


def test_input_that_is_not_utf8_is_refused():
    done = subprocess.run([sys.executable, "-m", "nemobuild", "chat"], input=b"\xff", capture_output=True, check=False)
    assert done.returncode == 2 and b"UTF-8" in done.stderr and b"Traceback" not in done.stderr


def test_help_and_version():
    assert run("--version").stdout.startswith("nemobuild ")
    text = run("--help").stdout
    assert all(c in text for c in ("profiles", "inspect", "fetch", "convert", "verify", "repo", "serve", "chat"))


def test_inspect_takes_a_quantised_model(tmp_path):
    folder = write_model(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    plain = json.loads(run("inspect", str(folder), "--json").stdout)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    assert json.loads(run("inspect", str(folder), "--json").stdout) == plain


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--precision", "bf16", "--samples", "3"), "--samples"),
        (("--precision", "bf16", "--tokens-per-sample", "3"), "--tokens-per-sample"),
        (("--precision", "bf16", "--kv-scales", "measured"), "--kv-scales"),
        (("--precision", "fp8", "--kv-scales", "raw"), "'raw' is unknown"),
        (("--precision", "fp8", "--kv-scales", "measured"), "--kv-cache fp8"),
        (("--precision", "fp8", "--kv-cache", "fp8", "--format", "hf", "--kv-scales", "measured"), "trtllm"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments, word, tmp_path):
    write_model(tmp_path / "hf")
    done = run("convert", "hf", "-o", "out", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and word in done.stderr
    assert not (tmp_path / "out").exists()


def test_inspect_without_network_or_heavy_libraries():
    code = (
        "import sys; from nemobuild.__main__ import main\n"
        "try: main()\n"
        "finally:\n"
        "    heavy = {'torch', 'numpy', 'tritonclient', 'tokenizers', 'huggingface_hub', 'jinja2'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["inspect", "super-49b-v1.5"], ["profiles"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    done = run("inspect", "super-49b-v1.5", "--json")
    assert json.loads(done.stdout)["parameters"] == 49_867_145_216


def test_a_reader_that_goes_away_is_no_error():
    script = f"{sys.executable} -m nemobuild inspect ultra-253b-v1 --json | head -c 10"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_profiles_are_read_strictly(tmp_path):
    for name in profile_names():
        assert isinstance(load_profile(name), EngineConfig)
    good = "description: d\nruntime: cpu\nmodel: {source: s}\nreasoning: {policy: none}\n"
    limits = "limits: {max_batch_size: 4, max_context_tokens: 64"
    file = tmp_path / "p.yaml"
    for text, words in (
        (good + limits + ", max_batchsize: 3}", "max_batch_size"),
        (good + limits.replace("4", "0") + "}", "limits.max_batch_size"),
        (good + limits.replace("4", "four") + "}", "limits.max_batch_size"),
        (good + limits + ", max_prompt_tokens: 64}", "max_prompt_tokens"),
        (good + limits + ", kv_cache_tokens: 63}", "kv_cache_tokens"),
        (good.replace("cpu", "tpu") + limits + "}", "runtime"),
        (good, "limits"),
        ("a: [", "not valid YAML"),
        ("", "is wrong"),
        ("&a [*a]", "is wrong"),
        ("description: 2024-13-45", "not valid YAML"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=words):
            load_profile(str(file))
    with pytest.raises(UsageError, match=r"missing\.yaml"):
        load_profile(str(tmp_path / "missing.yaml"))


def test_units():
    assert format_bytes(51_969_556_480) == "48.40 GiB" and format_bytes(1023) == "1023 B"
    assert [format_seconds(s) for s in (0.85, 12.34, 245, 7800)] == ["850 ms", "12.3 s", "4 min 05 s", "2 h 10 min"]


def test_errors_as_json_and_text():
    error = NemobuildError("a-code", "What.", why="Why.", next="Next.")
    assert str(error) == "What. Why. Next."
    assert error.as_dict() == {
        "error": {"code": "a-code", "what": "What.", "why": "Why.", "next": "Next.", "exit_status": 1}
    }
