"""What FP8 costs is measured right, and every fault of an FP8 checkpoint is found, placed, and fails the gate."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nemobuild.convert import quality as module
from nemobuild.convert.executor import convert
from nemobuild.convert.quality import HeldOutText, QualityThresholds, measure_quality
from nemobuild.convert.quality_plot import svg_errors
from nemobuild.convert.scales import BlockScales, GroupScales, KvScales, quant_groups
from nemobuild.convert.verify import VerifyReport, verify
from nemobuild.convert.verify_models import StreamedModel, hf_model, trtllm_model
from nemobuild.errors import UsageError
from nemobuild.model import forward as fw
from nemobuild.model.spec import ModelSpec
from nemobuild.weights.snapshot import Snapshot, open_snapshot
from tests.checkpoints import Fp8Scales, cast, fp8_scales, load_tensors, write_fp8_checkpoint
from tests.test_cpu_checkpoint import edit_config, edit_tensors
from tests.tiny import random_weights, tiny_config, write_model

CONFIG = tiny_config()
WEIGHTS = random_weights(CONFIG)
RNG = np.random.default_rng(0)
TEXTS = [
    HeldOutText(RNG.integers(0, 256, n).tolist(), language)
    for language, n in (("en", 20), ("de", 33), ("en", 2), ("hi", 12))
]
SCALES = fp8_scales(CONFIG, WEIGHTS, [list(t.token_ids) for t in TEXTS])
# Random weights spread every error over all logits, so FP8 costs them far more than a trained model.
LOOSE = QualityThresholds(
    max_saturated_share=0.01,
    max_divergence=1,
    max_language_divergence=1,
    max_perplexity_increase=1,
    min_greedy_agreement=0,
)
GROUPS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "linear_attn": "attention_linear"}
GROUPS |= {"gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down", "linear_mlp": "ffn_linear"}


def write_hf_fp8(folder: Path, source: Path, scales: Fp8Scales, *, static: bool = True) -> Path:
    """ModelOpt's form of an FP8 folder, from its description, with a manifest as if nemobuild had written it."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    out: dict[str, np.ndarray] = {}
    for name, value in WEIGHTS.items():
        *_, linear, _ = name.split(".")
        if linear not in GROUPS:
            out[name] = value
            continue
        layer, module_name = int(name.split(".")[2]), name.removesuffix(".weight")
        out[name] = cast(value, scales.weight[layer, GROUPS[linear]])
        out[f"{module_name}.weight_scale"] = np.array(scales.weight[layer, GROUPS[linear]])
        if static:
            out[f"{module_name}.input_scale"] = np.array(scales.input[layer, GROUPS[linear]])
        if linear in ("k_proj", "v_proj"):
            out[f"{module_name}.{linear[0]}_scale"] = np.array(scales.kv[layer])
    save_file(out, folder / "model.safetensors")
    excluded = ["lm_head", "model.embed_tokens"]
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": excluded}
    producer = {"name": "modelopt", "version": "0.47.0"}
    (folder / "hf_quant_config.json").write_text(json.dumps({"producer": producer, "quantization": quantization}))
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    inline = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": excluded, "kv_cache_scheme": scheme}
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": inline}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").write_text(json.dumps({"inputs": {"tools": {"nemobuild": "0.1.0"}}}))
    return folder


