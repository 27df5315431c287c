"""transformers as the judge: the same logits and the same greedy tokens, through our checkpoint reader and engine.

Weights are BF16 or float32 in the file and float32 in both programs, so logits agree to 1e-3 and, the models having no
near ties on these prompts, 64 greedy tokens are equal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nemobuild.engine.cpu import Chunk, Engine, Generation
from nemobuild.model import forward as fw
from nemobuild.model.forward import Segment
from nemobuild.model.hf_config import load_json, load_spec, spec_from_config
from nemobuild.model.spec import ModelSpec
from nemobuild.weights.safetensors import read_array, read_header
from tests.checkpoints import write_checkpoint
from tests.tiny import random_weights, tiny_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-3
NEW_TOKENS = 64
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List three prime numbers and say how you know that they are prime.",
    "Translate to German: Good morning, my friend!",
)


def reader(folder: Path) -> Callable[[str], Any]:
    tensors = {name: info for file in folder.glob("*.safetensors") for name, info in read_header(file).items()}
    return lambda name: read_array(tensors[name])


def our_logits(folder: Path, prompts: Sequence[list[int]]) -> list[Any]:
    spec, read = load_spec(folder), reader(folder)
    return fw.forward(spec, fw.hf_ends(spec, read), fw.hf_blocks(spec, read), prompts)


def our_tokens(checkpoint: Path, prompts: Sequence[list[int]], layout: Any = "auto") -> list[list[int]]:
    """Greedy tokens of all prompts at once, from the engine."""
    results: list[list[int]] = [[] for _ in prompts]
    done = [threading.Event() for _ in prompts]
    limits = {"max_batch_size": 8, "max_context_tokens": 256, "kv_cache_tokens": 2048, "max_queue_size": 0}
    with closing(Engine(checkpoint, layout=layout, **limits)) as engine:
        for i, prompt in enumerate(prompts):

            def on_chunk(chunk: Chunk, i: int = i) -> None:
                results[i].extend(chunk.tokens)
                if chunk.finished:
                    done[i].set()

            engine.submit(Generation(prompt, NEW_TOKENS, temperature=0.0), on_chunk)
        for event in done:
            assert event.wait(300)
    return results


def their_logits(model: Any, prompts: Sequence[list[int]]) -> list[Any]:
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]


def assert_same(folder: Path, checkpoint: Path, model: Any, prompts: Sequence[list[int]]) -> None:
    """Same logits at every position of prompt and answer, and the answer is the one ``model`` gives greedily.

    It is, when the likeliest token after the prompt and any part of the answer is the answer's next one.
    """
    answers = our_tokens(checkpoint, prompts)
    texts = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    both = zip(our_logits(folder, texts), their_logits(model, texts), strict=True)
    for prompt, answer, (ours, theirs) in zip(prompts, answers, both, strict=True):
        assert np.ptp(theirs) > 1, "these logits could not tell a fault"
        assert np.abs(ours - theirs).max() <= TOLERANCE
        assert len(answer) == NEW_TOKENS
        assert theirs[len(prompt) - 1 :].argmax(1).tolist() == answer


def load_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_random_llama(tmp_path: Path, tied: bool, dtype: str) -> None:
    """Grouped attention, a head size of its own, llama3 rope whose three bands all occur."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=515,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        initializer_range=0.15,
        tie_word_embeddings=tied,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    folder = tmp_path / "hf"
    assert load_spec(folder).tied_embeddings == tied
    rng = np.random.default_rng(5)
    prompts = [[int(t) for t in rng.integers(0, 515, n)] for n in (1, 7, 30, 100, 180)]
    checkpoint = write_checkpoint(tmp_path / "checkpoint", hf_config(folder), hf_weights(folder), 2, 2)
    assert_same(folder, checkpoint, load_model(folder), prompts)


def hf_config(folder: Path) -> dict[str, Any]:
    config = load_json(folder / "config.json")
    rope = config.get("rope_parameters")
    if rope and rope["rope_type"] == "llama3":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return config


