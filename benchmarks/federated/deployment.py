"""A deployment on one machine, and what goes wrong in it: three sites and a coordinator in processes of their own.

    python benchmarks/federated/deployment.py --output runs/deployment --results benchmarks/results/federated-deployment

The script starts itself again in a network namespace that has a loopback device and nothing else (Linux, `unshare`),
so nothing can reach the internet; where that is not permitted it says so and goes on. It then plays one federation of
eight rounds of the pocket model:

    site c is a rogue: it repeats an old update in round 2, cuts one in round 3, sends NaN in 4 and a huge change in 5
    a site with a key that the coordinator does not know tries to join
    a program that reaches the port, but has not the coordinator's secret, tries to take its task
    site b is killed (SIGKILL) while it has an offer, in round 6, and started again
    the coordinator is killed after round 7 and started again, with the same command

It prints a table of what was to happen and whether it did, and writes the record. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import torch

from thriftune.federated.flower.coordinator import COORDINATOR_TASK
from thriftune.federated.flower.site import SiteLink
from thriftune.federated.flower.tasks import acquire, acquiring_client
from thriftune.federated.join import Joining
from thriftune.federated.keys import make_keys, read_site_keys
from thriftune.federated.message import factors_of, open_message, pack
from thriftune.federated.records import FederatedRecord, FederatedRound
from thriftune.federated.site import Site, open_base, recipe_of_rounds
from thriftune.recipe import read_recipe
from thriftune.records import read_record
from thriftune.run import prepare_run

ROUNDS, RANK = 8, 16
WORDS = [
    *("pocket", "method=lora", f"lora.r={RANK}", "local_steps=1", f"federated.rounds={ROUNDS}", "round_timeout_s=90"),
    *("per_device_train_batch_size=2", "gradient_accumulation_steps=1", "quorum=0.6"),
]
OWN = ["max_samples=16", "save_strategy=no"]
WAIT_S = 240.0
REFUSED = "does not let site"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--cut-off", choices=("yes", "no"), help=argparse.SUPPRESS)
    parser.add_argument("--rogue", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rogue:
        act_as_rogue(arguments.output, arguments.rogue)
        return
    if arguments.cut_off is None:
        sys.exit(again_without_network())
    if arguments.cut_off == "yes":
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    play = Play(arguments.output.absolute())
    try:
        play.run()
    finally:
        play.end()
    play.check("network cut off", "no address but loopback", arguments.cut_off == "yes" and not reaches_out())
    report(play, arguments.results)


def again_without_network() -> int:
    """This script again, in a network namespace of its own where that is permitted."""
    possible = shutil.which("unshare") and shutil.which("ip")
    inside = ["unshare", "--net", "--map-root-user"]
    cut = bool(possible) and subprocess.run([*inside, "true"], check=False).returncode == 0
    command = [sys.executable, *sys.argv, "--cut-off", "yes" if cut else "no"]
    return subprocess.run([*inside, *command] if cut else command, check=False).returncode


def reaches_out() -> bool:
    """Whether any address beyond this machine has a route (TEST-NET-1 is never answered, but a route takes it)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return False
        return True


