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
--     version     one row per edition of this file that the database was brought to
--
-- durable.py applies this file at launch, in one transaction under an advisory lock.  Every statement
-- may therefore run again at any time and never destroys data.  It has the storeys of durable.py, and can be cut
-- where that can.  A table is told once and whole; its columns are grouped by who needs them.

-- ==== I. The engine =================================================================================
--
-- Who runs workflows, the workflows, and their steps.

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
    stopped_at          timestamptz,            -- set by destroy(); a crash leaves it empty
    lost_at             timestamptz,            -- when another executor first saw its lock free

    -- what it would take, for durable.why; kept up to date within a second
    known               jsonb       not null default '[]',  -- functions, each with its class and instance
    queues              jsonb       not null default '[]',  -- each with its limits
    deactivated         boolean     not null default false, -- it recovers, but takes nothing new
    failover            boolean     not null default false, -- it also recovers executors of other names
    interrupted         jsonb       not null default '[]',  -- IDs of workflows that Ctrl-C or sys.exit() ended
    misfits             jsonb       not null default '{}'   -- IDs of those that it did not adopt, each with its reason
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

-- For _left_behind and its like, and for a queue's count of what runs.  A PENDING row always has an incarnation; that it is
-- said here keeps the planner from using this index to find a row by its ID while the index is small.
create index if not exists workflows_running on durable.workflows (queue, incarnation)
    where status = 'PENDING' and incarnation is not null;

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
    tries               integer     not null default 1,     -- more where the step has retries
    primary key (workflow_id, position)
);

-- What tables made by edition 1 lack.
alter table durable.executors
    add column if not exists lost_at timestamptz,
    add column if not exists known jsonb not null default '[]',
    add column if not exists queues jsonb not null default '[]',
    add column if not exists deactivated boolean not null default false,
    add column if not exists failover boolean not null default false,
    add column if not exists interrupted jsonb not null default '[]',
    add column if not exists misfits jsonb not null default '{}';
alter table durable.steps add column if not exists tries integer not null default 1;

-- Which edition this file is, by the storeys of it: 57 has the first, 60 all four.
insert into durable.version (number) select 57 where not exists (select from durable.version where number >= 57);

-- ==== II. Self-hosting ==============================================================================
--
-- Who lives.

update durable.version set number = 58 where number = 57;

-- Which executors live?  Those whose lock somebody holds.
create or replace view durable.living as
select incarnation, executor_id, application, application_version, known, queues, deactivated, failover, launched_at,
       misfits
  from durable.executors
 where incarnation in (select objid::integer from pg_locks
                        where locktype = 'advisory' and classid = 730624 and objsubid = 2 and granted
                          and database = (select oid from pg_database where datname = current_database()));

-- ==== III. Rooms ====================================================================================
--
-- What each room needs.

update durable.version set number = 59 where number = 58;

-- --- Cancel and timeouts ----------------------------------------------------------------------------

-- For _expire: what runs out of time next.
create index if not exists workflows_deadline on durable.workflows (deadline_at)
    where deadline_at is not null and status in ('DELAYED', 'ENQUEUED', 'PENDING');

-- For _children_of: the children of a workflow.
create index if not exists workflows_children on durable.workflows (parent_workflow_id)
    where parent_workflow_id is not null;

-- --- Queues -----------------------------------------------------------------------------------------

-- For _dequeue: what is due, in order, without walking past what is finished or not yet due.
create index if not exists workflows_due on durable.workflows (queue, priority, number)
    where status = 'ENQUEUED';

-- For _release_delayed.
create index if not exists workflows_delayed on durable.workflows (delayed_until)
    where status = 'DELAYED';

-- For a queue's rate limit.
create index if not exists workflows_rate on durable.workflows (queue, dequeued_at)
    where dequeued_at is not null;

-- A deduplication ID is held until its workflow ends, and is free again then.
create unique index if not exists workflows_deduplication on durable.workflows (queue, deduplication_id)
    where deduplication_id is not null and status in ('DELAYED', 'ENQUEUED', 'PENDING');