def hf_weights(folder: Path) -> dict[str, Any]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders ``llama`` and ``nas``, and their checkpoints, of SmolLM2-135M-Instruct."""
    demo = pytest.importorskip("nemobuild.demo")
    base, folders = tmp_path_factory.mktemp("smollm2"), {}
    for form in ("llama", "nas"):
        folders[form] = demo.write_smollm2(base / form, form=form)
        folders[f"{form} checkpoint"] = write_checkpoint(
            base / f"{form}-checkpoint", hf_config(folders[form]), hf_weights(folders[form])
        )
    return folders


@pytest.fixture(scope="session")
def judge(smollm2: dict[str, Path]) -> Any:
    return load_model(smollm2["llama"])


@pytest.fixture(scope="session")
def prompts(smollm2: dict[str, Path]) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2["llama"] / "tokenizer.json"))
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return [tokenizer.encode(chat.format(text), add_special_tokens=False).ids for text in PROMPTS]


@contextmanager
def zeroed(model: Any, blocks: Sequence[int]) -> Iterator[None]:
    """``model`` with the output of the attention of ``blocks`` set to zero."""

    def zero(module: Any, inputs: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:])

    hooks = [model.model.layers[i].self_attn.register_forward_hook(zero) for i in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def test_smollm2(smollm2: dict[str, Path], judge: Any, prompts: list[list[int]]) -> None:
    assert_same(smollm2["llama"], smollm2["llama checkpoint"], judge, prompts)


def test_smollm2_without_the_attention_of_two_blocks(
    smollm2: dict[str, Path], judge: Any, prompts: list[list[int]]
) -> None:
    spec = load_spec(smollm2["nas"])
    absent = [i for i in range(len(spec.blocks)) if i not in spec.attention_blocks]
    assert absent == [17, 28]
    with zeroed(judge, absent):
        assert_same(smollm2["nas"], smollm2["nas checkpoint"], judge, prompts)
    whole, cut = their_logits(judge, prompts[:1])[0], our_logits(smollm2["nas"], prompts[:1])[0]
    assert np.abs(whole - cut).max() > 1, "the two blocks matter, so the comparison above is one"


@pytest.mark.parametrize("layout", ["plain", "panels"])
def test_smollm2_answers(smollm2: dict[str, Path], prompts: list[list[int]], layout: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2["nas"] / "tokenizer.json"))
    (tokens,) = our_tokens(smollm2["nas checkpoint"], prompts[:1], layout)
    assert "Paris" in tokenizer.decode(tokens)


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def torch_weights(spec: ModelSpec, device: str, dtype: Any) -> tuple[Any, list[Any]]:
    weights = random_weights(tiny_config())

    def read(name: str) -> Any:
        return torch.tensor(weights[name].astype(np.float32)).to(device, dtype)

    return fw.hf_ends(spec, read), list(fw.hf_blocks(spec, read))


@pytest.mark.parametrize("device", devices())
def test_torch_arrays_give_the_same_logits(device: str) -> None:
    """Every kind of block, and a step that packs decodes with a chunk of a prompt."""
    spec, weights = spec_from_config(tiny_config()), random_weights(tiny_config())
    rng = np.random.default_rng(0)
    prompts = [[int(t) for t in rng.integers(0, 265, n)] for n in (9, 300)]
    read = {name: w.astype(np.float32) for name, w in weights.items()}.__getitem__
    expected = fw.forward(spec, fw.hf_ends(spec, read), fw.hf_blocks(spec, read), prompts)
    ends, blocks = torch_weights(spec, device, torch.float32)
    for ours, theirs in zip(expected, fw.forward(spec, ends, blocks, prompts), strict=True):
        assert isinstance(theirs, torch.Tensor) and theirs.device.type == device
        assert np.abs(ours - theirs.cpu().numpy()).max() <= TOLERANCE

    caches = [fw.new_cache(spec, block, 310, ends.norm) for block in spec.blocks]

    def run(segments: list[Segment], tokens: list[int]) -> Any:
        hidden = fw.embed(ends, torch.tensor(tokens, device=device))
        step = fw.make_step(spec, segments, hidden)
        for block, block_weights, cache in zip(spec.blocks, blocks, caches, strict=True):
            hidden = fw.run_block(spec, block, block_weights, hidden, step, cache)
        return fw.head(spec, ends, hidden).cpu().numpy()

    run([Segment(0, 0, 8), Segment(9, 0, 290)], prompts[0][:8] + prompts[1][:290])
    logits = run([Segment(0, 8, 1), Segment(9, 290, 10)], prompts[0][8:] + prompts[1][290:])
    assert np.abs(logits[0] - expected[0][8]).max() <= TOLERANCE
    assert np.abs(logits[1:] - expected[1][290:]).max() <= TOLERANCE


@pytest.mark.parametrize("device", devices())
def test_a_caller_may_multiply_in_bfloat16(device: str) -> None:
    """Weights stay BF16 and the residual stream float32: what a calibration on a GPU does."""
    spec = spec_from_config(tiny_config())
    ends, blocks = torch_weights(spec, device, torch.bfloat16)

    def linear(name: str, x: Any, weight: Any) -> Any:
        return (x.to(weight.dtype) @ weight.T).float()

    (rounded,) = fw.forward(spec, ends, blocks, [[1, 2, 3]], linear)
    ends, blocks = torch_weights(spec, device, torch.float32)
    (exact,) = fw.forward(spec, ends, blocks, [[1, 2, 3]])
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.15 * exact.abs().max()
