"""The demo model: the real weights out of the package index, in both forms."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import jinja2
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tokenizers import Tokenizer

from nemobuild import demo
from nemobuild.demo import NAS_BLOCKS_WITHOUT_ATTENTION, Form, write_smollm2
from nemobuild.errors import DoesNotFit, ToolchainError, UsageError
from nemobuild.model.forward import forward, hf_blocks, hf_ends
from nemobuild.weights.safetensors import ShardWriter, read_array
from nemobuild.weights.snapshot import open_snapshot

pytestmark = pytest.mark.xdist_group("demo-model")
ANSWER = "The capital of France is Paris."
TEXTS = [
    "The quick brown fox, 12345 times.",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "हिन्दी में नमस्ते",
    "中文和日本語も한국어도",
    "🙂🏳️‍🌈 family: 👨‍👩‍👧‍👦",
    "  two spaces\n\n\ttabs and \r\n lines  ",
    "don't we'll I'M",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Form, Path]:
    base = tmp_path_factory.mktemp("smollm2")
    return {"llama": write_smollm2(base / "llama", form="llama"), "nas": write_smollm2(base / "nas", form="nas")}


@pytest.fixture(scope="module")
def tokenizer(folders: dict[Form, Path]) -> Tokenizer:
    return Tokenizer.from_file(str(folders["nas"] / "tokenizer.json"))


def test_the_plain_form_is_the_published_model(folders: dict[Form, Path]) -> None:
    snapshot = open_snapshot(folders["llama"])
    spec = snapshot.spec
    assert spec.parameter_count == 134_515_008
    assert snapshot.weight_bytes == 2 * 134_515_008
    assert (spec.model_type, spec.tied_embeddings, spec.max_context_tokens) == ("llama", True, 8192)
    assert (spec.rope.theta, spec.norm_epsilon, spec.end_token_ids) == (100_000, 1e-5, (2, 0))
    assert {t.dtype for t in snapshot.tensors.values()} == {"BF16"}


def test_the_block_wise_form_lacks_two_attentions_and_nothing_else(folders: dict[Form, Path]) -> None:
    plain, nas = open_snapshot(folders["llama"]), open_snapshot(folders["nas"])
    without = [i for i, kv_heads in enumerate(nas.spec.kv_heads_per_block) if kv_heads == 0]
    assert without == list(NAS_BLOCKS_WITHOUT_ATTENTION) == [17, 28]
    absent = plain.tensors.keys() - nas.tensors.keys()
    assert len(absent) == 10
    assert all(f"layers.{i}." in n for n in absent for i in without if f".{i}." in n)
    assert nas.spec.parameter_count == 134_515_008 - 2 * (2 * 576 * 576 + 2 * 192 * 576 + 576)
    for name, tensor in nas.tensors.items():
        assert np.array_equal(read_array(tensor, bits=True), read_array(plain.tensors[name], bits=True)), name


@pytest.mark.parametrize("form", ["llama", "nas"])
def test_it_knows_the_capital_of_france(form: Form, folders: dict[Form, Path], tokenizer: Tokenizer) -> None:
    settings = json.loads((folders[form] / "tokenizer_config.json").read_text())
    prompt = jinja2.Template(settings["chat_template"]).render(
        messages=[{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    answer_ids = tokenizer.encode(f"{ANSWER}{settings['eos_token']}", add_special_tokens=False).ids
    snapshot = open_snapshot(folders[form])

    def read(name: str) -> Any:
        return read_array(snapshot.tensors[name])

    spec = snapshot.spec
    (logits,) = forward(spec, hf_ends(spec, read), hf_blocks(spec, read), [[*prompt_ids, *answer_ids]])
    # Greedy decoding gives this answer exactly if every token of it is the best one after what comes before.
    assert logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist() == answer_ids
    assert answer_ids[-1] in spec.end_token_ids


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    # The model's authors left out bytes that their data had not: six control characters, and planes above 3.
    known = st.characters(
        exclude_categories=["Cs"], max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d"
    )

    @given(st.text(known))
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text

    check()


def test_tokens_are_those_of_the_model(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 49152
    # As the published tokenizer gives them: digits one by one, a leading space inside the token, ids of the specials.
    assert tokenizer.encode("2024", add_special_tokens=False).tokens == ["2", "0", "2", "4"]
    assert tokenizer.encode("year 2024", add_special_tokens=False).tokens == ["year", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.encode("What is the capital of France?").ids == [1780, 314, 260, 3575, 282, 4649, 47]
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>").ids
    assert (ids[0], ids[-1], tokenizer.token_to_id("<|endoftext|>")) == (1, 2, 0)
    assert tokenizer.decode(ids) == "user\nHi"  # specials are known as such


def test_the_folder_says_where_it_comes_from(folders: dict[Form, Path]) -> None:
    for form, folder in folders.items():
        source = json.loads((folder / "source.json").read_text())
        assert source == {"package": demo.REQUIREMENT, "sha256": demo.SHA256, "form": form}
        assert "Apache License" in (folder / "LICENSE").read_text()
        assert "HuggingFaceTB" in (folder / "NOTICE").read_text()
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert "17, 28" in (folders["nas"] / "NOTICE").read_text()


def test_a_second_call_does_nothing_and_other_folders_are_left_alone(folders: dict[Form, Path], tmp_path: Path) -> None:
    before = {f.name: f.stat().st_mtime_ns for f in folders["nas"].iterdir()}
    assert write_smollm2(folders["nas"], form="nas") == folders["nas"]
    assert {f.name: f.stat().st_mtime_ns for f in folders["nas"].iterdir()} == before
    for folder in (folders["llama"], tmp_path):
        with pytest.raises(UsageError) as caught:
            write_smollm2(folder, form="nas")
        assert caught.value.code == "folder-exists"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(DoesNotFit):
        write_smollm2(tmp_path / "model", form="nas")
    assert list(tmp_path.iterdir()) == []


def test_without_gguf_the_next_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ToolchainError) as caught:
        write_smollm2(tmp_path / "model", form="llama")
    assert "nemobuild[demo]" in caught.value.next
    assert list(tmp_path.iterdir()) == []


@given(
    arrays(np.uint32, 64, elements=st.integers(0, 0xFF7F)),  # upper half: all finite values of both signs
    arrays(np.uint32, 64, elements=st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])),
)
def test_rounding_to_bf16_is_to_nearest_even(upper: np.ndarray, lower: np.ndarray) -> None:
    values = (upper << 16 | lower).view(np.float32)
    values = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(demo._bf16(values), expected)
