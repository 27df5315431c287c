"""FP8 in one pass: calibration finds the scales of a block while the executor writes the blocks before it.

The executor is the only writer and asks for the scales of each block when it comes to it. Calibration runs in a
thread of its own and is ahead by the block that runs; what it read, the executor finds in the page cache. What both
need is known and checked before either starts.

A kill leaves two folders beside the output: the executor's partial one and the calibration's, and both go on with
``resume``. Everything else that ends a run early leaves neither.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemobuild.convert import executor, planning
from nemobuild.convert.calibrate import CalibrationPlan, calibrate, check_device, plan_calibration, weight_scales
from nemobuild.convert.calibrate_state import State
from nemobuild.convert.calibrate_torch import TorchDevice
from nemobuild.convert.journal import refuse_existing
from nemobuild.convert.samples import SampleSet, default_calibration, load_samples, prompt_digest
from nemobuild.convert.scales import BlockScales
from nemobuild.convert.workers import Progress
from nemobuild.engine.cpu.memory import available_memory_bytes
from nemobuild.errors import DoesNotFit, NemobuildError, UsageError
from nemobuild.units import format_bytes
from nemobuild.weights.snapshot import Snapshot

NO_DATA = "none"
DEFAULT_TOKENS_PER_SAMPLE = 512


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What a conversion to FP8 will do and need. ``samples`` and ``calibration`` are ``None`` where no text is run:
    for a source that is FP8 already, and without data."""

    snapshot: Snapshot
    form: dict[str, Any]
    conversion: planning.Plan
    samples: SampleSet | None
    calibration: CalibrationPlan | None
    description: dict[str, Any] | None

    @property
    def parts(self) -> tuple[tuple[str, int], ...]:
        """Name and bytes of everything in the stated peak of the host's memory."""
        parts = [("writing", self.conversion.peak_memory_bytes)]
        if self.calibration is not None:
            held = self.calibration.block_bytes if self.calibration.device == "cpu" else 0
            parts.append(("largest block" if held else "PyTorch", held or self.calibration.memory_bytes))
            if held:
                parts.append((f"batches of {self.calibration.threads} threads", self.calibration.memory_bytes - held))
        elif self.description is not None:
            parts.append(("largest block", _largest_block(self.snapshot)))
        return tuple(parts)

    @property
    def peak_memory_bytes(self) -> int:
        return sum(size for _, size in self.parts)

    @property
    def stream_bytes(self) -> int:
        """Disk for the residual streams, which are gone in the end."""
        return self.calibration.disk_bytes if self.calibration is not None else 0

    @property
    def disk_bytes(self) -> int:
        return self.conversion.disk_bytes + self.stream_bytes


def prepare(
    snapshot: Snapshot,
    *,
    format: str = "trtllm",
    kv_cache: str = "bf16",
    clamp_kv: bool = True,
    tp: int = 1,
    pp: int = 1,
    calibration: Path | str | None = None,
    samples: int | None = None,
    tokens_per_sample: int | None = DEFAULT_TOKENS_PER_SAMPLE,
    reasoning: str | None = None,
    device: str = "cpu",
    workers: int | None = None,
) -> QuantizePlan:
    """Plan and prove a conversion of ``snapshot`` to FP8; reads texts and tokenizer, no weights.

    ``calibration`` is a file of JSON lines (see ``samples``), ``None`` for the texts that ship with nemobuild, or
    ``"none"``: scales from the weights alone, activations scaled while the model runs (Hugging Face form only). A
    source that is FP8 already keeps its scales and takes no texts.

    Raises ``UsageError`` (form, device, texts), ``ToolchainError`` (``cuda`` without a GPU), ``IntegrityError``
    (tokenizer).
    """
    form: dict[str, Any] = {"precision": "fp8", "format": format, "kv_cache": kv_cache, "clamp_kv": clamp_kv}
    form |= {"tp": tp, "pp": pp, "workers": workers, "static": calibration != NO_DATA}
    if snapshot.quantization is not None:
        if calibration is not None:
            raise UsageError(
                "already-quantised",
                f"{snapshot.path} is FP8 already and brings its scales.",
                why="Calibration needs the model's own precision.",
                next="Leave --calibration out, or convert the BF16 form of the model.",
            )
        form["static"] = snapshot.quantization.static
        return QuantizePlan(snapshot, form, planning.prepare(snapshot, **form), None, None, None)
    if calibration == NO_DATA:
        description: dict[str, Any] = {"method": "weights only", "activations": "dynamic"}
        conversion = planning.prepare(snapshot, **form, calibration=description)
        return QuantizePlan(snapshot, form, conversion, None, None, description)
    # A form or a device that cannot be is told before a thousand texts are read.
    planning.prepare(snapshot, **form)
    check_device(device)
    path = Path(calibration) if calibration is not None else default_calibration()
    texts = load_samples(
        path, snapshot.path, snapshot.spec, count=samples, tokens_per_sample=tokens_per_sample, reasoning=reasoning
    )
    run = plan_calibration(snapshot, [len(s.token_ids) for s in texts.samples], device)
    description = {
        "method": "largest magnitude",
        "activations": "static",
        "texts": f"sha256:{texts.digest}",
        # What the texts became: tokenizer, template and reasoning policy are in it.
        "token_ids": f"sha256:{_digest(texts)}",
        "prompt": prompt_digest(snapshot.path, reasoning),
        "samples": len(texts.samples),
        "tokens_per_sample": tokens_per_sample,
        "tokens": texts.tokens,
        "device": device,
    }
    conversion = planning.prepare(snapshot, **form, calibration=description)
    return QuantizePlan(snapshot, form, conversion, texts, run, description)


