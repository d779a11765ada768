-- Delivering again: what the log still reaches back to, rewinds, and (below) backfills and republished messages.
-- Run by migration 0002 after schema.sql. Only the package consumers.store writes these tables.

-- How far the log reaches back ---------------------------------------------------------------------------------

-- Where each epoch of a source began: nothing from before the first is or was in the log.
create table source_epoch (
    source    uuid        not null,
    epoch     integer     not null,
    begun_lsn bigint      not null,
    begun_at  timestamptz not null default now(),
    primary key (source, epoch)
);

-- The latest commit of each epoch in a closed partition: a search by time or LSN passes over partitions that end before.
create table log_extent (
    partition    text        not null,
    source       uuid        not null,
    epoch        integer     not null,
    committed_at timestamptz not null,
    commit_lsn   bigint      not null,
    primary key (partition, source, epoch)
);

-- The latest commit of each epoch that went away with a dropped partition.
create table log_lost (
    source       uuid        not null,
    epoch        integer     not null,
    committed_at timestamptz not null,
    commit_lsn   bigint      not null,
    primary key (source, epoch)
);

-- The first message of a source that was committed at p_time or later (p_lsn null), or, of the changes as captured, at
-- p_lsn of p_epoch or later; null when there is none. Commit times are the source's and need not be in order.
create function sequin_find(p_source uuid, p_consumer uuid, p_time timestamptz, p_epoch integer, p_lsn bigint)
returns bigint language plpgsql stable set enable_seqscan = off set enable_sort = off set jit = off as $$
declare
    r       record;
    v_found bigint;
begin
    for r in select * from log_partition p order by p.from_id loop
        continue when r.measured and not exists (
            select from log_extent e where e.partition = r.name and e.source = p_source
            and (e.committed_at >= p_time or e.epoch > p_epoch or e.epoch = p_epoch and e.commit_lsn >= p_lsn));
        if p_lsn is null then
            select m.id into v_found from messages m
             where m.source = p_source and m.id >= r.from_id and m.id < r.to_id and m.committed_at >= p_time
               and (m.consumer is null or m.consumer = p_consumer)
             order by m.id limit 1;
        else
            select m.id into v_found from messages m
             where m.source = p_source and m.id >= r.from_id and m.id < r.to_id and m.consumer is null
               and (m.epoch > p_epoch or m.epoch = p_epoch and m.commit_lsn >= p_lsn)
             order by m.id limit 1;
        end if;
        if found then
            return v_found;
        end if;
    end loop;
    return null;
end $$;

-- The oldest message of a row still in the log, or the newest: by the index that closed partitions have on their keys.
create function sequin_find_row(p_source uuid, p_consumer uuid, p_relations integer[], p_key text, p_last boolean)
returns bigint language sql stable
set enable_seqscan = off set enable_indexscan = off set enable_indexonlyscan = off set jit = off as $$
    select case when p_last then max(f.id) else min(f.id) end from (
        select m.id from messages m
         where m.key = p_key and m.source::text = p_source::text and m.relation = any (p_relations)  -- as text: not by the other index
           and (m.consumer is null or m.consumer = p_consumer)
        offset 0) f
$$;

-- How many messages beyond its position are for a consumer, when there are fewer than p_limit; else about how many: as many
-- as among the first p_limit that were looked at. And when the first of them was committed. Not declared stable: see sequin_seen.
create function sequin_estimate(p_consumer uuid, p_limit integer, out messages bigint, out first_committed_at timestamptz)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off as $$
declare
    v_pos       consumer_position;
    v_actions   text[];
    v_relations integer[];
    v_looked    bigint;
    v_from      bigint;
    v_to        bigint;
    v_last      bigint;
