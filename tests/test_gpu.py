"""What only a GPU can show: numbers, compilation, NCCL and resume on CUDA. `make gpu` runs it.

Without a GPU it is skipped; GPU_TESTS_ON=cpu rehearses all of it there. What takes longest comes first, so that it begins first
where several tests run at a time.
"""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import logged, newest_sums, records, run_command, start_command, torchrun, wait_until

from core.config import load_config
from model import GPT, KVCache
from positional import ENCODINGS

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device here")
SHAPE = [
    "--n_layer=2", "--n_head=4", "--n_embd=256", "--vocab_size=1024", "--block_size=192", "--micro_batch=1",
    "--tokens_per_step=192",
]  # fmt: skip


@pytest.fixture
def words(corpus: Path, tmp_path: Path) -> list[str]:
    return [
        f"--data={corpus}", f"--out_dir={tmp_path}", f"--device={DEVICE}", "--encoding=carope", "--n_layer=2", "--n_head=2",
        "--n_embd=64", "--vocab_size=320", "--block_size=64", "--micro_batch=4", "--tokens_per_step=1024", "--steps=30",
        "--warmup_steps=2", "--eval_every=1000", "--final_eval_tokens=2000", "--save_every=1000", "--compile=off",
    ]  # fmt: skip


def test_training_evaluation_and_samples(words, tmp_path):
    """From shards to text, compiled and in bf16 where that is what the device takes."""
    run = tmp_path / "whole"
    trained = run_command("train.py", *(word for word in words if word != "--compile=off"), "--name=whole")
    assert trained.returncode == 0, trained.stderr
    out = run / "eval.json"
    lengths = ["--lengths", 64, 256, "--device", DEVICE]
    evaluated = run_command("eval_ppl.py", run, *lengths, "--json", out)
    assert evaluated.returncode == 0, evaluated.stderr
    by_itself = run_command("eval_ppl.py", run, *lengths, "--documents", 256, "--json", out.with_name("documents.json"))
    assert by_itself.returncode == 0, by_itself.stderr
    last = next(r["val_loss"] for r in reversed(records(run)) if "val_loss" in r)
    for result in (*json.loads(out.read_text()), *json.loads(out.with_name("documents.json").read_text())):
        assert result["nll"] == pytest.approx(last, rel=0.2) and result["nll"] < math.log(320)
    said = run_command("sample.py", run, "--prompt", "The ", "--max_new_tokens", 100, "--device", DEVICE, "--dtype", "auto")
    assert said.returncode == 0 and len(said.stdout) > 50, said.stderr


def test_one_rank_under_torchrun_trains_as_one_process(words, tmp_path):
    alone = run_command("train.py", *words, "--name=alone")
    ranks = torchrun(1, "train.py", *words, "--name=ranks")
    assert alone.returncode == ranks.returncode == 0, alone.stderr + ranks.stderr
    one, other = (next(r for r in reversed(records(tmp_path / name)) if "val_loss" in r) for name in ("alone", "ranks"))
    assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-3)


def test_a_run_that_was_told_to_leave_goes_on(words, tmp_path):
    child = start_command("train.py", *words, "--name=left", "--steps=2000", "--warmup_steps=10")
    wait_until(child, lambda: logged(tmp_path / "left") > 3)
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 75, child.communicate()[1]
    left = records(tmp_path / "left")[-1]["step"]
    assert newest_sums(tmp_path / "left")
    again = start_command("train.py", *words, "--name=left", "--steps=2000", "--warmup_steps=10")
    wait_until(again, lambda: logged(tmp_path / "left") > len(records(tmp_path / "left")[: left + 1]) + 3)
    again.send_signal(signal.SIGTERM)
    assert again.wait() == 75, again.communicate()[1]
    steps = [record["step"] for record in records(tmp_path / "left") if "loss" in record]
    assert steps == list(range(len(steps))) and len(steps) > left + 1


def test_the_preflight(words):
    table = ["--preflight", "--sizes", "demo", "--encodings", "rope", "carope", *[w for w in words if "--encoding=" not in w]]
    done = torchrun(1, "table1.py", *table)
    assert done.returncode == 0 and "all came back bit for bit" in done.stdout, done.stderr
    assert f"exchange: {'nccl' if DEVICE == 'cuda' else 'gloo'}, " in done.stdout and "the sum is right" in done.stdout


def model_and_tokens(encoding: str) -> tuple[GPT, torch.Tensor]:
    """A model whose encoding has something to say (CARoPE's W is 0 at the start), and two rows of tokens, both on the CPU."""
    model = GPT(load_config([*SHAPE, f"--encoding={encoding}"]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model, torch.randint(0, 1024, (2, 192), generator=generator)


def loss_and_gradients(model: GPT, net: torch.nn.Module, ids: torch.Tensor, bf16: bool) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
        loss = net(ids, ids.roll(-1, 1))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])


def reference(encoding: str) -> tuple[float, torch.Tensor]:
    """Loss and gradients in float32 on the CPU, the loss written out."""
    model, ids = model_and_tokens(encoding)
    logits = model(ids)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.mark.parametrize("encoding", ["rope", "carope_hidden", "sinusoidal", "t5", "kerple", "fire", "cable", "fox"])
def test_compiled_is_eager(encoding):
    model, ids = model_and_tokens(encoding)
    model.to(DEVICE)
    torch.compiler.reset()  # else the graphs of all encodings count together
    net = torch.compile(model, dynamic=False, fullgraph=True)
    for bf16, tolerance in ((False, 1e-4), (True, 2e-2)):
        loss, grad = loss_and_gradients(model, model, ids.to(DEVICE), bf16)
        compiled_loss, compiled_grad = loss_and_gradients(model, net, ids.to(DEVICE), bf16)
        assert compiled_loss == pytest.approx(loss, rel=tolerance)
        assert ((compiled_grad - grad).norm() / grad.norm()).item() < 2 * tolerance


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_loss_and_gradients_are_those_of_the_cpu(encoding):
    wanted, wanted_grad = reference(encoding)
    model, ids = model_and_tokens(encoding)
    model.to(DEVICE)
    for bf16, tolerance in ((False, 2e-4), (True, 2e-2)):
        loss, grad = loss_and_gradients(model, model, ids.to(DEVICE), bf16)
        assert loss == pytest.approx(wanted, rel=tolerance)
        assert ((grad - wanted_grad).norm() / wanted_grad.norm()).item() < 5 * tolerance


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_decoding_with_a_cache_is_the_full_forward(encoding):
    model, ids = model_and_tokens(encoding)
    model.to(DEVICE)
    cache = KVCache()
    with torch.no_grad():
        whole = model(ids.to(DEVICE))
        parts = [model(part, cache=cache) for part in ids.to(DEVICE).split([100, 1, 1, 90], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=1e-3)