def write_all(folder: Path) -> dict[str, Any]:
    source = write_model(folder / "source")
    return {
        "source": source,
        "snapshot": open_snapshot(source),
        "trtllm": write_fp8_checkpoint(folder / "trtllm", CONFIG, WEIGHTS, SCALES, 2, 2),
        "hf": write_hf_fp8(folder / "hf", source, SCALES),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_all(tmp_path_factory.mktemp("quality"))


@pytest.fixture
def snapshot(made: dict[str, Any]) -> Snapshot:
    found: Snapshot = made["snapshot"]
    return found


def source_model(snapshot: Snapshot) -> StreamedModel:
    return hf_model(snapshot.spec, snapshot.tensors)


def whole_logits(model: StreamedModel, text: HeldOutText) -> np.ndarray:
    """Logits of one text by the plain forward pass of the project, as float64."""
    norm = model.ends.norm
    ends = fw.EndWeights(*(part.read(0, 265) for part in (model.ends.embedding,)), norm, model.ends.head.read(0, 265))
    (logits,) = fw.forward(model.spec, ends, model.blocks(), [list(text.token_ids)])
    return logits.astype(np.float64)


def test_sums_over_a_streamed_vocabulary(snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models that differ much, against the textbook's formulas over whole logits."""
    other = open_snapshot(write_model(tmp_path / "other", seed=1))
    models = source_model(snapshot), source_model(other)
    for rows, tokens in ((4096, 1024), (50, 1024), (7, 21)):
        monkeypatch.setattr(module, "HEAD_BLOCK_ROWS", rows)
        monkeypatch.setattr(module, "BATCH_TOKENS", tokens)
        report = measure_quality(*models, TEXTS)
        rowwise = {}
        for text in TEXTS:
            a, b = (whole_logits(m, text)[:-1] for m in models)
            pa, pb = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a, b))
            at = np.arange(len(a)), np.asarray(text.token_ids)[1:]
            part = np.stack([(np.exp(pa) * (pa - pb)).sum(1), -pa[at], -pb[at], pa.argmax(1) == pb.argmax(1)], 1)
            rowwise.setdefault(text.language, []).append(part)
        for found in (report.total, *report.languages):
            parts = [p for language, ps in rowwise.items() for p in ps if found.language in ("all", language)]
            kl, loss_a, loss_b, agree = np.concatenate(parts).mean(0)
            assert found.tokens == sum(map(len, parts))
            assert found.divergence == pytest.approx(kl, rel=1e-4)
            assert found.source_perplexity == pytest.approx(np.exp(loss_a), rel=1e-4)
            assert found.perplexity == pytest.approx(np.exp(loss_b), rel=1e-4)
            assert found.greedy_agreement == pytest.approx(agree)
        divergences = [q.divergence for q in report.languages]
        assert {q.language for q in report.languages} == {"en", "de", "hi"} and divergences == sorted(divergences)[::-1]


def test_a_model_is_no_worse_than_itself(snapshot: Snapshot) -> None:
    model = source_model(snapshot)
    report = measure_quality(model, model, TEXTS)
    assert report.total.divergence == pytest.approx(0, abs=1e-9)
    assert (report.total.perplexity_increase, report.total.greedy_agreement) == (0, 1)
    assert report.residual_error == (0.0,) * 10
    assert report.activations == ()
    assert list(report.failures(QualityThresholds(0, 0, 1e-9, 1e-9, 0, 1))) == []


def test_one_block_of_each_model_at_a_time(snapshot: Snapshot, made: dict[str, Any]) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def watched(model: StreamedModel) -> StreamedModel:
        def block(index: int) -> fw.BlockWeights:
            nonlocal most
            most = max(most, sum(ref() is not None for ref in alive))
            weights = model.block(index)
            arrays = (getattr(weights, f.name) for f in dataclasses.fields(weights))
            for array in arrays:
                if array is not None:
                    alive.append(weakref.ref(getattr(array, "values", array)))
                    break
            return weights

        return dataclasses.replace(model, block=block)

    seen: list[tuple[int, int]] = []
    models = watched(source_model(snapshot)), watched(trtllm_model(made["trtllm"]))
    measure_quality(*models, TEXTS, lambda *p: seen.append(p))
    assert most == 1, "while a block is read, only the one before it is held"
    assert seen == [(i + 1, 10) for i in range(10)]


def test_bad_texts(snapshot: Snapshot) -> None:
    model = source_model(snapshot)
    for texts in ([], [HeldOutText([1])], [HeldOutText([1, 265])], [HeldOutText([1, -1])]):
        with pytest.raises(UsageError):
            measure_quality(model, model, texts)


def test_bad_texts_are_refused_by_name_before_anything_is_compared(made: dict[str, Any], snapshot: Snapshot) -> None:
    for ids, words in (([1], "Line 7 of x is 1 token"), ([1, 265], "Line 7 of x has a token outside")):
        with pytest.raises(UsageError, match=words):
            verify(made["trtllm"], snapshot, texts=[*TEXTS, HeldOutText(ids, "", "Line 7 of x")], progress=pytest.fail)


