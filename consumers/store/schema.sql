-- The store: the log, and for each consumer a position in it plus the few messages it has out.
-- Run by migration 0002. Only the package consumers.store writes these tables.

-- The log ------------------------------------------------------------------------------------------------------

create sequence messages_id;

create table messages (
    source           uuid        not null,
    id               bigint      not null default nextval('messages_id'),
    relation         integer     not null,
    table_oid        bigint      not null,
    action           "char"      not null,  -- I U D T R: insert update delete truncate read
    key              text        not null,  -- JSON array of the primary key's values as text; [] without one
    old_key          text,                  -- the key before, when an update changed it
    xid              bigint      not null,  -- 64 bits, widened by capture
    commit_lsn       bigint      not null,
    commit_idx       bigint      not null,
    committed_at     timestamptz not null,
    epoch            integer     not null,
    record           text        not null,  -- JSON, not jsonb: jsonb halves the ingest rate and refuses \u0000
    changes          text,
    unchanged        text,                  -- JSON array of the columns Postgres did not send
    old_values_known boolean     not null,
    annotations      text,
    consumer         uuid,                  -- null: for all; set: a backfilled or republished message for one
    backfill         uuid,                  -- the backfill that read this row
    replay           uuid,                  -- the republish that made this copy
    primary key (source, id)                -- read by every claim
) partition by range (id);
-- Read by a backfill that begins, looking for changes its snapshot does not see.
create index messages_xid on messages using brin (xid) with (autosummarize = on);

-- What a partition holds and since when; the table's own bounds are not readable in SQL.
create table log_partition (
    name       text primary key,
    from_id    bigint not null,
    to_id      bigint not null,  -- exclusive
    created_at timestamptz not null default now(),
    closed_at  timestamptz,      -- when the sequence was first seen beyond it
    measured   boolean not null default false  -- log_extent has its rows
);

-- Messages whose partition is gone although a lease or a parked row still names them.
create table kept_messages (like messages including defaults);
alter table kept_messages alter column id drop default;
alter table kept_messages add primary key (source, id);

-- Below this id the log is gone: a rewind there is refused.
create table log_floor (single boolean primary key default true check (single), id bigint not null default 0);
insert into log_floor default values;

create table relation_version (
    id               integer generated always as identity primary key,
    source           uuid    not null,
    epoch            integer not null,
    oid              bigint  not null,
    schema_name      text    not null,
    table_name       text    not null,
    columns          jsonb   not null,  -- [{"name", "type_oid", "typmod", "type_name"}, …]
    primary_key      text[]  not null,  -- from the catalog: pgoutput flags every column under REPLICA IDENTITY FULL
    replica_identity text    not null,
    digest           text    not null,
    seen_at          timestamptz not null default now(),
    unique (source, epoch, oid, digest)  -- read when capture registers a shape, and by claims (source)
);

-- The id of this shape of a table; the same shape has the same id. `p_seen`: capture saw it. One after another for a source, so
-- that whoever has seen an id has seen all smaller ones too: a larger one is a shape not heard of yet.
create function sequin_register_relation(
    p_source uuid, p_epoch integer, p_oid bigint, p_schema text, p_table text, p_columns jsonb, p_key text[], p_identity text,
    p_digest text, p_seen boolean) returns integer language plpgsql as $$
declare
    v_id integer;
begin
    for i in 1..2 loop
        select r.id into v_id from relation_version r
         where r.source = p_source and r.epoch = p_epoch and r.oid = p_oid and r.digest = p_digest;
        exit when v_id is not null or i = 2;
        perform pg_advisory_xact_lock(hashtextextended('relations of ' || p_source, 0));
    end loop;
    if v_id is null then
        insert into relation_version (source, epoch, oid, schema_name, table_name, columns, primary_key, replica_identity, digest, seen_at)
        values (p_source, p_epoch, p_oid, p_schema, p_table, p_columns, p_key, p_identity, p_digest,
                case when p_seen then clock_timestamp() else '-infinity' end)
        returning id into v_id;
    elsif p_seen then
        update relation_version r set seen_at = clock_timestamp() where r.id = v_id;
    end if;
    return v_id;
end $$;

-- The append lock: the first statement of every append updates and thereby locks and compares this row.
create table capture_progress (
    source            uuid primary key,
    epoch             integer not null,
    system_identifier text    not null,
    timeline          integer not null,
    stored_lsn        bigint  not null,
    part_lsn          bigint  not null default 0,
    part_changes      bigint  not null default 0,
    reached_lsn       bigint  not null,
    messages          bigint  not null default 0,  -- stored ever, for the metrics
    gap               text,     -- what may be missing from the log, until it is acknowledged or has been backfilled
    gap_at            timestamptz,  -- when the newest of it was noticed
    proof             text,     -- the newest transaction: {"lsn", "xid", …} (Proof); a server of the same history has it
    updated_at        timestamptz not null default now()
) with (fillfactor = 50);

create table source_status (
    source         uuid primary key,
    state          text not null,   -- active, or the name of what is wrong
    reasons        text[] not null default '{}',
    retained_bytes bigint,
    source_lsn     bigint,
    confirmed_lsn  bigint,
    since          timestamptz not null default now(),  -- when this state began
    at             timestamptz not null default now()
) with (fillfactor = 50);

-- The publication and the tables of a source when capture last looked (capture/membership.py).
create table source_tables (
    source uuid primary key,
    tables jsonb not null
);

-- How much of the log lies beyond this id, in bytes, indexes included: what a consumer at this position holds back.
create function sequin_backlog_bytes(p_position bigint) returns bigint language sql stable as $$
    select coalesce(sum(pg_total_relation_size(to_regclass(p.name))
                        * (least(p.to_id, s.last + 1) - greatest(p.from_id, p_position + 1))::numeric
                        / greatest(1, least(p.to_id, s.last + 1) - greatest(p.from_id, 1))), 0)::bigint
    from log_partition p, (select case when is_called then last_value else 0 end as last from messages_id) s
    where p.to_id > p_position + 1 and p.from_id <= s.last and s.last > p_position
$$;

-- What happened to a source that people should know: gaps, changed tables, rows rewritten without being sent.
create table source_events (
    id         bigint generated always as identity primary key,
    source     uuid not null,
    at         timestamptz not null default now(),
    kind       text not null,
    table_name text,
    text       text not null,
    backfill   boolean not null default false  -- a backfill of the table brings what was not sent
);
create index source_events_source on source_events (source, id);

-- The consumers ------------------------------------------------------------------------------------------------

-- One hot row a consumer, apart from the configuration; locked by everything that hands out or gives back messages. Under a
-- snapshot that stays open all its versions stay too: the newest is found first, and claims count them.
-- An ack of whole leases deletes them and does not touch this row: out_count and acked_count are those of the last claim, and
-- what became of leases since then is known from those that are left. The view consumer_standing says how things stand.
create table consumer_position (
    consumer     uuid    not null,
    version      bigint  not null default 0,
    source       uuid    not null,
    position     bigint  not null,  -- the log has been taken up to this id
    start_lsn    bigint  not null,  -- nothing committed before it, in start_epoch, is this consumer's
    start_epoch  integer not null,
    start_id     bigint  not null,  -- nor anything up to this id
    -- The last rewind: messages from the one to the other id that are handed out now are repeated under this name.
    replay       uuid,
    replay_from  bigint,
    replay_to    bigint,
    out_count    integer not null default 0,   -- messages in leases, and those acknowledged since the last claim
    lease_floor  bigint  not null default 0,   -- none of its leases has a smaller id
    is_full      boolean not null default false,  -- after the last claim max_ack_pending were out
    parked_count integer not null default 0,   -- messages parked, dead letters apart
    dead_count   integer not null default 0,
    acked_count  bigint  not null default 0,   -- for the metrics
    failed_count bigint  not null default 0,
    dropped_count bigint not null default 0,  -- given up because its backlog was full
    filtered_count bigint not null default 0,  -- `where` said no, or the transform returned nil
    undecided_count bigint not null default 0,  -- delivered because `where` hung on something unknown
    -- How long messages took from their commit to their ack: one number for each bound of sequin_delivery_bounds()
    -- and one beyond the last, not cumulated; and the sum of all seconds.
    took_buckets double precision[] not null default array_fill(0, array[14]),
    took_seconds double precision   not null default 0,
    taken_at     timestamptz
) with (fillfactor = 50);
create index consumer_position_newest on consumer_position (consumer, version);

-- One row a claim, except that an extend of some of its messages splits it; the token stays.
create table leases (
    id       bigint generated always as identity,
    token    uuid        not null,
    consumer uuid        not null,
    source   uuid        not null,
    until    timestamptz not null,
    ids      bigint[]    not null,  -- ascending
    grps     bigint[]    not null,
    grp2s    bigint[]    not null,
    counts   integer[]   not null,  -- how often each has been handed out, this time included
    holder   uuid,
    primary key (consumer, id)                -- read by claims, from the consumer's lease_floor on
);
create index leases_token on leases (token);  -- read by ack, nack, extend, renew

-- The consumers' positions with the counts as they are now.
create view consumer_standing as
    select p.consumer, p.source, p.position, p.start_lsn, p.start_epoch, o.out_count, p.parked_count, p.dead_count,
           p.acked_count + p.out_count - o.out_count as acked_count, p.failed_count, p.filtered_count, p.undecided_count, p.taken_at
    from consumer_position p cross join lateral (
        select coalesce(sum(cardinality(l.ids)), 0)::integer as out_count from leases l
        where l.consumer = p.consumer and l.id >= p.lease_floor) o;

-- Groups of which something was acknowledged while, at the same moment, something was parked in this consumer: the next
-- claim looks whether these may go on. (An ack waits for no claim.)
create table released (
    consumer uuid     not null,
    grps     bigint[] not null
);
create index released_consumer on released (consumer);

-- The exceptions: to be retried, blocked behind such a one, in error, or dead.
create table parked (
    id            bigint generated always as identity primary key,
    consumer      uuid     not null,
    source        uuid     not null,
    grp           bigint   not null,
    grp2          bigint,             -- an update that changed the key belongs to two groups
    first_id      bigint   not null,
    ids           bigint[] not null,  -- one; or, never handed out and blocked, a run of one group
    reason        text     not null check (reason in ('retry', 'blocked', 'error', 'dead')),
    not_before    timestamptz,        -- not to be handed out earlier
    due_at        timestamptz,        -- set on group heads that nothing holds back, null on all others
    deliver_count integer  not null default 0,
    max_batch     integer,            -- the next push may carry no more than this
    last_error    text,
    last_status   integer,
    lease_token   uuid,               -- under this token a late ack still counts
    parked_at     timestamptz not null default now()
);
create index parked_group on parked (consumer, grp, first_id) where reason <> 'dead';   -- read by claims: is the group free?
create index parked_group2 on parked (consumer, grp2, first_id) where reason <> 'dead' and grp2 is not null;
create index parked_due on parked (consumer, due_at, first_id) where due_at is not null;  -- read by claims
create index parked_dead on parked (consumer, first_id) where reason = 'dead';          -- read by the console
create index parked_token on parked (lease_token) where lease_token is not null;        -- read by late acks