begin
    select p.* into v_pos from consumer_position p where p.consumer = p_consumer order by p.version desc limit 1;
    select c.actions, array(select r.id from relation_version r where r.source = v_pos.source and (c.tables = '{}'
               or r.schema_name || '.' || r.table_name = any (c.tables) or r.schema_name || '.*' = any (c.tables)))
      into v_actions, v_relations from consumers_consumer c where c.id = p_consumer;
    select count(*), min(x.id), max(x.id), count(*) filter (where x.hit), min(x.committed_at) filter (where x.id = x.first)
      into v_looked, v_from, v_to, messages, first_committed_at
      from (select y.*, min(y.id) filter (where y.hit) over () as first from (
            select m.id, m.committed_at,
                   m.consumer is not distinct from p_consumer or (m.consumer is null
                   and case m.action when 'I' then 'insert' when 'U' then 'update' when 'D' then 'delete' when 'T' then 'truncate'
                       end = any (v_actions)
                   and m.relation = any (v_relations) and (m.epoch <> v_pos.start_epoch or m.commit_lsn >= v_pos.start_lsn)) as hit
            from messages m where m.source = v_pos.source and m.id > v_pos.position order by m.id limit p_limit) y) x;
    if v_looked = p_limit then
        select max(m.id) into v_last from messages m where m.source = v_pos.source;
        messages := messages * (v_last - v_from + 1) / (v_to - v_from + 1);
    end if;
end $$;

-- Rewind -------------------------------------------------------------------------------------------------------

-- Move a consumer back, so that everything with an id above p_to comes again, in order, under the name p_replay. Its
-- leases end: what of them lies up to p_to is due again at once, and the receipts are void. What is parked above p_to goes,
-- because the log brings it again. `lost_to`: set instead when the log no longer reaches back so far, and nothing is done.
-- A point ahead of the position moves nothing: nothing is ever skipped.
create function sequin_rewind(p_consumer uuid, p_to bigint, p_replay uuid, out moved boolean, out place bigint, out lost_to bigint)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set jit = off as $$
declare
    v_pos      consumer_position;
    v_floor    bigint;
    v_first    record;
    v_grps     bigint[];
    v_returned integer;
    v_out      integer;
    v_parked   bigint;
    v_dead     bigint;
begin
    perform pg_advisory_xact_lock(hashtextextended(p_consumer::text, 0));
    select p.* into v_pos from consumer_position p where p.consumer = p_consumer order by p.version desc limit 1 for update;
    place := v_pos.position;
    moved := false;
    if v_pos.consumer is null or p_to >= v_pos.position then
        return;
    end if;
    -- Held against the raising of the floor, which looks at the positions afterwards.
    select f.id into v_floor from log_floor f for share;
    if p_to + 1 < v_floor then
        lost_to := v_floor;
        return;
    end if;

    select coalesce(array_agg(distinct g) filter (where g is not null), '{}') into v_grps
      from leases l, unnest(l.ids, l.grps, l.grp2s) u(id, grp, grp2), unnest(array[u.grp, u.grp2]) g
     where l.consumer = p_consumer;
    with ended as (
        delete from leases l where l.consumer = p_consumer returning l.ids, l.grps, l.grp2s, l.counts
    ), returned as (
        insert into parked (consumer, source, grp, grp2, first_id, ids, reason, deliver_count)
        select p_consumer, v_pos.source, u.grp, u.grp2, u.id, array[u.id], 'retry', u.count
        from ended e, unnest(e.ids, e.grps, e.grp2s, e.counts) u(id, grp, grp2, count) where u.id <= p_to
        returning 1
    )
    select (select count(*) from returned), coalesce((select sum(cardinality(e.ids)) from ended e), 0) into v_returned, v_out;
    update parked p set lease_token = null where p.consumer = p_consumer and p.lease_token is not null;

    with gone as (
        delete from parked p where p.consumer = p_consumer and p.first_id > p_to
        returning p.reason, cardinality(p.ids) as n
    ), cut as (
        update parked p set ids = k.ids
        from parked o, lateral (select array_agg(x order by x) as ids from unnest(o.ids) x where x <= p_to) k
        where o.id = p.id and p.consumer = p_consumer and p.first_id <= p_to and p.ids[cardinality(p.ids)] > p_to
        returning p.reason, cardinality(o.ids) - cardinality(k.ids) as n
    )
    select coalesce(sum(x.n) filter (where x.reason <> 'dead'), 0), coalesce(sum(x.n) filter (where x.reason = 'dead'), 0)
      into v_parked, v_dead
      from (select * from gone union all select * from cut) x;

    -- It may have begun later than this: from here on it takes what was before its beginning too.
    select m.commit_lsn, m.epoch into v_first from messages m
     where m.source = v_pos.source and m.id > p_to and m.consumer is null order by m.id limit 1;
    update consumer_position p
       set version = v_pos.version + 1, position = p_to, out_count = 0, acked_count = p.acked_count + p.out_count - v_out,
           parked_count = p.parked_count + v_returned - v_parked,
           dead_count = p.dead_count - v_dead, start_id = least(p.start_id, p_to),
           start_lsn = case when v_first.epoch < p.start_epoch then 0  -- LSNs compare within a history only
                            when v_first.epoch = p.start_epoch then least(p.start_lsn, v_first.commit_lsn) else p.start_lsn end,
           replay = p_replay,
           -- A rewind that is not worked off yet is taken in.
           replay_from = case when p.position < p.replay_to then least(p.replay_from, p_to) else p_to end,
           replay_to = greatest(p.replay_to, p.position)
     where p.consumer = p_consumer and p.version = v_pos.version;
    -- What filters have judged ahead was judged by the start of before.
    update consumers_consumer c set updated_at = clock_timestamp() where c.id = p_consumer;
    perform sequin_promote(p_consumer, v_grps);
    perform pg_notify('sequin_consumer', p_consumer::text), pg_notify('sequin_config', 'consumer:' || p_consumer);
    place := p_to;
    moved := true;
