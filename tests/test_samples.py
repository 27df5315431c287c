"""Calibration texts: what ships, how a line becomes token ids, and every way in which a file can be wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from nemobuild.convert.samples import LANGUAGES, SampleSet, default_calibration, held_out, load_samples, prompt_digest
from nemobuild.errors import IntegrityError, NemobuildError, UsageError
from nemobuild.model.hf_config import load_spec
from tests.templates import SUPER_V15, TOOL_NOTES
from tests.tiny import EOT, tiny_config, write_model

TEMPLATE = SUPER_V15.replace("tool_notes", repr(TOOL_NOTES))
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("samples") / "m", tiny_config(max_position_embeddings=2048), template=TEMPLATE
    )


def load(model: Path, folder: Path, *lines: Any, **options: Any) -> SampleSet:
    file = folder / "texts.jsonl"
    file.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return load_samples(file, model, load_spec(model), **options)


def text_of(model: Path, ids: Sequence[int]) -> str:
    return Tokenizer.from_file(str(model / "tokenizer.json")).decode(list(ids), skip_special_tokens=False)


def entries(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_shipped_texts_are_as_promised(model: Path) -> None:
    spec = load_spec(model)
    texts = load_samples(default_calibration(), model, spec, tokens_per_sample=128)
    held = load_samples(held_out(), model, spec, tokens_per_sample=128)
    assert len(texts.samples) >= 128 and len(held.samples) >= 24
    for found, least in ((texts, 12), (held, 3)):
        languages = Counter(s.language for s in found.samples)
        assert set(languages) == set(LANGUAGES) and min(languages.values()) >= least
    kinds = Counter(s.kind for s in texts.samples)
    assert min(kinds[k] for k in ("chat", "reasoning", "code", "math", "tools", "long", "prose")) >= 8
    # Any beginning of the file is varied too, since a profile may use only that.
    assert {s.language for s in texts.samples[:8]} == set(LANGUAGES)
    assert len({s.kind for s in texts.samples[:48]}) >= 5


def test_the_shipped_texts_do_not_repeat_and_held_out_ones_are_apart() -> None:
    texts, held = entries(default_calibration()), entries(held_out())
    words = [e["text"] if "text" in e else json.dumps(e["messages"], ensure_ascii=False) for e in (*texts, *held)]
    lines = [line for text in words for line in text.replace("\\n", "\n").split("\n") if len(line) > 60]
    assert len(set(lines)) == len(lines)


def test_a_conversation_is_written_as_the_model_would_see_it(model: Path, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "Hi.", "reasoning_content": "Greet."}
    line = {"messages": [*HELLO, answer]}
    on, off = load(model, tmp_path, line | {"reasoning": "on"}, line | {"reasoning": "off"}).samples
    head = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    assert text_of(model, on.token_ids).startswith(head)
    assert text_of(model, on.token_ids).endswith("<think>\nGreet.\n</think>\n\nHi.<|eot_id|>")
    assert text_of(model, off.token_ids).endswith("assistant<|end_header_id|>\n\n<think>\n\n</think>\n\nHi.<|eot_id|>")
    assert on.token_ids[-1] == EOT and on.token_ids.count(256) == 1


def test_unmarked_conversations_switch_reasoning_on_and_off_in_turn(model: Path, tmp_path: Path) -> None:
    found = load(model, tmp_path, *[{"messages": HELLO}] * 4).samples
    closed = [text_of(model, s.token_ids).endswith("<think>\n\n</think>\n\n") for s in found]
    assert closed == [False, True, False, True]


def test_tool_calls_are_written_in_the_models_tags(model: Path, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    (sample,) = load(model, tmp_path, {"messages": [*HELLO, turn], "tools": tools}, tokens_per_sample=2048).samples
    text = text_of(model, sample.token_ids)
    assert text.endswith('<TOOLCALL>[{"name": "look", "arguments": {"at": "sea"}}]</TOOLCALL><|eot_id|>')
    assert '<AVAILABLE_TOOLS>[{"name": "look"' in text


def test_text_is_taken_as_it_is_and_cut(model: Path, tmp_path: Path) -> None:
    found = load(model, tmp_path, {"text": "abcdef", "language": "en"}, {"text": "ab"}, tokens_per_sample=4)
    assert [text_of(model, s.token_ids) for s in found.samples] == ["abcd", "ab"]
    assert found.tokens == 6 and found.samples[0].language == "en" and found.samples[1].line == 2
    assert len(load(model, tmp_path, *[{"text": "a"}] * 5, count=3).samples) == 3


def test_a_base_model_gets_the_words_alone(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    turns = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]
    (sample,) = load(model, tmp_path, {"messages": turns}).samples
    assert text_of(model, sample.token_ids) == "One.\n\nTwo."


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Line 2 .* not valid JSON"),
        ("[1]", "an object is needed"),
        ({"txt": "a"}, "'txt' is unknown; Did you mean 'text'"),
        ({}, "exactly one of text and messages"),
        ({"text": "a", "messages": HELLO}, "exactly one of text and messages"),
        ({"text": 3}, "text is not a string"),
        ({"text": " \n"}, "text is not a string with something in it"),
        ({"messages": []}, "the list is empty"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": HELLO, "reasoning": "maybe"}, "reasoning is 'maybe'"),
        ({"messages": HELLO, "tools": [3]}, r"tools\[0\]"),
        ({"text": "a", "language": 1}, "language is not a string"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "a", "reasoning_content": 1}]}, "reasoning_content"),
        ('{"text": "\\ud800"}', "not valid Unicode"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_broken_line_is_named(model: Path, tmp_path: Path, line: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load(model, tmp_path, {"text": "good"}, line)
    assert caught.value.code == "calibration-broken"


def test_files_without_texts_are_refused(model: Path, tmp_path: Path) -> None:
    for content in ("", "\n \n"):
        with pytest.raises(UsageError, match="holds no text"):
            load(model, tmp_path, content)
    with pytest.raises(NemobuildError, match="absent"):
        load_samples(tmp_path / "absent.jsonl", model, load_spec(model))
    with pytest.raises(UsageError, match="0 samples"):
        load(model, tmp_path, {"text": "a"}, count=0)


def test_no_more_samples_than_there_are(model: Path, tmp_path: Path) -> None:
    assert len(load(model, tmp_path, {"text": "a"}, {"text": "b"}, count=2).samples) == 2
    with pytest.raises(UsageError, match=r"3 samples were asked for; .* holds 2"):
        load(model, tmp_path, {"text": "a"}, {"text": "b"}, count=3)


def test_lines_that_would_take_the_tokenizer_long_are_refused(model: Path, tmp_path: Path) -> None:
    assert load(model, tmp_path, {"text": "a b " * (1 << 17)}, tokens_per_sample=7).tokens == 7
    with pytest.raises(UsageError, match=r"Line 2 .* longer than 1,048,576 bytes"):
        load(model, tmp_path, {"text": "a"}, {"text": "a" * (1 << 20)})


def test_token_ids_take_little_room(model: Path, tmp_path: Path) -> None:
    (sample,) = load(model, tmp_path, {"text": "a" * 2000}).samples
    assert len(sample.token_ids) == 512 and memoryview(sample.token_ids).nbytes == 4 * 512


def test_texts_beyond_the_context_are_refused(model: Path, tmp_path: Path) -> None:
    context = load_spec(model).max_context_tokens
    with pytest.raises(UsageError, match=f"{context + 1} tokens do not fit"):
        load(model, tmp_path, {"text": "a"}, tokens_per_sample=context + 1)
    with pytest.raises(UsageError, match=r"Line 2 .* has"):
        load(model, tmp_path, {"text": "a"}, {"text": "a" * (context + 1)}, tokens_per_sample=None)
    assert load(model, tmp_path, {"text": "a" * context}, tokens_per_sample=None).tokens == context


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match="cannot be read"):
        load(model, tmp_path, {"text": "a"})
    (model / "tokenizer.json").unlink()
    with pytest.raises(IntegrityError, match=r"no tokenizer\.json"):
        load(model, tmp_path, {"text": "a"})


def test_the_digest_is_that_of_the_file(model: Path, tmp_path: Path) -> None:
    first = load(model, tmp_path, {"text": "a"}, {"text": "b"})
    assert load(model, tmp_path, {"text": "a"}, {"text": "b"}).digest == first.digest
    assert load(model, tmp_path, {"text": "a"}, {"text": "c"}).digest != first.digest


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_what_makes_a_prompt_has_one_digest(model: Path, tmp_path: Path, name: str) -> None:
    mine = tmp_path / "m"
    mine.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (mine / file).write_bytes((model / file).read_bytes())
    before = prompt_digest(mine, "none")
    assert before == prompt_digest(model, "none"), "whatever else there is, and wherever it is"
    assert len({before, prompt_digest(mine, None), prompt_digest(mine, "nemotron-v1")}) == 3
    with (mine / name).open("a") as stream:
        stream.write(" ")
    assert prompt_digest(mine, "none") != before