def quantize(
    plan: QuantizePlan,
    output: Path,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    durable: bool = True,
) -> executor.Report:
    """Carry ``plan`` out: calibrate and write the new folder ``output``.

    Raises what ``executor.convert`` raises, ``DoesNotFit`` when memory or disk is too small for what the plan states,
    and ``IntegrityError`` with block and linear when an activation is not finite.
    """
    output = Path(output).absolute()
    refuse_existing(output)
    check_room(plan, output)
    if resume and calibration_folder(output).is_dir():
        # Before anything is made or taken away; whoever has the executor's lock opens it again.
        _open_state(plan, calibration_folder(output), resume=True).close()
    convert = partial(
        executor.convert,
        plan.snapshot,
        output,
        **plan.form,
        calibration=plan.description,
        resume=resume,
        progress=progress,
        durable=durable,
    )
    if plan.description is None:
        return convert()
    source = _Source(plan, calibration_folder(output), resume=resume)
    try:
        report = convert(scales=source, on_stop=source.stop)
    except NemobuildError as error:
        source.close(discard=error.code != "io-error" and source.started)
        raise
    except BaseException:
        source.close(discard=False)
        raise
    source.close(discard=True)
    return report


def calibration_folder(output: Path) -> Path:
    """``.NAME.calibration`` beside ``output``: what an interrupted calibration goes on from."""
    return output.parent / f".{output.name}.calibration"


def check_room(plan: QuantizePlan, output: Path) -> None:
    """Raise ``DoesNotFit`` when memory, GPU memory or disk is less than the plan states."""
    available_bytes = available_memory_bytes()
    if available_bytes is not None and available_bytes < plan.peak_memory_bytes:
        raise DoesNotFit(
            "memory-too-small",
            f"{format_bytes(available_bytes)} of memory are available; FP8 conversion of this model needs "
            f"{format_bytes(plan.peak_memory_bytes)}.",
            why=f"That is {', '.join(f'{name} {format_bytes(size)}' for name, size in plan.parts)}.",
            next="Stop other programs, give fewer --workers, or take a larger machine.",
        )
    if plan.calibration is not None and plan.calibration.device == "cuda":
        free_bytes = TorchDevice(plan.snapshot).free_bytes()
        if free_bytes is not None and free_bytes < plan.calibration.device_bytes:
            raise DoesNotFit(
                "gpu-memory-too-small",
                f"The GPU has {format_bytes(free_bytes)} free; calibration needs "
                f"{format_bytes(plan.calibration.device_bytes)}.",
                why="Two blocks of weights, the residual streams of all samples and one batch are held there.",
                next="Give fewer --samples, or --device cpu.",
            )
    planning.check_space(output, plan.conversion, {calibration_folder(output): plan.stream_bytes})


class _Source:
    """The scales of every block for the executor's threads, from a calibration that starts with the first request.

    Only then does the executor hold its lock on the output, so two runs can never share the calibration's folder.
    """

    def __init__(self, plan: QuantizePlan, folder: Path, *, resume: bool) -> None:
        self._plan, self._folder, self._resume = plan, folder, resume
        self._changed = threading.Condition()
        self._found: list[BlockScales] = []
        self._failure: BaseException | None = None
        self._stopped = False
        self._state: State | None = None
        self._thread: threading.Thread | None = None

    @property
    def started(self) -> bool:
        return self._thread is not None

    def __call__(self, block: int) -> BlockScales:
        """Wait for the scales of ``block``. Raises what ended the calibration."""
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="calibration", daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: block < len(self._found) or self._failure is not None or self._stopped)
            if block < len(self._found):
                return self._found[block]
            if self._failure is not None:
                raise self._failure
            raise NemobuildError("stopped", "The calibration was stopped.")

    def stop(self) -> None:
        """Let the calibration end after the batch at hand, and those who wait for it at once."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self, *, discard: bool) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join()
        if self._state is not None:
            self._state.close()
        if discard:
            State.remove(self._folder)

    def _run(self) -> None:
        try:
            for scales in self._blocks():
                with self._changed:
                    self._found.append(scales)
                    self._changed.notify_all()
                if self._stopped:
                    return
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _blocks(self) -> Iterator[BlockScales]:
        plan = self._plan
        if plan.calibration is None or plan.samples is None:
            return weight_scales(plan.snapshot)
        self._state = _open_state(plan, self._folder, resume=self._resume)
        sequences = [s.token_ids for s in plan.samples.samples]
        return calibrate(plan.snapshot, sequences, plan.calibration, self._state, stopped=lambda: self._stopped)


def _open_state(plan: QuantizePlan, folder: Path, *, resume: bool) -> State:
    identity = {"source files": plan.snapshot.fingerprint, "calibration": str(plan.description)}
    return State(folder, identity, resume=resume)


def _digest(texts: SampleSet) -> str:
    """sha256 (hex) of the token ids of all samples."""
    digest = hashlib.sha256()
    for sample in texts.samples:
        digest.update(len(sample.token_ids).to_bytes(8, "little"))
        digest.update(sample.token_ids.tobytes())
    return digest.hexdigest()


def _largest_block(snapshot: Snapshot) -> int:
    return plan_calibration(snapshot, [1]).block_bytes