-- Failures, and the last successes of each consumer, for people.
create table attempts (
    id            bigint generated always as identity primary key,
    consumer      uuid not null,
    source        uuid not null,
    message_id    bigint not null,
    at            timestamptz not null default now(),
    ok            boolean not null,
    status        integer,
    error         text,
    duration_ms   integer not null,
    response      text,
    url           text,
    deliver_count integer not null,
    headers       text              -- of the request, as JSON; secret values masked
);
create index attempts_consumer on attempts (consumer, id);
create index attempts_message on attempts (consumer, message_id);  -- read by the console: one message's history

-- For charts and rates, made out of the counts above by consumers.store.counters: what a source or a consumer (or, as the
-- nil UUID, all of them together) did in each minute.
create table minute_counters (
    subject   uuid        not null,
    minute    timestamptz not null,
    captured  bigint      not null default 0,
    delivered bigint      not null default 0,
    failed    bigint      not null default 0,
    filtered  bigint      not null default 0,
    lag_bytes bigint,     -- the worst seen in the minute
    lag_s     real,
    primary key (subject, minute)  -- read by charts
);

-- Where the counting stood last, and what is costly to find out, for pages that show hundreds at once.
create table counted (
    subject   uuid primary key,
    captured  bigint not null default 0,
    delivered bigint not null default 0,
    failed    bigint not null default 0,
    filtered  bigint not null default 0,
    waiting   bigint,     -- messages beyond the position; past 1,000 an estimate
    lag_bytes bigint,
    lag_s     real,       -- of a consumer: the age of its oldest undelivered message
    at        timestamptz not null
) with (fillfactor = 50);

-- A pump's time-limited right to serve a push consumer.
create table turns (
    consumer uuid primary key,
    holder   uuid not null,
    token    uuid not null,
    pid      integer not null,
    host     text not null,
    until    timestamptz not null
) with (fillfactor = 50);

create table heartbeats (
    process text not null,
    host    text not null,
    pid     integer not null,
    at      timestamptz not null,
    detail  text not null default '',
    primary key (process, host, pid)
) with (fillfactor = 50);

-- What was done stays as it was written.
create function sequin_refuse() returns trigger language plpgsql as $$
begin
    raise exception 'the audit log is not changed' using errcode = 'insufficient_privilege';
end $$;
create trigger audit_stays before update or delete on consumers_auditentry for each row execute function sequin_refuse();

-- Groups -------------------------------------------------------------------------------------------------------

-- A document that can be looked into: NULs and halves of surrogate pairs, which json allows and ->> does not, taken out.
-- The backslashes that are meant as such are put aside meanwhile, as a character that no JSON text holds.
create function sequin_readable(p_doc text) returns text language sql immutable
return replace(regexp_replace(replace(replace(p_doc, '\\', chr(1)), '\u0000', ''),
                              '\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}',
                              '\\ufffd', 'g'), chr(1), '\\');

-- The group of a message under a consumer's group_columns; with p_before, its group before the update.
-- A 64-bit hash: two groups that collide are delivered one after the other, which is slower but never wrong.
create function sequin_group(p_record text, p_changes text, p_columns text[], p_table_oid bigint, p_before boolean)
returns bigint language sql immutable return (
    select hashtextextended(jsonb_agg(case when p_before and c.doc::json -> col is not null then c.doc::json ->> col
                                           else r.doc::json ->> col end order by n)::text, p_table_oid)
    from unnest(p_columns) with ordinality as u(col, n),
         (select case when strpos(p_record, '\u') > 0 then sequin_readable(p_record) else p_record end as doc) r,
         (select case when strpos(p_changes, '\u') > 0 then sequin_readable(p_changes) else p_changes end as doc) c
);

-- All groups that the consumer has out.
create function sequin_groups_out(p_consumer uuid) returns setof bigint language sql stable as $$
    select g from leases l, unnest(l.grps || l.grp2s) g
    where l.consumer = p_consumer and g is not null
      and l.id >= (select p.lease_floor from consumer_position p where p.consumer = p_consumer order by p.version desc limit 1)
$$;

-- Wait for acks that are under way of leases that hold any of these groups, and keep others from beginning until this
-- transaction ends: what it finds out is out, so that whoever acknowledges it sees what was parked behind it.
create function sequin_hold_groups(p_consumer uuid, p_groups bigint[]) returns void language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set plan_cache_mode = force_generic_plan as $$
begin
    perform from leases x where x.consumer = p_consumer and x.id in (
        select l.id from leases l, unnest(l.grps || l.grp2s) g
        where l.consumer = p_consumer and g in (select unnest(p_groups))
          and l.id >= (select p.lease_floor from consumer_position p where p.consumer = p_consumer order by p.version desc limit 1))
    order by x.id for share;
end $$;

-- Parked -------------------------------------------------------------------------------------------------------

-- The first message that is parked in a group, dead letters apart; null when there is none. Found by one probe of each index:
-- the order leaves the planner no other way, also where its statistics are those of an empty table.
create function sequin_first_parked(p_consumer uuid, p_grp bigint) returns bigint language sql stable as $$
    select least((select q.first_id from parked q where q.consumer = p_consumer and q.grp = p_grp and q.reason <> 'dead'
                  order by q.first_id limit 1),
                 (select q.first_id from parked q where q.consumer = p_consumer and q.grp2 = p_grp and q.grp2 is not null
                  and q.reason <> 'dead' order by q.first_id limit 1))
$$;

-- Make due the head of each of these groups, where nothing holds it back any more. Returns how many became due.
create function sequin_promote(p_consumer uuid, p_groups bigint[]) returns integer language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set plan_cache_mode = force_generic_plan as $$
declare
    v_out   bigint[];
    v_now   timestamptz := clock_timestamp();
    v_count integer;
begin
    perform sequin_hold_groups(p_consumer, p_groups);
    v_out := array(select sequin_groups_out(p_consumer));
    with heads as (
        select distinct h.id, h.first_id, h.grp, h.grp2, h.not_before
        -- by hashing: there may be very many of both
        from (select unnest(p_groups) as grp except select unnest(v_out)) g,
        lateral (
            select * from (
                (select p.* from parked p where p.consumer = p_consumer and p.grp = g.grp and p.reason <> 'dead'
                 order by p.first_id limit 1)
                union all
                (select p.* from parked p where p.consumer = p_consumer and p.grp2 = g.grp and p.grp2 is not null
                 and p.reason <> 'dead' order by p.first_id limit 1)
            ) candidates order by first_id limit 1
        ) h
        where h.due_at is null
    )
    update parked p set due_at = greatest(v_now, p.not_before)  -- one moment for all: they come back in log order
    from heads h
    where p.id = h.id
      -- an update with two groups waits until it leads both, and neither is out
      and (h.grp2 is null or (
          not (h.grp = any (v_out)) and not (h.grp2 = any (v_out))
          and sequin_first_parked(p_consumer, h.grp) >= h.first_id and sequin_first_parked(p_consumer, h.grp2) >= h.first_id));
    get diagnostics v_count = row_count;
    return v_count;
end $$;

-- Park messages never handed out behind their groups, as runs of at most 200.
create function sequin_park_behind(p_consumer uuid, p_source uuid, p_ids bigint[], p_grps bigint[])
returns void language plpgsql set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off
set plan_cache_mode = force_generic_plan as $$
begin
    with fresh as (
        select u.grp, array_agg(u.id order by u.id) as ids from unnest(p_ids, p_grps) u(id, grp) group by u.grp
    ), tail as (
        select f.grp, f.ids, t.id as tail_id
        from fresh f left join lateral (
            select p.* from parked p where p.consumer = p_consumer and p.grp = f.grp and p.reason <> 'dead'
            order by p.first_id desc limit 1
        ) t on t.reason = 'blocked' and t.deliver_count = 0 and t.grp2 is null
            and cardinality(t.ids) + cardinality(f.ids) <= 200
            and (select q.first_id from parked q where q.consumer = p_consumer and q.grp2 = f.grp and q.grp2 is not null
                 and q.reason <> 'dead' and q.first_id > t.first_id order by q.first_id limit 1) is null
    ), grown as (
        update parked p set ids = p.ids || t.ids from tail t where p.id = t.tail_id
    )
    insert into parked (consumer, source, grp, first_id, ids, reason)
    select p_consumer, p_source, t.grp, t.ids[s], t.ids[s:s + 199], 'blocked'
    from tail t, generate_series(1, cardinality(t.ids), 200) s
    where t.tail_id is null;
end $$;

-- The moment p_delay_ms from now; null for none, infinity for -1: until something is changed.
create function sequin_after(p_delay_ms bigint) returns timestamptz language sql volatile as $$
    select case when p_delay_ms > 0 then clock_timestamp() + p_delay_ms * interval '1 ms' when p_delay_ms = -1 then 'infinity' end
$$;

-- Give messages of one token back: those in p_ids because they failed, and with them the later ones of their groups.
-- A message past p_max_deliver becomes a dead letter, which blocks nothing. The caller holds the position's row,
-- and afterwards promotes `groups` and adds the counts to it.
create function sequin_give_back(
    p_consumer uuid, p_source uuid, p_token uuid, p_max_deliver integer, p_late_ack_counts boolean,
    p_followers_were_sent boolean, p_ids bigint[], p_delays bigint[], p_reasons text[], p_errors text[],
    p_statuses integer[], p_max_batches integer[],
    out done integer, out freed integer, out parked integer, out dead integer, out groups bigint[])
language plpgsql set enable_seqscan = off set plan_cache_mode = force_generic_plan as $$
declare
    v_at      integer;
    v_dead    boolean;
    v_removed bigint[] := '{}';
    v_held    bigint[] := '{}';
    m         record;
begin
    done := 0; freed := 0; parked := 0; dead := 0; groups := '{}';
    perform from leases l where l.token = p_token and l.consumer = p_consumer order by l.id for update;
    for m in
        select u.* from leases l, unnest(l.ids, l.grps, l.grp2s, l.counts) u(id, grp, grp2, count)
        where l.token = p_token and l.consumer = p_consumer order by u.id
    loop
        v_at := array_position(p_ids, m.id);
        if v_at is not null then
            done := done + 1;
            v_dead := m.count >= p_max_deliver;
            insert into parked (consumer, source, grp, grp2, first_id, ids, reason, not_before, deliver_count, max_batch,
                                last_error, last_status, lease_token)
            values (p_consumer, p_source, m.grp, m.grp2, m.id, array[m.id],
                    case when v_dead then 'dead' else coalesce(p_reasons[v_at], 'retry') end,
                    case when not coalesce(v_dead, false) then sequin_after(p_delays[v_at]) end,
                    m.count, p_max_batches[v_at], p_errors[v_at], p_statuses[v_at],
                    case when p_late_ack_counts then p_token end);
            if v_dead then
                dead := dead + 1;
            else
                parked := parked + 1;
            end if;
            if v_dead is not true or not p_followers_were_sent then
                v_held := v_held || m.grp || coalesce(array[m.grp2], '{}');
            end if;
        elsif m.grp = any (v_held) or m.grp2 = any (v_held) then
            insert into parked (consumer, source, grp, grp2, first_id, ids, reason, deliver_count, lease_token)
            values (p_consumer, p_source, m.grp, m.grp2, m.id, array[m.id], 'blocked',
                    m.count - case when p_followers_were_sent then 0 else 1 end,
                    -- what nobody was given nobody can acknowledge; it may become part of a run
                    case when p_followers_were_sent then p_token end);
            parked := parked + 1;
            v_held := v_held || m.grp || coalesce(array[m.grp2], '{}');
        else
            continue;
        end if;
        freed := freed + 1;
        v_removed := v_removed || m.id;
        groups := groups || m.grp || coalesce(array[m.grp2], '{}');
    end loop;
    groups := array_remove(groups, null);
    if freed > 0 then
        perform sequin_shrink_leases(p_consumer, p_token, v_removed);
    end if;
