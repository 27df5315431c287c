"""Calibration block by block against the whole model at once, its memory, and activations that are not finite."""

from __future__ import annotations

import dataclasses
import math
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nemobuild.config import QualityConfig
from nemobuild.convert import calibrate as module
from nemobuild.convert import calibrate_torch
from nemobuild.convert.calibrate import calibrate, plan_calibration, weight_scales
from nemobuild.convert.calibrate_devices import PANEL_VALUES, NumpyDevice
from nemobuild.convert.calibrate_state import State
from nemobuild.convert.calibrate_torch import HeldStream, TorchDevice, held_bytes
from nemobuild.convert.quality import QualityThresholds
from nemobuild.convert.scales import BlockScales
from nemobuild.errors import DoesNotFit, IntegrityError, ToolchainError, UsageError
from nemobuild.model import forward
from nemobuild.model.hf_config import spec_from_config
from nemobuild.model.spec import Attention
from nemobuild.weights.snapshot import Snapshot, open_snapshot
from tests.tiny import random_weights, tiny_config, write_model, write_weights

LENGTHS = (5, 1, 40, 17, 300, 2, 64)


def make(folder: Path, weights: dict[str, np.ndarray] | None = None, **changes: Any) -> Snapshot:
    config = tiny_config(**changes)
    write_model(folder, config)
    if weights is not None:
        write_weights(folder, weights)
    return open_snapshot(folder)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return make(tmp_path_factory.mktemp("calibrate") / "m")


def texts(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 265, n).tolist() for n in lengths]


def run(snapshot: Snapshot, folder: Path, sequences: list[list[int]], **options: Any) -> list[BlockScales]:
    plan = plan_calibration(snapshot, [len(s) for s in sequences])
    state = State(folder / "state", {"of": "test"}, resume=options.pop("resume", False))
    try:
        return list(calibrate(snapshot, sequences, plan, state, **options))
    finally:
        state.close()


def numbers(blocks: list[BlockScales]) -> np.ndarray:
    found: list[float] = []
    for block in blocks:
        for pair in block.groups.values():
            found += [pair.weight, math.nan if pair.input is None else pair.input]
        found += [] if block.kv is None else [block.kv.key, block.kv.value]
    return np.array(found)


def at_once(weights: dict[str, np.ndarray], sequences: list[list[int]]) -> list[dict[str, float]]:
    """Largest magnitudes by block, from the whole model in float32 and all texts in one step."""
    spec = spec_from_config(tiny_config())
    wide = {name: w.astype(np.float32) for name, w in weights.items()}
    found: list[dict[str, float]] = []
    ends = forward.hf_ends(spec, wide.__getitem__)
    lengths = [len(s) for s in sequences]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    hidden = forward.embed(ends, np.concatenate(sequences))
    step = forward.make_step(spec, [forward.Segment(s, 0, n) for s, n in zip(starts, lengths, strict=True)], hidden)
    for i, block in enumerate(spec.blocks):
        seen: dict[str, float] = {}

        def watch(name: str, x: Any, weight: Any, seen: dict[str, float] = seen) -> Any:
            seen[name] = float(np.abs(x).max())
            seen[f"{name} weight"] = float(np.abs(weight).max())
            return x @ weight.T

        cache = forward.new_cache(spec, block, sum(lengths), hidden)
        hidden = forward.run_block(spec, block, forward.hf_block(spec, i, wide.__getitem__), hidden, step, cache, watch)
        if cache is not None:
            seen |= {"keys": float(np.abs(cache.keys).max()), "values": float(np.abs(cache.values).max())}
        found.append(seen)
    return found


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_the_scales_are_those_of_the_whole_model(dtype: Any, tmp_path: Path) -> None:
    weights = {name: w.astype(dtype) for name, w in random_weights(tiny_config()).items()}
    blocks = run(make(tmp_path / "m", weights), tmp_path, texts())
    expected = at_once(weights, texts())
    assert len(blocks) == len(expected)
    for i, (block, seen) in enumerate(zip(blocks, expected, strict=True)):
        linears = {name for name in seen if f"{name} weight" in seen}
        assert set(block.groups) == {f"model.layers.{i}.{name}" for name in linears}
        for group, pair in block.groups.items():
            name = group.rsplit(".", 1)[1]
            assert pair.weight == np.float32(seen[f"{name} weight"]) / np.float32(448)
            assert pair.input == pytest.approx(seen[name] / 448, rel=1e-5)
        assert (block.kv is None) == ("keys" not in seen)
        if block.kv is not None:
            assert block.kv.key == pytest.approx(seen["keys"] / 448, rel=1e-5)
            assert block.kv.value == pytest.approx(seen["values"] / 448, rel=1e-5)


