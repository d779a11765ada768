"""Filters: a consumer's `where`, real SQL, decided by Postgres itself.

`grammar` parses and allows, `rewriting` puts the columns of a message in, both pure; `checking` asks Postgres before a
filter is saved; `plans` makes the statement that judges a stretch of the log, and `scouting` runs it for claims.
"""