@pytest.mark.parametrize("form", ["trtllm", "hf"])
def test_a_right_checkpoint_passes(form: str, made: dict[str, Any], snapshot: Snapshot) -> None:
    report = verify(made[form], snapshot, texts=TEXTS, thresholds=LOOSE)
    assert report.findings == ()
    assert (report.precision, report.max_logit_error, report.prompt_tokens) == ("fp8", None, 0)
    linears = sum(n.startswith("model.layers.") and len(s) == 2 for n, s in snapshot.spec.tensor_shapes().items())
    attention = len(snapshot.spec.attention_blocks)
    assert len(report.weights) == (linears if form == "hf" else 2 * (linears - 2 * attention))
    errors = [e.error for e in report.weights]
    assert errors == sorted(errors)[::-1] and 0.02 < errors[-1] < errors[0] < 0.03
    assert all(0.9 < e.half_steps <= 1 + 1e-6 for e in report.weights)
    assert report.quality is not None
    assert 0.001 < report.quality.total.divergence < 0.2
    places = {a.where for a in report.quality.activations}
    assert {"model.layers.0.qkv", "model.layers.4.ffn_linear", "model.layers.9.keys", "model.layers.9.values"} <= places
    assert report.quality.residual_error[0] < report.quality.residual_error[-1]
    strict = QualityThresholds(max_divergence=1e-4)
    failed = verify(made[form], snapshot, texts=TEXTS, thresholds=strict)
    assert failed.findings[0].kind == "quality" and "all texts" in {f.where for f in failed.findings}


def test_both_forms_are_one_model(made: dict[str, Any], snapshot: Snapshot) -> None:
    """The reader of the HF form and that of the TensorRT-LLM form give the same numbers."""
    both = [verify(made[form], snapshot, texts=TEXTS, thresholds=LOOSE).quality for form in ("trtllm", "hf")]
    assert both[0] is not None and both[1] is not None
    assert both[0].total.divergence == pytest.approx(both[1].total.divergence, rel=0.05)


def test_dynamic_activations(made: dict[str, Any], snapshot: Snapshot, tmp_path: Path) -> None:
    folder = write_hf_fp8(tmp_path / "hf", made["source"], SCALES, static=False)
    report = verify(folder, snapshot, texts=TEXTS, thresholds=LOOSE)
    assert report.findings == () and report.quality is not None
    linears = [a for a in report.quality.activations if not a.where.endswith(("keys", "values"))]
    assert all(a.saturated_share == 0 and a.peak == pytest.approx(1) for a in linears)


def block_scales(spec: ModelSpec) -> list[BlockScales]:
    return [
        BlockScales(
            {
                group: GroupScales(*(float(part[i, group.split(".")[3]]) for part in (SCALES.weight, SCALES.input)))
                for group in quant_groups(spec, i)
            },
            KvScales(float(SCALES.kv[i]), float(SCALES.kv[i])) if i in SCALES.kv else None,
        )
        for i in range(len(spec.blocks))
    ]


@pytest.mark.parametrize(("form", "tp", "pp"), [("trtllm", 1, 1), ("trtllm", 8, 1), ("trtllm", 2, 3), ("hf", 1, 1)])
def test_what_was_converted_passes(form: Any, tp: int, pp: int, snapshot: Snapshot, tmp_path: Path) -> None:
    """Converter and verification share no rule. The FP8 folder, converted again, keeps every byte."""
    scales = block_scales(snapshot.spec)
    options: dict[str, Any] = {"precision": "fp8", "format": form, "kv_cache": "fp8", "scales": scales}
    convert(snapshot, tmp_path / "out", tp=tp, pp=pp, clamp_kv=False, **options)
    report = verify(tmp_path / "out", snapshot, texts=TEXTS, thresholds=LOOSE)
    assert report.findings == () and report.quality is not None
    if form == "hf":
        again = open_snapshot(tmp_path / "out", fp8=True)
        convert(again, tmp_path / "again", precision="fp8", kv_cache="fp8", clamp_kv=False, tp=2)
        second = verify(tmp_path / "again", again, texts=TEXTS, thresholds=LOOSE)
        assert second.findings == () and second.quality is not None
        assert max(e.half_steps for e in second.weights) < 1e-4, "the same codes; a float32 product and quotient apart"
        assert second.quality.total.divergence < 0.1 * report.quality.total.divergence


def test_both_forms_hold_the_bytes_of_the_reference_cast(
    made: dict[str, Any], snapshot: Snapshot, tmp_path: Path
) -> None:
    """What the converter writes with the same scales is what the little writer of these tests wrote."""
    scales, options = block_scales(snapshot.spec), {"precision": "fp8", "kv_cache": "fp8", "clamp_kv": False}
    convert(snapshot, tmp_path / "trtllm", tp=2, pp=2, scales=scales, **options)  # type: ignore[arg-type]
    convert(snapshot, tmp_path / "hf", format="hf", scales=scales, **options)  # type: ignore[arg-type]
    for form, files in (("trtllm", [f"rank{n}.safetensors" for n in range(4)]), ("hf", ["model.safetensors"])):
        for file in files:
            ours, theirs = (load_tensors(folder / file) for folder in (made[form], tmp_path / form))
            for name, array in ours.items():
                assert array.dtype == theirs[name].dtype and array.shape == theirs[name].shape, name
                assert array.tobytes() == theirs[name].tobytes(), name