end $$;

-- Take messages out of the leases of a token; a lease that holds none any more is deleted.
create function sequin_shrink_leases(p_consumer uuid, p_token uuid, p_removed bigint[]) returns void language plpgsql
set enable_seqscan = off set plan_cache_mode = force_generic_plan as $$
begin
    with rest as (
        select l.id, array_agg(u.id order by u.id) filter (where x.id is null) as ids,
               array_agg(u.grp order by u.id) filter (where x.id is null) as grps,
               array_agg(u.grp2 order by u.id) filter (where x.id is null) as grp2s,
               array_agg(u.count order by u.id) filter (where x.id is null) as counts
        from leases l, unnest(l.ids, l.grps, l.grp2s, l.counts) u(id, grp, grp2, count)
        left join unnest(p_removed) x(id) on x.id = u.id
        where l.token = p_token and l.consumer = p_consumer
        group by l.id
    ), gone as (
        delete from leases l using rest r where l.consumer = p_consumer and l.id = r.id and r.ids is null
    )
    update leases l set ids = r.ids, grps = r.grps, grp2s = r.grp2s, counts = r.counts
    from rest r where l.consumer = p_consumer and l.id = r.id and r.ids is not null and r.ids <> l.ids;
end $$;

-- Park what expired leases held; the tokens stay valid until the messages are handed out again.
create function sequin_expire(p_consumer uuid, p_source uuid, p_floor bigint, p_max_deliver integer,
                              out freed integer, out parked integer, out dead integer)
language plpgsql set enable_seqscan = off set plan_cache_mode = force_generic_plan as $$
declare
    l      record;
    g      record;
    v_grps bigint[] := '{}';
begin
    freed := 0; parked := 0; dead := 0;
    for l in
        select x.token, x.ids from leases x where x.consumer = p_consumer and x.id >= p_floor and x.until <= clock_timestamp()
        order by x.id limit 200 for update
    loop
        select * into g from sequin_give_back(
            p_consumer, p_source, l.token, p_max_deliver, true, true, l.ids, '{}', '{}',
            array_fill('not acknowledged in time'::text, array[cardinality(l.ids)]), '{}', '{}');
        freed := freed + g.freed; parked := parked + g.parked; dead := dead + g.dead;
        v_grps := v_grps || g.groups;
    end loop;
    if freed > 0 then
        perform sequin_promote(p_consumer, v_grps);
    end if;
end $$;

-- The claim ----------------------------------------------------------------------------------------------------

-- How many of these ids a position passed on its way.
create function sequin_passed(p_ids bigint[], p_before bigint, p_after bigint) returns bigint language sql immutable as $$
    select case when p_ids = '{}' or p_before = p_after then 0
                else (select count(*) from unnest(p_ids) id where id > p_before and id <= p_after) end
$$;

-- Of a parked group only the newest message stays, in the place of its head, as if never handed out. Returns how many went
-- away; null when nothing waits behind the head, or when a message of two groups is among them.
create function sequin_keep_newest(p_consumer uuid, p_grp bigint, p_head bigint) returns bigint language plpgsql
set enable_seqscan = off set plan_cache_mode = force_generic_plan as $$
declare
    v_rows   bigint[];
    v_newest bigint;
    v_count  bigint;
begin
    if exists (select from parked q where q.consumer = p_consumer and q.reason <> 'dead' and q.grp2 is not null
               and (q.grp = p_grp or q.grp2 = p_grp)) then
        return null;
    end if;
    select array_agg(q.id), max(q.ids[cardinality(q.ids)]), sum(cardinality(q.ids)) into v_rows, v_newest, v_count
      from (select p.id, p.ids from parked p where p.consumer = p_consumer and p.grp = p_grp and p.reason <> 'dead'
            order by p.first_id limit 1000) q;
    if v_count < 2 then
        return null;
    end if;
    delete from parked p where p.id = any (v_rows) and p.id <> p_head;
    update parked p set ids = array[v_newest], first_id = v_newest, reason = 'blocked', deliver_count = 0, not_before = null,
           lease_token = null, last_error = null, last_status = null, max_batch = null
     where p.id = p_head;
    return v_count - 1;
end $$;

-- The shapes that tables of these names have had. To be asked in the statement that reads the messages, and so of the same moment: one
-- that was asked before does not know the shape of what has arrived meanwhile, which would count as nothing of the consumer's.
create function sequin_relations(p_source uuid, p_tables text[]) returns setof integer language sql stable as $$
    select r.id from relation_version r where r.source = p_source
       and (r.schema_name || '.' || r.table_name = any (p_tables) or r.schema_name || '.*' = any (p_tables))
$$;

-- Hand out up to p_limit messages under a new lease: due heads of parked groups first, then the log from the position
-- on. One row a message in log order; or one row without a message. `at_end`: nothing more can be had now (not looked for
-- when one was asked for and came); an empty answer without it means that p_scan rows were looked at in vain and the caller
-- asks again. No more than p_max_bytes of rows, except that one message always fits.
--
-- This is the quick way, of a consumer that has neither a `where` nor groups of its own and nothing parked, when none of what
-- comes next is held up by what is out; all else goes the other. What it costs is mostly how many statements it begins,
-- and how many columns each of them has.
create function sequin_claim(p_consumer uuid, p_limit integer, p_lease_ms bigint, p_holder uuid, p_scan integer, p_max_bytes bigint)
returns table (
    token uuid, at_end boolean, next_due_ms bigint, reached bigint, needs_verdicts boolean, fresh boolean, version timestamptz, source uuid, id bigint, deliver_count integer, grp bigint, grp2 bigint,
    max_batch integer, relation integer, action "char", record text, changes text, key text, commit_lsn bigint,
    commit_idx bigint, committed_at text, epoch integer, unchanged text, old_values_known boolean, annotations text,
    backfill uuid, replay uuid)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    v_set         text;
    v_lock        bigint := hashtextextended(p_consumer::text, 0);
    v_version     bigint;
    v_position    bigint;
    v_start_lsn   bigint;
    v_start_epoch integer;
    v_replay      uuid;
    v_replay_from bigint;
    v_replay_to   bigint;
    v_was_out     integer;     -- after the last claim
    v_out         integer := 0;
    v_was_full    boolean;
    v_max_out     integer;
    v_floor       bigint;
    v_oldest      bigint;      -- of the leases
    v_until       timestamptz; -- when the first of them ends
    v_grps        bigint[] := '{}';  -- what is out
    v_tables      text[];
    v_relations   integer[];
    v_shape       integer;     -- the newest of which it is known whose it is
    v_words       text[];
    v_actions     "char"[];
    v_room        integer;
    v_hit         boolean;
    v_by_table    boolean;
    v_tied        boolean := false;
    v_lease       bigint;
