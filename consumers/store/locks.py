"""The numbers of the store's advisory locks, all of them here: two that were the same would keep strangers waiting for each other.

Besides these a consumer has one of its own, hashed from its id, and so has a source for its shapes (schema.sql).
"""
from __future__ import annotations

SOURCE_LOCK_CLASS = 0x5E9  # with the source: one reader each
PARTITION_LOCK = 0x5E9_0001  # one process makes partitions at a time
SEQUENCE_LOCK = 0x5E9_0002  # appends hold it shared, a jump of the sequence alone
MAINTENANCE_LOCK = 0x5E9_0003  # one process maintains at a time; that may take long, so no append ever waits for it
REWRITE_LOCK = 0x5E9_0004  # one process rewrites hot tables
COUNTING_LOCK = 0x5E9_0005  # one process counts
ALERT_LOCK = 0x5E9_0006  # one process judges alerts