def test_without_texts_only_weights_are_judged(made: dict[str, Any], snapshot: Snapshot) -> None:
    report = verify(made["trtllm"], snapshot)
    assert report.passed and report.quality is None and report.weights


QKV, FC = "transformer.layers.0.attention.qkv", "transformer.layers.0.ffn.fc"


def scaled(name: str, factor: float) -> Callable[[Path], None]:
    """A scale multiplied on every rank that has it under this name (the ranks of the first stage)."""

    def change(folder: Path) -> None:
        for rank in (0, 1):
            edit_tensors(rank, lambda t: t.update({name: t[name] * np.float32(factor)}))(folder)

    return change


def requantised(factor: float) -> Callable[[Path], None]:
    """Weights cast with a scale that is too large: each within half a step, but the steps are coarse."""

    def change(folder: Path) -> None:
        for rank in (0, 1):

            def cast_again(t: dict[str, np.ndarray]) -> None:
                for name in (FC, FC.replace("fc", "gate")):
                    scale = t[f"{name}.weights_scaling_factor"]
                    values = t[f"{name}.weight"].astype(np.float32) * scale
                    t[f"{name}.weights_scaling_factor"] = scale * np.float32(factor)
                    t[f"{name}.weight"] = cast(values, scale * np.float32(factor))

            edit_tensors(rank, cast_again)(folder)

    return change


def halves_beside_kv_scale(tensors: dict[str, np.ndarray]) -> None:
    name = "transformer.layers.0.attention.{}_cache_scaling_factor"
    tensors |= {name.format(kind): tensors[name.format("kv")] / np.float32(2) for kind in "kv"}


