"""FP8 Hugging Face folders as sources: re-packed byte for byte where scales allow it, refused by name where not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemobuild.convert import executor, workers
from nemobuild.convert.executor import convert, prepare
from nemobuild.convert.sources import source_scales
from nemobuild.convert.verify import verify
from nemobuild.convert.workers import Progress
from nemobuild.errors import NemobuildError, UsageError
from nemobuild.weights.quantized import read_scheme
from nemobuild.weights.snapshot import open_snapshot
from tests.checkpoints import FP8, load_tensors
from tests.fp8_models import BF16, MEMBERS, dequantised, given_scales, quantization_config, write_fp8_folder
from tests.tiny import llama_config, random_weights, tiny_config, write_model

CONFIGS = {"nas": tiny_config(), "llama": llama_config()}
FORMS = ("modelopt", "compressed-tensors")
Tensors = dict[str, np.ndarray]


def read_folder(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "manifest.json"}


def tensors_of(folder: Path) -> Tensors:
    return {n: a for f in sorted(folder.glob("*.safetensors")) for n, a in load_tensors(f).items()}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_scales_give_the_bytes_of_a_direct_conversion(
    name: str, form: str, tp: int, pp: int, tmp_path: Path
) -> None:
    config = CONFIGS[name]
    direct = open_snapshot(write_model(tmp_path / "bf16", config))
    blocks = given_scales(config, random_weights(config))
    split: dict[str, Any] = {"precision": "fp8", "kv_cache": "fp8", "tp": tp, "pp": pp}
    convert(direct, tmp_path / "direct", scales=blocks, **split)
    source = open_snapshot(write_fp8_folder(tmp_path / "fp8", config, form=form, equal=True), fp8=True)
    assert source_scales(source).blocks == tuple(blocks)
    report = convert(source, tmp_path / "packed", **split)
    assert read_folder(tmp_path / "packed") == read_folder(tmp_path / "direct")
    assert report.requantized == ()


def test_our_own_folder_is_a_source(tmp_path: Path) -> None:
    """BF16 -> Hugging Face FP8 -> engine form gives the bytes of BF16 -> engine form."""
    config = CONFIGS["nas"]
    snapshot = open_snapshot(write_model(tmp_path / "bf16", config))
    blocks = given_scales(config, random_weights(config))
    form: dict[str, Any] = {"precision": "fp8", "kv_cache": "fp8"}
    convert(snapshot, tmp_path / "hf", format="hf", scales=blocks, **form)
    convert(snapshot, tmp_path / "direct", scales=blocks, **form)
    hf = open_snapshot(tmp_path / "hf", fp8=True)
    convert(hf, tmp_path / "packed", **form)
    assert read_folder(tmp_path / "packed") == read_folder(tmp_path / "direct")
    convert(hf, tmp_path / "again", format="hf", **form)
    assert read_folder(tmp_path / "again") == read_folder(tmp_path / "hf")


@pytest.mark.parametrize("form", FORMS)
def test_unequal_scales_take_the_largest(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK_BYTES", 1 << 12)
    config = CONFIGS["nas"]
    folder = write_fp8_folder(tmp_path / "fp8", config, form=form)
    old = tensors_of(folder)
    report = convert(open_snapshot(folder, fp8=True), tmp_path / "out", precision="fp8", format="hf", kv_cache="fp8")
    new = tensors_of(tmp_path / "out")
    expected_errors = {}
    for i in range(10):
        for parts in MEMBERS.values():
            names = [f"model.layers.{i}.{p}." for p in parts if f"model.layers.{i}.{p}.weight" in old]
            scales = [float(old[n + "weight_scale"].reshape(())) for n in names]
            for name, scale in zip(names, scales, strict=True):
                weight = name + "weight"
                assert float(new[name + "weight_scale"]) == max(scales)
                assert float(new[name + "input_scale"]) == float(old[name + "input_scale"].reshape(()))
                if scale == max(scales):
                    assert new[weight].tobytes() == old[weight].tobytes()
                    continue
                before, after = dequantised(old, weight), dequantised(new, weight)
                recast = (before / np.float32(max(scales))).astype(FP8)
                assert new[weight].tobytes() == recast.tobytes()
                expected_errors[weight] = np.sqrt(np.mean((after - before) ** 2.0) / np.mean(before**2.0))
    found = {r.tensor: r.relative_error for r in report.requantized}
    assert found.keys() == expected_errors.keys() and len(found) >= 10
    for name, error in expected_errors.items():
        assert found[name] == pytest.approx(error, rel=1e-4)
    assert 0 < max(found.values()) < 0.06
    assert [r.relative_error for r in report.requantized] == sorted(found.values(), reverse=True)
    one = report.requantized[0]
    assert one.scale > one.source_scale == float(old[one.tensor.removesuffix("weight") + "weight_scale"].reshape(()))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [r["tensor"] for r in manifest["fp8"]["requantized"]] == [r.tensor for r in report.requantized]


@pytest.mark.parametrize("form", FORMS)
def test_what_was_packed_again_is_verified_against_its_fp8_source(form: str, tmp_path: Path) -> None:
    source = open_snapshot(write_fp8_folder(tmp_path / "fp8", CONFIGS["nas"], form=form), fp8=True)
    report = convert(source, tmp_path / "out", precision="fp8", kv_cache="fp8")
    assert report.requantized
    verified = verify(tmp_path / "out", source)
    assert verified.findings == ()
    assert verified.weights[0].error == pytest.approx(report.requantized[0].relative_error, rel=0.5)
    assert min(w.error for w in verified.weights) == 0


def test_a_resumed_run_reports_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "SYNC_BYTES", 1)
    snapshot = open_snapshot(write_fp8_folder(tmp_path / "fp8", CONFIGS["nas"]), fp8=True)
    whole = convert(snapshot, tmp_path / "whole", precision="fp8")

    def stop(progress: Progress) -> None:
        if progress.done_bytes > 0.5 * progress.total_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(snapshot, tmp_path / "out", precision="fp8", workers=1, progress=stop)
    resumed = convert(snapshot, tmp_path / "out", precision="fp8", resume=True)
    assert resumed.resumed_bytes > 0
    assert resumed.requantized == whole.requantized != ()
    assert (tmp_path / "out/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "whole")


@pytest.mark.parametrize("claimed", [False, True])
def test_a_source_without_kv_scales(claimed: bool, tmp_path: Path) -> None:
    def drop(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith(("k_scale", "v_scale"))]:
            del tensors[name]

    folder = write_fp8_folder(tmp_path / "fp8", CONFIGS["llama"], kv=claimed, change=drop)
    snapshot = open_snapshot(folder, fp8=True)
    convert(snapshot, tmp_path / "out", precision="fp8")
    with pytest.raises(UsageError, match="no KV scales"):
        prepare(snapshot, precision="fp8", kv_cache="fp8")


def test_a_source_with_kv_scales_may_leave_them(tmp_path: Path) -> None:
    snapshot = open_snapshot(write_fp8_folder(tmp_path / "fp8", CONFIGS["llama"]), fp8=True)
    convert(snapshot, tmp_path / "out", precision="fp8")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization"]["kv_cache_quant_algo"] is None
    assert not any("cache" in name for name in tensors_of(tmp_path / "out"))


def test_a_source_that_scales_while_running(tmp_path: Path) -> None:
    folder = write_fp8_folder(tmp_path / "fp8", CONFIGS["llama"], kv=False, static=False)
    snapshot = open_snapshot(folder, fp8=True)
    convert(snapshot, tmp_path / "out", precision="fp8", format="hf", static=False)
    with pytest.raises(UsageError, match="without input scales"):
        prepare(snapshot, precision="fp8", format="hf")


def test_a_folder_that_does_not_say_how_inputs_are_scaled(tmp_path: Path) -> None:
    for static in (True, False):
        folder = write_fp8_folder(
            tmp_path / str(static),
            CONFIGS["llama"],
            static=static,
            kv=False,
            change=lambda t, c, s: c["quantization_config"].pop("config_groups") and None,
        )
        found = open_snapshot(folder, fp8=True).quantization
        assert found is not None and found.static is static


def test_our_folder_without_input_scales_says_so(tmp_path: Path) -> None:
    source = open_snapshot(write_model(tmp_path / "bf16", CONFIGS["nas"]))
    blocks = given_scales(CONFIGS["nas"], random_weights(CONFIGS["nas"]), static=False)
    convert(source, tmp_path / "hf", precision="fp8", format="hf", static=False, scales=blocks)
    assert read_scheme(tmp_path / "hf", json.loads((tmp_path / "hf/config.json").read_text())).static is False
    assert verify(tmp_path / "hf", source).findings == ()
    convert(open_snapshot(tmp_path / "hf", fp8=True), tmp_path / "o", precision="fp8", format="hf", static=False)


def test_fp8_must_be_asked_for(tmp_path: Path) -> None:
    folder = write_fp8_folder(tmp_path / "fp8", CONFIGS["llama"])
    with pytest.raises(UsageError) as caught:
        open_snapshot(folder)
    assert caught.value.code == "quantised-weights"
    with pytest.raises(UsageError, match="--precision fp8"):
        prepare(open_snapshot(folder, fp8=True))


def test_only_one_of_the_two_descriptions_is_enough(tmp_path: Path) -> None:
    def inline_only(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
        separate.clear()

    def separate_only(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
        del config["quantization_config"]

    def old_inline(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
        # ModelOpt 0.33
        del config["quantization_config"]["quant_method"]
        config["quantization_config"]["kv_cache_scheme"] = "FP8"

    for n, change in enumerate((inline_only, separate_only, old_inline)):
        folder = write_fp8_folder(tmp_path / str(n), CONFIGS["llama"], change=change)
        snapshot = open_snapshot(folder, fp8=True)
        assert snapshot.quantization is not None and snapshot.quantization.kv_scales


def test_a_changed_description_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = write_fp8_folder(tmp_path / "fp8", CONFIGS["llama"])
    before = open_snapshot(folder, fp8=True).fingerprint
    value = json.loads((folder / "hf_quant_config.json").read_text())
    value["producer"]["version"] = "0.1"
    (folder / "hf_quant_config.json").write_text(json.dumps(value))
    assert open_snapshot(folder, fp8=True).fingerprint != before


UP = "model.layers.1.mlp.up_proj."
Change = Callable[[Tensors, dict[str, Any], dict[str, Any]], object]


def set_scale(name: str, value: float) -> Change:
    return lambda t, c, s: t.update({name: np.full_like(t[name], value)})


def as_bf16(*names: str) -> Change:
    def change(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith(names)]:
            tensors[name] = tensors[name].astype(BF16)

    return change


def excluded(module: str, *, change: Change = lambda t, c, s: None) -> Change:
    def both(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
        config["quantization_config"]["ignore"].append(module)
        separate["quantization"]["exclude_modules"].append(module)
        change(tensors, config, separate)

    return both


def algorithm(**values: Any) -> Change:
    """The same in both descriptions."""

    def change(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
        separate["quantization"] |= values
        config["quantization_config"] |= {k: v for k, v in values.items() if k == "quant_algo"}

    return change


def group(**values: Any) -> Change:
    return lambda t, c, s: c["quantization_config"]["config_groups"]["group_0"].update(values)


def inputs(**values: Any) -> Change:
    return lambda t, c, s: c["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(values)


def block_scales(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
    tensors[UP + "weight_scale"] = np.ones((2, 1), np.float32)


def fp8_head(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(FP8)


REFUSED: dict[str, tuple[Change, str, str]] = {
    "scale of zero": (set_scale(UP + "weight_scale", 0.0), "bad-scale", UP + "weight_scale"),
    "negative scale": (set_scale(UP + "input_scale", -1.0), "bad-scale", UP + "input_scale"),
    "scale of NaN": (set_scale(UP + "weight_scale", np.nan), "bad-scale", "nan"),
    "KV scale of Inf": (
        set_scale("model.layers.1.self_attn.k_proj.k_scale", np.inf),
        "bad-scale",
        "model.layers.1.self_attn.k_proj.k_scale",
    ),
    "half FP8": (as_bf16("mlp.up_proj.weight"), "quantization-contradiction", r"up_proj.*is BF16 \(18 of 21 are FP8\)"),
    "not FP8 at all": (as_bf16("_proj.weight"), "quantization-contradiction", r"0 of 21 are FP8"),
    "half FP8 and says so": (
        excluded("model.layers.1*", change=as_bf16("layers.1.mlp.up_proj.weight")),
        "quantization-contradiction",
        "excludes 'model.layers.1",
    ),
    "one layer left out": (
        excluded("model.layers.1.mlp.up_proj", change=as_bf16("layers.1.mlp.up_proj.weight")),
        "partly-quantised",
        "20 of 21",
    ),
    "excluded but FP8": (excluded("*.down_proj"), "quantization-contradiction", "down_proj.*which is FP8"),
    "no scale": (lambda t, c, s: t.pop(UP + "weight_scale"), "scale-missing", "20 of 21"),
    "no input scale": (lambda t, c, s: t.pop(UP + "input_scale"), "scale-missing", UP + "input_scale"),
    "no input scale at all": (
        lambda t, c, s: [t.pop(name) for name in list(t) if name.endswith("input_scale")],
        "quantization-contradiction",
        "config.json contradicts.*input_activations.dynamic in its config_groups is false",
    ),
    "input scales denied": (
        inputs(dynamic=True),
        "quantization-contradiction",
        "input_activations.dynamic in its config_groups is true",
    ),
    "inputs of four bits": (inputs(num_bits=4), "unsupported-quantization", "group_0.input_activations num_bits=4"),
    "inputs scaled by token": (inputs(strategy="token"), "unsupported-quantization", "strategy='token'"),
    "weights of four bits": (group(weights={"num_bits": 4, "type": "int"}), "unsupported-quantization", "num_bits=4"),
    "weights scaled while running": (
        group(weights={"num_bits": 8, "type": "float", "dynamic": True}),
        "unsupported-quantization",
        "group_0.weights .*dynamic=True",
    ),
    "a list of groups": (
        lambda t, c, s: c["quantization_config"].update(config_groups=[1]),
        "unsupported-quantization",
        "config_groups",
    ),
    "groups of two minds": (
        lambda t, c, s: c["quantization_config"]["config_groups"].update(
            group_1={"input_activations": {"num_bits": 8, "type": "float", "dynamic": True}}
        ),
        "unsupported-quantization",
        "differ in input_activations.dynamic",
    ),
    "other layers": (group(targets=["re:.*q_proj"]), "unsupported-quantization", "other targets"),
    "KV cache a list": (
        lambda t, c, s: c["quantization_config"].update(kv_cache_scheme=[1]),
        "unsupported-quantization",
        "kv_cache_scheme",
    ),
    "no key scale": (lambda t, c, s: t.pop("model.layers.2.self_attn.k_proj.k_scale"), "scale-missing", "k_scale"),
    "KV scales denied": (
        lambda t, c, s: (
            s["quantization"].update(kv_cache_quant_algo=None),
            c["quantization_config"].pop("kv_cache_scheme"),
        ),
        "quantization-contradiction",
        "KV cache is not quantised",
    ),
    "two opinions on the KV cache": (
        lambda t, c, s: s["quantization"].update(kv_cache_quant_algo=None),
        "quantization-contradiction",
        r"differ in the KV cache \(kv_cache_quant_algo, kv_cache_scheme\)",
    ),
    "two opinions on what is excluded": (
        lambda t, c, s: s["quantization"].update(exclude_modules=[]),
        "quantization-contradiction",
        "excluded modules",
    ),
    "two forms": (
        lambda t, c, s: c.update(quantization_config=quantization_config("compressed-tensors")),
        "quantization-contradiction",
        "method",
    ),
    "scales of blocks": (block_scales, "unsupported-quantization", r"\(2, 1\), which is a scale per row or block"),
    "embedding in FP8": (fp8_head, "unsupported-quantization", "model.embed_tokens.weight"),
    "NVFP4": (algorithm(quant_algo="NVFP4"), "unsupported-quantization", "NVFP4"),
    "block-scaled": (algorithm(quant_algo="FP8_PB_WO"), "unsupported-quantization", "FP8_PB_WO"),
    "mixed": (algorithm(quant_algo="MIXED_PRECISION"), "unsupported-quantization", "MIXED_PRECISION"),
    "INT8 KV": (algorithm(kv_cache_quant_algo="INT8"), "unsupported-quantization", "INT8"),
    "NaN in a weight": (
        lambda t, c, s: t[UP + "weight"].view(np.uint8).__setitem__((3, 5), 0xFF),
        "not-finite",
        r"model.layers.1.mlp.up_proj.weight.*\[3, 5\]",
    ),
    "a list": (lambda t, c, s: c.update(quantization_config=["fp8"]), "unsupported-quantization", "fp8"),
    "no details": (lambda t, c, s: s.pop("quantization"), "quantization-contradiction", "no object 'quantization'"),
    "excluded is no list": (algorithm(exclude_modules="lm_head"), "unsupported-quantization", "no list of names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_cannot_be_trusted(name: str, tmp_path: Path) -> None:
    change, code, word = REFUSED[name]
    folder = write_fp8_folder(tmp_path / "fp8", CONFIGS["llama"], change=lambda *parts: change(*parts) and None)
    with pytest.raises(NemobuildError, match=word) as caught:
        convert(open_snapshot(folder, fp8=True), tmp_path / "out", precision="fp8", kv_cache="fp8")
    assert caught.value.code == code
    assert caught.value.why and caught.value.next
    assert [f.name for f in tmp_path.iterdir()] == ["fp8"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"weights": {"strategy": "channel"}}, "strategy='channel'"),
        ({"weights": {"strategy": "block"}}, "strategy='block'"),
        ({"weights": None}, "group_0.weights None"),
        ({"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}}, "num_bits=4"),
        ({"input_activations": {"dynamic": True, "strategy": "token"}}, "dynamic=True"),
        ({"targets": ["re:.*q_proj"]}, "other targets"),
    ],
)
def test_other_kinds_of_compressed_tensors(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    def change(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
        group = config["quantization_config"]["config_groups"]["group_0"]
        for key, value in changes.items():
            group[key] = group[key] | value if isinstance(value, dict) else value

    folder = write_fp8_folder(tmp_path / "m", CONFIGS["llama"], form="compressed-tensors", change=change)
    with pytest.raises(UsageError, match=word) as caught:
        open_snapshot(folder, fp8=True)
    assert caught.value.code == "unsupported-quantization"


@pytest.mark.parametrize("changes", [{"type": "int"}, {"dynamic": True}, {"num_bits": 4}])
def test_other_kinds_of_compressed_kv_caches(changes: dict[str, Any], tmp_path: Path) -> None:
    """They need no scale tensors, so that nothing else would show them."""

    def change(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
        config["quantization_config"]["kv_cache_scheme"] = config["quantization_config"]["kv_cache_scheme"] | changes
        for name in [n for n in tensors if n.endswith((".k_scale", ".v_scale"))]:
            del tensors[name]

    folder = write_fp8_folder(tmp_path / "m", CONFIGS["llama"], form="compressed-tensors", change=change)
    with pytest.raises(UsageError, match=r"config\.json has kv_cache_scheme") as caught:
        open_snapshot(folder, fp8=True)
    assert caught.value.code == "unsupported-quantization"


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"quant_method": "awq", "bits": 4}, "'awq'"),
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "'fp8'"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "'pack-quantized'"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        ({}, "quant_method None"),
    ],
)
def test_other_quantisations_are_refused_by_name(config: dict[str, Any], word: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIGS["llama"])
    (folder / "config.json").write_text(json.dumps(CONFIGS["llama"] | {"quantization_config": config}))
    for fp8 in (False, True):
        with pytest.raises(UsageError, match=word) as caught:
            open_snapshot(folder, fp8=fp8)
        assert caught.value.code == "unsupported-quantization"


def test_scales_in_bf16_are_widened(tmp_path: Path) -> None:
    """compressed-tensors stores scales in the dtype of the model."""

    def change(tensors: Tensors, config: dict[str, Any], separate: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith("_scale")]:
            tensors[name] = tensors[name].astype(BF16)

    folder = write_fp8_folder(tmp_path / "m", CONFIGS["llama"], form="compressed-tensors", change=change)
    snapshot = open_snapshot(folder, fp8=True)
    scales = tensors_of(folder)[UP + "weight_scale"].astype(np.float32)
    assert source_scales(snapshot).weights[UP + "weight"] == float(scales[0])
    convert(snapshot, tmp_path / "out", precision="fp8", kv_cache="fp8")
    made = tensors_of(tmp_path / "out")["transformer.layers.1.mlp.gate.weights_scaling_factor"]
    assert made.dtype == np.float32 and float(made[0]) >= float(scales[0])
