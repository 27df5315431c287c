"""A slice: a few blocks of a model as a small model, from the Hub by ranges of bytes, or from a folder."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nemobuild.ci import convert_options, verify_options
from nemobuild.cli.app import app
from nemobuild.config import load_profile
from nemobuild.errors import DoesNotFit, IntegrityError, NemobuildError, RemoteError, UsageError
from nemobuild.model.hf_config import load_spec, spec_from_config
from nemobuild.model.slicing import distinct_blocks, sliced_config, sliced_names, sliced_spec
from nemobuild.model.spec import Attention, Block, Linear, Mlp, ModelSpec, NoOp
from nemobuild.resources import data_folder
from nemobuild.weights import hub as whole
from nemobuild.weights.safetensors import read_array, read_header
from nemobuild.weights.slice import folder_origin, hub_origin, plan_slice, write_slice
from nemobuild.weights.snapshot import open_snapshot
from tests.hub_server import TOKEN, Fault, HubServer, hub_server
from tests.tiny import llama_config, tiny_config, write_model

REPO = "maker/tiny-nemotron"
MODELS = sorted((data_folder("engine_configs") / "models").glob("*.json"))
BLOCKS = (8, 0, 4)


@pytest.fixture(autouse=True)
def apart_from_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NEMOBUILD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda s, sleep=time.sleep: sleep(min(s, 0.01)))  # the library's pauses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "model", template="{{ messages }}")


@pytest.fixture
def hub(model: Path) -> Iterator[HubServer]:
    with hub_server() as server:
        server.add(REPO, contents(model) | {"pytorch_model.bin": b"a pickle", "README.md": b"# Tiny"})
        yield server


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def get(hub: HubServer, target: Path, blocks: Sequence[int] | None = BLOCKS, **more: Any) -> Path:
    progress = more.pop("progress", None)
    origin = hub_origin(REPO, more.pop("revision", "main"), endpoint=hub.endpoint, pauses_s=(0.01, 0.01), **more)
    return write_slice(plan_slice(origin, blocks), target, progress=progress)


def refused(hub: HubServer, target: Path, kind: type[NemobuildError], code: str, **more: Any) -> NemobuildError:
    with pytest.raises(kind) as caught:
        get(hub, target, **more)
    assert (type(caught.value), caught.value.code) == (kind, code)
    assert caught.value.next
    assert not target.exists()
    return caught.value


def asked(hub: HubServer) -> dict[str, list[tuple[int, int]]]:
    """Ranges (start, end) of shards that the second host was asked for; every request must have one."""
    found: dict[str, list[tuple[int, int]]] = {}
    for _, path, headers in hub.requests:
        if path.startswith("/cdn/") and path.endswith(".safetensors"):
            start, end = headers["Range"].removeprefix("bytes=").split("-")
            found.setdefault(path.rsplit("/", 1)[1], []).append((int(start), int(end) + 1))
    return found


def assert_equal(slice_folder: Path, model: Path, blocks: Sequence[int]) -> None:
    """Every tensor, byte for byte; and no other."""
    source, made = open_snapshot(model), open_snapshot(slice_folder)
    assert made.spec.blocks == tuple(source.spec.blocks[i] for i in blocks)
    names = sliced_names(source.spec, blocks)
    assert list(names) == list(made.tensors)
    for new, old in names.items():
        assert made.tensors[new].dtype == source.tensors[old].dtype
        assert (read_array(made.tensors[new], bits=True) == read_array(source.tensors[old], bits=True)).all(), new


def test_a_slice_holds_what_the_model_holds(hub: HubServer, model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = get(hub, tmp_path / "slice", progress=lambda done, total: seen.append((done, total)))
    assert_equal(folder, model, BLOCKS)
    assert seen[-1][0] == seen[-1][1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    assert not (folder / "pytorch_model.bin").exists()
    before, after = (json.loads((f / "config.json").read_text()) for f in (model, folder))
    assert after["num_hidden_layers"] == 3
    assert after["block_configs"] == [before["block_configs"][i] for i in BLOCKS]
    assert {k: v for k, v in after.items() if before[k] != v}.keys() == {"num_hidden_layers", "block_configs"}
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith("slice")] == ["slice"]


def test_only_the_ranges_of_its_tensors_are_asked_for(hub: HubServer, model: Path, tmp_path: Path) -> None:
    get(hub, tmp_path / "slice", (0, 1))
    spec = load_spec(model)
    wanted = set(sliced_names(spec, (0, 1)).values())
    ranges = asked(hub)
    for shard in model.glob("*.safetensors"):
        header = read_header(shard)
        start = min(t.offset for t in header.values())
        expected = {(0, 8), (8, start)} | {(t.offset, t.offset + t.nbytes) for n, t in header.items() if n in wanted}
        assert sorted(ranges[shard.name]) == sorted(expected), "each once, and nothing besides"
        assert sum(b - a for a, b in ranges[shard.name]) < shard.stat().st_size
    # The account's token stays with the Hub, and nothing is asked for twice.
    assert all("bytes=" in h["Range"] for _, p, h in hub.requests if "/resolve/" in p and p.endswith(".safetensors"))


def test_a_shard_without_a_wanted_tensor_is_not_touched(hub: HubServer, tmp_path: Path) -> None:
    source = write_model(tmp_path / "many", shards=20)
    hub.add(REPO, contents(source))
    get(hub, tmp_path / "slice", (0,))
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert asked(hub).keys() == {index[name] for name in sliced_names(load_spec(source), (0,)).values()}
    assert len(asked(hub)) < 20


def test_what_is_recorded_says_what_was_checked(hub: HubServer, tmp_path: Path) -> None:
    folder = get(hub, tmp_path / "slice")
    record = json.loads((folder / "source.json").read_text())
    assert record["slice_of"] == {"repo": REPO, "commit": hub.repos[REPO].branches["main"]}
    assert (record["blocks"], record["of_blocks"]) == (list(BLOCKS), 10)
    assert "could not be held against the digests" in record["checked"]
    assert record["files"].keys() == {f.name for f in folder.iterdir()} - {"source.json"}
    # The same slice has the same identity elsewhere, and it is not taken for the model.
    assert open_snapshot(folder).fingerprint == open_snapshot(get(hub, tmp_path / "other")).fingerprint
    with pytest.raises(UsageError, match="something else"):
        whole.fetch(REPO, "main", folder, endpoint=hub.endpoint, pauses_s=())


def test_a_slice_that_is_there_is_kept(hub: HubServer, model: Path, tmp_path: Path) -> None:
    folder = get(hub, tmp_path / "slice")
    hub.requests.clear()
    assert get(hub, folder) == folder
    assert sum(b - a for ranges in asked(hub).values() for a, b in ranges) < 20_000, "headers only"
    for changes in ({"blocks": (0,)}, {"revision": hub.add(REPO, contents(model) | {"README.md": b"newer"})}):
        with pytest.raises(UsageError) as caught:
            get(hub, folder, **changes)
        assert caught.value.code == "folder-exists"
    with next(folder.glob("*.safetensors")).open("r+b") as stream:
        stream.truncate(100)
    hub.repos[REPO].branches["main"] = json.loads((folder / "source.json").read_text())["slice_of"]["commit"]
    with pytest.raises(IntegrityError) as damaged:
        get(hub, folder)
    assert damaged.value.code == "snapshot-damaged"


def test_a_cut_goes_on_where_it_was(
    hub: HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemobuild.weights.hub_client._CHUNK_BYTES", 50)  # a piece that did not end is lost
    hub.faults.append(Fault("/model-0000", "cut", times=30, after=1000))
    folder = get(hub, tmp_path / "slice")
    assert_equal(folder, model, BLOCKS)
    starts = [start for ranges in asked(hub).values() for start, _ in ranges]
    assert any(b - a == 1000 for a, b in itertools.permutations(starts, 2))


def test_a_run_that_failed_keeps_whole_shards(hub: HubServer, model: Path, tmp_path: Path) -> None:
    origin = hub_origin(REPO, "main", endpoint=hub.endpoint, pauses_s=())
    cut = plan_slice(origin, BLOCKS)
    last = cut.tensors["lm_head.weight"]

    def fails(info: Any, stop: Any) -> Iterator[bytes]:
        if info is last:
            raise RemoteError("no-network", "gone")
        return origin.read(info, stop)

    with pytest.raises(RemoteError, match="gone"):
        write_slice(dataclasses.replace(cut, origin=dataclasses.replace(origin, read=fails)), tmp_path / "slice")
    (stage,) = (f for f in tmp_path.iterdir() if f.name.startswith("slice.partial-"))
    kept = {f.name: f.stat().st_mtime_ns for f in stage.glob("*.safetensors")}
    assert kept and "model-00005-of-00005.safetensors" not in kept
    (stage / "stray.txt").write_text("stray")
    older = tmp_path / "slice.partial-of-another"
    older.mkdir()
    hub.requests.clear()
    folder = write_slice(cut, tmp_path / "slice")
    assert_equal(folder, model, BLOCKS)
    assert kept.items() <= {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}.items()
    assert not (folder / "stray.txt").exists()
    assert not stage.exists() and not older.exists()


@pytest.mark.parametrize(
    ("fault", "kind", "code"),
    [
        (Fault("/cdn/", "no-range", times=None), RemoteError, "no-ranges"),
        (Fault("/cdn/", 503, times=None), RemoteError, "hub-error"),
        (Fault("/cdn/", 429, times=None), RemoteError, "rate-limited"),
        (Fault("/cdn/", "cut", times=None, after=0), RemoteError, "no-network"),
        (Fault("/cdn/", "longer", times=None), IntegrityError, "wrong-bytes"),
        (Fault("tokenizer_config.json", "other-bytes", times=None), IntegrityError, "wrong-bytes"),
    ],
)
def test_faults_of_the_hub(fault: Fault, kind: type[NemobuildError], code: str, hub: HubServer, tmp_path: Path) -> None:
    hub.faults.append(dataclasses.replace(fault))
    refused(hub, tmp_path / "slice", kind, code)


def test_a_server_that_stops_serving_ranges_gives_no_wrong_bytes(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemobuild.weights.hub_client._CHUNK_BYTES", 50)
    cut = plan_slice(hub_origin(REPO, "main", endpoint=hub.endpoint, pauses_s=(0.01,)), BLOCKS)
    hub.faults += [Fault("/model-0000", "cut", after=500, times=8), Fault("/model-0000", "no-range", times=None)]
    with pytest.raises(RemoteError, match="part of model-"):
        write_slice(cut, tmp_path / "slice")
    assert not (tmp_path / "slice").exists()


@pytest.mark.parametrize("blocks", [(10,), (-1,), (0, 3, 0), ()])
def test_blocks_that_cannot_be_cut(blocks: tuple[int, ...], hub: HubServer, tmp_path: Path) -> None:
    refused(hub, tmp_path / "slice", UsageError, "bad-blocks", blocks=blocks)
    assert asked(hub) == {}


def test_quantised_weights_are_refused(hub: HubServer, model: Path, tmp_path: Path) -> None:
    files = contents(model)
    hub.add(REPO, files | {"hf_quant_config.json": b"{}"})
    refused(hub, tmp_path / "slice", UsageError, "quantised-weights")
    config = tiny_config(quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    hub.add(REPO, files | {"config.json": json.dumps(config).encode()})
    refused(hub, tmp_path / "slice", UsageError, "quantised-weights")
    assert asked(hub) == {}


def test_headers_are_held_against_the_config(hub: HubServer, model: Path, tmp_path: Path) -> None:
    files = contents(model)
    hub.add(REPO, files | {"config.json": json.dumps(tiny_config(vocab_size=300)).encode()})
    refused(hub, tmp_path / "slice", IntegrityError, "wrong-shape")
    index = json.loads(files["model.safetensors.index.json"])
    del index["weight_map"]["model.norm.weight"]
    hub.add(REPO, files | {"model.safetensors.index.json": json.dumps(index).encode()})
    refused(hub, tmp_path / "slice", IntegrityError, "tensor-missing")
    shard = "model-00001-of-00002.safetensors"
    hub.add(REPO, files | {shard: (1 << 40).to_bytes(8, "little") + files[shard][8:]})
    hub.requests.clear()
    refused(hub, tmp_path / "slice", IntegrityError, "bad-header")
    assert asked(hub)[shard] == [(0, 8)], "a length that cannot be is not fetched"


def test_too_small_a_disk_is_said_before_the_weights(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, needed_bytes: int, what: str) -> None:
        raise DoesNotFit("disk-full", f"{what} {needed_bytes}", next="free some")

    monkeypatch.setattr("nemobuild.weights.slice.check_free", full)
    error = refused(hub, tmp_path / "slice", DoesNotFit, "disk-full")
    assert int(error.what.split()[-1]) > 100_000


def test_a_gated_model_needs_its_token(hub: HubServer, model: Path, tmp_path: Path) -> None:
    hub.repos[REPO].gated = True
    refused(hub, tmp_path / "slice", RemoteError, "gated-repo")
    assert_equal(get(hub, tmp_path / "slice", token=TOKEN), model, BLOCKS)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    "config",
    [
        llama_config(layer_types=["full_attention"] * 3),
        llama_config(model_type="deci", num_key_value_heads_per_layer=[4, 2, 1], tie_word_embeddings=False),
    ],
    ids=["llama", "deci"],
)
def test_the_other_dialects_from_a_folder(config: dict[str, Any], shards: int, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", config, shards=shards)
    folder = write_slice(plan_slice(folder_origin(source), (2, 0)), tmp_path / "slice")
    assert_equal(folder, source, (2, 0))
    made = json.loads((folder / "config.json").read_text())
    assert made.get("num_key_value_heads_per_layer") in (None, [1, 4])
    assert len(made.get("layer_types", [1, 2])) == 2


def test_a_single_file_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", shards=1)
    hub.add(REPO, contents(source))
    assert_equal(get(hub, tmp_path / "slice"), source, BLOCKS)


@pytest.mark.parametrize("file", MODELS, ids=lambda f: f.stem)
def test_the_blocks_of_known_models(file: Path) -> None:
    spec = load_spec(file)
    chosen = distinct_blocks(spec)
    assert_covers(spec, chosen)
    assert len(chosen) == max(len({b.attention for b in spec.blocks}), len({b.ffn for b in spec.blocks}))
    config = json.loads(file.read_text())
    assert spec_from_config(sliced_config(config, chosen)) == sliced_spec(spec, chosen)


def assert_covers(spec: ModelSpec, chosen: Sequence[int]) -> None:
    held = [spec.blocks[i] for i in chosen]
    assert {b.attention for b in held} == {b.attention for b in spec.blocks}
    assert {b.ffn for b in held} == {b.ffn for b in spec.blocks}
    assert list(chosen) == sorted(set(chosen))


def test_no_smaller_set_of_blocks_would_do() -> None:
    """Against trying all, where the first choice of each kind would take one too many."""
    kinds = [
        [(Attention(2), Mlp(8)), (Attention(2), Mlp(16)), (NoOp(), Mlp(8))],
        [(NoOp(), NoOp()), (NoOp(), Mlp(8)), (Linear(), NoOp()), (Attention(1), Mlp(8)), (Attention(2), Mlp(16))],
        [(Attention(k), Mlp(w)) for k, w in ((1, 1), (1, 2), (2, 1), (4, 2), (4, 3), (8, 1), (8, 4))],
        [(b.attention, b.ffn) for b in spec_from_config(tiny_config()).blocks],
    ]
    for pairs in kinds:
        spec = dataclasses.replace(spec_from_config(tiny_config()), blocks=tuple(Block(a, f) for a, f in pairs))
        chosen = distinct_blocks(spec)
        assert_covers(spec, chosen)
        for fewer in itertools.combinations(spec.blocks, len(chosen) - 1):
            attentions, ffns = {b.attention for b in fewer}, {b.ffn for b in fewer}
            assert (attentions, ffns) != ({b.attention for b in spec.blocks}, {b.ffn for b in spec.blocks})


def call(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, (arguments, done.output, done.exception)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    ("runtime", "form"),
    [
        ("tensorrt", "{tensor_parallel: 2}"),
        ("tensorrt", "{precision: fp8, kv_cache: fp8, tensor_parallel: 2}"),
        ("llmapi", "{precision: fp8, kv_cache: fp8, format: hf, tensor_parallel: 2}"),
    ],
)
def test_what_the_workflow_does_with_a_slice(
    runtime: str, form: str, hub: HubServer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = functools.partial(hub_origin, endpoint=hub.endpoint, pauses_s=(0.01,))
    monkeypatch.setattr("nemobuild.weights.slice.hub_origin", here)
    profile = tmp_path / "mine.yaml"
    profile.write_text(
        f"description: mine\nruntime: {runtime}\nmodel: {{source: {REPO}}}\nmachine: {{gpu: h100-sxm, count: 2}}\n"
        f"limits: {{max_context_tokens: 2048}}\nreasoning: {{policy: none}}\ncheckpoint: {form}\n"
    )
    planned = call("fetch", profile, "--blocks", "auto", "--dry-run")
    assert not (tmp_path / "build").exists()
    assert planned["blocks"] == list(distinct_blocks(load_spec(model)))
    folder, checkpoint = tmp_path / "slice", tmp_path / "checkpoint"
    made = call("fetch", profile, "--blocks", "auto", "-o", folder)
    assert made == planned | {"snapshot": str(folder)}
    assert call("inspect", folder)
    wanted = load_profile(str(profile)).checkpoint
    call("convert", folder, "-o", checkpoint, *convert_options(wanted).split())
    report = call("verify", checkpoint, "--against", folder, *verify_options(wanted).split())
    assert report["passed"]
    assert report["precision"] == wanted.precision


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("FOLDER", "--blocks", "0,x", "-o", "slice"), "bad-blocks"),
        (("FOLDER", "--blocks", "", "-o", "slice"), "bad-blocks"),
        (("FOLDER", "--blocks", "99", "-o", "slice"), "bad-blocks"),
        (("FOLDER", "--blocks", "0"), "no-target"),
        (("FOLDER", "--dry-run"), "useless-option"),
        (("FOLDER", "--blocks", "0", "--revision", "main", "-o", "slice"), "local-source"),
        (("FOLDER", "--blocks", "0", "-o", "FOLDER"), "folder-exists"),
        (("smollm2-nas-cpu", "--blocks", "0", "-o", "slice"), "packaged-source"),
    ],
)
def test_wrong_lines(
    arguments: tuple[str, ...], code: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["fetch", *(str(model) if a == "FOLDER" else a for a in arguments)])
    assert isinstance(done.exception, UsageError), done.exception
    assert done.exception.code == code
    assert not (tmp_path / "slice").exists()


def test_the_size_is_said_before_anything_is_fetched(model: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["fetch", str(model), "--blocks", "0,9", "-o", str(tmp_path / "slice")])
    assert done.exit_code == 0
    assert "KiB to fetch: blocks 0, 9 of 10, embedding and head" in done.stderr
