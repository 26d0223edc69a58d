"""The hub breaks off, lies, is silent or is down; the command asks again, checks, goes on, or says what is wrong."""

import json
import random
import resource
from itertools import pairwise

import pytest
from conftest import wait_until
from hub import FOLDER, REPO, Fault, contents, hub_reference, read_shards, run, serving, start

from text.token_stream import PROGRESS

pytestmark = pytest.mark.slow
SIZES = ("--tokenizer", "bytes", "--val_tokens", "100_000", "--shard_tokens", "200_000", "--workers", "1")
NAMES = [f"{FOLDER}/00{i}_00000.parquet" for i in range(3)]
FIRST, SECOND, THIRD = NAMES
QUICK = 0.05  # seconds before the second attempt, instead of 2
ATTEMPTS = 5
CUT = 150_000  # about half of a file


def documents(i):
    draw = random.Random(i)
    return [draw.randbytes(4000).hex() for _ in range(100 if i == 0 else 40)]  # enough for shards before the third


@pytest.fixture
def hub(tmp_path):
    with serving(tmp_path, *map(documents, range(3))) as server:
        yield server


@pytest.fixture
def prepare(hub, tmp_path):
    """The command, as run(…) or start(…)."""

    def go(how=run, env=None, constants={"FIRST_WAIT": QUICK}, **options):  # noqa: B006
        env = {**hub.env, "HF_HOME": str(tmp_path / "home"), **(env or {})}
        return how("--out", tmp_path / "data", *SIZES, env=env, constants=constants, **options)

    return go


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The files of an undisturbed run, which are the reference's."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with serving(folder, *map(documents, range(3))) as hub:
        rc, _, err = run("--out", folder / "data", *SIZES, env={**hub.env, "HF_HOME": str(folder / "home")})
        assert rc == 0, err
        assert read_shards(folder / "data") == hub_reference(hub, 100_000, 200_000)
        assert [len(hub.asked(name)) for name in NAMES] == [1, 1, 1]
    return contents(folder / "data")


def waits(requests):
    """The seconds between them."""
    return [round(after.at - before.at, 2) for before, after in pairwise(requests)]


def retries(err):
    """The lines that announce another attempt."""
    return [line for line in err.splitlines() if "; attempt " in line]


@pytest.mark.parametrize("reset", [False, True])
def test_a_download_that_breaks_off_is_made_again(fault, hub, prepare, tmp_path, expected, reset):
    happened = fault(f"the hub {'resets' if reset else 'closes'} the connection in the middle of a file")
    hub.faults[SECOND] = [Fault(cut=CUT, reset=reset)]
    rc, _, err = prepare()
    assert rc == 0, err
    assert len(hub.asked(SECOND)) == 2
    for retry in retries(err):  # none where huggingface_hub itself asks again
        assert retry.startswith(f"{SECOND}: ") and retry.endswith(f"; attempt 2 of 5 in {QUICK} s")
    assert contents(tmp_path / "data") == expected
    happened("asked again; same shards", attempts=2, waits_s=waits(hub.asked(SECOND)))


def test_a_storage_on_another_host_does_not_get_the_token(fault, hub, prepare, tmp_path, expected):
    happened = fault("the hub redirects to a storage on another host, which closes the connection in the middle of a file")
    hub.cdn = "localhost"
    hub.faults[f"/cdn/{FIRST}"] = [Fault(cut=CUT)]
    rc, _, err = prepare(env={"HF_TOKEN": "hf_secret"})
    assert rc == 0, err
    assert len(hub.asked(f"/cdn/{FIRST}")) == 2
    assert {request.token for request in hub.requests if request.path.startswith("/cdn/")} == {None}
    assert "Bearer hf_secret" in hub.tokens
    assert contents(tmp_path / "data") == expected
    happened("asked again, the token stayed with the hub; same shards", attempts=2)


