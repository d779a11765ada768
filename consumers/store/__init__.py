"""The store: the log, the positions, the leases and the parked messages; the only writer of these tables.

`appender` is capture's face, `claims` is delivery's, `lifecycle` is the console's and the API's, `partitions` keeps the
log cut and pruned. The work is done by the functions of `schema.sql`: one round trip each, in one transaction each.
"""
