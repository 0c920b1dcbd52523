"""Stories of one request: messages in, actions out, no socket and no clock."""

from __future__ import annotations

import random
from typing import Any

import pytest

from loopmux import codec, errors, wire
from loopmux.cadence import KEPT, RESEND
from loopmux.events import (
    Action,
    Arrived,
    Attached,
    CancelAsked,
    Consumed,
    Deliver,
    Detached,
    Fail,
    Finish,
    Ponged,
    Refused,
    Request,
    RequestEvent,
    Send,
    TimePassed,
)
from loopmux.messages import End, Failure, Phase, Submit, Tok
from loopmux.results import ReasoningDelta, TextDelta, Timing, ToolCall, Usage, Waiting
from loopmux.stream import GRACE, PATIENCE, Exchange, Stage
from loopmux.wire import Header, Kind, Message, pack_tokens

ID = bytes(range(16))
ATTACHED = Attached(window=16, max_body=1000, fresh=True)
USAGE = Usage(5, 3)


class Story:
    """An exchange with its clock and what came out of it."""

    def __init__(self, **request: Any) -> None:
        submit = Submit("m", timeout=request.pop("timeout", 100.0))
        self.now = 0.0
        self.exchange = Exchange(Request(ID, submit, b"body", submit.timeout, **request), self.now)
        self.delivered: list[Deliver] = []
        self.outcomes: list[Finish | Fail] = []
        self.sent: list[Message] = []

    def do(self, event: RequestEvent) -> list[Message]:
        """Handle an event; what was sent because of it."""
        actions: list[Action] = [*self.exchange.handle(event, self.now)]
        sent = [a.message for a in actions if isinstance(a, Send)]
        self.sent += sent
        self.delivered += [a for a in actions if isinstance(a, Deliver)]
        self.outcomes += [a for a in actions if isinstance(a, (Finish, Fail))]
        return sent

    def kinds(self, event: RequestEvent) -> list[Kind]:
        return [m.kind for m in self.do(event)]

    def wait(self, seconds: float) -> list[Kind]:
        """Let time pass, waking the exchange whenever it is due; the kinds it sent."""
        until, sent = self.now + seconds, []
        while self.exchange.due <= until:
            self.now = max(self.now, self.exchange.due)
            sent += self.kinds(TimePassed())
        self.now = until
        return sent

    @property
    def error(self) -> errors.LoopmuxError:
        (outcome,) = self.outcomes
        assert isinstance(outcome, Fail)
        return outcome.error

    @property
    def text(self) -> str:
        return "".join(d.event.text for d in self.delivered if isinstance(d.event, TextDelta))


def begun(**request: Any) -> Story:
    story = Story(**request)
    assert story.kinds(ATTACHED) == [Kind.SUBMIT]
    story.do(accepted())
    return story


def accepted(position: int = 0) -> Arrived:
    return Arrived(Message(Header(Kind.ACCEPTED, ID, arg=position)))


def tok(
    start: int, count: int = 1, calls: tuple[ToolCall, ...] = (), fingerprint: str = "", thought: str = ""
) -> Arrived:
    ids = list(range(start, start + count))
    body = codec.pack(Tok("".join(f"{i}." for i in ids), calls, fingerprint=fingerprint, reasoning=thought))
    return Arrived(Message(Header(Kind.TOK, ID, start, count, 1), body=body, tokens=pack_tokens(ids)))


def end(total: int, attempt: int = 1) -> Arrived:
    body = codec.pack(End("stop", USAGE, Timing(1, 2, 3), "m", "w1", "a"))
    return Arrived(Message(Header(Kind.END, ID, total, attempt=attempt), body=body))


def failure(kind: Kind, total: int, code: str, **more: Any) -> Arrived:
    return Arrived(Message(Header(kind, ID, total), body=codec.pack(Failure(code, "because", **more))))


def credits_of(messages: list[Message]) -> list[tuple[int, int]]:
    return [(m.header.seq, m.header.arg) for m in messages if m.kind is Kind.CREDIT]


# --- the good way -----------------------------------------------------------------------------------------------------


