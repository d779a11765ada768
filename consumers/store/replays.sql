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
-- as among the first p_limit that were looked at. And when the first of them was committed.
create function sequin_estimate(p_consumer uuid, p_limit integer, out messages bigint, out first_committed_at timestamptz)
language plpgsql stable set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off as $$
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
    select count(*) into v_returned from returned;
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
       set version = v_pos.version + 1, position = p_to, out_count = 0, parked_count = p.parked_count + v_returned - v_parked,
           dead_count = p.dead_count - v_dead, start_id = least(p.start_id, p_to),
           start_lsn = case when v_first.epoch = p.start_epoch then least(p.start_lsn, v_first.commit_lsn) else p.start_lsn end,
           replay = p_replay,
           -- A rewind that is not worked off yet is taken in.
           replay_from = case when p.position < p.replay_to then least(p.replay_from, p_to) else p_to end,
           replay_to = greatest(p.replay_to, p.position)
     where p.consumer = p_consumer and p.version = v_pos.version;
    perform sequin_promote(p_consumer, v_grps);
    perform pg_notify('sequin_consumer', p_consumer::text), pg_notify('sequin_config', 'consumer:' || p_consumer);
    place := p_to;
    moved := true;
end $$;
