"""Who is served how much: accounts, and what moves them."""

from __future__ import annotations

import pytest

from brokerkit import (
    CLIENT,
    FOUR,
    ONE,
    OTHER,
    SECOND,
    THREE,
    TWO,
    WORKER,
    Core,
    end,
    order,
    stopped,
    tok,
)
from loopmux.messages import Register, ServedModel, Submit
from loopmux.wire import VERSIONS, Kind
from loopmux_broker.clients import Client, Principal
from loopmux_broker.events import say
from loopmux_broker.ledger import Account, Ledger, Ledgers, Line
from loopmux_broker.output import Output
from loopmux_broker.pool import Worker
from loopmux_broker.queues import HeadStart, Queues
from loopmux_broker.requests import Request


@pytest.fixture
def core() -> Core:
    core = Core()
    core.hello()
    return core


def test_a_client_with_one_request_does_not_wait_for_another_s_thousand(core: Core) -> None:
    core.hello(OTHER)
    core.register()
    core.submit(ONE)
    for n in range(1000):
        core.submit(b"many" + n.to_bytes(12))
    core.submit(TWO, OTHER)
    assert TWO in order(core, 2)  # none of these produces a token, so the two take turns


def test_clients_are_served_alike_by_tokens_and_not_by_requests() -> None:
    """One asks for answers of 200 tokens, the other for answers of 20: it gets ten times as many."""
    core = Core()
    core.hello()
    core.hello(OTHER)
    core.register()
    for n in range(200):
        core.submit(b"a" + n.to_bytes(15), CLIENT, max_new_tokens=200)
        core.submit(b"b" + n.to_bytes(15), OTHER, max_new_tokens=20)
    served = {b"a": 0, b"b": 0}
    for _ in range(110):
        [lease] = core.tables.pool.leases.values()
        request = lease.request.id
        total = 200 if request[:1] == b"a" else 20
        served[request[:1]] += total
        core.worker(tok(request, 0, total))
        core.worker(end(request, total))
    assert abs(served[b"a"] - served[b"b"]) <= 200


def test_what_was_expected_and_not_used_is_given_back(core: Core) -> None:
    core.hello(OTHER)
    core.register()
    core.submit(ONE, max_new_tokens=10_000)
    assert account(core).served == 10_000
    core.worker(tok(ONE, 0, 7))
    core.worker(end(ONE, 7))
    assert account(core).served == 7


def test_nobody_pays_twice_because_a_worker_was_lost(core: Core) -> None:
    core.register()
    core.register(SECOND)
    core.submit(ONE, prompt_size=400, max_new_tokens=50)
    core.worker(tok(ONE, 0, 7))
    core.lose(WORKER)
    assert account(core).served == 100 + 50
    core.worker(tok(ONE, 7, 3, attempt=2), SECOND)
    core.worker(end(ONE, 10, attempt=2), SECOND)
    assert account(core).served == 100 + 10


def test_nor_for_what_another_worker_produces_while_the_first_is_still_being_stopped(core: Core) -> None:
    core.register()
    core.register(SECOND)
    core.submit(ONE, prompt_size=400, max_new_tokens=50)
    core.worker(tok(ONE, 5))  # output with a hole
    core.worker(tok(ONE, 0, 10, attempt=2), SECOND)
    core.worker(stopped(ONE), WORKER)
    assert account(core).served == 100 + 50
    core.worker(end(ONE, 10, attempt=2), SECOND)
    assert account(core).served == 100 + 10


def test_time_away_is_no_credit(core: Core) -> None:
    """A client that comes after another was served a lot takes turns with it from then on."""
    core.register()
    for n in range(5):
        request = bytes([n + 20]) * 16
        core.submit(request, max_new_tokens=1000)
        core.worker(tok(request, 0, 1000))
        core.worker(end(request, 1000))
    core.hello(OTHER)
    core.submit(ONE, max_new_tokens=100)
    mine = [bytes([n + 30]) * 16 for n in range(3)]
    theirs = [bytes([n + 40]) * 16 for n in range(3)]
    for pair in zip(mine, theirs, strict=True):
        core.submit(pair[0], CLIENT, max_new_tokens=100)
        core.submit(pair[1], OTHER, max_new_tokens=100)
    owners = ["theirs" if request in theirs else "mine" for request in order(core, 6)]
    assert sorted(owners[:2]) == sorted(owners[2:4]) == ["mine", "theirs"]