def test_a_file_without_a_checksum_has_its_length(fault, hub, prepare, tmp_path, expected):
    happened = fault("a hub that tells no sha256 closes the connection in the middle of a file, then sends too short a body")
    hub.checksums = False
    hub.faults[SECOND] = [Fault(cut=CUT), Fault(length=CUT)]
    rc, _, err = prepare()
    assert rc == 0, err
    assert [request.start for request in hub.asked(SECOND)] == [0, 0, 0]
    assert contents(tmp_path / "data") == expected
    happened("its size is checked, and it is fetched from the beginning; same shards", attempts=3)


def test_a_busy_hub_is_given_the_time_it_asks_for(fault, hub, prepare, tmp_path, expected):
    happened = fault("429 for the listing; 429 with Retry-After: 1, then 429 with RateLimit: t=0 for a file")
    busy = [Fault(status=429, headers={"Retry-After": "1"}), Fault(status=429, headers={"RateLimit": '"api";r=0;t=0'})]
    hub.faults = {"/main": [Fault(status=429)], FIRST: busy}
    rc, _, err = prepare()
    assert rc == 0, err
    assert len(hub.asked("/main")) == 2
    assert min(waits(hub.asked(FIRST))) >= 1  # the hub's t rounds down
    assert err.count("HTTP 429 Too Many Requests; attempt") == 1, "for a file huggingface_hub waits"
    assert contents(tmp_path / "data") == expected
    happened("asked again when it said; same shards", attempts=3, waits_s=waits(hub.asked(FIRST)))


def test_server_errors_are_waited_out(fault, hub, prepare, tmp_path, expected):
    happened = fault("500 for the revision, 503 and then no JSON for the listing, 500, 502, 503 and 504 for a file")
    hub.faults = {
        "/main": [Fault(status=500)],
        "sample%2F10BT": [Fault(status=503), Fault(length=20)],
        FIRST: [Fault(status=status) for status in (500, 502, 503, 504)],
    }
    rc, _, err = prepare()
    assert rc == 0, err
    pauses = waits(hub.asked(FIRST))
    assert all(pause >= QUICK * 2**i for i, pause in enumerate(pauses)), pauses
    assert [len(hub.asked(end)) for end in ("/main", "sample%2F10BT", FIRST)] == [2, 3, 5]
    assert contents(tmp_path / "data") == expected
    happened("each asked again with growing pauses; same shards", attempts=5, waits_s=pauses)


def test_a_body_of_the_wrong_length_is_fetched_anew(fault, hub, prepare, tmp_path, expected):
    happened = fault("a body that is too short, with a Content-Length that agrees with it")
    hub.faults[SECOND] = [Fault(length=CUT)]
    rc, _, err = prepare()
    assert rc == 0, err
    assert [request.start for request in hub.asked(SECOND)] == [0, 0]
    (retry,) = retries(err)
    assert f"file should be of size {len(hub.files[SECOND])} but has size {CUT}" in retry
    assert contents(tmp_path / "data") == expected
    happened("noticed by its size, fetched again; same shards", attempts=2)


def test_a_wrong_bit_is_noticed(fault, hub, prepare, tmp_path, expected):
    happened = fault("a body of the right length with a wrong bit")
    hub.faults = {FIRST: [Fault(corrupt=True)]}
    rc, _, err = prepare()
    assert rc == 0, err
    assert [len(hub.asked(name)) for name in NAMES] == [2, 1, 1]
    assert err.count("the bytes that came do not have the hub's sha256") == 1
    assert contents(tmp_path / "data") == expected
    happened("noticed by its sha256, fetched again; same shards", attempts=2)


def test_a_silent_hub_is_not_waited_for_without_end(fault, hub, prepare, tmp_path, expected):
    happened = fault("the hub falls silent in the listing and in the middle of a file")
    hub.faults = {"sample%2F10BT": [Fault(cut=0, hang=True)], SECOND: [Fault(cut=CUT, hang=True)]}
    rc, _, err = prepare(env={"HF_HUB_ETAG_TIMEOUT": "3", "HF_HUB_DOWNLOAD_TIMEOUT": "3"})
    assert rc == 0, err
    assert [len(hub.asked(end)) for end in ("sample%2F10BT", SECOND)] == [2, 2]
    assert contents(tmp_path / "data") == expected
    happened("given up after the client's timeout, asked again; same shards", attempts=2)