def test_a_request_is_submitted_streamed_and_acknowledged() -> None:
    story = begun()
    call = ToolCall("c1", "add", {"a": 1})
    story.do(tok(0, 2))
    story.do(tok(2, 1, (call,)))
    assert story.kinds(end(3, attempt=2)) == [Kind.ENDACK]
    assert [d.event for d in story.delivered] == [
        TextDelta("0.1.", (0, 1), 0),
        TextDelta("2.", (2,), 2),
        call,
        USAGE,
    ]
    (outcome,) = story.outcomes
    assert isinstance(outcome, Finish)
    result = outcome.result
    assert (result.text, result.token_ids, result.tool_calls) == ("0.1.2.", (0, 1, 2), (call,))
    assert (result.finish_reason, result.usage, result.attempts) == ("stop", USAGE, 2)
    assert (result.model, result.adapter, result.worker, result.request_id) == ("m", "a", "w1", ID.hex())
    assert story.exchange.stage is Stage.DONE


def test_reasoning_comes_in_front_of_text_and_is_no_part_of_it() -> None:
    story = begun()
    story.do(tok(0, 1, thought="I "))
    story.do(tok(1, 1, thought="add."))
    story.do(end(2))
    assert [type(d.event) for d in story.delivered[:4]] == [ReasoningDelta, TextDelta] * 2
    (outcome,) = story.outcomes
    assert isinstance(outcome, Finish)
    assert (outcome.result.reasoning, outcome.result.text, outcome.result.attempts) == ("I add.", "0.1.", 1)


def test_waiting_is_told_to_the_reader() -> None:
    story = Story()
    story.do(ATTACHED)
    story.do(accepted(position=3))
    story.do(Arrived(Message(Header(Kind.PHASE, ID), codec.pack(Phase("loading", 2, 1.5, "layer 3")))))
    assert [d.event for d in story.delivered] == [Waiting("queued", 3), Waiting("loading", 2, 1.5, "layer 3")]


def test_submit_is_repeated_until_anything_comes_and_says_what_time_is_left() -> None:
    story = Story(timeout=10.0)
    story.do(ATTACHED)
    assert story.wait(2 * RESEND) == [Kind.SUBMIT, Kind.SUBMIT]
    left = [codec.unpack(Submit, m.route).timeout for m in story.sent]
    assert left == [10.0, 9.0, 8.0]
    story.do(accepted())
    assert story.wait(5) == []


def test_collecting_delivers_nothing_but_the_result() -> None:
    story = begun(collect=True)
    credited = [c for i in range(0, 64, 4) for c in credits_of(story.do(tok(i, 4)))]
    story.do(end(64))
    assert story.delivered == []
    assert isinstance(story.outcomes[0], Finish)
    assert [limit for limit, _ in credited] == [24, 32, 40, 48, 56, 64, 72, 80]


# --- order, loss, repetition ------------------------------------------------------------------------------------------


def test_repeated_chunks_are_dropped() -> None:
    story = begun()
    for event in (tok(0, 2), tok(0, 2), tok(2), tok(0, 2), tok(2)):
        story.do(event)
    assert story.text == "0.1.2."


def test_a_gap_asks_for_the_missing_part_once() -> None:
    story = begun()
    story.do(tok(0))
    assert credits_of(story.do(tok(2))) == [(16, 1)]
    assert story.do(tok(3)) == []  # the same gap, just asked for
    story.now += 1
    assert credits_of(story.do(tok(4))) == [(16, 1)]  # apparently that was lost too
    for i in (1, 2, 3, 4):
        story.do(tok(i))
    assert story.text == "0.1.2.3.4."


def test_a_terminal_that_overtook_its_tokens_counts_when_they_are_here() -> None:
    story = begun()
    story.do(tok(0))
    assert credits_of(story.do(end(3))) == [(16, 1)]
    assert story.outcomes == []
    story.do(tok(1))
    assert story.kinds(tok(2)) == [Kind.ENDACK]
    assert isinstance(story.outcomes[0], Finish)
    assert story.text == "0.1.2."


