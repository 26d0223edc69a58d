"""Which device a command computes on, and that nothing asks Apple's GPUs for the float64 that they do not have."""

from functools import partial

import pytest
import torch
from conftest import as_rank, run_command
from test_positional import ALL, T, build, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import core.numerics
from core.distributed import Distributed, pick_device, pick_dtype
from core.errors import UserError
from core.evaluate import losses
from core.optim import make_optimizer
from core.profile import Profile
from model import KVCache
from positional import ENCODINGS
from positional.bias import t5_bucket
from positional.scaling import SCALINGS, rescale


class NoFloat64(TorchDispatchMode):
    """As on a device without float64, no operation returns it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(found)):
            raise TypeError(f"{function} made a tensor of float64")
        return found


@pytest.fixture
def without(monkeypatch):
    """A CPU that takes the way of a device without float64, and a mode that fails where it does not."""
    monkeypatch.setattr(core.numerics, "NO_FLOAT64", {"cpu"})
    return NoFloat64()


def test_float64_is_noticed(without):
    with without, pytest.raises(TypeError, match="float64"):
        torch.ones(1).double()


@pytest.mark.parametrize("encoding", ALL)
def test_training_decoding_and_evaluation_need_no_float64_and_agree_with_it(encoding, monkeypatch):
    model, idx = build(encoding), tokens(T + 1)
    n = min(model.max_len or 4 * T, 4 * T)
    with torch.no_grad():
        exact = losses(model, tokens(n + 1)[:, :-1], tokens(n + 1)[:, 1:])
    monkeypatch.setattr(core.numerics, "NO_FLOAT64", {"cpu"})
    optimizer = make_optimizer(model, model.cfg)
    with NoFloat64():
        with torch.no_grad():
            found = losses(model, tokens(n + 1)[:, :-1], tokens(n + 1)[:, 1:])
            Profile(n, torch.device("cpu")).add(found, torch.full((len(found),), n))
            full, cache = model(idx[:, :T]), KVCache()
            pieces = [model(idx[:, i : i + 4], cache=cache) for i in range(0, T, 4)]
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
    assert found.dtype == torch.float32 and (found - exact).abs().max() < 1e-3
    assert (torch.cat(pieces, 1) - full).abs().max() < 1e-3


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_phases_stay_in_the_type_of_the_device(without, scaling):
    model = build("carope")
    rescale(list(model.encodings), "carope", SCALINGS[scaling](4, T))
    frame = model.encodings[0](model.wte(tokens(T)), torch.arange(T)).frame
    assert {part.dtype for part in frame} == {torch.float32}


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (32, 8192), (8, 20), (2, 5)])
def test_t5_buckets_are_the_same_in_float32(monkeypatch, n_buckets, max_distance):
    distance_S = torch.arange(20_000)
    exact = t5_bucket(distance_S, n_buckets, max_distance)
    monkeypatch.setattr(core.numerics, "NO_FLOAT64", {"cpu"})
    assert torch.equal(t5_bucket(distance_S, n_buckets, max_distance), exact)


@pytest.mark.parametrize(
    ("wanted", "cuda", "mps", "ranks", "picked"),
    [
        ("auto", False, False, "1", "cpu"), ("auto", False, True, "1", "mps"), ("auto", False, True, "2", "cpu"),
        ("auto", True, True, "1", "cuda"), ("cpu", True, True, "1", "cpu"), ("mps", False, True, "1", "mps"),
        ("mps", False, True, "2", "one process can use it, not 2"), ("mps", False, False, "1", "no Apple GPU that torch"),
        ("cuda", False, True, "1", "no CUDA device that torch"),
    ],
)  # fmt: skip
def test_the_device_is_the_first_that_is_there_and_can_be_used(monkeypatch, wanted, cuda, mps, ranks, picked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    as_rank(monkeypatch, 0, int(ranks))
    if picked in ("cpu", "cuda", "mps"):
        device = pick_device(wanted)
        assert device.type == picked
        assert picked != "mps" or pick_dtype("auto", device) == torch.float32
    else:
        with pytest.raises(UserError, match=picked):
            pick_device(wanted)


@pytest.mark.parametrize(("local_rank", "says_it"), [(2, True), (3, False)])
def test_of_more_ranks_than_gpus_the_first_without_one_says_so(monkeypatch, local_rank, says_it):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    as_rank(monkeypatch, local_rank, 4)
    with pytest.raises(UserError, match=f"local rank {local_rank} has no GPU, this node has 2") as refused:
        pick_device("auto")
    assert refused.value.alone is says_it


@pytest.mark.slow
def test_a_process_compiles_as_many_models_as_a_bench_holds(monkeypatch):
    """Each for training and for evaluation; torch's own limit is eight in all."""
    compile_whole = partial(torch.compile, backend="eager", fullgraph=True)  # raises where the compiler gives up
    monkeypatch.setattr(torch, "compile", compile_whole)
    dist, x_BT = Distributed(torch.device("cpu"), torch.float32), tokens(T)
    torch.compiler.reset()
    for encoding in ENCODINGS:
        model = build(encoding)
        net = dist.wrap(model, model.cfg.model_copy(update={"compile": "on"}))
        net(x_BT, x_BT).backward()
        with torch.no_grad():
            net.eval()(x_BT, x_BT)


TOLD = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"RANK": "3"}, "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing in the environment, which has RANK"),
        ({"LOCAL_RANK": "0"}, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are missing"),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT is missing"),
        ({**TOLD, "WORLD_SIZE": ""}, "WORLD_SIZE is missing"),
        ({**TOLD, "RANK": "2"}, "RANK = '2', LOCAL_RANK = '1', WORLD_SIZE = '2': in the environment, and cannot be"),
        ({**TOLD, "LOCAL_RANK": "one"}, "LOCAL_RANK = 'one'"),
        ({**TOLD, "RANK": "-1"}, "RANK = '-1'"),
    ],
)
@pytest.mark.parametrize("script", ["train.py", "eval_ppl.py"])
def test_a_part_of_torchruns_environment_is_refused(small, runs, tmp_path, script, told, message):
    """What trained as a rank that nobody waits for wrote nothing, and left with 0."""
    words = {"train.py": [*small, "--name=r"], "eval_ppl.py": [runs / "carope", "--lengths", "16", "--max_tokens", "100"]}
    done = run_command(script, *words[script], env=told)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr and "start it with torchrun, or `unset" in done.stderr
    assert not (tmp_path / "r").exists()
