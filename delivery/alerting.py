"""Tell people: episodes of what holds, one notice to each destination when one begins, one when it is over.

`judge` and `send` are rounds of run_workers. Any number of processes may run them: judging is done by one at a time, and a
notice is taken before it is sent.
"""
from __future__ import annotations

import json
import logging
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.core.mail import send_mail
from django.db import connection, transaction
from django.utils import timezone

from consumers import alert_rules
from consumers.alert_models import AlertDestination, AlertEpisode, AlertNotice, AlertRule
from consumers.store.locks import ALERT_LOCK
from delivery.push import once

log = logging.getLogger(__name__)

CALM_S = 30  # so long must it not hold to be over
RETRY_S, LONGEST_RETRY_S = 30, 1800
GIVE_UP_AFTER = timedelta(days=1)
TIMEOUT_S = 10.0
NOTICES_A_ROUND = 20
EPISODES_KEPT = timedelta(days=90)


def judge(now: datetime | None = None) -> bool:
    """Open, fire and end episodes by what holds now. False: another process is at it."""
    now = now or timezone.now()
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_try_advisory_xact_lock(%s)", [ALERT_LOCK])
            row = cursor.fetchone()
        if not row or not row[0]:
            return False
        rules = {rule.kind: rule for rule in AlertRule.objects.all()}
        held = {(rules[one.kind].pk, one.subject): one for one in alert_rules.holding(now)}
        open_episodes = {(one.rule_id, one.subject): one for one in AlertEpisode.objects.filter(ended_at=None).select_related("rule")}
        for key, condition in held.items():
            episode = open_episodes.get(key) or AlertEpisode(rule=rules[condition.kind], subject=condition.subject, began_at=now)
            _holds(episode, condition.text, now)
        for key, episode in open_episodes.items():
            if key not in held:
                _is_absent(episode, now)
        AlertEpisode.objects.filter(ended_at__lt=now - EPISODES_KEPT).delete()
    return True


def send(now: datetime | None = None) -> int:
    """Send the notices that are due. Returns how many went out."""
    sent = 0
    for _ in range(NOTICES_A_ROUND):
        notice = _take(now or timezone.now())
        if notice is None:
            break
        error = _deliver(notice)
        notice.error = error[:500]
        notice.sent_at = None if error else timezone.now()
        notice.save(update_fields=["error", "sent_at"])
        if error:
            log.warning("alert to %s failed: %s", notice.destination.name, error[:200])
        sent += not error
    return sent


def _holds(episode: AlertEpisode, text: str, now: datetime) -> None:
    known = (episode.text, episode.absent_since, episode.fired_at)
    episode.text, episode.absent_since = text, None
    fires = episode.fired_at is None and now - episode.began_at >= timedelta(seconds=episode.rule.after_s)
    if fires:
        episode.fired_at = now
    if episode.pk is None or (episode.text, episode.absent_since, episode.fired_at) != known:
        episode.save()
    if fires:
        log.warning("alert: %s: %s", episode.subject, text)
        _notify(episode, now, over=False)


def _is_absent(episode: AlertEpisode, now: datetime) -> None:
    """It does not hold at the moment: after a while it is over. One that never fired is simply forgotten."""
    if episode.fired_at is None:
        episode.delete()
        return
    episode.absent_since = episode.absent_since or now
    if now - episode.absent_since >= timedelta(seconds=CALM_S):
        episode.ended_at = now
        log.info("alert is over: %s: %s", episode.subject, episode.rule)
        _notify(episode, now, over=True)
    episode.save()


def _notify(episode: AlertEpisode, now: datetime, *, over: bool) -> None:
    if over:
        # What nobody has been told needs no end; and who was told is told of it.
        told = AlertNotice.objects.filter(episode=episode, over=False)
        told.filter(sent_at=None).delete()
        destinations = [notice.destination for notice in told.exclude(sent_at=None).select_related("destination")]
    else:
        chosen = AlertDestination.objects.filter(enabled=True).prefetch_related("rules")
        destinations = [one for one in chosen if not one.rules.all() or episode.rule in one.rules.all()]
    for destination in destinations:
        AlertNotice.objects.get_or_create(episode=episode, destination=destination, over=over, defaults={"due_at": now})


def _take(now: datetime) -> AlertNotice | None:
    """The next notice due, put off so that nobody else sends it meanwhile."""
    with transaction.atomic():
        notice: AlertNotice | None = (
            AlertNotice.objects.select_for_update(skip_locked=True, of=("self",))
            .filter(sent_at=None, due_at__lte=now, destination__enabled=True, episode__began_at__gt=now - GIVE_UP_AFTER)
            .select_related("destination", "episode__rule")
            .order_by("due_at")
            .first()
        )
        if notice is not None:
            notice.attempts += 1
            notice.due_at = now + timedelta(seconds=min(LONGEST_RETRY_S, RETRY_S * 2 ** min(notice.attempts - 1, 10)))
            notice.save(update_fields=["attempts", "due_at"])
    return notice


def _deliver(notice: AlertNotice) -> str:
    """What went wrong, or nothing."""
    destination, episode = notice.destination, notice.episode
    title = f"{'Over' if notice.over else 'Alert'}: {episode.subject}: {episode.rule}"
    if destination.kind == "email":
        return _mail(destination, title, f"{title}\n\n{episode.text}\n\nSince {episode.began_at:%Y-%m-%d %H:%M:%S} UTC.\n")
    body = _slack(title, episode) if destination.kind == "slack" else _webhook(notice)
    outcome = once.post(
        url=destination.url, body=json.dumps(body, ensure_ascii=False).encode(), timeout_s=TIMEOUT_S,
        secrets=destination.signing_secret, webhook_id=f"alert_{episode.pk}_{'over' if notice.over else 'fired'}",
    )  # fmt: skip
    return "" if outcome.ok else outcome.error or "failed"


def _webhook(notice: AlertNotice) -> dict[str, Any]:
    episode = notice.episode
    return {
        "type": "alert.over" if notice.over else "alert.fired",
        "rule": episode.rule.kind,
        "subject": episode.subject,
        "text": episode.text,
        "began_at": episode.began_at.isoformat(),
        "ended_at": episode.ended_at.isoformat() if episode.ended_at else None,
    }


def _slack(title: str, episode: AlertEpisode) -> dict[str, Any]:
    plain = episode.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {"text": f"*{title}*\n{plain}"}


def _mail(destination: AlertDestination, subject: str, text: str) -> str:
    if not settings.EMAIL_CONFIGURED:
        return "no mail server is set: EMAIL_URL"
    try:
        send_mail(" ".join(subject.split())[:200], text, settings.DEFAULT_FROM_EMAIL, destination.recipients())
    except OSError as error:  # smtplib's errors are OSErrors
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return ""