end $$;

-- Backfills ----------------------------------------------------------------------------------------------------

-- A table's rows on their way into the log as read messages for one consumer; or what of the log is republished to it.
create table backfills (
    id             uuid        primary key,
    consumer       uuid        not null,
    source         uuid        not null,
    kind           text        not null default 'backfill' check (kind in ('backfill', 'republish')),
    table_name     text        not null,              -- schema.table; empty: republished from the log
    "where"        text        not null default '',
    sort_column    text        not null default '',   -- empty: the primary key
    start_value    text,                              -- of the sort column, inclusive
    since          timestamptz,                       -- of the log, inclusive
    until          timestamptz,                       -- exclusive
    status         text        not null default 'running' check (status in ('running', 'paused', 'completed', 'cancelled', 'failed')),
    reason         text        not null default '',   -- why it failed, or what it waits for
    created_at     timestamptz not null default clock_timestamp(),
    ended_at       timestamptz,
    rows_estimated bigint,
    rows_done      bigint      not null default 0,    -- those left out included
    rows_left_out  bigint      not null default 0,    -- overtaken by a change that the consumer gets as such
    rate           double precision,                  -- rows a second, lately
    rate_at        timestamptz,
    -- Where it is. Saved with the rows that are appended, in one transaction.
    parts          jsonb,                             -- what to read: [{"oid", "table", "leaf"}, …]
    part           integer     not null default 0,
    place          jsonb,                             -- within the part; null: at its beginning
    to_id          bigint,                            -- of the log: up to here, when it is republished
    replay         uuid,                              -- in metadata.replay_id of what is republished
    number         bigint      not null default 0,    -- of rows read: their commit_idx
    barrier_xid    bigint      not null default 0,    -- transactions older than this have to end first
    seen_id        bigint,                            -- messages up to here are seen by every snapshot from now on
    page_rows      integer     not null default 200,
    -- Who works on it, and when again.
    holder         uuid,
    held_until     timestamptz,
    worked_at      timestamptz,
    due_at         timestamptz not null default now(),
    waits_for      bigint,                            -- the reached LSN, in waits_epoch
    waits_epoch    integer,
    wants_lsn      bigint                             -- what has been read is appended once this is reached
) with (fillfactor = 50);
create index backfills_running on backfills (source) where status = 'running';  -- read by readers and by workers
create index backfills_consumer on backfills (consumer, created_at);