-- Enqueues a workflow, from psql, a trigger or any language, and returns its ID: in the transaction of whoever
-- calls it, so that it commits or rolls back with everything else there, and wakes workers when it commits.
--
--     select durable.enqueue('fulfil', 'orders', '["order-17", 2]', '{"gift": true}');
--
-- The arguments are JSON, and come to the function as Python reads it.  The rest means what it does in
-- EnqueueOptions of durable.py: without `app_version`, executors of any version may run it; an ID that is there
-- is returned as it is, if it is that of the same function; a deduplication ID that an unfinished workflow of the
-- queue has is a unique_violation.
create or replace function durable.enqueue(
    workflow_name    text,
    queue_name       text,
    args             jsonb            default '[]',
    kwargs           jsonb            default '{}',
    workflow_id      text             default null,
    app_version      text             default null,
    deduplication_id text             default null,
    priority         integer          default null,
    delay_seconds    double precision default null,
    workflow_timeout double precision default null,
    class_name       text             default null,
    instance_name    text             default null
) returns text language plpgsql as $$
#variable_conflict use_variable
declare
    new_id  text := coalesce(workflow_id, gen_random_uuid()::text);
    there   durable.workflows;
    holder  text;
    problem text := case
        when coalesce(jsonb_typeof(args), 'null') <> 'array' then 'args must be a JSON array'
        when coalesce(jsonb_typeof(kwargs), 'null') <> 'object' then 'kwargs must be a JSON object'
        when coalesce(btrim(workflow_name), '') = '' then 'workflow_name must not be empty'
        when coalesce(btrim(queue_name), '') = '' then 'queue_name must not be empty'
        when btrim(new_id) = '' or btrim(deduplication_id) = '' then 'an ID must not be empty'
        when greatest(octet_length(workflow_name), octet_length(queue_name), octet_length(new_id),
                      octet_length(deduplication_id)) > 1000 then 'a name or an ID is longer than 1000 bytes'
        when priority < 0 then 'priority must be from 0 (first)'
        when not delay_seconds between 0 and 1e9 then 'delay_seconds must be a number of seconds from 0'
        when not (workflow_timeout > 0 and workflow_timeout <= 1e9) then 'workflow_timeout must be above 0 seconds'
        end;
begin
    if problem is not null then
        raise exception 'durable.enqueue: %', problem using errcode = 'invalid_parameter_value';
    end if;
    app_version := nullif(app_version, '');  -- or nobody would ever take it
    class_name := nullif(class_name, '');
    instance_name := nullif(instance_name, '');
    loop
        insert into durable.workflows
               (id, name, class_name, config_name, inputs, status, claim, application_version, queue, priority,
                deduplication_id, delayed_until, timeout_s)
        values (new_id, workflow_name, class_name, instance_name,
                jsonb_build_object('args', args, 'kwargs', kwargs)::text,
                case when delay_seconds is null then 'ENQUEUED' else 'DELAYED' end,
                (random() * 281474976710655)::bigint + 1, app_version, queue_name, coalesce(priority, 0),
                deduplication_id, clock_timestamp() + make_interval(secs => delay_seconds), workflow_timeout)
            on conflict do nothing;
        if found then
            perform pg_notify('durable', '0 ' || json_build_array('q', queue_name));
            return new_id;
        end if;
        select * into there from durable.workflows as w where w.id = new_id;
        if found and (there.name, there.class_name, there.config_name)
                     is distinct from (workflow_name, class_name, instance_name) then
            raise exception 'workflow ID % belongs to a workflow of %, not of %: use another ID',
                            new_id, there.name, workflow_name using errcode = 'unique_violation';
        elsif found then
            return new_id;
        end if;
        select w.id into holder from durable.workflows as w
         where w.queue = queue_name and w.deduplication_id = enqueue.deduplication_id
           and w.status in ('DELAYED', 'ENQUEUED', 'PENDING');
        if found then
            raise exception 'workflow % was not enqueued on %: unfinished workflow % has the deduplication ID %',
                            new_id, queue_name, holder, deduplication_id using errcode = 'unique_violation';
        end if;
    end loop;
end $$;

-- --- Messages ---------------------------------------------------------------------------------------

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

-- For _RECEIVE: the oldest that waits.
create index if not exists messages_waiting on durable.messages (workflow_id, topic, number)
    where received_at is null;

-- For _SEND and _post: an idempotency key that a workflow has had is not taken again.
create unique index if not exists messages_idempotency on durable.messages (workflow_id, idempotency_key);

-- --- Events -----------------------------------------------------------------------------------------

-- One row per value and the position at which it was set, so that a fork finds the values as of then.
create table if not exists durable.events (
    workflow_id         text        not null,
    key                 text        not null,
    position            integer     not null,
    value               text        not null,
    primary key (workflow_id, key, position)
);

-- --- Streams ----------------------------------------------------------------------------------------

-- Every value, in order.
create table if not exists durable.streams (
    workflow_id         text        not null,
    key                 text        not null,
    "offset"            integer     not null,   -- 0, 1, 2...
    value               text,                   -- null: the stream is closed
    position            integer     not null,
    token               bigint      not null,   -- the same at each try of a write
    primary key (workflow_id, key, "offset"),
    unique (workflow_id, token)
);

-- ==== IV. Operators =================================================================================
--
-- What management looks for, and the operator's questions.  However many workflows have ended, its views are as quick.

update durable.version set number = 60 where number = 59;

