"""`hf-mend export`: export saved edits as a LoRA adapter, or merge them into the model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, BaseModel, DeviceMap, Dtype, Report, TrustRemoteCode, plural


def export(  # typer makes an argument or option of each of the eleven parameters
    edits: Annotated[str, typer.Argument(help="Saved edits: a folder or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[
        str,
        typer.Option(help="lora: an adapter for plain PEFT; merged: the plain model with the edits in its weights."),
    ] = "lora",
    base_model: BaseModel = None,
    uniform_rank: Annotated[
        bool, typer.Option(help="One rank for all of an adapter's layers, and every block's, as servers want it.")
    ] = True,
    max_rank: Annotated[
        int | None, typer.Option(help="Highest rank of an adapter's layer; those above it are truncated by SVD.")
    ] = None,
    edit: Annotated[
        list[str] | None, typer.Option(help="The id of an edit to export; repeatable. Left out: all of them.")
    ] = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> Report:
    """
    Write saved edits in a form that needs no hf_mend: a LoRA adapter, or the merged model. No editor is needed.

    \b
    Example:
      hf-mend export my-edits my-adapter --base-model openai-community/gpt2 --max-rank 64
      hf-mend export my-edits my-model --to merged --base-model openai-community/gpt2
    """
    if to not in ("lora", "merged"):
        raise ValueError(f"--to is {to!r}, expected lora or merged")
    if max_rank is not None and to != "lora":
        raise ValueError(f"--max-rank {max_rank} goes with --to lora; weights have no rank to keep to")
    from ..auto import load_edited
    from ..hub.atomic import check_writable, replaced_folder

    check_writable(output)
    model = load_edited(edits, base_model, device_map=device_map, dtype=dtype, trust_remote_code=trust_remote_code)
    if len(model.edits) == 0:
        raise ValueError(f"{edits} holds no edit; make one with hf-mend edit ... --save {edits}")
    count = len({*edit}) if edit else len(model.edits)
    error = 0.0
    if to == "lora":
        error = model.save_lora(output, edit, uniform_rank=uniform_rank, max_rank=max_rank)
        text = f"{plural(count, 'edit')} as a LoRA adapter in {output}; PeftModel.from_pretrained(base, ...) loads it"
        if error:
            text += f"\nTruncated to rank {max_rank}: the largest relative error of a layer is {error:.3g}"
    else:
        tokenizer = model.tokenizer
        with replaced_folder(output) as work:
            model.merge_and_unload(edits=edit).save_pretrained(work)
            if tokenizer is not None:
                tokenizer.save_pretrained(work)
        text = f"The model with {plural(count, 'edit')} in its weights is in {output}"
    return Report({"edits": count, "to": to, "output": str(output), **({"error": error} if max_rank else {})}, text)