-- Rows read and not appended yet, at most 500 under one snapshot. A cache: after a crash of the store they are read again.
create unlogged table backfill_chunks (
    backfill  uuid    not null,
    number    bigint  not null,
    page      bigint  not null,
    epoch     integer not null,
    from_xid  bigint  not null,  -- the snapshot: xmin, xmax and the transactions that ran
    to_xid    bigint  not null,
    running   bigint[] not null,
    low       bigint,            -- set on standbys, whose snapshots do not list what is running
    high      bigint  not null,  -- whatever the snapshot sees was committed below it
    relation  integer not null,
    table_oid bigint  not null,
    read_at   timestamptz not null,
    part      integer not null,  -- where reading goes on after this chunk
    place     jsonb,
    is_last   boolean not null,
    keys      text[]  not null,
    records   text[]  not null,
    unchanged text[],            -- of rows that are too large: the columns left out
    seen_id   bigint,            -- messages up to here are seen by its snapshot
    looked_id bigint,            -- up to here the log was searched for changes that are not
    gone      integer[] not null default '{}',  -- rows that such a change has overtaken, counted from 1
    staged_at timestamptz not null default clock_timestamp(),
    primary key (backfill, number)
);
alter table backfill_chunks alter column keys set storage external, alter column records set storage external;

-- The last message that every snapshot from this one on sees, as far as the log went when p_last_id was its end. Not declared
-- stable, as nothing is that comes upon a hot table first: it would read by its caller's snapshot, which may be older than what is
-- in a table that was emptied and filled again meanwhile (hot.py), and find it empty.
create function sequin_seen(p_source uuid, p_last_id bigint, p_xmin bigint, p_xmax bigint, p_xip bigint[], p_standby boolean)
returns bigint language sql set jit = off as $$
    select coalesce((select min(m.id) - 1 from messages m
                     where m.source = p_source and m.consumer is null and m.id <= p_last_id and m.xid >= p_xmin
                       and (p_standby or m.xid >= p_xmax or m.xid = any (p_xip))
                       and m.epoch = (select p.epoch from capture_progress p where p.source = p_source)), p_last_id)
$$;

-- What rows of this shape are told apart by: the columns of the key, with their types, or all of them.
create function sequin_told_apart_by(p_relation integer) returns jsonb language sql stable as $$
    select case when r.primary_key = '{}' then r.columns
                else (select jsonb_agg(c.value order by k.n) from unnest(r.primary_key) with ordinality k(name, n)
                      left join jsonb_array_elements(r.columns) c on c.value ->> 'name' = k.name) end
    from relation_version r where r.id = p_relation
$$;

-- Look for changes that a chunk's snapshot does not see in the log after p_from, up to p_to: rows with such a change are
-- overtaken by it, if the consumer gets it. `again`: the rows have to be read again under a newer snapshot. `first_unseen`:
-- the first such change of any table. Not declared stable: see sequin_seen.
create function sequin_overtaken(p_backfill backfills, p_chunk backfill_chunks, p_from bigint, p_to bigint,
                                 out gone integer[], out again text, out first_unseen bigint)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
set plan_cache_mode = force_generic_plan as $$
declare
    v_pos     consumer_position;
    v_actions "char"[];
    v_keys    text[];   -- with a change that this consumer gets
    v_below   text[];   -- with one from before its start
    v_old     text[];   -- rows without a key as they were
    v_changed boolean;