def test_who_allows_for_long_answers_and_gets_short_ones_has_as_many_slots_as_others(core: Core) -> None:
    core.hello(OTHER)
    core.register(slots=8)
    for n in range(200):
        core.submit(b"long" + n.to_bytes(12), CLIENT, max_new_tokens=4096)
        core.submit(b"brief" + n.to_bytes(11), OTHER, max_new_tokens=16)
    for _ in range(24):  # what began before anything was known of the answers
        short(core)
    held = []
    for _ in range(50):
        held.append(sum(lease.request.id[:4] == b"long" for lease in core.tables.pool.leases.values()))
        short(core)
    assert set(held) <= {3, 4, 5}


def test_what_ended_before_it_was_an_answer_says_nothing_about_the_next_ones(core: Core) -> None:
    core.register()
    for n in range(20):
        core.submit(b"given up" + n.to_bytes(8), max_new_tokens=100)
        core.client(say(Kind.CANCEL, b"given up" + n.to_bytes(8)))
        core.worker(stopped(b"given up" + n.to_bytes(8)))
    core.submit(ONE, max_new_tokens=100)
    assert (account(core).served, account(core).expected) == (20 + 100, 100)


def test_who_gets_longer_answers_than_before_pays_for_them_while_they_run(core: Core) -> None:
    core.hello(OTHER)
    core.register(slots=2)
    for n in range(2):
        core.submit(b"long" + n.to_bytes(12), CLIENT, max_new_tokens=10_000)
        short(core)
    core.submit(ONE, CLIENT, max_new_tokens=10_000)  # the next begins as if it were as short
    assert account(core).served == 3 * 16
    core.worker(tok(ONE, 0, 16))
    assert account(core).served == 3 * 16
    for had, count, charged in ((16, 1, 34), (17, 17, 34), (34, 2_000, 4_068), (2_034, 5_000, 10_000)):
        core.worker(tok(ONE, had, count))
        assert account(core).served == 2 * 16 + charged
    assert account(core).settled == 2 * 16 + 7_034
    core.worker(end(ONE, 7_034))
    assert account(core).served == account(core).settled == 2 * 16 + 7_034


def test_who_comes_does_not_wait_for_what_others_were_expected_to_cost_and_did_not(core: Core) -> None:
    core.register(slots=2)
    for n in range(2):
        core.submit(b"long" + n.to_bytes(12), max_new_tokens=4096)
    many(core)
    short(core)  # of an answer that might have been long
    core.hello(OTHER)
    core.submit(ONE, OTHER, max_new_tokens=16)
    assert ONE in [short(core) for _ in range(4)]


def test_what_others_take_of_another_model_where_nobody_waits_is_not_waited_for(core: Core) -> None:
    """Else a client that has waited all the time would first get as much as another one did where nobody waited."""
    core.hello(OTHER)
    core.hello(b"third")
    core.register()
    core.register(SECOND, models=("other",))
    many(core)
    core.submit(TWO, OTHER, model="other", max_new_tokens=16)
    core.worker(tok(TWO, 0, 10_000), SECOND)
    core.worker(end(TWO, 10_000), SECOND)
    core.submit(THREE, OTHER, model="other", max_new_tokens=16)
    core.submit(ONE, b"third", max_new_tokens=16)
    assert ONE in [short(core) for _ in range(3)]


def test_nor_is_who_comes_while_no_worker_is_there_ahead_of_those_who_wait(core: Core) -> None:
    core.launcher()
    core.declare("m", "ready")
    core.register()
    was_served(core, 10_000)
    core.lose(WORKER)
    core.submit(THREE, max_new_tokens=16)
    core.hello(OTHER)
    many(core, OTHER)
    core.register(SECOND)
    assert THREE in [short(core, SECOND) for _ in range(2)]