class Play:
    """The processes of the play, and what was seen."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self.seen: list[dict[str, object]] = []
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.server = f"127.0.0.1:{self.port}"

    def run(self) -> None:
        certificates = self.folder / "certs"
        make_keys(certificates, ["a", "b", "c"], ["localhost", "127.0.0.1"])
        self.serve()
        self.join("a", certificates / "sites" / "a")
        self.join("b", certificates / "sites" / "b")
        self.start("c", [__file__, "--output", str(self.folder), "--results", "-", "--rogue", self.server])
        self.no_secret(certificates)
        self.unknown_key(certificates)
        self.wait_for("b", f"round 6 of {ROUNDS}: ")
        self.kill("b")
        self.join("b", certificates / "sites" / "b")
        self.wait_for("serve", f"round 7/{ROUNDS}: ")
        self.kill("serve")
        wait_until(lambda: not self.answers(), "the port is free")
        self.serve()
        refused = self.processes["stranger"].wait(WAIT_S) == 2 and REFUSED in self.said("stranger")
        self.check("a key that the coordinator does not know", "refused", refused)
        codes = {name: self.processes[name].wait(WAIT_S) for name in ("serve", "a", "b", "c")}
        self.check("all end by themselves", "exit codes 0", set(codes.values()) == {0}, str(codes))

    def serve(self) -> None:
        words = ["-m", "thriftune", "federate", "serve", *WORDS, "--certificates", str(self.folder / "certs")]
        self.start("serve", [*words, "--port", str(self.port), "--output", str(self.folder / "fed")])

    def join(self, site: str, certificates: Path) -> None:
        words = ["-m", "thriftune", "federate", "join", *WORDS, *OWN, "--data", "reviews", "--server", self.server]
        self.start(site, [*words, "--certificates", str(certificates), "--output", str(self.folder / site)])

    def unknown_key(self, certificates: Path) -> None:
        """A site of the same authority whose public key the coordinator was not given."""
        make_keys(self.folder / "others", ["stranger"], ["localhost"])
        stranger = self.folder / "others" / "sites" / "stranger"
        shutil.copy(certificates / "authority.pem", stranger / "authority.pem")
        self.join("stranger", stranger)

    def no_secret(self, certificates: Path) -> None:
        """Whoever takes the coordinator's task could send messages to the sites."""
        wait_until(lambda: "serving " in self.said("serve"), "the coordinator serves")
        guess = self.folder / "guess"
        guess.write_bytes(b"a guess")
        client = acquiring_client(self.server, (certificates / "authority.pem").read_bytes(), guess)
        try:
            acquire(client, COORDINATOR_TASK, None)
            refused = "not refused"
        except httpx.HTTPStatusError as error:
            refused = f"HTTP {error.response.status_code}"
        client.close()
        self.check("taking the coordinator's task without its secret", "refused", refused == "HTTP 401", refused)

    def start(self, name: str, words: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *words], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def said(self, name: str) -> str:
        return text_of(self.folder / f"{name}.out")

    def wait_for(self, name: str, words: str) -> None:
        wait_until(lambda: words in self.said(name), f"{name}: {words}")

    def end(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(60)

    def check(self, what: str, expected: str, holds: bool, note: str = "") -> None:
        self.seen.append({"what": what, "expected": expected, "holds": bool(holds), "note": note})


def wait_until(holds: Callable[[], bool], what: str) -> None:
    ends = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > ends:
            raise TimeoutError(f"waited {WAIT_S:g} s for: {what}")
        time.sleep(0.1)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def act_as_rogue(folder: Path, server: str) -> None:
    """Site c: honest but for four rounds. It trains like the others, and then sends something else."""
    own = folder / "c"
    recipe = read_recipe(None, [*WORDS[1:], *OWN], {"model": WORDS[0], "data": "reviews", "output": str(own)})
    asked = Joining(recipe, folder / "certs" / "sites" / "c", server, own, False)
    keys = read_site_keys(asked.certificates)
    own.mkdir(parents=True)
    prepared = prepare_run(recipe_of_rounds(recipe))
    base = open_base(prepared, own, print)
    site = Site(base, keys.site, prepared.data.train, own, [], keeps=False)
    first = b""
    with SiteLink(keys, server, own / "flower", print) as link:
        while True:
            task = link.wait()
            message = open_message(task.data)
            if message.header.kind == "end":
                site.end(task.data)
                task.reply(b"")
                return
            update = site.answer(task.data)
            first = first or update
            number = message.header.round + 1
            if number == 7:  # slow enough for site b to come back within the round, and for the stranger to give up
                wait_until(lambda: f"round 7 of {ROUNDS}: " in text_of(folder / "b.out"), "site b in round 7")
                wait_until(lambda: REFUSED in text_of(folder / "stranger.out"), "the stranger")
            if number == 2:
                update = first
            elif number == 3:
                update = update[:-7]
            elif number in (4, 5):
                opened = open_message(update)
                adapter = factors_of(opened, base.places.shapes(), base.places.read())
                for factors in adapter.values():
                    factors.b_OR.mul_(torch.nan if number == 4 else 1e4)
                update = pack(opened.header, adapter)
            task.reply(update)


def report(play: Play, results: Path) -> None:
    record = read_record(play.folder / "fed" / "record.json", FederatedRecord)
    refused = {entry.round: {site.site: site.refused for site in entry.sites} for entry in record.rounds}
    taken = {entry.round: entry.updates for entry in record.rounds}
    wanted = {2: ("an old update again", "round 0, not 1"), 3: ("a cut update", "not those its header names"),
              4: ("NaN in an update", "not finite"), 5: ("a huge change", "times the usual")}  # fmt: skip
    for number, (what, words) in wanted.items():
        reason = refused[number].get("c", "")
        play.check(what, "refused, by the site's name", words in reason and "site c" in reason, reason)
    play.check("a site killed in round 6", "the round goes on with 2", taken[6] == 2, f"{taken[6]} updates")
    went_on = "went on from" in play.said("b")
    play.check(
        "the site started again", "in round 7, with its moments", taken[7] == 3 and went_on, f"{taken[7]} updates"
    )
    said = play.said("serve")
    went_on = f"round {ROUNDS} of {ROUNDS}" in said and said.count("serving ") == 2
    play.check("the coordinator killed after round 7", "goes on with round 8", went_on and len(taken) == ROUNDS)
    over = [over_the_factors(entry, record.sides) for entry in record.rounds if all_arrived(entry)]
    play.check(
        f"Flower's meter against 2 x rank x (in + out), {len(over)} rounds",
        "within 1 %",
        len(over) > 3 and 0 <= min(over) <= max(over) < 0.01,
        f"at most {100 * max(over):.2f} % more, up and down",
    )
    left = [line for line in command_lines() if str(play.folder) in line and "deployment.py" not in line]
    play.check("processes left over", "none", not left, "; ".join(left))
    results.mkdir(parents=True, exist_ok=True)
    shutil.copy(play.folder / "fed" / "record.json", results / "record.json")
    (results / "checks.json").write_text(json.dumps(play.seen, indent=2) + "\n", encoding="utf-8")
    print(said)
    for entry in play.seen:
        print(f"{'yes' if entry['holds'] else 'NO '}  {entry['what']}: {entry['expected']}  {entry['note']}")
    if not all(entry["holds"] for entry in play.seen):
        sys.exit("not everything held")


def all_arrived(entry: FederatedRound) -> bool:
    """Whether every offer of the round was answered by an update that was whole, poisoned or not."""
    return all(site.bytes_of_factors for site in entry.sites)


def over_the_factors(entry: FederatedRound, sides: int) -> float:
    """What Flower counted in a round beyond the bytes of the factors in bfloat16, as a share of those."""
    down, up = entry.meter["bytes_down"], entry.meter["bytes_up"]
    of_offers = 2 * RANK * sides * len(entry.sites)
    return max(down / of_offers, up / sum(2 * site.rank * sides for site in entry.sites)) - 1


def command_lines() -> list[str]:
    return [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])
            if process.pid != os.getpid()]  # fmt: skip


if __name__ == "__main__":
    main()