begin
    select p.* into v_pos from consumer_position p where p.consumer = p_backfill.consumer order by p.version desc limit 1;
    select array(select case a when 'insert' then 'I' when 'update' then 'U' when 'delete' then 'D' when 'truncate' then 'T'
                        end::"char" from unnest(c.actions) a) into v_actions
      from consumers_consumer c where c.id = p_backfill.consumer;
    if v_pos.start_epoch = p_chunk.epoch and coalesce(p_chunk.low, p_chunk.high) < v_pos.start_lsn then
        again := 'the server has not come to the consumer''s start yet';
        return;
    end if;
    with unseen as materialized (
        select m.id, m.table_oid = p_chunk.table_oid as ours, m.relation, m.action, m.key, m.old_key,
               m.id > v_pos.start_id and (m.epoch <> v_pos.start_epoch or m.commit_lsn >= v_pos.start_lsn) as started
        from messages m
        where m.source = p_backfill.source and m.id > p_from and m.id <= p_to and m.consumer is null and m.epoch = p_chunk.epoch
          and case when p_chunk.low is null then m.xid >= p_chunk.to_xid or m.xid = any (p_chunk.running)
                   else m.commit_lsn > p_chunk.low or m.xid >= p_chunk.from_xid end
    )
    select min(u.id), bool_or(u.ours),
           case when bool_or(u.ours and u.action = 'T') then 'the table was truncated'
                when bool_or(u.ours and u.key ~ '[[,]null[],]') then 'a row was changed whose key the source did not send'
                -- Its rows could not be found among those read: the same key may be written in another way.
                when exists (select from (select distinct x.relation from unseen x where x.ours and x.relation <> p_chunk.relation) y
                             where sequin_told_apart_by(y.relation) is distinct from sequin_told_apart_by(p_chunk.relation))
                then 'rows were changed that are told apart by other columns now' end,
           array_agg(u.key) filter (where u.ours and u.started and u.action = any (v_actions))
               || array_agg(u.old_key) filter (where u.ours and u.started and u.action = any (v_actions) and u.old_key is not null),
           array_agg(u.key) filter (where u.ours and not u.started)
               || array_agg(u.old_key) filter (where u.ours and not u.started and u.old_key is not null)
      into first_unseen, v_changed, again, v_keys, v_below
      from unseen u;
    gone := '{}';
    if v_changed is not true or p_chunk.keys = '{}' then
        again := null;
        return;
    end if;
    if p_chunk.keys[1] <> '[]' then
        gone := coalesce((select array_agg(k.n::integer) from unnest(p_chunk.keys) with ordinality k(key, n)
                          where k.key in (select unnest(v_keys)) and k.n <> all (p_chunk.gone)), '{}');
        if p_chunk.keys && v_below then
            again := 'a change from before the consumer''s start is not visible on the source yet';
        end if;
        return;
    end if;
    -- Rows without a key are known by what is in them; of several that are equal, as many go as were changed.
    select array_agg(o.record) into v_old from (
        select case when m.action = 'D' then m.record else sequin_old_record(m.record, m.changes) end as record
        from messages m
        where m.source = p_backfill.source and m.id > p_from and m.id <= p_to and m.consumer is null and m.epoch = p_chunk.epoch
          and m.table_oid = p_chunk.table_oid and m.action in ('U', 'D') and m.action = any (v_actions)
          and case when p_chunk.low is null then m.xid >= p_chunk.to_xid or m.xid = any (p_chunk.running)
                   else m.commit_lsn > p_chunk.low or m.xid >= p_chunk.from_xid end) o;
    gone := coalesce((select array_agg(r.n::integer) from (
                select k.n, k.record, row_number() over (partition by k.record order by k.n) as nth
                from unnest(p_chunk.records) with ordinality k(record, n) where k.n <> all (p_chunk.gone)) r
             join (select record, count(*) as n from unnest(v_old) record group by record) o
               on o.record = r.record and r.nth <= o.n), '{}');
end $$;

-- A row as it was before an update, written as capture writes it.
create function sequin_old_record(p_record text, p_changes text) returns text language sql immutable as $$
    select '{' || string_agg(to_json(r.key)::text || ':' || coalesce(c.value, r.value), ',' order by r.n) || '}'
    from (select key, value::text, n from json_each(replace(p_record, '\u0000', '\u0001')::json) with ordinality x(key, value, n)) r
    left join (select key, value::text from json_each(replace(p_changes, '\u0000', '\u0001')::json) x(key, value)) c using (key)
$$;

-- Search the log for changes newer than the next chunk, without the append lock.
create function sequin_look(p_backfill uuid, p_holder uuid) returns void language plpgsql
set plan_cache_mode = force_generic_plan as $$
declare
    b      backfills;
    c      backfill_chunks;
    v_last bigint;
    v_from bigint;
    o      record;