def test_who_comes_beside_one_that_is_next_by_its_priority_alone_is_level_with_the_others(core: Core) -> None:
    core.register()
    was_served(core, 11_000)
    core.hello(OTHER)
    core.hello(b"third")
    core.submit(THREE, OTHER, max_new_tokens=16)
    many(core, OTHER)
    core.submit(b"p" * 16, priority=10, max_new_tokens=16)
    core.submit(ONE, b"third", max_new_tokens=16)
    assert ONE in [short(core) for _ in range(4)]


def test_a_worker_s_end_starves_nobody_who_was_served_much(core: Core) -> None:
    core.launcher()
    core.declare("m", "ready")
    core.register()
    was_served(core, 10_000)
    core.submit(FOUR, max_new_tokens=16)  # a slot was given away since
    short(core)
    core.lose(WORKER)
    core.hello(OTHER)
    core.register(SECOND)
    many(core, OTHER)
    core.submit(ONE, max_new_tokens=16)
    assert ONE in [short(core, SECOND) for _ in range(4)]


def test_nobody_waits_for_one_model_because_of_what_was_had_of_another(core: Core) -> None:
    core.hello(OTHER)
    core.register(models=("fast",))
    core.register(SECOND, models=("slow",))
    for n in range(50):
        core.submit(b"mine" + n.to_bytes(12), model="slow", max_new_tokens=16)
        core.submit(b"theirs" + n.to_bytes(10), OTHER, model="slow", max_new_tokens=16)
    ran = []
    for n in range(20):  # all the while one of them has much of what nobody else wants
        request = b"fast" + n.to_bytes(12)
        core.submit(request, model="fast", max_new_tokens=1_000)
        core.worker(tok(request, 0, 1_000))
        core.worker(end(request, 1_000))
        ran.append(short(core, SECOND)[:4])
    assert ran.count(b"mine") == 10


def test_adapters_of_one_worker_are_no_more_shares(core: Core) -> None:
    core.hello(OTHER)
    names = tuple(f"lora{n}" for n in range(8))
    core.register(models=("m", *names))
    for n in range(50):
        core.submit(b"mine" + n.to_bytes(12), model=names[n % 8], max_new_tokens=16)
        core.submit(b"theirs" + n.to_bytes(10), OTHER, model="m", max_new_tokens=16)
    ran = [short(core)[:4] for _ in range(20)]
    assert ran.count(b"mine") == 10


def test_models_that_a_worker_comes_to_serve_together_are_paid_for_together(core: Core) -> None:
    core.hello(OTHER)
    core.register(models=("m",))
    core.register(SECOND, models=("n",))
    for n in range(50):
        core.submit(b"mine" + n.to_bytes(12), model="m", max_new_tokens=16)
        core.submit(b"also" + n.to_bytes(12), model="n", max_new_tokens=16)
        core.submit(b"theirs" + n.to_bytes(10), OTHER, model="m", max_new_tokens=16)
    core.lose(SECOND)
    core.register(b"third", models=("m", "n"))
    ran = [short(core, b"third")[:4] for _ in range(40)]
    assert abs(ran.count(b"mine") + ran.count(b"also") - ran.count(b"thei")) <= 2
    assert {b"mine", b"also", b"thei"} == set(ran)


def test_who_waits_for_one_of_two_models_waits_behind_what_it_had_of_the_other_once_they_are_united() -> None:
    queues = Queues(HeadStart(), lambda _: True)
    much, little = (Client(n.to_bytes(16), None, "", Principal(), 0.0) for n in range(2))
    for name, model, client in (("had", "n", much), ("first", "m", much), ("second", "m", little)):
        submit = Submit(model, max_new_tokens=5_000)
        request = Request(name.encode(), client, submit, b"", 0.0, 1.0, Output(1))
        queues.push(request)
        if name == "had":
            queues.remove(request)
            queues.charge(request)
    served = tuple(ServedModel(model, "f") for model in ("m", "n"))
    worker = Worker(b"w", Register("worker", "w", b"b" * 16, VERSIONS, models=served, slots=1), 0.0, 0.0, 0, "")
    queues.unite(worker.models)
    following = queues.next_for(worker)
    assert following is not None
    assert following.id == b"second"