-- For durable.unfinished.
create index if not exists workflows_dead on durable.workflows (id)
    where status = 'MAX_RECOVERY_ATTEMPTS_EXCEEDED';

-- What has not come to an end?  Each arm is the condition of an index.
create or replace view durable.unfinished as
select id, number, status, name, class_name, config_name, queue, priority, application_version,
       executor_id, incarnation, recovery_attempts, created_at, updated_at, delayed_until, deadline_at
  from durable.workflows
 where status = 'DELAYED' or status = 'ENQUEUED' or (status = 'PENDING' and incarnation is not null)
    or status = 'MAX_RECOVERY_ATTEMPTS_EXCEEDED';

-- --- Management -------------------------------------------------------------------------------------

-- For _list, _begun_until and _count: by age.
create index if not exists workflows_created on durable.workflows (created_at);

-- For _list: by name, by age.
create index if not exists workflows_named on durable.workflows (name, created_at);

-- For _ended_before and _last_ended: in the order in which they came to their ends.
create index if not exists workflows_ended on durable.workflows (coalesce(completed_at, updated_at))
    where status not in ('DELAYED', 'ENQUEUED', 'PENDING');

-- For _list: what did not succeed; what did, which is most of it, pays nothing for that.
create index if not exists workflows_failed on durable.workflows (status, created_at)
    where status in ('ERROR', 'CANCELLED');

-- For _list: by the beginning of an ID, in whatever collation the database has.
create index if not exists workflows_prefix on durable.workflows (id text_pattern_ops);

-- --- Offer ------------------------------------------------------------------------------------------

-- Why is it not moving?  What is the same for all workflows of a kind (who could take them, how full their
-- queue is) is found once per kind, so that the view stays quick with many of them.
create or replace view durable.why as
with unfinished as materialized (
    select *, row_number() over (partition by status, queue, application_version order by priority, number) - 1 as ahead
      from durable.unfinished),
living as materialized (select * from durable.living),
misfits as materialized (
    select key as id, min(format('%s does not go on with it: %s', application_version, value)) as says
      from living, jsonb_each_text(misfits) group by key),
kinds as materialized (
    select jsonb_build_array(application_version, executor_id, queue, name, class_name, config_name) as kind, able.*
      from (select distinct application_version, executor_id, queue, name, class_name, config_name from unfinished) as u
     cross join lateral (
        select count(*) as of_version, count(*) filter (where knows) as knowing,
               count(*) filter (where knows and not deactivated) as willing,
               count(*) filter (where knows and not deactivated and serves) as serving,
               string_agg(distinct l.executor_id, ', ') filter (where knows) as able,
               bool_or(knows and l.executor_id = u.executor_id) as namesake,
               min(l.executor_id) filter (where knows and failover) as successor
          from (select *, known @> jsonb_build_array(jsonb_build_object('name', u.name, 'class_name',
                              u.class_name, 'config_name', u.config_name)) as knows,
                       queues @> jsonb_build_array(jsonb_build_object('name', u.queue)) as serves
                  from living) as l
         where l.application_version = u.application_version or u.application_version is null) as able),
queues as materialized (
    select *, (select count(*) from unfinished as u where u.queue = q.queue and u.status = 'PENDING') as running,
           case when "limit" is not null then
               (select count(*) from durable.workflows as w
                 where w.queue = q.queue and w.dequeued_at > now() - make_interval(secs => period)) end as started
      from (select name as queue, min(concurrency) as concurrency, min("workerConcurrency") as each,
                   min(("rateLimit" ->> 'limit')::bigint) as "limit", min(("rateLimit" ->> 'period')::float8) as period
              from living, jsonb_to_recordset(living.queues)
                   as q(name text, concurrency integer, "workerConcurrency" integer, "rateLimit" jsonb)
             group by name) as q)
