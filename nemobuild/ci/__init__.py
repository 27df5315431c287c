"""``ci init``: workflows for those who rebuild their engine whenever the checkpoint changes.

Two jobs. A cheap one runs on every push, on a hosted machine without a GPU: the plan of the real profile, then the
whole road with a CPU profile, gates included, since everything around the engine is the same code. The other one runs
on your own GPU runner and never for a pull request, whose code could be anybody's. Actions are pinned by commit.
"""

from __future__ import annotations

from pathlib import Path

from nemobuild.config import load_profile, profile_names
from nemobuild.errors import UsageError, from_os_error

# The commits of these tags, as they are pinned in public workflows of 2026; a tag can be moved, a commit cannot.
ACTIONS = {
    "CHECKOUT": "actions/checkout@df4cb1c069e1874edd31b4311f1884172cec0e10 # v6.0.3",
    "PYTHON": "actions/setup-python@a309ff8b426b58ec0e2a45f0f869d46889d02405 # v6.2.0",
    "CACHE": "actions/cache@cdf6c1fa76f9f475f3d7449005a359c84ca0f306 # v5.0.3",
    "UPLOAD": "actions/upload-artifact@b7c566a772e6b6bfb58ed0dc250532a479d7789f # v6.0.0",
}
CPU_PROFILE = "smollm2-nas-cpu-fp8"
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
        "KEY_FILE": ".gitlab-ci.yml" if profile in profile_names() else profile,
    }
    text = Path(__file__).with_name("gitlab.yml" if gitlab else "github.yml").read_text(encoding="utf-8")
    for name, value in (ACTIONS | values).items():
        text = text.replace(f"@{name}@", value)
    return Path(".gitlab-ci.yml" if gitlab else ".github/workflows/nemobuild.yml"), text


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
