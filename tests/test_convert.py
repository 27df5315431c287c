"""The BF16 checkpoint: names, shapes, bytes and config against rules written here a second time; refusals."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from nemobuild.convert import trtllm, workers
from nemobuild.convert.executor import convert, prepare
from nemobuild.convert.tensor_map import Piece, Target, TensorMap, check, coverage
from nemobuild.convert.workers import Progress
from nemobuild.errors import DoesNotFit, IntegrityError, NemobuildError, UsageError
from nemobuild.model.hf_config import load_spec, spec_from_config
from nemobuild.model.spec import Attention, Block, Linear, Mlp, ModelSpec, NoOp, Rope
from nemobuild.weights.safetensors import TensorInfo, layout
from nemobuild.weights.snapshot import open_snapshot
from tests.tiny import llama_config, random_weights, tiny_config, write_model, write_weights


def deci_config() -> dict[str, Any]:
    return llama_config(model_type="deci", tie_word_embeddings=False, num_key_value_heads_per_layer=[4, 1, 8])


CONFIGS = {"nas": tiny_config(), "deci": deci_config(), "llama": llama_config()}
SPLITS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 3), (4, 2)]


def expected_ranks(
    config: dict[str, Any], weights: dict[str, NDArray[Any]], tp: int, pp: int
) -> list[dict[str, NDArray[Any]]]:
    """The rank files by the rules of the format, from whole matrices and ``np.split``; shares no code with ours."""
    spec = spec_from_config(config)
    deci, heads, head = config["model_type"] != "llama", spec.query_heads, spec.head_size
    ffn = "ffn" if deci else "mlp"
    lm_head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    padding = -len(lm_head) % tp
    lm_head = np.concatenate([lm_head, np.zeros((padding, lm_head.shape[1]), lm_head.dtype)])
    ranks = []
    for p, layers in enumerate(np.array_split(np.arange(len(spec.blocks)), pp)):
        for t in range(tp):
            rank = {}
            if p == 0:
                rank["transformer.vocab_embedding.weight"] = weights["model.embed_tokens.weight"]
            if p == pp - 1:
                rank["transformer.ln_f.weight"] = weights["model.norm.weight"]
                rank["lm_head.weight"] = np.split(lm_head, tp)[t]
            for local, layer in enumerate(layers):
                source = {
                    name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): w
                    for name, w in weights.items()
                    if name.startswith(f"model.layers.{layer}.")
                }
                made = {}
                if "input_layernorm" in source:
                    made["input_layernorm"] = source["input_layernorm"]
                if "self_attn.q_proj" in source:
                    per_head = [source[f"self_attn.{x}_proj"].reshape(-1, head, spec.hidden_size) for x in "qkv"]
                    for i in (1, 2):
                        per_head[i] = np.repeat(per_head[i], max(1, tp // len(per_head[i])), axis=0)
                    assert len(per_head[0]) == heads
                    parts = [np.split(x, tp)[t].reshape(-1, spec.hidden_size) for x in per_head]
                    made["attention.qkv"] = np.concatenate(parts)
                    made["attention.dense"] = np.split(source["self_attn.o_proj"], tp, axis=1)[t]
                if "self_attn.linear_attn" in source:
                    made["attention"] = np.split(source["self_attn.linear_attn"], tp)[t]
                if "post_attention_layernorm" in source:
                    made["post_layernorm"] = source["post_attention_layernorm"]
                if "mlp.gate_proj" in source:
                    made[f"{ffn}.fc"] = np.split(source["mlp.gate_proj"], tp)[t]
                    made[f"{ffn}.gate"] = np.split(source["mlp.up_proj"], tp)[t]
                    made[f"{ffn}.proj"] = np.split(source["mlp.down_proj"], tp, axis=1)[t]
                if "mlp.linear_mlp" in source:
                    made[f"{ffn}"] = np.split(source["mlp.linear_mlp"], tp)[t]
                rank |= {f"transformer.layers.{local}.{name}.weight": w for name, w in made.items()}
            ranks.append(rank)
    return ranks


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 700], ids=["whole", "chunked"])
@pytest.mark.parametrize(("tp", "pp"), SPLITS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_byte(
    name: str, tp: int, pp: int, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(workers, "JOB_BYTES", 5 * chunk_bytes)
    config = CONFIGS[name]
    report = convert(open_snapshot(write_model(tmp_path / "m", config)), tmp_path / "out", tp=tp, pp=pp)
    expected = expected_ranks(config, random_weights(config), tp, pp)
    files = {f"rank{n}.safetensors" for n in range(tp * pp)}
    assert {f.name for f in (tmp_path / "out").iterdir()} == files | {"config.json", "manifest.json"}
    assert not (tmp_path / ".out.partial").exists()
    for n, rank in enumerate(expected):
        made = load_file(tmp_path / "out" / f"rank{n}.safetensors")
        assert made.keys() == rank.keys()
        for tensor, array in rank.items():
            assert made[tensor].dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(made[tensor].view(np.uint16), array.view(np.uint16), err_msg=tensor)
    assert report.files == {file: (tmp_path / "out" / file).stat().st_size for file in sorted(files)}
    assert report.source_bytes == 2 * spec_from_config(config).parameter_count


def test_config_of_the_nas_form(tmp_path: Path) -> None:
    config = trtllm.checkpoint_config(spec_from_config(tiny_config()), tp=2, pp=2)
    layers = config.pop("layer_configs")
    assert config == {
        "architecture": "DeciLMForCausalLM",
        "dtype": "bfloat16",
        "logits_dtype": "float32",
        "vocab_size": 265,
        "hidden_size": 128,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "intermediate_size": 256,
        "head_size": 16,
        "hidden_act": "silu",
        "norm_epsilon": 1e-5,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": 10000.0,
        "rotary_scaling": tiny_config()["rope_scaling"],
        "max_position_embeddings": 512,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    assert layers[0] == {
        "attention": {"impl": "attention", "num_key_value_heads": 4},
        "ffn": {"impl": "mlp", "intermediate_size": 192},
    }
    assert layers[7] == {
        "attention": {"impl": "no_op", "num_key_value_heads": None},
        "ffn": {"impl": "linear", "intermediate_size": None},
    }
    assert [layer["attention"]["impl"] for layer in layers].count("linear") == 2
    assert len(layers) == 10


def test_config_of_the_llama_form() -> None:
    config = trtllm.checkpoint_config(spec_from_config(llama_config(rope_scaling=None)))
    assert config["architecture"] == "LlamaForCausalLM"
    assert "layer_configs" not in config
    assert (config["num_key_value_heads"], config["intermediate_size"], config["rotary_scaling"]) == (4, 192, None)


def test_config_and_manifest_on_disk(tmp_path: Path) -> None:
    snapshot = open_snapshot(write_model(tmp_path / "m"))
    report = convert(snapshot, tmp_path / "out", tp=2)
    assert json.loads((tmp_path / "out/config.json").read_text()) == trtllm.checkpoint_config(snapshot.spec, 2, 1)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["key"] == report.key == prepare(snapshot, tp=2).key
    assert manifest["inputs"]["snapshot"] == snapshot.fingerprint
    assert manifest["files"] == {
        f.name: f.stat().st_size for f in (tmp_path / "out").iterdir() if f.name != "manifest.json"
    }
    assert prepare(snapshot, tp=4).key != report.key


@pytest.mark.parametrize(
    ("model", "tensors"), [("super-49b-v1.5", 470), ("super-49b-v1", 470), ("ultra-253b-v1", None)]
)
def test_real_models_add_up(model: str, tensors: int | None) -> None:
    spec = load_spec(Path(__file__).parents[1] / "engine_configs" / "models" / f"{model}.json")
    sources = infos(spec)
    for tp, pp in ((1, 1), (8, 1), (16, 1), (2, 4)):
        tensor_map = trtllm.tensor_map(spec, tp, pp)
        check(tensor_map, sources)
        if tensors and tp * pp == 1:
            assert len(tensor_map.ranks[0]) == tensors


def infos(spec: ModelSpec) -> dict[str, TensorInfo]:
    return layout(Path("x"), [(n, "BF16", s) for n, s in spec.tensor_shapes().items()])[1]


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    heads, head_size = draw(st.sampled_from([1, 2, 4, 6, 8, 12])), draw(st.sampled_from([2, 4]))
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    attention = st.one_of(st.sampled_from(divisors).map(Attention), st.just(Linear()), st.just(NoOp()))
    ffn = st.one_of(st.integers(1, 24).map(Mlp), st.just(Linear()), st.just(NoOp()))
    model_type = draw(st.sampled_from(["nemotron-nas", "deci", "llama"]))
    if model_type == "llama":
        blocks = [Block(Attention(draw(st.sampled_from(divisors))), Mlp(draw(st.integers(1, 24))))] * draw(
            st.integers(1, 5)
        )
    else:
        blocks = draw(st.lists(st.builds(Block, attention, ffn), min_size=1, max_size=6))
    return ModelSpec(
        model_type=model_type,
        hidden_size=draw(st.integers(1, 12)),
        vocab_size=draw(st.integers(1, 30)),
        query_heads=heads,
        head_size=head_size,
        blocks=tuple(blocks),
        rope=Rope(1e4),
        norm_epsilon=1e-5,
        max_context_tokens=64,
        tied_embeddings=draw(st.booleans()),
    )


@settings(max_examples=300, deadline=None)
@given(specs(), st.integers(1, 12), st.integers(1, 4))
def test_any_split_adds_up_or_is_refused(spec: ModelSpec, tp: int, pp: int) -> None:
    try:
        tensor_map = trtllm.tensor_map(spec, tp, pp)
    except UsageError as error:
        assert error.code == "cannot-split"
        return
    check(tensor_map, infos(spec))
    assert len(tensor_map.ranks) == tp * pp
    # Ranks of one pipeline stage have the same names and shapes.
    for p in range(pp):
        stage = tensor_map.ranks[p * tp : (p + 1) * tp]
        assert len({tuple((t.name, t.shape) for t in rank) for rank in stage}) == 1


@pytest.mark.parametrize(
    ("config", "tp", "pp", "word"),
    [
        (tiny_config(), 3, 1, "query heads"),
        (tiny_config(), 16, 1, "query heads"),
        (tiny_config(), 0, 1, "at least 1"),
        (tiny_config(), 1, 11, "10 blocks"),
        (tiny_config(), 1, -1, "at least 1"),
        (llama_config(intermediate_size=193), 2, 1, "193 FFN channels of block 0"),
        (llama_config(num_attention_heads=12, num_key_value_heads=4, head_dim=8), 6, 1, "4 KV heads of block 0"),
        (tiny_config(num_attention_heads=24, hidden_size=128, head_dim=16), 3, 1, "linear block 2"),
    ],
)
def test_splits_that_do_not_work(config: dict[str, Any], tp: int, pp: int, word: str) -> None:
    if config["num_attention_heads"] == 24:
        for part in config["block_configs"]:
            if part["ffn"].get("intermediate_size") or part["ffn"].get("ffn_mult"):
                part["ffn"] = {"intermediate_size": 96, "no_op": False, "replace_with_linear": False}
            if part["attention"]["n_heads_in_group"]:
                part["attention"]["n_heads_in_group"] = 8
    with pytest.raises(UsageError) as caught:
        trtllm.tensor_map(spec_from_config(config), tp, pp)
    assert caught.value.code == "cannot-split"
    assert word in caught.value.what


def test_pipeline_ranges_are_those_of_tensor_split() -> None:
    for layers in range(1, 20):
        for pp in range(1, layers + 1):
            expected = [list(part) for part in np.array_split(np.arange(layers), pp)]
            assert [list(part) for part in trtllm.pipeline_ranges(layers, pp)] == expected


def one_target(*pieces: Piece, shape: tuple[int, ...] = (4, 6), name: str = "t") -> TensorMap:
    return TensorMap(((Target(name, "BF16", shape, pieces),),), {})


SOURCE = layout(Path("x"), [("a", "BF16", (4, 6))])[1]
WHOLE = Piece("a", (0, 4), (0, 6), 0)


@pytest.mark.parametrize(
    ("tensor_map", "word"),
    [
        (one_target(Piece("a", (0, 3), (0, 6), 0)), "not produced exactly once"),
        (one_target(WHOLE, Piece("a", (0, 1), (0, 6), 3)), "not produced exactly once"),
        (one_target(Piece("a", (0, 4), (0, 6), 1)), "not produced exactly once"),
        (one_target(Piece("a", (0, 4), (0, 5), 0)), "wrong shape"),
        (one_target(Piece("a", (1, 5), (0, 6), 0)), "reaches outside"),
        (one_target(Piece("a", (0, 4), (1, 7), 0)), "reaches outside"),
        (one_target(Piece("b", (0, 4), (0, 6), 0)), "lacks"),
        (one_target(Piece(None, (0, 4), (0, 6), 0)), "0 to 0 times"),
        (one_target(Piece("a", (0, 2), (0, 6), 0), Piece("a", (0, 2), (0, 6), 2)), "0 to 2 times"),
        (TensorMap((one_target(WHOLE).ranks[0] * 2,), {"a": 2}), "produced twice"),
        (TensorMap((one_target(WHOLE).ranks[0],), {"a": 2}), "instead of 2"),
        (TensorMap(((Target("t", "F8_E4M3", (4, 6), (WHOLE,)),),), {}), "no such conversion"),
    ],
)
def test_maps_that_do_not_add_up(tensor_map: TensorMap, word: str) -> None:
    check(one_target(WHOLE), SOURCE)
    with pytest.raises(IntegrityError, match=word):
        check(tensor_map, SOURCE)


@settings(deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.lists(st.tuples(*[st.tuples(st.integers(0, 7), st.integers(1, 4))] * 2), max_size=6),
)
def test_coverage_counts(rows: int, columns: int, starts: list[Any]) -> None:
    rectangles = [((r, r + h), (c, c + w)) for (r, h), (c, w) in starts]
    counts = np.zeros((16, 16), int)
    for (r0, r1), (c0, c1) in rectangles:
        counts[r0:r1, c0:c1] += 1
    inside = counts[:rows, :columns]
    outside = counts.sum() > inside.sum()
    least, most = coverage((rows, columns), rectangles)
    assert least == inside.min()
    assert most > inside.max() if outside else most == inside.max()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_wider_sources_are_rounded_to_nearest_even(dtype: Any, tmp_path: Path) -> None:
    config = llama_config()
    folder = write_model(tmp_path / "m", config)
    rng = np.random.default_rng(5)
    weights = {}
    for name, array in random_weights(config).items():
        # All exponents, both signs, subnormals and exact ties.
        bits = rng.integers(0, 2 ** (8 * np.dtype(dtype).itemsize), array.shape, dtype=np.uint64)
        values = bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
        if dtype is np.float32:
            ties = rng.random(array.shape) < 0.3
            values.view(np.uint32)[ties] = values.view(np.uint32)[ties] & 0xFFFF0000 | 0x8000
        limit = 3e38 if dtype is np.float32 else np.inf
        weights[name] = np.where(np.isfinite(values) & (np.abs(values) < limit), values, dtype(0.5)).astype(dtype)
    write_weights(folder, weights)
    convert(open_snapshot(folder), tmp_path / "out", tp=2)
    expected = expected_ranks(config, {n: w.astype(ml_dtypes.bfloat16) for n, w in weights.items()}, 2, 1)
    for n, rank in enumerate(expected):
        made = load_file(tmp_path / "out" / f"rank{n}.safetensors")
        for tensor, array in rank.items():
            np.testing.assert_array_equal(made[tensor].view(np.uint16), array.view(np.uint16), err_msg=tensor)


@pytest.mark.parametrize(
    ("dtype", "value", "word"),
    [
        (ml_dtypes.bfloat16, np.nan, "NaN or Inf"),
        (ml_dtypes.bfloat16, -np.inf, "NaN or Inf"),
        (np.float16, np.inf, "NaN or Inf"),
        (np.float16, -np.nan, "NaN or Inf"),
        (np.float32, np.nan, "NaN or Inf"),
        (np.float32, -np.inf, "NaN or Inf"),
        (np.float32, 3.4e38, "too large for BF16"),
        (np.float32, -3.4e38, "too large for BF16"),
    ],
)
def test_weights_that_are_not_finite(dtype: Any, value: float, word: str, tmp_path: Path) -> None:
    config = tiny_config()
    folder = write_model(tmp_path / "m", config)
    weights = {name: array.astype(dtype) for name, array in random_weights(config).items()}
    weights["model.layers.3.mlp.up_proj.weight"][17, 101] = value
    write_weights(folder, weights)
    with pytest.raises(IntegrityError) as caught:
        convert(open_snapshot(folder), tmp_path / "out", tp=4)
    assert caught.value.code == "not-finite"
    for part in (word, "model.layers.3.mlp.up_proj.weight", "[17, 101]"):
        assert part in caught.value.what
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m"]


def test_the_largest_finite_values_pass(tmp_path: Path) -> None:
    config = llama_config()
    folder = write_model(tmp_path / "m", config)
    weights = random_weights(config)
    largest = np.array([0x7F7F], np.uint16).view(ml_dtypes.bfloat16)[0]
    weights["model.norm.weight"][:2] = [largest, -largest]
    write_weights(folder, weights)
    convert(open_snapshot(folder), tmp_path / "out")
    made = load_file(tmp_path / "out/rank0.safetensors")["transformer.ln_f.weight"]
    assert [float(x) for x in made[:2]] == [float(largest), -float(largest)]


def refused(tmp_path: Path, output: Path, kind: type[NemobuildError], code: str) -> NemobuildError:
    snapshot = open_snapshot(tmp_path / "m")
    with pytest.raises(kind) as caught:
        convert(snapshot, output)
    assert caught.value.code == code, str(caught.value)
    return caught.value


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    (tmp_path / "file").touch()
    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    before = sorted(tmp_path.rglob("*"))
    refused(tmp_path, tmp_path / "file" / "out", UsageError, "bad-path")
    refused(tmp_path, tmp_path / "file" / "deep" / "out", UsageError, "bad-path")
    refused(tmp_path, tmp_path / "file", UsageError, "output-exists")
    refused(tmp_path, tmp_path / "there", UsageError, "output-exists")
    refused(tmp_path, tmp_path / "dangling", UsageError, "output-exists")
    # A folder in which nobody, not even root, may create anything.
    refused(tmp_path, Path("/proc/self/out"), UsageError, "bad-path")
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    convert(open_snapshot(tmp_path / "m"), tmp_path / "a/b/out")
    assert (tmp_path / "a/b/out/rank0.safetensors").exists()


def test_a_model_larger_than_the_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    free_bytes = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    # A hole takes no space, so the source can be larger than the disk. Many files, since each has a limit of its own.
    width = 1 << 24
    layers = free_bytes // (2 * 3 * width * 512) + 1
    config = llama_config(num_hidden_layers=int(layers), hidden_size=512, intermediate_size=width)
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for i, (name, shape) in enumerate(spec_from_config(config).tensor_shapes().items()):
        file = f"s{i}.safetensors"
        head, _ = layout(folder / file, [(name, "BF16", shape)])
        (folder / file).write_bytes(head)
        os.truncate(folder / file, len(head) + 2 * math.prod(shape))
        weight_map[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(DoesNotFit) as caught:
        convert(open_snapshot(folder), tmp_path / "out")
    assert caught.value.code == "disk-full"
    assert "before the work begins" in caught.value.why
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_a_source_that_changes_meanwhile(tmp_path: Path) -> None:
    snapshot = open_snapshot(write_model(tmp_path / "m"))

    def touch(_: Progress) -> None:
        os.utime(tmp_path / "m/model-00001-of-00002.safetensors", ns=(5, 5))

    with pytest.raises(IntegrityError) as caught:
        convert(snapshot, tmp_path / "out", progress=touch)
    assert caught.value.code == "source-changed"
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_a_source_that_is_cut_meanwhile(tmp_path: Path) -> None:
    snapshot = open_snapshot(write_model(tmp_path / "m"))
    os.truncate(tmp_path / "m/model-00002-of-00002.safetensors", 4000)
    with pytest.raises(IntegrityError) as caught:
        convert(snapshot, tmp_path / "out")
    assert caught.value.code == "shard-truncated"
    assert [f.name for f in tmp_path.iterdir()] == ["m"]


def test_progress_counts_every_source_byte_once(tmp_path: Path) -> None:
    snapshot = open_snapshot(write_model(tmp_path / "m"))
    seen: list[Progress] = []
    report = convert(snapshot, tmp_path / "out", tp=4, workers=3, progress=seen.append)
    done = [p.done_bytes for p in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1].total_bytes == report.source_bytes == snapshot.weight_bytes
    assert {p.tensor for p in seen} == set(snapshot.tensors)
    assert report.workers == 3


def test_result_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    snapshot = open_snapshot(write_model(tmp_path / "m"))
    for count in (1, 5):
        convert(snapshot, tmp_path / f"out{count}", tp=2, workers=count)
    for file in (tmp_path / "out1").iterdir():
        assert file.read_bytes() == (tmp_path / "out5" / file.name).read_bytes()
    with pytest.raises(UsageError):
        convert(snapshot, tmp_path / "out0", workers=0)
