"""Another checkout's GPT, trained at our shape on fixed tokens, to be timed beside ours; nothing of it is kept here.

Taken are the classes GPT and GPTConfig of nanoGPT's model.py or build-nanogpt's train_gpt2.py; what stands around them, which
would start a training run, is not executed.
"""

import ast
import inspect
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

from core.config import Config
from core.errors import UserError
from core.measure import release, synchronize, turn
from core.watchdog import follow_parent
from lab.bench.turns import Candidate, own_stdout, serve

FILES = ("model.py", "train_gpt2.py")
OURS = ("GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")  # what host.py sets


def load_definitions(path: Path) -> types.ModuleType:
    """The imports, functions and classes that work by themselves of a script, or of a checkout's. Raises UserError."""
    file = next((path / name for name in FILES if (path / name).is_file()), path)
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--vs {path}: no {' or '.join(FILES)} that can be read there ({error})") from None
    module = types.ModuleType(f"peer_{file.parent.name}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
            try:
                exec(compile(ast.Module([node], []), str(file), "exec"), module.__dict__)
            except Exception:  # what its training script needs, its model may do without
                continue
    if not all(hasattr(module, name) for name in ("GPT", "GPTConfig")):
        raise UserError(f"--vs {path}: {file.name} defines no GPT and GPTConfig")
    return module


def peer(word: str, cfg: Config, device: torch.device) -> Candidate:
    """The peer in the folder that `word` begins with. It has its training script's settings of memory and threads.

    As shipped it computes on a CPU in fp32, not compiled, and on a GPU in bf16, compiled. Raises UserError.
    """
    folder, *options = word.split(",")
    path = Path(folder).resolve()
    load_definitions(Path(folder))  # what is wrong with it is said here
    job = {"path": str(path), "device": str(device), "shape": cfg.model_dump()}
    return Candidate(f"{','.join([path.name, *options])}, as shipped", "lab.bench.peers", job, without=OURS)


def main() -> None:
    """Take a step of the peer's model for each line that comes: with clipping, as the peer's training script takes it."""
    answers, job = own_stdout(), json.loads(sys.argv[1])
    follow_parent()
    definitions, shape, device = load_definitions(Path(job["path"])), job["shape"], torch.device(job["device"])
    fast = device.type != "cpu"
    known = inspect.signature(definitions.GPTConfig).parameters
    arguments = {**shape, "dropout": 0.0, "bias": True}
    model = definitions.GPT(definitions.GPTConfig(**{k: v for k, v in arguments.items() if k in known})).to(device)
    net: Any = torch.compile(model) if fast else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=shape["lr"], betas=(shape["beta1"], shape["beta2"]), weight_decay=shape["weight_decay"],
        fused=device.type == "cuda",
    )  # fmt: skip
    size = (2, shape["micro_batch"], shape["block_size"])
    x_BT, y_BT = torch.randint(0, min(50257, shape["vocab_size"]), size, device=device)
    n_micro = shape["tokens_per_step"] // x_BT.numel()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")

    def micro_step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=fast):
            _, loss = net(x_BT, y_BT)
        (loss / n_micro).backward()

    def step() -> None:
        for _ in range(n_micro):
            micro_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def discarded_micro_step() -> None:
        micro_step()
        optimizer.zero_grad(set_to_none=True)

    step()
    synchronize(device)
    serve(answers, release(device), lambda _question: turn({"step": step}, ["step"], device, refill=discarded_micro_step))


if __name__ == "__main__":
    main()