def test_by_how_much_a_client_is_ahead_is_in_the_sum_of_two_ledgers() -> None:
    both, one, two = Principal(), Principal(), Principal()
    kept, absorbed = Ledger(1_000), Ledger(50)
    kept.accounts |= {both: Account(1_200, 100, 7.0), one: Account(900, 0, None)}
    line = Line(Account(80, 20, 9.0))
    line.account.lines["n", None, None] = line
    absorbed.accounts |= {both: line.account, two: Account(40, 0, 3.0)}
    kept.absorb(absorbed)
    found = {name: kept.accounts[who] for name, who in (("both", both), ("one", one), ("two", two))}
    assert {name: (x.served, x.expected, x.usual) for name, x in found.items()} == {
        "both": (1_230, 120, 7.0),
        "one": (900, 0, None),
        "two": (990, 0, 3.0),
    }
    assert found["both"].lines == {("n", None, None): line}
    assert line.account is found["both"]


def test_a_ledger_is_kept_while_its_model_is_known() -> None:
    ledgers, who = Ledgers({"m"}.__contains__), Principal()
    kept = ledgers.of("m")
    kept.of(who)
    for n in range(1_000):
        ledgers.of(f"typo {n}")
        ledgers.unite(["m", f"adapter {n}"])
    assert ledgers.get("m") is kept
    assert sum(ledgers.get(f"{what} {n}") is not None for n in range(1_000) for what in ("typo", "adapter")) < 200


def test_of_a_client_that_is_gone_no_account_is_left_nor_made() -> None:
    queues, client = Queues(HeadStart(), lambda _: True), Client(ONE, None, "", Principal(), 0.0)
    request = Request(ONE, client, Submit("m"), b"", 0.0, 1.0, Output(1))
    queues.charge(request)
    queues.forget(client.principal)
    queues.outgrown(request)
    queues.settle(request)
    assert not queues._ledgers.of("m").accounts


def account(core: Core, model: str = "m") -> Account:
    """What the first client was served of a model."""
    return core.tables.queues._ledgers.of(model).accounts[core.tables.clients.by_peer[CLIENT].principal]


def many(core: Core, peer: bytes = CLIENT) -> None:
    """Fifty requests of a client that wait, each for a short answer."""
    for n in range(50):
        core.submit(b"many" + n.to_bytes(12), peer, max_new_tokens=16)


def was_served(core: Core, tokens: int) -> None:
    """The first client has had an answer of so many."""
    core.submit(TWO, max_new_tokens=16)
    core.worker(tok(TWO, 0, tokens))
    core.worker(end(TWO, tokens))


def short(core: Core, worker: bytes = WORKER) -> bytes:
    """What a worker has had longest, which ends there with 16 tokens."""
    lease = next(iter(core.tables.pool.workers[worker].leases.values()))
    request, attempt = lease.key
    core.worker(tok(request, 0, 16, attempt=attempt), worker)
    core.worker(end(request, 16, attempt=attempt), worker)
    return request


def test_priority_counts_between_clients_and_does_not_starve_them(core: Core) -> None:
    core.hello(OTHER)
    core.register()
    core.submit(ONE, max_new_tokens=100)
    core.submit(TWO, max_new_tokens=100)
    eager = [b"e" + n.to_bytes(15) for n in range(40)]
    for request in eager:
        core.submit(request, OTHER, priority=1, max_new_tokens=100)
    ran = order_full(core, 30, 100)
    assert ran[0] in eager
    assert TWO in ran  # a step is worth 1 500 tokens: fifteen of these


def order_full(core: Core, count: int, total: int) -> list[bytes]:
    """The requests that one worker with one slot gets one after the other, if each produces ``total`` tokens."""
    ran = []
    for _ in range(count):
        [lease] = core.tables.pool.leases.values()
        core.worker(tok(lease.request.id, 0, total))
        core.worker(end(lease.request.id, total))
        [lease] = core.tables.pool.leases.values()
        ran.append(lease.request.id)
    return ran