begin
    -- A lost lease is a redelivery, so the claim need not wait for the disk. Receivers wait for each other here and not for the
    -- row: a row's lock is handed on in two waits. So does whoever edits the consumer and needs claims to go by it: what is read
    -- of the configuration beside the row is of the moment before the row was waited for.
    v_set := set_config('synchronous_commit', 'off', true);
    if not pg_try_advisory_xact_lock(v_lock) then  -- an expression costs less than a statement
        perform pg_advisory_xact_lock(v_lock);
    end if;
    select p.version, p.position, p.source, p.start_lsn, p.start_epoch, p.replay, p.replay_from, p.replay_to, p.out_count, p.lease_floor,
           p.is_full, c.max_ack_pending, c.tables, c.actions, c.updated_at
      into v_version, v_position, source, v_start_lsn, v_start_epoch, v_replay, v_replay_from, v_replay_to, v_was_out, v_floor,
           v_was_full, v_max_out, v_tables, v_words, version
      from consumer_position p join consumers_consumer c on c.id = p.consumer
     where p.consumer = p_consumer and p.parked_count = 0 and c.status = 'active' and c."where" = '' and c.stream <> 'rows'
       and c.group_columns = '{}' and c.max_per_group is null
     order by p.version desc limit 1 for update of p;
    if found then
        if v_was_out > 0 and not v_was_full and v_was_out + p_limit >= v_max_out then
            -- It may become full: who acknowledges from now on has to see that, and to say so.
            perform from leases l where l.consumer = p_consumer and l.id >= v_floor order by l.id for share;
        end if;
        if p_limit = 1 then
            -- One at a time, as many clients take them.
            select m.id, hashtextextended(m.key, m.table_oid), m.relation, m.action, m.record, m.changes, m.key, m.commit_lsn, m.commit_idx,
                   to_char(m.committed_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), m.epoch, m.unchanged, m.old_values_known,
                   m.annotations, m.backfill,
                   coalesce(m.replay, case when m.id > v_replay_from and m.id <= v_replay_to then v_replay end),
                   m.consumer is not distinct from p_consumer
                   or (m.consumer is null and (m.epoch <> v_start_epoch or m.commit_lsn >= v_start_lsn)
                       and case m.action when 'I' then 'insert' when 'U' then 'update' when 'D' then 'delete' else 'truncate' end = any (v_words)),
                   m.consumer is null and v_tables <> '{}', m.old_key is not null
              into id, grp, relation, action, record, changes, key, commit_lsn, commit_idx, committed_at, epoch, unchanged, old_values_known,
                   annotations, backfill, replay, v_hit, v_by_table, v_tied
              from messages m where m.source = sequin_claim.source and m.id > v_position order by m.id limit 1;
            if v_hit and v_by_table then
                perform from relation_version r where r.id = sequin_claim.relation
                    and (r.schema_name || '.' || r.table_name = any (v_tables) or r.schema_name || '.*' = any (v_tables));
                v_hit := found;
            end if;
        end if;
        if v_was_out > 0 then
            select min(l.id), min(l.until), coalesce(sum(cardinality(l.ids)), 0),
                   v_tied or coalesce(bool_or(sequin_claim.grp = any (l.grps) or sequin_claim.grp = any (l.grp2s)), false)
              into v_oldest, v_until, v_out, v_tied
              from leases l where l.consumer = p_consumer and l.id >= v_floor;
        end if;
        if v_out < v_max_out and v_until > clock_timestamp() is not false then
            if p_limit = 1 then
                if v_hit and not v_tied then
                    token := gen_random_uuid();
                    insert into leases (token, consumer, source, until, ids, grps, grp2s, counts, holder)
                    values (sequin_claim.token, p_consumer, sequin_claim.source, clock_timestamp() + p_lease_ms * interval '1 ms',
                            array[sequin_claim.id], array[sequin_claim.grp], '{null}', '{1}', p_holder)
                    returning leases.id into v_lease;
                    update consumer_position p
                       set version = v_version + 1, position = sequin_claim.id, out_count = v_out + 1, acked_count = p.acked_count + v_was_out - v_out,
                           lease_floor = coalesce(v_oldest, v_lease), is_full = v_out + 1 >= v_max_out, taken_at = clock_timestamp()
                     where p.consumer = p_consumer and p.version = v_version;
                    at_end := false;
                    reached := id;
                    deliver_count := 1;
                    return next;
                    return;
                end if;
            else
                v_room := least(p_limit, v_max_out - v_out);
                if v_out > 0 then
                    v_grps := array(select g from leases l, unnest(l.grps || l.grp2s) g
                                    where l.consumer = p_consumer and l.id >= v_floor and g is not null);
                end if;
                if v_tables <> '{}' then
                    select array_agg(r.id) filter (where r.schema_name || '.' || r.table_name = any (v_tables) or r.schema_name || '.*' = any (v_tables)),
                           coalesce(max(r.id), 0)
                      into v_relations, v_shape from relation_version r where r.source = sequin_claim.source;
                end if;
                v_actions := array_remove(array[case when 'insert' = any (v_words) then 'I' end, case when 'update' = any (v_words) then 'U' end,
                                                case when 'delete' = any (v_words) then 'D' end,
                                                case when 'truncate' = any (v_words) then 'T' end], null);
                return query
                    with x as materialized (
                        select m.id, m.relation, m.action, m.record, m.changes, m.key, m.commit_lsn, m.commit_idx, m.committed_at, m.epoch,
                               m.unchanged, m.old_values_known, m.annotations, m.backfill, m.replay,
                               hashtextextended(m.key, m.table_oid) as grp, hashtextextended(m.old_key, m.table_oid) as grp2,
                               m.consumer is not distinct from p_consumer
                               or (m.consumer is null and m.action = any (v_actions) and (v_tables = '{}' or m.relation = any (v_relations))
                                   and (m.epoch <> v_start_epoch or m.commit_lsn >= v_start_lsn)) as hit
                        from messages m where m.source = sequin_claim.source and m.id > v_position order by m.id limit v_room + 1  -- is there more?
                    ), a as materialized (
                        select (array_agg(x.id) filter (where x.hit))[:v_room] as ids, (array_agg(x.grp) filter (where x.hit))[:v_room] as grps,
                               count(*) as looked, count(*) filter (where x.hit) as hits, max(x.id) as last, max(x.relation) > v_shape as is_unheard_of,
                               bool_or(x.grp in (select unnest(v_grps)) or coalesce(x.grp2 <> x.grp, false)) filter (where x.hit) as tied,
                               sum(octet_length(x.record) + coalesce(octet_length(x.changes), 0)) filter (where x.hit) as bytes
                        from x
                    ), ready as materialized (
                        select a.ids, a.grps, cardinality(a.ids) as n, case when a.looked > v_room then a.ids[v_room] else a.last end as last,
                               a.looked <= v_room as at_end
                        from a where not a.tied and a.is_unheard_of is not true and (a.hits >= v_room or a.looked <= v_room) and (a.bytes <= p_max_bytes or a.hits = 1)
                    ), lease as (
                        insert into leases (token, consumer, source, until, ids, grps, grp2s, counts, holder)
                        select gen_random_uuid(), p_consumer, sequin_claim.source, clock_timestamp() + p_lease_ms * interval '1 ms', r.ids, r.grps,
                               array_fill(null::bigint, array[r.n]), array_fill(1, array[r.n]), p_holder
                        from ready r
                        returning leases.id, leases.token
                    ), moved as (
                        update consumer_position p
                           set version = v_version + 1, position = r.last, out_count = v_out + r.n, acked_count = p.acked_count + v_was_out - v_out,
                               lease_floor = coalesce(v_oldest, l.id), is_full = v_out + r.n >= v_max_out, taken_at = clock_timestamp()
                          from ready r, lease l where p.consumer = p_consumer and p.version = v_version
                    )
                    select case when x.id = r.ids[1] then l.token end, r.at_end, null::bigint, r.last, false, false,
                           case when x.id = r.ids[1] then sequin_claim.version end, case when x.id = r.ids[1] then sequin_claim.source end, x.id, 1, x.grp,
                           null::bigint, null::integer, x.relation, x.action, x.record, x.changes, x.key, x.commit_lsn, x.commit_idx,
                           to_char(x.committed_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), x.epoch, x.unchanged, x.old_values_known,
                           x.annotations, x.backfill,
                           coalesce(x.replay, case when x.id > v_replay_from and x.id <= v_replay_to then v_replay end)
                    from ready r, lease l, x where x.hit and x.id <= r.last;
                if found then
                    return;
                end if;
                select m.id into id from messages m where m.source = sequin_claim.source and m.id > v_position order by m.id limit 1;
            end if;
            if id is null and v_out = v_was_out then
                -- The end, and nothing has changed since the last claim.
                at_end := true;
                next_due_ms := ceil(extract(epoch from v_until - clock_timestamp()) * 1000);
                reached := v_position;
                return next;
                return;
            end if;
        end if;
    end if;
    return query select * from sequin_claim_any(p_consumer, p_limit, p_lease_ms, p_holder, p_scan, p_max_bytes);
end $$;

-- The same for whatever consumer and whatever lies in the way.
-- A consumer with a `where`, or of the latest rows only, does not read the log here: consumers.filters has judged the
-- stretch (p_from, p_through] of it, under the configuration of p_version. p_ids are what it lets through, p_errors and
-- p_delays_ms beside them what went wrong (null: nothing; a delay of -1: held until something is changed), p_passed what it
-- does not let through, p_undecided what it lets through not knowing. `needs_verdicts`: they are of another configuration.
-- `fresh`: was parked and never handed out, so the `where` of now has to be asked again. `version`: of the configuration.
create function sequin_claim_any(p_consumer uuid, p_limit integer, p_lease_ms bigint, p_holder uuid, p_scan integer,
                                 p_max_bytes bigint, p_version timestamptz default null, p_from bigint default null,
                                 p_through bigint default null, p_ids bigint[] default '{}', p_grps bigint[] default '{}',
                                 p_grp2s bigint[] default '{}', p_errors text[] default '{}', p_delays_ms bigint[] default '{}',
                                 p_passed bigint[] default '{}', p_undecided bigint[] default '{}')
returns table (
    token uuid, at_end boolean, next_due_ms bigint, reached bigint, needs_verdicts boolean, fresh boolean, version timestamptz, source uuid, id bigint, deliver_count integer, grp bigint, grp2 bigint,
    max_batch integer, relation integer, action "char", record text, changes text, key text, commit_lsn bigint,
    commit_idx bigint, committed_at text, epoch integer, unchanged text, old_values_known boolean, annotations text,
    backfill uuid, replay uuid)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
    v_pos        record;      -- the position, and what claims go by of the configuration
    v_columns    text[];
    v_max_out    integer;
    v_max_deliver integer;
    v_per_group  integer;
    v_actions    "char"[];
    v_all_tables boolean;
    v_out_count  integer := 0;
    v_settled    integer;     -- acknowledged since the last claim
    v_set        text;
    v_lock       bigint;
    v_now        timestamptz;
    v_room       integer;
    v_position   bigint;
    v_end        boolean := false;
    v_from_parked boolean := false;
    v_log_first  boolean;
    v_parked     integer := 0;  -- change of the parked count
    v_dropped    bigint[] := '{}';  -- groups of which something was dropped
    v_expired    record;
    v_head       record;
    v_row        record;
    v_ids        bigint[] := '{}';
    v_grps       bigint[] := '{}';
    v_grp2s      bigint[] := '{}';
    v_counts     integer[] := '{}';
    v_batches    integer[] := '{}';
    v_take       bigint[];
    v_in_group   integer;
    v_out        bigint[] := '{}';
    v_window     integer;
    v_scanned    integer := 0;
    w_ids        bigint[];
    w_grps       bigint[];
    w_grp2s      bigint[];
    w_last       bigint;
    w_stop       bigint;
    w_count      integer;
    w_two        boolean;
    w_free       boolean;
    b_ids        bigint[];   -- blocked: parked behind their groups
    b_grps       bigint[];
    t_ids        bigint[];
    t_grps       bigint[];
    t_grp2s      bigint[];
    t_stop       bigint;
    v_token      uuid;
    v_lease      bigint;
    v_floor      bigint;       -- the oldest lease
    v_until      timestamptz;  -- when the first of them ends
    v_fit        integer;
    v_beyond     bigint[];
    v_latest     boolean;      -- of each row its latest state only
    v_fresh      boolean[] := '{}';
    v_newest     bigint;
    w_errors     text[];
    w_delays     bigint[];
    i            integer;
