"""A candidate of lab/bench/turns.py that does as its job says."""

import json
import sys
import time

from lab.bench.turns import own_stdout, serve


def main() -> None:
    answers, job = own_stdout(), json.loads(sys.argv[1])
    print("this is no answer")
    time.sleep(job.get("sleep", 0))
    if job.get("fails") == "start":
        raise SystemExit(3)
    turns = 0

    def answer(question: str) -> dict:
        nonlocal turns
        turns += 1
        if job.get("fails") == "turn" and turns == 2:
            raise SystemExit(4)
        with open(job["order"], "a") as file:
            print(job["name"], file=file)
        return {"seconds": {"step": turns}, "asked": question}

    serve(answers, {"name": job["name"]}, answer)


if __name__ == "__main__":
    main()