def flip(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{QKV}.weight"].view(np.uint8)[7, 9] ^= 0x08


def swap(tensors: dict[str, np.ndarray]) -> None:
    fc, gate = f"{FC}.weight", f"{FC}.weight".replace("fc", "gate")
    tensors[fc], tensors[gate] = tensors[gate], tensors[fc]


def to_bf16(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{QKV}.weight"] = tensors[f"{QKV}.weight"].astype(ml_dtypes.bfloat16)


# damage -> kind of a finding, words in where it is or what it says
FAULTS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "one-bit": (edit_tensors(0, flip), "bytes", "1 of"),
    "swapped": (edit_tensors(0, swap), "bytes", "ffn.fc"),
    "scale-too-small": (scaled(f"{QKV}.weights_scaling_factor", 0.5), "bytes", "attention.qkv"),
    "scale-too-large": (scaled(f"{QKV}.weights_scaling_factor", 1.2), "bytes", "half a step"),
    "coarse": (requantised(2.0**14), "weights", "ffn.fc"),
    "unequal-group": (scaled(f"{FC}.weights_scaling_factor", 1.0001), "scale", "must be equal"),
    "unequal-ranks": (
        edit_tensors(1, lambda t: t.update({f"{QKV}.activation_scaling_factor": np.ones(1, np.float32)})),
        "scale",
        "rank1",
    ),
    "no-scale": (edit_tensors(0, lambda t: t.pop(f"{QKV}.weights_scaling_factor")), "scale", "not there"),
    "no-kv-scale": (
        edit_tensors(0, lambda t: t.pop("transformer.layers.0.attention.kv_cache_scaling_factor")),
        "scale",
        "kv_cache",
    ),
    "kv-scale-is-not-the-larger": (
        lambda folder: [edit_tensors(rank, halves_beside_kv_scale)(folder) for rank in (0, 1)],
        "scale",
        "keys and values",
    ),
    "zero-scale": (scaled(f"{FC}.weights_scaling_factor", 0.0), "scale", "above zero"),
    "nan-scale": (scaled(f"{FC}.activation_scaling_factor", float("nan")), "scale", "nan"),
    "scale-of-two": (
        edit_tensors(0, lambda t: t.update({f"{FC}.weights_scaling_factor": np.ones(2, np.float32)})),
        "scale",
        "shape",
    ),
    "half-fp8": (edit_tensors(0, to_bf16), "dtype", "not F8_E4M3"),
    "says-bf16": (edit_config(quantization__quant_algo=None), "dtype", "not BF16"),
    "kv-not-said": (edit_config(quantization__kv_cache_quant_algo=None), "unexpected", "kv_cache"),
    "head-not-excluded": (edit_config(quantization__exclude_modules=["x"]), "config", "lm_head"),
    "inputs-saturate": (scaled(f"{QKV}.activation_scaling_factor", 0.25), "activations", "model.layers.0.qkv"),
    "keys-saturate": (
        scaled("transformer.layers.0.attention.kv_cache_scaling_factor", 0.25),
        "activations",
        "model.layers.0.keys",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str, made: dict[str, Any], snapshot: Snapshot, tmp_path: Path) -> None:
    damage, kind, words = FAULTS[name]
    folder = tmp_path / "copy"
    shutil.copytree(made["trtllm"], folder)
    damage(folder)
    report = verify(folder, snapshot, texts=TEXTS, thresholds=LOOSE)
    assert not report.passed
    found = [f"{f.where} {f.what}" for f in report.findings if f.kind == kind]
    assert any(words in text for text in found), report.findings


def test_picture_has_every_block(made: dict[str, Any], snapshot: Snapshot) -> None:
    report: VerifyReport = verify(made["trtllm"], snapshot, texts=TEXTS, thresholds=LOOSE)
    assert report.quality is not None
    root = ET.fromstring(svg_errors("a <b> & c", report.quality, report.weights, LOOSE))
    titles = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles[0] == "a <b> & c"
    assert [t.split(":")[0] for t in titles[1:]] == [f"block {i}" for i in range(10)]
    red = svg_errors("x", report.quality, report.weights, dataclasses.replace(LOOSE, max_weight_error=0.01))
    assert red.count("#d1495b") == 9 + 1, "all blocks but the empty one, and the line of the bound"


def test_a_code_one_step_off_is_found(made: dict[str, Any], snapshot: Snapshot, tmp_path: Path) -> None:
    """The next code on the far side of a value is less than two half steps away, near enough to look right."""
    folder, name = tmp_path / "copy", "transformer.layers.0.attention.dense.weight"
    shutil.copytree(made["trtllm"], folder)
    source = WEIGHTS["model.layers.0.self_attn.o_proj.weight"][:, :64].astype(np.float32) / SCALES.weight[0, "o"]
    codes = load_tensors(folder / "rank0.safetensors")[name]
    row, column = np.argwhere((np.abs(source) > 32) & (np.abs(source) - np.abs(codes.astype(np.float32)) > 0.5))[0]
    edit_tensors(0, lambda t: t[name].view(np.uint8).__setitem__((row, column), codes.view(np.uint8)[row, column] + 1))(
        folder
    )
    report = verify(folder, snapshot)
    (finding,) = report.findings
    assert 1.1 < max(e.half_steps for e in report.weights) < 1.95
    assert finding.kind == "bytes" and f"1 of {codes.size:,}" in finding.what and f"[{row}, {column}]" in finding.what


def test_every_bound_is_kept_exactly(made: dict[str, Any], snapshot: Snapshot) -> None:
    report = verify(made["trtllm"], snapshot, texts=TEXTS, thresholds=LOOSE)
    quality = report.quality
    assert quality is not None
    measured = {
        "max_saturated_share": quality.activations[0].saturated_share,
        "max_divergence": quality.total.divergence,
        "max_language_divergence": quality.languages[0].divergence,
        "max_perplexity_increase": quality.total.perplexity_increase,
        "min_greedy_agreement": quality.total.greedy_agreement,
    }
    for name, value in measured.items():
        sign = -1 if name.startswith("min") else 1
        if value <= 0:  # a perplexity that fell passes every bound
            continue
        kept = dataclasses.replace(LOOSE, **{name: value + sign * 1e-9})
        broken = dataclasses.replace(LOOSE, **{name: value - sign * 1e-6})
        assert list(quality.failures(kept)) == [], name
        assert len(list(quality.failures(broken))) >= 1, name
    worst = report.weights[0].error
    for bound, passes in ((worst * 1.0001, True), (worst * 0.9999, False)):
        thresholds = dataclasses.replace(LOOSE, max_weight_error=bound)
        assert verify(made["trtllm"], snapshot, thresholds=thresholds).passed is passes


def test_thresholds_refuse_nonsense() -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_divergence"):
            QualityThresholds(max_divergence=value)
