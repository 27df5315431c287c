"""The last look at a server before clients get it: real answers in each mode of reasoning, beside those of the old one.

The gates have judged the model; this judges what was started of it. So the questions are few, and only what a broken
server does counts: an answer that breaks the contract, or nothing right any more of what the old one answers right.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemobuild.errors import IntegrityError, VerificationFailed
from nemobuild.gates.prompts import Answer, Prompt, ask_all, fitting, load_prompts
from nemobuild.runtime.settings import load_settings

_PER_MODE = 2
_LIMIT_TOKENS = 64
_TIMEOUT_S = 120.0


def ask_canary(grpc_url: str, repository: Path) -> list[Answer]:
    """What the server of ``repository`` says to the first questions of the gates, two in each mode.

    Raises ``IntegrityError`` when the repository does not say how it is asked, ``RemoteError`` when nobody answers.
    """
    file = repository / "chat" / "1" / "assets" / "runtime.json"
    try:
        policy = load_settings(file).reasoning
    except (OSError, ValueError) as error:
        raise IntegrityError("bad-assets", f"{file} cannot be read.", why=f"{error}.") from error
    chosen: dict[str | None, list[Prompt]] = {}
    for prompt in fitting(load_prompts(), policy):
        if not prompt.tools:
            chosen.setdefault(prompt.reasoning, []).append(prompt)
    prompts = [prompt for mode in chosen.values() for prompt in mode[:_PER_MODE]]
    return ask_all(grpc_url, prompts, policy, limit_tokens=_LIMIT_TOKENS, timeout_s=_TIMEOUT_S)


def judge_canary(answers: Sequence[Answer], before: Sequence[Answer]) -> None:
    """Raise ``VerificationFailed`` when ``answers`` are those of a broken server; ``before`` are the old one's."""
    unsound = next((answer for answer in answers if answer.unsound), None)
    if unsound is not None:
        raise VerificationFailed(
            "canary-failed",
            f"It does not answer {unsound.prompt} as a served model must.",
            why=f"The answer is not sound: {unsound.unsound.rstrip('.')}.",
        )
    were_right = {answer.prompt for answer in before if answer.right}
    wrong = [answer for answer in answers if answer.prompt in were_right and answer.wrong]
    if were_right and len(wrong) == len(were_right):
        raise VerificationFailed(
            "canary-failed",
            "It answers nothing right of what the version before answers right.",
            why=f"{wrong[0].prompt}: {wrong[0].wrong}.",
        )
