"""``ci init``: workflows for those who rebuild their engine whenever the checkpoint changes.

Two jobs. A cheap one runs on every push, on a hosted machine without a GPU: the plan of the real profile; a slice of
its model (one block of each kind), converted as the profile says; then the whole road with a CPU profile, gates
included, since everything around the engine is the same code. The other one runs
on your own GPU runner and never for a pull request, whose code could be anybody's. Actions are pinned by commit.
"""

from __future__ import annotations

import re
from pathlib import Path

from nemobuild.config import CheckpointConfig, EngineConfig, load_profile, profile_names
from nemobuild.errors import UsageError, from_os_error
from nemobuild.model.hf_config import load_spec
from nemobuild.model.slicing import distinct_blocks, sliced_spec
from nemobuild.places import config_file
from nemobuild.sources import is_hub_source

# The commits of these tags, as they are pinned in public workflows of 2026; a tag can be moved, a commit cannot.
ACTIONS = {
    "CHECKOUT": "actions/checkout@df4cb1c069e1874edd31b4311f1884172cec0e10 # v6.0.3",
    "PYTHON": "actions/setup-python@a309ff8b426b58ec0e2a45f0f869d46889d02405 # v6.2.0",
    "CACHE": "actions/cache@cdf6c1fa76f9f475f3d7449005a359c84ca0f306 # v5.0.3",
    "UPLOAD": "actions/upload-artifact@b7c566a772e6b6bfb58ed0dc250532a479d7789f # v6.0.0",
}
CPU_PROFILE = "smollm2-nas-cpu-fp8"
MAX_SLICE_BYTES = 10 * 10**9  # what GitHub caches for one repository; Ultra's blocks alone are beyond it
_SLICE = re.compile(r"^ *# slice:\n(.*?)^ *# :slice\n", re.M | re.S)
DAILY = "17 3 * * *"  # not on the hour, when everybody's jobs start


def workflow(
    profile: str,
    source: str,
    *,
    gitlab: bool = False,
    cpu_profile: str = CPU_PROFILE,
    runner: str = "gpu",
) -> tuple[Path, str]:
    """Path in the repository, and text. ``source`` is where pip gets nemobuild: a URL, as after ``name @``.

    Raises ``UsageError`` for an unknown profile, or a CPU profile that is none.
    """
    form = load_profile(profile)
    if load_profile(cpu_profile).runtime != "cpu":
        raise UsageError("not-cpu", f"{cpu_profile} is not of the runtime cpu.", next="Name one that is.")
    for value in (profile, source, cpu_profile, runner):
        if not value.isprintable() or set(value) & set("\"'\\`${}[]"):
            raise UsageError("not-plain", f"{value!r} cannot stand in a workflow.", next="Use plain characters.")
    values = {
        "PROFILE": profile,
        "CPU_PROFILE": cpu_profile,
        "INSTALL": source,
        "RUNNER": runner if gitlab else f"[self-hosted, {runner}]",
        "DEVICE": "cpu" if form.runtime == "cpu" else "cuda",
        "CRON": DAILY,
        "CONVERT": convert_options(form.checkpoint),
        "VERIFY": verify_options(form.checkpoint),
        "KEY_FILE": ".gitlab-ci.yml" if profile in profile_names() else profile,
    }
    text = Path(__file__).with_name("gitlab.yml" if gitlab else "github.yml").read_text(encoding="utf-8")
    text = _SLICE.sub(r"\1" if _has_slice(form, profile) else "", text)
    for name, value in (ACTIONS | values).items():
        text = text.replace(f"@{name}@", value)
    return Path(".gitlab-ci.yml" if gitlab else ".github/workflows/nemobuild.yml"), text


def _has_slice(form: EngineConfig, profile: str) -> bool:
    """Whether a hosted machine can convert a slice: the model is on the Hub, and the slice small, as far as known."""
    if not is_hub_source(form.model.source) or form.model.known is None:
        return is_hub_source(form.model.source)
    spec = load_spec(config_file(profile))
    return 2 * sliced_spec(spec, distinct_blocks(spec)).parameter_count <= MAX_SLICE_BYTES


def convert_options(form: CheckpointConfig) -> str:
    """Of ``convert``, for a folder, which takes nothing from the profile. Two texts are enough to run calibration."""
    options = f"--precision {form.precision}"
    if form.format == "trtllm":  # the other form is not split over ranks
        options += f" --tp {form.tensor_parallel}"
    if form.precision == "fp8":
        options += f" --kv-cache {form.kv_cache} --format {form.format} --samples 2 --tokens-per-sample 64"
    return options


def verify_options(form: CheckpointConfig) -> str:
    """Of ``verify``. A few blocks of a model say nothing of its quality, so no texts are run through them."""
    return " --weights-only" if form.precision == "fp8" else ""


def write_workflow(path: Path, text: str, *, force: bool) -> None:
    """Raises ``UsageError`` when the file is there already, unless ``force``."""
    if path.exists() and not force:
        raise UsageError(
            "workflow-exists", f"{path} is there already.", next="Look at it; then --force writes it anew."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise from_os_error(error, path, "writing") from error