begin
    -- As sequin_claim, which may hold the lock already.
    v_set := set_config('synchronous_commit', 'off', true);
    v_lock := hashtextextended(p_consumer::text, 0);
    if not pg_try_advisory_xact_lock(v_lock) then  -- an expression costs less than a statement
        perform pg_advisory_xact_lock(v_lock);
    end if;
    select p.consumer, p.version, p.source, p.position, p.start_lsn, p.start_epoch, p.replay, p.replay_from, p.replay_to, p.out_count,
           p.lease_floor, p.is_full, p.parked_count, p.dead_count, p.failed_count,
           c.status, c.tables, c.group_columns, c.max_ack_pending, c.max_deliver, c.max_per_group, c.max_parked,
           array_remove(array[case when 'insert' = any (c.actions) then 'I' end, case when 'update' = any (c.actions) then 'U' end,
                              case when c.stream = 'changes' and 'delete' = any (c.actions) then 'D' end,
                              case when c.stream = 'changes' and 'truncate' = any (c.actions) then 'T' end], null)::"char"[] as actions,
           c.updated_at as configured_at, c."where" <> '' or c.stream = 'rows' as is_judged, c.stream = 'rows' as is_latest
      into v_pos
      from consumer_position p left join consumers_consumer c on c.id = p.consumer
     where p.consumer = p_consumer order by p.version desc limit 1 for update of p;
    reached := v_pos.position;
    version := v_pos.configured_at;
    needs_verdicts := case when v_pos.is_judged then v_pos.configured_at end is distinct from p_version and v_pos.status = 'active';
    if v_pos.status is distinct from 'active' or needs_verdicts then
        at_end := true;
        return next;
        return;
    end if;
    v_now := clock_timestamp();
    v_max_out := v_pos.max_ack_pending;
    v_actions := v_pos.actions;
    v_columns := nullif(v_pos.group_columns, '{}');
    v_all_tables := v_pos.tables = '{}';

    -- 1. What is out: less than at the last claim, when something was acknowledged.
    if v_pos.out_count > 0 then
        if not v_pos.is_full and v_pos.out_count + p_limit >= v_max_out then
            -- It may become full: who acknowledges from now on has to see that, and to say so.
            perform from leases l where l.consumer = p_consumer and l.id >= v_pos.lease_floor order by l.id for share;
        end if;
        select min(l.id), min(l.until), coalesce(sum(cardinality(l.ids)), 0) into v_floor, v_until, v_out_count
          from leases l where l.consumer = p_consumer and l.id >= v_pos.lease_floor;
    end if;
    v_settled := v_pos.out_count - v_out_count;

    v_max_deliver := v_pos.max_deliver;
    v_per_group := v_pos.max_per_group;
    v_latest := v_pos.is_latest;
    v_position := v_pos.position;
    v_pos.out_count := v_out_count;
    if v_pos.parked_count > 0 then
        with freed as (delete from released r where r.consumer = p_consumer returning r.grps)
        select array_agg(distinct g) into v_dropped from freed f, unnest(f.grps) g where g is not null;
        v_dropped := coalesce(v_dropped, '{}');
        if v_dropped <> '{}' then
            perform sequin_promote(p_consumer, v_dropped);
            v_dropped := '{}';
            v_now := clock_timestamp();
        end if;
    end if;
    -- Leases that ended.
    if v_until <= v_now then
        select * into v_expired from sequin_expire(p_consumer, v_pos.source, v_pos.lease_floor, v_max_deliver);
        v_pos.out_count := v_pos.out_count - v_expired.freed;
        v_pos.parked_count := v_pos.parked_count + v_expired.parked;
        v_pos.dead_count := v_pos.dead_count + v_expired.dead;
        v_pos.failed_count := v_pos.failed_count + v_expired.freed;
        v_now := clock_timestamp();
    end if;
    v_room := least(p_limit, v_max_out - v_pos.out_count);

    -- 2 and 3 in either order, by chance, so that what fails again and again keeps nobody from what is fresh.
    v_log_first := v_pos.parked_count > 0 and random() < 0.5;
    for v_turn in 1..2 loop
    -- 2. Heads of parked groups that are due, each with what follows it in its group.
    if v_turn = 2 and v_log_first or v_turn = 1 and not v_log_first then
    if v_pos.parked_count > 0 and v_room > 0 then
        <<heads>>
        for v_head in
            select p.* from parked p where p.consumer = p_consumer and p.due_at <= v_now order by p.due_at, p.first_id limit v_room
        loop
            v_in_group := 0;
            if v_latest and v_columns is null then
                v_newest := sequin_keep_newest(p_consumer, v_head.grp, v_head.id);
                if v_newest is not null then
                    -- What waited behind the head takes its place: it was never handed out.
                    v_parked := v_parked - v_newest;
                    select p.* into v_head from parked p where p.id = v_head.id;
                end if;
            end if;
            for v_row in
                select p.* from parked p where p.id = v_head.id
                union all
                select * from (select p.* from parked p
                    where v_head.grp2 is null and p.consumer = p_consumer and p.grp = v_head.grp and p.reason <> 'dead'
                      and p.first_id > v_head.first_id order by p.first_id limit v_room) followers
            loop
                exit heads when v_room <= 0;
                exit when v_in_group >= v_per_group;
                if v_row.id <> v_head.id then
                    -- One with a second group, or one behind such a one, waits for its own turn.
                    exit when v_row.grp2 is not null or v_row.not_before > v_now or v_row.reason = 'error' or (
                        select q.first_id from parked q where q.consumer = p_consumer and q.grp2 = v_row.grp and q.grp2 is not null
                        and q.reason <> 'dead' order by q.first_id limit 1) < v_row.first_id;
                end if;
                v_take := v_row.ids;
                if v_row.deliver_count = 0 and v_row.reason = 'blocked' then
                    -- Never handed out: what the consumer's settings now leave out is dropped.
                    v_take := array(
                        select m.id from messages m where m.source = v_pos.source and m.id = any (v_row.ids)
                          and m.id between v_row.ids[1] and v_row.ids[cardinality(v_row.ids)]
                          and (m.consumer = p_consumer
                               or m.action = any (v_actions)
                                  and (v_all_tables or m.relation = any (array(select * from sequin_relations(v_pos.source, v_pos.tables)))))
                        union  -- while a partition goes, both hold it
                        select m.id from kept_messages m where m.source = v_pos.source and m.id = any (v_row.ids)
                          and (m.consumer = p_consumer
                               or m.action = any (v_actions)
                                  and (v_all_tables or m.relation = any (array(select * from sequin_relations(v_pos.source, v_pos.tables)))))
                        order by 1);
                    if cardinality(v_take) < cardinality(v_row.ids) then
                        v_parked := v_parked - (cardinality(v_row.ids) - cardinality(v_take));
                        v_dropped := v_dropped || v_row.grp || v_row.grp2;
                    end if;
                end if;
                w_ids := v_take;
                v_take := v_take[1:least(v_room, coalesce(v_per_group, 1000000) - v_in_group)];
                i := cardinality(v_take);
                if i = cardinality(w_ids) then
                    delete from parked p where p.id = v_row.id;
                else
                    -- The rest of a run waits for the ack of what is taken now.
                    update parked p set first_id = w_ids[i + 1], ids = w_ids[i + 1:], due_at = null where p.id = v_row.id;
                end if;
                continue when i = 0;
                v_ids := v_ids || v_take;
                v_grps := v_grps || array_fill(v_row.grp, array[i]);
                v_grp2s := v_grp2s || array_fill(v_row.grp2, array[i]);
                v_counts := v_counts || array_fill(v_row.deliver_count + 1, array[i]);
                v_batches := v_batches || array_fill(v_row.max_batch, array[i]);
                v_fresh := v_fresh || array_fill(v_row.reason = 'error' or v_row.reason = 'blocked' and v_row.deliver_count = 0, array[i]);
                v_from_parked := true;
                v_parked := v_parked - i;
                v_room := v_room - i;
                v_in_group := v_in_group + i;
            end loop;
        end loop;
    end if;

    -- 3. The log.
    elsif v_room > 0 and v_pos.parked_count + v_parked < v_pos.max_parked then
        if v_pos.out_count > 0 then
            v_out := array(select sequin_groups_out(p_consumer));
        end if;
        v_window := greatest(v_room, 4);
        loop
            if v_pos.is_judged then
                -- Judged already; what others took meanwhile lies before the position.
                select array_agg(u.id order by u.id), array_agg(u.grp order by u.id),
                       array_agg(nullif(u.grp2, u.grp) order by u.id), array_agg(u.error order by u.id),
                       array_agg(u.delay order by u.id), bool_or(u.grp2 <> u.grp or u.error is not null)
                  into w_ids, w_grps, w_grp2s, w_errors, w_delays, w_two
                  from unnest(p_ids, p_grps, p_grp2s, p_errors, p_delays_ms) u(id, grp, grp2, error, delay)
                 where u.id > v_position and p_from <= v_position;
                w_last := case when p_from <= v_position then greatest(p_through, v_position) end;
                w_count := 0;
            else
            select array_agg(x.id) filter (where x.hit), array_agg(x.grp) filter (where x.hit),
                   array_agg(nullif(x.grp2, x.grp)) filter (where x.hit),
                   bool_or(x.grp2 <> x.grp) filter (where x.hit), max(x.id), count(*)
              into w_ids, w_grps, w_grp2s, w_two, w_last, w_count
              from (
                select m.id,
                       case when v_columns is null then hashtextextended(m.key, m.table_oid)
                            else sequin_group(m.record, m.changes, v_columns, m.table_oid, false) end as grp,
                       case when v_columns is not null then
                                case when m.action = 'U' then sequin_group(m.record, m.changes, v_columns, m.table_oid, true) end
                            when m.old_key is not null then hashtextextended(m.old_key, m.table_oid) end as grp2,
                       m.consumer is not distinct from p_consumer
                       or (m.consumer is null and m.action = any (v_actions)
                           and (v_all_tables or m.relation = any (array(select * from sequin_relations(v_pos.source, v_pos.tables))))
                           and (m.epoch <> v_pos.start_epoch or m.commit_lsn >= v_pos.start_lsn)) as hit
                from messages m where m.source = v_pos.source and m.id > v_position
                order by m.id limit v_window
              ) x;
            end if;
            v_scanned := v_scanned + w_count;
            v_end := w_count < v_window;
            w_stop := w_last;
            if w_ids is not null then
                w_free := not coalesce(w_two, false) and v_per_group is null and v_pos.parked_count + v_parked = 0
                          and (v_out = '{}' or not exists (select from unnest(w_grps[1:v_room]) g where g in (select unnest(v_out))));
                if not w_free and v_out <> '{}' then
                    -- Some of it will be parked behind what is out.
                    perform sequin_hold_groups(p_consumer, w_grps || w_grp2s);
                    v_out := array(select sequin_groups_out(p_consumer));
                end if;
                if w_free then
                    -- Nothing parked, and none of the first is out: these.
                    if cardinality(w_ids) >= v_room then
                        w_ids := w_ids[1:v_room];
                        w_grps := w_grps[1:v_room];
                        w_last := w_ids[v_room];
                    end if;
                    i := cardinality(w_ids);
                    v_fresh := v_fresh || array_fill(false, array[i]);
                    v_ids := v_ids || w_ids;
                    v_grps := v_grps || w_grps;
                    v_grp2s := v_grp2s || array_fill(null::bigint, array[i]);
                    v_counts := v_counts || array_fill(1, array[i]);
                    v_batches := v_batches || array_fill(null::integer, array[i]);
                    v_room := v_room - i;
                elsif coalesce(w_two, false) then
                    -- Updates that changed their key tie two groups together, and what went wrong holds up its group: row by row.
                    t_ids := '{}'; t_grps := '{}'; t_grp2s := '{}'; b_ids := '{}'; b_grps := '{}';
                    declare
                        v_busy bigint[] := array(
                            select g.grp from (select distinct unnest(w_grps || array_remove(w_grp2s, null)) as grp) g
                            where g.grp = any (v_out)
                               or sequin_first_parked(p_consumer, g.grp) is not null);
                        v_taken bigint[] := v_grps || array_remove(v_grp2s, null);
                    begin
                        for i in 1..cardinality(w_ids) loop
                            if w_errors[i] is not null then
                                -- What was blocked so far must lie in front of it.
                                perform sequin_park_behind(p_consumer, v_pos.source, b_ids, b_grps);
                                v_parked := v_parked + cardinality(b_ids);
                                b_ids := '{}'; b_grps := '{}';
                                insert into parked (consumer, source, grp, grp2, first_id, ids, reason, not_before, due_at, deliver_count,
                                                    last_error)
                                values (p_consumer, v_pos.source, w_grps[i], w_grp2s[i], w_ids[i], array[w_ids[i]],
                                        case when v_max_deliver <= 1 then 'dead' else 'error' end, sequin_after(w_delays[i]),
                                        case when coalesce(v_max_deliver, 2) > 1
                                                  and not (array_remove(array[w_grps[i], w_grp2s[i]], null) && (v_busy || v_taken))
                                             then sequin_after(w_delays[i]) end,
                                        1, w_errors[i]);
                                if v_max_deliver <= 1 then
                                    v_pos.dead_count := v_pos.dead_count + 1;
                                else
                                    v_parked := v_parked + 1;
                                    v_busy := v_busy || w_grps[i] || coalesce(nullif(array[w_grp2s[i]], array[null::bigint]), '{}');
                                end if;
                            elsif w_grps[i] = any (v_busy) or w_grp2s[i] = any (v_busy)
                               or cardinality(array_positions(v_taken, w_grps[i])) >= v_per_group
                               or cardinality(array_positions(v_taken, w_grp2s[i])) >= v_per_group then
                                v_busy := v_busy || w_grps[i];
                                if w_grp2s[i] is not null then
                                    v_busy := v_busy || w_grp2s[i];
                                    -- Its own row; what was blocked so far must lie in front of it.
                                    perform sequin_park_behind(p_consumer, v_pos.source, b_ids, b_grps);
                                    insert into parked (consumer, source, grp, grp2, first_id, ids, reason)
                                    values (p_consumer, v_pos.source, w_grps[i], w_grp2s[i], w_ids[i], array[w_ids[i]],
                                            'blocked');
                                    v_parked := v_parked + cardinality(b_ids) + 1;
                                    b_ids := '{}'; b_grps := '{}';
                                else
                                    b_ids := b_ids || w_ids[i];
                                    b_grps := b_grps || w_grps[i];
                                end if;
                            else
                                t_ids := t_ids || w_ids[i];
                                t_grps := t_grps || w_grps[i];
                                t_grp2s := t_grp2s || w_grp2s[i];
                                v_taken := v_taken || w_grps[i] || coalesce(nullif(array[w_grp2s[i]], array[null::bigint]), '{}');
                                if cardinality(t_ids) = v_room then
                                    w_last := w_ids[i];
                                    exit;
                                end if;
                            end if;
                        end loop;
                    end;
                    perform sequin_park_behind(p_consumer, v_pos.source, b_ids, b_grps);
                    v_parked := v_parked + cardinality(b_ids);
                    v_fresh := v_fresh || array_fill(false, array[cardinality(t_ids)]);
                    v_ids := v_ids || t_ids;
                    v_grps := v_grps || t_grps;
                    v_grp2s := v_grp2s || t_grp2s;
                    v_counts := v_counts || array_fill(1, array[cardinality(t_ids)]);
                    v_batches := v_batches || array_fill(null::integer, array[cardinality(t_ids)]);
                    v_room := v_room - cardinality(t_ids);
                else
                    with c as (
                        select u.id, u.grp, u.n from unnest(w_ids, w_grps) with ordinality u(id, grp, n)
                    ), taken as (
                        select g.grp, count(*) as n from unnest(v_grps || v_grp2s) g(grp)
                        where v_per_group is not null and g.grp is not null group by g.grp
                    ), busy as materialized (
                        select distinct c.grp from c
                        where c.grp in (select unnest(v_out))
                           or (v_pos.parked_count + v_parked > 0 and sequin_first_parked(p_consumer, c.grp) is not null)
                    ), marked as (
                        select c.id, c.grp, c.n,
                               b.grp is not null or coalesce(row_number() over (partition by c.grp order by c.n)
                                                             + coalesce(t.n, 0) > v_per_group, false) as blocked
                        from c left join busy b on b.grp = c.grp left join taken t on t.grp = c.grp
                    ), cut as (
                        select k.*, count(*) filter (where not k.blocked) over (order by k.n) as taken from marked k
                    )
                    select coalesce(array_agg(k.id order by k.n) filter (where not k.blocked and k.taken <= v_room), '{}'),
                           coalesce(array_agg(k.grp order by k.n) filter (where not k.blocked and k.taken <= v_room), '{}'),
                           coalesce(array_agg(k.id order by k.n) filter (where k.blocked and k.taken < v_room), '{}'),
                           coalesce(array_agg(k.grp order by k.n) filter (where k.blocked and k.taken < v_room), '{}'),
                           max(k.id) filter (where not k.blocked and k.taken = v_room)
                      into t_ids, t_grps, b_ids, b_grps, t_stop
                      from cut k;
                    if b_ids <> '{}' then
                        perform sequin_park_behind(p_consumer, v_pos.source, b_ids, b_grps);
                        v_parked := v_parked + cardinality(b_ids);
                    end if;
                    if t_ids <> '{}' then
                        v_fresh := v_fresh || array_fill(false, array[cardinality(t_ids)]);
                        v_ids := v_ids || t_ids;
                        v_grps := v_grps || t_grps;
                        v_grp2s := v_grp2s || array_fill(null::bigint, array[cardinality(t_ids)]);
                        v_counts := v_counts || array_fill(1, array[cardinality(t_ids)]);
                        v_batches := v_batches || array_fill(null::integer, array[cardinality(t_ids)]);
                        v_room := v_room - cardinality(t_ids);
                    end if;
                    w_last := coalesce(t_stop, w_last);
                end if;
            end if;
            v_position := coalesce(w_last, v_position);
            v_end := v_end and w_last is not distinct from w_stop;
            exit when v_room <= 0 or v_end or v_scanned >= p_scan
                   or v_pos.parked_count + v_parked >= v_pos.max_parked;
            v_window := least(v_window * 4, 5000);
        end loop;
    else
        v_end := v_ids = '{}';
    end if;
    end loop;

    -- 4. The lease and the position.
    if v_from_parked then
        select array_agg(u.id order by u.id), array_agg(u.grp order by u.id), array_agg(u.grp2 order by u.id),
               array_agg(u.n order by u.id), array_agg(u.b order by u.id), array_agg(u.fresh order by u.id)
          into v_ids, v_grps, v_grp2s, v_counts, v_batches, v_fresh
          from (select x.*, max(x.id) over (partition by x.grp) as newest
                from unnest(v_ids, v_grps, v_grp2s, v_counts, v_batches, v_fresh) x(id, grp, grp2, n, b, fresh)) u
         -- of a row its latest state only, also where that came from the log and an older one from the parked
         where u.id = u.newest or u.grp2 is not null or not v_latest or v_columns is not null;
    end if;
    if v_dropped <> '{}' then
        perform sequin_promote(p_consumer, array_remove(v_dropped, null));
    end if;
    if v_ids <> '{}' then
        v_token := gen_random_uuid();
        insert into leases (token, consumer, source, until, ids, grps, grp2s, counts, holder)
        values (v_token, p_consumer, v_pos.source, clock_timestamp() + p_lease_ms * interval '1 ms',
                v_ids, v_grps, v_grp2s, v_counts, p_holder)
        returning leases.id into v_lease;
    end if;
    update consumer_position p
       set version = v_pos.version + 1, position = v_position, out_count = v_pos.out_count + cardinality(v_ids),
           lease_floor = coalesce(v_floor, v_lease, p.lease_floor), is_full = v_pos.out_count + cardinality(v_ids) >= v_max_out,
           parked_count = v_pos.parked_count + v_parked, dead_count = v_pos.dead_count,
           failed_count = v_pos.failed_count, acked_count = p.acked_count + v_settled,
           taken_at = case when v_ids <> '{}' then v_now else p.taken_at end,
           filtered_count = p.filtered_count + sequin_passed(p_passed, v_pos.position, v_position),
           undecided_count = p.undecided_count + sequin_passed(p_undecided, v_pos.position, v_position)
     where p.consumer = p_consumer and p.version = v_pos.version
       and (p.position, p.out_count, p.parked_count, p.dead_count, p.is_full) is distinct from
           (v_position, v_pos.out_count + cardinality(v_ids), v_pos.parked_count + v_parked, v_pos.dead_count,
            v_pos.out_count + cardinality(v_ids) >= v_max_out);

    if cardinality(v_ids) > 1 then
        -- What does not fit into one answer keeps its place. The length of a large value is known without reading it.
        select count(*) into v_fit from (
            select sum(l.bytes) over (order by u.n) as bytes, u.n
            from unnest(v_ids) with ordinality u(id, n)
            -- one probe a message: without the limit the planner may join the whole partition
            left join lateral (select octet_length(x.record) + coalesce(octet_length(x.changes), 0) as bytes
                               from messages x where x.source = v_pos.source and x.id = u.id limit 1) l on true
        ) s where coalesce(s.bytes, 0) <= p_max_bytes or s.n = 1;
        if v_fit < cardinality(v_ids) then
            v_beyond := v_ids[v_fit + 1:];
            perform sequin_undo(p_consumer, array_fill(v_token, array[cardinality(v_beyond)]), v_beyond, v_batches[v_fit + 1:],
                                array(select u.id from unnest(v_ids, v_fresh) u(id, fresh) where u.fresh));
            v_ids := v_ids[:v_fit];
            v_end := false;
        end if;
    end if;

    reached := v_position;
    if v_ids = '{}' then
        -- Heads that the settings now leave out took the place of others, and freed what was behind them.
        at_end := v_end and v_dropped = '{}';
        select ceil(extract(epoch from least(
                   (select min(l.until) from leases l where l.consumer = p_consumer and l.id >= v_pos.lease_floor),
                   (select min(p.due_at) from parked p where p.consumer = p_consumer and p.due_at is not null and p.due_at < 'infinity'))
                   - clock_timestamp()) * 1000)
          into next_due_ms;
        return next;
        return;
    end if;
    if not v_from_parked then
        -- All of one stretch of the log: the partitions that hold it are known before the scan begins.
        return query
            select case when m.n = 1 then v_token end, v_end, null::bigint, v_position, false, false, case when m.n = 1 then v_pos.configured_at end,
                   case when m.n = 1 then m.source end, m.id, 1, v_grps[m.n], v_grp2s[m.n], null::integer, m.relation, m.action, m.record,
                   m.changes, m.key, m.commit_lsn, m.commit_idx,
                   to_char(m.committed_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), m.epoch, m.unchanged,
                   m.old_values_known, m.annotations, m.backfill,
                   coalesce(m.replay, case when m.id > v_pos.replay_from and m.id <= v_pos.replay_to then v_pos.replay end)
            from (select x.*, row_number() over (order by x.id) as n from messages x
                  where x.source = v_pos.source and x.id = any (v_ids) and x.id >= v_ids[1] and x.id <= v_ids[cardinality(v_ids)]
                 ) m;
        return;
    end if;
    return query
        select case when u.o = 1 then v_token end, v_end, null::bigint, v_position, false, u.fresh, case when u.o = 1 then v_pos.configured_at end,
               case when u.o = 1 then m.source end, m.id, u.n, u.grp, u.grp2, u.b, m.relation, m.action, m.record,
               m.changes, m.key, m.commit_lsn, m.commit_idx,
               to_char(m.committed_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), m.epoch, m.unchanged,
               m.old_values_known, m.annotations, m.backfill,
               coalesce(m.replay, case when m.id > v_pos.replay_from and m.id <= v_pos.replay_to then v_pos.replay end)
        from unnest(v_ids, v_counts, v_grps, v_grp2s, v_batches, v_fresh) with ordinality u(id, n, grp, grp2, b, fresh, o)
        -- one probe a message: what was parked may lie millions of ids before what was not
        cross join lateral (
            select * from messages x where x.source = v_pos.source and x.id = u.id
            union all
            select * from kept_messages x where x.source = v_pos.source and x.id = u.id
            limit 1
        ) m;
