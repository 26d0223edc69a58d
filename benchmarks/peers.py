"""Another checkout's GPT, trained at our shape on fixed tokens, to be timed beside ours; nothing of it is kept here.

Taken are the classes GPT and GPTConfig of nanoGPT's model.py or build-nanogpt's train_gpt2.py; what stands around them, which
would start a training run, is not executed.
"""

import ast
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import torch

from config import Config
from system.errors import UserError

FILES = ("model.py", "train_gpt2.py")
OURS = {"GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"}  # what host.py sets
READY = "ready for a step\n"


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


class Peer:
    """A peer in a process of its own, which has its training script's settings of memory and threads and none of ours.

    As shipped it computes on a CPU in fp32, not compiled, and on a GPU in bf16, compiled; `tuned` does the latter everywhere.
    """

    def __init__(self, path: Path, cfg: Config, device: str, tuned: bool) -> None:
        self.name = f"{path.resolve().name}, {'tuned' if tuned else 'as shipped'}"
        load_definitions(path)  # what is wrong with it is said here
        job = {"path": str(path), "device": device, "fast": tuned or device != "cpu", "shape": cfg.model_dump()}
        env = {key: value for key, value in os.environ.items() if key not in OURS}
        command = [sys.executable, "-m", "benchmarks.peers", json.dumps(job)]
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(
            command, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._answer()

    def step(self) -> None:
        """One step of as many tokens as ours, with clipping, as the peer's training script takes it."""
        print("step", file=self.process.stdin, flush=True)
        self._answer()

    def _answer(self) -> None:
        for line in self.process.stdout or ():
            if line == READY:
                return
        raise UserError(f"--vs: {self.name} ended with exit code {self.process.wait()}; its message stands above")

    def close(self) -> None:
        """End its process."""
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()


def serve(job: dict[str, Any]) -> None:
    """Take a step of the peer's model for each line that comes, and say when it is done."""
    definitions, shape, device = load_definitions(Path(job["path"])), job["shape"], torch.device(job["device"])
    known = inspect.signature(definitions.GPTConfig).parameters
    arguments = {**shape, "dropout": 0.0, "bias": True}
    model = definitions.GPT(definitions.GPTConfig(**{k: v for k, v in arguments.items() if k in known})).to(device)
    net: Any = torch.compile(model) if job["fast"] else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=shape["lr"], betas=(shape["beta1"], shape["beta2"]), weight_decay=shape["weight_decay"],
        fused=device.type == "cuda",
    )  # fmt: skip
    size = (2, shape["micro_batch"], shape["block_size"])
    x_BT, y_BT = torch.randint(0, min(50257, shape["vocab_size"]), size, device=device)
    n_micro = shape["tokens_per_step"] // x_BT.numel()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    print(READY, end="", flush=True)
    for _ in sys.stdin:
        for _ in range(n_micro):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=job["fast"]):
                _, loss = net(x_BT, y_BT)
            (loss / n_micro).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(READY, end="", flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