def test_how_texts_are_cut_into_batches_does_not_matter(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = numbers(run(snapshot, tmp_path, texts()))
    monkeypatch.setattr(module, "MIN_BATCH_TOKENS", 1)
    monkeypatch.setitem(module.MAX_BATCH_TOKENS, "cpu", 23)  # cuts the long texts in the middle
    plan = plan_calibration(snapshot, LENGTHS)
    assert plan.batch_tokens == 23 and [p.starts for p in plan.packs[:2]] == [(0, 5), (6,)]
    np.testing.assert_allclose(numbers(run(snapshot, tmp_path, texts())), whole, rtol=1e-5)


def test_a_plan_takes_every_token_once(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIN_BATCH_TOKENS", 1)
    rng = np.random.default_rng(0)
    for most in (1, 2, 7, 64):
        monkeypatch.setitem(module.MAX_BATCH_TOKENS, "cpu", most)
        lengths = rng.integers(1, 30, 12).tolist()
        plan = plan_calibration(snapshot, lengths)
        seen = []
        for pack in plan.packs:
            for first, last, segments in pack.batches(plan.batch_tokens):
                assert 0 < last - first <= max(plan.batch_tokens, 1) and sum(s.count for s in segments) == last - first
                seen += [(first, last)]
        assert [a for a, _ in seen] == [0, *(b for _, b in seen[:-1])] and seen[-1][1] == sum(lengths)
        assert [s for p in plan.packs for s in p.starts] == np.cumsum([0, *lengths[:-1]]).tolist()


def test_memory_stays_below_what_is_said_and_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    wide = {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"intermediate_size": 2048, "no_op": False}}
    snapshot = make(tmp_path / "m", block_configs=[wide] * 4, num_hidden_layers=4, hidden_size=512, head_dim=64)
    assert snapshot.spec.hidden_size == 512
    peaks = []
    for count in (80, 240):
        sequences = texts((128,) * count)
        plan = plan_calibration(snapshot, [128] * count)
        tracemalloc.start()
        run(snapshot, tmp_path, sequences)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert peaks[-1] <= plan.memory_bytes
        # Without BLAS and stacks, which are not traced, the statement is not a mere upper bound.
        assert peaks[-1] > 0.5 * (plan.memory_bytes - plan.threads * module._THREAD_BYTES)
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("part", ["norm", "weight"])
def test_values_that_are_not_finite_are_named(part: str, tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    if part == "norm":
        # Finite weights whose product is not: the input of the MLP of block 1 overflows.
        weights["model.layers.1.post_attention_layernorm.weight"][:] = 3e38
        weights["model.layers.1.post_attention_layernorm.weight"][3] = np.inf
        words = "input of gate_up in block 1"
    else:
        weights["model.layers.2.mlp.up_proj.weight"][3, 7] = np.nan
        words = r"model\.layers\.2\.mlp\.up_proj\.weight.*\[3, 7\]"
    with pytest.raises(IntegrityError, match=words):
        run(make(tmp_path / "m", weights), tmp_path, texts((5, 9)))


def test_what_is_zero_gets_the_scale_one(tmp_path: Path) -> None:
    weights = random_weights(tiny_config())
    weights["model.layers.0.self_attn.v_proj.weight"][:] = 0
    weights["model.layers.1.self_attn.o_proj.weight"][:] = 0
    blocks = run(make(tmp_path / "m", weights), tmp_path, texts((5, 9)))
    assert blocks[0].kv is not None and blocks[0].kv.value == 1.0
    assert blocks[0].groups["model.layers.0.o"].input == 1.0
    assert blocks[1].groups["model.layers.1.o"].weight == 1.0


def test_without_data_there_are_weight_scales_alone(snapshot: Snapshot, tmp_path: Path) -> None:
    blocks = list(weight_scales(snapshot))
    with_data = run(snapshot, tmp_path, texts((5,)))
    assert [{g: p.weight for g, p in b.groups.items()} for b in blocks] == [
        {g: p.weight for g, p in b.groups.items()} for b in with_data
    ]
    assert all(p.input is None for b in blocks for p in b.groups.values()) and all(b.kv is None for b in blocks)


def test_it_goes_on_where_it_was_stopped(snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(snapshot, tmp_path / "whole", texts())
    begun: list[int] = []
    original = module._run
    monkeypatch.setattr(module, "_run", lambda d, i, *a: begun.append(i) or original(d, i, *a))
    found = run(snapshot, tmp_path, texts(), stopped=lambda: len(begun) > 4)
    assert len(found) == 4 and begun == [0, 1, 2, 3, 4]
    begun.clear()
    assert run(snapshot, tmp_path, texts(), resume=True) == whole
    assert begun == list(range(4, len(whole)))
    begun.clear()
    assert run(snapshot, tmp_path, texts(), resume=True) == whole and not begun


def test_after_a_power_cut_known_scales_stay_and_the_rest_is_run_again(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(snapshot, tmp_path / "whole", texts())
    begun: list[int] = []
    original = module._run
    monkeypatch.setattr(module, "_run", lambda d, i, *a: begun.append(i) or original(d, i, *a))
    run(snapshot, tmp_path, texts(), stopped=lambda: len(begun) > 4)
    for file in (tmp_path / "state").glob("stream.*"):
        file.write_bytes(b"\xff" * file.stat().st_size)  # never reached the disk
    monkeypatch.setattr("nemobuild.convert.calibrate_state._boot_id", lambda: "another")
    begun.clear()
    # Interrupted once more, it goes on from what it saved since then.
    run(snapshot, tmp_path, texts(), resume=True, stopped=lambda: len(begun) > 7)
    assert begun == list(range(8))
    begun.clear()
    assert run(snapshot, tmp_path, texts(), resume=True) == whole
    assert begun == list(range(7, len(whole)))


def test_streams_are_not_trusted_when_nobody_knows_of_a_power_cut(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemobuild.convert.calibrate_state._BOOT_ID", tmp_path / "absent")
    for saved in (None, None):
        state = State(tmp_path / "s", {}, resume=True)
        assert state.saved is saved
        state.begin()
        state.close()


class HeldDevice(NumpyDevice):
    """NumPy with the streams held in memory, as on a GPU."""

    def stream(self, state: State, tokens: int) -> HeldStream:
        held = np.empty((tokens, self.snapshot.spec.hidden_size), np.float32)
        return HeldStream(state, held, np.asarray, np.ascontiguousarray)


@pytest.mark.parametrize("kill", [False, True])
def test_saves_that_cost_much_are_skipped_and_none_harms_the_one_before(
    kill: bool, snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(snapshot, tmp_path / "whole", texts())
    clock, began = [0.0], []
    monkeypatch.setattr(calibrate_torch.time, "monotonic", lambda: clock[0])
    write = State.write_stream

    def slow_write(state: State, offset_bytes: int, buffer: Any) -> None:
        """Five seconds for all; the second time, a kill after half of them."""
        clock[0] += 5
        began.append(len(state.scales()))
        if kill and len(began) == 2:
            write(state, offset_bytes, memoryview(buffer).cast("B")[: buffer.nbytes // 2])
            raise KeyboardInterrupt
        write(state, offset_bytes, buffer)

    def block(*arguments: Any) -> Any:
        clock[0] += 40  # so 5 s are worth it after 100 s, three blocks
        return original(*arguments)

    original = module._run
    monkeypatch.setattr(State, "write_stream", slow_write)
    monkeypatch.setattr(module, "_run", block)
    if not kill:
        assert run(snapshot, tmp_path, texts(), device=HeldDevice(snapshot)) == whole
        # Embedded; then after blocks 2, 5 and 8, whose own scales come a moment later.
        assert began == [0, 2, 5, 8]
        return
    with pytest.raises(KeyboardInterrupt):
        run(snapshot, tmp_path, texts(), device=HeldDevice(snapshot))
    assert began == [0, 2]
    assert run(snapshot, tmp_path, texts(), device=HeldDevice(snapshot), resume=True) == whole


def test_a_full_gpu_is_told_by_name(snapshot: Snapshot, tmp_path: Path) -> None:
    class OutOfMemoryError(RuntimeError):
        """torch's own has this name and this base."""

    class Full(NumpyDevice):
        def linear(self, x: Any, weight: Any) -> Any:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with pytest.raises(DoesNotFit, match="Tried to allocate 2 GiB") as caught:
        run(snapshot, tmp_path, texts((5,)), device=Full(snapshot))
    assert caught.value.code == "gpu-memory-too-small"


def test_blocks_without_attention_need_no_positions(
    snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    step = NumpyDevice.step
    monkeypatch.setattr(NumpyDevice, "step", lambda *a: made.append(1) or step(*a))
    monkeypatch.setattr(module, "available_cpus", lambda: 1)
    plan = plan_calibration(snapshot, LENGTHS)
    run(snapshot, tmp_path, texts())
    batches = sum(1 for pack in plan.packs for _ in pack.batches(plan.batch_tokens))
    assert len(made) == batches * len(snapshot.spec.attention_blocks) < batches * len(snapshot.spec.blocks)


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    State(tmp_path / "s", {"source files": "a", "calibration": "b"}, resume=False).close()
    with pytest.raises(UsageError, match="differs in calibration"):
        State(tmp_path / "s", {"source files": "a", "calibration": "c"}, resume=True)
    (tmp_path / "s" / "journal").write_text("junk\n")
    with pytest.raises(UsageError, match="unreadable"):
        State(tmp_path / "s", {"source files": "a", "calibration": "b"}, resume=True)
    first = State(tmp_path / "s", {"a": "b"}, resume=False)
    with pytest.raises(UsageError, match="Another calibration"):
        State(tmp_path / "s", {"a": "b"}, resume=True)
    first.close()


def test_bad_requests(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no text"):
        plan_calibration(snapshot, [])
    with pytest.raises(UsageError, match="'tpu' is unknown"):
        plan_calibration(snapshot, [3], "tpu")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ToolchainError, match="needs PyTorch"):
        TorchDevice(snapshot)


def test_the_49b_fits_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stated peak for the real shapes: on one H100 with 512 texts of 512 tokens, and on the CPU with any number."""
    from nemobuild.model.hf_config import load_spec
    from nemobuild.places import config_file
    from nemobuild.weights.safetensors import TensorInfo

    spec = load_spec(config_file("super-49b-v1.5"))
    tensors = {
        name: TensorInfo(name, "BF16", shape, Path(), 0, 2 * math.prod(shape))
        for name, shape in spec.tensor_shapes().items()
    }
    snapshot = Snapshot(Path(), spec, tensors, (), "")
    gpu = plan_calibration(snapshot, [512] * 512, "cuda")
    assert gpu.device_bytes < 16 << 30
    assert max(held_bytes(snapshot, i) for i in range(80)) == pytest.approx(gpu.block_bytes, rel=1e-3)
    # More than what is held at least: two blocks, all streams.
    assert gpu.device_bytes > 2 * gpu.block_bytes + 512 * 512 * 8192 * 4 + (1 << 30)
    block_bytes = 2 * (8192 * (10240 + 8192) + 3 * 8192 * 28672) + 4 * 8192
    for threads in (1, 4, 32):
        monkeypatch.setattr(module, "available_cpus", lambda count=threads: count)
        cpu = plan_calibration(snapshot, [512] * 512)
        assert cpu.block_bytes == block_bytes and cpu.threads == threads
        assert cpu.memory_bytes < (2 if threads <= 4 else 4) * block_bytes
        with monkeypatch.context() as without:
            without.setattr(module, "PANEL_VALUES", 0)
            rest = plan_calibration(snapshot, [512] * 512)
        assert cpu.memory_bytes - rest.memory_bytes == threads * 4 * PANEL_VALUES


def test_torch_finds_the_same(snapshot: Snapshot, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    expected = run(snapshot, tmp_path / "a", texts())
    found = run(snapshot, tmp_path / "b", texts(), device=TorchDevice(snapshot, "cpu"))
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=0.05)
    assert [b.groups.keys() for b in found] == [b.groups.keys() for b in expected]
    for a, b in zip(found, expected, strict=True):
        assert [p.weight for p in a.groups.values()] == [p.weight for p in b.groups.values()]


def test_torch_keeps_f16_apart_from_activations(tmp_path: Path) -> None:
    """An activation above 65504 is nothing that F16 weights are to blame for."""
    pytest.importorskip("torch")
    weights = {name: w.astype(np.float16) for name, w in random_weights(tiny_config()).items()}
    weights["model.layers.1.post_attention_layernorm.weight"][:] = 60000
    snapshot = make(tmp_path / "m", weights)
    expected = run(snapshot, tmp_path / "a", texts())
    assert max(p.input or 0 for p in expected[1].groups.values()) * 448 > 65504
    found = run(snapshot, tmp_path / "b", texts(), device=TorchDevice(snapshot, "cpu"))
    np.testing.assert_allclose(numbers(found), numbers(expected), rtol=1e-4)


def test_torch_takes_its_buffers_once(snapshot: Snapshot) -> None:
    pytest.importorskip("torch")
    places = set()
    for i, weights in TorchDevice(snapshot, "cpu").blocks(0):
        found = [getattr(weights, f.name) for f in dataclasses.fields(weights)]
        assert sum(-(-x.nbytes // 512) * 512 for x in found if x is not None) == held_bytes(snapshot, i)
        places |= {(i % 2, x.untyped_storage().data_ptr()) for x in found if x is not None}
    assert len(places) == 2


def test_torch_goes_on_too(snapshot: Snapshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    whole = run(snapshot, tmp_path / "whole", texts(), device=TorchDevice(snapshot, "cpu"))
    calls = [0]
    original = module._run

    def count(*arguments: Any) -> Any:
        calls[0] += 1
        return original(*arguments)

    monkeypatch.setattr(module, "_run", count)
    device = TorchDevice(snapshot, "cpu")
    run(snapshot, tmp_path, texts(), device=device, stopped=lambda: calls[0] > 4)
    assert run(snapshot, tmp_path, texts(), device=TorchDevice(snapshot, "cpu"), resume=True) == whole


def test_the_profile_and_the_gate_have_the_same_bounds() -> None:
    assert QualityConfig().model_dump() == dataclasses.asdict(QualityThresholds())


def test_only_attention_has_kv_scales(snapshot: Snapshot, tmp_path: Path) -> None:
    blocks = run(snapshot, tmp_path, texts((9,)))
    assert [b.kv is not None for b in blocks] == [isinstance(b.attention, Attention) for b in snapshot.spec.blocks]