end $$;

-- Settling -----------------------------------------------------------------------------------------------------

-- The histogram's upper bounds, in seconds.
create function sequin_delivery_bounds() returns double precision[] language sql immutable as $$
    select '{0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600, 3600}'::double precision[]
$$;

-- Where p_done acknowledged messages belong in the histogram. At most 20 of them are looked at, each standing for its
-- share: looking at a thousand would cost more than acknowledging them. Null buckets: none is in the log any more.
create function sequin_delivery_times(p_source uuid, p_ids bigint[], p_done integer,
                                      out buckets double precision[], out seconds double precision)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set jit = off
set plan_cache_mode = force_generic_plan as $$
declare
    v_counts integer[] := array_fill(0, array[14]);
    v_seen   integer := 0;
    v_step   integer := ceil(cardinality(p_ids) / 20.0);
    v_at     integer := 1;
    v_bucket integer;
    v_took   double precision;
begin
    seconds := 0;
    while v_at <= cardinality(p_ids) loop
        select greatest(0, extract(epoch from clock_timestamp() - m.committed_at)) into v_took
          from messages m where m.source = p_source and m.id = p_ids[v_at];
        if found then
            v_bucket := width_bucket(v_took, sequin_delivery_bounds()) + 1;
            v_counts[v_bucket] := v_counts[v_bucket] + 1;
            seconds := seconds + v_took;
            v_seen := v_seen + 1;
        end if;
        v_at := v_at + v_step;
    end loop;
    if v_seen > 0 then
        buckets := array(select u.n * p_done::double precision / v_seen from unnest(v_counts) with ordinality u(n, i) order by i);
        seconds := seconds * p_done / v_seen;
    end if;
