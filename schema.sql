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
--     messages    what was sent to a workflow, in order, and whether it was received
--     events      what a workflow says of itself under a key: the last value counts
--     streams     what a workflow says of itself under a key: every value, in order
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
    claim               bigint      not null,   -- begins anywhere, grows with each run that takes the row
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

-- For _expire: what runs out of time next.
create index if not exists workflows_deadline on durable.workflows (deadline_at)
    where deadline_at is not null and status in ('DELAYED', 'ENQUEUED', 'PENDING');

-- For _list and _collect: by age.
create index if not exists workflows_created on durable.workflows (created_at);

-- For _family: the children of a workflow.
create index if not exists workflows_children on durable.workflows (parent_workflow_id)
    where parent_workflow_id is not null;

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

-- One row per message.  A received one stays, so that its idempotency key is not taken a second time.
-- Like the steps, messages, events and streams are written under a lock on their workflow's row.
create table if not exists durable.messages (
    number              bigint      primary key generated always as identity,   -- order of arrival
    workflow_id         text        not null,   -- to whom
    topic               text        not null,
    message             text        not null,
    idempotency_key     text,
    sent_at             timestamptz not null default now(),
    received_at         timestamptz
);

-- For _receive: the oldest that waits.
create index if not exists messages_waiting on durable.messages (workflow_id, topic, number)
    where received_at is null;

create unique index if not exists messages_idempotency on durable.messages (workflow_id, idempotency_key);

-- One row per value and the position at which it was set, so that a fork finds the values as of then.
create table if not exists durable.events (
    workflow_id         text        not null,
    key                 text        not null,
    position            integer     not null,
    value               text        not null,
    primary key (workflow_id, key, position)
);

create table if not exists durable.streams (
    workflow_id         text        not null,
    key                 text        not null,
    "offset"            integer     not null,   -- 0, 1, 2...
    value               text,                   -- null: the stream is closed
    position            integer     not null,
    primary key (workflow_id, key, "offset")
);

insert into durable.version (number) select 1 where not exists (select from durable.version);