def test_a_hub_that_stays_down_is_one_line_and_the_same_command_goes_on(fault, hub, prepare, tmp_path, expected):
    happened = fault("500 for the third file for good; later the hub is well again")
    hub.always[THIRD] = Fault(status=500)
    rc, _, err = prepare()
    assert rc == 2
    assert len(retries(err)) == ATTEMPTS - 1
    error = err.splitlines()[-1]
    assert error.startswith(f"error: hf://datasets/{REPO}/{FOLDER}: {THIRD}: HTTP 500 Internal Server Error, in 5 attempts")
    assert len(hub.asked(THIRD)) == ATTEMPTS
    left = contents(tmp_path / "data")
    whole = {shard["file"] for shard in json.loads((tmp_path / "data" / PROGRESS).read_text())["shards"]}
    assert whole == {name for name in left if name.endswith(".bin")} != set()
    assert all(left[name] == expected[name] for name in whole)
    assert "manifest.json" not in left
    assert not [name for name in left if name.endswith(".parquet")]

    hub.always.clear()
    hub.requests.clear()
    rc, _, err = prepare()
    assert rc == 0, err
    assert contents(tmp_path / "data") == expected
    happened(
        f"exit code 2, the file, the reason and the attempts on one line, {len(whole)} whole shards; later the same shards",
        attempts=ATTEMPTS,
        shards_kept=len(whole),
    )


def test_a_hub_that_breaks_off_for_good_does_not_keep_the_command_forever(fault, hub, prepare, tmp_path):
    happened = fault("the hub resets the connection in the middle of a file every time")
    hub.always[FIRST] = Fault(cut=CUT, reset=True)
    rc, _, err = prepare()
    assert (rc, len(hub.asked(FIRST))) == (2, ATTEMPTS)
    assert f"error: hf://datasets/{REPO}/{FOLDER}: {FIRST}: " in err.splitlines()[-1]
    assert not (tmp_path / "data").exists()
    happened("exit code 2, nothing is left", attempts=ATTEMPTS)


def test_what_will_not_pass_is_not_asked_again(fault, hub, prepare, tmp_path):
    happened = fault("403 for a file")
    hub.always[FIRST] = Fault(status=403)
    rc, _, err = prepare()
    assert rc == 2
    assert not retries(err)
    error = err.splitlines()[-1]
    assert error.startswith(f"error: hf://datasets/{REPO}/{FOLDER}: {FIRST}: ")
    assert "403" in error and "HF_TOKEN" in error
    assert len(hub.asked(FIRST)) == 1
    assert not contents(tmp_path / "data")
    happened("exit code 2 and one line at once", attempts=1)


def test_a_full_disk_is_not_the_hubs_fault(fault, hub, prepare, tmp_path, expected):
    happened = fault("the disk takes no more (a limit on the size of files) in the middle of a download")
    rc, _, err = prepare(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (CUT, CUT)))
    assert rc == 2
    assert not retries(err)
    assert err.splitlines()[-1] == f"error: {tmp_path}/data/.download: File too large"
    assert len(hub.asked(FIRST)) == 1
    rc, _, err = prepare()
    assert rc == 0, err
    assert contents(tmp_path / "data") == expected
    happened("exit code 2 and one line at once; with room, the same shards", attempts=2)


def test_kill_minus_nine_in_a_download_costs_that_file(fault, hub, prepare, tmp_path, expected):
    happened = fault("kill -9 in the middle of a download")
    hub.faults[SECOND] = [Fault(cut=CUT, slow=True)]
    process = prepare(start)
    wait_until(process, lambda: hub.asked(SECOND) and list((tmp_path / "data").rglob("*.incomplete")))
    process.kill()
    process.communicate()
    assert not list((tmp_path / "data").rglob("*.parquet"))
    rc, _, err = prepare()
    assert rc == 0, err
    assert [len(hub.asked(name)) for name in (SECOND, THIRD)] == [2, 1]
    assert contents(tmp_path / "data") == expected
    happened("the next start fetched the file again; same shards", attempts=2)
