-- The tables behind durable.py.
--
-- The life of one workflow.  Somebody calls or enqueues a function: a row appears in `workflows`,
-- PENDING if the caller's own process runs it at once, ENQUEUED if any executor may.  An executor that
-- takes the row raises its `claim`; from then on only writes made under that number count.  Each step
-- that finishes adds a row to `steps`.  When the function returns or raises, the workflow's row becomes
-- SUCCESS or ERROR.  If the process dies first, another run raises the claim again, reads the steps,
-- and goes on after the last of them.
--
--     workflows   one row per workflow: who it is, how far it is, what came out
--     steps       one row per finished step: what every replay of it returns
--     executors   one row per launch of a process: the incarnations behind a name
--     version     one row: which edition of this file the database has
--
-- durable.py applies this file at launch, in one transaction under an advisory lock.  Every statement
-- may therefore run again at any time and never destroys data.

create schema if not exists durable;

create table if not exists durable.version (
    number     integer     not null,
    applied_at timestamptz not null default now()
);

-- One row per launch.  While that process lives, one of its sessions holds the advisory lock
-- (730624, incarnation); a lock that is free is how the others learn that it died.
create table if not exists durable.executors (
    incarnation         integer     primary key generated always as identity,
    executor_id         text        not null,   -- a name, which outlives the process: 'local', 'web-1'
    application         text        not null,
    application_version text        not null,
    workflows           jsonb       not null,   -- function name -> hash of its source
    hostname            text        not null,
    pid                 integer     not null,
    launched_at         timestamptz not null default now(),
    stopped_at          timestamptz             -- set by destroy(); a crash leaves it empty
);

create table if not exists durable.workflows (
    -- identity: what to run
    id                  text        primary key,
    number              bigint      not null generated always as identity,  -- order of arrival
    name                text        not null,   -- the function's registered name
    class_name          text,                   -- for a method: its class,
    config_name         text,                   --   and which configured instance
    inputs              text        not null,   -- see "Values" in durable.py
    parent_workflow_id  text,                   -- the workflow that started this one
    forked_from         text,                   -- the workflow whose first steps this one copied
    created_at          timestamptz not null default now(),

    -- progress: who runs it
    status              text        not null check (status in (
        'DELAYED',      -- ENQUEUED, with a time before which nobody may take it
        'ENQUEUED',     -- waits in a queue for an executor
        'PENDING',      -- claimed: somebody runs it, or died running it
        'SUCCESS',      -- the function returned
        'ERROR',        -- the function raised
        'CANCELLED',    -- stopped by an operator or by its deadline
        'MAX_RECOVERY_ATTEMPTS_EXCEEDED'        -- took its process down too often; waits for an operator
    )),
    claim               bigint      not null default 0,     -- grows with each run that takes the row
    recovery_attempts   integer     not null default 0,     -- runs begun since the start or a resume
    executor_id         text,                   -- the name behind the claim,
    incarnation         integer,                --   and which launch of it
    application_version text,                   -- only executors of this version may run it; null: any
    updated_at          timestamptz not null default now(),

    -- queue: when it may run
    queue               text,
    priority            integer     not null default 0 check (priority >= 0),   -- lower goes first
    deduplication_id    text,                   -- at most one unfinished workflow of a queue has it
    delayed_until       timestamptz,
    dequeued_at         timestamptz,            -- what a queue's rate limit counts

    -- time: when it must be done
    timeout_s           double precision,       -- how long it may run once it has started
    deadline_at         timestamptz,

    -- outcome
    output              text,
    error               text,
    completed_at        timestamptz,

    check ((status in ('SUCCESS', 'ERROR', 'CANCELLED')) = (completed_at is not null)),
    check (status <> 'PENDING' or (claim > 0 and incarnation is not null)),
    check (status not in ('ENQUEUED', 'DELAYED') or queue is not null)
);

-- For _dequeue: what is due, in order, without walking past what is finished or not yet due.
create index if not exists workflows_due on durable.workflows (queue, priority, number)
    where status = 'ENQUEUED';

-- For _release_delayed.
create index if not exists workflows_delayed on durable.workflows (delayed_until)
    where status = 'DELAYED';

-- For _sweep, and for a queue's count of what runs.  A PENDING row always has an incarnation; that it is
-- said here keeps the planner from using this index to find a row by its ID while the index is small.
create index if not exists workflows_running on durable.workflows (queue, incarnation)
    where status = 'PENDING' and incarnation is not null;

-- For a queue's rate limit.
create index if not exists workflows_rate on durable.workflows (queue, dequeued_at)
    where dequeued_at is not null;

-- A deduplication ID is held until its workflow ends, and is free again then.
create unique index if not exists workflows_deduplication on durable.workflows (queue, deduplication_id)
    where deduplication_id is not null and status in ('DELAYED', 'ENQUEUED', 'PENDING');

-- One row per finished step.  There is no foreign key, and none is needed: a step is written under a
-- share lock on its workflow's row (_RECORD), so it cannot slip past the deletion of that row, and
-- the check that a key would add costs a tenth of the speed of steps.
create table if not exists durable.steps (
    workflow_id         text        not null,
    position            integer     not null check (position > 0),  -- 1, 2, 3...: the order of the calls
    name                text        not null,   -- compared at replay: a different name is a changed order
    output              text,
    error               text,
    child_workflow_id   text,                   -- for the start of a child, or the wait for its result
    started_at          timestamptz not null,
    completed_at        timestamptz not null,
    primary key (workflow_id, position)
);

insert into durable.version (number) select 1 where not exists (select from durable.version);
