"""An FP8 folder in ModelOpt's Hugging Face form, run by transformers: the judge of such a folder's numbers.

transformers itself does not know ModelOpt's form: it loads the E4M3 weights as they are and leaves the scales out.
Here the scales are read from the file and used as the format says: weights and inputs are E4M3 times their scale, and
so are keys (after RoPE) and values where the folder has KV scales. Casting is torch's, arithmetic float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

E4M3 = torch.float8_e4m3fn


def load(folder: Path, *, kv_cache: bool = True) -> Any:
    """The model of ``folder``; ``kv_cache`` False leaves keys and values as they are."""
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=_attention(tensors) if kv_cache else "sdpa"
    ).eval()
    for name, module in model.named_modules():
        scale = tensors.get(f"{name}.weight_scale")
        if scale is None:
            continue
        codes = tensors[f"{name}.weight"]
        assert codes.dtype == E4M3
        assert torch.equal(module.weight, codes.float()), "transformers has loaded the values of the file"
        module.weight.data *= scale
        module.register_forward_pre_hook(_cast_input(tensors[f"{name}.input_scale"]))
    return model


def losses(model: Any, texts: Iterable[Sequence[int]]) -> list[float]:
    """Of every next token, in nats."""
    found: list[float] = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text])
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            found += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return found


def block_streams(model: Any, text: Sequence[int]) -> list[tuple[Any, Any]]:
    """The residual stream (tokens, hidden) before and after every block."""
    found: list[tuple[Any, Any]] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        found.append((inputs[0].reshape(len(text), -1).numpy(), after.reshape(len(text), -1).numpy()))

    hooks = [layer.register_forward_hook(note) for layer in model.model.layers]
    with torch.no_grad():
        model(torch.tensor([text]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def cast(x: Any, scale: Any) -> Any:
    """``x`` after a round trip through E4M3, saturating at 448."""
    return (x / scale).clamp(-448, 448).to(E4M3).float() * scale


def _cast_input(scale: Any) -> Any:
    return lambda module, inputs: (cast(inputs[0], scale), *inputs[1:])


def _attention(tensors: dict[str, Any]) -> str:
    """The name of an attention function that casts keys and values; plain SDPA for a folder without KV scales."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    scales = {
        int(name.split(".")[2]): (scale, tensors[name.replace("k_proj.k_scale", "v_proj.v_scale")])
        for name, scale in tensors.items()
        if name.endswith("k_proj.k_scale")
    }
    if not scales:
        return "sdpa"

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        of_keys, of_values = scales[module.layer_idx]
        return plain(module, query, cast(key, of_keys), cast(value, of_values), *args, **options)

    name = f"fp8_kv_{id(scales)}"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    transformers.AttentionMaskInterface.register(name, transformers.masking_utils.sdpa_mask)
    return name
