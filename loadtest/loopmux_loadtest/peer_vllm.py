"""vLLM as a peer: runs in vLLM's own environment, takes batches as JSON lines and answers each with its time.

    VENV/bin/python peer_vllm.py MODEL ADAPTERS

`ADAPTERS` is the number of folders `MODEL-lora0`, … to serve; 0 leaves LoRA off. A line in is `{"prompts": [[ids]],
"new": n, "adapters": [number or null], "watch": bool}`; greedy, end token ignored. The line out is `{"seconds": s,
"outputs": [[ids]]}`, or to watch `{"seen": [[[when, tokens]]]}`, for each stream what each step of the engine handed
out; the first line out is `{"ready": seconds, "version": text}`. Whatever vLLM prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

CONTEXT, ROWS, RANK = 4096, 64, 16


def main() -> None:
    """Serve until standard input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["HF_HUB_OFFLINE"] = "1"
    started = time.perf_counter()
    import vllm  # type: ignore[import-not-found]  # after the settings, which it reads while it is imported
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]
    from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

    model, adapters = sys.argv[1], int(sys.argv[2])
    engine = vllm.LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=CONTEXT,
        max_num_seqs=ROWS,
        enable_lora=adapters > 0,
        max_loras=max(1, adapters),
        max_lora_rank=RANK,
    )
    print(json.dumps({"ready": time.perf_counter() - started, "version": vllm.__version__}), file=out, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        lora = [None if n is None else LoRARequest(f"l{n}", n + 1, f"{model}-lora{n}") for n in work["adapters"]]
        sampling = vllm.SamplingParams(max_tokens=work["new"], temperature=0, ignore_eos=True)
        prompts = [{"prompt_token_ids": ids} for ids in work["prompts"]]
        if work["watch"]:
            sampling.output_kind = RequestOutputKind.CUMULATIVE
            print(json.dumps({"seen": watched(engine.llm_engine, prompts, sampling, lora)}), file=out, flush=True)
            continue
        started = time.perf_counter()
        made = engine.generate(prompts, sampling, lora_request=lora if adapters else None, use_tqdm=False)
        seconds = time.perf_counter() - started
        outputs = [list(one.outputs[0].token_ids) for one in made]
        print(json.dumps({"seconds": seconds, "outputs": outputs}), file=out, flush=True)


def watched(engine: Any, prompts: list[Any], sampling: Any, lora: list[Any]) -> list[list[tuple[float, int]]]:
    """What each step hands out of each prompt's stream: when, and how many tokens. As ``LLM.generate`` steps, too."""
    for number, (prompt, adapter) in enumerate(zip(prompts, lora, strict=True)):
        engine.add_request(str(number), prompt, sampling, lora_request=adapter)
    seen: list[list[tuple[float, int]]] = [[] for _ in prompts]
    had = [0] * len(prompts)
    while engine.has_unfinished_requests():
        for output in engine.step():
            number, total = int(output.request_id), len(output.outputs[0].token_ids)
            if total > had[number]:
                seen[number].append((time.perf_counter(), total - had[number]))
                had[number] = total
    return seen


if __name__ == "__main__":
    main()
