"""What both clients are: options, an endpoint, and what callers say turned into requests and questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, Unpack

from loopmux import wire
from loopmux.bound import Bound
from loopmux.codec import FieldError, build, pack, show
from loopmux.driver import ForCaller
from loopmux.endpoints import default_endpoint, ipc_path
from loopmux.errors import BadRequestError
from loopmux.events import Answer, Asked, Fail, Request
from loopmux.keys import Credentials, credentials
from loopmux.messages import DEFAULT_TIMEOUT, AdapterOrder, Done, Evict, SessionHint, Status
from loopmux.options import Defaults, Options, check_plain, merge, prepare, seconds
from loopmux.wire import Kind

if TYPE_CHECKING:
    from typing import Self

Messages = Sequence[Mapping[str, Any]]
"""A conversation: role/content maps as chat templates take them."""

_ADAPTER_PATIENCE = 300.0
"""Seconds for the answer about an adapter: workers and launchers get 120 each from the broker."""

_Order = TypeVar("_Order", SessionHint, AdapterOrder, Evict)


class _Channel(Protocol):
    def __init__(self, endpoint: str, connect_timeout: float, credentials: Credentials | None) -> None: ...


C = TypeVar("C", bound=_Channel)


class BaseClient(Bound, Generic[C]):
    """An endpoint, the options of every call, and the way to the broker, which copies share."""

    _instead = "make one in each process; here with_options() makes one that shares its connection"
    _channel_class: type[C]

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        connect_timeout: float = 5.0,
        key: str | Path | None = None,
        server_key: str | None = None,
        **options: Unpack[Defaults],
    ) -> None:
        self.endpoint = endpoint or default_endpoint()
        ipc_path(self.endpoint)
        self._options = merge(options, {"timeout": timeout})
        patience = seconds("connect_timeout", connect_timeout, forever=True)
        self._channel = self._channel_class(self.endpoint, patience, credentials(self.endpoint, key, server_key))
        self._owner = True

    def with_options(self, **options: Unpack[Options]) -> Self:
        """A client with other defaults that shares this one's connection."""
        copy = object.__new__(type(self))
        copy.endpoint = self.endpoint
        copy._options = merge(self._options, options)
        copy._channel = self._channel
        copy._owner = False
        return copy

    def _request(self, options: Mapping[str, Any], prompt: str | None, now: float, *, collect: bool) -> Request:
        """A request of this client.

        Raises:
            BadRequestError, PayloadTooLargeError: it cannot be asked.
        """
        ready = prepare(merge(self._options, options, {"prompt": prompt}))
        return Request(wire.new_id(), ready.submit, ready.body, now + ready.submit.timeout, ready.idle_timeout, collect)

    def _loop_settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a tool loop is told: what was given, and those of the client's defaults that loops have rules for."""
        defaults = self._options
        return {name: defaults[name] for name in ("session", "tool_choice") if name in defaults} | dict(given)


def hint_of(session: str, state: str, expected: float | None) -> SessionHint:
    """A checked SESSION hint.

    Raises:
        BadRequestError: a field is of the wrong type or too long, or the state unknown.
    """
    return _checked(SessionHint, session=session, state=state, expected=expected)


def load_order(model: str, name: str, folder: str | Path, give_up_at: float) -> Asked:
    """LOAD, as a question; a relative folder is one of this process's.

    Raises:
        BadRequestError: a field is of the wrong type or too long.
    """
    try:
        path = str(Path(folder).expanduser().absolute())
    except (TypeError, RuntimeError) as error:
        raise BadRequestError(f"folder: found {show(folder)}, expected a path: {error}") from error
    order = _checked(AdapterOrder, model=model, name=name, folder=path)
    return Asked(wire.new_id(), give_up_at, Kind.LOAD, pack(order), _ADAPTER_PATIENCE)


def unload_order(model: str, name: str, give_up_at: float) -> Asked:
    """UNLOAD, as a question.

    Raises:
        BadRequestError: a field is of the wrong type or too long.
    """
    order = _checked(AdapterOrder, model=model, name=name)
    return Asked(wire.new_id(), give_up_at, Kind.UNLOAD, pack(order), _ADAPTER_PATIENCE)


def evict_order(worker: str, within: float, give_up_at: float) -> Asked:
    """EVICT, as a question.

    Raises:
        BadRequestError: a field is of the wrong type or too long, or ``within`` out of range.
    """
    order = _checked(Evict, worker=worker, within=within)
    order.check()
    return Asked(wire.new_id(), give_up_at, Kind.EVICT, pack(order))


def _checked(kind: type[_Order], **fields: object) -> _Order:
    """What a caller wants of the broker, refused here where the broker would count it as malformed.

    Raises:
        BadRequestError: naming the field, what was found and what was expected.
    """
    try:
        order = build(kind, fields)
    except FieldError as error:
        raise BadRequestError(str(error)) from error
    for name, value in fields.items():
        check_plain(value, name, 0)
    if (size := len(pack(order))) > wire.SUBMIT_ROUTE_LIMIT:
        texts = {name: len(value) for name, value in fields.items() if isinstance(value, str)}
        longest = max(texts, key=texts.__getitem__)
        raise BadRequestError(
            f"{longest}: found a text of {texts[longest]} characters, expected a shorter one: "
            f"{', '.join(fields)} take {size} bytes, at most {wire.SUBMIT_ROUTE_LIMIT} fit"
        )
    return order


def outcome_of(answer: Status | Done) -> Done:
    """What came of LOAD or UNLOAD.

    Raises:
        LoopmuxError: it was not done.
    """
    assert isinstance(answer, Done), "LOAD and UNLOAD are answered with DONE"
    if answer.failure is not None:
        raise answer.failure.error()
    return answer


def status_of(answer: Status | Done) -> Status:
    """What STATUS and EVICT are answered with."""
    assert isinstance(answer, Status), "STATUS and EVICT are answered with REPORT"
    return answer


def answer_of(came: ForCaller) -> Status | Done:
    """What came for a question.

    Raises:
        LoopmuxError: it was refused, or nobody answered.
    """
    match came:
        case Answer(_, answer):
            return answer
        case Fail(_, error):
            raise error
        case other:
            raise AssertionError(f"a question was answered with {other}")