begin
    select * into b from backfills x where x.id = p_backfill and x.holder = p_holder and x.status = 'running';
    select * into c from backfill_chunks x where x.backfill = p_backfill order by x.number limit 1;
    v_from := coalesce(c.looked_id, greatest(b.seen_id, c.seen_id));
    -- What is visible: a message on its way may have a lower id than the sequence's last.
    select max(m.id) into v_last from messages m where m.source = b.source and m.id > v_from;
    if c.backfill is null or v_last is null then
        return;
    end if;
    select * into o from sequin_overtaken(b, c, v_from, v_last);
    perform from backfills x where x.id = p_backfill and x.holder = p_holder and x.status = 'running' for update;  -- before its chunks, as everybody
    if not found then
        return;
    end if;
    if o.again is not null then
        delete from backfill_chunks x where x.backfill = p_backfill;
        update backfills x set reason = 'reads again: ' || o.again where x.id = p_backfill;
        return;
    end if;
    update backfill_chunks x set looked_id = v_last, gone = x.gone || o.gone where x.backfill = p_backfill and x.number = c.number;
    if c.looked_id is null then
        update backfills x set seen_id = coalesce(o.first_unseen - 1, v_last) where x.id = p_backfill;
    end if;
end $$;

-- Append the next chunk to the log of the source, in one short transaction under the append lock, and move the backfill on.
-- `outcome`: appended; completed, with it; waiting, as the log does not reach the chunk's high watermark yet; empty, as
-- nothing is staged; search, as more than p_much messages have to be searched first; again, because all that is staged has
-- to be read again; lost, as somebody else works on it or it was paused or cancelled.
create function sequin_append_chunk(p_backfill uuid, p_holder uuid, p_sequence_lock bigint, p_much bigint, out outcome text, out rows_read integer, out reason text)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
    b      backfills;
    c      backfill_chunks;
    p      capture_progress;
    v_last bigint;
    v_from bigint;
    v_gone integer[];
    v_rows integer;
    v_end  boolean;
    o      record;
begin
    perform set_config('synchronous_commit', 'off', true);
    select * into b from backfills x where x.id = p_backfill and x.holder = p_holder and x.status = 'running' for update;
    if not found then
        outcome := 'lost';
        return;
    end if;
    select * into c from backfill_chunks x where x.backfill = p_backfill order by x.number limit 1;
    if not found then
        outcome := 'empty';
        return;
    end if;
    select * into p from capture_progress x where x.source = b.source;
    if p.epoch = c.epoch and p.reached_lsn < c.high then
        outcome := 'waiting';
        return;
    end if;
    v_from := coalesce(c.looked_id, greatest(b.seen_id, c.seen_id));
    select max(m.id) into v_last from messages m where m.source = b.source and m.id > v_from;
    if v_last - v_from > p_much then
        outcome := 'search';
        return;
    end if;
    perform pg_advisory_xact_lock_shared(p_sequence_lock);
    select * into p from capture_progress x where x.source = b.source for no key update;
    if p.epoch <> c.epoch then
        outcome := 'again';
        reason := 'the source has begun another history';
    else
        select i.last_value into v_last from messages_id i;  -- nobody else appends for this source now
        select * into o from sequin_overtaken(b, c, v_from, v_last);
        if o.again is not null then
            outcome := 'again';
            reason := o.again;
        end if;
    end if;
    if outcome = 'again' then
        delete from backfill_chunks x where x.backfill = p_backfill;
        return;
    end if;
    v_gone := c.gone || o.gone;
    rows_read := cardinality(c.keys);
    insert into messages (source, relation, table_oid, action, key, xid, commit_lsn, commit_idx, committed_at, epoch, record,
                          unchanged, old_values_known, consumer, backfill, replay)
    -- No commit has this LSN: what the snapshot sees lies below it, what the log brings later above.
    select b.source, c.relation, c.table_oid, 'R', u.key, 0, c.high - 1, b.number + u.n - 1, c.read_at, c.epoch, u.record,
           c.unchanged[u.n], true, b.consumer, b.id, b.replay
    from unnest(c.keys, c.records) with ordinality u(key, record, n)
    where u.n <> all (v_gone) order by u.n;
    get diagnostics v_rows = row_count;
    update capture_progress x set messages = x.messages + v_rows where x.source = b.source and v_rows > 0;
    v_end := c.is_last;
    update backfills x
       set rows_done = x.rows_done + rows_read, rows_left_out = x.rows_left_out + cardinality(v_gone), number = x.number + rows_read,
           part = c.part, place = c.place, reason = '', status = case when v_end then 'completed' else x.status end,
           ended_at = case when v_end then clock_timestamp() end,
           seen_id = case when c.looked_id is null then coalesce(o.first_unseen - 1, v_last) else x.seen_id end
     where x.id = p_backfill;
    delete from backfill_chunks x where x.backfill = p_backfill and (x.number = c.number or v_end);
    if v_rows > 0 then
        perform pg_notify('sequin_consumer', b.consumer::text);
    end if;
    outcome := case when v_end then 'completed' else 'appended' end;