def test_tokens_that_never_come_after_a_terminal_are_an_error_in_the_end() -> None:
    story = begun(timeout=1000.0)
    story.do(tok(0))
    story.do(end(3))
    story.wait(KEPT + 1)
    assert isinstance(story.error, errors.ConnectionLostError)
    assert "2 tokens at the end of the output were lost" in str(story.error)


def test_a_chunk_across_the_position_is_a_protocol_error() -> None:
    story = begun()
    story.do(tok(0, 2))
    assert story.kinds(tok(1, 2)) == [Kind.CANCEL]
    assert isinstance(story.error, errors.ProtocolError)
    assert story.error.partial_text == "0.1."


def test_a_chunk_that_is_nested_without_end_is_a_protocol_error() -> None:
    story = begun()
    body = b"\x81\xa4text" + b"\x91" * 1000 + b"\xc0"
    story.do(Arrived(Message(Header(Kind.TOK, ID, 0, 1, 1), body=body, tokens=pack_tokens([7]))))
    assert isinstance(story.error, errors.ProtocolError)


def test_a_terminal_below_the_position_is_a_protocol_error() -> None:
    story = begun()
    story.do(tok(0, 2))
    story.do(end(1))
    assert isinstance(story.error, errors.ProtocolError)


def test_a_count_that_differs_from_the_tokens_is_a_protocol_error() -> None:
    story = begun()
    lying = Message(Header(Kind.TOK, ID, 0, 3), body=codec.pack(Tok("x")), tokens=pack_tokens([1]))
    story.do(Arrived(lying))
    assert isinstance(story.error, errors.ProtocolError)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_the_link_does_the_output_is_whole_and_in_order(seed: int) -> None:
    """A small honest broker behind a link that loses, repeats and reorders; the end must come and be right."""
    dice = random.Random(seed)
    story, total = Story(collect=bool(seed % 2)), dice.randrange(1, 60)
    link: list[RequestEvent] = []
    sent = credit = 0
    over = False
    story.do(ATTACHED)
    for _ in range(4000):
        for message in story.sent:
            if message.kind is Kind.SUBMIT:
                credit = max(credit, 16)
            elif message.kind is Kind.CREDIT:
                if message.header.seq <= credit:
                    sent = message.header.arg
                credit = max(credit, message.header.seq)
            elif message.kind is Kind.ENDACK:
                over = True
        story.sent.clear()
        if sent < min(credit, total):
            link.append(tok(sent))
            sent += 1
        elif sent == total and dice.random() < 0.1:
            link.append(end(total))
        if dice.random() < 0.05:
            link.append(Ponged())
        if link:
            at = dice.randrange(min(3, len(link)))
            event = link[at] if dice.random() < 0.1 else link.pop(at)
            if dice.random() < 0.8:
                story.do(event)
        reports = [d.report for d in story.delivered if d.report]
        if reports and dice.random() < 0.5:
            story.do(Consumed(ID, reports[-1]))
        story.wait(0.01)
        if over:
            break
    (outcome,) = story.outcomes
    assert isinstance(outcome, Finish)
    assert outcome.result.token_ids == tuple(range(total))
    assert outcome.result.text == "".join(f"{i}." for i in range(total))
    if not story.exchange.request.collect:
        assert story.text == outcome.result.text


# --- credit -----------------------------------------------------------------------------------------------------------


def test_credit_follows_the_reader_by_half_windows() -> None:
    story = begun()
    for i in range(0, 16, 4):
        assert story.do(tok(i, 4)) == []  # the reader said nothing
    assert [d.report for d in story.delivered] == [0, 8, 0, 16]
    assert credits_of(story.do(Consumed(ID, 8))) == [(24, 16)]
    assert credits_of(story.do(Consumed(ID, 16))) == [(32, 16)]
    assert story.do(Consumed(ID, 8)) == []  # nothing new


def test_a_pong_repeats_the_credit_of_a_quiet_stream_only() -> None:
    story = begun()
    story.do(tok(0))
    assert story.do(Ponged()) == []
    assert credits_of(story.do(Ponged())) == [(16, 1)]
    story.do(tok(1))
    assert story.do(Ponged()) == []