end $$;

-- Acknowledge what came under one token, as nearly all do: the whole lease of a consumer that has nothing parked goes, and nobody
-- is waited for. All else goes as below.
create function sequin_ack_lease(p_consumer uuid, p_token uuid, p_ids bigint[], p_filtered boolean, out done integer, out stale integer)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
    v_set    text;
    v_timed  boolean := random() < 0.0625;  -- how long it took is looked at for few: counting costs more than acknowledging
    v_grps   bigint[];
    v_parked integer;
    v_full   boolean;
begin
    if not v_timed and not p_filtered then
        v_set := set_config('synchronous_commit', 'off', true);
        delete from leases l where l.token = p_token and l.consumer = p_consumer and l.ids = p_ids
           and (select p.parked_count = 0 and p.acked_count >= 1000 from consumer_position p where p.consumer = p_consumer
                order by p.version desc limit 1)
        returning l.grps || l.grp2s into v_grps;
        if found then
            -- A claim that found it out has ended by now: what it did is seen.
            select p.parked_count, p.is_full into v_parked, v_full from consumer_position p where p.consumer = p_consumer
             order by p.version desc limit 1;
            if v_parked > 0 then
                insert into released (consumer, grps) values (p_consumer, v_grps);
            end if;
            if v_parked > 0 or v_full then
                perform pg_notify('sequin_consumer', p_consumer::text);
            end if;
            done := cardinality(p_ids);
            stale := 0;
            return;
        end if;
    end if;
    select a.done, a.stale into done, stale
      from sequin_ack(p_consumer, array_fill(p_token, array[cardinality(p_ids)]), p_ids, p_filtered, v_timed) a;
end $$;

-- Acknowledge. A receipt (token, id) that names nothing out, and nothing that came back under its token, is stale.
-- p_filtered: they were not delivered, the consumer's filter or transform dropped them. p_timed: how long it took is looked at.
create function sequin_ack(p_consumer uuid, p_tokens uuid[], p_ids bigint[], p_filtered boolean default false,
                           p_timed boolean default random() < 0.0625, out done integer, out stale integer)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
    v_pos     record;
    v_total   integer := cardinality(p_ids);
    v_whole   uuid[] := '{}';
    v_freed   integer;
    v_late    integer := 0;
    v_dead    integer := 0;
    v_grps    bigint[];
    v_due     integer := 0;
    v_weight  integer;
    v_set     text;
    r         record;
    x         record;
begin
    v_set := set_config('synchronous_commit', 'off', true);
    -- receivers wait here and not for the row: a row's lock is handed on in two waits
    perform pg_advisory_xact_lock(hashtextextended(p_consumer::text, 0));
    select p.* into v_pos from consumer_position p where p.consumer = p_consumer order by p.version desc limit 1 for update;
    if v_pos.consumer is null then
        done := 0; stale := v_total;
        return;
    end if;
    v_weight := case when p_filtered then 0 when v_pos.acked_count < 1000 then 1 when p_timed then 16 else 0 end;
    v_grps := '{}';
    v_freed := 0;

    -- Whole leases at once, which is what most clients settle; most of all one.
    if p_tokens[1] = all (p_tokens) then
        delete from leases l where l.token = p_tokens[1] and l.consumer = p_consumer and l.ids = p_ids
        returning cardinality(l.ids), array_remove(l.grps || l.grp2s, null) into v_freed, v_grps;
        v_freed := coalesce(v_freed, 0);
        v_grps := coalesce(v_grps, '{}');
    else
    with receipts as materialized (
        select u.token, array_agg(distinct u.id order by u.id) as ids from unnest(p_tokens, p_ids) u(token, id) group by u.token
    ), gone as (
        delete from leases l using receipts c
        where l.token = c.token and l.consumer = p_consumer and l.ids = c.ids
        returning l.token, cardinality(l.ids) as n, l.grps, l.grp2s
    )
    select coalesce(sum(g.n), 0), coalesce(array_agg(g.token), '{}'),
           coalesce((select array_agg(distinct y) from gone h, unnest(h.grps || h.grp2s) y where y is not null), '{}')
      into v_freed, v_whole, v_grps
      from gone g;
    end if;

    if v_freed < v_total then
        perform from leases l where l.token = any (p_tokens) and l.consumer = p_consumer order by l.id for update;
        for r in
            select u.token, array_agg(distinct u.id) as ids from unnest(p_tokens, p_ids) u(token, id)
            where u.token <> all (v_whole) group by u.token
        loop
            select array_agg(u.id) as ids, array_agg(u.grp) || array_agg(u.grp2) as grps into x
              from leases l, unnest(l.ids, l.grps, l.grp2s) u(id, grp, grp2)
             where l.token = r.token and l.consumer = p_consumer and u.id = any (r.ids);
            if x.ids is not null then
                perform sequin_shrink_leases(p_consumer, r.token, x.ids);
                v_freed := v_freed + cardinality(x.ids);
                v_grps := v_grps || array_remove(x.grps, null);
            end if;
            if v_pos.parked_count + v_pos.dead_count > 0 then
                -- Late, but before it was handed out again: counts.
                for x in
                    delete from parked p where p.id = any (array(select y.id from parked y where y.lease_token = r.token))
                       and p.consumer = p_consumer and p.first_id = any (r.ids)
                    returning p.reason, p.grp, p.grp2
                loop
                    if x.reason = 'dead' then
                        v_dead := v_dead + 1;
                    else
                        v_late := v_late + 1;
                    end if;
                    v_grps := v_grps || x.grp || coalesce(nullif(array[x.grp2], array[null::bigint]), '{}');
                end loop;
            end if;
        end loop;
    end if;

    done := v_freed + v_late + v_dead;
    stale := v_total - done;
    if done = 0 then
        return;
    end if;
    if v_weight = 0 then
        update consumer_position p
           set version = v_pos.version + 1, out_count = p.out_count - v_freed, parked_count = p.parked_count - v_late,
               dead_count = p.dead_count - v_dead, acked_count = p.acked_count + case when p_filtered then 0 else done end,
               filtered_count = p.filtered_count + case when p_filtered then done else 0 end
         where p.consumer = p_consumer and p.version = v_pos.version;
    else
        update consumer_position p
           set version = v_pos.version + 1, out_count = p.out_count - v_freed, parked_count = p.parked_count - v_late,
               dead_count = p.dead_count - v_dead, acked_count = p.acked_count + done,
               took_buckets = case when t.buckets is null then p.took_buckets
                              else array(select a + b from unnest(p.took_buckets, t.buckets) with ordinality u(a, b, n) order by n) end,
               took_seconds = p.took_seconds + t.seconds
          from sequin_delivery_times(v_pos.source, p_ids, done * v_weight) t
         where p.consumer = p_consumer and p.version = v_pos.version;
    end if;
    if v_pos.parked_count > v_late then
        v_due := sequin_promote(p_consumer, v_grps);
    end if;
    if v_due > 0 or v_pos.is_full then
        perform pg_notify('sequin_consumer', p_consumer::text);
    end if;
end $$;

-- Give back: a nack of a pull client (p_sent: what follows in the group had been handed out with it), or a failed push
-- (what follows was not sent, so it does not count as delivered).
create function sequin_return(
    p_consumer uuid, p_tokens uuid[], p_ids bigint[], p_delays bigint[], p_reasons text[], p_errors text[],
    p_statuses integer[], p_max_batches integer[], p_sent boolean, out done integer, out stale integer)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
    v_pos         consumer_position;
    v_max_deliver integer;
    v_grps        bigint[] := '{}';
    v_freed       integer := 0;
    v_parked      integer := 0;
    v_dead        integer := 0;
    v_failed      integer := 0;
    v_late        integer;
    r             record;
    g             record;
begin
    perform set_config('synchronous_commit', 'off', true),
            -- receivers wait here and not for the row: a row's lock is handed on in two waits
            pg_advisory_xact_lock(hashtextextended(p_consumer::text, 0));
    select p.* into v_pos from consumer_position p where p.consumer = p_consumer order by p.version desc limit 1 for update;
    done := 0; stale := cardinality(p_ids);
    if v_pos.consumer is null then
        return;
    end if;
    select c.max_deliver into v_max_deliver from consumers_consumer c where c.id = p_consumer;
    for r in
        select u.token, array_agg(u.id order by u.n) as ids, array_agg(u.delay order by u.n) as delays,
               array_agg(u.reason order by u.n) as reasons, array_agg(u.error order by u.n) as errors,
               array_agg(u.status order by u.n) as statuses, array_agg(u.batch order by u.n) as batches
        from unnest(p_tokens, p_ids, p_delays, p_reasons, p_errors, p_statuses, p_max_batches) with ordinality
             u(token, id, delay, reason, error, status, batch, n)
        group by u.token
    loop
        -- Expired, but not handed out again: the delay and the error still count. What failed in a lease below is
        -- parked under no token, so nothing is counted twice.
        with late as (
            update parked p
               set not_before = sequin_after(u.delay),
                   due_at = case when p.due_at is not null then coalesce(sequin_after(u.delay), clock_timestamp()) end,
                   lease_token = null, last_error = coalesce(u.error, p.last_error),
                   last_status = coalesce(u.status, p.last_status), max_batch = coalesce(u.batch, p.max_batch)
              from unnest(r.ids, r.delays, r.errors, r.statuses, r.batches) u(id, delay, error, status, batch)
             where p.id = any (array(select y.id from parked y where y.lease_token = r.token))
               and p.consumer = p_consumer and p.first_id = u.id and p.reason <> 'dead'
            returning 1)
        select count(*) into v_late from late;
        select * into g from sequin_give_back(p_consumer, v_pos.source, r.token, v_max_deliver, false, p_sent, r.ids,
                                              r.delays, r.reasons, r.errors, r.statuses, r.batches);
        done := done + g.done + v_late;
        v_freed := v_freed + g.freed; v_parked := v_parked + g.parked; v_dead := v_dead + g.dead;
        v_failed := v_failed + g.done;
        v_grps := v_grps || g.groups;
    end loop;
    stale := stale - done;
    if v_freed > 0 then
        update consumer_position p
           set version = v_pos.version + 1, out_count = p.out_count - v_freed, parked_count = p.parked_count + v_parked,
               dead_count = p.dead_count + v_dead, failed_count = p.failed_count + v_failed
         where p.consumer = p_consumer and p.version = v_pos.version;
        perform sequin_promote(p_consumer, v_grps);
    end if;
    if done > 0 then
        perform pg_notify('sequin_consumer', p_consumer::text);
    end if;
end $$;

-- Move the end of the leases of these messages to p_wait_ms from now. A message whose lease has ended, but which was not
-- handed out again and leads its group, is out again under its token, as if the lease had not ended.
create function sequin_extend(p_consumer uuid, p_tokens uuid[], p_ids bigint[], p_wait_ms bigint,
                              out done integer, out stale integer)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
    v_pos    consumer_position;
    v_room   integer;
    v_until  timestamptz;
    v_out    bigint[];
    v_ids    bigint[];
    v_grps   bigint[];
    v_grp2s  bigint[];
    v_counts integer[];
    r        record;
    l        record;