end $$;

-- Republishing -------------------------------------------------------------------------------------------------

-- Messages of the log that may be republished, p_count of them looked at behind p_after and up to p_to: those for all or for
-- this consumer, committed from p_since on and before p_until. Copies made by another republish are not copied again.
create function sequin_candidates(p_source uuid, p_consumer uuid, p_after bigint, p_to bigint, p_count integer,
                                  p_since timestamptz, p_until timestamptz, out ids bigint[], out last_id bigint)
language sql stable set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off as $$
    select coalesce(array_agg(x.id order by x.id) filter (where x.hit), '{}'), max(x.id)
    from (select m.id, (m.consumer is null or m.consumer = p_consumer and (m.replay is null or m.backfill is not null))
                       and m.committed_at >= coalesce(p_since, '-infinity') and m.committed_at < coalesce(p_until, 'infinity') as hit
          from messages m where m.source = p_source and m.id > p_after and m.id <= p_to order by m.id limit p_count) x
$$;

-- Append copies of these messages (ascending ids) for one consumer; the caller has begun nothing that locks before. Returns how many.
create function sequin_copy(p_consumer uuid, p_source uuid, p_sequence_lock bigint, p_ids bigint[], p_replay uuid) returns integer
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
    v_rows integer;
begin
    perform pg_advisory_xact_lock_shared(p_sequence_lock);
    perform from capture_progress x where x.source = p_source for no key update;
    insert into messages (source, relation, table_oid, action, key, old_key, xid, commit_lsn, commit_idx, committed_at, epoch,
                          record, changes, unchanged, old_values_known, annotations, consumer, backfill, replay)
    select m.source, m.relation, m.table_oid, m.action, m.key, m.old_key, m.xid, m.commit_lsn, m.commit_idx, m.committed_at,
           m.epoch, m.record, m.changes, m.unchanged, m.old_values_known, m.annotations, p_consumer, m.backfill, p_replay
    from messages m where m.source = p_source and m.id = any (p_ids) and m.id >= p_ids[1] and m.id <= p_ids[cardinality(p_ids)]
      and (m.consumer is null or m.consumer = p_consumer)
    order by m.id;
    get diagnostics v_rows = row_count;
    update capture_progress x set messages = x.messages + v_rows where x.source = p_source;
    perform pg_notify('sequin_consumer', p_consumer::text);
    return v_rows;
end $$;

-- Append copies of these messages for the consumer of a republish, and move it on to p_place. `outcome`: appended; completed,
-- with it; lost, as somebody else works on it or it was paused or cancelled.
create function sequin_append_copies(p_backfill uuid, p_holder uuid, p_sequence_lock bigint, p_ids bigint[], p_place bigint,
                                     p_is_last boolean, out outcome text)
language plpgsql set enable_seqscan = off set enable_bitmapscan = off set jit = off set plan_cache_mode = force_generic_plan as $$
declare
    b      backfills;
    v_rows integer := 0;
begin
    perform set_config('synchronous_commit', 'off', true);
    select * into b from backfills x where x.id = p_backfill and x.holder = p_holder and x.status = 'running' for update;
    if not found then
        outcome := 'lost';
        return;
    end if;
    if p_ids <> '{}' then
        v_rows := sequin_copy(b.consumer, b.source, p_sequence_lock, p_ids, b.replay);
    end if;
    update backfills x
       set rows_done = x.rows_done + v_rows, place = to_jsonb(p_place), reason = '',
           status = case when p_is_last then 'completed' else x.status end,
           ended_at = case when p_is_last then clock_timestamp() end
     where x.id = p_backfill;
    outcome := case when p_is_last then 'completed' else 'appended' end;
end $$;