select u.id as workflow_id, u.status, u.name, u.queue, u.application_version, u.executor_id,
       case when u.status = 'DELAYED' then u.created_at else u.updated_at end as since,
       case
       when u.status = 'MAX_RECOVERY_ATTEMPTS_EXCEEDED' then format(
           'was begun %s times without coming to an end: find out what takes its process down, then resume it',
           u.recovery_attempts)
       when u.status = 'DELAYED' and u.delayed_until > now() then format('delayed until %s', u.delayed_until::timestamptz(0))
       when u.status = 'PENDING' and a.incarnation is not null and e.interrupted ? u.id then
           format('was interrupted on %s: it goes on when that is launched again', u.executor_id)
       when u.status = 'PENDING' and a.incarnation is not null then
           format('runs on %s since %s; ', u.executor_id, u.updated_at::timestamptz(0))
           || case when s.position is null then 'no step is on record yet'
                   when s.name = 'DBOS.sleep' and s.output ~ '^\d+(\.\d+)?$' and to_timestamp(s.output::float8) > now()
                   then format('waits, until %s at the latest', to_timestamp(s.output::float8)::timestamptz(0))
                   else format('last step: %s %s, at %s', s.position, s.name, s.completed_at::timestamptz(0)) end
           || coalesce('; it started workflow ' || c.id || ', which is ' || c.status, '')
           || coalesce('; will be cancelled at ' || u.deadline_at::timestamptz(0), '')
       when u.status = 'PENDING' then
           format('its executor %s (incarnation %s) ', u.executor_id, u.incarnation)
           || coalesce('stopped at ' || e.stopped_at::timestamptz(0), 'died before ' || e.lost_at::timestamptz(0),
                       'is gone') || ': '
           || case when of_version = 0 then
                       format('launch %s again, with version %s', u.executor_id, u.application_version)
                   when knowing = 0 then format('no live executor of version %s knows %s: launch %s again',
                                                u.application_version, u.name, u.executor_id)
                   when namesake then format('%s lives again, and takes it up within seconds', u.executor_id)
                   when successor is not null then format('%s takes it over within seconds', successor)
                   else format('launch %s again, or POST ["%1$s"] to /dbos-workflow-recovery of %s',
                               u.executor_id, able) end
       when of_version = 0 then coalesce('no live executor has its version, ' || u.application_version || ': launch one',
                                         'no executor lives: launch one')
       when knowing = 0 then format('no live executor of its version knows %s',
                                    concat_ws('/', u.name, u.class_name, u.config_name))
       when willing = 0 then format('the live executors that know %s are deactivated: launch one', u.name)
       when serving = 0 then format('no live executor that knows %s serves queue %s: declare it there', u.name, u.queue)
       when u.status = 'DELAYED' then format('its delay is over since %s; enters queue %s within a second',
                                             u.delayed_until::timestamptz(0), u.queue)
       else case when u.ahead = 0 then 'is next' else 'waits behind ' || u.ahead end || ' in queue ' || u.queue || ': '
           || case when running >= concurrency then format('%s of %s places are taken (concurrency)', running, concurrency)
                   when started >= "limit" then format('%s of %s starts in %s s are used up', started, "limit", period)
                   when running >= each * serving then
                       format('%s of %s places are taken (worker_concurrency)', running, each * serving)
                   else 'no limit holds it, so executors take it as soon as they have a thread free' end
       end || coalesce('; version ' || m.says, '') as why
  from unfinished as u
  join kinds as k on k.kind = jsonb_build_array(u.application_version, u.executor_id, u.queue, u.name, u.class_name,
                                                u.config_name)
  left join queues as q on q.queue = u.queue
  left join living as a on a.incarnation = u.incarnation
  left join durable.executors as e on e.incarnation = u.incarnation
  left join lateral (select * from durable.steps where u.status = 'PENDING' and workflow_id = u.id
                      order by position desc limit 1) as s on true
  left join durable.workflows as c on c.id = s.child_workflow_id and c.completed_at is null
  left join misfits as m on m.id = u.id and of_version = 0
 order by since;

-- --- Deploys ----------------------------------------------------------------------------------------

-- Which versions have executors or work, and which have work that nobody will do?  `changed` are the functions of
-- a version that have other code, or none, in the one that its application was launched with last.
create or replace view durable.versions as
select application_version, coalesce(delayed, 0) as delayed, coalesce(enqueued, 0) as enqueued,
       coalesce(pending, 0) as pending, coalesce(executors, 0) as executors,
       (select max(launched_at) from durable.executors as e where e.application_version = v.application_version)
           as launched_at,
       coalesce(delayed + enqueued + pending, 0) > 0 and coalesce(executors, 0) = 0
           and (application_version is not null or not exists (select from durable.living)) as stranded,
       (select array_agg(its.key order by its.key)
          from (select application, workflows from durable.executors as e
                 where e.application_version = v.application_version order by incarnation desc limit 1) as latest
         cross join jsonb_each_text(latest.workflows) as its
         where its.value is distinct from (select e.workflows ->> its.key from durable.executors as e
                                            where e.application = latest.application
                                            order by incarnation desc limit 1)) as changed
  from ((select application_version, count(*) filter (where status = 'DELAYED') as delayed,
                count(*) filter (where status = 'ENQUEUED') as enqueued,
                count(*) filter (where status = 'PENDING') as pending
           from durable.unfinished where status <> 'MAX_RECOVERY_ATTEMPTS_EXCEEDED'
          group by application_version) as work
        full join (select application_version, count(*) as executors
                     from durable.living group by application_version) as life using (application_version)) as v
 order by stranded desc, launched_at desc;