def test_credit_names_no_more_tokens_than_a_header_has_room_for() -> None:
    story = Story(collect=True)
    wide = Attached(window=2**40, max_body=1000, fresh=True)
    assert story.kinds(wide) == [Kind.SUBMIT]
    story.do(tok(0, 3))
    [attach] = story.do(wide)
    assert (attach.header.seq, attach.header.arg) == (3, 2**32 - 1)
    story.do(accepted())
    [credit] = story.do(Attached(window=2**40, max_body=1000, fresh=False))
    assert (credit.header.seq, credit.header.arg) == (2**32 - 1, 3)
    assert wire.from_bytes(wire.to_bytes(credit)) == credit


def test_a_window_of_one_token_still_flows() -> None:
    story = Story(collect=True)
    story.do(Attached(1, 1000, fresh=True))
    story.do(accepted())
    assert credits_of(story.do(tok(0))) == [(2, 1)]
    assert credits_of(story.do(tok(1))) == [(3, 2)]


# --- the ends ---------------------------------------------------------------------------------------------------------


def test_a_failure_carries_everything() -> None:
    story = begun()
    story.do(tok(0, 2))
    story.do(failure(Kind.ERROR, 2, "worker_lost", retryable=True, worker="w7"))
    error = story.error
    assert isinstance(error, errors.WorkerLostError)
    assert (error.partial_text, error.request_id, error.model, error.worker, error.retryable) == (
        "0.1.",
        ID.hex(),
        "m",
        "w7",
        True,
    )


def test_an_expired_request_is_a_deadline_error() -> None:
    story = begun()
    story.do(failure(Kind.EXPIRED, 0, "deadline"))
    assert isinstance(story.error, TimeoutError)


def test_an_undecodable_end_is_an_error_and_the_broker_is_acknowledged() -> None:
    story = begun()
    broken = Arrived(Message(Header(Kind.END, ID, 0), body=b"\xc1"))
    assert story.kinds(broken) == [Kind.CANCEL]
    assert isinstance(story.error, errors.ProtocolError)
    assert story.kinds(broken) == [Kind.ENDACK]
    assert story.exchange.stage is Stage.DONE


def test_cancel_is_repeated_until_a_terminal() -> None:
    story = begun()
    story.do(tok(0))
    assert story.kinds(CancelAsked(ID)) == [Kind.CANCEL]
    assert story.wait(RESEND) == [Kind.CANCEL]
    assert story.outcomes == []
    assert story.kinds(failure(Kind.CANCELLED, 1, "cancelled")) == [Kind.ENDACK]
    assert isinstance(story.error, errors.CancelledError)
    assert story.error.partial_text == "0."


def test_an_end_that_was_faster_than_the_cancel_counts() -> None:
    story = begun()
    story.do(tok(0))
    story.do(CancelAsked(ID))
    story.do(end(1))
    assert isinstance(story.outcomes[0], Finish)


def test_a_cancelled_request_does_not_wait_for_tokens_it_was_not_sent() -> None:
    story = begun()
    story.do(tok(0))
    story.do(CancelAsked(ID))
    assert story.kinds(end(40)) == [Kind.ENDACK]
    assert isinstance(story.error, errors.CancelledError)


def test_a_cancel_that_nobody_confirms_is_told_to_the_caller_but_pursued() -> None:
    story = begun()
    story.do(CancelAsked(ID))
    story.wait(PATIENCE)
    assert isinstance(story.error, errors.CancelledError)
    assert story.exchange.stage is Stage.CLOSING
    assert Kind.CANCEL in story.wait(RESEND)
    assert story.do(tok(0)) == []
    assert story.delivered == []
    story.wait(KEPT)
    assert story.exchange.stage is Stage.DONE


def test_a_cancel_before_the_broker_knows_needs_no_message() -> None:
    story = Story()
    assert story.do(CancelAsked(ID)) == []
    assert isinstance(story.error, errors.CancelledError)
    assert story.exchange.stage is Stage.DONE