begin
    perform set_config('synchronous_commit', 'off', true);
    select p.* into v_pos from consumer_position p where p.consumer = p_consumer order by p.version desc limit 1 for update;
    perform from leases h where h.token = any (p_tokens) and h.consumer = p_consumer order by h.id for update;
    v_until := clock_timestamp() + p_wait_ms * interval '1 ms';
    done := 0;
    for r in
        select u.token, array_agg(distinct u.id) as ids from unnest(p_tokens, p_ids) u(token, id) group by u.token
    loop
        for l in
            select x.id, x.source, x.holder, x.token, count(*) as all_of_it,
                   array_agg(u.id order by u.id) filter (where u.id = any (r.ids)) as ids,
                   array_agg(u.grp order by u.id) filter (where u.id = any (r.ids)) as grps,
                   array_agg(u.grp2 order by u.id) filter (where u.id = any (r.ids)) as grp2s,
                   array_agg(u.count order by u.id) filter (where u.id = any (r.ids)) as counts,
                   array_agg(u.id order by u.id) filter (where u.id <> all (r.ids)) as rest,
                   array_agg(u.grp order by u.id) filter (where u.id <> all (r.ids)) as rest_grps,
                   array_agg(u.grp2 order by u.id) filter (where u.id <> all (r.ids)) as rest_grp2s,
                   array_agg(u.count order by u.id) filter (where u.id <> all (r.ids)) as rest_counts
            from leases x, unnest(x.ids, x.grps, x.grp2s, x.counts) u(id, grp, grp2, count)
            where x.token = r.token and x.consumer = p_consumer
            group by x.consumer, x.id
        loop
            continue when l.ids is null;
            done := done + cardinality(l.ids);
            update leases x set until = v_until, ids = l.ids, grps = l.grps, grp2s = l.grp2s, counts = l.counts
             where x.consumer = p_consumer and x.id = l.id and l.rest is null;
            if l.rest is not null then
                update leases x set ids = l.rest, grps = l.rest_grps, grp2s = l.rest_grp2s, counts = l.rest_counts
                 where x.consumer = p_consumer and x.id = l.id;
                insert into leases (token, consumer, source, until, ids, grps, grp2s, counts, holder)
                values (l.token, p_consumer, l.source, v_until, l.ids, l.grps, l.grp2s, l.counts, l.holder);
            end if;
        end loop;
        continue when v_pos.parked_count = 0;
        v_ids := '{}'; v_grps := '{}'; v_grp2s := '{}'; v_counts := '{}';
        v_out := array(select x from leases o, unnest(o.grps || o.grp2s) x
                       where o.consumer = p_consumer and o.id >= v_pos.lease_floor and o.token <> r.token and x is not null);
        select c.max_ack_pending - v_pos.out_count into v_room from consumers_consumer c where c.id = p_consumer;
        for l in
            select p.* from (select * from parked y where y.lease_token = r.token offset 0) p
             where p.consumer = p_consumer and p.reason <> 'dead' and p.first_id = any (r.ids) order by p.first_id
        loop
            exit when v_room <= 0;
            continue when l.grp = any (v_out) or l.grp2 = any (v_out) or sequin_first_parked(p_consumer, l.grp) < l.first_id
                       or sequin_first_parked(p_consumer, l.grp2) < l.first_id;
            delete from parked p where p.id = l.id;
            v_ids := v_ids || l.first_id; v_grps := v_grps || l.grp; v_grp2s := v_grp2s || l.grp2;
            v_counts := v_counts || l.deliver_count;
            v_room := v_room - 1;
        end loop;
        if v_ids <> '{}' then
            insert into leases (token, consumer, source, until, ids, grps, grp2s, counts)
            values (r.token, p_consumer, v_pos.source, v_until, v_ids, v_grps, v_grp2s, v_counts);
            done := done + cardinality(v_ids);
            update consumer_position p set out_count = p.out_count + cardinality(v_ids), parked_count = p.parked_count - cardinality(v_ids)
             where p.consumer = p_consumer returning p.* into v_pos;
        end if;
    end loop;
    stale := cardinality(p_ids) - done;
end $$;

-- People's decisions -------------------------------------------------------------------------------------------

-- Let parked messages and dead letters be tried again now (p_discard: drop them), by id or by state, time and key.
-- Returns how many.
create function sequin_redrive(p_consumer uuid, p_discard boolean, p_ids bigint[], p_state text, p_since timestamptz,
                               p_until timestamptz, p_key text)
returns bigint language plpgsql set enable_seqscan = off set jit = off as $$
declare
    v_count  bigint;
    v_parked bigint;
    v_dead   bigint;
    v_grps   bigint[];
begin
    perform from consumer_position p where p.consumer = p_consumer order by p.version desc limit 1 for update;
    -- A run becomes single rows where only a part of it is meant.
    with chosen as (
        select p.id, p.grp, p.grp2, p.reason, u.id as message, p.ids
        from parked p, unnest(p.ids) u(id)
        where p.consumer = p_consumer
          and (p_ids is null or u.id in (select unnest(p_ids)))
          and (p_state is null or (p_state = 'dead') = (p.reason = 'dead'))
          and (p_since is null or p.parked_at >= p_since) and (p_until is null or p.parked_at < p_until)
          and (p_key is null or p_key in (
              select m.key from messages m where m.source = p.source and m.id = u.id
              union all select m.key from kept_messages m where m.source = p.source and m.id = u.id))
    ), rows as (
        select c.id, c.reason, c.grp, c.grp2, array_agg(c.message) as messages, c.ids from chosen c
        group by c.id, c.reason, c.grp, c.grp2, c.ids
    ), dropped as (
        delete from parked p using rows r where p_discard and p.id = r.id and cardinality(r.messages) = cardinality(r.ids)
    ), cut as (
        update parked p set ids = n.ids, first_id = n.ids[1], due_at = null
        from rows r, lateral (select array_agg(x order by x) as ids from unnest(r.ids) x where x <> all (r.messages)) n
        where p_discard and p.id = r.id and cardinality(r.messages) < cardinality(r.ids)
    ), revived as (
        update parked p
           set reason = case when p.deliver_count = 0 and p.reason = 'blocked' then 'blocked' else 'retry' end,
               not_before = null, due_at = null,
               deliver_count = case when p.reason = 'dead' then 0 else p.deliver_count end, parked_at = clock_timestamp()
          from rows r where not p_discard and p.id = r.id
    )
    select coalesce(sum(cardinality(r.messages)), 0), coalesce(sum(cardinality(r.messages)) filter (where r.reason <> 'dead'), 0),
           coalesce(sum(cardinality(r.messages)) filter (where r.reason = 'dead'), 0),
           coalesce((select array_agg(distinct y) from rows q, unnest(array[q.grp, q.grp2]) y where y is not null), '{}')
      into v_count, v_parked, v_dead, v_grps
      from rows r;
    if v_count > 0 then
        update consumer_position p
           set parked_count = p.parked_count + case when p_discard then -v_parked else v_dead end,
               dead_count = p.dead_count - v_dead
         where p.consumer = p_consumer;
        -- What is revived leads its group again, in front of what became due meanwhile.
        if not p_discard then
            update parked p set due_at = null from (select distinct unnest(v_grps) as grp) g
             where p.consumer = p_consumer and p.due_at is not null and p.grp = g.grp;
            update parked p set due_at = null from (select distinct unnest(v_grps) as grp) g
             where p.consumer = p_consumer and p.due_at is not null and p.grp2 = g.grp;
        end if;
        perform sequin_promote(p_consumer, v_grps);
        perform pg_notify('sequin_consumer', p_consumer::text);
    end if;
    return v_count;
end $$;

-- The filter or the transform was mended: what failed because of it is due at once. Returns how many.
create function sequin_mended(p_consumer uuid) returns bigint language plpgsql set enable_seqscan = off set jit = off as $$
declare
    v_count bigint;
    v_grps  bigint[];
begin
    perform pg_advisory_xact_lock(hashtextextended(p_consumer::text, 0));  -- a claim goes by what was before, or by all of it
    perform from consumer_position p where p.consumer = p_consumer order by p.version desc limit 1 for update;
    with freed as (
        update parked p set not_before = null, due_at = null where p.consumer = p_consumer and p.reason = 'error' returning p.grp, p.grp2
    )
    select count(*), array_agg(distinct g) into v_count, v_grps from freed f, unnest(array[f.grp, f.grp2]) g where g is not null;
    if v_count > 0 then
        perform sequin_promote(p_consumer, v_grps);
    end if;
    return v_count;
end $$;

-- Undo a hand-out: the pump stops before it has tried these. They keep their place and count as never handed out.
-- Those in p_fresh had failed in the filter or the function, and nobody has had them yet.
create function sequin_undo(p_consumer uuid, p_tokens uuid[], p_ids bigint[], p_max_batches integer[], p_fresh bigint[]) returns integer
language plpgsql set enable_seqscan = off set jit = off as $$
declare
    v_freed integer := 0;
    v_grps  bigint[] := '{}';
    r       record;
    m       record;
begin
    perform set_config('synchronous_commit', 'off', true);
    perform from consumer_position p where p.consumer = p_consumer order by p.version desc limit 1 for update;
    perform from leases l where l.token = any (p_tokens) and l.consumer = p_consumer order by l.id for update;
    for r in
        select u.token, array_agg(distinct u.id) as ids from unnest(p_tokens, p_ids) u(token, id) group by u.token
    loop
        for m in
            select u.*, l.source from leases l, unnest(l.ids, l.grps, l.grp2s, l.counts) u(id, grp, grp2, count)
            where l.token = r.token and l.consumer = p_consumer and u.id = any (r.ids)
        loop
            insert into parked (consumer, source, grp, grp2, first_id, ids, reason, deliver_count, max_batch)
            values (p_consumer, m.source, m.grp, m.grp2, m.id, array[m.id],
                    case when m.count > 1 and m.id = any (p_fresh) then 'error' else 'blocked' end, m.count - 1,
                    p_max_batches[array_position(p_ids, m.id)]);
            v_freed := v_freed + 1;
            v_grps := v_grps || m.grp || m.grp2;
        end loop;
        perform sequin_shrink_leases(p_consumer, r.token, r.ids);
    end loop;
    if v_freed > 0 then
        update consumer_position p set out_count = p.out_count - v_freed, parked_count = p.parked_count + v_freed
         where p.consumer = p_consumer;
        perform sequin_promote(p_consumer, array_remove(v_grps, null));
        perform pg_notify('sequin_consumer', p_consumer::text);
    end if;
    return v_freed;
end $$;

-- Filters -------------------------------------------------------------------------------------------------------

-- The role under which filters run: it may read messages, and nothing else. A managed server may not let us make one.
do $$ begin
    if not exists (select from pg_roles where rolname = 'sequin_filter') then
        create role sequin_filter nologin;
    end if;
    execute format('grant sequin_filter to %I', current_user);
exception when insufficient_privilege or duplicate_object or unique_violation then
    raise notice 'no role for filters: %', sqlerrm;
end $$;
do $$ begin
    if exists (select from pg_roles where rolname = 'sequin_filter') then
        grant select on messages, kept_messages to sequin_filter;
    end if;
end $$;
