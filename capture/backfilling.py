"""Get on with backfills: one step is one turn on one of them, and never waits.

A turn appends what may be appended and reads ahead, up to READ_AHEAD pages; when neither can be done it ends, and the backfill
is due again once the log has reached what it waits for. `pages` reads the source, the store's `BackfillWork` keeps what was
read and moves it into the log.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Callable
from uuid import UUID, uuid4

import psycopg
from django.conf import settings
from django.db import connection

from capture.disk import shortage
from capture.pages import Busy, Page, SourcePages, TooSlow, Untranslatable
from capture.published import NotReadable, Part, Published
from consumers import gaps, republishing
from consumers.filters.column_types import table_of
from consumers.filters.grammar import Refused, parse
from consumers.filters.rewriting import row_condition
from consumers.models import Source
from consumers.source_connection import SourceUnreachable, reason_of
from consumers.store.backfill_work import CHUNK_BYTES, CHUNK_ROWS, BackfillWork, Chunk, Job, Place

log = logging.getLogger(__name__)

SLICE_S = 1.0
READ_AHEAD = 4  # pages
KEEP_TURN_EVERY_S = 2.0
FIRST_ROWS, FEWEST_ROWS, MOST_ROWS = 200, 10, 10_000  # of a page
PAGE_AIM_S, PAGE_AIM_BYTES = 0.2, 2 * 1024 * 1024
SOON_S, LATER_S = 0.2, 2.0  # until something is tried again
TELL_EVERY_S = 10.0

_told_at: dict[UUID, float] = {}


class TurnLost(Exception):
    """It was paused or cancelled, or somebody else works on it."""


class Postponed(Exception):
    """Nothing can be done for now; the text says why, `again_in_s` when to look again."""

    def __init__(self, reason: str, again_in_s: float = LATER_S) -> None:
        self.again_in_s = again_in_s
        super().__init__(reason)


def step(slice_s: float = SLICE_S, alive: Callable[[], None] = lambda: None) -> bool:
    """Take a turn on the backfill that has waited longest. False when none is due. `alive` is called now and then."""
    with BackfillWork(uuid4()) as work:
        job = work.take_turn()
        if job is None:
            return False
        Turn(work, job, alive).run(slice_s)
    return True


class Turn:
    """One worker's turn on one backfill."""

    def __init__(self, work: BackfillWork, job: Job, alive: Callable[[], None]) -> None:
        self._work, self._job, self._alive = work, job, alive
        self._page_rows = job.page_rows
        self._rows = 0
        self._kept_at = time.monotonic()
        self._pages: SourcePages | None = None
        self._parts = None if job.parts is None else [Part(**part) for part in job.parts]
        self._search: republishing.Search | None = None

    def run(self, slice_s: float) -> None:
        """Get on until the slice is over or nothing can be done. What goes wrong is noted with the backfill."""
        began = time.monotonic()
        again_in_s, reason, blocked = 0.0, None, False
        try:
            while time.monotonic() - began < slice_s and not blocked:
                blocked = not self._get_on()
                self._keep_turn()
        except TurnLost:
            return
        except Postponed as why:
            again_in_s, reason = why.again_in_s, str(why)
        except (Busy, psycopg.errors.LockNotAvailable) as error:
            again_in_s, reason = SOON_S, f"waits: {error}" if isinstance(error, Busy) else None
        except (NotReadable, republishing.CannotJudge) as error:
            self._fail(str(error))
            return
        except psycopg.errors.InsufficientPrivilege as error:
            self._fail(self._privilege(error))
            return
        except (psycopg.DataError, psycopg.ProgrammingError) as error:  # of its `where`, say: it would come again
            self._fail(self._said(error))
            return
        except (SourceUnreachable, psycopg.Error, OSError) as error:
            again_in_s, reason = LATER_S, f"waits: {self._said(error)}"
            log.warning("backfill of table=%s waits: %s", self._job.table, self._said(error))
        finally:
            if self._pages is not None:
                self._pages.__exit__(None, None, None)
        took = time.monotonic() - began
        self._tell()
        self._work.yield_turn(
            self._job, page_rows=self._page_rows, blocked=blocked, rate=self._rows / took if self._rows else None,
            again_in_s=again_in_s, reason=reason,
        )  # fmt: skip

    # What there is to do ------------------------------------------------------------------------------------------------------

    def _get_on(self) -> bool:
        """Append a chunk, or read a page. False when there is nothing to do before the log gets on."""
        job = self._job
        self._demand_disk()
        if job.to_id is not None:
            return self._republish(job)
        done = self._work.append(job)
        if done.outcome == "lost":
            raise TurnLost
        if done.outcome == "again":
            log.info("backfill of table=%s reads again: %s", job.table, done.reason)
            raise Postponed(f"reads again: {done.reason}", SOON_S)
        self._rows += done.rows
        if done.outcome == "appended":
            return True
        if done.outcome == "completed":
            log.info("backfill completed table=%s rows=%s", job.table, job.rows_done + self._rows)
            if gaps.close_if_covered(job.source_id):
                log.info("gap closed: every table of every consumer was backfilled since")
            return False
        place = self._work.place(job)
        if place.is_complete or place.pages_staged >= READ_AHEAD:
            return False
        if why := self._work.waiting_for(job):
            raise Postponed(why, SOON_S)
        self._read(place)
        return True

    def _republish(self, job: Job) -> bool:
        """Copy what matches of the next messages of the log."""
        if why := self._work.waiting_for(job):
            raise Postponed(why, SOON_S)
        self._search = self._search or republishing.Search(job.consumer_id, job.where, job.table)
        done = republishing.get_on(self._work, job, self._search, self._keep_turn)
        if done.outcome == "lost":
            raise TurnLost
        self._rows += done.copies
        self._job = job._replace(place=done.place)
        if done.outcome == "completed":
            log.info("republished messages=%s", job.rows_done + self._rows)
        return done.outcome != "completed"

    def _read(self, place: Place) -> None:
        """Read the next page and stage it."""
        work, job = self._work, self._job
        pages = self._open()
        epoch, system, timeline = work.history(job)
        now = pages.identity()
        if now.system_identifier != system or (now.timeline is not None and now.timeline != timeline):
            raise Postponed("waits for capture to follow the source to its new server")
        last_id = work.last_id(job)
        try:
            part = self._begin(pages)[place.part]
            table, page = pages.read(
                part, job.sort_column, place.place, self._page_rows, condition=self._condition, start_value=job.start_value
            )
        except Untranslatable as error:
            log.info("backfill of table=%s takes texts unconverted: %s", job.table, error)
            pages.read_unconverted()
            return
        except TooSlow:
            self._too_slow()
            return
        if page.snapshot.xmin < job.barrier_xid:
            raise Postponed("waits for transactions to end that were open when the table was published")
        seen = self._seen(last_id, page)
        self._adapt(page)
        relation = work.register_relation(epoch, job.source_id, table.shape)
        for chunk in self._chunks(place, page, table, epoch, relation, seen):
            if not work.stage(job, chunk):
                raise TurnLost

    def _seen(self, last_id: int, page: Page) -> int | None:
        """What the page's snapshot sees of the log: found with the first page, and again when much has been logged since."""
        work, job = self._work, self._job
        if job.seen_id is None:
            seen = work.seen(job, last_id, page.snapshot)
            if work.begin_from(job, seen):
                self._job = job._replace(seen_id=seen)
                return None
        return work.seen_if_far(job, last_id, page.snapshot)

    def _chunks(self, place: Place, page: Page, table: Published, epoch: int, relation: int, seen: int | None) -> list[Chunk]:
        """The page's rows in chunks, the last of which says where reading goes on. A page without rows is one, too."""
        starts = [0]
        size = 0
        for index, row in enumerate(page.rows):
            if index - starts[-1] >= CHUNK_ROWS or (size + len(row.record) > CHUNK_BYTES and index > starts[-1]):
                starts.append(index)
                size = 0
            size += len(row.record)
        assert self._parts is not None
        part_ends = page.is_last
        all_ends = part_ends and place.part + 1 >= len(self._parts)
        chunks = []
        for start, end in zip(starts, [*starts[1:], len(page.rows)], strict=True):
            is_end = end == len(page.rows)
            part, behind = place.part, page.place if is_end else page.places[end - 1]
            if is_end and part_ends and not all_ends:
                part, behind = place.part + 1, None
            rows = page.rows[start:end]
            chunks.append(
                Chunk(
                    place.page + 1, epoch, page.snapshot, page.high, relation, table.shape.oid, page.read_at, part, behind,
                    is_end and all_ends, [row.key for row in rows], [row.record for row in rows],
                    [row.unchanged for row in rows] if any(row.unchanged for row in rows) else None, seen,
                )
            )  # fmt: skip
        return chunks

    # How it goes ----------------------------------------------------------------------------------------------------------------

    def _begin(self, pages: SourcePages) -> list[Part]:
        """Find out what there is to read, the first time."""
        if self._parts is None:
            parts = pages.parts(self._job.table)
            tables = [pages.look(part, self._job.sort_column) for part in parts]
            estimated = sum(pages.rows_estimated(table, self._job.start_value, self._condition) for table in tables)
            self._work.set_parts(self._job, [part._asdict() for part in parts], estimated)
            self._parts = parts
            log.info("backfill began table=%s rows_estimated=%s", self._job.table, estimated)
        return self._parts

    def _condition(self, table: Published) -> str | None:
        """The backfill's `where`, over the rows of the table itself."""
        if not self._job.where:
            return None
        connection.ensure_connection()
        try:
            return row_condition(parse(self._job.where), table_of(connection.connection, table.shape), "t")
        except Refused as refused:
            raise NotReadable(f"where does not fit the table any more: {refused.reason}") from None

    def _open(self) -> SourcePages:
        if self._pages is None:
            source = Source.objects.get(pk=self._job.source_id)
            if source.status != "active":
                raise Postponed(f"waits: the source {source.name} is paused")
            self._pages = SourcePages(source, self._keep_turn)
        return self._pages

    def _keep_turn(self) -> None:
        now = time.monotonic()
        if now - self._kept_at >= KEEP_TURN_EVERY_S:
            self._kept_at = now
            self._alive()
            if not self._work.keep_turn(self._job):
                raise TurnLost

    def _adapt(self, page: Page) -> None:
        """Let the next page take about PAGE_AIM_S, and hold about PAGE_AIM_BYTES."""
        factor = min(2.0, PAGE_AIM_S / max(page.took_s, 0.001), PAGE_AIM_BYTES / max(page.size, 1))
        looked_at = max(page.looked_at, FEWEST_ROWS)
        wanted = int((looked_at if page.looked_at < self._page_rows and not page.is_last else self._page_rows) * factor)
        self._page_rows = min(MOST_ROWS, max(FEWEST_ROWS, wanted))

    def _too_slow(self) -> None:
        if self._page_rows <= FEWEST_ROWS:
            by = self._job.sort_column or "its key"
            self._fail(f"{FEWEST_ROWS} rows could not be read within the time limit: is there an index on {by}?")
            raise TurnLost
        self._page_rows = max(FEWEST_ROWS, self._page_rows // 4)

    def _demand_disk(self) -> None:
        if why := shortage(settings.SEQUIN_STORE_DIRECTORY, settings.SEQUIN_MIN_FREE_DISK):
            raise Postponed(f"waits: {why}")

    def _tell(self) -> None:
        """Log now and then how far it is."""
        if self._rows and time.monotonic() - _told_at.get(self._job.id, 0.0) > TELL_EVERY_S:
            _told_at[self._job.id] = time.monotonic()
            done, estimated = self._work.progress(self._job)
            log.info("backfill of table=%s: rows=%s of about %s", self._job.table or "(log)", done, estimated)

    def _fail(self, reason: str) -> None:
        log.warning("backfill failed table=%s: %s", self._job.table, reason)
        self._work.fail(self._job, reason)

    def _privilege(self, error: psycopg.Error) -> str:
        role = self._pages.source.username if self._pages is not None else ""
        if "row-level security" in str(error):
            return f'{self._said(error)}. Run on the source: ALTER ROLE "{role}" BYPASSRLS;'
        return f"{self._said(error)}. Run on the source: GRANT SELECT ON {self._job.table} TO \"{role}\";"

    def _said(self, error: BaseException) -> str:
        return str(error) if isinstance(error, SourceUnreachable) else reason_of(error, self._pages.source if self._pages else None)