def test_the_deadline_is_kept_when_the_broker_does_not() -> None:
    story = begun(timeout=5.0)
    story.do(tok(0))
    assert story.wait(5.0 + GRACE - 0.01) == []
    assert story.wait(0.02) == [Kind.CANCEL]
    assert isinstance(story.error, errors.DeadlineExceededError)
    assert "deadline of 5 s passed; 1 tokens" in str(story.error)
    assert story.kinds(failure(Kind.ERROR, 9, "deadline")) == [Kind.ENDACK]
    assert len(story.outcomes) == 1


def test_the_deadline_needs_no_grace_without_a_broker() -> None:
    story = Story(timeout=5.0)
    story.wait(5.0)
    assert "no broker had taken it yet" in str(story.error)
    assert story.exchange.stage is Stage.DONE
    story = begun(timeout=5.0)
    story.do(Detached())
    assert story.wait(5.0) == []
    assert "0 tokens had arrived" in str(story.error)


def test_a_stream_is_idle_before_its_reader_has_said_a_word() -> None:
    story = begun(idle_timeout=2.0)
    story.do(tok(0))
    assert story.wait(2) == [Kind.CANCEL]
    assert "idle_timeout" in str(story.error)


def test_an_idle_stream_ends_but_a_slow_reader_is_no_idle_stream() -> None:
    story = begun(idle_timeout=2.0)
    story.wait(10)  # the first token may take its time
    story.do(tok(0))
    story.wait(1.5)
    story.do(tok(1, 15))
    story.wait(10)  # the window is full: it is the reader who is slow
    assert story.outcomes == []
    story.do(Consumed(ID, 16))
    story.wait(4)
    assert isinstance(story.error, errors.DeadlineExceededError)
    assert "idle_timeout" in str(story.error)


UNDECODABLE = Arrived(Message(Header(Kind.PHASE, ID), b"\xc1"))


@pytest.mark.parametrize(
    "later",
    [
        Refused(errors.CancelledError("closed")),
        UNDECODABLE,
        tok(1),
        end(1),
        failure(Kind.ERROR, 9, "internal"),
        CancelAsked(ID),
        Arrived(Message(Header(Kind.WHO, ID))),
        ATTACHED,
        Detached(),
        Ponged(),
        Consumed(ID, 1),
    ],
)
@pytest.mark.parametrize("first", [UNDECODABLE, CancelAsked(ID), TimePassed()])
def test_a_caller_has_one_outcome_whatever_follows_it(first: RequestEvent, later: RequestEvent) -> None:
    story = begun(timeout=100.0)
    story.do(tok(0))
    story.now = 100.0 + GRACE - PATIENCE
    story.do(first)
    story.wait(PATIENCE)
    assert len(story.outcomes) == len(story.delivered) == 1
    story.do(later)
    assert len(story.outcomes) == len(story.delivered) == 1
    story.wait(KEPT)
    assert len(story.outcomes) == 1


# --- the broker comes and goes ----------------------------------------------------------------------------------------


def test_nothing_is_said_while_there_is_no_connection() -> None:
    story = Story()
    story.do(ATTACHED)
    story.do(Detached())
    assert story.wait(10) == []
    [attach] = story.do(ATTACHED)
    assert attach.header == Header(Kind.ATTACH, ID, seq=0, arg=16)
    story.do(tok(0, 16))
    story.do(Detached())
    for event in (Consumed(ID, 16), tok(18), CancelAsked(ID)):
        assert story.do(event) == []
    assert story.wait(KEPT) == []
    assert isinstance(story.error, errors.CancelledError)
    assert story.kinds(ATTACHED) == [Kind.CANCEL]


def test_a_new_broker_is_told_which_weights_the_tokens_came_from() -> None:
    story = begun()
    story.do(tok(0, fingerprint="f"))
    story.do(tok(1))
    story.do(Detached())
    [attach] = story.do(ATTACHED)
    assert codec.unpack(Submit, attach.route).fingerprint == "f"


def test_a_new_broker_is_given_the_request_again_until_it_answers() -> None:
    story = begun()
    story.do(Detached())
    assert story.wait(10) == []
    [attach] = story.do(ATTACHED)
    assert attach.header == Header(Kind.ATTACH, ID, seq=0, arg=16)
    assert codec.unpack(Submit, attach.route).timeout == 90
    assert attach.body == b"body"
    assert story.wait(RESEND) == [Kind.ATTACH]
    story.do(accepted())
    assert story.wait(RESEND) == []
    story.do(tok(0))
    story.do(end(1))
    assert isinstance(story.outcomes[0], Finish)


def test_with_everything_that_others_need_to_go_on() -> None:
    story = begun()
    story.do(tok(0, 3))
    story.do(Arrived(Message(Header(Kind.TOK, ID, 3, 1, 4), body=codec.pack(Tok("3.")), tokens=pack_tokens([3]))))
    story.do(Detached())
    [attach] = story.do(ATTACHED)
    assert (attach.header.seq, attach.header.attempt) == (4, 4)
    assert attach.tokens == pack_tokens([0, 1, 2, 3])
    story.do(tok(4))
    story.do(end(5, attempt=5))
    assert story.text == "0.1.2.3.4."
    assert isinstance(story.outcomes[0], Finish)


def test_a_terminal_of_the_old_broker_that_overtook_its_tokens_is_forgotten() -> None:
    story = begun()
    story.do(tok(0))
    story.do(end(3))
    story.do(Detached())
    assert story.kinds(ATTACHED) == [Kind.ATTACH]
    assert story.wait(KEPT + 1).count(Kind.ATTACH) > 1
    assert story.outcomes == []


def test_a_broker_that_gave_the_request_up_gets_it_again() -> None:
    story = begun()
    story.do(tok(0))
    [attach] = story.do(Arrived(Message(Header(Kind.WHO, ID))))
    assert attach.header == Header(Kind.ATTACH, ID, seq=1, arg=16, attempt=1)


def test_a_new_broker_is_told_of_what_is_to_be_cancelled() -> None:
    story = begun()
    story.do(tok(0))
    story.do(CancelAsked(ID))
    assert story.do(Arrived(Message(Header(Kind.WHO, ID)))) == []
    story.do(Detached())
    assert story.kinds(ATTACHED) == [Kind.CANCEL]
    story.do(failure(Kind.CANCELLED, 0, "cancelled"))
    assert isinstance(story.error, errors.CancelledError)
    assert story.exchange.stage is Stage.DONE


def test_the_same_epoch_carries_on() -> None:
    story = begun()
    story.do(tok(0))
    story.do(Detached())
    assert credits_of(story.do(Attached(16, 1000, fresh=False))) == [(16, 1)]
    story.do(end(1))
    assert isinstance(story.outcomes[0], Finish)


def test_the_same_epoch_hears_a_cancel_again() -> None:
    story = begun()
    story.do(CancelAsked(ID))
    story.do(Detached())
    assert story.kinds(Attached(16, 1000, fresh=False)) == [Kind.CANCEL]


def test_a_body_larger_than_the_broker_takes_is_refused_here() -> None:
    story = Story()
    assert story.do(Attached(16, 3, fresh=True)) == []
    assert isinstance(story.error, errors.PayloadTooLargeError)


def test_a_refused_request_fails_with_the_reason() -> None:
    story = Story()
    story.do(Refused(errors.AuthError("who are you")))
    assert isinstance(story.error, errors.AuthError)
    assert story.exchange.stage is Stage.DONE


def test_a_refusal_that_crossed_a_repeated_submit_is_followed_by_a_cancel() -> None:
    """The broker remembers no refusal: it may have let the second one in."""
    story = Story()
    story.do(ATTACHED)
    assert story.wait(RESEND) == [Kind.SUBMIT]
    assert story.kinds(failure(Kind.ERROR, 0, "overloaded")) == [Kind.ENDACK, Kind.CANCEL]
    assert isinstance(story.error, errors.OverloadedError)


def test_a_refusal_of_the_only_submit_is_acknowledged_and_no_more() -> None:
    story = Story()
    story.do(ATTACHED)
    assert story.kinds(failure(Kind.ERROR, 0, "overloaded")) == [Kind.ENDACK]
